"""The page where a network is changed, trained and watched: in a browser, and its API."""

import http.client
import json
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import CallIn
from optuna.study import StudyDirection
from playwright.sync_api import Browser, Page
from serving import COMMAND, HOST, environment_of, free_port

from digitlab.base.errors import UserError
from digitlab.config.compose import compose
from digitlab.config.recorded import with_values
from digitlab.data.datasets import KNOWN, TEST, Known, load_digits
from digitlab.data.images import as_tensors
from digitlab.digits.prepare import scale
from digitlab.networks.table import build_network
from digitlab.pages.events import EventLog
from digitlab.pages.export import save_page
from digitlab.pages.form import Form
from digitlab.pages.moments import Moments
from digitlab.pages.play import Lesson, lesson_app
from digitlab.pages.search import ranges, search_words
from digitlab.pages.server import PageServer
from digitlab.records.mlflow import MlflowTracker
from digitlab.records.record import open_records
from digitlab.records.tracker import TrackerAway, TrackerRefused
from digitlab.study.samplers import searched_space
from digitlab.study.storage import open_storage
from digitlab.training.evaluate import evaluate
from digitlab.training.film import shown_steps

SAMPLE = ("data=sample", "trainer.epochs=2")
WAIT_S = 120.0  # for an event that must come: only a failing test takes so long


