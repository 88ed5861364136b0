"""What surrounds a measurement."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actionclip_deploy.benchmarks import runner
from actionclip_deploy.benchmarks.runner import ConditionsReader, toolkit_commit
from actionclip_deploy.benchmarks.worker import matmul_rate


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

    monkeypatch.setattr(runner.time, "monotonic", lambda: now)
    monkeypatch.setattr(runner.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(runner.psutil, "cpu_times", cpu_times)
    monkeypatch.setattr(runner.psutil, "Process", lambda: FakeProcess(own))
    reader = ConditionsReader()
    now, own, others = 10.0, 8.0, 10.0
    # 10 of the 40 seconds that four cores have in ten.
    assert reader.read("first").cpu_percent_of_others == pytest.approx(25.0)
    now, own = 20.0, 16.0
    assert reader.read("second").cpu_percent_of_others == pytest.approx(0.0)


def test_conditions_that_cannot_be_read_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_times() -> Any:
        raise runner.psutil.AccessDenied

    monkeypatch.setattr(runner.psutil, "cpu_times", no_times)
    monkeypatch.setattr(runner.psutil, "cpu_freq", lambda: None)
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
