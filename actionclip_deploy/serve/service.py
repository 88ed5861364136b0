"""What HTTP and gRPC call: classify, embed, run a graph, info. Plain Python, no web framework.

    service = Service(bundle, runtime, ServerSettings())
    await service.start()
    classified = await service.classify([VideoInput(path, "a.mp4")], ClassifyOptions("mine"))
    await service.stop()

It owns the runtime, the decoding processes, the queue before the runtime and the label banks.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy import __version__
from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import LabelBankError, RequestRefusedError, ShapeError
from actionclip_deploy.known_words import describe_unknown_words
from actionclip_deploy.labels import LabelBank, remove_label_bank
from actionclip_deploy.manifest import GraphOrClip, Manifest, ScoreMethod, TensorSpec
from actionclip_deploy.recognizer import Ranker, Ranking
from actionclip_deploy.records import RefusedVideo
from actionclip_deploy.runtimes.base import Array, Float32Array, Runtime
from actionclip_deploy.runtimes.call_sizes import BestCall, CallSizes, measure_best_call
from actionclip_deploy.runtimes.machine import check_memory
from actionclip_deploy.runtimes.parity import ParityReport, verify_bundle
from actionclip_deploy.sampling import Views
from actionclip_deploy.search import Archive
from actionclip_deploy.serve import refusals
from actionclip_deploy.serve.archives import ServedArchive
from actionclip_deploy.serve.banks import BankRegistry, BankVersion, TextEncoder
from actionclip_deploy.serve.batcher import Batcher, CallOutput
from actionclip_deploy.serve.decode_pool import Decoded, DecodeJob, DecodePool
from actionclip_deploy.serve.observability import ServerMetrics, Tracer, open_tracer
from actionclip_deploy.serve.settings import ServerSettings
from actionclip_deploy.serve.streams import LiveStreams
from actionclip_deploy.sinks import Sink
from actionclip_deploy.views import Job, ViewFrames, encode_in_full_calls, encode_views
from actionclip_deploy.watch import Camera

logger = logging.getLogger(__name__)

# fp16 embeddings that a client rounded once more are still within it.
_NORM_TOLERANCE = 1e-2
# From this many cosines on, scoring is not done between two steps of the event loop.
_SLOW_COSINES = 20_000
_WARM_UP_SECONDS = 10.0

Result = TypeVar("Result")
State = Literal["new", "starting", "ready", "stopping", "stopped"]


@dataclass(frozen=True)
class VideoInput:
    """A video file, or a .npy file of frames, uint8 (N, H, W, 3); the name is its sender's."""

    path: Path
    name: str
    kind: Literal["video", "frames"] = "video"


@dataclass(frozen=True, eq=False)
class EmbeddingInput:
    """A video that was embedded before: unit norm, float32, shape (V, D), one row per view."""

    embeddings: Float32Array
    name: str


Input = VideoInput | EmbeddingInput


@dataclass(frozen=True)
class ClassifyOptions:
    """How videos are to be classified.

    Attributes:
        labels: Name of a label bank, or labels.
        top_k: Labels of an answer.
        views: Clips and crops per video.
        templates: For labels, the templates to fill, None for the bundle's; for a bank, those of
            its templates to use, None for all.
        multi_label: Whether each label is scored by itself.
        per_template: Whether to say what each template alone would have said.
        return_frames: Whether the answer holds the frames as the model saw them.
        allow_unknown_words: Whether labels are taken of which the model knows no word.
    """

    labels: str | tuple[str, ...]
    top_k: int = 5
    views: Views = field(default_factory=Views)
    templates: tuple[str, ...] | None = None
    multi_label: bool = False
    per_template: bool = False
    return_frames: bool = False
    allow_unknown_words: bool = False


@dataclass(frozen=True)
class Budget:
    """The time of one request.

    Attributes:
        seconds: How much it has.
        deadline: When it ends, by the event loop's clock.
        read_seconds: What reading its body took.
        started: When it began, by `time.perf_counter`.
    """

    seconds: float
    deadline: float
    read_seconds: float
    started: float

    @classmethod
    def of(cls, seconds: float, *, read_seconds: float = 0.0) -> Budget:
        """A budget that begins to run now."""
        now = asyncio.get_running_loop().time()
        return cls(seconds, now + seconds, read_seconds, time.perf_counter() - read_seconds)

    @property
    def total_seconds(self) -> float:
        """Since the request began."""
        return time.perf_counter() - self.started


