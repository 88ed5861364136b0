"""Energy of a machine, from stand-ins for its sensors and counters."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actionclip_deploy.benchmarks import power
from actionclip_deploy.benchmarks.power import (
    EnergyMeter,
    PowerSampler,
    Tegrastats,
    find_rails,
    open_rails,
    open_tegrastats,
    parse_tegrastats,
    total_names,
)


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


# Power of a Jetson, from folders and lines written by hand in the forms of real boards.
#
# Folders: Jetson Linux Developer Guide r32 to r38, "Software-Based Power Consumption Modeling",
# and the boards listed in jetson/JetsonPowerRails.md of energymon. Lines: of an AGX Orin with
# JetPack 5, an Orin Nano with JetPack 6, a Xavier NX with JetPack 4, an AGX Thor with JetPack 7.


DRIVERS = "sys/bus/i2c/drivers"

AGX_ORIN = (
    "11-24-2026 10:00:01 RAM 5012/62795MB (lfb 13x4MB) SWAP 0/31398MB (cached 0MB) "
    "CPU [1%@2201,100%@2201] EMC_FREQ 1%@2133 GR3D_FREQ 14%@[407,407] VIC_FREQ 115 APE 174 "
    "CV0@73.625C CPU@77.281C Tboard@62C SOC2@70C tj@77.281C GPU@69.125C "
    "VDD_GPU_SOC 3150mW/2971mW VDD_CPU_CV 14312mW/12415mW VIN_SYS_5V0 4968mW/5048mW "
    "VDDQ_VDD2_1V8AO 1091mW/1091mW\n"
)
ORIN_NANO = (
    "11-24-2026 10:00:01 RAM 2840/7620MB (lfb 512x4MB) SWAP 0/3810MB (cached 0MB) "
    "CPU [25%@1510,off,off,20%@1510,22%@1510,18%@1510] GR3D_FREQ 76%@[624] cpu@49.2C gpu@48.1C "
    "tj@49.2C VDD_IN 7421mW/8050mW VDD_CPU_GPU_CV 2617mW/2336mW VDD_SOC 1478mW/1318mW\n"
)
XAVIER_NX = (
    "RAM 3347/7467MB (lfb 896x4MB) CPU [21%@1190,19%@1190] GR3D_FREQ 61% APE 150 AO@48.5C "
    "GPU@49.2C PMIC@50.0C thermal@50.187C VDD_IN 5336/4970 VDD_CPU_GPU_CV 2617/2336 "
    "VDD_SOC 1478/1318\n"
)
AGX_THOR = (
    "11-24-2026 10:00:01 RAM 9000/125772MB (lfb 4x4MB) CPU [5%@972,2%@972] GR3D_FREQ 0% "
    "cpu@53.7C tj@55.1C VDD_GPU -392mW/0mW VDD_CPU_SOC_MSS 6510mW/6500mW "
    "VIN_SYS_5V0 6520mW/6510mW VIN 23000mW/22950mW\n"
)


def hwmon(root: Path, chip: str, rails: dict[int, tuple[str, int, int]]) -> None:
    """A chip as the kernel shows it since JetPack 5: (name, mV, mA) by channel."""
    folder = root / DRIVERS / "ina3221" / chip / "hwmon" / f"hwmon{chip[-1]}"
    folder.mkdir(parents=True)
    for number, (name, millivolts, milliamperes) in rails.items():
        (folder / f"in{number}_label").write_text(f"{name}\n")
        (folder / f"in{number}_input").write_text(f"{millivolts}\n")
        (folder / f"curr{number}_input").write_text(f"{milliamperes}\n")
    # The chip's own sum has no current of its own.
    (folder / "in7_label").write_text("sum of shunt voltages\n")
    (folder / "in7_input").write_text("12\n")


def test_the_input_of_an_orin_nano_is_its_power(tmp_path: Path) -> None:
    hwmon(
        tmp_path,
        "1-0040",
        {1: ("VDD_IN", 5024, 1480), 2: ("VDD_CPU_GPU_CV", 5016, 520), 3: ("VDD_SOC", 5016, 290)},
    )
    opened = open_rails(tmp_path)
    assert opened is not None
    words, read = opened
    assert words == "Jetson VDD_IN"
    assert read() == pytest.approx(5.024 * 1.480)


def test_an_agx_orin_is_the_sum_of_its_rails_without_one_that_is_behind_another(
    tmp_path: Path,
) -> None:
    first = {
        1: ("VDD_GPU_SOC", 843, 6170),
        2: ("VDD_CPU_CV", 780, 3437),
        3: ("VIN_SYS_5V0", 4968, 953),
    }
    hwmon(tmp_path, "1-0040", first)
    hwmon(tmp_path, "1-0041", {1: ("NC", 0, 0), 2: ("VDDQ_VDD2_1V8AO", 4968, 80)})
    opened = open_rails(tmp_path)
    assert opened is not None
    words, read = opened
    assert words == "Jetson VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0"
    assert read() == pytest.approx(0.843 * 6.170 + 0.780 * 3.437 + 4.968 * 0.953)


def test_the_input_of_a_thor_is_measured_by_a_chip_of_its_own(tmp_path: Path) -> None:
    hwmon(tmp_path, "2-0040", {1: ("VDD_GPU", 12000, 100), 2: ("VDD_CPU_SOC_MSS", 12000, 540)})
    folder = tmp_path / DRIVERS / "ina238/2-0044/hwmon/hwmon5"
    folder.mkdir(parents=True)
    (folder / "power1_input").write_text("23000000\n")
    opened = open_rails(tmp_path)
    assert opened is not None
    assert opened[0] == "Jetson VIN"
    assert opened[1]() == pytest.approx(23.0)


def test_the_sensors_of_jetpack_4_are_read(tmp_path: Path) -> None:
    folder = tmp_path / DRIVERS / "ina3221x/6-0040/iio:device0"
    folder.mkdir(parents=True)
    for number, (name, milliwatts) in enumerate([("POM_5V_IN", 5336), ("POM_5V_GPU", 1040)]):
        (folder / f"rail_name_{number}").write_text(f"{name}\n")
        (folder / f"in_power{number}_input").write_text(f"{milliwatts}\n")
    opened = open_rails(tmp_path)
    assert opened is not None
    assert opened[0] == "Jetson POM_5V_IN"
    assert opened[1]() == pytest.approx(5.336)


def test_a_machine_without_such_sensors_has_none(tmp_path: Path) -> None:
    assert find_rails(tmp_path) == ()
    assert open_rails(tmp_path) is None


def test_a_rail_that_cannot_be_read_is_left_out_and_later_tells_nothing(tmp_path: Path) -> None:
    hwmon(tmp_path, "1-0040", {1: ("VDD_IN", 5000, 1000), 2: ("VDD_SOC", 5000, 100)})
    folder = tmp_path / DRIVERS / "ina3221/1-0040/hwmon/hwmon0"
    (folder / "curr2_input").unlink()
    assert [rail.name for rail in find_rails(tmp_path)] == ["VDD_IN"]
    opened = open_rails(tmp_path)
    assert opened is not None
    (folder / "curr1_input").write_text("-\n")
    assert opened[1]() is None


@pytest.mark.parametrize(
    ("line", "total", "watts"),
    [
        (AGX_ORIN, ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), 3.150 + 14.312 + 4.968),
        (ORIN_NANO, ("VDD_IN",), 7.421),
        (XAVIER_NX, ("VDD_IN",), 5.336),
        (AGX_THOR, ("VIN",), 23.0),
    ],
    ids=["AGX Orin", "Orin Nano", "Xavier NX", "AGX Thor"],
)
def test_a_line_of_tegrastats_tells_the_power_of_the_board(
    line: str, total: tuple[str, ...], watts: float
) -> None:
    rails = parse_tegrastats(line)
    assert total_names(rails) == total
    assert sum(rails[name] for name in total) == pytest.approx(watts)


def test_memory_clocks_and_temperatures_are_no_rails() -> None:
    assert parse_tegrastats(AGX_ORIN).keys() == {
        "VDD_GPU_SOC",
        "VDD_CPU_CV",
        "VIN_SYS_5V0",
        "VDDQ_VDD2_1V8AO",
    }
    assert parse_tegrastats("RAM 2840/7620MB (lfb 512x4MB) SWAP 0/3810MB\n") == {}


def program_that_prints(folder: Path, *lines: str) -> Path:
    """A program as `tegrastats` is, which ends after its last line."""
    path = folder / "tegrastats"
    printed = "".join(f"echo '{line.strip()}'\n" for line in lines)
    path.write_text(f"#!/bin/sh\n{printed}")
    path.chmod(0o755)
    return path


def test_the_lines_are_followed_until_there_are_no_more(tmp_path: Path) -> None:
    later = ORIN_NANO.replace("VDD_IN 7421mW", "VDD_IN 9000mW")
    program = program_that_prints(tmp_path, ORIN_NANO, later)
    started = Tegrastats(str(program))
    assert started.names == ("VDD_IN",)
    started.close()
    assert started.read() is None


def test_a_tegrastats_that_tells_no_power_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    program_that_prints(tmp_path, "RAM 2840/7620MB")
    assert open_tegrastats() is None
    program_that_prints(tmp_path, ORIN_NANO)
    started = open_tegrastats()
    assert started is not None
    started.close()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert open_tegrastats() is None
