"""The server at saturation, beside the same work without HTTP.

    python benchmarks/bench_serving.py --bundle bundle --videos FOLDER --output serving.json

64 clients send one request after the other. Uploaded videos are compared with a run over the same
files by `Recognizer.predict_all`, clips as tensors of the inference protocol with the runtime
alone, in calls of the server's best size. A second server takes one clip at a time. All take turns
in each round, in one run, and the clients share the machine with the server. Before, and again
with every answer under load, answers are compared with those of one request alone.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from workbench import (
    find_videos,
    make_bank,
    make_parser,
    render_videos,
    runtime_rate,
    server,
    write_report,
)

from actionclip_deploy import Bundle, Client, FailedVideo, Recognizer, open_runtime
from actionclip_deploy.benchmarks.load import (
    ANSWERED,
    LoadRequest,
    RequestTiming,
    Sender,
    make_requests,
    run_closed_loop,
)
from actionclip_deploy.errors import BundleError

BANK = "random"
TIMEOUT_SECONDS = 120.0


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--videos", type=Path, help="searched with its subfolders")
    parser.add_argument("--max-videos", type=int, default=48)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each turn")
    parser.add_argument("--max-batch", type=int, default=16)
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    with tempfile.TemporaryDirectory() as folder:
        videos = find_videos(options.videos or render_videos(Path(folder)), options.max_videos)
        if not videos:
            parser.error(f"--videos is {options.videos}; no video is in there.")
        report = measure(bundle, videos, options)
    report |= {"clients": options.clients, "max_batch": options.max_batch}
    report |= {"seconds": options.seconds, "videos": len(videos)}
    write_report(report, options.output)


def measure(bundle: Bundle, videos: list[Path], options: argparse.Namespace) -> dict[str, Any]:
    """Turn after turn; gives medians, ratios and latencies."""
    bank = make_bank(bundle)
    try:
        bank.save(bundle, overwrite=True)
    except BundleError as exc:
        raise SystemExit(f"{exc} The bundle has to be one that may be written to.") from exc
    with (
        server(bundle, BANK, max_batch=options.max_batch) as shared,
        server(bundle, BANK, max_batch=1) as single,
        open_runtime(bundle) as runtime,
    ):
        recognizer = Recognizer(runtime, bank)
        videos = readable(recognizer, videos)
        with Client(shared) as client:
            info = client.info()
        best = info["batching"]["best_batch"]
        requests = {
            "uploads": make_requests("video", info, labels=BANK, videos=videos),
            "tensors": make_requests("tensors", info, labels=BANK),
        }
        alone: dict[str, Callable[[], float]] = {
            "directory": lambda: directory_rate(recognizer, videos, options.seconds),
            "runtime": lambda: runtime_rate(runtime, best, options.seconds),
        }
        targets = {
            f"{kind}{suffix}": (url, requests[kind])
            for url, suffix in ((shared, ""), (single, ", one clip a call"))
            for kind in requests
        }
        rates, samples = asyncio.run(take_turns(alone, targets, options))
    return {
        "best_batch": best,
        "clips_per_second": {name: statistics.median(found) for name, found in rates.items()},
        "ratios": ratios(rates),
        "load": {name: describe(found) for name, found in samples.items()},
        "rates": rates,
    }


async def take_turns(
    alone: dict[str, Callable[[], float]],
    targets: dict[str, tuple[str, list[LoadRequest]]],
    options: argparse.Namespace,
) -> tuple[dict[str, list[float]], dict[str, list[RequestTiming]]]:
    """Rates of each round and, of the clients, every request."""
    rates: dict[str, list[float]] = {name: [] for name in (*alone, *targets)}
    samples: dict[str, list[RequestTiming]] = {name: [] for name in targets}
    async with AsyncExitStack() as stack:
        senders = {}
        for name, (url, requests) in targets.items():
            sender = Sender(
                *(url, requests),
                headers={},
                connections=options.clients,
                timeout_seconds=TIMEOUT_SECONDS,
            )
            senders[name] = await stack.enter_async_context(sender)
            await sender.learn_answers()
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
            for name, rate in alone.items():
                rates[name].append(rate())  # no request is under way meanwhile
            for name, sender in senders.items():
                found = await run_closed_loop(sender.send, options.clients, options.seconds)
                check(found)
                rates[name].append(len(found) / max(each.ended for each in found))
                samples[name] += found
    return rates, samples


def check(samples: list[RequestTiming]) -> None:
    """End here if a request was not answered, or otherwise than alone."""
    for each in samples:
        if each.outcome.kind != ANSWERED or each.outcome.is_wrong:
            raise SystemExit(f"A request ended with {each.outcome}.")


def ratios(rates: dict[str, list[float]]) -> dict[str, float]:
    """Medians over the rounds of what was measured in the same round."""

    def ratio(one: str, other: str) -> float:
        pairs = zip(rates[one], rates[other], strict=True)
        return statistics.median(a / b for a, b in pairs)

    return {
        "uploads / directory": ratio("uploads", "directory"),
        "tensors / runtime": ratio("tensors", "runtime"),
        "uploads / one clip a call": ratio("uploads", "uploads, one clip a call"),
        "tensors / one clip a call": ratio("tensors", "tensors, one clip a call"),
    }


def describe(samples: list[RequestTiming]) -> dict[str, Any]:
    """Latency of the clients, and the clips of a call."""
    latencies = np.array([each.latency_seconds * 1000 for each in samples])
    sizes = [each.outcome.batch_size for each in samples if each.outcome.batch_size]
    return {
        "requests": len(samples),
        "latency_ms": {
            f"p{percent}": float(np.percentile(latencies, percent)) for percent in (50, 95, 99)
        },
        "mean_batch": statistics.mean(sizes) if sizes else None,
    }


def directory_rate(recognizer: Recognizer, videos: list[Path], seconds: float) -> float:
    """Videos per second of a run over files."""
    done, start = 0, time.perf_counter()
    # Whole rounds over the files, since they differ.
    while time.perf_counter() - start < seconds:
        done += sum(1 for _ in recognizer.predict_all(videos))
    return done / (time.perf_counter() - start)


def readable(recognizer: Recognizer, videos: list[Path]) -> list[Path]:
    """The videos that give frames."""
    outcomes = recognizer.predict_all(islice(cycle(videos), len(videos)))
    return [each.video for each in outcomes if not isinstance(each, FailedVideo)]


if __name__ == "__main__":
    main()
