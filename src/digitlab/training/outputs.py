"""The files that a fit leaves: weights, predictions and pictures."""

import tempfile
from pathlib import Path

import safetensors.torch

from digitlab.training.fit import Fit, one_of_each
from digitlab.training.pictures import draw_confusions, draw_film


def output_files(fit: Fit) -> dict[str, bytes]:
    """Return the content of each file by its path in the record."""
    metadata = {"layout": "channels_last", "format": "1"}
    guesses, labels = fit.logits.argmax(1).byte(), fit.labels.byte()
    predictions = {"predictions": guesses, "labels": labels, "logits": fit.logits}
    files = {
        "weights.safetensors": safetensors.torch.save(fit.weights, metadata),
        "predictions.safetensors": safetensors.torch.save(predictions),
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        draw_confusions(fit.logits, fit.labels, fit.images, folder)
        if fit.film:
            shown = one_of_each(fit.labels)
            draw_film(fit.film, fit.images[shown], fit.labels[shown], folder)
        files |= {f"pictures/{path.name}": path.read_bytes() for path in folder.iterdir()}
    return files
