"""The training loop: steps, validation, and what it tells."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_fakes import LABELS, TEMPLATES, ColourClips, colour_data, toy_config

from actionclip_deploy.errors import CheckpointError, TrainingError
from actionclip_deploy.model import load_checkpoint, save_original_checkpoint
from actionclip_deploy.scoring import score_clips, score_independent
from actionclip_deploy.train.data import SampleKey, TrainingData
from actionclip_deploy.train.learner import prompt_tokens
from actionclip_deploy.train.loop import (
    Journal,
    StepReport,
    score_samples,
    start_accelerator,
    train,
)
from actionclip_deploy.train.models import TrainedModel, build_trained_model
from actionclip_deploy.train.run_config import TrainConfig, parse_config


class StoppedError(Exception):
    """Ends a run between two steps."""


def stop_after(step: int) -> Any:
    def on_step(report: StepReport) -> None:
        if report.step == step:
            raise StoppedError

    return on_step


def run(config: TrainConfig, **choices: Any) -> dict[str, torch.Tensor]:
    """Train, and give the weights of the result by key."""
    choices.setdefault("data", colour_data())
    result = train(config, **choices)
    content = torch.load(result.checkpoint, weights_only=True)
    return {**content["model_state_dict"], **content["fusion_model_state_dict"]}


def start(config: TrainConfig) -> dict[str, torch.Tensor]:
    model = build_trained_model(config.model, config.loss, num_labels=4, seed=config.run.seed).model
    head = {f"module.{key}": value for key, value in model.visual_prompt.state_dict().items()}
    return {**model.towers.state_dict(), **head}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def is_visual(key: str) -> bool:
    return key.startswith("visual.")


def is_textual(key: str) -> bool:
    return not is_visual(key) and not key.startswith("module.") and key != "logit_scale"


def test_a_run_learns_and_writes_what_others_can_read(tmp_path: Path) -> None:
    config = toy_config(tmp_path, "schedule.length=30", "run.validate_every=10")
    reports: list[StepReport] = []
    result = train(config, colour_data(), on_step=reports.append)
    assert [report.step for report in reports] == list(range(1, 31))
    assert [report.step for report in reports if report.loss is not None] == [5, 10, 15, 20, 25, 30]
    measured = [report.step for report in reports if report.validation is not None]
    assert measured == [10, 20, 30]
    assert reports[-1].epoch == 10.0  # 24 clips, 8 in a batch
    assert result.is_main
    metrics = json.loads(result.metrics_path.read_text())
    assert metrics == json.loads(json.dumps(result.metrics))
    assert {key: metrics["validation"][key] for key in ("top1", "top5", "num_videos")} == {
        "top1": 1.0,
        "top5": 1.0,
        "num_videos": 8,
    }
    assert metrics["loss"] < 0.1
    assert (metrics["steps"], metrics["num_videos"], metrics["replaced_videos"]) == (30, 24, [])
    loaded = load_checkpoint(result.checkpoint, num_frames=4)
    assert (loaded.family, loaded.model.config.visual_prompt) == ("original", "transf")
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert parse_config(written) == config
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    one = run(toy_config(tmp_path / "1"))
    assert equal(one, run(toy_config(tmp_path / "2")))
    assert not equal(one, run(toy_config(tmp_path / "3", "run.seed=1")))


RICH = (
    "model.visual_prompt=transf_cls",  # has dropout
    "run.ema_decay=0.8",
    "run.accumulation=2",
    "run.clip_norm=0.5",
    "run.checkpoint_every=3",
)


@pytest.fixture(scope="module")
def rich_weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights that a run with `RICH` ends with if nothing stops it."""
    torch.set_num_threads(1)
    return run(toy_config(tmp_path_factory.mktemp("rich"), *RICH))


@pytest.mark.parametrize("stop", [2, 6, 10])  # before, at and behind a checkpoint
def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_weights(
    tmp_path: Path, stop: int, rich_weights: dict[str, torch.Tensor]
) -> None:
    config = toy_config(tmp_path, *RICH)
    with pytest.raises(StoppedError):
        train(config, colour_data(), on_step=stop_after(stop))
    torch.rand(7)  # whatever happens to the generators in between
    assert equal(run(config, resume=True), rich_weights)


def test_workers_change_no_weight(tmp_path: Path) -> None:
    wanted = run(toy_config(tmp_path / "none"))
    assert equal(run(toy_config(tmp_path / "two", "data.workers=2")), wanted)


