"""`digitlab report`: a study on one page, a single HTML file that works offline."""

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from PIL import Image
from plotly.offline import get_plotlyjs
from torch import Tensor

from digitlab.base.errors import UserError
from digitlab.base.files import safe_name, write_output
from digitlab.base.statistics import Interval
from digitlab.config.types import Config
from digitlab.data.datasets import TEST, load_digits
from digitlab.records.reader import recorded_environment
from digitlab.records.record import open_records
from digitlab.records.store import RunRow, Tracker
from digitlab.results.charts import champion_charts, in_words, study_charts
from digitlab.results.page import Section, chart_section, render
from digitlab.study.champion import finished_results, unpruned_fits
from digitlab.study.storage import open_storage, study_names
from digitlab.study.summary import champion_text, pruning_text, short, sweep_command
from digitlab.study.trials import TrialRow, TrialStore, load_study

_TOP = 20  # trials in the table
_STATES = ("finished", "pruned", "failed", "running", "waiting")
_LIBRARIES = (
    "torch",
    "torchvision",
    "pytorch-lightning",
    "optuna",
    "mlflow",
    "hydra-core",
    "numpy",
)
_WRONG = "What the champion gets wrong"


def write_report(study: str | None, out: Path | None, lab: Path) -> int:
    """Write a study's report into the lab (or `out`) and onto the study's own run; returns 0.

    Raises:
        UserError: there is no such study, or the file cannot be written.
    """
    known = study_names(open_storage(lab))
    if not known:
        raise UserError("report: there is no study yet: run `make sweep`")
    name = study or known[-1]
    store, config = load_study(lab, name)
    with open_records(config, lab) as records:
        page = report(store, config, records.tracker, lab)
        target = out or lab / "reports" / f"{safe_name(name)}.html"
        write_output(target, page, "--out")
        if "run_id" in store.notes():
            spool = records.outbox.resume_run(store.notes()["run_id"])
            spool.add_files({"report.html": page.encode()})
    print(f"written: {target}")
    return 0


def report(store: TrialStore, config: Config, tracker: Tracker, lab: Path) -> str:
    """Return the page; a study that still runs, or whose trials all failed, has one too."""
    rows, notes = store.rows(), store.notes()
    champion: Mapping[str, Any] = notes.get("champion", {})
    parent = tracker.get(notes["run_id"]) if notes.get("run_id") else None
    overrides = json.loads(parent.tags.get("digitlab.overrides", "[]")) if parent else []
    unpruned = notes.get("unpruned", {})
    asked = [fit.key for fit in unpruned_fits(config, rows) if fit.key in unpruned]
    pruning = pruning_text(rows, finished_results({key: unpruned[key] for key in asked}))
    commands = [sweep_command(overrides), f"make report ARGS={config.study.name}"]
    if champion.get("run_id"):
        commands.insert(1, f"make reproduce RUN={champion['run_id']}")
    sections = [
        _result(config, rows, champion, overrides),
        _best(rows, champion, config),
        *map(chart_section, study_charts(store, config.trainer.epochs)),
        Section("What pruning saved", f"{pruning[0].upper()}{pruning[1:]}."),
        *_champion(config, champion, tracker, lab),
        _film(store, champion, tracker),
        Section("Commands", code="\n".join(commands)),
        _environment(tracker, parent),
    ]
    plotly = get_plotlyjs() if any(section.figure for section in sections) else ""
    facts = _facts(rows, champion, config)
    title = f"Study {config.study.name}"
    return render("report.html", title, sections, facts=facts, plotly=plotly)


def _facts(
    rows: Sequence[TrialRow], champion: Mapping[str, Any], config: Config
) -> list[dict[str, str]]:
    """Return the headline: champion, accuracy with interval, time, trials."""
    facts = [{"name": "Champion", "value": "none yet", "note": "the study has not ended"}]
    if champion:
        test = Interval(**champion["test_accuracy"])
        value, spread = str(test).split(" (")
        labels = in_words(champion["values"])
        values = ", ".join(f"{labels[k]} {short(v)}" for k, v in champion["values"].items())
        facts = [{"name": "Test accuracy", "value": value, "note": f"({spread}"}]
        facts += [{"name": "Champion", "value": f"trial {champion['trial']}", "note": values}]
    seconds = sum(row.notes.get("metrics", {}).get("seconds", 0.0) for row in rows)
    note = (
        f"{len(rows)} of {config.study.trials} planned" if len(rows) < config.study.trials else ""
    )
    facts += [{"name": "Trials", "value": str(len(rows)), "note": note}]
    return [
        *facts,
        {"name": "Training time of all trials", "value": f"{seconds:,.0f} s", "note": ""},
    ]


