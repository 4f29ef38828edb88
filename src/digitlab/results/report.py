"""`digitlab report`: a study on one page that needs no network."""

import base64
import html
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from matplotlib import image as png
from plotly.offline import get_plotlyjs
from torch import Tensor

from digitlab.base.errors import UserError
from digitlab.base.statistics import Interval
from digitlab.config.types import Config
from digitlab.data.datasets import TEST, load_digits
from digitlab.records.mlflow import RunRow, Tracking, open_tracking
from digitlab.records.reader import recorded_environment
from digitlab.results.charts import Chart, champion_charts, study_charts
from digitlab.study.champion import Results, unpruned_jobs
from digitlab.study.fingerprint import begun_study
from digitlab.study.storage import open_storage, study_names
from digitlab.study.summary import champion_text, pruning_text, short, sweep_command
from digitlab.study.trials import Search, TrialRow

_TOP = 20  # trials in the table


def write_report(study: str | None, out: Path | None, lab: Path) -> int:
    """Write a study's report into the lab (or `out`) and onto the study's own run; returns 0.

    Raises:
        UserError: there is no such study, or the file cannot be written.
    """
    known = study_names(open_storage(lab))
    if not known:
        raise UserError("report: no study has begun yet: run `make sweep`")
    name = study or known[-1]
    search, config = begun_study(lab, name)
    tracking = open_tracking(config, lab)
    page = report(search, config, tracking, lab)
    target = out or lab / "reports" / f"{name}.html"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page)
    except OSError as error:
        raise UserError(f"--out {target}: cannot be written: {error.strerror}") from error
    keep_report(page, search, tracking, lab)
    print(f"written: {target}")
    return 0


def report(search: Search, config: Config, tracking: Tracking, lab: Path) -> str:
    """The page: everything it shows is in it.

    A study that runs, or of which every trial failed, has a page too: it says what is missing.
    """
    rows, notes = search.rows(), search.notes()
    champion: Mapping[str, Any] = notes.get("champion", {})
    parent = tracking.get(notes["run_id"]) if notes.get("run_id") else None
    overrides = json.loads(parent.tags.get("digitlab.overrides", "[]")) if parent else []
    parts = [
        _section("Result", _result(config, rows, champion, overrides)),
        _section("Best trials", _table(rows, champion, config)),
        *(_figure(chart) for chart in study_charts(search, config.trainer.epochs)),
        _section("What pruning saved", _text(pruning_text(rows, _unpruned(config, rows, notes)))),
        *_champion(config, champion, tracking, lab),
        _section("How the champion learned", _film(search, champion, tracking)),
        _section("Commands", _commands(config, champion, overrides)),
        _section("Environment", _environment(tracking, parent)),
    ]
    title = f"Study {config.study.name}"
    return _PAGE.format(title=html.escape(title), body="\n".join(parts), plotly=get_plotlyjs())


def keep_report(page: str, search: Search, tracking: Tracking, lab: Path) -> None:
    """Log the page as `report.html` on the study's own run."""
    run = search.notes().get("run_id")
    folder = lab / "staging" / f"report-{search.config.name}"
    if run:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.html").write_text(page)
        tracking.resume(run).keep(folder)


