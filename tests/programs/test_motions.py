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

import pytest
import yaml
from accelerate.state import AcceleratorState
from typer.testing import CliRunner

from actionclip_deploy.cli import app
from actionclip_deploy.model.zoo import packaged_path, read_provenance
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