def _result(
    config: Config, rows: Sequence[TrialRow], champion: Mapping[str, Any], overrides: Sequence[str]
) -> Section:
    counts = {state: sum(row.state == state for row in rows) for state in _STATES}
    listed = ", ".join(f"{n} {state}" for state, n in counts.items() if n) or "none yet"
    trials = f"{len(rows)} of {max(config.study.trials, len(rows))} trials: {listed}."
    if not champion:
        return Section("Result", f"{trials} There is no champion yet: the study has not ended.")
    row = rows[champion["trial"]]
    metrics = row.notes.get("metrics", {})
    text = (
        f"The champion, trial {row.number}, reads {Interval(**champion['test_accuracy'])} of the "
        f"test images right. It has {metrics.get('model_parameters', 0):,.0f} parameters and took "
        f"{metrics.get('seconds', 0):.1f} s to train as a trial. {trials}"
    )
    return Section("Result", text, code=champion_text(config, champion, overrides))


def _best(rows: Sequence[TrialRow], champion: Mapping[str, Any], config: Config) -> Section:
    finished = [row for row in rows if row.state == "finished"]
    if not finished:
        reasons = {str(row.notes["reason"]) for row in rows if "reason" in row.notes}
        return Section("Best trials", f"No trial finished. {' '.join(sorted(reasons)[:3])}")
    best = sorted(finished, key=lambda row: (-(row.value or 0), row.number))[:_TOP]
    seeds = champion.get("val_accuracy", {})
    labels = in_words(config.study.space)
    columns = ["trial", "validation", "new seeds", *labels.values(), "parameters", "seconds"]
    lines = []
    for row in best:
        metrics = row.notes.get("metrics", {})
        interval = seeds.get(str(row.number))
        lines.append(
            [
                f"{row.number}" + " (champion)" * (row.number == champion.get("trial")),
                f"{row.value:.2%}",
                str(Interval(**interval)) if interval else "",
                *(short(row.values.get(key, "")) for key in labels),
                f"{metrics.get('model_parameters', 0):,.0f}",
                f"{metrics.get('seconds', 0):.1f}",
            ]
        )
    text = "Validation accuracies of single seeds; 95 % intervals where new seeds were trained."
    return Section(
        "Best trials",
        text,
        columns=columns,
        lines=lines,
        best=f"{champion.get('trial')} (champion)",
    )


def _champion(
    config: Config, champion: Mapping[str, Any], tracker: Tracker, lab: Path
) -> Iterator[Section]:
    """Show what the first final fit makes of the test images, as recorded when it was tested."""
    run = champion.get("run_id")
    weights_run = tracker.get(run).tags.get("digitlab.weights_run") if run else None
    if not weights_run:
        yield Section(_WRONG, "Missing: no champion is recorded.")
        return
    try:
        predictions = tracker.artifact(weights_run, "predictions.safetensors")
    except UserError as error:
        yield Section(_WRONG, f"Missing: {error}")
        return
    logits = safetensors.torch.load(predictions)["logits"]
    digits = load_digits(lab, config.data.name, TEST, config.data.allow_unknown)
    yield from map(chart_section, champion_charts(logits, digits.labels))
    misread = list(_misread(logits, digits.labels, digits.images))
    text = (
        "Each with its true digit, what was read, and with which probability."
        if misread
        else "None."
    )
    yield Section("Every misread test digit", text, digits=misread)


def _misread(logits: Tensor, labels: Tensor, images: Tensor) -> Iterator[dict[str, str]]:
    probabilities = logits.softmax(1)
    for place in (logits.argmax(1) != labels).nonzero().flatten().tolist():
        shares, digits = (part.tolist() for part in probabilities[place].topk(3))
        read = ", ".join(f"{d}: {p:.1%}" for d, p in zip(digits, shares, strict=True))
        true = str(int(labels[place]))
        file = io.BytesIO()
        Image.fromarray(255 - images[place].numpy()).save(file, "PNG")
        yield {
            "text": f"test image {place}, a {true}, read as {read}",
            "image": base64.b64encode(file.getvalue()).decode(),
            "true": true,
            "read": str(digits[0]),
            "percent": f"{shares[0]:.0%}",
        }


def _film(store: TrialStore, champion: Mapping[str, Any], tracker: Tracker) -> Section:
    """Show the filmstrip of the champion's trial."""
    title, number = "How the champion learned", str(champion.get("trial", ""))
    tags = {"digitlab.kind": "trial", "digitlab.study_id": store.study_id}
    rows = tracker.find(tags | {"digitlab.trial": number}) if number else []
    try:
        picture = tracker.artifact(rows[-1].run_id, "pictures/evolution.png")
    except (IndexError, UserError):
        return Section(title, "Missing: no champion's trial is recorded.")
    text = "Before training and after each epoch: filters of the first layer, and ten digits of "
    text += "the validation set with the probabilities of 0 to 9."
    return Section(title, text, film=base64.b64encode(picture).decode())


def _environment(tracker: Tracker, parent: RunRow | None) -> Section:
    if parent is None:
        return Section("Environment", "Missing: the study was not recorded.")
    environment = recorded_environment(tracker, parent)
    libraries = environment.pop("libraries", {})
    environment |= {name: libraries.get(name) for name in _LIBRARIES}
    keys = ("commit", "python", "platform", "processor", "cores", *_LIBRARIES)
    lines = [[key, str(environment.get(key))] for key in keys]
    return Section("Environment", columns=["part", "value"], lines=lines)
