"""Runs over many videos: what a Ray cluster costs, and what happens when parts of it are lost.

    python benchmarks/bench_scale.py videos FOLDER --count 2000    renders them, damaged ones too
    python benchmarks/bench_scale.py losses BUNDLE FOLDER WORK     of an actor, a node, the driver
    python benchmarks/bench_scale.py speed BUNDLE FOLDER WORK      one process against 1 and 2 nodes
    python benchmarks/bench_scale.py constants                     for a model of larger runs

`losses` and `speed` print JSON. Nodes are raylets on this machine with one core each. The storage
is moto's S3 on the loopback address, which here fails now and then.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

CLI = [sys.executable, "-m", "actionclip_deploy.cli"]
STORE_BYTES = 200 * 2**20
TOLERANCE = 1e-6  # of scores: other videos share a call on a cluster
DAMAGED_SHARE = 0.05
REFUSED_SHARE, CUT_SHARE = 0.06, 0.03  # of the answers of the storage
LABELS = "circle\nsquare\ntriangle\nstar\n"
OPTIONS = ["--allow-unknown-words", "--runtime", "onnxruntime", "--threads", "1"]

os.environ.update(
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_health_check_initial_delay_ms="1000",
    RAY_health_check_period_ms="1000",
    RAY_health_check_failure_threshold="3",
    RAY_worker_niceness="0",  # others of this machine would come first
    OMP_NUM_THREADS="1",
)


def write_videos(folder: Path, count: int) -> None:
    """Videos of several lengths and sizes; of 100, five are damaged or are none."""
    from actionclip_deploy.motions.dataset import write_dataset

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        write_dataset(Path(made) / "set", "train", min(count, 200), seed=1)
        whole = [path.read_bytes() for path in sorted(Path(made).rglob("*.mp4"))]
    chance = random.Random(0)
    for number in range(count):
        content = whole[number % len(whole)]
        if chance.random() < DAMAGED_SHARE:
            start = chance.randrange(len(content))
            content = chance.choice(
                [b"", content[:start], bytes(1000), content[:start] + bytes(200) + content[start:]]
            )
        # As a file of its own each has its own bytes, and so its own tag in a storage.
        box = b"\0\0\0\x10free" + number.to_bytes(8, "big")
        (folder / f"{number:05d}.mp4").write_bytes(content + box if content else content)


# A storage that fails now and then


class FailingStorage:
    """moto's S3, which refuses some reads and cuts others; counts those of each key."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self._app = DomainDispatcherApplication(create_backend_app)
        self._chance = random.Random(1)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.reads: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.is_failing = False
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        """Of its server."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def _answer(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        name = environ["PATH_INFO"].rpartition("/")[2]
        if environ["REQUEST_METHOD"] != "GET" or not name.endswith(".mp4"):
            return list(self._app(environ, start_response))
        self.reads[name] += 1
        dice = self._chance.random() if self.is_failing else 1.0
        if dice < REFUSED_SHARE:
            self.faults["refused"] += 1
            start_response("503 Slow Down", [("Content-Length", "0")])
            return []
        body = b"".join(self._app(environ, start_response))
        if dice < REFUSED_SHARE + CUT_SHARE and len(body) > 1:
            self.faults["cut"] += 1
            return [body[: len(body) // 2]]
        return [body]


def fill(folder: Path) -> None:
    import boto3

    client = boto3.client("s3")
    client.create_bucket(Bucket="videos")
    for path in sorted(folder.glob("*.mp4")):
        client.put_object(Bucket="videos", Key=f"all/{path.name}", Body=path.read_bytes())


@contextmanager
def cluster(num_nodes: int, *, is_pinned: bool = False) -> Iterator[tuple[Any, list[Any]]]:
    """Start nodes; pinned, each has a core of its own, which all of its processes share."""
    from ray.cluster_utils import Cluster

    cores = sorted(os.sched_getaffinity(0))

    node = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": STORE_BYTES}

    def pin(number: int) -> None:
        if is_pinned:
            os.sched_setaffinity(0, {cores[number % len(cores)]})

    pin(0)
    made = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    others = []
    for number in range(1, num_nodes):
        pin(number)
        others.append(made.add_node(**node))
    os.sched_setaffinity(0, cores)
    try:
        yield made, others
    finally:
        made.shutdown()


def rows_in(output: Path) -> dict[str, dict[str, Any]]:
    from actionclip_deploy.scale.result_folder import read_results

    rows = read_results(output).to_pylist()
    names = Counter(Path(row["uri"]).name for row in rows)
    assert set(names.values()) <= {1}, [name for name, num in names.items() if num > 1][:5]
    return {Path(row["uri"]).name: row for row in rows}


def wait_for_rows(output: Path, count: int, process: subprocess.Popen[bytes]) -> int:
    while process.poll() is None:
        num = len(rows_in(output)) if list(output.glob("part-*")) else 0
        if num >= count:
            return num
        time.sleep(0.5)
    raise SystemExit(f"the run ended before it had {count} rows")


def kill_an_actor() -> str:
    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or ())
        if title.startswith("ray::") and "MapWorker" in title:
            process.kill()
            return title.split()[0]
    raise SystemExit("no actor was found")


def losses(bundle: Path, folder: Path, work: Path) -> dict[str, Any]:
    """Lose an actor, a node and the driver in one run on a failing storage, then go on with it."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "labels.txt").write_text(LABELS)
    words = ["--labels", str(work / "labels.txt"), *OPTIONS, "--rows-per-file", "50"]
    begun = time.monotonic()
    here = [*CLI, "predict", str(bundle), str(folder), *words, "--workers", "1"]
    subprocess.run(
        [*here, "-o", str(work / "here"), "--resume"], stdout=subprocess.DEVNULL, check=False
    )
    expected = rows_in(work / "here")
    report: dict[str, Any] = {"videos": len(expected), "local_seconds": time.monotonic() - begun}
    storage = FailingStorage()
    os.environ.update(
        AWS_ACCESS_KEY_ID="x",
        AWS_SECRET_ACCESS_KEY="x",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_ENDPOINT_URL=storage.address,
    )
    fill(folder)
    storage.is_failing = True
    output = work / "there"
    shutil.rmtree(output, ignore_errors=True)
    with cluster(3) as (made, others):
        ray_words = ["--engine", "ray", "--address", made.address, "-o", str(output)]
        run = [*CLI, "predict", str(bundle), "s3://videos/all", *words, *ray_words]
        log = (work / "driver.log").open("wb")
        driver = subprocess.Popen(run, stdout=log, stderr=log)
        share = len(expected) // 8
        report["rows_when_an_actor_was_killed"] = wait_for_rows(output, share, driver)
        report["actor"] = kill_an_actor()
        report["rows_when_a_node_was_killed"] = wait_for_rows(output, 3 * share, driver)
        made.remove_node(others[-1], allow_graceful=False)
        report["rows_when_the_driver_was_killed"] = wait_for_rows(output, 5 * share, driver)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        time.sleep(5)  # until what the driver had begun has ended
        kept, reads = rows_in(output), Counter(storage.reads)
        again = subprocess.run(
            [*run, "--resume", "--json"], stdout=subprocess.PIPE, stderr=log, check=False
        )
        report["exit_code"] = again.returncode
    summary = json.loads(again.stdout)
    found = rows_in(output)
    final = {name for name, row in kept.items() if row["error_class"] not in TRANSIENT}
    report |= {
        "faults": dict(storage.faults),
        "rows_kept_by_the_killed_run": len(kept),
        "rows_of_the_resumed_run": summary["num_now"],
        "rows_that_came_twice_and_were_dropped": summary["num_repeated"],
        "reads_of_videos_that_had_a_row": sum(storage.reads[name] - reads[name] for name in final),
        "lost": sorted(set(expected) - set(found)),
        "failed": summary["failed"],
        **compare(expected, found),
    }
    assert not report["lost"]
    assert not report["different"]
    assert not report["reads_of_videos_that_had_a_row"]
    return report


