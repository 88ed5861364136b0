"""Words that a model of a small vocabulary does not know are named, wherever labels are used."""

from __future__ import annotations

import asyncio
import json
import shutil
import string
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fakes import FakeRuntime, know_only, write_fake_bundle
from serving import error_of, make_service, running_app
from starlette.testclient import TestClient
from threaded_server import ThreadedServer
from typer.testing import CliRunner

from actionclip_deploy import AsyncClient, Bundle, Client, LabelBank, LabelWarning, Recognizer
from actionclip_deploy.cli import app
from actionclip_deploy.errors import (
    BundleError,
    IntegrityError,
    LabelBankError,
    LabelError,
    RequestRefusedError,
    UnknownWordsError,
)
from actionclip_deploy.known_words import (
    MAX_WORDS_NAMED,
    check_words,
    describe_unknown_words,
    unknown_words,
)
from actionclip_deploy.labels import embed_texts
from actionclip_deploy.prompts import read_labels
from actionclip_deploy.serve.app import create_app
from actionclip_deploy.tokenizer import NUM_TOKENS, Tokenizer, Vocabulary

pytestmark = pytest.mark.usefixtures("cache_of_the_run")

KNOWN = "a red blue star moving left right counterclockwise the man is playing"
VIDEO = b"the seed of some pixels"
URL = "http://testserver"
DEADLINE_SECONDS = 60.0


@pytest.fixture(scope="module")
def vocabulary(clip_tokenizer: Tokenizer) -> Vocabulary:
    is_known = np.zeros(NUM_TOKENS, np.bool_)
    is_known[clip_tokenizer([KNOWN], context_length=77)[0]] = True
    return Vocabulary(is_known)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_fake_bundle(tmp_path / "small", known=KNOWN)


def build(bundle: Bundle, *labels: str, **options: Any) -> LabelBank:
    return LabelBank.build(bundle, FakeRuntime(bundle.manifest), labels, name="mine", **options)


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("a red star moving left", ()),
        ("A  Red STAR", ()),
        ("a red star juggling", ("juggling",)),
        ("opening a door, closing a door", ("opening", "door", "closing")),
        ("star-shaped", ("shaped",)),  # signs are no words where there are others
        ("red & blue!", ()),
        ("counterclockwise", ()),  # two tokens, both known
        ("clockwise", ()),  # the second of them
        ("counter", ("counter",)),  # another token than the first of them
        ("counterstar", ()),  # read in pieces that are known, which is all that is looked at
        ("counterdance", ("counterdance",)),  # a word that is known in parts is not known
        ("ApplyEyeMakeup", ("applyeyemakeup",)),
        ("🙂", ("🙂",)),
        ("走る", ("走る",)),
        ("route 66", ("route", "6")),
    ],
)
def test_a_word_is_known_if_all_of_its_tokens_are(
    clip_tokenizer: Tokenizer, vocabulary: Vocabulary, label: str, expected: tuple[str, ...]
) -> None:
    assert unknown_words([label], clip_tokenizer, vocabulary) == expected


def test_words_are_those_that_the_tokenizer_sees(clip_tokenizer: Tokenizer) -> None:
    (words,) = clip_tokenizer.words(["Caf\u00e9 &amp; don't 走る 12"])
    assert [word.text for word in words] == ["café", "&", "don", "'t", "走る", "1", "2"]
    tokens = [token for word in words for token in word.tokens]
    row = clip_tokenizer(["Caf\u00e9 &amp; don't 走る 12"], context_length=77)[0]
    assert tokens == row[1:-1].tolist()


def test_a_model_that_knows_every_token_says_nothing_and_refuses_nothing(
    clip_tokenizer: Tokenizer,
) -> None:
    assert unknown_words(["zyzzyva 🙂"], clip_tokenizer, None) is None
    check_words(["zyzzyva", "xylophone"], clip_tokenizer, None)


@pytest.mark.parametrize(
    "label",
    [
        "opening a door",
        "the man is playing the violin",  # those that are known are words of every template
        "playing",
        "🙂",
    ],
)
def test_a_label_of_which_no_word_is_known_is_refused(
    clip_tokenizer: Tokenizer, vocabulary: Vocabulary, label: str
) -> None:
    with pytest.raises(UnknownWordsError, match=r"no word of label 2 .* besides .* templates"):
        check_words(["a red star", label], clip_tokenizer, vocabulary)


def test_words_of_the_templates_of_the_bundle_say_nothing_either(
    clip_tokenizer: Tokenizer, vocabulary: Vocabulary
) -> None:
    check_words(["moving a piano"], clip_tokenizer, vocabulary)
    with pytest.raises(UnknownWordsError):
        check_words(["moving a piano"], clip_tokenizer, vocabulary, templates=["moving: {}"])


