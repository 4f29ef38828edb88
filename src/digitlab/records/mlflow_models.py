"""The model that MLflow loads and serves, and what its pages of models show of it."""

import re
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, Metric

from digitlab.records.tracker import Registration, Tracker

if TYPE_CHECKING:  # torch takes as long to import as all else that lists runs
    import numpy as np
    import torch

_LONGEST_PARAM = 500  # characters of a logged model's in MLflow's stores


def log_model(client: MlflowClient, run_id: str, what: Registration) -> LoggedModel:
    """Return the run's logged model, which is made where there is none, with the run's metrics.

    A logged model's metrics are the only ones that MLflow's stores keep a data set of.
    """
    run = client.get_run(run_id)
    name = re.sub(r"""[/:.%"']""", "-", what.model)  # MLflow takes none of these
    found = client.search_logged_models([run.info.experiment_id], f"name = '{name}'")
    logged = next((model for model in found if model.source_run_id == run_id), None)
    if logged is None:
        params = run.data.params.items()
        short = {key: value for key, value in params if 0 < len(value) <= _LONGEST_PARAM}
        tags = dict(what.tags)
        logged = client.create_logged_model(run.info.experiment_id, name, run_id, tags, short)
    where = (logged.model_id, what.measured_on.name, what.measured_on.digest)
    points = [point for key in run.data.metrics for point in client.get_metric_history(run_id, key)]
    # With the times that the run has them at: they are not doubled there.
    metrics = [Metric(p.key, p.value, p.timestamp, p.step, *where) for p in points]
    client.log_batch(run_id, metrics)
    outputs = run.outputs.model_outputs if run.outputs else []
    if logged.model_id not in {made.model_id for made in outputs}:
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return logged


def model_files(tracker: Tracker, run_id: str) -> dict[str, bytes]:
    """Return the files of a run that is registered as a model, by their paths in the model."""
    paths = [path for path in tracker.files(run_id) if path.startswith("model/")]
    return {path.removeprefix("model/"): tracker.artifact(run_id, path) for path in paths}


def register_model(
    client: MlflowClient, run_id: str, logged: LoggedModel, what: Registration
) -> None:
    """Make a version of the registered model, once for a run, under the alias `champion`."""
    client.finalize_logged_model(logged.model_id, "READY")
    if not client.search_registered_models(f"name = '{what.model}'"):
        client.create_registered_model(what.model)
    versions = client.search_model_versions(f"name = '{what.model}'")
    made = next((one for one in versions if one.run_id == run_id), None)
    if made is None:
        source = logged.artifact_location
        made = client.create_model_version(
            what.model, source, run_id, dict(what.tags), None, what.card, model_id=logged.model_id
        )
    client.set_registered_model_alias(what.model, "champion", made.version)


def owner_of(client: MlflowClient, model: str) -> str | None:
    """Return the study_id of the registered versions of a name; None if there are none."""
    versions = client.search_model_versions(f"name = '{model}'")
    owners = [version.tags.get("digitlab.study_id", "") for version in versions]
    # A version that a person has added by hand makes the name nobody else's.
    return next(filter(None, owners), "") if owners else None


def save_servable(network: "torch.nn.Module", example: "np.ndarray", folder: Path) -> None:
    """Write a model that MLflow loads and serves: a pt2 archive without pickled code of ours.

    The only pickle in the archive is torch's sample input, plain tensors, which MLflow asks for.

    Args:
        network: takes images (N, ...) and returns a row for each.
        example: an input, which the signature is taken from.
        folder: must not exist.
    """
    import mlflow.pytorch
    import torch
    from mlflow.models import infer_signature

    network.eval()  # or dropout is exported with the rest
    with torch.no_grad():
        output = network(torch.from_numpy(example)).numpy()
    libraries = [f"{name}=={version(name)}" for name in ("torch", "numpy", "mlflow")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, on tensors that share memory
        mlflow.pytorch.save_model(
            network,
            folder,
            signature=infer_signature(example, output),
            input_example=example,
            pip_requirements=libraries,
            serialization_format="pt2",
        )
