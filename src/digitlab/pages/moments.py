"""The networks of the page's runs as they were at each moment: measured, kept, looked at."""

import functools
import queue
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from digitlab.base.errors import UserError, first_line
from digitlab.config.types import Config
from digitlab.data.datamodule import Labelled
from digitlab.data.datasets import class_names
from digitlab.data.images import standardise, to_unit
from digitlab.digits.explain import activations
from digitlab.digits.predict import UncalibratedReader
from digitlab.networks.table import build_network
from digitlab.pages.draw import Layer, shown_layer
from digitlab.training.evaluate import evaluate
from digitlab.training.film import learned_last

SHOWN_IMAGES = 1000  # of the validation set, the same at each moment
_MOST_BYTES = 2**29  # of weights: the oldest moments give way


@dataclass(frozen=True)
class Moment:
    config: Config
    weights: bytes
    logits: Tensor  # (1000, 10)
    images: Labelled


@dataclass(frozen=True)
class LearnedDigit:
    """A validation image, and what the network makes of it: one probability a digit."""

    place: int
    label: int
    image: list[list[int]]
    probabilities: list[float]


@dataclass(frozen=True)
class Look:
    """What a network has learned at a moment, and what its layers make of one digit."""

    filters: list[list[list[int]]]  # of the first convolution; 128 is 0
    layers: list[Layer]  # maps after the activation
    chosen: LearnedDigit
    last: list[LearnedDigit]  # learned last, the last one first
    labels: list[str]  # names of the classes


class Moments:
    """Measures snapshots in a thread of its own, so that nobody waits to send one."""

    def __init__(self, lab: Path, publish: Callable[..., None]) -> None:
        self.lab, self.publish = lab, publish
        self._kept: dict[tuple[int, int], Moment] = {}  # by run and step, the oldest first
        self._waiting: queue.Queue[tuple[int, int, Config, bytes, Labelled]] = queue.Queue()
        self.reader = functools.lru_cache(8)(self._reader)
        threading.Thread(target=self._measure, daemon=True).start()

    def add(self, run: int, step: int, config: Config, weights: bytes, images: Labelled) -> None:
        self._waiting.put((run, step, config, weights, images))

    def join(self) -> None:
        """Wait until all that was added has been published."""
        self._waiting.join()

    def _measure(self) -> None:
        while True:
            snapshot = self._waiting.get()
            try:
                self._keep(*snapshot)
            except Exception as error:  # noqa: BLE001  later moments are shown all the same
                where = f"step {snapshot[1]} of run {snapshot[0]}"
                print(f"{where} cannot be shown: {first_line(error)}", file=sys.stderr)
            finally:  # or `join` would wait for ever
                self._waiting.task_done()

    def _keep(self, run: int, step: int, config: Config, weights: bytes, images: Labelled) -> None:
        """Measure a snapshot, keep and publish it; one of a training that diverges is left out."""
        network = _network(config, weights)
        logits = evaluate(network, images[0], config.data)
        loss = F.cross_entropy(logits, images[1])
        if not all(each.isfinite().all() for each in (*network.parameters(), logits, loss)):
            return
        self._kept[run, step] = Moment(config, weights, logits, images)
        while sum(len(m.weights) for m in self._kept.values()) > _MOST_BYTES:
            self._kept.pop(next(iter(self._kept)))
        accuracy = float((logits.argmax(1) == images[1]).double().mean())
        about = {"loss": round(float(loss), 5), "accuracy": accuracy, "images": len(images[1])}
        self.publish("moment", run=run, step=step, **about)

    def _moment(self, run: int, step: int) -> Moment:
        try:
            return self._kept[run, step]
        except KeyError as error:
            raise UserError(
                f"Step {step} of run {run} is not kept: it must be one of the last moments that "
                "were shown. Move the slider, or train again."
            ) from error

    def _reader(self, run: int, step: int) -> UncalibratedReader:
        """Return the network of a moment, to read drawings; UserError where it is not kept."""
        moment = self._moment(run, step)
        network = _network(moment.config, moment.weights)
        return UncalibratedReader(network, moment.config, self.lab)

    def look(self, run: int, step: int, place: int | None) -> Look:
        """Look at a moment, and at one of its images; the one learned last, where it is None."""
        moment, reader = self._moment(run, step), self.reader(run, step)
        images, labels = moment.images
        last = self._learned_last(run, labels)
        chosen = last[0] if place is None else min(place, len(labels) - 1)
        image = standardise(to_unit(images[chosen][None]), moment.config.data)
        maps, _ = activations(reader.network, image)
        weights = [p for p in reader.network.parameters() if p.ndim == 4][:1]
        filters = [_levels(p.detach().mean(1)) for p in weights]
        shares = moment.logits.softmax(1)

        def digit(at: int) -> LearnedDigit:
            given = [round(share, 4) for share in shares[at].tolist()]
            return LearnedDigit(at, int(labels[at]), images[at, 0].tolist(), given)

        layers = [shown_layer(name, layer) for name, layer in maps.items()]
        names = class_names(moment.config.data.name, self.lab)
        found = [digit(place) for place in last]
        return Look(filters[0] if filters else [], layers, digit(chosen), found, names)

    def _learned_last(self, run: int, labels: Tensor) -> list[int]:
        """Return the images that were wrong until the latest moment of a run."""
        kept = [m.logits for (of, _), m in sorted(self._kept.items(), key=_key) if of == run]
        return learned_last([logits.softmax(1) for logits in kept], labels)


def _key(kept: tuple[tuple[int, int], Any]) -> tuple[int, int]:
    return kept[0]


def _network(config: Config, weights: bytes) -> torch.nn.Module:
    network = build_network(config.model)
    network.load_state_dict(safetensors.torch.load(weights))
    return network.eval()


def _levels(filters: Tensor) -> list[list[list[int]]]:
    """Return filters as 0 to 255, the same reach for all: 128 is 0."""
    reach = float(filters.abs().max()) or 1.0
    found: list[list[list[int]]] = (128 + 127 * filters / reach).round().int().tolist()
    return found
