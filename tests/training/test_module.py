"""The module in somebody's own Trainer; what the settings of optimizer and schedule mean."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from small import ONE_STEP, configure, digest, train, train_plainly
from torch import nn

from digitlab.config.types import OptimConfig, Schedule
from digitlab.data.datamodule import DigitsData
from digitlab.networks.table import build_network
from digitlab.training.module import DigitModule, Diverged, build_optimizer, build_schedule

# ---- any Trainer ---------------------------------------------------------------------------------


def test_a_trainer_validates_and_tests_what_was_learned(lab: Path) -> None:
    module, trainer = train_plainly(lab, "optim.ema=0.9", "data.evaluate_on=test")
    [tested] = trainer.test(module, datamodule=DigitsData(module.config, lab), verbose=False)
    fitted = train(lab, "optim.ema=0.9", "data.evaluate_on=test")
    expected = {name: fitted.metrics[name] for name in ("test_loss", "test_accuracy")}
    assert tested == pytest.approx(expected, rel=1e-5)


def test_a_checkpoint_holds_the_network_and_its_average(lab: Path, tmp_path: Path) -> None:
    module, trainer = train_plainly(lab, "optim.ema=0.9")
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    other = DigitModule(module.config)
    loaded = torch.load(tmp_path / "last.ckpt", weights_only=True)
    other.load_state_dict(loaded["state_dict"])
    assert digest(other.learned.state_dict()) == digest(module.learned.state_dict())


def test_a_trainer_s_own_clipping_comes_before_the_configuration_s(lab: Path) -> None:
    plain = ["optim=sgd", "optim.momentum=0", "optim.weight_decay=0", "optim.learning_rate=1"]
    config = configure(*ONE_STEP, *plain, "optim.gradient_clip=1")
    torch.manual_seed(0)
    module = DigitModule(config)
    start = {name: value.clone() for name, value in module.network.state_dict().items()}
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=1, gradient_clip_val=0.01, log_every_n_steps=1, **quiet)
    trainer.fit(module, datamodule=DigitsData(config, lab))
    end = dict(module.network.named_parameters())
    steps = [(value.detach() - start[name]).norm() for name, value in end.items()]
    assert float(torch.stack(steps).norm()) == pytest.approx(0.01, rel=1e-3)


def test_a_plain_trainer_ends_when_the_loss_is_not_finite(lab: Path) -> None:
    wild = ["optim=sgd", "optim.schedule=constant", "optim.learning_rate=10"]
    wild += ["optim.weight_decay=1", "model.batch_norm=false", "optim.momentum=0"]
    with pytest.raises(Diverged, match=r"loss is (nan|inf) in epoch \d at learning rate 10$"):
        train_plainly(lab, *wild, "trainer.epochs=4")


# ---- schedule and optimizer ----------------------------------------------------------------------


def rates(steps: int, **values: Any) -> list[float]:
    config = replace(configure().optim, **({"learning_rate": 0.5} | values))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], config.learning_rate)
    schedule = build_schedule(config, optimizer, steps)
    used = []
    for _ in range(steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(used) < steps:
            schedule.step()
    return used


def test_onecycle_rises_and_falls_by_half_cosines() -> None:
    steps, warmup = 40, 0.3
    top = warmup * steps - 1  # the step of the peak
    low = 0.5 / 25 / 1e4
    expected = [
        0.5 / 25 + (0.5 - 0.5 / 25) * (1 - math.cos(math.pi * step / top)) / 2
        if step <= top
        else low + (0.5 - low) * (1 + math.cos(math.pi * (step - top) / (steps - 1 - top))) / 2
        for step in range(steps)
    ]
    used = rates(steps, schedule=Schedule.onecycle, warmup=warmup)
    assert used == pytest.approx(expected, rel=1e-12)
    assert max(used) == used[11] == pytest.approx(0.5)


@pytest.mark.parametrize("steps", range(1, 9))
def test_onecycle_has_a_rate_for_any_number_of_steps(steps: int) -> None:
    used = rates(steps, schedule=Schedule.onecycle, warmup=0.25)
    assert all(0 < rate <= 0.5 for rate in used)


def test_cosine_falls_by_half_a_cosine() -> None:
    expected = [0.25 * (1 + math.cos(math.pi * step / 40)) for step in range(40)]
    assert rates(40, schedule=Schedule.cosine) == pytest.approx(expected, rel=1e-9)


def test_constant_stays() -> None:
    assert rates(40, schedule=Schedule.constant) == [0.5] * 40


def sgd(config: OptimConfig, value: float, gradients: list[float], decay: float) -> float:
    """Nesterov's momentum as Sutskever et al. 2013 have it in torch's form."""
    velocity = 0.0
    for given in gradients:
        gradient = given + decay * value
        velocity = config.momentum * velocity + gradient
        value -= config.learning_rate * (gradient + config.momentum * velocity)
    return value


def adam(config: OptimConfig, value: float, gradients: list[float], decay: float) -> float:
    """Kingma & Ba 2015; adamw decays apart from the gradient, Loshchilov & Hutter 2019."""
    first = second = 0.0
    apart = config.name == "adamw"
    for step, given in enumerate(gradients, start=1):
        gradient = given + (0 if apart else decay * value)
        value -= config.learning_rate * decay * value if apart else 0
        first = config.momentum * first + (1 - config.momentum) * gradient
        second = config.beta2 * second + (1 - config.beta2) * gradient**2
        mean = first / (1 - config.momentum**step)
        size = math.sqrt(second / (1 - config.beta2**step))
        value -= config.learning_rate * mean / (size + 1e-8)
    return value


@pytest.mark.parametrize(("name", "reference"), [("sgd", sgd), ("adam", adam), ("adamw", adam)])
def test_optimizer_follows_its_formula_and_decays_no_bias(
    name: str, reference: Callable[[OptimConfig, float, list[float], float], float]
) -> None:
    config = configure(f"optim={name}", "optim.weight_decay=0.2", "optim.learning_rate=0.05").optim
    layer = nn.Linear(1, 1, dtype=torch.float64)
    start = [float(parameter.detach()) for parameter in (layer.weight, layer.bias)]
    optimizer = build_optimizer(config, layer)
    gradients = [0.3, -0.7, 0.2, 0.05]
    for gradient in gradients:
        for parameter in layer.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
    weight, bias = (float(parameter.detach()) for parameter in (layer.weight, layer.bias))
    assert weight == pytest.approx(reference(config, start[0], gradients, 0.2), rel=1e-9)
    assert bias == pytest.approx(reference(config, start[1], gradients, 0.0), rel=1e-9)


def test_label_smoothing_shares_a_part_of_the_target_among_all_digits(lab: Path) -> None:
    config = configure(*ONE_STEP, "optim.label_smoothing=0.2", "model.batch_norm=false")
    torch.manual_seed(config.trainer.seed)
    network = build_network(config.model)
    data = DigitsData(config, lab)
    data.setup("fit")
    assert data.training is not None
    images, labels = data.training
    inputs = (images.double() / 255 - config.data.mean) / config.data.std
    logs = network.double()(inputs).log_softmax(1).detach()
    right = logs.gather(1, labels[:, None]).mean()
    expected = float(-(0.8 * right + 0.2 * logs.mean()))
    fitted = train(lab, *ONE_STEP, "optim.label_smoothing=0.2", "model.batch_norm=false")
    assert fitted.metrics["train_loss"] == pytest.approx(expected, rel=1e-6)


def initial(*overrides: str) -> dict[str, nn.Parameter]:
    config = configure(*overrides)
    torch.manual_seed(config.trainer.seed)
    return dict(build_network(config.model).named_parameters())


def test_clipping_bounds_the_length_of_a_step(lab: Path) -> None:
    plain = ["optim=sgd", "optim.momentum=0", "optim.weight_decay=0", "optim.learning_rate=1"]

    def length(clip: float) -> float:
        weights = train(lab, *ONE_STEP, *plain, f"optim.gradient_clip={clip}").weights
        steps = [weights[name] - value.detach() for name, value in initial(*ONE_STEP).items()]
        return math.sqrt(sum(float(step.double().square().sum()) for step in steps))

    free = length(0)
    assert free > 0.1
    assert length(0.05) == pytest.approx(0.05, rel=1e-3)
    assert length(100) == free


@pytest.mark.parametrize("steps", [1, 3])
def test_average_of_less_than_four_steps_has_learned(lab: Path, steps: int) -> None:
    overrides = [*ONE_STEP, f"trainer.epochs={steps}", "optim.ema=0.9"]
    weights = train(lab, *overrides).weights
    start = initial(*overrides)
    assert [name for name, value in start.items() if torch.equal(weights[name], value)] == []
