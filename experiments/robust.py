"""Print what networks answer for digits that are not MNIST's, and for what is no digit.

    python experiments/robust.py RUN [RUN ...]      # named as for `digitlab reproduce`
    python experiments/robust.py --scenes 200 --first 5000 RUN      # test images 5000 to 5199

Prints the tables of robust.md: the answers of each run to each kind of image, or of scene. Digits
of other people are UCI's test set in scikit-learn (1,797 of 13 writers, 8x8 pixels, enlarged).
"""

import argparse
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import scenes
import torch
from ending import end_plainly
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from sklearn.datasets import load_digits as load_uci
from sklearn.datasets import load_sample_images

from digitlab.base.paths import lab_folder
from digitlab.base.statistics import share_interval
from digitlab.data.datasets import TEST, Digits, load_digits
from digitlab.data.images import as_tensors
from digitlab.digits.decode import Grey, decode
from digitlab.digits.predict import DigitReader, read_picture
from digitlab.digits.prepare import prepare
from digitlab.records.reader import lab_tracker
from digitlab.training.evaluate import evaluate

CHANCE = np.random.default_rng(0)
FONTS = sorted((Path(matplotlib.get_data_path()) / "fonts/ttf").glob("DejaVu*.ttf"))
UNLIKE = "ACEFHKMNPRTUVWXYadefhkmnprtvwxy"  # letters that are unlike any digit


def canvas(digit: Grey, least: int = 40, most: int = 120) -> Grey:
    """A digit as it is, anywhere in a larger black picture."""
    side = CHANCE.integers(least, most + 1, 2)
    picture = np.zeros(side, np.float32)
    top, left = (int(CHANCE.integers(1, one - 28)) for one in side)
    picture[top : top + 28, left : left + 28] = digit
    return picture


def letter(font: Path, what: str) -> Grey:
    image = Image.new("L", (140, 140), 255)
    face = ImageFont.truetype(str(font), 90)
    ImageDraw.Draw(image).text((70, 70), what, 0, face, anchor="mm")
    return np.asarray(image, np.float32)


def lines(count: int, closed: bool = False) -> Grey:
    image = Image.new("L", (120, 120), 255)
    draw = ImageDraw.Draw(image)
    points = [tuple(point) for point in CHANCE.integers(10, 110, (2 * count, 2)).tolist()]
    if closed:
        draw.polygon(points[:count], outline=0, width=5)
    else:
        for begin in range(count):
            draw.line(points[2 * begin : 2 * begin + 2], 0, 5)
    return np.asarray(image, np.float32)


def smooth() -> Grey:
    noise = Image.fromarray(CHANCE.integers(0, 256, (120, 120)).astype(np.uint8))
    blurred = np.asarray(noise.filter(ImageFilter.GaussianBlur(8)), np.float32)
    return (blurred - blurred.min()) * (255 / np.ptp(blurred))


def of_photos(count: int) -> Iterator[Grey]:
    photos = [Image.fromarray(photo).convert("L") for photo in load_sample_images().images]
    for i in range(count):
        photo, side = photos[i % len(photos)], int(CHANCE.integers(60, 400))
        left, top = (int(CHANCE.integers(0, size - side)) for size in photo.size)
        yield np.asarray(photo.crop((left, top, left + side, top + side)), np.float32)


def in_scenes(predictor: DigitReader, test: Digits, count: int, first: int) -> None:
    """Print how a run reads each kind of scene, of `count` test images from the `first` on."""
    numbers = range(first, first + count)
    print(f"| {predictor.row.name} | n | read | wrong | unsure | none |\n|---|---|---|---|---|---|")
    for kind in scenes.KINDS:
        said: Counter[bool | str] = Counter()
        for i in numbers:
            file = io.BytesIO()
            scenes.scene(kind, test.images[i], i).save(file, "PNG")
            answer, _ = read_picture(predictor, str(i), decode(file.getvalue(), kind))
            is_right = answer.digit == int(test.labels[i])
            said[is_right if answer.status == "digit" else answer.status] += 1
        cells = [f"{said[answer] / count:.1%}" for answer in (True, False, "unsure", "none")]
        print(f"| {kind} | {count} | {' | '.join(cells)} |", flush=True)


