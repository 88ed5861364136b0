"""From embeddings and a label bank to the part of an answer that ranks labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actionclip_deploy.calibration import Answer
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.records import LabelScore, TemplateVote
from actionclip_deploy.runtimes.base import Float32Array
from actionclip_deploy.scoring import average_views, score, top_k
from actionclip_deploy.serve import refusals

# From this many cosines on, scoring is not done between two steps of the event loop.
SLOW_COSINES = 20_000


@dataclass(frozen=True)
class Ranking:
    """Labels of one video.

    Attributes:
        predictions: Best first.
        answer: The best label or "unknown"; None where the bank was not calibrated, or for
            another method of scoring.
        votes: Of each template; None where nobody asked.
    """

    predictions: tuple[LabelScore, ...]
    answer: Answer | None
    votes: tuple[TemplateVote, ...] | None


@dataclass(frozen=True)
class Scorer:
    """Scores embeddings against a bank.

    Attributes:
        bank: The labels to choose from.
        method: One of `scoring.SCORE_METHODS`.
        scale: Multiplier of the cosine.
        top_k: Labels of a ranking.
        votes: Whether to say what each template alone would have said.
    """

    bank: LabelBank
    method: str
    scale: float
    top_k: int
    votes: bool = False

    def num_cosines(self, num_views: int) -> int:
        """How much work it is."""
        return num_views * len(self.bank.templates) * len(self.bank.labels) * (1 + self.votes)

    def rank(self, embeddings: Float32Array) -> Ranking:
        """Rank labels by the scores that a video's views have on average.

        Args:
            embeddings: Of the views, unit norm, float32, shape (V, D).
        """
        scores = self._scores(embeddings, self.bank.embeddings)
        best, best_scores = top_k(scores[np.newaxis], self.top_k)
        labels = self.bank.labels
        predictions = tuple(
            LabelScore(labels[i], float(s)) for i, s in zip(best[0], best_scores[0], strict=True)
        )
        votes = self._votes(embeddings, int(best[0][0])) if self.votes else None
        return Ranking(predictions, self.bank.answer(scores, method=self.method), votes)

    def _scores(self, embeddings: Float32Array, label_embeddings: Float32Array) -> Float32Array:
        scores = score(self.method, embeddings, label_embeddings, scale=self.scale)
        averaged: Float32Array = average_views(scores[np.newaxis])[0]
        return averaged

    def _votes(self, embeddings: Float32Array, best: int) -> tuple[TemplateVote, ...]:
        votes = []
        for k, template in enumerate(self.bank.templates):
            scores = self._scores(embeddings, self.bank.embeddings[k : k + 1])
            first = int(scores.argmax())
            votes.append(
                TemplateVote(template, self.bank.labels[first], float(scores[first]), first == best)
            )
        return tuple(votes)


def with_templates(bank: LabelBank, templates: Sequence[str]) -> LabelBank:
    """A bank with some of its templates, in the order given.

    Raises:
        RequestRefusedError: If the bank lacks one.
    """
    places = {template: place for place, template in enumerate(bank.templates)}
    for template in templates:
        if template not in places:
            raise refusals.bad_value(
                f"The label bank {bank.name!r} has no template {template!r}; choose among its own "
                f"(GET /v1/labels/{bank.name}), or give the labels as a list."
            )
    chosen = [places[template] for template in dict.fromkeys(templates)]
    return LabelBank(
        bank.name,
        bank.labels,
        tuple(bank.templates[place] for place in chosen),
        np.ascontiguousarray(bank.embeddings[chosen]),
        bank.textual_sha256,
    )
