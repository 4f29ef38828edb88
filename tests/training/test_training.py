"""Training: the same bits each time, and the bits that an independent loop comes to."""

import copy
import hashlib
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode

from digitlab.base.errors import UserError
from digitlab.config.compose import compose
from digitlab.config.recorded import config_from_plain, config_to_plain
from digitlab.config.types import Config, OptimConfig, Schedule
from digitlab.data import datamodule
from digitlab.data.augment import augment
from digitlab.data.datamodule import DigitsData, random_stream
from digitlab.data.datasets import stratified_split
from digitlab.networks.table import build_network
from digitlab.records.mlflow import RunRecord, Tracking
from digitlab.records.record import Identity
from digitlab.study.run import perform
from digitlab.training.fit import Fit, Watch, fit
from digitlab.training.module import DigitModule, Diverged, build_optimizer, build_schedule

DATA = Path(__file__).parents[1] / "support" / "digits"
LEARNED = 1600  # images of the sample without the holdout's 400
SMALL = ["experiments=smoke", "data=sample", "model.widths=[4,8]", "model.hidden=16"]
SMALL += ["trainer.epochs=2", "trainer.seed=7", "data.batch_size=128"]
STEPS = 13  # of an epoch: 1,600 images in batches of 128
# Everything that takes part in a fit: dropout, augmentation, the average, clipping.
ALL = ["model.dropout=0.2", "data.augment.shift=2", "data.augment.erase=4", "optim.ema=0.9"]
ALL += ["optim.gradient_clip=1", "optim.label_smoothing=0.1"]
ONE_STEP = ["trainer.epochs=1", "data.batch_size=1600", "optim.schedule=constant"]


@cache
def configure(*overrides: str) -> Config:
    return compose("train", [*SMALL, *overrides])[0].config


def train(lab: Path, *overrides: str, rungs: list[float] | None = None) -> Fit:
    return fit(configure(*overrides), lab, Watch(), rungs)


