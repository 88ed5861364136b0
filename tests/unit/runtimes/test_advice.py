from __future__ import annotations

import re
from pathlib import Path

import pytest

from actionclip_deploy.installation import install_command
from actionclip_deploy.runtimes.advice import (
    Facts,
    KnownBad,
    find_known_bad,
    find_problems,
    read_known_bad,
    recommend,
)
from actionclip_deploy.runtimes.machine import Gpu, Gpus, Jetson, TensorRT, version_numbers

ROOT = Path(__file__).resolve().parents[3]
GIB = 2**30

ORIN = Gpus((Gpu("Orin", "8.7", 8 * GIB),), "12.6")
THOR = Gpus((Gpu("NVIDIA Thor", "11.0", 128 * GIB),), "13.0")
RTX_2080 = Gpus((Gpu("NVIDIA GeForce RTX 2080", "7.5", 8 * GIB),), "13.0")
RTX_4070 = Gpus((Gpu("NVIDIA GeForce RTX 4070", "8.9", 12 * GIB),), "13.0")
RTX_5090 = Gpus((Gpu("NVIDIA GeForce RTX 5090", "12.0", 32 * GIB),), "13.0")
SERVER = Gpus((Gpu("NVIDIA H100 80GB HBM3", "9.0", 80 * GIB),), "13.0")
PASCAL = Gpus((Gpu("NVIDIA GeForce GTX 1080", "6.1", 8 * GIB),), "12.9")
NONE = Gpus(missing_because="the CUDA driver is not installed")

JETPACK_6 = Jetson("NVIDIA Jetson Orin Nano Developer Kit", "36.4.4", "6.2.1", "15W (0)")
JETPACK_7 = Jetson("NVIDIA Jetson AGX Thor Developer Kit", "38.4.0", "7.1", "MAXN (0)")
JETPACK_5 = Jetson("NVIDIA Jetson AGX Orin Developer Kit", "35.4.1", "5.x", None)

V10_3 = TensorRT("10.3.0", None, {"libnvinfer.so.10": "10.3.0"})
V10_13 = TensorRT("10.13.3.9", None, {"libnvinfer.so.10": "10.13.3"})
V10_16 = TensorRT("10.16.1.11", None, {"libnvinfer.so.10": "10.16.1"})
V8 = TensorRT("8.6.1", None, {"libnvinfer.so.8": "8.6.1"})
RTX = TensorRT("1.7.1.116", None, {"libtensorrt_rtx.so.1": "1.7.1"})


def test_an_orin_with_jetpack_6_builds_fp16_engines_and_verifies_them() -> None:
    recipe = recommend(Facts(gpus=ORIN, jetson=JETPACK_6, tensorrt=V10_3))
    assert (recipe.runtime, recipe.precision) == ("tensorrt", "fp16")
    assert recipe.environment == "runtimes/tensorrt"
    assert "10.3.0" in recipe.why
    assert "TensorRT 10.7 or later is the surer way" in recipe.why
    assert any("Dockerfile.jetpack6" in line for line in recipe.commands)
    assert "actionclip build bundle --runtime tensorrt" in recipe.commands
    assert recipe.commands[-1] == "actionclip verify bundle --runtime tensorrt"


def test_a_python_that_does_not_see_jetpack_s_tensorrt_is_told_how_to() -> None:
    recipe = recommend(Facts(gpus=ORIN, jetson=JETPACK_6))
    assert recipe.runtime == "tensorrt"
    assert "--system-site-packages" in recipe.why


def test_a_thor_with_jetpack_7_is_told_of_its_fusion_and_the_container() -> None:
    recipe = recommend(Facts(gpus=THOR, jetson=JETPACK_7, tensorrt=V10_13))
    assert (recipe.runtime, recipe.precision) == ("tensorrt", "fp16")
    assert "fuse wrongly on Thor" in recipe.why
    assert any("Dockerfile.jetpack7" in line for line in recipe.commands)


def test_a_jetson_with_jetpack_5_stays_on_the_cpu() -> None:
    facts = Facts(cpu_flags=("asimd", "asimddp"), gpus=ORIN, jetson=JETPACK_5, tensorrt=V8)
    recipe = recommend(facts)
    assert (recipe.runtime, recipe.precision) == ("onnxruntime", "int8")
    assert "below 10.3, which is too old; update to JetPack 6" in recipe.why


def test_a_desktop_with_an_rtx_card_takes_tensorrt_for_rtx() -> None:
    recipe = recommend(Facts(gpus=RTX_4070))
    assert (recipe.runtime, recipe.precision) == ("tensorrt-rtx", "fp16")
    assert recipe.environment == "runtimes/tensorrt-rtx"
    assert install_command("rtx") in recipe.commands