def test_validation_changes_no_weight(
    tmp_path: Path, rich_weights: dict[str, torch.Tensor]
) -> None:
    assert equal(run(toy_config(tmp_path, *RICH, "run.validate_every=1")), rich_weights)


def test_resume_without_a_checkpoint_starts(tmp_path: Path) -> None:
    assert equal(
        run(toy_config(tmp_path / "1"), resume=True), run(toy_config(tmp_path / "2"), resume=False)
    )


def test_a_finished_run_is_resumed_to_the_same_result(tmp_path: Path) -> None:
    wanted = run(toy_config(tmp_path))
    (tmp_path / "model.pt").unlink()
    assert equal(run(toy_config(tmp_path), resume=True), wanted)


def test_a_run_goes_on_from_a_checkpoint_that_is_named(tmp_path: Path) -> None:
    config = toy_config(tmp_path, "run.checkpoint_every=4", "run.keep_last=5")
    wanted = run(config)
    newest = tmp_path / "checkpoints" / "step-00000010" / "state.json"
    newest.write_text("{")
    with pytest.raises(CheckpointError, match=r"step-00000010 is damaged.*good checkpoint is .*08"):
        train(config, colour_data(), resume=True)
    good = tmp_path / "checkpoints" / "step-00000008"
    assert equal(run(config, resume=good), wanted)
    assert equal(run(config, resume=True), wanted)


def test_a_folder_with_checkpoints_is_not_started_anew_unasked(tmp_path: Path) -> None:
    run(toy_config(tmp_path))
    with pytest.raises(
        TrainingError, match="holds the checkpoints of a run; continue it with --re"
    ):
        train(toy_config(tmp_path), colour_data())


def test_another_configuration_cannot_be_resumed(tmp_path: Path) -> None:
    run(toy_config(tmp_path))
    changed = toy_config(tmp_path, "optimiser.lr=1e-4", "run.log_every=1")
    with pytest.raises(
        TrainingError, match=r"configuration \(optimiser.lr 0.001 -> 0.0001\); give"
    ):
        train(changed, colour_data(), resume=True)


def test_other_data_cannot_be_resumed(tmp_path: Path) -> None:
    run(toy_config(tmp_path))
    with pytest.raises(
        TrainingError, match=r"had 24 training videos and 1 processes, and now .* 16"
    ):
        train(toy_config(tmp_path), colour_data(16), resume=True)


@pytest.mark.parametrize(
    ("freeze", "frozen"),
    [
        ("visual", is_visual),
        ("textual", is_textual),
        ("both", lambda key: is_visual(key) or is_textual(key)),
    ],
)
def test_frozen_towers_keep_their_weights_and_the_rest_learns(
    tmp_path: Path, freeze: str, frozen: Any
) -> None:
    config = toy_config(
        tmp_path, f"model.freeze={freeze}", "schedule.length=3", "schedule.warmup=0"
    )
    before, after = start(config), run(config)
    for key, value in before.items():
        assert torch.equal(after[key], value) == bool(frozen(key)), key


def test_the_result_is_the_mean_of_the_weights_of_all_steps(tmp_path: Path) -> None:
    choices = (
        "schedule.length=3",
        "schedule.warmup=0",
        "run.checkpoint_every=1",
        "run.keep_last=9",
    )
    run(toy_config(tmp_path / "plain", *choices))
    found = run(toy_config(tmp_path / "mean", *choices, "run.ema_decay=0.5"))
    mean = start(toy_config("unused"))
    for step in (1, 2, 3):
        path = tmp_path / "plain" / "checkpoints" / f"step-{step:08d}" / "model.safetensors"
        with safetensors.safe_open(path, "pt") as file:
            for key, value in mean.items():
                name = key.replace("module.", "visual_prompt.")
                name = name if name.startswith("visual_prompt.") else f"towers.{name}"
                mean[key] = 0.5 * value + 0.5 * file.get_tensor(f"model.{name}")
    for key, value in mean.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-7)


def test_accumulated_batches_have_the_mean_of_their_gradients(tmp_path: Path) -> None:
    # With a single step and a large eps, AdamW's step is nearly linear in the gradient, which is
    # why two equal batches in one step have to move the weights as one of them does.
    class Same(ColourClips):
        def __getitem__(self, key: SampleKey) -> Any:
            return super().__getitem__(SampleKey(0, 0))

    data = TrainingData(Same(16), LABELS, ("{}",))
    choices = ("schedule.length=1", "schedule.warmup=0", "optimiser.eps=1", "optimiser.lr=1")
    one = run(toy_config(tmp_path / "one", *choices), data=data)
    two = run(toy_config(tmp_path / "two", *choices, "run.accumulation=2"), data=data)
    assert equal(one, two)


