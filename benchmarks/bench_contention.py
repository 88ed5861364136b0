"""What waiting threads cost: calls, a folder and a server, quiet and with a busy neighbour.

    python benchmarks/bench_contention.py calls --models FOLDER --precision int8 --threads 2
    python benchmarks/bench_contention.py folder --models FOLDER --precision int8
    python benchmarks/bench_contention.py server --models FOLDER --precision int8

ONNX Runtime's threads may look for work in a loop before they sleep. That spares them from being
woken, and takes the time of whoever else has work: readers, HTTP, another program. Here each way
to wait is a process of its own that opens what the runtime would; all take turns in each round,
another one first, quiet and with a neighbour that never rests. Ratios are medians over the rounds
of the ratio to `spins`, ONNX Runtime's default, in the same round: above 1 is faster.

With --runtime openvino (--run-precision bf16), `folder` and `server` have rows of that runtime as
well, each beside computing alone with it. What
runtimes do beside each other is in bench_runtimes.py.

--models is where ViT-B/32 with random weights lies in fp32 and int8, or is exported to. --output
is added to: each part stands under its name, precision and threads.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from random_models import make_bundle
from workbench import (
    compute_views,
    find_videos,
    make_bank,
    make_parser,
    read_videos,
    render_videos,
    runtime_rate,
    server,
    write_report,
)

from actionclip_deploy import Bundle, Client, Recognizer, Runtime, open_runtime
from actionclip_deploy.benchmarks.load import ANSWERED, Sender, make_requests, run_closed_loop
from actionclip_deploy.runtimes.call_sizes import frames_in_caches
from actionclip_deploy.runtimes.machine import SPIN_VARIABLE
from actionclip_deploy.runtimes.ort import open_session

BACKBONE = "ViT-B-32"
BASE = "spins"  # what the ratios are of
_SETTLE_SECONDS = 0.1  # threads of the process before go on spinning for a while
_BANK = "random"

_SPINS = "session.intra_op.allow_spinning"
_SPIN_US = "session.intra_op.spin_duration_us"
_AFFINITY = "session.intra_op_thread_affinities"

# Entries of the session; "one thread fewer" and "pinned" say more below.
WAYS: dict[str, dict[str, str]] = {
    BASE: {_SPINS: "1"},
    "stops spinning after a call": {"session.force_spinning_stop": "1"},
    "spins 1000 us": {_SPIN_US: "1000"},
    "spins 100 us": {_SPIN_US: "100"},
    "sleeps": {_SPINS: "0"},
    "sleeps, pinned": {_SPINS: "0"},
    "one thread fewer": {_SPINS: "0"},
}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("part", choices=("calls", "folder", "server"))
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--precision", default="fp32", help="fp32 or int8")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runtime", help="another one, of a folder and a server: openvino")
    parser.add_argument("--run-precision", help="what it computes in, as bf16")
    parser.add_argument("--ways", nargs="*", help="of calls, besides the first; all by default")
    parser.add_argument("--repeats", type=int, default=3, help="of one clip, in a turn of calls")
    parser.add_argument("--videos", type=int, default=12, help="of a folder, rendered")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--kind", choices=("uploads", "tensors"), default="uploads")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a turn of a server")
    options = parser.parse_args()
    path = find_bundle(options.models, options.precision)
    measure = {"calls": bench_calls, "folder": bench_folder, "server": bench_server}[options.part]
    name = " ".join((options.part, options.precision, f"{options.threads} threads"))
    found = measure(path, options)
    if options.part == "server":
        name += f", {options.kind}"
    known: dict[str, Any] = {}
    if options.output is not None and options.output.exists():
        known = json.loads(options.output.read_text(encoding="utf-8"))["results"]
    write_report({"results": {**known, name: found}}, options.output, prints=False)
    print(json.dumps({name: found}, indent=1))


def find_bundle(folder: Path, precision: str) -> Path:
    """The bundle of random weights, which is exported where it is not there yet."""
    path = folder / precision
    if not path.exists():
        with tempfile.TemporaryDirectory() as made:
            make_bundle(BACKBONE, precision, Path(made)).rename(path)
    return path


@contextlib.contextmanager
def neighbour(is_busy: bool) -> Iterator[None]:
    """Another program that has work for one core, for the time of a block."""
    if not is_busy:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(2 * _SETTLE_SECONDS)
        yield
    finally:
        process.kill()
        process.wait()


class Rows:
    """Processes that take turns.

    Args:
        program: What each runs: it gets a connection and the arguments of its row, says once that
            it is ready, and then answers each word with numbers by name.
        rows: Arguments by the row's name.

    Attributes:
        told: What each said when it was ready.
    """

    def __init__(self, program: Callable[..., None], rows: dict[str, tuple[Any, ...]]) -> None:
        context = multiprocessing.get_context("spawn")
        self.told: dict[str, Any] = {}
        self._ends: dict[str, Connection] = {}
        self._processes = []
        for name, arguments in rows.items():
            ours, theirs = context.Pipe()
            process = context.Process(target=program, args=(theirs, *arguments), daemon=True)
            process.start()
            theirs.close()
            self.told[name] = ours.recv()
            self._ends[name] = ours
            self._processes.append(process)

    def ask(self, name: str) -> dict[str, float]:
        """One turn of a row."""
        time.sleep(_SETTLE_SECONDS)
        self._ends[name].send("go")
        answer: dict[str, float] = self._ends[name].recv()
        return answer

    def take_turns(self, rounds: int, base: str = BASE) -> dict[str, Any]:
        """Medians and ratios of each row, quiet and with a busy neighbour."""
        names = list(self._ends)
        found: dict[str, dict[str, list[dict[str, float]]]] = {
            condition: {name: [] for name in names} for condition in ("quiet", "busy")
        }
        for turn in range(rounds):
            print(f"round {turn + 1} of {rounds}", file=sys.stderr)
            first = turn % len(names)
            for condition, rows in found.items():
                with neighbour(condition == "busy"):
                    for name in names[first:] + names[:first]:
                        rows[name].append(self.ask(name))
        return {condition: summarise(rows, base) for condition, rows in found.items()}

    def close(self) -> None:
        """End the processes."""
        for end in self._ends.values():
            end.close()
        for process in self._processes:
            process.join(10)


def summarise(rows: dict[str, list[dict[str, float]]], base: str = BASE) -> dict[str, Any]:
    """The median of each number, and of its ratio to that of `base` in the same round."""
    summary: dict[str, Any] = {}
    for name, turns in rows.items():
        summary[name] = {}
        for what in turns[0]:
            values = [turn[what] for turn in turns]
            based = [turn[what] for turn in rows[base]]
            ratios = [a / b for a, b in zip(values, based, strict=True)]
            summary[name][what] = round(statistics.median(values), 3)
            summary[name][f"{what}, times {base}"] = round(statistics.median(ratios), 3)
            # Of what computes and does nothing else, where there is such a row.
            alone = rows.get(f"{name}, compute alone")
            if alone is not None:
                shares = [a / turn[what] for a, turn in zip(values, alone, strict=True)]
                summary[name][f"{what}, of computing alone"] = round(statistics.median(shares), 3)
    return {"rounds": len(rows[base]), **summary}


# Calls


def bench_calls(bundle: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One clip and four clips a call, in each way to wait."""
    threads = options.threads
    ways = options.ways or (WAYS if threads > 1 else ["sleeps"])
    chosen = dict.fromkeys((BASE, *ways))
    rows = Rows(
        _calls,
        {
            name: (
                *(bundle, threads - 1 if name == "one thread fewer" else threads),
                *(name, options.repeats),
            )
            for name in chosen
        },
    )
    try:
        return rows.take_turns(options.rounds)
    finally:
        rows.close()


