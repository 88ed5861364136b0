from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeRuntime, fake_manifest, write_fake_bundle
from safetensors.numpy import load_file, save_file
from tiny_graphs import write_tiny_bundle

from actionclip_deploy.bundle import Bundle, hash_files, write_manifest
from actionclip_deploy.errors import (
    BundleError,
    InferenceError,
    IntegrityError,
    ParityError,
    ShapeError,
)
from actionclip_deploy.manifest import GraphName, Manifest, QuantizationSpec
from actionclip_deploy.runtimes.base import (
    Audit,
    AuditedProduct,
    GraphProduct,
    ProductPrecision,
    RuntimeInfo,
)
from actionclip_deploy.runtimes.ort import OrtRuntime
from actionclip_deploy.runtimes.parity import (
    TOLERANCES,
    Comparison,
    Golden,
    ParityReport,
    compare,
    failed,
    tolerance_of,
    verify,
    verify_bundle,
)
from actionclip_deploy.scoring import score_clips

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


def failed_parts(report: ParityReport) -> set[str]:
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

    assert "visual, rows by themselves" in failed_parts(report_of(halve_in_batches))


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
    assert graph in failed_parts(report)
    others = {"visual", "temporal", "textual"} - {graph}
    assert not failed_parts(report) & others  # each graph is given the reference's inputs
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
    assert "visual" in failed_parts(report)
    assert "scores" not in failed_parts(report)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_a_failure_of_their_own(value: float) -> None:
    def fault(name: str, array: Any, output: Any) -> Any:
        if name == "visual" and len(array) == 3:
            output[1, 2] = value
        return output

    report = report_of(fault)
    assert failed_parts(report) == {"visual"}
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
    assert {"temporal, same rows", "scores"} <= failed_parts(report)


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

    assert failed_parts(report_of(fault)) == {
        "visual, reordered rows",
        "visual, repeated rows",
        "visual, rows by themselves",
    }


def test_rows_that_leak_into_each_other_are_found() -> None:
    def fault(name: str, array: Any, output: Any) -> Any:
        return output + np.float32(0.01) * output.mean(axis=0) if name == "textual" else output

    assert {"textual", "textual, full length"} <= failed_parts(report_of(fault))


def test_a_row_beyond_the_golden_rows_is_compared() -> None:
    def fault(name: str, array: Any, output: Any) -> Any:
        if name == "visual":
            output[8:] = 1  # 2 clips of 4 frames are right
        return output

    assert failed_parts(report_of(fault)) == {"visual", "scores"}


def test_text_that_fails_is_told_for_the_scores_too() -> None:
    def fault(name: str, array: Any, output: Any) -> Any:
        if name == "textual":
            raise InferenceError("no memory for prompts")
        return output

    report = report_of(fault)
    assert {"textual", "textual, same rows", "scores"} <= failed_parts(report)
    assert report.comparisons[-1].error == "no memory for prompts"


def test_another_first_label_is_found_though_the_embeddings_are_right() -> None:
    manifest = fake_manifest()
    golden = make_golden(manifest)
    turned = Golden(**{**vars(golden), "scores": golden.scores[:, ::-1].copy()})
    report = verify(FakeRuntime(manifest), turned)
    assert failed_parts(report) == {"scores"}
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


# One output beside the reference's


def rows(*values: Any) -> np.ndarray:
    return np.array(values, np.float32)


REFERENCE = rows([1, 0], [0, 1], [0.6, 0.8])


def test_equal_outputs_agree() -> None:
    result = compare("visual", REFERENCE, REFERENCE, 1e-4, 0.99999)
    assert result.passed
    assert (result.what, result.batch_size, result.error) == ("visual", 3, None)
    assert result.max_abs_difference == 0
    assert result.min_cosine == pytest.approx(1)
    assert result.top1_agreement is None
    assert result.top5_agreement is None


