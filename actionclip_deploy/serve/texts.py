"""Texts of strangers: checked against the limits, tokenized, and embedded beside the clips."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.prompts import check_labels, check_templates, describe_text
from actionclip_deploy.runtimes.base import Runtime
from actionclip_deploy.serve import refusals
from actionclip_deploy.serve.banks import BankVersion
from actionclip_deploy.serve.banks_adhoc import ADHOC_NAME, AdhocBanks
from actionclip_deploy.serve.settings import Limits
from actionclip_deploy.serve.shared_runtime import SharedRuntime
from actionclip_deploy.tokenizer import Tokenizer

# Prompts in one call: a clip waits no longer than for these.
_PROMPTS_PER_CALL = 16


class TextEncoder:
    """Label banks, and prompts by themselves.

    Args:
        bundle: The bundle that is served.
        runtime: Its runtime.
        in_thread: Calls something in the thread of the runtime.
        limits: How many texts, and how long.
    """

    def __init__(
        self,
        bundle: Bundle,
        runtime: Runtime,
        in_thread: Callable[..., Future[Any]],
        limits: Limits,
    ) -> None:
        self._bundle = bundle
        self._runtime = SharedRuntime(runtime, in_thread)
        self._limits = limits
        self._tokenizer = Tokenizer.from_file(bundle.file("tokenizer.json"))
        self._adhoc = AdhocBanks(self._build_adhoc)

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary."""
        return self._tokenizer.num_tokens

    def tokens(self, texts: Sequence[str]) -> NDArray[np.int32]:
        """Tokens of prompts, shape (M, L).

        Raises:
            RequestRefusedError: If there are too many, or one is too long to look at.
            LabelError: If one is empty, holds control characters, or has too many tokens.
        """
        if not texts:
            raise refusals.bad_request("The request has no text; send a list of one or more.")
        if len(texts) > self._limits.rows:
            raise refusals.too_many("texts", len(texts), self._limits.rows)
        self._check_lengths(texts, "texts")
        for index, text in enumerate(texts):
            if any("\ud800" <= char <= "\udfff" for char in text):
                raise refusals.bad_value(
                    f"{describe_text(texts, index, 'text')} holds half a character (a surrogate); "
                    "send whole ones."
                )
        return self._tokenizer(
            list(texts),
            context_length=self._bundle.manifest.model.context_length,
            describe=lambda index: describe_text(texts, index, "text"),
        )

    def check_bank(self, labels: Sequence[str], templates: Sequence[str] | None) -> None:
        """Refuse labels and templates that no bank can be built of, before it is tried.

        Raises:
            RequestRefusedError: If there are too many, or one is too long.
            LabelError: If one cannot be used.
        """
        limits = self._limits
        self._check_set(labels, templates, limits.bank_labels, limits.bank_prompts)

    def build_bank(
        self,
        name: str,
        labels: Sequence[str],
        templates: Sequence[str] | None,
        progress: Callable[[int, int], None],
    ) -> LabelBank:
        """Build a bank; blocks, so it is for a thread."""
        return LabelBank.build(
            self._bundle,
            self._runtime,
            labels,
            name=name,
            templates=templates,
            batch_size=_PROMPTS_PER_CALL,
            progress=progress,
        )

    async def adhoc_bank(
        self,
        labels: tuple[str, ...],
        templates: tuple[str, ...] | None,
        *,
        deadline: float | None = None,
    ) -> BankVersion:
        """The bank of the labels that a request brings along.

        Raises:
            RequestRefusedError: If there are too many, one is too long, or the deadline passes.
            LabelError: If one cannot be used.
        """
        self._check_set(labels, templates, self._limits.labels, self._limits.prompts)
        chosen = self._bundle.manifest.templates if templates is None else templates
        return await self._adhoc.get(labels, tuple(chosen), deadline=deadline)

    def stop(self) -> None:
        """Make no more banks."""
        self._adhoc.stop()

    def _build_adhoc(self, labels: Sequence[str], templates: Sequence[str]) -> BankVersion:
        bank = self.build_bank(ADHOC_NAME, labels, templates, lambda *_: None)
        return BankVersion(bank, 0, bank.sha256, 0.0)

    def _check_set(
        self,
        labels: Sequence[str],
        templates: Sequence[str] | None,
        max_labels: int,
        max_prompts: int,
    ) -> None:
        if len(labels) > max_labels:
            raise refusals.too_many("labels", len(labels), max_labels)
        if templates is not None and len(templates) > self._limits.templates:
            raise refusals.too_many("templates", len(templates), self._limits.templates)
        used = self._bundle.manifest.templates if templates is None else templates
        num_prompts = len(labels) * len(used)
        if num_prompts > max_prompts:
            raise refusals.too_many("prompts (labels x templates)", num_prompts, max_prompts)
        self._check_lengths(labels, "labels")
        self._check_lengths(used, "templates")
        check_labels(labels)
        check_templates(used)

    def _check_lengths(self, texts: Sequence[str], noun: str) -> None:
        limit = self._limits.text_characters
        longest = max((len(text) for text in texts), default=0)
        if longest > limit:
            raise refusals.too_many(f"characters in one of its {noun}", longest, limit)
