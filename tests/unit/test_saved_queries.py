"""Saved queries: label banks that say from where on a window shows what a search looked for."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeRuntime, write_fake_bundle
from typer.testing import CliRunner

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.calibration import SavedQuery, query_threshold
from actionclip_deploy.cli import app
from actionclip_deploy.errors import (
    ArgumentError,
    BundleError,
    LabelBankError,
    LabelError,
    ThresholdWarning,
)
from actionclip_deploy.evaluate.evaluate import evaluate
from actionclip_deploy.events import WatchedLabels
from actionclip_deploy.labels import LabelBank, list_label_banks
from actionclip_deploy.motions import Act, MotionLabel, render_acts, write_video
from actionclip_deploy.recognizer import Ranker, Recognizer
from actionclip_deploy.scoring import score_independent
from actionclip_deploy.search import Archive

LABELS = ("a person falls", "a person sits down")


def query_for(bundle: Bundle, **fields: Any) -> SavedQuery:
    values: dict[str, Any] = {
        "mean": 0.2,
        "std": 0.05,
        "threshold_z": 4.0,
        "num_accepted": 3,
        "num_rejected": 1,
        "num_windows": 1000,
        "window_seconds": 2.0,
        "stride_seconds": 0.5,
        "visual_sha256": bundle.visual_sha256,
    }
    return SavedQuery(**{**values, **fields})


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_fake_bundle(tmp_path / "bundle")


@pytest.fixture
def bank(bundle: Bundle) -> LabelBank:
    templates = ("{}", "a video of {}", "{}, seen from above")
    runtime = FakeRuntime(bundle.manifest)
    built = LabelBank.build(bundle, runtime, LABELS, name="falls", templates=templates)
    return dataclasses.replace(built, query=query_for(bundle))


# Scores and thresholds


def test_a_score_is_a_half_at_the_threshold_and_less_below_it(bundle: Bundle) -> None:
    query = query_for(bundle)
    cosines = np.array([[0.1], [0.2], [0.3], [0.2 + 4 * 0.05], [0.2 + 12 * 0.05], [np.nan]])
    expected = [0.0, 0.0, 2 / 6, 0.5, 12 / 16, np.nan]
    np.testing.assert_allclose(query.scores(cosines), expected, atol=1e-12)
    assert query.threshold_cosine == pytest.approx(0.4)


def test_a_window_that_is_nearer_to_what_is_not_meant_scores_nothing(bundle: Bundle) -> None:
    cosines = np.array([[0.5, 0.4, 0.1], [0.5, 0.1, 0.6], [0.5, 0.5, 0.1]])
    assert query_for(bundle).scores(cosines).tolist() == [pytest.approx(0.6), 0.0, 0.0]


@pytest.mark.parametrize(
    ("accepted", "rejected", "others", "expected"),
    [
        ([6.0, 8.0], [], np.linspace(0, 2, 101), 4.0 - 0.01),  # the 99th percentile is 1.98
        ([6.0, 8.0], [3.0, 7.0], np.zeros(100), 4.5),
        ([6.0], [6.5], np.zeros(100), 3.0),  # higher than what was accepted: nothing can help
        ([2.0], [], np.full(100, 5.0), 2.0),  # all that is as high is told of
        ([6.0], [], np.full(100, -1.0), 3.0),
        ([6.0], [], np.empty(0), 3.0),
    ],
)
def test_the_threshold_lies_between_what_was_accepted_and_the_rest(
    accepted: list[float], rejected: list[float], others: np.ndarray, expected: float
) -> None:
    found = query_threshold(np.array(accepted), np.array(rejected), others)
    assert found == pytest.approx(expected)


def test_an_accepted_moment_that_does_not_stand_out_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"accepted holds a moment whose z is -0\.5"):
        query_threshold(np.array([3.0, -0.5]), np.empty(0), np.zeros(10))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("std", 0.0, "deviation"),
        ("mean", 2.0, "mean"),
        ("threshold_z", 0.0, "threshold_z is 0"),
        ("threshold_z", float("nan"), "threshold_z is nan"),
        ("window_seconds", 0.0, "window_seconds is 0"),
        ("num_accepted", -1, "num_accepted is -1"),
    ],
)
def test_numbers_that_no_archive_has_are_refused(
    bundle: Bundle, field: str, value: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        query_for(bundle, **{field: value})


# Banks


def test_a_saved_query_is_read_back_as_it_was_saved(bundle: Bundle, bank: LabelBank) -> None:
    record = json.loads((bank.save(bundle) / "bank.json").read_text("utf-8"))
    assert record["schema_version"] == 3
    loaded = LabelBank.load(bundle, "falls")
    assert loaded.query == bank.query
    assert loaded.sha256 == bank.sha256
    assert loaded.sha256 != dataclasses.replace(bank, query=None).sha256
    (info,) = list_label_banks(bundle)
    assert info.is_saved_query
    assert info.problem is None
    assert LabelBank.load(bundle, "falls", calibrated=False).query is None
    plain = dataclasses.replace(bank, name="plain", query=None).save(bundle)
    record = json.loads((plain / "bank.json").read_text("utf-8"))
    assert record["schema_version"] == 1  # which older versions read
    assert "query" not in record


def test_a_saved_query_of_other_weights_is_refused(bundle: Bundle, bank: LabelBank) -> None:
    other = dataclasses.replace(bank, query=query_for(bundle, visual_sha256="0" * 64))
    with pytest.raises(LabelBankError, match="is of an archive of other weights"):
        other.save(bundle)
    folder = bank.save(bundle)
    record = json.loads((folder / "bank.json").read_text("utf-8"))
    record["query"]["visual_sha256"] = "0" * 64
    (folder / "bank.json").write_text(json.dumps(record), "utf-8")
    with pytest.raises(LabelBankError, match="index the videos anew"):
        LabelBank.load(bundle, "falls")
    record["textual_sha256"] = "0" * 64
    (folder / "bank.json").write_text(json.dumps(record), "utf-8")
    with pytest.raises(LabelBankError, match=r"saved query 'falls' .* --save falls --overwrite`"):
        LabelBank.load(bundle, "falls")


def test_it_is_scored_by_independent_scores_unless_others_are_asked_for(bank: LabelBank) -> None:
    assert bank.method_for(None, "template-softmax") == "independent"
    assert bank.method_for("mean-embedding", "template-softmax") == "mean-embedding"
    plain = dataclasses.replace(bank, query=None)
    assert plain.method_for(None, "template-softmax") == "template-softmax"
    assert bank.grid_for(None, None) == (2.0, 0.5)
    assert bank.grid_for(4.0, None) == (4.0, None)
    assert plain.grid_for(None, None) == (None, None)


def test_watching_scores_as_the_search_does(bank: LabelBank) -> None:
    """The cosine with the mean over templates, of unit norm, by a loop."""
    rows = np.random.default_rng(1).standard_normal((50, bank.embeddings.shape[-1]))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    query = dataclasses.replace(bank.query, mean=0.0, std=0.1)  # type: ignore[type-var]
    bank = dataclasses.replace(bank, query=query)
    watched = WatchedLabels.of(bank, "independent")
    assert watched.names == LABELS[:1]
    assert watched.thresholds.tolist() == [0.5]
    found = watched.scores(score_independent(rows, bank.embeddings))
    means = bank.embeddings.astype(np.float64).mean(axis=0)
    for row, score in zip(rows.astype(np.float64), found[:, 0], strict=True):
        cosine, other = (float(row @ mean / np.linalg.norm(mean)) for mean in means)
        z = max(0.0, cosine / 0.1) if cosine > other else 0.0
        assert score == pytest.approx(z / (z + 4), abs=1e-5)
    assert (found > 0).any()
    assert (found == 0).any()


def test_a_guessed_threshold_is_told_and_groups_are_refused(
    bundle: Bundle, bank: LabelBank
) -> None:
    guessed = dataclasses.replace(bank, query=query_for(bundle, num_accepted=0))
    with pytest.warns(ThresholdWarning, match="saved without accepted moments"):
        WatchedLabels.of(guessed, "independent")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert WatchedLabels.of(guessed, "independent", thresholds=0.7).thresholds == [0.7]
        WatchedLabels.of(bank, "independent")
    with pytest.raises(LabelError, match="leave the groups out"):
        WatchedLabels.of(bank, "independent", groups={"all": LABELS})
    with pytest.raises(LabelError, match="There is a threshold for 'a person sits down'"):
        WatchedLabels.of(bank, "independent", thresholds={LABELS[1]: 0.5})


def test_a_video_that_does_not_show_it_is_unknown(bank: LabelBank) -> None:
    norms = np.linalg.norm(bank.embeddings.mean(axis=0), axis=1)
    for cosine, label in ((0.45, LABELS[0]), (0.35, None)):
        scores = ((1 + np.array([cosine, 0.0]) * norms) / 2).astype(np.float32)
        answer = bank.answer(scores, method="independent")
        assert answer is not None
        assert (answer.label, answer.threshold) == (label, 0.5)
    assert bank.answer(np.array([0.5, 0.5], np.float32), method="template-softmax") is None


def expected_score(cosines: np.ndarray, query: SavedQuery) -> float:
    """z / (z + threshold) of the first label; nothing where another is nearer."""
    z = max(0.0, (cosines[0] - query.mean) / query.std)
    return 0.0 if cosines[1:].max(initial=-1) >= cosines[0] else z / (z + query.threshold_z)


def test_a_ranking_has_the_one_label_and_the_score_that_it_is_told_of_by(
    bundle: Bundle, bank: LabelBank
) -> None:
    query = query_for(bundle, mean=-0.5, std=0.1)
    bank = dataclasses.replace(bank, query=query)
    rows = np.random.default_rng(4).standard_normal((20, bank.embeddings.shape[-1]))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    means = bank.embeddings.astype(np.float64).mean(axis=0)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    ranker = Ranker(bank, "independent", 100.0, top_k=5, votes=True)
    found = []
    for row in rows:
        ranking = ranker.rank(row[np.newaxis])
        expected = expected_score(means @ row.astype(np.float64), query)
        ((label, score),) = [(each.label, each.score) for each in ranking.predictions]
        assert (label, score) == (LABELS[0], pytest.approx(expected, abs=1e-5))
        assert ranking.scores.shape == (1,)
        assert ranking.scores[0] == pytest.approx(expected, abs=1e-5)
        assert ranking.answer is not None
        assert ranking.answer.score == score
        assert ranking.answer.is_unknown == (score < 0.5)
        assert ranking.votes is not None
        for vote, of_template in zip(ranking.votes, bank.embeddings, strict=True):
            alone = expected_score(of_template.astype(np.float64) @ row, query)
            assert (vote.label, vote.score) == (LABELS[0], pytest.approx(alone, abs=1e-5))
            assert vote.agrees == ((alone >= 0.5) == (expected >= 0.5))
        found.append(score)
    assert min(found) < 0.5 <= max(found)
    other = Ranker(bank, "template-softmax", 100.0, top_k=5).rank(rows[:1])
    assert [each.label for each in other.predictions] != [LABELS[0]]
    assert other.answer is None


def test_a_saved_query_ranks_no_labels_to_be_evaluated(bundle: Bundle, bank: LabelBank) -> None:
    recognizer = Recognizer(FakeRuntime(bundle.manifest), bank)
    with pytest.raises(LabelBankError, match="saved query, which says whether a video shows one"):
        evaluate(recognizer, [])


# The whole way: from an archive to an alert

FPS = 12
STAR = MotionLabel("star", "red", "moving left")
OTHERS = (
    MotionLabel("circle", "blue", "growing"),
    MotionLabel("square", "green", "bouncing"),
    MotionLabel("moon", "white", "turning clockwise"),
    MotionLabel("cross", "purple", "moving up"),
)
ACT, GAP = 6 * FPS, 2 * FPS  # frames


def motions_video(path: Path, labels: list[MotionLabel], seed: int) -> Path:
    acts = [Act(label, GAP + n * (ACT + GAP), ACT, 2) for n, label in enumerate(labels)]
    frames = render_acts(acts, GAP + len(labels) * (ACT + GAP), fps=FPS, seed=seed)
    return write_video(path, frames, fps=FPS)


@pytest.fixture(scope="module")
def recorded(
    motions_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """A bundle, an archive of 3 minutes that shows the star twice, and the folder of both."""
    folder = tmp_path_factory.mktemp("recorded")
    bundle, archive, camera = (folder / name for name in ("bundle", "archive", "camera"))
    shutil.copytree(motions_bundle, bundle)
    camera.mkdir()
    for number in range(4):
        shown = [*OTHERS[number:], *OTHERS[:number]]
        if number < 2:
            shown[1] = STAR
        motions_video(camera / f"{number}.mp4", shown, seed=number)
    done = invoke("index", bundle, camera, "-o", archive, "--runtime", "onnxruntime")
    assert "4 videos added" in done
    return bundle, archive, folder


def invoke(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return " ".join(result.output.replace("│", " ").split())


def watched(bundle: Path, *words: object) -> list[dict[str, Any]]:
    command = ["watch", bundle, *words, "--runtime", "onnxruntime", "--json"]
    result = CliRunner().invoke(app, [str(word) for word in command])
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def test_a_query_tells_of_each_moment_that_was_accepted(recorded: tuple[Path, Path, Path]) -> None:
    """Also of one that lies beside a stronger one, which was not."""
    _, archive, _ = recorded
    with Archive.open(archive) as opened:
        for label in (STAR, *OTHERS):
            found = opened.search(str(label), top=6)
            for rank, moment in enumerate(found):
                saved = opened.save_query(
                    "tried",
                    str(label),
                    accepted=[moment],
                    rejected=found[:rank],
                    overwrite=True,
                )
                assert saved.threshold_z <= moment.z


def test_what_a_search_found_and_somebody_accepted_is_told_of_by_watch(
    recorded: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    bundle, archive, _ = recorded
    with Archive.open(archive) as opened:
        found = opened.search(str(STAR), top=4)
    # The star is in the second act of the first two videos.
    assert {(Path(each.video).name, each.start_seconds // 8) for each in found[:2]} == {
        ("0.mp4", 1.0),
        ("1.mp4", 1.0),
    }
    saved = invoke("search", archive, STAR, "--save", "star", "--accept", 1, "--accept", 2)
    assert "2 of them reach the threshold of star" in saved
    assert "chosen by 2 accepted moments" in saved
    assert f"watch {bundle} SOURCE --labels star" in saved

    new = motions_video(tmp_path / "new.mp4", [OTHERS[2], STAR, OTHERS[0]], seed=77)
    events = [each for each in watched(bundle, new, "--labels", "star") if each["kind"] == "end"]
    assert [each["label"] for each in events] == [str(STAR)]
    assert events[0]["start_seconds"] + 2 >= 8
    assert events[0]["end_seconds"] <= 16 + 2  # a window of 2 s may begin or end in the gap
    assert events[0]["method"] == "independent"
    others = motions_video(tmp_path / "others.mp4", [OTHERS[3], OTHERS[1], OTHERS[2]], seed=78)
    assert watched(bundle, others, "--labels", "star") == []

    words = ("predict", bundle, others, "--labels", "star", "--runtime", "onnxruntime")
    record = json.loads(CliRunner().invoke(app, [*map(str, words), "--json"]).stdout)
    (only,) = record["predictions"]
    assert only == {"label": str(STAR), "score": record["answer"]["score"]}
    assert record["answer"]["is_unknown"]
    assert only["score"] < 0.5
    assert f"{only['score']:.4f}" in invoke(*words)
    rows = invoke(*words, "--output", tmp_path / "found.csv")
    assert "1 of 1 videos scored" in rows
    assert f",1,{STAR},{only['score']}" in (tmp_path / "found.csv").read_text("utf-8")


def test_a_saved_query_is_searched_listed_and_shown(recorded: tuple[Path, Path, Path]) -> None:
    bundle, archive, _ = recorded
    text, without = str(OTHERS[0]), str(OTHERS[1])
    video = "2.mp4"
    words = ("search", archive, text, "--not", without, "--save", "circle", "--json")
    record = json.loads(
        CliRunner().invoke(app, [*map(str, words), "--accept", f"{video}@21"]).stdout
    )
    assert record["saved"]["num_accepted"] == 1
    assert record["query"] == f"{text}, not {without}"
    again = json.loads(
        CliRunner().invoke(app, ["search", str(archive), "--saved", "circle", "--json"]).stdout
    )
    assert again == record
    with Archive.open(archive) as opened:
        (found,) = [each for each in opened.saved_queries() if each.name == "circle"]
        assert (found.text, found.without) == (text, (without,))
        moments = opened.search(saved="circle")
        threshold_z = (found.threshold_cosine - moments.mean) / moments.std
        shown = [each for each in moments if each.z >= threshold_z]
        assert moments.num_shown == len(shown) >= 1
        assert shown == list(moments[: len(shown)])  # those above the line of the table
        assert any(Path(each.video).name == video for each in shown)
    assert "circle" in invoke("search", archive, "--list-saved")
    page = bundle.parent / "found.html"
    invoke("search", archive, "--saved", "circle", "--html", page)
    assert f"{len(shown)} of them reach" in page.read_text("utf-8")
    listed = invoke("labels", "list", bundle)
    assert "saved query" in listed
    assert "unknown" not in listed
    shown_bank = invoke("labels", "show", bundle, "circle")
    assert "is told of from z" in shown_bank
    assert "1 moment was accepted" in shown_bank
    assert "never unknown" not in shown_bank
    assert "unknown below the query's threshold" in shown_bank
    assert "--overwrite" in invoke("search", archive, text, "--save", "circle", code=1)
    saved = invoke("search", archive, text, "--save", "circle", "--overwrite", "--threshold", 2.5)
    assert "threshold of circle, z 2.5" in saved


def test_a_query_without_accepted_moments_is_a_guess(recorded: tuple[Path, Path, Path]) -> None:
    bundle, archive, folder = recorded
    saved = invoke("search", archive, STAR, "--save", "guess")
    assert "z 4.0, a guess: --accept some moments" in saved
    told = invoke(
        *("watch", bundle, folder / "camera" / "3.mp4", "--labels", "guess"),
        *("--runtime", "onnxruntime", "--stop-after", 0.1),
    )
    assert "was saved without accepted moments" in told


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["a", "--saved", "b"], 2, "Give a TEXT to look for, or --like"),
        (["--saved", "b", "--save", "c"], 2, "--save is for a TEXT"),
        (["a red star growing", "--accept", "1"], 2, "--accept goes with --save NAME"),
        (["a red star growing", "--threshold", "3"], 2, "--threshold goes with --save NAME"),
        (["a red star growing", "--overwrite"], 2, "--overwrite goes with --save NAME"),
        (["a red star growing", "--save", "c", "--accept", "99"], 2, "--accept is 99, and"),
        (["a red star growing", "--save", "c", "--accept", "0"], 2, "--accept is 0, and"),
        (["a red star growing", "--save", "c", "--accept", "x"], 2, "a rank such as 1, or VIDEO@"),
        (["a red star growing", "--save", "c", "--accept", "0.mp4@99"], 2, "no window at 99 s"),
        (["a red star growing", "--save", "c", "--threshold", "0"], 2, "--threshold is 0"),
        (["a red star growing", "--save", "c/d"], 2, "c/d"),
        (["--saved", "none"], 1, "has no saved query 'none' (there is:"),
        (["--saved", "none"], 1, "save one with `actionclip search ARCHIVE TEXT --save NAME`"),
        (["", "--save", "c"], 2, "text is ''; give what can be seen in words"),
        (["a red star growing", "--not", ""], 2, "--not is ''; give what can be seen in words"),
        (["a red star", "--not", "A red star"], 2, "--not is 'A red star', which is what is"),
        (["opening a door"], 1, "The model knows no word of the text 'opening a door'"),
        (["--saved", "c", "--list-saved"], 2, "--list-saved stands alone"),
    ],
)
def test_wrong_usage_of_saved_queries_is_told(
    recorded: tuple[Path, Path, Path], words: list[str], code: int, message: str
) -> None:
    _, archive, _ = recorded
    assert message in invoke("search", archive, *words, code=code)


def test_a_label_bank_that_is_no_saved_query_is_told(recorded: tuple[Path, Path, Path]) -> None:
    bundle, archive, _ = recorded
    invoke("labels", "build", bundle, "--label", "a red star growing", "--name", "plain")
    assert "is no saved query (there is:" in invoke("search", archive, "--saved", "plain", code=1)


def test_the_threshold_of_a_saved_query_is_not_calibrated_away(
    recorded: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    bundle, archive, _ = recorded
    invoke("search", archive, STAR, "--save", "kept")
    (tmp_path / "list.txt").write_text("a.mp4 0\n")
    words = ("labels", "calibrate", bundle, "--name", "kept")
    told = invoke(*words, "--annotations", tmp_path / "list.txt", code=2)
    assert "is a saved query, whose threshold" in told
    assert LabelBank.load(Bundle.open(bundle), "kept").query is not None


def test_moments_that_were_passed_over_and_are_told_of_are_named(
    recorded: tuple[Path, Path, Path],
) -> None:
    _, archive, _ = recorded
    told = invoke("search", archive, OTHERS[0], "--save", "third", "--accept", 3)
    with Archive.open(archive) as opened:
        (query,) = [each for each in opened.saved_queries() if each.name == "third"]
        first, second = opened.search(str(OTHERS[0]), top=2)
    assert second.z >= query.threshold_z  # as both are higher than what was accepted
    assert "third also tells of 2 moments that ranked before an accepted one" in told
    assert "(ranks 1, 2)" in told
    assert first.z > second.z
    once = invoke("search", archive, OTHERS[0], "--save", "first", "--accept", 1)
    assert "also tells of" not in once


def test_a_taken_name_is_told_in_the_words_of_both_roads(
    recorded: tuple[Path, Path, Path],
) -> None:
    _, archive, _ = recorded
    with Archive.open(archive) as opened:
        opened.save_query("taken", str(STAR))
        with pytest.raises(BundleError, match=r"\(in Python, overwrite=True\)"):
            opened.save_query("taken", str(STAR))


def test_a_moment_of_what_must_not_be_shown_is_not_accepted(
    recorded: tuple[Path, Path, Path],
) -> None:
    _, archive, _ = recorded
    with Archive.open(archive) as opened, pytest.raises(ArgumentError, match="nearer to what must"):
        opened.save_query("none", str(OTHERS[0]), without=str(STAR), accepted=[("0.mp4", 13.0)])
