"""What surrounds a measurement."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actionclip_deploy.benchmarks import conditions
from actionclip_deploy.benchmarks.conditions import (
    ConditionsReader,
    EnergyMeter,
    toolkit_commit,
)
from actionclip_deploy.benchmarks.matmul import matmul_rate


def _zone(folder: Path, name: str, microjoules: int) -> Path:
    zone = folder / name
    zone.mkdir(exist_ok=True)
    (zone / "energy_uj").write_text(f"{microjoules}\n")
    return zone


def test_power_is_energy_over_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(conditions.time, "monotonic", lambda: now[0])
    _zone(tmp_path, "intel-rapl:0", 5_000_000)
    _zone(tmp_path, "intel-rapl:1", 1_000_000)
    _zone(tmp_path, "intel-rapl:0:0", 4_000_000)  # the cores of package 0, counted in it already
    meter = EnergyMeter(tmp_path)
    _zone(tmp_path, "intel-rapl:0", 45_000_000)
    _zone(tmp_path, "intel-rapl:1", 21_000_000)
    _zone(tmp_path, "intel-rapl:0:0", 40_000_000)
    now[0] = 102.0
    assert meter.watts() == pytest.approx(30.0)


def test_a_counter_that_begins_anew_gives_no_power(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(conditions.time, "monotonic", lambda: now[0])
    _zone(tmp_path, "intel-rapl:0", 5_000_000)
    meter = EnergyMeter(tmp_path)
    _zone(tmp_path, "intel-rapl:0", 1_000_000)
    now[0] = 1.0
    assert meter.watts() is None


def test_a_machine_that_tells_no_energy_has_no_power(tmp_path: Path) -> None:
    assert EnergyMeter(tmp_path / "missing").watts() is None
    (tmp_path / "intel-rapl:0").mkdir()  # there, but its counter cannot be read
    assert EnergyMeter(tmp_path).watts() is None


class FakeProcess:
    """A process with a child that lives and one that has ended."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._seconds = seconds

    def cpu_times(self) -> SimpleNamespace:
        spent = self._seconds
        return SimpleNamespace(user=spent, system=0.0, children_user=spent / 2, children_system=0.0)

    def children(self, *, recursive: bool) -> list[FakeProcess]:
        assert recursive
        return [FakeProcess(self._seconds)]


def test_work_of_others_is_told_from_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    Times = namedtuple("Times", "user system idle iowait")
    now, own, others = 0.0, 0.0, 0.0

    def cpu_times() -> Any:
        # Ours are three times `own`: this process, its child, and half of that twice for those
        # that have ended.
        return Times(user=3 * own + others, system=0.0, idle=100.0 * now, iowait=7.0 * now)

    monkeypatch.setattr(conditions.time, "monotonic", lambda: now)
    monkeypatch.setattr(conditions.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(conditions.psutil, "cpu_times", cpu_times)
    monkeypatch.setattr(conditions.psutil, "Process", lambda: FakeProcess(own))
    reader = ConditionsReader()
    now, own, others = 10.0, 8.0, 10.0
    # 10 of the 40 seconds that four cores have in ten.
    assert reader.read("first").cpu_percent_of_others == pytest.approx(25.0)
    now, own = 20.0, 16.0
    assert reader.read("second").cpu_percent_of_others == pytest.approx(0.0)


def test_conditions_that_cannot_be_read_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_times() -> Any:
        raise conditions.psutil.AccessDenied

    monkeypatch.setattr(conditions.psutil, "cpu_times", no_times)
    monkeypatch.setattr(conditions.psutil, "cpu_freq", lambda: None)
    read = ConditionsReader().read("now")
    assert read.cpu_mhz is None
    assert read.cpu_percent_of_others is None
    assert read.gpu_watts is None


def test_the_commit_is_that_of_this_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    given = toolkit_commit()
    if given is not None:  # an unpacked source archive has none
        assert given.removesuffix("-dirty").isalnum()
    monkeypatch.setenv("PATH", "")
    assert toolkit_commit() is None


def test_the_matrix_product_rate_says_what_computed_it() -> None:
    sample = matmul_rate(1)
    assert (sample.precision, sample.library) == ("fp32", f"numpy {np.__version__}")
    assert sample.flops_per_second > 1e8  # a thousandth of what any CPU of today does
