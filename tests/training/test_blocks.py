"""Blocks of batches: the same weights as Lightning's own loop over single batches."""

from itertools import chain
from pathlib import Path

import pytest
import torch
from small import ALL, configure, digest, train, train_plainly

from digitlab.data.datamodule import DigitsData
from digitlab.data.images import Batches
from digitlab.training.blocks import Blocks

VARIANTS = {
    "network": [],
    "average": ["optim.ema=0.9"],
    "augmentation": ["data.augment.shift=2", "data.augment.rotate=9", "data.augment.erase=4"],
    "clip": ["optim.gradient_clip=0.5", "optim.weight_decay=0.1"],
    "bfloat16": ["trainer.precision=bfloat16"],
    "sgd-cosine": ["optim=sgd", "optim.schedule=cosine"],
    "all-in-blocks-of-eight": [*ALL, "data.batch_size=10", "trainer.epochs=1"],
    "test-set": [*ALL, "data.evaluate_on=test"],
}


@pytest.mark.slow
@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_a_plain_trainer_comes_to_the_same_weights(lab: Path, overrides: list[str]) -> None:
    fitted = train(lab, *overrides)
    module, trainer = train_plainly(lab, *overrides)
    assert digest(module.network.state_dict()) == digest(fitted.weights)
    plain = {name: float(value) for name, value in trainer.callback_metrics.items()}
    names = {name for name in fitted.metrics if name.startswith(("train_", "val_"))}
    assert plain.keys() == names
    assert plain == pytest.approx({name: fitted.metrics[name] for name in names}, rel=1e-5)


def batches(lab: Path, size: int) -> Batches:
    data = DigitsData(configure(f"data.batch_size={size}"), lab)
    data.setup("fit")
    return data.train_dataloader()


@pytest.mark.parametrize(("size", "most"), [(128, 1), (40, 2), (10, 8), (2, 16)])
def test_a_block_is_at_most_a_twentieth_of_a_pass_or_one_batch(
    lab: Path, size: int, most: int
) -> None:
    blocks = Blocks(batches(lab, size))
    lengths = [len(block) for block in blocks]
    assert max(lengths) == most
    assert len(lengths) == len(blocks)


def test_blocks_hold_the_batches_in_their_order(lab: Path) -> None:
    single = list(batches(lab, 30))
    together = list(chain.from_iterable(Blocks(batches(lab, 30))))
    assert len(single) == len(together)
    for (images, labels), (others, answers) in zip(single, together, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, answers)
