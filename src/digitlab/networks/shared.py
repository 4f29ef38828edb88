"""A network of few parameters: one convolution that is applied again and again."""

from torch import Tensor, nn

from digitlab.networks.convnet import CLASSES, FlattenLast
from digitlab.networks.settings import SharedConfig


class SharedNetwork(nn.Module):
    """A first convolution, a 3x3 one for each of `repeat_pools`, then a linear layer.

    The kernels of the 3x3 one are the same each time. Batch norm is another one each time, since
    the features at each depth have a mean and a deviation of their own. If separable, the 3x3 one
    is a depthwise convolution and a pointwise one (Chollet 2017).
    """

    def __init__(self, config: SharedConfig) -> None:
        super().__init__()
        width, kernel = config.width, config.kernel_size
        self.first = nn.Conv2d(1, width, kernel, config.stride, kernel // 2, bias=False)
        if config.separable:
            each = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
            self.shared: nn.Module = nn.Sequential(each, nn.Conv2d(width, width, 1, bias=False))
        else:
            self.shared = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.steps = nn.ModuleList(_after(width, pool) for pool in (1, *config.repeat_pools))
        self.head = nn.Sequential(FlattenLast(), nn.Linear(width * config.side() ** 2, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 10) of standardised images (N, 1, 28, 28)."""
        first, *later = self.steps
        features = first(self.first(images))
        for step in later:
            features = step(self.shared(features))
        logits: Tensor = self.head(features)
        return logits


def _after(width: int, pool: int) -> nn.Sequential:
    """Return what follows a convolution; pooling comes first, as in Convnet."""
    pooling = [nn.MaxPool2d(pool)] if pool > 1 else []
    return nn.Sequential(*pooling, nn.BatchNorm2d(width), nn.ReLU(inplace=True))
