"""What HTTP calls: classify, embed, run a graph, info. Plain Python, no web framework.

    service = Service(bundle, runtime, ServerSettings())
    await service.start()
    classified = await service.classify([VideoInput(path, "a.mp4")], ClassifyOptions("mine"))
    await service.stop()

It owns the runtime, the decoding processes, the queue before the runtime and the label banks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy import __version__
from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import RequestRefusedError
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.manifest import Manifest, ScoreMethod
from actionclip_deploy.records import RefusedVideo
from actionclip_deploy.runtimes.base import Array, Float32Array, Runtime
from actionclip_deploy.runtimes.parity import ParityReport, verify_bundle
from actionclip_deploy.sampling import Views
from actionclip_deploy.serve import refusals
from actionclip_deploy.serve.banks import BankRegistry, BankVersion, TextEncoder
from actionclip_deploy.serve.batcher import (
    Answer,
    Batcher,
    BatchFacts,
    ClipWork,
    GraphOrClip,
    SharedCalls,
    measure_batches,
)
from actionclip_deploy.serve.decode_pool import Decoded, DecodeJob, DecodePool
from actionclip_deploy.serve.observability import Metrics, Tracer, open_tracer
from actionclip_deploy.serve.ranking import SLOW_COSINES, Ranking, Scorer, with_templates
from actionclip_deploy.serve.settings import ServerSettings

logger = logging.getLogger(__name__)


# What is asked of the service, in plain Python: videos, options, and what comes out.


Result = TypeVar("Result")


@dataclass(frozen=True)
class VideoInput:
    """A video file, or a .npy file of frames, uint8 (N, H, W, 3).

    Attributes:
        path: Where it lies.
        name: What its sender calls it.
        kind: Which of the two it is.
    """

    path: Path
    name: str
    kind: Literal["video", "frames"] = "video"


@dataclass(frozen=True, eq=False)
class EmbeddingInput:
    """A video that was embedded before.

    Attributes:
        embeddings: Of its views, unit norm, float32, shape (V, D).
        name: What its sender calls it.
    """

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
    """

    labels: str | tuple[str, ...]
    top_k: int = 5
    views: Views = field(default_factory=Views)
    templates: tuple[str, ...] | None = None
    multi_label: bool = False
    per_template: bool = False
    return_frames: bool = False


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
        name: What its sender calls it.
        embeddings: Of its views, unit norm, float32, shape (V, D).
        indices: Frames of each clip, 0-based, shape (num_clips, T); None for embeddings that
            came as such.
        pts_seconds: Their presentation times; None where not known.
        warnings: Damage that was found.
        stages: Seconds by stage.
        batch_size: Clips in its call of the runtime, those of others too; 0 without a call.
        work: The frames as the model saw them; None where nobody asked for them, and for
            embeddings that came as such.
    """

    name: str
    embeddings: Float32Array
    indices: NDArray[np.int64] | None
    pts_seconds: NDArray[np.float64] | None
    warnings: tuple[str, ...]
    stages: dict[str, float]
    batch_size: int
    work: ClipWork | None


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
        method: How it was scored.
        videos: In the order of the request.
    """

    bank: BankVersion
    is_adhoc: bool
    method: ScoreMethod
    videos: tuple[ClassifiedVideo | RefusedVideo, ...]


def or_refused(given: Input, result: Result | BaseException) -> Result | RefusedVideo:
    """What came out for one video, or why nothing did; other errors are the request's."""
    if isinstance(result, RequestRefusedError):
        return RefusedVideo(given.name, result)
    if isinstance(result, BaseException):
        raise result
    return result


# Checks of tensors that strangers send, before they wait for a call that others share.


# fp16 embeddings that a client rounded once more are still within it.
_NORM_TOLERANCE = 1e-2
_DTYPES = {
    "visual": np.uint8,
    "temporal": np.float32,
    "textual": np.int32,
    "video": np.uint8,
    "clip": np.uint8,
}


