from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from actionclip_deploy.errors import TrainingError
from actionclip_deploy.model import VISUAL_PROMPTS
from actionclip_deploy.model.config import COMBINED_PROMPTS
from actionclip_deploy.train.run_config import VisualPrompt, load_config, parse_config

MINIMAL = """
model: {backbone: ViT-B-32}
data: {annotations: train.txt, labels: labels.csv}
run: {output: out}
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL)
    return path


def test_defaults_are_those_of_the_original(config_file: Path) -> None:
    config = load_config(config_file)
    assert config.optimiser.lr == 5e-6
    assert (config.optimiser.visual_ratio, config.optimiser.prompt_ratio) == (1, 10)
    assert config.optimiser.betas == (0.9, 0.98)
    assert config.optimiser.eps == 1e-8
    assert config.optimiser.weight_decay == 0.2
    assert (config.schedule.unit, config.schedule.length, config.schedule.warmup) == (
        "epochs",
        50,
        5,
    )
    assert config.loss.kind == "kl-softmax"
    assert config.run.batch_size == 128
    assert config.model.num_frames == 8


def test_visual_prompts_are_those_of_the_model() -> None:
    assert get_args(VisualPrompt) == (*VISUAL_PROMPTS, *COMBINED_PROMPTS)


def test_overrides_win_over_the_file_and_later_ones_over_earlier_ones(config_file: Path) -> None:
    config = load_config(
        config_file, ["run.seed=1", "run.seed=2", "optimiser.lr=1e-5", "data.label_only=true"]
    )
    assert config.run.seed == 2
    assert config.optimiser.lr == 1e-5
    assert config.data.label_only is True


def test_an_override_makes_a_section_that_the_file_has_not(config_file: Path) -> None:
    assert load_config(config_file, ["data.augmentation.flip=0"]).data.augmentation.flip == 0


def test_overrides_read_lists_as_yaml(config_file: Path) -> None:
    assert load_config(config_file, ["optimiser.betas=[0.9, 0.999]"]).optimiser.betas == (
        0.9,
        0.999,
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optimiser.learning_rate=1",
            r"the key 'optimiser.learning_rate' is unknown.*; the keys of optimiser are lr, "
            r"visual_ratio, prompt_ratio, betas, eps, weight_decay",
        ),
        ("optimiser.visual_ration=1", r"unknown \(did you mean 'optimiser.visual_ratio'\?\)"),
        ("run.num_frames=4", r"unknown \(did you mean 'model.num_frames'\?\)"),
        ("training.lr=1", r"'training' is unknown.*; the keys of the file are model, data, loss"),
        (
            "data.augmentation.mixup=1",
            r"'data.augmentation.mixup' is unknown.*; the keys of data.augmentation are multi",
        ),
        ("model.sizes={depth: 3}", r"'model.sizes.\w+' is (missing|unknown)"),
        ("loss.kind=ce", r"loss.kind is 'ce': input should be 'kl-softmax', 'kl-normalised' or"),
        ("run.batch_size=0", r"run.batch_size is 0: input should be greater than 0"),
        ("run.ema_decay=1", r"run.ema_decay is 1: input should be less than 1"),
        ("optimiser.lr=.nan", r"optimiser.lr is nan: input should be a finite number"),
        ("model.checkpoint=a.pt", r"model: checkpoint and backbone given; give exactly one"),
        ("model.backbone=null", r"model: none of them given; give exactly one of checkpoint"),
        ("schedule.warmup=50", r"schedule: warmup is 50 and length 50; give a shorter warmup"),
        ("run.output=null", r"run.output is None: input is not a valid path"),
        ("run.seed", r"'run.seed' sets nothing; write a key of the configuration, '=' and a"),
        (".seed=1", r"'.seed=1' sets nothing"),
        ("run.seed.x=1", r"run.seed is \{'x': 1\}: input should be a valid integer"),
        ("model.backbone.x=1", r"model.backbone is \{'x': 1\}: input should be a valid string"),
        ("optimiser.betas.0=1", r"'optimiser.betas.0=1' cannot be read|optimiser.betas.* is"),
        ("run.seed=[1", r"'run.seed=\[1' cannot be read \(while parsing .* expected ',' or ']'"),
        ("run.seed=${nothing}", r"'run.seed=\$\{nothing\}' cannot be read \(Interpolation key"),
    ],
)
def test_what_is_not_allowed_is_named(config_file: Path, override: str, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        load_config(config_file, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.batch_size=1000000000000", "less than or equal to 1048576"),
        ("run.batch_size=-1", "greater than 0"),
        ("run.accumulation=1e12", "less than or equal to 1000000000"),
        ("run.seed=99999999999999999999999", "less than 9223372036854775808"),
        ("run.keep_last=1e12", "less than or equal to 1000000000"),
        ("data.workers=100000", "less than or equal to 1024"),
        ("data.workers=-1", "greater than or equal to 0"),
        ("model.num_frames=1000000000", "less than or equal to 4096"),
        ("model.prompt_layers=1000000", "less than or equal to 1000"),
        ("optimiser.lr=1e300", "less than or equal to 100"),
        ("optimiser.lr=-1", "greater than 0"),
        ("optimiser.lr=.inf", "finite"),
        ("optimiser.weight_decay=1e300", "less than or equal to 1000000"),
        ("optimiser.betas=[2, 0.9]", "less than 1"),
        ("optimiser.betas=[0.9, -1]", "greater than or equal to 0"),
        ("schedule.length=1e300", "less than or equal to 1000000000"),
        ("loss.initial_scale=1e300", "less than or equal to 1000000"),
    ],
)
def test_a_number_that_no_run_can_want_is_refused_by_its_key(
    config_file: Path, override: str, message: str
) -> None:
    with pytest.raises(TrainingError) as caught:
        load_config(config_file, [override])
    key = override.partition("=")[0]
    assert key in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["run.batch_size", "optimiser.lr", "run.validate_every"])
def test_a_switch_is_no_number(config_file: Path, key: str) -> None:
    with pytest.raises(TrainingError, match=f"{key}: true is a switch"):
        load_config(config_file, [f"{key}=true"])


@pytest.mark.parametrize("name", ["embed_dim", "input_size", "vision_layers", "text_width"])
def test_sizes_of_a_new_model_are_bounded(config_file: Path, name: str) -> None:
    sizes = {"embed_dim": 8, "input_size": 32, "vision_layers": 1, "vision_width": 64}
    sizes |= {"patch_size": 8, "text_layers": 1, "text_width": 64, name: 10**12}
    given = ", ".join(f"{key}: {value}" for key, value in sizes.items())
    with pytest.raises(TrainingError, match=f"model.sizes.{name} is 1000000000000"):
        load_config(config_file, ["model.backbone=null", f"model.sizes={{{given}}}"])


def test_templates_and_label_only_exclude_each_other(config_file: Path) -> None:
    with pytest.raises(TrainingError, match="data: templates and label_only exclude each other"):
        load_config(config_file, ["data.templates=t.txt", "data.label_only=true"])


@pytest.mark.parametrize("key", ["prompt_layers", "prompt_std", "prompt_position_std"])
def test_a_visual_prompt_that_stays_takes_no_size_or_start(config_file: Path, key: str) -> None:
    overrides = ["model.backbone=null", "model.checkpoint=a.pt", f"model.{key}=2"]
    with pytest.raises(TrainingError, match=f"{key} is for a new visual prompt.*set new_prompt"):
        load_config(config_file, overrides)
    new = ["model.new_prompt=true", "model.visual_prompt=transf"]
    assert load_config(config_file, [*overrides, *new]).model.has_new_prompt


def test_a_new_visual_prompt_is_named(config_file: Path) -> None:
    overrides = ["model.backbone=null", "model.checkpoint=a.pt", "model.new_prompt=true"]
    with pytest.raises(TrainingError, match="new_prompt is set; give the visual_prompt"):
        load_config(config_file, overrides)


def test_frames_that_are_pictures_are_not_cached(config_file: Path) -> None:
    with pytest.raises(TrainingError, match="cache is for video files"):
        load_config(config_file, ["data.cache=frames", "data.format=original"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "holds no mapping"),
        ("", "'model' is missing; give it"),
        ("run: [1\n", "is not valid YAML"),
        ("run: {seed: 1, seed: 2}\n", "is not valid YAML .*found duplicate key seed"),
        ("run: !!python/object:os.system {}\n", "is not valid YAML .*could not determine"),
        ("data: {annotations: a, labels: b}\nrun: {output: c}\n", "'model' is missing; give it"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(TrainingError, match=message):
        load_config(path)


def test_a_file_stands_on_its_base(config_file: Path) -> None:
    folder = config_file.parent
    (folder / "longer.yaml").write_text("base: config.yaml\nschedule: {length: 90}\n")
    (folder / "sub").mkdir()
    own = folder / "sub" / "own.yaml"
    own.write_text("base: ../longer.yaml\nrun: {seed: 3}\nschedule: {warmup: 1}\n")
    config = load_config(own, ["run.batch_size=4"])
    assert (config.schedule.length, config.schedule.warmup) == (90, 1)
    assert (config.run.seed, config.run.batch_size, str(config.run.output)) == (3, 4, "out")
    assert config.model == load_config(config_file).model


def test_a_file_cannot_be_its_own_base(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(TrainingError, match=r"a\.yaml is its own base"):
        load_config(tmp_path / "a.yaml")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"nothing\.yaml cannot be read"):
        load_config(tmp_path / "nothing.yaml")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"model: {}\r\nl\xe9ap: 1\r\n", r"a\.yaml line 2 is not UTF-8 \(byte 0xe9\); save the"),
        ("run: {seed: 3}\n".encode("utf-16"), r"a\.yaml is UTF-16LE, and not UTF-8; save it as"),
        (b"run: {seed: \0}\n", r"a\.yaml line 1 holds a zero byte"),
        (b"[" * 100_000, r"a\.yaml is not valid YAML"),
        (b"3", r"a\.yaml (is not valid YAML|holds no mapping)"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(
    content: bytes, told: str, tmp_path: Path
) -> None:
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(TrainingError, match=told):
        load_config(tmp_path / "a.yaml")


def test_differences_leave_out_what_changes_no_weight(config_file: Path) -> None:
    one = load_config(config_file)
    other = load_config(
        config_file, ["run.output=elsewhere", "run.log_every=1", "data.workers=0", "run.seed=4"]
    )
    assert one.differences(other) == {"run.seed": (0, 4)}


def test_a_configuration_survives_json(config_file: Path) -> None:
    config = load_config(config_file, ["data.augmentation.flip=0.1", "optimiser.betas=[0.5, 0.6]"])
    data: dict[str, Any] = config.model_dump(mode="json")
    assert parse_config(data) == config


def test_reading_a_configuration_loads_no_torch() -> None:
    code = "import sys, actionclip_deploy.train.run_config; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
