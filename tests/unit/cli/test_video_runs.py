"""`predict` and `embed` into a folder of results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import Result
from fakes import FakeRuntime, write_fake_bundle
from schemas import check_json
from typer.testing import CliRunner

from actionclip_deploy import Bundle
from actionclip_deploy.cli import app, video_runs
from actionclip_deploy.command_records import BatchSummaryRecord
from actionclip_deploy.scale.batch import BatchReader, BatchSettings, Scorer, score_here
from actionclip_deploy.scale.result_folder import read_results
from actionclip_deploy.scale.video_list import videos_in

LABELS = ("an and", "in an", "and")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def sentence(result: Result) -> str:
    return " ".join(result.stderr.replace("│", " ").split())


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    for name in ("options", "labels"):
        module = import_module(f"actionclip_deploy.cli.{name}")
        monkeypatch.setattr(
            module, "open_runtime", lambda bundle, *_, **__: FakeRuntime(bundle.manifest)
        )
    opened = write_fake_bundle(tmp_path / "bundle")
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    words = ("labels", "build", opened.path, "--labels", tmp_path / "labels.txt", "--name", "mine")
    assert run(*words).exit_code == 0
    return opened


@pytest.fixture
def folder(tmp_path: Path, rendered_video: Path) -> Path:
    """Two videos that can be read, and one that cannot."""
    (tmp_path / "videos").mkdir()
    for name in ("one.mp4", "broken, or so.mp4", "two.mp4"):
        content = b"no video" if "broken" in name else rendered_video.read_bytes()
        (tmp_path / "videos" / name).write_bytes(content)
    return tmp_path / "videos"


def table(output: Path) -> list[dict[str, Any]]:
    return sorted(read_results(output).to_pylist(), key=lambda row: row["uri"])


def test_a_folder_has_the_rows_of_the_printed_records(
    bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    done = run("predict", bundle.path, folder, "--top-k", 2, "--workers", 1, "-o", tmp_path / "out")
    assert done.exit_code == 3, done.output
    assert "3 of 3 videos are done (0 were before), 1 failed" in " ".join(done.stdout.split())
    printed = run("predict", bundle.path, folder, "--top-k", 2, "--json").stdout
    found = table(tmp_path / "out")
    for record, row in zip(map(json.loads, printed.splitlines()), found, strict=True):
        assert row["uri"] == record["video"]
        best = record.get("predictions")
        if best is None:
            assert row["error"] == record["error"]["message"]
            assert row["error_class"] == "video_unreadable"
            continue
        assert row["labels"] == [each["label"] for each in best]
        np.testing.assert_allclose(row["scores"], [each["score"] for each in best], atol=1e-6)
        assert row["size"] == (folder / record["name"]).stat().st_size


def test_a_second_run_does_what_is_missing(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    words = ("predict", bundle.path, folder, "--workers", 1, "-o", tmp_path / "out", "--json")
    first = json.loads(run(*words).stdout)
    check_json(BatchSummaryRecord, first)
    assert (first["num_now"], first["is_complete"]) == (3, True)
    assert "add --resume to go on with it" in sentence(run(*words))
    again = json.loads(run(*words, "--resume").stdout)
    assert (again["num_before"], again["num_now"]) == (3, 0)
    (folder / "three.mp4").write_bytes((folder / "one.mp4").read_bytes())
    more = json.loads(run(*words, "--resume").stdout)
    assert (more["num_before"], more["num_now"], more["num_rows"]) == (3, 1, 4)
    other = run(*words, "--resume", "--views", "2x1")
    assert "it has views '1x1' and this one '2x1'" in sentence(other)


def test_columns_of_a_list_and_embeddings_are_kept(
    bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    listed = tmp_path / "list.parquet"
    names = [str(folder / "one.mp4"), str(folder / "two.mp4")]
    pq.write_table(pa.table({"uri": names, "camera": [7, 8]}), listed)
    words = ("--embeddings", "--views", "2x1", "--workers", 1, "-o", tmp_path / "out")
    assert run("predict", bundle.path, listed, *words).exit_code == 0
    found = table(tmp_path / "out")
    assert [row["camera"] for row in found] == [7, 8]
    embeddings = np.array([row["embeddings"] for row in found])
    assert embeddings.shape[:2] == (2, 2)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=2), 1, atol=1e-5)


def test_embed_writes_a_folder_as_well(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    words = ("--workers", 1, "-o", tmp_path / "out")
    assert run("embed", bundle.path, folder, *words).exit_code == 3
    assert run("embed", bundle.path, folder, "-o", tmp_path / "all.npz").exit_code == 3
    with np.load(tmp_path / "all.npz") as arrays:
        expected = dict(zip(arrays["videos"], arrays["embeddings"], strict=True))
    scored = [row for row in table(tmp_path / "out") if row["status"] == "ok"]
    assert len(scored) == 2
    for row in scored:
        assert "labels" not in row
        np.testing.assert_allclose(row["embeddings"], expected[row["uri"]], atol=1e-6)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--timeline",), "--timeline does not go with a folder of results"),
        (("--plot", "a.png"), "--plot does not go with a folder of results"),
        (("--decoder", "nvdec"), "--decoder is nvdec, and videos of such a run are decoded"),
    ],
)
def test_what_does_not_go_with_a_folder_is_refused(
    bundle: Bundle, folder: Path, tmp_path: Path, words: tuple[str, ...], what: str
) -> None:
    done = run("predict", bundle.path, folder, "-o", tmp_path / "out", *words)
    assert done.exit_code == 2
    assert what in sentence(done)


@pytest.mark.parametrize("words", [("--embeddings",), ("--decode-seconds", "3")])
def test_what_goes_with_a_folder_alone_is_refused(
    bundle: Bundle, folder: Path, words: tuple[str, ...]
) -> None:
    done = run("predict", bundle.path, folder, *words)
    assert done.exit_code == 2
    assert f"{words[0]} goes with a folder of results" in sentence(done)


@pytest.mark.parametrize("given", ["s3://bucket/a.mp4", "list.csv"])
def test_addresses_and_lists_ask_for_a_folder(bundle: Bundle, given: str) -> None:
    done = run("predict", bundle.path, given)
    assert done.exit_code == 2
    assert "add --output FOLDER" in sentence(done)


# On a cluster, which this process stands in for: tests/programs/test_ray_cluster.py has a real one


@pytest.fixture
def cluster(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores here what a cluster is asked for, and gives each row twice."""

    def rows_on_ray(
        _: Bundle, bank: Any, settings: BatchSettings, *more: Any
    ) -> Iterator[pa.Table]:
        videos = more[-1]()
        ranker, run = settings.ranker(bundle.manifest, bank), settings.run(bundle, bank)
        scorer = Scorer(FakeRuntime(bundle.manifest), settings, run, ranker)
        with BatchReader(bundle.manifest, replace(settings, num_workers=1)) as reader:
            for table in score_here(videos_in(videos), reader, scorer):
                yield table
                yield table

    monkeypatch.setattr(video_runs, "rows_on_ray", rows_on_ray)
    monkeypatch.setattr(
        video_runs, "open_runtime", lambda bundle, *_, **__: FakeRuntime(bundle.manifest)
    )


