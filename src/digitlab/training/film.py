"""What a network makes of a few images while it learns: the frames of a film."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

FILM_IMAGES = 200  # the first of the validation set: enough that some are learned late


@dataclass(frozen=True)
class Frame:
    """A network at one moment."""

    moment: str  # untrained, step 20, epoch 3
    probabilities: Tensor  # (N, 10) of N images, the same in each frame
    filters: Tensor  # (C, k, k) of the first convolution


def shown_steps(steps: int, epoch: int) -> tuple[int, ...]:
    """Return the steps to show: 0, 10, 20, 50, 100, ..., and the ends of epochs of `epoch`."""
    powers = (10**n * k for n in range(1, len(str(steps))) for k in (1, 2, 5))
    return tuple(sorted({0, steps, *(s for s in powers if s < steps), *range(0, steps, epoch)}))


def make_frame(step: int, epoch: int, network: nn.Module, logits: Tensor) -> Frame:
    """Return the frame after a number of steps, of which an epoch has `epoch`."""
    filters = next((p for p in network.parameters() if p.ndim == 4), torch.empty(0, 1, 1, 1))
    moment = "untrained" if not step else f"step {step}"
    if step and step % epoch == 0:
        moment = f"epoch {step // epoch}"
    return Frame(moment, logits.softmax(1).cpu(), filters.detach().mean(1).cpu().clone())


def learned_last(probabilities: Sequence[Tensor], labels: Tensor) -> list[int]:
    """Return the ten images that were wrong until the latest, the last one first.

    Args:
        probabilities: (N, 10), moment by moment.
        labels: (N,) of the same images.
    """
    wrong = torch.stack([one.argmax(1) != labels for one in probabilities])
    until = (wrong * torch.arange(1, len(wrong) + 1)[:, None]).max(0).values
    doubt = 1 - probabilities[-1].gather(1, labels[:, None])[:, 0]
    return [int(place) for place in (until + doubt).argsort(descending=True)[:10]]
