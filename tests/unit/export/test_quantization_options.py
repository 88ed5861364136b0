from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actionclip_deploy.export import quantization
from actionclip_deploy.export.quantization import Fp8Options, Int8Options, exact_weight_range


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "both"}, "recipe is 'both'; it must be one of None, dynamic, static"),
        ({"weight_range": "half"}, "weight_range is 'half'; it must be one of reduced, full"),
        ({"recipe": "static"}, "The recipe static needs calibration videos, .*; give some, or"),
        ({"num_clips": 0}, "num_clips is 0; it must be 1 or more"),
        ({"max_drop": -0.1}, "max_drop is -0.1; it must be 0 to 100 points"),
        ({"max_drop": float("nan")}, "max_drop is nan; it must be 0 to 100 points"),
        ({"min_cosine": 1.0}, "min_cosine is 1.0; it must be between 0 and 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Int8Options(**options)


def test_a_rest_in_fp16_needs_the_recipe_of_gpus() -> None:
    with pytest.raises(ValueError, match=r"recipe dynamic is for CPUs .* give calibration videos"):
        Int8Options(rest="fp16")
    videos = (Path("video.mp4"),)
    assert Int8Options(calibration=videos, rest="fp16").rest == "fp16"
    assert Int8Options(calibration=videos).rest == "fp32"
    with pytest.raises(ValueError, match="rest is 'bf16'; it must be one of fp32, fp16"):
        Int8Options(calibration=videos, rest="bf16")  # type: ignore[arg-type]


def test_fp8_needs_calibration_videos() -> None:
    with pytest.raises(ValueError, match=r"fp8 needs calibration videos, .* or take the precision"):
        Fp8Options()
    options = Fp8Options(calibration=(Path("video.mp4"),))
    assert (options.precision, options.rest) == ("fp8", "fp16")
    assert (options.chosen_recipe, options.weight_range) == ("static", None)


def test_calibration_videos_choose_the_recipe_unless_it_is_named() -> None:
    videos = (Path("video.mp4"),)
    assert Int8Options().chosen_recipe == "dynamic"
    assert Int8Options(calibration=videos).chosen_recipe == "static"
    assert Int8Options(calibration=videos, recipe="dynamic").chosen_recipe == "dynamic"


@pytest.mark.parametrize(
    ("architecture", "flags", "expected"),
    [
        ("x86_64", ["avx2", "avx512f"], "reduced"),
        ("x86_64", ["avx2", "avx512_vnni"], "full"),
        ("x86_64", ["avx2", "avx_vnni"], "full"),
        ("aarch64", ["asimd"], "full"),
        ("x86_64", [], "reduced"),
    ],
)
def test_full_weights_need_a_cpu_that_adds_without_saturation(
    architecture: str, flags: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = {"architecture": architecture, "cpu_flags": flags}
    monkeypatch.setattr(quantization, "describe_machine", lambda: machine)
    assert exact_weight_range() == expected
    Int8Options(weight_range="reduced").check_machine()
    if expected == "full":
        Int8Options(weight_range="full").check_machine()
    else:
        with pytest.raises(ValueError, match=r"this CPU has no VNNI.*take reduced weights, or"):
            Int8Options(weight_range="full").check_machine()
