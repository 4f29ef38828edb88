"""Every network of the table is built from its YAML, and is of the size that was asked for."""

import dataclasses
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from digitlab.base.paths import CONF
from digitlab.config.compose import compose
from digitlab.networks.article import ArticleNetwork
from digitlab.networks.convnet import Convnet, FlattenLast
from digitlab.networks.settings import ArticleConfig, ConvnetConfig, ModelConfig, SharedConfig
from digitlab.networks.shared import SharedNetwork
from digitlab.networks.table import NETWORKS, build_network

PLAIN = ConvnetConfig(
    name="convnet",
    widths=[16, 32],
    kernel_sizes=[3],
    strides=[1],
    pools=[2],
    batch_norm=True,
    dropout=0.0,
    hidden=64,
)

SHARED = SharedConfig(
    name="shared", width=4, kernel_size=5, stride=2, repeat_pools=[2, 1, 3], separable=True
)


def but(**values: Any) -> ConvnetConfig:
    """The plain network with some values replaced."""
    return dataclasses.replace(PLAIN, **values)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def images(n: int) -> Tensor:
    return torch.randn(n, 1, 28, 28, generator=torch.Generator().manual_seed(0))


# --- the table ---


@pytest.mark.parametrize("network", get_args(ModelConfig), ids=lambda network: network.__name__)
def test_every_network_is_built_from_its_yaml(network: type) -> None:
    (name,) = get_args(network.__annotations__["name"])
    config = compose("train", ["~experiments", f"model={name}"])[0].config.model
    assert type(config) is network
    assert config.name == name
    module = build_network(config)
    assert type(module) is NETWORKS[network]
    assert module(images(3)).shape == (3, 10)


def test_every_model_option_has_an_entry_in_the_table() -> None:
    options = [path.stem for path in (CONF / "model").glob("*.yaml")]
    types = {type(compose("train", [f"model={option}"])[0].config.model) for option in options}
    assert types == set(NETWORKS)


