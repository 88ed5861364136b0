"""The model of a run: where it starts, which of its weights are trained, and what it computes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actionclip_deploy.errors import TrainingError
from actionclip_deploy.model import (
    PIXEL_MEAN,
    PIXEL_STD,
    ActionClipNetwork,
    ModelConfig,
    build_model,
    load_checkpoint,
)
from actionclip_deploy.model.config import HEAD_WIDTH, ORIGINAL_NORM_EPS
from actionclip_deploy.model.visual_prompts import INIT_STD

if TYPE_CHECKING:
    from actionclip_deploy.train.run_config import LossSection, ModelSection, Sizes

_DEFAULT_VISUAL_PROMPT = "transf"
_CLASSIFIER_STD = INIT_STD  # as the original draws every new linear layer
_POSITIONS = ("frame_position_embeddings.weight", "pos_embed", "time_embedding")

# Stored for the sake of the original's format and read by no forward pass.
_UNREAD_TABLE = "frame_position_embeddings.weight"
_PROMPTS_WITH_UNREAD_TABLE = ("lstm", "conv1d", "transf_cls")


class TrainedModel(nn.Module):
    """An ActionCLIP as it is trained: from bytes to embeddings, or to the logits of a classifier.

    Args:
        num_labels: C, to add a linear layer over the labels; None for a contrastive model.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self, model: ActionClipNetwork, *, num_labels: int | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.model = model
        self.classifier = None
        if num_labels is not None:
            self.classifier = nn.Linear(model.config.embed_dim, num_labels)
            nn.init.zeros_(self.classifier.bias)
            nn.init.normal_(
                self.classifier.weight,
                std=_CLASSIFIER_STD,
                generator=torch.Generator().manual_seed(seed),
            )
        self.register_buffer("pixel_mean", _channels(PIXEL_MEAN), persistent=False)
        self.register_buffer("pixel_std", _channels(PIXEL_STD), persistent=False)
        self._frozen: list[nn.Module] = []

    def forward(self, frames: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor] | Tensor:
        """Embed clips, uint8, (B, T, 3, S, S), and their texts, tokens (B, L).

        Returns:
            Embeddings of clips (B, D) and of texts (B, D), unit norm, float32, and the
            multiplier of their cosine; or the logits (B, C) of the classifier.
        """
        if self.classifier is not None:
            return self.classify(frames)
        scale: Tensor = self.model.towers.logit_scale.exp()
        return self.embed_clips(frames), self.embed_texts(tokens), scale

    def embed_clips(self, frames: Tensor) -> Tensor:
        """Embed clips, uint8, (B, T, 3, S, S), as (B, D), float32."""
        return F.normalize(self._features(frames).float(), dim=-1)

    def embed_texts(self, tokens: Tensor) -> Tensor:
        """Embed tokens (M, L) as (M, D), float32."""
        return F.normalize(self.model.encode_text_features(tokens).float(), dim=-1)

    def classify(self, frames: Tensor) -> Tensor:
        """Logits (B, C) of the classifier for clips, uint8, (B, T, 3, S, S)."""
        assert self.classifier is not None
        logits: Tensor = self.classifier(self._features(frames))
        return logits

    def _features(self, frames: Tensor) -> Tensor:
        pixels = (frames.to(torch.float32) / 255.0 - self.pixel_mean) / self.pixel_std
        return self.model.encode_video_features(pixels)

    def freeze(self, towers: str) -> None:
        """Keep the weights of towers as they are."""
        if towers in ("visual", "both"):
            self.model.towers.visual.requires_grad_(False)
            self._frozen.append(self.model.towers.visual)
        if towers in ("textual", "both"):
            self._freeze_text()

    def _freeze_text(self) -> None:
        for name, parameter in self.model.towers.named_parameters():
            if not name.startswith("visual.") and name != "logit_scale":
                parameter.requires_grad_(False)

    def freeze_unread(self) -> None:
        """Keep what the loss does not depend on: weight decay alone would wear it away.

        DistributedDataParallel, too, waits for a gradient of every trained parameter.
        """
        if self.model.config.head in _PROMPTS_WITH_UNREAD_TABLE:
            self.model.visual_prompt.get_parameter(_UNREAD_TABLE).requires_grad_(False)
        if self.classifier is not None:
            self._freeze_text()
            self.model.towers.logit_scale.requires_grad_(False)

    def train(self, mode: bool = True) -> TrainedModel:
        """Switch to training; frozen towers stay in evaluation, for the sake of batch norms."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self


def build_trained_model(
    section: ModelSection, loss: LossSection, *, num_labels: int, seed: int
) -> TrainedModel:
    """Build the model that a configuration asks for, as it is before the first step.

    Raises:
        TrainingError: If there is no such model, if the original's format, in which it is given
            out, cannot hold it, or if nothing is left to train.
        CheckpointError: If the checkpoint cannot be used.
    """
    try:
        model = _start(section, seed)
    except ValueError as exc:
        raise TrainingError(f"The model of the configuration cannot be built: {exc}.") from exc
    _check_format(model.config)
    _spread_prompt(model, section)
    trained = TrainedModel(model, num_labels=num_labels if section.classifier else None, seed=seed)
    scale = model.towers.logit_scale
    if loss.initial_scale is not None:
        scale.data.fill_(math.log(loss.initial_scale))
    scale.requires_grad_(loss.learn_scale)
    trained.freeze(section.freeze)
    trained.freeze_unread()
    if not any(parameter.requires_grad for parameter in trained.parameters()):
        raise TrainingError(
            f"Nothing is left to train with model.freeze {section.freeze}, visual prompt "
            f"{model.config.visual_prompt} and loss.learn_scale {str(loss.learn_scale).lower()}; "
            "freeze less."
        )
    return trained


def bound_scale(model: TrainedModel, max_scale: float | None) -> None:
    """Keep the multiplier of the cosine from growing beyond a bound."""
    if max_scale is not None:
        model.model.towers.logit_scale.data.clamp_(max=math.log(max_scale))


def _start(section: ModelSection, seed: int) -> ActionClipNetwork:
    if section.checkpoint is not None:
        return load_checkpoint(
            section.checkpoint,
            family=section.family,
            num_frames=section.num_frames,
            base=section.base,
            visual_prompt=section.visual_prompt,
            random_towers=section.random_towers,
            new_prompt=section.new_prompt,
            prompt_layers=section.prompt_layers,
            with_classifier=True,  # training goes on from its frames
            seed=seed,
        ).model
    if section.sizes is not None:
        config = _new_config(section.sizes)
    else:
        assert section.backbone is not None
        config = ModelConfig.from_open_clip(section.backbone, quick_gelu=True)
    if section.prompt_layers is not None:
        config = replace(config, prompt_layers=section.prompt_layers)
    prompt = section.visual_prompt or _DEFAULT_VISUAL_PROMPT
    config = config.with_visual_prompt(prompt, num_frames=section.num_frames)
    model = build_model(config, seed=seed)
    if section.sizes is not None and section.sizes.position_std is not None:
        positions = model.towers.visual.positional_embedding
        with torch.no_grad():
            positions.mul_(section.sizes.position_std / positions.std())
    return model


def _spread_prompt(model: ActionClipNetwork, section: ModelSection) -> None:
    """Give the linear layers and the positions of a new visual prompt other deviations."""
    layers = model.visual_prompt.named_modules()
    linear = {f"{name}.weight" for name, layer in layers if isinstance(layer, nn.Linear)}
    for name, weight in (
        *model.visual_prompt.named_parameters(),
        *((n, p) for n, p in model.towers.visual.named_parameters() if n == "time_embedding"),
    ):
        std = section.prompt_std if name in linear else None
        if name.endswith(_POSITIONS):
            std = section.prompt_position_std
        if std is not None:
            with torch.no_grad():
                weight.mul_(std / weight.std())


def _new_config(sizes: Sizes) -> ModelConfig:
    """The configuration that the importer will read off the weights' shapes again."""
    return ModelConfig(
        backbone="custom ViT",
        text_heads=max(sizes.text_width // HEAD_WIDTH, 1),
        vision_head_width=min(HEAD_WIDTH, sizes.vision_width),
        visual_prompt="meanp",
        **sizes.model_dump(exclude={"position_std"}),
    )


def _check_format(config: ModelConfig) -> None:
    if not config.quick_gelu or config.prompt_norm_eps != ORIGINAL_NORM_EPS:
        raise TrainingError(
            f"The start of the run has quick_gelu {config.quick_gelu} and LayerNorms of the "
            f"visual prompt with epsilon {config.prompt_norm_eps:g}; the original's format, in "
            f"which the result is written, means True and {ORIGINAL_NORM_EPS:g}: start from "
            "weights of OpenAI's CLIP or of the original."
        )


def _channels(values: tuple[float, float, float]) -> Tensor:
    return torch.tensor(values).reshape(3, 1, 1)
