"""What is published of a study: its champion as a model, its report, its text in MLflow."""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import numpy as np
import safetensors.torch
import torch

from digitlab.base.errors import UserError, counted
from digitlab.base.statistics import Interval, softmax
from digitlab.config.types import Config, DataConfig, TrackerName
from digitlab.networks.table import build_network
from digitlab.records.mlflow_models import save_servable
from digitlab.records.reader import recorded_guesses, recorded_logits, verified
from digitlab.records.record import RunRecorder, datasets_of, trial_tags
from digitlab.records.tracker import Registration, RunRow, restore_command
from digitlab.study.champion import Fit, final_fits, test_metrics
from digitlab.study.session import StudySession
from digitlab.study.summary import champion_text, describe_study


def publish(session: StudySession, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Register the champion, and put its figures and the report on the study's own run.

    An earlier champion of the study stays, marked as superseded; the alias moves.
    """
    if session.config.tracking.name is TrackerName.none or session.parent is None:
        return {}
    summary = {**summary, "vote": vote(session, summary)}
    summary["run_id"] = register_champion(session, summary)
    session.store.note("champion", summary)  # the report is made from what is noted
    text = champion_text(session.config, summary, session.overrides)
    note = describe_study(session.config, session.overrides, text)
    session.parent.log(test_metrics(summary), tags={"mlflow.note.content": note})
    from digitlab.results.report import report  # plotly, after all else has run

    page = report(session.store, session.config, session.records.tracker, session.lab)
    session.parent.add_files({"report.html": page.encode()})
    return {key: summary[key] for key in ("run_id", "vote")}


def vote(session: StudySession, summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the test accuracy of the final fits' mean probability; None of a single fit.

    It is of the answers that the fits gave when each was tested: no new look at the test set.
    """
    tracker = session.records.tracker
    row = session.store.rows()[summary["trial"]]
    runs = [_final_runs(session, fit) for fit in final_fits(session.config, row)]
    last = [found[-1] for found in runs if found]
    if len(last) < 2:
        return None
    _, labels = recorded_guesses(tracker, last[0])
    shares = sum(softmax(recorded_logits(tracker, run, len(labels))) for run in last)
    accuracy = float((np.argmax(shares, axis=1) == labels).mean())
    return {"fits": len(last), "test_accuracy": accuracy}


def register_champion(session: StudySession, summary: Mapping[str, Any]) -> str | None:
    """Record the champion's run, with a model that MLflow serves; return its id."""
    tracker, config = session.records.tracker, session.config
    study_id, study = session.store.study_id, config.study.name
    row = session.store.rows()[summary["trial"]]
    fit = next(f for f in final_fits(config, row) if f.key == summary["weights_of"])
    found = _final_runs(session, fit)
    if not found:
        _refuse_missing(session, fit)
    weights_run = found[-1]
    weights = verified(tracker, weights_run, "weights")
    earlier = tracker.find({"digitlab.study_id": study_id, "digitlab.kind": "champion"})
    tags = trial_tags(study_id, study, row.number, 1) | {
        "digitlab.weights_run": weights_run.run_id,
        "digitlab.weights_sha256": weights_run.tags["digitlab.weights_sha256"],
        "digitlab.champion_of": counted(len(session.store.rows()), "trial"),
    }
    identity = session.identity("champion", f"{study}-champion", tags)
    recorder = RunRecorder(session.records.outbox, fit.config, identity)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "summary.json").write_text(json.dumps(dict(summary), indent=1))
        (folder / "weights.safetensors").write_bytes(weights)
        network = build_network(fit.config.model)
        network.load_state_dict(safetensors.torch.load(weights))
        example = np.zeros((2, 1, 28, 28), np.float32)  # of one, the export makes a constant
        save_servable(_Served(network, fit.config.data), example, folder / "model")
        recorder.add_files(folder)
    read = json.loads(weights_run.tags["digitlab.data_sha256"])
    card = _model_card(config, summary, fit.config)
    measured_on = datasets_of(fit.config.data, read)[-1]
    owned = {"trial": str(row.number), "digitlab.study_id": study_id}
    registration = Registration(study, owned, card, measured_on)
    recorder.end("finished", metrics=test_metrics(summary), registration=registration)
    session.flush_records()
    run_id = recorder.run_id()
    if run_id is not None:
        for run in earlier:
            tracker.tag(run.run_id, {"digitlab.superseded_by": run_id})
    return run_id