@pytest.mark.parametrize("attention", ["fused", "plain"])
def test_plain_attention_gives_the_same_loss_without_fused_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    fused_allowed = []
    embed_clips = TrainedModel.embed_clips

    def record(model: TrainedModel, frames: torch.Tensor) -> torch.Tensor:
        if model.training:
            fused_allowed.append(torch.backends.cuda.flash_sdp_enabled())
        return embed_clips(model, frames)

    monkeypatch.setattr(TrainedModel, "embed_clips", record)
    config = toy_config(tmp_path, f"run.attention={attention}", "schedule.length=3")
    result = train(config, colour_data())

    assert fused_allowed == [attention == "fused"] * 3
    monkeypatch.undo()
    fused = train(toy_config(tmp_path / "fused", "schedule.length=3"), colour_data())
    assert result.metrics["loss"] == pytest.approx(fused.metrics["loss"], rel=1e-4)


def test_clipping_bounds_the_step(tmp_path: Path) -> None:
    choices = ("schedule.length=1", "schedule.warmup=0", "optimiser.eps=1", "optimiser.lr=1")
    choices = (*choices, "optimiser.weight_decay=0", "optimiser.prompt_ratio=1")
    config = toy_config(tmp_path, *choices, "run.clip_norm=1e-3")
    before, after = start(config), run(config)
    # AdamW's first step is g / (|g| + 1), which is at most g; the norm of g is 1e-3.
    moved = sum(float((after[key] - before[key]).square().sum()) for key in before)
    assert 0.99e-3 < math.sqrt(moved) < 1.001e-3


def test_the_classifier_is_trained_and_written(tmp_path: Path) -> None:
    config = toy_config(tmp_path, "model.classifier=true", "schedule.length=30")
    before, after = start(config), run(config)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["validation"]["top1"] == 1.0
    assert torch.equal(after["text_projection"], before["text_projection"])
    assert torch.equal(after["logit_scale"], before["logit_scale"])
    with safetensors.safe_open(tmp_path / "classifier.safetensors", "pt") as file:
        assert json.loads(file.metadata()["labels"]) == list(LABELS)
        assert file.get_tensor("weight").shape == (4, 32)
    with pytest.raises(CheckpointError, match=r"run with model.classifier: true"):
        load_checkpoint(tmp_path / "model.pt", num_frames=2)


@pytest.mark.parametrize("kind", ["kl-normalised", "cross-entropy-diagonal"])
def test_other_losses_learn_as_well(tmp_path: Path, kind: str) -> None:
    result = train(toy_config(tmp_path, f"loss.kind={kind}", "schedule.length=30"), colour_data())
    assert result.metrics["validation"]["top1"] == 1.0


def test_videos_with_several_labels_are_learnt(tmp_path: Path) -> None:
    config = toy_config(tmp_path, "schedule.length=30")
    result = train(config, colour_data(second_label=True))
    assert result.metrics["validation"]["top1"] >= 0.5


def test_videos_in_the_place_of_others_are_counted(tmp_path: Path) -> None:
    config = toy_config(tmp_path, "run.checkpoint_every=4")
    data = colour_data(unreadable=[3, 9])
    with pytest.raises(StoppedError):
        train(config, data, on_step=stop_after(8))
    result = train(config, data, resume=True)
    assert result.metrics["replaced_videos"] == [3, 9]


def test_the_scale_stays_below_its_bound(tmp_path: Path) -> None:
    after = run(toy_config(tmp_path, "loss.initial_scale=40", "loss.max_scale=20"))
    assert float(after["logit_scale"].exp()) <= 20.001


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    config = toy_config(tmp_path, "optimiser.lr=100", "run.log_every=1", "schedule.warmup=0")
    with pytest.raises(TrainingError, match=r"The loss is (nan|inf) after step \d+; continue from"):
        train(config, colour_data())
    assert not (tmp_path / "model.pt").exists()


def test_bf16_trains_weights_of_fp32(tmp_path: Path) -> None:
    after = run(toy_config(tmp_path, "run.precision=bf16"))
    assert {value.dtype for value in after.values()} == {torch.float32}


def test_fp16_on_a_cpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"run.precision fp16 cannot be had on the device 'cpu'; give"
    ):
        train(toy_config(tmp_path, "run.precision=fp16"), colour_data())