def test_the_largest_difference_and_the_smallest_cosine_are_told() -> None:
    output = REFERENCE.copy()
    output[1] = [0.5, 1]
    result = compare("visual", output, REFERENCE, 1.0, 0.9)
    assert result.max_abs_difference == 0.5
    assert result.min_cosine == pytest.approx(1 / math.sqrt(1.25))  # of (0.5, 1) and (0, 1)
    assert not result.passed
    assert result.in_words() == (
        "max abs difference 0.5, allowed 1; min cosine 0.8944272, allowed 0.9"
    )


def test_a_difference_over_the_tolerance_disagrees_whatever_the_cosine() -> None:
    # Twice as long and in the same direction, as where a normalisation is left out.
    result = compare("visual", 2 * REFERENCE, REFERENCE, 0.1, 0.99999)
    assert result.min_cosine == pytest.approx(1)
    assert not result.passed


def test_another_direction_disagrees_whatever_the_difference() -> None:
    output = rows([1, 0], [0, 1], [0.8, 0.6])
    assert not compare("visual", output, REFERENCE, 0.3, 0.99).passed
    assert compare("visual", output, REFERENCE, 0.3, 0.9).passed


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_never_agree(value: float) -> None:
    output = REFERENCE.copy()
    output[2, 1] = value
    result = compare("visual", output, REFERENCE, math.inf, -2.0)
    assert not result.passed
    assert result.in_words() == "1 of 6 values are NaN or infinite"
    assert math.isnan(result.min_cosine)
    assert math.isnan(result.max_abs_difference)


def test_rows_of_zeros_agree_with_nothing() -> None:
    result = compare("visual", np.zeros_like(REFERENCE), REFERENCE, 2.0, 0.0)
    assert result.min_cosine == -1
    assert not result.passed


@pytest.mark.parametrize("shape", [(1, 2), (3, 3), (3, 1), (2,)])
def test_another_shape_never_agrees(shape: tuple[int, ...]) -> None:
    result = compare("temporal", np.zeros(shape, np.float32), REFERENCE, 10.0)
    assert not result.passed
    assert result.in_words() == f"the output has shape {shape}, expected (3, 2)"


def test_a_run_that_failed_never_agrees() -> None:
    result = failed("textual", 3, "out of memory")
    assert not result.passed
    assert result.in_words() == "out of memory"


def test_the_first_label_has_to_agree() -> None:
    reference = rows([0.7, 0.2, 0.1], [0.1, 0.2, 0.7])
    output = rows([0.7, 0.2, 0.1], [0.1, 0.5, 0.4])
    result = compare("scores", output, reference, 0.35, labels=True)
    assert result.max_abs_difference == pytest.approx(0.3)
    assert result.top1_agreement == 0.5
    assert result.top5_agreement == 1.0  # all three labels are in both lists
    assert not result.passed
    assert "the first label agrees for 50% of the clips" in result.in_words()


def test_labels_that_rounding_decides_between_may_change_places() -> None:
    reference = rows([0.4000, 0.3995, 0.2005])
    output = rows([0.3996, 0.3999, 0.2005])
    assert compare("scores", output, reference, 1e-3, labels=True).passed
    # The same exchange between labels that are further apart than the tolerance.
    result = compare("scores", output, reference, 4e-4, labels=True)
    assert result.top1_agreement == 0.0
    assert not result.passed


def test_the_first_five_labels_are_compared_as_sets() -> None:
    reference = rows([9, 8, 7, 6, 5, 4, 3, 2])
    output = rows([5, 6, 7, 8, 3, 4, 9, 2])  # first five: 6, 3, 2, 1, 0 -> 6 is not among them
    result = compare("scores", output, reference, 0.5, labels=True)
    assert result.top5_agreement == pytest.approx(4 / 5)


@pytest.mark.parametrize("num_labels", [1, 2])
def test_fewer_than_five_labels_are_compared(num_labels: int) -> None:
    reference = rows([1, 0][:num_labels])
    result = compare("scores", reference, reference, 1e-3, labels=True)
    assert (result.top1_agreement, result.top5_agreement) == (1.0, 1.0)


