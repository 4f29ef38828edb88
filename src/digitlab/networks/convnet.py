"""A plain convolutional network with any number of convolutions."""

from dataclasses import dataclass

from torch import Tensor, nn

from digitlab.base.errors import UserError, require

PIXELS = 28
CLASSES = 10


@dataclass
class ConvnetConfig:
    """Parameters of `Convnet`. A list of one value holds for every convolution."""

    name: str
    widths: list[int]  # output channels, one for each convolution
    kernel_sizes: list[int]  # pixels, odd
    strides: list[int]  # pixels
    pools: list[int]  # side of the max-pooling window after the convolution, pixels; 1 is none
    batch_norm: bool  # after each convolution and the hidden layer
    dropout: float  # probability, before each linear layer
    hidden: int  # units of the hidden linear layer; 0 is none

    def __post_init__(self) -> None:
        widths = f"model.widths={self.widths}"
        require(_are_positive(self.widths), widths, "one or more integers >= 1")
        for field in ("kernel_sizes", "strides", "pools"):
            values: list[int] = getattr(self, field)
            given = f"model.{field}={values}"
            require(_are_positive(values), given, "one or more integers >= 1")
            if len(values) not in (1, len(self.widths)):
                raise UserError(
                    f"{given} does not fit {widths}: give one value for all convolutions, "
                    f"or {len(self.widths)}"
                )
        odd = all(size % 2 for size in self.kernel_sizes)
        require(odd, f"model.kernel_sizes={self.kernel_sizes}", "odd sizes")
        require(0 <= self.dropout < 1, f"model.dropout={self.dropout}", "0 <= dropout < 1")
        require(self.hidden >= 0, f"model.hidden={self.hidden}", "an integer >= 0, 0 for none")
        self.side()

    def layers(self) -> list[tuple[int, int, int, int]]:
        """(width, kernel size, stride, pool) of each convolution."""
        n = len(self.widths)
        lists = (self.kernel_sizes, self.strides, self.pools)
        full = [values * n if len(values) == 1 else values for values in lists]
        return list(zip(self.widths, *full, strict=True))

    def side(self) -> int:
        """Pixels that are left on a side after the last convolution.

        Raises:
            UserError: strides and pools leave less than one pixel.
        """
        side = PIXELS
        for _, _, stride, pool in self.layers():
            side = (-(-side // stride)) // pool
        if side < 1:
            raise UserError(
                f"model.pools={self.pools} with model.strides={self.strides} over "
                f"{len(self.widths)} convolutions leaves no pixel of {PIXELS}: lower one of them"
            )
        return side


def _are_positive(values: list[int]) -> bool:
    return bool(values) and all(isinstance(value, int) and value >= 1 for value in values)


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
