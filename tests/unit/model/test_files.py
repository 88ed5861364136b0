from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import pytest
import safetensors.torch
import torch

from actionclip_deploy.errors import CheckpointError
from actionclip_deploy.files import sha256_of_file
from actionclip_deploy.model.checkpoint_files import read_checkpoint_file


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