@dataclass(frozen=True, eq=False)
class EmbeddedVideo:
    """A video's embeddings.

    Attributes:
        embeddings: Of its views, unit norm, float32, shape (V, D).
        indices: Frames of each clip, 0-based, shape (num_clips, T); None for embeddings that
            came as such.
        pts_seconds: Their presentation times; None where not known.
        warnings: Damage that was found.
        stages: Seconds by stage.
        batch_size: Clips in its call of the runtime, those of others too; 0 without a call.
        work: The frames as the model saw them; None where nobody asked for them, and for
            embeddings that came as such.
        num_frames_encoded: Frames that went through the graphs; None for embeddings that came as
            such, and so below.
        num_frames_reused: Frames whose features were known.
    """

    name: str
    embeddings: Float32Array
    indices: NDArray[np.int64] | None
    pts_seconds: NDArray[np.float64] | None
    warnings: tuple[str, ...]
    stages: dict[str, float]
    batch_size: int
    work: ViewFrames | None
    num_frames_encoded: int | None = None
    num_frames_reused: int | None = None


@dataclass(frozen=True, eq=False)
class ClassifiedVideo:
    """A video's labels."""

    embedded: EmbeddedVideo
    ranking: Ranking


@dataclass(frozen=True, eq=False)
class Classified:
    """The answer to a request.

    Attributes:
        bank: The version that all of its videos were scored with.
        is_adhoc: Whether the bank was made of the request's own labels.
    """

    bank: BankVersion
    is_adhoc: bool
    method: ScoreMethod
    videos: tuple[ClassifiedVideo | RefusedVideo, ...]


def check_embeddings(manifest: Manifest, array: Float32Array, name: str) -> None:
    """Refuse what is not the embeddings of a video's views, shape (V, D), of unit norm.

    Raises:
        RequestRefusedError: If they are not.
    """
    shape = ("V", manifest.model.embedding_dim)
    spec = TensorSpec(name=name, dtype="float32", shape=shape)
    try:
        spec.check(array)
    except ShapeError as exc:
        raise refusals.bad_tensor(str(exc)) from exc
    try:
        spec.check(array, norm_tolerance=_NORM_TOLERANCE)
    except ShapeError as exc:
        raise refusals.bad_value(str(exc)) from exc


