"""The programs that make the default model, in miniature: a few videos, a few steps."""

from __future__ import annotations

import io
import json
import re
import runpy
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from accelerate.state import AcceleratorState
from typer.testing import CliRunner

from actionclip_deploy import Archive, Bundle, LabelBank, Recognizer, open_runtime
from actionclip_deploy.cli import app
from actionclip_deploy.indexing import STATIC_COSINE
from actionclip_deploy.model.zoo import packaged_path, read_provenance
from actionclip_deploy.motions import ORDER_PAIRS, all_labels, labels
from actionclip_deploy.stream import WindowGrid
from actionclip_deploy.train.run_config import load_config, parse_config

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "motions.md").read_text(encoding="utf-8")
STAGES = ("motions-pictures", "motions-clips", "motions")
TINY = {
    "data": {"workers": 0},
    "schedule": {"length": 2, "warmup": 1},
    "run": {"batch_size": 8, "precision": "fp32"},
}


@contextmanager
def _at_work(folder: Path) -> Iterator[pytest.MonkeyPatch]:
    """In a folder, and with no precision that accelerate keeps for whoever comes next."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        try:
            yield patch
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


def _program(name: str, *words: str, folder: Path) -> str:
    """What a program prints; in this process, which has imported torch already."""
    with _at_work(folder) as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", [name, *words])
        runpy.run_path(str(ROOT / "train" / name), run_name="__main__")
    return printed.getvalue()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the checkout: data, configurations cut down to two steps, and documents."""
    folder = tmp_path_factory.mktemp("motions")
    _program("render_motions.py", "--share", "0.002", "--workers", "1", folder=folder)
    configs = folder / "train" / "configs"
    configs.mkdir(parents=True)
    for name in (*STAGES, "motions-tables"):
        path = ROOT / "train" / "configs" / f"{name}.yaml"
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        for section, values in TINY.items():
            config[section].update(values)
        (configs / path.name).write_text(yaml.safe_dump(config), encoding="utf-8")
    (folder / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "motions.md", folder / "docs")
    with _at_work(folder):
        for name in STAGES:
            done = CliRunner().invoke(app, ["train", f"train/configs/{name}.yaml"])
            assert done.exit_code == 0, done.output
    return folder


def test_the_stages_end_in_a_package_with_its_provenance(workplace: Path) -> None:
    written = workplace / "motions.safetensors"
    _program("package_motions.py", "--output", str(written), folder=workplace)

    assert written.stat().st_size == pytest.approx(packaged_path("motions").stat().st_size, rel=0.1)
    provenance = json.loads(written.with_suffix(".json").read_text(encoding="utf-8"))
    shipped = json.loads(packaged_path("motions").with_suffix(".json").read_text("utf-8"))
    assert provenance.keys() == shipped.keys()
    assert [stage["steps"] for stage in provenance["stages"]] == [2, 2, 2]
    reached = provenance["metrics"]["test"]
    assert reached["num_videos"] == 4
    # Two steps teach nothing, and yet ONNX Runtime has to give first what PyTorch does.
    assert provenance["exported"]["fp32"]["test"] == reached
    assert provenance["exported"]["fp16"].keys() == provenance["metrics"].keys()


def test_a_row_of_the_tables_is_run_once_and_written_into_the_page(workplace: Path) -> None:
    words = ("run", "--rows", "unimodal", "meanp")
    _program("paper_tables.py", *words, folder=workplace)
    assert _program("paper_tables.py", *words, folder=workplace) == ""
    _program("paper_tables.py", "write", folder=workplace)

    results = json.loads((workplace / "train/results/motions-tables.json").read_text("utf-8"))
    assert [(run["row"], run["steps"]) for run in results] == [("meanp", 2), ("unimodal", 2)]
    page = (workplace / "docs" / "motions.md").read_text(encoding="utf-8")
    assert page.count("| unimodal (classifier) | 1 |") == 1
    assert page.count("| meanp | 1 |") == 1


