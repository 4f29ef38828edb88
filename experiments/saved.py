"""Compare a saved page with its network on all test images, in a browser: does it answer the same?

python experiments/saved.py champion
"""

import shutil
import sys
import tempfile
from pathlib import Path

import torch
from playwright.sync_api import sync_playwright

from digitlab.base.paths import lab_folder
from digitlab.data.datasets import TEST, load_digits
from digitlab.data.images import as_tensors
from digitlab.pages.export import save_page
from digitlab.records.reader import lab_tracker, load_run
from digitlab.training.evaluate import evaluate

COUNT = "images => images.map(pixels => [...compute(pixels).at(-1).data])"
lab = lab_folder()
row, config, network = load_run(lab_tracker(lab), sys.argv[1])
text = save_page(network, config, row.name)
images, _ = as_tensors(load_digits(lab, config.data.name, TEST))
expected = evaluate(network, images, config.data)
with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
    file = Path(folder) / "saved.html"
    file.write_text(text, encoding="utf-8")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))))
    browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
    page = browser.new_context(offline=True).new_page()
    page.goto(file.as_uri())
    parts = [page.evaluate(COUNT, part.tolist()) for part in images.flatten(1).split(500)]
    browser.close()
found = torch.tensor([logits for part in parts for logits in part])
same = int((found.argmax(1) == expected.argmax(1)).sum())
reach = float((found - expected).abs().max())
print(f"{row.name}: {len(text.encode()):,} bytes; the same digit on {same} of {len(images)} images")
print(f"largest difference of logits: {reach:.1e}")