def _final_runs(session: StudySession, fit: Fit) -> list[RunRow]:
    """Return the finished runs of a final fit, the last one last."""
    return session.records.tracker.find(_final_tags(session, fit))


def _final_tags(session: StudySession, fit: Fit) -> dict[str, str]:
    tags = {"digitlab.study_id": session.store.study_id, "digitlab.kind": "final"}
    tags |= {"digitlab.trial": str(fit.number), "digitlab.seed": str(fit.seed)}
    return tags | {"digitlab.state": "finished"}


def _refuse_missing(session: StudySession, fit: Fit) -> NoReturn:
    tracker, study = session.records.tracker, session.config.study.name
    what = f"study {study}: the run of the final fit of trial {fit.number} with seed {fit.seed}"
    deleted = tracker.find_deleted(_final_tags(session, fit))
    if not deleted:
        raise UserError(
            f"{what} was removed for good: it must be in the tracker, since the champion has its "
            "weights. Restore the tracker from a copy, or start a new study with study.name=NEW."
        )
    raise UserError(
        f"{what} was deleted: it must be in the tracker, since the champion has its weights. "
        f"Restore it with `{restore_command(tracker, deleted[-1].run_id)}`, then go on."
    )


class _Served(torch.nn.Module):
    """Pixels 0 to 255 or 0 to 1, light on dark (N, 1, 28, 28), to probabilities of ten digits."""

    def __init__(self, network: torch.nn.Module, data: DataConfig) -> None:
        super().__init__()
        self.network, self.mean, self.std = network, data.mean, data.std

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        # Of an image that is scaled to 0 to 1 already, no pixel is above 1.
        is_unit = pixels.amax((1, 2, 3), keepdim=True) <= 1
        unit = torch.where(is_unit, pixels, pixels / 255)
        logits: torch.Tensor = self.network((unit - self.mean) / self.std)
        return logits.softmax(1)


def _model_card(config: Config, summary: Mapping[str, Any], first: Config) -> str:
    """Return a model card (Mitchell et al. 2019): what it is, how good, what it is not for."""
    interval = Interval(**summary["test_accuracy"])
    values = ", ".join(f"`{key}={value}`" for key, value in summary["values"].items())
    images = config.data.images or "all"
    return "\n".join(
        [
            f"**{first.model.name}**, champion of study `{config.study.name}`: trial "
            f"{summary['trial']} ({values}).",
            "",
            f"- Test accuracy on {config.data.name}: {interval}, over seeds and test images.",
            "- Input: float32 (N, 1, 28, 28), pixels 0 to 255 or 0 to 1, light digit on dark, "
            "centred as MNIST's are; any other type is refused. Output: probabilities (N, 10).",
            f"- After `model = mlflow.pyfunc.load_model('models:/{config.study.name}@champion')`, "
            "of MNIST's uint8 images (N, 28, 28):",
            "  - 0 to 255: `model.predict(images[:, None].astype('float32'))`",
            "  - 0 to 1: `model.predict(images[:, None].astype('float32') / 255)`",
            "  - served: POST to `/invocations` "
            "`{\"inputs\": images[:, None].astype('float32').tolist()}`",
            f"- Trained on {images} training images of {config.data.name}; seed "
            f"{first.trainer.seed}.",
            "- Not for letters, several digits, or photos that were not prepared as MNIST was.",
            "- Weights: the first final fit's; the best one's would be chosen by the test set.",
        ]
    )
