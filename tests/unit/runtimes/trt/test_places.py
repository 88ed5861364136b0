from __future__ import annotations

from pathlib import Path

from fake_cudart import FakeCudart

from actionclip_deploy.runtimes.trt.api import Api
from actionclip_deploy.runtimes.trt.driver import Cuda
from actionclip_deploy.runtimes.trt.plan import BuildOptions
from actionclip_deploy.runtimes.trt.store import Place, find_place

API = Api("tensorrt", None, "10.3.0")


def jetson(root: Path, *, mode: int) -> Place:
    for name, text in {
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic",
        "var/lib/nvpmodel/status": f"pmode:{mode:04}",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return find_place(API, Cuda(FakeCudart()), root=root)


def test_a_place_names_what_an_engine_depends_on(tmp_path: Path) -> None:
    assert jetson(tmp_path, mode=0).fields == {
        "runtime": "tensorrt",
        "version": "10.3.0",
        "gpu": "Orin",
        "compute_capability": "8.7",
        "cuda": "12.6",
        "driver": "unknown",
        "l4t": "36.4.3",
    }


def test_the_power_mode_of_a_jetson_leaves_its_engines_usable(tmp_path: Path) -> None:
    assert jetson(tmp_path, mode=0) == jetson(tmp_path, mode=2)


def test_without_a_gpu_there_is_no_card_to_verify_on(tmp_path: Path) -> None:
    place = find_place(API, None, root=tmp_path)
    assert place.card is None
    assert place.fields == {"runtime": "tensorrt", "version": "10.3.0"}


def test_compatible_engines_are_for_any_gpu_or_version(tmp_path: Path) -> None:
    place = jetson(tmp_path, mode=0)
    hardware = place.built_with(BuildOptions(hardware_compatible=True))
    assert (hardware["gpu"], hardware["compute_capability"]) == ("any", "any")
    assert place.built_with(BuildOptions(version_compatible=True))["version"] == "any"