def test_a_cluster_writes_the_same_folder(
    cluster: None, bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    words = ("predict", bundle.path, folder, "--workers", 1, "--json", "-o")
    here = json.loads(run(*words, tmp_path / "here").stdout)
    there = json.loads(run(*words, tmp_path / "there", "--engine", "ray").stdout)
    assert (here["engine"], there["engine"]) == ("local", "ray")
    assert (here["num_repeated"], there["num_repeated"]) == (0, 3)
    for one, other in zip(table(tmp_path / "here"), table(tmp_path / "there"), strict=True):
        del one["seconds"], other["seconds"]
        assert one == other


def test_evaluate_measures_what_a_cluster_scores(
    cluster: None, bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("one.mp4 0\ntwo.mp4 1\ngone.mp4 2\n")
    words = ("evaluate", bundle.path, listed, "--root", folder, "--json")
    here, there = run(*words), run(*words, "--engine", "ray")
    expected, found = json.loads(here.stdout), json.loads(there.stdout)
    for report in (expected, found):
        # Of the last two a cluster does not tell.
        for name in ("seconds", "num_frames_encoded", "num_frames_reused"):
            report.pop(name, None)
        for failed in report["failed"]:
            del failed["error"]  # which a process of its own words in another way
    assert found == expected
    assert found["num_videos"] == 2


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--engine", "spark"), "--engine is 'spark'; it must be local or ray"),
        (("--address", "local"), "--address goes with --engine ray"),
        (("--actors", "2"), "--actors goes with --engine ray"),
    ],
)
def test_an_engine_that_there_is_not_is_refused(
    bundle: Bundle, folder: Path, tmp_path: Path, words: tuple[str, ...], what: str
) -> None:
    done = run("predict", bundle.path, folder, "-o", tmp_path / "out", *words)
    assert done.exit_code == 2
    assert what in sentence(done)


def test_a_cluster_needs_a_folder(bundle: Bundle, folder: Path) -> None:
    done = run("predict", bundle.path, folder, "--engine", "ray")
    assert "--engine goes with a folder of results" in sentence(done)
