"""What a network answers, how right it is and what it costs: of use without Lightning."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from digitlab.config.types import DataConfig
from digitlab.data.images import EVALUATION_BATCH, standardise, to_unit


@torch.no_grad()
def evaluate(network: nn.Module, images: Tensor, config: DataConfig) -> Tensor:
    """Return logits (N, 10) of images uint8 (N, 1, 28, 28) on the network's own device.

    The network's mode stays as it was.
    """
    training = network.training
    network.eval()
    batches = torch.split(images, EVALUATION_BATCH)
    logits = torch.cat([network(standardise(to_unit(batch), config)) for batch in batches])
    network.train(training)
    return logits


def measure(logits: Tensor, labels: Tensor, prefix: str) -> dict[str, float]:
    """Return mean cross-entropy and accuracy as `<prefix>_loss` and `<prefix>_accuracy`."""
    loss = float(F.cross_entropy(logits, labels))
    accuracy = float((logits.argmax(1) == labels).double().mean())
    return {f"{prefix}_loss": loss, f"{prefix}_accuracy": accuracy}


def count_parameters(network: nn.Module) -> int:
    """Count the numbers that training can change."""
    return sum(math.prod(parameter.shape) for parameter in network.parameters())


def count_flops(network: nn.Module) -> int:
    """Count the floating-point operations of one image's forward pass; a multiply-add is two."""
    # It imports triton, whether there is a GPU or not: those that only evaluate need neither.
    from torch.utils.flop_counter import FlopCounterMode

    training = network.training
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network.eval()(torch.zeros(1, 1, 28, 28))
    network.train(training)
    return int(counter.get_total_flops())