def test_the_tables_of_long_videos_are_written_into_the_page(
    workplace: Path, motions_bundle: Path
) -> None:
    words = (str(motions_bundle), "--clips", "data/motions/heldout")
    path = workplace / "docs" / "motions.md"
    others = [line for line in path.read_text("utf-8").splitlines() if line.startswith("| meanp |")]
    _program("timeline_tables.py", *words, folder=workplace)

    results = json.loads((workplace / "train/results/motions-timelines.json").read_text("utf-8"))
    assert [row["window_seconds"] for row in results] == [2.0, 3.0, 4.0]
    intervals = (workplace / "data/motions/long/test.csv").read_text("utf-8").splitlines()[1:]
    for row in results:
        assert row["hours"] == pytest.approx(60 / 3600)
        assert row["intervals"] == len(intervals) > 3
        # The model knows these motions, and where they begin and end.
        assert row["timeline"]["frame_map"] > 0.5
        assert row["timeline"]["thumos_map"] > row["single"]["thumos_map"]
        assert row["clips"]["videos"] == 2
    format_tables = runpy.run_path(str(ROOT / "train" / "timeline_tables.py"))["format_tables"]
    page = path.read_text(encoding="utf-8")
    assert format_tables(results) in page
    assert others
    assert set(others) <= set(page.splitlines())  # the other tables stay


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("render_motions.py", "--workers", "0"), "error: workers is 0; it has to be 1 or more"),
        (("package_motions.py", "nowhere"), r"error: .*nowhere/config.yaml"),
        (("paper_tables.py", "run"), r"error: .*motions-tables.yaml cannot be read"),
        (("paper_tables.py", "write"), r"The runs in runs/motions-tables are none"),
        (("timeline_tables.py", "nowhere"), r"error: .*docs/motions\.md"),
        (("search_tables.py", "nowhere"), r"error: .*docs/motions\.md"),
    ],
)
def test_a_program_that_cannot_go_on_says_why(
    tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        _program(*words, folder=tmp_path)
    # A sentence here is what Python prints before it ends with 1.
    assert isinstance(stopped.value.code, str)
    assert re.search(message, stopped.value.code)
    assert not list(tmp_path.iterdir())


def test_the_tables_in_the_documentation_are_those_of_the_results() -> None:
    format_tables = runpy.run_path(str(ROOT / "train" / "paper_tables.py"))["format_tables"]
    results = json.loads((ROOT / "train/results/motions-tables.json").read_text("utf-8"))
    assert format_tables(results) in PAGE


def test_the_tables_of_long_videos_in_the_documentation_are_those_of_the_results() -> None:
    format_tables = runpy.run_path(str(ROOT / "train" / "timeline_tables.py"))["format_tables"]
    results = json.loads((ROOT / "train/results/motions-timelines.json").read_text("utf-8"))
    assert format_tables(results) in PAGE


def test_the_tables_of_searching_in_the_documentation_are_those_of_the_results() -> None:
    format_tables = _search_tables()["format_tables"]
    results = json.loads((ROOT / "train/results/motions-search.json").read_text("utf-8"))
    assert format_tables(results) in PAGE
    # What is said of it holds for an archive of a day, with labels that are new to the model.
    assert results["test"]["hours"] >= 20
    assert results["test"]["kinds"]["heldout"]["search"]["queries"] >= 50


def _search_tables() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "train" / "search_tables.py"))


def test_what_a_search_is_worth_is_counted_by_hand() -> None:
    program = _search_tables()

    def answer(hits: list[int], z: list[float], num_true: int) -> Any:
        found = np.array(hits, bool)
        query = program["Query"]("seen", "a red star blinking")
        return program["Answer"](query, num_true, found, found, {"z": np.array(z)})

    one = answer([1, 0, 1, 0, 0, 1], [9, 8, 7, 6, 5, 4], 4)
    two = answer([0, 1], [3, 2.5], 1)
    nothing, something = answer([0, 0], [5, 1], 0), answer([0, 0, 0], [8, 7.5, 7], 0)
    row = program["worth"]([one, two, nothing])
    assert (row["queries"], row["true"]) == (2, 5)
    assert row["ap"] == pytest.approx(((1 + 2 / 3 + 1 / 2) / 4 + 1 / 2) / 2)
    for name, expected in {
        "recall@1": (1 / 4 + 0) / 2,
        "recall@5": (2 / 4 + 1) / 2,
        "recall@10": (3 / 4 + 1) / 2,
        "recall@n": (2 / 4 + 0) / 2,
        "precision@1": (1 + 0) / 2,
        "precision@5": (2 / 5 + 1 / 5) / 2,
        "precision@10": (3 / 10 + 1 / 10) / 2,
    }.items():
        assert row[name] == pytest.approx(expected), name
    # Right are 9, 7 and 4 of the one, 2.5 of the other, and one of the five is never found.
    thresholds = [program["threshold_for"]([one, two], "z", each) for each in (0.4, 0.5, 0.8, 1)]
    assert thresholds == [7, 4, 2.5, None]
    told = program["told_at"](7, "z", [one, two], [nothing, something])
    assert told["recall"] == pytest.approx(2 / 5)
    assert told["precision"] == pytest.approx(2 / 3)
    assert (told["queries_with_false"], told["false_per_query"]) == (1 / 2, 3 / 2)
    # From 7 on, three of the one are told, two of them right, and none of the other.
    assert program["f_measures"]([one, two], "z", 7).tolist() == pytest.approx([4 / 7, 0])
    assert program["own_f_measures"]([one, two]).tolist() == pytest.approx([6 / 10, 2 / 3])


