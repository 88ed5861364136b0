"""Mutated videos: each gives frames or one `VideoError`; nothing crashes, hangs or is foreign.

A process of its own reads the mutants, so that a crash of a decoder is seen and not suffered. In
the gate a few hundred are read; `MUTANTS=20000` reads more, and `MUTANT_SEED` other ones.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from rendering import render

NUM_MUTANTS = int(os.environ.get("MUTANTS", "300"))
SEED = int(os.environ.get("MUTANT_SEED", "0"))
# Of CPU; one mutant takes milliseconds, and the whole test about 15 seconds.
CPU_SECONDS_PER_MUTANT = 20.0
SECONDS_PER_MUTANT = 300.0  # of one that waits for ever

_KINDS = {
    "mp4": ("libx264", "yuv420p"),
    "mkv": ("libx265", "yuv420p"),
    "avi": ("mpeg4", "yuv420p"),
    "ts": ("mpeg2video", "yuv420p"),
    "webm": ("libvpx", "yuv420p"),
    "flv": ("libx264", "yuv420p"),
    "mov": ("mjpeg", "yuvj420p"),
    "gif": ("gif", "rgb8"),
    "h264": ("libx264", "yuv420p"),
    "y4m": ("rawvideo", "yuv420p"),
}


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
    """Flip, cut, insert, repeat or overwrite bytes, at up to eight places, often near the start."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 9))):
        size = max(1, len(data))
        place = int(rng.integers(min(size, 512) if rng.random() < 0.4 else size))
        count = int(2 ** rng.uniform(0, 9))
        match int(rng.integers(6)):
            case 0:
                data[place : place + 1] = bytes([data[place] ^ (1 << int(rng.integers(8)))])
            case 1:
                del data[place : place + count]
            case 2:
                data[place:place] = rng.bytes(count)
            case 3:
                data[place:place] = data[place : place + count]
            case 4:
                value = (b"\xff", b"\0", b"\x80")[int(rng.integers(3))]
                data[place : place + 4] = value * 4
            case _:
                del data[place + count :]
        if not data:
            break
    return bytes(data)


def main() -> None:
    """Read the file that each line of standard input names; answer with how it went."""
    from actionclip_deploy.errors import VideoError
    from actionclip_deploy.video import VideoReader

    for line in sys.stdin:
        # Nothing handles these signals: a mutant that hangs ends this.
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS_PER_MUTANT)
        signal.setitimer(signal.ITIMER_REAL, SECONDS_PER_MUTANT)
        try:
            with VideoReader(line.strip(), on_warning=lambda _: None) as reader:
                count = reader.num_frames
                reader.read([0, count // 2, count - 1])
            answer = "read"
        except VideoError as exc:
            # One sentence for a person: a class of Python in it is a foreign error that was mapped.
            answer = "mapped" if "cannot be decoded (" in str(exc) else "refused"
        except Exception as exc:  # noqa: BLE001 - none is expected, and each is told
            answer = f"{type(exc).__name__}: {exc}"
        print(json.dumps(answer), flush=True)


def test_mutated_videos_give_frames_or_one_sentence(tmp_path: Path) -> None:
    contents = {
        suffix: render(
            tmp_path / f"good.{suffix}",
            num_frames=10,
            size=(64, 48),
            group=5,
            codec=codec,
            pix_fmt=pix_fmt,
            b_frames=2 if suffix in ("mp4", "flv") else 0,
            options={"x265-params": "log-level=none"} if codec == "libx265" else {},
        ).read_bytes()
        for suffix, (codec, pix_fmt) in _KINDS.items()
    }
    rng = np.random.default_rng(SEED)
    counts: dict[str, int] = {}
    problems: list[str] = []
    worker = start_worker()
    for number in range(NUM_MUTANTS):
        suffix = list(contents)[number % len(contents)]
        path = tmp_path / f"mutant.{suffix}"
        path.write_bytes(mutate(contents[suffix], rng))
        answer, seconds = ask(worker, path)
        if answer is None:
            kept = path.rename(tmp_path / f"bad-{number}.{suffix}")
            problems.append(f"{kept}: ended with {worker.poll()} after {seconds:.1f} s")
            end(worker)
            worker = start_worker()
        elif answer not in ("read", "refused", "mapped"):
            problems.append(f"mutant {number} of {suffix}: {answer}")
        counts[str(answer)] = counts.get(str(answer), 0) + 1
    end(worker)
    print(f"{NUM_MUTANTS} mutants: {counts}")
    assert not problems, problems
    # Some of both, or nothing was tried.
    assert min(counts["read"], counts["refused"]) > NUM_MUTANTS // 20


def start_worker() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )


def end(worker: subprocess.Popen[str]) -> None:
    worker.kill()
    worker.communicate()


def ask(worker: subprocess.Popen[str], path: Path) -> tuple[str | None, float]:
    """The worker's answer, or None where it ended; and the seconds that it took."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    began = time.monotonic()
    worker.stdin.write(f"{path}\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    return (json.loads(line) if line else None), time.monotonic() - began


if __name__ == "__main__":
    main()
