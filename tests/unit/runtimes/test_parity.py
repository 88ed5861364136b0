from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeRuntime, fake_manifest, write_fake_bundle
from tiny_graphs import write_tiny_bundle

from actionclip_deploy.bundle import Bundle, hash_files, write_manifest
from actionclip_deploy.errors import BundleError, InferenceError, ParityError, ShapeError
from actionclip_deploy.manifest import GraphName, Manifest
from actionclip_deploy.runtimes.base import RuntimeInfo
from actionclip_deploy.runtimes.ort import OrtRuntime
from actionclip_deploy.runtimes.parity import (
    Comparison,
    Golden,
    ParityReport,
    verify,
    verify_bundle,
)

LABELS = ("run", "hide", "jump")


def make_golden(
    manifest: Manifest, *, num_clips: int = 2, runtime: FakeRuntime | None = None
) -> Golden:
    """Golden data of the fake runtime, with 3 labels and prompts of 3 to 6 tokens."""
    generator = np.random.default_rng(5)
    model = manifest.model
    frames = generator.integers(0, 256, (num_clips, model.num_frames, 32, 32, 3), dtype=np.uint8)
    tokens = generator.integers(1, 50, (len(manifest.templates) * len(LABELS), 6), dtype=np.int32)
    for row, length in enumerate((3, 4, 6, 5, 3, 4)):
        tokens[row, length:] = 0
    return Golden.from_reference(
        runtime or FakeRuntime(manifest), frames, tokens, LABELS, origin="random numbers"
    )


class Changed(FakeRuntime):
    """The fake runtime with a fault in its outputs."""

    def __init__(self, manifest: Manifest, fault: Callable[[str, Any, Any], Any]) -> None:
        super().__init__(manifest)
        self.fault = fault

    def _run(self, graph: GraphName, array: np.ndarray) -> np.ndarray:
        result: np.ndarray = self.fault(graph, array, super()._run(graph, array))
        return result


def report_of(
    fault: Callable[[str, Any, Any], Any], *, precision: str = "fp32", **manifest: Any
) -> ParityReport:
    description = fake_manifest(**manifest)
    graphs = {
        name: spec.model_copy(update={"precision": precision})
        for name, spec in description.graphs.items()
    }
    description = description.model_copy(update={"graphs": graphs})
    return verify(Changed(description, fault), make_golden(description))


def failed(report: ParityReport) -> set[str]:
    return {comparison.what for comparison in report.comparisons if not comparison.passed}


def no_fault(graph: str, array: Any, output: Any) -> Any:
    return output


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("visual_prompt", ["transf", "joint"])
def test_the_reference_agrees_with_itself(visual_prompt: str, precision: str) -> None:
    report = report_of(no_fault, visual_prompt=visual_prompt, precision=precision)
    report.check()
    assert report.passed
    assert report.origin == "random numbers"
    assert report.runtime.name == "fake"


def test_every_graph_is_run_at_several_batch_sizes_and_then_the_whole_way() -> None:
    manifest = fake_manifest()
    report = verify(FakeRuntime(manifest), make_golden(manifest))
    sizes: dict[str, list[int]] = {}
    for comparison in report.comparisons:
        sizes.setdefault(comparison.what, []).append(comparison.batch_size)
    assert sizes == {
        "visual": [1, 2, 3, 8, 9],  # 2 clips of 4 frames
        "visual, reordered rows": [5],
        "visual, repeated rows": [5],
        "visual, rows by themselves": [5],
        "temporal": [1, 2, 3],
        "temporal, reordered rows": [5],
        "temporal, repeated rows": [5],
        "temporal, rows by themselves": [5],
        "textual": [1, 2, 3, 6, 7],  # 2 templates x 3 labels
        "textual, full length": [2],
        "textual, reordered rows": [5],
        "textual, repeated rows": [5],
        "textual, rows by themselves": [5],
        "scores": [1, 2, 3],
    }