@dataclass(frozen=True)
class Lab:
    """A lab, and the page's server on it."""

    folder: Path
    lesson: Lesson
    port: int

    def ask(
        self, method: str, path: str, content: Any = None, **headers: str
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers, and the JSON or text that came back."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=30)
        body = content if isinstance(content, bytes | None) else json.dumps(content).encode()
        kind = {"Content-Type": "application/json"} if method == "POST" else {}
        sent = kind | {key.replace("_", "-"): value for key, value in headers.items()}
        try:
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        with suppress(ValueError):
            return answer.status, dict(answer.getheaders()), json.loads(text)
        return answer.status, dict(answer.getheaders()), text

    def tell(self, path: str, **content: Any) -> tuple[int, Any]:
        status, _, answer = self.ask("POST", path, content)
        return status, answer


@dataclass
class Tab:
    """Reads the events of a page as a tab of the browser does."""

    lab: Lab
    seen: list[dict[str, Any]] = field(default_factory=list)

    def __enter__(self) -> "Tab":
        self.connection = http.client.HTTPConnection(HOST, self.lab.port, timeout=WAIT_S)
        self.connection.request("GET", "/events")
        self.answer = self.connection.getresponse()
        assert self.answer.getheader("content-type", "").startswith("text/event-stream")
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def until(self, is_last: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        while line := self.answer.readline():
            if line.startswith(b"data: "):
                self.seen.append(json.loads(line.removeprefix(b"data: ")))
                if is_last(self.seen[-1]):
                    return self.seen[-1]
        raise AssertionError(f"the stream ended after {self.seen}")

    def state(self, *states: str) -> dict[str, Any]:
        return self.until(lambda event: event.get("state") in states)


@contextmanager
def served(folder: Path, *overrides: str) -> Iterator[Lab]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    form, port = Form(overrides or SAMPLE), free_port()
    with open_records(form.base.config, folder) as records:
        lesson = Lesson(form, folder, records)
        lesson.trainer()
        server = PageServer(lesson_app(lesson, "play"), port, lesson.log.close)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield Lab(folder, lesson, port)
        finally:
            server.handle_exit(signal.SIGTERM, None)
            thread.join()
            lesson.close()
            torch.set_num_threads(threads)


@pytest.fixture
def page_lab(lab: Path) -> Iterator[Lab]:
    with served(lab) as found:
        yield found


# ---- the form ------------------------------------------------------------------------------------


def test_form_has_limits_units_and_a_sentence_for_each_field() -> None:
    about = Form(["data=sample"]).describe()
    fields = {each["key"]: each for each in about["fields"]}
    assert fields["model.dropout"]["rule"] == "a number >= 0 and < 1"
    assert fields["data.augment.shift"]["about"] == "Largest shift along each axis, pixels."
    assert (fields["model.widths"]["min"], fields["trainer.epochs"]["kind"]) == (1, "integer")
    assert fields["optim.name"]["options"] == ["adamw", "adam", "sgd"]
    assert set(about["values"]) == set(fields)
    assert about["is_fixed"]  # the article's network, until a layer is changed


CHANGES: list[dict[str, Any]] = [
    {"model.widths": [64]},
    {"model.widths": [8, 16], "model.kernel_sizes": [3, 3], "model.strides": [1, 1],
     "model.pools": [2, 2]},
    {"model.widths": [8, 16], "model.kernel_sizes": [5, 3], "model.strides": [2, 1],
     "model.pools": [1, 2], "model.batch_norm": True, "model.dropout": 0.25, "model.hidden": 32},
    {"optim.name": "sgd", "optim.learning_rate": 0.05, "data.augment.rotate": 10,
     "data.batch_size": 64, "trainer.seed": 3, "trainer.epochs": 5},
    {"model.widths": [8] * 40, "model.kernel_sizes": [3] * 40, "model.strides": [1] * 40,
     "model.pools": [2, *[1] * 39]},
]  # fmt: skip


@pytest.mark.parametrize("values", CHANGES)
def test_the_printed_command_trains_what_the_form_shows(values: dict[str, Any]) -> None:
    form = Form(["data=sample"])
    found = form.check(values, is_fixed=False)
    composed = form.compose(values, is_fixed=False)
    again = compose("train", composed.overrides)[0].config
    assert again == composed.config
    plain = dict(values)
    assert with_values(composed.config, plain).optim == composed.config.optim
    network = build_network(composed.config.model)
    assert found["parameters"] == sum(p.numel() for p in network.parameters())
    assert found["layers"][-1]["shape"] == "10"
    assert found["command"].startswith("digitlab train experiments=seed data=sample model=convnet")
    keys = [word.partition("=")[0] for word in composed.overrides]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"model.pools": [40]}, r"model\.pools=\[40\] .* leaves no pixel of 28: it must leave one"),
        ({"model.kernel_sizes": [2]}, "must be a list of odd integers"),
        ({"trainer.epochs": 0}, r"trainer\.epochs=0 is invalid: it must be an integer >= 1\."),
        ({"optim.name": "lion"}, "must be one of adamw, adam, sgd"),
        ({"model.hidden": 5000}, r"31,\d+,\d+ parameters: it must have at most 5,000,000"),
        ({"tracking.uri": "http://evil"}, "no such field of the form"),
        ({"model.width": [3]}, r"no such field of the form, did you mean model\.widths"),
    ],
)
def test_what_is_impossible_is_explained(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        Form(["data=sample"]).check(values, is_fixed=False)


def test_moments_are_a_few_and_hold_each_epoch_s_end() -> None:
    assert shown_steps(1173, 391) == (0, 10, 20, 50, 100, 200, 391, 500, 782, 1000, 1173)
    assert shown_steps(3, 3) == (0, 3)


# ---- training ------------------------------------------------------------------------------------


def test_a_run_is_shown_moment_by_moment_and_recorded_as_any_run(page_lab: Lab) -> None:
    with Tab(page_lab) as tab:
        assert page_lab.tell("/train", is_fixed=True) == (200, {"run": 1})
        end = tab.state("finished", "failed")
        assert end["state"] == "finished", end
    moments = [event for event in tab.seen if event["kind"] == "moment"]
    assert [moment["step"] for moment in moments] == [0, 10, 20, 50, 100]
    assert moments[-1]["accuracy"] > 0.8 > moments[0]["accuracy"]
    epochs = [event for event in tab.seen if event["kind"] == "epoch"]
    # 400 validation images are fewer than 1,000, so both are measured on all of them.
    assert epochs[-1]["metrics"]["val_accuracy"] == moments[-1]["accuracy"]
    row = page_lab.lesson.records.tracker.get(end["run_id"])
    alone = compose("train", ["experiments=seed", *SAMPLE])[0].config
    assert {key: row.tags[f"digitlab.{key}"] for key in ("kind", "state", "recipe")} == {
        "kind": "train", "state": "finished", "recipe": "seed"}  # fmt: skip
    assert row.params["model.name"] == alone.model.name
    _, _, first = page_lab.ask("GET", "/look?run=1&step=0")
    _, _, last = page_lab.ask("GET", "/look?run=1&step=100&place=7")
    assert np.shape(first["filters"]) == (32, 3, 3)
    assert first["layers"][0]["name"] == "convolution 1 (32 filters)"
    assert [digit["place"] for digit in first["last"]] == [d["place"] for d in last["last"]]
    assert last["chosen"]["place"] == 7
    assert max(last["last"][0]["probabilities"]) == pytest.approx(1, abs=1)
    wrong = [d for d in last["last"] if np.argmax(d["probabilities"]) != d["label"]]
    assert len(wrong) >= min(10, round(400 * (1 - moments[-1]["accuracy"])))


def test_what_is_not_kept_is_named(page_lab: Lab) -> None:
    status, _, answer = page_lab.ask("GET", "/look?run=9&step=0")
    assert (status, answer["detail"][:29]) == (400, "Step 0 of run 9 is not kept: ")
    for run in ("live:9:0", "live:x", "nothing"):
        status, _, answer = page_lab.ask("GET", f"/save?run={run}")
        assert (status, set(answer)) == (400, {"detail"})


def test_one_run_at_a_time_pauses_goes_on_and_stops(page_lab: Lab) -> None:
    with Tab(page_lab) as tab:
        page_lab.tell("/train", values={"trainer.epochs": 500})
        tab.until(lambda event: event["kind"] == "moment")
        status, answer = page_lab.tell("/train")
        assert status == 409
        assert "one run at a time" in answer["detail"]
        assert page_lab.tell("/search", ticked=["model.hidden"], minutes=1)[0] == 409
        page_lab.tell("/control", action="pause")
        tab.state("paused")
        with Tab(page_lab) as other:  # a second tab, and a reload, know all of it
            assert other.state("paused")["run"] == 1
            assert {event["kind"] for event in other.seen} >= {"session", "run", "moment"}
            page_lab.tell("/control", action="continue")
            other.state("training")
            page_lab.tell("/control", action="stop")
            end = other.state("interrupted")
            other.until(lambda event: event["kind"] == "free")
        row = page_lab.lesson.records.tracker.get(end["run_id"])
        assert row.tags["digitlab.state"] == "interrupted"
        assert page_lab.tell("/train", values={"trainer.epochs": 1})[0] == 200
        assert tab.until(lambda e: e.get("run") == 2 and e.get("state") == "finished")


def test_a_run_that_is_stopped_before_it_trains_is_recorded_as_stopped(
    page_lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = page_lab.lesson.trainer()
    prepare = trainer.prepare
    monkeypatch.setattr(trainer, "prepare", lambda config: trainer.stop() or prepare(config))
    with Tab(page_lab) as tab:
        page_lab.tell("/train")
        end = tab.state("failed", "finished", "interrupted")
    assert (end["state"], end["text"]) == ("interrupted", "it was stopped")
    row = page_lab.lesson.records.tracker.get(end["run_id"])
    assert row.tags["digitlab.state"] == "interrupted"


def test_a_refused_record_is_said_and_the_next_run_is_not_blamed(page_lab: Lab) -> None:
    def refuse(*_: object) -> None:
        raise TrackerRefused("403")

    with Tab(page_lab) as tab:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MlflowTracker, "upload", refuse)
            page_lab.tell("/train", values={"trainer.epochs": 1})
            end = tab.state("failed", "finished")
            tab.until(lambda event: event["kind"] == "free")
        assert (end["state"], end["text"].count("was refused (403). It is kept")) == ("finished", 1)
        page_lab.tell("/train", values={"trainer.epochs": 1})
        end = tab.state("failed", "finished")
    assert (end["state"], "refused" in end["text"]) == ("finished", False)
    assert page_lab.lesson.records.tracker.get(end["run_id"]).tags["digitlab.state"] == "finished"


def test_a_record_that_waits_for_the_tracker_is_said(
    page_lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise TrackerAway("the artifacts cannot be stored")

    monkeypatch.setattr(MlflowTracker, "upload", away)
    monkeypatch.setattr("digitlab.records.outbox._RUN_S", 0.1)
    monkeypatch.setattr("digitlab.records.outbox._CLOSE_S", 0.1)
    with Tab(page_lab) as tab:
        page_lab.tell("/train", values={"trainer.epochs": 1})
        text = tab.state("failed", "finished")["text"]
    outbox = page_lab.folder / "outbox"
    assert text == f"1 record still in {outbox}, until the tracker answers again"


def test_moments_that_cannot_be_shown_are_left_out_and_nobody_waits_for_them(
    lab: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log: list[dict[str, Any]] = []
    moments = Moments(lab, lambda kind, **event: log.append(event | {"kind": kind}))
    config = compose("train", ["experiments=seed", "data=sample"])[0].config
    network = build_network(config.model)
    images = (torch.zeros(20, 1, 28, 28, dtype=torch.uint8), torch.arange(20) % 10)
    state = network.state_dict()
    snapshot = safetensors.torch.save
    moments.add(1, 0, config, snapshot(state), images)
    for step, value in enumerate((torch.nan, torch.inf, 3e38), 1):
        broken = {name: torch.full_like(tensor, value) for name, tensor in state.items()}
        moments.add(1, step, config, snapshot(broken), images)
    moments.add(1, 4, config, b"no weights", images)
    moments.add(1, 5, config, snapshot(state), images)
    waiting = threading.Thread(target=moments.join, daemon=True)
    waiting.start()
    waiting.join(WAIT_S)
    assert not waiting.is_alive()
    assert [event["step"] for event in log] == [0, 5]
    assert json.loads(json.dumps(log, allow_nan=False))[0]["images"] == 20
    assert "step 4 of run 1 cannot be shown: " in capsys.readouterr().err
    with pytest.raises(UserError, match="Step 1 of run 1 is not kept"):
        moments.look(1, 1, None)


@pytest.mark.slow
def test_a_run_that_diverges_says_so_and_the_page_goes_on(lab: Path) -> None:
    wild = ["optim=sgd", "optim.schedule=constant", "optim.learning_rate=10"]
    wild += ["optim.weight_decay=1"]
    with served(lab, *SAMPLE, *wild) as found, Tab(found) as tab:
        found.tell("/train", values={"trainer.epochs": 5})
        end = tab.state("failed", "finished")
        tab.until(lambda event: event["kind"] == "free")
        assert (end["state"], "the loss is " in end["text"]) == ("failed", True)
        json.dumps(tab.seen, allow_nan=False)  # or no tab can read it
        for moment in (event for event in tab.seen if event["kind"] == "moment"):
            assert found.ask("GET", f"/look?run=1&step={moment['step']}")[0] == 200
        found.tell("/train", values={"trainer.epochs": 1, "optim.learning_rate": 0.01})
        tab.until(lambda e: e.get("run") == 2 and e.get("state") == "finished")


@pytest.mark.slow
def test_a_ladder_says_what_was_changed_and_whether_that_is_chance(page_lab: Lab) -> None:
    with Tab(page_lab) as tab:
        for number, epochs in enumerate((1, 4), 1):
            page_lab.tell("/train", is_fixed=True, values={"trainer.epochs": epochs})
            ends = lambda e, n=number: e.get("run") == n and e.get("state") == "finished"  # noqa: E731
            said = tab.until(ends)["text"]
            tab.until(lambda event: event["kind"] == "free")
    assert re.fullmatch(
        r"better by \d+\.\d\d points than seed data=sample epochs=1: that is hardly chance", said
    )
    _, _, rungs = page_lab.ask("GET", "/ladder")
    assert [rung["name"] for rung in rungs] == [
        "seed data=sample epochs=4",
        "seed data=sample epochs=1",
    ]
    assert (rungs[0]["changed"], rungs[0]["difference"]) == ("epochs 1 -> 4", said)
    assert rungs[0]["values"]["trainer.epochs"] == 4
    assert rungs[0]["is_fixed"]


def test_ranges_lie_around_the_values_and_are_ones_that_a_sweep_takes() -> None:
    form = Form(["data=sample"])
    values = form.describe()["values"]
    ticked = ["model.widths", "model.hidden", "model.batch_norm", "model.dropout",
              "optim.learning_rate", "trainer.epochs"]  # fmt: skip
    found = ranges(values, ticked)
    assert found["model.widths"] == "choice([16],[32],[64])"
    deeper = {"model.widths": [8, 16], "model.pools": [2, 2], "model.kernel_sizes": [5, 5]}
    for values in ({}, deeper):
        words = search_words(form.compose(values, is_fixed=False), found, 2.5, "mine")
        study = compose("sweep", words)[0].config.study
        assert (set(study.space), study.name, study.minutes) == (set(ticked), "mine", 2.5)
    unlike = form.compose(deeper | {"model.pools": [1, 2]}, is_fixed=False)
    with pytest.raises(UserError, match="widths cannot be searched while layers differ"):
        search_words(unlike, found, 2.5, "mine")
    with pytest.raises(UserError, match=r"trainer\.seed cannot be searched from the page: it must"):
        ranges(values, ["trainer.seed"])


@pytest.mark.parametrize("recipe", ["default", "smoke", "smallest", "seed", "robust"])
def test_a_search_is_over_what_is_ticked_alone_and_trains_each_trial_to_the_end(
    recipe: str,
) -> None:
    form = Form([f"experiments={recipe}", "data=sample"])
    composed = form.compose({"trainer.epochs": 5}, is_fixed=False)
    words = search_words(composed, {"optim.learning_rate": "interval(0.01,0.1)"}, 3, "mine")
    config = compose("sweep", words)[0].config
    assert [one.name for one in searched_space(config)] == ["optim.learning_rate"]
    assert (config.study.pruner, config.study.rungs) == ("none", [])
    assert config.trainer == composed.config.trainer
    assert config.optim == composed.config.optim


@pytest.mark.slow
def test_a_search_fills_the_ladder_and_stops_when_asked(page_lab: Lab) -> None:
    with Tab(page_lab) as tab:
        small = {"model.widths": [4], "data.batch_size": 200, "trainer.epochs": 1}
        wish = {"values": small, "ticked": ["model.hidden", "optim.learning_rate"]}
        assert page_lab.tell("/search", minutes=0, **wish)[0] == 409
        assert page_lab.tell("/search", minutes=5, **wish)[0] == 200
        assert page_lab.tell("/train")[0] == 409
        tab.until(lambda event: event["kind"] == "search")
        deadline = time.monotonic() + WAIT_S
        while not (rungs := page_lab.ask("GET", "/ladder")[2]):
            assert time.monotonic() < deadline
        page_lab.tell("/control", action="stop")
        end = tab.state("interrupted", "finished", "failed")
    assert (end["state"], end["name"]) == ("interrupted", "play-1"), end
    assert "go on with" in end["text"]
    assert rungs[0]["name"].startswith("play-1-")


def test_a_search_takes_no_name_that_the_storage_has(
    page_lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    monkeypatch.setattr(page_lab.lesson.search, "start", lambda *asked: names.append(asked[-1]))
    # As a deleted study, it has no run that can be seen.
    open_storage(page_lab.folder).create_new_study([StudyDirection.MAXIMIZE], "play-1")
    assert page_lab.tell("/search", minutes=5, ticked=["model.hidden"])[0] == 200
    assert names == ["play-2"]


# ---- the saved page ------------------------------------------------------------------------------

NETWORKS = [
    ["experiments=seed"],
    ["experiments=default"],
    ["model=convnet", "model.widths=[4,8,8]", "model.kernel_sizes=[5,3,1]", "model.strides=[2,1,1]",
     "model.pools=[1,3,1]", "model.hidden=0", "model.dropout=0.5", "model.batch_norm=false"],
    ["model=shared", "model.width=6", "model.separable=true"],
]  # fmt: skip


@pytest.mark.parametrize("overrides", NETWORKS, ids=["article", "default", "mixed", "shared"])
def test_a_saved_page_computes_what_the_network_does(
    browser: Browser, lab: Path, tmp_path: Path, overrides: list[str]
) -> None:
    config = compose("train", overrides)[0].config
    torch.manual_seed(0)
    network = build_network(config.model)
    for name, value in network.state_dict().items():  # as if it had been trained
        if "running_mean" in name:
            value.normal_()
        elif "running_var" in name:
            value.uniform_(0.5, 2)
    images = as_tensors(load_digits(lab, "sample", TEST))[0][:500]
    text = save_page(network.eval(), config, "</script><b>seed & co", lab)
    assert len(text) < 2**20
    assert not re.search(r"https?://|src=|href=", text)
    file = tmp_path / "saved.html"
    file.write_text(text, encoding="utf-8")
    page = browser.new_context(offline=True).new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(file.as_uri())
    assert page.locator("h1").inner_text() == "</script><b>seed & co"
    count = "images => images.map(pixels => [...compute(pixels).at(-1).data])"
    found = torch.tensor(page.evaluate(count, images.flatten(1).tolist()))
    expected = evaluate(network, images, config.data)
    assert (found - expected).abs().max() < 1e-3
    assert (found.argmax(1) == expected.argmax(1)).all()
    assert errors == []


@pytest.mark.parametrize("mean", [0.9, 0.2])  # of dark ink on light paper, and the reverse
def test_a_saved_page_reads_classes_and_pictures_as_its_data_set_has_them(
    browser: Browser, lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mean: float
) -> None:
    known = Known({}, classes=("<ring>", "cross"), is_centred=False)
    monkeypatch.setitem(KNOWN, "shapes", known)
    config = compose("train", ["experiments=seed"])[0].config
    config = with_values(config, {"data.name": "shapes", "data.mean": mean})
    network = build_network(config.model)
    network.state_dict()["dense.bias"][1] = 1000
    file = tmp_path / "saved.html"
    file.write_text(save_page(network.eval(), config, "shapes", lab), encoding="utf-8")
    page = browser.new_context(offline=True).new_page()
    page.goto(file.as_uri())
    drawn = "ink.fillRect(0, 0, 95, 280); answer(); [...prepare(ink)]"
    found = np.reshape(page.evaluate(drawn), (28, 28))
    picture = np.full((280, 280), 255, np.float32)
    picture[:, :95] = 0
    expected = scale(picture if mean > 0.5 else 255 - picture)
    assert np.abs(found - expected).max() <= 1  # by rounding
    assert page.locator("#answer").inner_text() == "cross"
    assert page.locator("#likely").inner_text().startswith("cross: 100.0 %, ")


# ---- guards --------------------------------------------------------------------------------------

READ = ["/form", "/look?run=1&step=0", "/ladder", "/save?run=x", "/events"]
WRITTEN = ["/check", "/train", "/control", "/search"]


@pytest.mark.parametrize("headers", [
    {"Host": "evil.example"}, {"Host": "127.0.0.2"}, {"Origin": "http://evil.example"},
    {"Origin": "null"}, {"Origin": "http://127.0.0.1:1"},
])  # fmt: skip
def test_other_sites_are_refused_on_every_route(page_lab: Lab, headers: dict[str, str]) -> None:
    for method, paths in (("GET", READ), ("POST", WRITTEN)):
        for path in paths:
            status, _, answer = page_lab.ask(method, path, {} if method == "POST" else None,
                                             **headers)  # fmt: skip
            assert (status, set(answer)) == (403, {"detail"}), path


def test_bodies_must_be_short_json_of_the_form(page_lab: Lab) -> None:
    for path in WRITTEN:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
            assert page_lab.ask("POST", path, b"{}", Content_Type=kind)[0] == 415
        assert page_lab.ask("POST", path, b" " * (2**16 + 1))[0] == 413
        for body in (b"", b"[]", b"{", b'{"minutes": "1"}', b'{"action": "shut"}', b"\xff"):
            status, _, answer = page_lab.ask("POST", path, body)
            assert (status, set(answer)) == (400, {"detail"}), (path, body)
            assert "\n" not in answer["detail"]
    for query in ("run=x&step=0", "run=1", "step=1", "run=1&step=0&place=x"):
        assert page_lab.ask("GET", f"/look?{query}")[0] == 422
    assert page_lab.tell("/train", values={"tracking.uri": "http://evil"})[0] == 400
    status, headers, page = page_lab.ask("GET", "/")
    assert (status, headers["cache-control"]) == (200, "no-store")
    assert headers["content-security-policy"].startswith("default-src 'none'; connect-src 'self'")
    assert 'data-view="play"' in page


def test_every_route_is_described(page_lab: Lab) -> None:
    paths = page_lab.ask("GET", "/openapi.json")[2]["paths"]
    known = {path.partition("?")[0] for path in (*READ, *WRITTEN)}
    assert set(paths) == known | {"/", "/runs", "/predict", "/explain", "/likeness"}
    for path in WRITTEN:
        assert {"400", "403", "408", "409", "413", "415"} < set(paths[path]["post"]["responses"])


def test_too_many_tabs_are_refused_and_a_closed_log_ends_the_others(page_lab: Lab) -> None:
    tabs = [Tab(page_lab).__enter__() for _ in range(20)]
    for tab in tabs:
        tab.until(lambda event: event["kind"] == "session")
    assert page_lab.ask("GET", "/events")[0] == 503
    page_lab.lesson.log.close()
    for tab in tabs:
        while tab.answer.readline():
            continue
        tab.__exit__()


def test_a_log_that_nobody_reads_takes_events() -> None:
    log = EventLog()
    log.publish("free")
    log.close()
    assert not log.is_full


# ---- a person learns -----------------------------------------------------------------------------


def wait(page: Page, condition: str) -> None:
    """Until an expression holds; a policy forbids the page to evaluate texts by itself."""
    deadline = time.monotonic() + WAIT_S
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, page.locator("#state").inner_text()
        page.wait_for_timeout(20)


NEWEST = "[...lesson.values()].at(-1)"
READY = "!!form && isValid && !isBusy"


@contextmanager
def opened(browser: Browser, lab: Lab, **options: Any) -> Iterator[Page]:
    page = browser.new_page(**({"viewport": {"width": 1200, "height": 900}} | options))
    page.set_default_timeout(60_000)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda line: errors.extend([line.text] * (line.type == "error")))
    page.goto(f"http://{HOST}:{lab.port}/")
    wait(page, READY)
    yield page
    page.close()
    assert errors == []


def draw_seven(page: Page) -> None:
    page.locator("#paper").scroll_into_view_if_needed()
    box = page.locator("#paper").bounding_box()
    assert box
    places = [(0.3, 0.23), (0.69, 0.23), (0.45, 0.82)]
    points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in places]
    page.mouse.move(*points[0])
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(*point, steps=3)
    page.mouse.up()


def test_a_learner_trains_draws_widens_and_trains_again(
    browser: Browser, lab: Path, tmp_path: Path
) -> None:
    started = time.monotonic()
    with served(lab, "data=sample", "trainer.epochs=6") as found, opened(browser, found) as page:
        assert page.locator("#command").text_content() == (
            "digitlab train experiments=seed data=sample trainer.epochs=6"
        )
        page.get_by_role("button", name="Train", exact=True).click()
        wait(page, f"lesson.size === 1 && {NEWEST}.moments.length > 2")
        draw_seven(page)
        wait(page, f"{NEWEST}.state === 'finished' && !isBusy")
        wait(page, "!busy && !again && !isLooking")
        assert page.locator("#answer").inner_text()[-1] == "7"
        accuracies = page.evaluate(f"{NEWEST}.moments.map((moment) => moment.accuracy)")
        assert accuracies[-1] > 0.85 > accuracies[1] > accuracies[0]
        assert page.locator("#curve polyline").count() == 2
        assert page.locator(".last button").count() == 10
        page.locator("#moment").focus()
        page.keyboard.press("Home")  # back to the untrained network
        wait(page, "!busy && !again && !isLooking")
        assert re.fullmatch(
            r"step 0 of 300: \d+\.\d % of 400 validation images read right",
            page.locator("#when").inner_text(),
        )
        legend = page.locator("#curve text.run0").last.text_content()
        assert re.fullmatch(r"seed data=sample epochs=6: \d\d\.\d % of 400 images", legend or "")
        shown = page.locator(".last button span").all_inner_texts()
        wrong = [text for text in shown if not re.fullmatch(r"\d ✓ .*%", text)]
        assert wrong
        for text in wrong:
            assert re.fullmatch(r"is (\d), read as \d \(\1: [^)]+ %\)", text)
        page.locator("#convolutions input").first.fill("64")
        wait(page, "$('size').textContent === '126,090 parameters'")
        page.get_by_role("button", name="Train", exact=True).click()
        wait(page, f"lesson.size === 2 && {NEWEST}.state === 'finished' && !isBusy")
        said = page.locator("#state").inner_text()
        assert re.search(r"(better|worse) by \d\.\d\d points than seed|as good as seed", said), said
        page.locator("#beside").select_option("1")
        wait(page, "!isLooking && $('looks').children.length === 2")
        page.screenshot(path=tmp_path / "play.png", full_page=True)
        page.reload()
        wait(page, f"{READY} && lesson.size === 2 && $('ladder').children.length === 2")
        page.locator("#ladder button").last.click()
        wait(page, "isFixed || values['model.widths'][0] === 64")
    assert time.monotonic() - started < 90


def test_what_can_be_changed_stands_in_groups_with_units(browser: Browser, page_lab: Lab) -> None:
    with opened(browser, page_lab) as page:
        assert page.locator("#lead").inner_text() == (
            "Change the network, press Train, then draw a digit below."
        )
        heads = page.locator("#network h3").all_inner_texts()
        assert heads == ["Layers", "Training", "Changed images"]
        for group, labels in {
            "model": ["batch norm", "dropout", "hidden"],
            "training": ["epochs", "learning rate", "batch size", "optimizer", "seed"],
            "augment": ["shift (pixels)", "rotate (degrees)", "scale (0.1 is 10 %)",
                        "shear (degrees)", "erase (pixels)", "stroke (pixels)"],
        }.items():  # fmt: skip
            found = page.locator(f"#fields-{group} label").evaluate_all(
                "all => all.map((label) => label.firstChild.textContent)"
            )
            assert found == labels
        page.locator("#switch").click()
        assert not page.locator("#lead").is_visible()


def test_a_run_whose_network_no_form_can_show_brings_none_back(browser: Browser, lab: Path) -> None:
    with served(lab, *SAMPLE, "model=shared") as own, Tab(own) as tab:
        own.tell("/train", is_fixed=True, values={"trainer.epochs": 1})
        tab.state("finished", "failed")
        assert [rung["is_fixed"] for rung in own.ask("GET", "/ladder")[2]] == [True]
    with served(lab) as found, opened(browser, found) as page:  # the article's network
        wait(page, "$('ladder').children.length === 1")
        assert [rung["is_fixed"] for rung in found.ask("GET", "/ladder")[2]] == [False]
        assert page.locator("#ladder button").is_disabled()


def test_what_is_impossible_is_said_in_its_place_and_nothing_is_trained(
    browser: Browser, page_lab: Lab
) -> None:
    with opened(browser, page_lab) as page:
        page.get_by_label("pool").fill("40")
        wait(page, "!isValid")
        assert "leaves no pixel of 28" in page.locator("#problem").inner_text()
        assert page.locator("#train").is_disabled()
        page.get_by_label("pool").fill("2")
        wait(page, "isValid")
        page.get_by_role("button", name="Add a layer").click()
        wait(page, "$('drawn').children.length > 5 && isValid")
        assert not page.locator("#problem").is_visible()
        page.get_by_role("button", name="Remove convolution 2").click()
        page.get_by_role("button", name="own network").click()
        wait(page, "isFixed && $('drawn').children.length === 3")


def test_phone_and_keys_reach_every_control(
    browser: Browser, page_lab: Lab, tmp_path: Path
) -> None:
    phone = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
    with opened(browser, page_lab, color_scheme="dark", **phone) as page:
        page.screenshot(path=tmp_path / "phone.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        unnamed = """() => [...document.querySelectorAll('button, input, select')]
          .filter((e) => !e.disabled && e.offsetParent)
          .filter((e) => !(e.labels?.length || e.ariaLabel || e.textContent.trim()))
          .map((e) => e.outerHTML)"""
        assert page.evaluate(unnamed) == []
        reached = set()
        for _ in range(60):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.id"))
        assert {"run", "add", "train", "paper", "search", "minutes", "switch"} <= reached


# ---- the command ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_a_run_ends_clean(lab: Path, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    command = [*COMMAND, "play", *SAMPLE, "trainer.epochs=500", "--port", str(port)]
    with open(log, "wb") as file:
        process = subprocess.Popen(command, env=environment_of(lab), stdout=file, stderr=file)
    try:
        found, deadline = Lab(lab, None, port), time.monotonic() + WAIT_S  # type: ignore[arg-type]
        while True:
            try:
                assert found.tell("/train", is_fixed=True)[0] == 200
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
        with Tab(found) as tab:
            tab.until(lambda event: event["kind"] == "moment" and event["step"] >= 20)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
    finally:
        process.kill()
        process.wait()
    assert log.read_text() == f"play: http://127.0.0.1:{port}   (Ctrl-C ends it)\n"
    with open_records(compose("train", [])[0].config, lab) as records:
        assert records.outbox.adopt() == []
        [row] = records.tracker.find({"digitlab.kind": "train"})
    assert row.tags["digitlab.state"] == "interrupted"


MISTAKES = ["trainer.epochs=0", "data=mnis"]
MISTAKES += [] if torch.cuda.is_available() else ["trainer.device=cuda"]


@pytest.mark.parametrize("word", MISTAKES)
def test_a_mistake_is_one_line(lab: Path, call_in: CallIn, word: str) -> None:
    status, out, err = call_in(lab)("play", "data=sample", word)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"{word} is invalid" in err
