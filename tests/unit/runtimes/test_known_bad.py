from __future__ import annotations

import re

import pytest

from actionclip_deploy.runtimes.advice import KNOWN_BAD, KnownBad, find_known_bad
from actionclip_deploy.runtimes.machine import version_numbers


def names(*given: str | None, **options: str | None) -> set[str]:
    return {row.name for row in find_known_bad(*given, **options)}  # type: ignore[arg-type]


def test_rows_have_names_of_their_own_and_rising_versions() -> None:
    assert len({row.name for row in KNOWN_BAD}) == len(KNOWN_BAD)
    for row in KNOWN_BAD:
        assert row.before is None or version_numbers(row.first) < version_numbers(row.before)


@pytest.mark.parametrize("row", KNOWN_BAD, ids=lambda row: row.name)
def test_every_row_is_one_sentence_with_links_to_issues(row: KnownBad) -> None:
    assert row.text.endswith(".")
    assert "; " in row.text
    for link in row.issues:
        assert re.fullmatch(r"https://github\.com/[\w-]+/[\w-]+/(issues|pull)/\d+", link)
        assert link in row.text


@pytest.mark.parametrize(
    ("version", "capability", "precision", "expected"),
    [
        # JetPack 6.2 on Orin.
        ("10.3.0", "8.7", "fp16", {"10.3-fp16-vit", "10.3-dynamic-transformer"}),
        ("10.3.0.30", "8.7", "fp32", {"10.3-dynamic-transformer"}),
        ("10.4.0", "8.6", "fp32", {"10.3-dynamic-transformer", "10.4-vit"}),
        ("10.5.0", "8.7", "fp16", set()),
        ("10.7.0", "8.7", "fp16", {"10.7-fused-attention"}),
        ("10.11.0.33", "8.9", "fp32", {"10.11-batch"}),
        # JetPack 7.1 on Thor, and the same version on a server.
        ("10.13.3.9", "11.0", "fp16", {"10.13.3-thor-qkv"}),
        ("10.13.3.9", "9.0", "fp16", set()),
        ("10.13.2", "11.0", "fp16", set()),
        ("10.16.1", "11.0", "fp16", set()),
        # GeForce RTX 50.
        ("10.16.1.11", "12.0", "fp16", {"sm120-fused-attention"}),
        ("10.16.1.11", "12.0", "bf16", {"sm120-fused-attention"}),
        ("10.16.1.11", "12.0", "fp32", set()),
        ("11.0.0", "12.0", "fp16", set()),
        ("11.1.0.106", "9.0", "fp32", {"11.1-batch", "11.1-rows"}),
        ("11.2.1.2", "9.0", "fp16", {"11.2-fusion"}),
        ("11.4.0.106", "9.0", "fp16", set()),
    ],
)
def test_a_combination_finds_its_rows(
    version: str, capability: str, precision: str, expected: set[str]
) -> None:
    assert names(version, capability, precision=precision) == expected


def test_without_a_precision_the_rows_of_all_are_found() -> None:
    assert names("10.16.1", "12.0") == {"sm120-fused-attention"}


def test_without_a_gpu_the_rows_of_one_kind_are_left_out() -> None:
    assert names("10.16.1") == set()
    assert names("10.3.0") == {"10.3-fp16-vit", "10.3-dynamic-transformer"}


@pytest.mark.parametrize(
    ("version", "jetpack", "expected"),
    [
        ("11.4.0.106", "7.2.x", {"jetpack-11"}),
        ("11.4.1", "7.2.x", {"jetpack-11.4.1"}),
        ("11.4.1", "6.1 to 6.2.x", {"jetpack-11.4.1"}),
        ("11.4.1", "7.2.2", set()),
        ("11.4.0", None, set()),
        ("10.16.2", "7.2.1", set()),
    ],
)
def test_tensorrt_11_on_a_jetson_is_known(
    version: str, jetpack: str | None, expected: set[str]
) -> None:
    assert names(version, "8.7", jetpack=jetpack) == expected


def test_tensorrt_for_rtx_has_rows_of_its_own() -> None:
    assert names("1.7.1", "7.5", precision="fp32", runtime="tensorrt-rtx") == {"rtx-turing-fp32"}
    assert names("1.7.1", "8.6", precision="fp8", runtime="tensorrt-rtx") == {"rtx-fp8"}
    assert names("1.7.1", "8.9", precision="fp8", runtime="tensorrt-rtx") == set()
    assert names("1.7.1", "8.6", precision="fp16", runtime="tensorrt-rtx") == set()


def test_a_version_without_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"version is 'newest'; it must begin with a number, as"):
        find_known_bad("newest")
