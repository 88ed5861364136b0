"""Benchmarks that can be compared: rows side by side in one run, parity beside every speed-up.

rows.py        what a row of the table runs
worker.py      a row in its own process; processes.py talks to it
timing.py      warm-up until stable, wall clock, CUDA events
stages.py      every stage apart, from the file to the scores
matmul.py      the matrix-product rate of the machine
runner.py      lets the rows take turns
power.py       energy of a machine; jetson_power.py that of a Jetson; power_runs.py of each row
measured.py    what they measured, as a report
statistics.py  percentiles and ratios with intervals
report.py      the report and its schema
comparison.py  two reports beside each other
charts.py      the pictures; words.py the tables; page.py the page that holds both
peers.py       other ways to run the same weights
load*.py       a server under load, beside which none of the above runs
"""

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
