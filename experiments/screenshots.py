"""Take the pictures of the README, from the lab's study, a running `make ui` and `make draw`.

python experiments/screenshots.py default http://127.0.0.1:5000 http://127.0.0.1:8000
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from digitlab.base.paths import lab_folder
from digitlab.records.reader import lab_tracker
from digitlab.records.views import view_addresses
from digitlab.study.trials import load_study

study, server, drawing = sys.argv[1:]
here = Path(__file__).parent
lab = lab_folder()


tracker, mine = lab_tracker(lab, []), {"digitlab.study_id": load_study(lab, study)[0].study_id}
parent = tracker.find(mine | {"digitlab.kind": "study"})[-1]
champion = tracker.find(mine | {"digitlab.kind": "champion"})[-1]
number = {"digitlab.trial": champion.tags["digitlab.trial"]}
trial = tracker.find(mine | number | {"digitlab.kind": "trial", "digitlab.state": "finished"})[-1]
report = here / f".{study}-report.html"
for run, path, file in (
    (trial.run_id, "pictures/evolution.png", here / f"{study}-evolution.png"),
    (champion.tags["digitlab.weights_run"], "pictures/misread.png", here / f"{study}-misread.png"),
    (parent.run_id, "report.html", report),
):
    file.write_bytes(tracker.artifact(run, path))

program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
    page = browser.new_page(viewport={"width": 1500, "height": 760})
    # MLflow opens its assistant beside the runs on a browser's first visit.
    for key, value in (("panelOpen_v1", "false"), ("fab.autoOpenedOnFirstLoad_v1", "true")):
        page.add_init_script(f"localStorage.setItem('mlflow.assistant.{key}', '{value}')")
    runs_page = f"{server}/#/experiments/{tracker.experiment}/runs?workflowType=machine_learning"
    for kind, address in view_addresses(runs_page, study).items():
        page.goto(address)
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
    three = [(0.3, 0.28), (0.5, 0.18), (0.68, 0.3), (0.5, 0.46), (0.7, 0.62), (0.5, 0.82)]
    three.append((0.28, 0.7))
    places = [(paper["x"] + x * paper["width"], paper["y"] + y * paper["height"]) for x, y in three]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=4)
    page.mouse.up()
    page.wait_for_timeout(3000)
    page.screenshot(path=here / "draw.png")
    page.set_viewport_size({"width": 1300, "height": 1500})
    page.get_by_role("button", name="watch it learn").click()
    page.locator("#train:enabled").click()
    page.get_by_text("is finished").wait_for(timeout=300_000)
    page.wait_for_timeout(3000)
    page.screenshot(path=here / "play.png")
    browser.close()
report.unlink()