def test_what_is_installed_is_not_installed_again() -> None:
    recipe = recommend(Facts(gpus=RTX_4070, tensorrt_rtx=RTX))
    assert recipe.runtime == "tensorrt-rtx"
    assert not any("pip install" in line for line in recipe.commands)
    assert "1.7.1.116 is installed" in recipe.why


def test_a_desktop_with_tensorrt_uses_it() -> None:
    recipe = recommend(Facts(gpus=RTX_5090, tensorrt=V10_16, tensorrt_rtx=RTX))
    assert (recipe.runtime, recipe.environment) == ("tensorrt", "runtimes/tensorrt")


def test_a_server_without_tensorrt_takes_the_container() -> None:
    recipe = recommend(Facts(gpus=SERVER))
    assert (recipe.runtime, recipe.precision) == ("tensorrt", "fp16")
    assert any(
        line.startswith("docker build -f runtimes/tensorrt/Dockerfile ") for line in recipe.commands
    )


def test_a_tensorrt_that_is_too_old_is_not_used() -> None:
    assert recommend(Facts(gpus=RTX_4070, tensorrt=V8)).runtime == "tensorrt-rtx"


def test_a_gpu_that_is_too_old_is_left_to_onnxruntime() -> None:
    recipe = recommend(Facts(gpus=PASCAL))
    assert (recipe.runtime, recipe.execution_provider) == ("onnxruntime", "cuda")
    assert recipe.precision == "fp32"
    assert recipe.commands[-1] == "actionclip verify bundle --device cuda"


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        (("avx2", "avx512_vnni"), "int8"),
        (("avx2", "avx_vnni"), "int8"),
        (("asimd", "asimddp", "i8mm"), "int8"),
        (("avx2", "fma"), "fp32"),
        ((), "fp32"),
    ],
)
def test_a_machine_without_gpu_takes_int8_where_its_cpu_adds_it_up(
    flags: tuple[str, ...], precision: str
) -> None:
    recipe = recommend(Facts(cpu_flags=flags, gpus=NONE))
    assert (recipe.runtime, recipe.execution_provider) == ("onnxruntime", "cpu")
    assert recipe.precision == precision
    assert "the CUDA driver is not installed" in recipe.why


@pytest.mark.parametrize(("name", "device"), [("GPU", "gpu"), ("GPU.0", "gpu:0")])
def test_a_gpu_of_intel_is_left_to_openvino(name: str, device: str) -> None:
    recipe = recommend(Facts(gpus=NONE, openvino=("CPU", name)))
    assert (recipe.runtime, recipe.precision) == ("openvino", "fp16")
    assert recipe.commands[-1] == (f"actionclip verify bundle --runtime openvino --device {device}")
    assert recommend(Facts(gpus=RTX_4070, openvino=("CPU", name))).runtime == "tensorrt-rtx"


def test_bf16_is_mentioned_where_the_cpu_multiplies_it() -> None:
    told = "`--runtime openvino --precision bf16`"
    assert told in recommend(Facts(cpu_flags=("avx512_vnni", "avx512_bf16"), gpus=NONE)).why
    assert told not in recommend(Facts(cpu_flags=("avx512_vnni",), gpus=NONE)).why


EVERY = [
    Facts(gpus=NONE, openvino=("CPU", "GPU")),
    Facts(gpus=ORIN, jetson=JETPACK_6, tensorrt=V10_3),
    Facts(gpus=ORIN, jetson=JETPACK_5),
    Facts(gpus=THOR, jetson=JETPACK_7),
    Facts(gpus=RTX_4070),
    Facts(gpus=SERVER),
    Facts(gpus=PASCAL),
    Facts(),
]


@pytest.mark.parametrize("facts", EVERY, ids=range(len(EVERY)))
def test_every_recipe_is_one_to_three_sentences_and_names_what_there_is(facts: Facts) -> None:
    recipe = recommend(facts)
    assert 1 <= len(re.findall(r"[.](?= |$)", recipe.why)) <= 3
    assert (ROOT / recipe.environment / "README.md").is_file()
    for file in re.findall(r"-f (\S+)", " ".join(recipe.commands)):
        assert (ROOT / file).is_file()


