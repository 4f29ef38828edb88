"""The model that MLflow loads and serves."""

import warnings
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes as long to import as all else that lists runs
    import numpy as np
    import torch


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
