"""Energy of a machine, from stand-ins for its sensors and counters."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actionclip_deploy.benchmarks import power
from actionclip_deploy.benchmarks.power import EnergyMeter, PowerSampler


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of the meter, in its only entry."""
    now = [100.0]
    monkeypatch.setattr(power.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(power, "open_nvml", lambda: None)
    return now


def _zone(root: Path, name: str, microjoules: int) -> None:
    zone = root / "sys/class/powercap" / name
    zone.mkdir(exist_ok=True, parents=True)
    (zone / "energy_uj").write_text(f"{microjoules}\n")


def test_power_is_energy_over_time(tmp_path: Path, clock: list[float]) -> None:
    _zone(tmp_path, "intel-rapl:0", 5_000_000)
    _zone(tmp_path, "intel-rapl:1", 1_000_000)
    _zone(tmp_path, "intel-rapl:0:0", 4_000_000)  # the cores of package 0, counted in it already
    meter = EnergyMeter(tmp_path)
    assert meter.source == "CPU package 0 (powercap) and CPU package 1 (powercap)"
    _zone(tmp_path, "intel-rapl:0", 45_000_000)
    _zone(tmp_path, "intel-rapl:1", 21_000_000)
    _zone(tmp_path, "intel-rapl:0:0", 40_000_000)
    clock[0] += 2.0
    spent = meter.spent()
    assert spent.joules == pytest.approx(60.0)
    assert spent.watts == pytest.approx(30.0)


def test_a_counter_that_begins_anew_gives_no_power(tmp_path: Path, clock: list[float]) -> None:
    _zone(tmp_path, "intel-rapl:0", 5_000_000)
    meter = EnergyMeter(tmp_path)
    _zone(tmp_path, "intel-rapl:0", 1_000_000)
    clock[0] += 1.0
    assert meter.spent().watts is None


def test_a_machine_that_tells_no_energy_has_no_power(tmp_path: Path, clock: list[float]) -> None:
    meter = EnergyMeter(tmp_path / "missing")
    clock[0] += 1.0
    assert meter.source is None
    assert meter.spent().joules is None
    # There, but its counter cannot be read.
    (tmp_path / "sys/class/powercap/intel-rapl:0").mkdir(parents=True)
    assert EnergyMeter(tmp_path).source is None


class FakePynvml:
    """The management library of a GPU that has spent some energy."""

    NVMLError = RuntimeError
    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0

    def __init__(self) -> None:
        self.millijoules: int | None = 7000

    def nvmlInit(self) -> None:  # noqa: N802
        """There is a driver."""

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        return f"GPU {index}"

    def nvmlDeviceGetTotalEnergyConsumption(self, device: str) -> int:  # noqa: N802
        if self.millijoules is None:
            raise RuntimeError("Not Supported")
        return self.millijoules


def test_a_gpu_counts_beside_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakePynvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    _zone(tmp_path, "intel-rapl:0", 0)
    meter = EnergyMeter(tmp_path)
    assert meter.source == "CPU package 0 (powercap) and GPU 0 (NVML)"
    nvml.millijoules = 47_000
    _zone(tmp_path, "intel-rapl:0", 2_000_000)
    assert meter.spent().joules == pytest.approx(42.0)


def test_a_gpu_that_counts_no_energy_is_no_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = FakePynvml()
    nvml.millijoules = None
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert EnergyMeter(tmp_path).source is None


def _board(root: Path, millivolts: int, milliamperes: int) -> None:
    folder = root / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1"
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "in1_label").write_text("VDD_IN\n")
    (folder / "in1_input").write_text(f"{millivolts}\n")
    (folder / "curr1_input").write_text(f"{milliamperes}\n")


def test_the_board_of_a_jetson_is_all_that_counts(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(power, "_SAMPLE_SECONDS", 3600.0)
    _zone(tmp_path, "intel-rapl:0", 0)
    _board(tmp_path, 5000, 1000)
    with EnergyMeter(tmp_path) as meter:
        assert meter.source == "Jetson VDD_IN"
        clock[0] += 2.0
        assert meter.spent().joules == pytest.approx(10.0)
        # From 5 W to 15 W within four seconds: 10 W in the mean.
        _board(tmp_path, 5000, 3000)
        clock[0] += 4.0
        assert meter.spent().watts == pytest.approx(10.0)


def test_a_sensor_that_fails_for_a_moment_leaves_a_gap(tmp_path: Path) -> None:
    readings = iter([10.0, None, 10.0, 10.0])
    ticks = itertools.count()
    sampler = PowerSampler(lambda: next(readings), lambda: float(next(ticks)))
    assert [sampler.joules() for _ in range(3)] == [None, None, 10.0]


def test_a_thread_reads_between_the_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power, "_SAMPLE_SECONDS", 0.001)
    threads, ticks = [], itertools.count()

    def read() -> float:
        threads.append(power.threading.current_thread())
        return 1.0

    sampler = PowerSampler(read, lambda: float(next(ticks)))
    sampler.start()
    while len(threads) < 5:
        power.time.sleep(0.001)
    sampler.close()
    assert sampler.joules() == pytest.approx(len(threads) - 1)
    assert len(set(threads)) == 2


def test_tegrastats_is_asked_where_a_jetson_shows_no_sensor(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[bool] = []
    program = SimpleNamespace(names=("VDD_IN",), read=lambda: 7.0, close=lambda: ended.append(True))
    monkeypatch.setattr(power, "open_tegrastats", lambda: program)
    assert EnergyMeter(tmp_path).source is None  # no Jetson
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text("# R36 (release), REVISION: 4.3\n")
    with EnergyMeter(tmp_path) as meter:
        assert meter.source == "Jetson VDD_IN (tegrastats)"
        clock[0] += 2.0
        assert meter.spent().joules == pytest.approx(14.0)
    assert ended == [True]


def test_a_meter_of_the_machine_itself_is_opened_and_closed(monkeypatch: Any) -> None:
    monkeypatch.setattr(power, "open_nvml", lambda: None)
    with EnergyMeter() as meter:
        assert meter.spent().seconds >= 0