def input_shape(manifest: Manifest, graph: GraphOrClip) -> tuple[int | str, ...]:
    """Shape of a graph's input; a letter stands for any positive number."""
    model = manifest.model
    frame = (model.input_size, model.input_size, 3)
    num_frames: int | str = model.num_frames if model.fixed_num_frames else "T"
    return {
        "visual": ("N", *frame),
        "temporal": ("B", num_frames, model.embedding_dim),
        "textual": ("M", "L"),
        "video": ("B", num_frames, *frame),
        "clip": ("B", num_frames, *frame),
    }[graph]


def check_graph_input(
    manifest: Manifest, graph: GraphOrClip, array: Array, num_tokens: int, max_rows: int
) -> None:
    """Refuse what a graph would fail on, or answer with what is no number.

    Args:
        manifest: Of the model.
        graph: The graph, or `clip`.
        array: Its input.
        num_tokens: Size of the vocabulary.
        max_rows: Rows that a request may have.

    Raises:
        RequestRefusedError: If it is no input of the graph.
    """
    shape, dtype = input_shape(manifest, graph), _DTYPES[graph]
    fits = array.dtype == dtype and array.ndim == len(shape)
    if not fits or any(
        given == 0 or (isinstance(size, int) and given != size)
        for given, size in zip(array.shape, shape, strict=True)
    ):
        wanted = ", ".join(map(str, shape))
        raise refusals.bad_tensor(
            f"The input of {graph} has shape {array.shape} and type {array.dtype}; expected "
            f"({wanted}) and {np.dtype(dtype)}, none of its sizes zero."
        )
    if len(array) > max_rows:
        raise refusals.too_many("rows", len(array), max_rows)
    if graph == "textual":
        _check_tokens(manifest, array, num_tokens)
    elif graph != "visual":
        _check_num_frames(manifest, graph, array.shape[1])
    if graph == "temporal" and not np.isfinite(array).all():
        raise refusals.bad_tensor(
            "The input of temporal holds values that are not finite; send frame features as the "
            "visual graph gives them."
        )


def check_embeddings(manifest: Manifest, array: Float32Array, name: str) -> None:
    """Refuse what are no embeddings of a video's views, shape (V, D), of unit norm.

    Raises:
        RequestRefusedError: If they are not.
    """
    width = manifest.model.embedding_dim
    if array.ndim != 2 or array.shape[1] != width or not len(array):
        raise refusals.bad_tensor(
            f"{name} has shape {array.shape}; expected embeddings of the views of one video, "
            f"(V, {width})."
        )
    with np.errstate(over="ignore", invalid="ignore"):
        errors = np.abs(np.linalg.norm(array.astype(np.float64), axis=1) - 1)
    if not (errors <= _NORM_TOLERANCE).all():  # written so that NaN fails
        raise refusals.bad_value(
            f"{name} holds vectors that are not of norm 1; send embeddings as /v1/embed gives them."
        )


def _check_tokens(manifest: Manifest, tokens: Array, num_tokens: int) -> None:
    limit = manifest.model.context_length
    if tokens.shape[1] > limit:
        raise refusals.bad_tensor(
            f"The input of textual has {tokens.shape[1]} columns and may have {limit}; "
            "shorten the prompts."
        )
    if tokens.min() < 0 or tokens.max() >= num_tokens:
        raise refusals.bad_tensor(
            f"The input of textual holds tokens from {tokens.min()} to {tokens.max()}; they must "
            f"be from 0 to {num_tokens - 1}."
        )


def _check_num_frames(manifest: Manifest, graph: str, num_frames: int) -> None:
    limit = manifest.model.max_frames
    if limit is not None and num_frames > limit:
        raise refusals.bad_tensor(
            f"The input of {graph} has {num_frames} frames per clip and the model takes {limit} "
            "at most; send fewer."
        )


