"""How a verb ends that cannot go on: a full disk, a reader that left, Ctrl-C at any moment."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import Result
from full_disk import NO_BYTECODE, NO_ROOM, keep_files_small, small_files
from made_once import common_folder
from onnx import numpy_helper
from rendering import render
from tiny_graphs import write_tiny_bundle
from training_fakes import toy_config
from typer.testing import CliRunner

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.cli import app
from actionclip_deploy.cli.output import what_was_done
from actionclip_deploy.errors import BundleError
from actionclip_deploy.installation import install_command
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.recognizer import Recognizer
from actionclip_deploy.runtimes import open_runtime

PROGRAM = (sys.executable, "-m", "actionclip_deploy.cli")
# The bundle has no golden outputs, by which `auto` would choose.
ORT = ("--runtime", "onnxruntime")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, fake_tokenizer_file: Path) -> Bundle:
    return tiny_bundle_with_bank(tmp_path_factory.mktemp("bundle"), fake_tokenizer_file)


@pytest.fixture(scope="module")
def fake_tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fakes import fake_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    fake_tokenizer(folder).save(folder / "tokenizer.json")
    return folder / "tokenizer.json"


def tiny_bundle_with_bank(folder: Path, tokenizer: Path) -> Bundle:
    from actionclip_deploy.bundle import hash_files, write_manifest

    def with_words(name: str, model: Any) -> Any:
        if name == "textual":
            rows = np.random.default_rng(3).normal(size=(1000, 16)).astype(np.float32)
            words = next(t for t in model.graph.initializer if t.name == "vocabulary")
            words.CopyFrom(numpy_helper.from_array(rows, "vocabulary"))
        return model

    opened = write_tiny_bundle(folder, change=with_words)
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    write_manifest(folder, opened.manifest.model_copy(update={"files": hash_files(folder)}))
    opened = Bundle.open(folder)
    with open_runtime(opened, num_threads=1) as runtime:
        LabelBank.build(opened, runtime, ["an and", "in an"], name="mine").save(opened)
    return opened


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *map(str, arguments)], stderr=subprocess.PIPE, text=True, check=False, **options
    )


def run_here(*arguments: object, num_bytes: int | None = None) -> Result:
    """Run a verb in this process, which has imported what another one would spend seconds on.

    Args:
        arguments: Of `actionclip`.
        num_bytes: What a file finds room for; None for no limit.
    """
    with nullcontext() if num_bytes is None else small_files(num_bytes):
        return CliRunner().invoke(app, [*map(str, arguments)])


def is_one_sentence(stderr: str, part: str) -> bool:
    lines = stderr.strip().splitlines()
    return len(lines) == 1 and lines[0].startswith("error: ") and part in lines[0]


def is_last_sentence(stderr: str, part: str) -> bool:
    last = stderr.strip().splitlines()[-1]
    return stderr.count("error: ") == 1 and last.startswith("error: ") and part in last


def test_a_flipped_bit_in_a_graph_is_an_error(bundle: Bundle, rendered_video: Path) -> None:
    path = bundle.path / "visual.onnx"
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    try:
        arguments = ("predict", bundle.path, rendered_video, "--json", *ORT)
        done = run_here(*arguments)
        assert (done.exit_code, done.stdout) == (1, "")
        assert is_one_sentence(done.stderr, "visual.onnx does not have the sha256")
        assert "copy the bundle again or export it again" in done.stderr
        unverified = run_here(*arguments, "--no-verify")
        assert unverified.exit_code in (0, 1)  # by what the bit was of
        assert "sha256" not in unverified.stderr
    finally:
        path.write_bytes(content)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "arguments",
    [
        ("predict", "{bundle}", "{video}", "--json", *ORT),
        ("predict", "{bundle}", "{video}", *ORT),
        ("labels", "list", "{bundle}", "--json"),
        ("inspect", "{bundle}"),
        ("--version",),
        ("labels", "build", "{bundle}", "--labels", "{labels}", "--name", "new", "--overwrite"),
        ("benchmark", "--schema"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_printed_is_an_error(
    arguments: tuple[str, ...], bundle: Bundle, rendered_video: Path, tmp_path: Path
) -> None:
    (tmp_path / "labels.txt").write_text("an and\nin an\n")
    folder = bundle.path
    if "build" in arguments:  # the others have one bank to choose from
        folder = shutil.copytree(folder, tmp_path / "bundle")
    places = {"bundle": folder, "video": rendered_video, "labels": tmp_path / "labels.txt"}
    with Path("/dev/full").open("w") as full:
        done = run(*(each.format(**places) for each in arguments), stdout=full)
    assert done.returncode == 1
    assert is_one_sentence(done.stderr, f"Standard output cannot be written (No space {'left'}")
    assert NO_ROOM in done.stderr


def test_a_reader_that_left_is_no_traceback(bundle: Bundle) -> None:
    readable, writable = os.pipe()
    os.close(readable)
    with os.fdopen(writable, "w") as stdout:
        done = run("labels", "list", bundle.path, "--json", stdout=stdout)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    ("verb", "option", "name"),
    [
        ("predict", "--plot", "x.png"),
        ("predict", "--plot", "x.svg"),
        ("evaluate", "--output", "x.json"),
        ("evaluate", "--plot", "x.pdf"),
    ],
)
def test_a_disk_that_fills_up_leaves_nothing(
    verb: str, option: str, name: str, bundle: Bundle, rendered_video: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "written"
    folder.mkdir()
    (tmp_path / "list.txt").write_text(f"{rendered_video} 0\n" * 40)
    subject = {
        "predict": (rendered_video, "--labels", "mine"),
        "evaluate": (tmp_path / "list.txt", "--labels", "mine"),
    }[verb]
    # In a process of its own, where matplotlib may leave half a file open.
    done = run(
        *(verb, bundle.path, *subject, option, folder / name, *ORT),
        stdout=subprocess.DEVNULL,
        preexec_fn=keep_files_small,
    )
    assert done.returncode == 1, done.stderr
    assert is_one_sentence(done.stderr, f"{name} cannot be written (File too large); {NO_ROOM}")
    assert list(folder.iterdir()) == []


@pytest.fixture(scope="module")
def long_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render(tmp_path_factory.mktemp("long") / "long.mp4", num_frames=50)


WINDOWS = ("--labels", "mine", "--window", "0.4", "--threshold", "0.1", *ORT)


@pytest.mark.parametrize(
    ("verb", "option", "name"),
    [
        ("predict", "--matrix", "x.npz"),
        ("predict", "--matrix", "x.parquet"),
        ("predict", "--subtitles", "x.vtt"),
        ("predict", "--subtitles", "x.srt"),
        ("predict", "--plot", "x.png"),
        ("predict", "--annotated", "x.mp4"),
        ("embed", "--output", "x.npz"),
        ("embed", "--output", "x.parquet"),
        ("embed", "--output", "x.safetensors"),
    ],
)
def test_a_timeline_or_embeddings_that_find_no_room_leave_nothing(
    verb: str, option: str, name: str, bundle: Bundle, long_video: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "written"
    folder.mkdir()
    given = ("--timeline", *WINDOWS) if verb == "predict" else ORT
    done = run_here(verb, bundle.path, long_video, option, folder / name, *given, num_bytes=30)
    assert done.exit_code == 1, done.stderr
    assert is_one_sentence(done.stderr, f"{folder / name}")
    assert "File too large" in done.stderr
    assert "make room" in done.stderr
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("sink", ["{}/x.jsonl", "clips:{}/clips", "video:{}/x.mp4"])
def test_events_that_find_no_room_are_counted_and_are_no_success(
    sink: str, bundle: Bundle, long_video: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "written"
    folder.mkdir()
    words = ("watch", bundle.path, long_video, "--sink", sink.format(folder), *WINDOWS)
    done = run_here(*words, num_bytes=30)
    assert done.exit_code == 3, done.stderr
    assert is_last_sentence(done.stderr, f"The sink {sink.format(folder)} gave up ")
    assert f"cannot be written (File too large); {NO_ROOM}" in done.stderr.splitlines()[-1]
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) == 0


def test_results_that_find_no_room_end_with_the_last_whole_line(
    bundle: Bundle, rendered_video: Path, tmp_path: Path
) -> None:
    videos = [tmp_path / f"{number}.mp4" for number in range(4)]
    for video in videos:
        video.symlink_to(rendered_video)
    written = tmp_path / "written" / "x.jsonl"
    written.parent.mkdir()
    given = ("predict", bundle.path, *videos, "--labels", "mine", *ORT)
    size = _size_of_a_record(given, tmp_path)
    done = run_here(*given, "--output", written, num_bytes=2 * size + size // 2)
    assert done.exit_code == 1
    assert is_one_sentence(done.stderr, "x.jsonl cannot be written any more (File too large)")
    assert "make room, then repeat the command with --resume" in done.stderr
    lines = written.read_text().splitlines()
    assert [json.loads(line)["video"] for line in lines] == list(map(str, videos[:2]))
    assert list(written.parent.iterdir()) == [written]
    assert run_here(*given, "--output", written, "--resume").exit_code == 0
    assert len(written.read_text().splitlines()) == len(videos)


def _size_of_a_record(given: tuple[object, ...], folder: Path) -> int:
    assert run_here(*given, "--output", folder / "sized.jsonl").exit_code == 0
    return max(map(len, (folder / "sized.jsonl").read_text().splitlines()))


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_record_that_finds_no_room_in_a_redirected_file_is_told(
    unbuffered: str, bundle: Bundle, rendered_video: Path, tmp_path: Path
) -> None:
    env = {**os.environ, **NO_BYTECODE, "PYTHONUNBUFFERED": unbuffered}
    given = ("predict", bundle.path, rendered_video, "--labels", "mine", "--json", *ORT)
    with (tmp_path / "x.json").open("w") as file:
        done = run(*given, stdout=file, env=env, preexec_fn=lambda: keep_files_small(100))
    assert done.returncode == 1
    assert is_one_sentence(done.stderr, "Standard output cannot be written (File too large)")


@pytest.mark.parametrize("is_there", [False, True])
def test_a_bank_that_finds_no_room_leaves_what_was_there(
    is_there: bool, bundle: Bundle, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle.path, copy)
    if not is_there:
        shutil.rmtree(copy / "labels")
    before = content_of(copy)
    (tmp_path / "labels.txt").write_text("an\nin\nand\n")
    words = ("labels", "build", copy, "--labels", tmp_path / "labels.txt", "--name", "mine")
    done = run_here(*words, "--overwrite", num_bytes=300)
    assert done.exit_code == 1
    assert is_one_sentence(done.stderr, f"{copy}/labels/mine cannot be written (File too large); ")
    assert content_of(copy) == before


def test_a_calibration_that_finds_no_room_leaves_the_bank(
    bundle: Bundle, rendered_video: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle.path, copy)
    before = content_of(copy)
    (tmp_path / "labels.txt").write_text("an and\nin an\nand\n")
    (tmp_path / "list.txt").write_text("".join(f"{rendered_video} {n % 3}\n" for n in range(9)))
    words = ("labels", "calibrate", copy, "--name", "mine", "--labels", tmp_path / "labels.txt")
    done = run_here(*words, "--annotations", tmp_path / "list.txt", *ORT, num_bytes=300)
    assert done.exit_code == 1
    assert is_last_sentence(done.stderr, f"{copy}/labels/mine cannot be written (File too large); ")
    assert content_of(copy) == before


@pytest.mark.usefixtures("tiny_bundle")  # whose traces the memory of the tests has room for
def test_an_export_that_finds_no_room_leaves_nothing(
    tiny_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "written" / "x"
    given = ("export", tiny_checkpoints["Transf"], "--output", output)
    done = run_here(*given, num_bytes=60_000)
    assert done.exit_code == 1
    assert is_one_sentence(done.stderr, f"{output} cannot be written (File too large); {NO_ROOM}")
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("num_bytes", "named"), [(100, "/config.yaml"), (60_000, "/checkpoints/step-00000002")]
)
def test_a_training_run_that_finds_no_room_leaves_no_half_file(
    num_bytes: int, named: str, rendered_video: Path, tmp_path: Path
) -> None:
    (tmp_path / "labels.txt").write_text("an\nin\n")
    (tmp_path / "list.txt").write_text("".join(f"{rendered_video} {n % 2}\n" for n in range(4)))
    output = tmp_path / "run"
    config = toy_config(
        output,
        f"data.annotations={tmp_path / 'list.txt'}",
        f"data.labels={tmp_path / 'labels.txt'}",
        *("schedule.length=2", "schedule.warmup=1", "run.batch_size=4"),
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    done = run_here("train", tmp_path / "config.yaml", num_bytes=num_bytes)
    assert done.exit_code == 1
    expected = f"{output}{named} cannot be written (File too large); {NO_ROOM}"
    assert is_last_sentence(done.stderr, expected)
    # What a run that could begin has written up to here is kept, for --resume.
    left = {path.name for path in output.rglob("*") if not path.name.startswith("events.out.")}
    begun = {"config.yaml", "checkpoints", "tensorboard"}
    assert (output.exists(), left) == ("config" not in named, left & begun)


def test_a_program_that_finds_no_room_leaves_no_half_of_a_compiled_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    (tmp_path / "large.py").write_text(f"numbers = {list(range(5000))}\n")
    command = [sys.executable, "-c", "import large"]
    subprocess.run(command, cwd=tmp_path, check=True, preexec_fn=lambda: keep_files_small(100))
    subprocess.run(command, cwd=tmp_path, check=True)


def content_of(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_a_sentence_wherever_it_is_met(
    code: int, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code), "/somewhere/x")

    monkeypatch.setattr(import_module("actionclip_deploy.cli.labels"), "list_label_banks", fail)
    result = CliRunner().invoke(app, ["labels", "list", str(bundle.path)])
    assert result.exit_code == 1
    assert f"/somewhere/x cannot be written ({os.strerror(code)}); {NO_ROOM}" in result.stderr


# What is not there, or not to be had


@pytest.mark.parametrize(
    ("options", "code", "part"),
    [
        (("--labels", "/x/labels.csv"), 1, "The label file /x/labels.csv cannot be read"),
        (("--output", "x.xlsx"), 2, "give a file that ends in .jsonl"),
        (("--plot", "x.foo"), 2, "give a file that ends in .png"),
        (("--threads", "100000"), 2, "--threads is 100000; with the"),
        (("--workers", "100000"), 2, "--workers is 100000; with the"),
        (("--decode-threads", "100000"), 2, "--workers is 100000; with the"),
        (("--views", "999999999x3"), 2, "--views is '999999999x3' (CLIPSxCROPS)"),
        (("--top-k", "1000000000000"), 2, "--top-k is 1000000000000; it must be 1 or more"),
    ],
    ids=lambda given: given[0] if isinstance(given, tuple) else "",
)
def test_what_cannot_be_had_is_refused_before_the_work(
    options: tuple[str, str], code: int, part: str, bundle: Bundle, rendered_video: Path
) -> None:
    given = ["predict", str(bundle.path), str(rendered_video), "--labels", "mine", *ORT, *options]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == code
    assert part in " ".join(result.stderr.replace("│", " ").split())


LONG = "a" * 300


@pytest.mark.parametrize(
    "arguments",
    [
        ("predict", LONG, "{video}"),
        ("predict", "{bundle}", "{video}", "--labels", "mine", "--output", f"{LONG}.jsonl", *ORT),
        ("predict", "{bundle}", "{video}", "--labels", "mine", "--plot", f"{LONG}.png", *ORT),
        ("classify", "{video}", "--url", "http://127.0.0.1:9", "--labels", LONG),
        ("load", "http://127.0.0.1:9", "--labels", LONG),
        ("export", LONG, "--output", "x"),
        ("inspect", LONG),
        ("verify", LONG),
        ("serve", LONG),
        ("evaluate", LONG, "{video}", "--labels", "mine"),
        ("benchmark", LONG),
    ],
    ids=lambda given: f"{given[0]} {given.index(next(x for x in given if LONG in x))}",
)
def test_a_name_that_is_too_long_is_one_sentence(
    arguments: tuple[str, ...], bundle: Bundle, rendered_video: Path
) -> None:
    places = {"bundle": bundle.path, "video": rendered_video}
    given = [each.format(**places) for each in arguments]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 1
    assert is_one_sentence(result.stderr, LONG if given[0] not in ("classify", "load") else ":9")


def test_a_bundle_of_a_name_that_is_too_long_is_none() -> None:
    with pytest.raises(BundleError, match="aaa does not exist; expected the folder of a bundle"):
        Bundle.open(LONG)


@pytest.mark.parametrize("name", ["", LONG], ids=["empty", "long"])
def test_labels_of_such_a_name_are_not_those_of_the_only_bank(
    name: str, bundle: Bundle, rendered_video: Path
) -> None:
    # As a script gives whose variable is not set.
    words = ["predict", str(bundle.path), str(rendered_video), f"--labels={name}"]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "1000"})
    assert result.exit_code == 2
    assert f"--labels is '{name}', which is neither a label bank of {bundle.path} (it has: " in (
        " ".join(result.stderr.split())
    )


def test_labels_may_come_from_a_pipe_of_the_shell(bundle: Bundle, rendered_video: Path) -> None:
    command = (
        f"'{sys.executable}' -m actionclip_deploy.cli predict '{bundle.path}' '{rendered_video}' "
        r"--labels <(printf 'an\nin\n') --json --runtime onnxruntime"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bank"]["num_labels"] == 2


@pytest.mark.parametrize("value", ["1e308", "nan", "-1", "0", "much", "inf"])
def test_a_cache_of_no_size_is_a_sentence(
    value: str,
    bundle: Bundle,
    rendered_video: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACTIONCLIP_CACHE", str(tmp_path))
    monkeypatch.setenv("ACTIONCLIP_CACHE_GB", value)
    given = ["predict", str(bundle.path), str(rendered_video), "--labels", "mine", *ORT]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 2
    words = " ".join(result.stderr.replace("│", " ").split())
    assert f"ACTIONCLIP_CACHE_GB is '{value}'; it must be a number of GiB above 0" in words


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("onnx", ("build", "{bundle}")),
        ("onnx", ("verify", "{bundle}", "--runtime", "tensorrt")),
        ("onnxruntime", ("predict", "{bundle}", "{video}")),
        ("torch", ("export", "x.pt", "--output", "y")),
        ("torch", ("inspect", "{video}")),
        ("matplotlib", ("predict", "{bundle}", "{video}", "--plot", "x.png", *ORT)),
        ("fastapi", ("serve", "{bundle}")),
        ("httpx", ("classify", "{video}", "--url", "http://127.0.0.1:9")),
        ("psutil", ("benchmark", "{bundle}")),
        ("accelerate", ("train", "{video}")),
    ],
    ids=lambda given: given if isinstance(given, str) else given[0],
)
def test_a_package_that_is_missing_is_one_sentence(
    module: str, arguments: tuple[str, ...], bundle: Bundle, rendered_video: Path
) -> None:
    places = {"bundle": bundle.path, "video": rendered_video}
    given = [each.format(**places) for each in arguments]
    program = (
        f"import sys; sys.modules[{module!r}] = None; sys.argv[1:] = {given!r}; "
        "from actionclip_deploy.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr
    assert done.returncode != 0
    if "Usage:" not in done.stderr and "no label" not in done.stderr.lower():
        assert is_one_sentence(done.stderr, install_command("").partition("[")[0]), done.stderr


# Ctrl-C


@pytest.mark.parametrize("seconds", [0.15, 0.5, 1.0])
@pytest.mark.parametrize(
    "arguments",
    [
        ("predict", "{bundle}", "{video}", *ORT),
        ("doctor",),
        ("labels", "list", "{bundle}"),
        ("export", "motions", "--output", "{new}"),
        ("inspect", "motions"),
        ("serve", "{bundle}"),
        ("evaluate", "{bundle}", "{video}", "--labels", "mine"),
    ],
    ids=lambda given: given[0],
)
def test_an_interruption_is_one_sentence_at_any_moment(
    arguments: tuple[str, ...],
    seconds: float,
    bundle: Bundle,
    rendered_video: Path,
    tmp_path: Path,
) -> None:
    places = {"bundle": bundle.path, "video": rendered_video, "new": tmp_path / "new"}
    process = subprocess.Popen(
        [*PROGRAM, *(each.format(**places) for each in arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=300)[1]
    if "Traceback" in stderr and "actionclip_deploy" not in stderr:
        return  # Python itself was starting, before a line of ours
    assert "Traceback" not in stderr
    if process.returncode in (0, 1, 2, 3) and "Interrupted" not in stderr:
        return  # it had ended before, on its own
    assert process.returncode == 130, stderr
    assert stderr.count("Interrupted before it had") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_entry_point_imports_nothing_that_takes_time() -> None:
    program = (
        "import sys, actionclip_deploy.cli; "
        "print(sorted(m for m in sys.modules if m.startswith('actionclip_deploy')), "
        "[m for m in ('numpy', 'typer', 'pydantic', 'rich', 'typing') if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}; {program}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert found == "['actionclip_deploy', 'actionclip_deploy.cli'] []\n"


def test_an_interrupted_run_says_what_is_done_and_goes_on(
    bundle: Bundle, rendered_video: Path, tmp_path: Path
) -> None:
    num_videos = 400
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(num_videos):
        (folder / f"{number:03}.mp4").hardlink_to(rendered_video)
    output = tmp_path / "results.jsonl"
    words = ["predict", bundle.path, folder, "--output", output, "--workers", "1", *ORT]
    process = subprocess.Popen(
        [*PROGRAM, *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while not (output.exists() and output.read_bytes().count(b"\n")):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=300)[1]
    num_done = output.read_bytes().count(b"\n")
    assert process.returncode == 130, stderr
    assert is_one_sentence(
        stderr,
        f"Interrupted before it had finished: {num_done} of {num_videos} videos are done, with "
        f"their results in {output}; the same command with --resume goes on.",
    ), stderr
    done = run_here(*words, "--resume")
    assert done.exit_code == 0
    assert f"({num_done} were done before)" in done.stdout
    assert output.read_bytes().count(b"\n") == num_videos


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ("predict", "{bundle}", "{video}", "{other}", *ORT),
            "1 of 2 videos were scored; with --output FILE.jsonl results are kept",
        ),
        (
            ("evaluate", "{bundle}", "{list}", "--labels", "mine", *ORT),
            "1 of 2 videos were scored, of which nothing is kept; begin again",
        ),
        (
            ("labels", "build", "{bundle}", "--labels", "{labels}", "--name", "more"),
            "0 of 6 prompts were embedded and the bundle is as it was; repeat the command",
        ),
        (
            ("benchmark", "{bundle}", "--batch", "1"),
            "its last step was: a step; no report was written, so begin again, with fewer",
        ),
    ],
    ids=lambda given: given[0] if isinstance(given, tuple) else "",
)
def test_an_interruption_says_what_was_done_and_how_to_go_on(
    words: tuple[str, ...],
    told: str,
    bundle: Bundle,
    rendered_video: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other, listed, labels = (tmp_path / name for name in ("other.mp4", "list.txt", "labels.txt"))
    other.hardlink_to(rendered_video)
    listed.write_text(f"{rendered_video} 0\n{other} 1\n")
    labels.write_text("an and\nin an\nand\n")
    calls = []

    def interrupt_at_the_second(self: Recognizer, outcome: Any, **options: Any) -> Any:
        calls.append(outcome)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return record(self, outcome, **options)

    def interrupt(*_: Any, on_step: Any = None, **__: Any) -> Any:
        if on_step is not None:
            on_step("a step")
        raise KeyboardInterrupt

    def evaluate(recognizer: Any, samples: Any, *, on_video: Any) -> Any:
        on_video(None)
        raise KeyboardInterrupt

    record = Recognizer.record
    monkeypatch.setattr(Recognizer, "record", interrupt_at_the_second)
    monkeypatch.setattr(import_module("actionclip_deploy.cli.evaluate"), "run_evaluation", evaluate)
    monkeypatch.setattr("actionclip_deploy.benchmarks.run_benchmark", interrupt)
    monkeypatch.setattr("actionclip_deploy.labels.embed_prompts", interrupt)
    places = {
        "bundle": bundle.path,
        "video": rendered_video,
        "other": other,
        "list": listed,
        "labels": labels,
    }
    result = CliRunner().invoke(app, [word.format(**places) for word in words])
    assert result.exit_code == 130
    assert f"error: Interrupted before it had finished: {told}" in result.stderr
    # The next one in this process begins anew.
    assert what_was_done() == ""


def until_there(path: Path, process: subprocess.Popen[str], *, part: str = "") -> None:
    """Wait until a process has written a file."""
    while not (path.exists() and part in path.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


# A verb that waits where its work is: at which moment a signal comes is otherwise left to chance.
WAITING = """
import pathlib, sys, time
import {module} as module
def wait(*_, **__):
    pathlib.Path({there!r}).touch()
    for _ in range(600):  # a signal just before one long sleep would be answered after it
        time.sleep(0.1)
