"""The table of a network's layers."""

from digitlab.config.compose import compose
from digitlab.networks.table import build_network
from digitlab.study.layers import layer_rows
from digitlab.training.evaluate import count_parameters


def test_a_layer_that_is_applied_again_has_a_row_each_time_and_is_counted_once() -> None:
    config = compose("train", ["~experiments", "model=shared"])[0].config.model
    rows = layer_rows(config)
    assert [count for kind, _, count in rows if kind == "Conv2d"] == [25 * 16, 9 * 16 * 16, 0, 0, 0]
    assert sum(count for _, _, count in rows) == count_parameters(build_network(config))
