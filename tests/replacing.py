"""Replaces a bank, a bundle or a file again and again, and is killed before each step of it.

A program: `python replacing.py KIND swap|rename FOLDER` kills one writer after another, each one
file operation later than the last, and prints a line of JSON for each: what a reader finds then,
and what is left in the folder after the next writer.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fakes import write_fake_bundle

from actionclip_deploy import files
from actionclip_deploy.bundle import Bundle, new_folder
from actionclip_deploy.labels import LabelBank, list_label_banks

KILLED = 9
_EVENTS = {"open", "fcntl.flock", "os.chmod", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}


def small_bank(bundle: Bundle, label: str) -> LabelBank:
    embeddings = np.zeros((1, 1, 16), np.float32)
    embeddings[..., len(label)] = 1.0
    return LabelBank(
        "k", (label,), ("{}",), embeddings, bundle.textual_sha256, encoder_checked=True
    )


def write_bank(folder: Path, content: str) -> None:
    bundle = Bundle.open(folder)
    small_bank(bundle, content).save(bundle, overwrite=True)


def read_bank(folder: Path) -> str:
    bundle = Bundle.open(folder)
    (listed,) = list_label_banks(bundle)
    assert listed.problem is None, listed
    return LabelBank.load(bundle, "k").labels[0]


def write_bundle(folder: Path, content: str) -> None:
    with new_folder(folder / "b", overwrite=True, marker="manifest.json") as new:
        write_fake_bundle(new, textual=content.encode())


def read_bundle(folder: Path) -> str:
    path = folder / "b"
    Bundle.open(path, check_hashes=True)
    # Not by `Bundle.file`, which refuses a file of the bundle that has come in its place since.
    return files.read_replaceable(path, (path / "textual.onnx").read_text, OSError)


def write_file(folder: Path, content: str) -> None:
    files.write_text(folder / "f.json", content * 1000)


def read_file(folder: Path) -> str:
    text = (folder / "f.json").read_text()
    assert len(text) % 1000 == 0
    return text[: len(text) // 1000]


KINDS: dict[str, tuple[Callable[[Path, str], None], Callable[[Path], str]]] = {
    "bank": (write_bank, read_bank),
    "bundle": (write_bundle, read_bundle),
    "file": (write_file, read_file),
}


def die_at(step: int) -> None:
    """End this process, as by SIGKILL, before its file operation of this number."""
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1
        if count == step:
            os._exit(KILLED)

    def around(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            tick()
            try:
                return call(*arguments)
            finally:
                tick()

        return counted

    def write_in_two(path: Path, data: bytes) -> int:
        with path.open("wb", buffering=0) as file:
            tick()
            file.write(data[: len(data) // 2])
            tick()
            file.write(data[len(data) // 2 :])
        return len(data)

    files.swap_folders = around(files.swap_folders)
    os.fsync = around(lambda _: None)
    Path.write_bytes = write_in_two  # type: ignore[method-assign,assignment]
    sys.addaudithook(lambda event, _: tick() if event in _EVENTS else None)


def leftovers(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob(".*"))


def kill_at_each_step(kind: str, folder: Path) -> None:
    write, read = KINDS[kind]
    step, code = 0, KILLED
    while code:
        step += 1
        write(folder, "old")
        child = os.fork()
        if child == 0:
            die_at(step)
            write(folder, "new")
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, KILLED), code
        try:
            found = read(folder)
        except Exception as exc:  # noqa: BLE001 - whatever it is, it is told
            found = f"{type(exc).__name__}: {exc}"
        write(folder, "next")
        print(json.dumps([step, found, read(folder), leftovers(folder)]))


if __name__ == "__main__":
    os.fsync = lambda fd: None  # noqa: ARG005 - slow, and a process that is killed leaves the same without
    if sys.argv[2] == "rename":
        files.swap_folders = lambda *_: False
    kill_at_each_step(sys.argv[1], Path(sys.argv[3]))
