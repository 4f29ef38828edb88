"""What augmentation does is measured on pictures of coordinates, and compared with scipy's and
torchvision's own transformations."""

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import affine

from digitlab.config.types import AugmentConfig
from digitlab.data.augment import augment
from digitlab.data.datasets import TRAIN, load_digits
from digitlab.data.images import as_tensors

SIDE = 28
ALL = {"shift": 2.5, "rotate": 15.0, "scale": 0.15, "shear": 10.0, "erase": 5, "stroke": 0.5}


def amounts(**largest: float) -> AugmentConfig:
    """Largest amounts; what is not named is off."""
    return AugmentConfig(
        **({"shift": 0, "rotate": 0, "scale": 0, "shear": 0, "erase": 0, "stroke": 0} | largest)
    )  # type: ignore[arg-type]


def chance(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def noise(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, 1, SIDE, SIDE, generator=chance(seed))


@pytest.fixture
def digits(lab: Path) -> Tensor:
    """Some real digits of each class, float (40, 1, 28, 28)."""
    return as_tensors(load_digits(lab, "sample", TRAIN))[0][::50].float() / 255


def sources(config: AugmentConfig, n: int, seed: int) -> Tensor:
    """The affine maps that `augment` applied, as (n, 2, 3) from where a pixel is to where it came
    from, in pixels from the centre of the image, x before y.

    Interpolation between pixels keeps a linear ramp: an image whose values are its columns shows,
    after augmentation, which column each pixel came from.
    """
    line = torch.arange(SIDE, dtype=torch.float32) / (SIDE - 1)
    ramp = line.expand(SIDE, SIDE)
    ramps = [ramp, ramp.T, torch.ones(SIDE, SIDE)]
    x, y, inside = (
        augment(ramp.repeat(n, 1, 1, 1), config, chance(seed)).double().flatten(1).numpy()
        for ramp in ramps
    )
    centre = (SIDE - 1) / 2
    rows, columns = np.indices((SIDE, SIDE)).reshape(2, -1) - centre
    here = np.stack([columns, rows, np.ones(SIDE**2)], axis=1)  # (784, 3)
    there = np.stack([x, y], axis=2) * (SIDE - 1) - centre  # (n, 784, 2)
    whole = inside > 1 - 1e-6  # no black of the outside is mixed in
    assert whole.sum(1).min() > 20
    squares = np.einsum("np,pi,pj->nij", whole, here, here)
    maps = np.linalg.solve(squares, np.einsum("np,pi,npk->nik", whole, here, there))  # (n, 3, 2)
    assert np.abs((here @ maps - there)[whole]).max() < 1e-3  # they are affine
    return torch.from_numpy(maps).mT


@pytest.fixture
def largest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every random amount is the largest one."""
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.ones(*size))


# --- off, determinism, form ---


def test_amounts_of_zero_give_the_same_tensor_back_and_use_no_chance() -> None:
    images, generator = noise(3), chance()
    before = generator.get_state()
    assert augment(images, amounts(), generator) is images
    assert torch.equal(generator.get_state(), before)


CONFIGS = st.builds(
    AugmentConfig,
    shift=st.floats(0, 14),
    rotate=st.floats(0, 180),
    scale=st.floats(0, 0.99),
    shear=st.floats(0, 60),
    erase=st.integers(0, 28),
    stroke=st.floats(0, 1),
)


@settings(deadline=None, max_examples=50)
@given(CONFIGS, st.integers(0, 2**31), st.integers(1, 5))
@example(amounts(scale=0.99), 0, 5)
@example(amounts(**ALL), 0, 5)
def test_form_and_range_stay_and_the_generator_decides_all(
    config: AugmentConfig, seed: int, n: int
) -> None:
    images = noise(n)
    before, world = images.clone(), torch.get_rng_state()
    first, second = chance(seed), chance(seed)
    out = augment(images, config, first)
    assert out.shape == images.shape
    assert out.dtype == torch.float32
    assert out.min() >= 0
    assert out.max() <= 1 + 1e-6
    assert torch.equal(out, augment(images, config, second))
    assert torch.equal(first.get_state(), second.get_state())
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), world)


def test_a_white_image_never_gets_whiter_nor_a_black_one_whiter() -> None:
    config = amounts(**ALL)
    assert augment(torch.ones(64, 1, SIDE, SIDE), config, chance()).max() <= 1 + 1e-6
    assert augment(torch.zeros(64, 1, SIDE, SIDE), config, chance()).max() == 0


@pytest.mark.parametrize("change", ALL)
def test_other_states_of_the_generator_give_other_images(change: str) -> None:
    images, generator = noise(8), chance()
    config = amounts(**{change: ALL[change]})
    batches = [augment(images, config, generator) for _ in range(3)]
    assert not torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[1], batches[2])


@pytest.mark.parametrize("change", ALL)
def test_each_image_of_a_batch_gets_its_own_amounts(change: str) -> None:
    images = noise(1).expand(16, 1, SIDE, SIDE).contiguous()
    out = augment(images, amounts(**{change: ALL[change]}), chance())
    assert len(torch.unique(out, dim=0)) > 12


# --- against other implementations ---


@pytest.mark.parametrize("seed", range(3))
def test_digits_move_as_scipy_moves_them(digits: Tensor, seed: int) -> None:
    config = amounts(**(ALL | {"erase": 0, "stroke": 0}))
    out = augment(digits, config, chance(seed))
    centre = (SIDE - 1) / 2
    for image, moved, xy in zip(digits, out, sources(config, len(digits), seed), strict=True):
        matrix = xy[:, :2].numpy()[::-1, ::-1]  # scipy puts rows before columns
        offset = centre + xy[:, 2].numpy()[::-1] - matrix @ [centre, centre]
        expected = scipy.ndimage.affine_transform(
            image[0].double().numpy(), matrix, offset, order=1, mode="grid-constant", cval=0
        )
        np.testing.assert_allclose(moved[0].numpy(), expected, atol=2e-3)


@pytest.mark.parametrize("pixels", [1, 3, 14])
def test_a_shift_by_whole_pixels_is_a_roll_with_black_behind_it(largest: None, pixels: int) -> None:
    images = noise(2)
    out = augment(images, amounts(shift=pixels), chance())
    expected = torch.roll(images, (-pixels, -pixels), dims=(2, 3))
    expected[:, :, -pixels:, :] = 0
    expected[:, :, :, -pixels:] = 0
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("degrees", "quarters"), [(90, 1), (180, 2)])
def test_a_rotation_by_right_angles_is_exact(largest: None, degrees: int, quarters: int) -> None:
    images = noise(2)
    out = augment(images, amounts(rotate=degrees), chance())
    expected = torch.rot90(images, quarters, dims=(2, 3))
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)


def by_torchvision(images: Tensor, angle: float = 0, scale: float = 1, shear: float = 0) -> Tensor:
    """Turned clockwise by `angle`, enlarged, leant by `shear`; degrees."""
    return affine(
        images, angle, [0, 0], scale, [shear, 0], interpolation=InterpolationMode.BILINEAR
    )


@pytest.mark.parametrize("degrees", [5, 30, 45, 137])
def test_a_rotation_is_torchvision_s(largest: None, digits: Tensor, degrees: int) -> None:
    out = augment(digits, amounts(rotate=degrees), chance())
    expected = by_torchvision(digits, angle=-degrees)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("degrees", [5, 20, 45])
def test_a_shear_is_torchvision_s(largest: None, digits: Tensor, degrees: int) -> None:
    out = augment(digits, amounts(shear=degrees), chance())
    expected = by_torchvision(digits, shear=degrees)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)


# --- the largest amounts are respected, and nearly reached ---

N = 64


@settings(deadline=None, max_examples=15)
@given(st.floats(0.1, 14), st.integers(0, 2**31))
def test_a_shift_moves_both_ways_by_its_amount_at_most_and_changes_no_form(
    pixels: float, seed: int
) -> None:
    maps = sources(amounts(shift=pixels), N, seed)
    torch.testing.assert_close(
        maps[:, :, :2], torch.eye(2).double().expand(N, 2, 2), atol=1e-3, rtol=0
    )
    for axis in (0, 1):
        moved = maps[:, axis, 2]
        assert moved.abs().max() <= pixels + 1e-3
        assert moved.max() > 0.5 * pixels
        assert moved.min() < -0.5 * pixels


@settings(deadline=None, max_examples=15)
@given(st.floats(0.5, 180), st.integers(0, 2**31))
def test_a_rotation_turns_both_ways_by_its_amount_at_most_and_changes_no_size(
    degrees: float, seed: int
) -> None:
    maps = sources(amounts(rotate=degrees), N, seed)
    turns, centres = maps[:, :, :2], maps[:, :, 2]
    torch.testing.assert_close(
        turns @ turns.mT, torch.eye(2).double().expand(N, 2, 2), atol=1e-3, rtol=0
    )
    assert (torch.linalg.det(turns) > 0).all()  # no mirror images
    assert centres.abs().max() < 1e-2
    angles = torch.rad2deg(torch.atan2(turns[:, 1, 0], turns[:, 0, 0]))
    assert angles.abs().max() <= degrees + 0.05
    assert angles.max() > 0.5 * degrees
    assert angles.min() < -0.5 * degrees


@settings(deadline=None, max_examples=15)
@given(st.floats(0.5, 60), st.integers(0, 2**31))
def test_a_shear_leans_both_ways_by_its_amount_at_most_and_keeps_the_rows(
    degrees: float, seed: int
) -> None:
    maps = sources(amounts(shear=degrees), N, seed)
    lean = maps[:, 0, 1].clone()
    maps[:, 0, 1] = 0
    unchanged = torch.eye(2, 3).double().expand(N, 2, 3)
    torch.testing.assert_close(maps, unchanged, atol=2e-3, rtol=0)
    angles = torch.rad2deg(torch.atan(lean))
    assert angles.abs().max() <= degrees + 0.05
    assert angles.max() > 0.5 * degrees
    assert angles.min() < -0.5 * degrees


@settings(deadline=None, max_examples=15)
@given(st.floats(0.02, 0.6), st.integers(0, 2**31))
@example(0.1, 0)
@example(0.5, 0)
def test_a_scale_of_a_tenth_is_nine_tenths_to_eleven_tenths(scale: float, seed: int) -> None:
    maps = sources(amounts(scale=scale), N, seed)
    across = torch.stack([maps[:, 0, 1], maps[:, 1, 0], maps[:, 0, 2], maps[:, 1, 2]])
    assert across.abs().max() < 5e-3  # about the centre, along the axes
    width, height = 1 / maps[:, 0, 0], 1 / maps[:, 1, 1]  # of a digit, to what they were
    assert width.max() <= 1 + scale + 1e-3
    assert width.min() >= 1 - scale - 1e-3
    assert width.max() > 1 + 0.5 * scale
    assert width.min() < 1 - 0.5 * scale
    stretch = height / width
    assert stretch.max() <= 1 + scale / 2 + 2e-3
    assert stretch.min() >= 1 - scale / 2 - 2e-3


# --- erasing ---


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 28), st.integers(0, 2**31))
@example(1, 0)
@example(28, 0)
def test_erasing_paints_one_black_square_of_that_side_at_most(side: int, seed: int) -> None:
    images = noise(N) / 2 + 0.5
    out = augment(images, amounts(erase=side), chance(seed))
    black = out == 0
    rows, cols = black.any(3, keepdim=True), black.any(2, keepdim=True)
    assert torch.equal(black, rows & cols)  # a rectangle
    for line in (rows[:, 0, :, 0], cols[:, 0, 0, :]):
        edges = (line[:, 1:] != line[:, :-1]).sum(1) + line[:, 0] + line[:, -1]
        assert (edges == 2).all()  # without a gap
        lengths = line.sum(1)
        assert lengths.min() >= 1
        assert lengths.max() <= side
        if side < 20:  # most squares do not reach the edge
            assert (lengths == side).any()
    assert torch.equal(out[~black], images[~black])


def test_erased_squares_lie_all_over_the_image() -> None:
    out = augment(torch.ones(2000, 1, SIDE, SIDE), amounts(erase=4), chance())
    often = (out == 0).float().mean(0)[0]
    centre = often[4:-4, 4:-4]
    expected = 16 / SIDE**2
    assert centre.min() > expected / 2
    assert centre.max() < expected * 2
    assert often.min() > 0  # corners too


def test_erasing_comes_after_moving() -> None:
    out = augment(torch.ones(N, 1, SIDE, SIDE), amounts(rotate=45, erase=9), chance())
    black = (out == 0).flatten(1).sum(1)
    assert (black >= 25).all()  # a square cut off at a corner is 5 x 5, whatever the rotation


def test_mean_of_augmented_digits_stays_near_that_of_the_digits(digits: Tensor) -> None:
    out = augment(digits, amounts(shift=1.5, rotate=12, scale=0.12, shear=6), chance())
    assert math.isclose(out.mean().item(), digits.mean().item(), rel_tol=0.05)


def test_strokes_become_thicker_and_thinner_by_less_than_a_pixel(digits: Tensor) -> None:
    many = digits.repeat(20, 1, 1, 1)
    out = augment(many.clone(), amounts(stroke=1), chance())
    thick, thin = F.max_pool2d(many, 3, 1, 1), -F.max_pool2d(-many, 3, 1, 1)
    assert (out <= thick + 1e-6).all()
    assert (out >= thin - 1e-6).all()
    gain = out.mean((1, 2, 3)) / many.mean((1, 2, 3))
    assert (gain > 1.2).float().mean() > 0.25
    assert (gain < 0.8).float().mean() > 0.25
