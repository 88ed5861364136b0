"""/v1 from outside: what is asked, what comes back, and what is refused."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import TEMPLATES, FakeRuntime, fake_manifest, write_fake_bundle
from serving import error_of, npy_bytes, running_app
from starlette.testclient import TestClient

from actionclip_deploy.calibration import SavedQuery
from actionclip_deploy.errors import InferenceError
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.scoring import score_clips, score_independent
from actionclip_deploy.serve import service as service_module

LABELS = ["run", "walk", "sit"]
VIDEO = b"the seed of some pixels"
DEADLINE_SECONDS = 60.0


def make_bank(folder: Path, name: str, labels: list[str]) -> LabelBank:
    bundle = write_fake_bundle(folder / "for_banks")
    return LabelBank.build(bundle, FakeRuntime(bundle.manifest), labels, name=name)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with running_app(tmp_path, banks=[make_bank(tmp_path, "mine", LABELS)]) as client:
        yield client


def classify(client: TestClient, *videos: bytes, **fields: Any) -> Any:
    files = [("video", (f"{n}.mp4", video)) for n, video in enumerate(videos)]
    return client.post("/v1/classify", files=files, data={"labels": "mine", **fields})


def expected_embedding(video: bytes) -> np.ndarray:
    """What the fake pool's pixels of these bytes give."""
    pixels = np.random.default_rng(list(video)).integers(0, 256, (4, 32, 32, 3), np.uint8)
    return FakeRuntime(fake_manifest()).encode_video(pixels[np.newaxis])


def wait_for_build(client: TestClient, name: str) -> dict[str, Any]:
    until = time.monotonic() + DEADLINE_SECONDS
    while True:
        answer = client.get(f"/v1/labels/{name}").json()
        if answer["build"]["state"] not in ("waiting", "building"):
            return answer
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_video_is_scored_against_a_bank(client: TestClient, tmp_path: Path) -> None:
    answer = classify(client, VIDEO, top_k="2").json()
    bank = make_bank(tmp_path, "mine", LABELS)
    scores = score_clips(expected_embedding(VIDEO), bank.embeddings)[0]
    order = np.argsort(-scores)[:2]

    (result,) = answer["results"]
    assert [each["label"] for each in result["predictions"]] == [LABELS[i] for i in order]
    np.testing.assert_allclose(
        [each["score"] for each in result["predictions"]], scores[order], atol=1e-5
    )
    assert result["name"] == "0.mp4"
    assert result["frames"]["indices"] == [[2, 7, 12, 17]]
    assert result["frames"]["pts_seconds"] == [[0.2, 0.7, 1.2, 1.7]]
    assert result["answer"] is None
    assert {"read", "decode", "queue", "visual", "temporal", "score"} <= set(result["timings_ms"])
    assert answer["runtime"]["name"] == "fake"
    assert answer["bank"]["name"] == "mine"
    assert answer["bank"]["version"] == 1
    assert answer["bank"]["num_labels"] == 3
    assert answer["method"] == "template-softmax"


def test_labels_of_the_request_give_what_a_bank_of_them_gives(client: TestClient) -> None:
    by_bank = classify(client, VIDEO).json()
    for form in ({"labels": LABELS}, {"labels": json.dumps(LABELS)}):
        adhoc = client.post("/v1/classify", files={"video": VIDEO}, data=form).json()
        assert adhoc["results"][0]["predictions"] == by_bank["results"][0]["predictions"]
        assert adhoc["bank"]["name"] is None
        assert adhoc["bank"]["version"] is None


def test_several_videos_are_answered_in_their_order(client: TestClient) -> None:
    videos = [b"a", b"b", b"c", b"d", b"e"]
    together = classify(client, *videos).json()["results"]
    alone = [classify(client, video).json()["results"][0] for video in videos]
    assert [r["predictions"] for r in together] == [r["predictions"] for r in alone]
    assert [r["name"] for r in together] == ["0.mp4", "1.mp4", "2.mp4", "3.mp4", "4.mp4"]


def test_labels_can_be_scored_by_themselves(client: TestClient, tmp_path: Path) -> None:
    answer = classify(client, VIDEO, multi_label="true", top_k="3").json()
    bank = make_bank(tmp_path, "mine", LABELS)
    scores = score_independent(expected_embedding(VIDEO), bank.embeddings)[0]
    given = {each["label"]: each["score"] for each in answer["results"][0]["predictions"]}
    np.testing.assert_allclose([given[label] for label in LABELS], scores, atol=1e-6)
    assert answer["method"] == "independent"


