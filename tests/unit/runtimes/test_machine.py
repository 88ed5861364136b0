from __future__ import annotations

import json
import os
import sys
from importlib import metadata
from pathlib import Path

import pytest

from actionclip_deploy.runtimes import machine
from actionclip_deploy.runtimes.machine import (
    Gpu,
    Gpus,
    cpu_identity,
    cpu_quota,
    cuda_devices,
    describe_machine,
    installed_versions,
    memory_limit_bytes,
    num_available_cores,
    onnxruntime_providers,
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


def test_the_cpu_works_in_onnxruntime() -> None:
    assert onnxruntime_providers() == {"CPUExecutionProvider": "works"}


def test_a_machine_without_onnxruntime_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "actionclip_deploy.runtimes.ort", raising=False)
    (reason,) = onnxruntime_providers().values()
    assert 'pip install "actionclip-deploy[onnxruntime]"' in reason


def test_processors_that_differ_in_a_flag_are_told_apart(tmp_path: Path) -> None:
    flags = {"a": "flags : fma avx2", "b": "flags : avx2 fma", "c": "flags : avx2 fma avx512f"}
    found = {
        name: cpu_identity(write(tmp_path / name, {"proc/cpuinfo": f"model name : X\n{text}\n"}))
        for name, text in flags.items()
    }
    assert found["a"] == found["b"] != found["c"]
    other = write(tmp_path / "d", {"proc/cpuinfo": f"model name : Y\n{flags['a']}\n"})
    assert cpu_identity(other) != found["a"]