def of_things(predictors: list[DigitReader], test: Digits) -> None:
    """Print how often each run answers digit, unsure and none, to digits and to what is none."""
    things = {
        "test images in larger canvases": list(map(canvas, test.images[:2000].astype(np.float32))),
        "digits of DejaVu fonts": [letter(font, digit) for font in FONTS for digit in "0123456789"],
        "letters of the same fonts, unlike digits": [letter(f, c) for f in FONTS for c in UNLIKE],
        "scribbles of 4 to 11 lines": [lines(int(CHANCE.integers(4, 12))) for _ in range(300)],
        "triangles": [lines(3, closed=True) for _ in range(200)],
        "parts of photos": list(of_photos(300)),
        "smooth noise": [smooth() for _ in range(300)],
        "noise": [CHANCE.normal(128, 60, (80, 80)).clip(0, 255).astype(np.float32)
                  for _ in range(100)],
        "blank paper": [np.full((60, 60), CHANCE.integers(0, 256), np.float32)
                        for _ in range(100)],
    }  # fmt: skip
    for what, given in things.items():
        cells = []
        for predictor in predictors:
            answers = (read_picture(predictor, "", picture)[0] for picture in given)
            counts = Counter(answer.status for answer in answers)
            cells.append(" / ".join(str(counts[status]) for status in ("digit", "unsure", "none")))
        print(f"| {what} ({len(given)}) | {' | '.join(cells)} |", flush=True)


def main(runs: list[str], count: int, first: int) -> None:
    lab = lab_folder()
    tracker = lab_tracker(lab, [])
    predictors = [DigitReader(tracker, run, lab) for run in runs]
    print("runs:", ", ".join(f"{p.row.name} ({p.row.run_id[:8]})" for p in predictors))
    test = load_digits(lab, "mnist", TEST)
    if count:
        for predictor in predictors:
            in_scenes(predictor, test, count, first)
        return
    uci = load_uci()
    pictures = [np.asarray(Image.fromarray((16 * i).clip(0, 255).astype(np.uint8)).resize(
        (80, 80), Image.Resampling.BICUBIC), np.float32) for i in uci.images]  # fmt: skip
    foreign = [prepare(np.pad(picture, 16)) for picture in pictures]
    placed = [prepare(canvas(image.astype(np.float32), 30)) for image in test.images]
    for predictor in predictors:
        name = predictor.row.name
        answers = predictor.answer([("", p) for p in foreign])
        right = np.mean([a.digit == t for a, t in zip(answers, uci.target, strict=True)])
        print(f"{name}: UCI digits {share_interval(float(right), len(uci.target))}")
        logits = evaluate(predictor.network, as_tensors(test)[0], predictor.config.data)
        images = torch.from_numpy(np.stack([p.image for p in placed]))[:, None]
        again = evaluate(predictor.network, images, predictor.config.data).argmax(1)
        same = int((again == logits.argmax(1)).sum())
        print(f"{name}: in canvases of 30 to 120 pixels {same} of {len(again)} are read as before")
        sure, digits = predictor.calibration.probabilities(logits).max(1)
        true = (digits == as_tensors(test)[1]).double()
        parts = [(sure > low) & (sure <= low + 0.1) for low in np.arange(0, 1, 0.1)]
        gaps = [abs(float((sure[p] - true[p]).sum())) / len(sure) for p in parts if p.any()]
        print(f"{name}: T {predictor.calibration.temperature:.2f}, confidence {sure.mean():.2%}, "
              f"accuracy {true.mean():.2%}, calibration error {sum(gaps):.4f}")  # fmt: skip
    of_things(predictors, test)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--scenes", type=int, default=0, metavar="N")
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    end_plainly(lambda: main(given.runs, given.scenes, given.first))