def test_labels_that_only_unknown_words_tell_apart_are_refused(
    clip_tokenizer: Tokenizer, vocabulary: Vocabulary
) -> None:
    check_words(["red star dancing", "red dancing star"], clip_tokenizer, vocabulary)
    with pytest.raises(UnknownWordsError, match=r"label 2 .* is to the model the same as label 1"):
        check_words(["red star dancing", "red star juggling"], clip_tokenizer, vocabulary)


def test_the_refusal_names_the_line_how_many_there_are_and_what_to_do(
    bundle: Bundle, tmp_path: Path
) -> None:
    path = tmp_path / "labels.txt"
    path.write_text("a red star\njazz\nhockey\nzumba\n")
    with pytest.raises(LabelError) as caught:
        LabelBank.build(bundle, FakeRuntime(bundle.manifest), read_labels(path), name="mine")
    assert "labels.txt line 2 (label 'jazz') and 2 others" in str(caught.value)
    for part in ("trained on", "allow_unknown_words", "actionclip models"):
        assert part in str(caught.value)


def test_a_bank_knows_the_words_when_it_is_built_and_when_it_is_read(bundle: Bundle) -> None:
    bank = build(bundle, "a red star", "a blue star dancing")
    assert bank.unknown_words == ("dancing",)
    bank.save(bundle)
    assert LabelBank.load(bundle, "mine").unknown_words == ("dancing",)
    assert bank.with_templates(bank.templates[:1]).unknown_words == ("dancing",)
    assert "unknown_words" not in json.loads((bundle.path / "labels/mine/bank.json").read_text())
    forced = build(bundle, "zumba", allow_unknown_words=True)
    assert forced.unknown_words == ("zumba",)


def test_what_a_bank_is_and_its_hash_do_not_depend_on_what_is_known(
    bundle: Bundle, tmp_path: Path
) -> None:
    whole = write_fake_bundle(tmp_path / "whole")
    mine, theirs = (build(each, "a red star", "a blue star dancing") for each in (bundle, whole))
    assert theirs.unknown_words is None
    assert mine.sha256 == theirs.sha256
    mine.save(bundle)
    shutil.copytree(bundle.path / "labels", whole.path / "labels")
    assert LabelBank.load(whole, "mine").unknown_words is None


def test_a_recognizer_warns_of_them_once_it_is_made(bundle: Bundle) -> None:
    bank = build(bundle, "a red star", "a blue star dancing")
    with pytest.warns(LabelWarning, match="does not know 'dancing' of the labels"):
        Recognizer(FakeRuntime(bundle.manifest), bank)
    Recognizer(FakeRuntime(bundle.manifest), build(bundle, "a red star"))  # without a word


def test_a_sentence_names_the_first_words_and_counts_the_others() -> None:
    words = [f"w{number}" for number in range(10)]
    assert "'w0', 'w1'" in describe_unknown_words(words)
    assert "'w7' and 2 more words" in describe_unknown_words(words)


def test_a_record_names_no_more_than_a_hundred(bundle: Bundle) -> None:
    labels = [f"star {first}{last}z" for first in "qwfjkz" for last in string.ascii_lowercase]
    used = build(bundle, *labels, allow_unknown_words=True).used("mine")
    assert used.unknown_words is not None
    assert len(used.unknown_words) == MAX_WORDS_NAMED
    full = build(bundle, "a red star").used("mine")
    assert full.to_dict()["unknown_words"] == []


# The file of the bundle.


@pytest.mark.parametrize("known", [[0], [0, 1, 2, 7], [9], list(range(10)), []])
def test_a_vocabulary_is_read_as_it_was_written(tmp_path: Path, known: list[int]) -> None:
    is_known = np.isin(np.arange(10), known)
    Vocabulary(is_known).save(tmp_path / "vocabulary.json")
    read = Vocabulary.from_file(tmp_path / "vocabulary.json")
    np.testing.assert_array_equal(read.is_known, is_known)
    assert read.num_known == len(known)
    assert not read.knows([10])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"schema_version": 2, "num_tokens": 10, "known_tokens": []}',
        '{"schema_version": 1, "num_tokens": 0, "known_tokens": []}',
        '{"schema_version": 1, "num_tokens": 10, "known_tokens": [[3, 10]]}',
        '{"schema_version": 1, "num_tokens": 10, "known_tokens": [[4, 3]]}',
        '{"schema_version": 1, "num_tokens": 10, "known_tokens": [[-1, 3]]}',
    ],
)
def test_a_file_that_is_no_vocabulary_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "vocabulary.json"
    path.write_text(text)
    with pytest.raises(BundleError, match=r"cannot be read .*; export the bundle again"):
        Vocabulary.from_file(path)