class Service:
    """Everything a server does, but for HTTP and gRPC.

    Args:
        bundle: The bundle that is served.
        runtime: An open runtime of it; closed by `stop`.
        settings: How to run.
        make_banks: Make label banks besides those of the settings; called once the runtime is
            verified, in a thread.
        cameras: What to watch from the start to the end.
        watched_banks: Of those that `make_banks` gives, what cameras may be watched with.
        sinks: Where events of the cameras go, besides the clients that listen; not closed here.
        archive: What searches look through; closed by `stop`.

    Raises:
        ArchiveError: If the archive goes with another text encoder than the bundle's.
        ValueError: If a camera's window, stride or thresholds are not allowed.
        LabelError: If a camera has a threshold or a group for a label that its bank lacks.
        LabelBankError: If there is no such bank as a camera's.
    """

    def __init__(
        self,
        bundle: Bundle,
        runtime: Runtime,
        settings: ServerSettings,
        *,
        make_banks: Sequence[Callable[[], LabelBank]] = (),
        cameras: Sequence[Camera] = (),
        watched_banks: Sequence[LabelBank] = (),
        sinks: Sequence[Sink] = (),
        archive: Archive | None = None,
    ) -> None:
        if archive is not None:
            archive.check_bundle(bundle)
        model = runtime.manifest.model
        for name in ("max_batch", "queue"):
            clip_bytes = model.num_frames * model.frame_bytes
            check_memory(name, getattr(settings, name), clip_bytes)
        self.bundle = bundle
        self.runtime = runtime
        self.manifest = runtime.manifest
        self.settings = settings
        self._make_banks = make_banks
        self.limits = settings.limits
        self.metrics = ServerMetrics()
        self.state: State = "new"
        self.verification: ParityReport | None = None
        self.verified_seconds: float | None = None
        self.batch_facts: BestCall | None = None
        self.tracer: Tracer = open_tracer(enabled=settings.tracing)
        self._sizes = CallSizes.of_server(self.manifest.model, settings.max_batch)
        self._num_decoding = 0
        self._num_requests = 0
        self.batcher = Batcher(
            self._execute,
            max_batch=settings.max_batch,
            max_delay_seconds=settings.max_delay_ms / 1000,
            max_waiting=settings.queue,
            shares_calls=runtime.calls_can_be_shared,
            on_call=self._count_call,
            more_is_coming=lambda: self._num_decoding > 0,
        )
        self.pool = DecodePool(self.manifest, self.limits, num_workers=settings.workers)
        self.texts = TextEncoder(bundle, runtime, self.batcher.in_thread, self.limits)
        self.banks = BankRegistry(
            self.texts.build_bank,
            max_banks=self.limits.banks,
            max_bytes=self.limits.bank_bytes,
            on_change=self._bank_changed,
            save=self._save_bank if settings.save_labels else None,
            forget=self._forget_bank if settings.save_labels else None,
        )
        self.streams = LiveStreams(
            bundle,
            runtime,
            cameras,
            bank_names=self._first_bank_names(),
            in_thread=self.batcher.in_thread,
            banks=watched_banks,
            sinks=sinks,
            max_pixels=self.limits.pixels,
            max_listeners=self.limits.event_clients,
            on_age=self.metrics.observe_age,
            on_call=self.metrics.stream_batch_windows.observe,
        )
        self.metrics.watch(self.streams.states, self.streams.sink_stats)
        self._archive: ServedArchive | None = None
        if archive is not None:
            self._archive = ServedArchive(
                archive,
                self.texts,
                self.limits,
                metrics=self.metrics,
                asks_for_key=bool(settings.api_keys),
            )
        self._saved: dict[str, str] = {}  # states of banks in the bundle, as this server knows them

    @property
    def is_ready(self) -> bool:
        """Whether it is verified and warm, and was not told to end."""
        return self.state == "ready"

    @property
    def has_archive(self) -> bool:
        """Whether there is something to search."""
        return self._archive is not None

    @property
    def archive(self) -> ServedArchive:
        """What searches look through.

        Raises:
            RequestRefusedError: If there is none (404).
        """
        if self._archive is None:
            raise refusals.no_archive()
        return self._archive

    @property
    def graph_names(self) -> list[GraphOrClip]:
        """What `run_graph` can run: the bundle's graphs, and `clip` for whole clips."""
        graphs: list[GraphOrClip] = [*self.manifest.graphs, "clip"]
        return sorted(graphs)

    async def start(self) -> None:
        """Verify the runtime, warm it up, load the banks and start the decoding processes.

        Raises:
            ParityError: If the runtime disagrees with the golden data.
            BundleError: If a bank cannot be loaded.
            ArchiveError: If the archive is damaged.
            RuntimeUnavailableError: If a decoding process does not start.
        """
        self.state = "starting"
        if self.settings.verify:
            self.verification = await asyncio.to_thread(verify_bundle, self.bundle, self.runtime)
            self.verification.check()
            self.verified_seconds = time.time()
        self.batch_facts = await asyncio.to_thread(self._warm_up)
        self.batcher.best_batch = self.batch_facts.num_clips
        for name in self._first_bank_names():
            self._saved[name] = self.bundle.label_bank_state(name)
            self.banks.activate(await asyncio.to_thread(LabelBank.load, self.bundle, name))
        for make in self._make_banks:
            self.banks.activate(await asyncio.to_thread(make))
        if self._archive is not None:
            await self._archive.start()
        self.batcher.start()
        await self.pool.start()
        info = self.runtime.describe()
        self.metrics.info.labels(
            __version__, info.name, info.execution_provider, info.precision, info.engine or ""
        ).set(1)
        if self.state == "starting":  # and was not told to end meanwhile
            self.streams.start()
            self.state = "ready"

    def begin_stop(self) -> None:
        """Refuse new requests from now on; those that have begun go on."""
        if self.state in ("starting", "ready"):
            self.state = "stopping"
        self.streams.begin_stop()

    async def stop(self) -> None:
        """Finish what is there and free everything."""
        if self.state == "stopped":
            return
        self.begin_stop()
        await self.streams.stop()  # whose calls need the batcher's thread
        await self.banks.stop()
        self.texts.stop()
        if self._archive is not None:
            await self._archive.stop()
        is_done = await self.batcher.drain(self.settings.drain_seconds)
        await self.pool.stop()
        if is_done:
            self.runtime.close()
        else:  # a call may still be running, in memory that closing frees
            logger.warning(
                "Some requests were not finished in %s seconds.", self.settings.drain_seconds
            )
        self.tracer.close()
        self.state = "stopped"

    def check_ready(self) -> None:
        """Do nothing if new requests are taken.

        Raises:
            RequestRefusedError: If they are not, not yet or not any more (503).
        """
        self._check_running()
        if self.state != "ready":
            raise refusals.shutting_down()

    def check_key(self, given: bytes) -> None:
        """Do nothing if a key is one of the server's, or it asks for none.

        Raises:
            RequestRefusedError: If it is not (401).
        """
        keys = self.settings.api_keys
        # All keys are compared, whichever fits, so that time tells nothing.
        if keys and not sum(hmac.compare_digest(given, key.encode()) for key in keys):
            raise refusals.no_key()

    def has_ticket(self, path: str, query: bytes) -> bool:
        """Whether a request brings what opens a file of the archive without a key."""
        return self._archive is not None and self._archive.opens(path, query)

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place among the requests that are worked on at a time, until the end of the context.

        Raises:
            RequestRefusedError: If none is free (429).
        """
        limit = self.limits.requests
        if self._num_requests >= limit:
            raise refusals.too_many_requests(limit, self.batcher.retry_after_seconds)
        self._num_requests += 1
        try:
            yield
        finally:
            self._num_requests -= 1

    def _check_running(self) -> None:
        """Requests that have begun go on after `begin_stop`."""
        if self.state in ("new", "starting"):
            raise refusals.not_ready()
        if self.state == "stopped":
            raise refusals.shutting_down()

    def check_bank(
        self,
        name: str,
        labels: Sequence[str],
        templates: Sequence[str] | None,
        *,
        allow_unknown_words: bool = False,
    ) -> int:
        """Refuse a bank that cannot be built, before it is tried; gives its embeddings' bytes.

        Raises:
            RequestRefusedError: If the name is not allowed, or there is too much of something.
            LabelError: If a label or template cannot be used.
        """
        try:
            self.bundle.label_bank_path(name)
        except ValueError as exc:
            raise refusals.bad_value(str(exc)) from exc
        self.streams.check_labels(name, labels)
        self.texts.check_bank(labels, templates, allow_unknown_words=allow_unknown_words)
        num_vectors = len(labels) * len(templates or self.manifest.templates)
        return 4 * num_vectors * self.manifest.model.embedding_dim

    async def remove_bank(self, name: str) -> None:
        """Remove a label bank that no camera is watched with, see `banks.BankRegistry.remove`.

        Raises:
            RequestRefusedError: If a camera is (409), or there is no such bank (404).
        """
        self.streams.check_unused(name)
        await self.banks.remove(name)

    async def update_metrics(self) -> None:
        """Set the numbers that are states, before they are read."""
        if self._archive is not None and self.state == "ready":
            await self._archive.look()
        metrics, pool = self.metrics, self.pool
        metrics.queue_clips.set(self.batcher.num_waiting)
        metrics.queue_limit_clips.set(self.settings.queue)
        metrics.decode_queue.set(pool.num_waiting)
        metrics.decode_workers.set(len(pool.process_ids))
        metrics.decode_replaced.set(pool.num_replaced)
        metrics.is_ready.set(self.is_ready)

    def budget(self, seconds: float | None = None, *, read_seconds: float = 0.0) -> Budget:
        """The time of a request that begins now; None takes the limit, and more is refused."""
        limit = self.limits.request_seconds
        if seconds is not None and not 0 < seconds <= limit:
            raise refusals.bad_value(
                f"timeout_ms is {seconds * 1000:g}; it must be above 0 and at most "
                f"{limit * 1000:g}."
            )
        return Budget.of(limit if seconds is None else seconds, read_seconds=read_seconds)

    async def classify(
        self, inputs: Sequence[Input], options: ClassifyOptions, budget: Budget | None = None
    ) -> Classified:
        """Rank labels for videos; all are scored by the bank's version of this moment.

        Of several videos, one that fails is reported in its place; a single one raises.

        Raises:
            RequestRefusedError: If the request cannot be done.
            LabelError: If its labels or templates cannot be used.
            InferenceError: If the runtime fails.
        """
        self._check_running()
        budget = budget or self.budget()
        keeps_frames = options.return_frames
        self._check_inputs(inputs, options.views, returns_frames=keeps_frames)
        began = time.perf_counter()
        bank, is_adhoc = await self._bank_for(options, budget)
        label_seconds = time.perf_counter() - began
        scores = self.manifest.scores
        asked: ScoreMethod | None = "independent" if options.multi_label else None
        method = bank.bank.method_for(asked, scores.method)
        ranker = Ranker(bank.bank, method, scores.scale, options.top_k, options.per_template)

        async def classify(each: Input) -> ClassifiedVideo:
            embedded = await self._embed(each, options.views, budget, keeps_frames=keeps_frames)
            started = time.perf_counter()
            with self.tracer.span("score"):
                ranking = await self._rank(ranker, embedded.embeddings)
            embedded.stages["score"] = time.perf_counter() - started
            if is_adhoc:
                embedded.stages["labels"] = label_seconds
            self._count_stages(embedded)
            return ClassifiedVideo(embedded, ranking)

        videos = await _each_or_refused(inputs, classify)
        return Classified(bank, is_adhoc, method, tuple(videos))

    async def embed_videos(
        self, inputs: Sequence[VideoInput], views: Views, budget: Budget | None = None
    ) -> list[EmbeddedVideo | RefusedVideo]:
        """Embed videos: unit-norm vectors, one for each view.

        Raises:
            RequestRefusedError: If the request cannot be done.
            InferenceError: If the runtime fails.
        """
        self._check_running()
        budget = budget or self.budget()
        self._check_inputs(inputs, views)

        async def embed(each: Input) -> EmbeddedVideo:
            embedded = await self._embed(each, views, budget)
            self._count_stages(embedded)
            return embedded

        return await _each_or_refused(inputs, embed)

    async def embed_texts(self, texts: Sequence[str], budget: Budget | None = None) -> Float32Array:
        """Embed prompts as they are; unit norm, float32, shape (M, D).

        Raises:
            RequestRefusedError: If there are too many, or the deadline passes.
            LabelError: If a text cannot be used.
        """
        self._check_running()
        return await self.run_graph("textual", self.texts.tokens(texts), budget)

    async def run_graph(
        self, graph: GraphOrClip, array: Array, budget: Budget | None = None
    ) -> Float32Array:
        """Run one graph, or `clip`, in calls that it may share with other requests.

        Args:
            graph: One of `graph_names`.
            array: Its input, as the methods of `runtimes.base.Runtime` take it.
            budget: The request's time.

        Returns:
            Its output, shape (rows, D).

        Raises:
            RequestRefusedError: If the request cannot be done.
            ShapeError: If the input is not one of the graph.
            InferenceError: If the runtime fails.
        """
        self._check_running()
        deadline = (budget or self.budget()).deadline
        if graph not in self.graph_names:
            raise refusals.unknown_model(graph, list(self.graph_names))
        self.manifest.check_input(graph, array, num_tokens=self.texts.num_tokens)
        if len(array) > self.limits.rows:
            raise refusals.too_many("rows", len(array), self.limits.rows)
        if graph == "clip":
            encoded = await self._encode(ViewFrames.of_clips(array), deadline)
            embeddings: Float32Array = encoded.output.embeddings
            return embeddings
        num_clips = len(array)
        if graph == "visual":
            num_clips = -(-num_clips // self.manifest.model.num_frames)
        group = (graph, array.shape[1:])
        done = await self.batcher.submit(group, array, size=num_clips, deadline=deadline)
        output: Float32Array = done.output
        return output

    def _check_inputs(
        self, inputs: Sequence[Input], views: Views, *, returns_frames: bool = False
    ) -> None:
        """Refuse a request without videos, or with too many.

        Frames that are to be returned may take no more than what may be sent.
        """
        if not inputs:
            raise refusals.bad_request(
                "The request has no video; send one as the part `video`, `frames` or `embeddings`."
            )
        limits, model = self.limits, self.manifest.model
        if len(inputs) > limits.videos:
            raise refusals.too_many("videos", len(inputs), limits.videos)
        if views.num_views > limits.views:
            raise refusals.too_many("views of a video", views.num_views, limits.views)
        frame_bytes = model.num_frames * model.input_size**2 * 3
        num_bytes = len(inputs) * views.num_views * frame_bytes
        if returns_frames and num_bytes > limits.body_bytes:
            raise refusals.too_many("bytes of frames to return", num_bytes, limits.body_bytes)
        for each in inputs:
            if isinstance(each, EmbeddingInput) and len(each.embeddings) > limits.views:
                raise refusals.too_many("embeddings of a video", len(each.embeddings), limits.views)

    async def _bank_for(self, options: ClassifyOptions, budget: Budget) -> tuple[BankVersion, bool]:
        """The bank that a request asks for, and whether it is made of the request's own labels."""
        if not isinstance(options.labels, str):
            with self.tracer.span("labels"):
                bank = await self.texts.adhoc_bank(
                    options.labels,
                    options.templates,
                    allow_unknown_words=options.allow_unknown_words,
                    deadline=budget.deadline,
                )
                return bank, True
        active = self.banks.get(options.labels)
        if options.templates is None:
            return active, False
        try:
            chosen = active.bank.with_templates(options.templates)
        except LabelBankError as exc:
            raise refusals.bad_value(f"{exc} GET /v1/labels/{active.name} lists them.") from exc
        return replace(active, bank=chosen), False

    async def _embed(
        self, given: Input, views: Views, budget: Budget, *, keeps_frames: bool = False
    ) -> EmbeddedVideo:
        """Embed one video; embeddings are passed on as they are.

        Frames are kept only where they are asked for: a request waits for all of its videos.
        """
        if isinstance(given, EmbeddingInput):
            return EmbeddedVideo(given.name, given.embeddings, None, None, (), {}, 0, None)
        decoded = await self._decode(given, views, budget)
        with self.tracer.span("encode", views=len(decoded.views)):
            done = await self._encode(decoded, budget.deadline)
        return EmbeddedVideo(
            name=given.name,
            embeddings=done.output.embeddings,
            indices=decoded.indices,
            pts_seconds=decoded.pts_seconds,
            warnings=decoded.warnings,
            stages={
                "read": budget.read_seconds,
                "decode_queue": decoded.wait_seconds,
                "decode": decoded.timings_ms["total"] / 1000,
                "queue": done.queue_seconds,
                **done.output.seconds,
            },
            batch_size=done.batch_size,
            work=decoded if keeps_frames else None,
            num_frames_encoded=done.output.num_frames_encoded,
            num_frames_reused=done.output.num_frames_reused,
        )

    async def _decode(self, given: VideoInput, views: Views, budget: Budget) -> Decoded:
        job = DecodeJob(given.path, given.name, views, given.kind)
        self._num_decoding += 1
        try:
            with self.tracer.span("decode", video=given.name):
                return await self.pool.decode(job, deadline=budget.deadline)
        except RequestRefusedError as exc:
            self.metrics.decode_failures.labels(exc.code).inc()
            raise
        finally:
            self._num_decoding -= 1
            self.batcher.wake()

    async def _encode(self, frames: ViewFrames, deadline: float) -> CallOutput:
        """Embed views in calls that others share; the output is a `views.Encoded`."""
        num_frames = frames.views.shape[1]
        num_clips = -(-len(frames.pixels) // num_frames)
        return await self.batcher.submit(
            ("views", num_frames), frames, size=num_clips, deadline=deadline
        )

    def _execute(self, group: Hashable, payloads: Sequence[Any]) -> Sequence[Any]:
        """Compute what a call of the batcher holds; in the thread of the runtime.

        A group is `("views", T)`, with frames and views, or `(graph, shape of a row)`, with rows.
        """
        assert isinstance(group, tuple)
        if group[0] == "views":
            return list(encode_views(self.runtime, payloads, sizes=self._sizes))
        runtime, sizes = self.runtime, self._sizes
        graphs: dict[str, tuple[Callable[[Any], Float32Array], int]] = {
            "visual": (runtime.encode_frames, sizes.visual),
            "temporal": (runtime.encode_clips, sizes.temporal),
            "textual": (runtime.encode_text, sizes.textual),
            "video": (runtime.encode_video, sizes.video),
        }
        run, rows_per_call = graphs[group[0]]
        done = encode_in_full_calls(
            (Job.of_rows(None, rows) for rows in payloads),
            run,
            rows_per_call=rows_per_call,
            shares_calls=runtime.calls_can_be_shared,
        )
        return [job.output() for job in done]

    async def _rank(self, ranker: Ranker, embeddings: Float32Array) -> Ranking:
        if ranker.num_cosines(len(embeddings)) < _SLOW_COSINES:
            return ranker.rank(embeddings)
        return await asyncio.to_thread(ranker.rank, embeddings)

    def _first_bank_names(self) -> Sequence[str]:
        names = self.settings.labels
        return self.bundle.label_bank_names() if names is None else names

    def _warm_up(self) -> BestCall:
        best = measure_best_call(
            self.runtime, max_clips=self.settings.max_batch, budget_seconds=_WARM_UP_SECONDS
        )
        self.runtime.encode_text(np.ones((1, 2), np.int32))
        return best

    def _save_bank(self, bank: LabelBank) -> None:
        expected = self._saved.get(bank.name, "")
        try:
            bank.save(self.bundle, overwrite=True, expected=expected)
        finally:
            # Whoever was told of another program's bank, and puts theirs again, means it.
            self._saved[bank.name] = self.bundle.label_bank_state(bank.name)

    def _forget_bank(self, name: str) -> None:
        # Whoever put it there: with `save_labels`, the folder has what the server has.
        remove_label_bank(self.bundle, name)
        self._saved.pop(name, None)

    def _bank_changed(self, name: str, active: BankVersion | None) -> None:
        if active is None:
            self.metrics.forget_bank(name)
        else:
            self.metrics.bank_version.labels(name).set(active.version)
            self.streams.set_bank(active)
            if words := active.bank.unknown_words:
                logger.warning(
                    "The label bank %r, version %d: %s",
                    name,
                    active.version,
                    describe_unknown_words(words),
                )

    def _count_call(self, group: Hashable, num_clips: int, seconds: float) -> None:
        assert isinstance(group, tuple)
        self.metrics.batch_clips.labels(group[0]).observe(num_clips)
        self.metrics.batch_seconds.labels(group[0]).observe(seconds)

    def _count_stages(self, embedded: EmbeddedVideo) -> None:
        self.metrics.clips.inc(len(embedded.embeddings))
        for stage, seconds in embedded.stages.items():
            self.metrics.stage_seconds.labels(stage).observe(seconds)


async def _each_or_refused(
    inputs: Sequence[Input], work: Callable[[Input], Awaitable[Result]]
) -> list[Result | RefusedVideo]:
    """Work on all inputs at once; of several, one that is refused is reported in its place.

    Other errors are the whole request's, and so is the refusal of a single input.
    """
    results = await asyncio.gather(*map(work, inputs), return_exceptions=True)
    outcomes: list[Result | RefusedVideo] = []
    for given, result in zip(inputs, results, strict=True):
        if isinstance(result, RequestRefusedError) and len(inputs) > 1:
            outcomes.append(RefusedVideo(given.name, result))
        elif isinstance(result, BaseException):
            raise result
        else:
            outcomes.append(result)
    return outcomes
