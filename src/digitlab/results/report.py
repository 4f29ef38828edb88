"""`digitlab report`: a study on one page, a single HTML file that works offline."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from plotly.offline import get_plotlyjs

from digitlab.base.errors import UserError, refuse_damage
from digitlab.base.files import safe_name, write_output
from digitlab.base.invocation import SHORT_ID, command, storage_of
from digitlab.base.statistics import Interval, fit_temperature, softmax
from digitlab.config.compose import store_words
from digitlab.config.types import Config
from digitlab.data.datasets import TEST, class_names, load_digits
from digitlab.records.reader import recorded_environment, recorded_guesses, recorded_logits
from digitlab.records.record import open_records
from digitlab.records.tracker import RunRow, Tracker
from digitlab.results.charts import champion_charts, in_words, study_charts
from digitlab.results.page import render
from digitlab.study.champion import finished_results, unpruned_fits
from digitlab.study.storage import listed_studies, open_storage, study_notes
from digitlab.study.summary import champion_text, continue_command, pruning_text, short
from digitlab.study.trials import TrialStore, is_own, load_study

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


def write_report(
    study: str | None, out: Path | None, lab: Path, stores: Sequence[str] = ()
) -> Path:
    """Write a study's report into the lab (or `out`) and onto the study's own run; return the file.

    Raises:
        UserError: there is no such study, or the file cannot be written.
    """
    name = study or _newest(lab, stores)
    store, config = load_study(lab, name, storage_of(stores))
    with open_records(config, lab) as records:
        with refuse_damage(f"what the storage holds of study {name!r}"):
            page = report(store, config, records.tracker, lab)
        target = out or lab / "reports" / f"{safe_name(name)}.html"
        write_output(target, page, "--out" if out else "", lab)
        print(f"written: {target}")
        if "run_id" in store.notes():
            spool = records.outbox.resume_run(store.notes()["run_id"], store.study_id)
            spool.add_files({"report.html": page.encode()})
            records.outbox.flush_run(spool)
            if pending := records.outbox.pending_text():
                print(pending)
    return target


def _newest(lab: Path, stores: Sequence[str]) -> str:
    """Return the study that was created last, but for replays and other programs' studies."""
    storage = open_storage(lab, storage_of(stores))
    known = listed_studies(storage)
    if not known:
        raise UserError(f"report: there is no study yet: run `{command('sweep')}`.")
    notes = {name: study_notes(storage, name) for name in known}
    own = [name for name in known if is_own(notes[name]) and "again" not in notes[name]]
    return (own or known)[-1]


def report(store: TrialStore, config: Config, tracker: Tracker, lab: Path) -> str:
    """Return the page; a study that still runs, or whose trials all failed, has one too."""
    rows, notes = store.rows(), store.notes()
    champion: Mapping[str, Any] = notes.get("champion", {})
    looks: list[Mapping[str, Any]] = notes.get("tested", [])
    parent = tracker.get(notes["run_id"]) if notes.get("run_id") else None
    overrides = None if "again" in notes else notes.get("overrides", [])
    unpruned = notes.get("unpruned", {})
    asked = [fit.key for fit in unpruned_fits(config, rows) if fit.key in unpruned]
    counts = {state: sum(row.state == state for row in rows) for state in _STATES}
    stores = store_words(config)
    commands = [continue_command(notes), command("report", config.study.name, *stores)]
    if champion.get("run_id"):
        commands.insert(1, command("reproduce", champion["run_id"][:SHORT_ID], *stores))
    charts = study_charts(store, config.trainer.epochs)
    return render(
        "report.html",
        f"Study {config.study.name}",
        rows=rows,
        planned=config.study.trials,
        counts=", ".join(f"{n} {state}" for state, n in counts.items() if n),
        seconds=sum(row.seconds for row in rows),
        champion=champion,
        test=Interval(**champion["test_accuracy"]) if champion else None,
        summary=champion_text(config, champion, overrides) if champion else "",
        looks=[[look["when"], look["n"], ", ".join(look["fits"])] for look in looks],
        labels=in_words(config.study.space),
        best=_best(store, champion),
        best_name=f"{champion.get('trial')} (champion)",
        reasons=sorted({str(row.notes["reason"]) for row in rows if "reason" in row.notes})[:3],
        charts=charts,
        pruning=pruning_text(rows, finished_results({key: unpruned[key] for key in asked})),
        **_misread(store, config, champion, tracker, lab),
        film=_film(store, champion, tracker),
        commands=commands,
        environment=_environment(tracker, parent) if parent else [],
        plotly=get_plotlyjs() if any(chart.figure for chart in charts) else "",
    )


