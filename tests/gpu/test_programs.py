"""The verbs on the GPU of this machine."""

from __future__ import annotations

from pathlib import Path

from on_gpu import require_tensorrt
from typer.testing import CliRunner

from actionclip_deploy.benchmarks import read_report
from actionclip_deploy.bundle import Bundle
from actionclip_deploy.cli import app
from actionclip_deploy.runtimes import open_runtime


def run(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_doctor_finds_the_gpu(gpu: str) -> None:
    assert gpu.split(",")[0].split(" (")[0] in run("doctor")


def test_auto_opens_what_is_verified(bundles: dict[str, Bundle]) -> None:
    with open_runtime(bundles["fp16"], "auto") as runtime:
        assert runtime.describe().name


def test_the_benchmark_measures_engines_beside_pytorch(
    bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    require_tensorrt("tensorrt")
    bundle = bundles["fp16"].path
    run("build", bundle, "--runtime", "tensorrt")
    words = ("--runtimes", "torch,onnxruntime,tensorrt", "--checkpoint", "motions")
    report = tmp_path / "report.json"
    run("benchmark", bundle, *words, "--batch", "1", "--duration", "1", "--output", report)
    rows = {row.name: row for row in read_report(report).rows}
    assert set(rows) == {"torch", "onnxruntime fp16", "tensorrt fp16"}
    assert not [row.error for row in rows.values() if row.error]
