"""`digitlab predict`: which digit a new image shows, and how certain that is."""

import io
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from digitlab.base.errors import UserError, counted, require, visible
from digitlab.base.files import write_output
from digitlab.config.types import Config
from digitlab.data.datasets import class_names, known_classes
from digitlab.digits.calibration import load_calibration
from digitlab.digits.decode import MAX_FILE_BYTES, Grey, decode, is_image, read_image
from digitlab.digits.prepare import Prepared, prepare_as
from digitlab.records.reader import lab_tracker, load_run
from digitlab.records.tracker import Tracker
from digitlab.training.evaluate import evaluate

_FAR = 1.25  # times the limit of the distance, beyond which there is no digit at all
_CERTAINTY = ("none", "unsure", "digit")
_UNLIKE = "unlike any digit of the training images"


@dataclass(frozen=True)
class Answer:
    """What a network reads in one image.

    status: digit, unsure (a digit is the best guess, not to be relied on), none (nothing that looks
    like a digit) or error. `digit` is None unless there is one; `probability` is its own.
    Both are calibrated; `raw_probability` is the network's own for that digit. `labels` name the
    classes in the order of the probabilities, and `label` is that of `digit`.
    """

    path: str
    status: str
    digit: int | None = None
    probability: float | None = None
    probabilities: list[float] = field(default_factory=list)
    message: str = ""
    raw_probability: float | None = None
    label: str | None = None
    labels: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.probabilities:
            return visible(f"{self.path}: {self.message}")
        ranked = np.argsort(self.probabilities)[::-1][:3]
        likely = ", ".join(f"{self.labels[i]} {self.probabilities[i]:.1%}" for i in ranked)
        head = self.label if self.status == "digit" else self.message
        return visible(f"{self.path}: {head}   ({likely}; uncalibrated {self.raw_probability:.1%})")


class DigitReader:
    """A run's network, ready for new images."""

    def __init__(self, tracker: Tracker, run: str | None, lab: Path) -> None:
        """Load a run and its calibration.

        Raises:
            UserError: no such run, or its data are not available.
        """
        self.lab = lab
        self.row, self.config, self.network = load_run(tracker, run)
        self.calibration = load_calibration(tracker, self.row, self.config, self.network, lab)

    def answer(self, prepared: Sequence[tuple[str, Prepared]]) -> list[Answer]:
        """Return an answer for each image, by its path."""
        images = torch.from_numpy(np.stack([p.image for _, p in prepared]))[:, None]
        logits = evaluate(self.network, images, self.config.data)
        probabilities, raw = self.calibration.probabilities(logits), logits.softmax(1)
        scores, limits = self.calibration.scores(images, logits), self.calibration.limits
        unsure = (scores > limits).any(1).tolist()
        far = (scores[:, 1] > _FAR * limits[1]).tolist()
        answers, labels = [], class_names(self.config.data.name, self.lab)
        for i, (path, found) in enumerate(prepared):
            problem = found.problem or (_UNLIKE if far[i] else "")
            answers.append(_answer(path, problem, probabilities[i], raw[i], unsure[i], labels))
        return answers


@dataclass(frozen=True)
class UncalibratedReader:
    """A network that has no calibration, since it still learns: its own probabilities are given."""

    network: nn.Module
    config: Config
    lab: Path

    def answer(self, prepared: Sequence[tuple[str, Prepared]]) -> list[Answer]:
        """As `DigitReader`; unsure is what is less probable than not."""
        images = torch.from_numpy(np.stack([p.image for _, p in prepared]))[:, None]
        raw = evaluate(self.network, images, self.config.data).softmax(1)
        labels = class_names(self.config.data.name, self.lab)
        return [
            _answer(path, found.problem, raw[i], raw[i], bool(raw[i].max() < 0.5), labels)
            for i, (path, found) in enumerate(prepared)
        ]


ImageReader = DigitReader | UncalibratedReader


def read_picture(reader: ImageReader, path: str, grey: Grey) -> tuple[Answer, Prepared]:
    """Return what is read in a grey picture (H, W), and the image that it is read in."""
    name, lab = reader.config.data.name, reader.lab
    found = [(path, prepare_as(grey, name, lab))]
    [read] = read_prepared(reader, found, lambda _: prepare_as(grey, name, lab, keeps_lines=False))
    return read


def read_prepared(
    reader: ImageReader,
    found: Sequence[tuple[str, Prepared]],
    without_lines: Callable[[int], Prepared],
) -> list[tuple[Answer, Prepared]]:
    """Return what is read in each image, and which image that is.

    Where it is no digit, and it is a surer one without the lines across its picture, it is that.

    Args:
        without_lines: gives the image of that index so prepared.
    """
    read = [(answer, one) for answer, (_, one) in zip(reader.answer(found), found, strict=True)]
    again = [i for i, (answer, _) in enumerate(read) if answer.status != "digit"]
    if again:
        others = [(found[i][0], without_lines(i)) for i in again]
        for i, other, (_, one) in zip(again, reader.answer(others), others, strict=True):
            if _CERTAINTY.index(other.status) > _CERTAINTY.index(read[i][0].status):
                read[i] = (other, one)
    return read


