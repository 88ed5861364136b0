"""Many videos on a Ray cluster: the steps of `batch`, as operators of Ray Data.

    videos (blocks) -> fetch and decode (tasks) -> encode and score (a pool of actors) -> rows

A file is fetched where it is decoded, by threads of the task, since it lies on that machine's
disk. Ray computes a row at least once; the one program that writes them takes each once
(`result_folder`), so nothing that machines do twice or lose is seen in the result.

The windows of an archive are made by actors that read and encode, and written by one program too.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from actionclip_deploy.archive import ArchivedVideo
from actionclip_deploy.bundle import Bundle
from actionclip_deploy.command_records import BatchRunRecord
from actionclip_deploy.errors import (
    ActionClipError,
    ArgumentError,
    ClusterError,
    IntegrityError,
    MissingExtraError,
)
from actionclip_deploy.files import sha256_of, staged_folder, unique_name, work_lock
from actionclip_deploy.indexing import EncodedVideo, encode_videos
from actionclip_deploy.labels import LabelBank, bank_for
from actionclip_deploy.manifest import Manifest
from actionclip_deploy.preprocess import Region
from actionclip_deploy.recognizer import VideoEncoder
from actionclip_deploy.runtimes import open_runtime
from actionclip_deploy.runtimes.parity import verify_bundle
from actionclip_deploy.scale.batch import BatchReader, BatchSettings, ReadVideo, Scorer
from actionclip_deploy.scale.storage import Failure, describe
from actionclip_deploy.scale.video_list import LIST_SCHEMA, videos_in
from actionclip_deploy.stream import WindowGrid

# A cluster that is started here tells nobody of its use; who wants that sets the variable to 1.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

try:
    import pyarrow as pa
    import ray
    import ray.data
    from ray.data.exceptions import SystemException
    from ray.exceptions import RayError, RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError as exc:
    raise MissingExtraError("A run on Ray", "ray") from exc

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 32 * 2**20  # of a bundle's file, on its way to a node
_BLOCK_BYTES = 16 * 2**20  # of decoded frames in one block
_VIDEOS_PER_TASK = 16
_MAX_BLOCKS = 10_000  # the driver holds something for each
_VIDEOS_PER_CALL = 16
# A cluster that loses machines again and again, and gives no row between, is given up.
_ATTEMPTS = 5
_ACTOR_CPUS, _GPU_ACTOR_CPUS = 0.9, 0.4
_OURS = "_actionclip_"  # begins the columns on the way from one stage to the next


@dataclass(frozen=True)
class Layout:
    """How a cluster is shared out.

    Attributes:
        num_actors: Most processes that encode.
        actor_cpus: Cores that each of them counts for.
        actor_gpus: GPUs of each.
    """

    num_actors: int
    actor_cpus: float
    actor_gpus: float

    @classmethod
    def of(cls, cpus: Iterable[float], num_gpus: float, *, num_actors: int | None = None) -> Layout:
        """Leave a core of each machine to tasks; where there is no second, actors count for none.

        Actors stay, and tasks feed them: where actors leave no whole core, no task of those that
        read a user's list runs, and both wait for ever (ray#44687). An actor counts for less than
        a core, so that one that Ray puts on a machine with two others still leaves room there.

        Args:
            cpus: Cores of each machine.
            num_gpus: Of all machines; without any, actors encode on cores.
            num_actors: Most actors; None for as many as leave that room.
        """
        cores = [count for count in cpus if count > 0]
        if not cores:
            raise ClusterError("The cluster has no machine with a core; start one and try again.")
        is_small = min(cores) < 2
        fitting = (
            math.floor(num_gpus) if num_gpus >= 1 else sum(max(1, int(each) - 1) for each in cores)
        )
        # Of other sizes than tasks: Ray would do both in the actor, one after the other.
        actor_cpus = _GPU_ACTOR_CPUS if num_gpus >= 1 else _ACTOR_CPUS
        return cls(
            num_actors=max(1, fitting) if num_actors is None else num_actors,
            actor_cpus=0.0 if is_small else actor_cpus,
            actor_gpus=1.0 if num_gpus >= 1 else 0.0,
        )


@dataclass(frozen=True)
class RayPlan:
    """All that the machines of a cluster need to know; made by `plan_on_ray`."""

    manifest_json: str
    settings: BatchSettings
    run: BatchRunRecord
    bank: LabelBank | None
    runtime: Mapping[str, Any]  # arguments of `open_runtime`
    shelf: str  # name of the actor that has the bundle
    layout: Layout


def connect(address: str) -> None:
    """Connect to a cluster, or start one on this machine.

    Args:
        address: `local` for this machine alone; `auto` for the cluster that RAY_ADDRESS or this
            machine knows; or HOST:PORT of a cluster's head.

    Raises:
        ClusterError: If there is none.
    """
    if not ray.is_initialized():
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                namespace="actionclip",
            )
        except (ConnectionError, RuntimeError, ValueError) as exc:
            raise ClusterError(
                f"There is no Ray cluster at {address!r} ({exc}); start one with `ray start`, or "
                "take --address local."
            ) from exc


def plan_on_ray(
    bundle: Bundle,
    bank: LabelBank | None,
    settings: BatchSettings,
    *,
    runtime: Mapping[str, Any] | None = None,
    num_actors: int | None = None,
) -> RayPlan:
    """Plan a run on the cluster that is connected; the bundle is held ready for its machines.

    Args:
        bundle: The model.
        bank: The labels; None for embeddings alone.
        settings: How videos are read and scored.
        runtime: Arguments of `open_runtime`.
        num_actors: Most processes that encode; None for what the cluster has room for now.
    """
    asked, layout = _shared_out(runtime, num_actors)
    return RayPlan(
        manifest_json=bundle.manifest.model_dump_json(),
        settings=replace(settings, num_workers=1),
        run=settings.run(bundle, bank),
        bank=bank,
        runtime=asked,
        shelf=_shelve(bundle),
        layout=layout,
    )


def _shared_out(
    runtime: Mapping[str, Any] | None, num_actors: int | None
) -> tuple[dict[str, Any], Layout]:
    """What each actor opens, and how the cluster is shared out among actors."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    asked = dict(runtime or {})
    gpus = 0.0 if asked.get("device") == "cpu" else sum(each.get("GPU", 0.0) for each in alive)
    layout = Layout.of((each.get("CPU", 0.0) for each in alive), gpus, num_actors=num_actors)
    if not layout.actor_gpus and asked.get("num_threads") is None:
        asked["num_threads"] = 1
    return asked, layout


