"""From a request's videos and tensors to what the graphs make of them, in calls that are shared.

It owns the decoding processes and the queue before the runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from actionclip_deploy.errors import RequestRefusedError
from actionclip_deploy.runtimes.base import Array, Runtime
from actionclip_deploy.sampling import Views
from actionclip_deploy.serve import refusals
from actionclip_deploy.serve.batcher import Answer, Batcher
from actionclip_deploy.serve.checks import check_graph_input
from actionclip_deploy.serve.decode_pool import Decoded, DecodeJob, DecodePool
from actionclip_deploy.serve.execution import ClipWork, GraphOrClip, SharedCalls
from actionclip_deploy.serve.requests import (
    Budget,
    EmbeddedVideo,
    EmbeddingInput,
    Input,
    VideoInput,
)
from actionclip_deploy.serve.settings import ServerSettings
from actionclip_deploy.serve.tracing import Tracer


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