def test_an_altered_vocabulary_is_refused(bundle: Bundle) -> None:
    build(bundle, "a red star").save(bundle)
    path = bundle.path / "vocabulary.json"
    path.write_bytes(path.read_bytes().replace(b"[", b"{"))
    with pytest.raises(IntegrityError, match=r"vocabulary\.json"):
        build(bundle, "zumba")
    with pytest.raises(IntegrityError, match=r"vocabulary\.json"):
        LabelBank.load(bundle, "mine")


# On the command line.


@pytest.fixture(scope="module")
def tiny(
    tiny_bundle: Path, clip_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny bundle, as if its text encoder had been trained on a few words."""
    folder = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("small") / "tiny")
    know_only(folder, clip_tokenizer, KNOWN)
    return folder


def run(*words: object, exit_code: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == exit_code, result.output
    return result.stdout, " ".join(result.stderr.split())


def label_file(folder: Path, *labels: str) -> Path:
    path = folder / "labels.txt"
    path.write_text("\n".join(labels))
    return path


def test_labels_build_refuses_warns_and_can_be_forced(tiny: Path, tmp_path: Path) -> None:
    command = ("labels", "build", tiny, "--name", "built", "--overwrite", "--labels")
    _, told = run(*command, label_file(tmp_path, "red star", "zumba"), exit_code=1)
    assert "line 2 (label 'zumba')" in told
    assert "--allow-unknown-words" in told
    assert not (tiny / "labels" / "built").exists()

    said, told = run(*command, tmp_path / "labels.txt", "--allow-unknown-words", "--json")
    assert json.loads(said)["unknown_words"] == ["zumba"]
    assert told == f"warning: {describe_unknown_words(['zumba'])}"

    said, told = run(*command, label_file(tmp_path, "red star", "blue star"), "--json")
    assert json.loads(said)["unknown_words"] == []
    assert told == ""


def test_inspect_says_how_much_a_model_knows(tiny: Path, tiny_bundle: Path) -> None:
    labels = json.loads(run("inspect", tiny, "--json")[0])["labels"]
    assert (labels["known_tokens"], labels["tokens"]) == (15, NUM_TOKENS)
    assert "known_tokens" not in json.loads(run("inspect", tiny_bundle, "--json")[0])["labels"]


def test_predict_says_it_once_and_in_each_record(
    tiny: Path, rendered_video: Path, tmp_path: Path
) -> None:
    labels = label_file(tmp_path, "red star dancing", "blue star")
    run("labels", "build", tiny, "--name", "some", "--overwrite", "--labels", labels)
    other = shutil.copy(rendered_video, tmp_path / "other.mp4")
    said, told = run("predict", tiny, rendered_video, other, "--labels", "some", "--json")
    records = [json.loads(line) for line in said.splitlines()]
    assert [each["bank"]["unknown_words"] for each in records] == [["dancing"]] * 2
    assert told.count("does not know 'dancing'") == 1
    assert told.startswith("warning: ")


def test_evaluate_refuses_labels_of_a_file_as_build_does(
    tiny: Path, rendered_video: Path, tmp_path: Path
) -> None:
    annotations = tmp_path / "list.txt"
    annotations.write_text(f"{rendered_video} 0\n")
    command = ("evaluate", tiny, annotations, "--labels", label_file(tmp_path, "zumba", "red star"))
    _, told = run(*command, exit_code=1)
    assert "no word of" in told
    _, told = run(*command, "--allow-unknown-words", "--json")
    assert "does not know 'zumba'" in told


def test_classify_says_what_the_server_says(rendered_video: Path, tmp_path: Path) -> None:
    with ThreadedServer(tmp_path, known=KNOWN) as server:
        command = ("classify", rendered_video, rendered_video, "--url", server.url)
        own = ("--label", "red star", "--label", "zumba")
        _, told = run(*command, *own, exit_code=1)
        assert "no word of label 2 ('zumba')" in told
        said, told = run(*command, *own, "--allow-unknown-words", "--json")
        assert json.loads(said.splitlines()[0])["bank"]["unknown_words"] == ["zumba"]
        assert told.count("does not know 'zumba'") == 1


# Over HTTP.


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with running_app(tmp_path, known=KNOWN) as client:
        yield client


def ask(client: TestClient, *labels: str, **fields: str) -> Any:
    data = {"labels": json.dumps(labels), **fields}
    return client.post("/v1/classify", files={"video": ("a.mp4", VIDEO)}, data=data)


def finished(client: TestClient, name: str) -> dict[str, Any]:
    until = time.monotonic() + DEADLINE_SECONDS
    while True:
        state: dict[str, Any] = client.get(f"/v1/labels/{name}").json()
        if state["build"]["state"] == "ready":
            return state
        assert time.monotonic() < until, state
        time.sleep(0.01)


def test_texts_that_are_embedded_are_answered_with_their_unknown_words(client: TestClient) -> None:
    asked = client.post("/v1/embed", json={"texts": ["a red star dancing", "blue star"]})
    assert asked.status_code == 200, asked.text
    assert asked.json()["unknown_words"] == ["dancing"]
    known = client.post("/v1/embed", json={"texts": ["a red star"]}).json()
    assert known["unknown_words"] == []
    videos = client.post("/v1/embed", files={"video": ("a.mp4", VIDEO)}).json()
    assert "unknown_words" not in videos


def test_a_model_that_knows_all_words_says_nothing_of_texts(tmp_path: Path) -> None:
    with running_app(tmp_path) as client:
        assert "unknown_words" not in client.post("/v1/embed", json={"texts": ["zumba"]}).json()


def test_who_embeds_texts_is_warned(bundle: Bundle, tmp_path: Path) -> None:
    match = "does not know 'zumba' of the texts; embeddings rest on"
    with pytest.warns(LabelWarning, match=match):
        embed_texts(bundle, FakeRuntime(bundle.manifest), ["a red star", "zumba"])
    embed_texts(bundle, FakeRuntime(bundle.manifest), ["a red star"])  # says nothing
    with ThreadedServer(tmp_path, known=KNOWN) as server, Client(server.url) as asking:
        with pytest.warns(LabelWarning, match=match):
            asking.embed_texts(["zumba"])
        asking.embed_texts(["a red star"])


def test_labels_of_a_request_are_refused_named_and_can_be_forced(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    assert error_of(ask(client, "red star", "zumba"))["code"] == "unknown_words"
    answer = ask(client, "red star", "zumba", allow_unknown_words="true").json()
    for used in (answer["bank"], answer["results"][0]["bank"]):
        assert used["unknown_words"] == ["zumba"]
    assert "does not know 'zumba'" in caplog.text
    # What was forced once is not allowed to the next who asks.
    assert error_of(ask(client, "red star", "zumba"))["code"] == "unknown_words"
    assert ask(client, "red star", "blue star").json()["bank"]["unknown_words"] == []


def test_a_bank_that_is_put_is_refused_named_and_can_be_forced(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    body: dict[str, Any] = {"labels": ["red star", "zumba"]}
    refused = client.put("/v1/labels/mine", json=body)
    assert refused.status_code == 422
    assert error_of(refused)["code"] == "unknown_words"
    assert client.get("/v1/labels/mine").status_code == 404
    begun = client.put("/v1/labels/mine", json={**body, "allow_unknown_words": True}).json()
    assert begun["build"]["unknown_words"] == ["zumba"]
    assert finished(client, "mine")["unknown_words"] == ["zumba"]
    assert "The label bank 'mine', version 1: The model does not know 'zumba'" in caplog.text
    video = {"video": ("a.mp4", VIDEO)}
    answer = client.post("/v1/classify", files=video, data={"labels": "mine"}).json()
    assert answer["bank"]["unknown_words"] == ["zumba"]


def test_info_says_how_much_the_model_knows(client: TestClient, tmp_path: Path) -> None:
    known = client.get("/v1/info").json()["vocabulary"]
    assert 0 < known["num_known_tokens"] < known["num_tokens"]
    with running_app(tmp_path / "whole") as other:
        assert other.get("/v1/info").json()["vocabulary"] is None


def test_nothing_is_said_by_a_model_that_knows_every_token(tmp_path: Path) -> None:
    with running_app(tmp_path) as client:
        answer = ask(client, "red star", "zumba").json()
        assert "unknown_words" not in answer["bank"]
        begun = client.put("/v1/labels/mine", json={"labels": ["zumba"]}).json()
        assert "unknown_words" not in begun["build"]
        assert "unknown_words" not in finished(client, "mine")


def test_a_client_warns_and_can_allow(tmp_path: Path) -> None:
    async def use() -> None:
        service = make_service(tmp_path, known=KNOWN)
        application = create_app(service)
        transport = httpx.ASGITransport(application)
        async with (
            application.router.lifespan_context(application),
            AsyncClient(URL, max_retries=0, transport=transport) as client,
        ):
            with pytest.raises(RequestRefusedError, match="no word of label 2"):
                await client.classify(VIDEO, ["red star", "zumba"])
            with pytest.warns(LabelWarning, match="'zumba'"):
                (result,) = await client.classify(
                    VIDEO, ["red star", "zumba"], allow_unknown_words=True
                )
            assert result.bank.unknown_words == ("zumba",)  # type: ignore[union-attr]
            with pytest.raises((RequestRefusedError, LabelBankError), match="no word"):
                await client.put_bank("mine", ["zumba"])
            with pytest.warns(LabelWarning, match="'zumba'"):
                state = await client.put_bank("mine", ["zumba"], allow_unknown_words=True)
            assert state.unknown_words == ("zumba",)

    asyncio.run(use())
