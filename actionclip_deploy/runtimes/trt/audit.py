"""Whether an engine computes in the precision that its graph asks for.

A build that succeeds says nothing about that: a version that ignores a flag gives an fp32 engine
and no error, and a quantised product may fall back to a wider type. So the arithmetic of the graph
is looked for among the layers of the engine, product by product.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from actionclip_deploy.errors import EngineError
from actionclip_deploy.runtimes.trt.inspector import Layer, read_layers
from actionclip_deploy.runtimes.trt.products import PRECISIONS, Product, ProductPrecision

# Of all arithmetic. TensorRT may fold or move a small product, such as one with a constant.
MAX_OTHER_SHARE = 0.05
MAX_UNKNOWN_SHARE = 0.2

# Kinds of layers that only move numbers, though they name the nodes whose numbers those are.
_MOVING = frozenset(
    ("reformat", "constant", "noop", "no op", "signal", "wait", "shuffle", "shapehosttodevice")
)
# Myelin, the compiler within TensorRT, numbers the layers that it names after nodes.
_MYELIN_NUMBER = re.compile(r"(?:_mye\d+)?_myl\d+_\d+$")
# torch's exporter names a Cast so.
_CASTING = re.compile(r"cast|to_copy")
_MULTIPLYING = re.compile(r"gemm|gemv|conv|matrix|matmul|mha|fmha|xmma|cutlass|cudnn|attention")


@dataclass(frozen=True)
class AuditedProduct:
    """A product of the graph, and what the engine made of it.

    Attributes:
        product: What the graph asks for.
        layers: Names of the layers that compute it.
        precision: What they compute it in; None where that cannot be told.
    """

    product: Product
    layers: tuple[str, ...]
    precision: ProductPrecision | None


@dataclass(frozen=True)
class Audit:
    """The arithmetic of a graph and of an engine side by side.

    Attributes:
        products: All products of the graph, in its order.
        num_layers: Layers of the engine.
    """

    products: tuple[AuditedProduct, ...]
    num_layers: int

    def asked(self) -> dict[ProductPrecision, float]:
        """Share of the arithmetic by the precision that the graph asks for, 0 to 1."""
        return self._shares(lambda audited: audited.product.precision)

    def computed(self) -> dict[ProductPrecision, float]:
        """Share of the arithmetic by the precision that the engine computes in, 0 to 1."""
        return self._shares(lambda audited: audited.precision)

    def unknown_share(self) -> float:
        """Share of the arithmetic of which the precision cannot be told, 0 to 1."""
        return self._share(audited for audited in self.products if audited.precision is None)

    def check(self) -> None:
        """Do nothing where the engine computes what was asked for.

        Raises:
            EngineError: If it computes a share in another precision, or if that cannot be told of
                too large a share.
        """
        unknown = [audited for audited in self.products if audited.precision is None]
        others = [
            audited
            for audited in self.products
            if audited.precision not in (None, audited.product.precision)
        ]
        if self._share(others) > MAX_OTHER_SHARE:
            raise EngineError(
                f"The engine computes {self._share(others):.0%} of its arithmetic in another "
                f"precision than its graph asks for: {_largest(others)}; build it with another "
                "version of TensorRT, or export a bundle of a precision that this GPU has."
            )
        if self._share(unknown) > MAX_UNKNOWN_SHARE:
            raise EngineError(
                f"The precision of {self._share(unknown):.0%} of the engine's arithmetic cannot be "
                f"told from its {self.num_layers} layers, {MAX_UNKNOWN_SHARE:.0%} at most is "
                f"taken: {_largest(unknown)}; build it with another version of TensorRT."
            )

    def to_dict(self) -> dict[str, Any]:
        """What is kept beside an engine."""
        return {
            "num_macs": sum(audited.product.num_macs for audited in self.products),
            "num_layers": self.num_layers,
            "asked": self.asked(),
            "computed": self.computed(),
            "unknown": self.unknown_share(),
            "other_than_asked": [
                {
                    "node": audited.product.node,
                    "asked": audited.product.precision,
                    "computed": audited.precision,
                    "layers": list(audited.layers),
                }
                for audited in self.products
                if audited.precision != audited.product.precision
            ],
        }

    def _shares(
        self, precision_of: Callable[[AuditedProduct], ProductPrecision | None]
    ) -> dict[ProductPrecision, float]:
        shares = {
            precision: self._share(a for a in self.products if precision_of(a) == precision)
            for precision in PRECISIONS
        }
        return {precision: share for precision, share in shares.items() if share}

    def _share(self, some: Iterable[AuditedProduct]) -> float:
        total = sum(audited.product.num_macs for audited in self.products)
        return sum(audited.product.num_macs for audited in some) / total if total else 0.0


def audit(inspector_json: str, products: Sequence[Product]) -> Audit:
    """Find each product of a graph in an engine.

    A product belongs to the layers that name its node, and of those to the ones that multiply.
    They compute it in the type that the name of their kernel tells, or else in the type of their
    inputs; a layer of which neither is clear leaves it unknown.

    Args:
        inspector_json: What TensorRT's engine inspector tells of the engine, as JSON.
        products: Of the graph that it was built from.

    Raises:
        EngineError: If the inspector tells no layers.
    """
    layers = read_layers(inspector_json)
    by_node: dict[str, list[Layer]] = {}
    for layer in layers:
        for node in _nodes(layer):
            by_node.setdefault(node, []).append(layer)
    audited = []
    for product in products:
        named = by_node.get(product.node) or by_node.get(_plain(product.node), [])
        computing = _computing(named)
        names = tuple(layer.name for layer in computing)
        precision = _precision(computing, product.precision)
        audited.append(AuditedProduct(product, names, precision))
    return Audit(tuple(audited), len(layers))


def _nodes(layer: Layer) -> set[str]:
    """Nodes that a layer names: those of its metadata, or else the parts of its own name."""
    if layer.nodes:
        return set(layer.nodes)
    parts = _MYELIN_NUMBER.sub("", layer.name).split("+")
    return {_plain(part.strip()) for part in parts}


def _plain(name: str) -> str:
    """A name as one of the compilers writes it, which keeps letters, digits and slashes."""
    return re.sub(r"[^0-9A-Za-z/]", "_", name)


def _computing(layers: Sequence[Layer]) -> list[Layer]:
    """Those of the layers of one node that do its arithmetic."""
    working = [layer for layer in layers if layer.kind.lower() not in _MOVING]
    multiplying = [
        layer
        for layer in working
        if _MULTIPLYING.search(f"{layer.kind} {layer.tactic}".lower()) or layer.kernel_precision
    ]
    return multiplying or working


def _precision(layers: Sequence[Layer], asked: ProductPrecision) -> ProductPrecision | None:
    """What layers compute in together; None where one is not clear, or they differ."""
    found = {_layer_precision(layer, asked) for layer in layers}
    return found.pop() if len(found) == 1 else None


def _layer_precision(layer: Layer, asked: ProductPrecision) -> ProductPrecision | None:
    if layer.kernel_precision is not None:
        return layer.kernel_precision
    types = set(layer.input_types)
    if len(types) == 1:
        only = types.pop()
        # Wide inputs may be rounded inside of a layer that casts, and then nothing is known; but
        # not for a product of which the graph rounds no operand.
        names = (layer.name, layer.tactic, *layer.nodes)
        casts = asked != "fp32" and any(_CASTING.search(name.lower()) for name in names)
        narrows = only == "fp32" and (casts or set(layer.output_types) not in (set(), {"fp32"}))
        return None if narrows else only
    narrow = types & {"int8", "fp8"}
    if len(narrow) == 1 and layer.input_types[0] in narrow:
        # The others are a bias or a residual.
        return narrow.pop()
    return None


def _largest(some: Sequence[AuditedProduct]) -> str:
    """The largest of some products with what is known of it, and how many others there are."""
    first = max(some, key=lambda audited: audited.product.num_macs)
    layers = f"the layer {first.layers[0]}" if first.layers else "no layer that names it"
    computed = f" in {first.precision}" if first.precision else ""
    others = f", and {len(some) - 1} more" if len(some) > 1 else ""
    return f"{first.product.node} ({first.product.precision}) by {layers}{computed}{others}"
