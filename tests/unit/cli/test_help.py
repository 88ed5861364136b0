"""Every verb's help, as it is read in a terminal of 80 columns."""

from __future__ import annotations

import os
import pickle
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer import BadParameter, Context
from typer.main import get_command
from typer.testing import CliRunner, Result

from actionclip_deploy.cli import app
from actionclip_deploy.cli.options import use_device
from actionclip_deploy.cli.verb import in_options
from actionclip_deploy.errors import ArgumentError

# Verbs whose options are so few that they need no panels.
FEW_OPTIONS = 8
PANELS = ["Make a bundle", "Recognise", "Search", "Serve", "Measure", "Look"]


def _verbs(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from _verbs(inner, (*path, name))


VERBS = dict(_verbs(get_command(app), ()))
NAMES = [" ".join(path) or "actionclip" for path in VERBS]


def help_of(path: tuple[str, ...]) -> Result:
    return CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "80"}, prog_name="actionclip")


def panels(text: str) -> dict[str, str]:
    """What stands in each panel, by its title."""
    parts = re.split(r"^╭─ (.+?) ─*╮$", text, flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.parametrize("path", VERBS, ids=NAMES)
def test_help_fits_in_80_columns_and_nothing_is_cut(path: tuple[str, ...]) -> None:
    result = help_of(path)
    assert result.exit_code == 0
    assert [line for line in result.stdout.splitlines() if len(line) > 80] == []
    assert "…" not in result.stdout
    words = set(re.findall(r"--[a-z0-9-]+", result.stdout))
    for param in VERBS[path].params:
        for option in param.opts if param.opts[0].startswith("-") else ():
            assert not option.startswith("--") or option in words, option
        said = " ".join(re.sub("[│╭╮╰╯─]", " ", result.stdout).split())
        first_words = " ".join((getattr(param, "help", None) or "").split()[:2])
        assert first_words in said


@pytest.mark.parametrize("path", VERBS, ids=NAMES)
def test_help_ends_with_examples_that_are_understood(
    path: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = help_of(path).stdout.partition("Example:")[2].strip()
    lines = [line.strip() for line in shown.splitlines() if line.strip()]
    assert lines
    for line in lines:
        program, *words = shlex.split(line)
        assert program == "actionclip"
        command: Any = VERBS[()]
        called = []
        while hasattr(command, "commands") and words and words[0] in command.commands:
            called.append(words.pop(0))
            command = command.commands[called[-1]]
        assert called[: len(path)] == list(path) or path in ((), ("models",))
        command.make_context("actionclip", words, parent=Context(VERBS[()]))


@pytest.mark.parametrize("path", VERBS, ids=NAMES)
def test_the_options_that_most_people_need_come_first(path: tuple[str, ...]) -> None:
    shown = panels(help_of(path).stdout)
    if hasattr(VERBS[path], "commands"):
        return
    titles = [title for title in shown if title != "Arguments"]
    assert titles[0] == "Options"
    first = re.findall(r"^│ (-)", shown["Options"], re.M)
    assert len(first) <= FEW_OPTIONS
    if len(VERBS[path].params) > 2 * FEW_OPTIONS:
        assert len(titles) >= 3


def test_the_verbs_are_listed_by_what_they_are_for() -> None:
    shown = panels(help_of(()).stdout)
    assert list(shown)[: len(PANELS)] == PANELS
    listed = [re.findall(r"^│ (\w+) ", shown[title], re.M) for title in PANELS]
    assert {name for names in listed for name in names} == {p[0] for p in VERBS if len(p) == 1}
    assert listed[0][:3] == ["models", "export", "labels"]


def test_the_list_of_verbs_says_what_each_says_of_itself() -> None:
    listed = {each.name: each.text for each in VERBS[()].describe_verbs(Context(VERBS[()]))}
    for name, text in listed.items():
        assert text == " ".join(VERBS[(name,)].help.partition("\n\n")[0].split())


@pytest.mark.parametrize("words", [["--help"], ["models"], ["inspct"]])
def test_a_verb_is_imported_when_it_is_called(words: list[str]) -> None:
    code = (
        "import sys\nfrom actionclip_deploy.cli import app\n"
        "try:\n    app(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print(*(name for name in sys.modules if name.startswith('actionclip_deploy.cli.')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    )
    imported = {name.rpartition(".")[2] for name in done.stdout.splitlines()[-1].split()}
    assert imported & {path[0] for path in VERBS if path} == set(words) & {"models"}


@pytest.mark.parametrize("path", VERBS, ids=NAMES)
def test_an_option_has_one_name_and_one_meaning(path: tuple[str, ...]) -> None:
    old = {"--frames", "--decode-threads", "--api-key-file"}
    names = {name for param in VERBS[path].params for name in param.opts}
    assert not names & old


SCORING = [("predict",), ("classify",), ("evaluate",), ("serve",), ("load",), ("labels", "build")]
RUNNING = [
    *(("predict",), ("embed",), ("evaluate",), ("serve",), ("verify",), ("benchmark",), ("build",)),
    *(("labels", "build"), ("labels", "calibrate")),
]


@pytest.mark.parametrize(
    ("paths", "options"),
    [
        (SCORING, ("--labels", "--label", "--templates", "--template", "--allow-unknown-words")),
        (RUNNING, ("--device",)),
    ],
    ids=["labels", "device"],
)
def test_what_verbs_share_is_the_same_option(
    paths: list[tuple[str, ...]], options: tuple[str, ...]
) -> None:
    for option in options:
        found = [
            next((param for param in VERBS[path].params if option in param.opts), None)
            for path in paths
        ]
        assert None not in found, (option, found)
        said = {(param.metavar, param.help) for param in found if param is not None}
        # The server takes --labels several times, and says so.
        assert len(said) <= (2 if option == "--labels" else 1), said


def test_the_runtime_is_auto_unless_a_verb_says_why_it_is_not() -> None:
    for path, verb in VERBS.items():
        for param in verb.params:
            if "--runtime" in param.opts and param.default != "auto":
                assert "Not auto" in param.help, path


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ("predict", "b", "v", "--decode-threads", "0"),
            "--decode-threads is now called --workers",
        ),
        (("benchmark", "--frames=0"), "--frames is now called --num-frames"),
        (("build", "b", "--frames", "0"), "--frames is now called --num-frames"),
        (("classify", "v", "--api-key-file"), "--api-key-file is now called --api-keys"),
    ],
    ids=lambda given: given[0] if isinstance(given, tuple) else "",
)
def test_an_old_name_works_and_warns_in_one_line(words: tuple[str, ...], told: str) -> None:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 2  # since its value is wrong, which the new name is told of
    lines = result.stderr.splitlines()
    assert lines[0] == f"warning: {told}; the old name will go."
    assert told.rpartition(" ")[2] in result.stderr.partition("\n")[2]
    assert "now called" not in result.stdout


