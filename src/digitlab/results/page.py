"""One look for the pages that a person shows to others: a single HTML file that works offline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from math import isnan
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from digitlab.results.charts import Chart

_LAYOUT = {
    "title": None,
    "template": "plotly_white",
    "margin": {"l": 70, "r": 30, "t": 30, "b": 60},
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "height": 420,
    "width": None,
    "autosize": True,
}


@dataclass(frozen=True)
class Section:
    """A part of a page under its own heading; the template shows what is given of the rest."""

    title: str
    text: str = ""
    code: str = ""
    columns: Sequence[str] = ()
    lines: Sequence[Sequence[str]] = ()
    best: str = ""  # the first cell of the line to stress
    figure: str = ""  # plotly's JSON
    film: str = ""  # a PNG in base64
    digits: Sequence[Mapping[str, str]] = ()


def chart_section(chart: Chart) -> Section:
    """Return a chart with its message and its data."""
    if chart.figure is None:
        return Section(chart.title, chart.message)
    chart.figure.update_yaxes(automargin=True)  # for the names of hyperparameters
    chart.figure.update_layout(_LAYOUT)
    figure = chart.figure.to_json().replace("</", "<\\/")  # `</script>` would end the element
    lines = [[_cell(value) for value in line] for line in chart.data.itertuples(index=False)]
    columns = [str(column) for column in chart.data.columns]
    return Section(chart.title, chart.message, columns=columns, lines=lines, figure=figure)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if isnan(value) else f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    return str(value)[:19] if isinstance(value, datetime) else str(value)


def render(template: str, title: str, sections: Sequence[Section], **more: Any) -> str:
    """Fill a template; everything that comes from a store or a person is escaped."""
    folder = FileSystemLoader(Path(__file__).with_name("templates"), encoding="utf-8")
    templates = Environment(loader=folder, autoescape=True, undefined=StrictUndefined)
    return templates.get_template(template).render(title=title, sections=sections, **more)
