"""Check the figures that README and the experiments' pages print (`make check` runs this).

A comment below a paragraph or a table names the values that a figure in it was computed from:

    <!-- 99.05 % = speed.json: fast99, test accuracy, mean -->
    <!-- table = speed.json -->
    <!-- records = records.json -->

The first is compared with the values of that name, rounded as it is printed; the second is a table
of all values of the file but those of other comments; the third, `runs` and `curve` are tables of
what `records.py` wrote. Figures that were recorded elsewhere have a
line that begins with "Source:". Prints what is wrong, one a line; exit status 1 if anything is.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from scipy.special import stdtr

from digitlab.base.statistics import mean_interval

ROOT = Path(__file__).resolve().parents[1]
COMPUTED: dict[str, Callable[[Sequence[float]], float]] = {
    "median": statistics.median,
    "mean": statistics.fmean,
    "sd": statistics.stdev,
}
COMMENT = re.compile(r"<!-- ((?:(?!-->).)+) = (\S+\.json)(?:: (.+?), (\w+))? -->")
MEASURED = re.compile(r"\d\.\d+ (%|s\b|ms)")  # percentages and times


def problems(text: str, folder: Path = ROOT / "experiments") -> Iterator[str]:
    """Yield what is wrong with the figures of a page; `folder` holds the JSON files."""
    above, is_sourced = "", True
    for block in f"{text}\n\n".split("\n\n"):
        comments = COMMENT.findall(block)
        named = {key for _, _, key, _ in COMMENT.findall(text)}
        for printed, file, key, what in comments:
            figures = json.loads((folder / file).read_text())["figures"]
            if printed in ROWS:
                others = [figure for figure in figures if figure["name"] not in named]
                rows = [row for figure in others if (row := ROWS[printed](figure))]
                yield from (f"no row {row}" for row in rows if row not in above)
            elif (value := _value(figures, key, what, printed)) not in printed:
                yield f"{printed} should be {value}: {file}: {key}, {what}"
            elif printed not in above.replace("\n", " "):
                yield f"{printed} does not stand above its comment"
        if comments or block.startswith("Source:"):
            is_sourced = True
        else:
            if not is_sourced:
                yield f"no source of the table with {above.splitlines()[0]}"
            above, is_sourced = block, not (block.startswith("|") and MEASURED.search(block))


def _value(figures: list[dict[str, Any]], key: str, what: str, printed: str) -> str:
    """Return a figure as it should be printed, with as many digits as it is."""
    figure = next((f for f in figures if f["name"] == key), None)
    if figure is None:
        return f"one that is measured: {key} is not"
    values = figure["values"]
    is_share = figure["unit"] == "fraction" or ("%" in printed and max(values) <= 1)
    decimals = re.findall(r"\d+\.?(\d*)", printed)[-1]
    return f"{COMPUTED[what](values) * (100 if is_share else 1):.{len(decimals)}f}"


def _row(figure: dict[str, Any]) -> str:
    values, least, most = figure["values"], figure["least"], figure["most"]
    bar = f">= {least:g}" if least is not None else f"<= {most:g}" if most is not None else ""
    unit = "" if figure["unit"] in ("ratio", "requests") else f" {figure['unit']}"
    spread = f"{min(values):.3g} to {max(values):.3g}"
    middle = f"{statistics.median(values):.3g}{unit}"
    return f"| {figure['name']} | {bar} | {middle} | {spread} | {len(values)} |"


def record_row(figure: dict[str, Any]) -> str:
    """Return the board's line of a record, with the p of a one-sided t-test over its seeds."""
    values, target = figure["values"], figure["least"]
    if target is None:  # a point of the curve, which has no target
        return ""
    p = p_value(values, target)
    verdict = f"{100 * target:.2f} % | {mean_interval(values)} | {p:.2g} | "
    verdict += "met" if p < 0.01 else "not met"
    made = f"{figure['parameters']:,} | {figure['commit'][:7]} | {figure['date']}"
    return f"| `{figure['name']}` | {verdict} | {made} |"


def p_value(values: Sequence[float], target: float) -> float:
    """Return how likely so high a mean would be if the true one were the target: Student's t."""
    if len(values) < 2:
        return 1.0
    above, spread = statistics.fmean(values) - target, statistics.stdev(values)
    if not spread:
        return float(above <= 0)
    return float(stdtr(len(values) - 1, -above / spread * len(values) ** 0.5))


def runs_row(figure: dict[str, Any]) -> str:
    """Return the line of a record's runs: the first characters of their ids, by seed."""
    if figure["least"] is None:
        return ""
    return f"| `{figure['name']}` | {' '.join(run[:8] for run in figure['run_ids'])} |"


def votes_row(figure: dict[str, Any]) -> str:
    """Return the line of the votes of each five runs of a record."""
    votes = figure.get("votes")
    if not votes:
        return ""
    each = ", ".join(f"{100 * vote:.2f} %" for vote in votes)
    return f"| vote of five fits of `{figure['name']}` | {each} |"


def curve_row(figure: dict[str, Any]) -> str:
    """Return the curve's line of a number of images."""
    if figure["least"] is not None:
        return ""
    values = figure["values"]
    spread = f"{min(values):.2%} to {max(values):.2%}".replace("%", "")
    images = figure["name"].removeprefix("curve, ").removesuffix(" images")
    return f"| {int(images):,} | {mean_interval(values)} | {spread} |".replace("  ", " ")


ROWS: dict[str, Callable[[dict[str, Any]], str]] = {
    "table": _row,
    "records": record_row,
    "runs": runs_row,
    "curve": curve_row,
    "votes": votes_row,
}


def main() -> int:
    found = []
    for page in (ROOT / "README.md", *sorted((ROOT / "experiments").glob("*.md"))):
        found += [f"{page.name}: {it}" for it in problems(page.read_text())]
    print("\n".join(found), end="\n" if found else "")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