TRANSIENT = ("changed", "fetch_failed", "out_of_memory", "timed_out")


def compare(expected: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    different, largest = [], 0.0
    for name, one in expected.items():
        other = found.get(name)
        if other is None:
            continue
        same = all(one[key] == other[key] for key in ("status", "error_class", "size"))
        if one["scores"] is not None and other["scores"] is not None:
            ours = dict(zip(one["labels"], one["scores"], strict=True))
            theirs = dict(zip(other["labels"], other["scores"], strict=True))
            largest = max(largest, *(abs(ours[label] - theirs[label]) for label in ours))
            same &= largest <= TOLERANCE
        if not same:
            different.append(name)
    return {"different": different, "largest_difference": largest}


# What a cluster costs


class Memory:
    """Samples the processes below this one; keeps the peak of each kind."""

    def __init__(self) -> None:
        self.peaks: dict[str, float] = {}
        self._stop = threading.Event()
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while not self._stop.wait(0.5):
            for process in psutil.Process().children(recursive=True):
                try:
                    words, rss = (
                        process.cmdline(),
                        process.memory_info().rss - process.memory_info().shared,
                    )
                except psutil.Error:
                    continue
                kind = kind_of(words)
                self.peaks[kind] = max(self.peaks.get(kind, 0.0), rss / 2**20)

    def stop(self) -> dict[str, int]:
        """End, and give the peaks in MiB."""
        self._stop.set()
        return {kind: round(peak) for kind, peak in sorted(self.peaks.items())}


def kind_of(words: list[str]) -> str:
    text = " ".join(words)
    if text.startswith("ray::"):
        return words[0].split("(")[0].removeprefix("ray::") or "ray worker"
    for name in ("decode_worker", "raylet", "gcs_server"):
        if name in text:
            return name
    return "driver" if "actionclip_deploy.cli" in text else "others of Ray"


def speed(bundle: Path, folder: Path, work: Path) -> dict[str, Any]:
    """The same videos by one process on one core, and by clusters of nodes with one core each."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "labels.txt").write_text(LABELS)
    words = ["--labels", str(work / "labels.txt"), *OPTIONS, "--rows-per-file", "50", "--json"]
    report: dict[str, Any] = {}
    for name in ("local", "ray_1", "ray_2", "local_again"):
        output = work / name
        shutil.rmtree(output, ignore_errors=True)
        run = [*CLI, "predict", str(bundle), str(folder), *words, "-o", str(output)]
        memory = Memory()
        if name.startswith("local"):
            done = subprocess.run(
                ["taskset", "-c", "0", *run, "--workers", "1"], stdout=subprocess.PIPE, check=False
            )
        else:
            num_nodes = int(name[-1])
            with cluster(num_nodes, is_pinned=True) as (made, _):
                cores = ",".join(map(str, range(num_nodes)))
                more = ["--engine", "ray", "--address", made.address]
                done = subprocess.run(
                    ["taskset", "-c", cores, *run, *more], stdout=subprocess.PIPE, check=False
                )
        summary = json.loads(done.stdout)
        files = sorted(output.glob("part-*"), key=lambda path: path.stat().st_mtime)
        # Between the first and the last file, the start left out.
        seconds = files[-1].stat().st_mtime - files[0].stat().st_mtime
        count = sum(1 for _ in rows_in(output)) - 50
        report[name] = {
            "videos": summary["num_rows"],
            "seconds": summary["seconds"],
            "videos_per_second_after_the_start": round(count / seconds, 1) if seconds else None,
            "peak_mib": memory.stop(),
            "stage_seconds": summary["stage_seconds"],
        }
    return report


def constants() -> dict[str, float]:
    """What a row and a video of a list cost the one program that has them all."""
    import pyarrow as pa

    from actionclip_deploy.command_records import BatchRunRecord
    from actionclip_deploy.scale.result_folder import open_result_folder, result_schema
    from actionclip_deploy.scale.video_list import LIST_SCHEMA, largest_first

    run = BatchRunRecord(
        kind="predict",
        bundle_sha256="b" * 64,
        bank="bank",
        bank_sha256="c" * 64,
        views="1x1",
        scores="template-softmax",
        resize="frame",
        top_k=5,
        embeddings=True,
        max_pixels=1,
    )
    count, batch, dim = 50_000, 1_000, 512
    uris = [f"s3://bucket/2026/11/30/camera-{n % 997:04d}/{n:012d}.mp4" for n in range(count)]
    listed = [uris, [f"{n:032x}" for n in range(count)], list(range(count))]
    found: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any], num: int) -> Any:
        started = time.perf_counter()
        result = work()
        found[name] = round(num / (time.perf_counter() - started))
        return result

    videos = pa.Table.from_arrays(
        [pa.array(c, f.type) for c, f in zip(listed, LIST_SCHEMA, strict=True)], schema=LIST_SCHEMA
    )
    found["list_bytes_per_video"] = round(videos.nbytes / count)
    videos = timed("sorted_videos_per_second", lambda: largest_first(videos), count)
    schema = result_schema(run, embedding_dim=dim)
    units = pa.array(np.random.default_rng(0).normal(size=batch * dim).astype(np.float32))
    embeddings = pa.ListArray.from_arrays(
        np.arange(batch + 1, dtype=np.int32), pa.FixedSizeListArray.from_arrays(units, dim)
    )
    shared = {
        "status": "ok",
        "labels": ["opening a door"] * 5,
        "scores": [0.2] * 5,
        "bundle_sha256": "b" * 64,
        "run_sha256": "r" * 64,
        "runtime": "onnxruntime (CPUExecutionProvider, fp32)",
        "node": "n" * 56,
        "seconds": {"decode": 0.1},
    }

    def rows(start: int) -> pa.Table:
        part = videos.slice(start, batch).to_pylist()
        table = pa.Table.from_pylist([{**row, **shared} for row in part], schema=schema)
        place = schema.get_field_index("embeddings")
        return table.set_column(place, schema.field(place), embeddings)

    made = [rows(start) for start in range(0, count, batch)]
    with tempfile.TemporaryDirectory() as work:
        output = Path(work) / "out"
        with open_result_folder(output, run, schema, videos) as folder:
            timed(
                "rows_with_embeddings_per_second",
                lambda: [folder.add(table) for table in made],
                count,
            )
        size = sum(path.stat().st_size for path in output.glob("part-*"))
        found["file_bytes_per_row_with_embeddings"] = round(size / count)

        def resumed() -> None:
            with open_result_folder(output, run, schema, videos, resume=True) as folder:
                assert not len(folder.todo)

        timed("resumed_videos_per_second", resumed, count)
    plain_run = run.model_copy(update={"embeddings": False})
    plain = result_schema(plain_run, embedding_dim=dim)
    made = [table.select(plain.names).cast(plain) for table in made]
    with tempfile.TemporaryDirectory() as work:
        output = Path(work) / "out"
        with open_result_folder(output, plain_run, plain, videos) as folder:
            timed("rows_without_embeddings_per_second", lambda: [*map(folder.add, made)], count)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["videos", "losses", "speed", "constants"])
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--count", type=int, default=2000)
    given = parser.parse_args()
    if given.what == "videos":
        write_videos(given.paths[0], given.count)
        return
    report = {"losses": losses, "speed": speed, "constants": constants}[given.what](*given.paths)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
