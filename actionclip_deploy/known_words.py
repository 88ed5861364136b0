"""Words of labels that a model knows: those of the tokens that its text encoder was trained on.

A model that was trained from the start on few sentences (`motions`) has rows of its token table
that are zero; its bundle lists the others. Models that start from CLIP know every token.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import LabelWarning, UnknownWordsError
from actionclip_deploy.prompts import PLACEHOLDER, TEMPLATES, describe_text
from actionclip_deploy.tokenizer import VOCABULARY_NAME, Tokenizer, Vocabulary, Word

# Words that one record or sentence names; a forced bank of thousands of labels may have as many.
MAX_WORDS_NAMED = 100
_WORDS_IN_A_SENTENCE = 8


def read_vocabulary(bundle: Bundle) -> Vocabulary | None:
    """The tokens that a bundle's text encoder was trained on; None for all.

    Raises:
        IntegrityError: If the file was altered.
    """
    if VOCABULARY_NAME not in bundle.manifest.files:
        return None
    return Vocabulary.from_file(bundle.file(VOCABULARY_NAME))


def unknown_words(
    labels: Sequence[str], tokenizer: Tokenizer, vocabulary: Vocabulary | None
) -> tuple[str, ...] | None:
    """Words of labels that a model does not know, each once, in their order.

    A word is known if all of its tokens are. Of one that is known in parts the embedding has a
    fragment, which is a part of other words as well. The other way round, a token that the model
    met only as a part of a word ("biting" in "orbiting") counts as a word that it knows: which
    words there were cannot be told from its weights.

    Args:
        labels: C labels.
        tokenizer: Of the text encoder.
        vocabulary: What it was trained on; None for every token.

    Returns:
        Words in lower case; None of a model that knows every token.
    """
    if vocabulary is None:
        return None
    found = {
        word.text: None
        for words in _words_that_matter(labels, tokenizer)
        for word in words
        if not vocabulary.knows(word.tokens)
    }
    return tuple(found)


def check_words(
    labels: Sequence[str],
    tokenizer: Tokenizer,
    vocabulary: Vocabulary | None,
    *,
    templates: Sequence[str] = TEMPLATES,
    noun: str = "label",
) -> None:
    """Refuse labels of which a model knows no word, or no word that tells two of them apart.

    Words of templates do not count: the model met them around every label, so they say nothing
    of any ("a", "the man is", "playing").

    Args:
        labels: C labels, checked by `check_labels`.
        tokenizer: Of the text encoder.
        vocabulary: What it was trained on; None for every token.
        templates: What it was trained with, besides the original's.
        noun: What one of them is called in messages: "label", or "text" of a search.

    Raises:
        UnknownWordsError: If there is such a label; names the first.
    """
    if vocabulary is None:
        return
    sentences = [text.replace(PLACEHOLDER, " ") for text in (*TEMPLATES, *templates)]
    common = {word.tokens for words in tokenizer.words(sentences) for word in words}
    advice = (
        f"It was trained on {vocabulary.num_known:,} of {len(vocabulary.is_known):,} tokens. Give "
        f"{noun}s in words that it knows, or take a model of real actions (`actionclip models` "
        f"lists some). To score such {noun}s all the same, set allow_unknown_words "
        "(--allow-unknown-words)."
    )

    def name(index: int) -> str:
        # Of labels the place tells which one is meant; a search has one text, or few.
        if noun == "label":
            return describe_text(labels, index, noun)
        return f"the {noun} {labels[index][:60]!r}"

    first: dict[tuple[tuple[int, ...], ...], int] = {}
    matter = _words_that_matter(labels, tokenizer)
    says_nothing = [
        index
        for index, words in enumerate(matter)
        if not any(vocabulary.knows(word.tokens) and word.tokens not in common for word in words)
    ]
    if says_nothing:
        others = len(says_nothing) - 1
        more = f" and {others} other{'s' if others > 1 else ''}" if others else ""
        raise UnknownWordsError(
            f"The model knows no word of {name(says_nothing[0])}{more}, "
            f"besides those of its templates, so a score would mean nothing. {advice}"
        )
    for index, words in enumerate(tokenizer.words(labels)):
        read = tuple(word.tokens if vocabulary.knows(word.tokens) else () for word in words)
        if (other := first.setdefault(read, index)) != index:
            raise UnknownWordsError(
                f"{name(index)} is to the model the same as {name(other)}: it does not know the "
                f"words in which they differ, so which of the two scores higher would mean "
                f"nothing. {advice}"
            )


def _words_that_matter(labels: Sequence[str], tokenizer: Tokenizer) -> list[list[Word]]:
    """Words of each label without its signs, unless it has nothing else."""
    found = tokenizer.words(labels)
    named = [[word for word in words if any(map(str.isalnum, word.text))] for words in found]
    return [named_ or words for named_, words in zip(named, found, strict=True)]


def say_unknown_words(words: Sequence[str] | None) -> dict[str, Any]:
    """The field of a record about them, which is left out of a model that knows every token."""
    return {} if words is None else {"unknown_words": tuple(words[:MAX_WORDS_NAMED])}


def describe_unknown_words(words: Sequence[str], *, of_texts: bool = False) -> str:
    """One sentence about words of labels that a model does not know; one word or more.

    Args:
        words: In their order.
        of_texts: Whether they are of texts that are embedded, and not of labels.
    """
    shown = ", ".join(map(repr, words[:_WORDS_IN_A_SENTENCE]))
    rest = len(words) - _WORDS_IN_A_SENTENCE
    more = f" and {rest} more words" if rest > 0 else ""
    kind, rests = ("texts", "embeddings rest") if of_texts else ("labels", "scores rest")
    return (
        f"The model does not know {shown}{more} of the {kind}; {rests} on their other words alone."
    )


def warn_of_unknown_words(words: Sequence[str] | None, *, of_texts: bool = False) -> None:
    """Give a `LabelWarning` if there are any, of the line that called the caller."""
    if words:
        text = describe_unknown_words(words, of_texts=of_texts)
        warnings.warn(text, LabelWarning, stacklevel=3)