def test_a_model_that_mixes_frames_is_compared_clip_by_clip() -> None:
    manifest = fake_manifest(visual_prompt="joint")
    runtime = FakeRuntime(manifest)
    report = verify(runtime, make_golden(manifest, num_clips=1))
    whats = {comparison.what.partition(",")[0] for comparison in report.comparisons}
    assert whats == {"video", "textual", "scores"}
    assert {graph for graph, _ in runtime.calls} == {"video", "textual"}


def test_prompts_are_run_at_their_own_length_and_at_the_longest() -> None:
    manifest = fake_manifest()
    runtime = FakeRuntime(manifest)
    verify(runtime, make_golden(manifest))
    lengths = [shape for graph, shape in runtime.calls if graph == "textual"]
    assert (1, 3) in lengths  # the first prompt has 3 tokens
    assert (6, 6) in lengths
    assert (2, 77) in lengths


def test_batch_sizes_may_be_chosen() -> None:
    manifest = fake_manifest()
    runtime = FakeRuntime(manifest)
    report = verify(runtime, make_golden(manifest), batch_sizes=[16])
    sizes = {c.batch_size for c in report.comparisons if "," not in c.what}
    assert sizes == {16}
    assert ("visual", (16, 32, 32, 3)) in runtime.calls


def test_batch_sizes_may_be_chosen_for_each_graph() -> None:
    manifest = fake_manifest()
    sizes = {"visual": [1, 16], "scores": [4]}
    report = verify(FakeRuntime(manifest), make_golden(manifest), batch_sizes=sizes)
    given = [(c.what, c.batch_size) for c in report.comparisons if "," not in c.what]
    assert [size for what, size in given if what == "visual"] == [1, 16]
    assert [size for what, size in given if what == "temporal"] == [1, 2, 3]
    assert [size for what, size in given if what == "scores"] == [4]


def test_a_row_that_is_another_one_in_a_batch_is_found() -> None:
    def halve_in_batches(graph: str, array: Any, output: Any) -> Any:
        # Reordered and repeated rows agree with each other: all of them are wrong alike.
        return output * 0.5 if graph == "visual" and len(array) == 5 else output

    assert "visual, rows by themselves" in failed(report_of(halve_in_batches))


@pytest.mark.parametrize("sizes", [[], [0], [4, -1]])
def test_batch_sizes_below_1_are_refused(sizes: list[int]) -> None:
    manifest = fake_manifest()
    with pytest.raises(
        ValueError, match=r"batch_sizes is .*; each must be 1 or more, and one give"
    ):
        verify(FakeRuntime(manifest), make_golden(manifest), batch_sizes=sizes)


def test_golden_data_of_another_model_is_refused() -> None:
    golden = make_golden(fake_manifest())
    with pytest.raises(ShapeError, match="they are of different models"):
        verify(FakeRuntime(fake_manifest(embedding_dim=8)), golden)


@pytest.mark.parametrize("graph", ["visual", "temporal", "textual"])
def test_a_graph_that_is_wrong_is_named(graph: str) -> None:
    def fault(name: str, array: Any, output: Any) -> Any:
        return output[:, ::-1].copy() if name == graph else output

    report = report_of(fault)
    assert graph in failed(report)
    others = {"visual", "temporal", "textual"} - {graph}
    assert not failed(report) & others  # each graph is given the reference's inputs
    with pytest.raises(ParityError, match=rf"first in {graph} at batch size 1: max abs difference"):
        report.check()


def test_the_error_says_by_how_much_against_what_and_holds_the_report() -> None:
    def fault(name: str, array: Any, output: Any) -> Any:
        return output + np.float32(0.003) if name == "temporal" else output

    report = report_of(fault)
    with pytest.raises(
        ParityError,
        match=r"fake \(numpy, fp32\) disagrees with PyTorch in \d+ of 26 comparisons, first in "
        r"temporal at batch size 1: max abs difference 0\.003, allowed 0\.0001; min cosine 0\.99"
        r".* Do not use it so; try another execution provider .*export the bundle again\.",
    ) as caught:
        report.check()
    assert caught.value.report is report


