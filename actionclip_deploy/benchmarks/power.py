"""Energy that a machine spends: of a Jetson's board, or of the CPU package and an NVIDIA GPU.

zeus was tried (0.16). It brings 12 packages (pandas, SciPy, scikit-learn: 400 MB), which take 4 s
to import, and starts a process for each counter. Of an AGX Orin it reads the rails of CPU and GPU
and no total, of a Thor nothing, and in a container without `uname -p` it finds no Jetson at all.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from actionclip_deploy.runtimes.machine import read_file

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

_ROOT = Path("/")
# Often enough for a stretch of seconds; a reading takes about 1 ms of one core.
_SAMPLE_SECONDS = 0.05

Read = Callable[[], float | None]  # of watts or joules; None where they cannot be read
Clock = Callable[[], float]


@dataclass(frozen=True)
class Spent:
    """Energy of some time; None where it is not told."""

    seconds: float
    joules: float | None

    @property
    def watts(self) -> float | None:
        """Mean power."""
        return None if self.joules is None or self.seconds <= 0 else self.joules / self.seconds


class EnergyMeter:
    """Counts energy from one reading to the next.

    A Jetson's sensors tell the power of the whole board or module. Elsewhere it is that of the CPU
    packages through Linux's powercap, which most systems let only root read, and of the first
    NVIDIA GPU. Without any of them there is no power.

    Args:
        root: Where `/sys` is; another one in tests.

    Attributes:
        source: What is counted, in words; None where nothing can be.
    """

    def __init__(self, root: Path = _ROOT) -> None:
        self._open = ExitStack()
        counters = self._jetson(root) or _counters(root)
        self.source = " and ".join(words for words, _ in counters) or None
        self._counters = [read for _, read in counters]
        self._joules, self._since = self._read(), time.monotonic()

    def spent(self) -> Spent:
        """What was spent since the last call, or since this was made."""
        joules, now = self._read(), time.monotonic()
        pairs = zip(self._joules, joules, strict=True)
        parts = [b - a for a, b in pairs if a is not None and b is not None]
        seconds = now - self._since
        self._joules, self._since = joules, now
        # A counter that began anew from zero makes no number.
        return Spent(seconds, sum(parts) if parts and min(parts) >= 0 else None)

    def __enter__(self) -> EnergyMeter:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _jetson(self, root: Path) -> list[tuple[str, Read]]:
        if found := open_rails(root):
            words, read = found
        elif (root / "etc/nv_tegra_release").exists() and (program := open_tegrastats()):
            words, read = f"Jetson {' + '.join(program.names)} (tegrastats)", program.read
            self._open.callback(program.close)
        else:
            return []
        sampler = PowerSampler(read, time.monotonic)
        sampler.start()
        self._open.callback(sampler.close)
        return [(words, sampler.joules)]

    def _read(self) -> list[float | None]:
        return [read() for read in self._counters]


class PowerSampler:
    """A counter of energy in J from a sensor of power in W, which a thread reads over and over."""

    def __init__(self, read: Read, clock: Clock) -> None:
        self._read, self._clock = read, clock
        self._lock = threading.Lock()
        self._watts, self._at = read(), clock()
        self._joules = 0.0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to read."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def joules(self) -> float | None:
        """Read once more; gives the energy since this was made.

        Between two readings power is taken to change in a straight line. None where the sensor
        tells no power.
        """
        with self._lock:
            watts, now = self._read(), self._clock()
            if watts is not None and self._watts is not None:
                self._joules += (watts + self._watts) / 2 * (now - self._at)
                told: float | None = self._joules
            else:
                told = None
            self._watts, self._at = watts, now
            return told

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS):
            self.joules()


# A Jetson: from the sensors on its board, or from the lines of `tegrastats`.


@dataclass(frozen=True)
class Rail:
    """One rail that a sensor measures."""

    name: str  # as the board's device tree calls it
    files: tuple[Path, ...]  # files whose product is the power
    watts: float  # what one of that product is in W

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

    Sensors are INA3221 chips of three rails each; a Thor has an INA238 for its input besides. The
    drivers of the kernel show volts and amperes, in `hwmon` folders since JetPack 5, in `iio` ones
    before.
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


def open_rails(root: Path) -> tuple[str, Read] | None:
    """What is measured, in words, and how to read it in W; None where there are no sensors."""
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
    """Reads the lines of a `tegrastats` that runs meanwhile, where sensors cannot be read."""

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


# CPU packages and NVIDIA GPUs.


class Nvml:
    """The first GPU through NVIDIA's management library."""

    def __init__(self, pynvml: Any) -> None:
        self._library = pynvml
        self._device = pynvml.nvmlDeviceGetHandleByIndex(0)

    def read(self) -> dict[str, float | None]:
        """Clock in MHz, power in W, temperature in degrees; None for what it does not tell."""
        nvml, device = self._library, self._device
        return {
            "mhz": self._value(nvml.nvmlDeviceGetClockInfo, device, nvml.NVML_CLOCK_SM),
            "watts": self._value(nvml.nvmlDeviceGetPowerUsage, device, scale=1e-3),
            "celsius": self._value(
                nvml.nvmlDeviceGetTemperature, device, nvml.NVML_TEMPERATURE_GPU
            ),
        }

    def joules(self) -> float | None:
        """Energy since the driver was loaded; None where it does not tell."""
        return self._value(
            self._library.nvmlDeviceGetTotalEnergyConsumption, self._device, scale=1e-3
        )

    def _value(self, function: Any, *arguments: Any, scale: float = 1.0) -> float | None:
        try:
            return float(function(*arguments)) * scale
        except self._library.NVMLError:
            return None


def open_nvml() -> Nvml | None:
    """The management library; None where it or a GPU is not there."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return Nvml(pynvml)
    except pynvml.NVMLError:
        return None


def _counters(root: Path) -> list[tuple[str, Read]]:
    found: list[tuple[str, Read]] = []
    powercap = root / "sys/class/powercap"
    # Packages alone ("intel-rapl:0"; AMD's too): their parts would be counted twice.
    zones = sorted(powercap.glob("intel-rapl:[0-9]*")) if powercap.is_dir() else []
    for zone in zones:
        path = zone / "energy_uj"
        if zone.name.count(":") == 1 and _microjoules(path) is not None:
            number = zone.name.partition(":")[2]
            found.append((f"CPU package {number} (powercap)", partial(_microjoules, path)))
    nvml = open_nvml()
    if nvml is not None and nvml.joules() is not None:
        found.append(("GPU 0 (NVML)", nvml.joules))
    return found


def _microjoules(path: Path) -> float | None:
    try:
        return int(path.read_text()) / 1e6
    except (OSError, ValueError):
        return None
