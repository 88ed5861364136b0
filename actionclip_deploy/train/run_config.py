"""The configuration of a training run: a YAML file, and `KEY=VALUE` on top of it.

    model      what is trained and where it starts
    data       which videos, labels and templates, and how frames are drawn and changed
    loss       what is minimised
    optimiser  learning rates and decay
    schedule   how long, and how the learning rate changes
    run        batch, precision, seed, output, checkpoints

Defaults are those of the original. A key that is not known is refused.

omegaconf reads the files, puts them over each other and parses overrides. Its structured configs
were tried for the sections too: they know neither `Literal` nor bounds, and report a wrong value
in several lines without the allowed ones. So the sections are pydantic's, which check.

Source:
    sallymmx/ActionCLIP@31c34df configs/k400/k400_train.yaml, train.py, utils/solver.py,
    datasets/transforms_ss.py.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from yaml import YAMLError

from actionclip_deploy.errors import TrainingError
from actionclip_deploy.files import read_text
from actionclip_deploy.manifest import MAX_INPUT_SIZE, MAX_NUM_FRAMES
from actionclip_deploy.tokenizer import NUM_TOKENS
from actionclip_deploy.video import MAX_PIXELS

# Written out for the type checker: `VISUAL_PROMPTS` and `COMBINED_PROMPTS` of the model.
VisualPrompt = Literal[
    "joint",
    "shift",
    "meanp",
    "conv1d",
    "lstm",
    "transf",
    "transf_cls",
    "shift+conv1d",
    "shift+lstm",
    "shift+transf",
    "shift+transf_cls",
]
AnnotationFormat = Literal[
    "original", "videos", "kinetics", "ucf101", "hmdb51", "multi-label", "folders"
]
# Every number has two bounds: none of them is near what a run can want, and beyond them is a slip
# of the keyboard that would take the machine's memory or end in infinite weights.
_Count: TypeAlias = Annotated[int, Field(gt=0, le=10**9)]
_Number: TypeAlias = Annotated[int, Field(ge=0, le=10**9)]
_Size: TypeAlias = Annotated[int, Field(gt=0, le=2**20)]
_Layers: TypeAlias = Annotated[int, Field(gt=0, le=1000)]
_Batch: TypeAlias = Annotated[int, Field(gt=0, le=2**20)]
_Positive: TypeAlias = Annotated[float, Field(gt=0, le=1e6)]
_NonNegative: TypeAlias = Annotated[float, Field(ge=0, le=1e6)]
_Decay: TypeAlias = Annotated[float, Field(ge=0, lt=1)]
_Seed: TypeAlias = Annotated[int, Field(ge=0, lt=2**63)]
_Frames: TypeAlias = Annotated[int, Field(gt=0, le=MAX_NUM_FRAMES)]
_Pixels: TypeAlias = Annotated[int, Field(gt=0, le=MAX_INPUT_SIZE)]
_Workers: TypeAlias = Annotated[int, Field(ge=0, le=1024)]

LossKind = Literal["kl-softmax", "kl-normalised", "cross-entropy-diagonal"]


class Section(BaseModel):
    """Part of a configuration: cannot be changed, and knows no other keys than its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _check_switch(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[info.field_name or ""]
        # Pydantic takes true for the number 1.
        if isinstance(value, bool) and field.annotation is not bool:
            raise ValueError(f"{str(value).lower()} is a switch, which this key is not; correct it")
        return value


class Sizes(Section):
    """Sizes of a new model with a ViT; attention heads are 64 channels wide, and at least one.

    Attributes:
        embed_dim: D.
        input_size: Height and width of a frame, in pixels.
        vision_layers: Blocks of the visual tower.
        vision_width: Channels of its tokens.
        patch_size: Pixels on a patch's side.
        text_layers: Blocks of the textual tower.
        text_width: Channels of its tokens.
        vision_mlp_ratio: Hidden width of a visual block's MLP over `vision_width`.
        context_length: Largest L, in tokens.
        vocab_size: Rows of the token table.
        position_std: Standard deviation of the visual positions before training; None for CLIP's,
            which is so small next to the patches that a short run never learns where things are.
    """

    embed_dim: _Size
    input_size: _Pixels
    vision_layers: _Layers
    vision_width: _Size
    patch_size: _Pixels
    text_layers: _Layers
    text_width: _Size
    vision_mlp_ratio: _Positive = 4.0
    context_length: _Count = 77
    vocab_size: _Count = NUM_TOKENS
    position_std: _Positive | None = None


class ModelSection(Section):
    """What is trained; exactly one of `checkpoint`, `backbone` and `sizes` says where it starts.

    Attributes:
        checkpoint: Path of a checkpoint of any supported family, `open_clip:MODEL/TAG`, or
            `motions` for the default model.
        backbone: open_clip's name of a ViT or ResNet, for random weights of its sizes.
        sizes: Sizes of a new model with random weights.
        family: Whose format the checkpoint has; "auto" finds out from the keys.
        base: Checkpoint that supplies the tower that `checkpoint` lacks.
        visual_prompt: How time enters. None takes the checkpoint's, or `transf` for a new model.
        num_frames: T.
        new_prompt: Whether the visual prompt gets new random weights, whatever the checkpoint has.
        prompt_layers: Blocks of a new `transf` or `transf_cls`; None for the original's 6.
        prompt_std: Standard deviation of the linear layers of a new visual prompt; None for the
            original's 0.02, which fits D = 512 and long runs.
        prompt_position_std: Standard deviation of the temporal positions of a new visual prompt;
            None for the original's. If they are small compared with the features, the order of
            frames is the last thing that a run learns.
        random_visual: Whether the checkpoint's visual tower gets new random weights (table 2).
        random_textual: The same for the textual tower.
        freeze: Which towers keep their weights (table 5). The visual prompt and the scale are
            trained in any case.
        classifier: Whether to train a linear layer over the labels instead of comparing with
            text: the unimodal baseline (table 1).
    """

    checkpoint: str | None = None
    backbone: str | None = None
    sizes: Sizes | None = None
    family: str = "auto"
    base: Path | None = None
    visual_prompt: VisualPrompt | None = None
    num_frames: _Frames = 8
    new_prompt: bool = False
    prompt_layers: _Layers | None = None
    prompt_std: _Positive | None = None
    prompt_position_std: _Positive | None = None
    random_visual: bool = False
    random_textual: bool = False
    freeze: Literal["none", "visual", "textual", "both"] = "none"
    classifier: bool = False

    @model_validator(mode="after")
    def _check_start(self) -> ModelSection:
        given = [n for n in ("checkpoint", "backbone", "sizes") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(
                f"{' and '.join(given) or 'none of them'} given; give exactly one of checkpoint, "
                "backbone and sizes"
            )
        if self.new_prompt and self.visual_prompt is None:
            raise ValueError("new_prompt is set; give the visual_prompt that it is to be")
        for name in ("prompt_layers", "prompt_std", "prompt_position_std"):
            if not self.has_new_prompt and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} is for a new visual prompt; leave it out with a checkpoint, or set "
                    "new_prompt"
                )
        return self

    @property
    def has_new_prompt(self) -> bool:
        """Whether the visual prompt starts with random weights for certain."""
        return self.checkpoint is None or self.new_prompt

    @property
    def random_towers(self) -> tuple[str, ...]:
        """The towers to draw anew, by the names that `model.load_checkpoint` has for them."""
        chosen = {"visual": self.random_visual, "text": self.random_textual}
        return tuple(tower for tower, is_random in chosen.items() if is_random)