def pipeline(dataset: Any, plan: RayPlan) -> Any:
    """A dataset of videos as one of rows, computed when it is asked for."""
    layout = plan.layout
    read = dataset.map_batches(
        _read_block,
        batch_format="pyarrow",
        batch_size=None,
        num_cpus=1,
        fn_kwargs={"plan": replace(plan, bank=None)},
    )
    return read.map_batches(
        _Encoder,
        batch_format="pyarrow",
        batch_size=_VIDEOS_PER_CALL,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=layout.num_actors),
        num_cpus=layout.actor_cpus,
        num_gpus=layout.actor_gpus or None,
        fn_constructor_kwargs={"plan": plan},
    )


def score_dataset(
    dataset: Any,
    bundle: Bundle,
    labels: Any,
    settings: BatchSettings | None,
    *,
    runtime: Mapping[str, Any],
    num_actors: int | None,
) -> Any:
    """See `scale.score`."""
    with open_runtime(bundle, "onnxruntime", device="cpu", num_threads=1) as here:
        bank = bank_for(bundle, here, labels)
    connect("auto" if os.environ.get("RAY_ADDRESS") else "local")
    chosen = settings or BatchSettings()
    plan = plan_on_ray(bundle, bank, chosen, runtime=runtime, num_actors=num_actors)
    # A list is a block or two, however long it is, and a block is one task on one machine.
    videos = dataset.repartition(target_num_rows_per_block=_VIDEOS_PER_TASK)
    return pipeline(_in_small_blocks(videos), plan)


