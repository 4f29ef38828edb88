"""The saved views, in MLflow's own format; tests/pages opens them in a browser."""

import base64
import json
import zlib
from dataclasses import replace
from typing import Any

from digitlab.config.compose import compose
from digitlab.records.views import view_addresses, view_tags

TWELVE = {
    "model.widths": "choice([16,24,48],[16,32,48],[16,32,64])",
    "model.hidden": "tag(log,int(interval(16,64)))",
    "model.dropout": "interval(0,0.5)",
    "data.batch_size": "choice(64,128,256)",
    "data.augment.shift": "interval(0,3)",
    "data.augment.rotate": "interval(0,20)",
    "data.augment.scale": "interval(0,0.2)",
    "optim.learning_rate": "tag(log,interval(0.003,0.03))",
    "optim.weight_decay": "tag(log,interval(0.0001,0.1))",
    "optim.label_smoothing": "interval(0,0.1)",
    "optim.warmup": "interval(0.1,0.5)",
    "trainer.epochs": "range(1,6)",
}
STUDY = compose("train", ["experiments=smoke"])[0].config.study


def state_of(tag: str) -> dict[str, Any]:
    """Return the state of a saved view, unpacked as MLflow's page does it."""
    kind, packed = json.loads(tag)["state"].split(";")
    assert kind == "deflate"
    return dict(json.loads(zlib.decompress(base64.b64decode(packed, validate=True))))


def test_view_of_twelve_hyperparameters_fits_into_a_tag_and_shows_them_all() -> None:
    tags = view_tags(replace(STUDY, name="a-study_of.mine", space=TWELVE))
    assert sorted(tags) == [
        "mlflow.sharedViewState.digitlab-a-study_of.mine-charts",
        "mlflow.sharedViewState.digitlab-a-study_of.mine-table",
    ]
    assert max(map(len, tags.values())) < 5000  # what MLflow takes
    for key, tag in tags.items():
        title = "charts" if key.endswith("charts") else "best first"
        assert json.loads(tag)["name"] == f"a-study_of.mine: {title}"
        state = state_of(tag)
        assert "'a-study_of.mine'" in state["searchFilter"]
        assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`val_accuracy`", False)
        columns = state["selectedColumns"]
        assert len(set(columns)) == len(columns)
        assert {f"params.`{name}`" for name in TWELVE} < set(columns)
        assert state["compareRunCharts"][0]["selectedParams"] == list(TWELVE)
        sections = {section["uuid"] for section in state["compareRunSections"]}
        assert {chart["metricSectionId"] for chart in state["compareRunCharts"]} == sections


def test_a_network_that_is_searched_is_shown_by_its_name() -> None:
    space = {"model": "choice(seed,convnet)", "optim.ema": "interval(0,0.9)"}
    state = state_of(next(iter(view_tags(replace(STUDY, space=space)).values())))
    assert {"params.`model.name`", "params.`optim.ema`"} < set(state["selectedColumns"])
    assert state["compareRunCharts"][0]["selectedParams"] == ["model.name", "optim.ema"]


def test_addresses_name_the_views_that_are_tagged() -> None:
    keys = {key.removeprefix("mlflow.sharedViewState.") for key in view_tags(STUDY)}
    addresses = view_addresses("http://there/#/runs?a=b", STUDY.name)
    assert {address.split("viewStateShareKey=")[1] for address in addresses.values()} == keys
    assert all(address.startswith("http://there/#/runs?a=b&") for address in addresses.values())
