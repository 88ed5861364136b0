"""A report as tables of words, for the terminal, and as one HTML page with charts and tables.

The page is made by Jinja. rich's own HTML export was tried (15.0): it gives the terminal's text as
one preformatted block, without tables that a screen reader or a spreadsheet takes, nor anything
for a narrow or a dark screen, and charts and data would have to be pasted into it all the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from actionclip_deploy.benchmarks.charts import svg_charts
from actionclip_deploy.benchmarks.report import BenchmarkReport, Estimate, Parity
from actionclip_deploy.benchmarks.stages import STAGES
from actionclip_deploy.errors import MissingExtraError

try:
    import jinja2
    from markupsafe import Markup
except ImportError as exc:
    raise MissingExtraError("A benchmark's page", "benchmark") from exc

# Of all cores, per cent: more than that used by others moves medians by more than their intervals.
_BUSY_PERCENT = 10.0
_NOTHING = "–"
_TENSORRT = ("tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx")


@dataclass(frozen=True)
class WordTable:
    """A table of words."""

    title: str
    headings: tuple[str, ...]  # one per column; the first column is text, the others are numbers
    rows: tuple[tuple[str, ...], ...]  # cells by row


def tables(report: BenchmarkReport, *, brief: bool = False) -> list[WordTable]:
    """All tables of a report: one for each batch size, then power, starting and stages.

    Args:
        report: What was measured.
        brief: Leave out what does not fit into the 80 columns of a terminal.
    """
    made = [_batch_table(report, size, brief=brief) for size in report.settings.batch_sizes]
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
    names = ("actionclip-deploy", "onnxruntime", "onnxruntime-gpu", "openvino", "torch", *_TENSORRT)
    versions = [f"{name} {report.versions[name]}" for name in names if name in report.versions]
    pairs += [("versions", ", ".join(versions)), ("commit", report.commit or "none")]
    return [*pairs, ("golden inputs", subject.golden_origin), ("measured", report.created)]


def _batch_table(report: BenchmarkReport, batch_size: int, *, brief: bool) -> WordTable:
    found = [(row, r) for row in report.rows for r in row.results if r.batch_size == batch_size]
    has_power = any(result.watts is not None for _, result in found)
    reference = report.reference
    clips = "1 clip" if batch_size == 1 else f"{batch_size} clips"
    title = f"{clips} of {report.subject.num_frames} frames in a call"
    times = f"{'x' if brief else 'times'} {reference.name if reference else 'reference'}"
    if brief:
        headings: tuple[str, ...] = ("row", "median ms", "p95", "clips/s", times, "cosine", "top-1")
    else:
        headings = (
            *("row", "median ms", "min", "p90", "p95", "p99", "clips/s", times, "of matmul"),
            *(("W", "clips/J") if has_power else ()),
            *("cosine", "top-1", "top-5", "copies"),
        )
    rows = []
    for row, result in found:
        latency, rate, parity = result.latency_ms, result.clips_per_second, result.parity
        p90, p95, p99 = (_number(each, ".2f") for each in (latency.p90, latency.p95, latency.p99))
        cosine, top1, top5 = _parity_words(parity)
        speedup = _with_bounds(result.speedup)
        if brief:
            median = f"{latency.median.value:.2f}"
            speedup = "1" if row.is_reference else speedup
            rows.append((row.name, median, p95, f"{rate.value:.4g}", speedup, cosine, top1))
            continue
        watts = result.watts
        power = (_number(watts, ".1f"), _number(watts and rate.value / watts, ".2f"))
        rows.append(
            (
                *(row.name, _with_bounds(latency.median), f"{latency.minimum:.2f}", p90, p95, p99),
                *(_with_bounds(rate), "1 (reference)" if row.is_reference else speedup),
                _number(result.utilisation, ".0%"),
                *(power if has_power else ()),
                *(cosine, top1, top5, row.transfers or _NOTHING),
            )
        )
    return WordTable(title, headings, tuple(rows))


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
                rows.append((*head, _number(idle, ".4g"), *cells))
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
        device_bytes = lived.device_bytes
        rows.append(
            (
                row.name,
                f"{row.start.import_seconds:.2f}",
                f"{row.start.load_seconds:.2f}",
                f"{row.start.first_result_seconds:.2f}",
                f"{again.load_seconds + again.first_result_seconds:.2f}" if again else _NOTHING,
                f"{lived.resident_bytes / 1e6:,.0f}",
                f"{lived.peak_resident_bytes / 1e6:,.0f}",
                _number(None if device_bytes is None else device_bytes / 1e6, ",.0f"),
            )
        )
    title = "From a new process to the first result (again: with the cache that it left)"
    return WordTable(title, headings, tuple(rows))


def _stages_table(report: BenchmarkReport) -> WordTable:
    staged = [(row.name, row.stages) for row in report.rows if row.stages]
    present = [name for name in STAGES if any(name in each.stages_ms for _, each in staged)]
    has_files = any(each.end_to_end_videos_per_second for _, each in staged)
    rows = []
    for row_name, stages in staged:
        times = (*(stages.stages_ms.get(name) for name in present), stages.total_ms)
        rate = _number(stages.end_to_end_videos_per_second, ".1f")
        cells = (row_name, *(_number(ms, ".2f") for ms in times))
        rows.append((*cells, rate) if has_files else cells)
    headings = ("row", *present, "together", *(("videos/s",) if has_files else ()))
    title = "Stages of one clip in ms"
    if has_files:
        title += "; videos/s of all files, decoding ahead"
    return WordTable(title, headings, tuple(rows))


def _number(value: Estimate | float | None, form: str) -> str:
    if value is None:
        return _NOTHING
    return format(value.value if isinstance(value, Estimate) else value, form)


def _parity_words(parity: Parity) -> tuple[str, str, str]:
    """Cosine and agreement of the first and of the first five labels."""
    if parity.min_cosine is None:
        return ("FAILED", "FAILED", "FAILED")
    # With as many nines as there are, and no rounding up to 1.
    value = 1.0 if parity.min_cosine >= 1.0 - 5e-8 else min(parity.min_cosine, 0.9999999)
    cosine = f"{value:.7f}" if parity.passed else f"{value:.7f} FAILED"
    return cosine, _number(parity.top1_agreement, ".0%"), _number(parity.top5_agreement, ".0%")


def _with_bounds(estimate: Estimate | None) -> str:
    if estimate is None:
        return _NOTHING
    digits = 2 if estimate.value < 10 else 1 if estimate.value < 100 else 0
    value, low, high = (
        f"{number:,.{digits}f}" for number in (estimate.value, estimate.low, estimate.high)
    )
    return f"{value} [{low}, {high}]"


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