def test_a_saved_query_is_answered_with_its_own_score(tmp_path: Path) -> None:
    bank = make_bank(tmp_path, "falls", LABELS[:1])
    bundle = write_fake_bundle(tmp_path / "for_banks")
    query = SavedQuery(-0.5, 0.1, 4.0, 1, 0, 100, 2.0, 0.5, bundle.visual_sha256)
    with running_app(tmp_path, banks=[replace(bank, name="falls", query=query)]) as client:
        answer = classify(client, VIDEO, labels="falls", per_template="true").json()
    (result,) = answer["results"]
    mean = bank.embeddings.astype(np.float64).mean(axis=0)[0]
    cosine = float(expected_embedding(VIDEO)[0].astype(np.float64) @ mean) / np.linalg.norm(mean)
    z = max(0.0, (cosine + 0.5) / 0.1)
    (only,) = result["predictions"]
    assert only["score"] == pytest.approx(z / (z + 4), abs=1e-4)
    assert result["answer"]["score"] == only["score"]
    assert {vote["label"] for vote in result["templates"]} == {LABELS[0]}


def test_each_template_tells_what_it_would_have_chosen(client: TestClient, tmp_path: Path) -> None:
    result = classify(client, VIDEO, per_template="true").json()["results"][0]
    bank = make_bank(tmp_path, "mine", LABELS)
    embedding, best = expected_embedding(VIDEO), result["predictions"][0]["label"]
    for k, template in enumerate(result["templates"]):
        cosines = (embedding @ bank.embeddings[k].T)[0]
        assert template["template"] == TEMPLATES[k]
        assert template["label"] == LABELS[int(cosines.argmax())]
        assert template["agrees"] == (template["label"] == best)
    agreeing = [template["agrees"] for template in result["templates"]]
    assert result["template_agreement"] == sum(agreeing) / 2


def test_one_template_of_a_bank_can_be_chosen(client: TestClient) -> None:
    one = classify(client, VIDEO, templates=TEMPLATES[1]).json()
    adhoc = classify(client, VIDEO, labels=LABELS, templates=TEMPLATES[1]).json()
    assert one["bank"]["num_templates"] == 1
    assert one["results"][0]["predictions"] == adhoc["results"][0]["predictions"]


def test_the_frames_that_the_model_saw_come_along_on_request(client: TestClient) -> None:
    pixels = classify(client, VIDEO, return_frames="true").json()["results"][0]["pixels"]
    assert pixels["shape"] == [4, 32, 32, 3]
    expected = np.random.default_rng(list(VIDEO)).integers(0, 256, (4, 32, 32, 3), np.uint8)
    assert base64.b64decode(pixels["data"]) == expected.tobytes()
    assert "pixels" not in classify(client, VIDEO).json()["results"][0]


def test_embeddings_are_scored_as_their_video(client: TestClient) -> None:
    by_video = classify(client, VIDEO).json()["results"][0]["predictions"]
    embedded = client.post("/v1/embed", files={"video": VIDEO}).json()["results"][0]["embeddings"]
    np.testing.assert_allclose(embedded, expected_embedding(VIDEO), atol=1e-6)
    as_json = client.post("/v1/classify", json={"labels": "mine", "embeddings": [embedded]})
    file = npy_bytes(np.array(embedded, np.float32))
    as_file = client.post("/v1/classify", files={"embeddings": file}, data={"labels": "mine"})
    for answer in (as_json.json(), as_file.json()):
        (result,) = answer["results"]
        assert result["frames"] is None
        for mine, theirs in zip(result["predictions"], by_video, strict=True):
            assert mine["label"] == theirs["label"]
            assert mine["score"] == pytest.approx(theirs["score"], abs=1e-5)


def test_texts_are_embedded_as_the_runtime_does(client: TestClient, tmp_path: Path) -> None:
    texts = ["a photo of action run", "a photo of action walk", "a photo of action sit"]
    answer = client.post("/v1/embed", json={"texts": texts}).json()
    bank = make_bank(tmp_path, "mine", LABELS)
    np.testing.assert_allclose(answer["embeddings"], bank.embeddings[0], atol=1e-6)
    assert answer["embedding_dim"] == 16


