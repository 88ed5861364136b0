"""Prompts -> tokens, as CLIP makes them, through the `tokenizers` library and without torch.

CLIP's tokenizer has two halves. The second (splitting, byte-level pairs, ids) is in the bundle's
`tokenizer.json`, which any program with the `tokenizers` library can read. The first, which is done
here in Python before it, cleans the prompt: `ftfy.fix_text`, `html.unescape` twice, runs of white
space become one space, lower case. A program that reads `tokenizer.json` itself has to do the same.

A prompt that spells out one of CLIP's control tokens is refused. The original would read it as
that token, and the text encoder, which takes its output at the first end token, would then ignore
the rest of the prompt.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from actionclip_deploy.errors import BundleError, ExportError, LabelError, MissingExtraError
from actionclip_deploy.files import write_text
from actionclip_deploy.manifest import describe_invalid
from actionclip_deploy.prompts import clean_prompt

if TYPE_CHECKING:  # who scores against a bank reads no text, and it takes a while to import
    import tokenizers

TokenArray: TypeAlias = NDArray[np.int32]

START_TOKEN = "<|startoftext|>"
END_TOKEN = "<|endoftext|>"
CLIP_MERGES_NAME = "bpe_simple_vocab_16e6.txt.gz"

VOCABULARY_NAME = "vocabulary.json"

# The names that open_clip gives to the same two tokens.
_CONTROL_STRINGS = (START_TOKEN, END_TOKEN, "<start_of_text>", "<end_of_text>")
# 49,152 is CLIP's vocabulary without the 256 single bytes that end a word and without the two
# control tokens; the file lists more pairs than CLIP uses.
_NUM_MERGES = 49152 - 256 - 2
NUM_TOKENS = 2 * 256 + _NUM_MERGES + 2
_END_OF_WORD = "</w>"
# CLIP matches without regard to case, and after lower-casing two characters still tell: U+017F, the
# long s, folds to "s"; U+0345, a mark that folds to a letter, matches nothing and is dropped.
_WORD = r"'[s\x{17F}]|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}\x{345}]+"


@dataclass(frozen=True)
class Word:
    """A word of a text, as the tokenizer cuts it: a run of letters, one digit, a run of signs.

    Attributes:
        text: The word, in lower case.
        tokens: Its ids; a word that CLIP has no token of its own for has several.
    """

    text: str
    tokens: tuple[int, ...]


class _VocabularyRecord(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    schema_version: Literal[1] = 1
    num_tokens: Annotated[int, Field(ge=1, le=1 << 24)]
    known_tokens: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Which tokens a text encoder was trained on, where those are not all of its tokenizer's.

    A token that it was not trained on has a row of zeros in the token table. Nothing of such a
    token reaches the embedding, but that something stands in its place.

    Attributes:
        is_known: bool, shape (number of tokens,).
    """

    is_known: NDArray[np.bool_]

    @classmethod
    def from_file(cls, path: Path) -> Vocabulary:
        """Read a `vocabulary.json`.

        Raises:
            BundleError: If it cannot be read, or is no vocabulary.
        """
        try:
            record = _VocabularyRecord.model_validate_json(path.read_bytes())
            is_known = np.zeros(record.num_tokens, np.bool_)
            for first, last in record.known_tokens:
                if not 0 <= first <= last < record.num_tokens:
                    raise ValueError(f"known_tokens has {first} to {last}")
                is_known[first : last + 1] = True
        except (OSError, ValueError) as exc:
            why = describe_invalid(exc) if isinstance(exc, ValidationError) else exc
            raise BundleError(
                f"The vocabulary {path} cannot be read ({why}); export the bundle again."
            ) from exc
        return cls(is_known)

    def save(self, path: Path) -> None:
        """Write a `vocabulary.json`: the first and the last id of each run of known tokens."""
        edges = np.flatnonzero(np.diff(self.is_known.astype(np.int8), prepend=0, append=0))
        runs = [(int(first), int(end) - 1) for first, end in edges.reshape(-1, 2)]
        record = _VocabularyRecord(num_tokens=len(self.is_known), known_tokens=tuple(runs))
        write_text(path, record.model_dump_json() + "\n")

    @property
    def num_known(self) -> int:
        """How many tokens are known."""
        return int(self.is_known.sum())

    def knows(self, tokens: Iterable[int]) -> bool:
        """Whether all of some tokens are known."""
        return all(token < len(self.is_known) and self.is_known[token] for token in tokens)


@functools.lru_cache(maxsize=2)
def _parsed(text: str) -> tokenizers.Tokenizer:
    """What a `tokenizer.json` says; kept, since reading takes 50 ms and each call asks for it."""
    import tokenizers

    return tokenizers.Tokenizer.from_str(text)