def test_problems_are_those_of_what_is_installed() -> None:
    problems = find_problems(Facts(gpus=ORIN, jetson=JETPACK_6, tensorrt=V10_3))
    assert {row.id for row in problems} == {"10.3-fp16-vit", "10.3-dynamic-transformer"}
    problems = find_problems(Facts(gpus=RTX_5090, tensorrt=V10_16, tensorrt_rtx=RTX))
    assert {row.id for row in problems} == {"sm120-fused-attention"}
    library_alone = TensorRT(None, "it is not installed", {"libnvinfer.so.10": "10.4.0"})
    problems = find_problems(Facts(gpus=SERVER, tensorrt=library_alone))
    assert "10.4-vit" in {row.id for row in problems}
    assert find_problems(Facts(gpus=SERVER)) == ()


def test_a_bundle_for_rtx_20_is_exported_without_fp32_products() -> None:
    exports = [
        recommend(Facts(gpus=gpus, tensorrt_rtx=RTX)).commands[0] for gpus in (RTX_2080, RTX_4070)
    ]
    assert [line.endswith("--precision fp16 --text-precision fp16") for line in exports] == [
        True,
        False,
    ]


def names(*given: str | None, **options: str | None) -> set[str]:
    return {row.id for row in find_known_bad(*given, **options)}  # type: ignore[arg-type]


def test_rows_have_names_of_their_own_and_rising_versions() -> None:
    assert len({row.id for row in read_known_bad()}) == len(read_known_bad())
    for row in read_known_bad():
        assert row.before is None or version_numbers(row.first) < version_numbers(row.before)


def version_before(version: str) -> str:
    """A version below another one that no smaller one is between, as far as versions go."""
    numbers = list(version_numbers(version))
    while numbers[-1] == 0:
        numbers.pop()
    return ".".join(str(number) for number in (*numbers[:-1], numbers[-1] - 1, 999))


@pytest.mark.parametrize("row", read_known_bad(), ids=lambda row: row.id)
def test_a_row_fires_for_its_versions_and_not_beside_them(row: KnownBad) -> None:
    def fires(version: str, **changes: str | None) -> bool:
        machine: dict[str, str | None] = {
            "compute_capability": (row.compute_capabilities or ["8.7"])[0],
            "precision": (row.precisions or ["fp16"])[0],
            "runtime": row.runtime,
            "jetpack": version_before(row.before_jetpack) if row.before_jetpack else None,
        }
        return row.id in names(version, **{**machine, **changes})

    last = version_before(row.before) if row.before else "999.0"
    assert fires(row.first)
    assert fires(last)
    assert not fires(version_before(row.first))
    if row.before is not None:
        assert not fires(row.before)
    other = {"tensorrt": "tensorrt-rtx", "tensorrt-rtx": "tensorrt"}[row.runtime]
    assert not fires(row.first, runtime=other)
    if row.compute_capabilities is not None:
        assert not fires(row.first, compute_capability="3.5")
    if row.precisions is not None:
        assert not fires(row.first, precision="int4")
    if row.before_jetpack is not None:
        assert not fires(row.first, jetpack=row.before_jetpack)
        assert not fires(row.first, jetpack=None)


ROW = """
[[known_bad]]
id = "a"
runtime = "tensorrt"
first = "10.3"
before = "10.5"
what = "TensorRT is wrong"
remedy = "take another version"
"""


def test_a_table_is_read_as_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "table.toml").write_text(ROW, encoding="utf-8")
    (row,) = read_known_bad(tmp_path / "table.toml")
    assert (row.id, row.precisions, row.links) == ("a", None, [])
    assert row.text == "TensorRT is wrong; take another version."


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('first = "10.3"', "", r"first\n  Field required"),
        ('first = "10.3"', 'first = "soon"', r"first\n  String should match pattern"),
        ('before = "10.5"', 'before = "10.3"', "the second must be the later version"),
        ('"tensorrt"', '"openvino"', r"runtime\n  Input should be 'tensorrt' or"),
        ('remedy = "take another version"', 'remedy = ""', r"remedy\n  String should"),
        ("before =", "until =", r"until\n  Extra inputs are not permitted"),
        ("before =", 'links = ["10.5"]\nbefore =', r"links\.0\n  String should match"),
        (ROW, ROW + ROW, "two rows with one id"),
    ],
)
def test_a_row_that_is_not_well_formed_is_refused(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    assert old in ROW
    (tmp_path / "table.toml").write_text(ROW.replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_known_bad(tmp_path / "table.toml")


@pytest.mark.parametrize("row", read_known_bad(), ids=lambda row: row.id)
def test_every_row_is_one_sentence_with_links_to_issues(row: KnownBad) -> None:
    assert row.text.endswith(".")
    assert "; " in row.text
    for link in row.links:
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
