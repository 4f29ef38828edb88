"""The same training on CUDA, each step as one graph of kernels.

A small network's step is some hundred kernels of a few microseconds each, and torch takes longer to
start them than the GPU to run them. A graph starts them all at once.
"""

import torch

from digitlab.config.types import Config
from digitlab.training.blocks import BlockModule
from digitlab.training.module import Batch

_EAGER_STEPS = 3  # in which the libraries and the optimizer allocate what they keep


class CapturedModule(BlockModule):
    """A BlockModule whose step is captured once, and then replayed for each batch of that size."""

    def __init__(self, config: Config, steps: int) -> None:
        super().__init__(config, steps)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.is_capturing = False
        self.eager_steps = 0

    def take_step(self, batch: Batch) -> Batch:
        if self.eager_steps == 0:  # nothing can be captured in the default one
            self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            loss, logits = self._step(batch)
        current.wait_stream(self.stream)
        return loss, logits

    def _step(self, batch: Batch) -> Batch:
        is_odd = len(batch[1]) != self.config.data.batch_size  # the last of a pass
        if is_odd or self.eager_steps < _EAGER_STEPS:
            self.eager_steps += 1
            return super().take_step(batch)
        if self.graph is None:
            self._capture(batch)
        for place, given in zip(self.given, batch, strict=True):
            place.copy_(given)
        assert self.graph is not None
        self.graph.replay()
        self.average_weights()
        loss, logits = self.result
        return loss.clone(), logits.clone()

    def _capture(self, batch: Batch) -> None:
        images, labels = batch
        self.given = images.clone(), labels.clone()
        self.graph, self.is_capturing = torch.cuda.CUDAGraph(), True
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.result = super().take_step(self.given)
        self.is_capturing = False

    def average_weights(self) -> None:
        if not self.is_capturing:  # the average follows every fourth step alone, and stays outside
            super().average_weights()