def test_a_graph_of_half_precision_may_be_exported_in_full() -> None:
    def fault(name: str, array: Any, output: Any) -> Any:
        return -output

    class Half(Changed):
        def describe(self) -> Any:
            return super().describe().__class__("fake", "numpy", "fp16", None)

    manifest = fake_manifest()
    with pytest.raises(ParityError, match="export the bundle with --precision fp32"):
        verify(Half(manifest, fault), make_golden(manifest)).check()


@pytest.mark.parametrize(("precision", "passes"), [("fp32", False), ("fp16", True)])
def test_rounding_to_half_precision_passes_for_half_precision_alone(
    precision: str, passes: bool
) -> None:
    def fault(name: str, array: Any, output: Any) -> Any:
        return output.astype(np.float16).astype(np.float32)

    assert report_of(fault, precision=precision).passed == passes


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_features_that_are_too_long_disagree(precision: str) -> None:
    # The cosine is 1 and the embeddings after the temporal graph are right.
    def fault(name: str, array: Any, output: Any) -> Any:
        return output * np.float32(1.1) if name == "visual" else output

    report = report_of(fault, precision=precision)
    assert "visual" in failed(report)
    assert "scores" not in failed(report)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_a_failure_of_their_own(value: float) -> None:
    def fault(name: str, array: Any, output: Any) -> Any:
        if name == "visual" and len(array) == 3:
            output[1, 2] = value
        return output

    report = report_of(fault)
    assert failed(report) == {"visual"}
    with pytest.raises(ParityError, match="batch size 3: 1 of 48 values are NaN or infinite"):
        report.check()


def test_nothing_but_values_that_are_not_finite_is_a_failure() -> None:
    def fault(name: str, array: Any, output: Any) -> Any:
        return np.full_like(output, np.nan)

    report = report_of(fault)
    assert all(not comparison.passed for comparison in report.comparisons)


def test_a_batch_size_that_was_fixed_at_export_is_found() -> None:
    def fault(name: str, array: Any, output: Any) -> Any:
        if name == "temporal" and len(array) != 2:
            raise InferenceError("the temporal graph takes 2 rows")
        return output

    report = report_of(fault)
    with pytest.raises(ParityError, match="temporal at batch size 1: the temporal graph takes 2 r"):
        report.check()
    assert {"temporal, same rows", "scores"} <= failed(report)


def test_an_output_of_another_shape_is_found() -> None:
    def fault(name: str, array: Any, output: Any) -> Any:
        return output[:1] if name == "textual" else output

    report = report_of(fault)
    with pytest.raises(ParityError, match=r"gave shape \(1, 16\) .*; expected \(2, 16\)"):
        report.check()


def test_rows_that_depend_on_their_place_are_found() -> None:
    # Right for the golden rows in their own order and count, wrong for all others.
    def fault(name: str, array: Any, output: Any) -> Any:
        if name == "visual" and len(array) == 5:
            output = output + np.arange(5, dtype=np.float32)[:, None]
        return output

    assert failed(report_of(fault)) == {
        "visual, reordered rows",
        "visual, repeated rows",
        "visual, rows by themselves",
    }


def test_rows_that_leak_into_each_other_are_found() -> None:
    def fault(name: str, array: Any, output: Any) -> Any:
        return output + np.float32(0.01) * output.mean(axis=0) if name == "textual" else output

    assert {"textual", "textual, full length"} <= failed(report_of(fault))


def test_a_row_beyond_the_golden_rows_is_compared() -> None:
    def fault(name: str, array: Any, output: Any) -> Any:
        if name == "visual":
            output[8:] = 1  # 2 clips of 4 frames are right
        return output

    assert failed(report_of(fault)) == {"visual", "scores"}