def test_what_looks_like_an_old_name_and_is_a_value_is_left_alone() -> None:
    words = ["predict", "b", "v", "--label", "--frames", "--labels", "x"]
    result = CliRunner().invoke(app, words)
    assert "now called" not in result.stderr
    words = ["predict", "nowhere", "--", "--decode-threads"]
    assert "now called" not in CliRunner().invoke(app, words).stderr


# What options do


@pytest.mark.parametrize(
    ("visible", "device", "seen"),
    [
        (None, "cuda", None),
        (None, "cuda:0", "0"),
        (None, "cuda:3", "3"),
        ("2,5", "cuda:1", "5"),
        ("2,5", "cpu", "2,5"),
        ("GPU-8f, GPU-1c", "cuda:1", "GPU-1c"),
    ],
)
def test_a_gpu_is_chosen_among_those_that_are_visible(
    visible: str | None, device: str, seen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "as it was before the test")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert use_device(device) == device.partition(":")[0]
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == seen


@pytest.mark.parametrize("device", ["gpu", "gpu:1", "npu"])
def test_devices_of_intel_are_passed_on(device: str) -> None:
    assert use_device(device) == device


@pytest.mark.parametrize(
    ("visible", "device", "told"),
    [
        (None, "cpu:1", "give cpu, cuda, or cuda:1 for the second GPU"),
        (None, "tpu", "give cpu, cuda, or cuda:1 for the second GPU; of Intel gpu, gpu:1 or npu"),
        (None, "npu:1", "of Intel gpu, gpu:1 or npu"),
        ("0", "cuda:1", "CUDA_VISIBLE_DEVICES shows 1 GPUs"),
    ],
)
def test_a_device_that_there_cannot_be_is_told(
    visible: str | None, device: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(BadParameter, match=re.escape(told)):
        use_device(device)


@pytest.mark.parametrize(
    ("path", "argument", "told"),
    [
        (("predict",), "num_threads", "--threads is 0"),
        (("predict",), "method", "--scores is 0"),
        (("predict",), "region", "--resize is 0"),
        (("evaluate",), "format", "--format is 0"),
        (("serve",), "max_delay_ms", "--max-delay-ms is 0"),
        (("benchmark",), "duration_seconds", "--duration is 0"),
        (("predict",), "something_else", "something_else is 0"),
        (("predict",), "videos", "videos is 0"),
    ],
)
def test_what_is_wrong_with_an_argument_is_told_by_its_option(
    path: tuple[str, ...], argument: str, told: str
) -> None:
    error = ArgumentError(argument, "is 0; it must be more.")
    assert str(error) == f"{argument} is 0; it must be more."
    assert in_options(error, VERBS[path]) == f"{told}; it must be more."
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
