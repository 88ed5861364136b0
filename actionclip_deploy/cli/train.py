"""`actionclip train`: a configuration becomes a fine-tuned checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress, TaskID

from actionclip_deploy.cli.options import JsonOption
from actionclip_deploy.cli.output import (
    notes,
    print_json,
    print_warning,
    progress_bar,
    results,
    tells_when_interrupted,
    usage_error,
)
from actionclip_deploy.errors import MissingExtraError
from actionclip_deploy.records import counted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from actionclip_deploy.train.loop import StepReport, TrainingResult


def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML file, like those in train/configs.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE...", help="Set a key of the file, such as run.seed=1."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue from the newest checkpoint of the run, if there is one."
        ),
    ] = False,
    resume_from: Annotated[
        Path | None,
        typer.Option("--resume-from", metavar="CHECKPOINT", help="Continue from this checkpoint."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune a model as the paper does, and write a checkpoint in the original's format.

    For several GPUs, run accelerate launch train/finetune.py with the same arguments. Which device
    it runs on is run.device of the configuration.

    Example:
        actionclip train train/configs/motions.yaml run.seed=1
        actionclip train train/configs/motions.yaml --resume
    """
    if resume and resume_from is not None:
        raise usage_error("--resume and --resume-from exclude each other; give one.")
    try:
        from actionclip_deploy.train.data import open_training_data
        from actionclip_deploy.train.loop import leave_processes
        from actionclip_deploy.train.loop import train as run_training
        from actionclip_deploy.train.run_checkpoints import checkpoint_folder, list_states
        from actionclip_deploy.train.run_config import load_config
    except ImportError as exc:
        raise MissingExtraError("actionclip train", "train") from exc

    settings = load_config(config, overrides or ())
    reporter = _Reporter()

    def tell() -> str:
        checkpoints = list_states(checkpoint_folder(settings.run.output))
        if not checkpoints:
            return f"{reporter.done()}, and no checkpoint is there; repeat the command."
        return (
            f"{reporter.done()}, and the newest checkpoint is {checkpoints[-1]}; the same command "
            "with --resume goes on from it."
        )

    with tells_when_interrupted(tell), progress_bar() as bar:
        reporter.bar = bar
        result = run_training(
            settings,
            open_training_data(settings),
            resume=resume_from or resume,
            on_step=reporter,
        )
    leave_processes()
    if not result.is_main:
        return
    if replaced := result.metrics["replaced_videos"]:
        print_warning(
            f"{len(replaced)} training videos could not be read; others took their place."
        )
    if as_json:
        print_json(result.metrics)
    else:
        _print_result(result)


class _Reporter:
    """Shows the steps of a run: a bar on a terminal, and a line for each that has a loss."""

    def __init__(self) -> None:
        self.bar: Progress | None = None
        self._task: TaskID | None = None
        self._last: StepReport | None = None

    def done(self) -> str:
        """How far the run is, in words."""
        last = self._last
        return "no step was done" if last is None else f"step {last.step} of {last.total_steps}"

    def __call__(self, report: StepReport) -> None:
        self._last = report
        if self.bar is not None:
            if self._task is None:
                self._task = self.bar.add_task("Training", total=report.total_steps)
            self.bar.update(self._task, completed=report.step)
        if report.loss is not None:
            notes.print(
                f"step {report.step}/{report.total_steps}  epoch {report.epoch:.2f}  "
                f"loss {report.loss:.4f}  scale {report.scale:.1f}  "
                f"{report.clips_per_second:.1f} clips/s",
                highlight=False,
            )
        if report.validation is not None:
            notes.print(f"step {report.step}  {_accuracy(report.validation)}", highlight=False)


def _print_result(result: TrainingResult) -> None:
    metrics = result.metrics
    line = f"{metrics['steps']} steps in {metrics['seconds']:.0f} s"
    if metrics["loss"] is not None:
        line += f", loss {metrics['loss']:.4f}"
    if metrics["validation"] is not None:
        line += f"; {_accuracy(metrics['validation'])}"
    results.print(line, highlight=False)
    results.print(f"Wrote {result.checkpoint} and {result.metrics_path}.", highlight=False)


def _accuracy(measured: Mapping[str, Any]) -> str:
    return (
        f"validation top-1 {measured['top1']:.2%}, top-5 {measured['top5']:.2%} of "
        f"{counted(measured['num_videos'], 'video')}"
    )
