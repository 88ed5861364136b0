from __future__ import annotations

import re
from pathlib import Path

import pytest

from actionclip_deploy.runtimes.advice import Facts, find_problems, recommend
from actionclip_deploy.runtimes.machine import Gpu, Gpus, Jetson, TensorRT

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
    assert 'pip install "actionclip-deploy[rtx]"' in recipe.commands


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
    assert recipe.commands[-1] == "actionclip verify bundle --execution-provider cuda"


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


EVERY = [
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
    assert {row.name for row in problems} == {"10.3-fp16-vit", "10.3-dynamic-transformer"}
    problems = find_problems(Facts(gpus=RTX_5090, tensorrt=V10_16, tensorrt_rtx=RTX))
    assert {row.name for row in problems} == {"sm120-fused-attention"}
    library_alone = TensorRT(None, "it is not installed", {"libnvinfer.so.10": "10.4.0"})
    problems = find_problems(Facts(gpus=SERVER, tensorrt=library_alone))
    assert "10.4-vit" in {row.name for row in problems}
    assert find_problems(Facts(gpus=SERVER)) == ()


def test_a_bundle_for_rtx_20_is_exported_without_fp32_products() -> None:
    exports = [
        recommend(Facts(gpus=gpus, tensorrt_rtx=RTX)).commands[0] for gpus in (RTX_2080, RTX_4070)
    ]
    assert [line.endswith("--precision fp16 --text-precision fp16") for line in exports] == [
        True,
        False,
    ]
