"""Layers of the deployable graphs: the model's own weights, laid out for a runtime.

Tokens travel as rows, shape (sequences * length, width): a product with a weight is then one
`Gemm` with its bias, and every reshape has a constant shape wherever the length is constant. The
residual stream, LayerNorm and softmax are fp32 in every precision; only the products and what
lies between two of them are not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

# Added to the scores of tokens that may not be seen. Its exponential is zero in every precision,
# and unlike -inf it is a number of fp16 and gives no NaN in a row that is masked throughout.
MASKED = -1e4


def constant(values: Tensor, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """Make weights of a graph from values, contiguous and without gradient."""
    return nn.Parameter(values.detach().to(dtype).contiguous(), requires_grad=False)


def normalise(vectors: Tensor) -> Tensor:
    """Scale vectors, shape (rows, D), to unit norm; zeros stay zeros."""
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / norms.clamp_min(1e-12)


def as_convolution(weight: Tensor) -> Tensor:
    """A matrix (outputs, inputs) as the kernel of a convolution over a single pixel."""
    return weight[:, :, None, None]


def convolve_rows(rows: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply rows (rows, inputs) with a kernel of `as_convolution`, in fp32.

    For the products that stay fp32 in an fp16 graph: TensorRT for RTX 1.7 has no fp32 matrix
    products for GPUs of compute capability 7.5, and refuses a graph for a single one, but it has
    fp32 convolutions.
    """
    return F.conv2d(rows[:, :, None, None], kernel, bias).view(-1, kernel.shape[0])


class Norm(nn.Module):
    """A LayerNorm in fp32, whatever it is given."""

    def __init__(self, source: nn.LayerNorm) -> None:
        super().__init__()
        self.weight = constant(source.weight)
        self.bias = constant(source.bias)
        self.eps = source.eps

    def forward(self, rows: Tensor) -> Tensor:
        """Normalise rows, shape (rows, width); fp32."""
        return F.layer_norm(rows, self.weight.shape, self.weight, self.bias, self.eps)


class Affine(nn.Module):
    """Rows times a matrix plus a bias, in the precision of its weights.

    The matrix is stored as (inputs, outputs): as (outputs, inputs) the graph would hold a
    transpose, which each session computes again when it loads.

    Args:
        weight: Shape (outputs, inputs), as torch stores it.
        bias: Shape (outputs,).
        dtype: What the products are computed in.
    """

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = constant(weight.t(), dtype)
        self.bias = constant(bias, dtype)

    def forward(self, rows: Tensor) -> Tensor:
        """Map rows (rows, inputs) to (rows, outputs)."""
        return torch.addmm(self.bias, rows.to(self.weight.dtype), self.weight)


class ConvolvedAffine(nn.Module):
    """As `Affine` in fp32, for an fp16 graph; see `convolve_rows`.

    Args:
        weight: Shape (outputs, inputs).
        bias: Shape (outputs,).
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = constant(as_convolution(weight))
        self.bias = constant(bias)

    def forward(self, rows: Tensor) -> Tensor:
        """Map rows (rows, inputs) to (rows, outputs)."""
        return convolve_rows(rows.float(), self.weight, self.bias)


class LastProjection(nn.Module):
    """The last product of a tower, without bias and always in fp32.

    Args:
        matrix: Shape (inputs, outputs), as CLIP stores it.
        dtype: What the tower's other products are computed in; in an fp16 graph this one becomes
            a convolution, see `convolve_rows`.
    """

    def __init__(self, matrix: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.convolved = dtype != torch.float32
        self.weight = constant(as_convolution(matrix.t()) if self.convolved else matrix)

    def forward(self, rows: Tensor) -> Tensor:
        """Map rows (rows, inputs), fp32, to (rows, outputs)."""
        if self.convolved:
            return convolve_rows(rows, self.weight)
        output: Tensor = rows @ self.weight
        return output


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention as plain products, which every exporter and runtime computes alike.

    Args:
        query: Scaled already, shape (sequences, heads, queries, head width).
        key: Shape (sequences, heads, head width, length).
        value: Shape (sequences, heads, length, head width).
        mask: Added to the scores, broadcastable to (sequences, heads, queries, length).

    Returns:
        Rows, shape (sequences * queries, width).
    """
    scores = (query @ key).float()
    if mask is not None:
        scores = scores + mask
    mixed = torch.softmax(scores, dim=-1).to(value.dtype) @ value
    heads, head_width = value.shape[1], value.shape[3]
    return mixed.transpose(1, 2).contiguous().view(-1, heads * head_width)


