"""Folders and files that are replaced: by writers that are killed at any moment, beside readers."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import replacing
from fakes import fake_tokenizer, write_fake_bundle

from actionclip_deploy import files
from actionclip_deploy.errors import BundleError
from actionclip_deploy.files import (
    read_replaceable,
    remove_folder,
    staged_file,
    staged_folder,
)
from actionclip_deploy.motions import write_dataset, write_video
from actionclip_deploy.runtimes.onnx_graphs import write_model

CASES = pytest.mark.parametrize(
    ("kind", "how"),
    [
        *((kind, how) for kind in ("bank", "bundle") for how in ("swap", "rename")),
        ("file", "rename"),
    ],
)


@CASES
def test_a_writer_killed_at_any_step_leaves_the_old_or_the_new_and_the_next_one_tidies_up(
    kind: str, how: str, tmp_path: Path
) -> None:
    write_fake_bundle(tmp_path / "root")
    done = subprocess.run(
        [sys.executable, replacing.__file__, kind, how, str(tmp_path / "root")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = [line for line in lines if line[1] not in ("old", "new") or line[2:] != ["next", []]]
    assert wrong == []
    found = [line[1] for line in lines]
    assert found == sorted(found, reverse=True)  # old until one step, new from then on
    assert found[0] == "old"
    assert found[-1] == "new"
    assert len(found) > {"file": 8, "bank": 20, "bundle": 20}[kind]


def replace_until(folder: Path, how: str, kind: str, ready: object, stop: object) -> None:
    if how == "rename":
        files.swap_folders = lambda *_: False
    write, _ = replacing.KINDS[kind]
    ready.set()  # type: ignore[attr-defined]
    turn = 0
    while not stop.is_set():  # type: ignore[attr-defined]
        turn += 1
        write(folder, "x" * (1 + turn % 7))


@CASES
def test_readers_beside_a_writer_never_fail(kind: str, how: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_fake_bundle(root)
    write, read = replacing.KINDS[kind]
    write(root, "x")
    context = multiprocessing.get_context("spawn")
    ready, stop = context.Event(), context.Event()
    writer = context.Process(target=replace_until, args=(root, how, kind, ready, stop))
    writer.start()
    try:
        assert ready.wait(60)
        num_reads, contents = 0, set()
        end = time.monotonic() + 2.0
        # Longer where the machine is busy: with that few reads nothing would have been tried.
        while time.monotonic() < end or num_reads <= 20 or len(contents) < 2:
            contents.add(read(root))
            num_reads += 1
    finally:
        stop.set()
        writer.join(60)
    assert writer.exitcode == 0
    assert num_reads > 20
    assert contents <= {"x" * length for length in range(1, 8)}
    assert len(contents) > 1
    assert replacing.leftovers(root) == []


def test_what_a_living_writer_is_writing_is_not_tidied_up(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "slow") as slow, staged_file(tmp_path / "file") as file:
        (slow / "a").write_text("a")
        with staged_folder(tmp_path / "fast") as fast:
            (fast / "b").write_text("b")
        (tmp_path / "slow").mkdir()
        remove_folder(tmp_path / "slow")
        files.write_text(tmp_path / "file", "fast")
        file.write_text("slow")
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert names == {"slow", "slow/a", "fast", "fast/b", "file"}
    assert (tmp_path / "file").read_text() == "slow"


def test_another_process_that_is_writing_is_not_disturbed(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from actionclip_deploy.files import staged_folder\n"
        "with staged_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'a').write_text('theirs'); print('ready', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "a")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as other:  # type: ignore[call-overload]
        assert other.stdout.readline() == "ready\n"
        with staged_folder(tmp_path / "a") as folder:
            (folder / "a").write_text("ours")
        assert len(replacing.leftovers(tmp_path)) == 1
        other.communicate()
    assert other.returncode == 0
    assert (tmp_path / "a" / "a").read_text() == "theirs"
    assert replacing.leftovers(tmp_path) == []


def test_hidden_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    for name in (".git", ".a-abcdefgh", ".cache"):
        (tmp_path / name).mkdir()
    with staged_folder(tmp_path / "a"):
        pass
    assert len(list(tmp_path.iterdir())) == 4


def test_damage_that_stays_is_told_and_a_missing_folder_at_once(tmp_path: Path) -> None:
    calls: list[None] = []

    def read() -> None:
        calls.append(None)
        raise BundleError("damaged")

    with pytest.raises(BundleError, match="damaged"):
        read_replaceable(tmp_path, read, BundleError)
    assert len(calls) == 2
    with pytest.raises(BundleError, match="damaged"):
        read_replaceable(tmp_path / "gone", read, BundleError)
    assert len(calls) == 3


def test_a_check_and_its_replacement_are_one_step(tmp_path: Path) -> None:
    """Eight writers count up a number that each has read: none of the steps is lost."""
    target = tmp_path / "a"
    with staged_folder(target) as folder:
        (folder / "n").write_text("0")

    class MeanwhileError(Exception):
        pass

    def count_up() -> None:
        for _ in range(5):
            done = False
            while not done:
                seen = (target / "n").read_text()

                def check(seen: str = seen) -> None:
                    if (target / "n").read_text() != seen:
                        raise MeanwhileError

                try:
                    with staged_folder(target, check=check) as folder:
                        (folder / "n").write_text(str(int(seen) + 1))
                    done = True
                except MeanwhileError:
                    pass

    threads = [threading.Thread(target=count_up) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (target / "n").read_text() == "40"
    assert replacing.leftovers(tmp_path) == []


def test_a_name_of_many_bytes_can_be_replaced(tmp_path: Path) -> None:
    name = "\N{FILM FRAMES}" * 60  # 240 bytes
    for content in "ab":
        with staged_folder(tmp_path / name) as folder:
            (folder / "a").write_text(content)
        files.write_text(tmp_path / f"{name}.txt", content)
    assert {path.name for path in tmp_path.iterdir()} == {name, f"{name}.txt"}


def test_a_reader_beside_a_writer_of_texts_never_finds_half_of_one(tmp_path: Path) -> None:
    """What the tokenizer and the rendered data write replaces a file as everything else does."""

    def write() -> list[Path]:
        fake_tokenizer(tmp_path).save(tmp_path / "tokenizer.json")
        write_video(tmp_path / "a.mp4", np.zeros((2, 16, 16, 3), np.uint8), codec="mpeg4")
        write_dataset(tmp_path / "data", "train", 1, 0, size=32, codec="mpeg4")
        data = (path for path in (tmp_path / "data").rglob("*") if path.is_file())
        return [tmp_path / "tokenizer.json", tmp_path / "a.mp4", *data]

    paths = write()
    (tmp_path / "kept").mkdir()
    kept = [tmp_path / "kept" / str(number) for number in range(len(paths))]
    for path, link in zip(paths, kept, strict=True):
        link.hardlink_to(path)
    write()
    assert len(paths) > 5
    for path, link in zip(paths, kept, strict=True):
        assert not path.samefile(link), path  # and a reader who had it open reads on in the old one
        assert path.read_bytes() == link.read_bytes()
    assert replacing.leftovers(tmp_path) == []


@pytest.mark.parametrize("max_embedded_bytes", [10**6, 0])
def test_a_graph_is_written_whole_or_is_not_there(
    max_embedded_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx

    weight = onnx.numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    node = onnx.helper.make_node("Identity", ["w"], ["y"])
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (64, 64))
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [output], [weight]))
    path = tmp_path / "g.onnx"
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    write_model(copy, path, max_embedded_bytes=max_embedded_bytes)
    np.testing.assert_array_equal(
        onnx.numpy_helper.to_array(onnx.load(str(path)).graph.initializer[0]), 1
    )
    seen = []

    def killed(self: Path, target: Path) -> None:
        seen.append(onnx.load(str(target)) if Path(target).exists() else None)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_model(model, path, max_embedded_bytes=max_embedded_bytes)
    (found,) = seen  # at the last moment: the old one, or none where its weights have gone
    assert (found is None) == (max_embedded_bytes == 0)
    assert replacing.leftovers(tmp_path) == []