@pytest.mark.parametrize(
    "config", [PLAIN, but(batch_norm=False), ArticleConfig(name="seed"), SHARED]
)
def test_weights_of_convolutions_are_in_channels_last_layout(config: ModelConfig) -> None:
    convolutions = [m for m in build_network(config).modules() if isinstance(m, nn.Conv2d)]
    assert convolutions
    for layer in convolutions:
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("config", [PLAIN, ArticleConfig(name="seed")])
def test_one_seed_makes_one_network(config: ModelConfig) -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(torch.cat([p.flatten() for p in build_network(config).parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


# --- seed ---


def test_the_seed_network_has_the_parameters_of_the_article() -> None:
    assert parameters(build_network(ArticleConfig(name="seed"))) == 54_410


def test_the_seed_network_computes_what_the_article_s_layers_do() -> None:
    module = build_network(ArticleConfig(name="seed"))
    assert isinstance(module, ArticleNetwork)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
        features = F.relu(F.conv2d(images(4), module.convolution.weight, module.convolution.bias))
        assert features.shape == (4, 32, 26, 26)
        flat = F.max_pool2d(features, 2).permute(0, 2, 3, 1).reshape(4, 13 * 13 * 32)
        expected = flat @ module.dense.weight.T + module.dense.bias
        torch.testing.assert_close(module(images(4)), expected)


def test_the_seed_network_starts_as_keras_starts_it() -> None:
    torch.manual_seed(0)
    module = build_network(ArticleConfig(name="seed"))
    assert isinstance(module, ArticleNetwork)
    # Glorot's uniform: the limit is sqrt(6 / (inputs + outputs)), a convolution's counted by pixel
    for layer, inputs, outputs in (
        (module.convolution, 9 * 1, 9 * 32),
        (module.dense, 32 * 13 * 13, 10),
    ):
        limit = (6 / (inputs + outputs)) ** 0.5
        weight = layer.weight.detach().abs()
        assert weight.max() <= limit
        assert weight.max() > 0.9 * limit
        assert weight.mean().item() == pytest.approx(limit / 2, rel=0.1)
        assert layer.bias is not None
        assert not layer.bias.any()


# --- convnet ---


@st.composite
def convnets(draw: st.DrawFn) -> ConvnetConfig:
    n = draw(st.integers(1, 4))

    def each(values: list[int]) -> list[int]:
        size = draw(st.sampled_from([1, n]))
        return draw(st.lists(st.sampled_from(values), min_size=size, max_size=size))

    values = {
        "widths": draw(st.lists(st.integers(1, 12), min_size=n, max_size=n)),
        "kernel_sizes": each([1, 3, 5, 9]),
        "strides": each([1, 2, 3]),
        "pools": each([1, 2, 3]),
        "batch_norm": draw(st.booleans()),
        "dropout": draw(st.sampled_from([0.0, 0.5])),
        "hidden": draw(st.sampled_from([0, 1, 16])),
    }
    try:
        return but(**values)
    except ValidationError:  # the strides and pools leave no pixel
        assume(False)
        raise


@settings(deadline=None, max_examples=40)
@given(convnets(), st.integers(1, 4))
@example(but(strides=[28], pools=[1], widths=[3]), 2)
@example(but(strides=[1], pools=[28], widths=[3]), 2)
def test_a_convnet_is_of_the_side_it_predicts_and_gives_ten_logits(
    config: ConvnetConfig, n: int
) -> None:
    module = build_network(config).eval()
    sides = []
    for layer in module.modules():
        if isinstance(layer, FlattenLast):
            layer.register_forward_hook(lambda _, given, __: sides.append(given[0].shape))
    logits = module(images(n))
    assert logits.shape == (n, 10)
    assert sides == [(n, config.widths[-1], config.side(), config.side())]


@settings(deadline=None, max_examples=25)
@given(convnets())
def test_a_convnet_s_parameters_are_those_of_its_layers(config: ConvnetConfig) -> None:
    norm = config.batch_norm
    expected, inputs = 0, 1
    for i, width in enumerate(config.widths):
        kernel = config.kernel_sizes[i if len(config.kernel_sizes) > 1 else 0]
        expected += inputs * width * kernel**2 + (2 * width if norm else width)
        inputs = width
    inputs *= config.side() ** 2
    if config.hidden:
        expected += inputs * config.hidden + (2 * config.hidden if norm else config.hidden)
        inputs = config.hidden
    expected += inputs * 10 + 10
    assert parameters(build_network(config)) == expected


def test_the_plain_convnet_has_as_many_parameters_as_counted_by_hand() -> None:
    convolutions = 1 * 16 * 9 + 2 * 16 + 16 * 32 * 9 + 2 * 32
    assert (
        parameters(build_network(PLAIN)) == convolutions + 7 * 7 * 32 * 64 + 2 * 64 + 64 * 10 + 10
    )


@pytest.mark.parametrize("batch_norm", [True, False])
def test_a_convnet_computes_what_its_layers_do(batch_norm: bool) -> None:
    """Convolution, norm, ReLU and then pooling: the usual order gives the same in evaluation."""
    config = but(
        widths=[3, 5], strides=[2, 1], kernel_sizes=[5, 3], hidden=7, batch_norm=batch_norm
    )
    module = build_network(config)
    module.train()
    for _ in range(3):
        module(images(16))  # so that the norms have something to subtract
    module.eval()
    layers = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    norms = iter([m for m in module.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)])
    with torch.no_grad():
        x = images(4)
        for layer, stride in zip(layers[:2], config.strides, strict=True):
            weight = layer.weight
            x = F.conv2d(x, weight, layer.bias, stride, padding=weight.shape[-1] // 2)
            # norm's slope is positive at the start, so that it may follow pooling or precede it
            x = F.max_pool2d(F.relu(next(norms)(x) if batch_norm else x), 2)
        flat = x.permute(0, 2, 3, 1).reshape(len(x), -1)
        hidden = F.linear(flat, layers[2].weight, layers[2].bias)
        x = F.relu(next(norms)(hidden) if batch_norm else hidden)
        expected = F.linear(x, layers[3].weight, layers[3].bias)
        torch.testing.assert_close(module(images(4)), expected, atol=1e-5, rtol=1e-4)


def test_a_list_of_one_value_holds_for_every_convolution() -> None:
    short = but(widths=[4, 5, 6], kernel_sizes=[5], strides=[2], pools=[1])
    assert short.layers() == [(4, 5, 2, 1), (5, 5, 2, 1), (6, 5, 2, 1)]
    full = but(widths=[4, 5, 6], kernel_sizes=[5] * 3, strides=[2] * 3, pools=[1] * 3)
    assert full.layers() == short.layers()
    assert full.side() == short.side() == 4


@pytest.mark.parametrize(("hidden", "layers"), [(0, 1), (8, 2)])
def test_dropout_stands_before_each_linear_layer(hidden: int, layers: int) -> None:
    module = build_network(but(dropout=0.25, hidden=hidden))
    assert isinstance(module, Convnet)
    order = [m for m in module.layers if isinstance(m, nn.Dropout | nn.Linear)]
    assert [type(m) for m in order] == [nn.Dropout, nn.Linear] * layers
    assert {m.p for m in order if isinstance(m, nn.Dropout)} == {0.25}


def test_dropout_changes_training_only() -> None:
    torch.manual_seed(0)
    module = build_network(but(dropout=0.5, batch_norm=False))
    x = images(8)
    assert not torch.equal(module.train()(x), module(x))
    assert torch.equal(module.eval()(x), module(x))


# --- shared ---


@pytest.mark.parametrize(("is_separable", "of_shared"), [(True, 4 * 9 + 4 * 4), (False, 4 * 4 * 9)])
def test_a_shared_network_s_convolution_is_counted_once(is_separable: bool, of_shared: int) -> None:
    config = dataclasses.replace(SHARED, separable=is_separable)
    norms = 4 * 2 * 4  # four, each of a scale and a bias a channel
    assert parameters(build_network(config)) == 4 * 25 + of_shared + norms + 4 * 2 * 2 * 10 + 10


@pytest.mark.parametrize("is_separable", [True, False])
def test_a_shared_network_computes_what_its_layers_do(is_separable: bool) -> None:
    module = build_network(dataclasses.replace(SHARED, separable=is_separable))
    assert isinstance(module, SharedNetwork)
    module.train()
    for _ in range(3):
        module(images(16))  # so that the norms have something to subtract
    module.eval()
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 4
    with torch.no_grad():
        x = F.relu(norms[0](F.conv2d(images(4), module.first.weight, stride=2, padding=2)))
        for norm, pool in zip(norms[1:], [2, 1, 3], strict=True):
            if isinstance(module.shared, nn.Sequential):
                each, point = module.shared
                x = F.conv2d(x, each.weight, padding=1, groups=4)
                x = torch.einsum("oi,nihw->nohw", point.weight[:, :, 0, 0], x)
            else:
                x = F.conv2d(x, module.shared.weight, padding=1)
            x = F.max_pool2d(F.relu(norm(x)), pool)
        expected = x.permute(0, 2, 3, 1).reshape(4, -1) @ module.head[1].weight.T
        torch.testing.assert_close(
            module(images(4)), expected + module.head[1].bias, atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"repeat_pools": [5, 3]}, ["model.repeat_pools=[5, 3]", "model.stride=2"]),
        ({"stride": 15}, ["model.repeat_pools=[2, 1, 3]", "model.stride=15"]),
        ({"kernel_size": 4}, ["model.kernel_size=4", "an odd integer"]),
        ({"repeat_pools": []}, ["repeat_pools"]),
        ({"width": 0}, ["width"]),
    ],
)
def test_an_impossible_shared_network_is_refused(values: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        dataclasses.replace(SHARED, **values)
    for field in named:
        assert field in str(caught.value)


# --- impossible combinations ---


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"kernel_sizes": [3, 3, 3]}, ["model.kernel_sizes=[3, 3, 3]", "model.widths=[16, 32]"]),
        ({"strides": [1, 1, 1]}, ["model.strides=[1, 1, 1]", "model.widths=[16, 32]"]),
        ({"pools": [2, 2, 2]}, ["model.pools=[2, 2, 2]", "model.widths=[16, 32]"]),
        ({"widths": [8], "pools": [2, 2]}, ["model.pools=[2, 2]", "model.widths=[8]"]),
        ({"pools": [6]}, ["model.pools=[6]", "model.strides=[1]", "2 convolutions"]),
        ({"strides": [15]}, ["model.pools=[2]", "model.strides=[15]"]),
        ({"widths": [4] * 5}, ["model.pools=[2]", "5 convolutions"]),
    ],
)
def test_an_impossible_combination_is_refused_by_both_names(
    values: dict[str, Any], named: list[str]
) -> None:
    with pytest.raises(ValidationError) as caught:
        but(**values)
    message = caught.value.errors()[0]["msg"]
    assert "\n" not in message
    for field in named:
        assert field in message
