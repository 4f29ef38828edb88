"""The networks that a configuration can name: one file and one line here for each."""

from dataclasses import dataclass

import torch
from torch import nn

from digitlab.base.errors import UserError, nearest
from digitlab.networks.convnet import Convnet, ConvnetConfig
from digitlab.networks.seed import Seed, SeedConfig

ModelConfig = ConvnetConfig | SeedConfig


@dataclass(frozen=True)
class Network:
    """What the table holds of a network: its typed parameters and the module they build."""

    config: type
    module: type[nn.Module]


NETWORKS = {
    "convnet": Network(ConvnetConfig, Convnet),
    "seed": Network(SeedConfig, Seed),
}


def find_network(name: str) -> Network:
    """The table's entry for `model.name`.

    Raises:
        UserError: no network has this name.
    """
    if name not in NETWORKS:
        raise UserError(f"model.name={name}: no such network, {nearest(name, NETWORKS)}")
    return NETWORKS[name]


def build_network(config: ModelConfig) -> nn.Module:
    """The network of `config`, float (N, 1, 28, 28) to logits (N, 10), in channels-last layout.

    Channels-last makes convolution and pooling on a CPU about twice as fast as the default layout.
    """
    module = find_network(config.name).module(config)
    return module.to(memory_format=torch.channels_last)
