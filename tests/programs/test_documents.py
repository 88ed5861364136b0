"""What the documentation says is so: links lead somewhere, code runs, tables hold."""

from __future__ import annotations

import doctest
import json
import re
import runpy
import shlex
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from serving_programs import running_server
from typer.main import get_command
from typer.testing import CliRunner

import actionclip_deploy
from actionclip_deploy import Client, labels, manifest
from actionclip_deploy.cli import app
from actionclip_deploy.model import ActionClipNetwork, ModelConfig, count_macs, count_parameters
from actionclip_deploy.motions import MotionLabel, render_clip, write_video

pytestmark = pytest.mark.usefixtures("cache_of_the_run")

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *ROOT.glob("tests/**/*.md"),
        *ROOT.glob("train/*.md"),
        *ROOT.glob("export/*.md"),
        *ROOT.glob("benchmarks/*.md"),
        *ROOT.glob("runtimes/**/*.md"),
    ]
)
NAMES = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]

# Where the documents' server listens; a test has one on a free port.
SERVER = "127.0.0.1:8000"
GRPC_SERVER = "127.0.0.1:8001"

# What it watches: something is always recognised.
CAMERAS = """
[[camera]]
name = "door"
source = "test:?fps=40"
labels = "mine"
window = 0.4
thresholds = 0.000001
"""

LABELS = ("a red star moving left", "an orange cross blinking", "an orange star blinking")
# What the README's video shows.
README_VIDEO = MotionLabel("cross", "orange", "blinking")

# A printed figure stands for everything that rounds to it.
HALF_A_HUNDREDTH = 0.005


def _blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text("utf-8"), re.M | re.S)


def _commands(path: Path) -> list[list[str]]:
    """The `actionclip` lines of a document's shell blocks, as lists of words."""
    joined = "".join(_blocks(path, "sh")).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in joined.splitlines()]
    return [words[1:] for words in lines if words and words[0] == "actionclip"]


def _table(heading: str) -> list[list[str]]:
    """Cells of the first table below a heading of the conformance page, head row left out."""
    text = (ROOT / "docs" / "conformance.md").read_text("utf-8").partition(f"## {heading}\n")[2]
    rows = re.search(r"(^\|.*\n)+", text, re.M)
    assert rows, heading
    return [
        [cell.strip() for cell in row.strip("|").split("|")] for row in rows[0].splitlines()[2:]
    ]


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_relative_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            file, _, _ = target.partition("#")
            assert (path.parent / file).exists(), target


