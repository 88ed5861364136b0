from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actionclip_deploy.runtimes import machine
from actionclip_deploy.runtimes.machine import (
    Gpu,
    Gpus,
    TensorRT,
    ask_nvpmodel,
    choose_spin_us,
    cpu_has_bf16,
    cpu_identity,
    cpu_quota,
    cuda_devices,
    describe_machine,
    find_gpus,
    find_tensorrt,
    installed_versions,
    memory_limit_bytes,
    num_available_cores,
    read_jetson,
    version_numbers,
)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


V2 = "0::/user.slice/job\n"
V1 = "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"proc/self/cgroup": V2}, None),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/user.slice/job/cpu.max": "max 100000"}, None),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/user.slice/job/cpu.max": "150000 100000"}, 1.5),
        # A group above is tighter than the process's own.
        (
            {
                "proc/self/cgroup": V2,
                "sys/fs/cgroup/user.slice/job/cpu.max": "400000 100000",
                "sys/fs/cgroup/user.slice/cpu.max": "200000 100000",
            },
            2.0,
        ),
        # In a container the host's path is told and not there; the container's group is the top.
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3.0),
        ({"proc/self/cgroup": "0::/../../x\n", "sys/fs/cgroup/cpu.max": "50000 100000"}, 0.5),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000\n",
            },
            2.5,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "600000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            6.0,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            None,
        ),
        # Both versions mounted, the quota in version 2.
        (
            {
                "proc/self/cgroup": V1 + "0::/job\n",
                "sys/fs/cgroup/unified/job/cpu.max": "100000 100000",
            },
            1.0,
        ),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/cpu.max": "nonsense"}, None),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/cpu.max": "100000 0"}, None),
        ({"proc/self/cgroup": "nonsense\n\n", "sys/fs/cgroup/cpu.max": "100000 100000"}, None),
    ],
)
def test_the_quota_is_read_from_the_control_groups(
    tmp_path: Path, files: dict[str, str], expected: float | None
) -> None:
    assert cpu_quota(write(tmp_path, files)) == expected


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max", 8), ("1600000", 8), ("400000", 4), ("150000", 2), ("100000", 1), ("20000", 1)],
)
def test_cores_are_those_of_the_quota_rounded_up(
    tmp_path: Path, eight_cores: None, quota: str, expected: int
) -> None:
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": f"{quota} 100000"}
    assert num_available_cores(write(tmp_path, files)) == expected


def test_cores_are_those_the_process_is_pinned_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    assert num_available_cores(tmp_path) == 2


def test_cores_are_counted_where_there_is_no_affinity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert num_available_cores(tmp_path) == 6


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/memory.max": "max"}, None),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/memory.max": "4294967296"}, 4294967296),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": "1073741824",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            },
            1073741824,
        ),
    ],
)
def test_the_memory_limit_is_read_from_the_control_groups(
    tmp_path: Path, files: dict[str, str], expected: int | None
) -> None:
    assert memory_limit_bytes(write(tmp_path, files)) == expected


def test_an_x86_machine_is_described(tmp_path: Path) -> None:
    cpu = "model name\t: Big CPU 9000\nflags\t\t: fpu avx2 avx512f avx512_vnni amx_tile ssse3\n\n"
    files = {
        "proc/cpuinfo": cpu + cpu,
        "proc/meminfo": "MemTotal:       16384 kB\nMemFree: 1 kB\n",
        "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06",
    }
    facts = describe_machine(write(tmp_path, files))
    assert facts["cpu"] == "Big CPU 9000"
    assert facts["cpu_flags"] == ["avx2", "avx512f", "avx512_vnni", "amx_tile"]
    assert facts["memory_bytes"] == 16 * 1024 * 1024
    assert facts["nvidia_driver"] == "580.65.06"
    assert facts["jetson"] is None


