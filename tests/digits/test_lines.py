"""Lines across a picture: they are taken out, what they cross stays, and digits are no lines."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from digitlab.config.compose import compose
from digitlab.config.types import Config
from digitlab.digits import lines
from digitlab.digits.decode import Grey
from digitlab.digits.lines import without_lines
from digitlab.digits.predict import Answer, ImageReader, read_picture
from digitlab.digits.prepare import Prepared, prepare

find = lines._find_line
RAW = Path(__file__).parents[1] / "support" / "digits" / "t10k-images-idx3-ubyte"
DIGITS = np.fromfile(RAW, np.uint8)[16:].reshape(-1, 28, 28)
FOUR = [(60, 20, 30, 110), (30, 110, 120, 110), (95, 60, 95, 190)]
SEVEN = [(0, 3, 149, 3), (146, 3, 60, 199)]  # cut out tight


def drawn(*strokes: tuple[int, int, int, int], size: tuple[int, int] = (150, 200)) -> Grey:
    image = Image.new("L", size)
    for stroke in strokes:
        ImageDraw.Draw(image).line(stroke, 255, 8)
    return np.asarray(image, np.float32) / 255


@given(number=st.integers(0, len(DIGITS) - 1))
def test_a_digit_without_lines_is_as_it_was(number: int) -> None:
    ink = DIGITS[number].astype(np.float32) / 255
    np.testing.assert_array_equal(without_lines(ink), ink)


@given(
    number=st.integers(0, len(DIGITS) - 1),
    begin=st.integers(0, 27),
    end=st.integers(0, 27),
    is_upright=st.booleans(),
    width=st.integers(1, 2),
)
def test_a_line_goes_and_nothing_that_is_away_from_it(
    number: int, begin: int, end: int, is_upright: bool, width: int
) -> None:
    plain = Image.fromarray(DIGITS[number])
    line = (begin, 0, end, 27) if is_upright else (0, begin, 27, end)
    crossed, alone = plain.copy(), Image.new("L", (28, 28))
    for image in (crossed, alone):
        ImageDraw.Draw(image).line(line, 255, width)
    before, after = (np.asarray(image, np.float32) / 255 for image in (plain, crossed))
    rest = without_lines(after)
    assert (rest <= after).all()
    near = np.asarray(alone) > 0
    for axis in (0, 1):
        for step in range(-4, 5):
            near = near | (np.roll(np.asarray(alone), step, axis) > 0)
    np.testing.assert_array_equal(rest[~near], before[~near])
    if before[:, [0, 1, 2, 25, 26, 27]].max() == before[[0, 1, 2, 25, 26, 27]].max() == 0:
        assert rest[[0, -1]].max() <= 0.5
        assert rest[:, [0, -1]].max() <= 0.5


@pytest.mark.parametrize("count", [4, 7, 9])
def test_a_digit_on_ruled_paper_is_left(count: int) -> None:
    plain = drawn(*FOUR)
    ruled = plain.copy()
    for row in np.linspace(12, 190, count).astype(int):
        ruled[row : row + 3] = 1
    assert np.abs(without_lines(ruled) - plain).mean() < 0.01
    assert np.abs(ruled - plain).mean() > 0.05


def test_lines_end_where_filters_find_no_ink() -> None:
    plain = drawn(*FOUR)
    ruled = plain.copy()
    ruled[[20, 80, 140]] = 1
    for side in (ruled, ruled.T):
        side[:4] = side[-4:] = 0
    assert np.abs(without_lines(ruled) - plain).mean() < 0.005


@pytest.mark.parametrize(
    "make",
    [
        lambda: drawn(*SEVEN),
        lambda: drawn((0, 0, 149, 199)),  # nothing else
        lambda: drawn((75, 0, 75, 199), (0, 100, 149, 100)),
        lambda: drawn((0, 100, 149, 100), (20, 0, 70, 199)),  # something that is cut off
        lambda: np.ones((40, 40), np.float32),
        lambda: np.zeros((9, 400), np.float32),
        lambda: np.ones((1, 1), np.float32),
    ],
)
def test_what_may_be_a_digit_or_none_stays(make: Callable[[], Grey]) -> None:
    ink = make()
    np.testing.assert_array_equal(without_lines(ink), ink)


def test_a_crossed_digit_is_prepared_like_a_plain_one() -> None:
    plain = 255 - 255 * drawn(*FOUR)
    crossed = np.minimum(plain, 255 - 255 * drawn((0, 30, 149, 150)))
    prepared = prepare(crossed, keeps_lines=False)
    assert not prepared.problem
    assert np.abs(prepared.image.astype(int) - prepare(plain).image.astype(int)).mean() < 4


@dataclass
class ScriptedReader:
    """A reader that gives each image the status that a test asks for."""

    config: Config
    lab: Path
    status: Callable[[Prepared], str]

    def answer(self, prepared: Sequence[tuple[str, Prepared]]) -> list[Answer]:
        return [Answer(path, self.status(found)) for path, found in prepared]


@pytest.mark.parametrize("first", ["none", "unsure", "digit"])
@pytest.mark.parametrize("then", ["none", "unsure", "digit"])
def test_lines_are_taken_out_where_that_makes_an_answer_surer(
    tmp_path: Path, first: str, then: str
) -> None:
    picture = np.minimum(255 - 255 * drawn(*FOUR), 255 - 255 * drawn((0, 30, 149, 150)))
    with_lines, without = prepare(picture), prepare(picture, keeps_lines=False)
    assert (with_lines.image != without.image).any()
    reader = ScriptedReader(
        compose("train", ["data=sample"])[0].config,
        tmp_path,
        lambda found: first if (found.image == with_lines.image).all() else then,
    )
    answer, seen = read_picture(cast("ImageReader", reader), "it", picture)
    is_surer = ["none", "unsure", "digit"].index(then) > ["none", "unsure", "digit"].index(first)
    assert answer.status == (then if is_surer else first)
    assert (seen.image == (without if is_surer else with_lines).image).all()


def test_a_picture_that_is_all_ink_takes_no_time() -> None:
    looked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "_find_line", lambda ink: looked.append(0) or find(ink))
        without_lines(np.ones((300, 300), np.float32))
    assert len(looked) == 1
