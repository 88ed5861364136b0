"""export/export_zoo.py: checkpoints to bundles and a table, and the recipes that it reads."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from safetensors.numpy import load_file

from actionclip_deploy import Bundle
from actionclip_deploy.model import FAMILIES, PIXEL_MEAN, PIXEL_STD, load_checkpoint
from actionclip_deploy.runtimes.parity import TOLERANCES

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "export" / "export_zoo.py"
RECIPES = ROOT / "export" / "recipes"
RECIPE_NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))

ALL_AGREE, SOME_FAILED, WRONG_ARGUMENTS = 0, 3, 2
# Rounding to fp16 is thousands of times what another order of sums in fp32 changes.
RELATIVE = 1e-2

TRANSF = "vit-b-tiny-8f"
PORT = "vit-b-port-8f"
BROKEN = "vit-b-cut-off-8f"


@pytest.fixture(scope="module")
def zoo() -> Iterator[ModuleType]:
    """The program as a module, so that no test waits for another import of torch."""
    spec = importlib.util.spec_from_file_location("export_zoo", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "export_zoo", module)  # dataclasses look there for their module
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def weights(
    tiny_checkpoints: dict[str, Path],
    golden_weights: dict[str, np.ndarray],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The authors' format, the same weights in mmaction2's, and half a file."""
    folder = tmp_path_factory.mktemp("weights")
    shutil.copy(tiny_checkpoints["Transf"], folder / f"{TRANSF}.pt")
    port = {}
    for key, value in golden_weights.items():
        part, _, name = key.partition("/")
        if part in ("model", "head_Transf"):
            name = f"clip.{name}" if part == "model" else f"adapter.{name.removeprefix('module.')}"
            port[name] = torch.from_numpy(value.copy())
    table = "adapter.frame_position_embeddings.weight"
    port[table] = port[table][:8].clone()
    torch.save({"state_dict": port}, folder / f"{PORT}.pth")
    whole = (folder / f"{TRANSF}.pt").read_bytes()
    (folder / f"{BROKEN}.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.txt").write_text("no checkpoint")
    return folder


@pytest.fixture(scope="module")
def exported(
    zoo: ModuleType, weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path]:
    """The exit code and the output of one run over the folder; copy it before you change it."""
    output = tmp_path_factory.mktemp("zoo") / "output"
    code = zoo.main([str(weights), "--output", str(output), "--precision", "fp16"])
    return code, output


@pytest.fixture
def output(exported: tuple[int, Path], tmp_path: Path) -> Path:
    return shutil.copytree(exported[1], tmp_path / "output")


@pytest.fixture
def calls(zoo: ModuleType, monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path) -> list[Any]:
    """What would be exported; every export gives the same bundle."""
    given: list[Any] = []

    def export(checkpoint: str | Path, output: Path, **arguments: Any) -> SimpleNamespace:
        given.append((checkpoint, output, arguments))
        return SimpleNamespace(bundle=Bundle.open(tiny_bundle))

    monkeypatch.setattr(zoo, "export_checkpoint", export)
    return given


def rows_of(output: Path) -> dict[str, dict[str, Any]]:
    rows = json.loads((output / "parity.json").read_text(encoding="utf-8"))["rows"]
    return {row["checkpoint"]: row for row in rows}


