"""Label banks: the text embeddings of labels x templates, stored in the bundle that made them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.calibration import Answer, Calibration, calibrated_scores
from actionclip_deploy.embeddings import (
    check_calibration,
    check_record,
    damaged,
    of_other_encoder,
    read_embeddings,
    read_record,
    write_bank,
)
from actionclip_deploy.errors import BundleError, LabelBankError, LabelError, ShapeError
from actionclip_deploy.manifest import TensorSpec
from actionclip_deploy.prompts import (
    check_labels,
    check_templates,
    describe_text,
    fill_prompts,
)
from actionclip_deploy.runtimes.base import Float32Array, Runtime
from actionclip_deploy.runtimes.call_sizes import PROMPTS_PER_CALL
from actionclip_deploy.tokenizer import Tokenizer

# Graphs normalise in fp32, which is exact to 1e-6; vectors that nobody normalised miss by far more.
_NORM_TOLERANCE = 1e-3


def tokenise_prompts(
    tokenizer: Tokenizer, labels: Sequence[str], templates: Sequence[str], *, context_length: int
) -> NDArray[np.int32]:
    """Turn every label in every template into tokens.

    All prompts are padded to the longest, so an embedding does not depend on the call in which its
    prompt happens to be.

    Args:
        tokenizer: Of the text encoder.
        labels: C labels.
        templates: K templates.
        context_length: The longest prompt that the text encoder takes, in tokens.

    Returns:
        Token ids, shape (K * C, L), template-major.

    Raises:
        LabelError: If a prompt is longer; names its label and template.
    """

    def describe(index: int) -> str:
        template, label = divmod(index, len(labels))
        return (
            f"{describe_text(labels, label, 'label')} in "
            f"{describe_text(templates, template, 'template')}"
        )

    prompts = fill_prompts(labels, templates)
    return tokenizer(prompts, context_length=context_length, describe=describe)


def embed_prompts(
    encode: Callable[[Any], Float32Array],
    tokens: Any,
    *,
    num_labels: int,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> Float32Array:
    """Embed the prompts of labels x templates.

    Args:
        encode: Maps tokens (M, L) to embeddings (M, D), in whatever computes text.
        tokens: Template-major, shape (K * C, L), an array or a tensor of what `encode` takes.
        num_labels: C.
        batch_size: Prompts in one call.
        progress: Called after each call with the numbers of prompts done and of all.

    Returns:
        float32, shape (K, C, D).
    """
    batches = []
    for start in range(0, len(tokens), batch_size):
        batches.append(encode(tokens[start : start + batch_size]))
        if progress is not None:
            progress(min(start + batch_size, len(tokens)), len(tokens))
    return np.concatenate(batches).reshape(-1, num_labels, batches[0].shape[-1])


@dataclass(frozen=True, eq=False)
class LabelBank:
    """Labels, templates and their text embeddings.

    Attributes:
        name: Name of the bank in its bundle.
        labels: C labels; the index of a label is its id.
        templates: K templates.
        embeddings: float32, shape (K, C, D), of unit norm.
        textual_sha256: `Bundle.textual_sha256` of the bundle that made the embeddings.
        calibration: How scores are read; None where a video is never "unknown".
    """

    name: str
    labels: tuple[str, ...]
    templates: tuple[str, ...]
    embeddings: NDArray[np.float32]
    textual_sha256: str
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        """Check that the parts fit each other.

        Raises:
            LabelError: If the labels or templates cannot be used.
            ShapeError: If the embeddings have another shape or dtype than the labels ask for.
            LabelBankError: If an embedding is not of unit norm, or not finite.
        """
        check_labels(self.labels)
        check_templates(self.templates)
        spec = TensorSpec(
            name=f"The embeddings array of the label bank {self.name!r}",
            dtype="float32",
            shape=(len(self.templates), len(self.labels), "D"),
        )
        spec.check(self.embeddings)
        try:
            spec.check(self.embeddings, norm_tolerance=_NORM_TOLERANCE)
        except ShapeError as exc:
            raise LabelBankError(
                f"The embeddings of the label bank {self.name!r} are not all of norm 1; check the "
                "runtime that made them with `actionclip verify` and build the bank again."
            ) from exc

    @cached_property
    def sha256(self) -> str:
        """Hash of all that an answer depends on: texts, embeddings and calibration."""
        texts = "\n".join((*self.labels, "", *self.templates))
        digest = hashlib.sha256(np.ascontiguousarray(self.embeddings).data)
        digest.update(texts.encode())
        if self.calibration is not None:
            digest.update(json.dumps(asdict(self.calibration), sort_keys=True).encode())
        return digest.hexdigest()

    def answer(self, scores: Float32Array, *, method: str) -> Answer | None:
        """Say which label a video shows, or that it shows none of them.

        Args:
            scores: Of all labels, shape (C,).
            method: How they were made.

        Returns:
            None where the bank was not calibrated, or for another method.

        Raises:
            ShapeError: If there is not a score for each label, or they do not sum to 1.
        """
        if self.calibration is None or self.calibration.method != method:
            return None
        if scores.shape != (len(self.labels),):
            raise ShapeError(
                f"scores has shape {scores.shape}; expected ({len(self.labels)},), one for each "
                f"label of the bank {self.name!r}."
            )
        # The temperature keeps the order, but for scores that it rounds to the same.
        best = int(scores.argmax())
        score = float(calibrated_scores(scores[np.newaxis], self.calibration.temperature)[0, best])
        threshold = self.calibration.threshold
        return Answer(self.labels[best] if score >= threshold else None, score, threshold)

    @classmethod
    def build(
        cls,
        bundle: Bundle,
        runtime: Runtime,
        labels: Sequence[str],
        *,
        name: str,
        templates: Sequence[str] | None = None,
        batch_size: int = PROMPTS_PER_CALL,
        progress: Callable[[int, int], None] | None = None,
        encode_text: Callable[[NDArray[np.int32]], Float32Array] | None = None,
    ) -> LabelBank:
        """Embed every label in every template; nothing is written before `save`.

        Args:
            bundle: The bundle that the bank is for.
            runtime: A runtime opened on this bundle.
            labels: C labels, used exactly as written.
            name: Name of the bank: letters, digits, '.', '_' and '-'.
            templates: K templates; None for the manifest's.
            batch_size: Prompts in one call of the runtime.
            progress: Called after each batch with the numbers of prompts done and of all.
            encode_text: Called in the place of `runtime.encode_text`, by whoever shares the
                runtime with others.

        Raises:
            LabelError: If labels or templates cannot be used, or a prompt is longer than the text
                encoder takes; names the line where they came from a file.
            LabelBankError: If the runtime is of another bundle, or its embeddings are not of
                unit norm.
            ValueError: If the name or the batch size is not allowed.
        """
        bundle.label_bank_path(name)  # a name that is not allowed is refused before the work
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected 1 or more.")
        if Bundle(bundle.path, runtime.manifest).textual_sha256 != bundle.textual_sha256:
            raise LabelBankError(
                f"The runtime was opened on a bundle with another text encoder than {bundle.path}; "
                "open the runtime on the bundle that the label bank is for."
            )
        labels = check_labels(labels)
        templates = check_templates(bundle.manifest.templates if templates is None else templates)
        tokens = tokenise_prompts(
            Tokenizer.from_file(bundle.file("tokenizer.json")),
            labels,
            templates,
            context_length=bundle.manifest.model.context_length,
        )
        embeddings = embed_prompts(
            encode_text or runtime.encode_text,
            tokens,
            num_labels=len(labels),
            batch_size=batch_size,
            progress=progress,
        )
        return cls(name, tuple(labels), tuple(templates), embeddings, bundle.textual_sha256)

    def with_templates(self, templates: Sequence[str]) -> LabelBank:
        """The bank with some of its templates alone, in the order given; not calibrated.

        Raises:
            LabelBankError: If it lacks one.
        """
        places = {template: place for place, template in enumerate(self.templates)}
        for template in templates:
            if template not in places:
                raise LabelBankError(
                    f"The label bank {self.name!r} has no template {template!r}; choose among "
                    "its own, or embed the labels with others."
                )
        chosen = [places[template] for template in dict.fromkeys(templates)]
        return replace(
            self,
            templates=tuple(self.templates[place] for place in chosen),
            embeddings=np.ascontiguousarray(self.embeddings[chosen]),
            calibration=None,
        )

    @classmethod
    def load(cls, bundle: Bundle, name: str, *, calibrated: bool = True) -> LabelBank:
        """Read a bank of a bundle.

        Args:
            bundle: The bundle that holds the bank and made it.
            name: Name of the bank.
            calibrated: Whether its calibration is read, if it has one.

        Raises:
            LabelBankError: If the bank is missing, was altered, was made by another text encoder
                or tokenizer than the bundle's, or was calibrated for another's scores.
            IntegrityError: If the bank's files lie outside of the bundle.
            ValueError: If the name is not one that a bank can have.
        """
        record = read_record(bundle, name)
        check_record(bundle, name, record)
        calibration = record.calibration if calibrated else None
        check_calibration(bundle, name, calibration)
        embeddings = read_embeddings(bundle, name, record)
        try:
            bank = cls(name, record.labels, record.templates, embeddings, record.textual_sha256)
        except (LabelError, ShapeError) as exc:
            raise damaged(name, f"its content is not that of a bank ({exc})") from exc
        if embeddings.shape[-1] != bundle.manifest.model.embedding_dim:
            raise damaged(name, f"its embeddings have width {embeddings.shape[-1]}")
        return replace(bank, calibration=calibration)

    def save(self, bundle: Bundle, *, overwrite: bool = False) -> Path:
        """Write the bank into its bundle; a reader sees all of it or nothing.

        Args:
            bundle: The bundle that made the bank.
            overwrite: Whether a bank of the same name may be replaced.

        Returns:
            The folder of the bank.

        Raises:
            LabelBankError: If the bundle did not make the bank, or another one's scores were
                calibrated, or the files cannot be written.
            BundleError: If there is a bank of this name that may not be replaced.
        """
        if self.textual_sha256 != bundle.textual_sha256:
            raise of_other_encoder(self.name)
        check_calibration(bundle, self.name, self.calibration)
        return write_bank(
            bundle,
            self.name,
            self.labels,
            self.templates,
            self.embeddings,
            calibration=self.calibration,
            overwrite=overwrite,
        )


@dataclass(frozen=True)
class LabelBankInfo:
    """What is known of a bank without reading its embeddings.

    Attributes:
        name: Name of the bank.
        num_labels: C; None where the bank cannot be read.
        num_templates: K; None where the bank cannot be read.
        problem: Why `LabelBank.load` would refuse it, in a sentence; None if nothing speaks
            against it.
        is_calibrated: Whether a video may be "unknown".
    """

    name: str
    num_labels: int | None
    num_templates: int | None
    problem: str | None
    is_calibrated: bool = False


@dataclass(frozen=True)
class LabelBankDiff:
    """What changed from one bank to another.

    Attributes:
        added: Labels of the new bank alone, in its order.
        removed: Labels of the old bank alone, in its order.
        moved: Labels of both whose id changed, with the old and the new id, in the new order.
        templates_added: Templates of the new bank alone.
        templates_removed: Templates of the old bank alone.
    """

    added: tuple[str, ...]
    removed: tuple[str, ...]
    moved: tuple[tuple[str, int, int], ...]
    templates_added: tuple[str, ...]
    templates_removed: tuple[str, ...]


def list_label_banks(bundle: Bundle) -> tuple[LabelBankInfo, ...]:
    """Describe the banks of a bundle, by name; those that cannot be used too, with the reason."""
    return tuple(_describe(bundle, name) for name in bundle.label_bank_names())


def diff_label_banks(old: LabelBank, new: LabelBank) -> LabelBankDiff:
    """Compare the labels, ids and templates of two banks."""
    old_ids = {label: index for index, label in enumerate(old.labels)}
    new_ids = {label: index for index, label in enumerate(new.labels)}
    return LabelBankDiff(
        added=tuple(label for label in new.labels if label not in old_ids),
        removed=tuple(label for label in old.labels if label not in new_ids),
        moved=tuple(
            (label, old_ids[label], index)
            for label, index in new_ids.items()
            if old_ids.get(label, index) != index
        ),
        templates_added=tuple(text for text in new.templates if text not in old.templates),
        templates_removed=tuple(text for text in old.templates if text not in new.templates),
    )


def _describe(bundle: Bundle, name: str) -> LabelBankInfo:
    try:
        record = read_record(bundle, name)
    except BundleError as exc:
        return LabelBankInfo(name, None, None, str(exc))
    problem = None
    try:
        check_record(bundle, name, record)
        check_calibration(bundle, name, record.calibration)
    except BundleError as exc:
        problem = str(exc)
    return LabelBankInfo(
        name,
        len(record.labels),
        len(record.templates),
        problem,
        is_calibrated=record.calibration is not None,
    )