def test_text_that_fails_is_told_for_the_scores_too() -> None:
    def fault(name: str, array: Any, output: Any) -> Any:
        if name == "textual":
            raise InferenceError("no memory for prompts")
        return output

    report = report_of(fault)
    assert {"textual", "textual, same rows", "scores"} <= failed(report)
    assert report.comparisons[-1].error == "no memory for prompts"


def test_another_first_label_is_found_though_the_embeddings_are_right() -> None:
    manifest = fake_manifest()
    golden = make_golden(manifest)
    turned = Golden(**{**vars(golden), "scores": golden.scores[:, ::-1].copy()})
    report = verify(FakeRuntime(manifest), turned)
    assert failed(report) == {"scores"}
    full = next(c for c in report.comparisons if c.what == "scores" and c.batch_size == 2)
    assert full.top1_agreement is not None
    assert full.top1_agreement < 1


def test_the_report_is_json_without_nan() -> None:
    def fault(name: str, array: Any, output: Any) -> Any:
        return output * np.float32(np.nan) if name == "visual" else output

    data = json.loads(json.dumps(report_of(fault).to_dict(), allow_nan=False))
    assert data["passed"] is False
    assert data["golden_origin"] == "random numbers"
    assert data["runtime"]["execution_provider"] == "numpy"
    first = data["comparisons"][0]
    assert (first["what"], first["batch_size"], first["passed"]) == ("visual", 1, False)
    assert first["max_abs_difference"] is None
    assert first["min_cosine"] is None
    assert "NaN" in first["error"]


def test_a_report_without_comparisons_has_not_passed() -> None:
    report = ParityReport(FakeRuntime(fake_manifest()).describe(), "nothing", ())
    assert not report.passed
    with pytest.raises(ParityError, match=r"Nothing of fake .* was compared with PyTorch"):
        report.check()


def test_comparisons_are_plain_numbers() -> None:
    for comparison in report_of(no_fault).comparisons:
        assert type(comparison.max_abs_difference) is float
        assert type(comparison.passed) is bool
        assert isinstance(comparison, Comparison)


def test_a_bundle_is_verified_with_its_own_golden_data(tmp_path: Path) -> None:
    bundle = write_fake_bundle(tmp_path)
    make_golden(bundle.manifest).save(tmp_path)
    files = hash_files(tmp_path)
    write_manifest(tmp_path, bundle.manifest.model_copy(update={"files": files}))
    assert verify_bundle(Bundle.open(tmp_path), FakeRuntime(bundle.manifest)).passed


def test_a_bundle_without_golden_data_cannot_be_verified(tmp_path: Path) -> None:
    bundle = write_fake_bundle(tmp_path)
    with pytest.raises(BundleError, match="so there is nothing to compare with"):
        verify_bundle(bundle, FakeRuntime(bundle.manifest))


@pytest.mark.parametrize("visual_prompt", ["transf", "joint"])
def test_onnxruntime_agrees_with_itself(tmp_path: Path, visual_prompt: str) -> None:
    bundle = write_tiny_bundle(tmp_path, visual_prompt=visual_prompt)
    with OrtRuntime(bundle) as runtime:
        golden = make_golden(bundle.manifest, runtime=runtime)  # type: ignore[arg-type]
        verify(runtime, golden).check()


def test_an_int8_runtime_that_disagrees_is_told_about_reduced_weights() -> None:
    class Int8(FakeRuntime):
        def describe(self) -> RuntimeInfo:
            return RuntimeInfo("fake", "numpy", "int8", num_threads=1)

        def _run(self, graph: GraphName, array: np.ndarray) -> np.ndarray:
            return super()._run(graph, array) * np.float32(1.1 if graph == "visual" else 1)

    manifest = fake_manifest()
    report = verify(Int8(manifest), make_golden(manifest))
    with pytest.raises(
        ParityError, match=r"--int8-weights reduced, .*no VNNI, or with --precision"
    ):
        report.check()
