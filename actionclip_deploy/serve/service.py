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
from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np

from actionclip_deploy import __version__
from actionclip_deploy.bundle import Bundle
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.runtimes.base import Array, Float32Array, Runtime
from actionclip_deploy.runtimes.parity import ParityReport, verify_bundle
from actionclip_deploy.sampling import Views
from actionclip_deploy.serve import refusals
from actionclip_deploy.serve.banks import BankRegistry, BankVersion
from actionclip_deploy.serve.batcher import Answer
from actionclip_deploy.serve.encoding import Encoder
from actionclip_deploy.serve.execution import BatchFacts, GraphOrClip, measure_batches
from actionclip_deploy.serve.observability import Metrics
from actionclip_deploy.serve.ranking import SLOW_COSINES, Ranking, Scorer, with_templates
from actionclip_deploy.serve.requests import (
    Budget,
    Classified,
    ClassifiedVideo,
    ClassifyOptions,
    EmbeddedVideo,
    Input,
    RefusedVideo,
    VideoInput,
    or_refused,
)
from actionclip_deploy.serve.settings import ServerSettings
from actionclip_deploy.serve.texts import TextEncoder
from actionclip_deploy.serve.tracing import Tracer, open_tracer

logger = logging.getLogger(__name__)

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
        method = "independent" if options.multi_label else scores.method
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
