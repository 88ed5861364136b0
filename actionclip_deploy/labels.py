"""Label banks: the text embeddings of labels x templates, stored in the bundle that made them.

A bank is a folder `labels/NAME` of a bundle: `bank.safetensors` holds the embeddings, and
`bank.json` says what they are of, what made them and, after calibration, how scores are read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

from actionclip_deploy.bundle import BANK_RECORD_NAME, LABELS_FOLDER, Bundle, new_folder
from actionclip_deploy.calibration import (
    QUERY_THRESHOLD,
    Answer,
    Calibration,
    SavedQuery,
    calibrated_scores,
)
from actionclip_deploy.embeddings import (
    check_embeddings,
    read_embeddings,
    read_metadata,
    read_record,
    write_embeddings,
    write_record,
)
from actionclip_deploy.errors import (
    ArgumentError,
    BundleError,
    DamagedFileError,
    FileWriteError,
    LabelBankError,
    LabelChoiceError,
    LabelError,
    LabelWarning,
    ShapeError,
)
from actionclip_deploy.files import read_replaceable, remove_folder, sha256_of
from actionclip_deploy.keyed_store import Store, cache_folder
from actionclip_deploy.known_words import (
    check_words,
    read_vocabulary,
    say_unknown_words,
    unknown_words,
    warn_of_unknown_words,
)
from actionclip_deploy.manifest import FileSpec, ScoreMethod, TensorSpec
from actionclip_deploy.prompts import (
    PLACEHOLDER,
    check_labels,
    check_templates,
    check_texts,
    clean_prompt,
    describe_text,
    fill_prompts,
    match_texts,
    read_labels,
    read_templates,
)
from actionclip_deploy.records import UsedBank
from actionclip_deploy.runtimes.base import Float32Array, Runtime
from actionclip_deploy.runtimes.call_sizes import PROMPTS_PER_CALL
from actionclip_deploy.tokenizer import Tokenizer

if TYPE_CHECKING:  # who recognises needs none of them, and they take a while to import
    from actionclip_deploy.command_records import LabelBankDiff, LabelBankInfo, SavedQueryRecord

logger = logging.getLogger(__name__)

# A calibration came with 2, a saved query with 3; without them a bank is as it was, and older
# versions read it.
BANK_SCHEMA_VERSION = 3
_WITHOUT_QUERY = 2
_WITHOUT_CALIBRATION = 1

_TENSORS_NAME = "bank.safetensors"
# In its metadata: the hash that the text encoder was held against. In bank.json it would be a field
# that older versions refuse.
_CHECKED = "textual_sha256"

# Of a bank that is not one of the bundle's; none of those can have such a name.
_ADHOC_NAME = "ad hoc"
_ADHOC_FOLDER = "banks"  # of the cache
_MAX_ADHOC_BYTES = 1 << 28
MAX_BATCH_SIZE = 10_000  # prompts in a call, of which each takes about 1 MB of activations

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
    tokens = tokenizer(prompts, context_length=context_length, describe=describe)
    _refuse_equal_tokens(labels, tokens)
    return tokens


def _refuse_equal_tokens(labels: Sequence[str], tokens: NDArray[np.int32]) -> None:
    """Refuse labels that only the tokenizer finds equal, as it does "pull-up" and "pull - up"."""
    first: dict[bytes, int] = {}
    for index, row in enumerate(tokens[: len(labels)]):
        if (other := first.setdefault(row.tobytes(), index)) != index:
            raise LabelError(
                f"{describe_text(labels, index, 'label')} has the same tokens as "
                f"{describe_text(labels, other, 'label')}, so the two would share their score; "
                "give one of them."
            )


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
        query: How independent scores are read, of a query that was saved from an archive.
        unknown_words: Words of the labels that the model does not know, see `unknown_words`; None
            of a model that knows every token.
        encoder_checked: Whether the files of the text encoder were held against `textual_sha256`
            when the embeddings were made. Versions that did not may have used altered ones.
    """

    name: str
    labels: tuple[str, ...]
    templates: tuple[str, ...]
    embeddings: NDArray[np.float32]
    textual_sha256: str
    calibration: Calibration | None = None
    query: SavedQuery | None = None
    unknown_words: tuple[str, ...] | None = None
    encoder_checked: bool = False

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

    @property
    def is_adhoc(self) -> bool:
        """Whether it was made of labels that came without a name, by `bank_for`."""
        return self.name == _ADHOC_NAME

    @cached_property
    def sha256(self) -> str:
        """Hash of all that an answer depends on: texts, embeddings and calibration."""
        texts = "\n".join((*self.labels, "", *self.templates))
        digest = hashlib.sha256(np.ascontiguousarray(self.embeddings).data)
        digest.update(texts.encode())
        if self.calibration is not None:
            digest.update(json.dumps(asdict(self.calibration), sort_keys=True).encode())
        if self.query is not None:
            digest.update(json.dumps(asdict(self.query), sort_keys=True).encode())
        return digest.hexdigest()

    def method_for(self, asked: ScoreMethod | None, usual: ScoreMethod) -> ScoreMethod:
        """How it is scored: as was asked, or else as a saved query is read, or else as usual."""
        return asked or ("independent" if self.query is not None else usual)

    def grid_for(
        self, window_seconds: float | None, stride_seconds: float | None
    ) -> tuple[float | None, float | None]:
        """Window and stride: as was asked, or else those that a saved query was chosen on."""
        if self.query is None or window_seconds is not None or stride_seconds is not None:
            return window_seconds, stride_seconds
        return self.query.window_seconds, self.query.stride_seconds

    def reads_query(self, method: str) -> bool:
        """Whether scores of a method are read as a saved query's, which has one of its own."""
        return self.query is not None and method == "independent"

    def query_scores(
        self, scores: NDArray[np.floating[Any]], *, template: int | None = None
    ) -> NDArray[np.float64]:
        """Scores of a saved query from independent scores, (N, C) -> (N,); see `SavedQuery`.

        Args:
            scores: Independent scores.
            template: The number of the one template that they are of; None for all.
        """
        assert self.query is not None, "only of a saved query"
        used = self.embeddings if template is None else self.embeddings[template : template + 1]
        # An independent score is of the mean of the cosines with the templates, which is the
        # cosine with the templates' mean, as a search takes it, times the norm of that.
        norms = np.linalg.norm(used.mean(axis=0, dtype=np.float64), axis=-1)
        return self.query.scores((2.0 * scores.astype(np.float64) - 1.0) / norms)

    def used(
        self, name: str | None, version: int | None = None, sha256: str | None = None
    ) -> UsedBank:
        """The bank as a record says which one it was.

        Args:
            name: What it is called there; None for a list of labels.
            version: On a server; None elsewhere.
            sha256: Of the version that it is a part of; None for its own.
        """
        return UsedBank(
            name=name,
            version=version,
            sha256=sha256 or self.sha256,
            num_labels=len(self.labels),
            num_templates=len(self.templates),
            textual_sha256=self.textual_sha256,
            **say_unknown_words(self.unknown_words),
        )

    def answer(self, scores: Float32Array, *, method: str) -> Answer | None:
        """Say which label a video shows, or that it shows none of them.

        Args:
            scores: Of all labels, shape (C,).
            method: How they were made.

        Returns:
            None where the bank is no saved query and was not calibrated, or for another method.

        Raises:
            ShapeError: If there is not a score for each label, or they do not sum to 1.
        """
        is_query = self.reads_query(method)
        if not is_query and (self.calibration is None or self.calibration.method != method):
            return None
        if scores.shape != (len(self.labels),):
            raise ShapeError(
                f"scores has shape {scores.shape}; expected ({len(self.labels)},), one for each "
                f"label of the bank {self.name!r}."
            )
        if is_query:
            (score,) = self.query_scores(scores[np.newaxis]).tolist()
            label = self.labels[0] if score >= QUERY_THRESHOLD else None
            return Answer(label, score, QUERY_THRESHOLD)
        assert self.calibration is not None
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
        recall: Callable[[Callable[[], Float32Array]], Float32Array] | None = None,
        allow_unknown_words: bool = False,
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
            recall: Called with what embeds the prompts, and gives their embeddings, by whoever may
                have them already.
            allow_unknown_words: Whether a label is embedded of which the model knows no word.

        Raises:
            LabelError: If labels or templates cannot be used, or a prompt is longer than the text
                encoder takes; names the line where they came from a file.
            UnknownWordsError: If the model knows no word of a label, or none that tells two
                labels apart.
            LabelBankError: If the runtime is of another bundle, or its embeddings are not of
                unit norm.
            IntegrityError: If a file of the text encoder was altered.
            ValueError: If the name or the batch size is not allowed.
        """
        bundle.label_bank_path(name)  # a name that is not allowed is refused before the work
        if not 1 <= batch_size <= MAX_BATCH_SIZE:
            raise ArgumentError(
                "batch_size", f"is {batch_size}; expected 1 or more and {MAX_BATCH_SIZE} at most."
            )
        _check_same_encoder(bundle, runtime)
        bundle.check_text_encoder()
        labels = check_labels(labels)
        templates = check_templates(bundle.manifest.templates if templates is None else templates)
        tokenizer, vocabulary = _read_tokenizer(bundle), read_vocabulary(bundle)
        tokens = tokenise_prompts(
            tokenizer, labels, templates, context_length=bundle.manifest.model.context_length
        )
        if not allow_unknown_words:
            check_words(labels, tokenizer, vocabulary, templates=bundle.manifest.templates)

        def embed() -> Float32Array:
            return embed_prompts(
                encode_text or runtime.encode_text,
                tokens,
                num_labels=len(labels),
                batch_size=batch_size,
                progress=progress,
            )

        return cls(
            name,
            tuple(labels),
            tuple(templates),
            embed() if recall is None else recall(embed),
            bundle.textual_sha256,
            unknown_words=unknown_words(labels, tokenizer, vocabulary),
            encoder_checked=True,
        )

    def with_templates(self, templates: Sequence[str]) -> LabelBank:
        """The bank with some of its templates alone, in the order given; not calibrated.

        Raises:
            LabelBankError: If it lacks one.
        """
        chosen: list[int] = []
        places = match_texts(templates, self.templates)
        for template, place in zip(templates, places, strict=True):
            if place is None:
                raise LabelBankError(
                    f"The label bank {self.name!r} has no template {template!r}; choose among "
                    "its own, or embed the labels with others."
                )
            if place not in chosen:
                chosen.append(place)
        return replace(
            self,
            templates=tuple(self.templates[place] for place in chosen),
            embeddings=np.ascontiguousarray(self.embeddings[chosen]),
            calibration=None,
            query=None,
        )

    @classmethod
    def load(cls, bundle: Bundle, name: str, *, calibrated: bool = True) -> LabelBank:
        """Read a bank of a bundle.

        Args:
            bundle: The bundle that holds the bank and made it.
            name: Name of the bank.
            calibrated: Whether its calibration, or how a saved query is read, is read too.

        Raises:
            LabelBankError: If the bank is missing, also since none can have such a name, was
                altered, was made by another text encoder or tokenizer than the bundle's, or was
                calibrated for another's scores.
            IntegrityError: If the bank's files lie outside of the bundle.

        Warns:
            LabelWarning: If a version made it that did not look at the text encoder's hash.
        """

        def load() -> LabelBank:
            return cls._load(bundle, name, calibrated=calibrated)

        try:
            folder = bundle.label_bank_path(name)
        except ValueError:
            return load()  # which says what a bank is, and how one is made
        return read_replaceable(folder, load, LabelBankError)

    @classmethod
    def _load(cls, bundle: Bundle, name: str, *, calibrated: bool) -> LabelBank:
        record = read_bank_record(bundle, name)
        _check_record(bundle, name, record)
        calibration = record.calibration if calibrated else None
        query = record.query if calibrated else None
        _check_calibration(bundle, name, calibration, query)
        try:
            path = _path_of(bundle, name, _TENSORS_NAME)
            embeddings = read_embeddings(path, record.embeddings)
            checked = read_metadata(path).get(_CHECKED)
            bank = cls(name, record.labels, record.templates, embeddings, record.textual_sha256)
        except DamagedFileError as exc:
            raise _damaged(name, str(exc), record.query) from exc
        except (LabelError, ShapeError) as exc:
            what = f"its content is not that of a bank ({exc})"
            raise _damaged(name, what, record.query) from exc
        if embeddings.shape[-1] != bundle.manifest.model.embedding_dim:
            what = f"its embeddings have width {embeddings.shape[-1]}"
            raise _damaged(name, what, record.query)
        if checked not in (None, record.textual_sha256):
            raise _of_other_encoder(name, record.query)
        if checked is None:
            warnings.warn(_of_unchecked_encoder(bundle, name), LabelWarning, stacklevel=3)
        return replace(
            bank,
            calibration=calibration,
            query=query,
            unknown_words=_unknown_words(bundle, bank.labels),
            encoder_checked=checked is not None,
        )

    def save(self, bundle: Bundle, *, overwrite: bool = False, expected: str | None = None) -> Path:
        """Write the bank into its bundle; a reader sees all of it or nothing.

        Args:
            bundle: The bundle that made the bank.
            overwrite: Whether a bank of the same name may be replaced.
            expected: `Bundle.label_bank_state` of when the work on this bank began, so that what
                another program saved meanwhile is not lost; None to replace whatever is there.

        Returns:
            The folder of the bank.

        Raises:
            LabelBankError: If the bundle did not make the bank, or another one's scores were
                calibrated, or what is saved is not what was expected, or the files cannot be
                written.
            BundleError: If there is a bank of this name that may not be replaced, or another
                bundle in the place of this one.
        """
        if self.textual_sha256 != bundle.textual_sha256:
            raise _of_other_encoder(self.name, self.query)
        _check_calibration(bundle, self.name, self.calibration, self.query)
        target = bundle.label_bank_path(self.name)
        version = _WITHOUT_QUERY if self.calibration else _WITHOUT_CALIBRATION
        version = BANK_SCHEMA_VERSION if self.query else version
        metadata = {_CHECKED: self.textual_sha256} if self.encoder_checked else None

        def check() -> None:
            bundle.check_current()
            if expected is not None:
                _check_state(bundle, self.name, expected)

        try:
            with new_folder(
                target,
                overwrite=overwrite,
                marker=BANK_RECORD_NAME,
                error=LabelBankError,
                check=check,
            ) as folder:
                path = folder / _TENSORS_NAME
                record = BankRecord(
                    schema_version=version,
                    name=self.name,
                    labels=self.labels,
                    templates=self.templates,
                    textual_sha256=self.textual_sha256,
                    prompts_sha256=_prompts_sha256(self.labels, self.templates),
                    embeddings=write_embeddings(path, self.embeddings, metadata),
                    calibration=self.calibration,
                    query=self.query,
                )
                write_record(folder / BANK_RECORD_NAME, record)
        except LabelBankError:
            bundle.check_current()  # tells of the cause where the whole bundle was replaced
            raise
        return target


# Labels as one gives them: a bank's name, a file, a list, or nothing where there is one bank.


def bank_for(
    bundle: Bundle,
    runtime: Runtime,
    labels: LabelBank | str | Path | Iterable[str] | None = None,
    *,
    templates: str | Path | Iterable[str] | None = None,
    allow_unknown_words: bool = False,
    cache: bool | str | Path = True,
    progress: Callable[[int, int], None] | None = None,
) -> LabelBank:
    """The bank of what was given as labels, whichever way; nothing is written into the bundle.

    The embeddings of labels that are in none of the bundle's banks are kept in the cache, under
    a key of the text encoder, the texts as it reads them, and the runtime.

    Args:
        bundle: The bundle to score with.
        runtime: A runtime opened on this bundle.
        labels: The name of a bank of the bundle, which comes before a file of that name; a label
            file, as `read_labels` takes it; the labels themselves; a bank; None for the only one
            that the bundle has.
        templates: K templates, or their file; None for all of the bank, or else the bundle's. Of
            a bank, those of its own that are used.
        allow_unknown_words: Whether a label is embedded of which the model knows no word.
        cache: Folder of the cache; True for that of `ACTIONCLIP_CACHE` or else of the platform,
            False for none.
        progress: Called after each batch with the numbers of prompts done and of all, if they
            have to be embedded.

    Returns:
        A bank; one that is not among the bundle's says so (`is_adhoc`).

    Raises:
        LabelError: If labels or templates cannot be used, or are no labels at all.
        UnknownWordsError: If the model knows no word of a label.
        LabelBankError: If there is no such bank, or not just one where none was named; or it was
            made by another text encoder than the bundle's.
        IntegrityError: If a file of the text encoder was altered.
    """
    chosen = _read_templates(templates)
    given = named_labels(bundle, labels)
    if isinstance(given, str):
        given = LabelBank.load(bundle, given)
    if isinstance(given, LabelBank):
        if given.textual_sha256 != bundle.textual_sha256:
            raise _of_other_encoder(given.name, given.query)
        return given if chosen is None else given.with_templates(chosen)
    chosen = bundle.manifest.templates if chosen is None else chosen
    key = _adhoc_key(bundle, runtime, given, chosen)
    folder = cache_folder(cache)
    bank = LabelBank.build(
        bundle,
        runtime,
        given,
        name="adhoc",
        templates=chosen,
        allow_unknown_words=allow_unknown_words,
        progress=progress,
        recall=None if folder is None else lambda embed: _recall(folder, key, embed),
    )
    return replace(bank, name=_ADHOC_NAME)


def _recall(folder: Path, key: Any, embed: Callable[[], Float32Array]) -> Float32Array:
    """Embeddings that the cache has, or that are made now and kept there if it can be written."""
    made: list[Float32Array] = []

    def write(new: Path) -> None:
        made.append(embed())
        write_embeddings(new / _TENSORS_NAME, made[0])

    store = Store(folder / _ADHOC_FOLDER, limit_bytes=_MAX_ADHOC_BYTES)
    try:
        entry = store.find_or_add(key, write)
        if made:
            return made[0]
        kept = entry.record["files"][_TENSORS_NAME]
        spec = FileSpec(sha256=kept["sha256"], size_bytes=kept["size"])
        return read_embeddings(entry.folder / _TENSORS_NAME, spec)
    except (FileWriteError, DamagedFileError, LookupError) as exc:
        logger.warning("the embeddings of these labels are not kept: %s", exc)
        return made[0] if made else embed()


def named_labels(
    bundle: Bundle, labels: LabelBank | str | Path | Iterable[str] | None
) -> LabelBank | str | tuple[str, ...]:
    """What was given as labels: a bank, the name of one of the bundle's, or the labels themselves.

    Args:
        bundle: The bundle.
        labels: As for `bank_for`.

    Raises:
        LabelError: If they are no labels, or their file cannot be read.
        LabelChoiceError: If there is no such bank, or not just one where none was named.
    """
    return labels_among(bundle.label_bank_names(), labels, owner=str(bundle.path))


def labels_among(
    names: Sequence[str],
    labels: LabelBank | str | Path | Iterable[str] | None,
    *,
    owner: str,
) -> LabelBank | str | tuple[str, ...]:
    """As `named_labels`, of whoever has banks: a bundle, or a server.

    Args:
        names: Of the banks.
        labels: As for `bank_for`.
        owner: What the banks are of, in messages.
    """
    if isinstance(labels, LabelBank):
        return labels
    there = ", ".join(names) or "none"
    if labels is None:
        if len(names) == 1:
            return names[0]
        raise LabelChoiceError(
            "labels",
            f"is missing, and {owner} has no label bank; give labels, or build a bank with "
            "`actionclip labels build BUNDLE --labels FILE --name NAME`."
            if not names
            else f"is missing, and {owner} has the label banks {there}; choose one of them.",
        )
    if isinstance(labels, str) and labels in names:
        return labels
    if isinstance(labels, str | Path):
        # A name with a suffix is a file's, whose reader says best what is wrong with it.
        is_name = isinstance(labels, str) and not Path(labels).suffix
        if is_name and (labels == "" or not _is_there(Path(labels))):
            raise LabelChoiceError(
                "labels",
                f"is {labels!r}, which is neither a label bank of {owner} (it has: {there}) nor a "
                "file; give one of them, or the labels themselves.",
            )
        return read_labels(labels)
    return check_labels(labels)


def check_search_words(bundle: Bundle, texts: Sequence[str]) -> None:
    """Refuse texts to look for of which the model knows no word, or none that tells two apart.

    Raises:
        UnknownWordsError: If there is such a text; names the first.
    """
    vocabulary = read_vocabulary(bundle)
    if vocabulary is not None:
        tokenizer, templates = _read_tokenizer(bundle), bundle.manifest.templates
        check_words(texts, tokenizer, vocabulary, templates=templates, noun="text")


def embed_texts(bundle: Bundle, runtime: Runtime, texts: Iterable[str]) -> Float32Array:
    """Embed texts as they are, without a template; one may be there several times.

    A `LabelWarning` names words of theirs that the model does not know.

    Args:
        bundle: The bundle.
        runtime: A runtime opened on this bundle.
        texts: M texts.

    Returns:
        float32, of unit norm, shape (M, D).

    Raises:
        LabelError: If one is no text, or longer than the text encoder takes.
        LabelBankError: If the runtime is of another bundle.
    """
    _check_same_encoder(bundle, runtime)
    checked = check_texts(texts, "text")
    warn_of_unknown_words(_unknown_words(bundle, checked), of_texts=True)
    tokenizer = _read_tokenizer(bundle)
    tokens = tokenizer(
        list(checked),
        context_length=bundle.manifest.model.context_length,
        describe=lambda index: describe_text(checked, index, "text"),
    )
    embeddings = embed_prompts(
        runtime.encode_text, tokens, num_labels=len(checked), batch_size=PROMPTS_PER_CALL
    )
    return embeddings.reshape(len(checked), -1)


def _read_templates(templates: str | Path | Iterable[str] | None) -> tuple[str, ...] | None:
    if isinstance(templates, str) and PLACEHOLDER in templates:
        raise LabelError(
            f"templates is {templates!r}; give templates as a list, such as [{templates!r}], or "
            "the name of their file."
        )
    if isinstance(templates, str | Path):
        return read_templates(templates)
    return None if templates is None else check_templates(templates)


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # no name that a file can have
        return False


def _adhoc_key(
    bundle: Bundle, runtime: Runtime, labels: Sequence[str], templates: Sequence[str]
) -> dict[str, Any]:
    info = asdict(runtime.describe())
    del info["num_threads"]  # which changes no bit
    source = bundle.manifest.source
    is_exported = bundle.manifest.graphs["textual"].file in bundle.manifest.files
    # Of a checkpoint that PyTorch runs as it is, the tokenizer's is the only file.
    checkpoint = {} if is_exported else {"checkpoint": [source.sha256, source.base_sha256]}
    return {
        **checkpoint,
        "textual": bundle.textual_sha256,
        "labels": [clean_prompt(label) for label in labels],
        "templates": [clean_prompt(template) for template in templates],
        "runtime": info,
    }


def _check_same_encoder(bundle: Bundle, runtime: Runtime) -> None:
    if Bundle(bundle.path, runtime.manifest).textual_sha256 != bundle.textual_sha256:
        raise LabelBankError(
            f"The runtime was opened on a bundle with another text encoder than {bundle.path}; "
            "open the runtime on the bundle that the label bank is for."
        )


def rename_label_bank(bundle: Bundle, old: str, new: str, *, overwrite: bool = False) -> Path:
    """Give a bank another name; whatever moment this is killed at, it is whole under one of them.

    Args:
        bundle: The bundle.
        old: Its name.
        new: Its new name.
        overwrite: Whether a bank of the new name may be replaced.

    Returns:
        Its new folder.

    Raises:
        LabelBankError: If there is no such bank, it is damaged, or another program changes it
            meanwhile; or if it cannot be written.
        BundleError: If there is a bank of the new name that may not be replaced.
        FileWriteError: If the bank cannot be removed under its old name.
        ValueError: If the new name is not one that a bank can have.
    """
    target = bundle.label_bank_path(new)
    if old == new:
        raise ValueError(f"{new!r} is the name of the label bank already; give another one.")
    record = read_bank_record(bundle, old)
    before = bundle.label_bank_state(old)

    def check() -> None:
        bundle.check_current()
        _check_state(bundle, old, before)

    with new_folder(
        target, overwrite=overwrite, marker=BANK_RECORD_NAME, error=LabelBankError, check=check
    ) as folder:
        path = _path_of(bundle, old, _TENSORS_NAME)
        try:
            embeddings = read_embeddings(path, record.embeddings)
            metadata = read_metadata(path)
        except DamagedFileError as exc:
            raise _damaged(old, str(exc)) from exc
        spec = write_embeddings(folder / _TENSORS_NAME, embeddings, metadata=metadata)
        renamed = record.model_copy(update={"name": new, "embeddings": spec})
        write_record(folder / BANK_RECORD_NAME, renamed)
    _check_state(bundle, old, before)
    remove_label_bank(bundle, old)
    return target


def _check_state(bundle: Bundle, name: str, expected: str) -> None:
    if bundle.label_bank_state(name) != expected:
        raise LabelBankError(
            f"The label bank {name!r} was changed by another program while this one "
            "worked on it, so nothing was saved; look at what is there now, and repeat "
            "this if it is still wanted."
        )


def remove_label_bank(bundle: Bundle, name: str) -> None:
    """Remove a bank from its bundle; one that is not there is no error.

    Raises:
        FileWriteError: If it cannot be removed.
        ValueError: If the name is not one that a bank can have.
    """
    folder = bundle.label_bank_path(name)
    try:
        if folder.is_dir():
            remove_folder(folder)
    except FileNotFoundError:
        pass
    except OSError as exc:
        raise FileWriteError(exc.errno, exc.strerror or str(exc), str(folder)) from exc


class BankRecord(BaseModel):
    """`bank.json`: what a bank holds and which bundle may use it."""

    # The schema is built when the first bank is read, not by `import actionclip_deploy`.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    schema_version: int = BANK_SCHEMA_VERSION
    name: str
    labels: tuple[str, ...]
    templates: tuple[str, ...]
    textual_sha256: str
    prompts_sha256: str
    embeddings: FileSpec
    calibration: Calibration | None = None
    query: SavedQuery | None = None

    @model_serializer(mode="wrap")
    def _without_what_is_absent(self, handler: SerializerFunctionWrapHandler) -> Any:
        fields = handler(self)
        for name in ("calibration", "query"):
            if fields.get(name) is None:
                fields.pop(name, None)
        return fields


def read_bank_record(bundle: Bundle, name: str) -> BankRecord:
    """What a bank says of itself, whether or not it fits the bundle.

    Raises:
        LabelBankError: If there is no such bank, or its record cannot be read.
    """
    if name not in bundle.label_bank_names():
        there = ", ".join(bundle.label_bank_names()) or "none"
        if "/" in name or "\\" in name or Path(name).suffix:  # a file of labels, most likely
            raise LabelBankError(
                f"{name!r} is not the name of a label bank of {bundle.path} (it has: {there}); "
                f"make one with `actionclip labels build {bundle.path} --labels FILE --name NAME` "
                "and give its name."
            )
        raise LabelBankError(
            f"The bundle {bundle.path} has no label bank {name!r} (it has: {there}); "
            "make it with `actionclip labels build`, or of a search with `actionclip search "
            "ARCHIVE TEXT --save NAME`."
        )
    path = _path_of(bundle, name, BANK_RECORD_NAME)
    try:
        versions = (_WITHOUT_CALIBRATION, _WITHOUT_QUERY, BANK_SCHEMA_VERSION)
        return read_record(path, BankRecord, versions=versions)
    except DamagedFileError as exc:
        raise _damaged(name, str(exc)) from exc
    except ValueError as exc:  # another version
        raise LabelBankError(
            f"The label bank {name!r} {exc}; build it again with "
            "`actionclip labels build --overwrite`."
        ) from exc


def _check_record(bundle: Bundle, name: str, record: BankRecord) -> None:
    """Check what can be checked without reading the embeddings."""
    query = record.query
    if record.textual_sha256 != bundle.textual_sha256:
        raise _of_other_encoder(name, query)
    if record.prompts_sha256 != _prompts_sha256(record.labels, record.templates):
        raise _damaged(name, "its labels or templates are not those that were embedded", query)
    try:
        check_embeddings(_path_of(bundle, name, _TENSORS_NAME), record.embeddings)
    except DamagedFileError as exc:
        raise _damaged(name, str(exc), query) from exc


def _check_calibration(
    bundle: Bundle, name: str, calibration: Calibration | None, query: SavedQuery | None
) -> None:
    """Check that a calibration, or a saved query, is of the scores that the bundle gives."""
    if query is not None and query.visual_sha256 != bundle.visual_sha256:
        raise LabelBankError(
            f"The saved query {name!r} is of an archive of other weights, precision or scale than "
            "this bundle's, so its threshold would mean nothing; index the videos anew with this "
            f"bundle, and {_made_again(name, query)}."
        )
    if calibration is not None and calibration.visual_sha256 != bundle.visual_sha256:
        raise LabelBankError(
            f"The label bank {name!r} was calibrated for other weights, precision or scale than "
            'this bundle\'s, so its threshold for "unknown" would mean nothing; run '
            "`actionclip labels calibrate` again, or build it again without."
        )


def _read_tokenizer(bundle: Bundle) -> Tokenizer:
    return Tokenizer.from_file(bundle.file("tokenizer.json"))


def _unknown_words(bundle: Bundle, texts: Sequence[str]) -> tuple[str, ...] | None:
    vocabulary = read_vocabulary(bundle)
    if vocabulary is None:  # reading a tokenizer takes a while
        return None
    return unknown_words(texts, _read_tokenizer(bundle), vocabulary)


def _path_of(bundle: Bundle, name: str, file: str) -> Path:
    return bundle.file(f"{LABELS_FOLDER}/{name}/{file}")


def _prompts_sha256(labels: Sequence[str], templates: Sequence[str]) -> str:
    # Embeddings belong to these texts; a label that was corrected by hand no longer has one.
    return sha256_of(json.dumps([list(labels), list(templates)]))


def _made_again(name: str, query: SavedQuery | None) -> str:
    if query is None:
        return "build it again with `actionclip labels build --overwrite`"
    return (
        "save it again, from an archive of this bundle, with `actionclip search ARCHIVE TEXT "
        f"--save {name} --overwrite`"
    )


def _damaged(name: str, what: str, query: SavedQuery | None = None) -> LabelBankError:
    kind = "label bank" if query is None else "saved query"
    return LabelBankError(f"The {kind} {name!r} is damaged: {what}; {_made_again(name, query)}.")


def _of_unchecked_encoder(bundle: Bundle, name: str) -> str:
    return (
        f"The label bank {name!r} was made by a version that did not look whether the text encoder "
        "was altered, in which case its scores mean nothing; build it again with "
        f"`actionclip labels build {bundle.path} --labels FILE --name {name} --overwrite`."
    )


def _of_other_encoder(name: str, query: SavedQuery | None = None) -> LabelBankError:
    kind = "label bank" if query is None else "saved query"
    return LabelBankError(
        f"The {kind} {name!r} was made by another text encoder or tokenizer than this bundle's, so "
        f"its scores would mean nothing; {_made_again(name, query)}."
    )


def list_label_banks(bundle: Bundle) -> tuple[LabelBankInfo, ...]:
    """Describe the banks of a bundle, by name; those that cannot be used too, with the reason."""
    return tuple(_describe(bundle, name) for name in bundle.label_bank_names())


def describe_query(bank: LabelBank | BankRecord) -> SavedQueryRecord:
    """What is known of the saved query that a bank is."""
    from actionclip_deploy.command_records import SavedQueryRecord

    query = bank.query
    assert query is not None, "only of a saved query"
    return SavedQueryRecord(
        name=bank.name,
        text=bank.labels[0],
        without=bank.labels[1:],
        threshold_z=query.threshold_z,
        threshold_cosine=query.threshold_cosine,
        num_accepted=query.num_accepted,
        num_rejected=query.num_rejected,
        num_windows=query.num_windows,
        window_seconds=query.window_seconds,
        stride_seconds=query.stride_seconds,
    )


def diff_label_banks(old: LabelBank, new: LabelBank) -> LabelBankDiff:
    """Compare the labels, ids and templates of two banks, as the text encoder reads them."""
    from actionclip_deploy.command_records import LabelBankDiff

    old_ids = match_texts(new.labels, old.labels)
    return LabelBankDiff(
        added=_unmatched(new.labels, old.labels),
        removed=_unmatched(old.labels, new.labels),
        moved=tuple(
            (label, old_id, index)
            for index, (label, old_id) in enumerate(zip(new.labels, old_ids, strict=True))
            if old_id is not None and old_id != index
        ),
        templates_added=_unmatched(new.templates, old.templates),
        templates_removed=_unmatched(old.templates, new.templates),
    )


def _unmatched(texts: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    places = match_texts(texts, others)
    return tuple(text for text, place in zip(texts, places, strict=True) if place is None)


def _describe(bundle: Bundle, name: str) -> LabelBankInfo:
    from actionclip_deploy.command_records import LabelBankInfo

    folder = bundle.label_bank_path(name)
    try:
        record = read_replaceable(folder, lambda: read_bank_record(bundle, name), BundleError)
    except BundleError as exc:
        return LabelBankInfo(name=name, num_labels=None, num_templates=None, problem=str(exc))

    def check() -> None:
        again = read_bank_record(bundle, name)  # another one, where the bank is replaced meanwhile
        _check_record(bundle, name, again)
        _check_calibration(bundle, name, again.calibration, again.query)

    problem = None
    try:
        read_replaceable(folder, check, BundleError)
    except BundleError as exc:
        problem = str(exc)
    return LabelBankInfo(
        name=name,
        num_labels=len(record.labels),
        num_templates=len(record.templates),
        problem=problem,
        is_calibrated=record.calibration is not None,
        is_saved_query=record.query is not None,
    )
