"""Forms as they arrive, whatever is wrong with them, and their files on disk."""

from __future__ import annotations

import asyncio
import errno
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actionclip_deploy.errors import RequestRefusedError
from actionclip_deploy.serve.uploads import Form, Spool, read_form

TYPE = "multipart/form-data; boundary=xyz"
GOOD = (
    b'--xyz\r\nContent-Disposition: form-data; name="labels"\r\n\r\nmine\r\n'
    b'--xyz\r\nContent-Disposition: form-data; name="video"; filename="a/b/c.mp4"\r\n'
    b"Content-Type: video/mp4\r\n\r\n\x00\r\n--xy\r\n\xff\r\n"
    b'--xyz\r\nContent-Disposition: form-data; name="labels"\r\n\r\nyours\r\n--xyz--\r\n'
)


def read(folder: Path, body: bytes, sizes: list[int] | None = None, **options: object) -> Form:
    async def chunks() -> AsyncIterator[bytes]:
        start = 0
        for size in sizes or [len(body)]:
            yield body[start : start + size]
            start += size
        yield body[start:]

    async def run() -> tuple[Form, list[bytes]]:
        limits = {"file_fields": frozenset({"video"}), "field_bytes": 100, "max_files": 2}
        given = {"content_type": TYPE, **limits, **options}
        with Spool(folder, max_bytes=10**6) as spool, spool.files() as files:
            form = await read_form(chunks(), given.pop("content_type"), files, **given)  # type: ignore[arg-type]
            contents = [each.file.path.read_bytes() for each in form.files]
        return form, contents

    form, contents = asyncio.run(run())
    form.contents = contents  # type: ignore[attr-defined]
    return form


@settings(deadline=None, max_examples=50)
@given(sizes=st.lists(st.integers(1, 40), max_size=12))
def test_a_form_is_read_the_same_whatever_the_pieces(
    sizes: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    form = read(tmp_path_factory.mktemp("spool"), GOOD, sizes)
    assert form.fields == {"labels": ["mine", "yours"]}
    assert [(each.field, each.name) for each in form.files] == [("video", "c.mp4")]
    assert form.contents == [b"\x00\r\n--xy\r\n\xff"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("C:\\films\\a.mp4", "a.mp4"),
        ("../../etc/passwd", "passwd"),
        ("", "the video"),
        ("a\x1b[31mb\x9b.mp4", r"a\x1b[31mb\x9b.mp4"),
        ("x" * 400, "x" * 255),
    ],
)
def test_a_name_is_shown_without_folders_and_oddities(
    given: str, shown: str, tmp_path: Path
) -> None:
    head = b'--xyz\r\nContent-Disposition: form-data; name="video"; filename="%b"\r\n\r\n'
    escaped = given.replace("\\", "\\\\").encode()
    form = read(tmp_path, head % escaped + b"1\r\n--xyz--\r\n")
    assert form.files[0].name == shown


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (GOOD[:-10], 400, "ends in the middle of a part"),
        (b"", 400, "ends in the middle of a part"),
        (b"no form at all", 400, "not multipart/form-data"),
        (GOOD.replace(b'; name="labels"', b"", 1), 400, "has no name"),
        (GOOD.replace(b"mine", b"\xff\xfe"), 400, "'labels' is not UTF-8"),
        (GOOD.replace(b"mine", b"x" * 101), 413, "bytes in fields that are no files"),
        (
            GOOD.replace(b"video/mp4", b"x" * 9000),
            400,
            "not multipart/form-data.*header size",
        ),
    ],
)
def test_a_form_that_is_none_is_refused_in_a_sentence(
    body: bytes, status: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(RequestRefusedError, match=message) as caught:
        read(tmp_path, body)
    assert caught.value.status == status
    assert not list(tmp_path.iterdir())


def test_a_form_without_a_boundary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestRefusedError, match="no boundary"):
        read(tmp_path, GOOD, content_type="multipart/form-data")


def test_more_files_than_allowed_are_refused(tmp_path: Path) -> None:
    part = GOOD[GOOD.index(b"--xyz", 5) : GOOD.rindex(b"--xyz\r\n")]
    with pytest.raises(RequestRefusedError, match=r"3 files and may have 2") as caught:
        read(tmp_path, part * 3 + b"--xyz--\r\n")
    assert caught.value.status == 413


# Uploads on disk: private, bounded together, and gone when their request ends.


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


def killed_server(folder: Path) -> None:
    """What a server leaves that was killed with an upload."""
    program = (
        "import os, sys; from pathlib import Path\n"
        "from actionclip_deploy.serve.uploads import Spool\n"
        "spool = Spool(Path(sys.argv[1]), max_bytes=100)\n"
        "(spool.folder / 'upload').write_bytes(b'x'); os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder)], check=False)
    assert done.returncode == -9


def test_what_a_killed_server_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    killed_server(tmp_path)
    killed_server(tmp_path)
    (left,) = tmp_path.iterdir()  # the second one has removed the first one's
    assert (left / "upload").exists()
    with Spool(tmp_path, max_bytes=100) as spool:
        assert list(tmp_path.iterdir()) == [spool.folder]
    assert list(tmp_path.iterdir()) == []


def test_the_uploads_of_a_live_server_are_left_alone(tmp_path: Path) -> None:
    others = [tmp_path / "actionclip-mine", tmp_path / "actionclip-spool-link"]
    others[0].mkdir()
    others[1].symlink_to(others[0])
    with Spool(tmp_path, max_bytes=100) as first, first.files() as files:
        file = files.make()
        with Spool(tmp_path, max_bytes=100) as second:
            assert second.folder != first.folder
        assert file.path.exists()
    assert sorted(tmp_path.iterdir()) == others
