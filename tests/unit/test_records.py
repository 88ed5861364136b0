"""One schema for what leaves as JSON, wherever it leaves."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest
from fakes import fake_event, know_only
from http_receiver import receiving
from schemas import strict_schema
from threaded_server import ThreadedServer
from typer.testing import CliRunner

from actionclip_deploy import Bundle, Client, LabelBank, LabelWarning, open_runtime
from actionclip_deploy.cli import app
from actionclip_deploy.records import (
    RECORD_SCHEMA_VERSION,
    EventRecord,
    LabelScore,
    RefusedVideo,
    UsedBank,
    VideoRecord,
    printable,
)
from actionclip_deploy.serve.service import Service
from actionclip_deploy.serve.settings import ServerSettings
from actionclip_deploy.sinks import parse_sink
from actionclip_deploy.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("cache_of_the_run")

LABELS = ("abseiling", "arm wrestling", "yoga")
WAYS = ("predict --json", "predict --output", "classify --json", "/v1/classify", "the client")
# The server fuses clips of several requests in one call; on one, nothing but rounding differs.
ATOL = 1e-5
# What only some of them can know.
OF_A_SERVER = {"batch_size", "request_id"}
OF_A_FILE = {"run"}


@pytest.fixture(scope="module", params=["whole", "small"])
def bundle(
    request: pytest.FixtureRequest,
    tiny_bundle: Path,
    clip_tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    """With a text encoder that knows every word, and with one that knows two labels of three."""
    folder = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("records") / "tiny")
    if request.param == "small":
        know_only(folder, clip_tokenizer, " ".join(LABELS[:2]))
    opened = Bundle.open(folder)
    with open_runtime(opened) as runtime:
        bank = LabelBank.build(opened, runtime, LABELS, name="mine", allow_unknown_words=True)
    bank.save(opened)
    return opened


@pytest.fixture(scope="module")
def url(bundle: Bundle) -> Iterator[str]:
    settings = ServerSettings(verify=False, workers=1)
    with ThreadedServer(Service(bundle, open_runtime(bundle), settings)) as server:
        yield server.url


def lines(*words: object, exit_code: int) -> list[dict[str, Any]]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == exit_code, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def all_ways(
    bundle: Bundle, url: str, videos: list[Path], folder: Path, exit_code: int
) -> list[list[dict[str, Any]]]:
    """The records of videos, in the order of WAYS."""
    output = folder / "results.jsonl"
    predict = ("predict", bundle.path, *videos, "--output", output, "--json")
    printed = lines(*predict, exit_code=exit_code)
    written = [json.loads(line) for line in output.read_text().splitlines()]
    asked = lines("classify", *videos, "--url", url, "--json", exit_code=exit_code)
    files = [("video", (video.name, video.read_bytes())) for video in videos]
    answer = httpx.post(
        f"{url}/v1/classify", files=files, data={"labels": "mine"}, trust_env=False, timeout=60
    )
    assert answer.status_code == 200, answer.text
    with Client(url) as client, warnings.catch_warnings():
        warnings.simplefilter("ignore", LabelWarning)
        told = client.classify(list(videos), "mine")
    given = [each.to_dict() for each in told if not isinstance(each, RefusedVideo)]
    return [printed, written, asked, answer.json()["results"], given]


def test_every_way_out_gives_the_same_record_of_a_video(
    bundle: Bundle, url: str, rendered_video: Path, tmp_path: Path
) -> None:
    video = tmp_path / "a video.mp4"
    shutil.copy(rendered_video, video)
    found = all_ways(bundle, url, [video], tmp_path, exit_code=0)
    records = dict(zip(WAYS, (record for (record,) in found), strict=True))
    validator = jsonschema_rs.validator_for(strict_schema(VideoRecord))
    first = records["predict --json"]
    for way, record in records.items():
        validator.validate(record)
        assert set(record) - OF_A_SERVER - OF_A_FILE == set(first), way
        assert record["schema_version"] == RECORD_SCHEMA_VERSION
        assert record["name"] == "a video.mp4"
        for same in ("answer", "frames", "method", "runtime", "warnings"):
            assert record[same] == first[same], (way, same)
        assert {**record["bank"], "version": None} == first["bank"], way
        for mine, theirs in zip(record["predictions"], first["predictions"], strict=True):
            assert mine["label"] == theirs["label"]
            assert mine["score"] == pytest.approx(theirs["score"], abs=ATOL)
    is_small = (bundle.path / "vocabulary.json").exists()
    assert first["bank"].get("unknown_words") == (["yoga"] if is_small else None)
    assert [way for way in WAYS if set(records[way]) >= OF_A_SERVER] == list(WAYS[2:])
    assert [way for way in WAYS if set(records[way]) >= OF_A_FILE] == ["predict --output"]
    by_path = {"predict --json", "predict --output", "classify --json"}
    assert all(
        record["video"] == (str(video) if way in by_path else video.name)
        for way, record in records.items()
    )


def test_every_way_out_gives_the_same_record_of_a_failure(
    bundle: Bundle, url: str, rendered_video: Path, tmp_path: Path
) -> None:
    video, broken = tmp_path / "good.mp4", tmp_path / "broken.mp4"
    shutil.copy(rendered_video, video)
    broken.write_bytes(b"no video")
    validator = jsonschema_rs.validator_for(strict_schema(VideoRecord))
    *found, of_the_client = all_ways(bundle, url, [video, broken], tmp_path, exit_code=3)
    assert len(of_the_client) == 1  # it gives a `RefusedVideo` in the place of the other
    for _, failed in found:
        validator.validate(failed)
        assert failed["name"] == "broken.mp4"
        assert failed["error"]["code"] == "video_unreadable"
        assert "broken.mp4 is not a video" in failed["error"]["message"]
        assert "predictions" not in failed


def test_what_a_reader_does_not_know_is_ignored_and_what_is_written_is_read_again() -> None:
    bank = UsedBank(name=None, version=None, sha256="ab", num_labels=1, num_templates=1)
    record = VideoRecord(
        video="a/b.mp4", name="b.mp4", predictions=(LabelScore("run", 0.5),), bank=bank
    )
    told = json.loads(record.to_json())
    newer = {**told, "of_the_future": 1, "bank": {**told["bank"], "colour": "red"}}
    read = VideoRecord.model_validate(newer)
    assert read == record
    assert read.to_json() == record.to_json()
    assert set(told) == {"video", "schema_version", "name", "predictions", "bank"}


def test_an_event_is_written_by_its_schema_and_read_again() -> None:
    record = fake_event()
    told = json.loads(record.to_json())
    jsonschema_rs.validator_for(strict_schema(EventRecord)).validate(told)
    assert told["schema_version"] == RECORD_SCHEMA_VERSION
    assert (told["end_seconds"], told["end_time"], told["end_reason"]) == (None, None, None)
    assert EventRecord.model_validate({**told, "of_the_future": 1}) == record


def test_every_sink_gives_the_same_record_of_an_event(tmp_path: Path) -> None:
    sent = [fake_event(), fake_event("update", 1), fake_event("end", 2)]
    lines = tmp_path / "events.jsonl"
    with receiving() as server:
        sinks = [
            parse_sink(str(lines)),
            parse_sink(server.url, environ={}, spool=tmp_path / "spool"),
        ]
        for event in sent:
            for sink in sinks:
                sink.send(event)
        server.wait_for(len(sent))
        for sink in sinks:
            sink.close()
    written = [json.loads(line) for line in lines.read_text().splitlines()]
    validator = jsonschema_rs.validator_for(strict_schema(EventRecord))
    for record in written:
        validator.validate(record)
    assert written == [json.loads(post.body) for post in server.posts]
    assert [EventRecord.model_validate(record) for record in written] == sent


def test_times_of_events_that_are_not_utc_are_refused() -> None:
    for wrong in ("2027-01-15 08:00:02.500Z", "2027-01-15T08:00:02.500+01:00", "now"):
        with pytest.raises(ValueError, match="start_time"):
            fake_event(start_time=wrong)


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_number_that_json_has_not_is_refused(score: float) -> None:
    with pytest.raises(ValueError, match="finite number"):
        VideoRecord(video="a", name="a", timings_ms={"total": score})


def test_what_moves_a_terminal_is_escaped_and_letters_stay() -> None:
    assert printable("a\x1b]0;x\x07\x9b31m\u202e.mp4") == r"a\x1b]0;x\x07\x9b31m\u202e.mp4"
    assert printable("caf\udce9.mp4") == r"caf\udce9.mp4"
    for kept in ("Füße 走る", "نمی\u200cخواهم", "a\nb\tc", "👩\u200d👩"):
        assert printable(kept) == kept
    assert printable("a\nb", kept="") == r"a\nb"


def test_tables_errors_and_json_of_the_command_line_hold_nothing_that_moves_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from actionclip_deploy.cli import output

    name = "\x1b[31ma\x9b2J\n.mp4"
    output.print_json({"name": name})
    output.print_sections({"a": {"b": name}})
    output.results.print(output._prediction_table([VideoRecord(video=name, name=name)]))
    output.print_error(name)
    told, errors = capsys.readouterr()
    for text in (told, errors):
        assert "x1b[31ma" in text or "u001b[31ma" in text
        assert text.replace("\n", "").isprintable()
