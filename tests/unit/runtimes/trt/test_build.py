"""From a bundle to engines over the fake TensorRT, and other ways where they are wrong."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import EngineError, ParityError
from actionclip_deploy.manifest import QuantizationSpec
from actionclip_deploy.runtimes import open_runtime
from actionclip_deploy.runtimes.trt.build import (
    BuildRequest,
    BuildResult,
    EngineBuilder,
    check_precision,
    repair_engines,
)
from actionclip_deploy.runtimes.trt.plan import BuildOptions, default_targets, parse_profiles
from actionclip_deploy.runtimes.trt.rewrites import REWRITES


def request(*profiles: str, **options: Any) -> BuildRequest:
    return BuildRequest(parse_profiles(profiles), options=BuildOptions(**options))


def build(bundle: Bundle, *profiles: str, **options: Any) -> BuildResult:
    return EngineBuilder(bundle, "tensorrt").build(request(*profiles, **options))


def clips(bundle: Bundle, count: int) -> np.ndarray:
    size = bundle.manifest.model.input_size
    shape = (count, bundle.manifest.model.num_frames, size, size, 3)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def test_engines_are_built_audited_verified_and_give_what_the_graphs_give(
    tensorrt: Any, bundle: Bundle
) -> None:
    result = build(bundle)
    assert result.is_new
    assert result.examined is not None
    result.examined.check()
    assert result.examined.audits["visual"].computed() == (
        pytest.approx({"fp16": 0.99, "fp32": 0.01}, abs=0.02)
    )
    frames = clips(bundle, 3)
    with open_runtime(bundle, "tensorrt") as engines, open_runtime(bundle) as graphs:
        assert engines.describe().engine == result.entry.name
        assert engines.describe().name == "tensorrt"
        np.testing.assert_allclose(
            engines.encode_video(frames), graphs.encode_video(frames), atol=1e-6
        )


def test_networks_are_strongly_typed_and_without_tf32(tensorrt: Any, bundle: Bundle) -> None:
    entry = build(bundle, "latency").entry
    head = json.loads(entry.plan("visual").partition(b"\n")[0])
    assert head["strongly_typed"]
    assert not head["tf32"]


def test_what_was_built_is_found_again(tensorrt: Any, bundle: Bundle) -> None:
    first, second = build(bundle), build(bundle)
    assert (first.is_new, second.is_new) == (True, False)
    assert first.entry.name == second.entry.name
    assert tensorrt.state.num_builds == len(bundle.manifest.graphs)


@pytest.mark.parametrize(
    "change",
    [("name", "RTX 4090"), ("minor", 9), ("__version__", "10.16.1")],
    ids=["another GPU", "another compute capability", "another version"],
)
def test_an_engine_of_another_place_does_not_serve_and_is_told(
    tensorrt: Any,
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    change: tuple[str, Any],
) -> None:
    name = build(bundle).entry.name
    is_version = change[0].startswith("__")
    monkeypatch.setattr(tensorrt if is_version else tensorrt.state.cudart, *change)
    with pytest.raises(EngineError, match=rf"{name} was built for .* and not .*run: actionclip bu"):
        open_runtime(bundle, "tensorrt")
    assert build(bundle).is_new


def test_engines_of_another_fine_tune_are_not_found(
    tensorrt: Any, bundle: Bundle, tiny_bundle: Path
) -> None:
    build(bundle)
    with pytest.raises(EngineError, match="There is no tensorrt engine"):
        open_runtime(Bundle.open(tiny_bundle), "tensorrt")


def test_an_engine_that_is_silently_fp32_is_refused(tensorrt: Any, bundle: Bundle) -> None:
    tensorrt.state.faults = {"silently fp32"}
    result = build(bundle)
    assert result.examined is not None
    with pytest.raises(EngineError, match=r"visual: The engine computes \d+% of its arithmetic in"):
        result.examined.check()
    with pytest.raises(EngineError, match=r"No engine .* may serve.*failed verification"):
        open_runtime(bundle, "tensorrt")


@pytest.mark.parametrize("form", [10, 11])
def test_the_audit_reads_both_forms_of_the_inspector(
    tensorrt: Any, bundle: Bundle, form: int
) -> None:
    tensorrt.state.inspector_form = form
    result = build(bundle, "latency")
    assert result.examined is not None
    result.examined.check()


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ("wrong", "visual"),
        ("wrong in batches", "visual"),
        ("rows leak", "visual"),
        ("not finite", "visual"),
        ("execution fails", "visual"),
    ],
)
def test_an_engine_that_computes_something_else_never_serves(
    tensorrt: Any, bundle: Bundle, fault: str, what: str
) -> None:
    tensorrt.state.faults = {fault}
    result = build(bundle)
    assert result.examined is not None
    assert not result.examined.report.passed
    assert result.examined.report.to_dict()["comparisons"][0]["what"] == what
    with pytest.raises(ParityError, match="disagrees with PyTorch"):
        result.examined.check()
    with pytest.raises(EngineError, match=r"may serve on this device.*--bisect.*--repair"):
        open_runtime(bundle, "tensorrt")


def test_an_engine_that_is_wrong_in_batches_is_right_for_one(tensorrt: Any, bundle: Bundle) -> None:
    tensorrt.state.faults = {"wrong in batches"}
    examined = build(bundle).examined
    assert examined is not None
    report = examined.report
    by_size = {c.batch_size: c.passed for c in report.comparisons if c.what == "visual"}
    assert by_size[1]
    assert not any(passed for size, passed in by_size.items() if size > 1)


def test_every_end_of_every_profile_is_verified_and_odd_sizes_and_one_beyond(
    tensorrt: Any, bundle: Bundle
) -> None:
    examined = build(bundle, "latency", "2,4,6").examined
    assert examined is not None
    report = examined.report
    sizes = {c.batch_size for c in report.comparisons if c.what == "temporal"}
    assert sizes == {1, 2, 4, 5, 6, 7}
    num_frames = bundle.manifest.model.num_frames
    frames = {c.batch_size for c in report.comparisons if c.what == "visual"}
    assert {1, num_frames, 2 * num_frames, 6 * num_frames, 6 * num_frames + 1} <= frames
    assert any(size % 2 and 1 < size < 6 * num_frames for size in frames)


def test_a_truncated_plan_is_told_and_built_anew(tensorrt: Any, bundle: Bundle) -> None:
    entry = build(bundle).entry
    path = entry.folder / "visual.plan"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(EngineError, match=r"visual\.plan has \d+ bytes that are not those"):
        open_runtime(bundle, "tensorrt")
    again = build(bundle)
    assert again.is_new
    assert again.why is not None
    assert "visual.plan has" in again.why


def test_a_record_that_lies_about_its_key_is_told_and_built_anew(
    tensorrt: Any, bundle: Bundle
) -> None:
    entry = build(bundle).entry
    record = entry.folder / "entry.json"
    record.write_text(record.read_text().replace('"fp16"', '"fp32"'))
    with pytest.raises(EngineError, match="There is no tensorrt engine"):
        open_runtime(bundle, "tensorrt")
    again = build(bundle)
    assert again.is_new
    assert again.why is not None
    assert "its key gives another name" in again.why


def test_a_record_that_lies_about_verification_is_found_out(tensorrt: Any, bundle: Bundle) -> None:
    tensorrt.state.faults = {"wrong"}
    entry = build(bundle).entry
    record = json.loads((entry.folder / "entry.json").read_text())
    for card in record["verified"].values():
        card["passed"] = True
    (entry.folder / "entry.json").write_text(json.dumps(record))
    with pytest.raises(EngineError, match="disagrees with PyTorch"):
        open_runtime(bundle, "tensorrt")


def test_a_plan_of_another_graph_under_the_right_name_is_refused(
    tensorrt: Any, bundle: Bundle
) -> None:
    from actionclip_deploy.runtimes.trt.store import open_store

    builder = EngineBuilder(bundle, "tensorrt")
    entry = builder.build(request()).entry
    plans = {graph: entry.plan("textual") for graph in bundle.manifest.graphs}
    open_store().add(builder.key_of(request()), plans, {}, replace=True)
    with pytest.raises(EngineError, match="it is of another graph"):
        open_runtime(bundle, "tensorrt")


def test_the_engine_is_verified_anew_on_another_card(tensorrt: Any, bundle: Bundle) -> None:
    entry = build(bundle).entry
    tensorrt.state.cudart.uuid = b"\x02" * 16
    with open_runtime(bundle, "tensorrt"):
        pass
    record = json.loads((entry.folder / "entry.json").read_text())
    assert len(record["verified"]) == 2


def test_out_of_memory_says_what_to_do_and_leaves_nothing(
    tensorrt: Any, bundle: Bundle, tmp_path: Path
) -> None:
    tensorrt.state.faults = {"out of memory"}
    with pytest.raises(EngineError, match=r"Memory ran out: .*--workspace.*--opt-level 2"):
        build(bundle)
    folder = tmp_path / "cache" / "engines"
    assert not folder.exists() or not list(folder.iterdir())


def test_two_builders_at_once_leave_one_good_entry(tensorrt: Any, bundle: Bundle) -> None:
    results: list[BuildResult] = []
    threads = [threading.Thread(target=lambda: results.append(build(bundle))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({result.entry.name for result in results}) == 1
    assert len(results) == 3
    assert [path.name for path in results[0].entry.folder.parent.iterdir()] == [
        results[0].entry.name
    ]
    with open_runtime(bundle, "tensorrt"):
        pass


def test_ctrl_c_during_a_build_leaves_nothing(
    tensorrt: Any, bundle: Bundle, tmp_path: Path
) -> None:
    def interrupt(graph: str, phase: str, done: int, steps: int) -> None:
        raise KeyboardInterrupt

    builder = EngineBuilder(bundle, "tensorrt", on_phase=interrupt)
    with pytest.raises(KeyboardInterrupt):
        builder.build(request())
    assert not list((tmp_path / "cache" / "engines").iterdir())


def test_progress_is_told_by_graph_and_phase(tensorrt: Any, bundle: Bundle) -> None:
    told = []
    EngineBuilder(bundle, "tensorrt", on_phase=lambda *phase: told.append(phase)).build(request())
    assert ("visual", "Building Engine", 1, 2) in told
    assert {graph for graph, *_ in told} == set(bundle.manifest.graphs)


def test_a_jetson_builds_with_little_scratch_memory(tensorrt: Any, bundle: Bundle) -> None:
    pools: list[dict[Any, int]] = []
    original = tensorrt.Builder.build_serialized_network

    class Builder(tensorrt.Builder):  # type: ignore[misc, name-defined]
        def build_serialized_network(self, network: Any, config: Any) -> Any:
            pools.append(dict(config._pools))
            return original(self, network, config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorrt, "Builder", Builder)
        build(bundle)
        build(bundle, workspace_bytes=2**29)
    workspaces = [pool[tensorrt.MemoryPoolType.WORKSPACE] for pool in pools]
    assert workspaces[0] == 2**30  # of 8 GiB
    assert workspaces[-1] == 2**29


def test_a_timing_cache_is_made_used_and_kept_whole(
    tensorrt: Any, bundle: Bundle, tmp_path: Path
) -> None:
    path = tmp_path / "timing.cache"
    build(bundle, timing_cache=path)
    first = path.read_bytes()
    assert first
    build(bundle, "latency", timing_cache=path)
    assert path.read_bytes().startswith(first)
    path.write_bytes(b"not a timing cache")
    with pytest.raises(EngineError, match="is not a timing cache of TensorRT"):
        build(bundle, "3,3,3", timing_cache=path)


def test_a_precision_other_than_the_graphs_is_refused(bundle: Bundle) -> None:
    check_precision(bundle, None)
    check_precision(bundle, "fp16")
    with pytest.raises(EngineError, match=r"are fp16 and int8 was asked for.*--precision int8"):
        check_precision(bundle, "int8")


def test_what_the_parser_refuses_is_told_with_its_reason(
    tensorrt: Any, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt.OnnxParser, "parse_from_file", lambda *_: False)
    monkeypatch.setattr(tensorrt.OnnxParser, "num_errors", 1)
    error = tensorrt.ParserError("Assertion failed: axis is 7")
    monkeypatch.setattr(tensorrt.OnnxParser, "get_error", lambda *_: error)
    with pytest.raises(EngineError, match=r"does not take visual\.onnx: .*axis is 7"):
        build(bundle)


def test_a_stripped_engine_takes_a_fine_tune_without_a_build(
    tensorrt: Any, bundle: Bundle, tmp_path: Path
) -> None:
    first = build(bundle, strip=True)
    builds = tensorrt.state.num_builds
    assert builds == len(bundle.manifest.graphs)
    tuned = fine_tuned(bundle, tmp_path / "tuned")
    second = build(tuned, strip=True)
    assert tensorrt.state.num_builds == builds
    assert tensorrt.state.num_refits == 2 * builds
    assert second.entry.name != first.entry.name
    with open_runtime(tuned, "tensorrt") as engines, open_runtime(tuned) as graphs:
        frames = clips(tuned, 1)
        given = engines.encode_video(frames)
        np.testing.assert_allclose(given, graphs.encode_video(frames), atol=1e-6)
    with open_runtime(bundle, "tensorrt") as engines:
        assert np.abs(engines.encode_video(frames) - given).max() > 1e-3


def test_a_refit_that_lacks_weights_is_told(
    tensorrt: Any, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt.Refitter, "get_missing_weights", lambda _: ["blocks.0.up"])
    with pytest.raises(EngineError, match=r"it lacks 1 weights, first blocks\.0\.up"):
        build(bundle, strip=True)


def fine_tuned(bundle: Bundle, folder: Path) -> Bundle:
    """A bundle of the same architecture whose visual weights differ, and its own golden data."""
    import onnx
    from onnx import numpy_helper

    from actionclip_deploy.bundle import hash_files, write_manifest
    from actionclip_deploy.runtimes.parity import Golden

    shutil.copytree(bundle.path, folder)
    path = folder / "visual.onnx"
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name == "tower.projection.weight":
            values = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(values[:, ::-1].copy(), tensor.name))
    onnx.save(model, path)
    seal(folder, bundle, hash_files, write_manifest)
    opened = Bundle.open(folder)
    golden = Golden.load(bundle)
    with open_runtime(opened, cache=False) as reference:
        made = Golden.from_reference(
            reference, golden.frames, golden.tokens, golden.labels, origin="a test"
        )
    made.save(folder)
    seal(folder, bundle, hash_files, write_manifest)
    return Bundle.open(folder, check_hashes=True)


def seal(folder: Path, bundle: Bundle, hash_files: Any, write_manifest: Any) -> None:
    (folder / "manifest.json").unlink(missing_ok=True)
    write_manifest(folder, bundle.manifest.model_copy(update={"files": hash_files(folder)}))


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_engines_that_serve_work_with_and_without_recording(
    tensorrt: Any, bundle: Bundle, cuda_graphs: bool
) -> None:
    build(bundle)
    with (
        open_runtime(bundle, "tensorrt", cuda_graphs=cuda_graphs) as engines,
        open_runtime(bundle) as graphs,
    ):
        # 20 clips are split at the largest profile; each shape comes twice, to be replayed.
        for count in (1, 3, 20, 1, 3):
            frames = clips(bundle, count)
            np.testing.assert_allclose(
                engines.encode_video(frames), graphs.encode_video(frames), atol=1e-6
            )
    assert bool(tensorrt.state.cudart.launches) == cuda_graphs


@pytest.mark.parametrize(
    ("precision", "text", "rest", "visual_prompt", "oldest"),
    [
        ("fp32", "fp32", None, "transf", "sm86"),
        ("fp16", "fp32", None, "transf", "sm86"),
        ("fp16", "fp16", None, "transf", "sm75"),
        ("fp16", "fp16", None, "lstm", "sm86"),
        ("fp16", "fp16", None, "meanp", "sm75"),
        ("int8", "fp16", "fp32", "transf", "sm86"),
        ("int8", "fp16", "fp16", "transf", "sm75"),
        ("fp8", "fp16", "fp16", "transf", "sm89"),
    ],
)
def test_the_cards_to_compile_for_follow_from_the_precisions(
    precision: str, text: str, rest: str | None, visual_prompt: str, oldest: str, bundle: Bundle
) -> None:
    spec = None
    if rest is not None:
        spec = QuantizationSpec.model_construct(rest_precision=rest)  # type: ignore[arg-type]
    graphs = {
        name: graph.model_copy(update={"precision": text if name == "textual" else precision})
        for name, graph in bundle.manifest.graphs.items()
    }
    model = bundle.manifest.model.model_copy(update={"visual_prompt": visual_prompt})
    update = {"graphs": graphs, "quantization": spec, "model": model}
    targets = default_targets(bundle.manifest.model_copy(update=update))
    assert targets == ("sm75", "sm86", "sm89", "sm120")[-len(targets) :]
    assert targets[0] == oldest


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
