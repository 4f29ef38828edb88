"""The state of a fit between two blocks, as bytes: another process goes on from it, bit for bit."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from digitlab.base.environment import training_digest
from digitlab.config.types import Config
from digitlab.data.images import Batches
from digitlab.training.blocks import BlockModule

_LIBRARIES = ("torch", "pytorch-lightning", "numpy")
_TENSOR, _STATE = "tensor", "state"


@dataclass(frozen=True)
class Earlier:
    """What other processes have done of a fit that this one goes on with."""

    steps: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0


class Checkpoints:
    """Takes a fit's state every `trainer.checkpoint_minutes`, and gives it back.

    A state is taken up only where everything that bits depend on is as it was: settings, data,
    code, libraries, and what torch computes with. Bits are equal on the processor alone.
    """

    def __init__(
        self, config: Config, made_with: Mapping[str, Any], batches: Batches, content: bytes | None
    ) -> None:
        """Args: made_with: what the bits of this fit depend on; content: a state, or None."""
        self.made_with, self.batches = json.loads(json.dumps(made_with)), batches
        self.interval_s = 60 * config.trainer.checkpoint_minutes or math.inf
        is_wanted = config.trainer.checkpoint_minutes > 0
        self.state = _unpack(content, self.made_with) if content and is_wanted else {}
        self.earlier = Earlier(**self.state.get("earlier", {}))
        self.began, self.cpu_began = time.perf_counter(), time.process_time()
        self.taken = self.began

    def is_due(self) -> bool:
        return time.perf_counter() - self.taken >= self.interval_s

    def take(self, module: BlockModule, reporter: Mapping[str, Any]) -> bytes:
        """Return the state after the block that has just been trained, not an epoch's last one."""
        self.taken = time.perf_counter()
        [optimizer], [schedule] = module.trainer.optimizers, module.trainer.lr_scheduler_configs
        spent = Earlier(
            module.steps_done,
            self.earlier.seconds + self.taken - self.began,
            self.earlier.cpu_seconds + time.process_time() - self.cpu_began,
        )
        state = {
            "made_with": self.made_with,
            "earlier": asdict(spent),
            "module": module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.scheduler.state_dict(),
            "batches": self.batches.state_dict(),
            "random": _random_states(module.device),
            "reporter": reporter,
        }
        return _pack(state)

    def restore(self, module: BlockModule) -> dict[str, Any]:
        """Put a fit that is about to start into the state; return the reporter's part of it."""
        [optimizer], [schedule] = module.trainer.optimizers, module.trainer.lr_scheduler_configs
        module.load_state_dict(self.state["module"])
        moments = self.state["optimizer"]  # by the number of a parameter, which JSON makes a text
        moments["state"] = {int(number): one for number, one in moments["state"].items()}
        rates = [group["lr"] for group in optimizer.param_groups]
        optimizer.load_state_dict(moments)
        # A captured step reads the rate from the tensor that it was built with.
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate.copy_(group["lr"]) if isinstance(rate, Tensor) else group["lr"]
        # A fused step goes through memory as it lies: moments must lie as their weights do.
        for weight, state in optimizer.state.items():
            for name, value in state.items():
                if value.shape == weight.shape:
                    state[name] = torch.empty_like(weight).copy_(value)
        schedule.scheduler.load_state_dict(self.state["schedule"])
        self.batches.load_state_dict(self.state["batches"])
        torch.set_rng_state(self.state["random"]["cpu"])
        if module.device.type == "cuda":
            torch.cuda.set_rng_state(self.state["random"]["cuda"], module.device)
        reporter: dict[str, Any] = self.state["reporter"]
        return reporter


def _random_states(device: torch.device) -> dict[str, Tensor]:
    """Return where the generators are that dropout draws from, by the kind of device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def describe_training(
    config: Config,
    rungs: Sequence[float],
    data_sha256: Mapping[str, str],
    numerics: Mapping[str, Any],
) -> dict[str, Any]:
    """Return all that the bits of a fit depend on, and of what its observer receives."""
    return {
        **{group: asdict(getattr(config, group)) for group in ("data", "model", "optim")},
        "trainer": asdict(replace(config.trainer, checkpoint_minutes=0.0)),
        "rungs": list(rungs),
        "sha256": dict(data_sha256),
        # Lightning sets what is left out later, for all fits of a device alike.
        "numerics": {name: one for name, one in numerics.items() if name != "deterministic"},
        "code": training_digest(),
        "versions": {name: version(name) for name in _LIBRARIES},
    }


def _pack(state: Mapping[str, Any]) -> bytes:
    """Return a safetensors file of a nested state's tensors; the rest is JSON in one of them."""
    tensors: dict[str, Tensor] = {}

    def set_apart(value: Tensor) -> dict[str, str]:
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: name}

    text = json.dumps(state, default=set_apart).encode()
    tensors[_STATE] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return safetensors.torch.save(tensors)


def _unpack(content: bytes, made_with: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state that `_pack` made a file of; {} if that is another training's."""

    def put_back(found: dict[str, Any]) -> Any:
        return tensors[found[_TENSOR]] if found.keys() == {_TENSOR} else found

    try:
        tensors = safetensors.torch.load(content)
        text = tensors[_STATE].numpy().tobytes()
        state: dict[str, Any] = json.loads(text, object_hook=put_back)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # anything may lie in a lab's folder
    return state if state.get("made_with") == made_with else {}
