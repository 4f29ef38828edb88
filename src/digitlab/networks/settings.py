"""What each network can be configured with: its settings' types, one for each `model.name`.

They stand apart from the networks so that a configuration can be read without importing torch.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from digitlab.base.errors import UserError, require

PIXELS = 28  # on a side of an image
# Of every settings type: no unknown keys, no fraction or bool for an integer, no NaN or infinity.
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Positive = Annotated[int, Field(ge=1)]
Width = Annotated[int, Field(ge=1, le=2**16)]  # torch computes sizes in 64 bits


@dataclass(config=STRICT)
class ConvnetConfig:
    """Settings of `Convnet`. A list of one value holds for every convolution."""

    name: Literal["convnet"] = Field(description="Name of the network.")
    widths: list[Width] = Field(min_length=1, description="Output channels of each convolution.")
    kernel_sizes: list[Positive] = Field(min_length=1, description="Sides of kernels, odd, pixels.")
    strides: list[Positive] = Field(min_length=1, description="Strides of convolutions, pixels.")
    pools: list[Positive] = Field(
        min_length=1, description="Sides of the max-pooling windows, pixels; 1 pools nothing."
    )
    batch_norm: bool = Field(description="Batch norm after convolutions and the hidden layer.")
    dropout: float = Field(ge=0, lt=1, description="Dropout probability before linear layers.")
    hidden: int = Field(
        ge=0, le=2**16, description="Units of the hidden linear layer; 0 leaves it out."
    )

    @model_validator(mode="after")
    def _check(self) -> "ConvnetConfig":
        count = len(self.widths)
        for field in ("kernel_sizes", "strides", "pools"):
            values: list[int] = getattr(self, field)
            if len(values) not in (1, count):
                raise UserError(
                    f"model.{field}={values} does not fit model.widths={self.widths}: give one "
                    f"value for all convolutions, or {count}."
                )
        odd = all(size % 2 for size in self.kernel_sizes)
        require(odd, f"model.kernel_sizes={self.kernel_sizes}", "a list of odd integers")
        if self.side() < 1:
            raise UserError(
                f"model.pools={self.pools} with model.strides={self.strides} over {count} "
                f"convolutions leaves no pixel of {PIXELS}: it must leave one. Lower one of them."
            )
        return self

    def layers(self) -> list[tuple[int, int, int, int]]:
        """Return (width, kernel size, stride, pool) of each convolution."""
        n = len(self.widths)
        lists = (self.kernel_sizes, self.strides, self.pools)
        full = [values * n if len(values) == 1 else values for values in lists]
        return list(zip(self.widths, *full, strict=True))

    def side(self) -> int:
        """Return the pixels that are left on a side after the last convolution."""
        side = PIXELS
        for _, _, stride, pool in self.layers():
            side = (-(-side // stride)) // pool
        return side


@dataclass(config=STRICT)
class ArticleConfig:
    """`ArticleNetwork` has nothing to set: it stays what the article printed."""

    name: Literal["seed"] = Field(description="Name of the network.")


@dataclass(config=STRICT)
class SharedConfig:
    """Settings of `SharedNetwork`: few numbers, used again and again."""

    batch_norm: ClassVar[bool] = True  # always

    name: Literal["shared"] = Field(description="Name of the network.")
    width: Width = Field(description="Output channels of every convolution.")
    kernel_size: Positive = Field(description="Side of the first kernel, odd, pixels.")
    stride: Positive = Field(description="Stride of the first convolution, pixels.")
    repeat_pools: list[Positive] = Field(
        min_length=1,
        description="The shared convolution is applied once for each: side of the max-pooling "
        "window after it, pixels; 1 pools nothing.",
    )
    separable: bool = Field(
        description="Whether the shared convolution is one of each channel, then one of pixels."
    )

    @model_validator(mode="after")
    def _check(self) -> "SharedConfig":
        odd = self.kernel_size % 2 == 1
        require(odd, f"model.kernel_size={self.kernel_size}", "an odd integer")
        if self.side() < 1:
            raise UserError(
                f"model.repeat_pools={self.repeat_pools} with model.stride={self.stride} leaves no "
                f"pixel of {PIXELS}: it must leave one. Lower one of them."
            )
        return self

    def side(self) -> int:
        """Return the pixels that are left on a side after the last convolution."""
        side = -(-PIXELS // self.stride)
        for pool in self.repeat_pools:
            side //= pool
        return side


ModelConfig = ConvnetConfig | ArticleConfig | SharedConfig
