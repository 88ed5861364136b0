"""A whole run with rows that are played by numbers, and what surrounds it."""

from __future__ import annotations

import json
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fakes import write_fake_bundle

from actionclip_deploy.benchmarks import RowSpec, read_report, run_benchmark, runner, write_report
from actionclip_deploy.benchmarks.power import Spent
from actionclip_deploy.benchmarks.report import BenchmarkReport
from actionclip_deploy.benchmarks.runner import ConditionsReader, toolkit_commit
from actionclip_deploy.benchmarks.show import context, remarks, render_page, tables
from actionclip_deploy.benchmarks.worker import matmul_rate
from actionclip_deploy.errors import BenchmarkError

# Written before power, and copies to devices, were in reports.
REPORT_BEFORE_POWER = Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "vitb32.json"

PARITY = {
    "max_abs_difference": 1e-6,
    "min_cosine": 0.9999999,
    "top1_agreement": 1.0,
    "top5_agreement": 1.0,
    "passed": True,
    "problem": None,
}


class PlayedRow:
    """Answers as a worker does, with latencies that were decided before."""

    def __init__(self, spec: RowSpec, seconds: float, log: list[tuple[str, str]]) -> None:
        self.spec, self.seconds, self.log = spec, seconds, log
        self.closed = False
        self.parity = dict(PARITY)
        self.fails_at: str | None = None
        self.has_device = False

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        self.log.append((self.spec.name, what))
        if what == self.fails_at:
            raise BenchmarkError(f"{self.spec.name} cannot {what}; leave it out.")
        return getattr(self, f"_{what}")(**arguments)

    def close(self) -> None:
        self.closed = True

    def _open(self, cache: str | None, **_: Any) -> dict[str, Any]:
        was_there = cache is not None and Path(cache).exists()
        if cache is not None:
            Path(cache).mkdir(exist_ok=True)
        info = {"precision": "fp32", "execution_provider": "cpu", "num_threads": 2, "versions": {}}
        times = dict.fromkeys(("import_seconds", "load_seconds", "first_result_seconds"), 0.5)
        times["load_seconds"] = 0.1 if was_there else 0.5
        said = {"info": info, "has_device": self.has_device, "golden_origin": "rendered"}
        return {**said, "resident_bytes": 10**8, **times}

    def _parity(self, batch_size: int) -> dict[str, Any]:
        return self.parity

    def _warm_up(self, batch_size: int, max_seconds: float) -> dict[str, Any]:
        return {"num_calls": 10, "seconds": 1.0, "is_stable": True}

    def _measure(self, batch_size: int, seconds: float) -> dict[str, Any]:
        return {"wall": [self.seconds * batch_size] * 8, "device": []}

    def _matmul_rate(self) -> dict[str, Any]:
        rate = 1e6 if self.spec.runtime == "torch" else 5e5
        return {"flops_per_second": rate, "precision": "fp32", "library": self.spec.runtime}

    def _stages(self) -> dict[str, Any]:
        return {"stages_ms": {"visual": 3.0, "temporal": 1.0, "score": 0.5}}

    def _video(self, path: str, max_pixels: int) -> dict[str, Any]:
        return {"stages_ms": {"demux": 1.0, "decode": 5.0, "visual": 3.0, "score": 0.5}}

    def _directory(self, paths: list[str], max_pixels: int) -> dict[str, Any]:
        return {"seconds": 0.25, "num_failed": 0}

    def _memory(self) -> dict[str, Any]:
        return {"peak_resident_bytes": 2 * 10**8, "device_bytes": None}


class PlayedMeter:
    """Gives what was decided before: so many joules in so many seconds, each time that it is asked.

    Args:
        source: What it says it measures; None for a machine that tells no power.
        stretches: Seconds and joules, one pair for each reading, the last one again and again.
    """

    def __init__(self, source: str | None = None, *stretches: tuple[float, float | None]) -> None:
        self.source, self.stretches = source, list(stretches)
        self.closed = False

    def spent(self) -> Spent:
        if self.source is None:
            return Spent(1.0, None)
        return Spent(*(self.stretches.pop(0) if len(self.stretches) > 1 else self.stretches[0]))

    def __enter__(self) -> PlayedMeter:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True


