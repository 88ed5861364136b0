"""Archives of windows: building, appending, searching, memory and disk, as they grow.

    python benchmarks/bench_archive.py --windows 10000 100000 1000000 --output archive.json

Embeddings are made: unit vectors in clusters, as windows of a few scenes are. For each number of
windows, this store and, where they are installed, DuckDB and LanceDB, each in a process of its own:
seconds to build, to append a video of 100 windows, of the first search of a new process, and of
the searches after it; memory at its highest, and bytes on disk. All but `faiss` are exact; of the
others only the best 20 rows are asked for, where this store scores all, for z. `faiss` is this
store with its index for approximate search: its recall is the share of the moments of an exact
search that it finds, over 50 queries that are near to a scene, as windows are, and over 50 that are
near to none, which is harder, and where texts lie between the two.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from workbench import make_parser, settings_of, write_report

from actionclip_deploy.archive import ArchivedVideo, ArchiveModel, ArchiveWriter
from actionclip_deploy.search import Archive

DIM = 512
PER_VIDEO = 100
TOP = 20
SCENES = 500
RECALL_QUERIES = 50


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--windows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--stores", nargs="+", default=[*STORES], choices=[*STORES])
    parser.add_argument(
        "--row", nargs=3, metavar=("STEP", "STORE", "FOLDER"), help=argparse.SUPPRESS
    )
    given = parser.parse_args()
    if given.row is not None:
        step, store, folder = given.row
        print(json.dumps(STEPS[step](store, Path(folder), given)))
        return
    rows = []
    for num_windows in given.windows:
        for store in given.stores:
            package = STORES[store]
            if package is not None and find_spec(package) is None:
                continue
            with tempfile.TemporaryDirectory() as name:
                row: dict[str, Any] = {"store": store, "windows": num_windows}
                for step in STEPS:
                    row |= in_a_process(step, store, name, num_windows, given.rounds)
                row["disk_mib"] = round(
                    sum(p.stat().st_size for p in Path(name).rglob("*") if p.is_file()) / 2**20, 1
                )
            print(row, file=sys.stderr, flush=True)
            rows.append(row)
    write_report({"settings": settings_of(given), "dim": DIM, "rows": rows}, given.output)


def in_a_process(
    step: str, store: str, folder: str, num_windows: int, rounds: int
) -> dict[str, Any]:
    command = [sys.executable, __file__, "--row", step, store, folder]
    command += ["--windows", str(num_windows), "--rounds", str(rounds)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def embeddings(seed: int, count: int = PER_VIDEO) -> np.ndarray:
    """Windows of one video, which are near to a few of the scenes."""
    generator = np.random.default_rng(seed)
    scenes = np.random.default_rng(0).standard_normal((SCENES, DIM), np.float32)
    made = scenes[generator.integers(0, SCENES, count)]
    made = made + 0.7 * generator.standard_normal((count, DIM), np.float32)
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


def query(number: int = 0) -> np.ndarray:
    return embeddings(10**6 + number, 1)[0]


def build(store: str, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    (num_windows,) = given.windows
    num_videos = num_windows // PER_VIDEO
    append = APPEND[store](folder)
    spent, last = 0.0, []
    for number in range(num_videos):
        made = embeddings(number)
        begin = time.perf_counter()
        append(number, made)
        last.append(time.perf_counter() - begin)
        spent += last[-1]
    begin = time.perf_counter()
    if store == "faiss":
        with Archive.open(folder / "archive") as archive:
            archive.prepare_approximate()
    spent += time.perf_counter() - begin
    return {
        "build_seconds": round(spent, 3),
        "append_ms": round(1000 * statistics.median(last[-50:]), 2),
    }


def search(store: str, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    wanted = query()
    begin = time.perf_counter()
    find = FIND[store](folder)
    find(wanted)
    first = time.perf_counter() - begin
    seconds = []
    for _ in range(given.rounds):
        begin = time.perf_counter()
        find(wanted)
        seconds.append(time.perf_counter() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        **(recall(folder) if store == "faiss" else {}),
        "first_search_seconds": round(first, 4),
        "search_seconds": round(statistics.median(seconds), 4),
        "peak_mib": round(peak / 1024, 1),
    }


def recall(folder: Path) -> dict[str, Any]:
    kinds = {"near": query, "far": far_query}
    with Archive.open(folder / "archive") as archive:
        return {
            f"recall_{kind}": round(
                statistics.mean(share_found(archive, make(n)) for n in range(RECALL_QUERIES)), 4
            )
            for kind, make in kinds.items()
        }


def far_query(number: int) -> np.ndarray:
    made = np.random.default_rng(10**7 + number).standard_normal(DIM, np.float32)
    return made / np.linalg.norm(made)


def share_found(archive: Archive, wanted: np.ndarray) -> float:
    exact, near = (
        archive.search(like=wanted, top=TOP, approximate=approximate)
        for approximate in (False, True)
    )
    assert near.is_approximate
    # z is of all windows either way.
    np.testing.assert_allclose((near.mean, near.std), (exact.mean, exact.std), atol=1e-5)
    expected, found = ({(moment.video, moment.window) for moment in each} for each in (exact, near))
    return len(expected & found) / len(expected)


# The stores: a function that appends a video, and one that finds.

Append = Callable[[int, np.ndarray], None]
Find = Callable[[np.ndarray], Any]


def append_here(folder: Path) -> Append:
    model = ArchiveModel("bundle", "v", "t", DIM, 4.0, 0.5, "made", 2.0)
    writer = ArchiveWriter.open(folder / "archive", model)
    starts = 0.5 * np.arange(PER_VIDEO)
    intervals = np.stack([starts, starts + 4], axis=1)

    def append(number: int, made: np.ndarray) -> None:
        video = ArchivedVideo(f"/camera/{number}.mp4", "camera", 1, 1, None, 53.5)
        writer.put(video, intervals, made)

    return append


def find_here(folder: Path) -> Find:
    archive = Archive.open(folder / "archive")
    return lambda wanted: archive.search(like=wanted, top=TOP, approximate=False)


def find_near(folder: Path) -> Find:
    archive = Archive.open(folder / "archive")
    return lambda wanted: archive.search(like=wanted, top=TOP, approximate=True)


def append_duckdb(folder: Path) -> Append:
    import duckdb

    connection = duckdb.connect(str(folder / "archive.duckdb"))
    connection.execute(f"CREATE TABLE windows (video INTEGER, start FLOAT, embedding FLOAT[{DIM}])")

    def append(number: int, made: np.ndarray) -> None:
        import pyarrow as pa

        table = pa.table(
            {
                "video": np.full(len(made), number, np.int32),
                "start": np.arange(len(made), dtype=np.float32),
                "embedding": pa.FixedSizeListArray.from_arrays(made.ravel(), DIM),
            }
        )
        connection.register("new", table)
        connection.execute("INSERT INTO windows SELECT * FROM new")
        connection.unregister("new")

    return append


def find_duckdb(folder: Path) -> Find:
    import duckdb

    connection = duckdb.connect(str(folder / "archive.duckdb"), read_only=True)
    text = (
        f"SELECT video, start, array_inner_product(embedding, ?::FLOAT[{DIM}]) AS score "
        f"FROM windows ORDER BY score DESC LIMIT {TOP}"
    )
    return lambda wanted: connection.execute(text, [wanted.tolist()]).fetchall()


def append_lancedb(folder: Path) -> Append:
    import lancedb
    import pyarrow as pa

    schema = pa.schema(
        [("video", pa.int32()), ("start", pa.float32()), ("vector", pa.list_(pa.float16(), DIM))]
    )
    table = lancedb.connect(folder / "lance").create_table("windows", schema=schema)

    def append(number: int, made: np.ndarray) -> None:
        rows = pa.table(
            {
                "video": np.full(len(made), number, np.int32),
                "start": np.arange(len(made), dtype=np.float32),
                "vector": pa.FixedSizeListArray.from_arrays(
                    pa.array(made.astype(np.float16).ravel()), DIM
                ),
            },
            schema=schema,
        )
        table.add(rows)

    return append


def find_lancedb(folder: Path) -> Find:
    import lancedb

    table = lancedb.connect(folder / "lance").open_table("windows")
    return lambda wanted: (
        table.search(wanted.astype(np.float16)).distance_type("dot").limit(TOP).to_arrow()
    )


# What each needs to be installed.
STORES = {"actionclip": None, "faiss": "faiss", "duckdb": "duckdb", "lancedb": "lancedb"}
APPEND = {
    "actionclip": append_here,
    "faiss": append_here,
    "duckdb": append_duckdb,
    "lancedb": append_lancedb,
}
FIND = {
    "actionclip": find_here,
    "faiss": find_near,
    "duckdb": find_duckdb,
    "lancedb": find_lancedb,
}
STEPS = {"build": build, "search": search}

if __name__ == "__main__":
    if shutil.disk_usage(tempfile.gettempdir()).free < 8 * 2**30:
        print("warning: little room for temporary files", file=sys.stderr)
    main()
