"""How a study is laid out in MLflow's pages: its saved views, and the text on its own run.

A saved view is a tag of the experiment in MLflow's own format (3.17: mlflow.sharedViewState.<key>),
read by the runs page when its address carries the key. tests/test_ui.py opens them in a browser.
"""

import base64
import json
import time
import zlib
from typing import Any

from digitlab.config.types import Config, Pruner, StudyConfig
from digitlab.study.summary import sweep_command

_METRICS = ("model_parameters", "seconds", "images_per_second", "rung")


def view_tags(study: StudyConfig) -> dict[str, str]:
    """The tags of the experiment that hold a study's two saved views."""
    state = _state(study)
    names = {"table": "best first", "charts": "charts"}
    now = int(time.time() * 1000)  # MLflow counts milliseconds
    tags = {}
    for kind, title in names.items():
        packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
        told = {"name": f"{study.name}: {title}", "createdAt": now, "updatedAt": now}
        value = json.dumps(told | {"state": f"deflate;{packed}"})
        tags[f"mlflow.sharedViewState.{_key(study.name, kind)}"] = value
    return tags


def view_addresses(page: str, study: str) -> dict[str, str]:
    """The addresses of a study's table and charts, from that of the runs page."""
    return {
        "table": f"{page}&viewStateShareKey={_key(study, 'table')}",
        "charts": f"{page}&compareRunsMode=CHART&viewStateShareKey={_key(study, 'charts')}",
    }


def describe_study(config: Config, overrides: tuple[str, ...], champion: str = "") -> str:
    """What stands on the page of a study's own run: Markdown."""
    study = config.study
    space = [f"| `{knob}` | `{text}` |" for knob, text in study.space.items()]
    lines = [
        f"## Study {study.name}",
        f"{study.trials} trials ({study.sampler} sampler, {study.pruner} pruner), judged by "
        "`val_accuracy` on a validation set of the training images.",
        *("", "| knob | searched |", "|---|---|", *space, ""),
    ]
    if champion:
        lines += [
            "### Result",
            "```",
            champion,
            "```",
            "",
            "Artifacts: **report.html**, config.yaml.",
        ]
    else:
        lines += ["No champion yet."]
    lines += ["", f"Begin or go on: `{sweep_command(overrides)}`"]
    return "\n".join(lines)


def _key(study: str, kind: str) -> str:
    return f"digitlab-{study}-{kind}"


def _state(study: StudyConfig) -> dict[str, Any]:
    """The trials, best first; columns and charts of what was searched and what came of it."""
    knobs = list(study.space)
    shown = knobs if "trainer.epochs" in knobs else [*knobs, "trainer.epochs"]
    pruning = study.pruner is not Pruner.none  # and pruned trials have an accuracy at a rung alone
    judged = "rung_accuracy" if pruning else "val_accuracy"
    columns = [
        "metrics.`val_accuracy`",
        *(["metrics.`rung_accuracy`"] if pruning else []),
        *(f"params.`{knob}`" for knob in shown),
        *(f"metrics.`{name}`" for name in _METRICS),
        "tags.`digitlab.state`",
    ]
    section = "digitlab"
    charts: list[dict[str, Any]] = [
        {"type": "PARALLEL", "selectedParams": knobs, "selectedMetrics": [judged]},
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
