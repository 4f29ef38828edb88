"""A study in text: its best trials, its champion, what to do next."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from digitlab.base.choice import describe_choice
from digitlab.base.console import table
from digitlab.base.errors import counted
from digitlab.base.invocation import SHORT_ID, command
from digitlab.base.statistics import Interval
from digitlab.config.compose import store_words
from digitlab.config.types import Config
from digitlab.study.champion import Results
from digitlab.study.goal import Goal, TrialRow
from digitlab.study.samplers import PROMOTED_FROM, count_points
from digitlab.study.space import read_space

_SHOWN, _WIDTH = 10, 80  # trials in the table; characters of its lines


def trials_table(rows: Sequence[TrialRow], config: Config) -> Table:
    """Return the best trials with their values, validation accuracy, size and time.

    It fits a terminal of 80 columns: columns are left out from the right, which the title mentions.
    """
    study = config.study
    counts = {s: sum(row.state == s for row in rows) for s in ("finished", "pruned", "failed")}
    title = f"study {study.name}: " + ", ".join(f"{n} {state}" for state, n in counts.items() if n)
    names = [name.split(".")[-1] for name in study.space]
    names = names if len(set(names)) == len(names) else list(study.space)
    heads = ["trial", "validation", *(name.replace("_", "\n") for name in names)]
    heads += ["params", "time\n(s)"]
    lines = []
    for row in Goal.of(study).best_first(rows)[:_SHOWN]:
        metrics = row.notes.get("metrics", {})
        values = [short(row.values.get(name, "")) for name in study.space]
        size = f"{metrics.get('model_parameters', 0):,.0f}"
        seconds = f"{metrics.get('seconds', 0):.1f}"
        lines.append([str(row.number), f"{row.value:.2%}", *values, size, seconds])
    shown = len(heads)
    while _width(heads[:shown], lines) > _WIDTH:
        shown -= 1
    if shown < len(heads):
        words = (f"--study={study.name}", "--csv", *store_words(config))
        title += f"\n(all columns: {command('runs', *words)})"
    return table(title, heads[:shown], [line[:shown] for line in lines])


def _width(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> int:
    """Return the width of a table: three characters beside each column, and a last line."""
    columns = zip(heads, *(line[: len(heads)] for line in lines), strict=True)
    widths = (max(len(part) for cell in cells for part in cell.split("\n")) for cells in columns)
    return 1 + sum(3 + width for width in widths)


def short(value: Any) -> str:
    """Return a hyperparameter's value in few characters."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def pruning_text(rows: Sequence[TrialRow], unpruned: Results) -> str:
    """Return what pruning saved, and whether it cost anything where that was checked."""
    pruned = [row for row in rows if row.state == "pruned"]
    if not pruned:
        return "no trial was pruned"
    promoted = {row.notes[PROMOTED_FROM] for row in rows if PROMOTED_FROM in row.notes}
    saved = spent = 0.0
    for row in rows:
        rung = row.notes.get("metrics", {}).get("rung")
        spent += row.seconds
        if row.number in promoted:  # what it trained was trained again
            saved -= row.seconds
        elif row.state == "pruned" and rung:
            saved += row.seconds * (1 / rung - 1)
    saved = max(saved, 0.0)
    text = f"pruning saved about {saved:.0f} s of {saved + spent:.0f} s of training"
    if promoted:
        text += f"; the best {len(promoted)} of {len(pruned)} pruned trials were trained to the end"
    if unpruned:
        best = max((row.value or 0.0 for row in rows if row.state == "finished"), default=0.0)
        better = [key for key, metrics in unpruned.items() if metrics["val_accuracy"] > best]
        trials = ", ".join(key.split("/")[0] for key in better)
        verdict = f"trial {trials} would have won" if better else "none of them would have won"
        text += f"; {counted(len(unpruned), 'pruned trial')} trained to the end: {verdict}"
    return text


def sweep_command(overrides: Sequence[str], *more: str) -> str:
    """Return the command that runs a study, with overrides added; a later one replaces."""
    words = [*overrides, *more]
    last = {word.split("=")[0]: i for i, word in enumerate(words)}
    return command("sweep", *(words[i] for i in sorted(last.values())))


def continue_command(notes: Mapping[str, Any]) -> str:
    """Return the command that goes on with a study, from what is noted of it."""
    return str(notes.get("again") or sweep_command(notes.get("overrides", [])))


def champion_text(
    config: Config, summary: Mapping[str, Any], overrides: Sequence[str] | None
) -> str:
    """Return champion, accuracy and next steps; `overrides` is None where none are to follow."""
    study = config.study
    test = Interval(**summary["test_accuracy"])
    values = ", ".join(f"{name}={short(value)}" for name, value in summary["values"].items())
    lines = [f"champion: trial {summary['trial']} ({values})", *describe_choice(summary)]
    images, how = config.data.images, "on all training images"
    lines.append(f"  test accuracy {test}, fits {f'of {images:,} images' if images else how}")
    if summary.get("test_errors"):
        seeds, of_images = (f"{100 * error:.3f}" for error in summary["test_errors"])
        lines.append(
            f"    standard error: {seeds} points from the seeds, {of_images} from the images"
        )
    if not summary.get("meets_require", True):
        lines.append("  no trial meets study.require: it comes nearest")
    if front := summary.get("front"):
        numbers, confirmed = ", ".join(map(str, front)), len(summary["val_accuracy"])
        left = confirmed < len(front) > 1
        settings = f"study.confirm={len(front)} study.confirm_fits={2 * len(front)}"
        more = f"; {confirmed} confirmed ({settings} confirms all)" if left else ""
        lines.append(f"  Pareto front: trials {numbers}{more}")
    if summary.get("looks", 1) > 1:
        lines.append(f"    this is look {summary['looks']} of the study at the test set")
    if vote := summary.get("vote"):
        together = f"{vote['test_accuracy']:.2%}".replace("%", " %")
        lines.append(f"  the {vote['fits']} fits voting together (mean probability): {together}")
    if summary.get("run_id"):
        again = command("reproduce", summary["run_id"][:SHORT_ID], *store_words(config))
        lines.append(f"reproduce: {again}")
    total, points = study.trials, count_points(study, read_space(config))
    if summary.get("asked", {}).get("trials", 0) >= points:
        lines.append(f"the grid's {counted(int(points), 'point')} are all tried")
    elif overrides is not None and total < points:
        more = f"study.trials={min(total + max(1, total // 2), points)}"
        lines.append(f"extend:    {sweep_command(overrides, more)}")
    return "\n".join(lines)


def describe_study(config: Config, overrides: Sequence[str], champion: str = "") -> str:
    """Return what stands on the page of a study's own run: Markdown."""
    study = config.study
    space = [f"| `{name}` | `{text}` |" for name, text in study.space.items()]
    result = ["No champion yet."]
    if champion:
        result = ["### Result", "```", champion, "```", "", "Artifacts: **report.html**."]
    return "\n".join(
        [
            f"## Study {study.name}",
            f"{counted(study.trials, 'trial')} ({study.sampler} sampler, {study.pruner} pruner), "
            f"for {Goal.of(study).aim()} on validation images.",
            *("", "| hyperparameter | searched |", "|---|---|", *space, ""),
            *(*result, "", f"Start or go on: `{sweep_command(overrides)}`"),
        ]
    )
