"""The tests' own memory (tests/traced_graphs.py, tests/made_once.py): it hides no difference."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from made_once import made_once
from torch import nn
from traced_graphs import TraceMemory, trace_key


def module(**changes: object) -> nn.Module:
    """Two layers with the same weights at each call, and attributes beside them."""
    torch.manual_seed(3)
    built = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).eval()
    for name, value in changes.items():
        setattr(built, name, value)
    return built


def shared_weights() -> nn.Module:
    built = module()
    built.again = built[0]
    return built


def equal_weights() -> nn.Module:
    built, other = module(), module()
    built.again = other[0]
    return built


def changed_weight() -> nn.Module:
    built = module()
    with torch.no_grad():
        built[0].weight[0, 0] += 1e-7
    return built


def test_equal_modules_have_one_key() -> None:
    example = (torch.zeros(2, 3),)
    key = trace_key((module(), example), {"opset_version": 18})
    assert key == trace_key((module(), example), {"opset_version": 18})
    assert key is not None


@pytest.mark.parametrize(
    "other",
    [
        lambda: ((changed_weight(), (torch.zeros(2, 3),)), {}),
        lambda: ((module(scale=2.0), (torch.zeros(2, 3),)), {}),
        lambda: ((module().half(), (torch.zeros(2, 3),)), {}),
        lambda: ((module().train(), (torch.zeros(2, 3),)), {}),
        lambda: ((nn.Sequential(*module(), nn.ReLU()), (torch.zeros(2, 3),)), {}),
        lambda: ((module(), (torch.zeros(3, 3),)), {}),
        lambda: ((module(), (torch.zeros(2, 3),)), {"opset_version": 18}),
        lambda: ((module(), (torch.zeros(2, 3),)), {"dynamic_shapes": {0: torch.export.Dim("B")}}),
    ],
)
def test_whatever_differs_gives_another_key(other: Callable[[], tuple[tuple, dict]]) -> None:
    assert trace_key(*other()) != trace_key((module(), (torch.zeros(2, 3),)), {})


def test_one_layer_under_two_names_is_not_two_equal_layers() -> None:
    assert trace_key((shared_weights(),), {}) != trace_key((equal_weights(),), {})


def test_what_a_key_cannot_describe_has_none() -> None:
    class OfThisTest(nn.Module):
        pass

    assert trace_key((OfThisTest(),), {}) is None
    assert trace_key((module(activation=lambda x: x),), {}) is None
    assert trace_key((module(settings=object()),), {}) is None


def test_a_graph_is_traced_once_and_given_anew_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = []
    real = torch.onnx.export

    def count(*args: object, **kwargs: object) -> object:
        traced.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.onnx, "export", count)
    memory = TraceMemory(tmp_path)
    programs = []
    for _ in range(3):
        options = {"dynamo": True, "external_data": False, "verbose": False}
        programs.append(memory.export(module(), (torch.zeros(2, 3),), **options))
        programs[-1].model.graph.outputs[0].name = "renamed"
    assert len(traced) == 1
    first, *others = (program.model_proto.SerializeToString() for program in programs)
    assert others == [first, first]


def test_who_wants_a_graph_that_is_being_traced_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = []
    real = torch.onnx.export

    def trace(*args: object, **kwargs: object) -> object:
        traced.append(args)
        time.sleep(0.2)  # the other asks meanwhile
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.onnx, "export", trace)
    memories = [TraceMemory(tmp_path), TraceMemory(tmp_path)]
    # Made one after the other: both threads would draw their weights from torch's one generator.
    modules = [module(), module()]

    def export(memory: TraceMemory, graph: nn.Module) -> list[str]:
        options = {"dynamo": True, "external_data": False, "verbose": False}
        program = memory.export(graph, (torch.zeros(2, 3),), **options)
        # Not its bytes: torch notes what called it, which is another thread each time.
        return [node.op_type for node in program.model_proto.graph.node]

    with ThreadPoolExecutor() as pool:
        one, other = pool.map(export, memories, modules)
    assert one == other
    assert len(traced) == 1
    assert {(memory.num_traced, memory.num_found) for memory in memories} == {(1, 0), (0, 1)}


def test_a_folder_is_made_by_the_first_who_asks_and_only_whole(tmp_path: Path) -> None:
    made = []

    def make(folder: Path) -> None:
        made.append(folder.name)
        folder.mkdir()
        time.sleep(0.2)  # the other asks meanwhile
        (folder / "a").write_text("whole")

    def ask(_: int) -> str:
        return (made_once(tmp_path / "some" / "folder", make) / "a").read_text()

    with ThreadPoolExecutor() as pool:
        assert list(pool.map(ask, range(2))) == ["whole", "whole"]
    assert made == ["folder"]
