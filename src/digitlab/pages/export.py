"""A trained network in one HTML file: its weights, and a page that computes without any server."""

import base64
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from digitlab.base.errors import UserError
from digitlab.config.types import Config
from digitlab.data.datasets import class_names
from digitlab.digits.prepare import is_centred

_PASSED_OVER = ("permute", "flatten", "dropout", "dim", "__getitem__", "size", "__get__")


def save_page(network: nn.Module, config: Config, title: str, lab: Path) -> str:
    """Return an HTML file that reads drawings as the network does; `lab` has its data set.

    Raises:
        UserError: the network computes something that the page does not know.
    """
    image = torch.zeros(1, 1, 28, 28)
    with torch.no_grad(), _Operations() as seen:
        network.eval()(image)
    weights = torch.cat([tensor.detach().float().flatten() for tensor in seen.tensors])
    data = config.data
    network_text = json.dumps({
        "title": title, "mean": data.mean, "std": data.std, "steps": seen.steps,
        "classes": class_names(data.name, lab), "is_centred": is_centred(data.name, lab),
        "weights": base64.b64encode(weights.numpy().astype("<f4").tobytes()).decode(),
    })  # fmt: skip
    text = Path(__file__).with_name("saved.html").read_text(encoding="utf-8")
    # A name may hold what would end the script.
    return text.replace("/*network*/", network_text.replace("<", "\\u003c"))


class _Operations(TorchFunctionMode):
    """Notes what a network computes, as steps of the saved page, with their tensors in order.

    Maps lie there as height, width, channels, as in the networks of this package.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[dict[str, Any]] = []
        self.tensors: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        self._note(getattr(func, "__name__", str(func)), args, kwargs)
        return output

    def _note(self, name: str, args: Any, given: dict[str, Any]) -> None:
        match name:
            case "conv2d":
                weight = args[1]  # (out, in, k, k); the page reads (k, k, in, out)
                if len(args) > 6 and args[6] > 1:  # depthwise: to the page, most weights are 0
                    weight = torch.diag_embed(weight[:, 0].permute(1, 2, 0)).permute(3, 2, 0, 1)
                bias = args[2] if len(args) > 2 and args[2] is not None else None
                stride, padding = (args[3][0], args[4][0]) if len(args) > 4 else (1, 0)
                self._add("convolution", weight.permute(2, 3, 1, 0), bias, stride=stride,
                          padding=padding, size=weight.shape[2])  # fmt: skip
            case "linear":
                self._add("dense", args[1].T, args[2])
            case "max_pool2d":
                self._add("pool", size=args[1])
            case "batch_norm":
                scale = given["weight"] / (args[2] + given["eps"]).sqrt()
                self._add("scale", scale, given["bias"] - args[1] * scale)
            case "add_":
                self._add("scale", torch.ones(args[1].numel()), args[1].flatten())
            case "relu" | "relu_":
                self._add("relu")
            case _ if name not in _PASSED_OVER:
                raise UserError(
                    f"This network computes {name}, which a saved page does not know: it must be "
                    "of convolutions, max-pooling, batch norm, ReLU and dense layers. Use "
                    "`digitlab predict`."
                )

    def _add(self, kind: str, *tensors: Tensor | None, **settings: int) -> None:
        shapes = [0 if tensor is None else list(tensor.shape) for tensor in tensors]
        self.steps.append({"kind": kind, "shapes": shapes, **settings})
        self.tensors += [tensor for tensor in tensors if tensor is not None]
