"""What trains: the processor, or what torch finds beside it."""

from pathlib import Path

import pytest
import torch
from small import configure, digest

from digitlab.base.errors import UserError
from digitlab.config.types import Device
from digitlab.training import captured
from digitlab.training.blocks import BlockModule
from digitlab.training.device import find_device, numerics
from digitlab.training.fit import fit
from digitlab.training.observer import TrainingObserver

ALWAYS = "trainer.checkpoint_minutes=1e-9"  # at every block


class Keeper(TrainingObserver):
    """Keeps the first checkpoint."""

    first: bytes | None = None

    def checkpoint(self, content: bytes) -> None:
        self.first = self.first or content


FOUND = {
    Device.cpu: True,
    Device.cuda: torch.cuda.is_available(),
    Device.mps: torch.backends.mps.is_available(),
}


def test_auto_is_the_accelerator_that_torch_finds() -> None:
    accelerators = [device for device in (Device.cuda, Device.mps) if FOUND[device]]
    assert find_device(Device.auto).type == [*accelerators, Device.cpu][0]
    assert find_device(Device.cpu).type == "cpu"


def test_a_device_that_is_not_there_is_refused_naming_those_that_are(lab: Path) -> None:
    missing = next(device for device, is_there in FOUND.items() if not is_there)
    there = ", ".join(device for device, is_there in FOUND.items() if is_there)
    with pytest.raises(UserError) as raised:
        fit(configure(f"trainer.device={missing}"), lab, TrainingObserver())
    rule = f"it must be a device that torch finds on this machine: auto, {there}."
    assert str(raised.value) == f"trainer.device={missing} is invalid: {rule}"


def test_what_trained_is_recorded(lab: Path) -> None:
    result = fit(configure("trainer.device=auto"), lab, TrainingObserver())
    assert result.numerics == numerics(find_device(Device.auto))
    tensors = (result.logits, result.labels, result.images, *result.weights.values())
    assert {tensor.device.type for tensor in tensors} == {"cpu"}


@pytest.mark.skipif(not FOUND[Device.cuda], reason="torch finds no CUDA")
@pytest.mark.parametrize(
    "words",
    [[], ["optim=sgd", "optim.gradient_clip=1"], ["optim.ema=0.9"], ["model.dropout=0.3"]],
)
def test_captured_steps_give_the_bits_of_eager_and_of_resumed_ones(
    lab: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure("trainer.device=cuda", "trainer.epochs=2", *words)
    first = digest(fit(config, lab, TrainingObserver()).weights)
    assert digest(fit(config, lab, TrainingObserver()).weights) == first
    keeper = Keeper()
    often = configure("trainer.device=cuda", "trainer.epochs=2", ALWAYS, *words)
    fit(often, lab, keeper)
    resumed = fit(config, lab, TrainingObserver(), checkpoint=keeper.first)
    assert resumed.earlier.steps
    assert digest(resumed.weights) == first
    monkeypatch.setattr(captured.CapturedModule, "take_step", BlockModule.take_step)
    assert digest(fit(config, lab, TrainingObserver()).weights) == first
