from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from actionclip_deploy.train.loop import Journal, StepReport

RATES = {"textual": 1e-6, "visual": 2e-6, "prompt": 3e-5}


def read(folder: Path) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}


def measured(step: int, loss: float) -> StepReport:
    return StepReport(step, 10, step / 5, loss, scale=14.0, clips_per_second=30.0)


def test_tensorboard_gets_the_numbers_of_steps_that_have_a_loss(tmp_path: Path) -> None:
    with Journal(tmp_path, 0, None) as journal:
        journal.add(StepReport(1, 10, 0.2), RATES)
        journal.add(measured(2, 0.5), RATES)
    found = read(tmp_path)
    assert found["loss"] == {2: 0.5}
    assert found["scale"] == {2: 14.0}
    assert found["learning_rate/prompt"] == {2: pytest.approx(3e-5)}


def test_tensorboard_gets_what_validation_measures(tmp_path: Path) -> None:
    validation = {"top1": 0.25, "num_videos": 8, "top1_interval": [0.1, 0.4]}
    with Journal(tmp_path, 0, None) as journal:
        journal.add(StepReport(3, 10, 0.6, validation=validation), RATES)
    assert read(tmp_path) == {"validation/top1": {3: 0.25}, "validation/num_videos": {3: 8.0}}


def test_steps_that_a_resumed_run_does_again_replace_the_old_ones(tmp_path: Path) -> None:
    with Journal(tmp_path, 0, None) as journal:
        for step in (2, 4, 6):
            journal.add(measured(step, 1.0), RATES)
    with Journal(tmp_path, 3, None) as journal:
        journal.add(measured(4, 2.0), RATES)
    assert read(tmp_path)["loss"] == {2: 1.0, 4: 2.0}


def test_every_report_is_passed_on(tmp_path: Path) -> None:
    reports: list[StepReport] = []
    with Journal(None, 0, reports.append) as journal:
        journal.add(StepReport(1, 10, 0.2), RATES)
    assert [report.step for report in reports] == [1]
    assert list(tmp_path.iterdir()) == []
