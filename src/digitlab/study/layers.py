"""The layers of a network, in rows and in a table for a person."""

from typing import Any

import torch
from rich.table import Table
from torch import nn

from digitlab.base.console import table
from digitlab.networks.settings import ModelConfig
from digitlab.networks.table import build_network


def layers_table(config: ModelConfig) -> Table:
    """Return each layer's kind, output for one image, and number of parameters."""
    found = layer_rows(config)
    rows = [[kind, shape, f"{count:,}"] for kind, shape, count in found]
    total = sum(count for _, _, count in found)
    return table("", ["layer", "output", "parameters"], [*rows, ["all", "", f"{total:,}"]])


def layer_rows(config: ModelConfig, device: str = "cpu") -> list[tuple[str, str, int]]:
    """Return each layer's kind, output for one image, and number of parameters.

    A layer that is applied again has a row each time, and its parameters are counted once.
    On the device `meta` a network of any size is built at once, without memory.
    """
    rows: list[tuple[str, str, int]] = []
    counted: set[nn.Module] = set()

    def note(layer: nn.Module, _: Any, output: torch.Tensor) -> None:
        parameters = () if layer in counted else layer.parameters()
        count = sum(parameter.numel() for parameter in parameters)
        counted.add(layer)
        rows.append((_kind(layer), "x".join(map(str, output.shape[1:])), count))

    with torch.device(device), torch.no_grad():
        network = build_network(config).eval()
        for module in network.modules():
            if not list(module.children()):
                module.register_forward_hook(note)
        network(torch.zeros(1, 1, 28, 28))
    return rows


def _kind(layer: nn.Module) -> str:
    """Return the name of torch's layer that this one is, or its own."""
    kinds = [kind for kind in type(layer).__mro__ if kind.__module__.startswith("torch.nn")]
    return kinds[0].__name__ if kinds[0] is not nn.Module else type(layer).__name__
