from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from full_disk import small_files
from schemas import check_json
from typer.testing import CliRunner

from actionclip_deploy.cli import app
from actionclip_deploy.command_records import (
    BuiltEngineRecord,
    EngineParityRecord,
    StoredEngineRecord,
)
from actionclip_deploy.keyed_store import UNFINISHED


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_engines_are_built_listed_verified_and_removed(
    tensorrt: Any, tiny_fp16_bundle: Path
) -> None:
    built = run("build", tiny_fp16_bundle, "--profile", "latency", "--json")
    assert built.exit_code == 0, built.output
    check_json(BuiltEngineRecord, json.loads(built.stdout))
    name = json.loads(built.stdout)["engine"]
    (listed,) = json.loads(run("engines", "list", "--json").stdout)
    check_json(StoredEngineRecord, listed)
    assert listed["name"] == name
    assert listed["size_bytes"] > 0
    printed = run("verify", tiny_fp16_bundle, "--runtime", "tensorrt", "--json").stdout
    check_json(EngineParityRecord, json.loads(printed))
    verified = run("verify", tiny_fp16_bundle, "--runtime", "tensorrt")
    assert verified.exit_code == 0
    assert "is verified on this device" in verified.stdout
    assert run("engines", "remove", name[:8]).exit_code == 0
    assert json.loads(run("engines", "list", "--json").stdout) == []


def test_the_table_says_in_what_an_engine_computes(tensorrt: Any, tiny_fp16_bundle: Path) -> None:
    built = run("build", tiny_fp16_bundle)
    assert built.exit_code == 0
    assert "99% fp16" in built.stdout or "100% fp16" in built.stdout
    assert "verified on this device" in built.stdout.replace("\n", " ")


def test_engines_that_disagree_exit_with_4_and_the_bad_part_is_named(
    tensorrt: Any, tiny_fp16_bundle: Path
) -> None:
    tensorrt.state.faults = {"wrong"}
    tensorrt.state.strikes = lambda model, _: any(
        "tower.blocks.0." in tensor.name for tensor in model.graph.initializer
    )
    built = run("build", tiny_fp16_bundle, "--profile", "latency")
    assert built.exit_code == 4
    assert "disagrees with PyTorch" in built.stderr
    words = ("verify", tiny_fp16_bundle, "--runtime", "tensorrt", "--bisect")
    printed = json.loads(run(*words, "--json").stdout)
    check_json(EngineParityRecord, printed)
    assert printed["faults"]
    searched = run(*words)
    assert searched.exit_code == 4
    assert "The first bad part is blocks.0" in searched.stdout


def test_a_repair_that_succeeds_exits_with_0_and_tells_what_was_kept(
    tensorrt: Any, tiny_fp16_bundle: Path
) -> None:
    tensorrt.state.faults = {"wrong"}
    tensorrt.state.strikes = lambda model, built: (
        model.graph.input[0].name == "frames" and built["level"] > 1
    )
    built = run("build", tiny_fp16_bundle, "--profile", "latency", "--repair", "--json")
    assert built.exit_code == 0, built.output
    repair = json.loads(built.stdout)["record"]["repair"]
    assert repair["kept"] == "optimization level 1"


def test_an_engine_in_another_precision_exits_with_1(tensorrt: Any, tiny_fp16_bundle: Path) -> None:
    tensorrt.state.faults = {"silently fp32"}
    built = run("build", tiny_fp16_bundle, "--profile", "latency")
    assert built.exit_code == 1
    assert "in another precision than its graph asks for" in built.stderr


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--runtime", "cuda"), 2, "it must be tensorrt or"),
        (("--profile", "8,4,1"), 2, "MIN,OPT,MAX"),
        (("--workspace", "0"), 2, "a number of GiB above 0"),
        (("--workspace", "nan"), 2, "a number of GiB above 0"),
        (("--workspace", "1e308"), 2, "a number of GiB above 0, and 1,024 at most"),
        (("--precision", "int8"), 1, "export the checkpoint with --precision int8"),
        (("--target", "sm86"), 1, "use --runtime tensorrt-rtx"),
        (("--num-frames", "99"), 1, "has positions for"),
        (("--device", "cpu"), 2, "--device is cpu, and TensorRT's engines run on NVIDIA's"),
    ],
)
def test_wrong_options_are_told_and_build_nothing(
    tensorrt: Any, tiny_fp16_bundle: Path, options: tuple[str, ...], code: int, words: str
) -> None:
    built = run("build", tiny_fp16_bundle, *options)
    assert built.exit_code == code
    text = " ".join(built.stderr.replace("│", " ").split())
    assert words in text
    assert tensorrt.state.num_builds == 0


def test_engines_of_another_version_are_pruned(
    tensorrt: Any, tiny_fp16_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("build", tiny_fp16_bundle, "--profile", "latency").exit_code == 0
    assert "0 engines were removed, 1 are left" in run("engines", "prune").stdout
    monkeypatch.setattr(tensorrt, "__version__", "10.16.1")
    assert "1 engines were removed, 0 are left" in run("engines", "prune").stdout


def test_engines_that_find_no_room_leave_nothing(
    tensorrt: Any, tiny_fp16_bundle: Path, tmp_path: Path
) -> None:
    with small_files():
        built = run("build", tiny_fp16_bundle, "--profile", "latency")
    assert built.exit_code == 1
    words = " ".join(built.stderr.split())
    assert f"cannot be kept in {tmp_path / 'cache' / 'engines'} (File too large); " in words
    assert not [path for path in (tmp_path / "cache").rglob("*.plan") if path.is_file()]
    assert not list((tmp_path / "cache" / "engines").glob(f"{UNFINISHED}*"))


def test_a_search_for_a_fault_is_for_engines(tiny_fp16_bundle: Path) -> None:
    searched = run("verify", tiny_fp16_bundle, "--bisect")
    assert searched.exit_code == 2
    assert "--bisect is for engines" in searched.stderr
