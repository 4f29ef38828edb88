"""The files that a finished fit leaves."""

import json

import safetensors.torch
from torch import Tensor

from digitlab.training.fit import FitResult
from digitlab.training.pictures import draw_pictures

# Readers refuse weights without it: the same numbers in another order of axes would load too.
_METADATA = {"layout": "channels_last", "format": "1"}


def output_files(fit: FitResult) -> dict[str, bytes]:
    """Return the content of each file by its path in the run's record.

    weights.safetensors; predictions.safetensors with `predictions` and `labels`, both uint8 (M,),
    and `logits` (M, 10); pictures/*.png and *.gif.
    """
    predictions = {
        "predictions": fit.logits.argmax(1).byte(),
        "labels": fit.labels.byte(),
        "logits": fit.logits,
    }
    return {
        "weights.safetensors": _save_weights(fit.weights),
        "predictions.safetensors": safetensors.torch.save(predictions),
        **{f"pictures/{name}": picture for name, picture in draw_pictures(fit).items()},
    }


def _save_weights(weights: dict[str, Tensor]) -> bytes:
    content = safetensors.torch.save(weights, _METADATA)
    # The library writes the entries of its metadata in a random order: sorted, the same weights
    # always have the same SHA-256. Format: length of the header (8 bytes), the header, the tensors.
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":"))
    return content[:8] + header.encode().ljust(end - 8) + content[end:]