def test_a_jetson_is_described(tmp_path: Path) -> None:
    files = {
        "proc/cpuinfo": "processor : 0\nFeatures\t: fp asimd asimdhp asimddp\nCPU part: 0xd42\n",
        "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081\n# more\n",
        "var/lib/nvpmodel/status": "pmode:0002",
        "etc/nvpmodel.conf": "< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n",
    }
    facts = describe_machine(write(tmp_path, files))
    assert facts["cpu"] == "NVIDIA Jetson AGX Orin Developer Kit"
    assert facts["cpu_flags"] == ["asimd", "asimdhp", "asimddp"]
    assert facts["jetson"] == "JetPack 6.2, L4T 36.4.3, power mode MAXN_SUPER (2)"


def test_a_machine_that_tells_nothing_is_described(tmp_path: Path) -> None:
    facts = describe_machine(tmp_path)
    assert facts["cpu_flags"] == []
    assert facts["memory_bytes"] is None
    assert facts["memory_limit_bytes"] is None
    assert facts["cpu_quota"] is None
    assert facts["nvidia_driver"] is None


def test_this_machine_is_described_in_json() -> None:
    facts = json.loads(json.dumps(describe_machine(), allow_nan=False))
    assert facts["python"] == ".".join(str(n) for n in sys.version_info[:3])
    assert 1 <= facts["cpu_cores_available"] <= facts["cpu_cores"]


def test_gpus_are_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    orin = Gpu("Orin", "8.7", 8 * 2**30)
    monkeypatch.setattr(machine, "find_gpus", lambda: Gpus((orin,), "13.2"))
    assert cuda_devices() == (["Orin, compute capability 8.7, 8.0 GiB, CUDA 13.2"], None)
    monkeypatch.setattr(machine, "find_gpus", lambda: Gpus(missing_because="no driver"))
    assert cuda_devices() == ([], "no driver")


def test_versions_are_of_what_is_installed() -> None:
    versions = installed_versions()
    assert versions["numpy"] == metadata.version("numpy")
    assert versions["onnxruntime"] == metadata.version("onnxruntime")
    assert "tensorrt" not in versions


def test_processors_that_differ_in_a_flag_are_told_apart(tmp_path: Path) -> None:
    flags = {"a": "flags : fma avx2", "b": "flags : avx2 fma", "c": "flags : avx2 fma avx512f"}
    found = {
        name: cpu_identity(write(tmp_path / name, {"proc/cpuinfo": f"model name : X\n{text}\n"}))
        for name, text in flags.items()
    }
    assert found["a"] == found["b"] != found["c"]
    other = write(tmp_path / "d", {"proc/cpuinfo": f"model name : Y\n{flags['a']}\n"})
    assert cpu_identity(other) != found["a"]


# GPUs


def fake_cuda(*, num_devices: int = 1, init: int = 0) -> SimpleNamespace:
    """The CUDA driver's library; a call gives 0 and writes its answer through a reference."""

    def answer(place: int, value: object) -> Callable[..., int]:
        def call(*given: Any) -> int:
            target = getattr(given[place], "_obj", given[place])  # byref hides it
            target.value = value
            return 0

        return call

    def attribute(value: Any, which: int, device: object) -> int:
        value._obj.value = {75: 8, 76: 7}[which]
        return 0

    return SimpleNamespace(
        cuInit=lambda _: init,
        cuGetErrorName=answer(1, b"CUDA_ERROR_NO_DEVICE"),
        cuDriverGetVersion=answer(0, 13020),
        cuDeviceGetCount=answer(0, num_devices),
        cuDeviceGet=answer(0, 0),
        cuDeviceGetName=answer(0, b"Orin"),
        cuDeviceTotalMem_v2=answer(0, 8 * 2**30),
        cuDeviceGetAttribute=attribute,
    )


@pytest.fixture
def cuda_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    library: list[object] = []

    def load(name: str) -> object:
        if not library:
            raise OSError(f"{name}: cannot open shared object file")
        return library[0]

    monkeypatch.setattr(machine.ctypes, "CDLL", load)
    return library