def _in_small_blocks(dataset: Any) -> Any:
    """A dataset whose blocks of frames are small; it is made with a copy of what Ray is set to."""
    dataset.context.target_max_block_size = _BLOCK_BYTES
    return dataset


def score_on_ray(left: Callable[[], pa.Table], plan: RayPlan) -> Generator[pa.Table, None, None]:
    """Score videos on the cluster; gives tables of rows as they come, a row perhaps twice.

    Where machines are lost in a way that ends Ray's work, it begins again with what is left.

    Args:
        left: Gives the videos that have no row yet.
        plan: Of the run.

    Raises:
        ClusterError: If the cluster fails again and again.
        ActionClipError: What a machine raises: a bundle that is not as it was, a runtime that
            fails.
    """
    yield from _until_done(left, plan.layout, lambda dataset: pipeline(dataset, plan))


def _until_done(
    left: Callable[[], pa.Table], layout: Layout, work: Callable[[Any], Any]
) -> Generator[pa.Table, None, None]:
    # The command line has its own progress.
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    failed = 0
    while len(videos := left()):
        try:
            rows = work(_in_small_blocks(ray.data.from_arrow(_blocks(videos, layout))))
            for table in rows.iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=0
            ):
                failed = 0
                yield table
        except (RayError, SystemException) as exc:
            _raise_ours(exc)
            failed += 1
            if failed == _ATTEMPTS:
                raise ClusterError(
                    f"The cluster failed {failed} times without a row between "
                    f"({_first_line(exc)}); look at its machines, then repeat the command (predict "
                    "and embed with --resume): it goes on where it was."
                ) from exc
            logger.warning("The cluster failed and is asked again: %s", _first_line(exc))


def _blocks(videos: pa.Table, layout: Layout) -> list[pa.Table]:
    """Parts of a list that are a task each: of few videos, but no more than the driver can hold."""
    spread = math.ceil(len(videos) / (8 * layout.num_actors))
    size = max(math.ceil(len(videos) / _MAX_BLOCKS), min(_VIDEOS_PER_TASK, spread), 1)
    return [videos.slice(start, size) for start in range(0, len(videos), size)]


def _raise_ours(error: BaseException) -> None:
    """Raise an error of this package that a machine has raised; others are the cluster's."""
    seen: BaseException | None = error
    while seen is not None:
        cause = seen.cause if isinstance(seen, RayTaskError) else None
        for each in (seen, cause):
            if isinstance(each, ActionClipError):
                raise each from error
        seen = seen.__cause__


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]


# The bundle, which reaches each machine once