def test_a_second_precision_in_one_process_is_refused(tmp_path: Path) -> None:
    run(toy_config(tmp_path / "1", "schedule.length=1", "schedule.warmup=0"))
    with pytest.raises(TrainingError, match=r"accelerate cannot run with run.precision bf16 .* n"):
        train(toy_config(tmp_path / "2", "run.precision=bf16"), colour_data())


def test_an_output_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"file/run cannot be made .*; choose another run.outp"):
        train(toy_config(tmp_path / "file" / "run"), colour_data())


def test_without_validation_there_is_no_accuracy(tmp_path: Path) -> None:
    data = TrainingData(ColourClips(24), LABELS, TEMPLATES)
    result = train(toy_config(tmp_path, "run.validate_every=5"), data)
    assert result.metrics["validation"] is None


CONFIG = toy_config("unused")


def model(*overrides: str) -> TrainedModel:
    config = toy_config("unused", *overrides)
    return build_trained_model(config.model, config.loss, num_labels=4, seed=0)


def score(
    trained: TrainedModel, clips: ColourClips, batch_size: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    tokens = prompt_tokens(LABELS, TEMPLATES, trained.model.config)
    accelerator = start_accelerator(CONFIG.run)
    return score_samples(
        trained, clips, tokens, accelerator, num_labels=len(LABELS), batch_size=batch_size
    )


def test_scores_are_those_of_the_package(tmp_path: Path) -> None:
    trained, clips = model(), ColourClips(5)
    scores, labels = score(trained, clips)
    save_original_checkpoint(trained.model, tmp_path / "model.pt")
    other = TrainedModel(load_checkpoint(tmp_path / "model.pt", num_frames=4).model).eval()
    tokens = prompt_tokens(LABELS, TEMPLATES, other.model.config)
    texts = other.embed_texts(tokens).detach().numpy().reshape(3, 4, -1)
    for index in range(5):
        video = other.embed_clips(clips[SampleKey(index, 0)].frames[None]).detach().numpy()
        np.testing.assert_allclose(scores[index], score_clips(video, texts)[0], atol=1e-5)
    assert labels.argmax(axis=1).tolist() == [0, 1, 2, 3, 0]


def test_videos_of_several_labels_are_scored_independently(tmp_path: Path) -> None:
    trained, clips = model(), ColourClips(5)
    tokens = prompt_tokens(LABELS, TEMPLATES, trained.model.config)
    scores, _ = score_samples(
        trained,
        clips,
        tokens,
        start_accelerator(CONFIG.run),
        num_labels=len(LABELS),
        batch_size=3,
        method="independent",
    )
    texts = trained.embed_texts(tokens).detach().numpy().reshape(3, 4, -1)
    video = trained.eval().embed_clips(clips[SampleKey(0, 0)].frames[None]).detach().numpy()
    np.testing.assert_allclose(scores[0], score_independent(video, texts)[0], atol=1e-5)

    asked: list[object] = []

    def record(*_: object, method: object, **__: object) -> tuple[np.ndarray, np.ndarray]:
        asked.append(method)
        return np.eye(4, dtype=np.float32), np.eye(4, dtype=bool)

    with pytest.MonkeyPatch.context() as patch:  # what `validate` asks for, without a training
        patch.setattr("actionclip_deploy.train.loop.score_samples", record)
        data = TrainingData(ColourClips(24), LABELS, TEMPLATES, clips, scores="independent")
        train(toy_config(tmp_path / "run"), data)
    assert set(asked) == {"independent"}


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_the_size_of_batches_changes_nothing(batch_size: int) -> None:
    trained, clips = model(), ColourClips(9)
    np.testing.assert_allclose(
        score(trained, clips, batch_size)[0], score(trained, clips)[0], atol=1e-5
    )


def test_a_sample_in_the_place_of_another_counts_once() -> None:
    scores, labels = score(model(), ColourClips(6, unreadable=[2, 3]))
    assert len(scores) == 4
    assert labels.argmax(axis=1).tolist() == [0, 1, 0, 1]


def test_a_classifier_gives_probabilities() -> None:
    scores, _ = score(model("model.classifier=true"), ColourClips(5))
    np.testing.assert_allclose(scores.sum(axis=1), 1.0, atol=1e-6)


def test_the_model_stays_in_training_if_it_was() -> None:
    trained = model()
    trained.train()
    score(trained, ColourClips(2))
    assert trained.training
    trained.eval()
    score(trained, ColourClips(2))
    assert not trained.training


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
