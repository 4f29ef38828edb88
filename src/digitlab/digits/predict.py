"""`digitlab predict`: which digit a new image shows, and how sure that is."""

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from digitlab.base.errors import UserError
from digitlab.config.types import Config, EvaluateOn
from digitlab.data.datasets import TRAIN, load_digits, stratified_split
from digitlab.data.images import to_unit
from digitlab.digits.decode import decode, read_image
from digitlab.digits.explain import draw_reasons
from digitlab.digits.prepare import Grey, Prepared, prepare
from digitlab.records.mlflow import RunRow, Tracking
from digitlab.records.reader import lab_tracking, load_run
from digitlab.study.audit import trial_runs
from digitlab.training.evaluate import evaluate

_KEPT = 0.99  # of the validation set's digits keep each of the limits
_FAR = 1.25  # times the limit of the distance, beyond which there is no digit at all
_UNLIKE = "unlike any digit that was learned"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")


@dataclass(frozen=True)
class Answer:
    """What is said of one image.

    status: digit, unsure (a digit is the best guess, not to be relied on), none (nothing that looks
    like a digit) or error. `digit` is None unless there is one; `probability` is its.
    """

    path: str
    status: str
    digit: int | None = None
    probability: float | None = None
    probabilities: list[float] = field(default_factory=list)
    message: str = ""


@dataclass(frozen=True)
class Judge:
    """Turns logits into probabilities that can be believed, and tells what is no digit.

    All of it is chosen on validation images: `temperature` divides the logits such that the
    probabilities are as often right as they say (Guo et al. 2017); `limits` (4,) are those that 99
    of 100 of these digits keep, of each of four signs.
    """

    temperature: float
    limits: Tensor
    basis: Tensor  # (784, K), principal components of the training images
    known: list[Tensor]  # for each digit (N, K), the training images in them

    def probabilities(self, logits: Tensor) -> Tensor:
        return (logits / self.temperature).softmax(1)

    def signs(self, images: Tensor, logits: Tensor) -> Tensor:
        """(N, 4) of images uint8 (N, 1, 28, 28) with logits (N, 10): the greater, the stranger.

        How improbable the digit is that is said; how far its nearest training images are; that,
        over how far those of the next digit are; and how little all logits rise together (the
        energy of Liu et al. 2020).
        """
        probabilities = self.probabilities(logits)
        said = probabilities.argmax(1, keepdim=True)
        places = to_unit(images).flatten(1) @ self.basis
        near = [torch.cdist(places, k).topk(3, largest=False).values.mean(1) for k in self.known]
        distances = torch.stack(near, 1)
        own = distances.gather(1, said)[:, 0]
        others = distances.scatter(1, said, torch.inf).min(1).values
        energy = logits.logsumexp(1)
        return torch.stack([1 - probabilities.max(1).values, own, own / others, -energy], 1)


class Predictor:
    """A run's network, ready for new images."""

    def __init__(self, tracking: Tracking, run: str, lab: Path) -> None:
        """Load a run and fit its judge.

        Raises:
            UserError: no such run, or its data are not to be had.
        """
        self.row, self.config, self.network = load_run(tracking, run)
        self.judge = _judge(tracking, self.row, self.config, self.network, lab)

    def answer(self, prepared: Sequence[tuple[str, Prepared]]) -> list[Answer]:
        """What is said of each image, by its path."""
        images = torch.from_numpy(np.stack([p.image for _, p in prepared]))[:, None]
        logits = evaluate(self.network, images, self.config.data)
        probabilities = self.judge.probabilities(logits)
        signs = self.judge.signs(images, logits)
        strange = (signs > self.judge.limits).any(1)
        far = signs[:, 1] > _FAR * self.judge.limits[1]
        return [
            _say(path, p.problem or (_UNLIKE if is_far else ""), row.tolist(), bool(is_strange))
            for (path, p), row, is_far, is_strange in zip(
                prepared, probabilities, far, strange, strict=True
            )
        ]


def _say(path: str, problem: str, probabilities: list[float], strange: bool) -> Answer:
    if problem:
        return Answer(path, "none", message=f"no digit found: {problem}")
    sure = max(probabilities)
    digit = probabilities.index(sure)
    if strange:
        return Answer(path, "unsure", digit, sure, probabilities, f"not sure: perhaps {digit}")
    return Answer(path, "digit", digit, sure, probabilities)


def _judge(tracking: Tracking, row: RunRow, config: Config, network: nn.Module, lab: Path) -> Judge:
    """Fitted once for a run's weights, and kept in the lab."""
    digest = hashlib.sha256((row.tags["digitlab.weights_sha256"] + _VERSION).encode()).hexdigest()
    kept = lab / "judges" / f"{digest}.safetensors"
    if not kept.exists():
        tensors = _fitted(tracking, row, config, network, lab)
        kept.parent.mkdir(exist_ok=True)
        new = kept.with_suffix(f".{os.getpid()}.new")
        safetensors.torch.save_file(tensors, new)
        new.replace(kept)
    tensors = safetensors.torch.load_file(kept)
    return Judge(
        float(tensors["temperature"]),
        tensors["limits"],
        tensors["basis"],
        [tensors[f"known{digit}"] for digit in range(10)],
    )


_VERSION = "2"  # of what `_fitted` does
_COMPONENTS = 48  # hold nine tenths of the variance of MNIST's images


