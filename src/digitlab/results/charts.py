"""A study in charts: Optuna's own where it has them, plotly's where it lacks them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
import plotly.graph_objects as go
from optuna.importance import get_param_importances
from optuna.trial import create_trial
from optuna.visualization import (
    plot_contour,
    plot_optimization_history,
    plot_parallel_coordinate,
    plot_slice,
    plot_timeline,
)
from torch import Tensor

from digitlab.config.types import Pruner
from digitlab.study.trials import Search, TrialRow

_RESAMPLED = 20  # times, for the spread of the knobs' importance
_BINS = 10  # of confidence


@dataclass(frozen=True)
class Chart:
    """A figure with what it says in words; `figure` is None where something is missing."""

    title: str
    says: str
    figure: Any = None


def study_charts(search: Search, epochs: int) -> list[Chart]:
    """All charts of a study's trials; `epochs` is of those that do not search it."""
    study = optuna.load_study(study_name=search.config.name, storage=search.storage)
    rows = search.rows()
    judged, measure = _judged(search, rows)
    knobs = [knob.name for knob in search.knobs]
    important = _importance(judged, knobs)
    top = list(important)[:2] or knobs[:2]
    weights = ", ".join(f"{knob} {median:.0%}" for knob, (_, median, _) in important.items())
    drawers: list[tuple[str, str, Callable[[], Any]]] = [
        ("History", "Each finished trial, and the best so far.",
         lambda: plot_optimization_history(study, target_name="validation accuracy")),
        ("Learning curves", "Holdout accuracy by epoch; pruned trials are dashed.",
         lambda: _curves(rows, epochs)),
        ("Parallel coordinates", f"A line a trial, from its knobs to {measure}.",
         lambda: plot_parallel_coordinate(judged, knobs, target_name=measure)),
        ("What mattered", f"Importance of each knob for {measure} (PED-ANOVA), median and 10 to "
         f"90 % of {_RESAMPLED} resamplings of the trials: {weights or 'not to be told'}.",
         lambda: _importance_bars(important)),
        ("Slices", f"One knob at a time against {measure}.",
         lambda: plot_slice(judged, knobs, target_name=measure)),
        ("Contours", f"The two knobs that mattered most ({' and '.join(top)}) against {measure}.",
         lambda: plot_contour(judged, top, target_name=measure)),
        ("Accuracy against seconds", "Finished trials; on the line, none is both better and "
         "faster (Pareto front).", lambda: _pareto(rows, "seconds")),
        ("Accuracy against parameters", "Finished trials; on the line, none is both better and "
         "smaller (Pareto front).", lambda: _pareto(rows, "model_parameters")),
        ("Timeline", "When each trial ran, and how it ended.", lambda: plot_timeline(study)),
    ]  # fmt: skip
    return [_chart(title, says, draw, rows) for title, says, draw in drawers]


def _chart(title: str, says: str, draw: Callable[[], Any], rows: Sequence[TrialRow]) -> Chart:
    """Draw, or say why not: a study may have one trial, or none that finished."""
    ended = sum(row.value is not None for row in rows)
    if ended < 2:
        return Chart(title, f"Missing: two trials with a result are needed, there are {ended}.")
    try:
        figure = draw()
    except (ValueError, RuntimeError) as error:
        return Chart(title, f"Missing: {str(error).splitlines()[0]}")
    return Chart(title, says if figure.data else f"Missing: {says} No trial has it.", figure)


def _judged(search: Search, rows: Sequence[TrialRow]) -> tuple[optuna.Study, str]:
    """The trials with a measure that all of them have, and what it is.

    Where trials were pruned the few that finished say little of the knobs, and a last accuracy
    does not compare with one at a rung: the first rung's is taken, which every trial reached.
    """
    pruning = search.config.pruner is not Pruner.none
    trials = search.storage.get_all_trials(search.id, deepcopy=False)
    judged = optuna.create_study(direction="maximize")
    for trial, row in zip(trials, rows, strict=False):  # more may have begun meanwhile
        value = trial.intermediate_values.get(0) if pruning else row.value
        if value is not None and len(trial.params) == len(search.knobs):
            judged.add_trial(
                create_trial(params=trial.params, distributions=trial.distributions, value=value)
            )
    rung = (
        f"accuracy at {search.config.rungs[0]:g} of the steps" if pruning else "validation accuracy"
    )
    return judged, rung


def _importance(judged: optuna.Study, knobs: list[str]) -> dict[str, tuple[float, float, float]]:
    """Low, median and high importance of each knob over resamplings, most important first."""
    trials = judged.get_trials(deepcopy=False)
    if len(trials) < 4 or len({trial.value for trial in trials}) < 2:
        return {}
    chance = np.random.default_rng(0)
    found: dict[str, list[float]] = {knob: [] for knob in knobs}
    for _ in range(_RESAMPLED):
        sample = optuna.create_study(direction="maximize")
        sample.add_trials([trials[i] for i in chance.integers(len(trials), size=len(trials))])
        try:
            importance = get_param_importances(sample)
        except (ValueError, RuntimeError):  # a resampling without any variation
            continue
        for knob in knobs:
            found[knob].append(importance.get(knob, 0.0))
    spread = {
        knob: tuple(float(q) for q in np.quantile(values, (0.1, 0.5, 0.9)))
        for knob, values in found.items()
        if values
    }
    ranked = sorted(spread.items(), key=lambda item: -item[1][1])
    return {knob: (low, median, high) for knob, (low, median, high) in ranked}