class Stage:
    """Rows by runtime, and what they were asked in which order."""

    def __init__(self, tmp_path: Path) -> None:
        self.bundle = write_fake_bundle(tmp_path / "bundle").path
        self.log: list[tuple[str, str]] = []
        self.rows: dict[str, PlayedRow] = {}
        self.failing: dict[str, str] = {}
        self.on_device: set[str] = set()
        self.meter = PlayedMeter()

    def spec(self, runtime: str) -> RowSpec:
        return RowSpec(runtime, runtime, self.bundle, None, None, "cpu", 2, num_frames=4)

    def open(self, spec: RowSpec) -> PlayedRow:
        row = PlayedRow(spec, {"torch": 0.020}.get(spec.runtime, 0.010), self.log)
        row.fails_at = self.failing.get(spec.runtime)
        row.has_device = spec.runtime in self.on_device
        self.rows[spec.runtime] = row
        return row

    def run(self, *runtimes: str, **options: Any) -> BenchmarkReport:
        quick = {"num_rounds": 9, "duration_seconds": 1.0, "settle_seconds": 0.0}
        options = {"batch_sizes": (1, 4), **quick, "idle_seconds": 0.0, **options}
        specs = [self.spec(name) for name in runtimes]
        return run_benchmark(specs, open_row=self.open, open_meter=lambda: self.meter, **options)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_what_keeps_a_cache_is_opened_twice_from_an_empty_one(stage: Stage) -> None:
    reference, ours = stage.run("torch", "onnxruntime", batch_sizes=(1,)).rows
    assert reference.second_start is None
    assert ours.start
    assert ours.second_start
    assert (ours.start.load_seconds, ours.second_start.load_seconds) == (0.5, 0.1)


def test_rows_take_turns_and_each_is_first_in_some_rounds(stage: Stage) -> None:
    stage.run("torch", "onnxruntime", batch_sizes=(1,))
    measured = [name for name, what in stage.log if what == "measure"]
    rounds = [measured[i : i + 2] for i in range(0, len(measured), 2)]
    assert rounds == [["torch", "onnxruntime"], ["onnxruntime", "torch"]] * 4 + [rounds[0]]


def test_speedups_are_relative_to_torch_wherever_it_stands(stage: Stage) -> None:
    report = stage.run("onnxruntime", "torch")
    assert report.reference is not None
    assert report.reference.name == "torch"
    ours = report.rows[0]
    assert [r.speedup.value for r in ours.results if r.speedup] == pytest.approx([2.0, 2.0])
    assert [r.speedup for r in report.reference.results] == [None, None]


def test_throughput_and_utilisation_follow_from_latency(stage: Stage) -> None:
    report = stage.run("torch", "onnxruntime")
    result = report.rows[1].results[1]
    assert result.batch_size == 4
    assert result.latency_ms.median.value == pytest.approx(40.0)
    assert result.clips_per_second.value == pytest.approx(100.0)
    # 1990 operations a clip, 100 clips a second, of the faster library's million.
    assert report.matmul_rate is not None
    assert report.matmul_rate.library == "torch"
    assert result.utilisation == pytest.approx(0.199)


def test_utilisation_is_left_out_for_other_numbers_of_frames(stage: Stage) -> None:
    spec = RowSpec("torch", "torch", stage.bundle, None, None, "cpu", 2, num_frames=16)
    report = run_benchmark(
        [spec], open_row=stage.open, batch_sizes=(1,), num_rounds=9, settle_seconds=0
    )
    assert report.rows[0].results[0].utilisation is None


def test_stages_come_from_the_files_where_there_are_some(stage: Stage) -> None:
    without = stage.run("torch").rows[0].stages
    assert without is not None
    assert without.end_to_end_videos_per_second is None
    assert without.stages_ms == {"visual": 3.0, "temporal": 1.0, "score": 0.5}
    stages = stage.run("torch", videos=[Path("a.mp4"), Path("b.mp4")]).rows[0].stages
    assert stages is not None
    assert stages.total_ms == pytest.approx(9.5)
    assert stages.end_to_end_videos_per_second == pytest.approx(8.0)
    assert stages.num_clips == 8  # the first of five passes only fills the page cache


