"""Other forms of a graph, to build from where an engine of the graph itself is wrong.

Each gives the same numbers to the rounding of its precision and asks the compiler for something
else. An engine of any of them is verified like every other: what a version fuses is not known
before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from actionclip_deploy.runtimes.trt.attention_rewrites import (
    break_fusion,
    fold_heads,
    scale_scores,
    split_packed,
)
from actionclip_deploy.runtimes.trt.precision_rewrites import (
    fp32_attention,
    fp32_islands,
    to_bf16,
)


@dataclass(frozen=True)
class Rewrite:
    """One other form of a graph.

    Attributes:
        name: As reports and the JSON of engines have it.
        description: What it does, as one sentence.
        apply: Takes an `onnx.ModelProto` with its weights, which it leaves as it is, and gives a
            new one; None where there is nothing to rewrite.
    """

    name: str
    description: str
    apply: Callable[[Any], Any]


# In the order in which a repair tries them.
REWRITES: dict[str, Rewrite] = {
    rewrite.name: rewrite
    for rewrite in (
        Rewrite(
            "fp32-islands",
            "LayerNorm, softmax and the last normalisation are computed in fp32.",
            fp32_islands,
        ),
        Rewrite(
            "fp32-attention",
            "The products of two activations and the activation functions are computed in fp32.",
            fp32_attention,
        ),
        Rewrite(
            "attention-form",
            "Attention is computed by products of 3 dimensions, sequences and heads in the first.",
            fold_heads,
        ),
        Rewrite(
            "attention-scaled",
            "The scale of attention lies between its first product and its softmax.",
            scale_scores,
        ),
        Rewrite(
            "broken-fusion",
            "The largest score is subtracted before the softmax and a lone query comes twice, so "
            "that attention does not become one kernel.",
            break_fusion,
        ),
        Rewrite(
            "split-qkv",
            "Query, key and value have a product each, of rows that they do not share.",
            split_packed,
        ),
        Rewrite(
            "bf16",
            "All that is fp16 is computed in bf16, which overflows no sooner than fp32.",
            to_bf16,
        ),
    )
}
