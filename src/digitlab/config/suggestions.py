"""What a key that does not exist was probably meant to be."""

from collections.abc import Iterable
from difflib import get_close_matches

from digitlab.base.errors import nearest

# Names that other programs use, by the last part of a key, and the setting here.
_USUAL = {
    "lr": "optim.learning_rate",
    "wd": "optim.weight_decay",
    "bs": "data.batch_size",
    "batch": "data.batch_size",
    "filters": "model.widths",
    "channels": "model.widths",
    "device": "trainer.device",
    "gpu": "trainer.device",
    "gpus": "trainer.device",
    "epochs": "trainer.epochs",
    "max_epochs": "trainer.epochs",
    "seed": "trainer.seed",
}
_MOST_ALIKE = 3  # settings of one last part that are all named


def usual_key(key: str) -> str:
    """Return the setting that a usual name stands for, whatever group it was given; else `key`."""
    return _USUAL.get(key.rpartition(".")[2], key)


def suggest(key: str, known: Iterable[str]) -> str:
    """Return "did you mean a or b?" for a key, or the command that lists all settings."""
    keys = set(known)
    meant, last = usual_key(key), key.rpartition(".")[2]
    alike = [meant] if meant in keys else sorted(one for one in keys if one.endswith(f".{last}"))
    if 0 < len(alike) <= _MOST_ALIKE:
        return f"did you mean {' or '.join(alike)}?"
    lasts = {one.rpartition(".")[2]: one for one in sorted(keys, reverse=True)}
    if "." not in key and (close := get_close_matches(key, lasts, n=1)):
        return f"did you mean {lasts[close[0]]}?"
    return nearest(key, keys, otherwise="`digitlab config` lists all settings.")