def test_gpus_are_described_by_the_driver(cuda_library: list[object]) -> None:
    cuda_library.append(fake_cuda(num_devices=2))
    found = find_gpus()
    assert found.found == (Gpu("Orin", "8.7", 8 * 2**30),) * 2
    assert found.cuda == "13.2"
    assert found.missing_because is None
    assert found.in_words() == ["Orin, compute capability 8.7, 8.0 GiB, CUDA 13.2"] * 2
    assert json.loads(json.dumps(asdict(found)))["found"][1]["name"] == "Orin"


def test_a_machine_without_driver_says_so(cuda_library: list[object]) -> None:
    found = find_gpus()
    assert found.found == ()
    assert found.missing_because == (
        "the CUDA driver is not installed (libcuda.so.1: cannot open shared object file)"
    )


def test_a_driver_that_fails_says_why(cuda_library: list[object]) -> None:
    cuda_library.append(fake_cuda(init=100))
    assert find_gpus().missing_because == "the CUDA driver fails with CUDA_ERROR_NO_DEVICE"


def test_a_driver_without_device_says_so(cuda_library: list[object]) -> None:
    cuda_library.append(fake_cuda(num_devices=0))
    found = find_gpus()
    assert (found.found, found.missing_because) == ((), "the CUDA driver shows no device")


# Jetsons

# As the files of an Orin Nano with JetPack 6.2.1 have them.
RELEASE = (
    "# R36 (release), REVISION: 4.4, GCID: 41062509, BOARD: generic, EABI: aarch64, DATE: Mon\n"
    "# KERNEL_VARIANT: oot\n"
)
MODES = (
    "< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n"
    "< PM_CONFIG DEFAULT=0 >\n"
)
PACKAGES = (
    "Package: nvidia-jetpack-runtime\nStatus: install ok installed\nVersion: 6.2.1+b38\n\n"
    "Package: nvidia-jetpack\nStatus: {}\nPriority: standard\nVersion: 6.2.1+b38\n\n"
    "Package: zlib1g\nStatus: install ok installed\nVersion: 1:1.2.11\n"
)


def silent() -> str:
    return ""


def test_a_jetson_tells_its_board_versions_and_power_mode(tmp_path: Path) -> None:
    files = {
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit\0",
        "etc/nv_tegra_release": RELEASE,
        "var/lib/dpkg/status": PACKAGES.format("install ok installed"),
        "var/lib/nvpmodel/status": "pmode:0002",
        "etc/nvpmodel.conf": MODES,
    }
    found = read_jetson(write(tmp_path, files), silent)
    assert found is not None
    assert found.model == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit"
    assert (found.l4t, found.jetpack, found.jetpack_major) == ("36.4.4", "6.2.1", 6)
    assert found.power_mode == "MAXN_SUPER (2)"
    assert found.in_words() == "JetPack 6.2.1, L4T 36.4.4, power mode MAXN_SUPER (2)"


@pytest.mark.parametrize(
    ("release", "jetpack"),
    [
        ("R35 (release), REVISION: 4.1", "5.x"),
        ("R36 (release), REVISION: 3.0", "6.0"),
        ("R36 (release), REVISION: 4.0", "6.1"),
        ("R36 (release), REVISION: 4.3", "6.2"),
        ("R36 (release), REVISION: 4.7", "6.1 to 6.2.x"),
        ("R38 (release), REVISION: 2.0", "7.0"),
        ("R38 (release), REVISION: 4.0", "7.1"),
        ("R39 (release), REVISION: 2.0", "7.2.x"),
        ("R32 (release), REVISION: 7.1", None),
    ],
)
def test_without_its_package_jetpack_is_the_one_of_l4t(
    tmp_path: Path, release: str, jetpack: str | None
) -> None:
    found = read_jetson(write(tmp_path, {"etc/nv_tegra_release": f"# {release}, X"}), silent)
    assert found is not None
    assert found.jetpack == jetpack


def test_a_package_that_was_removed_does_not_count(tmp_path: Path) -> None:
    files = {
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.0, X",
        "var/lib/dpkg/status": PACKAGES.format("deinstall ok config-files"),
    }
    found = read_jetson(write(tmp_path, files), silent)
    assert found is not None
    assert found.jetpack == "6.1"