class AugmentationSection(Section):
    """How frames are changed in training; every probability is that of a whole clip.

    Attributes:
        multi_scale_crop: Whether a clip is cropped at one of several scales and places; without
            it, the centre.
        flip: Probability of a horizontal flip. None for the original's 0.5, or for 0 where a
            label says left, right or a direction of turning.
        colour_jitter: Probability of other brightness, contrast, saturation and hue, which are
            drawn for each frame.
        grayscale: Probability of no colours.
        randaugment_operations: N of RandAugment, operations per frame; 0 for none.
        randaugment_magnitude: M of RandAugment, 0 to 30.
    """

    multi_scale_crop: bool = True
    flip: float | None = Field(default=None, ge=0, le=1)
    colour_jitter: float = Field(default=0.8, ge=0, le=1)
    grayscale: float = Field(default=0.2, ge=0, le=1)
    randaugment_operations: Annotated[int, Field(ge=0, le=100)] = 0
    randaugment_magnitude: float = Field(default=9.0, ge=0, le=30)


class DataSection(Section):
    """Which videos are trained on, and how.

    Attributes:
        annotations: The list of training videos, or a folder with a folder for each label.
        validation: The list of validation videos in the same format, or None.
        format: Format of both lists; a folder is read as `folders` unless another one is given.
        root: Folder that the paths in the lists start from; None for the list's own.
        split: Which split, where the format has several.
        image_template: File name of a frame, where a video is a folder of pictures.
        index_bias: Number of the first frame there.
        labels: Label file; None for the names of the folders in `annotations`.
        templates: Template file; None for the original's 16.
        label_only: Whether the bare label is the only template (table 3).
        few_shot: Videos per label to train on, drawn by the seed; None for all (figure 3).
        sampling: How the frames of a clip are drawn in training: one at random from each
            segment, or the centre of each.
        augmentation: How frames are changed.
        cache: Folder for the frames of every video file, decoded once, resized and uncompressed;
            None to decode a clip each time. It takes as many bytes as all frames have values:
            fine for small videos, 80 MB for ten seconds at 256 pixels. Clips from the centre are
            the same pixels; multi-scale crops are cut from the resized frames and are softer.
        workers: Processes that decode; 0 to decode in the training process.
        bad_videos: What to do about a video that gives no frames, or fewer than `min_frames`.
        min_frames: A video of fewer frames is too short.
        max_pixels: Most pixels of a frame; a video with more gives no frames.
    """

    annotations: Path
    validation: Path | None = None
    format: AnnotationFormat = "videos"
    root: Path | None = None
    split: _Count = 1
    image_template: str = "img_{:05d}.jpg"
    index_bias: _Number = 1
    labels: Path | None = None
    templates: Path | None = None
    label_only: bool = False
    few_shot: _Count | None = None
    sampling: Literal["random", "centre"] = "random"
    augmentation: AugmentationSection = Field(default_factory=AugmentationSection)
    cache: Path | None = None
    workers: _Workers = 4
    bad_videos: Literal["skip", "fail"] = "skip"
    min_frames: _Count = 1
    max_pixels: _Count = MAX_PIXELS

    @model_validator(mode="after")
    def _check_templates(self) -> DataSection:
        if self.label_only and self.templates is not None:
            raise ValueError("templates and label_only exclude each other; give one of them")
        if self.cache is not None and self.format == "original":
            raise ValueError(
                "cache is for video files, and format original has pictures; leave one"
            )
        return self