def _best(store: TrialStore, champion: Mapping[str, Any]) -> list[list[str]]:
    seeds, lines = champion.get("val_accuracy", {}), []
    for row in store.goal.best_first(store.rows())[:_TOP]:
        metrics = row.notes.get("metrics", {})
        interval = seeds.get(str(row.number))
        lines.append(
            [
                f"{row.number}" + " (champion)" * (row.number == champion.get("trial")),
                f"{row.value:.2%}",
                str(Interval(**interval)) if interval else "",
                *(short(row.values.get(key, "")) for key in store.config.space),
                f"{metrics.get('model_parameters', 0):,.0f}",
                f"{metrics.get('seconds', 0):.1f}",
            ]
        )
    return lines


def _misread(
    store: TrialStore, config: Config, champion: Mapping[str, Any], tracker: Tracker, lab: Path
) -> dict[str, Any]:
    """Return what the first final fit made of the test images when it was tested."""
    run = champion.get("run_id")
    weights_run = tracker.get(run).tags.get("digitlab.weights_run") if run else None
    if not weights_run:
        return {"missing": "no champion is recorded."}
    try:
        digits = load_digits(lab, config.data.name, TEST, config.data.allow_unknown)
        logits = recorded_logits(tracker, tracker.get(weights_run), len(digits.labels))
    except UserError as error:
        return {"missing": str(error)}
    misread, names = [], class_names(config.data.name, lab)
    probabilities = softmax(logits)
    for place in (logits.argmax(1) != digits.labels).nonzero()[0].tolist():
        guesses = np.argsort(-probabilities[place], kind="stable")[:3].tolist()
        shares = probabilities[place, guesses].tolist()
        read = ", ".join(f"{names[d]}: {p:.1%}" for d, p in zip(guesses, shares, strict=True))
        true, file = int(digits.labels[place]), io.BytesIO()
        Image.fromarray(255 - digits.images[place]).save(file, "PNG")
        image = _data_address(file.getvalue())
        text = f"test image {place}, a {names[true]}, read as {read}"
        shown = {"read": names[guesses[0]], "percent": f"{shares[0]:.0%}"}
        misread.append({"text": text, "image": image, "true": names[true]} | shown)
    temperature = _temperature(store, champion, tracker)
    charts = champion_charts(logits, digits.labels, names, temperature)
    return {"missing": "", "champion_charts": charts, "misread": misread}


def _data_address(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _temperature(store: TrialStore, champion: Mapping[str, Any], tracker: Tracker) -> float | None:
    """Return the champion's temperature, of its trial's validation images, as `predict` has it."""
    trial = {"digitlab.kind": "trial", "digitlab.study_id": store.study_id}
    trial |= {"digitlab.trial": str(champion["trial"]), "digitlab.state": "finished"}
    for row in tracker.find(trial):
        if "digitlab.predictions_sha256" in row.tags:
            try:
                _, labels = recorded_guesses(tracker, row)
                logits = recorded_logits(tracker, row, len(labels))
            except UserError:  # its record is damaged, which `audit` reports
                continue
            return fit_temperature(logits, labels)
    return None


def _film(store: TrialStore, champion: Mapping[str, Any], tracker: Tracker) -> str:
    """Return the filmstrip of the champion's trial; empty where it is missing."""
    tags = {"digitlab.kind": "trial", "digitlab.study_id": store.study_id}
    rows = tracker.find(tags | {"digitlab.trial": str(champion["trial"])}) if champion else []
    try:
        return _data_address(tracker.artifact(rows[-1].run_id, "pictures/evolution.png"))
    except (IndexError, UserError):
        return ""


def _environment(tracker: Tracker, parent: RunRow) -> list[list[str]]:
    environment = recorded_environment(tracker, parent)
    environment |= {name: environment.get("libraries", {}).get(name) for name in _LIBRARIES}
    keys = ("commit", "python", "platform", "processor", "cores", *_LIBRARIES)
    return [[key, str(environment.get(key))] for key in keys]