def _calls(end: Connection, bundle: Path, threads: int, way: str, repeats: int) -> None:
    entries = dict(WAYS[way])
    if way == "sleeps, pinned" and threads > 1:
        # The calling thread counts as one, and is pinned by us; the others are ONNX Runtime's.
        cores = sorted(os.sched_getaffinity(0))
        entries[_AFFINITY] = ";".join(str(core + 1) for core in cores[1:threads])
    opened = Bundle.open(bundle, verify=False)
    session = open_session(opened.graph_path("visual"), num_threads=threads, entries=entries)
    if way == "sleeps, pinned" and threads > 1:
        os.sched_setaffinity(0, {cores[0]})
    model, step = opened.manifest.model, frames_in_caches(opened.manifest)
    shape = (4 * model.num_frames, model.input_size, model.input_size, 3)
    frames = np.random.default_rng(0).integers(0, 256, shape, np.uint8)

    def rate(num_clips: int) -> float:
        given = frames[: num_clips * model.num_frames]
        began = time.perf_counter()
        for start in range(0, len(given), step or len(given)):
            session.run(None, {"frames": given[start : start + (step or len(given))]})
        return num_clips / (time.perf_counter() - began)

    rate(1)
    end.send("ready")
    with contextlib.suppress(EOFError):
        while end.recv():
            one = statistics.median(rate(1) for _ in range(repeats))
            end.send({"1 clip, clips/s": one, "4 clips, clips/s": rate(4)})


# A folder


