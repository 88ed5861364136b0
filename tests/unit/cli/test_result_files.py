"""Files that `predict --output` and `embed --output` write, interrupted and resumed."""

from __future__ import annotations

import csv
import json
import os
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import safetensors
from click.testing import Result
from fakes import FakeRuntime, write_fake_bundle
from safetensors.numpy import load_file
from typer.testing import CliRunner

from actionclip_deploy import ActionCLIP, Bundle
from actionclip_deploy.cli import app
from actionclip_deploy.files import sha256_of_file

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
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(LABELS))
    built = run("labels", "build", opened.path, "--labels", labels, "--name", "mine")
    assert built.exit_code == 0
    return opened


@pytest.fixture
def videos(tmp_path: Path, rendered_video: Path) -> list[Path]:
    """Two that can be read, and between them one that cannot."""
    paths = [tmp_path / name for name in ("one.mp4", "broken, or so.mp4", "two.mp4")]
    for path in paths:
        is_broken = "broken" in path.name
        path.write_bytes(b"no video" if is_broken else rendered_video.read_bytes())
    return paths


def lines_of(*words: object) -> list[dict[str, object]]:
    return [json.loads(line) for line in run(*words, "--json").stdout.splitlines()]


@pytest.mark.parametrize("suffix", [".csv", ".CSV", ".parquet"])
def test_a_table_has_the_rows_of_the_printed_records(
    bundle: Bundle, videos: list[Path], tmp_path: Path, suffix: str
) -> None:
    output = tmp_path / f"table{suffix}"
    result = run("predict", bundle.path, *videos, "--top-k", 2, "--output", output)
    assert result.exit_code == 3
    assert "2 of 3 videos scored, 1 failed" in " ".join(result.stdout.split())
    table = pd.read_csv(output) if suffix.lower() == ".csv" else pd.read_parquet(output)
    assert list(table.columns) == ["video", "rank", "label", "score", "error"]
    expected = []
    for record in lines_of("predict", bundle.path, *videos, "--top-k", 2):
        for rank, best in enumerate(record.get("predictions", ()), start=1):
            expected.append((record["video"], rank, best["label"], best["score"]))
    scored = table[table["error"].isna()]
    found = scored[["video", "rank", "label", "score"]].itertuples(index=False, name=None)
    assert list(found) == expected
    (failed,) = table[table["error"].notna()].itertuples(index=False)
    assert failed.video == str(videos[1])
    assert "is not a video" in failed.error
    assert table["video"].tolist() == [str(videos[i]) for i in (0, 0, 1, 2, 2)]
    assert sorted(path.name for path in tmp_path.glob("table*")) == [output.name]


