from __future__ import annotations

import io
import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from actionclip_deploy.errors import CheckpointError
from actionclip_deploy.model.checkpoint_files import (
    is_torchscript,
    read_checkpoint_file,
    read_torchscript,
)


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
    with pytest.raises(CheckpointError, match=r"posix.mkdir is not a tensor.*refused"):
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