def test_tolerances_are_those_promised() -> None:
    assert TOLERANCES["fp32"].difference == 1e-4
    assert TOLERANCES["fp32"].min_cosine == 0.99999
    assert TOLERANCES["fp16"].min_cosine == 0.9999
    for narrow, wide in zip(
        vars(TOLERANCES["fp32"]).values(), vars(TOLERANCES["fp16"]).values(), strict=True
    ):
        assert narrow != wide


def test_bf16_may_be_further_off_than_fp16_and_no_further_than_int8() -> None:
    fp16, bf16, int8 = (TOLERANCES[precision] for precision in ("fp16", "bf16", "int8"))
    assert fp16.min_cosine > bf16.min_cosine == 0.999
    assert fp16.difference < bf16.difference
    assert fp16.score < bf16.score <= int8.score
    assert fp16.row < bf16.row <= int8.row


@pytest.mark.parametrize(("computed", "passes"), [("fp32", False), ("fp16", False), ("bf16", True)])
def test_a_runtime_is_judged_by_what_it_was_asked_to_compute_in(
    computed: ProductPrecision, passes: bool
) -> None:
    def rounded(_: str, __: Any, output: Any) -> Any:
        """A difference vector of 0.02 to each row, a cosine of 0.9998: twelve layers in bf16."""
        signs = np.where(np.arange(output.shape[1]) % 2, 1, -1) / np.sqrt(output.shape[1])
        norms = np.linalg.norm(output, axis=1, keepdims=True)
        return (output + 0.02 * norms * signs).astype(np.float32)

    class Asked(Changed):
        def precision_of(self, graph: GraphName) -> ProductPrecision:
            return computed

    manifest = fake_manifest()
    report = verify(Asked(manifest, rounded), make_golden(manifest))
    assert report.passed is passes


def test_a_graph_that_is_computed_in_something_else_does_not_pass() -> None:
    def audited(asked: ProductPrecision, found: ProductPrecision) -> Audit:
        product = GraphProduct("matmul", "MatMul", 100, asked)
        return Audit((AuditedProduct(product, ("gemm",), found),), 1, subject="The graph")

    class Telling(FakeRuntime):
        found: ProductPrecision = "fp32"

        def audit(self) -> dict[GraphName, Audit]:
            return {"visual": audited("fp32", self.found)}

    manifest = fake_manifest()
    runtime = Telling(manifest)
    assert verify(runtime, make_golden(manifest)).passed
    runtime.found = "bf16"
    report = verify(runtime, make_golden(manifest))
    assert not report.passed
    assert report.to_dict()["audit"]["visual"]["computed"] == {"bf16": 1.0}
    with pytest.raises(
        ParityError,
        match=r"visual: The graph computes 100% .*matmul \(fp32\) by the layer gemm in b",
    ):
        report.check()


def int8_manifest(precision: str = "int8", **measured: float) -> Manifest:
    manifest = fake_manifest()
    visual = manifest.graphs["visual"].model_copy(update={"precision": precision})
    spec = QuantizationSpec(
        recipe="dynamic",
        weight_range="reduced",
        quantized_blocks=("blocks.0",),
        unquantized_blocks=(),
        num_calibration_clips=0,
        accepted_by="cosine",
        bound=0.999,
        unquantized_value=None,
        quantized_value=0.9995,
        golden_min_cosine=measured.get("cosine", 0.9995),
        golden_max_difference=measured.get("difference", 0.03),
    )
    graphs = {**manifest.graphs, "visual": visual}
    return manifest.model_copy(update={"graphs": graphs, "quantization": spec})


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_quantised_graph_may_be_twice_as_far_off_as_at_its_export(precision: str) -> None:
    tolerance = tolerance_of(int8_manifest(precision), "visual")
    assert tolerance.min_cosine == pytest.approx(0.999, abs=1e-7)
    assert tolerance.min_cosine <= 0.999
    assert tolerance.difference == tolerance.row == pytest.approx(0.06)


def test_an_int8_graph_need_not_be_better_than_fp16() -> None:
    tolerance = tolerance_of(int8_manifest(cosine=1.0, difference=0.0), "visual")
    assert (tolerance.min_cosine, tolerance.difference) == (0.9999, 0.02)