def test_in_a_container_the_board_is_known_by_its_device_tree(tmp_path: Path) -> None:
    model = {"proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0"}
    found = read_jetson(write(tmp_path, model), silent)
    assert found is not None
    assert (found.l4t, found.jetpack, found.jetpack_major) == (None, None, None)
    assert found.in_words() == "JetPack unknown, L4T unknown, power mode unknown"


def test_other_boards_and_machines_are_no_jetson(tmp_path: Path) -> None:
    assert read_jetson(tmp_path, silent) is None
    other = write(tmp_path, {"proc/device-tree/model": "Raspberry Pi 5 Model B\0"})
    assert read_jetson(other, silent) is None


@pytest.mark.parametrize(
    ("status", "printed", "expected"),
    [
        ("pmode:0000", "", "15W (0)"),
        ("pmode:0009", "", "9"),
        (None, "NV Power Mode: 25W\n1\n", "25W (1)"),
        (None, "", None),
    ],
)
def test_the_power_mode_is_read_or_asked_for(
    tmp_path: Path, status: str | None, printed: str, expected: str | None
) -> None:
    files = {"etc/nv_tegra_release": RELEASE, "etc/nvpmodel.conf": MODES}
    if status:
        files["var/lib/nvpmodel/status"] = status
    found = read_jetson(write(tmp_path, files), lambda: printed)
    assert found is not None
    assert found.power_mode == expected


@pytest.mark.parametrize("script", ["echo 'NV Power Mode: 15W'; echo 0", "exit 1"])
def test_nvpmodel_is_asked_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    program = tmp_path / "nvpmodel"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(machine.shutil, "which", lambda _: str(program))
    assert ask_nvpmodel() == ("NV Power Mode: 15W\n0\n" if "echo" in script else "")
    monkeypatch.setattr(machine.shutil, "which", lambda _: None)
    assert ask_nvpmodel() == ""


# TensorRT and versions


def answer(monkeypatch: pytest.MonkeyPatch, *lines: str, code: int = 0) -> None:
    """Let the process that looks for TensorRT print these lines and end with a code."""

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        assert command[0] == sys.executable
        return SimpleNamespace(stdout="\n".join(lines) + "\n", returncode=code)

    monkeypatch.setattr(subprocess, "run", run)


def test_the_module_and_its_library_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, "module 10.3.0", "library libnvinfer.so.10 100300")
    found = find_tensorrt()
    assert found == TensorRT("10.3.0", None, {"libnvinfer.so.10": "10.3.0"})
    assert found.version == "10.3.0"


@pytest.mark.parametrize(
    ("module", "number", "expected"),
    [
        ("tensorrt", 8601, "8.6.1"),
        ("tensorrt", 100300, "10.3.0"),
        ("tensorrt", 101303, "10.13.3"),
        ("tensorrt", 110400, "11.4.0"),
        # As libtensorrt_rtx 1.7.1 answers.
        ("tensorrt_rtx", 10701, "1.7.1"),
    ],
)
def test_a_library_tells_its_version_as_one_number(
    monkeypatch: pytest.MonkeyPatch, module: str, number: int, expected: str
) -> None:
    answer(monkeypatch, "because ImportError no", f"library some.so {number}")
    found = find_tensorrt(module)
    assert found.libraries == {"some.so": expected}
    assert found.version == expected


def test_libraries_without_a_module_say_why_it_is_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer(
        monkeypatch,
        "because ModuleNotFoundError No module named 'tensorrt'",
        "library libnvinfer.so.11 110400",
        "library libnvinfer.so.10 101601",
    )
    found = find_tensorrt()
    assert found.missing_because == "it is not installed"
    assert found.libraries == {"libnvinfer.so.11": "11.4.0", "libnvinfer.so.10": "10.16.1"}


