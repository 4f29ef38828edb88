"""New images: what is found in them, and that it is what MNIST would have made of it."""

import io
from pathlib import Path

import numpy as np
import pytest
import scenes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from scipy import ndimage

from digitlab.digits.decode import Grey, decode
from digitlab.digits.prepare import prepare, prepare_as, stroke_width
from digitlab.digits.sheet import _threshold, find_sheet

RAW = Path(__file__).parents[1] / "support" / "digits" / "t10k-images-idx3-ubyte"
DIGITS = np.fromfile(RAW, np.uint8)[16:].reshape(-1, 28, 28)


def canvas(digit: np.ndarray, side: tuple[int, int], corner: tuple[int, int]) -> Grey:
    placed = np.zeros(side, np.float32)
    placed[corner[0] : corner[0] + 28, corner[1] : corner[1] + 28] = digit
    return placed


def large(digit: np.ndarray, side: int, resample: int = Image.Resampling.BICUBIC) -> Grey:
    image = Image.fromarray(digit).resize((side, side), resample)
    return np.asarray(image, np.float32)


def apart(first: np.ndarray, second: np.ndarray) -> float:
    """Mean difference in grey levels, over the ink of the first."""
    difference = np.abs(first.astype(float) - second.astype(float))
    return float(difference.sum() / (first > 0).sum())


@pytest.mark.slow
def test_digits_of_mnist_in_larger_canvases_come_back_to_the_pixel() -> None:
    chance = np.random.default_rng(0)
    for digit in DIGITS:
        height, width = chance.integers(30, 120, 2)
        corner = (chance.integers(1, height - 28), chance.integers(1, width - 28))
        for inverted in (False, True):
            image = canvas(digit, (height, width), corner)
            prepared = prepare(255 - image if inverted else image)
            assert prepared.problem == ""
            # One in a thousand of MNIST's has a speck, which is left out here.
            assert np.abs(prepared.image.astype(int) - digit).mean() < 1.5


def test_what_is_scaled_alone_is_light_on_dark_where_its_data_are(tmp_path: Path) -> None:
    for image in (DIGITS[0], 255 - DIGITS[0]):
        assert (prepare_as(image.astype(np.float32), "kmnist", tmp_path).image == DIGITS[0]).all()


@pytest.mark.parametrize("deviation", [0, 30, 60])
def test_mnists_own_images_are_found_and_hardly_changed(deviation: float) -> None:
    chance = np.random.default_rng(0)
    far = []
    for digit in DIGITS[:200]:
        noise = chance.normal(0, deviation, digit.shape)
        prepared = prepare((digit + noise).clip(0, 255).round().astype(np.float32))
        assert prepared.problem == ""
        far.append(apart(digit, prepared.image))
    assert np.mean(far) < 5 + 2 * deviation  # of 255, for each pixel of ink


@pytest.mark.slow
@pytest.mark.parametrize("side", [56, 140, 400])
def test_a_digit_drawn_large_is_brought_back_to_its_size(side: int) -> None:
    far = [apart(digit, prepare(large(digit, side)).image) for digit in DIGITS[:60]]
    assert np.mean(far) < 60  # of 255: a fraction of a pixel at the edges


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, len(DIGITS) - 1),
    st.integers(60, 300),
    st.floats(0.3, 1),
    st.floats(-60, 60),
    st.booleans(),
    st.integers(0, 9),
)
def test_light_shadow_and_polarity_change_little(
    index: int, side: int, contrast: float, slope: float, inverted: bool, seed: int
) -> None:
    digit = large(np.pad(DIGITS[index], 6), side)
    plain = prepare(digit)
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    noise = np.random.default_rng(seed).normal(0, 2, digit.shape)
    photo = 200 - 120 * contrast * digit / 255 + slope * 0.5 * x + slope * 0.3 * y * y + noise
    photo = np.clip(255 - photo if inverted else photo, 0, 255).astype(np.float32)
    prepared = prepare(photo)
    assert prepared.problem == ""
    centred = [ndimage.center_of_mass(image) for image in (plain.image, prepared.image)]
    np.testing.assert_allclose(*centred, atol=1.2)
    assert apart(plain.image, prepared.image) < 110  # a pixel of the box, at the worst


@pytest.mark.parametrize("level", [0, 7, 128, 255])
def test_blank_paper_holds_nothing(level: int) -> None:
    prepared = prepare(np.full((60, 80), level, np.float32))
    assert "nothing stands out" in prepared.problem
    assert not prepared.image.any()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.floats(0, 255), st.floats(0, 80), st.integers(8, 200))
def test_noise_is_nothing_or_a_picture(
    seed: int, level: float, deviation: float, side: int
) -> None:
    noise = np.random.default_rng(seed).normal(level, deviation, (side, side + 3))
    prepared = prepare(np.clip(noise, 0, 255).astype(np.float32))
    assert prepared.image.shape == (28, 28)
    assert prepared.image.dtype == np.uint8
    assert bool(prepared.problem) == (not prepared.image.any())