def _importance_bars(important: Mapping[str, tuple[float, float, float]]) -> go.Figure:
    if not important:
        raise ValueError("four trials with different results are needed")
    low, median, high = (list(values) for values in zip(*important.values(), strict=True))
    error = {
        "array": [h - m for h, m in zip(high, median, strict=True)],
        "arrayminus": [m - w for m, w in zip(median, low, strict=True)],
    }
    figure = go.Figure(go.Bar(x=median, y=list(important), orientation="h", error_x=error))
    return figure.update_layout(
        xaxis_title="importance (share)", yaxis={"autorange": "reversed"}, title="Importance"
    )


def _curves(rows: Sequence[TrialRow], epochs: int) -> go.Figure:
    figure = go.Figure()
    for row in rows:
        curve = row.notes.get("curve", [])
        metrics = row.notes.get("metrics", {})
        points = [(float(epoch), value) for epoch, value in enumerate(curve, 1)]
        if row.state == "pruned" and "rung" in metrics and row.value is not None:
            place = metrics["rung"] * row.values.get("trainer.epochs", epochs)
            points = [point for point in points if point[0] < place] + [(place, row.value)]
        if points:
            pruned = row.state == "pruned"
            x, y = zip(*points, strict=True)
            figure.add_scatter(
                x=x,
                y=y,
                name=f"trial {row.number}" + (" (pruned)" if pruned else ""),
                mode="lines+markers",
                opacity=0.4 if pruned else 0.9,
                line={"dash": "dot" if pruned else "solid", "width": 1.5},
            )
    return figure.update_layout(
        title="Learning curves",
        xaxis_title="epoch",
        yaxis_title="validation accuracy",
        showlegend=False,
    )


def _pareto(rows: Sequence[TrialRow], cost: str) -> go.Figure:
    points = sorted(
        (row.notes["metrics"][cost], -(row.value or 0.0), row.number)
        for row in rows
        if row.state == "finished" and cost in row.notes.get("metrics", {})
    )
    figure = go.Figure()
    front: list[tuple[float, float, int]] = []
    for point in points:
        if not front or point[1] < front[-1][1]:
            front.append(point)
    for name, shown, mode in (("trials", points, "markers"), ("Pareto front", front, "lines")):
        figure.add_scatter(
            x=[x for x, _, _ in shown],
            y=[-y for _, y, _ in shown],
            text=[f"trial {number}" for _, _, number in shown],
            name=name,
            mode=mode,
        )
    return figure.update_layout(
        title=f"Accuracy against {cost}", xaxis_title=cost, yaxis_title="validation accuracy"
    )


def champion_charts(logits: Tensor, labels: Tensor) -> list[Chart]:
    """What the champion's weights make of the test images, (M, 10) and (M,)."""
    guesses, truths = logits.argmax(1).numpy(), labels.numpy()
    counts = np.zeros((10, 10), int)
    np.add.at(counts, (truths, guesses), 1)
    wrong = counts * (1 - np.eye(10, dtype=int))
    most = np.unravel_index(wrong.argmax(), wrong.shape)
    matrix = go.Figure(
        go.Heatmap(z=wrong, text=counts, texttemplate="%{text}", colorscale="Reds", showscale=False)
    )
    ticks = {"tickmode": "array", "tickvals": list(range(10))}
    matrix.update_layout(
        title="Confusion", xaxis=ticks | {"title": "read as"}, yaxis=ticks | {"title": "is"}
    )
    matrix.update_yaxes(autorange="reversed")
    said = (
        f"{wrong.sum()} of {counts.sum()} misread; most often a {most[0]} as a {most[1]} "
        f"({wrong.max()} times)."
    )
    confidence = logits.softmax(1).max(1).values.numpy()
    right = guesses == truths
    places = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    bins = [place for place in range(_BINS) if (places == place).any()]
    sure = [float(confidence[places == place].mean()) for place in bins]
    hit = [float(right[places == place].mean()) for place in bins]
    sizes = [int((places == place).sum()) for place in bins]
    gaps = [abs(s - h) * n for s, h, n in zip(sure, hit, sizes, strict=True)]
    calibration = go.Figure(
        [
            go.Scatter(x=[0, 1], y=[0, 1], mode="lines", name="calibrated", line={"dash": "dot"}),
            go.Scatter(x=sure, y=hit, text=[f"{n} images" for n in sizes], name="champion"),
        ]
    )
    calibration.update_layout(
        title="Calibration", xaxis_title="probability it gave", yaxis_title="how often it was right"
    )
    error = sum(gaps) / len(right)
    return [
        Chart("Confusion", said, matrix),
        Chart("Calibration", f"Expected calibration error {error:.4f} (Guo et al. 2017), "
              f"{_BINS} bins.", calibration),
    ]  # fmt: skip
