"""Power of a Jetson, from the sensors on its board or from the lines of `tegrastats`.

Sensors are INA3221 chips of three rails each; a Thor has an INA238 for its input besides. The
drivers of the kernel show volts and amperes, in `hwmon` folders since JetPack 5, in `iio` ones
before.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from actionclip_deploy.runtimes.jetson import read_file

# The whole board or module, the first one that is there; which names a board has is up to its
# device tree: Thor, Orin Nano and NX and Xavier NX, Nano.
_INPUTS = ("VIN", "VDD_IN", "5V_IN", "POM_5V_IN")
# On an AGX Orin it is fed from VIN_SYS_5V0, and would be counted twice.
_BEHIND_OTHERS = frozenset({"VDDQ_VDD2_1V8AO"})
_NOT_CONNECTED = frozenset({"", "NC"})

# "VDD_IN 5336mW/4970mW": now, and the mean since it was started. "CPU@49.2C" is no rail, and
# before JetPack 5 there was no unit.
_RAIL = re.compile(r"(?:^|\s)([A-Z][A-Z0-9_]*) (-?\d+)(?:mW)?/-?\d+(?:mW)?(?=\s|$)")
_TEGRASTATS_MS = 100

ReadWatts = Callable[[], float | None]


@dataclass(frozen=True)
class Rail:
    """One rail that a sensor measures.

    Attributes:
        name: As the board's device tree calls it.
        files: Files whose product is the power.
        watts: What one of that product is in W.
    """

    name: str
    files: tuple[Path, ...]
    watts: float

    def read(self) -> float | None:
        """Its power in W; None where it cannot be read."""
        product = self.watts
        for path in self.files:
            try:
                product *= int(path.read_text(encoding="ascii"))
            except (OSError, ValueError):
                return None
        return product


def find_rails(root: Path) -> tuple[Rail, ...]:
    """All rails that can be read.

    Args:
        root: Where `/sys` is; another one in tests.
    """
    drivers = root / "sys/bus/i2c/drivers"
    rails = []
    for label in sorted(drivers.glob("ina3221*/*/hwmon/hwmon*/in*_label")):
        number = label.name.removeprefix("in").removesuffix("_label")
        files = (label.with_name(f"in{number}_input"), label.with_name(f"curr{number}_input"))
        rails.append(Rail(read_file(label), files, 1e-6))  # mV x mA
    for label in sorted(drivers.glob("ina3221*/*/iio:device*/rail_name_*")):
        number = label.name.removeprefix("rail_name_")
        rails.append(Rail(read_file(label), (label.with_name(f"in_power{number}_input"),), 1e-3))
    powers = sorted(drivers.glob("ina238*/*/hwmon/hwmon*/power1_input"))
    rails += [Rail("VIN", (power,), 1e-6) for power in powers]  # µW
    return tuple(rail for rail in rails if rail.read() is not None)


def total_names(names: Mapping[str, object]) -> tuple[str, ...]:
    """Of the rails of a board those that together are its power."""
    for whole in _INPUTS:
        if whole in names:
            return (whole,)
    return tuple(name for name in names if name not in _BEHIND_OTHERS | _NOT_CONNECTED)


def open_rails(root: Path) -> tuple[str, ReadWatts] | None:
    """What is measured, in words, and how to read it in W; None where there are no sensors.

    Args:
        root: Where `/sys` is.
    """
    by_name = {rail.name: rail for rail in find_rails(root)}
    chosen = total_names(by_name)
    if not chosen:
        return None

    def read() -> float | None:
        powers = [by_name[name].read() for name in chosen]
        known = [power for power in powers if power is not None]
        return sum(known) if len(known) == len(powers) else None

    return f"Jetson {' + '.join(chosen)}", read


def parse_tegrastats(line: str) -> dict[str, float]:
    """Power of each rail in W, from a line that `tegrastats` printed."""
    return {name: int(milliwatts) / 1e3 for name, milliwatts in _RAIL.findall(line)}


class Tegrastats:
    """Reads the lines of a `tegrastats` that runs meanwhile, for where the sensors cannot be read.

    Args:
        program: Its path.
    """

    def __init__(self, program: str) -> None:
        self._process = subprocess.Popen(
            [program, "--interval", str(_TEGRASTATS_MS)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._rails: dict[str, float] = self._next()
        self.names = total_names(self._rails)
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def read(self) -> float | None:
        """Power in W at the newest line; None once there are no more."""
        rails = self._rails
        if not self.names or any(name not in rails for name in self.names):
            return None
        return sum(rails[name] for name in self.names)

    def close(self) -> None:
        """End the program."""
        self._process.terminate()
        self._process.wait()
        self._thread.join()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _next(self) -> dict[str, float]:
        assert self._process.stdout is not None
        return parse_tegrastats(self._process.stdout.readline())

    def _follow(self) -> None:
        while self._rails:
            self._rails = self._next()


def open_tegrastats() -> Tegrastats | None:
    """Start `tegrastats`; None where it is not there or tells no power."""
    program = shutil.which("tegrastats")
    if program is None:
        return None
    try:
        started = Tegrastats(program)
    except OSError:
        return None
    if started.names:
        return started
    started.close()
    return None