@pytest.mark.parametrize("what", ["open", "warm_up", "measure", "stages"])
def test_a_row_that_fails_is_reported_and_the_others_go_on(stage: Stage, what: str) -> None:
    stage.failing["onnxruntime"] = what
    report = stage.run("torch", "onnxruntime")
    assert report.rows[1].error == f"onnxruntime cannot {what}; leave it out."
    assert len(report.rows[0].results) == 2
    assert not report.passed
    assert any("leave it out" in remark for remark in remarks(report))


def test_each_row_is_measured_once_more_without_turns_where_power_is_readable(
    stage: Stage,
) -> None:
    in_rounds = 2 * 9  # readings before and after each turn
    stretches = [
        *([(0.1, 0.5)] * in_rounds),
        *((0.1, 1.0), (3.0, 6.0)),  # what ran before; 2 W at rest
        *((0.0, 0.0), (0.5, 20.0)),  # burst: 8 clips in half a second, 40 W
        *((0.0, 0.0), (1.0, 25.0)),
        *((0.0, 0.0), (0.8, 16.0)),  # sustained: 8 clips in 0.8 s, 20 W
    ]
    stage.meter = PlayedMeter("CPU package 0 (powercap)", *stretches)
    report = stage.run("onnxruntime", batch_sizes=(1,))
    assert report.power_source == "CPU package 0 (powercap)"
    (result,) = report.rows[0].results
    assert result.watts == pytest.approx(5.0)
    assert result.power is not None
    assert result.power.idle_watts == pytest.approx(2.0)
    burst, sustained = result.power.burst, result.power.sustained
    assert (burst.num_clips, sustained.num_clips) == (8, 8)
    assert burst.watts == pytest.approx(40.0)
    assert burst.clips_per_second == pytest.approx(16.0)
    assert burst.clips_per_second_per_watt == pytest.approx(0.4)
    assert burst.joules_per_clip == pytest.approx(2.5)
    assert sustained.clips_per_second_per_watt == pytest.approx(0.5)
    assert sustained.joules_per_clip == pytest.approx(2.0)
    assert stage.meter.closed
    (table,) = [t for t in tables(report, brief=True) if t.title.startswith("Power")]
    assert table.rows == (
        ("onnxruntime", "1", "burst", "2", "40", "16", "0.4", "2.5"),
        ("onnxruntime", "1", "sustained", "2", "20", "10", "0.5", "2"),
    )
    assert ("power of", "CPU package 0 (powercap)") in context(report)
    assert "clips/s/W" in render_page(report)


def test_a_row_of_larger_batches_counts_all_of_their_clips(stage: Stage) -> None:
    stage.meter = PlayedMeter("GPU 0 (NVML)", (2.0, 64.0))
    result = stage.run("torch", batch_sizes=(4,)).rows[0].results[0]
    assert result.power is not None
    assert result.power.sustained.num_clips == 32
    assert result.power.sustained.joules_per_clip == pytest.approx(2.0)


def test_without_power_nothing_runs_once_more(stage: Stage) -> None:
    report = stage.run("torch", batch_sizes=(1,))
    assert report.power_source is None
    assert report.rows[0].results[0].power is None
    assert [what for _, what in stage.log].count("measure") == 9
    assert not any(table.title.startswith("Power") for table in tables(report))


def test_a_sensor_that_fails_leaves_the_power_out(stage: Stage) -> None:
    stage.meter = PlayedMeter("Jetson VDD_IN", (1.0, None))
    result = stage.run("torch", batch_sizes=(1,)).rows[0].results[0]
    assert result.watts is None
    assert result.power is None


def test_every_row_says_whether_copies_are_inside_its_latency(stage: Stage) -> None:
    stage.on_device = {"tensorrt"}
    report = stage.run("torch", "tensorrt", batch_sizes=(1,))
    assert [row.transfers for row in report.rows] == ["none", "inside"]
    words = dict(context(report))["latency"]
    assert words.endswith("copies to and from a device are inside: tensorrt")
    table = tables(report)[0]
    assert [row[table.headings.index("copies")] for row in table.rows] == ["none", "inside"]
    assert "numpy arrays in host memory" in render_page(report).replace("\n", " ")
    only_cpu = stage.run("torch", batch_sizes=(1,))
    assert dict(context(only_cpu))["latency"].endswith("are inside: no row")


