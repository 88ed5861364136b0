from __future__ import annotations

import gzip
import importlib.util
import json
import re
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
from fakes import fake_tokenizer
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from actionclip_deploy.errors import BundleError, ExportError, LabelError, MissingExtraError
from actionclip_deploy.installation import install_command
from actionclip_deploy.prompts import clean_prompt
from actionclip_deploy.tokenizer import Tokenizer, find_clip_merges

NO_LIMIT = 1 << 30

# Pieces that CLIP treats in a way of their own: contractions, entities (once and twice escaped),
# mojibake, ligatures, marks, joined emoji, digits that are no ASCII, control characters.
PIECES = [
    *("'s", "'S", "'ſ", "’t", "'re", "'ve", "'m", "'ll", "'d", "'''", "can't", "y'all'd"),
    *("&amp;", "&amp;lt;", "&#39;", "&#xD800;", "&nbsp;", "&hearts", "<b>", "</w>", "Ġ"),
    *("Ã©", "â€™", "ﬁ", "ﬆ", "ß", "İ", "Σ", "ΑΣ", "K", "\u0345", "e\u0301", "\u200b", "\ufeff"),
    *("👩‍👩‍👧", "🏃🏽", "跳远", "かな", "한국", "हिन्दी", "١٢", "½", "²", "Ⅷ", "①", "12,000.5"),
    *("\x00", "\x07", "\x1c", "\x7f", "\x85", "\u2028", "\r\n", "\t", "  ", "\xad", "\u00a0"),
    *("<", "|", ">", "startoftext", "<start_of", "_text>", "abseiling", "ApplyEyeMakeup"),
]
CONTROL_TOKENS = ["<|startoftext|>", "<|endoftext|>", "<start_of_text>", "<end_of_text>"]
CHARACTERS = st.characters(exclude_categories=("Cs", "Cn"))
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(CHARACTERS, max_size=4))).map("".join)


@pytest.fixture(scope="module")
def reference() -> Any:
    """The tokenizer of open_clip, which is that of OpenAI's CLIP."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of one prompt, without start and end."""
    row: list[int] = tokenizer([text], context_length=NO_LIMIT)[0].tolist()
    return row[1:-1]


def test_a_prompt_gives_the_published_tokens(clip_tokenizer: Tokenizer) -> None:
    tokens = clip_tokenizer(["a photo of action abseiling"], context_length=77)
    assert tokens.tolist() == [[49406, 320, 1125, 539, 1816, 596, 567, 3299, 49407]]
    assert tokens.dtype == np.int32


def test_each_peculiar_piece_gives_the_tokens_of_the_reference(
    clip_tokenizer: Tokenizer, reference: Any
) -> None:
    for piece in PIECES:
        for text in (piece, f"a{piece}s", f"! {piece}1 {piece}"):
            assert ids(clip_tokenizer, text) == reference.encode(text), repr(text)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(TEXTS)
def test_any_text_gives_the_tokens_of_the_reference(
    clip_tokenizer: Tokenizer, reference: Any, text: str
) -> None:
    cleaned = clean_prompt(text)  # which can make an unassigned character out of assigned ones
    assume(all(unicodedata.category(character) != "Cn" for character in cleaned))
    if any(control in cleaned.casefold() for control in CONTROL_TOKENS):
        with pytest.raises(LabelError, match="control token"):
            ids(clip_tokenizer, text)
    else:
        assert ids(clip_tokenizer, text) == reference.encode(text)


@pytest.mark.slow
def test_every_character_gives_the_tokens_of_the_reference(
    clip_tokenizer: Tokenizer, reference: Any
) -> None:
    # Characters that Unicode has not assigned are left out: the regular expression libraries of
    # the two know different versions of it.
    for character in map(chr, range(0x110000)):
        if unicodedata.category(character) not in ("Cs", "Cn"):
            text = f"a{character}'s{character}"
            assert ids(clip_tokenizer, text) == reference.encode(text), repr(text)


@pytest.mark.parametrize(
    "control",
    [*CONTROL_TOKENS, "<END_of_Text>", "&lt;|endoftext|&gt;", "<ſtart_of_text>"],
)
def test_a_prompt_that_spells_a_control_token_is_refused(
    clip_tokenizer: Tokenizer, control: str
) -> None:
    with pytest.raises(LabelError, match=r"prompt 2 .* holds the control token <.*text.*>"):
        clip_tokenizer(["run", f"a {control} run"], context_length=77)


