"""Uploads on disk: private, bounded together, and gone when their request ends."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from actionclip_deploy.errors import RequestRefusedError
from actionclip_deploy.serve.uploads import Spool


def test_files_are_private_and_gone_with_their_request(tmp_path: Path) -> None:
    with Spool(tmp_path, max_bytes=100) as spool:
        with spool.files() as files:
            first, second = files.make(), files.make()
            first.write(b"12345")
            first.close()
            second.write(b"678")
            assert first.path.read_bytes() == b"12345"
            assert first.path.stat().st_mode & 0o077 == 0
            assert spool.folder.stat().st_mode & 0o077 == 0
            assert spool.num_bytes == 8
        assert spool.num_bytes == 0
        assert not list(spool.folder.iterdir())
    assert not list(tmp_path.iterdir())


def test_uploads_are_bounded_together(tmp_path: Path) -> None:
    with Spool(tmp_path, max_bytes=10) as spool, spool.files() as files:
        files.make().write(b"123456")
        with spool.files() as others:
            other = others.make()
            with pytest.raises(RequestRefusedError, match="may take 10 bytes") as caught:
                other.write(b"12345")
            assert (caught.value.status, caught.value.code) == (503, "spool_full")
        with spool.files() as others:
            others.make().write(b"1234")


def test_a_full_disk_is_the_servers_and_leaves_nothing(tmp_path: Path) -> None:
    class FullDisk:
        def write(self, data: bytes = b"") -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        close = write

    with Spool(tmp_path, max_bytes=100) as spool:
        with spool.files() as files:
            file = files.make()
            file._file.close()
            file._file = FullDisk()  # type: ignore[assignment]
            with pytest.raises(RequestRefusedError, match=r"No space left.*try again later"):
                file.write(b"123")
        assert spool.num_bytes == 0
        assert not list(spool.folder.iterdir())
