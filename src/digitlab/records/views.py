"""What MLflow's pages show of a study: its saved views.

A saved view is a tag of the experiment in MLflow's own format (3.17: mlflow.sharedViewState.<key>),
read by the runs page when its address carries the key. tests/pages opens them in a browser.
"""

import base64
import json
import zlib
from typing import Any

from digitlab.config.types import Pruner, StudyConfig
from digitlab.records.tracker import now_ms

_METRICS = ("model_parameters", "seconds", "images_per_second", "rung")


def view_tags(study: StudyConfig) -> dict[str, str]:
    """Return the tags of the experiment that hold a study's two saved views."""
    state = _state(study)
    names = {"table": "best first", "charts": "charts"}
    now = now_ms()
    tags = {}
    for kind, title in names.items():
        packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
        view = {"name": f"{study.name}: {title}", "createdAt": now, "updatedAt": now}
        value = json.dumps(view | {"state": f"deflate;{packed}"})
        tags[f"mlflow.sharedViewState.{_key(study.name, kind)}"] = value
    return tags


def view_addresses(page: str, study: str) -> dict[str, str]:
    """Return the addresses of a study's table and charts, from that of the runs page."""
    return {
        "table": f"{page}&viewStateShareKey={_key(study, 'table')}",
        "charts": f"{page}&compareRunsMode=CHART&viewStateShareKey={_key(study, 'charts')}",
    }


def _key(study: str, kind: str) -> str:
    return f"digitlab-{study}-{kind}"


def _state(study: StudyConfig) -> dict[str, Any]:
    """Return the view's state: the trials, best first, with what was searched and measured."""
    # The choice among a group's options is no parameter of a run; its settings are.
    names = [name if "." in name else f"{name}.name" for name in study.space]
    shown = names if "trainer.epochs" in names else [*names, "trainer.epochs"]
    pruning = study.pruner is not Pruner.none  # and pruned trials have an accuracy at a rung alone
    metric = "rung_accuracy" if pruning else "val_accuracy"
    columns = [
        "metrics.`val_accuracy`",
        *(["metrics.`rung_accuracy`"] if pruning else []),
        *(f"params.`{name}`" for name in shown),
        *(f"metrics.`{name}`" for name in _METRICS),
        "tags.`digitlab.state`",
    ]
    section = "digitlab"
    charts: list[dict[str, Any]] = [
        {"type": "PARALLEL", "selectedParams": names, "selectedMetrics": [metric]},
        {"type": "LINE", "metricKey": "val_accuracy", "selectedMetricKeys": ["val_accuracy"]},
        {
            "type": "SCATTER",
            "xaxis": {"key": "seconds", "type": "METRIC"},
            "yaxis": {"key": "val_accuracy", "type": "METRIC"},
        },
    ]
    plain: dict[str, Any] = {"deleted": False, "isGenerated": False, "metricSectionId": section}
    axis = {"xAxisKey": "step", "useGlobalXaxisKey": False, "showAllRuns": True}
    axis |= {"useGlobalLineSmoothing": False, "lineSmoothness": 0}  # shown as measured
    return {
        "searchFilter": f"tags.`digitlab.study` = '{study.name}' AND "
        "tags.`digitlab.kind` = 'trial'",
        "orderByKey": "metrics.`val_accuracy`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": columns,
        "columnOrder": columns,
        "columnWidths": dict.fromkeys(columns, 105),  # pixels
        "runsHiddenMode": "SHOW_ALL",
        "groupBy": None,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0},
        "compareRunCharts": [
            {"uuid": f"{section}-{i}", "runsCountToCompare": 1000, **plain, **axis, **chart}
            for i, chart in enumerate(charts)
        ],
        "compareRunSections": [
            {"uuid": section, "name": "The study", "display": True, "columns": 2}
            | {"cardHeight": 420, "isReordered": False, "deleted": False, "isGenerated": False}
        ],
    }