def test_a_table_has_the_columns_and_rows_of_to_dataframe(
    tiny_bundle: Path, videos: list[Path], tmp_path: Path
) -> None:
    output, labels = tmp_path / "table.parquet", tmp_path / "labels.txt"
    labels.write_text("running\njumping\n")
    command = ("predict", tiny_bundle, *videos, "--labels", labels, "--runtime", "onnxruntime")
    assert run(*command, "--output", output).exit_code == 3
    with ActionCLIP(tiny_bundle, runtime="onnxruntime", progress=False) as model:
        expected = model(videos, labels=labels).to_dataframe()
    written = pq.read_table(output).to_pandas().astype({"rank": "Int64"})
    pd.testing.assert_frame_equal(written, expected, check_dtype=False)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_is_not_there_until_the_run_has_ended_and_goes_on_with_resume(
    bundle: Bundle,
    videos: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    suffix: str,
) -> None:
    output = tmp_path / f"table{suffix}"
    command = ("predict", bundle.path, *videos, "--output", output)
    whole = tmp_path / f"whole{suffix}"
    assert run(*command[:-1], whole).exit_code == 3

    result_file = import_module("actionclip_deploy.cli.result_files").ResultFile
    add = result_file.add

    def add_one(self, record):  # type: ignore[no-untyped-def]
        if self.done:
            raise KeyboardInterrupt
        return add(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(result_file, "add", add_one)
        assert run(*command).exit_code == 130
    assert not output.exists()
    again = run(*command)
    assert again.exit_code == 2
    assert "add --resume to go on with it" in sentence(again)

    resumed = run(*command, "--resume", "--json")
    assert resumed.exit_code == 3
    assert len(resumed.stdout.splitlines()) == 2  # the first was not scored again
    assert output.read_bytes() == whole.read_bytes() or suffix == ".parquet"
    assert pq.read_table(output) == pq.read_table(whole) if suffix == ".parquet" else True

    before = output.read_bytes()
    finished = run(*command, "--resume")
    assert finished.exit_code == 2
    assert "is whole" in sentence(finished)
    assert "--overwrite" in sentence(finished)
    unasked = run(*command)
    assert unasked.exit_code == 2
    assert "exists; give another name" in sentence(unasked)
    assert output.read_bytes() == before
    assert run(*command, "--overwrite").exit_code == 3


@pytest.mark.parametrize(("share", "num_kept"), [(1.0, 2), (0.5, 1)], ids=["whole", "half"])
def test_an_interruption_in_the_middle_of_a_line_is_told_as_the_file_is(
    bundle: Bundle,
    videos: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    share: float,
    num_kept: int,
) -> None:
    output = tmp_path / "results.jsonl"
    write = os.write
    sizes = []

    def write_two(file: int, content: bytes) -> int:
        if not sizes:
            sizes.append(len(content))
            return write(file, content)
        write(file, content[: round(share * len(content))])
        raise KeyboardInterrupt  # as the signal is answered once the system has written

    with monkeypatch.context() as patch:
        patch.setattr(import_module("actionclip_deploy.cli.result_files").os, "write", write_two)
        done = run("predict", bundle.path, *videos, "--output", output)
    assert done.exit_code == 130
    assert f"{num_kept} of 3 videos are done" in sentence(done)
    assert output.read_bytes().count(b"\n") == num_kept
    assert output.read_bytes().endswith(b"}\n")
    assert run("predict", bundle.path, *videos, "--output", output, "--resume").exit_code == 3
    assert output.read_bytes().count(b"\n") == 3


@pytest.mark.parametrize(
    ("verb", "name", "allowed"),
    [
        ("predict", "a.xlsx", ".jsonl, .ndjson, .json, .csv or .parquet"),
        ("predict", "a.npz", ".jsonl, .ndjson, .json, .csv or .parquet"),
        ("embed", "a.csv", ".npz, .parquet or .safetensors"),
    ],
)
def test_another_suffix_is_refused_before_the_work(
    tmp_path: Path, verb: str, name: str, allowed: str
) -> None:
    # Not even the bundle is looked at.
    result = run(verb, tmp_path / "none", tmp_path / "none.mp4", "--output", tmp_path / name)
    assert result.exit_code == 2
    assert f"give a file that ends in {allowed}." in sentence(result)


@pytest.mark.parametrize("verb", ["predict", "embed"])
def test_parquet_without_its_package_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    output = tmp_path / "a.parquet"
    result = run(verb, tmp_path / "none", tmp_path / "none.mp4", "--output", output)
    assert result.exit_code == 1
    assert "a.parquet needs packages that are not installed; run: " in sentence(result)
    assert "[parquet]" in sentence(result)


def test_a_name_that_is_not_utf_8_can_be_read_in_a_table(
    bundle: Bundle, videos: list[Path], tmp_path: Path
) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9.mp4")
    odd.write_bytes(videos[0].read_bytes())
    for suffix in (".csv", ".parquet"):
        output = tmp_path / f"table{suffix}"
        assert run("predict", bundle.path, odd, "--output", output, "--top-k", 1).exit_code == 0
        if suffix == ".csv":
            with output.open(encoding="utf-8", newline="") as file:
                (row,) = csv.DictReader(file)
            assert row["video"].endswith(r"caf\xe9.mp4")
        else:
            assert pq.read_table(output)["video"][0].as_py().endswith(r"caf\xe9.mp4")


# Embeddings


def embeddings_in(path: Path) -> tuple[np.ndarray, list[str], dict[str, object]]:
    """(B, V, D), names of the videos, and what the file says of them."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            assert set(arrays) == {"embeddings", "videos", "metadata"}
            metadata = json.loads(str(arrays["metadata"]))
            return arrays["embeddings"], arrays["videos"].tolist(), metadata
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, "np") as opened:
            metadata = json.loads(opened.metadata()["metadata"])
        return load_file(path)["embeddings"], metadata["videos"], metadata
    table = pq.read_table(path)
    metadata = json.loads(table.schema.metadata[b"actionclip"])
    frame = table.to_pandas()
    failed = frame[frame["error"].notna()]
    assert failed["embedding"].isna().all()
    assert len(failed) == len(metadata["failed"])
    frame = frame[frame["error"].isna()]
    names = list(dict.fromkeys(frame["video"]))
    assert frame["view"].tolist() == list(range(metadata["num_views"])) * len(names)
    rows = np.stack(frame["embedding"].to_list())
    return rows.reshape(len(names), metadata["num_views"], -1), names, metadata


@pytest.mark.parametrize("suffix", [".npz", ".parquet", ".safetensors"])
@pytest.mark.parametrize("views", ["1x1", "2x3"])
def test_embeddings_are_those_of_python_bit_for_bit(
    tiny_bundle: Path, videos: list[Path], tmp_path: Path, suffix: str, views: str
) -> None:
    output = tmp_path / f"embeddings{suffix}"
    command = ("embed", tiny_bundle, *videos, "--views", views, "--runtime", "onnxruntime")
    result = run(*command, "--output", output)
    assert result.exit_code == 3, result.output
    assert "2 of 3 videos embedded" in " ".join(result.stdout.split())
    assert "broken, or so.mp4 is not a video" in sentence(result)
    with ActionCLIP(tiny_bundle, runtime="onnxruntime", progress=False) as model:
        expected = model.embed([videos[0], videos[2]], views=views)
    embeddings, names, metadata = embeddings_in(output)
    assert embeddings.dtype == np.float32
    assert embeddings.tobytes() == expected.tobytes()
    assert names == [str(videos[0]), str(videos[2])]
    opened = Bundle.open(tiny_bundle)
    assert metadata["bundle"] == str(tiny_bundle)
    assert metadata["bundle_sha256"] == sha256_of_file(tiny_bundle / "manifest.json")
    assert metadata["visual_sha256"] == opened.visual_sha256
    assert metadata["textual_sha256"] == opened.textual_sha256
    assert (metadata["views"], metadata["num_videos"], metadata["sampling"]) == (
        views,
        2,
        "segments",
    )
    assert metadata["model"]["num_frames"] == opened.manifest.model.num_frames
    (failed,) = metadata["failed"]
    assert failed["video"] == str(videos[1])
    assert "is not a video" in failed["error"]


def test_embeddings_are_printed_as_lines(bundle: Bundle, videos: list[Path]) -> None:
    result = run("embed", bundle.path, *videos, "--views", "2x1", "--json")
    assert result.exit_code == 3
    first, broken, second = map(json.loads, result.stdout.splitlines())
    assert [each["video"] for each in (first, broken, second)] == list(map(str, videos))
    assert np.shape(first["embeddings"]) == (2, bundle.manifest.model.embedding_dim)
    np.testing.assert_allclose(np.linalg.norm(first["embeddings"], axis=1), 1, atol=1e-6)
    assert first["embeddings"] == second["embeddings"]  # they are copies
    assert np.shape(first["frames"]["indices"]) == (2, bundle.manifest.model.num_frames)
    assert broken["error"]["code"] == "video_unreadable"
    assert "embeddings" not in broken


def test_embeddings_are_gone_on_with_and_not_mixed_with_those_of_other_options(
    bundle: Bundle, videos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "embeddings.npz"
    command = ("embed", bundle.path, *videos, "--output", output)
    module = import_module("actionclip_deploy.cli.embed")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # All is embedded, and nothing written.
        patch.setattr(module, "embeddings_file", lambda *_: fail)
        assert run(*command).exit_code == 130
    assert not output.exists()
    other = run(*command, "--resume", "--views", "3x1")
    assert other.exit_code == 1
    assert "views '1x1' and this run has '3x1'" in sentence(other)
    resumed = run(*command, "--resume", "--json")
    assert (resumed.exit_code, resumed.stdout) == (3, "")
    embeddings, names, _ = embeddings_in(output)
    assert names == [str(videos[0]), str(videos[2])]
    with np.load(output) as arrays:
        assert arrays["embeddings"].tobytes() == embeddings.tobytes()
    assert [path.name for path in tmp_path.glob("embeddings*")] == [output.name]


def test_embed_says_where_embeddings_could_go(bundle: Bundle, videos: list[Path]) -> None:
    result = run("embed", bundle.path, *videos)
    assert result.exit_code == 2
    assert "--output is missing; give a file that ends in .npz, .parquet or .safetensors" in (
        sentence(result)
    )
