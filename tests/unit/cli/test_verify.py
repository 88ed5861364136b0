"""What `verify` prints: a line for each graph, and all that was compared on request."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from actionclip_deploy.cli import app
from actionclip_deploy.cli.verify import in_shares, print_report
from actionclip_deploy.records import RuntimeInfo
from actionclip_deploy.runtimes.base import Audit, AuditedProduct, GraphProduct
from actionclip_deploy.runtimes.parity import Comparison, ParityReport, failed

INFO = RuntimeInfo("fake", "numpy", "fp32", num_threads=1)


def comparison(what: str, batch_size: int, difference: float, cosine: float = 1.0) -> Comparison:
    passed = difference < 1e-3
    return Comparison(what, batch_size, difference, cosine, 1e-3, None, None, None, passed)


def lines(text: str) -> list[list[str]]:
    """The cells of the rows of the tables."""
    rows = [line for line in text.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in row.strip("│").split("│")] for row in rows]


def test_verify_prints_a_line_for_each_graph_and_all_on_request(tiny_bundle: Path) -> None:
    command = ["verify", str(tiny_bundle), "--runtime", "onnxruntime"]
    short = CliRunner().invoke(app, command, env={"COLUMNS": "80"})
    assert short.exit_code == 0, short.output
    rows = lines(short.stdout)
    assert [row[0] for row in rows] == ["visual", "temporal", "textual", "all, to scores"]
    assert {row[-1] for row in rows} == {"agrees"}
    assert all(len(line) <= 80 for line in short.stdout.splitlines()[:-1])
    long = CliRunner().invoke(app, [*command, "--verbose"], env={"COLUMNS": "200"})
    assert len(lines(long.stdout)) == sum(int(row[1]) for row in rows)
    assert "visual, reordered rows" in long.stdout


def test_what_openvino_computes_in_is_told(tiny_bundle: Path) -> None:
    command = ["verify", str(tiny_bundle), "--runtime", "openvino"]
    done = CliRunner().invoke(app, command, env={"COLUMNS": "80"})
    assert done.exit_code == 0, done.output
    for graph in ("visual", "temporal", "textual"):
        assert f"{graph} is computed in fp32." in done.stdout
    command = ["inspect", str(tiny_bundle), "--runtime", "openvino"]
    assert "computed in" in CliRunner().invoke(app, command, env={"COLUMNS": "80"}).stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("verify", "--runtime", "tensorrt", "--precision", "bf16"), "--precision is openvino's"),
        (("verify", "--runtime", "tensorrt", "--device", "npu"), "--device is npu and tensorrt"),
        (("verify", "--precision", "bf16"), "--precision is 'bf16' and the runtime is onnxruntime"),
        (("inspect", "--precision", "bf16"), "go with --runtime; give that, too"),
        (("inspect", "--runtime", "torch"), "--runtime is 'torch'; openvino alone tells it"),
    ],
)
def test_a_precision_that_would_change_nothing_is_refused(
    tiny_bundle: Path, words: tuple[str, ...], told: str
) -> None:
    done = CliRunner().invoke(app, [words[0], str(tiny_bundle), *words[1:]])
    assert done.exit_code == 2
    assert told in " ".join(done.output.replace("│", " ").split())


def test_shares_are_told_with_what_is_not_known() -> None:
    def product(name: str, num_macs: int, precision: str | None) -> AuditedProduct:
        asked = GraphProduct(name, "MatMul", num_macs, "bf16")
        return AuditedProduct(asked, (name,), precision)  # type: ignore[arg-type]

    products = (product("a", 10, "fp32"), product("b", 85, "bf16"), product("c", 5, None))
    words = "bf16 for 85.0%, fp32 for 10.0%, what is not told for 5.0%"
    assert in_shares(Audit(products, 3)) == words


def test_a_line_has_the_worst_of_its_graph(capsys: pytest.CaptureFixture[str]) -> None:
    report = ParityReport(
        INFO,
        "rendered",
        (
            comparison("visual", 1, 1e-6),
            comparison("visual", 33, 3e-5, 0.9999),
            comparison("visual, repeated rows", 5, 2e-6),
            comparison("scores", 2, 1e-7),
        ),
    )
    print_report(report, title="A report")
    assert lines(capsys.readouterr().out) == [
        ["visual", "3", "1 to 33", "3.0e-05", "0.9999000", "agrees"],
        ["all, to scores", "1", "2", "1.0e-07", "1.0000000", "agrees"],
    ]


def test_what_differs_is_counted_and_each_of_it_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = comparison("visual", 4, 0.5, 0.3)
    broken = failed("textual", 2, "the run failed")
    assert math.isnan(broken.min_cosine)
    report = ParityReport(INFO, "rendered", (comparison("visual", 1, 1e-6), wrong, broken))
    print_report(report, title="A report")
    shown = capsys.readouterr().out
    assert "What differs" in shown
    rows = lines(shown)
    assert rows[0] == ["visual", "2", "1 to 4", "5.0e-01", "0.3000000", "1 differ"]
    assert rows[1] == ["textual", "1", "2", "none", "none", "1 differ"]
    assert [row[:2] for row in rows[2:]] == [["visual", "4"], ["textual", "2"]]