def test_tokens_are_as_long_as_the_longest_prompt_and_padded_with_0(
    clip_tokenizer: Tokenizer,
) -> None:
    tokens = clip_tokenizer(["a", "a photo of", ""], context_length=77)
    assert tokens.tolist() == [
        [49406, 320, 49407, 0, 0],
        [49406, 320, 1125, 539, 49407],
        [49406, 49407, 0, 0, 0],
    ]


def test_a_prompt_of_exactly_the_context_length_is_taken(clip_tokenizer: Tokenizer) -> None:
    assert clip_tokenizer(["a " * 75], context_length=77).shape == (1, 77)


def test_a_prompt_over_the_context_length_is_refused_by_its_number(
    clip_tokenizer: Tokenizer,
) -> None:
    with pytest.raises(LabelError, match=r"prompt 2 \('a a .*\) is 78 tokens long .*at most 77"):
        clip_tokenizer(["a", "a " * 76], context_length=77)


def test_a_caller_can_name_the_prompt_of_an_error(clip_tokenizer: Tokenizer) -> None:
    with pytest.raises(LabelError, match=r"^line 7 is 5 tokens long .*at most 4; shorten"):
        clip_tokenizer(["a", "a a a"], context_length=4, describe=lambda index: f"line {index + 6}")


@pytest.mark.parametrize("prompts", ["run", []])
def test_one_string_and_no_prompts_are_refused(
    clip_tokenizer: Tokenizer, prompts: str | list[str]
) -> None:
    with pytest.raises(ValueError, match="expected a sequence of one prompt or more"):
        clip_tokenizer(prompts, context_length=77)


def test_a_saved_tokenizer_gives_the_same_tokens_and_the_same_file(
    clip_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    clip_tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.from_file(tmp_path / "tokenizer.json")
    prompts = [*PIECES, "a photo of action abseiling"]
    np.testing.assert_array_equal(
        loaded(prompts, context_length=NO_LIMIT), clip_tokenizer(prompts, context_length=NO_LIMIT)
    )
    loaded.save(tmp_path / "again.json")
    first, again = tmp_path / "tokenizer.json", tmp_path / "again.json"
    assert first.read_bytes() == again.read_bytes()


def test_the_library_alone_makes_the_tokens_of_a_cleaned_prompt(
    clip_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    clip_tokenizer.save(tmp_path / "tokenizer.json")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert library.get_vocab_size() == 49408
    for text in ["a photo of action abseiling", "it's 2 o'clock, Ã© &amp; 跳远"]:
        ours = clip_tokenizer([text], context_length=77)[0]
        assert library.encode(clean_prompt(text)).ids == ours.tolist()


def test_cleaning_is_the_original_s() -> None:
    assert clean_prompt("  Ã‰clair\t&amp;amp; \n Jump ") == "éclair & jump"


def test_a_tokenizer_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"tokenizer .*none\.json cannot be read.*export"):
        Tokenizer.from_file(tmp_path / "none.json")


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b'{"model": {"type": "none"}}'])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"tokenizer\.json.*export the bundle again"):
        Tokenizer.from_file(path)


def test_a_tokenizer_without_clip_s_control_tokens_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    fake_tokenizer(tmp_path).save(path)
    data = json.loads(path.read_text(encoding="utf-8"))
    other = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
    assert data["model"]["type"] == "BPE"
    path.write_text(other.to_str(), encoding="utf-8")
    with pytest.raises(BundleError, match="is not a tokenizer of CLIP"):
        Tokenizer.from_file(path)


@pytest.mark.parametrize(
    "content",
    [b"no gzip", gzip.compress(b"#version\na b c\n"), gzip.compress(b"#version\n"), b""],
    ids=["no gzip", "three in a line", "no pairs", "empty"],  # gzip notes the time of its making
)
def test_a_list_of_byte_pairs_that_cannot_be_read_is_refused(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "merges.txt.gz"
    path.write_bytes(content)
    with pytest.raises(ExportError, match="is not CLIP's list of byte pairs"):
        Tokenizer.from_clip_merges(path)


@pytest.mark.parametrize("origin", [None, "/nowhere/open_clip/__init__.py"])
def test_without_open_clip_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, origin: str | None
) -> None:
    spec = None if origin is None else SimpleNamespace(origin=origin)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    with pytest.raises(MissingExtraError, match=re.escape(install_command("torch"))):
        find_clip_merges()