before = module.{name}
module.{name} = {how}
sys.argv[1:] = {words!r}
from actionclip_deploy.cli import main
main()
"""
# With the graphs that this run of the tests has traced before: an interruption waits for none.
FOUND_TRACES = """
import sys
sys.path.insert(0, {tests!r})
import pathlib, torch, traced_graphs
torch.onnx.export = traced_graphs.TraceMemory(pathlib.Path({traced!r})).export
"""
INSTEAD, AFTERWARDS = "wait", "lambda *given, **more: (before(*given, **more), wait())"


@pytest.mark.parametrize(
    ("words", "module", "name", "how", "told"),
    [
        (
            ("labels", "build", "{bundle}", "--labels", "{labels}", "--name", "more"),
            "actionclip_deploy.cli.labels",
            "open_runtime",
            INSTEAD,
            "0 of 6 prompts were embedded and the bundle is as it was; repeat the command",
        ),
        (
            ("labels", "build", "{bundle}", "--labels", "{labels}", "--name", "more"),
            "actionclip_deploy.labels",
            "LabelBank.save",
            AFTERWARDS,
            "the bank is whole, in {bundle}/labels/more; `actionclip labels show` has what",
        ),
        (
            ("verify", "{golden}"),
            "actionclip_deploy.runtimes.parity",
            "_compare_scores",
            INSTEAD,
            "its last step was: Comparing scores with the golden outputs; nothing is known of "
            "this machine yet, and the bundle is as it was; repeat the command.",
        ),
        (
            ("export", "{checkpoint}", "--output", "{new}"),
            "actionclip_deploy.export.pipeline",
            "write_graph",
            INSTEAD,
            "its last step was: Writing the visual graph; nothing was written, so repeat the",
        ),
        (
            ("export", "{checkpoint}", "--output", "{old}", "--overwrite"),
            "actionclip_deploy.export.pipeline",
            "_pass_gate",
            INSTEAD,
            "its last step was: Comparing the graphs with PyTorch; {old} is as it was, so",
        ),
    ],
    ids=["build", "built", "verify", "export", "export again"],
)
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_what_is_interrupted_leaves_nothing_half_written(
    words: tuple[str, ...],
    module: str,
    name: str,
    how: str,
    told: str,
    signum: int,
    bundle: Bundle,
    tiny_bundle: Path,
    tiny_checkpoints: dict[str, Path],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    copy, old = (tmp_path / folder for folder in ("copy", "old"))
    shutil.copytree(bundle.path, copy)
    shutil.copytree(tiny_bundle, old)
    (tmp_path / "labels.txt").write_text("an and\nin an\nand\n")
    places = {
        "bundle": copy,
        "labels": tmp_path / "labels.txt",
        "golden": tiny_bundle,
        "checkpoint": tiny_checkpoints["Transf"],
        "new": tmp_path / "new",
        "old": old,
    }
    before = content_of(tmp_path)
    there = tmp_path / "it waits"
    given = [word.format(**places) for word in words]
    program = WAITING.format(module=module, name=name, how=how, there=str(there), words=given)
    if words[0] == "export":
        traced = common_folder(tmp_path_factory) / "traced"
        tests = Path(__file__).parents[2]
        program = FOUND_TRACES.format(tests=str(tests), traced=str(traced)) + program
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    until_there(there, process)
    process.send_signal(signum)
    stderr = process.communicate(timeout=60)[1]
    there.unlink()
    if signum == signal.SIGINT:
        assert process.returncode == 130, stderr
        sentence = f"Interrupted before it had finished: {told.format(**places)}"
        assert is_last_sentence(stderr, sentence), stderr
    else:
        assert (process.returncode, stderr) == (143, "")
    after = content_of(tmp_path)
    if how == AFTERWARDS:
        LabelBank.load(Bundle.open(copy), "more")
        after = {path: data for path, data in after.items() if "labels/more" not in path}
    assert after == before


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_watch_that_is_ended_ends_its_events_and_says_what_was_done(
    signum: int, bundle: Bundle, tmp_path: Path
) -> None:
    path = tmp_path / "events.jsonl"
    words = ("watch", bundle.path, "test:?fps=40", "--labels", "mine", "--sink", path, *ORT)
    options = ("--window", "0.4", "--threshold", "0.000001")
    process = subprocess.Popen(
        [*PROGRAM, *map(str, (*words, *options))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until_there(path, process, part="new")
    process.send_signal(signum)
    stdout, stderr = process.communicate(timeout=60)
    events = [json.loads(line) for line in path.read_text().splitlines()]
    begun = {event["id"] for event in events if event["kind"] == "new"}
    assert begun == {event["id"] for event in events if event["kind"] == "end"}
    assert stdout.count(" begins ") == stdout.count(" ends ") == len(begun)
    last = stderr.splitlines()[-1]
    noun = "event" if len(begun) == 1 else "events"
    done = f" of 1 source and told of {len(begun)} {noun}; {len(events)} messages went to {path}"
    if signum == signal.SIGINT:
        assert process.returncode == 130, stderr
        assert last.startswith("error: Interrupted: scored ")
        assert last.endswith(f"{done}; the same command watches again.")
    else:
        assert process.returncode == 0, stderr
        assert last.startswith("Scored ")
        assert last.endswith(f"{done}.")
    assert "Traceback" not in stderr


def test_a_second_ctrl_c_ends_a_watch_at_once(bundle: Bundle, tmp_path: Path) -> None:
    there = tmp_path / "it waits"
    given = ["watch", str(bundle.path), "test:", "--labels", "mine", *ORT]
    program = WAITING.format(
        module="actionclip_deploy.watch",
        name="encode_windows",  # a runtime that does not come back
        how=INSTEAD,
        there=str(there),
        words=given,
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    until_there(there, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert is_last_sentence(stderr, "Interrupted before it had finished: scored 0 windows of 1")


def test_the_programs_ends_have_one_sentence_for_the_first_second() -> None:
    program = (
        "import os, signal, actionclip_deploy.cli as cli; "
        "signal.signal(signal.SIGINT, cli.leave_with('Interrupted before it had begun.')); "
        "os.kill(os.getpid(), signal.SIGINT); signal.pause()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 130
    assert done.stderr == "error: Interrupted before it had begun.\n"