class _Shelf:
    """Has the files of a bundle, and gives them to machines in parts."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def sizes(self) -> dict[str, int]:
        """Bytes of each file, by its path in the bundle."""
        files = (path for path in self._folder.rglob("*") if path.is_file())
        return {str(path.relative_to(self._folder)): path.stat().st_size for path in files}

    def part(self, name: str, start: int) -> bytes:
        """Bytes of a file, from a place on."""
        with (self._folder / name).open("rb") as file:
            file.seek(start)
            return file.read(_CHUNK_BYTES)


# Names and handles by the hash of the bundle; an actor ends with the last handle to it.
_shelves: dict[str, tuple[str, Any]] = {}


def _shelve(bundle: Bundle) -> str:
    """Hold a bundle ready for machines, next to this program; gives the name to ask for."""
    sha256 = sha256_of((bundle.path / "manifest.json").read_bytes())
    if sha256 not in _shelves or not _is_alive(_shelves[sha256][1]):
        name = f"actionclip-bundle-{unique_name()}"
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        shelf = ray.remote(_Shelf).options(name=name, num_cpus=0, scheduling_strategy=here)
        _shelves[sha256] = name, shelf.remote(str(bundle.path.resolve()))
    return _shelves[sha256][0]


def _is_alive(shelf: Any) -> bool:
    try:
        ray.get(shelf.sizes.remote(), timeout=10)
    except (RayError, ValueError):
        return False
    return True


def _bundle_here(shelf_name: str, manifest_sha256: str) -> Bundle:
    """The bundle on this machine, brought here if it is not; every file is held to its hash.

    Raises:
        IntegrityError: If a file is not what the driver's bundle has.
    """
    home = Path(tempfile.gettempdir()) / f"actionclip-bundles-{os.getuid()}"
    home.mkdir(mode=0o700, exist_ok=True)
    folder = home / manifest_sha256
    with work_lock(home / f"{manifest_sha256}.lock"):
        if not folder.is_dir():
            shelf = ray.get_actor(shelf_name)
            with staged_folder(folder) as new:
                for name, size in ray.get(shelf.sizes.remote()).items():
                    (new / name).parent.mkdir(parents=True, exist_ok=True)
                    with (new / name).open("wb") as file:
                        for start in range(0, size, _CHUNK_BYTES):
                            file.write(ray.get(shelf.part.remote(name, start)))
    if sha256_of((folder / "manifest.json").read_bytes()) != manifest_sha256:
        raise IntegrityError(
            f"{folder} has another manifest than the bundle of this run; remove it, so that it is "
            "brought again."
        )
    return Bundle.open(folder, check_hashes=True)


# Fetch and decode: tasks, whose process keeps its decoding process from one to the next


@dataclass
class _Kept:
    key: str = ""
    reader: BatchReader | None = field(default=None, repr=False)


_kept = _Kept()


def _reader(plan: RayPlan) -> BatchReader:
    key = f"{plan.manifest_json} {plan.settings}"
    if _kept.reader is None or _kept.key != key:
        if _kept.reader is not None:
            _kept.reader.close()
        _kept.reader = None
        manifest = Manifest.model_validate_json(plan.manifest_json)
        _kept.reader, _kept.key = BatchReader(manifest, plan.settings).__enter__(), key
    return _kept.reader


def _read_block(block: pa.Table, plan: RayPlan) -> Iterator[pa.Table]:
    """Read the videos of a block; gives their rows with pixels, a few at a time."""
    listed = _with_list_columns(block)
    start, reads, num_bytes = 0, list[ReadVideo](), 0
    with closing(_reader(plan).read_all(videos_in(listed))) as found:
        for read in found:
            reads.append(read)
            num_bytes += read.pixels.nbytes
            if num_bytes >= _BLOCK_BYTES or len(reads) == _VIDEOS_PER_CALL:
                yield _with_pixels(listed.slice(start, len(reads)), reads)
                start, reads, num_bytes = start + len(reads), [], 0
    if reads:
        yield _with_pixels(listed.slice(start, len(reads)), reads)


def _with_list_columns(block: pa.Table) -> pa.Table:
    """A block of a user's dataset as a list of videos."""
    names = set(block.column_names)
    if "uri" not in names:
        raise ArgumentError(
            "dataset",
            f"has the columns {', '.join(block.column_names)}; one of them has to be `uri`, a path "
            "or an address; rename it.",
        )
    uris = block["uri"].to_pylist()
    if not {"etag", "size"} <= names:
        found = list(map(describe, uris))
        etags, sizes = [each.etag for each in found], [each.size_bytes for each in found]
    else:
        etags, sizes = block["etag"].to_pylist(), block["size"].to_pylist()
    arrays = [pa.array(c, f.type) for c, f in zip((uris, etags, sizes), LIST_SCHEMA, strict=True)]
    table = pa.Table.from_arrays(arrays, schema=LIST_SCHEMA)
    for name in block.column_names:
        if name not in LIST_SCHEMA.names:
            table = table.append_column(name, block[name])
    return table


def _with_pixels(listed: pa.Table, reads: list[ReadVideo]) -> pa.Table:
    columns = {
        "pixels": pa.array([read.pixels.tobytes() for read in reads], pa.large_binary()),
        "shape": pa.array([list(read.pixels.shape) for read in reads], pa.list_(pa.int64())),
        "views": pa.array([read.views.tolist() for read in reads], pa.list_(pa.list_(pa.int64()))),
        "kind": pa.array([read.failure and read.failure.kind for read in reads], pa.string()),
        "error": pa.array([read.failure and read.failure.message for read in reads], pa.string()),
        "warnings": pa.array([list(read.warnings) for read in reads], pa.list_(pa.string())),
        "fetch": pa.array([read.seconds.get("fetch") for read in reads], pa.float64()),
        "decode": pa.array([read.seconds.get("decode") for read in reads], pa.float64()),
    }
    for name, column in columns.items():
        listed = listed.append_column(_OURS + name, column)
    return listed


