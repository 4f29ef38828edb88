"""One look for the pages that a person shows to others: a single HTML file that works offline."""

import re
from datetime import datetime
from math import isnan
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from digitlab.study.summary import short

_CLEAR = "rgba(0,0,0,0)"
_LAYOUT = {
    "title": None,
    "template": "plotly_white",
    "margin": {"l": 70, "r": 30, "t": 30, "b": 60},
    "paper_bgcolor": _CLEAR,
    "plot_bgcolor": _CLEAR,
    "height": 420,
    "width": None,
}


def render(template: str, title: str, **content: Any) -> str:
    """Fill a template and its table of contents; what comes from a store is escaped."""
    folder = FileSystemLoader(Path(__file__).with_name("templates"), encoding="utf-8")
    templates = Environment(loader=folder, autoescape=True, undefined=StrictUndefined)
    templates.filters |= {"cell": cell, "short": short, "figure": _figure}
    page = templates.get_template(template).render(title=title, **content)
    headings = re.findall(r'<section id="([^"]*)".*?>\s*<h2[^>]*>(.*?)</h2>', page)
    links = "\n".join(f'<li><a href="#{place}">{text}</a></li>' for place, text in headings)
    return page.replace("<!-- contents -->", links, 1)


def cell(value: Any) -> str:
    """Format a table's value: four digits of a fraction, times to the second."""
    if value is None or (isinstance(value, float) and isnan(value)):
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    return str(value)[:19] if isinstance(value, datetime) else str(value)


def _figure(figure: Any) -> Markup:
    """Return plotly's JSON for a script element, which `</script>` would end."""
    figure.update_yaxes(automargin=True)  # for the names of hyperparameters
    return Markup(figure.update_layout(_LAYOUT).to_json().replace("</", "<\\/"))  # noqa: S704