def test_the_other_graphs_of_an_int8_bundle_are_judged_as_fp32() -> None:
    assert tolerance_of(int8_manifest(), "temporal") == TOLERANCES["fp32"]
    assert tolerance_of(fake_manifest(), "visual") == TOLERANCES["fp32"]


def test_saturation_as_measured_without_vnni_is_beyond_the_tolerance() -> None:
    """A ViT-B/32 with full weights: 0.99995 with VNNI, 0.981 without; reduced, 0.99988 in both."""
    full, reduced = int8_manifest(cosine=0.99995), int8_manifest(cosine=0.999875)
    assert tolerance_of(full, "visual").min_cosine > 0.981
    assert tolerance_of(reduced, "visual").min_cosine < 0.999878


def test_the_margin_is_the_smallest_lead_of_the_right_label() -> None:
    reference = rows([0.7, 0.2, 0.1], [0.1, 0.5, 0.4])
    output = rows([0.6, 0.3, 0.1], [0.1, 0.4, 0.5])
    result = compare("scores", output, reference, 0.5, labels=True)
    assert result.margin == pytest.approx(-0.1)  # 0.4 of the right one, 0.5 of another
    assert compare("visual", output, reference, 0.5).margin is None


def test_a_single_label_has_no_margin() -> None:
    assert compare("scores", rows([1]), rows([1]), 0.5, labels=True).margin is None


# Golden data


def golden_of(bundle: Bundle, *, num_clips: int = 2, num_frames: int = 4) -> Golden:
    generator = np.random.default_rng(3)
    frames = generator.integers(0, 256, (num_clips, num_frames, 32, 32, 3), dtype=np.uint8)
    tokens = generator.integers(1, 99, (2 * len(LABELS), 6), dtype=np.int32)
    reference = FakeRuntime(bundle.manifest)
    return Golden.from_reference(reference, frames, tokens, LABELS, origin="random numbers")


def with_golden(bundle: Bundle, golden: Golden) -> Bundle:
    golden.save(bundle.path)
    return rehashed(bundle)


def rehashed(bundle: Bundle) -> Bundle:
    files = hash_files(bundle.path)
    write_manifest(bundle.path, bundle.manifest.model_copy(update={"files": files}))
    return Bundle.open(bundle.path, check_hashes=True)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_fake_bundle(tmp_path / "bundle")


def test_golden_data_holds_what_the_reference_computes(bundle: Bundle) -> None:
    golden = golden_of(bundle)
    reference = FakeRuntime(bundle.manifest)
    assert golden.frame_features is not None
    for b in range(2):
        features = reference.encode_frames(golden.frames[b])
        np.testing.assert_array_equal(golden.frame_features[b], features)
        np.testing.assert_array_equal(
            golden.video_embeddings[b], reference.encode_clips(features[np.newaxis])[0]
        )
    embeddings = reference.encode_text(golden.tokens)
    np.testing.assert_array_equal(golden.text_embeddings, embeddings)
    by_template = np.stack([embeddings[:3], embeddings[3:]])
    np.testing.assert_array_equal(golden.scores, score_clips(golden.video_embeddings, by_template))


@pytest.mark.parametrize("visual_prompt", ["transf", "joint"])
@pytest.mark.parametrize("num_clips", [1, 3])
def test_golden_data_survives_the_bundle(
    tmp_path: Path, visual_prompt: str, num_clips: int
) -> None:
    bundle = write_fake_bundle(tmp_path, visual_prompt=visual_prompt)
    golden = golden_of(bundle, num_clips=num_clips)
    loaded = Golden.load(with_golden(bundle, golden))
    assert (golden.frame_features is None) == (visual_prompt == "joint")
    for name, value in vars(golden).items():
        np.testing.assert_array_equal(getattr(loaded, name), value)
        assert getattr(getattr(loaded, name), "dtype", None) == getattr(value, "dtype", None)


def test_arrays_that_are_not_contiguous_are_saved_as_they_look(bundle: Bundle) -> None:
    golden = golden_of(bundle)
    mirrored = Golden(**{**vars(golden), "frames": golden.frames[:, :, :, ::-1]})
    loaded = Golden.load(with_golden(bundle, mirrored))
    np.testing.assert_array_equal(loaded.frames, golden.frames[:, :, :, ::-1])


