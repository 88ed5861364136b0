"""The verb `train` on samples from memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState
from schemas import check_json
from training_fakes import colour_data, toy_config
from typer.testing import CliRunner, Result

from actionclip_deploy.cli import app
from actionclip_deploy.command_records import TrainingRecord
from actionclip_deploy.model import load_checkpoint
from actionclip_deploy.train import data as dataset
from actionclip_deploy.train import loop
from actionclip_deploy.train.loop import OnStep, StepReport

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def _own_accelerate_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dataset, "open_training_data", lambda _: colour_data())
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(toy_config(tmp_path / "out").model_dump(mode="json")))
    return path


@pytest.fixture
def run(config_file: Path) -> Run:
    def run_train(*arguments: object) -> Result:
        return CliRunner().invoke(app, ["train", str(config_file), *map(str, arguments)])

    return run_train


def test_a_run_reports_its_steps_and_its_result(run: Run, tmp_path: Path) -> None:
    result = run()
    assert result.exit_code == 0, result.output
    assert "step 5/10  epoch 1.67  loss " in result.stderr
    assert "10 steps in " in result.stdout
    assert "; validation top-1 " in result.stdout
    assert f"Wrote {tmp_path / 'out' / 'model.pt'}" in result.stdout
    assert load_checkpoint(tmp_path / "out" / "model.pt", num_frames=4).family == "original"


def test_json_is_all_there_is_on_standard_output(run: Run) -> None:
    printed = json.loads(run("--json", "schedule.length=3").stdout)
    assert printed["steps"] == 3
    check_json(TrainingRecord, printed)


def test_a_run_is_continued_on_request_only(run: Run) -> None:
    assert run("run.checkpoint_every=4").exit_code == 0
    refused = run()
    assert refused.exit_code == 1
    assert "continue it with --resume" in refused.stderr
    assert run("--resume").exit_code == 0


def test_a_run_is_continued_from_a_checkpoint_that_is_named(run: Run, tmp_path: Path) -> None:
    assert run("run.checkpoint_every=4").exit_code == 0
    older = tmp_path / "out" / "checkpoints" / "step-00000008"
    result = run("--resume-from", older)
    assert result.exit_code == 0, result.output
    assert "step 5/10" not in result.stderr
    assert "step 10/10" in result.stderr


def test_both_ways_of_continuing_exclude_each_other(run: Run) -> None:
    result = run("--resume", "--resume-from", "somewhere")
    assert result.exit_code == 2
    assert "exclude each other" in result.stderr


def test_an_unknown_key_is_named_with_those_there_are(run: Run) -> None:
    result = run("run.epochs=3")
    assert result.exit_code == 1
    assert "the key 'run.epochs' is unknown" in result.stderr
    assert "the keys of run are output, batch_size" in result.stderr


def test_videos_that_could_not_be_read_are_counted(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = colour_data(unreadable=[2, 5])
    monkeypatch.setattr(dataset, "open_training_data", lambda _: data)
    assert "2 training videos could not be read; others took their place" in run().stderr


def test_an_interruption_names_the_step_and_the_checkpoint(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(settings: object, data: object, *, resume: bool, on_step: OnStep) -> None:
        on_step(StepReport(7, 10, 1.2))
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train", interrupt)
    result = run()
    assert result.exit_code == 130
    assert "finished: step 7 of 10, and no checkpoint is there; repeat" in result.stderr
    newest = tmp_path / "out" / "checkpoints" / "step-00000005"
    newest.mkdir(parents=True)
    result = run("--resume")
    assert f"the newest checkpoint is {newest}; the same command with --resume" in result.stderr