# From a request's videos and tensors to what the graphs make of them, in calls that are shared.
#
# It owns the decoding processes and the queue before the runtime.


class Encoder:
    """Embeds videos and runs graphs; to be used from one event loop.

    Args:
        runtime: What executes the graphs.
        settings: How to run.
        tracer: Gets a span of each stage.
        on_call: Told of each call of the runtime: its group, clips and seconds.
        on_failure: Told the code of each video that gave no frames.
    """

    def __init__(
        self,
        runtime: Runtime,
        settings: ServerSettings,
        *,
        tracer: Tracer,
        on_call: Callable[[Hashable, int, float], None],
        on_failure: Callable[[str], None],
    ) -> None:
        self._manifest = runtime.manifest
        self._limits = settings.limits
        self._tracer = tracer
        self._on_failure = on_failure
        quantization = self._manifest.quantization
        self.batcher = Batcher(
            SharedCalls(runtime, max_batch=settings.max_batch),
            max_batch=settings.max_batch,
            max_delay_seconds=settings.max_delay_ms / 1000,
            max_waiting=settings.queue,
            shares_calls=quantization is None or quantization.recipe != "dynamic",
            on_call=on_call,
            more_is_coming=lambda: self._num_decoding > 0,
        )
        self.pool = DecodePool(self._manifest, self._limits, num_workers=settings.workers)
        self._num_decoding = 0

    @property
    def graph_names(self) -> list[GraphOrClip]:
        """What `run_graph` can run: the bundle's graphs, and `clip` for whole clips."""
        graphs: list[GraphOrClip] = [*self._manifest.graphs, "clip"]
        return sorted(graphs)

    async def start(self) -> None:
        """Start the decoding processes and begin to make calls.

        Raises:
            RuntimeUnavailableError: If a decoding process does not start.
        """
        self.batcher.start()
        await self.pool.start()

    async def stop(self, seconds: float) -> bool:
        """Finish what is there; gives whether all was done in time."""
        done = await self.batcher.drain(seconds)
        await self.pool.stop()
        return done

    def check_inputs(
        self, inputs: Sequence[Input], views: Views, *, returns_frames: bool = False
    ) -> None:
        """Refuse a request whose videos are none, or too many.

        Frames that are to be returned may take no more than what may be sent.

        Raises:
            RequestRefusedError: If they are.
        """
        if not inputs:
            raise refusals.bad_request(
                "The request has no video; send one as the part `video`, `frames` or `embeddings`."
            )
        if len(inputs) > self._limits.videos:
            raise refusals.too_many("videos", len(inputs), self._limits.videos)
        if views.num_views > self._limits.views:
            raise refusals.too_many("views of a video", views.num_views, self._limits.views)
        model = self._manifest.model
        frame_bytes = model.num_frames * model.input_size**2 * 3
        num_bytes = len(inputs) * views.num_views * frame_bytes
        if returns_frames and num_bytes > self._limits.body_bytes:
            raise refusals.too_many("bytes of frames to return", num_bytes, self._limits.body_bytes)
        for each in inputs:
            if isinstance(each, EmbeddingInput) and len(each.embeddings) > self._limits.views:
                raise refusals.too_many(
                    "embeddings of a video", len(each.embeddings), self._limits.views
                )

    async def embed(
        self, given: Input, views: Views, budget: Budget, *, keeps_frames: bool = False
    ) -> EmbeddedVideo:
        """Embed one video; embeddings are passed on as they are.

        Frames are kept where they are asked for alone: a request waits for all of its videos.

        Raises:
            RequestRefusedError: If it gives no frames, takes too much, or the deadline passes.
            InferenceError: If the runtime fails.
        """
        if isinstance(given, EmbeddingInput):
            return EmbeddedVideo(given.name, given.embeddings, None, None, (), {}, 0, None)
        decoded = await self._decode(given, views, budget)
        num_frames = decoded.views.shape[1]
        work = ClipWork(decoded.pixels, decoded.views)
        with self._tracer.span("encode", views=len(decoded.views)):
            answer = await self.batcher.submit(
                ("views", num_frames),
                work,
                size=-(-len(decoded.pixels) // num_frames),
                deadline=budget.deadline,
            )
        return EmbeddedVideo(
            name=given.name,
            embeddings=answer.output.output,
            indices=decoded.indices,
            pts_seconds=decoded.pts_seconds,
            warnings=decoded.warnings,
            stages={
                "read": budget.read_seconds,
                "decode_queue": decoded.wait_seconds,
                "decode": decoded.timings_ms["total"] / 1000,
                "queue": answer.queue_seconds,
                **answer.output.stages,
            },
            batch_size=answer.batch_size,
            work=work if keeps_frames else None,
        )

    async def run_graph(
        self, graph: GraphOrClip, array: Array, budget: Budget, *, num_tokens: int
    ) -> Answer:
        """Run one graph, or `clip`.

        Args:
            graph: One of `graph_names`.
            array: Its input, as the methods of `runtimes.base.Runtime` take it.
            budget: The request's time.
            num_tokens: Size of the vocabulary.

        Returns:
            Its `output` is an `execution.Encoded`, whose `output` is float32, shape (rows, D).

        Raises:
            RequestRefusedError: If the input is none for the graph, or the request cannot be done.
            InferenceError: If the runtime fails.
        """
        if graph not in self.graph_names:
            raise refusals.unknown_model(graph, list(self.graph_names))
        check_graph_input(self._manifest, graph, array, num_tokens, self._limits.rows)
        num_clips = len(array)
        if graph == "visual":
            num_clips = -(-num_clips // self._manifest.model.num_frames)
        return await self.batcher.submit(
            (graph, array.shape[1:]), array, size=num_clips, deadline=budget.deadline
        )

    async def _decode(self, given: VideoInput, views: Views, budget: Budget) -> Decoded:
        self._num_decoding += 1
        try:
            with self._tracer.span("decode", video=given.name):
                return await self.pool.decode(
                    DecodeJob(given.path, given.name, views, given.kind), deadline=budget.deadline
                )
        except RequestRefusedError as exc:
            self._on_failure(exc.code)
            raise
        finally:
            self._num_decoding -= 1
            self.batcher.wake()


_WARM_UP_SECONDS = 10.0

State = Literal["new", "starting", "ready", "stopping", "stopped"]


class Service:
    """Everything a server does, but for HTTP.

    Args:
        bundle: The bundle that is served.
        runtime: An open runtime of it; closed by `stop`.
        settings: How to run.
    """

    def __init__(self, bundle: Bundle, runtime: Runtime, settings: ServerSettings) -> None:
        self.bundle = bundle
        self.runtime = runtime
        self.manifest = runtime.manifest
        self.settings = settings
        self.limits = settings.limits
        self.metrics = Metrics()
        self.state: State = "new"
        self.verification: ParityReport | None = None
        self.batch_facts: BatchFacts | None = None
        self.tracer: Tracer = open_tracer(enabled=settings.tracing)
        self.encoder = Encoder(
            runtime,
            settings,
            tracer=self.tracer,
            on_call=self._count_call,
            on_failure=lambda code: self.metrics.decode_failures.labels(code).inc(),
        )
        self.batcher = self.encoder.batcher
        self.texts = TextEncoder(bundle, runtime, self.batcher.in_thread, self.limits)
        self.banks = BankRegistry(
            self.texts.build_bank,
            max_banks=self.limits.banks,
            max_bytes=self.limits.bank_bytes,
            on_change=self._bank_changed,
            save=self._save_bank if settings.save_labels else None,
        )

    @property
    def is_ready(self) -> bool:
        """Whether it is verified and warm, and was not told to end."""
        return self.state == "ready"

    @property
    def graph_names(self) -> list[GraphOrClip]:
        """What `run_graph` can run: the bundle's graphs, and `clip` for whole clips."""
        return self.encoder.graph_names

    async def start(self) -> None:
        """Verify the runtime, warm it up, load the banks and start the decoding processes.

        Raises:
            ParityError: If the runtime disagrees with the golden data.
            BundleError: If a bank cannot be loaded.
            RuntimeUnavailableError: If a decoding process does not start.
        """
        self.state = "starting"
        if self.settings.verify:
            self.verification = await asyncio.to_thread(verify_bundle, self.bundle, self.runtime)
            self.verification.check()
        self.batch_facts = await asyncio.to_thread(self._warm_up)
        self.batcher.best_batch = self.batch_facts.best
        names = self.settings.labels
        for name in self.bundle.label_bank_names() if names is None else names:
            self.banks.activate(await asyncio.to_thread(LabelBank.load, self.bundle, name))
        await self.encoder.start()
        self._tell_metrics()
        if self.state == "starting":  # and was not told to end meanwhile
            self.state = "ready"

    def begin_stop(self) -> None:
        """Refuse new requests from now on; those that have begun go on."""
        if self.state in ("starting", "ready"):
            self.state = "stopping"

    async def stop(self) -> None:
        """Finish what is there and free everything."""
        if self.state == "stopped":
            return
        self.begin_stop()
        drain = self.settings.drain_seconds
        await self.banks.stop()
        self.texts.stop()
        if await self.encoder.stop(drain):
            self.runtime.close()
        else:  # a call may still be running, in memory that closing frees
            logger.warning("Some requests were not finished in %s seconds.", drain)
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

    def _check_running(self) -> None:
        """Requests that have begun go on after `begin_stop`."""
        if self.state in ("new", "starting"):
            raise refusals.not_ready()
        if self.state == "stopped":
            raise refusals.shutting_down()

    def check_bank(self, name: str, labels: Sequence[str], templates: Sequence[str] | None) -> int:
        """Refuse a bank that cannot be built, before it is tried; gives its embeddings' bytes.

        Raises:
            RequestRefusedError: If the name is not allowed, or there is too much of something.
            LabelError: If a label or template cannot be used.
        """
        try:
            self.bundle.label_bank_path(name)
        except ValueError as exc:
            raise refusals.bad_value(str(exc)) from exc
        self.texts.check_bank(labels, templates)
        num_vectors = len(labels) * len(templates or self.manifest.templates)
        return 4 * num_vectors * self.manifest.model.embedding_dim

    def update_metrics(self) -> None:
        """Set the numbers that are states, before they are read."""
        metrics, pool = self.metrics, self.encoder.pool
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
        self.encoder.check_inputs(inputs, options.views, returns_frames=keeps_frames)
        began = time.perf_counter()
        bank, is_adhoc = await self._bank_for(options, budget)
        label_seconds = time.perf_counter() - began
        scores = self.manifest.scores
        method: ScoreMethod = "independent" if options.multi_label else scores.method
        scorer = Scorer(bank.bank, method, scores.scale, options.top_k, options.per_template)

        async def classify(each: Input) -> ClassifiedVideo:
            embedded = await self.encoder.embed(
                each, options.views, budget, keeps_frames=keeps_frames
            )
            started = time.perf_counter()
            with self.tracer.span("score"):
                ranking = await self._rank(scorer, embedded.embeddings)
            embedded.stages["score"] = time.perf_counter() - started
            if is_adhoc:
                embedded.stages["labels"] = label_seconds
            self._count_stages(embedded)
            return ClassifiedVideo(embedded, ranking)

        results = await asyncio.gather(*map(classify, inputs), return_exceptions=True)
        videos = tuple(map(or_refused, inputs, results))
        if len(videos) == 1 and isinstance(videos[0], RefusedVideo):
            raise videos[0].error
        return Classified(bank, is_adhoc, method, videos)

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
        self.encoder.check_inputs(inputs, views)

        async def embed(each: VideoInput) -> EmbeddedVideo:
            embedded = await self.encoder.embed(each, views, budget)
            self._count_stages(embedded)
            return embedded

        results = await asyncio.gather(*map(embed, inputs), return_exceptions=True)
        videos = list(map(or_refused, inputs, results))
        if len(videos) == 1 and isinstance(videos[0], RefusedVideo):
            raise videos[0].error
        return videos

    async def embed_texts(self, texts: Sequence[str], budget: Budget | None = None) -> Float32Array:
        """Embed prompts as they are; unit norm, float32, shape (M, D).

        Raises:
            RequestRefusedError: If there are too many, or the deadline passes.
            LabelError: If a text cannot be used.
        """
        self._check_running()
        budget = budget or self.budget()
        tokens = self.texts.tokens(texts)
        embeddings: Float32Array = (await self.run_graph("textual", tokens, budget)).output.output
        return embeddings

    async def run_graph(
        self, graph: GraphOrClip, array: Array, budget: Budget | None = None
    ) -> Answer:
        """Run one graph, or `clip`, in calls that it may share with other requests.

        Args:
            graph: One of `graph_names`.
            array: Its input, as the methods of `runtimes.base.Runtime` take it.
            budget: The request's time.

        Returns:
            Its `output` is an `execution.Encoded`, whose `output` is float32, shape (rows, D).

        Raises:
            RequestRefusedError: If the input is none for the graph, or the request cannot be done.
            InferenceError: If the runtime fails.
        """
        self._check_running()
        budget = budget or self.budget()
        return await self.encoder.run_graph(graph, array, budget, num_tokens=self.texts.num_tokens)

    async def _bank_for(self, options: ClassifyOptions, budget: Budget) -> tuple[BankVersion, bool]:
        if not isinstance(options.labels, str):
            with self.tracer.span("labels"):
                return (
                    await self.texts.adhoc_bank(
                        options.labels, options.templates, deadline=budget.deadline
                    ),
                    True,
                )
        active = self.banks.get(options.labels)
        if options.templates is None:
            return active, False
        chosen = with_templates(active.bank, options.templates)
        return (
            BankVersion(chosen, active.version, active.sha256, active.activated_seconds),
            False,
        )

    async def _rank(self, scorer: Scorer, embeddings: Float32Array) -> Ranking:
        if scorer.num_cosines(len(embeddings)) < SLOW_COSINES:
            return scorer.rank(embeddings)
        return await asyncio.to_thread(scorer.rank, embeddings)

    def _warm_up(self) -> BatchFacts:
        facts = measure_batches(
            self.runtime, max_batch=self.settings.max_batch, budget_seconds=_WARM_UP_SECONDS
        )
        self.runtime.encode_text(np.ones((1, 2), np.int32))
        return facts

    def _save_bank(self, bank: LabelBank) -> None:
        bank.save(self.bundle, overwrite=True)

    def _bank_changed(self, name: str, active: BankVersion | None) -> None:
        if active is None:
            self.metrics.forget_bank(name)
        else:
            self.metrics.bank_version.labels(name).set(active.version)

    def _tell_metrics(self) -> None:
        info = self.runtime.describe()
        self.metrics.info.labels(
            __version__, info.name, info.execution_provider, info.precision, info.engine or ""
        ).set(1)

    def _count_call(self, group: Hashable, num_clips: int, seconds: float) -> None:
        assert isinstance(group, tuple)
        self.metrics.batch_clips.labels(group[0]).observe(num_clips)
        self.metrics.batch_seconds.labels(group[0]).observe(seconds)

    def _count_stages(self, embedded: EmbeddedVideo) -> None:
        self.metrics.clips.inc(len(embedded.embeddings))
        for stage, seconds in embedded.stages.items():
            self.metrics.stage_seconds.labels(stage).observe(seconds)