def test_a_module_without_its_libraries_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, "because ImportError libnvinfer.so.11: cannot open shared object file")
    found = find_tensorrt()
    assert found.module is None
    assert found.missing_because == "libnvinfer.so.11: cannot open shared object file"


def test_a_module_that_brings_python_down_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, code=-11)
    assert find_tensorrt().missing_because == "importing it ended Python with code -11"


def test_a_process_that_hangs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_IMPORT_TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(machine, "_PROGRAM", "import time; time.sleep(20)")
    assert "timed out" in (find_tensorrt().missing_because or "")


def test_a_folder_of_that_name_where_one_stands_is_no_tensorrt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_tensorrt("tensorrt").module is None


def test_the_search_runs_for_real_and_tells_what_it_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "tensorrt"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '10.13.3.9'\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert find_tensorrt().module == "10.13.3.9"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.3.0", (10, 3, 0)),
        ("11.4.0.106", (11, 4, 0, 106)),
        ("6.1 to 6.2.x", (6, 1)),
        ("7.2.x", (7, 2)),
        ("6.2.1+b38", (6, 2, 1)),
        ("unknown", ()),
        ("", ()),
    ],
)
def test_a_version_is_the_numbers_that_it_begins_with(text: str, expected: tuple[int, ...]) -> None:
    assert version_numbers(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flags : fpu avx512f avx512_bf16", True),
        ("flags : avx2 avx_vnni avx_ne_convert", True),
        ("Features : fp asimd bf16", True),
        ("flags : fpu avx2 avx512f avx512_vnni", False),
        ("", False),
    ],
)
def test_bf16_is_known_by_the_flags(tmp_path: Path, text: str, expected: bool) -> None:
    assert cpu_has_bf16(write(tmp_path, {"proc/cpuinfo": f"{text}\n"})) is expected


@pytest.mark.parametrize(("number", "fits"), [(None, True), (1, True), (32, True), (10**5, False)])
def test_threads_are_bounded_by_the_cores(number: int | None, fits: bool) -> None:
    if fits:
        machine.check_num_threads("num_threads", number)
        return
    with pytest.raises(ValueError, match=r"num_threads is 100000; with the \d+ cores .* at most"):
        machine.check_num_threads("num_threads", number)


def test_what_is_asked_for_is_bounded_by_the_memory(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:     4194304 kB\n")
    machine.check_memory("queue", 1024, 2**20, root=tmp_path)
    match = r"queue is 1025, which takes 1\.0 GiB or more; .* has 4\.0 GiB, .* be 1024 at most"
    with pytest.raises(ValueError, match=match):
        machine.check_memory("queue", 1025, 2**20, root=tmp_path)


HALF_QUOTA = {"proc/self/cgroup": V2, "sys/fs/cgroup/cpu.max": "150000 100000"}


@pytest.mark.parametrize(
    ("is_alone", "variable", "files", "expected"),
    [
        (False, None, {}, 0),  # a pipeline and a server: others have work for the cores
        (True, None, {}, None),  # a benchmark: nothing else runs
        (True, None, HALF_QUOTA, 0),  # where the time of waiting threads is taken off the quota
        (False, "-1", HALF_QUOTA, None),
        (True, "0", {}, 0),
        (False, " 250 ", {}, 250),
        (False, "", {}, 0),
    ],
)
def test_threads_that_wait_sleep_unless_they_are_alone(
    tmp_path: Path,
    is_alone: bool,
    variable: str | None,
    files: dict[str, str],
    expected: int | None,
) -> None:
    environment = {} if variable is None else {"ACTIONCLIP_SPIN_US": variable}
    root = write(tmp_path, files)
    assert choose_spin_us(is_alone=is_alone, environment=environment, root=root) == expected


@pytest.mark.parametrize("given", ["yes", "-2", "1.5", "1000001"])
def test_a_time_of_waiting_that_is_none_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match=r"ACTIONCLIP_SPIN_US is '.*'; give microseconds"):
        choose_spin_us(environment={"ACTIONCLIP_SPIN_US": given})
