"""What a drawing is like, and how little would change its answer."""

from pathlib import Path

import numpy as np
import pytest
import torch
from samples import configure, readers

from digitlab.data.datasets import TRAIN, load_digits
from digitlab.digits.likeness import fool, nearest
from digitlab.digits.predict import DigitReader
from digitlab.records.mlflow import MlflowTracker
from digitlab.training.evaluate import evaluate


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return readers(tmp_path_factory)


@pytest.fixture(scope="module")
def reader(lab: Path) -> DigitReader:
    return DigitReader(MlflowTracker(None, "digitlab", lab), "read-seed-0", lab)


def test_a_training_image_is_nearest_to_itself_though_it_is_shifted(lab: Path) -> None:
    data = configure().data
    digits = load_digits(lab, "sample", TRAIN)
    for place in (0, 7, 400):
        image = digits.images[place]
        found = nearest(image, lab, data)
        assert found[0].image == image.tolist()
        assert found[0].label == str(digits.labels[place])
        assert len({str(one.image) for one in found}) == len(found) == 5
        shifted = nearest(np.roll(image, 1, axis=1), lab, data)
        assert [one.image for one in shifted].index(image.tolist()) < 5


def test_a_small_change_fools_the_network_and_is_no_larger_than_said(reader: DigitReader) -> None:
    digits = load_digits(reader.lab, "sample", TRAIN)
    generator_state = torch.random.get_rng_state()
    fooled = 0
    for image in digits.images[:20]:
        read = int(evaluate(reader.network, torch.from_numpy(image)[None, None],
                            reader.config.data).argmax())  # fmt: skip
        found = fool(reader.network, image, reader.lab, reader.config.data)
        if found is None:
            continue
        fooled += 1
        changed = np.array(found.image, int)
        picture = torch.tensor(found.image, dtype=torch.uint8)[None, None]
        answer = int(evaluate(reader.network, picture, reader.config.data).argmax())
        assert answer == int(found.label)
        assert int(found.label) != read
        assert np.abs(changed - image).max() <= round(255 * found.largest_change)
        assert fool(reader.network, image, reader.lab, reader.config.data) == found
    assert fooled >= 18
    assert torch.equal(torch.random.get_rng_state(), generator_state)


def test_what_needs_too_much_is_not_fooled(reader: DigitReader) -> None:
    class Same(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.eye(10)[:1].expand(len(images), 10) + 0 * images.sum((1, 2, 3))[:, None]

    assert fool(Same(), np.zeros((28, 28), np.uint8), reader.lab, reader.config.data) is None


def test_without_training_images_nothing_is_fetched(reader: DigitReader, tmp_path: Path) -> None:
    assert nearest(np.zeros((28, 28), np.uint8), tmp_path, reader.config.data) == []
    assert list(tmp_path.iterdir()) == []