def _fitted(
    tracking: Tracking, row: RunRow, config: Config, network: nn.Module, lab: Path
) -> dict[str, Tensor]:
    data = config.data
    digits = load_digits(lab, data.name, TRAIN, data.allow_unknown)
    learn, held = stratified_split(digits.labels, data.validation_images, data.split_seed)
    images, labels = digits.images[:, None], digits.labels
    told = _held_logits(tracking, row, config, network, images[held], labels[held])
    if told is None:  # nothing is known of it on digits that it has not learned
        logits, temperature = evaluate(network, images[held], data), 1.0
    else:
        logits, temperature = told[0], fit_temperature(*told)
    flat = to_unit(images[learn]).flatten(1)
    basis = torch.linalg.eigh(flat.T @ flat / len(flat)).eigenvectors[:, -_COMPONENTS:].contiguous()
    known = [(flat[labels[learn] == digit] @ basis).contiguous() for digit in range(10)]
    judge = Judge(temperature, torch.zeros(4), basis, known)
    sample = torch.arange(0, len(held), max(1, len(held) // 2000))
    signs = judge.signs(images[held][sample], logits[sample])
    limits = signs.quantile(_KEPT, 0)
    fitted = {"temperature": torch.tensor(temperature), "limits": limits, "basis": basis}
    return fitted | {f"known{digit}": known[digit] for digit in range(10)}


def _held_logits(
    tracking: Tracking,
    row: RunRow,
    config: Config,
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
) -> tuple[Tensor, Tensor] | None:
    """Logits and labels of digits that were not learned from, never of the test set.

    A final fit has learned from the validation set too: for it stands the trial behind it,
    which has the same configuration. None where there is no such trial.
    """
    if config.data.evaluate_on is EvaluateOn.validation:
        return evaluate(network, images, config.data), labels
    study, trial = row.tags.get("digitlab.study"), row.tags.get("digitlab.trial")
    if study and trial:
        runs = trial_runs(tracking, study, int(trial))
        for chosen in (run for run in runs if "digitlab.weights_sha256" in run.tags):
            kept = tracking.artifact(chosen.run_id, "predictions.safetensors")
            logits = safetensors.torch.load(kept)[
                "logits"
            ]  # of the same validation set, in its order
            return logits, labels
    return None


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The number above 0 by which to divide logits (N, 10) for the least cross-entropy."""

    def loss(logarithm: float) -> float:
        scaled = logits / float(np.exp(logarithm))
        return float(nn.functional.cross_entropy(scaled, labels))

    return float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))


def predict(
    paths: Sequence[str], run: str, as_json: bool, explain: bool, save: Path | None, lab: Path
) -> int:
    """Say which digits images show: files, folders, `-` for standard input.

    Returns:
        0, or 2 where an image could not be read; the others are answered all the same.

    Raises:
        UserError: no such run.
    """
    tracking = lab_tracking(lab)
    predictor = Predictor(tracking, run, lab)
    failed = False
    answers: list[Answer] = []
    named: Counter[str] = Counter()
    for path in _files(paths):
        try:
            prepared = prepare(_read(path))
        except UserError as error:
            failed = True
            answers.append(Answer(path, "error", message=str(error)))
            if not as_json:
                print(f"digitlab: {error}", file=sys.stderr)
            continue
        [answer] = predictor.answer([(path, prepared)])
        answers.append(answer)
        if not as_json:
            print(told(answer), flush=True)
        name = "standard-input" if path == "-" else Path(path).stem
        named[name] += 1  # files of several folders may have the same
        name += f"-{named[name]}" if named[name] > 1 else ""
        if save is not None:
            _save(prepared, save / f"{name}.28x28.png")
        if explain and answer.digit is not None:
            out = lab / "explained" / f"{name}-{answer.digit}.png"
            other = int(np.argsort(answer.probabilities)[-2])
            pixels = torch.from_numpy(prepared.image)
            digits = (answer.digit, other)
            draw_reasons(predictor.network, predictor.config.data, pixels, digits, out)
            print(f"why: {out}", file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print(json.dumps([asdict(answer) for answer in answers], indent=1))
    return 2 if failed else 0


def told(answer: Answer) -> str:
    """An answer as a line."""
    if not answer.probabilities:
        return f"{answer.path}: {answer.message}"
    ranked = np.argsort(answer.probabilities)[::-1][:3]
    told = ", ".join(f"{digit} {answer.probabilities[digit]:.1%}" for digit in ranked)
    head = f"{answer.digit}" if answer.status == "digit" else answer.message
    return f"{answer.path}: {head}   ({told})"


def _files(paths: Sequence[str]) -> list[str]:
    """The paths, with the images of a folder in its place, by name."""
    files: list[str] = []
    for path in paths:
        folder = Path(path)
        try:
            if path != "-" and folder.is_dir():
                inside = sorted(p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES)
                files += [str(p) for p in inside] or [path]
                continue
        except OSError:  # a folder that may not be listed: told when it is read
            pass
        files.append(path)
    return files


def _read(path: str) -> Grey:
    if path == "-":
        if sys.stdin is None:
            raise UserError("standard input: closed")
        return decode(sys.stdin.buffer.read(2**26), "standard input")
    if Path(path).is_dir():
        raise UserError(
            f"{path}: a folder without images that can be listed ({', '.join(_SUFFIXES)})"
        )
    return read_image(Path(path))


def _save(prepared: Prepared, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(prepared.image).save(target)
    except OSError as error:
        raise UserError(f"--save {target.parent}: cannot be written: {error.strerror}") from error
