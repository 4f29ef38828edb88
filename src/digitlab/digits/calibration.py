"""How certain a network's answers are, and which images are like nothing that it has learned."""

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from digitlab.base.files import write_synced
from digitlab.base.statistics import fit_temperature
from digitlab.config.types import Config, EvaluateOn
from digitlab.data.datasets import TRAIN, load_digits, stratified_split
from digitlab.data.images import as_tensors, to_unit
from digitlab.records.reader import recorded_logits
from digitlab.records.tracker import RunRow, Tracker
from digitlab.training.evaluate import evaluate

_VERSION = "4"  # of what is fitted here: a cache of another version is not used
_DIGEST = 32  # bytes at the start of a cache: the SHA-256 of the rest
_WITHIN = 0.99  # of the validation images lie within each limit
_COMPONENTS = 48  # hold nine tenths of the variance of MNIST's images


@dataclass(frozen=True)
class Calibration:
    """Turns logits into probabilities, and detects images that are out of distribution.

    All of it is fitted on validation images: `temperature` divides the logits such that the
    probabilities match how often they are right (Guo et al. 2017); 99 of 100 of these images lie
    within each of `limits` (4,), one for each of four out-of-distribution scores.
    """

    temperature: float
    limits: Tensor
    basis: Tensor  # (784, K), leading eigenvectors of their second moments
    known: list[Tensor]  # for each digit (N, K), the training images in them

    def probabilities(self, logits: Tensor) -> Tensor:
        return (logits / self.temperature).softmax(1)

    def scores(self, images: Tensor, logits: Tensor) -> Tensor:
        """Return out-of-distribution scores (N, 4) of uint8 (N, 1, 28, 28) with logits (N, 10).

        They are one less the largest probability; the distance to the nearest training images of
        that digit; the same over the distance to those of the next digit; and how little all
        logits rise together (the energy of Liu et al. 2020).
        """
        probabilities = self.probabilities(logits)
        best = probabilities.argmax(1, keepdim=True)
        places = to_unit(images).flatten(1) @ self.basis
        distances = torch.stack([_distance(places, known) for known in self.known], 1)
        own = distances.gather(1, best)[:, 0]
        others = distances.scatter(1, best, torch.inf).min(1).values
        energy = logits.logsumexp(1)
        return torch.stack([1 - probabilities.max(1).values, own, own / others, -energy], 1)


def _distance(places: Tensor, known: Tensor) -> Tensor:
    """Return the mean distance to the three nearest; a class without images is infinitely far."""
    if not len(known):
        return torch.full((len(places),), torch.inf)
    nearest = torch.cdist(places, known).topk(min(3, len(known)), largest=False)
    return nearest.values.mean(1)


def load_calibration(
    tracker: Tracker, row: RunRow, config: Config, network: nn.Module, lab: Path
) -> Calibration:
    """Return the calibration of a run's weights, fitted once and then kept in the lab."""
    source = row if config.data.evaluate_on is EvaluateOn.validation else _trial(tracker, row)
    # The run that the temperature is fitted on belongs to the key: of two runs with the same
    # weights, one may have a trial behind it and the other not.
    key = [_VERSION, row.tags["digitlab.weights_sha256"], asdict(config.data), bool(source)]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
    file = lab / "calibrations" / f"{digest}.calibration"
    with suppress(OSError):  # it is not there yet
        content = file.read_bytes()
        if hashlib.sha256(content[_DIGEST:]).digest() == content[:_DIGEST]:  # or it is damaged
            return _from_tensors(safetensors.torch.load(content[_DIGEST:]))
    tensors = _fitted(tracker, source, config, network, lab)
    with suppress(OSError):  # a lab that cannot be written: fit it again the next time
        content = safetensors.torch.save(tensors)
        file.parent.mkdir(exist_ok=True)
        write_synced(file, hashlib.sha256(content).digest() + content)
    return _from_tensors(tensors)


def _from_tensors(tensors: dict[str, Tensor]) -> Calibration:
    known = [tensors[f"known{digit}"] for digit in range(10)]
    return Calibration(float(tensors["temperature"]), tensors["limits"], tensors["basis"], known)


def _trial(tracker: Tracker, row: RunRow) -> RunRow | None:
    """Return the trial behind a final fit, which has kept validation images to be measured on.

    A reproduction of a final fit has its weights, and so its trial.
    """
    weights = {"digitlab.weights_sha256": row.tags["digitlab.weights_sha256"]}
    for fit in [row, *tracker.find(weights)]:
        tags = {key: fit.tags.get(f"digitlab.{key}") for key in ("study", "trial", "study_id")}
        if tags["study"] and tags["trial"]:
            wanted = {f"digitlab.{key}": value for key, value in tags.items() if value}
            trials = tracker.find({"digitlab.kind": "trial", "digitlab.state": "finished"} | wanted)
            for trial in trials:
                if "digitlab.weights_sha256" in trial.tags:
                    return trial
    return None


def _fitted(
    tracker: Tracker, source: RunRow | None, config: Config, network: nn.Module, lab: Path
) -> dict[str, Tensor]:
    """Fit a calibration; `source` has predicted validation images that it did not train on.

    Where there is none, every image may have been learned from: the temperature stays 1.
    """
    data = config.data
    digits = load_digits(lab, data.name, TRAIN, data.allow_unknown)
    learn, held = stratified_split(digits.labels, data.validation_images, data.split_seed)
    images, labels = as_tensors(digits)
    logits, temperature = evaluate(network, images[held], data), 1.0
    if source is not None:
        if data.evaluate_on is not EvaluateOn.validation:
            # Of the same images, in the same order.
            logits = torch.from_numpy(recorded_logits(tracker, source, len(held)))
        temperature = fit_temperature(logits.numpy(), digits.labels[held])
    flat = to_unit(images[learn]).flatten(1)
    # In float64: of a few hundred images most eigenvalues are 0, where float32 does not converge.
    moments = (flat.T @ flat / len(flat)).double()
    basis = torch.linalg.eigh(moments).eigenvectors[:, -_COMPONENTS:].float().contiguous()
    known = [(flat[labels[learn] == digit] @ basis).contiguous() for digit in range(10)]
    sample = torch.arange(0, len(held), max(1, len(held) // 2000))
    unlimited = Calibration(temperature, torch.zeros(4), basis, known)
    limits = unlimited.scores(images[held][sample], logits[sample]).quantile(_WITHIN, 0)
    fitted = {"temperature": torch.tensor(temperature), "limits": limits, "basis": basis}
    return fitted | {f"known{digit}": known[digit] for digit in range(10)}