def _reads_of(table: pa.Table) -> Iterator[ReadVideo]:
    listed = table.select([name for name in table.column_names if not name.startswith(_OURS)])
    ours = table.select([name for name in table.column_names if name.startswith(_OURS)])
    for row, video in enumerate(videos_in(listed)):
        read = {name.removeprefix(_OURS): ours[name][row].as_py() for name in ours.column_names}
        times = {stage: read[stage] for stage in ("fetch", "decode") if read[stage] is not None}
        if read["kind"] is not None:
            yield ReadVideo.failed(video, Failure(read["kind"], read["error"]), times)
            continue
        pixels = np.frombuffer(read["pixels"], np.uint8).reshape(read["shape"])
        views = np.array(read["views"], np.int64)
        yield ReadVideo(pixels, views, video, warnings=tuple(read["warnings"]), seconds=times)


# Encode: a pool of actors


class _Encoder:
    """Encodes and scores blocks of videos that were read.

    Its runtime gives what PyTorch gave for the bundle's golden data, or it does not begin.
    """

    def __init__(self, plan: RayPlan) -> None:
        self._plan = plan
        self._node = ray.get_runtime_context().get_node_id()
        self._failure: ActionClipError | None = None
        try:
            bundle = _bundle_here(plan.shelf, plan.run.bundle_sha256)
            self._runtime = open_runtime(bundle, **plan.runtime)
            verify_bundle(bundle, self._runtime).check()
            self._ranker = plan.settings.ranker(bundle.manifest, plan.bank)
        except ActionClipError as exc:
            # Raised here, Ray would start the actor again and again, and not say why.
            self._failure = exc

    def __call__(self, table: pa.Table) -> pa.Table:
        if self._failure is not None:
            raise self._failure
        more = [
            each
            for each in table.schema
            if each.name not in LIST_SCHEMA.names and not each.name.startswith(_OURS)
        ]
        plan = self._plan
        scorer = Scorer(
            self._runtime, plan.settings, plan.run, self._ranker, more=more, node=self._node
        )
        tables = [*scorer.tables(_reads_of(table))]
        return pa.concat_tables(tables) if tables else scorer.schema.empty_table()


# The windows of an archive


@dataclass(frozen=True)
class IndexPlan:
    """All that machines need to know of an archive; made by `plan_index_on_ray`."""

    bundle_sha256: str
    shelf: str  # name of the actor that has the bundle
    runtime: Mapping[str, Any]  # arguments of `open_runtime`
    layout: Layout
    grid: WindowGrid
    static_cosine: float
    thumbnails: bool
    region: Region
    max_pixels: int


def plan_index_on_ray(
    bundle: Bundle,
    grid: WindowGrid,
    *,
    static_cosine: float,
    thumbnails: bool,
    region: Region,
    max_pixels: int,
    runtime: Mapping[str, Any] | None = None,
    num_actors: int | None = None,
) -> IndexPlan:
    """Plan how the cluster that is connected encodes the windows of an archive.

    Args:
        bundle: The model, which is held ready for the machines.
        grid: Where windows lie.
        static_cosine: Of the archive.
        thumbnails: Whether to make pictures.
        region: See `Recognizer`.
        max_pixels: Of a frame.
        runtime: Arguments of `open_runtime`.
        num_actors: Most processes that encode; None for what the cluster has room for now.
    """
    asked, layout = _shared_out(runtime, num_actors)
    return IndexPlan(
        bundle_sha256=sha256_of((bundle.path / "manifest.json").read_bytes()),
        shelf=_shelve(bundle),
        runtime=asked,
        layout=layout,
        grid=grid,
        static_cosine=static_cosine,
        thumbnails=thumbnails,
        region=region,
        max_pixels=max_pixels,
    )


