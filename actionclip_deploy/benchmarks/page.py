"""One self-contained HTML page of a report: charts, tables, context, and the report itself."""

from __future__ import annotations

from actionclip_deploy.benchmarks.charts import svg_charts
from actionclip_deploy.benchmarks.report import BenchmarkReport
from actionclip_deploy.benchmarks.show import context, remarks, tables
from actionclip_deploy.errors import MissingExtraError

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
