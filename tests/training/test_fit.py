"""A fit: the same bits each time and everywhere, and the bits of an independent loop."""

import copy
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import (
    ALL,
    DATA,
    IMAGES,
    SMALL,
    STEPS,
    Listener,
    configure,
    digest,
    in_thread,
    train,
)
from torch import Tensor, nn
from torch.optim import lr_scheduler

from digitlab.config.compose import compose
from digitlab.config.types import Config, OptimConfig
from digitlab.data.augment import augment
from digitlab.data.datasets import stratified_split
from digitlab.data.images import random_stream
from digitlab.networks.table import build_network
from digitlab.training.evaluate import measure
from digitlab.training.fit import fit
from digitlab.training.module import Diverged, build_schedule
from digitlab.training.observer import TrainingObserver

# ---- the same bits, and the files that a fit opens -----------------------------------------------

_ELSEWHERE = """
import hashlib, json, sys
from pathlib import Path
import safetensors.torch
from digitlab.config.compose import compose
from digitlab.training.fit import fit
from digitlab.training.observer import TrainingObserver

events = []
def note(event, arguments):
    if event == "open" and "ubyte" in str(arguments[0]):
        events.append(Path(str(arguments[0])).name)
sys.addaudithook(note)
class Steps(TrainingObserver):
    def batch(self, fraction):
        events.append(fraction)

for evaluate_on in ("validation", "test"):
    events.clear()
    config = compose("train", [*sys.argv[2:], f"data.evaluate_on={evaluate_on}"])[0].config
    fitted = fit(config, Path(sys.argv[1]), Steps())
    digest = hashlib.sha256(safetensors.torch.save(fitted.weights)).hexdigest()
    print(json.dumps({"digest": digest, "events": events}))
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Of a fit in another process, by evaluate_on: its digest, the files it opened, its steps."""
    lab = tmp_path_factory.mktemp("lab")
    shutil.copytree(DATA, lab / "data" / "sample")
    command = [sys.executable, "-c", _ELSEWHERE, str(lab), *SMALL, *ALL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return dict(zip(("validation", "test"), map(json.loads, done.stdout.splitlines()), strict=True))


def test_same_configuration_gives_the_same_bits(
    lab: Path, elsewhere: dict[str, dict[str, Any]]
) -> None:
    first = train(lab, *ALL)
    torch.randn(1000)  # random numbers that others have used
    np.random.random(10)
    second = train(lab, *ALL)
    assert digest(first.weights) == digest(second.weights)
    assert torch.equal(first.logits, second.logits)
    timeless = [
        {name: value for name, value in fitted.metrics.items() if name != "images_per_second"}
        for fitted in (first, second)
    ]
    assert timeless[0] == timeless[1]
    assert elsewhere["validation"]["digest"] == digest(first.weights)


def test_another_thread_gives_the_same_bits_and_touches_no_signal(lab: Path) -> None:
    before = [signal.getsignal(number) for number in signal.valid_signals()]
    fitted = in_thread(lambda: train(lab, *ALL))
    assert digest(fitted.weights) == digest(train(lab, *ALL).weights)
    assert [signal.getsignal(number) for number in signal.valid_signals()] == before


def test_rungs_do_not_change_the_weights(lab: Path) -> None:
    measured = train(lab, *ALL, rungs=(0.2, 0.5, 0.7))
    assert digest(measured.weights) == digest(train(lab, *ALL).weights)


def test_an_allocation_of_slurm_changes_nothing(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = digest(train(lab, "trainer.epochs=1").weights)
    allocation = {"JOB_ID": "1", "JOB_NAME": "x", "NTASKS": "4"}
    for name, value in (allocation | dict.fromkeys(("PROCID", "LOCALID", "NODEID"), "0")).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert digest(train(lab, "trainer.epochs=1").weights) == expected


class Terminated(Listener):
    """Gets a SIGTERM at each block."""

    def batch(self, fraction: float) -> None:
        super().batch(fraction)
        os.kill(os.getpid(), signal.SIGTERM)


def test_an_ignored_sigterm_stays_ignored(lab: Path) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        listener = Terminated()
        fit(configure("trainer.epochs=1"), lab, listener)
        assert len(listener.of("batch")) == STEPS
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_caller_s_handler_of_sigterm_is_called_at_once(lab: Path) -> None:
    def handle(*_: object) -> None:
        raise TimeoutError("the caller's handler")

    before = signal.signal(signal.SIGTERM, handle)
    try:
        with pytest.raises(TimeoutError, match="the caller's handler"):
            fit(configure("trainer.epochs=1"), lab, Terminated())
        assert signal.getsignal(signal.SIGTERM) is handle
    finally:
        signal.signal(signal.SIGTERM, before)


def test_another_seed_gives_other_weights_on_the_same_split(lab: Path) -> None:
    one, other = (train(lab, f"trainer.seed={seed}", "trainer.epochs=1") for seed in (1, 2))
    assert digest(one.weights) != digest(other.weights)
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.labels, other.labels)


def test_validation_opens_no_test_file(elsewhere: dict[str, dict[str, Any]]) -> None:
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
    split = (config.data.validation_images, config.data.split_seed)
    learn, _ = stratified_split(labels.numpy(), *split)
    images, labels = images.view(2000, 1, 28, 28)[learn], labels[learn].long()
    order, chance = (random_stream(config.trainer.seed, stream) for stream in (0, 1))
    optim, size = config.optim, config.data.batch_size
    steps = config.trainer.epochs * -(-IMAGES // size)
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
        shuffled = torch.randperm(IMAGES, generator=order)
        for begin in range(0, IMAGES, size):
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
    fitted, bare = fit(config, lab, TrainingObserver()).weights, bare_fit(config, lab)
    assert fitted.keys() == bare.keys()
    unequal = [
        name
        for name, value in bare.items()
        if value.is_floating_point() and not torch.equal(fitted[name], value)
    ]
    assert unequal == []


# ---- what a fit returns --------------------------------------------------------------------------


def test_measures_are_those_of_the_weights_that_are_given_back(lab: Path) -> None:
    config = configure("optim.ema=0.9")
    fitted = fit(config, lab, TrainingObserver())
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
    [(_, epoch)] = listener.of("epoch")
    assert [name for name in epoch if name.startswith(("val_", "test_"))] == []
    assert len(fitted.data_sha256) == 4


def test_a_last_batch_of_one_image_is_left_out(lab: Path) -> None:
    fitted = train(lab, "data.images=1025", "trainer.epochs=1")
    assert math.isfinite(fitted.metrics["train_loss"])  # batch norm refuses a batch of one


def test_bfloat16_is_of_the_step_alone_and_gives_the_same_bits_again(lab: Path) -> None:
    half = train(lab, *ALL, "trainer.precision=bfloat16")
    assert digest(half.weights) == digest(train(lab, *ALL, "trainer.precision=bfloat16").weights)
    assert digest(half.weights) != digest(train(lab, *ALL).weights)
    assert {value.dtype for value in half.weights.values()} <= {torch.float32, torch.int64}
    assert half.logits.dtype == torch.float32


def test_film_shows_the_first_steps_and_the_end_of_each_epoch(lab: Path) -> None:
    result = train(lab, "data.batch_size=50")
    film = result.film
    assert [frame.moment for frame in film[:4]] == ["untrained", "step 10", "step 20", "epoch 1"]
    assert film[-1].moment == "epoch 2"
    assert all(frame.probabilities.shape == (200, 10) for frame in film)
    assert all(frame.filters.shape == (4, 3, 3) for frame in film)
    assert not torch.equal(film[0].filters, film[2].filters)
    last = film[-1].probabilities
    assert torch.allclose(last, result.logits[:200].softmax(1))
    assert train(lab, "data.evaluate_on=test", "trainer.epochs=1").film == []


def test_a_hundred_digits_are_learned_by_heart(lab: Path) -> None:
    words = ["experiments=overfit", "data=sample", "data.batch_size=20"]
    [composed] = compose("train", words)
    result = fit(composed.config, lab, TrainingObserver())
    assert result.metrics["train_accuracy"] == 1


STEADY = ["optim.schedule=constant", "optim.learning_rate=0.03"]


def test_a_fit_ends_when_it_gets_no_better_and_keeps_its_best_epoch(lab: Path) -> None:
    listener = Listener()
    config = configure(*STEADY, "trainer.epochs=40", "trainer.early_stopping=2")
    stopped = fit(config, lab, listener)
    curve = [metrics["val_accuracy"] for _, metrics in listener.of("epoch")]
    best = curve.index(max(curve)) + 1
    assert len(curve) == best + 2 < 40
    assert (stopped.metrics["best_epoch"], stopped.metrics["val_accuracy"]) == (best, max(curve))
    assert measure(stopped.logits, stopped.labels, "val")["val_accuracy"] == max(curve)
    [(_, facts)] = listener.of("started")
    spent = stopped.metrics["training_flops"] / facts["training_flops"]
    assert spent == pytest.approx(len(curve) / 40)
    alone = train(lab, *STEADY, f"trainer.epochs={best}")
    assert digest(alone.weights) == digest(stopped.weights)


# ---- ends before the end -------------------------------------------------------------------------

# Every step makes the weights nine times as long: learning rate times decay is 10, where 1 is zero.
WILD = ["optim=sgd", "optim.schedule=constant", "optim.learning_rate=10", "optim.weight_decay=1"]
WILD += ["model.batch_norm=false", "optim.momentum=0"]


def test_loss_that_is_not_finite_ends_the_fit_naming_epoch_and_rate(lab: Path) -> None:
    with pytest.raises(Diverged, match=r"loss is (nan|inf) in epoch 1 at learning rate 10$"):
        train(lab, *WILD)


def test_divergence_names_the_epoch_and_the_rate_of_its_moment(lab: Path) -> None:
    listener = Listener()
    slow = ["optim.schedule=onecycle", "optim.warmup=0.9", "trainer.epochs=8"]
    config = configure(*WILD, *slow)
    with pytest.raises(Diverged) as raised:
        fit(config, lab, listener)
    steps = len(listener.of("batch")) + 1  # with the one that diverged
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], config.optim.learning_rate)
    schedule = build_schedule(config.optim, optimizer, 8 * STEPS)
    for _ in range(steps):
        optimizer.step()
        schedule.step()
    epoch, [rate] = (steps - 1) // STEPS + 1, schedule.get_last_lr()
    assert f"in epoch {epoch} at learning rate {rate:.3g}" in str(raised.value)
    assert epoch > 1


def test_fit_that_diverges_at_its_last_step_is_not_finished(lab: Path) -> None:
    wild = [*WILD, "data.batch_size=1600"]
    listener = Listener()
    with pytest.raises(Diverged):
        fit(configure(*wild, "trainer.epochs=30"), lab, listener)
    steps = len(listener.of("batch"))
    with pytest.raises(Diverged):
        train(lab, *wild, f"trainer.epochs={steps}")
