"""The training loop: from a configuration and samples to a checkpoint in the original's format.

accelerate gives the device, the processes and the precision. All that decides about a weight is
written out here: accelerate's own data loaders, schedulers and checkpoints are not used.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import accelerate
import numpy as np
import open_clip
import safetensors.torch
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from omegaconf import OmegaConf
from torch.utils.tensorboard import SummaryWriter

from actionclip_deploy import __version__
from actionclip_deploy.command_records import AccuracyRecord, TrainingRecord
from actionclip_deploy.errors import FileWriteError, TrainingError
from actionclip_deploy.evaluate.metrics import measure
from actionclip_deploy.files import staged_file, write_json, write_text
from actionclip_deploy.labels import embed_prompts
from actionclip_deploy.manifest import ScoreMethod
from actionclip_deploy.model import save_original_checkpoint
from actionclip_deploy.model.checkpoints import CLASSIFIER_NAME, RESULT_NAME
from actionclip_deploy.scoring import score as score_embeddings
from actionclip_deploy.train.batches import Batch, Sharding, TrainingBatches, load_batches
from actionclip_deploy.train.data import ClipDataset, SampleKey
from actionclip_deploy.train.learner import Learner, Schedule
from actionclip_deploy.train.run_checkpoints import (
    RunState,
    capture_random_states,
    check_same_run,
    checkpoint_folder,
    find_state,
    restore_random_states,
    seed_everything,
    write_state,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from actionclip_deploy.train.data import TrainingData
    from actionclip_deploy.train.models import TrainedModel
    from actionclip_deploy.train.run_config import RunSection, TrainConfig


_MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_PROMPTS_PER_CALL = 256


@dataclass(frozen=True)
class StepReport:
    """One optimiser step.

    Attributes:
        epoch: Passes over the training videos, with a fraction.
        loss: Mean over the steps since the last that had one; None where nothing is logged.
        scale: Multiplier of the cosine, where there is a loss.
        validation: What a validation after this step has measured, as `Metrics.summary` has it,
            or None.
    """

    step: int
    total_steps: int
    epoch: float
    loss: float | None = None
    scale: float | None = None
    clips_per_second: float | None = None
    validation: Mapping[str, Any] | None = None


OnStep: TypeAlias = Callable[[StepReport], None]


@dataclass(frozen=True, eq=False)
class TrainingResult:
    """What a run leaves in its folder, besides the configuration with all defaults.

    Attributes:
        checkpoint: The model in the original's format, as `actionclip export` reads it.
        metrics: Loss, accuracy, time, versions and configuration, as JSON.
        is_main: Whether this is the process that speaks for all.
    """

    checkpoint: Path
    metrics_path: Path
    metrics: dict[str, Any]
    is_main: bool


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
        resume: True to continue from the newest checkpoint in the folder if there is one, or
            the checkpoint to continue from. On a CPU in fp32, in one process, the weights at the
            end are then those of a run that was never stopped, bit for bit.
        on_step: Called after each step, in the main process.

    Raises:
        TrainingError: If the run cannot start or continue as asked, or its loss is not a number.
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
        text = OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))
        try:
            write_text(config.run.output / "config.yaml", text)
        except FileWriteError:
            with suppress(OSError):
                config.run.output.rmdir()  # if it is empty: nothing of this run was written
            raise
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
        """Continue a run that was stopped."""
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
        """Take stock of the steps since the last time; a loss that is not a number ends the run."""
        mean = self.accelerator.reduce(self._lap_loss / self._lap_steps, "mean")
        self.loss = float(mean)
        if not math.isfinite(self.loss):
            raise TrainingError(
                f"The loss is {self.loss} after step {self.step}; continue from the last "
                "checkpoint in another run.output with a lower optimiser.lr, with run.clip_norm 1, "
                "or with run.precision fp32."
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
                method=self.data.scores,
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
        metrics = TrainingRecord(
            steps=self.step,
            epochs=self.epoch,
            num_videos=len(self.data.training),
            replaced_videos=tuple(replaced),
            num_processes=self.accelerator.num_processes,
            device=str(self.accelerator.device),
            seconds=self.seconds,
            loss=self.loss,
            scale=self.learner.scale,
            validation=None if validation is None else AccuracyRecord(**validation),
            versions=_versions(),
            config=self.config.model_dump(mode="json"),
        ).to_dict()
        checkpoint, metrics_path = section.output / RESULT_NAME, section.output / "metrics.json"
        is_main = self.accelerator.is_main_process
        if is_main:
            with self.learner.result_weights():
                self._write_model(checkpoint)
            write_json(metrics_path, metrics)
        self.accelerator.wait_for_everyone()
        return TrainingResult(checkpoint, metrics_path, metrics, is_main)

    def _write_model(self, checkpoint: Path) -> None:
        model = self.learner.model
        layer = model.classifier.state_dict() if model.classifier is not None else None
        tensors = {key: value.cpu() for key, value in layer.items()} if layer else None
        save_original_checkpoint(
            model.model,
            checkpoint,
            epoch=int(self.epoch),
            classifier=tensors,
            clip_seconds=self.data.training.typical_seconds(),
        )
        if tensors is not None:
            with staged_file(checkpoint.with_name(CLASSIFIER_NAME)) as staged:
                metadata = {"labels": json.dumps(list(self.data.labels))}
                safetensors.torch.save_file(tensors, staged, metadata)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise TrainingError(
            f"{path} cannot be made ({exc.strerror}); choose another run.output."
        ) from exc


def _versions() -> dict[str, str]:
    """Of what decides about the numbers of a run."""
    return {
        "actionclip_deploy": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "open_clip": open_clip.__version__,
        "accelerate": accelerate.__version__,
    }


@torch.no_grad()
def score_samples(
    model: TrainedModel,
    clips: ClipDataset,
    tokens: Tensor,
    accelerator: Any,
    *,
    num_labels: int,
    batch_size: int,
    workers: int = 0,
    method: ScoreMethod | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Score every sample against every label, the samples shared out among the processes.

    Args:
        clips: N samples; one that replaces another counts once.
        tokens: Of the K * C prompts, template-major, shape (K * C, L).
        method: How embeddings become scores; None for the original's way. A classifier has its own.

    Returns:
        Scores (N, C), as the package scores everywhere or by the classifier, and which labels
        each sample has (N, C); both in the order of the samples, the same in all processes.
    """
    was_training = model.training
    model.eval()
    try:
        with accelerator.autocast():
            texts = None
            if model.classifier is None:
                texts = embed_prompts(
                    lambda part: model.embed_texts(part).cpu().numpy(),
                    tokens,
                    num_labels=num_labels,
                    batch_size=_PROMPTS_PER_CALL,
                )
            own = range(accelerator.process_index, len(clips), accelerator.num_processes)
            rows = []
            for batch in _load(clips, own, num_labels, batch_size, workers):
                scores = _score(model, batch.frames.to(accelerator.device), texts, method)
                kept = (batch.asked == batch.given).numpy()
                rows.append(
                    (batch.given.numpy()[kept], scores[kept], batch.video_labels.numpy()[kept])
                )
    finally:
        model.train(was_training)
    everyones = gather_object(rows)
    indices, scores, labels = (np.concatenate(column) for column in zip(*everyones, strict=True))
    order = np.argsort(indices)
    return scores[order], labels[order]


