"""A fit that was cut off goes on from its last checkpoint with the bits of an unbroken one."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from small import ALL, STEPS, Listener, configure, digest

from digitlab.base.usage import MACHINE_METRICS
from digitlab.config.compose import compose
from digitlab.config.types import Config
from digitlab.training.fit import FitResult, fit
from digitlab.training.module import Diverged
from digitlab.training.observer import StopTraining, TrainingObserver

ALWAYS = "trainer.checkpoint_minutes=1e-9"  # at every block
# Three epochs of twenty blocks, with the network, schedule, average and augmentation of a study.
WHOLE = ["experiments=default", "data=sample", "trainer.epochs=3"]
WHOLE += ["data.images=400", "data.batch_size=20", "data.validation_images=100"]
WHOLE += ["data.augment.shift=1", "data.augment.rotate=8", "data.augment.scale=0.1"]
WHOLE += ["model.dropout=0.1", ALWAYS]
RUNGS = (0.1, 0.5)


class Keeper(Listener):
    """Keeps the checkpoints, too, each with the number of events before it."""

    def __init__(self) -> None:
        super().__init__()
        self.checkpoints: list[tuple[int, bytes]] = []

    def checkpoint(self, content: bytes) -> None:
        self.checkpoints.append((len(self.events), content))

    def reported(self) -> list[tuple[Any, ...]]:
        """What does not depend on the machine, of epochs and rungs."""
        return [("epoch", epoch, _repeatable(metrics)) for epoch, metrics in self.of("epoch")] + [
            ("rung", *rung) for rung in self.of("rung")
        ]


def _repeatable(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name not in MACHINE_METRICS}


def assert_same(one: FitResult, other: FitResult) -> None:
    assert digest(one.weights) == digest(other.weights)
    assert torch.equal(one.logits, other.logits)
    assert _repeatable(one.metrics) == _repeatable(other.metrics)
    assert [frame.moment for frame in one.film] == [frame.moment for frame in other.film]
    for mine, theirs in zip(one.film, other.film, strict=True):
        assert torch.equal(mine.probabilities, theirs.probabilities)
        assert torch.equal(mine.filters, theirs.filters)


def go_on_everywhere(config: Config, lab: Path, places: slice = slice(None)) -> int:
    """Go on from the checkpoint after each block; return from how many."""
    unbroken = Keeper()
    whole = fit(config, lab, unbroken, RUNGS)
    checkpoints = unbroken.checkpoints[places]
    for number, content in checkpoints:
        resumed = Keeper()
        again = fit(config, lab, resumed, RUNGS, checkpoint=content)
        assert_same(again, whole)
        assert resumed.reported() == unbroken.reported()
        batches = [event for event in unbroken.events[number:] if event[0] == "batch"]
        assert [event for event in resumed.events if event[0] == "batch"] == batches
        steps = resumed.of("started")[0][1]["resumed_at_step"]
        assert again.earlier.steps == steps > 0
        assert again.earlier.seconds > 0 < again.earlier.cpu_seconds
    return len(checkpoints)


@pytest.mark.parametrize(
    "words",
    [
        ALL,
        pytest.param(
            ["optim=sgd", "optim.schedule=cosine", "optim.momentum=0.9"], marks=pytest.mark.slow
        ),
        pytest.param(
            ["optim.schedule=constant", "trainer.early_stopping=1", "trainer.epochs=3"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_fit_goes_on_with_equal_bits(lab: Path, words: list[str]) -> None:
    assert go_on_everywhere(configure(*words, ALWAYS), lab, slice(2, None, 9)) >= 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_fit_goes_on_with_equal_bits_after_every_block(lab: Path) -> None:
    # After an epoch's last block, the checkpoint of the block before is the last one.
    assert go_on_everywhere(compose("train", WHOLE)[0].config, lab) == 3 * 19


@pytest.mark.slow
def test_a_fit_that_goes_on_can_be_cut_off_again(lab: Path) -> None:
    config = configure(*ALL, ALWAYS)
    first = Keeper()
    whole = fit(config, lab, first)
    second = Keeper()
    fit(config, lab, second, checkpoint=first.checkpoints[3][1])
    again = fit(config, lab, TrainingObserver(), checkpoint=second.checkpoints[10][1])
    assert_same(again, whole)
    assert second.checkpoints[-1][1] != first.checkpoints[-1][1]  # of their seconds alone


class Stopper(Keeper):
    def batch(self, fraction: float) -> None:
        super().batch(fraction)
        if fraction > 0.3:
            raise StopTraining


def test_a_fit_that_is_stopped_leaves_a_checkpoint_of_its_last_step(lab: Path) -> None:
    config = configure(*ALL)  # whose interval it does not reach
    stopped = Stopper()
    with pytest.raises(StopTraining):
        fit(config, lab, stopped, [0.3])
    [(_, content)] = stopped.checkpoints
    resumed = Keeper()
    again = fit(config, lab, resumed, [0.3], checkpoint=content)
    unbroken = Keeper()
    assert_same(again, fit(config, lab, unbroken, [0.3]))
    assert resumed.reported() == unbroken.reported()
    assert again.earlier.steps == len(stopped.of("batch"))


@pytest.mark.slow
def test_a_checkpoint_of_another_training_is_left_aside(lab: Path) -> None:
    kept = Keeper()
    fit(configure(*ALL, ALWAYS), lab, kept)
    content = kept.checkpoints[5][1]
    other = configure(*ALL, "optim.learning_rate=0.004")
    assert_same(fit(other, lab, TrainingObserver(), checkpoint=content), fit(other, lab, Keeper()))
    assert fit(other, lab, TrainingObserver(), checkpoint=content).earlier.steps == 0
    # The interval changes no bit.
    assert fit(configure(*ALL), lab, Keeper(), checkpoint=content).earlier.steps == 6
    for foreign in (b"hello", safetensors.torch.save({"state": torch.zeros(1)})):
        assert fit(configure(*ALL), lab, Keeper(), checkpoint=foreign).earlier.steps == 0
    without = configure(*ALL, "trainer.checkpoint_minutes=0")
    assert fit(without, lab, Keeper(), checkpoint=content).earlier.steps == 0


def test_none_is_made_where_none_is_wanted_or_could_be_used(lab: Path) -> None:
    for words, snapshots in ((["trainer.checkpoint_minutes=0"], ()), ([ALWAYS], (STEPS,))):
        kept, stopped = Keeper(), Stopper()
        fit(configure(*words), lab, kept, snapshots=snapshots)
        with pytest.raises(StopTraining):
            fit(configure(*words), lab, stopped, snapshots=snapshots)
        assert kept.checkpoints == stopped.checkpoints == []


@pytest.mark.slow
def test_a_divergence_names_its_epoch_after_a_fit_went_on(lab: Path) -> None:
    words = ["optim=sgd", "optim.learning_rate=10", "optim.weight_decay=1", "optim.momentum=0"]
    wild = configure(*words, "model.batch_norm=false", "trainer.epochs=8", ALWAYS)
    kept = Keeper()
    with pytest.raises(Diverged) as unbroken:
        fit(wild, lab, kept)
    with pytest.raises(Diverged) as resumed:
        fit(wild, lab, TrainingObserver(), checkpoint=kept.checkpoints[-1][1])
    assert str(resumed.value) == str(unbroken.value)
