from __future__ import annotations

from typing import Any

import onnx
import pytest

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import EngineError
from actionclip_deploy.runtimes import open_runtime
from actionclip_deploy.runtimes.trt.build import BuildRequest, EngineBuilder, repair_engines
from actionclip_deploy.runtimes.trt.plan import BuildOptions, parse_profiles
from actionclip_deploy.runtimes.trt.rewrites import REWRITES


def request(*profiles: str, **options: Any) -> BuildRequest:
    return BuildRequest(parse_profiles(profiles), options=BuildOptions(**options))


def is_visual(model: onnx.ModelProto) -> bool:
    return model.graph.input[0].name == "frames"


def count(model: onnx.ModelProto, op_type: str) -> int:
    return sum(node.op_type == op_type for node in model.graph.node)


def test_the_form_of_the_graph_that_passes_is_kept_and_the_reason_recorded(
    tensorrt: Any, bundle: Bundle
) -> None:
    # As with a fused attention that is wrong: only a graph whose attention cannot be fused is
    # right, and that one has a ReduceMax in front of each softmax.
    tensorrt.state.faults = {"wrong"}
    tensorrt.state.strikes = lambda model, _: is_visual(model) and not count(model, "ReduceMax")
    builder = EngineBuilder(bundle, "tensorrt")
    result = builder.build(request("latency"))
    assert "disagrees with PyTorch" in str(result.why_wrong())
    repaired = repair_engines(builder, request("latency"), result)
    passed = [attempt.name for attempt in repaired.attempts if attempt.passed]
    assert passed == ["broken-fusion"]
    assert repaired.entry.rewrites == {"visual": "broken-fusion"}
    record = repaired.entry.record["repair"]
    assert record["kept"] == "broken-fusion"
    assert "disagrees with PyTorch" in record["why"]
    assert record["attempts"][0]["name"] in REWRITES
    # The wrong engine that was asked for is still there to be looked at, the attempts are not.
    assert {e.name for e in builder.store.entries()} == {result.entry.name, repaired.entry.name}
    with open_runtime(bundle, "tensorrt") as runtime:
        assert runtime.describe().engine == repaired.entry.name


def test_attempts_come_in_the_order_of_the_documentation(tensorrt: Any, bundle: Bundle) -> None:
    tensorrt.state.faults = {"wrong"}
    tensorrt.state.strikes = lambda model, built: is_visual(model) and built["level"] > 1
    builder = EngineBuilder(bundle, "tensorrt")
    repaired = repair_engines(builder, request("throughput"), builder.build(request("throughput")))
    names = [attempt.name for attempt in repaired.attempts]
    rewrites = [name for name in names if name in REWRITES]
    assert rewrites == [name for name in REWRITES if name in rewrites]
    assert names[len(rewrites) :] == [
        *("optimization level 2", "optimization level 1"),
        *("profile of 8,8,8 clips", "profile of 1,1,1 clips"),
    ]
    assert [a.name for a in repaired.attempts if a.passed] == ["optimization level 1"]
    assert repaired.entry.key["options"]["opt_level"] == 1


def test_a_narrower_profile_is_tried_where_the_width_is_at_fault(
    tensorrt: Any, bundle: Bundle
) -> None:
    def is_wide(model: onnx.ModelProto, built: dict[str, Any]) -> bool:
        shapes = [profile.get("frames") for profile in built["profiles"]]
        return any(shape and shape[0] != shape[2] for shape in shapes)

    tensorrt.state.faults = {"wrong"}
    tensorrt.state.strikes = is_wide
    builder = EngineBuilder(bundle, "tensorrt")
    asked = request("2,8,8")
    repaired = repair_engines(builder, asked, builder.build(asked))
    assert repaired.entry.key["shapes"]["temporal"][0][0][0] == 8
    assert [a.name for a in repaired.attempts if a.passed] == ["profile of 8,8,8 clips"]


def test_the_fastest_of_those_that_pass_is_kept(
    tensorrt: Any, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    import actionclip_deploy.runtimes.trt.build as module

    latencies = iter([3.0, 1.5, 2.0, *[9.0] * 20])
    monkeypatch.setattr(module, "median_latency_ms", lambda _: next(latencies))
    tensorrt.state.faults = {"wrong"}
    built: list[bool] = []

    def first_only(model: onnx.ModelProto, _: Any) -> bool:
        built.append(is_visual(model))
        return is_visual(model) and sum(built) == 1

    tensorrt.state.strikes = first_only
    builder = EngineBuilder(bundle, "tensorrt")
    repaired = repair_engines(builder, request("latency"), builder.build(request("latency")))
    passing = [attempt for attempt in repaired.attempts if attempt.passed]
    assert len(passing) > 2
    assert repaired.entry.record["repair"]["kept"] == passing[1].name


def test_where_nothing_passes_everything_that_was_tried_is_told(
    tensorrt: Any, bundle: Bundle
) -> None:
    tensorrt.state.faults = {"wrong"}
    builder = EngineBuilder(bundle, "tensorrt")
    result = builder.build(request("latency"))
    with pytest.raises(
        EngineError, match=r"No other form .*broken-fusion: .*level 1.*--runtime onn"
    ):
        repair_engines(builder, request("latency"), result)
    assert [entry.name for entry in builder.store.entries()] == [result.entry.name]


def test_an_attempt_that_cannot_be_built_is_told_and_the_others_go_on(
    tensorrt: Any, bundle: Bundle
) -> None:
    tensorrt.state.faults = {"wrong"}
    tensorrt.state.strikes = lambda model, built: is_visual(model) and built["level"] == 3
    original = tensorrt.OnnxParser.parse_from_file

    def refuse_reduce_max(self: Any, path: str) -> bool:
        if count(onnx.load(path), "ReduceMax"):
            self._errors.append(tensorrt.ParserError("no ReduceMax here"))
            return False
        return bool(original(self, path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorrt.OnnxParser, "parse_from_file", refuse_reduce_max)
        builder = EngineBuilder(bundle, "tensorrt")
        repaired = repair_engines(builder, request("latency"), builder.build(request("latency")))
    outcomes = {attempt.name: attempt.outcome for attempt in repaired.attempts}
    assert "no ReduceMax here" in outcomes["broken-fusion"]
    assert repaired.entry.key["options"]["opt_level"] == 2 or repaired.entry.rewrites == {}


def test_engines_that_pass_are_not_repaired(tensorrt: Any, bundle: Bundle) -> None:
    builder = EngineBuilder(bundle, "tensorrt")
    result = builder.build(request("latency"))
    assert result.why_wrong() is None
    with pytest.raises(EngineError, match="nothing to repair"):
        repair_engines(builder, request("latency"), result)
