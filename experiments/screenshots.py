"""The pictures of the README, from a real study, a running `make ui` and a running `make draw`.

python experiments/screenshots.py default http://127.0.0.1:5000 http://127.0.0.1:8000
"""

import json
import shutil
import sys
import urllib.request
from pathlib import Path

from playwright.sync_api import sync_playwright

study, server, drawing = sys.argv[1:]
here = Path(__file__).parent


def ask(path: str, **body: object) -> dict:
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{server}/api/2.0/mlflow/{path}", data)  # noqa: S310
    request.add_header("Content-Type", "application/json")
    return json.load(urllib.request.urlopen(request))  # noqa: S310


def artifact(run: str, path: str) -> bytes:
    address = f"{server}/get-artifact?path={path}&run_uuid={run}"
    return urllib.request.urlopen(address).read()  # noqa: S310


experiment = ask("experiments/search", max_results=9, filter="name = 'digitlab'")["experiments"][0]
mine = f"tags.`digitlab.study` = '{study}' AND tags.`digitlab.kind` = "
runs = {
    kind: ask("runs/search", experiment_ids=[experiment["experiment_id"]], filter=f"{mine}'{kind}'")
    for kind in ("study", "champion", "final", "trial")
}
parent = runs["study"]["runs"][0]["info"]["run_id"]
[champion] = runs["champion"]["runs"]
tags = {tag["key"]: tag["value"] for tag in champion["data"]["tags"]}
[trial] = [
    run["info"]["run_id"]
    for run in runs["trial"]["runs"]
    if {"key": "digitlab.trial", "value": tags["digitlab.trial"]} in run["data"]["tags"]
]
(here / f"{study}-evolution.png").write_bytes(artifact(trial, "pictures/evolution.png"))
misread = artifact(tags["digitlab.weights_run"], "pictures/misread.png")
(here / f"{study}-misread.png").write_bytes(misread)
report = here / f".{study}-report.html"
report.write_bytes(artifact(parent, "report.html"))

program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
    page = browser.new_page(viewport={"width": 1500, "height": 760})
    # MLflow opens its assistant beside the runs on a browser's first visit.
    for key, value in (("panelOpen_v1", "false"), ("fab.autoOpenedOnFirstLoad_v1", "true")):
        page.add_init_script(f"localStorage.setItem('mlflow.assistant.{key}', '{value}')")
    runs_page = (
        f"{server}/#/experiments/{experiment['experiment_id']}/runs?workflowType=machine_learning"
    )
    for kind, mode in (("table", ""), ("charts", "&compareRunsMode=CHART")):
        page.goto(f"{runs_page}{mode}&viewStateShareKey=digitlab-{study}-{kind}")
        page.get_by_text(f"{study}-", exact=False).first.wait_for()
        page.wait_for_timeout(3000)  # ms; charts are drawn one after another
        page.screenshot(path=here / f"{study}-{kind}.png")
    page.set_viewport_size({"width": 1000, "height": 1500})
    page.goto(report.as_uri())
    page.wait_for_timeout(3000)
    page.screenshot(path=here / f"{study}-report.png")
    page.set_viewport_size({"width": 1000, "height": 900})
    page.goto(drawing)
    page.locator("#run option").first.wait_for(state="attached")
    paper = page.locator("#paper").bounding_box()
    three = [
        (0.3, 0.28),
        (0.5, 0.18),
        (0.68, 0.3),
        (0.5, 0.46),
        (0.7, 0.62),
        (0.5, 0.82),
        (0.28, 0.7),
    ]
    places = [(paper["x"] + x * paper["width"], paper["y"] + y * paper["height"]) for x, y in three]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=4)
    page.mouse.up()
    page.wait_for_timeout(3000)
    page.screenshot(path=here / "draw.png")
    browser.close()
report.unlink()