class Tokenizer:
    """Turns prompts into token ids.

    Args:
        inner: A tokenizer of the `tokenizers` library that knows CLIP's two control tokens.

    Raises:
        ValueError: If it does not know them.
    """

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        start, end = inner.token_to_id(START_TOKEN), inner.token_to_id(END_TOKEN)
        if start is None or end is None:
            raise ValueError(
                f"The tokenizer does not know {START_TOKEN} and {END_TOKEN}; "
                "expected one that Tokenizer.save wrote."
            )
        self._inner = inner
        self._start: int = start
        self._end: int = end

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a `tokenizer.json`.

        Raises:
            BundleError: If it cannot be read, or is no tokenizer of CLIP.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise BundleError(
                f"The tokenizer {path} cannot be read ({exc}); "
                "expected the tokenizer.json of a bundle: export the bundle again."
            ) from exc
        try:
            return cls(_parsed(text))
        except Exception as exc:  # the library raises bare Exception, whatever is wrong
            raise BundleError(
                f"{path} is not a tokenizer of CLIP ({exc}); export the bundle again."
            ) from exc

    @classmethod
    def from_clip_merges(cls, path: str | Path) -> Tokenizer:
        """Build the tokenizer from CLIP's list of byte pairs.

        Args:
            path: `bpe_simple_vocab_16e6.txt.gz`, as CLIP and open_clip ship it.

        Raises:
            ExportError: If the file cannot be read as such a list.

        Source:
            openai/CLIP@d05afc4 clip/simple_tokenizer.py: the order of the vocabulary.
        """
        import tokenizers
        from tokenizers import Regex, models, pre_tokenizers, processors

        pairs = _read_pairs(Path(path))
        alphabet = _byte_alphabet()
        words = [*alphabet, *(letter + _END_OF_WORD for letter in alphabet)]
        words += ["".join(pair) for pair in pairs]
        words += [START_TOKEN, END_TOKEN]
        vocabulary = {word: number for number, word in enumerate(words)}
        inner = tokenizers.Tokenizer(
            models.BPE(vocab=vocabulary, merges=pairs, end_of_word_suffix=_END_OF_WORD)
        )
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        inner.add_special_tokens([START_TOKEN, END_TOKEN])
        ends = [(token, vocabulary[token]) for token in (START_TOKEN, END_TOKEN)]
        inner.post_processor = processors.TemplateProcessing(
            single=f"{START_TOKEN} $A {END_TOKEN}", special_tokens=ends
        )
        return cls(inner)

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary; ids are below it."""
        return int(self._inner.get_vocab_size())

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json`; the same tokenizer always gives the same bytes."""
        write_text(path, self._inner.to_str())

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        context_length: int,
        describe: Callable[[int], str] | None = None,
    ) -> TokenArray:
        """Turn prompts into tokens that are as long as the longest prompt, not longer.

        Nothing is ever cut off. The text encoder gives the same for any padding: its attention is
        causal and its output is taken at the end token.

        Args:
            prompts: M prompts.
            context_length: Longest prompt that the text encoder takes, with start and end.
            describe: What an error calls the prompt of a number, counted from 0; a noun phrase.
                Without it, the number counted from 1 and the prompt itself.

        Returns:
            Token ids, int32, shape (M, L), padded with 0; each row is the start token, the
            prompt's tokens, and the end token.

        Raises:
            LabelError: If a prompt is longer than the context, or spells out a control token.
            ValueError: If there are no prompts, or one string was given in the place of many.
        """
        if isinstance(prompts, str) or len(prompts) == 0:
            raise ValueError(f"prompts is {prompts!r}; expected a sequence of one prompt or more.")
        describe = describe or (lambda index: f"prompt {index + 1} ({prompts[index]!r})")
        rows = []
        for index, prompt in enumerate(prompts):
            row = [self._start, *self._encode(prompt, index, describe), self._end]
            if len(row) > context_length:
                raise LabelError(
                    f"{describe(index)} is {len(row)} tokens long with its start and end, and the "
                    f"text encoder takes at most {context_length}; shorten the label or the "
                    "template."
                )
            rows.append(row)
        tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = row
        return tokens

    def words(self, texts: Sequence[str]) -> list[list[Word]]:
        """The words of each text with their tokens; no token spans two words."""
        found = []
        for text in map(clean_prompt, texts):
            # One by one: `encode_batch` starts threads, of which a process that forks complains.
            encoded = self._inner.encode(text, add_special_tokens=False)
            pieces = zip(encoded.word_ids, encoded.ids, encoded.offsets, strict=True)
            words = []
            for _, group in groupby(pieces, key=lambda piece: piece[0]):
                _, ids, offsets = zip(*group, strict=True)
                start, end = min(first for first, _ in offsets), max(last for _, last in offsets)
                words.append(Word(text[start:end], ids))
            found.append(words)
        return found

    def _encode(self, prompt: str, index: int, describe: Callable[[int], str]) -> list[int]:
        text = clean_prompt(prompt)
        folded = text.casefold()
        for control in _CONTROL_STRINGS:
            if control in folded:
                raise LabelError(
                    f"{describe(index)} holds the control token {control}, which would begin or "
                    "end the prompt in its middle; write the label without it."
                )
        ids: list[int] = self._inner.encode(text, add_special_tokens=False).ids
        return ids


def find_clip_merges() -> Path:
    """Find CLIP's list of byte pairs in the installed open_clip, without importing it.

    Raises:
        MissingExtraError: If open_clip is not installed or has no such file.
    """
    spec = importlib.util.find_spec("open_clip")
    path = Path(spec.origin).with_name(CLIP_MERGES_NAME) if spec and spec.origin else None
    if path is None or not path.is_file():
        raise MissingExtraError(
            f"CLIP's vocabulary ({CLIP_MERGES_NAME}, a part of open_clip)", "torch"
        )
    return path


def _read_pairs(path: Path) -> list[tuple[str, str]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")[1 : _NUM_MERGES + 1]
        pairs = [(first, second) for first, second in (line.split() for line in lines if line)]
        if not pairs:
            raise ValueError("it is empty")
    except (OSError, EOFError, ValueError) as exc:
        raise ExportError(
            f"{path} is not CLIP's list of byte pairs ({exc}); expected the {CLIP_MERGES_NAME} of "
            "open_clip: install open_clip_torch again."
        ) from exc
    return pairs


def _byte_alphabet() -> list[str]:
    """One printable character for each byte, in the order of CLIP's first 256 ids.

    Bytes that are printable in Latin-1 stand for themselves and come first; the others follow,
    written as the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    num_others = 256 - len(printable)
    return [chr(code) for code in [*printable, *range(0x100, 0x100 + num_others)]]