def encode_on_ray(videos: Sequence[Path], plan: IndexPlan) -> Generator[EncodedVideo, None, None]:
    """Encode the windows of videos on the cluster; each once, as they come.

    Args:
        videos: Files, under paths that each machine knows.
        plan: Of the archive.

    Raises:
        ClusterError: If the cluster fails again and again.
        ActionClipError: What a machine raises: a bundle that is not as it was, a runtime that
            fails.
    """
    missing = dict.fromkeys(map(str, videos))

    def work(dataset: Any) -> Any:
        return dataset.map_batches(
            _WindowEncoder,
            batch_format="pyarrow",
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=plan.layout.num_actors),
            num_cpus=plan.layout.actor_cpus,
            num_gpus=plan.layout.actor_gpus or None,
            fn_constructor_kwargs={"plan": plan},
        )

    tables = _until_done(lambda: pa.table({"path": list(missing)}), plan.layout, work)
    with closing(tables):
        for table in tables:
            for row in table.to_pylist():
                encoded = _encoded_of(row)
                if encoded.video.path in missing:  # a video may have been done twice
                    del missing[encoded.video.path]
                    yield encoded


class _WindowEncoder:
    """Reads videos and encodes their windows.

    Its runtime gives what PyTorch gave for the bundle's golden data, or it does not begin.
    """

    def __init__(self, plan: IndexPlan) -> None:
        self._plan = plan
        self._failure: ActionClipError | None = None
        try:
            bundle = _bundle_here(plan.shelf, plan.bundle_sha256)
            runtime = open_runtime(bundle, **plan.runtime)
            verify_bundle(bundle, runtime).check()
            self._encoder = VideoEncoder(runtime, region=plan.region, max_pixels=plan.max_pixels)
        except ActionClipError as exc:
            # Raised here, Ray would start the actor again and again, and not say why.
            self._failure = exc

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        if self._failure is not None:
            raise self._failure
        encoded = encode_videos(
            self._encoder,
            [Path(name) for name in table["path"].to_pylist()],
            self._plan.grid,
            static_cosine=self._plan.static_cosine,
            thumbnails=self._plan.thumbnails,
            num_workers=1,
        )
        with closing(encoded):
            for each in encoded:
                yield _encoded_table(each)


# A video is a row, on its way to the program that writes the archive.
_ENCODED_SCHEMA = pa.schema(
    [
        ("video", pa.string()),
        ("intervals", pa.large_binary()),
        ("embeddings", pa.large_binary()),
        ("width", pa.int64()),
        ("pictures", pa.list_(pa.large_binary())),
        ("pictured", pa.list_(pa.int64())),
        ("warnings", pa.list_(pa.string())),
        ("num_windows", pa.int64()),
    ]
)


def _encoded_table(encoded: EncodedVideo) -> pa.Table:
    row = {
        "video": json.dumps(asdict(encoded.video)),
        "intervals": encoded.intervals.tobytes(),
        "embeddings": encoded.embeddings.tobytes(),
        "width": encoded.embeddings.shape[1],
        "pictures": [jpeg for _, jpeg in encoded.thumbnails],
        "pictured": [window for window, _ in encoded.thumbnails],
        "warnings": list(encoded.warnings),
        "num_windows": encoded.num_windows,
    }
    return pa.Table.from_pylist([row], schema=_ENCODED_SCHEMA)


def _encoded_of(row: Mapping[str, Any]) -> EncodedVideo:
    return EncodedVideo(
        video=ArchivedVideo(**json.loads(row["video"])),
        intervals=np.frombuffer(row["intervals"], np.float64).reshape(-1, 2),
        embeddings=np.frombuffer(row["embeddings"], np.float32).reshape(-1, row["width"]),
        thumbnails=tuple(zip(row["pictured"], row["pictures"], strict=True)),
        warnings=tuple(row["warnings"]),
        num_windows=row["num_windows"],
    )