class Attention(nn.Module):
    """Self-attention with one product for query, key and value; the scale is in its weights.

    Args:
        source: Has `in_proj_weight`, `in_proj_bias`, `out_proj` and `num_heads`.
        dtype: What the products are computed in.
    """

    def __init__(self, source: nn.MultiheadAttention, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads = source.num_heads
        self.width = source.embed_dim
        weight, bias = _scaled_in_projection(source)
        self.in_projection = Affine(weight, bias, dtype)
        self.out_projection = _affine(source.out_proj, dtype)

    def forward(self, rows: Tensor, length: int, mask: Tensor | None = None) -> Tensor:
        """Mix rows (sequences * length, width) within each sequence; the same shape."""
        head_width = self.width // self.num_heads
        shape = (-1, length, self.num_heads, head_width)
        query, key, value = self.in_projection(rows).split(self.width, dim=-1)
        mixed = _attend(
            query.view(shape).transpose(1, 2),
            key.view(shape).permute(0, 2, 3, 1),
            value.view(shape).transpose(1, 2),
            mask,
        )
        output: Tensor = self.out_projection(mixed)
        return output


class PooledAttention(nn.Module):
    """Attention of one query per sequence to all of its tokens.

    Args:
        source: Has `in_proj_weight`, `in_proj_bias`, `out_proj` and `num_heads`.
        dtype: What the products are computed in.
        fp32_output: Whether the last product is computed in fp32 whatever the others are.
    """

    def __init__(self, source: Any, dtype: torch.dtype, *, fp32_output: bool = False) -> None:
        super().__init__()
        self.num_heads = source.num_heads
        self.width = source.in_proj_weight.shape[1]
        weight, bias = _scaled_in_projection(source)
        self.query = Affine(weight[: self.width], bias[: self.width], dtype)
        self.key_and_value = Affine(weight[self.width :], bias[self.width :], dtype)
        out = source.out_proj
        convolved = fp32_output and dtype != torch.float32
        self.out_projection: nn.Module = (
            ConvolvedAffine(out.weight, out.bias) if convolved else _affine(out, dtype)
        )

    def forward(
        self, queries: Tensor, rows: Tensor, length: int, mask: Tensor | None = None
    ) -> Tensor:
        """Mix rows (sequences * length, width) for queries (sequences, width); (sequences, ...)."""
        head_width = self.width // self.num_heads
        shape = (-1, length, self.num_heads, head_width)
        key, value = self.key_and_value(rows).split(self.width, dim=-1)
        mixed = _attend(
            self.query(queries).view(-1, self.num_heads, 1, head_width),
            key.view(shape).permute(0, 2, 3, 1),
            value.view(shape).transpose(1, 2),
            mask,
        )
        output: Tensor = self.out_projection(mixed)
        return output


class Mlp(nn.Module):
    """Two products with an activation in between."""

    def __init__(
        self, up: nn.Linear, activation: nn.Module, down: nn.Linear, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.up = _affine(up, dtype)
        self.activation = activation
        self.down = _affine(down, dtype)

    def forward(self, rows: Tensor) -> Tensor:
        """Map rows (rows, width) to the same shape."""
        output: Tensor = self.down(self.activation(self.up(rows)))
        return output


class Block(nn.Module):
    """A pre-norm transformer block.

    Args:
        source: open_clip's `ResidualAttentionBlock`.
        dtype: What the products are computed in.
    """

    def __init__(self, source: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = Norm(source.ln_1), Norm(source.ln_2)
        self.attention = Attention(source.attn, dtype)
        self.mlp = Mlp(source.mlp.c_fc, source.mlp.gelu, source.mlp.c_proj, dtype)

    def forward(self, rows: Tensor, length: int, mask: Tensor | None = None) -> Tensor:
        """Map rows (sequences * length, width), fp32, to the same shape."""
        mixed: Tensor = self.attention(self.norm_1(rows), length, mask)
        rows = rows + mixed.float()
        output: Tensor = self.mlp(self.norm_2(rows))
        return rows + output.float()


class PooledBlock(nn.Module):
    """The last pre-norm block of a tower, for the one token of each sequence that is used.

    Its keys and values come from all tokens; query, projection and MLP run for one.

    Args:
        source: open_clip's `ResidualAttentionBlock`.
        dtype: What the products are computed in.
    """

    def __init__(self, source: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = Norm(source.ln_1), Norm(source.ln_2)
        self.attention = PooledAttention(source.attn, dtype)
        self.mlp = Mlp(source.mlp.c_fc, source.mlp.gelu, source.mlp.c_proj, dtype)

    def forward(
        self,
        rows: Tensor,
        length: int,
        pick: Callable[[Tensor], Tensor],
        mask: Tensor | None = None,
    ) -> Tensor:
        """Map rows (sequences * length, width), fp32, to one row per sequence.

        `pick` takes the token of each sequence from rows, (sequences, width).
        """
        normed = self.norm_1(rows)
        mixed: Tensor = self.attention(pick(normed), normed, length, mask)
        picked = pick(rows) + mixed.float()
        output: Tensor = self.mlp(self.norm_2(picked))
        return picked + output.float()


def _affine(source: nn.Linear, dtype: torch.dtype) -> Affine:
    return Affine(source.weight, source.bias, dtype)


def _scaled_in_projection(source: Any) -> tuple[Tensor, Tensor]:
    """Weight (3 * width, width) and bias of an attention, the query's part scaled."""
    weight, bias = source.in_proj_weight.detach().clone(), source.in_proj_bias.detach().clone()
    width = weight.shape[1]
    scale = (width // source.num_heads) ** -0.5
    weight[:width] *= scale
    bias[:width] *= scale
    return weight, bias