def table_of(output: Path) -> dict[str, list[str]]:
    """The cells of parity.md by their first, with the head under `checkpoint`."""
    lines = (output / "parity.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines if line[:1] == "|"]
    assert len({len(row) for row in rows}) == 1
    return {row[0]: row for row in rows}


def test_a_folder_is_exported_and_a_broken_file_does_not_stop_it(
    exported: tuple[int, Path],
) -> None:
    code, output = exported
    assert code == SOME_FAILED
    rows = rows_of(output)
    assert {name: row["passed"] for name, row in rows.items()} == {
        TRANSF: True,
        PORT: True,
        BROKEN: False,
    }
    assert "is cut off: the end of the file is missing" in rows[BROKEN]["error"]
    assert table_of(output)[BROKEN][-1] == rows[BROKEN]["error"]
    assert table_of(output)[TRANSF][-1] == "agrees"
    present = {path.name for path in output.iterdir()}
    assert present == {f"{TRANSF}-fp16", f"{PORT}-fp16", "parity.json", "parity.md"}
    for name in (TRANSF, PORT):
        Bundle.open(output / rows[name]["bundle"], check_hashes=True)


def test_a_row_says_what_was_exported(exported: tuple[int, Path], weights: Path) -> None:
    rows = rows_of(exported[1])
    for name, family, file in ((TRANSF, "original", ".pt"), (PORT, "mmaction2", ".pth")):
        row, loaded = rows[name], load_checkpoint(weights / f"{name}{file}")
        assert (row["family"], row["recipe"], loaded.family) == (family, family, family)
        assert row["backbone"] == loaded.model.config.backbone
        assert (row["visual_prompt"], row["num_frames"]) == ("transf", 8)
        assert row["precision"] == "fp16"
        assert row["source_sha256"] == loaded.sha256
        folder = exported[1] / row["bundle"]
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert row["bundle_bytes"] == sum(path.stat().st_size for path in files)
        recipe = yaml.safe_load((RECIPES / f"{family}.yaml").read_text())
        assert row["tolerances"] == recipe["tolerances"]["fp16"]
        assert row["seconds"] > 0
        cells = table_of(exported[1])[name]
        assert cells[1:6] == [family, row["backbone"], "transf", "8", "fp16"]
        assert cells[6] == f"{row['feature_difference']:.1e} (2e-02)"
        assert cells[9] == "yes"


def test_the_numbers_of_a_row_are_those_of_onnx_runtime_and_pytorch(
    exported: tuple[int, Path], weights: Path
) -> None:
    row, folder = rows_of(exported[1])[TRANSF], exported[1] / f"{TRANSF}-fp16"
    golden = load_file(folder / "golden" / "golden.safetensors")
    model = load_checkpoint(weights / f"{TRANSF}.pt").model
    frames = golden["frames"]
    pixels = torch.from_numpy(frames).permute(0, 1, 4, 2, 3) / 255
    mean, std = (torch.tensor(value).reshape(3, 1, 1) for value in (PIXEL_MEAN, PIXEL_STD))
    with torch.inference_mode():
        features = model.encode_frames(((pixels - mean) / std).flatten(0, 1))
        clips = features.reshape(*frames.shape[:2], -1)
        wanted = {
            "visual": features.numpy(),
            "temporal": model.encode_clips(clips).numpy(),
            "textual": model.encode_text(torch.from_numpy(golden["tokens"])).numpy(),
        }
    inputs = {
        "visual": frames.reshape(-1, *frames.shape[2:]),
        "temporal": clips.numpy(),
        "textual": golden["tokens"],
    }

    def run(graph: str, array: np.ndarray) -> np.ndarray:
        session = onnxruntime.InferenceSession(str(folder / f"{graph}.onnx"))
        return session.run(None, {session.get_inputs()[0].name: array})[0]

    given = {graph: run(graph, array) for graph, array in inputs.items()}
    largest = np.abs(wanted["visual"]).max()
    difference = np.abs(given["visual"] - wanted["visual"]).max()
    assert row["feature_difference"] == pytest.approx(difference / largest, rel=RELATIVE)
    distances = [1 - cosines(given[graph], wanted[graph]).min() for graph in wanted]
    assert row["cosine_distance"] == pytest.approx(max(distances), rel=RELATIVE)
    whole = run("temporal", given["visual"].reshape(clips.shape))
    scores = probabilities(whole, given["textual"])
    right = probabilities(wanted["temporal"], wanted["textual"])
    assert row["score_difference"] == pytest.approx(np.abs(scores - right).max(), rel=RELATIVE)
    assert row["same_top1"] is bool((scores.argmax(axis=1) == right.argmax(axis=1)).all())


def cosines(given: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    a, b = given.astype(np.float64), wanted.astype(np.float64)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def probabilities(video: np.ndarray, text: np.ndarray) -> np.ndarray:
    """With the original's 16 templates: softmax of each, then the mean."""
    logits = 100 * np.einsum("bd,kcd->bkc", video, text.reshape(16, -1, text.shape[-1]))
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return (powers / powers.sum(axis=-1, keepdims=True)).mean(axis=1)


def test_a_run_that_is_stopped_leaves_a_table_of_what_it_did(
    zoo: ModuleType,
    calls: list[Any],
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    export = zoo.export_checkpoint

    def stop(checkpoint: Path, *rest: Any, **arguments: Any) -> object:
        if checkpoint.stem == TRANSF:
            raise KeyboardInterrupt
        return export(checkpoint, *rest, **arguments)

    monkeypatch.setattr(zoo, "export_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        zoo.main([str(weights), "--output", str(tmp_path)])
    assert set(rows_of(tmp_path)) == {BROKEN, PORT}
    assert {path.name for path in tmp_path.iterdir()} == {"parity.json", "parity.md"}


def test_resume_keeps_bundles_and_their_rows(
    zoo: ModuleType, calls: list[Any], weights: Path, output: Path
) -> None:
    before = rows_of(output)
    arguments = [str(weights), "--output", str(output), "--precision", "fp16", "--resume"]
    zoo.main(arguments)
    assert [checkpoint.stem for checkpoint, *_ in calls] == [BROKEN]
    after = rows_of(output)
    assert {name: after[name] for name in (TRANSF, PORT)} == {
        name: before[name] for name in (TRANSF, PORT)
    }


def test_a_bundle_of_another_file_is_not_kept(
    zoo: ModuleType, calls: list[Any], tiny_checkpoints: dict[str, Path], output: Path
) -> None:
    weights = output.parent / "weights"
    weights.mkdir()
    shutil.copy(tiny_checkpoints["meanP"], weights / f"{TRANSF}.pt")
    arguments = [str(weights), "--output", str(output), "--precision", "fp16", "--resume"]
    assert zoo.main(arguments) == SOME_FAILED
    assert not calls
    error = rows_of(output)[TRANSF]["error"]
    assert re.search(r"exists and its sha256 is \w{64}, where this export has \w{64}", error)


def test_a_bundle_that_is_there_is_an_error_without_resume(
    zoo: ModuleType, weights: Path, output: Path
) -> None:
    file = str(weights / f"{TRANSF}.pt")
    arguments = [file, "--output", str(output), "--precision", "fp16"]
    assert zoo.main(arguments) == SOME_FAILED
    assert "exists already; choose another name" in rows_of(output)[TRANSF]["error"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["vit-b-32-9f"], "'vit-b-32-9f' is no file, no folder and no published checkpoint; the "),
        (["empty"], "The folder empty holds no checkpoint (.pt, .pth, .bin, .safetensors)"),
        ([], "No checkpoint is given"),
        (["a/one-8f.pt", "b/one-8f.pt"], "More than one checkpoint would become the bundle one-8f"),
        (["motions", "--recipe", "swin"], "There is no recipe 'swin'; take one of bike, mmaction2"),
        (["motions", "--output", "a/one-8f.pt"], "a/one-8f.pt cannot be written (File exists)"),
        (["motions", "--output", "a/one-8f.pt/zoo"], "cannot be written (Not a directory)"),
        (["motions", "--recipes", "empty"], "empty holds no recipes (*.yaml)"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused_before_anything_is_exported(
    zoo: ModuleType,
    calls: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    for folder in ("a", "b"):
        Path(folder).mkdir()
        Path(folder, "one-8f.pt").write_bytes(b"")
    if "--output" not in arguments:
        arguments = [*arguments, "--output", "zoo"]
    with pytest.raises(SystemExit) as stopped:
        zoo.main(arguments)
    assert stopped.value.code == WRONG_ARGUMENTS
    assert told in capsys.readouterr().err
    assert not calls
    assert not Path("zoo").exists()


def test_a_missing_output_is_refused(zoo: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        zoo.main(["motions"])
    assert "--output is missing" in capsys.readouterr().err


def test_a_published_checkpoint_that_is_not_there_says_where_to_get_it(
    zoo: ModuleType, calls: list[Any], tmp_path: Path
) -> None:
    name = "actionclip-k400-vit-b-16-8f"
    arguments = [name, "motions", "--weights", str(tmp_path), "--output", str(tmp_path / "zoo")]
    assert zoo.main(arguments) == SOME_FAILED
    assert [checkpoint for checkpoint, *_ in calls] == ["motions"]
    error = rows_of(tmp_path / "zoo")[name]["error"]
    assert error.startswith(f"{tmp_path / 'vit-b-16-8f.pth'} is not there; get {name} from https:")
    assert "/actionclip_vit-base-p16-res224-clip-pre_1x1x8_k400-rgb/vit-b-16-8f.pth" in error


def test_a_folder_does_not_hide_a_published_name(
    zoo: ModuleType, calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("motions").mkdir()
    assert zoo.main(["motions", "--output", "zoo"]) == ALL_AGREE
    assert [checkpoint for checkpoint, *_ in calls] == ["motions"]
    Path("motions").rmdir()
    Path("motions").write_bytes(b"weights")
    zoo.main(["motions", "--output", "zoo"])
    assert calls[-1][0] == Path("motions")


def test_a_published_checkpoint_is_found_by_its_usual_name(
    zoo: ModuleType, calls: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "vit-b-32-8f.pth").write_bytes(b"weights")
    arguments = ["actionclip-k400-vit-b-32-8f", "--weights", str(tmp_path)]
    zoo.main([*arguments, "--output", str(tmp_path / "zoo")])
    ((checkpoint, output, _),) = calls
    assert checkpoint == tmp_path / "vit-b-32-8f.pth"
    assert output == tmp_path / "zoo" / "actionclip-k400-vit-b-32-8f-fp32"


def test_a_file_that_is_not_the_published_one_is_refused(
    zoo: ModuleType, calls: list[Any], tmp_path: Path
) -> None:
    name = "mmaction2-k400-vit-b-32-8f"
    published = yaml.safe_load((RECIPES / "mmaction2.yaml").read_text())["published"][name]
    (tmp_path / published["file"]).write_bytes(b"half of it")
    arguments = [name, "--weights", str(tmp_path), "--output", str(tmp_path / "zoo")]
    assert zoo.main(arguments) == SOME_FAILED
    assert not calls
    error = rows_of(tmp_path / "zoo")[name]["error"]
    assert "its sha256 does not begin with 8535b794; get it again from https" in error


def test_the_program_lists_what_is_published(
    zoo: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert zoo.main(["--list"]) == ALL_AGREE
    lines = capsys.readouterr().out.splitlines()
    assert "motions (motions): comes with the package" in lines
    names = [name for path in RECIPES.glob("*.yaml") for name in read(path).get("published", {})]
    assert sorted(line.partition(" ")[0] for line in lines) == sorted(names)


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


def test_every_family_has_a_recipe_and_so_has_the_default_model(zoo: ModuleType) -> None:
    recipes = zoo.read_recipes(RECIPES)
    assert set(recipes) == {*FAMILIES, "motions"}
    for name, recipe in recipes.items():
        assert recipe.family == ("original" if name == "motions" else name)


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_a_recipe_says_why_and_allows_no_more_than_the_export_does(name: str) -> None:
    path = RECIPES / f"{name}.yaml"
    assert re.search(r"(^# .*\n)+tolerances:", path.read_text(), re.M), "no reason is given"
    for precision, tolerances in read(path)["tolerances"].items():
        limit = TOLERANCES[precision]
        assert tolerances["features"] <= limit.difference
        assert tolerances["cosine"] <= (1 - limit.min_cosine) * (1 + np.finfo(np.float32).eps)
        assert tolerances["scores"] <= limit.score


def test_published_checkpoints_have_the_name_and_hash_of_their_address() -> None:
    published = [
        p for path in RECIPES.glob("*.yaml") for p in read(path).get("published", {}).items()
    ]
    assert len({name for name, _ in published}) == len(published)
    for name, entry in published:
        if name == "motions":
            continue
        assert entry["address"].startswith("https://")
        assert entry["address"].endswith(f"/{entry['file']}")
        stated = re.search(r"-([0-9a-f]{8})\.pth$|/([0-9a-f]{64})/", entry["address"])
        assert entry.get("sha256") == (stated and (stated[1] or stated[2]))


@pytest.mark.parametrize(
    ("file", "options"),
    [
        ("vit-b-16-8f.pt", {}),
        ("vit-b-16-8f.pth", {}),
        ("actionclip_vit-base-p32-res224-clip-pre_g8xb16_1x1x8_k400-rgb.pth", {}),
        ("bike-k400-vitb-16-f8.pt", {}),
        ("ViT-B-16.pt", {"family": "openai", "num_frames": 8, "visual_prompt": "meanp"}),
        (
            "open_clip_pytorch_model.bin",
            {"family": "open_clip", "num_frames": 8, "visual_prompt": "meanp"},
        ),
        ("open_clip:ViT-B-32/laion2b_s34b_b79k", {"num_frames": 8, "visual_prompt": "meanp"}),
        ("open_clip:ViT-B-32-quickgelu/openai", {"num_frames": 8, "visual_prompt": "meanp"}),
        ("k400-vitl-14-f8.pt", {"base": "open_clip:ViT-L-14/openai"}),
        ("k400-vitl-14-336-f32.pt", {"base": "open_clip:ViT-L-14-336/openai"}),
        ("of-no-recipe.pt", {}),
    ],
)
def test_a_checkpoint_is_exported_with_the_options_of_its_recipe(
    zoo: ModuleType,
    calls: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    options: dict[str, Any],
) -> None:
    monkeypatch.chdir(tmp_path)
    if ":" not in file:
        Path(file).write_bytes(b"weights")
    zoo.main([file, "--output", "zoo", "--precision", "fp16", "--overwrite"])
    ((checkpoint, _, arguments),) = calls
    assert str(checkpoint) == file
    assert arguments.pop("precision") == "fp16"
    assert arguments.pop("overwrite") is True
    assert arguments.pop("golden_videos") == []
    assert arguments == options


def write_recipe(folder: Path, name: str, **changes: Any) -> Path:
    """Copy the recipes into a folder, with changes to one of them."""
    if not folder.exists():
        shutil.copytree(RECIPES, folder)
    content = read(folder / f"{name}.yaml") | changes
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return folder


def test_a_recipe_of_one_s_own_is_taken_whatever_the_file_is_called(
    zoo: ModuleType, calls: list[Any], tmp_path: Path
) -> None:
    options = {"num_frames": 32, "visual_prompt": "transf"}
    recipes = write_recipe(tmp_path / "recipes", "original", options=options)
    (tmp_path / "model.pt").write_bytes(b"weights")
    given = [str(tmp_path / "model.pt"), "--recipes", str(recipes), "--recipe", "original"]
    zoo.main([*given, "--output", str(tmp_path / "zoo")])
    assert options.items() <= calls[0][2].items()


def test_the_base_of_a_recipe_is_looked_for_beside_the_file_and_among_the_weights(
    zoo: ModuleType, calls: list[Any], tmp_path: Path
) -> None:
    base = {"file": "ViT-B-16.pt", "address": "https://example.org/ViT-B-16.pt"}
    recipes = write_recipe(tmp_path / "recipes", "openai", published={"openai-vit-b-16": base})
    write_recipe(recipes, "text4vis", base={"*-vitb-16-*": "openai-vit-b-16"})
    mine, weights = tmp_path / "mine", tmp_path / "weights"
    for folder in (mine, weights):
        folder.mkdir()
    (mine / "k400-vitb-16-f8.pt").write_bytes(b"weights")
    (mine / "k400-vitb-32-f8.pt").write_bytes(b"weights")
    arguments = [str(mine / "k400-vitb-16-f8.pt"), "--weights", str(weights)]
    arguments += ["--output", str(tmp_path / "zoo"), "--recipes", str(recipes)]
    assert zoo.main(arguments) == SOME_FAILED
    error = rows_of(tmp_path / "zoo")["k400-vitb-16-f8"]["error"]
    assert error.startswith(f"{weights / 'ViT-B-16.pt'} is not there; get openai-vit-b-16 from ")
    for folder in (weights, mine):
        (folder / "ViT-B-16.pt").write_bytes(b"base")
        zoo.main(arguments)
        assert calls[-1][2]["base"] == str(folder / "ViT-B-16.pt")
    zoo.main([str(mine / "k400-vitb-32-f8.pt"), *arguments[1:]])
    error = rows_of(tmp_path / "zoo")["k400-vitb-32-f8"]["error"]
    assert "the recipe text4vis knows it only for *-vitb-16-*; rename the file" in error
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("features", r"a difference of features of \S+ where 1e-08 is allowed"),
        ("cosine", r"1 - cosine of \S+ where 1e-12 is allowed"),
        ("scores", r"a difference of scores of \S+ where 1e-08 is allowed"),
    ],
)
def test_a_bundle_beyond_the_tolerance_of_its_recipe_does_not_pass(
    zoo: ModuleType, weights: Path, output: Path, key: str, told: str
) -> None:
    tolerances = read(RECIPES / "original.yaml")["tolerances"]
    tolerances["fp16"][key] = 1e-12 if key == "cosine" else 1e-8
    recipes = write_recipe(output.parent / "recipes", "original", tolerances=tolerances)
    arguments = [str(weights / f"{TRANSF}.pt"), "--output", str(output), "--resume"]
    assert zoo.main([*arguments, "--precision", "fp16", "--recipes", str(recipes)]) == SOME_FAILED
    row = rows_of(output)[TRANSF]
    assert row["passed"] is False
    assert row["feature_difference"] > 0
    assert re.fullmatch(rf"Beyond the recipe original: {told}\.", row["error"])
    assert table_of(output)[TRANSF][-1] == row["error"]
    assert zoo.main([*arguments, "--precision", "fp16"]) == ALL_AGREE


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tolerance": 1}, "tolerance: Extra inputs are not permitted, given 1"),
        ({"files": "*.pt"}, "files: Input should be a valid list, given '*.pt'"),
        ({"options": {"num_frames": "8"}}, "options.num_frames: Input should be a valid integer"),
        ({"options": {"frames": 8}}, "options.frames: Extra inputs are not permitted"),
        ({"tolerances": {"fp32": {"features": 1}}}, "tolerances.fp32.features: Input should be"),
        ({"licence": None}, "licence: Input should be a valid string, given None"),
        ({"base": {"*": "clip-vit-b-16"}}, "base: 'clip-vit-b-16' is neither published ("),
    ],
)
def test_a_recipe_that_is_not_valid_is_refused_with_its_key(
    zoo: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    told: str,
) -> None:
    recipes = write_recipe(tmp_path / "recipes", "bike", **changes)
    with pytest.raises(SystemExit) as stopped:
        zoo.main(["--list", "--recipes", str(recipes)])
    assert stopped.value.code == WRONG_ARGUMENTS
    assert f"{recipes / 'bike.yaml'} is not a valid recipe: {told}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"family: [", "cannot be read as YAML"),
        (b"family: \xff", "line 1 is not UTF-8 (byte 0xff)"),
        (b"\xff\xfe\x00", "is UTF-16LE, and not UTF-8; save it as UTF-8"),
        (b"- bike", "is not a valid recipe: the file: Input should be a valid dictionary"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(
    zoo: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    told: str,
) -> None:
    (tmp_path / "bike.yaml").write_bytes(content)
    with pytest.raises(SystemExit):
        zoo.main(["--list", "--recipes", str(tmp_path)])
    assert f"{tmp_path / 'bike.yaml'} {told}" in capsys.readouterr().err
