"""What a study came to, for a person at a terminal."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from digitlab.base.console import table
from digitlab.base.statistics import Interval
from digitlab.config.types import Config, StudyConfig
from digitlab.study.champion import Results
from digitlab.study.trials import TrialRow

_SHOWN = 10  # trials in the table


def trials_table(rows: Sequence[TrialRow], study: StudyConfig) -> Table:
    """The best trials with their knobs, validation accuracy, size and time."""
    counts = {s: sum(row.state == s for row in rows) for s in ("finished", "pruned", "failed")}
    title = f"study {study.name}: " + ", ".join(f"{n} {state}" for state, n in counts.items() if n)
    finished = [row for row in rows if row.state == "finished"]
    best = sorted(finished, key=lambda row: (-(row.value or 0), row.number))[:_SHOWN]
    names = [knob.split(".")[-1] for knob in study.space]
    names = names if len(set(names)) == len(names) else list(study.space)
    columns = ["trial", "validation", *names, "parameters", "seconds"]
    lines = [
        [
            row.number,
            f"{row.value:.2%}",
            *(short(row.values.get(knob, "")) for knob in study.space),
            f"{row.notes.get('metrics', {}).get('model_parameters', 0):,.0f}",
            f"{row.notes.get('metrics', {}).get('seconds', 0):.1f}",
        ]
        for row in best
    ]
    return table(title, columns, lines)


def short(value: Any) -> str:
    """A knob's value in few characters."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def pruning_text(rows: Sequence[TrialRow], unpruned: Results) -> str:
    """What pruning saved, and whether it cost anything where that was looked into."""
    pruned = [row for row in rows if row.state == "pruned"]
    if not pruned:
        return "no trial was pruned"
    saved = spent = 0.0
    for row in rows:
        metrics = row.notes.get("metrics", {})
        seconds = metrics.get("seconds", 0.0)
        spent += seconds
        if row.state == "pruned" and metrics.get("rung"):
            saved += seconds * (1 / metrics["rung"] - 1)
    text = f"pruning saved about {saved:.0f} s of {saved + spent:.0f} s of training"
    if unpruned:
        best = max((row.value or 0.0 for row in rows if row.state == "finished"), default=0.0)
        won = [key for key, metrics in unpruned.items() if metrics["val_accuracy"] > best]
        trials = ", ".join(key.split("/")[0] for key in won)
        verdict = f"trial {trials} would have won" if won else "none of them would have won"
        text += f"; {len(unpruned)} pruned trials trained to the end: {verdict}"
    return text


def sweep_command(overrides: Sequence[str], *more: str) -> str:
    """The `make` command of a study, with overrides added; a later one replaces an earlier."""
    keys = [override.split("=")[0] for override in more]
    kept = [override for override in overrides if override.split("=")[0] not in keys]
    recipe = [override for override in kept if override.startswith("experiments=")]
    rest = shlex.join([override for override in kept if override not in recipe] + list(more))
    command = "make sweep"
    if recipe and recipe[-1] != "experiments=default":
        command += f" EXPERIMENT={recipe[-1].split('=')[1]}"
    return f"{command} ARGS={shlex.quote(rest)}" if rest else command


def champion_text(
    config: Config, summary: Mapping[str, Any], overrides: Sequence[str] | None
) -> str:
    """The champion, how sure its accuracy is, and what to do next.

    `overrides` are those of the study; None where it is not to be extended.
    """
    study = config.study
    test = Interval(**summary["test_accuracy"])
    validation = {int(n): Interval(**i) for n, i in summary["val_accuracy"].items()}
    number = summary["trial"]
    values = ", ".join(f"{knob}={short(value)}" for knob, value in summary["values"].items())
    lines = [f"champion: trial {number} ({values})"]
    lines += [
        f"  candidate {n}: validation {interval} on new seeds" + (", tied" if n in tied else "")
        for tied in [summary["tied"] if len(summary["tied"]) > 1 else []]
        for n, interval in validation.items()
    ]
    if len(summary["tied"]) > 1:
        lines.append(f"  tied: {summary['tied']}; trial {number} is the cheapest of them")
    lines.append(f"  test accuracy {test}, 95 % interval over seeds, all training images")
    run = summary.get("run_id")
    more = f"study.trials={study.trials + max(1, study.trials // 2)}"
    lines += [
        f"reproduce: make reproduce RUN={run}" if run else "",
        "" if overrides is None else f"extend:    {sweep_command(overrides, more)}",
    ]
    return "\n".join(line for line in lines if line)
