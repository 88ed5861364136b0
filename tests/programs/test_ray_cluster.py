"""A run on a Ray cluster of three nodes gives the rows of this machine, also if a node is lost."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
import pytest
from rendering import render
from typer.testing import CliRunner

from actionclip_deploy.archive import ArchiveReader
from actionclip_deploy.cli import app
from actionclip_deploy.scale.result_folder import read_results

PROGRAM = Path(__file__).resolve().parents[1] / "ray_program.py"
NUM_VIDEOS = 50
# Rounding of the views that share a call, which are others on a cluster.
TOLERANCE = 1e-6
# A number that lies between two of float16 may be rounded to either.
FLOAT16_TOLERANCE = 2**-11

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs the extra `ray`"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    whole = [
        render(tmp_path / f"{n}.mp4", num_frames=8 + n, size=(64, 48)).read_bytes()
        for n in range(4)
    ]
    for number in range(NUM_VIDEOS):
        content = whole[number % 4]
        if number % 10 == 7:
            content = content[: len(content) // 2]
        (folder / f"{number:03d}.mp4").write_bytes(content)
    (folder / "empty.mp4").write_bytes(b"")
    return folder


def rows(output: Path) -> list[dict[str, Any]]:
    return by_uri(read_results(output))


def by_uri(table: pa.Table) -> list[dict[str, Any]]:
    return sorted(table.to_pylist(), key=lambda row: row["uri"])


def score_here(*words: str | Path) -> None:
    """By the command line on this machine; some of the videos fail."""
    done = CliRunner().invoke(app, [*map(str, words), "--runtime", "onnxruntime", "--workers", "1"])
    assert done.exit_code == 3, done.output


def on_a_cluster(*words: str | Path) -> subprocess.CompletedProcess[str]:
    # The names of Ray's sockets have to be shorter than below `tmp_path`.
    with tempfile.TemporaryDirectory(prefix="ray-") as short:
        return subprocess.run(
            [sys.executable, PROGRAM, *map(str, words)],
            env={**os.environ, "TMPDIR": short},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )


def assert_same_rows(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    """All but where a row was computed, and how fast."""
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"scores", "embeddings", "node", "seconds"}:
            assert one[name] == other[name], name
        for name in one.keys() & {"scores", "embeddings"}:
            if one[name] is None:
                assert other[name] is None
            else:
                np.testing.assert_allclose(one[name], other[name], atol=TOLERANCE)


def test_a_cluster_that_loses_a_node_gives_each_row_once(
    tiny_bundle: Path, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "labels.txt").write_text("running\njumping\nwalking\n")
    words = ["predict", tiny_bundle, folder, "--labels", tmp_path / "labels.txt", "--embeddings"]
    score_here(*words, "--output", tmp_path / "here")
    done = on_a_cluster(3, 8, *words, "--runtime", "onnxruntime", "--output", tmp_path / "there")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "a node was killed" in done.stderr
    summary = json.loads((tmp_path / "there" / "summary.json").read_text())
    assert summary["is_complete"]
    assert summary["num_now"] == NUM_VIDEOS + 1
    found = rows(tmp_path / "there")
    assert_same_rows(rows(tmp_path / "here"), found)
    assert sum(row["status"] == "failed" for row in found) == 6


# On a single core, what reads the list and what encodes want it at once.
@pytest.mark.parametrize("num_nodes", [1, 2])
def test_a_dataset_that_is_scored_from_python_has_the_rows_of_this_machine(
    num_nodes: int, tiny_bundle: Path, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "labels.txt").write_text("running\njumping\nwalking\n")
    videos = sorted(map(str, folder.iterdir()))
    listed = pa.table({"uri": videos, "camera": [f"gate {n % 3}" for n in range(len(videos))]})
    pa.parquet.write_table(listed, tmp_path / "list.parquet")
    files = [tiny_bundle, tmp_path / "list.parquet"]
    labels, here, there = tmp_path / "labels.txt", tmp_path / "here", tmp_path / "there"
    score_here("predict", *files, "--labels", labels, "--output", here)
    done = on_a_cluster(num_nodes, 0, "score", *files, labels, there)
    assert done.returncode == 0, done.stdout + done.stderr
    found = by_uri(pa.dataset.dataset(there).to_table())
    assert_same_rows(rows(here), found)
    assert [(row["uri"], row["camera"]) for row in found] == list(
        zip(videos, listed["camera"].to_pylist(), strict=True)
    )
    # The list is one block: its videos are shared out among the machines all the same.
    (tasks,) = re.findall(r"MapBatches\(_read_block\): (\d+) tasks", done.stdout)
    assert int(tasks) == math.ceil(len(videos) / 16)
    assert "progress bars: True" in done.stdout  # what is the user's own is left alone


def windows(archive: Path) -> dict[str, tuple[np.ndarray, np.ndarray, Any]]:
    """Intervals, embeddings and what is known, by the path of each video."""
    with ArchiveReader.open(archive) as reader:
        snapshot, videos = reader.snapshot(), reader.videos()
    table = np.concatenate([np.asarray(each) for each in snapshot.shards])
    spans = {
        path: (snapshot.intervals[a : a + n], table[a : a + n])
        for path, a, n in zip(snapshot.paths, snapshot.first, snapshot.count, strict=True)
    }
    nothing = np.empty((0, 2)), np.empty((0, 0), np.float16)
    return {path: (*spans.get(path, nothing), video) for path, video in videos.items()}


def test_an_archive_that_a_cluster_makes_is_that_of_this_machine(
    tiny_bundle: Path, folder: Path, tmp_path: Path
) -> None:
    words = ["index", tiny_bundle, folder, "--runtime", "onnxruntime", "--window", "0.4"]
    words += ["--static", "2", "--thumbnails", "--output"]
    here = CliRunner().invoke(app, list(map(str, [*words, tmp_path / "here"])))
    assert here.exit_code == 3, here.output
    done = on_a_cluster(3, 8, *words, tmp_path / "there")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "a node was killed" in done.stderr
    # What is the same is not done again, which needs no cluster.
    again = CliRunner().invoke(app, list(map(str, [*words, tmp_path / "there", "--engine", "ray"])))
    assert f"0 videos added, {NUM_VIDEOS + 1} unchanged" in again.stdout
    expected, found = windows(tmp_path / "here"), windows(tmp_path / "there")
    assert len(found) == NUM_VIDEOS + 1
    assert found.keys() == expected.keys()
    for path, (spans, embeddings, video) in expected.items():
        assert found[path][2] == video
        np.testing.assert_array_equal(found[path][0], spans)
        np.testing.assert_allclose(found[path][1], embeddings, atol=FLOAT16_TOLERANCE)
