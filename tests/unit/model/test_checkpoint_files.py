"""Checkpoint files of every kind, read without running code."""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import pickle
import re
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from actionclip_deploy.errors import CheckpointError
from actionclip_deploy.files import sha256_of_file
from actionclip_deploy.model.checkpoint_files import (
    is_torchscript,
    read_checkpoint_file,
    read_torchscript,
)


def test_a_pickled_dictionary_is_read(save) -> None:
    content = read_checkpoint_file(save({"epoch": 3, "inner": {"a": torch.arange(3)}}))
    assert content["epoch"] == 3
    assert content["inner"]["a"].tolist() == [0, 1, 2]


def test_a_file_of_an_old_torch_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save({"a": torch.arange(3)}, path, _use_new_zipfile_serialization=False)
    assert read_checkpoint_file(path)["a"].tolist() == [0, 1, 2]


def test_safetensors_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.arange(3)}, path)
    assert read_checkpoint_file(path)["a"].tolist() == [0, 1, 2]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere.pt does not exist; give the path"):
        read_checkpoint_file(tmp_path / "nowhere.pt")


def test_a_pipe_is_not_called_missing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a.pt is not a file but a pipe, a socket or a dev"):
        read_checkpoint_file(tmp_path / "a.pt")


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a directory; a checkpoint is one file"):
        read_checkpoint_file(tmp_path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.pt").touch()
    with pytest.raises(CheckpointError, match=r"empty.pt is empty; fetch or save"):
        read_checkpoint_file(tmp_path / "empty.pt")


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_cut_off_file_is_refused(save, share: float) -> None:
    path = save({"a": torch.zeros(10_000)})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(CheckpointError, match="is cut off: the end of the file is missing"):
        read_checkpoint_file(path)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_cut_off_file_of_an_old_torch_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "old.pt"
    torch.save({"a": torch.zeros(10_000)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(CheckpointError, match="cannot be read: it is cut off, damaged or no"):
        read_checkpoint_file(path)


@pytest.mark.parametrize(
    "data", [b"id,name\n0,abseiling\n", b"\x89PNG\r\n\x1a\n" + bytes(64), bytes(64)]
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "other.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"other.pt is not a checkpoint: it starts with"):
        read_checkpoint_file(tmp_path / "other.pt")


def test_a_pickle_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.pt").write_bytes(b"\x80\x02garbage")
    with pytest.raises(CheckpointError, match="cannot be read: it is cut off, damaged or no"):
        read_checkpoint_file(tmp_path / "other.pt")


def test_a_zip_of_something_else_is_refused(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "other.pt", "w") as file:
        file.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match="cannot be read: it is cut off, damaged or no"):
        read_checkpoint_file(tmp_path / "other.pt")


def test_damaged_safetensors_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(bytes(range(64)))
    with pytest.raises(CheckpointError, match="cannot be read: it is cut off, damaged or no"):
        read_checkpoint_file(tmp_path / "a.safetensors")


def test_a_lone_tensor_is_refused(save) -> None:
    with pytest.raises(CheckpointError, match="holds a Tensor; a checkpoint is a dictionary"):
        read_checkpoint_file(save(torch.zeros(3)))


@pytest.mark.parametrize("new_format", [True, False])
def test_pickled_classes_are_refused_with_the_way_out(tmp_path: Path, new_format: bool) -> None:
    path = tmp_path / "vifi.pt"
    content = {"model": {"a": torch.zeros(1)}, "config": argparse.Namespace(depth=2)}
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    match = r"other objects than tensors \(argparse.Namespace\).*refused.*weights_only=False"
    with pytest.raises(CheckpointError, match=match):
        read_checkpoint_file(path)


def test_the_way_out_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = tmp_path / "old.pt", tmp_path / "new.pt"
    torch.save({"model": {"a": torch.ones(1)}, "config": argparse.Namespace(depth=2)}, old)
    with pytest.raises(CheckpointError) as refused:
        read_checkpoint_file(old)
    advice = str(refused.value).split("that file: ")[1]
    exec(advice, {"torch": torch, "OLD": old, "NEW": new})
    assert read_checkpoint_file(new)["model"]["a"].tolist() == [1.0]


def test_the_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 8192  # more than one chunk
    (tmp_path / "file").write_bytes(data)
    assert sha256_of_file(tmp_path / "file") == hashlib.sha256(data).hexdigest()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2)
        self.ln_1 = nn.LayerNorm(8)
        self.bn = nn.BatchNorm1d(8)
        self.fc = nn.Linear(8, 8).half()
        self.sizes = [1, 2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ln_1(x)


class Program(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.strided = nn.Parameter(torch.randn(3, 2).t())
        self.tied = self.strided
        self.register_buffer("input_resolution", torch.tensor(224))
        self.name = "program"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "program.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.jit is on its way out
        torch.jit.save(torch.jit.script(Program()), path)
    return path


def test_tensors_are_those_that_torch_itself_reads(archive: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        expected = torch.jit.load(archive).state_dict()
    found = read_torchscript(archive)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value)


def test_archives_are_told_from_pickled_state_dicts(archive: Path, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "plain.pt")
    assert is_torchscript(archive)
    assert not is_torchscript(tmp_path / "plain.pt")


class Harm:
    def __reduce__(self):
        return os.mkdir, (os.environ["HARM"],)


def with_record(archive: Path, name: str, data: bytes) -> Path:
    """The archive with the bytes of one record replaced."""
    other = archive.with_name("altered.pt")
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(other, "w") as new:
        for entry in old.namelist():
            new.writestr(entry, data if entry.endswith(name) else old.read(entry))
    return other


def test_a_program_that_hides_a_call_is_refused_and_not_run(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    altered = with_record(archive, "/data.pkl", pickle.dumps(Harm(), protocol=2))
    with pytest.raises(CheckpointError, match=r"asks to run os.mkdir, refused"):
        read_checkpoint_file(altered)
    assert not (tmp_path / "harm").exists()


def test_a_tensor_beyond_its_storage_is_refused(archive: Path) -> None:
    with zipfile.ZipFile(archive) as old:
        record = next(name for name in old.namelist() if name.endswith("/data.pkl"))
        data = old.read(record)
    # The strided parameter is 2 x 3; the pickle holds its sizes as the bytes K\x02K\x03.
    assert data.count(b"(K\x02K\x03t") == 1
    altered = with_record(archive, "/data.pkl", data.replace(b"(K\x02K\x03t", b"(K\x02K\xfft"))
    with pytest.raises(CheckpointError, match=r"cannot be read: .*out of bounds"):
        read_checkpoint_file(altered)


def test_an_archive_without_its_objects_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "hollow.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("hollow/constants.pkl", b"")
    with pytest.raises(CheckpointError, match=re.escape("0 records are named data.pkl")):
        read_checkpoint_file(path)


def test_a_storage_of_an_unknown_kind_is_refused(archive: Path) -> None:
    class Odd(pickle.Pickler):
        def persistent_id(self, obj: object) -> object:
            return ("storage", "no type", "0", "cpu", 1) if obj == "odd" else None

    data = io.BytesIO()
    Odd(data, protocol=2).dump("odd")
    altered = with_record(archive, "/data.pkl", data.getvalue())
    with pytest.raises(CheckpointError, match="is not a tensor's storage"):
        read_checkpoint_file(altered)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_would_run_a_program_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int
) -> None:
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    path = tmp_path / "evil.pt"
    path.write_bytes(pickle.dumps({"a": 1, "b": Harm()}, protocol=protocol))
    with pytest.raises(CheckpointError, match=r"evil.pt asks to run os.mkdir, refused"):
        read_checkpoint_file(path)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("new_format", [True, False])
def test_a_saved_checkpoint_that_would_run_a_program_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_format: bool
) -> None:
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    path = tmp_path / "evil.pt"
    torch.save({"a": Harm()}, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(CheckpointError, match=r"evil.pt asks to run os.mkdir, refused"):
        read_checkpoint_file(path)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("record", ["bomb/data.pkl", "bomb/version", "bomb/byteorder"])
def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, record: str) -> None:
    path = tmp_path / "bomb.pt"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file,
        file.open(record, "w", force_zip64=True) as entry,
    ):
        for _ in range(100):
            entry.write(bytes(1 << 20))
    assert path.stat().st_size < 1 << 20
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"declares 104857600 bytes of bomb/.* most that is"):
        read_checkpoint_file(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_compressed_records_are_refused(save, tmp_path: Path) -> None:
    packed = tmp_path / "packed.pt"
    with (
        zipfile.ZipFile(save({"a": torch.zeros(10_000)})) as old,
        zipfile.ZipFile(packed, "w") as new,
    ):
        for entry in old.namelist():
            kind = zipfile.ZIP_DEFLATED if "/data/" in entry else zipfile.ZIP_STORED
            new.writestr(entry, old.read(entry), kind)
    with pytest.raises(CheckpointError, match=r"compressed records .*declare 40000\)"):
        read_checkpoint_file(packed)


def test_records_that_declare_more_than_the_file_has_are_refused(save) -> None:
    path = save({"a": torch.zeros(1000)})
    data = path.read_bytes()
    size = (4000).to_bytes(4, "little")
    assert data.count(size * 2) >= 1
    path.write_bytes(data.replace(size * 2, (4_000_000).to_bytes(4, "little") * 2))
    with pytest.raises(CheckpointError, match=r"and its records declare 4\d{6}, so it is refused"):
        read_checkpoint_file(path)
