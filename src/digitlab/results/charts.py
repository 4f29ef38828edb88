"""A study in charts: Optuna's own where it has them, plotly's where it lacks them."""

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
from numpy.typing import NDArray
from optuna.distributions import CategoricalDistribution
from optuna.trial import create_trial
from optuna.visualization import plot_contour, plot_parallel_coordinate, plot_slice

from digitlab.base.statistics import softmax
from digitlab.config.types import Pruner
from digitlab.study.goal import TrialRow
from digitlab.study.samplers import PROMOTED_FROM
from digitlab.study.summary import short
from digitlab.study.trials import TrialStore

_Logits = NDArray[np.floating]
_Labels = NDArray[np.integer]

_RESAMPLED = 20  # times, for the spread of the importances
_BINS = 10  # of confidence
_ACCURACY, _TIME, _SIZE = "validation accuracy (%)", "training time (s)", "parameters"


@dataclass(frozen=True)
class Chart:
    """A figure, its message in a sentence, and its data; `figure` is None where it is missing."""

    title: str
    message: str
    figure: Any = None
    data: Any = None  # a pandas table


def in_words(keys: Iterable[str]) -> dict[str, str]:
    """Return a label for each key: `optim.learning_rate` is 'learning rate' where that is clear."""
    last = {key: key.rpartition(".")[2] for key in keys}
    count = Counter(last.values())
    names = {key: name if count[name] == 1 else key for key, name in last.items()}
    return {key: name.replace(".", " ").replace("_", " ") for key, name in names.items()}


_WHY_PRUNED = {
    Pruner.none: "were stopped early.",
    Pruner.median: "had been less accurate than the median, at the same fraction of their "
    "training, of the trials that had finished by then.",
    Pruner.halving: "were not among the best third of the trials that had reached that fraction by "
    "then; early trials had fewer to beat.",
    Pruner.hyperband: "were not among the best third of the trials of their bracket that had "
    "reached that fraction by then; early trials had fewer to beat.",
    Pruner.screening: "were screened: later trials train the best of them to the end.",
}


