"""The files that a finished fit leaves."""

import safetensors.torch

from digitlab.training.fit import Fit
from digitlab.training.pictures import draw_pictures

# Readers refuse weights without it: the same numbers in another order of axes would load too.
_METADATA = {"layout": "channels_last", "format": "1"}


def output_files(fit: Fit) -> dict[str, bytes]:
    """Return the content of each file by its path in the run's record.

    weights.safetensors; predictions.safetensors with `predictions` and `labels`, both uint8 (M,),
    and `logits` (M, 10); pictures/*.png.
    """
    predictions = {
        "predictions": fit.logits.argmax(1).byte(),
        "labels": fit.labels.byte(),
        "logits": fit.logits,
    }
    return {
        "weights.safetensors": safetensors.torch.save(fit.weights, _METADATA),
        "predictions.safetensors": safetensors.torch.save(predictions),
        **{f"pictures/{name}": picture for name, picture in draw_pictures(fit).items()},
    }