class LossSection(Section):
    """What is minimised.

    Attributes:
        kind: `kl-softmax` is the original's code: targets are the softmax of 10 for a positive
            and 0 for any other. `kl-normalised` is the paper: each of P positives has 1 / P.
            `cross-entropy-diagonal` takes a sample's own text as its only positive.
        target_scale: The 10 of `kl-softmax`.
        initial_scale: Multiplier of the cosine at the start; None for the model's own.
        learn_scale: Whether the multiplier is trained.
        max_scale: Bound of the multiplier; None for none, as in the original.
    """

    kind: LossKind = "kl-softmax"
    target_scale: _Positive = 10.0
    initial_scale: _Positive | None = None
    learn_scale: bool = True
    max_scale: _Positive | None = None


class OptimiserSection(Section):
    """AdamW.

    Attributes:
        lr: Learning rate of the textual tower and of the scale.
        visual_ratio: Learning rate of the visual tower over `lr`.
        prompt_ratio: Learning rate of the visual prompt, and of a classifier, over `lr`.
        betas: Decay of the running means of the gradient and of its square.
        eps: Added to the root of the latter.
        weight_decay: Decay of every parameter, biases and norms included.
    """

    lr: Annotated[float, Field(gt=0, le=100)] = 5e-6
    visual_ratio: _NonNegative = 1.0
    prompt_ratio: _NonNegative = 10.0
    betas: tuple[_Decay, _Decay] = (0.9, 0.98)
    eps: _Positive = 1e-8
    weight_decay: _NonNegative = 0.2