def _section(title: str, inner: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{inner}</section>"


def _text(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def _code(text: str) -> str:
    return f"<pre tabindex='0'>{html.escape(text)}</pre>"


def _figure(chart: Chart) -> str:
    if chart.figure is None:
        return _section(chart.title, _text(chart.says))
    layout = {"title": None, "template": "none", "margin": {"l": 70, "r": 30, "t": 30, "b": 60}}
    chart.figure.update_yaxes(automargin=True)  # for the names of knobs
    chart.figure.update_layout(**layout, height=420, width=None, autosize=True)
    drawn = chart.figure.to_json().replace("</", "<\\/")
    label = html.escape(f"{chart.title}. {chart.says}", quote=True)
    return _section(
        chart.title,
        f"<figure><div class='chart' role='img' aria-label=\"{label}\"></div>"
        f"<script type='application/json'>{drawn}</script>"
        f"<figcaption>{html.escape(chart.says)}</figcaption></figure>",
    )


def _result(
    config: Config,
    rows: Sequence[TrialRow],
    champion: Mapping[str, Any],
    overrides: Sequence[str],
) -> str:
    counts = {state: sum(row.state == state for row in rows) for state in _STATES}
    told = ", ".join(f"{n} {state}" for state, n in counts.items() if n) or "none yet"
    trials = _text(f"{len(rows)} of {config.study.trials} trials: {told}.")
    if not champion:
        return trials + _text("There is no champion yet: the study has not ended.")
    test = Interval(**champion["test_accuracy"])
    values = ", ".join(f"{knob} {short(value)}" for knob, value in champion["values"].items())
    row = rows[champion["trial"]]
    metrics = row.notes.get("metrics", {})
    cost = (
        f"It has {metrics.get('model_parameters', 0):,.0f} parameters and took "
        f"{metrics.get('seconds', 0):.1f} s to train as a trial."
    )
    return (
        f"<p class='head'>The champion, trial {row.number} ({html.escape(values)}), reads "
        f"<strong>{html.escape(str(test))}</strong> of the test images right.</p>"
        + _text(cost)
        + trials
        + _code(champion_text(config, champion, overrides))
    )


_STATES = ("finished", "pruned", "failed", "running", "waiting")


def _table(rows: Sequence[TrialRow], champion: Mapping[str, Any], config: Config) -> str:
    finished = [row for row in rows if row.state == "finished"]
    if not finished:
        reasons = {str(row.notes["reason"]) for row in rows if "reason" in row.notes}
        return _text(f"No trial finished. {' '.join(sorted(reasons)[:3])}")
    best = sorted(finished, key=lambda row: (-(row.value or 0), row.number))[:_TOP]
    seeds = champion.get("val_accuracy", {})
    columns = ["trial", "validation", "new seeds", *config.study.space, "parameters", "seconds"]
    lines = []
    for row in best:
        metrics = row.notes.get("metrics", {})
        interval = seeds.get(str(row.number))
        mark = " (champion)" if row.number == champion.get("trial") else ""
        lines.append(
            [
                f"{row.number}{mark}",
                f"{row.value:.2%}",
                str(Interval(**interval)) if interval else "",
                *(short(row.values.get(knob, "")) for knob in config.study.space),
                f"{metrics.get('model_parameters', 0):,.0f}",
                f"{metrics.get('seconds', 0):.1f}",
            ]
        )
    note = "Holdout accuracies of single seeds; intervals (95 %) where new seeds were trained."
    return _text(note) + _html_table(columns, lines)


def _html_table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th scope='col'>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr><th scope='row'>{html.escape(first)}</th>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in lines
    )
    return (
        "<div class='wide' tabindex='0'><table><thead><tr>"
        f"{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _unpruned(config: Config, rows: list[TrialRow], notes: Mapping[str, Any]) -> Results:
    noted: Results = notes.get("unpruned", {})
    return {key: noted[key] for key in unpruned_jobs(config, rows) if key in noted}


def _champion(
    config: Config, champion: Mapping[str, Any], tracking: Tracking, lab: Path
) -> Iterator[str]:
    """What the first final fit makes of the test images, which were opened when it was tested."""
    run = champion.get("run_id")
    weights_run = tracking.get(run).tags.get("digitlab.weights_run") if run else None
    if not weights_run:
        yield _section("What the champion gets wrong", _text("Missing: no champion is recorded."))
        return
    try:
        kept = tracking.artifact(weights_run, "predictions.safetensors")
    except UserError as error:
        yield _section("What the champion gets wrong", _text(f"Missing: {error}"))
        return
    logits = safetensors.torch.load(kept)["logits"]
    digits = load_digits(lab, config.data.name, TEST, config.data.allow_unknown)
    yield from (_figure(chart) for chart in champion_charts(logits, digits.labels))
    yield _section("Every misread test digit", _misread(logits, digits.labels, digits.images))


def _misread(logits: Tensor, labels: Tensor, images: Tensor) -> str:
    probabilities = logits.softmax(1)
    shown = []
    for place in (logits.argmax(1) != labels).nonzero().flatten().tolist():
        sure, digits = probabilities[place].topk(3)
        read = ", ".join(
            f"{d}: {p:.1%}" for d, p in zip(digits.tolist(), sure.tolist(), strict=True)
        )
        says = f"test image {place}, a {int(labels[place])}, read as {read}"
        shown.append(
            f"<figure class='digit'><img alt='{says}' title='{says}' width='56' height='56' "
            f"src='{_digit(images[place])}'><figcaption>{int(labels[place])} → "
            f"{int(digits[0])}<br>{sure[0]:.0%}</figcaption></figure>"
        )
    return f"<div class='digits'>{''.join(shown) or 'None.'}</div>"


def _digit(image: Tensor) -> str:
    file = io.BytesIO()
    png.imsave(file, 255 - image.numpy(), cmap="gray", vmin=0, vmax=255, format="png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _film(search: Search, champion: Mapping[str, Any], tracking: Tracking) -> str:
    """The filmstrip of the champion's trial."""
    tags = {"digitlab.kind": "trial", "digitlab.study": search.config.name}
    number = str(champion.get("trial", ""))
    rows = tracking.find(tags | {"digitlab.trial": number}) if number else []
    try:
        picture = tracking.artifact(rows[-1].run_id, "pictures/evolution.png")
    except (IndexError, UserError):
        return _text("Missing: no champion's trial is recorded.")
    says = "Before training and after each epoch: filters of the first layer, and ten digits of "
    says += "the validation set with the probabilities of 0 to 9."
    source = base64.b64encode(picture).decode()
    return f"<img class='film' alt='{says}' src='data:image/png;base64,{source}'>" + _text(says)


def _commands(config: Config, champion: Mapping[str, Any], overrides: Sequence[str]) -> str:
    lines = [sweep_command(overrides)]
    if champion.get("run_id"):
        lines.append(f"make reproduce RUN={champion['run_id']}")
    return _code("\n".join([*lines, f"make report ARGS={config.study.name}"]))


def _environment(tracking: Tracking, parent: RunRow | None) -> str:
    if parent is None:
        return _text("Missing: the study was not recorded.")
    environment = recorded_environment(tracking, parent)
    libraries = environment.pop("libraries", {})
    names = ("torch", "torchvision", "pytorch-lightning", "optuna", "mlflow", "hydra-core", "numpy")
    environment |= {name: libraries.get(name) for name in names}
    shown = ("commit", "python", "platform", "processor", "cores", *names)
    return _html_table(["", "value"], [[key, str(environment.get(key))] for key in shown])


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark; --line: #8886; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem; }}
h2 {{ margin: 2.5rem 0 .5rem; }}
.head {{ font-size: 1.25rem; }}
pre, .wide {{ overflow-x: auto; border: 1px solid var(--line); padding: .6rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }}
td {{ white-space: nowrap; }} th[scope=row] {{ text-align: left; }}
figure {{ margin: 0; }} .chart {{ min-height: 420px; }} .film {{ max-width: 100%; }}
.digits {{ display: flex; flex-wrap: wrap; gap: .6rem; }} .digit {{ text-align: center; }}
.digit figcaption {{ font-size: .75rem; line-height: 1.2; }}
</style></head><body>
<header><h1>{title}</h1></header><main>
{body}
</main>
<script>{plotly}</script>
<script>
const dark = matchMedia('(prefers-color-scheme: dark)');
function ink() {{
  return {{ paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)',
            'font.color': dark.matches ? '#ddd' : '#222' }};
}}
const charts = document.querySelectorAll('.chart');
charts.forEach(function (place) {{
  const drawn = JSON.parse(place.nextElementSibling.textContent);
  Plotly.newPlot(place, drawn.data, drawn.layout, {{ responsive: true, displaylogo: false }});
  Plotly.relayout(place, ink());
}});
dark.addEventListener('change', () => charts.forEach(place => Plotly.relayout(place, ink())));
</script></body></html>
"""