@settings(deadline=None, max_examples=60)
@given(st.integers(5, 60), st.integers(5, 60), st.data())
def test_any_picture_is_answered(height: int, width: int, data: st.DataObject) -> None:
    levels = data.draw(st.lists(st.integers(0, 255), min_size=1, max_size=6))
    seed = data.draw(st.integers(0, 99))
    picture = np.random.default_rng(seed).choice(levels, (height, width)).astype(np.float32)
    prepared = prepare(picture)
    assert prepared.image.shape == (28, 28)
    assert bool(prepared.problem) == (not prepared.image.any())


@pytest.mark.slow
@pytest.mark.parametrize("kind", scenes.KINDS)
def test_scene_is_brought_back_to_the_digit_alone(kind: str) -> None:
    assert change_in_scene(kind, 1) < 130  # a pixel of the box, and a turn of 15 degrees


@pytest.mark.parametrize("number", [28, 32, 87])
def test_specks_at_the_edge_of_a_shadow_on_a_sheet_are_no_part_of_the_digit(number: int) -> None:
    assert change_in_scene("a note on a table, a shadow across it", number) < 70


def change_in_scene(kind: str, number: int) -> float:
    """How far a digit that was found in a scene is apart from the same one alone."""
    file = io.BytesIO()
    scenes.scene(kind, DIGITS[number], number).save(file, "PNG")
    is_crossed = kind in scenes.CROSSED
    prepared = prepare(decode(file.getvalue(), kind), keeps_lines=not is_crossed)
    plain = prepare(255 * scenes.coverage(DIGITS[number], 200).astype(np.float32))
    assert prepared.problem == ""
    return apart(plain.image, prepared.image)


def test_a_5_whose_body_touches_the_edge_keeps_its_body() -> None:
    image = Image.new("L", (200, 200), 255)
    draw = ImageDraw.Draw(image)
    draw.line([(70, 20), (140, 20)], 0, 14)
    whole = image.copy()
    for drawn, end in ((image, 205), (whole, 195)):
        draw = ImageDraw.Draw(drawn)
        draw.line([(62, 40), (60, 100)], 0, 14)
        draw.arc([40, 90, 150, end], -110, 150, 0, 14)
    cut, plain = (prepare(np.asarray(drawn, np.float32)) for drawn in (image, whole))
    assert cut.problem == ""
    assert apart(plain.image, cut.image) < 110


def test_two_digits_are_not_one() -> None:
    image = np.zeros((60, 120), np.float32)
    image[10:38, 10:38], image[10:38, 70:98] = DIGITS[0], DIGITS[1]
    assert "more than one digit" in prepare(image).problem


@pytest.mark.parametrize(
    ("box", "problem"),
    [
        ((slice(0, 90), slice(20, 23)), "a line from edge to edge"),
        ((slice(88, 90), slice(0, 90)), "a line from edge to edge"),
        ((slice(40, 48), slice(30, 60)), "wider than any digit"),
        ((slice(85, 90), slice(60, 90)), "wider than any digit"),
        ((slice(10, 80), slice(40, 43)), ""),  # a thin one
        ((slice(0, 90), slice(20, 26)), ""),  # one that was cut off at both ends
    ],
)
def test_lines_and_dashes_are_no_digits(box: tuple[slice, slice], problem: str) -> None:
    picture = np.full((90, 90), 255, np.float32)
    picture[box] = 0
    assert problem in prepare(picture).problem
    assert bool(prepare(picture).problem) == bool(problem)


def test_specks_and_the_edge_of_the_paper_are_left_out() -> None:
    plain = canvas(DIGITS[3], (80, 80), (20, 25))
    dirty = plain.copy()
    dirty[70:72, 70:72] = 255
    dirty[:, :3] = 255
    np.testing.assert_allclose(
        prepare(dirty).image.astype(int), prepare(plain).image.astype(int), atol=3
    )


def written(width: int) -> Grey:
    image = Image.new("L", (240, 240), 255)
    draw = ImageDraw.Draw(image)
    draw.line([(70, 40), (170, 40), (100, 200)], fill=0, width=width, joint="curve")
    return np.asarray(image.filter(ImageFilter.GaussianBlur(1)), np.float32)


def test_strokes_are_brought_near_those_of_mnist() -> None:
    measured = []
    for width in (2, 10, 24, 90):
        prepared = prepare(written(width))
        assert prepared.problem == ""
        measured.append(float((prepared.image > 127).sum()))
    hair, usual, marker, brush = measured
    assert hair > 0.45 * usual
    assert brush < 2 * marker  # four times as wide
    assert hair < usual < marker


def test_stroke_width_of_a_bar_is_its_width() -> None:
    for width in (20, 40):
        bar = np.zeros((200, 200), np.float32)
        bar[:, 80 : 80 + width] = 1
        assert stroke_width(bar) == pytest.approx(width / 10, rel=0.12)


def test_printed_digits_are_found() -> None:
    for digit in range(10):
        image = Image.new("L", (90, 120), 230)
        font = ImageFont.load_default(80)
        ImageDraw.Draw(image).text((20, 10), str(digit), fill=30, font=font)
        assert prepare(np.asarray(image, np.float32)).problem == ""


def test_levels_that_hardly_differ_are_one_tone() -> None:
    paper = np.full((60, 60), 200, np.float32)
    paper[20:40, 20:40] = np.nextafter(np.float32(200), np.float32(201))
    for inked in (paper, 200 - paper):
        find_sheet(inked)
        _threshold(inked)