def digest(weights: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(safetensors.torch.save(dict(weights))).hexdigest()


class Listener(Watch):
    """Keeps all that a run tells: (what, where, the rest)."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any, Any]] = []

    def begin(self, facts: Mapping[str, float]) -> None:
        self.told.append(("begin", 0, dict(facts)))

    def batch(self, done: float) -> None:
        self.told.append(("batch", done, None))

    def rung(self, rung: float, accuracy: float) -> None:
        self.told.append(("rung", rung, accuracy))

    def epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self.told.append(("epoch", epoch, dict(metrics)))


# ---- the same bits, and the files that a run opens -----------------------------------------------

_ELSEWHERE = """
import hashlib, json, sys
from pathlib import Path
import safetensors.torch
from digitlab.config.compose import compose
from digitlab.training.fit import Watch, fit

events = []
def note(event, arguments):
    if event == "open" and "ubyte" in str(arguments[0]):
        events.append(Path(str(arguments[0])).name)
sys.addaudithook(note)
class Steps(Watch):
    def batch(self, done):
        events.append(done)

for fold in ("validation", "test"):
    events.clear()
    config = compose("train", [*sys.argv[2:], f"data.evaluate_on={fold}"])[0].config
    fitted = fit(config, Path(sys.argv[1]), Steps())
    digest = hashlib.sha256(safetensors.torch.save(fitted.weights)).hexdigest()
    print(json.dumps({"digest": digest, "events": events}))
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Of a fit in another process, by fold: its digest, the files it opened and its steps."""
    lab = tmp_path_factory.mktemp("lab")
    shutil.copytree(DATA, lab / "data" / "sample")
    command = [sys.executable, "-c", _ELSEWHERE, str(lab), *SMALL, *ALL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return dict(zip(("validation", "test"), map(json.loads, done.stdout.splitlines()), strict=True))


def test_same_configuration_gives_the_same_bits(
    lab: Path, elsewhere: dict[str, dict[str, Any]]
) -> None:
    first = train(lab, *ALL)
    torch.randn(1000)  # chance that others have used up
    np.random.random(10)
    second = train(lab, *ALL)
    assert digest(first.weights) == digest(second.weights)
    assert torch.equal(first.logits, second.logits)
    timeless = [
        {k: v for k, v in fitted.metrics.items() if k != "images_per_second"}
        for fitted in (first, second)
    ]
    assert timeless[0] == timeless[1]
    assert elsewhere["validation"]["digest"] == digest(first.weights)


def test_rungs_do_not_change_the_weights(lab: Path) -> None:
    measured = train(lab, *ALL, rungs=[0.2, 0.5, 0.7])
    assert digest(measured.weights) == digest(train(lab, *ALL).weights)


def test_another_seed_gives_other_weights_on_the_same_split(lab: Path) -> None:
    one, other = (train(lab, f"trainer.seed={seed}", "trainer.epochs=1") for seed in (1, 2))
    assert digest(one.weights) != digest(other.weights)
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.labels, other.labels)


def test_holdout_run_opens_no_test_file(elsewhere: dict[str, dict[str, Any]]) -> None:
    events = elsewhere["validation"]["events"]
    assert [event for event in events if str(event).startswith("t10k")] == []
    assert [event for event in events if str(event).startswith("train-images")] != []
    assert 1.0 in events


def test_test_files_are_opened_once_after_the_last_step(
    elsewhere: dict[str, dict[str, Any]],
) -> None:
    events = elsewhere["test"]["events"]
    after = events[events.index(1.0) + 1 :]
    assert sorted(after) == ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
    assert [event for event in events if str(event).startswith("t10k")] == after


# ---- an independent loop -------------------------------------------------------------------------


def bare_fit(config: Config, lab: Path) -> dict[str, Tensor]:
    """The weights after a plain loop: no Lightning, no loaders, no averaged model."""
    torch.manual_seed(config.trainer.seed)
    network = build_network(config.model)
    images, labels = (
        torch.from_numpy(np.fromfile(lab / "data" / "sample" / name, np.uint8)[header:])
        for name, header in (("train-images-idx3-ubyte", 16), ("train-labels-idx1-ubyte", 8))
    )
    learn, _ = stratified_split(labels, config.data.validation_images, config.data.split_seed)
    images, labels = images.view(2000, 1, 28, 28)[learn], labels[learn].long()
    order, chance = (random_stream(config.trainer.seed, stream) for stream in (0, 1))
    optim, size = config.optim, config.data.batch_size
    steps = config.trainer.epochs * -(-LEARNED // size)
    optimizer = bare_optimizer(optim, network)
    schedule = {
        "onecycle": lambda: lr_scheduler.OneCycleLR(
            optimizer, optim.learning_rate, steps, pct_start=optim.warmup, cycle_momentum=False
        ),
        "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, steps),
        "constant": lambda: lr_scheduler.ConstantLR(optimizer, 1.0),
    }[optim.schedule]()
    average, step = copy.deepcopy(network.state_dict()), 0
    for _ in range(config.trainer.epochs):
        shuffled = torch.randperm(LEARNED, generator=order)
        for begin in range(0, LEARNED, size):
            batch = shuffled[begin : begin + size]
            inputs = augment(images[batch].float() / 255, config.data.augment, chance)
            logits = network((inputs - config.data.mean) / config.data.std)
            loss = F.cross_entropy(logits, labels[batch], label_smoothing=optim.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            if optim.gradient_clip:
                nn.utils.clip_grad_norm_(network.parameters(), optim.gradient_clip)
            optimizer.step()
            schedule.step()
            step += 1
            if step % 4 == 0:  # the average takes every fourth step, the first of them as it is
                weight = 1 - optim.ema**4 if step > 4 else 1.0
                for name, value in network.state_dict().items():
                    if value.is_floating_point():
                        average[name].lerp_(value, weight)
    return average if optim.ema else network.state_dict()


def bare_optimizer(optim: OptimConfig, network: nn.Module) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in network.parameters() if p.ndim > 1]},
        {"params": [p for p in network.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    rate, decay = optim.learning_rate, optim.weight_decay
    if optim.name == "sgd":
        return torch.optim.SGD(
            groups, rate, optim.momentum, weight_decay=decay, nesterov=True, fused=True
        )
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optim.name]
    return kind(groups, rate, (optim.momentum, optim.beta2), weight_decay=decay, fused=True)


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim.weight_decay=0.3"],
        ["optim=sgd", "optim.schedule=cosine", "optim.gradient_clip=0.5"],
        ["experiments=seed", "data.batch_size=128", "optim.weight_decay=0.01"],
        ALL,
    ],
    ids=["adamw-onecycle", "sgd-cosine-clipped", "seed-adam-constant", "all"],
)
def test_bare_loop_comes_to_the_same_weights(lab: Path, overrides: list[str]) -> None:
    if "experiments=seed" in overrides:
        config = compose("train", ["data=sample", "trainer.epochs=1", *overrides])[0].config
    else:
        config = configure(*overrides)
    fitted, bare = fit(config, lab, Watch()).weights, bare_fit(config, lab)
    assert fitted.keys() == bare.keys()
    unequal = [
        name
        for name, value in bare.items()
        if value.is_floating_point() and not torch.equal(fitted[name], value)
    ]
    assert unequal == []


# ---- what the settings mean ----------------------------------------------------------------------


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
    begun = [float(parameter.detach()) for parameter in (layer.weight, layer.bias)]
    optimizer = build_optimizer(config, layer)
    gradients = [0.3, -0.7, 0.2, 0.05]
    for gradient in gradients:
        for parameter in layer.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
    weight, bias = (float(parameter.detach()) for parameter in (layer.weight, layer.bias))
    assert weight == pytest.approx(reference(config, begun[0], gradients, 0.2), rel=1e-9)
    assert bias == pytest.approx(reference(config, begun[1], gradients, 0.0), rel=1e-9)


def test_label_smoothing_shares_a_part_of_the_target_among_all_digits(lab: Path) -> None:
    config = configure(*ONE_STEP, "optim.label_smoothing=0.2", "model.batch_norm=false")
    torch.manual_seed(config.trainer.seed)
    network = build_network(config.model)
    images, labels = DigitsData(config, lab).learned
    inputs = (images.double() / 255 - config.data.mean) / config.data.std
    logs = network.double()(inputs).log_softmax(1).detach()
    right = logs.gather(1, labels[:, None]).mean()
    expected = float(-(0.8 * right + 0.2 * logs.mean()))
    assert fit(config, lab, Watch()).metrics["train_loss"] == pytest.approx(expected, rel=1e-6)


def test_clipping_bounds_the_length_of_a_step(lab: Path) -> None:
    plain = ["optim=sgd", "optim.momentum=0", "optim.weight_decay=0", "optim.learning_rate=1"]

    def length(clip: float) -> float:
        config = configure(*ONE_STEP, *plain, f"optim.gradient_clip={clip}")
        torch.manual_seed(config.trainer.seed)
        begun = dict(build_network(config.model).named_parameters())
        ended = fit(config, lab, Watch()).weights
        steps = [
            (ended[name] - value.detach()).double().square().sum() for name, value in begun.items()
        ]
        return math.sqrt(float(sum(steps)))

    free = length(0)
    assert free > 0.1
    assert length(0.05) == pytest.approx(0.05, rel=1e-3)
    assert length(100) == free


@pytest.mark.parametrize("steps", [1, 3])
def test_average_of_less_than_four_steps_has_learned(lab: Path, steps: int) -> None:
    config = configure(*ONE_STEP, f"trainer.epochs={steps}", "optim.ema=0.9")
    torch.manual_seed(config.trainer.seed)
    begun = dict(build_network(config.model).named_parameters())
    ended = fit(config, lab, Watch()).weights
    assert [name for name, value in begun.items() if torch.equal(ended[name], value)] == []


# ---- data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 128, 400, 1599, 1600, 5000])
def test_pass_is_as_many_steps_as_batches_and_gives_each_image_once(lab: Path, size: int) -> None:
    data = DigitsData(configure(f"data.batch_size={size}"), lab)
    loader = data.train_dataloader()
    blocks = list(loader)
    assert len(blocks) == len(loader)
    batches = list(chain.from_iterable(blocks))
    assert len(batches) == loader.steps == LEARNED // size + (LEARNED % size > 1)
    assert [len(labels) for _, labels in batches[:-1]] == [size] * (len(batches) - 1)
    seen = torch.cat([images for images, _ in batches]).double().sum((1, 2, 3)).sort().values
    images = (data.learned[0].double() / 255 - 0.1307) / 0.3081
    sums = images.sum((1, 2, 3)).sort().values
    if size == 1599:  # the image that would be a batch of its own is left out: batch norm needs two
        assert len(seen) == 1599
        return
    assert torch.allclose(seen, sums, atol=1e-3)


def test_each_pass_has_its_own_order(lab: Path) -> None:
    loader = DigitsData(configure(), lab).train_dataloader()
    first, second = (
        torch.cat([labels for _, labels in chain.from_iterable(loader)]) for _ in range(2)
    )
    assert not torch.equal(first, second)
    assert torch.equal(first.bincount(), second.bincount())


def test_blocks_are_at_most_a_twentieth_of_a_pass_or_one_batch(lab: Path) -> None:
    for size, most in ((128, 1), (40, 2), (10, 8), (2, 16)):
        loader = DigitsData(configure(f"data.batch_size={size}"), lab).train_dataloader()
        assert max(map(len, loader)) == most


def test_images_are_prepared_by_whole_batches(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def counted(images: Tensor, *rest: Any) -> Tensor:
        sizes.append(len(images))
        return augment(images, *rest)

    monkeypatch.setattr(datamodule, "augment", counted)
    train(lab)
    assert sizes == ([128] * 12 + [64]) * 2


def test_split_is_of_the_training_images_alone(lab: Path) -> None:
    holdout = DigitsData(configure(), lab)
    final = DigitsData(configure("data.evaluate_on=test"), lab)
    assert [len(part) for part in (*holdout.learned, *holdout.validation)] == [1600, 1600, 400, 400]
    assert len(final.learned[0]) == 2000
    images = torch.cat([holdout.learned[0], holdout.validation[0]]).flatten(1)
    both = sorted(hash(image.numpy().tobytes()) for image in images)
    assert both == sorted(hash(i.numpy().tobytes()) for i in final.learned[0].flatten(1))


# ---- what a run tells, and gives back ------------------------------------------------------------


def test_run_tells_of_its_beginning_steps_rungs_and_epochs_in_order(lab: Path) -> None:
    listener = Listener()
    fit(configure(), lab, listener, [0.5, 0.1])
    steps = 2 * STEPS
    assert [done for what, done, _ in listener.told if what == "batch"] == [
        step / steps for step in range(1, steps + 1)
    ]
    after = [len([x for x in listener.told[:i] if x[0] == "batch"]) for i in range(31)]
    others = [
        (what, where, after[i])
        for i, (what, where, _) in enumerate(listener.told)
        if what != "batch"
    ]
    assert others == [
        ("begin", 0, 0),
        ("rung", 0.1, 3),
        ("rung", 0.5, STEPS),
        ("epoch", 1, STEPS),
        ("epoch", 2, steps),
    ]
    begun = listener.told[0][2]
    network = build_network(configure().model)
    assert begun["model_parameters"] == sum(p.numel() for p in network.parameters())
    assert begun["training_flops"] > 3 * 2 * LEARNED * begun["model_parameters"]


def test_rung_in_the_middle_is_the_accuracy_of_the_epoch_that_ends_there(lab: Path) -> None:
    listener = Listener()
    fit(configure("optim.ema=0.9"), lab, listener, [0.5])
    [rung] = [accuracy for what, _, accuracy in listener.told if what == "rung"]
    epochs = [metrics for what, _, metrics in listener.told if what == "epoch"]
    assert rung == epochs[0]["val_accuracy"] != epochs[1]["val_accuracy"]


def test_every_rung_is_told_of_however_close(lab: Path) -> None:
    listener = Listener()
    fit(configure("trainer.epochs=1"), lab, listener, [0.96, 0.97, 0.98])
    assert [where for what, where, _ in listener.told if what == "rung"] == [0.96, 0.97, 0.98]


def test_measures_are_those_of_the_weights_that_are_given_back(lab: Path) -> None:
    config = configure("optim.ema=0.9")
    fitted = fit(config, lab, Watch())
    network = build_network(config.model).eval()
    network.load_state_dict(fitted.weights)
    with torch.no_grad():
        logits = network((fitted.images.float() / 255 - config.data.mean) / config.data.std)
    assert torch.allclose(fitted.logits, logits, atol=1e-5)
    metrics = fitted.metrics
    assert metrics.keys() == {
        *("train_loss", "train_accuracy", "val_loss", "val_accuracy", "images_per_second")
    }
    right = int((logits.argmax(1) == fitted.labels).sum())
    assert metrics["val_accuracy"] == right / 400
    assert metrics["val_accuracy"] > 0.5
    assert metrics["val_loss"] == pytest.approx(float(F.cross_entropy(logits, fitted.labels)), 1e-5)
    assert sorted(fitted.data_sha256) == ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"]
    assert fitted.data_sha256 == {
        name: hashlib.sha256((DATA / name).read_bytes()).hexdigest() for name in fitted.data_sha256
    }


def test_final_fit_is_measured_on_the_test_images_alone(lab: Path) -> None:
    listener = Listener()
    fitted = fit(configure("data.evaluate_on=test", "trainer.epochs=1"), lab, listener)
    labels = np.fromfile(DATA / "t10k-labels-idx1-ubyte", np.uint8)[8:]
    assert fitted.labels.tolist() == labels.tolist()
    right = int((fitted.logits.argmax(1).numpy() == labels).sum())
    assert fitted.metrics["test_accuracy"] == right / 500
    assert [name for name in fitted.metrics if name.startswith("val_")] == []
    [epoch] = [metrics for what, _, metrics in listener.told if what == "epoch"]
    assert [name for name in epoch if name.startswith(("val_", "test_"))] == []
    assert len(fitted.data_sha256) == 4


# ---- ends before the end -------------------------------------------------------------------------

# Every step makes the weights nine times as long: learning rate times decay is 10, where 1 is zero.
WILD = ["optim=sgd", "optim.schedule=constant", "optim.learning_rate=10", "optim.weight_decay=1"]
WILD += ["model.batch_norm=false", "optim.momentum=0"]


def test_loss_that_is_not_finite_ends_the_run_naming_epoch_and_rate(lab: Path) -> None:
    with pytest.raises(Diverged, match=r"loss is (nan|inf) in epoch 1 at learning rate 10$"):
        train(lab, *WILD)


def test_divergence_names_the_epoch_and_the_rate_of_its_moment(lab: Path) -> None:
    listener = Listener()
    slow = ["optim.schedule=onecycle", "optim.warmup=0.9", "trainer.epochs=8"]
    with pytest.raises(Diverged) as told:
        fit(configure(*WILD, *slow), lab, listener)
    steps = sum(what == "batch" for what, _, _ in listener.told)
    course = rates(8 * STEPS, schedule=Schedule.onecycle, warmup=0.9, learning_rate=10)
    epoch, rate = steps // STEPS + 1, course[steps]
    assert f"in epoch {epoch} at learning rate {rate:.3g}" in str(told.value)
    assert epoch > 1


def test_run_that_diverges_at_its_last_step_is_no_finished_run(lab: Path) -> None:
    wild = [*WILD, "data.batch_size=1600"]
    listener = Listener()
    with pytest.raises(Diverged):
        fit(configure(*wild, "trainer.epochs=30"), lab, listener)
    steps = sum(what == "batch" for what, _, _ in listener.told)
    with pytest.raises(Diverged):
        train(lab, *wild, f"trainer.epochs={steps}")


class Stop(Exception):
    """What a watch raises."""


@pytest.mark.parametrize("stop", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("what", "where"), [("begin", 0), ("batch", 3 / 26), ("rung", 0.5), ("epoch", 1)]
)
def test_watch_that_raises_ends_the_run_at_once(
    lab: Path, what: str, where: float, stop: type[BaseException]
) -> None:
    raised = stop("enough")

    class Stopping(Listener):
        def __getattribute__(self, name: str) -> Any:
            method = super().__getattribute__(name)
            if name != what:
                return method

            def stopping(at: Any, *rest: Any) -> None:
                method(at, *rest)
                if what == "begin" or at == where:
                    raise raised

            return stopping

    listener = Stopping()
    with pytest.raises(stop) as ended:
        fit(configure(), lab, listener, [0.5])
    assert ended.value is raised
    assert listener.told[-1][:2] == (what, where)


def test_a_run_may_learn_from_a_stratified_part_of_the_images(lab: Path) -> None:
    whole = DigitsData(configure("data.evaluate_on=test"), lab)
    part = DigitsData(configure("data.evaluate_on=test", "data.images=500"), lab)
    again = DigitsData(configure("data.evaluate_on=test", "data.images=500", "trainer.seed=9"), lab)
    assert len(part.learned[1]) == 500
    shares = part.learned[1].bincount() / 500 - whole.learned[1].bincount() / 2000
    assert shares.abs().max() < 0.005
    assert torch.equal(part.learned[0], again.learned[0])  # the training seed keeps the part
    with pytest.raises(UserError, match=r"data.images=2000 is invalid: it must be .* <= 1999"):
        DigitsData(configure("data.evaluate_on=test", "data.images=2000"), lab)


def test_a_configuration_from_before_a_key_was_added_is_migrated() -> None:
    plain = config_to_plain(configure())
    del plain["data"]["images"], plain["data"]["augment"]["stroke"], plain["trainer"]["precision"]
    assert config_from_plain(plain) == configure()
    del plain["data"]["mean"]
    with pytest.raises(UserError, match=r"data.mean"):
        config_from_plain(plain)


# ---- what makes a run fast, counted --------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Counts the calls of torch's operators, and notes those that copy or change a layout."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.copies: list[tuple[str, torch.Size]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        self.count += 1
        if func.overloadpacket in COPIES and isinstance(given, Tensor) and given.numel() > 1000:
            self.copies.append((str(func), given.shape))
        return given


COPIES = {getattr(torch.ops.aten, name) for name in ("clone", "copy_", "_to_copy", "contiguous")}


@pytest.mark.parametrize("experiment", ["default", "seed", "fast99", "fast994"])
def test_no_step_copies_a_tensor_or_changes_its_layout(lab: Path, experiment: str) -> None:
    plain = [f"experiments={experiment}", "data=sample", "data.images=0", "optim.ema=0"]
    config = compose("train", [*plain, "trainer.precision=float32"])[0].config
    module = DigitModule(config, 10)
    block = next(iter(DigitsData(config, lab).train_dataloader()))
    with Calls() as calls:
        module.training_step(block[:1], 0)
    assert calls.copies == []
    assert calls.count > 20


def test_a_batch_takes_as_many_operators_whatever_its_size(lab: Path) -> None:
    moved = ["data.augment.shift=2", "data.augment.rotate=9", "data.augment.erase=3"]
    counts = set()
    for size in (16, 400):
        data = DigitsData(configure(f"data.batch_size={size}", *moved), lab)
        with Calls() as calls:
            data.train_dataloader()._block(torch.arange(size))
        counts.add(calls.count)
    assert len(counts) == 1


def test_a_run_calls_its_tracker_once_an_epoch(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    monkeypatch.setattr(RunRecord, "log", lambda _, __, step=0, ___=None: steps.append(step))
    config = configure("tracking=none", "trainer.epochs=5")
    outcome = perform(config, Identity("a", "train"), Tracking(), lab, Watch())
    assert outcome.state == "finished", outcome.reason
    assert steps == [0, 1, 2, 3, 4, 5, 5]  # what is known before, the epochs, and the end


def test_a_last_batch_of_one_image_is_left_out(lab: Path) -> None:
    fitted = train(lab, "data.images=1025", "trainer.epochs=1")
    assert math.isfinite(fitted.metrics["train_loss"])  # batch norm refuses a batch of one


def test_bfloat16_is_of_the_step_alone_and_gives_the_same_bits_again(lab: Path) -> None:
    half = train(lab, *ALL, "trainer.precision=bfloat16")
    assert digest(half.weights) == digest(train(lab, *ALL, "trainer.precision=bfloat16").weights)
    assert digest(half.weights) != digest(train(lab, *ALL).weights)
    assert {value.dtype for value in half.weights.values()} <= {torch.float32, torch.int64}
    assert half.logits.dtype == torch.float32