def test_a_gpu_is_no_share_of_what_the_cpu_multiplies(stage: Stage) -> None:
    stage.on_device = {"tensorrt"}
    cpu, gpu = stage.run("torch", "tensorrt", batch_sizes=(1,)).rows
    assert cpu.results[0].utilisation is not None
    assert gpu.results[0].utilisation is None


def test_a_report_of_an_earlier_version_is_still_read() -> None:
    report = read_report(REPORT_BEFORE_POWER)
    assert report.power_source is None
    assert {row.transfers for row in report.rows} == {None}
    assert all(result.power is None for row in report.rows for result in row.results)
    assert "latency" not in dict(context(report))
    assert tables(report)
    assert render_page(report)


def test_nothing_to_report_where_no_row_opens(stage: Stage) -> None:
    stage.failing["torch"] = "open"
    with pytest.raises(BenchmarkError, match=r"No row could be opened.*cannot open"):
        stage.run("torch")
    assert stage.rows["torch"].closed


def test_a_row_that_disagrees_is_said_to_be_worthless(stage: Stage) -> None:
    def open_row(spec: RowSpec) -> PlayedRow:
        row = stage.open(spec)
        row.parity |= {"passed": False, "min_cosine": 0.5, "problem": "embeddings: far off"}
        return row

    report = run_benchmark(
        [stage.spec("onnxruntime")],
        open_row=open_row,
        batch_sizes=(1,),
        num_rounds=9,
        settle_seconds=0,
    )
    assert not report.passed
    assert "its speed means nothing" in remarks(report)[0]
    assert "FAILED" in " ".join(tables(report)[0].rows[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_sizes": ()}, "batch_sizes is empty"),
        ({"batch_sizes": (0, 1)}, "batch_sizes is 0, 1"),
        ({"batch_sizes": (2, 2)}, "each once"),
        ({"duration_seconds": 0.0}, "duration_seconds is 0.0"),
        ({"num_rounds": 3}, "num_rounds is 3; it must be 9 or more"),
    ],
)
def test_wrong_numbers_are_refused(stage: Stage, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stage.run("torch", **options)
    assert not stage.log


def test_a_report_survives_being_written_and_read(stage: Stage, tmp_path: Path) -> None:
    report = stage.run("torch", "onnxruntime")
    write_report(report, tmp_path / "report.json")
    assert read_report(tmp_path / "report.json") == report
    assert [path.name for path in tmp_path.glob("*report*")] == ["report.json"]


def test_a_file_that_is_no_report_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"version": 1, "created": "today"}')
    with pytest.raises(BenchmarkError, match=r"is not a benchmark report of version 1 \(commit"):
        read_report(path)
    with pytest.raises(BenchmarkError, match="cannot be read"):
        read_report(tmp_path / "missing.json")


def test_the_page_holds_everything_and_asks_for_nothing(stage: Stage) -> None:
    report = stage.run("torch", "onnxruntime")
    page = render_page(report)
    assert page.count("<svg") == 4
    for table in tables(report):
        assert all(cell.replace("&", "&amp;") in page for row in table.rows for cell in row)
    assert "src=" not in page
    assert "<link" not in page
    assert "@import" not in page
    embedded = page.partition('id="report">')[2].partition("</script>")[0]
    assert BenchmarkReport.model_validate(json.loads(embedded)) == report


def test_a_name_with_markup_stays_text_on_the_page(stage: Stage) -> None:
    spec = RowSpec("</script><b>", "torch", stage.bundle, None, None, "cpu", 2, num_frames=4)
    page = render_page(
        run_benchmark([spec], open_row=stage.open, batch_sizes=(1,), num_rounds=9, settle_seconds=0)
    )
    before, _, after = page.partition('<script type="application/json" id="report">')
    assert "<b>" not in before
    assert after.count("</script>") == 1
    assert "<b>" not in after.partition("</script>")[2]


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
