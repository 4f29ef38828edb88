"""What a fit reports, in which order, and how an observer ends it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import IMAGES, STEPS, Listener, configure, in_thread

from digitlab.networks.table import build_network
from digitlab.training.fit import fit
from digitlab.training.observer import StopTraining, TrainingObserver


def test_an_observer_that_overrides_nothing_receives_everything() -> None:
    observer = TrainingObserver()
    observer.started({})
    observer.batch(0.5)
    observer.rung(0.5, 0.9)
    observer.snapshot(0, torch.nn.Identity())
    observer.epoch(1, {})
    observer.checkpoint(b"")


def test_start_blocks_rungs_and_epochs_are_reported_in_order(lab: Path) -> None:
    listener = Listener()
    fit(configure(), lab, listener, [0.5, 0.1])
    steps = 2 * STEPS
    fractions = [fraction for fraction, _ in listener.of("batch")]
    assert fractions == [step / steps for step in range(1, steps + 1)]
    names = [name for name, _, _ in listener.events]
    others = [
        (name, first, names[:place].count("batch"))
        for place, (name, first, _) in enumerate(listener.events)
        if name != "batch"
    ]
    assert others == [
        ("started", 0, 0),
        ("rung", 0.1, 3),
        ("rung", 0.5, STEPS),
        ("epoch", 1, STEPS),
        ("epoch", 2, steps),
    ]


def test_facts_at_the_start_are_size_and_work(lab: Path) -> None:
    listener = Listener()
    fit(configure("trainer.epochs=1"), lab, listener)
    [(_, facts)] = listener.of("started")
    network = build_network(configure().model)
    assert facts["model_parameters"] == sum(p.numel() for p in network.parameters())
    assert facts["training_flops"] > 3 * IMAGES * facts["model_parameters"]


def test_rung_where_an_epoch_ends_has_the_accuracy_of_that_epoch(lab: Path) -> None:
    listener = Listener()
    fit(configure("optim.ema=0.9"), lab, listener, [0.5])
    [(_, accuracy)] = listener.of("rung")
    epochs = [metrics["val_accuracy"] for _, metrics in listener.of("epoch")]
    assert accuracy == epochs[0] != epochs[1]


def test_every_rung_is_reported_however_close(lab: Path) -> None:
    listener = Listener()
    fit(configure("trainer.epochs=1"), lab, listener, [0.96, 0.97, 0.98])
    assert [rung for rung, _ in listener.of("rung")] == [0.96, 0.97, 0.98]


class Stopping(Listener):
    """Raises in one method, when its first argument is `where`."""

    def __init__(self, method: str, where: float, error: BaseException) -> None:
        super().__init__()
        self.where, self.error = where, error
        original = getattr(self, method)

        def stopping(first: Any, *rest: Any) -> None:
            original(first, *rest)
            if method == "started" or first == where:
                raise error

        setattr(self, method, stopping)


POINTS = [("started", 0), ("batch", 3 / 26), ("rung", 0.5), ("epoch", 1)]


@pytest.mark.parametrize("call", [lambda work: work(), in_thread], ids=["main", "thread"])
@pytest.mark.parametrize(("method", "where"), POINTS)
def test_stop_training_ends_the_fit_at_once(
    lab: Path, method: str, where: float, call: Callable[..., Any]
) -> None:
    stop = StopTraining("enough")
    observer = Stopping(method, where, stop)
    with pytest.raises(StopTraining) as raised:
        call(lambda: fit(configure(), lab, observer, [0.5]))
    assert raised.value is stop
    assert observer.events[-1][:2] == (method, where)


def test_ctrl_c_during_a_fit_stays_a_keyboard_interrupt(lab: Path) -> None:
    stop = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt) as raised:
        fit(configure(), lab, Stopping("batch", 3 / 26, stop))
    assert raised.value is stop
