"""The visual prompts that fuse frame features, as the temporal graph takes them.

Each maps features (B, T, D), fp32, to features (B, D), fp32, neither normalised; T may be free
except for `transf_cls`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actionclip_deploy.export.layers import (
    Attention,
    Block,
    Mlp,
    Norm,
    PooledAttention,
    constant,
)


class MeanHead(nn.Module):
    """`meanp`: the mean over T."""

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, T, D) to (B, D)."""
        return features.mean(dim=1)


class LstmHead(nn.Module):
    """`lstm`: one LSTM layer, its input added, and the mean over T.

    The layer is ONNX's own LSTM and nothing that PyTorch can compute: torch 2.15 exports its LSTM
    with its weights cut up and put together again in the graph.
    """

    def __init__(self, source: Any) -> None:
        super().__init__()
        lstm = source.lstm_visual
        self.width = lstm.hidden_size
        self.weight = constant(_onnx_gates(lstm.weight_ih_l0)[None])  # (1, 4 D, D)
        self.recurrence = constant(_onnx_gates(lstm.weight_hh_l0)[None])
        biases = (_onnx_gates(lstm.bias_ih_l0), _onnx_gates(lstm.bias_hh_l0))
        self.bias = constant(torch.cat(biases)[None])  # (1, 8 D)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, T, D) to (B, D)."""
        num_clips, num_frames, width = features.shape
        output = torch.onnx.ops.symbolic(
            "LSTM",
            (features.transpose(0, 1), self.weight, self.recurrence, self.bias),
            {"hidden_size": self.width},
            dtype=features.dtype,
            shape=(num_frames, 1, num_clips, width),
        )
        return output.mean(dim=0).view(-1, width) + features.mean(dim=1)


def _onnx_gates(weight: Tensor) -> Tensor:
    """Order the four gates, stacked in the first dimension, as ONNX has them.

    Source:
        torch: input, forget, cell, output. ONNX: input, output, forget, cell.
    """
    enter, forget, cell, output = weight.detach().chunk(4)
    return torch.cat((enter, output, forget, cell))


class Conv1dHead(nn.Module):
    """`conv1d`: a depthwise convolution, its input added, and the mean over T.

    As in the original, the memory of (B, T, D) is read as (B, D, T), which is no transpose.
    """

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.weight = constant(source.shift.weight)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, T, D) to (B, D)."""
        num_frames, width = features.shape[1:]
        x = features.view(-1, width, num_frames)
        mixed = F.conv1d(x, self.weight, padding=1, groups=width)
        # The mean over T comes before the transpose back, which it makes needless.
        return mixed.mean(dim=2) + features.mean(dim=1)


class TransformerHead(nn.Module):
    """`transf`: pre-norm blocks over T, a residual around them, and the mean over T."""

    def __init__(self, source: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.positions = constant(source.frame_position_embeddings.weight)
        self.blocks = nn.ModuleList(Block(block, dtype) for block in source.transformer.resblocks)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, T, D) to (B, D)."""
        num_frames, width = features.shape[1:]
        rows = (features + self.positions[:num_frames]).view(-1, width)
        for block in self.blocks:
            rows = block(rows, num_frames)
        return (rows.view(-1, num_frames, width) + features).mean(dim=1)


class ClassTokenHead(nn.Module):
    """`transf_cls`: the class token of a post-norm encoder over a fixed T."""

    def __init__(self, source: Any, dtype: torch.dtype) -> None:
        super().__init__()
        encoder = source.transformer
        table = encoder.pos_embed.detach()[0].clone()  # (1 + T, D)
        table[0] += encoder.cls_token.detach()[0, 0]
        self.table = constant(table)
        *layers, last = encoder.transformer_enc.layers
        self.layers = nn.ModuleList(_PostNormLayer(layer, dtype) for layer in layers)
        self.last_layer = _PooledPostNormLayer(last, dtype)
        self.norm = Norm(encoder.transformer_enc.norm)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, T, D) to (B, D)."""
        length, width = self.table.shape
        rows = (F.pad(features, (0, 0, 1, 0)) + self.table).view(-1, width)
        for layer in self.layers:
            rows = layer(rows, length)
        output: Tensor = self.norm(self.last_layer(rows, length))
        return output


class _PostNormLayer(nn.Module):
    def __init__(self, source: nn.TransformerEncoderLayer, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = Norm(source.norm1), Norm(source.norm2)
        self.attention = Attention(source.self_attn, dtype)
        self.mlp = Mlp(source.linear1, nn.ReLU(), source.linear2, dtype)

    def forward(self, rows: Tensor, length: int) -> Tensor:
        rows = self.norm_1(rows + self.attention(rows, length).float())
        output: Tensor = self.norm_2(rows + self.mlp(rows).float())
        return output


class _PooledPostNormLayer(nn.Module):
    """The last layer, for the class token alone."""

    def __init__(self, source: nn.TransformerEncoderLayer, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = Norm(source.norm1), Norm(source.norm2)
        self.attention = PooledAttention(source.self_attn, dtype)
        self.mlp = Mlp(source.linear1, nn.ReLU(), source.linear2, dtype)

    def forward(self, rows: Tensor, length: int) -> Tensor:
        tokens = rows.view(-1, length, rows.shape[-1])[:, 0]
        tokens = self.norm_1(tokens + self.attention(tokens, rows, length).float())
        output: Tensor = self.norm_2(tokens + self.mlp(tokens).float())
        return output


def temporal_head(model: Any, dtype: torch.dtype) -> nn.Module:
    """Build the head of a model's visual prompt.

    Args:
        model: The `ActionCLIP` whose frames are independent.
        dtype: What the products of a transformer are computed in. The other heads stay fp32:
            `meanp` and `conv1d` have next to no arithmetic, and an LSTM carries the rounding of
            each step into the next.
    """
    source = model.visual_prompt
    match model.config.visual_prompt:
        case "transf":
            return TransformerHead(source, dtype)
        case "transf_cls":
            return ClassTokenHead(source, dtype)
        case "lstm":
            return LstmHead(source)
        case "conv1d":
            return Conv1dHead(source)
        case _:
            return MeanHead()
