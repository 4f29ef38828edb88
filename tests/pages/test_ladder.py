"""The lab's runs, each compared with the one before it that it stands beside."""

from collections.abc import Mapping

from digitlab.config.compose import compose
from digitlab.config.recorded import config_to_yaml
from digitlab.config.types import Config
from digitlab.pages.ladder import Ladder
from digitlab.records.record import row_params
from digitlab.records.tracker import NoTracker, RunRow


class Recorded(NoTracker):
    """Finished runs without predictions, in the order in which they were trained."""

    def __init__(self) -> None:
        self.runs: list[RunRow] = []
        self.configs: dict[str, Config] = {}

    def add(self, name: str, accuracy: float, weights: str, *overrides: str, **tags: str) -> None:
        config = compose("train", overrides)[0].config
        tags = {"kind": "train", "recipe": config.study.name, "weights_sha256": weights} | tags
        named = {f"digitlab.{key}": value for key, value in tags.items()}
        metrics = {"val_accuracy": accuracy}
        params = row_params(config, "train")
        self.runs.append(RunRow(name, name, "FINISHED", named, params, metrics))
        self.configs[name] = config

    def find(self, tags: Mapping[str, str]) -> list[RunRow]:
        return self.runs

    def artifact(self, run_id: str, path: str) -> bytes:
        return config_to_yaml(self.configs[run_id]).encode()


SEED = "experiments=seed"


def ladder_of(tracker: Recorded) -> Ladder:
    return Ladder(tracker, compose("train", [SEED])[0].config)


def said(tracker: Recorded) -> dict[str, tuple[str, str]]:
    return {row.name: (row.changed, row.difference) for row in ladder_of(tracker).rows()}


def test_a_run_is_compared_with_the_last_one_of_its_recipe() -> None:
    tracker = Recorded()
    tracker.add("seed", 0.97, "a", SEED)
    study = {"kind": "trial", "recipe": "", "study_id": "1"}
    tracker.add("smoke-0", 0.90, "b", "experiments=smoke", **study)
    tracker.add("smoke-1", 0.98, "c", "experiments=smoke", "model.hidden=20", **study)
    tracker.add("other-0", 0.99, "c", "experiments=smoke", **study | {"study_id": "2"})
    tracker.add("fast98", 0.98, "d", "experiments=fast98")
    tracker.add("seed epochs=5", 0.975, "e", SEED, "trainer.epochs=5")
    ladder = ladder_of(tracker)
    assert ladder.conclude("seed epochs=5") == "better by 0.50 points than seed"
    assert ladder.conclude("seed") == ladder.conclude("fast98") == ""
    found = said(tracker)
    assert found["seed epochs=5"] == ("epochs 3 -> 5", "better by 0.50 points than seed")
    assert found["smoke-1"] == ("hidden 64 -> 20", "better by 8.00 points than smoke-0")
    assert found["other-0"] == found["smoke-0"] == ("", "")


def test_the_same_settings_are_called_the_same() -> None:
    tracker = Recorded()
    tracker.add("seed", 0.97, "a", SEED)
    tracker.add("seed #2", 0.97, "a", SEED)
    tracker.add("seed #3", 0.96, "b", SEED)
    assert said(tracker) == {
        "seed": ("", ""),
        "seed #2": ("", "the same settings as seed, and the same result"),
        "seed #3": ("", "with the same settings worse by 1.00 points than seed #2"),
    }


def test_what_another_network_has_beside_is_listed_and_names_say_of_what_they_are() -> None:
    tracker = Recorded()
    tracker.add("seed", 0.97, "a", SEED)
    model = ["model=convnet", "model.widths=[32,64]", "model.hidden=64"]
    tracker.add("wider", 0.98, "b", SEED, *model)
    tracker.add("sgd", 0.96, "c", SEED, *model, "optim=sgd", "model.batch_norm=false")
    found = said(tracker)
    changes = found["wider"][0].split(", ")
    assert changes[0] == "model seed -> convnet"
    assert {"batch_norm true", "hidden 64"} <= set(changes)
    assert "widths [32, 64]" in found["wider"][0]
    assert "optimizer adam -> sgd" in found["sgd"][0]
    assert "batch_norm true -> false" in found["sgd"][0]
