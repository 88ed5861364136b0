"""A report as rows of words, for the terminal and the page alike."""

from __future__ import annotations

from dataclasses import dataclass

from actionclip_deploy.benchmarks.charts import svg_charts
from actionclip_deploy.benchmarks.report import (
    BatchResult,
    BenchmarkReport,
    Estimate,
    Parity,
)
from actionclip_deploy.benchmarks.stages import STAGES
from actionclip_deploy.errors import MissingExtraError

# Of all cores, per cent: more than that used by others moves medians by more than their intervals.
_BUSY_PERCENT = 10.0
_NOTHING = "–"
_TENSORRT = ("tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx")


@dataclass(frozen=True)
class WordTable:
    """A table of words.

    Attributes:
        title: What it shows.
        headings: One per column; the first column is text, the others are numbers.
        rows: Cells by row.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(report: BenchmarkReport, *, brief: bool = False) -> list[WordTable]:
    """All tables of a report: one for each batch size, then power, starting and stages.

    Args:
        report: What was measured.
        brief: Leave out what does not fit into the 80 columns of a terminal.
    """
    batch_table = _brief_batch_table if brief else _batch_table
    made = [batch_table(report, size) for size in report.settings.batch_sizes]
    others = (_power_table(report), _start_table(report), _stages_table(report))
    return [table for table in (*made, *others) if table.rows]


def remarks(report: BenchmarkReport) -> list[str]:
    """What a reader has to know before trusting the numbers."""
    found = [f"{row.name}: {row.error}" for row in report.rows if row.error]
    for row in report.rows:
        found += [
            f"{row.name} disagrees with PyTorch at batch {result.batch_size} "
            f"({result.parity.problem}); its speed means nothing."
            for result in row.results
            if not result.parity.passed
        ]
        restless = [str(r.batch_size) for r in row.results if not r.warm_up.is_stable]
        if restless:
            found.append(
                f"{row.name} had not become stable after its warm-up at batch "
                f"{', '.join(restless)}; give a longer --duration."
            )
    busy = [c for c in report.conditions if (c.cpu_percent_of_others or 0.0) > _BUSY_PERCENT]
    if busy:
        worst = max(c.cpu_percent_of_others or 0.0 for c in busy)
        found.append(
            f"Other processes used up to {worst:.0f} % of the cores "
            f"({', '.join(c.moment for c in busy)}); measure again on a quiet machine."
        )
    return found


def context(report: BenchmarkReport) -> list[tuple[str, str]]:
    """What was measured on what, as pairs of name and value."""
    subject, machine, rate = report.subject, report.machine, report.matmul_rate
    cores = f"{report.settings.num_threads} of {machine['cpu_cores']} cores used"
    pairs = [
        (
            "model",
            f"{subject.backbone}, {subject.visual_prompt}, T = {subject.num_frames}, "
            f"{subject.input_size} pixels",
        ),
        ("checkpoint", subject.source_sha256[:12]),
        ("machine", f"{machine['cpu'] or machine['architecture']}, {cores}"),
        ("GPU", ", ".join(machine["gpus"]) or "none"),
        (
            "rounds",
            f"{report.settings.num_rounds} rounds in turns, "
            f"{report.settings.duration_seconds:g} s for each row and batch size",
        ),
    ]
    if (transfers := _transfer_words(report)) is not None:
        pairs.append(("latency", transfers))
    if report.power_source is not None:
        pairs.append(("power of", report.power_source))
    if rate is not None:
        product = f"{rate.flops_per_second / 1e9:,.0f} GFLOP/s {rate.precision} ({rate.library})"
        pairs.append(("matrix products", product))
    clocks = [c.cpu_mhz for c in report.conditions if c.cpu_mhz]
    if clocks:
        pairs.append(("CPU clock", f"{min(clocks):,.0f} to {max(clocks):,.0f} MHz"))
    names = ("actionclip-deploy", "onnxruntime", "onnxruntime-gpu", "torch", *_TENSORRT)
    versions = [f"{name} {report.versions[name]}" for name in names if name in report.versions]
    pairs += [("versions", ", ".join(versions)), ("commit", report.commit or "none")]
    return [*pairs, ("golden inputs", subject.golden_origin), ("measured", report.created)]


def _batch_table(report: BenchmarkReport, batch_size: int) -> WordTable:
    found = [(row, r) for row in report.rows for r in row.results if r.batch_size == batch_size]
    reference = report.reference
    has_power = any(result.watts is not None for _, result in found)
    headings = (
        *("row", "median ms", "min", "p90", "p95", "p99", "clips/s"),
        *(f"times {reference.name if reference else 'reference'}", "of matmul"),
        *(("W", "clips/J") if has_power else ()),
        *("cosine", "top-1", "top-5", "copies"),
    )
    rows = tuple(
        (
            row.name,
            *_latency_words(result),
            _with_bounds(result.clips_per_second),
            "1 (reference)" if row.is_reference else _with_bounds(result.speedup),
            _NOTHING if result.utilisation is None else f"{result.utilisation:.0%}",
            *(_power_words(result) if has_power else ()),
            *_parity_words(result.parity),
            row.transfers or _NOTHING,
        )
        for row, result in found
    )
    return WordTable(_batch_title(report, batch_size), headings, rows)


def _brief_batch_table(report: BenchmarkReport, batch_size: int) -> WordTable:
    found = [(row, r) for row in report.rows for r in row.results if r.batch_size == batch_size]
    reference = report.reference
    times = f"x {reference.name if reference else 'reference'}"
    headings = ("row", "median ms", "p95", "clips/s", times, "cosine", "top-1")
    rows = []
    for row, result in found:
        _, _, _, p95, _ = _latency_words(result)
        cosine, top1, _ = _parity_words(result.parity)
        median, rate = result.latency_ms.median.value, result.clips_per_second.value
        speedup = "1" if row.is_reference else _with_bounds(result.speedup)
        numbers = (f"{median:.2f}", p95, f"{rate:.4g}", speedup, cosine, top1)
        rows.append((row.name, *numbers))
    return WordTable(_batch_title(report, batch_size), headings, tuple(rows))


def _batch_title(report: BenchmarkReport, batch_size: int) -> str:
    clips = "1 clip" if batch_size == 1 else f"{batch_size} clips"
    return f"{clips} of {report.subject.num_frames} frames in a call"


def _transfer_words(report: BenchmarkReport) -> str | None:
    """What every latency is from and to; None for reports that do not say."""
    told = [row for row in report.rows if row.transfers]
    if not told:
        return None
    inside = ", ".join(row.name for row in told if row.transfers == "inside") or "no row"
    return f"from numpy arrays to numpy arrays; copies to and from a device are inside: {inside}"


def _power_table(report: BenchmarkReport) -> WordTable:
    rows = []
    for row in report.rows:
        for result in row.results:
            if result.power is None:
                continue
            idle = result.power.idle_watts
            for when, use in (("burst", result.power.burst), ("sustained", result.power.sustained)):
                numbers = (use.watts, use.clips_per_second, use.clips_per_second_per_watt)
                cells = [f"{number:.4g}" for number in (*numbers, use.joules_per_clip)]
                head = (row.name, str(result.batch_size), when)
                rows.append((*head, _NOTHING if idle is None else f"{idle:.4g}", *cells))
    headings = ("row", "clips", "when", "idle W", "W", "clips/s", "clips/s/W", "J/clip")
    title = "Power without turns: the first seconds after a rest, and the last third of the run"
    return WordTable(title, headings, tuple(rows))


def _start_table(report: BenchmarkReport) -> WordTable:
    headings = ("row", "import s", "load s", "first s", "again s", "MB", "peak MB", "GPU MB")
    rows = []
    for row in report.rows:
        if row.start is None:
            continue
        again, lived = row.second_start, row.second_start or row.start
        device = lived.device_bytes
        rows.append(
            (
                row.name,
                f"{row.start.import_seconds:.2f}",
                f"{row.start.load_seconds:.2f}",
                f"{row.start.first_result_seconds:.2f}",
                f"{again.load_seconds + again.first_result_seconds:.2f}" if again else _NOTHING,
                f"{lived.resident_bytes / 1e6:,.0f}",
                f"{lived.peak_resident_bytes / 1e6:,.0f}",
                _NOTHING if device is None else f"{device / 1e6:,.0f}",
            )
        )
    title = "From a new process to the first result (again: with the cache that it left)"
    return WordTable(title, headings, tuple(rows))


def _stages_table(report: BenchmarkReport) -> WordTable:
    staged = [row for row in report.rows if row.stages]
    present = [s for s in STAGES if any(row.stages and s in row.stages.stages_ms for row in staged)]
    has_files = any(row.stages and row.stages.end_to_end_videos_per_second for row in staged)
    rows = []
    for row in staged:
        assert row.stages is not None
        times = [row.stages.stages_ms.get(name) for name in present]
        rate = row.stages.end_to_end_videos_per_second
        cells = [row.name, *(_NOTHING if ms is None else f"{ms:.2f}" for ms in times)]
        cells.append(f"{row.stages.total_ms:.2f}")
        if has_files:
            cells.append(_NOTHING if rate is None else f"{rate:.1f}")
        rows.append(tuple(cells))
    headings = ("row", *present, "together", *(("videos/s",) if has_files else ()))
    title = "Stages of one clip in ms"
    if has_files:
        title += "; videos/s of all files, decoding ahead"
    return WordTable(title, headings, tuple(rows))


def _latency_words(result: BatchResult) -> tuple[str, ...]:
    latency = result.latency_ms
    tails = (latency.p90, latency.p95, latency.p99)
    return (
        _with_bounds(latency.median),
        f"{latency.minimum:.2f}",
        *(_NOTHING if tail is None else f"{tail.value:.2f}" for tail in tails),
    )


def _power_words(result: BatchResult) -> tuple[str, str]:
    if result.watts is None:
        return _NOTHING, _NOTHING
    return f"{result.watts:.1f}", f"{result.clips_per_second.value / result.watts:.2f}"


def _parity_words(parity: Parity) -> tuple[str, ...]:
    if parity.min_cosine is None:
        return ("FAILED",) * 3
    shares = (parity.top1_agreement, parity.top5_agreement)
    words = (
        _cosine(parity.min_cosine),
        *(_NOTHING if share is None else f"{share:.0%}" for share in shares),
    )
    return words if parity.passed else (f"{words[0]} FAILED", *words[1:])


def _cosine(value: float) -> str:
    """With as many nines as there are, and no rounding up to 1."""
    return f"{min(value, 0.9999999):.7f}" if value < 1.0 - 5e-8 else "1.0000000"


def _with_bounds(estimate: Estimate | None) -> str:
    if estimate is None:
        return _NOTHING
    digits = 2 if estimate.value < 10 else 1 if estimate.value < 100 else 0
    value, low, high = (
        f"{number:,.{digits}f}" for number in (estimate.value, estimate.low, estimate.high)
    )
    return f"{value} [{low}, {high}]"


# One self-contained HTML page of a report: charts, tables, context, and the report itself.


try:
    import jinja2
    from markupsafe import Markup
except ImportError as exc:
    raise MissingExtraError("A benchmark's page", "benchmark") from exc

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Benchmark of {{ report.subject.backbone }}</title>
<style>
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --line: #d8dadd; --soft: #5c6370;
        --bad: #b3261e; --panel: #f5f6f7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e7e9; --paper: #17191c; --line: #3a3e44; --soft: #a3a9b3; --bad: #ff8a80;
          --panel: #202327; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right;
         white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
.remarks { border-left: 4px solid var(--bad); padding: .3rem 1rem; background: var(--panel); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr));
          gap: 1rem; }
figure { margin: 0; background: #fff; border: 1px solid var(--line); border-radius: 6px;
         padding: .5rem; }
figure svg { width: 100%; height: auto; display: block; }
footer { color: var(--soft); margin: 2rem 0; }
</style>
</head>
<body>
<h1>Benchmark of {{ report.subject.backbone }}, {{ report.subject.visual_prompt }}</h1>
<dl>{% for name, value in context %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
{% if remarks %}<div class="remarks" role="alert"><ul>
{% for remark in remarks %}<li>{{ remark }}</li>{% endfor %}</ul></div>{% endif %}
<h2>Charts</h2>
<div class="charts">{% for title, svg in charts %}
<figure role="img" aria-label="{{ title }}; its numbers are in the tables">{{ svg }}</figure>
{% endfor %}</div>
{% for table in tables %}
<h2>{{ table.title }}</h2>
<div class="scroll"><table>
<thead><tr>
{% for heading in table.headings %}<th scope="col">{{ heading }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% endfor %}
<footer>Numbers in brackets are 95 % intervals from a bootstrap over rounds. Each row ran in a
process of its own, and all took turns in every round. A speed-up is the median over the rounds
of the ratio of the two rows' medians. "of matmul" is the model's arithmetic over the time, as
a share of the matrix-product rate measured in the same run. Cosine and agreement are with
PyTorch's golden outputs, at the same batch size. Each latency is from numpy arrays in host memory
to numpy arrays in host memory: where copies are "inside", those to and from the device are in
it.</footer>
<script type="application/json" id="report">{{ json }}</script>
</body>
</html>
"""


def render_page(report: BenchmarkReport) -> str:
    """Make the page; it needs nothing from elsewhere, and holds the report as JSON too."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(_TEMPLATE).render(
        report=report,
        context=context(report),
        remarks=remarks(report),
        charts=[(title, Markup(svg)) for title, svg in svg_charts(report)],
        tables=tables(report),
        # Inside of a script element "</" would end it, whatever it is part of.
        json=Markup(report.model_dump_json().replace("</", "<\\/")),
    )