def bench_folder(bundle: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Videos a second of a run over a folder, beside computing alone on all cores."""
    with tempfile.TemporaryDirectory() as folder:
        videos = find_videos(render_videos(Path(folder), options.videos), options.videos)
        given = (bundle, videos, options.threads)
        rows = Rows(
            _folder,
            {
                f"{name}{suffix}": (*given, spin_us, stage, runtime, precision)
                for name, spin_us, runtime, precision in _ways(options)
                for suffix, stage in {"": "both", ", compute alone": "compute"}.items()
            },
        )
        try:
            found = rows.take_turns(options.rounds)
        finally:
            rows.close()
    return found


def _ways(options: argparse.Namespace) -> list[tuple[str, str, str, str | None]]:
    """Rows of pipelines: name, how threads wait, runtime, and what it computes in."""
    ways = [(BASE, "-1", "onnxruntime", None), ("as chosen", "", "onnxruntime", None)]
    if options.runtime is not None:
        name = f"{options.runtime} {options.run_precision or ''}".strip()
        ways.append((name, "", options.runtime, options.run_precision))
    return ways


def _folder(
    end: Connection,
    bundle: Path,
    videos: list[Path],
    threads: int,
    spin_us: str,
    stage: str,
    name: str,
    precision: str | None,
) -> None:
    os.environ[SPIN_VARIABLE] = spin_us
    opened = Bundle.open(bundle, verify=False)
    with open_runtime(opened, name, precision=precision, num_threads=threads) as runtime:
        recognizer = Recognizer(runtime, make_bank(opened))
        frames = list(read_videos(recognizer, videos, 1))
        stages: dict[str, Callable[[], Any]] = {
            "both": lambda: list(recognizer.predict_all(videos)),
            "compute": lambda: compute_views(recognizer, frames),
        }
        stages[stage]()
        end.send("ready")
        with contextlib.suppress(EOFError):
            while end.recv():
                began, cpu_began = time.perf_counter(), time.process_time()
                stages[stage]()
                seconds = time.perf_counter() - began
                end.send(
                    {
                        "videos/s": len(videos) / seconds,
                        "cores busy": (time.process_time() - cpu_began) / seconds,
                    }
                )


# A server


def bench_server(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Requests a second of two servers at saturation, beside the runtime alone."""
    opened = Bundle.open(path)
    make_bank(opened).save(opened, overwrite=True)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        addresses: dict[str, str] = {}
        runtimes: dict[str, Runtime] = {}
        for name, spin_us, runtime, precision in _ways(options):
            addresses[name] = stack.enter_context(
                server(
                    *(opened, _BANK),
                    max_batch=16,
                    spin_us=spin_us,
                    runtime=runtime,
                    precision=precision,
                )
            )
            if name != BASE:
                runtimes[name] = stack.enter_context(
                    open_runtime(opened, runtime, precision=precision)
                )
        videos = find_videos(render_videos(Path(folder), options.videos), options.videos)
        with Client(addresses[BASE]) as client:
            info = client.info()
        kind = {"uploads": "video", "tensors": "tensors"}[options.kind]
        requests = make_requests(kind, info, labels=_BANK, videos=videos)
        best = info["batching"]["best_batch"]
        alone = {
            f"{name}, compute alone": partial(runtime_rate, runtime, best, options.seconds)
            for name, runtime in runtimes.items()
        }
        rates = asyncio.run(_serve(addresses, requests, alone, options))
    return {"best_batch": best, **summarise(rates)}


async def _serve(
    addresses: dict[str, str],
    requests: list[Any],
    alone: dict[str, Callable[[], float]],
    options: argparse.Namespace,
) -> dict[str, list[dict[str, float]]]:
    rates: dict[str, list[dict[str, float]]] = {name: [] for name in (*addresses, *alone)}
    async with contextlib.AsyncExitStack() as stack:
        senders = {}
        for name, address in addresses.items():
            sender = Sender(
                *(address, requests), headers={}, connections=options.clients, timeout_seconds=120.0
            )
            senders[name] = await stack.enter_async_context(sender)
            await sender.learn_answers()
        for turn in range(options.rounds):
            print(f"round {turn + 1} of {options.rounds}", file=sys.stderr)
            for name, rate in alone.items():
                rates[name].append({"requests/s": rate()})
            names = list(addresses)
            for name in names if turn % 2 else reversed(names):
                done = await run_closed_loop(senders[name].send, options.clients, options.seconds)
                if any(each.outcome.kind != ANSWERED or each.outcome.is_wrong for each in done):
                    raise SystemExit("A request was not answered, or otherwise than alone.")
                seconds = max(each.ended for each in done)
                rates[name].append({"requests/s": len(done) / seconds})
    return rates


if __name__ == "__main__":
    main()
