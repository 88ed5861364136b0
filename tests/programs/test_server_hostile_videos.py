"""Files that nobody should send: each is answered by one sentence, and the server goes on.

One server gets all of them. Its decoding processes end only where a file takes too long; that is
counted, and so is the memory of all processes.
"""

from __future__ import annotations

import csv
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from rendering import render
from serving import npy_bytes
from serving_programs import (
    Server,
    bundle_with_bank,
    children_of,
    memory_bytes,
    running_server,
)

pytestmark = pytest.mark.usefixtures("cache_of_the_run")

NUM_WORKERS = 2
FAST = {"preset": "ultrafast", "crf": "30"}
MIB = 1024 * 1024
# What the server itself may grow by: uploads go to disk in chunks, and pixels of one video at a
# time come back from a decoding process (8 frames of 64 x 64 here). Measured: 1 MiB.
SERVER_GROWTH_BYTES = 32 * MIB
# `Limits.decode_memory_bytes`, which the system holds the decoding processes to.
WORKER_GROWTH_BYTES = 1024 * MIB
# Frames that were refused are not kept. Measured: 56 MiB, of a peak of 787.
WORKER_KEPT_BYTES = 256 * MIB


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bank")
    return bundle_with_bank(tiny_bundle, folder, "mine", ["run", "walk", "sit"])


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("hostile")
    options = ("--workers", str(NUM_WORKERS), "--decode-seconds", "3", "--max-body-mib", "32")
    with running_server(bundle, folder, *options) as server:
        yield server


@pytest.fixture
def still_good(server: Server, rendered_video: Path) -> Iterator[None]:
    """After the test the server answers a good request, has its processes, and kept no file."""
    yield
    answer = post(server, rendered_video.read_bytes())
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["results"][0]["predictions"]) == 3
    assert len(server.worker_ids()) == NUM_WORKERS
    assert list(server.spool.rglob("*-0")) == []


def post(server: Server, data: bytes, part: str = "video", **fields: str) -> httpx.Response:
    with server.client() as client:
        return client.post(
            "/v1/classify",
            files={part: ("evil.bin", data)},
            data={"labels": "mine", **fields},
        )


def refusal(answer: httpx.Response) -> tuple[int, str]:
    """Status and code; the sentence names the file as its sender does and nothing of the server."""
    error = answer.json()["error"]
    assert error["request_id"] == answer.headers["x-request-id"]
    message = error["message"]
    assert "evil.bin" in message
    assert "/" not in message.replace("multipart/form-data", "")
    assert "\n" not in message
    assert message.endswith((".", "?"))
    return answer.status_code, error["code"]