class _Trials:
    """What the charts are drawn from: accuracies in per cent, hyperparameters in words.

    Where trials were pruned the few that finished show little of the hyperparameters, and a last
    accuracy does not compare with one at a rung: the first rung's is the measure, which all have.
    A trial that trains a screened one to the end is left out there: it would count twice.
    """

    def __init__(self, store: TrialStore, rows: Sequence[TrialRow], epochs: int) -> None:
        labels = in_words(store.config.space)
        self.rows, self.epochs, self.names = rows, epochs, list(labels.values())
        pruning = store.config.pruner is not Pruner.none
        rung = f"accuracy at {store.config.rungs[0]:g} of the steps (%)" if pruning else ""
        self.measure = rung or _ACCURACY
        self.by = self.measure.removesuffix(" (%)")  # in a sentence
        self.why_pruned = _WHY_PRUNED[store.config.pruner]
        self.study, lines = optuna.create_study(direction="maximize"), []
        stored = store.study.get_trials(deepcopy=False)
        for trial, row in zip(stored, rows, strict=False):  # more may have started meanwhile
            metrics = row.notes.get("metrics", {})
            finished = row.value if row.state == "finished" else None
            value = trial.intermediate_values.get(0) if pruning else finished
            value = None if PROMOTED_FROM in row.notes else value
            params = {label: row.values.get(key) for key, label in labels.items()}
            params = {k: short(v) if isinstance(v, list) else v for k, v in params.items()}
            line = {"trial": row.number, "outcome": row.state, **params}
            line |= {_ACCURACY: None if finished is None else 100 * finished}
            line |= {self.measure: None if value is None else 100 * value}
            line |= {_TIME: metrics.get("seconds"), _SIZE: metrics.get("model_parameters")}
            lines.append(line | {"start": trial.datetime_start, "end": trial.datetime_complete})
            present = {labels[key]: params[labels[key]] for key in labels if key in row.values}
            if value is not None and None not in present.values():
                ranges = {labels[k]: of for k, of in trial.distributions.items() if k in labels}
                for label, found in ranges.items():
                    if isinstance(found, CategoricalDistribution):
                        choices = [c.strip("[]").replace(" ", "") if isinstance(c, str) else c
                                   for c in found.choices]  # lists are JSON text  # fmt: skip
                        ranges[label] = CategoricalDistribution(choices)
                self.study.add_trial(
                    create_trial(params=present, distributions=ranges, value=100 * value)
                )
        known = self.study.get_trials(deepcopy=False)
        # A setting of a network or optimizer is missing in the trials of another one.
        self.common = [name for name in self.names if all(name in one.params for one in known)]
        self.table = pd.DataFrame(lines)
        self.comparable = self.table.dropna(subset=self.measure) if lines else self.table
        self.finished = self.table.dropna(subset=_ACCURACY) if lines else self.table

    def by_measure(self, *names: str) -> pd.DataFrame:
        columns = ["trial", *(names or self.names), self.measure]
        return self.comparable[columns].sort_values(self.measure, ascending=False)

    @functools.cached_property
    def importance(self) -> pd.DataFrame:
        """Return median, 10 and 90 % quantile of each importance over resamplings, best first."""
        columns = ["importance (%)", "10 %", "90 %"]
        known = self.study.get_trials(deepcopy=False)
        if len(known) < 4 or len({trial.value for trial in known}) < 2:
            return pd.DataFrame(columns=columns)
        # scikit-learn, which it imports for another measure, takes longer to import than numpy.
        from optuna.importance import get_param_importances

        chance, found = np.random.default_rng(0), []
        for _ in range(_RESAMPLED):
            sample = optuna.create_study(direction="maximize")
            sample.add_trials([known[i] for i in chance.integers(len(known), size=len(known))])
            with suppress(ValueError, RuntimeError), warnings.catch_warnings(action="ignore"):
                found.append(
                    get_param_importances(sample, params=self.common)
                )  # fails where nothing varies
        shares = 100 * pd.DataFrame(found).fillna(0).quantile([0.5, 0.1, 0.9]).T
        return shares.set_axis(columns, axis=1).sort_values(columns[0], ascending=False)

    def best_ranges(self) -> str:
        """Describe where the best quarter of the trials lies."""
        if self.comparable.empty:
            raise _NoData(f"no trial has an {self.by}.")
        best = self.by_measure().head(max(2, len(self.comparable) // 4))
        ranges = []
        for name in self.names:
            values = sorted(set(best[name].dropna()))
            if not values:  # none of them has it
                continue
            link = " or " if isinstance(values[0], str) else " to "
            shown = values if link == " or " else dict.fromkeys((values[0], values[-1]))
            ranges.append(f"{name} {link.join(map(short, shown))}")
        count = f"{len(best)} of {len(self.comparable)}"
        return f"By {self.by}, the best {count} have {', '.join(ranges)}."


class _NoData(Exception):
    """A chart has nothing to show; the text says what is missing."""


def study_charts(store: TrialStore, epochs: int) -> list[Chart]:
    """Draw all charts of a study's trials; `epochs` is of those that do not search it."""
    rows = store.rows()
    trials, ended = _Trials(store, rows, epochs), sum(row.value is not None for row in rows)
    charts = []
    for title, draw in _DRAWERS.items():
        try:
            if ended < 2:
                raise _NoData(f"two trials with a result are needed, there are {ended}.")
            message, figure, data = draw(trials)
            if not figure.data or data.empty:
                raise _NoData("no trial has what this chart shows.")
            charts.append(Chart(title, message, figure, data))
        except _NoData as error:
            charts.append(Chart(title, f"Missing: {error}"))
    return charts


_Drawn = tuple[str, go.Figure, pd.DataFrame]  # the message, the figure and its data


def _history(trials: _Trials) -> _Drawn:
    data = trials.finished[["trial", _ACCURACY]]
    data = data.assign(**{"best so far (%)": data[_ACCURACY].cummax()})
    figure = px.scatter(data, x="trial", y=_ACCURACY)
    figure.add_scatter(x=data["trial"], y=data["best so far (%)"], line_shape="hv", name="best")
    better = data["best so far (%)"].nunique() - 1
    if data.empty:
        return "", figure, data
    best = data.loc[data[_ACCURACY].idxmax()]
    message = f"Trial {best['trial']:.0f} is the most accurate with {best[_ACCURACY]:.2f} %; "
    return f"{message}the best so far improved {better} times after the first trial.", figure, data


def _curves(trials: _Trials) -> _Drawn:
    points: list[dict[str, Any]] = []
    for row in trials.rows:
        curve = list(enumerate(row.notes.get("curve", []), 1))
        rung = row.notes.get("metrics", {}).get("rung")
        if row.state == "pruned" and rung and row.value is not None:
            end = rung * row.values.get("trainer.epochs", trials.epochs)
            curve = [point for point in curve if point[0] < end] + [(end, row.value)]
        line = {"trial": f"{row.number}", "outcome": row.state}
        points += [line | {"epoch": float(x), _ACCURACY: 100 * y} for x, y in curve]
        points += [line]  # without values: a gap between two lines
    data = pd.DataFrame(points, columns=["trial", "outcome", "epoch", _ACCURACY])
    figure = go.Figure()  # one trace an outcome: a trace a trial makes large studies slow
    for outcome, lines in data.groupby("outcome", sort=False):
        x, y, text = lines["epoch"], lines[_ACCURACY], "trial " + lines["trial"]
        dash = "dot" if outcome == "pruned" else "solid"
        style = {"mode": "lines+markers", "line": {"dash": dash, "width": 1.5}, "opacity": 0.6}
        figure.add_scatter(x=x, y=y, text=text, name=outcome, **style)
    figure.update_layout(xaxis_title="epoch", yaxis_title=_ACCURACY)
    data = data.dropna()
    pruned = sum(row.state == "pruned" for row in trials.rows)
    message = f"{pruned} of {len(trials.rows)} trials were pruned (dotted lines), as they "
    message += trials.why_pruned
    return message if pruned else "Each line is a trial; none was pruned.", figure, data


def _parallel(trials: _Trials) -> _Drawn:
    message = f"One line a trial, to its {trials.measure}. {trials.best_ranges()}"
    figure = plot_parallel_coordinate(trials.study, trials.common, target_name=trials.measure)
    return message, figure, trials.by_measure()


def _slices(trials: _Trials) -> _Drawn:
    message = f"One hyperparameter at a time. {trials.best_ranges()}"
    figure = plot_slice(trials.study, trials.names, target_name=trials.measure)
    return message, figure, trials.by_measure()


def _contours(trials: _Trials) -> _Drawn:
    top = list(trials.importance.index[:2]) or trials.common[:2]
    data = trials.by_measure(*top)
    if data.empty or len(top) < 2:
        raise _NoData("trials of two hyperparameters are needed.")
    figure = plot_contour(trials.study, top, target_name=trials.measure)
    place = " and ".join(f"{name} {short(data[name].iloc[0])}" for name in top)
    return f"By {trials.by}, the best trial is at {place}; darker is better.", figure, data


def _mattered(trials: _Trials) -> _Drawn:
    data = trials.importance
    if data.empty:
        raise _NoData("four trials with different results are needed.")
    figure = px.bar(
        data, x="importance (%)", y=data.index, orientation="h",
        error_x=data["90 %"] - data["importance (%)"],
        error_x_minus=data["importance (%)"] - data["10 %"],
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", title="")
    shares = ", ".join(f"{name} {share:.0f} %" for name, share in data["importance (%)"].items())
    message = f"Importance for {trials.measure.removesuffix(' (%)')}: {shares} (PED-ANOVA, median "
    message += f"and 10 to 90 % of {_RESAMPLED} resamplings of the trials)."
    if others := [name for name in trials.names if name not in trials.common]:
        message += f" Not every trial has {', '.join(others)}: see its slice."
    return message, figure, data.rename_axis("hyperparameter").reset_index()


def _pareto(trials: _Trials, cost: str, comparison: str) -> _Drawn:
    data = trials.finished[["trial", cost, _ACCURACY]].dropna()
    data = data.sort_values([cost, _ACCURACY], ascending=[True, False])
    front = data[data[_ACCURACY] > data[_ACCURACY].cummax().shift(fill_value=-1.0)]
    figure = px.scatter(data, x=cost, y=_ACCURACY, hover_name="trial")
    figure.add_scatter(x=front[cost], y=front[_ACCURACY], mode="lines", name="Pareto front")
    numbers = ", ".join(map(str, front["trial"]))
    message = f"On the line (Pareto front: trials {numbers}), no other trial is both more accurate "
    return f"{message}and {comparison}.", figure, data


def _timeline(trials: _Trials) -> _Drawn:
    data = trials.table[["trial", "outcome", "start", "end"]].dropna()
    figure = px.timeline(data, x_start="start", x_end="end", y="trial", color="outcome")
    minutes = (data["end"].max() - data["start"].min()).total_seconds() / 60
    counts = ", ".join(f"{n} {state}" for state, n in data["outcome"].value_counts().items())
    return f"{len(data)} trials in {minutes:.1f} minutes: {counts}.", figure, data


_DRAWERS: dict[str, Callable[[_Trials], _Drawn]] = {
    "History": _history,
    "Learning curves": _curves,
    "Parallel coordinates": _parallel,
    "What mattered": _mattered,
    "Slices": _slices,
    "Contours": _contours,
    "Accuracy against time": lambda trials: _pareto(trials, _TIME, "faster"),
    "Accuracy against size": lambda trials: _pareto(trials, _SIZE, "smaller"),
    "Timeline": _timeline,
}


def champion_charts(
    logits: _Logits, labels: _Labels, names: Sequence[str], temperature: float | None
) -> list[Chart]:
    """Draw what the champion's weights make of the test images, (M, 10) and (M,).

    Args:
        names: of the labels.
        temperature: by which `predict` divides the logits; None if it is not known.
    """
    tested = pd.DataFrame({"true digit": labels, "read as": logits.argmax(1)})
    counts = pd.crosstab(tested["true digit"], tested["read as"])
    counts = counts.reindex(index=range(10), columns=range(10), fill_value=0)
    counts = counts.set_axis(names, axis=0).set_axis(names, axis=1)
    counts.index.name, counts.columns.name = "true digit", "read as"
    wrong = counts * (1 - np.eye(10, dtype=int))
    matrix = px.imshow(wrong, color_continuous_scale="Reds")
    matrix.update_traces(text=counts, texttemplate="%{text}").update_coloraxes(showscale=False)
    matrix.update_xaxes(dtick=1).update_yaxes(dtick=1)
    message = f"There are no errors in {len(tested)} test images"
    if errors := wrong.sum().sum():
        true, read = wrong.stack().idxmax()
        message = f"{errors} of {len(tested)} test images are misread, "
        message += f"most often a {true} as a {read} ({wrong.loc[true, read]} times)"
    confusion = Chart("Confusion", f"{message}.", matrix, counts.reset_index())
    return [confusion, _calibration(logits, labels, temperature)]


_GIVEN, _RIGHT, _WHOSE = "mean probability (%)", "correct (%)", "probabilities"


def _calibration(logits: _Logits, labels: _Labels, temperature: float | None) -> Chart:
    """Draw how often the probabilities are right: the network's own, and those of `predict`."""
    own, own_error = _reliability(logits, labels)
    parts = [own.assign(**{_WHOSE: "the network's own"})]
    message = f"The network's own probabilities are {own_error:.2f} percentage points off on "
    message += "average (expected calibration error)"
    if temperature is not None:
        tempered, error = _reliability(logits / temperature, labels)
        parts.append(tempered.assign(**{_WHOSE: "of predict"}))
        message += f"; those that `predict` gives, with temperature {temperature:.2f}, {error:.2f}"
    bins = pd.concat(parts)
    figure = px.line(bins, x=_GIVEN, y=_RIGHT, text="images", markers=True, color=_WHOSE)
    figure.update_traces(textposition="top left")
    start = min(99.0, float(bins[[_GIVEN, _RIGHT]].min(axis=None)))
    figure.add_scatter(x=[start, 100], y=[start, 100], mode="lines", line_dash="dot", name="ideal")
    return Chart("Calibration", f"{message}.", figure, bins)


def _reliability(logits: _Logits, labels: _Labels) -> tuple[pd.DataFrame, float]:
    """Return bins of images by their probability, and the expected calibration error (%)."""
    confidence = softmax(logits).max(1)
    place = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    tested = pd.DataFrame({"given": 100 * confidence, "hit": 100.0 * (logits.argmax(1) == labels)})
    bins = tested.groupby(place).agg(
        images=("hit", "size"), given=("given", "mean"), hit=("hit", "mean")
    )
    error = ((bins["given"] - bins["hit"]).abs() * bins["images"]).sum() / len(tested)
    bins.columns = pd.Index(["images", _GIVEN, _RIGHT])
    return bins, float(error)