def _answer(
    path: str,
    problem: str,
    probabilities: Tensor,
    raw: Tensor,
    is_unsure: bool,
    labels: list[str],
) -> Answer:
    if problem:
        return Answer(path, "none", message=f"no digit found: {problem}")
    if not probabilities.isfinite().all():
        raise UserError(
            "the network's answers are not finite: its weights must be those of a training. Train "
            "it again."
        )
    digit = int(probabilities.argmax())
    label = labels[digit]
    status, message = ("unsure", f"not sure: perhaps {label}") if is_unsure else ("digit", "")
    given, own = probabilities.tolist(), float(raw[digit])
    return Answer(path, status, digit, given[digit], given, message, own, label, labels)


def predict(
    paths: Sequence[str],
    run: str | None,
    as_json: bool,
    explain: bool,
    save: Path | None,
    lab: Path,
    stores: Sequence[str] = (),
    recursive: bool = False,
) -> int:
    """Print which digits images show: files, folders, `-` for standard input.

    Returns:
        0, or 2 where an image could not be read; the others are answered all the same.

    Raises:
        UserError: no such run.
    """
    require(all(paths), "predict ''", "the name of a file or a folder, or - for standard input")
    predictor = DigitReader(lab_tracker(lab, stores), run, lab)
    if run is None:
        chosen = f"{predictor.row.name}, which learned {predictor.config.data.name}"
        print(f"network: {chosen} (--run=RUN takes another)", file=sys.stderr)
    answers: list[Answer] = []
    names: set[str] = set()
    for path in _files(paths, recursive):
        try:
            answer, prepared = read_picture(predictor, path, _read(path))
        except UserError as error:
            answers.append(Answer(path, "error", message=str(error)))
            if not as_json:
                print(f"digitlab: {error}", file=sys.stderr)
            continue
        answers.append(answer)
        if not as_json:
            print(answer, flush=True)
        name = _new_name("standard-input" if path == "-" else Path(path).stem, names)
        if save is not None:
            file = io.BytesIO()
            Image.fromarray(prepared.image).save(file, "PNG")
            write_output(save / f"{name}.28x28.png", file.getvalue(), "--out", lab)
        if explain and answer.digit is not None:
            out = _draw_why(predictor, prepared, answer, lab, name)
            print(visible(f"why: {out}"), file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print(json.dumps([asdict(answer) for answer in answers], indent=1))
    return 2 if any(answer.status == "error" for answer in answers) else 0


def _new_name(stem: str, names: set[str]) -> str:
    """Return a name that is not among the names, and add it: files of two folders may share it."""
    counted = (f"{stem}-{number}" for number in itertools.count(2))
    name = next(name for name in itertools.chain([stem], counted) if name not in names)
    names.add(name)
    return name


def _draw_why(
    predictor: DigitReader, prepared: Prepared, answer: Answer, lab: Path, name: str
) -> Path:
    from digitlab.digits.explain import draw_reasons

    ranked, known = np.argsort(answer.probabilities)[::-1].tolist(), known_classes(answer.labels)
    best, other = sorted(ranked, key=lambda digit: digit not in known)[:2]
    out = lab / "explained" / f"{name}-{best}.png"
    pixels = torch.from_numpy(prepared.image)
    given = (predictor.network, predictor.config.data, pixels, (best, other))
    write_output(out, draw_reasons(*given, answer.labels), "", lab)
    return out


def _files(paths: Sequence[str], recursive: bool) -> list[str]:
    """Return the paths, with the images of a folder in its place, by name; hidden files are not."""
    files: list[str] = []
    for path in paths:
        inside: list[Path] = []
        try:
            if path != "-" and Path(path).is_dir():
                found = sorted(Path(path).rglob("*") if recursive else Path(path).iterdir())
                shown = [file for file in found if not _is_hidden(file.relative_to(path))]
                inside = [file for file in shown if is_image(file)]
                _report_passed_over(path, shown, inside, recursive)
        except OSError:  # a folder that may not be listed: reported when it is read
            pass
        files += map(str, inside) if inside else [path]
    return files


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _report_passed_over(
    path: str, shown: Sequence[Path], inside: Sequence[Path], recursive: bool
) -> None:
    folders = [file for file in shown if file.is_dir()]
    others = len(shown) - len(inside) - len(folders)
    if others:
        count = counted(others, "file is no image", "files are no images")
        print(visible(f"{path}: {count}"), file=sys.stderr)
    if folders and not recursive:
        count = counted(len(folders), "sub-folder is", "sub-folders are")
        text = f"{path}: {count} not read: --recursive reads all"
        print(visible(text), file=sys.stderr)


def _read(path: str) -> Grey:
    if path == "-":
        if sys.stdin is None:
            raise UserError("standard input: closed: it must hold an image.")
        return decode(sys.stdin.buffer.read(MAX_FILE_BYTES + 1), "standard input")
    if Path(path).is_dir():
        raise UserError(f"{path}: a folder without images: it must hold some, or give --recursive.")
    return read_image(Path(path))
