"""`actionclip benchmark` from the command to the files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from full_disk import NO_ROOM, small_files
from typer.testing import CliRunner

from actionclip_deploy.benchmarks import read_report
from actionclip_deploy.benchmarks.candidates import RowSpec
from actionclip_deploy.cli import app

QUICK = ("--batch", "1,2", "--rounds", "9", "--duration", "0.1", "--threads", "1")


def _run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["benchmark", *map(str, words)], env={"COLUMNS": "100"})
    return result.exit_code, result.output


@pytest.mark.timeout(1200)
def test_runtimes_and_a_peer_are_measured_and_agree(
    tiny_bundle: Path,
    tiny_checkpoints: dict[str, Path],
    plain_graphs: Path,
    rendered_video: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def prepare(row: RowSpec, folder: Path) -> RowSpec:
        if row.runtime == "onnxruntime-plain":  # of the same bundle and checkpoint
            return replace(row, graphs=plain_graphs)
        return real(row, folder)

    real = RowSpec.prepare
    monkeypatch.setattr(RowSpec, "prepare", prepare)
    words = ("--runtimes", "torch,onnxruntime,onnxruntime-plain", "--precisions", "fp32,fp16")
    files = ("--output", tmp_path / "r.json", "--html", tmp_path / "r.html")
    code, output = _run(
        tiny_bundle,
        *(*words, "--checkpoint", tiny_checkpoints["Transf"], *QUICK, *files),
        *("--plot", tmp_path / "r.png", "--videos", rendered_video.parent),
    )
    assert code == 0, output
    report = read_report(tmp_path / "r.json")
    names = ["torch", "onnxruntime fp32", "onnxruntime fp16", "onnxruntime-plain"]
    assert [row.name for row in report.rows] == names
    assert all(name in output for name in names)
    for row in report.rows:
        assert row.error is None
        assert [result.batch_size for result in row.results] == [1, 2]
        assert all(result.parity.passed for result in row.results)
        assert row.stages is not None
        assert {"demux", "decode", "resize", "visual"} <= set(row.stages.stages_ms)
        assert row.stages.end_to_end_videos_per_second
        assert row.start is not None
        assert row.start.peak_resident_bytes >= row.start.resident_bytes > 10**7
    # PyTorch is larger than ONNX Runtime: each row's memory is its own.
    torch_row, ours, _, plain = report.rows
    assert torch_row.start
    assert ours.start
    assert plain.start
    assert ours.start.peak_resident_bytes < torch_row.start.peak_resident_bytes
    assert plain.start.peak_resident_bytes < torch_row.start.peak_resident_bytes
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "r.html").read_text(encoding="utf-8")
    code, output = _run("--compare", tmp_path / "r.json", tmp_path / "r.json", "--json")
    assert code == 0
    compared = json.loads(output)
    assert {change["verdict"] for change in compared["changes"]} == {"within noise"}
    assert compared["differences"] == []


def test_a_runtime_that_is_not_there_is_reported_and_the_exit_code_says_so(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    code, output = _run(
        tiny_bundle, "--runtimes", "onnxruntime,torch", *QUICK, "--output", tmp_path / "r.json"
    )
    assert code == 4
    assert "torch runs the checkpoint" in " ".join(output.split())
    report = read_report(tmp_path / "r.json")
    assert len(report.rows[0].results) == 2
    assert report.rows[1].results == ()


@pytest.mark.parametrize(
    ("option", "name"), [("--output", "r.json"), ("--html", "r.html"), ("--plot", "r.png")]
)
def test_a_report_that_finds_no_room_leaves_nothing(
    option: str, name: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    path = tmp_path / name
    quick = ("--batch", "1", "--rounds", "9", "--duration", "0.02", "--threads", "1")
    with small_files():
        code, output = _run(tiny_bundle, *quick, option, path)
    assert code == 1, output
    words = " ".join(output.split())
    assert f"error: {path} cannot be written (File too large); {NO_ROOM}" in words
    assert list(tmp_path.iterdir()) == []


def test_the_schema_names_every_part_of_a_report() -> None:
    code, output = _run("--schema")
    assert code == 0
    schema = json.loads(output)
    assert {"rows", "machine", "matmul_rate", "conditions"} <= set(schema["properties"])
    assert "latency_ms" in schema["$defs"]["BatchResult"]["properties"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "Give a BUNDLE to measure"),
        (("BUNDLE", "--rates", "1"), "No such option: --rates"),
        (("BUNDLE", "--runtimes", "tensorflow"), "choose from torch, onnxruntime"),
        (("BUNDLE", "--batch", "1,x"), "give numbers of 1 or more"),
        (("BUNDLE", "--batch", "0"), "give numbers of 1 or more"),
        (("BUNDLE", "--batch", "1,1,2", "--duration", "0"), "--duration is 0.0"),
        (("BUNDLE", "--duration", "1e308"), "--duration is 1e+308; it must be a positive"),
        (("BUNDLE", "--rounds", "100000000"), "it must be 9 or more, and 10,000 at most"),
        (("BUNDLE", "--precisions", "fp16"), "give --checkpoint to export it"),
        (("BUNDLE", "--videos", "nowhere"), "does not exist"),
        (("BUNDLE", "--videos", "EMPTY"), "holds no video files"),
        (("BUNDLE", "--output", "nowhere/r.json"), "give a file in a folder that exists"),
        (("BUNDLE", "--html", "EMPTY"), "give a file in a folder that exists"),
        (("BUNDLE", "--plot", "r.txt"), "give a file that ends in"),
    ],
)
def test_wrong_usage_is_told_before_anything_runs(
    tiny_bundle: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    named = {"BUNDLE": tiny_bundle, "EMPTY": tmp_path}
    code, output = _run(*(named.get(word, word) for word in words))
    assert code == 2
    assert message in " ".join(output.replace("│", " ").split())


@pytest.mark.parametrize(
    "words",
    [
        ("--url", "http://x", "--mode", "frames"),
        ("--url=http://x",),
        ("bundle", "--rates", "1", "--url", "http://x"),
    ],
)
def test_who_looks_for_the_load_on_a_server_is_told_where_it_is(words: tuple[str, ...]) -> None:
    code, output = _run(*words)
    assert code == 2
    assert "by `actionclip load URL`, not by --url" in " ".join(output.replace("│", " ").split())


def test_reports_that_cannot_be_read_end_in_one_sentence(tmp_path: Path) -> None:
    code, output = _run("--compare", tmp_path / "a.json", tmp_path / "b.json")
    assert code == 1
    assert "a.json cannot be read" in " ".join(output.split())