def png(width: int, height: int) -> bytes:
    """A black picture of 1 bit a pixel: a thousandth of its pixels in bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    row = bytes(1 + -(-width // 8))
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def gif(width: int, height: int, num_frames: int) -> bytes:
    """Two colours; each frame is one pixel on a canvas of any size."""
    header = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    control = b"\x21\xf9\x04\x00\x01\x00\x00\x00"  # a hundredth of a second
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x4c\x01\x00"
    return header + (control + frame) * num_frames + b"\x3b"


def ivf(width: int, height: int) -> bytes:
    """A VP8 keyframe of a few bytes that says how large it is."""
    tag = (1 << 4 | 16 << 5).to_bytes(3, "little")  # a keyframe, shown, 16 bytes of partition
    frame = tag + b"\x9d\x01\x2a" + struct.pack("<HH", width, height) + bytes(64)
    head = b"DKIF" + struct.pack("<HH4sHHIIII", 0, 32, b"VP80", width, height, 10, 1, 2, 0)
    return head + b"".join(struct.pack("<IQ", len(frame), n) + frame for n in range(2))


def h264(width: int, height: int, num_frames: int) -> bytes:
    """Any size in multiples of 16, and slices with next to nothing in them, to be patched."""

    def ue(value: int) -> str:  # exponential Golomb code
        bits = f"{value + 1:b}"
        return "0" * (len(bits) - 1) + bits

    def unit(kind: int, bits: str) -> bytes:
        bits += "1"
        bits += "0" * (-len(bits) % 8)
        payload = int(bits, 2).to_bytes(len(bits) // 8, "big")
        escaped = re.sub(rb"\0\0(?=[\0-\3])", b"\0\0\3", payload)
        return b"\0\0\0\1" + bytes([kind]) + escaped

    profile = f"{66:08b}{0:08b}{62:08b}"
    sizes = ue(width // 16 - 1) + ue(height // 16 - 1)
    parameters = profile + ue(0) + ue(0) + ue(2) + ue(1) + "0" + sizes + "1100"
    picture = ue(0) + ue(0) + "00" + ue(0) * 3 + "000" + ue(0) * 3 + "000"
    intra = ue(0) + ue(7) + ue(0) + "0000" + ue(0) + "00" + ue(0)
    return unit(0x67, parameters) + unit(0x68, picture) + unit(0x65, intra + "1" * 160) * num_frames


def npy(header: str, data: bytes = b"") -> bytes:
    """A .npy file with any header."""
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode() + data


def npy_of(dtype: str, shape: str, data: bytes = b"", *, fortran: bool = False) -> bytes:
    return npy(f"{{'descr': {dtype}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n", data)


UNREADABLE = (422, "video_unreadable")
TOO_LARGE = (413, "video_too_large")
BAD_TENSOR = (400, "bad_tensor")

VIDEOS: dict[str, tuple[Any, tuple[int, str]]] = {
    "empty": (b"", UNREADABLE),
    "text": (b"not a video, just words\n" * 100, UNREADABLE),
    "random": (np.random.default_rng(0).bytes(100_000), UNREADABLE),
    "mp4 without a body": (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41", UNREADABLE),
    "mp4 of an endless box": (b"\0\0\0\x18ftypmp42" + b"\0" * 12 + b"\0\0\0\0moov", UNREADABLE),
    "list of other files": (b"ffconcat version 1.0\nfile '/etc/passwd'\n", UNREADABLE),
    "list of addresses": (
        b"#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        UNREADABLE,
    ),
    "huge VP8": (lambda: ivf(12_000, 12_000), TOO_LARGE),
    "H.264 of huge frames": (lambda: h264(12_288, 12_288, 200), TOO_LARGE),
    # As large as frames may be, and too many for the time.
    "H.264 of many large frames": (lambda: h264(3_072, 3_072, 6_000), TOO_LARGE),
    "PNG bomb": (lambda: png(16_000, 16_000), TOO_LARGE),
    "huge GIF": (lambda: gif(12_000, 12_000, 3), TOO_LARGE),
    "largest GIF": (lambda: gif(65_535, 65_535, 3), TOO_LARGE),
    "GIF of many frames": (lambda: gif(2, 2, 100_000), TOO_LARGE),
}
# The one that ends a decoding process, by its time.
SLOW = "H.264 of many large frames"


@pytest.mark.parametrize("name", VIDEOS)
@pytest.mark.usefixtures("still_good")
def test_a_hostile_video_is_refused_with_a_sentence(server: Server, name: str) -> None:
    data, expected = VIDEOS[name]
    answer = post(server, data() if callable(data) else data)
    assert refusal(answer) == expected, answer.text


@pytest.mark.usefixtures("still_good")
def test_a_gif_of_many_large_frames_takes_the_time_of_those_that_are_used(server: Server) -> None:
    before = server.worker_ids()
    answer = post(server, gif(2000, 2000, 20_000))
    assert answer.status_code == 200, answer.text
    assert server.worker_ids() == before


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
@pytest.mark.usefixtures("still_good")
def test_a_video_that_was_cut_off_is_refused(
    server: Server, rendered_video: Path, share: float
) -> None:
    data = rendered_video.read_bytes()
    answer = post(server, data[: int(len(data) * share)])
    assert refusal(answer) == UNREADABLE
    assert "cut off" in answer.json()["error"]["message"]


FRAMES: dict[str, bytes] = {
    "empty": b"",
    "no .npy": b"\x93NUMPX" + bytes(100),
    "a later version": b"\x93NUMPY\7\0\x10\0" + bytes(100),
    "a header that is cut off": npy("{'descr': '|u1', 'shape': ("),
    "a header of parentheses": npy("(" * 3000),
    "a header of signs": npy("-" * 4000 + "1"),
    "a header that is too long": npy(" " * 60_000),
    "Python objects": npy_of("'|O'", "(8, 64, 64, 3)", bytes(1000)),
    "a pickle": npy_of("'|O'", "(1,)", b"cos\nsystem\n(S'touch /tmp/owned'\ntR."),
    "column order": npy_of("'|u1'", "(8, 64, 64, 3)", bytes(8 * 64 * 64 * 3), fortran=True),
    "more than it has": npy_of("'|u1'", "(1000, 4000, 2000, 3)", bytes(1000)),
    "less than it has": npy_of("'|u1'", "(1, 8, 8, 3)", bytes(1000)),
    "an overflow": npy_of("'|u1'", f"({2**62}, {2**62}, {2**62}, 3)", bytes(1000)),
    "an overflow to what it has": npy_of("'|u1'", f"({2**32}, {2**32}, 1, 3)", b""),
    "negative sizes": npy_of("'|u1'", "(-8, -8, 1, 3)", bytes(192)),
    "no frames": npy_of("'|u1'", "(0, 64, 64, 3)"),
    "truth for a size": npy_of("'|u1'", "(True, 8, 8, 3)", bytes(192)),
    "words for sizes": npy_of("'|u1'", "('a', 'b', 'c', 'd')", bytes(192)),
    "numbers that are no bytes": npy_bytes(np.zeros((8, 64, 64, 3), np.float32)),
    "too many dimensions": npy_of("'|u1'", f"({'1, ' * 70})", b"\0"),
    "fields": npy_of("[('a', '|u1')]", "(1, 8, 8, 3)", bytes(192)),
}


@pytest.mark.parametrize("name", FRAMES)
@pytest.mark.parametrize("part", ["frames", "embeddings"])
@pytest.mark.usefixtures("still_good")
def test_a_hostile_array_is_refused_with_a_sentence(server: Server, name: str, part: str) -> None:
    before = server.worker_ids()
    assert refusal(post(server, FRAMES[name], part)) == BAD_TENSOR
    assert server.worker_ids() == before


@pytest.mark.usefixtures("still_good")
def test_frames_that_would_grow_huge_as_they_are_resized_are_scored(server: Server) -> None:
    # Only what the crop keeps is resized, so they take no more memory than others.
    before = server.worker_ids()
    answer = post(server, npy_bytes(np.zeros((1, 1_000_000, 1, 3), np.uint8)), "frames")
    assert answer.status_code == 200, answer.text
    assert server.worker_ids() == before


@pytest.mark.usefixtures("still_good")
def test_every_broken_video_of_the_reference_material_is_answered(
    server: Server, shared: Path
) -> None:
    with (shared / "videos" / "manifest.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["file"].startswith("broken/")]
    assert rows
    for row in rows:
        answer = post(server, (shared / "videos" / row["file"]).read_bytes())
        # What can be decoded of it is scored, and the damage is told.
        assert answer.status_code == 200, f"{row['file']}: {answer.text}"
        (warning,) = answer.json()["results"][0]["warnings"]
        assert "evil.bin is damaged" in warning


@pytest.mark.usefixtures("still_good")
def test_one_hostile_video_of_several_spoils_itself_alone(
    server: Server, rendered_video: Path
) -> None:
    good, bad = rendered_video.read_bytes(), b"no video"
    with server.client() as client:
        answer = client.post(
            "/v1/classify",
            files=[("video", (f"{n}.mp4", data)) for n, data in enumerate([good, bad, good])],
            data={"labels": "mine"},
        )
    first, second, third = answer.json()["results"]
    assert answer.status_code == 200
    assert first["predictions"] == third["predictions"]
    assert "predictions" not in second
    assert second["error"]["code"] == "video_unreadable"
    assert "1.mp4" in second["error"]["message"]


def test_memory_stays_within_its_bounds_and_only_slow_files_end_a_process(
    bundle: Path, rendered_video: Path, tmp_path: Path
) -> None:
    options = ("--workers", "1", "--decode-seconds", "6", "--max-body-mib", "32")
    with running_server(bundle, tmp_path, *options) as server:
        assert post(server, rendered_video.read_bytes()).status_code == 200
        (worker,) = children_of(server.process.pid)
        before, worker_before = memory_bytes(server.process.pid), memory_bytes(worker)
        for name, (data, _) in VIDEOS.items():
            if name != SLOW:
                post(server, data() if callable(data) else data)
        for data in FRAMES.values():
            post(server, data, "frames")
            post(server, data, "embeddings")
        assert server.worker_ids() == [worker]
        assert server.metric("actionclip_decode_workers_replaced") == 0
        assert memory_bytes(worker, "VmHWM") - worker_before < WORKER_GROWTH_BYTES
        assert memory_bytes(worker) - worker_before < WORKER_KEPT_BYTES
        assert "more than 6 seconds" in post(server, VIDEOS[SLOW][0]()).text
        assert post(server, rendered_video.read_bytes()).status_code == 200
        assert server.metric("actionclip_decode_workers_replaced") == 1
        assert memory_bytes(server.process.pid, "VmHWM") - before < SERVER_GROWTH_BYTES
        assert server.logs(), "the log is JSON to its last line"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_hundreds_of_4k_videos_are_answered_in_memory_that_stays(
    bundle: Path, tmp_path: Path, shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Before, a process kept the frames of each, and refused whatever came after 62 of them.
    plain = render(tmp_path / "a.mp4", num_frames=10, size=(3840, 2160), options=FAST)
    deep = render(
        tmp_path / "b.mp4", num_frames=10, size=(3840, 2160), pix_fmt="yuv420p10le", options=FAST
    )
    large = shared / "cases" / "allowed_4096x2304.gif"
    options = ("--workers", "1", "--decode-seconds", "300", "--timeout", "300")
    with running_server(bundle, tmp_path / "server", *options) as server:
        for path, num_posts in ((plain, 90), (deep, 90), (large, 20)):
            data, grown = path.read_bytes(), []
            for _ in range(num_posts):
                answer = post(server, data)
                assert answer.status_code == 200, answer.text
                grown.append(memory_bytes(server.worker_ids()[0]) // MIB)
            with capsys.disabled():
                print(f"\n{path.name}: {num_posts} answered, MiB {grown[0]} ... {grown[-1]}")
                print(f"at most {max(grown)}; server {memory_bytes(server.process.pid) // MIB}")
            assert max(grown[5:]) - grown[4] < 32
        assert server.metric("actionclip_decode_workers_replaced") == 0
