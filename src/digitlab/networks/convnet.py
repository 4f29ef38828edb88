"""A plain convolutional network with any number of convolutions."""

from torch import Tensor, nn

from digitlab.networks.settings import ConvnetConfig

CLASSES = 10


class FlattenLast(nn.Module):
    """(N, C, H, W) in channels-last layout to (N, H * W * C), a view.

    `nn.Flatten` keeps the order of channels-first: it copies forth, and sends back gradients in a
    layout that makes batch norm and ReLU before it ten times slower.
    """

    def forward(self, features: Tensor) -> Tensor:
        return features.permute(0, 2, 3, 1).flatten(1)


class Convnet(nn.Module):
    """Convolution, pooling, batch norm, ReLU, as often as asked; then the linear layers.

    Pooling comes before norm and activation: ReLU and max commute, and the two work on a quarter
    of the values.
    """

    def __init__(self, config: ConvnetConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for width, kernel, stride, pool in config.layers():
            bias = not config.batch_norm
            layers.append(nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=bias))
            if pool > 1:
                layers.append(nn.MaxPool2d(pool))
            if config.batch_norm:
                layers.append(nn.BatchNorm2d(width))
            layers.append(nn.ReLU(inplace=True))
            channels = width
        layers.append(FlattenLast())
        features = channels * config.side() ** 2
        dropout = [nn.Dropout(config.dropout)] if config.dropout else []
        if config.hidden:
            layers += [*dropout, nn.Linear(features, config.hidden, bias=not config.batch_norm)]
            layers += [nn.BatchNorm1d(config.hidden)] if config.batch_norm else []
            layers.append(nn.ReLU(inplace=True))
            features = config.hidden
        layers += dropout
        layers.append(nn.Linear(features, CLASSES))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 10) of standardised images (N, 1, 28, 28)."""
        logits: Tensor = self.layers(images)
        return logits
