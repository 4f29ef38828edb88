"""The network of the article that this project started from."""

import torch.nn.functional as F
from torch import Tensor, nn

from digitlab.networks.settings import ArticleConfig


class _Unbiased(nn.Conv2d):
    """A convolution whose bias is added later by whoever uses it."""

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(images, self.weight)


class ArticleNetwork(nn.Module):
    """Conv2D 32 3x3 without padding, ReLU, max-pooling 2, flatten, dense 10.

    Keras initialises with Glorot's uniform and zero biases; so does this, since torch's default
    starts the small network differently. The bias commutes with max-pooling, and is added after
    it, to a quarter of the values; so is its gradient taken.
    """

    def __init__(self, config: ArticleConfig) -> None:
        super().__init__()
        self.convolution = _Unbiased(1, 32, kernel_size=3)
        self.pool = nn.MaxPool2d(2)
        self.dense = nn.Linear(32 * 13 * 13, 10)
        for layer in (self.convolution, self.dense):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 1, 28, 28)."""
        bias = self.convolution.bias
        assert bias is not None
        features = self.pool(self.convolution(images)).add_(bias[:, None, None]).relu_()
        logits: Tensor = self.dense(features.permute(0, 2, 3, 1).flatten(1))  # as in Convnet
        return logits