class ScheduleSection(Section):
    """The learning rate: linear from 0, then half a cosine down to 0, set anew at each step.

    Attributes:
        unit: What `length` and `warmup` count: passes over the videos, or optimiser steps.
        length: Of the whole run.
        warmup: Of the linear part.
    """

    unit: Literal["epochs", "steps"] = "epochs"
    length: Annotated[float, Field(gt=0, le=1e9)] = 50.0
    warmup: Annotated[float, Field(ge=0, le=1e9)] = 5.0

    @model_validator(mode="after")
    def _check_warmup(self) -> ScheduleSection:
        if self.warmup >= self.length:
            raise ValueError(
                f"warmup is {self.warmup:g} and length {self.length:g}; give a shorter warmup"
            )
        return self


class RunSection(Section):
    """How the run is done.

    Attributes:
        output: Folder for all that the run writes.
        batch_size: Clips of one contrastive batch, over all processes.
        accumulation: Batches per optimiser step. Each has its own contrast: two batches of 64
            are not one of 128.
        clip_norm: Largest norm of the gradient; None for no bound.
        ema_decay: Decay per step of a running mean of the weights, which is then what is
            validated and given out; None for none.
        precision: Of the arithmetic; weights are fp32 throughout.
        device: "auto" takes an accelerator where there is one.
        attention: "plain" multiplies matrices one after the other; on a CPU, and for a few dozen
            tokens, that is faster than the fused kernels that "fused" leaves to torch.
        seed: Of weights, order, frames, augmentation and templates.
        checkpoint_every: Steps between checkpoints.
        keep_last: Checkpoints that are kept.
        log_every: Steps between two lines of the log.
        validate_every: Steps between validations; None for one at the end.
    """

    output: Path
    batch_size: _Batch = 128
    accumulation: _Count = 1
    clip_norm: _Positive | None = None
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: Literal["auto", "cpu"] = "auto"
    attention: Literal["fused", "plain"] = "fused"
    seed: _Seed = 0
    checkpoint_every: _Count = 500
    keep_last: _Count = 2
    log_every: _Count = 10
    validate_every: _Count | None = None


# What may differ between a run and its continuation: none of it changes a weight.
FREE_KEYS = frozenset(
    {"data.root", "data.workers", "run.output", "run.checkpoint_every", "run.keep_last"}
    | {"run.log_every", "run.validate_every"}
)


