"""The training loop: from a configuration and samples to a checkpoint in the original's format.

accelerate gives the device, the processes and the precision. All that decides about a weight is
written out here: accelerate's own data loaders, schedulers and checkpoints are not used.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object

from actionclip_deploy.errors import TrainingError
from actionclip_deploy.evaluate.metrics import measure
from actionclip_deploy.train.batches import Batch, Sharding, TrainingBatches, load_batches
from actionclip_deploy.train.journal import Journal, OnStep, StepReport
from actionclip_deploy.train.learner import Learner
from actionclip_deploy.train.optimiser import Schedule
from actionclip_deploy.train.processes import start_accelerator
from actionclip_deploy.train.random_states import (
    capture_random_states,
    restore_random_states,
    seed_everything,
)
from actionclip_deploy.train.results import (
    TrainingResult,
    result_paths,
    versions,
    write_config,
    write_results,
)
from actionclip_deploy.train.resuming import check_same_run, checkpoint_folder, find_state
from actionclip_deploy.train.run_checkpoints import RunState, write_state
from actionclip_deploy.train.validation import score_samples

if TYPE_CHECKING:
    from collections.abc import Iterator

    from actionclip_deploy.train.config import TrainConfig
    from actionclip_deploy.train.samples import TrainingData


def train(
    config: TrainConfig,
    data: TrainingData,
    *,
    resume: bool | Path = False,
    on_step: OnStep | None = None,
) -> TrainingResult:
    """Train a model, and write it with what it measured into the folder of the run.

    Started in several processes by accelerate, each of them calls this with the same arguments.

    Args:
        config: The configuration.
        data: What to learn from.
        resume: True to go on from the newest checkpoint in the folder if there is one, or the
            checkpoint to go on from. On a CPU in fp32, in one process, the weights at the end
            are then those of a run that was never stopped, bit for bit.
        on_step: Called after each step, in the main process.

    Returns:
        Where the results are.

    Raises:
        TrainingError: If the run cannot start or go on as asked, or its loss is no number.
        CheckpointError: If a checkpoint cannot be used.
        LabelError: If a prompt is too long.
        VideoError: If a video cannot be read and that is to end the run.
    """
    accelerator = start_accelerator(config.run)
    _make_folder(config.run.output)
    state = find_state(config.run.output, resume, accelerator)
    run = _Run(config, data, accelerator)
    if state is not None:
        run.restore(state)
    if accelerator.is_main_process:
        write_config(config)
    run.go(on_step)
    return run.finish()


class _Run:
    """One run: what has been done, and what comes next."""

    def __init__(self, config: TrainConfig, data: TrainingData, accelerator: Any) -> None:
        self.config, self.data, self.accelerator = config, data, accelerator
        section = config.run
        self.sharding = Sharding(
            section.batch_size, accelerator.num_processes, accelerator.process_index
        )
        self.batches_per_epoch = self.sharding.count_batches(len(data.training))
        self.schedule = Schedule.in_steps(
            config.schedule, self.batches_per_epoch / section.accumulation
        )
        seed_everything(section.seed)
        self.learner = Learner(config, data.labels, data.templates, accelerator)
        # From here on processes draw different numbers, for dropout.
        seed_everything(section.seed + 1 + accelerator.process_index)
        self.step = 0
        self.replaced: set[int] = set()  # samples in whose place others were given
        self.loss: float | None = None
        self._started = time.perf_counter()
        self._lap_started = self._started
        self._lap_loss = torch.zeros((), device=accelerator.device)
        self._lap_steps = 0

    @property
    def seconds(self) -> float:
        """Time that the run has taken, with its parts before it was resumed."""
        return time.perf_counter() - self._started

    @property
    def epoch(self) -> float:
        """Passes over the training samples that are done."""
        return self.step * self.config.run.accumulation / self.batches_per_epoch

    @property
    def is_done(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.schedule.num_steps

    def restore(self, state: RunState) -> None:
        """Go on in the place of a run that was stopped."""
        check_same_run(state, self.config, len(self.data.training), self.accelerator.num_processes)
        self.learner.restore(
            model=state.model, mean=state.mean, optimiser=state.optimiser, scaler=state.scaler
        )
        restore_random_states(state.random[self.accelerator.process_index])
        self.step = state.step
        self.loss = state.loss
        self.replaced = set(state.replaced)
        self._started = time.perf_counter() - state.seconds

    def go(self, on_step: OnStep | None) -> None:
        """Do the steps that are left."""
        main = self.accelerator.is_main_process
        folder = self.config.run.output / "tensorboard" if main else None
        self._lap_started = time.perf_counter()
        with Journal(folder, self.step, on_step if main else None) as journal:
            batches = self._batches()
            while not self.is_done:
                factor = self.schedule.factor(self.step)
                parts = [next(batches) for _ in range(self.config.run.accumulation)]
                loss, rates = self.learner.do_step(parts, factor)
                self.step += 1
                self._lap_loss += loss
                self._lap_steps += 1
                journal.add(self._look_around(), rates)

    def _batches(self) -> Iterator[Batch]:
        section = self.config.run
        keys = TrainingBatches(
            len(self.data.training),
            self.sharding,
            seed=section.seed,
            first=self.step * section.accumulation,
            last=self.schedule.num_steps * section.accumulation,
        )
        loader = load_batches(
            self.data.training,
            keys,
            num_templates=len(self.data.templates),
            num_labels=len(self.data.labels),
            workers=self.config.data.workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        for batch in loader:
            self.replaced.update(batch.asked[batch.asked != batch.given].tolist())
            yield batch

    def _look_around(self) -> StepReport:
        """After a step, do what is due: logging, validation, a checkpoint."""
        section, looked = self.config.run, time.perf_counter()
        report = StepReport(self.step, self.schedule.num_steps, self.epoch)
        saves = self.is_done or self.step % section.checkpoint_every == 0
        if saves or self.step % section.log_every == 0:
            report = self._close_lap(report)
        if section.validate_every is not None and self.step % section.validate_every == 0:
            report = replace(report, validation=self.validate())
        if saves:
            self._save()
        self._lap_started += time.perf_counter() - looked  # a lap is of steps alone
        return report

    def _close_lap(self, report: StepReport) -> StepReport:
        """Take stock of the steps since the last time; a loss that is no number ends the run."""
        mean = self.accelerator.reduce(self._lap_loss / self._lap_steps, "mean")
        self.loss = float(mean)
        if not math.isfinite(self.loss):
            raise TrainingError(
                f"The loss is {self.loss} after step {self.step}; go on from the last checkpoint "
                "in another run.output with a lower optimiser.lr, with run.clip_norm 1, or with "
                "run.precision fp32."
            )
        now, section = time.perf_counter(), self.config.run
        clips = self._lap_steps * section.batch_size * section.accumulation
        report = replace(
            report,
            loss=self.loss,
            scale=self.learner.scale,
            clips_per_second=clips / (now - self._lap_started),
        )
        self._lap_started = now
        self._lap_loss.zero_()
        self._lap_steps = 0
        return report

    def validate(self) -> dict[str, Any] | None:
        """Measure the weights that would be given out now; None without validation samples."""
        if self.data.validation is None:
            return None
        with self.learner.result_weights():
            scores, labels = score_samples(
                self.learner.model,
                self.data.validation,
                self.learner.tokens,
                self.accelerator,
                num_labels=len(self.data.labels),
                batch_size=self.config.run.batch_size // self.accelerator.num_processes,
                workers=self.config.data.workers,
            )
        return measure(scores, labels).summary()

    def _all_replaced(self) -> list[int]:
        return sorted(set(gather_object(sorted(self.replaced))))

    def _save(self) -> None:
        random, replaced = gather_object([capture_random_states()]), self._all_replaced()
        if self.accelerator.is_main_process:
            state = RunState(
                step=self.step,
                num_samples=len(self.data.training),
                seconds=self.seconds,
                loss=self.loss,
                replaced=replaced,
                config=self.config.model_dump(mode="json"),
                random=random,
                **self.learner.state(),
            )
            section = self.config.run
            write_state(checkpoint_folder(section.output), state, keep_last=section.keep_last)
        self.accelerator.wait_for_everyone()

    def finish(self) -> TrainingResult:
        """Measure the result and write it."""
        section = self.config.run
        validation, replaced = self.validate(), self._all_replaced()
        metrics = {
            "steps": self.step,
            "epochs": self.epoch,
            "num_videos": len(self.data.training),
            "replaced_videos": replaced,
            "num_processes": self.accelerator.num_processes,
            "device": str(self.accelerator.device),
            "seconds": self.seconds,
            "loss": self.loss,
            "scale": self.learner.scale,
            "validation": validation,
            "versions": versions(),
            "config": self.config.model_dump(mode="json"),
        }
        if self.accelerator.is_main_process:
            with self.learner.result_weights():
                write_results(section.output, self.learner.model, self.data.labels, metrics)
        self.accelerator.wait_for_everyone()
        checkpoint, metrics_path = result_paths(section.output)
        return TrainingResult(
            checkpoint, metrics_path, metrics, is_main=self.accelerator.is_main_process
        )


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise TrainingError(
            f"{path} cannot be made ({exc.strerror}); choose another run.output."
        ) from exc