def test_a_bank_is_built_replaced_compared_and_removed(client: TestClient) -> None:
    put = client.put("/v1/labels/mine", json={"labels": ["walk", "run", "swim"]})
    assert put.status_code == 202
    assert put.headers["location"] == "/v1/labels/mine"
    answer = wait_for_build(client, "mine")
    assert answer["active"]["version"] == 2
    assert answer["labels"] == ["walk", "run", "swim"]
    assert answer["templates"] == list(TEMPLATES)
    assert answer["build"] == {
        "state": "ready", "done": 6, "total": 6, "error": None, "version": 2,
    }  # fmt: skip
    assert [each["version"] for each in answer["versions"]] == [1, 2]
    assert classify(client, VIDEO).json()["bank"]["version"] == 2

    diff = client.get("/v1/labels/mine/diff", params={"old": 1}).json()
    assert (diff["added"], diff["removed"]) == (["swim"], ["sit"])
    assert diff["moved"] == [["walk", 1, 0], ["run", 0, 1]]

    assert client.delete("/v1/labels/mine").status_code == 204
    assert classify(client, VIDEO).status_code == 404
    client.put("/v1/labels/mine", json={"labels": LABELS})
    # A version names the same bank for ever.
    assert wait_for_build(client, "mine")["active"]["version"] == 3


def test_a_build_that_fails_says_why_and_leaves_the_active_bank(client: TestClient) -> None:
    client.put("/v1/labels/mine", json={"labels": ["a word " * 40]})
    answer = wait_for_build(client, "mine")
    assert answer["build"]["state"] == "failed"
    assert "the text encoder takes at most 77" in answer["build"]["error"]
    assert answer["active"]["version"] == 1


def test_all_banks_are_listed(client: TestClient) -> None:
    client.put("/v1/labels/other", json={"labels": ["x"], "templates": ["{}"]})
    wait_for_build(client, "other")
    banks = client.get("/v1/labels").json()["banks"]
    assert [(bank["name"], bank["active"]["num_labels"]) for bank in banks] == [
        ("mine", 3), ("other", 1),
    ]  # fmt: skip


def test_info_tells_what_runs(client: TestClient) -> None:
    info = client.get("/v1/info").json()
    assert info["state"] == "ready"
    assert info["runtime"]["execution_provider"] == "numpy"
    assert info["limits"]["body_bytes"] == 64 * 1024 * 1024
    assert info["banks"][0]["name"] == "mine"
    assert info["batching"]["max_batch"] == 4
    assert set(info["bundle"]["graphs"]) == {"visual", "temporal", "textual"}


BAD_EMBEDDINGS = {"labels": "mine", "embeddings": [[[1.0, 0.0]]]}
LONG_EMBEDDINGS = {"labels": "mine", "embeddings": [[[1.0] * 16]]}
UNEVEN_EMBEDDINGS = {"labels": "mine", "embeddings": [[[1.0], [1.0, 0.0]]]}