class TrainConfig(Section):
    """The whole configuration; see the sections."""

    model: ModelSection
    data: DataSection
    loss: LossSection = Field(default_factory=LossSection)
    optimiser: OptimiserSection = Field(default_factory=OptimiserSection)
    schedule: ScheduleSection = Field(default_factory=ScheduleSection)
    run: RunSection

    def differences(self, other: TrainConfig) -> dict[str, tuple[Any, Any]]:
        """Keys with different values in the two, apart from those that change no weight."""
        own, others = (dict(_flatten(c.model_dump(mode="json"))) for c in (self, other))
        return {
            key: (own.get(key), others.get(key))
            for key in sorted(own.keys() | others.keys())
            if key not in FREE_KEYS and own.get(key) != others.get(key)
        }


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a configuration.

    Args:
        path: The YAML file. Under `base` it may name another file, relative to itself, whose
            keys hold where it says nothing else.
        overrides: Such as "optimiser.lr=1e-5", with values in YAML; later ones win.

    Raises:
        TrainingError: If the file cannot be read, or a key or value is not allowed.
    """
    return parse_config(_read_yaml(Path(path)), overrides, source=str(path))


def parse_config(
    data: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str = "the configuration"
) -> TrainConfig:
    """Check a configuration that is given as nested mappings.

    Args:
        data: Sections by name.
        overrides: As `load_config` takes them.
        source: Where it came from, for messages.

    Raises:
        TrainingError: If a key or value is not allowed.
    """
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not all(key.split(".")):
            raise TrainingError(
                f"{override!r} sets nothing; write a key of the configuration, '=' and a value, "
                "such as run.seed=3."
            )
    try:
        merged = OmegaConf.merge(
            OmegaConf.create(dict(data)), OmegaConf.from_dotlist(list(overrides))
        )
        return TrainConfig.model_validate(OmegaConf.to_container(merged, resolve=True))
    except ValidationError as exc:
        raise TrainingError(f"{source}: {_describe(exc)}") from exc
    except (YAMLError, OmegaConfBaseException, TypeError) as exc:
        given = " ".join(overrides) or source
        raise TrainingError(f"{given!r} cannot be read ({_one_line(exc)}); correct it.") from exc


def _read_yaml(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a YAML file, and below its keys those of its base."""
    text = read_text(path, "configuration", TrainingError)
    try:
        # It refuses a key that is given twice, and tags that would run code.
        data: Any = OmegaConf.load(io.StringIO(text))
    except (YAMLError, OmegaConfBaseException, OSError, RecursionError) as exc:
        # OSError is what OmegaConf makes of a number or a word alone.
        raise TrainingError(f"{path} is not valid YAML ({_one_line(exc)}); correct it.") from exc
    if not isinstance(data, DictConfig):
        raise TrainingError(
            f"{path} holds no mapping; give a YAML file with sections such as model, data and run."
        )
    base = data.pop("base", None)
    if base is not None:
        own = path.resolve()
        if own in above:
            raise TrainingError(f"{path} is its own base; name another file under base.")
        data = OmegaConf.merge(_read_yaml(path.parent / str(base), (*above, own)), data)
    content: Any = OmegaConf.to_container(data)
    return dict(content)


def _describe(exc: ValidationError) -> str:
    """The first thing that is wrong, in one sentence."""
    first = exc.errors(include_url=False)[0]
    *sections, _ = location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        section = ".".join(sections)
        known = dict(_keys_by_section(TrainConfig))
        nearest = get_close_matches(
            key, [f"{name}.{k}".lstrip(".") for name, keys in known.items() for k in keys], n=1
        )
        meant = f" (did you mean {nearest[0]!r}?)" if nearest else ""
        return (
            f"the key {key!r} is unknown{meant}; the keys of {section or 'the file'} are "
            f"{', '.join(known[section])}"
        )
    if first["type"] == "missing":
        return f"the key {key!r} is missing; give it in the file or as {key}=VALUE"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{key}: {message}"
    return f"{key} is {first['input']!r}: {message[0].lower()}{message[1:]}; correct it"


def _keys_by_section(section: type[BaseModel], name: str = "") -> Iterator[tuple[str, list[str]]]:
    yield name, list(section.model_fields)
    for key, field in section.model_fields.items():
        for candidate in (field.annotation, *get_args(field.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                yield from _keys_by_section(candidate, f"{name}.{key}".lstrip("."))


def _flatten(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _one_line(exc: Exception) -> str:
    return " ".join(str(exc).split())