def _load(
    clips: ClipDataset, own: range, num_labels: int, batch_size: int, workers: int
) -> Iterable[Batch]:
    keys = [
        [SampleKey(index, 0) for index in own[start : start + batch_size]]
        for start in range(0, len(own), batch_size)
    ]
    return load_batches(clips, keys, num_templates=1, num_labels=num_labels, workers=workers)


def _score(
    model: TrainedModel,
    frames: Tensor,
    texts: NDArray[np.float32] | None,
    method: ScoreMethod | None,
) -> NDArray[np.float32]:
    if texts is None:
        scores: NDArray[np.float32] = model.classify(frames).float().softmax(1).cpu().numpy()
        return scores
    return score_embeddings(
        method or "template-softmax", model.embed_clips(frames).cpu().numpy(), texts
    )


class Journal:
    """Passes reports on and writes their numbers to TensorBoard; a context manager.

    Args:
        folder: For TensorBoard's files; None for a process that writes none.
        steps_done: Steps before this start; what TensorBoard has of later ones is hidden.
    """

    def __init__(self, folder: Path | None, steps_done: int, on_step: OnStep | None) -> None:
        self._writer: Any = None
        if folder is not None:
            self._writer = SummaryWriter(str(folder), purge_step=steps_done + 1)
        self._on_step = on_step

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def add(self, report: StepReport, learning_rates: Mapping[str, float]) -> None:
        """Take a report, and the learning rates of the step by part."""
        if self._writer is not None:
            for name, value in _numbers(report, learning_rates).items():
                self._writer.add_scalar(name, value, report.step)
        if self._on_step is not None:
            self._on_step(report)


def _numbers(report: StepReport, learning_rates: Mapping[str, float]) -> dict[str, float]:
    numbers = {
        f"validation/{key}": float(value)
        for key, value in (report.validation or {}).items()
        if isinstance(value, int | float)
    }
    if report.loss is None:
        return numbers
    rates = {f"learning_rate/{part}": rate for part, rate in learning_rates.items()}
    measured = {
        "loss": report.loss,
        "scale": report.scale,
        "clips_per_second": report.clips_per_second,
    }
    return numbers | rates | {key: value for key, value in measured.items() if value is not None}


def start_accelerator(section: RunSection) -> Any:
    """Join the processes of this run, of which there may be one; accelerate's `Accelerator`."""
    try:
        accelerator = Accelerator(
            cpu=section.device == "cpu", mixed_precision=_MIXED_PRECISION[section.precision]
        )
    except ValueError as exc:
        raise TrainingError(
            f"accelerate cannot run with run.precision {section.precision} and run.device "
            f"{section.device} here ({exc}); choose others, or start a new process."
        ) from exc
    if section.precision != "fp32" and not accelerator.native_amp:  # it would continue in fp32
        raise TrainingError(
            f"run.precision {section.precision} cannot be had on the device "
            f"{accelerator.device.type!r}; give bf16 or fp32."
        )
    kind = accelerator.distributed_type.value
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise TrainingError(
            f"accelerate was started with {kind}; this loop keeps the whole model in each "
            "process: launch it with --multi_gpu."
        )
    return accelerator


def leave_processes() -> None:
    """Part from the other processes, at the end of a program; no run can follow in it."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
