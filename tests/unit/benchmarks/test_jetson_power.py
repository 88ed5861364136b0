"""Power of a Jetson, from folders and lines written by hand in the forms of real boards.

Folders: Jetson Linux Developer Guide r32 to r38, "Software-Based Power Consumption Modeling", and
the boards listed in jetson/JetsonPowerRails.md of energymon. Lines: of an AGX Orin with JetPack 5,
an Orin Nano with JetPack 6, a Xavier NX with JetPack 4 and an AGX Thor with JetPack 7.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from actionclip_deploy.benchmarks.power import (
    Tegrastats,
    find_rails,
    open_rails,
    open_tegrastats,
    parse_tegrastats,
    total_names,
)

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