@pytest.mark.parametrize(
    ("fields", "status", "text"),
    [
        ({"labels": "yours"}, 404, "no label bank 'yours' .there are: mine."),
        ({"labels": ["a", "A"]}, 422, "label 2 .'A'. repeats label 1"),
        ({"labels": "[]"}, 422, "at least one label"),
        ({"labels": "[1]"}, 422, "labels"),
        ({"labels": "[1"}, 400, "begins like a JSON list but is not one"),
        ({"labels": ["x", "a\x00b"]}, 422, "control character U.0000"),
        ({"labels": [f"l{n}" for n in range(257)]}, 413, "has 257 labels and may have 256"),
        ({"labels": json.dumps([f"l{n}" for n in range(10_000)])}, 413, "has 10,000 labels"),
        ({"labels": ["x" * 1001, "y"]}, 413, "1,001 characters in one of its labels"),
        ({"labels": ["x", "y"], "templates": ["no place"]}, 422, "has {} 0 times"),
        ({"templates": "{} of another bank"}, 422, "has no template '{} of another bank'"),
        ({"top_k": "0"}, 422, "top_k is 0; give 1 or more"),
        ({"top_k": "many"}, 422, "top_k"),
        ({"top_k": ["1", "2"]}, 400, "field 'top_k' is there twice"),
        ({"views": "2x2"}, 422, "views"),
        ({"views": "0x1"}, 422, "num_clips is 0"),
        ({"views": "11x3"}, 413, "has 33 views of a video and may have 30"),
        ({"timeout_ms": "-1"}, 422, "timeout_ms"),
        ({"timeout_ms": "1e9"}, 422, "at most 60000"),
        ({"timeout_ms": "nan"}, 422, "timeout_ms"),
        ({"colour": "red"}, 422, "colour is no field of this request; its fields are labels"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_refused_in_a_sentence(
    client: TestClient, fields: dict[str, Any], status: int, text: str
) -> None:
    response = classify(client, VIDEO, **fields)
    assert response.status_code == status, response.text
    with pytest.raises(AssertionError, match=text):
        raise AssertionError(error_of(response)["message"])


@pytest.mark.parametrize(
    ("request_", "status", "text"),
    [
        ({"content": b"x"}, 415, "The body is of type 'none'"),
        ({"content": b"x", "headers": {"content-type": "video/mp4"}}, 415, "type 'video/mp4'"),
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "is not JSON"),
        ({"content": b"[" * 9999, "headers": {"content-type": "application/json"}}, 400, "JSON"),
        ({"json": [1]}, 422, "the body"),
        (
            {"json": BAD_EMBEDDINGS},
            400,
            "has shape .1, 2. and .*; expected shape .V, 16.",
        ),
        ({"json": LONG_EMBEDDINGS}, 422, "not of norm 1"),
        ({"json": UNEVEN_EMBEDDINGS}, 400, "views of several widths"),
        ({"data": {"labels": "mine"}, "files": {"other": b"x"}}, 422, "other"),
        ({"data": {"labels": "mine"}, "files": {"frames": b"x"}}, 400, "not a .npy file"),
        ({"data": {"labels": "mine"}, "files": {"embeddings": b"x"}}, 400, "not a .npy file"),
        (
            {"content": b"--a\r\n", "headers": {"content-type": "multipart/form-data"}},
            400,
            "it has no boundary",
        ),
        (
            {"content": b"--b", "headers": {"content-type": "multipart/form-data; boundary=a"}},
            400,
            "is not multipart/form-data",
        ),
        (
            {
                "content": b'--a\r\nContent-Disposition: form-data; name="video"\r\n\r\nabc',
                "headers": {"content-type": "multipart/form-data; boundary=a"},
            },
            400,
            "ends in the middle of a part",
        ),
    ],
)
def test_a_wrong_body_is_refused_in_a_sentence(
    tmp_path: Path, request_: dict[str, Any], status: int, text: str
) -> None:
    # Real processes, for what only they find out.
    bank = make_bank(tmp_path, "mine", LABELS)
    fake_pool = "frames" not in request_.get("files", {})
    with running_app(tmp_path, banks=[bank], fake_pool=fake_pool) as client:
        response = client.post("/v1/classify", **request_)
    assert response.status_code == status, response.text
    with pytest.raises(AssertionError, match=text):
        raise AssertionError(error_of(response)["message"])


def test_a_request_without_a_video_is_refused(client: TestClient) -> None:
    response = client.post("/v1/classify", files={"labels": (None, "mine")})
    assert response.status_code == 400
    assert "has no video" in error_of(response)["message"]


def test_more_videos_than_allowed_are_refused(client: TestClient) -> None:
    response = classify(client, *([b"x"] * 17))
    assert response.status_code == 413
    assert "17 files and may have 16" in error_of(response)["message"]


def test_of_several_videos_one_that_fails_is_told_in_its_place(
    tmp_path: Path, rendered_video: Path
) -> None:
    bank = make_bank(tmp_path, "mine", LABELS)
    with running_app(tmp_path, banks=[bank], fake_pool=False) as client:
        answer = classify(client, rendered_video.read_bytes(), b"no video").json()
        alone = classify(client, b"no video")
    good, bad = answer["results"]
    assert len(good["predictions"]) == 3
    assert bad["error"]["status"] == 422
    assert "1.mp4 is not a video" in bad["error"]["message"]
    assert alone.status_code == 422


@pytest.mark.parametrize(
    ("name", "body", "status", "text"),
    [
        ("a b", {"labels": ["x"]}, 422, "name 'a b' is not allowed"),
        ("x", {"labels": []}, 422, "labels"),
        ("x", {"labels": ["a", "a"]}, 422, "repeats"),
        ("x", {"labels": ["it's", "b", "It\u2019s"]}, 422, "repeats label 1"),
        ("x", {"labels": ["a"], "templates": ["{} {}"]}, 422, "has {} 2 times"),
        ("x", {"labels": [f"l{n}" for n in range(10_001)]}, 413, "10,001 labels"),
        ("x", {"labels": ["a"], "templates": ["{}"] * 65}, 413, "65 templates"),
        ("x", {"names": ["a"]}, 422, "labels: Field required"),
    ],
)
def test_a_wrong_bank_is_refused_before_it_is_built(
    client: TestClient, name: str, body: dict[str, Any], status: int, text: str
) -> None:
    response = client.put(f"/v1/labels/{name}", json=body)
    assert response.status_code == status
    assert text in error_of(response)["message"]


@pytest.mark.parametrize("path", ["/v1/labels/none", "/v1/labels/none/diff?old=1"])
def test_a_bank_that_is_not_there_is_not_found(client: TestClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 404
    assert error_of(response)["code"] == "unknown_bank"


def test_a_version_that_is_not_known_is_not_found(client: TestClient) -> None:
    response = client.get("/v1/labels/mine/diff?old=7")
    assert response.status_code == 404
    assert "'mine version 7' (there are: mine version 1)" in error_of(response)["message"]


def test_a_failure_of_the_runtime_is_the_servers_and_names_no_details(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_app(tmp_path, banks=[make_bank(tmp_path, "mine", LABELS)]) as client:

        def fail(*arguments: object) -> np.ndarray:
            raise InferenceError("secret details")

        monkeypatch.setattr(FakeRuntime, "_run", fail)
        response = classify(client, VIDEO)
        assert response.status_code == 500
        assert error_of(response)["code"] == "failed"
        assert "secret" not in response.text
        monkeypatch.undo()
        assert classify(client, VIDEO).status_code == 200


@pytest.mark.parametrize(("path", "status"), [("/nope", 404), ("/v1/nope", 404)])
def test_a_path_that_is_not_there_is_told_as_any_error(
    client: TestClient, path: str, status: int
) -> None:
    response = client.get(path)
    assert response.status_code == status
    assert error_of(response)["code"] == "not_found"


def test_a_method_that_a_path_lacks_is_told_with_those_it_has(client: TestClient) -> None:
    response = client.get("/v1/classify")
    assert response.status_code == 405
    assert error_of(response)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"
    for path in ("/healthz", "/v1/info", "/v2/models/clip"):
        assert client.head(path).status_code != 405
        assert client.patch(path).headers["allow"] == "GET, HEAD"


def wait_for_bank(client: Any, name: str) -> None:
    while client.get(f"/v1/labels/{name}").json()["active"] is None:
        time.sleep(0.01)


@pytest.mark.parametrize("saves", [True, False])
def test_a_bank_that_is_deleted_is_not_back_after_a_restart(saves: bool, tmp_path: Path) -> None:
    bundle = write_fake_bundle(tmp_path / "for_banks")
    own = LabelBank.build(bundle, FakeRuntime(bundle.manifest), ["a", "b"], name="own")
    with running_app(tmp_path, banks=[own], save_labels=saves) as client:
        assert client.put("/v1/labels/new", json={"labels": ["c", "d"]}).status_code == 202
        wait_for_bank(client, "new")
        served = client.service.bundle  # type: ignore[attr-defined]
        assert served.label_bank_names() == (("new", "own") if saves else ("own",))
        for name in ("new", "own"):
            assert client.delete(f"/v1/labels/{name}").status_code == 204
            assert client.get(f"/v1/labels/{name}").status_code == 404
            assert client.delete(f"/v1/labels/{name}").status_code == 404
        # Without --save-labels the server never writes to its bundle.
        assert served.label_bank_names() == (() if saves else ("own",))
        assert [p.name for p in (served.path / "labels").iterdir()] == ([] if saves else ["own"])


def test_a_bank_that_cannot_be_removed_from_its_folder_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    with running_app(tmp_path, save_labels=True) as client:
        client.put("/v1/labels/new", json={"labels": ["c", "d"]})
        wait_for_bank(client, "new")
        monkeypatch.setattr(
            service_module, "remove_label_bank", fail
        )  # no test may need a full disk
        refused = client.delete("/v1/labels/new")
        assert refused.status_code == 500
        assert "Read-only file system), so it stays" in error_of(refused)["message"]
        assert client.get("/v1/labels/new").json()["active"]["version"] == 1
        monkeypatch.undo()
        assert client.delete("/v1/labels/new").status_code == 204