@pytest.fixture
def user_folder(
    tiny_checkpoints: dict[str, Path],
    rendered_video: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A folder with the files that the README speaks of."""
    shutil.copy(tiny_checkpoints["Transf"], tmp_path / "vit-b-16-8f.pt")
    shutil.copy(rendered_video, tmp_path / "video.mp4")
    rows = ["id,name", *(f"{number},{label}" for number, label in enumerate(LABELS))]
    (tmp_path / "labels.csv").write_text("\n".join(rows), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_code_of_the_readme_runs_and_prints_what_it_shows(
    user_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    shown = re.findall(r"│ +(?:video.mp4)? +│ (.+?) +│ [\d.]+ │", readme)
    assert len(shown) == 3
    write_video(user_folder / "video.mp4", render_clip(README_VIDEO, seed=1))
    commands = _commands(ROOT / "README.md")
    assert {words[0] for words in commands} == {"export", "labels", "predict", "verify"}
    ranking = []
    for words in commands:
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, (words, result.output)
        if words[0] == "predict" and "--json" in words:
            ranking = [best["label"] for best in json.loads(result.stdout)["predictions"]]
    assert ranking == shown
    capsys.readouterr()
    for block in _blocks(ROOT / "README.md", "python"):
        exec(compile(block, "README.md", "exec"), {})
    assert str(README_VIDEO) in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("*.md")), ids=lambda path: path.stem)
def test_the_python_code_of_the_pages_runs(
    path: Path, user_folder: Path, tiny_bundle: Path
) -> None:
    blocks = _blocks(path, "python")
    if not blocks:
        return
    shutil.copytree(tiny_bundle, user_folder / "bundle")
    words = ["labels", "build", "bundle", "--labels", "labels.csv", "--name", "mine"]
    assert CliRunner().invoke(app, words).exit_code == 0
    if any("embeddings.npz" in block for block in blocks):
        words = ["embed", "bundle", "video.mp4", "--output", "embeddings.npz"]
        assert CliRunner().invoke(app, words).exit_code == 0
    searches = any("client.search(" in block for block in blocks)
    if searches or any('Archive.open("archive")' in block for block in blocks):
        words = ["index", "bundle", "video.mp4", "--output", "archive", "--window", "0.4"]
        words += ["--thumbnails"]
        assert CliRunner().invoke(app, words).exit_code == 0
    with ExitStack() as stack:
        if any(SERVER in block or GRPC_SERVER in block for block in blocks):
            (user_folder / "cameras.toml").write_text(CAMERAS)
            options = ["--watch", "@cameras.toml", "--grpc-port", "0"]
            if searches:
                options += ["--archive", "archive"]
            starting = running_server(Path("bundle"), user_folder / "server", *options)
            server = stack.enter_context(starting)
            with Client(server.url) as client:
                next(client.events("door", last_id="0"))  # it has shown something
            here = {SERVER: server.url.removeprefix("http://"), GRPC_SERVER: server.grpc_address}
            for written, address in here.items():
                blocks = [block.replace(written, address) for block in blocks]
        for block in blocks:
            exec(compile(block, path.name, "exec"), {})


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_commands_in_the_documents_exist_with_their_options(path: Path) -> None:
    for words in _commands(path):
        command = get_command(app)
        rest = list(words)
        while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
            command = command.commands[rest.pop(0)]
        allowed = {
            name for param in command.params for name in (*param.opts, *param.secondary_opts)
        }
        allowed |= {"--help"}
        given = {word.partition("=")[0] for word in rest if word.startswith("-")}
        assert given <= allowed, words


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_python_sessions_print_what_the_documents_show(path: Path) -> None:
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for number, block in enumerate(_blocks(path, "pycon")):
        test = doctest.DocTestParser().get_doctest(block, {}, f"{path.name}:{number}", None, 0)
        assert runner.run(test).failed == 0


def test_the_bundle_format_names_every_field_of_manifest_and_label_bank() -> None:
    text = (ROOT / "docs" / "bundle-format.md").read_text("utf-8")
    records = [
        value
        for module in (manifest, labels)
        for value in vars(module).values()
        if isinstance(value, type)
        and hasattr(value, "model_fields")
        and value.__module__ == module.__name__
    ]
    fields = {field for record in records for field in record.model_fields}
    assert "schema_version" in fields
    assert {field for field in fields if f"`{field}`" not in text} == set()


@pytest.mark.parametrize("name", ["api", "cli"])
def test_a_page_that_the_code_makes_is_what_the_code_says(name: str) -> None:
    program = runpy.run_path(str(ROOT / "scripts" / f"{name}_page.py"))
    # If not: python scripts/api_page.py, or scripts/cli_page.py
    assert (ROOT / "docs" / f"{name}.md").read_text("utf-8") == program["page"]()


def test_the_api_page_documents_every_public_name_in_the_repository_and_on_the_site() -> None:
    text = (ROOT / "docs" / "api.md").read_text("utf-8")
    page = runpy.run_path(str(ROOT / "scripts" / "api_page.py"))["directives"]()
    documented = re.findall(r"^::: actionclip_deploy\.(\w+)$", page, re.M)
    assert sorted(documented) == sorted(actionclip_deploy.__all__)
    shown = re.findall(r"^(?:### |\| `)(\w+)", text, re.M)
    assert set(actionclip_deploy.__all__) <= set(shown)


@pytest.mark.parametrize("row", _table("Parameters and multiply-accumulates"), ids=" ".join)
def test_parameters_and_macs_are_those_of_the_conformance_table(row: list[str]) -> None:
    backbone, num_frames, parameters, gmacs, _ = row
    config = ModelConfig.from_open_clip(
        backbone, visual_prompt="transf", num_frames=int(num_frames)
    )
    assert count_parameters(config)["total"] == int(parameters.replace(",", ""))
    assert abs(count_macs(config) / 1e9 - float(gmacs)) <= HALF_A_HUNDREDTH


@pytest.mark.parametrize("row", _table("Keys of a checkpoint"), ids=" ".join)
def test_checkpoints_have_as_many_tensors_as_the_conformance_table_says(row: list[str]) -> None:
    part, visual_prompt, num_tensors = row
    config = ModelConfig.from_open_clip(
        "ViT-B-32", visual_prompt="meanp" if visual_prompt == "any" else visual_prompt
    )
    with torch.device("meta"):  # names and shapes, no weights
        model = ActionClipNetwork(config)
    module = model.visual_prompt if part == "visual prompt" else model.towers
    assert len(module.state_dict()) == int(num_tensors)
