"""The configurations in train/configs, and the table that maps the paper to them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from actionclip_deploy.train.run_config import TrainConfig, load_config

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = {path.stem: path for path in sorted((ROOT / "train" / "configs").glob("*.yaml"))}
# Of the paper; the others are ours.
RECIPES = {
    name: path
    for name, path in CONFIGS.items()
    if name.startswith(("table", "figure", "k400", "ucf101", "hmdb51"))
}
README = (ROOT / "train" / "README.md").read_text(encoding="utf-8")

# arXiv 2109.08472; the last two are of the authors' README.
PUBLISHED = {
    "table1-unimodal": (75.45, 92.51),
    "k400-vitb32-8f": (78.36, 94.25),
    "table2-both-random": (36.96, 63.02),
    "table2-language-random": (76.63, 91.94),
    "table2-vision-random": (40.10, 66.35),
    "table3-label-only": (77.82, 93.95),
    "table4-joint": (74.37, 93.09),
    "table4-shift": (71.73, 91.07),
    "table4-meanp": (77.11, 93.79),
    "table4-lstm": (77.09, 93.86),
    "table4-conv1d": (77.04, 94.06),
    "table4-transf-cls": (78.12, 94.25),
    "table5-both-frozen": (72.21, 91.61),
    "table5-language-frozen": (73.88, 91.61),
    "table5-vision-frozen": (73.78, 92.17),
    "table6-rn50-8f": (73.31, 92.02),
    "table6-vitb16-8f": (81.09, 95.49),
    "table6-vitb16-16f": (81.68, 95.87),
    "table6-vitb16-32f": (82.32, 96.20),
    "table9-charades-vitb16-32f": (44.3,),
    "ucf101-vitb16-32f": (97.1,),
    "hmdb51-vitb16-32f": (76.2,),
}
FIGURE = {"figure3-k400", "figure3-hmdb51", "figure3-ucf101"}
# In how many tables a configuration is a row.
NUM_ROWS = {"k400-vitb32-8f": 6, "ucf101-vitb16-32f": 0, "hmdb51-vitb16-32f": 0}


def _head(name: str) -> dict[str, str]:
    """The lines `Key: value` of the comment at the top."""
    lines = RECIPES[name].read_text(encoding="utf-8").splitlines()
    return dict(
        match.groups()  # type: ignore[misc]
        for line in lines
        if (match := re.fullmatch(r"# (Published|Launch): (.*)", line))
    )


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in re.findall(r"\d+\.\d+", text))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_is_one_that_training_takes(name: str) -> None:
    config = load_config(CONFIGS[name])

    assert config.run.output.name == name or name not in RECIPES


def test_every_experiment_has_its_file() -> None:
    assert set(RECIPES) == {*PUBLISHED, *FIGURE}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_head_has_the_published_numbers(name: str) -> None:
    assert _numbers(_head(name)["Published"]) == PUBLISHED[name]


@pytest.mark.parametrize("name", RECIPES)
def test_a_head_has_the_command_that_launches_it(name: str) -> None:
    words = shlex.split(_head(name)["Launch"])

    assert words[:2] == ["accelerate", "launch"]
    processes = int(words[words.index("--num_processes") + 1])
    program, path = words[-2:]
    assert (ROOT / program).is_file()
    assert (ROOT / path) == RECIPES[name]
    assert load_config(ROOT / path).run.batch_size % processes == 0


def test_the_readme_maps_every_row_to_its_file() -> None:
    rows = re.findall(r"^\| (\d) \| .* \| \[(.*)\]\((.*)\) \| (.*) \|$", README, re.M)

    for _, name, link, published in rows:
        assert ROOT / "train" / link == RECIPES[name]
        assert _numbers(published) == PUBLISHED[name]
    names = [name for _, name, _, _ in rows]
    assert {name: names.count(name) for name in PUBLISHED} == {
        name: NUM_ROWS.get(name, 1) for name in PUBLISHED
    }
    assert all(f"configs/{name}.yaml" in README for name in RECIPES)


def _config(name: str) -> TrainConfig:
    return load_config(RECIPES[name])


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith(("k4", "table"))])
def test_rows_differ_from_the_defaults_in_what_they_are_about(name: str) -> None:
    model, data = _config(name).model, _config(name).data
    default = _config("k400-vitb32-8f")
    changed = {key.removeprefix("model.") for key in default.differences(_config(name))}

    expected = {
        "k400-vitb32-8f": set(),
        "table1-unimodal": {"classifier"},
        "table2-both-random": {"checkpoint", "backbone"},
        "table2-language-random": {"random_textual"},
        "table2-vision-random": {"random_visual"},
        "table3-label-only": {"data.label_only"},
        "table6-rn50-8f": {"checkpoint"},
        "table6-vitb16-8f": {"checkpoint"},
        "table6-vitb16-16f": {"checkpoint", "num_frames"},
        "table6-vitb16-32f": {"checkpoint", "num_frames"},
    }
    if name.startswith("table4"):
        assert changed == {"visual_prompt"}
        assert model.visual_prompt == name.removeprefix("table4-").replace("-", "_")
    elif name.startswith("table5"):
        frozen = {"both": "both", "language": "textual", "vision": "visual"}
        assert changed == {"freeze"}
        assert model.freeze == frozen[name.split("-")[1]]
    elif not name.startswith("table9"):
        assert changed == expected[name]
    assert data.format == ("multi-label" if name.startswith("table9") else "kinetics")


def test_kinetics_is_trained_as_the_authors_configured_it() -> None:
    config = _config("k400-vitb32-8f")

    # sallymmx/ActionCLIP configs/k400/k400_train.yaml, and what its code reads of it.
    assert config.run.batch_size == 128
    assert (config.schedule.unit, config.schedule.length, config.schedule.warmup) == (
        "epochs",
        50,
        5,
    )
    optimiser = config.optimiser
    assert (optimiser.lr, optimiser.visual_ratio, optimiser.prompt_ratio) == (5e-6, 1, 10)
    assert (optimiser.weight_decay, optimiser.betas) == (0.2, (0.9, 0.98))
    augmentation = config.data.augmentation
    assert (augmentation.randaugment_operations, augmentation.randaugment_magnitude) == (2, 9)
    assert (augmentation.colour_jitter, augmentation.grayscale) == (0.8, 0.2)
    assert config.data.sampling == "random"
    assert config.loss.kind == "kl-softmax"


@pytest.mark.parametrize("name", ["ucf101-vitb16-32f", "hmdb51-vitb16-32f"])
def test_small_data_sets_are_trained_as_the_authors_configured_them(name: str) -> None:
    config = _config(name)

    # configs/ucf101/ucf_ft.yaml and configs/hmdb51/hmdb_ft.yaml: no RandAugment, and no
    # random_shift, so the middle frames.
    assert config.run.batch_size == {"ucf101": 32, "hmdb51": 64}[name.split("-")[0]]
    assert config.data.augmentation.randaugment_operations == 0
    assert config.data.sampling == "centre"


# Backbone, T and visual prompt as paper and README state them; None where a checkpoint tells.
STATED = {
    "figure3-k400": ("ViT-B-16", 8, "meanp"),  # section 4.4: Transf has nothing to learn from
    "figure3-hmdb51": ("table6-vitb16-8f", 8, None),
    "figure3-ucf101": ("table6-vitb16-8f", 8, None),
    "ucf101-vitb16-32f": ("table6-vitb16-32f", 32, None),
    "hmdb51-vitb16-32f": ("table6-vitb16-32f", 32, None),
    "table9-charades-vitb16-32f": ("table6-vitb16-32f", 32, None),
    "table6-rn50-8f": ("RN50", 8, "transf"),
    "table6-vitb16-8f": ("ViT-B-16", 8, "transf"),
    "table6-vitb16-16f": ("ViT-B-16", 16, "transf"),
    "table6-vitb16-32f": ("ViT-B-16", 32, "transf"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_start_frames_and_visual_prompt_are_those_of_the_paper(name: str) -> None:
    prompt = name.removeprefix("table4-").replace("-", "_") if "table4" in name else "transf"
    backbone, num_frames, visual_prompt = STATED.get(name, ("ViT-B-32", 8, prompt))
    model = _config(name).model

    assert backbone in (model.backbone or str(model.checkpoint))
    assert model.num_frames == num_frames
    assert visual_prompt in (None, model.visual_prompt)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_learns_as_the_authors_do(name: str) -> None:
    config, data = _config(name), _config(name).data
    is_small = data.format in ("ucf101", "hmdb51")

    # Of all of the authors' configurations; the loss of Charades is ours.
    assert (config.schedule.length, config.schedule.warmup) == (50, 5)
    optimiser = config.optimiser
    assert (optimiser.lr, optimiser.visual_ratio, optimiser.prompt_ratio) == (5e-6, 1, 10)
    assert (optimiser.weight_decay, optimiser.betas) == (0.2, (0.9, 0.98))
    assert data.sampling == ("centre" if is_small else "random")
    if data.format == "kinetics":
        assert config.run.batch_size == 128
        assert data.augmentation.randaugment_operations == 2
    elif is_small:
        assert data.augmentation.randaugment_operations == 0
