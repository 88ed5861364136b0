"""Runtimes side by side in one run, with parity beside every speed-up; and servers under load."""

from actionclip_deploy.benchmarks.candidates import RowSpec
from actionclip_deploy.benchmarks.report import (
    BenchmarkReport,
    compare_reports,
    read_report,
    write_report,
)
from actionclip_deploy.benchmarks.runner import run_benchmark

__all__ = [
    "BenchmarkReport",
    "RowSpec",
    "compare_reports",
    "read_report",
    "run_benchmark",
    "write_report",
]