def test_static_windows_are_scored_as_often_as_they_were_there() -> None:
    grid = WindowGrid(window_seconds=2.0, num_frames=8)
    spans = np.array([[0.0, 2.0], [0.25, 3.0], [1.5, 3.5]])  # the second stands for four
    windows, places = _search_tables()["all_windows"](spans, grid)
    assert places.tolist() == [0, 1, 1, 1, 1, 2]
    assert [each.start_seconds for each in windows] == [0, 0.25, 0.5, 0.75, 1.0, 1.5]
    assert {each.end_seconds - each.start_seconds for each in windows} == {2.0}


def test_what_archives_show_is_drawn_with_labels_that_are_new_and_labels_backwards() -> None:
    contents = _search_tables()["Contents"].drawn(5, 90)
    heldout = set(labels("heldout"))
    shown = set(contents.shown)
    assert (len(shown), len(shown & heldout)) == (90, 30)
    backwards = {**dict(ORDER_PAIRS), **{second: first for first, second in ORDER_PAIRS}}
    pairs = [
        each for each in shown if each._replace(motion=backwards.get(each.motion, "")) in shown
    ]
    assert len(pairs) >= 20
    assert not shown & {*contents.near, *contents.far}
    objects = {(each.shape, each.colour) for each in shown}
    assert not objects & {(each.shape, each.colour) for each in contents.far}
    assert 20 <= len(set(contents.near) & heldout) < len(contents.near)


def test_an_archive_is_searched_for_labels_that_the_model_was_never_trained_on(
    motions_bundle: Path, tmp_path: Path
) -> None:
    program = _search_tables()
    bundle = Bundle.open(motions_bundle)
    with open_runtime(bundle) as runtime:
        bank = LabelBank.build(bundle, runtime, list(map(str, all_labels())), name="motions")
        place = program["Workplace"](bundle, Recognizer(runtime, bank), tmp_path, 1)
        grid = WindowGrid.of_model(bundle.manifest)
        (folder,), contents, videos = place.archives("test", 0.2, grid, [STATIC_COSINE])
        assert not list(tmp_path.rglob("*.mp4"))
        queries = [each for each in program["queries_of"](contents) if each.kind == "heldout"]
        with Archive.open(folder, bundle=motions_bundle) as archive:
            answers = program["ask"](archive, videos, queries)
    row = program["worth"](answers)
    assert row["true"] >= 2
    assert row["recall@10"] > 0.8


def test_the_page_of_the_default_model_states_what_its_provenance_does() -> None:
    format_rows = runpy.run_path(str(ROOT / "train" / "package_motions.py"))["format_rows"]
    rows = format_rows(read_provenance("motions"))
    assert len(rows) == 5
    assert [row for row in rows if f"\n{row}\n" not in PAGE] == []


def test_the_recipes_are_those_that_the_weights_were_trained_with() -> None:
    stages = read_provenance("motions")["stages"]
    for name, stage in zip(STAGES, stages, strict=True):
        recipe = load_config(ROOT / "train" / "configs" / f"{name}.yaml")
        assert parse_config(stage["config"]).differences(recipe) == {}


def test_the_costs_of_the_papers_table_7_are_those_it_prints() -> None:
    format_costs = runpy.run_path(str(ROOT / "train" / "paper_tables.py"))["format_costs"]

    lines = format_costs(["vitb32-8f", "vitb16-8f", "vitb16-16f", "vitb16-32f"], 0).splitlines()[2:]

    for line, macs in zip(lines, ("35.4", "140.8", "281.6", "563.1"), strict=True):
        assert f"| {macs} ({macs}) |" in line