def test_a_bundle_without_golden_data_says_so(bundle: Bundle) -> None:
    with pytest.raises(
        BundleError, match=r"has no golden/golden\.safetensors, so there is nothing to compare"
    ):
        Golden.load(bundle)


def drop_scores(path: Path) -> None:
    arrays = load_file(path / "golden/golden.safetensors")
    del arrays["scores"]
    save_file(arrays, path / "golden/golden.safetensors")


def pickle(path: Path) -> None:
    (path / "golden/golden.safetensors").write_bytes(b"\x80\x04K\x01.")


def no_json(path: Path) -> None:
    (path / "golden/golden.json").write_text("{")


def a_list(path: Path) -> None:
    (path / "golden/golden.json").write_text("[]")


def no_labels(path: Path) -> None:
    (path / "golden/golden.json").write_text('{"labels": [], "origin": "x"}')


def fewer_labels(path: Path) -> None:
    (path / "golden/golden.json").write_text('{"labels": ["run", "hide"], "origin": "x"}')


def numbers_for_labels(path: Path) -> None:
    text = json.loads((path / "golden/golden.json").read_text())
    text["labels"] = list(range(len(text["labels"])))
    (path / "golden/golden.json").write_text(json.dumps(text))


@pytest.mark.parametrize(
    "damage",
    [drop_scores, pickle, no_json, a_list, no_labels, fewer_labels, numbers_for_labels],
)
def test_golden_data_that_cannot_be_used_is_refused(
    bundle: Bundle, damage: Callable[[Path], None]
) -> None:
    with_golden(bundle, golden_of(bundle))
    damage(bundle.path)
    with pytest.raises(
        IntegrityError, match=r"The golden data of .* cannot be used .*copy the bun"
    ):
        Golden.load(rehashed(bundle))


def test_golden_data_of_another_model_is_refused_when_it_is_read(tmp_path: Path) -> None:
    bundle = write_fake_bundle(tmp_path / "wide", embedding_dim=24)
    golden = golden_of(write_fake_bundle(tmp_path / "narrow"))
    with pytest.raises(
        IntegrityError, match=r"\(T, S\), D and K x C of \(\(4, 32\), 16, 6\) and the model .* 24,"
    ):
        Golden.load(with_golden(bundle, golden))


def test_golden_data_of_another_number_of_frames_is_refused(bundle: Bundle) -> None:
    with pytest.raises(ShapeError, match="they are of different models"):
        golden_of(bundle, num_frames=5).check_model(bundle.manifest)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("frames", np.zeros((2, 4, 32, 30, 3), np.uint8)),
        ("frame_features", np.zeros((2, 4, 15), np.float32)),
        ("video_embeddings", np.zeros((2, 16))),
        ("tokens", np.zeros((6, 6), np.int64)),
        ("text_embeddings", np.zeros((5, 16), np.float32)),
        ("scores", np.zeros((2, 4), np.float32)),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(
    bundle: Bundle, name: str, value: np.ndarray
) -> None:
    fields: dict[str, Any] = {**vars(golden_of(bundle)), name: value}
    with pytest.raises(ShapeError, match=rf"^{name} has shape .*; expected shape"):
        Golden(**fields)


def test_prompts_that_are_no_multiple_of_the_labels_are_refused(bundle: Bundle) -> None:
    golden = golden_of(bundle)
    fields = {
        **vars(golden),
        "tokens": golden.tokens[:5],
        "text_embeddings": golden.text_embeddings[:5],
    }
    with pytest.raises(ShapeError, match="tokens are 5 prompts and there are 3 labels"):
        Golden(**fields)


def test_the_text_of_golden_data_can_be_read_by_people(bundle: Bundle) -> None:
    golden_of(bundle).save(bundle.path)
    text = json.loads((bundle.path / "golden/golden.json").read_text())
    assert text == {"labels": ["run", "hide", "jump"], "origin": "random numbers"}
