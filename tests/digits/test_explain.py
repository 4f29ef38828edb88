"""Why a network says what it says, and the film of how it learned to."""

import hashlib
import re
import struct
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import pytest
import safetensors.torch
import torch
from mlflow import MlflowClient
from test_report import recorded, studies
from torch import Tensor, nn

from digitlab.cli import main
from digitlab.config.compose import compose
from digitlab.config.types import Config
from digitlab.data.datasets import TEST, load_digits
from digitlab.digits.explain import activations, attribution
from digitlab.networks.table import build_network
from digitlab.records.mlflow import RunRecord, Tracking, sqlite_uri
from digitlab.records.reader import recorded_config
from digitlab.records.record import Identity
from digitlab.study import run
from digitlab.study.run import perform
from digitlab.training import fit as training
from digitlab.training.fit import Fit, Frame, Watch, fit
from digitlab.training.pictures import draw_film

SMALL = ["experiments=smoke", "data=sample", "data.batch_size=400", "trainer.epochs=2"]
SMALL += ["model.widths=[4,6]", "model.hidden=16", "trainer.seed=5"]


@cache
def configure(*overrides: str) -> Config:
    return compose("train", [*SMALL, *overrides])[0].config


def fresh(*overrides: str) -> nn.Module:
    """A network that has seen nothing, but for statistics of its norms that are not 0 and 1."""
    torch.manual_seed(11)
    network = build_network(configure(*overrides).model)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.running_mean.uniform_(-1, 1)
            layer.running_var.uniform_(0.5, 2)
    return network.eval()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a study that was run to its end."""
    return studies(tmp_path_factory)


# ---- which pixels spoke for the answer -----------------------------------------------------------


def network_of(name: str, lab: Path) -> nn.Module:
    """A network of a model's name, untrained, or the one that the study trained."""
    if name != "trained":
        torch.manual_seed(4)
        return build_network(compose("train", ["data=sample", f"model={name}"])[0].config.model)
    study = recorded(lab, "smoke")
    run = study.search.notes()["champion"]["run_id"]
    network = build_network(recorded_config(study.tracking, study.tracking.get(run)).model)
    weights = safetensors.torch.load(study.tracking.artifact(run, "weights.safetensors"))
    network.load_state_dict(weights)
    return network


@pytest.mark.parametrize("name", ["convnet", "seed", "strided", "trained"])
def test_reasons_add_up_to_what_the_image_adds_to_the_difference(name: str, lab: Path) -> None:
    """Completeness (Sundararajan et al. 2017)."""
    network = network_of(name, lab).eval()
    image = load_digits(lab, "sample", TEST, False).images[7][None, None].float() / 255
    image = (image - 0.1307) / 0.3081
    black = torch.full_like(image, -0.1307 / 0.3081)
    with torch.no_grad():
        added = (network(image) - network(black))[0]
    for said, other in ((3, 8), (8, 3), (0, 9)):
        reasons = attribution(network, image, said, other)
        assert reasons.shape == (28, 28)
        assert not reasons.requires_grad
        expected = float(added[said] - added[other])
        assert float(reasons.sum()) == pytest.approx(expected, abs=0.02 * float(added.abs().max()))
        assert float(reasons[image[0, 0] == image.min()].abs().max()) == 0  # of black pixels


def test_reasons_of_a_linear_network_are_its_weights_times_the_pixels() -> None:
    torch.manual_seed(2)
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    image = torch.rand(1, 1, 28, 28)
    reasons = attribution(network, image, 4, 1)
    weights = network[1].weight.detach()
    expected = (weights[4] - weights[1]).view(28, 28) * (image[0, 0] - image.min())
    torch.testing.assert_close(reasons, expected, atol=1e-5, rtol=1e-4)


# ---- what each layer sees ------------------------------------------------------------------------


def test_every_layer_but_the_last_gives_its_maps_after_its_activation() -> None:
    network = fresh("model.widths=[4,6,5]", "model.kernel_sizes=[5,3,3]", "model.hidden=24")
    image = torch.rand(1, 1, 28, 28)
    maps, logits = activations(network, image)
    assert {name: tuple(layer.shape) for name, layer in maps.items()} == {
        "convolution 1 (4 filters)": (4, 14, 14),
        "convolution 2 (6 filters)": (6, 7, 7),
        "convolution 3 (5 filters)": (5, 3, 3),
        "dense 1 (24 units)": (1, 4, 6),
    }
    assert all(float(layer.min()) == 0 for layer in maps.values())
    with torch.no_grad():
        torch.testing.assert_close(logits, network(image))


@pytest.mark.parametrize("overrides", [(), ("model.pools=[1]",), ("model.pools=[2]",)])
@pytest.mark.parametrize("norm", ["true", "false"])
def test_first_maps_are_those_of_the_layers_up_to_the_first_relu(
    overrides: tuple[str, ...], norm: str
) -> None:
    network = fresh("model.widths=[8]", f"model.batch_norm={norm}", *overrides)
    image = torch.rand(1, 1, 28, 28)
    maps, _ = activations(network, image)
    layers = next(iter(network.children()))
    end = next(i for i, layer in enumerate(layers) if isinstance(layer, nn.ReLU))
    with torch.no_grad():
        expected = layers[: end + 1](image)[0]
    torch.testing.assert_close(maps["convolution 1 (8 filters)"], expected)


def test_activation_counts_that_is_a_function_and_not_a_module() -> None:
    network = network_of("seed", Path("/nonexistent")).eval()
    maps, _ = activations(network, torch.rand(1, 1, 28, 28))
    assert [(name, tuple(layer.shape)) for name, layer in maps.items()] == [
        ("convolution 1 (32 filters)", (32, 13, 13))
    ]
    assert float(maps["convolution 1 (32 filters)"].min()) == 0


# ---- from the command line -----------------------------------------------------------------------


@pytest.fixture
def explain(lab: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.setenv("DIGITLAB_HOME", str(lab))
    return lambda *arguments: main(["explain", *arguments])


def read(lab: Path, index: int) -> tuple[int, Tensor]:
    """What test image `index` is, and the champion's probabilities when it was tested."""
    study = recorded(lab, "smoke")
    champion = study.tracking.find({"digitlab.study": "smoke", "digitlab.kind": "champion"})[0]
    kept = study.tracking.artifact(champion.tags["digitlab.weights_run"], "predictions.safetensors")
    tensors = safetensors.torch.load(kept)
    return int(tensors["labels"][index]), tensors["logits"][index].softmax(0)


def test_explain_says_what_the_champion_reads_and_draws_why(
    lab: Path, explain, capsys: pytest.CaptureFixture[str]
) -> None:
    truth, probabilities = read(lab, 3)
    sure, digits = probabilities.topk(3)
    assert explain("3") == 0
    told = capsys.readouterr()
    assert told.err == ""
    first, second = told.out.splitlines()
    ranked = list(zip(digits.tolist(), sure.tolist(), strict=True))
    said = ", ".join(f"{digit} {probability:.2%}" for digit, probability in ranked)
    assert first.startswith(f"test image 3, a {truth}: ")
    assert first.endswith(f" reads {said}")
    (best, _), (other, _), _ = ranked
    assert second.startswith(f"why {best} and not {other}, ")
    picture = Path(second.rsplit(": ", 1)[1])
    assert picture.parent == lab / "explained"
    assert picture.name.endswith(f"-3-{best}-not-{other}.png")
    assert size(picture)[0] > 500


def test_explain_takes_a_run_a_digit_and_a_file(
    lab: Path, explain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = next(row for row in recorded(lab, "smoke").search.rows() if row.state == "finished")
    target = tmp_path / "new" / "why.png"
    arguments = ("--run", f"smoke/{row.number}", "--out", str(target))
    assert explain("499", *arguments) == 0
    told = capsys.readouterr().out
    found = re.search(rf"smoke-{row.number} reads (\d) ", told)
    assert found
    assert str(target) in told
    first = target.read_bytes()
    other = (int(found[1]) + 5) % 10
    assert explain("499", *arguments, "--against", str(other)) == 0
    assert f"why {found[1]} and not {other}," in capsys.readouterr().out
    assert target.read_bytes() != first


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["500"], "a file, or an index of a test image, 0 to 499"),
        (["-1"], "-1: no such file"),
        (["three"], "three: no such file"),
        (["3", "--against", "10"], "10"),
        (["3", "--run", "smoek"], "smoek: no such run"),
        (["3", "--run", "smoke"], "trained nothing itself"),
        (["3", "--run", "stopped-1"], "running"),
    ],
)
def test_what_cannot_be_explained_is_refused_in_one_line(
    explain, arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain(*arguments) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert named in told.err
    assert told.err.count("\n") == 1


def test_the_answer_itself_is_compared_with_the_next_best(
    lab: Path, explain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best, second = read(lab, 3)[1].topk(2).indices.tolist()
    assert explain("3", "--against", str(best), "--out", str(tmp_path / "why.png")) == 0
    assert f"why {best} and not {second}," in capsys.readouterr().out


def test_run_whose_name_is_a_path_writes_in_the_lab_alone(
    lab: Path, explain, capsys: pytest.CaptureFixture[str]
) -> None:
    study = recorded(lab, "smoke")
    row = next(row for row in study.search.rows() if row.state == "finished")
    run_id = study.tracking.get(f"smoke-{row.number}").run_id
    client = MlflowClient(sqlite_uri(lab))
    client.set_tag(run_id, "mlflow.runName", "../../../evil/x\x1b[31m")
    try:
        assert explain("3", "--run", run_id) == 0
    finally:
        client.set_tag(run_id, "mlflow.runName", f"smoke-{row.number}")
    picture = Path(capsys.readouterr().out.splitlines()[1].rsplit(": ", 1)[1])
    assert picture.parent == lab / "explained"
    assert re.fullmatch(r"[\w.=,-]+\.png", picture.name)


def test_picture_that_cannot_be_written_is_told_in_one_line(
    explain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert explain("3", "--out", str(tmp_path / "file" / "why.png")) == 2
    told = capsys.readouterr().err
    assert str(tmp_path / "file" / "why.png") in told
    assert told.count("\n") == 1


# ---- the film ------------------------------------------------------------------------------------

# Everything that draws on chance or keeps a state, which a film must not touch.
LIVELY = ["model.dropout=0.3", "data.augment.shift=2", "optim.ema=0.9"]


def digest(weights: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(safetensors.torch.save(dict(weights))).hexdigest()


@pytest.fixture(scope="module")
def filmed(lab: Path) -> Fit:
    return fit(configure(*LIVELY), lab, Watch())


def test_film_has_a_frame_before_training_and_one_after_each_epoch(filmed: Fit) -> None:
    assert [frame.epoch for frame in filmed.film] == [0, 1, 2]
    for frame in filmed.film:
        assert frame.probabilities.shape == (10, 10)
        torch.testing.assert_close(frame.probabilities.sum(1), torch.ones(10))
        assert frame.filters.shape == (4, 3, 3)
    firsts = [int((filmed.labels == digit).nonzero()[0]) for digit in range(10)]
    last = filmed.film[-1]
    torch.testing.assert_close(last.probabilities, filmed.logits[firsts].softmax(1))
    filters = next(value for value in filmed.weights.values() if value.ndim == 4)
    torch.testing.assert_close(last.filters, filters.mean(1))
    assert not torch.equal(filmed.film[0].filters, filmed.film[1].filters)
    torch.manual_seed(5)
    untrained = next(p for p in build_network(configure(*LIVELY).model).parameters() if p.ndim == 4)
    torch.testing.assert_close(filmed.film[0].filters, untrained.detach().mean(1))


def test_film_changes_nothing_of_what_is_learned(
    filmed: Fit, lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training._Loop, "on_train_start", lambda *_: None)
    monkeypatch.setattr(training._Loop, "_frame", lambda *_: None)
    plain = fit(configure(*LIVELY), lab, Watch())
    assert plain.film == []
    assert digest(plain.weights) == digest(filmed.weights)
    assert torch.equal(plain.logits, filmed.logits)


def test_final_fits_have_no_film(lab: Path) -> None:
    assert fit(configure("data.evaluate_on=test", "trainer.epochs=1"), lab, Watch()).film == []


def test_runs_with_a_holdout_keep_their_film_as_a_picture_and_final_fits_none(lab: Path) -> None:
    study = recorded(lab, "smoke")
    pictures = {}
    for kind in ("trial", "confirm", "final"):
        for row in study.tracking.find({"digitlab.study": "smoke", "digitlab.kind": kind}):
            if row.tags["digitlab.state"] == "finished":
                folder = lab / "artifacts" / row.run_id / "artifacts" / "pictures"
                pictures[row.name] = (kind, (folder / "evolution.png").exists())
    assert {kind for kind, _ in pictures.values()} == {"trial", "confirm", "final"}
    assert all(there == (kind != "final") for kind, there in pictures.values()), pictures


def size(picture: Path) -> tuple[int, int]:
    """Width and height of a PNG, in pixels."""
    content = picture.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def film(epochs: int) -> list[Frame]:
    chance = torch.Generator().manual_seed(epochs)
    return [
        Frame(epoch, torch.rand(10, 10, generator=chance), torch.rand(4, 3, 3, generator=chance))
        for epoch in range(epochs + 1)
    ]


def test_picture_of_a_film_grows_with_its_frames_up_to_nine(tmp_path: Path) -> None:
    images, labels = torch.zeros(10, 1, 28, 28, dtype=torch.uint8), torch.arange(10)
    widths = []
    for epochs in (1, 2, 8, 30):
        draw_film(film(epochs), images, labels, tmp_path)
        widths.append(size(tmp_path / "evolution.png")[0])
    one = widths[1] - widths[0]
    assert one > 50
    assert widths[2] - widths[0] == pytest.approx(7 * one, abs=9)
    assert widths[3] == widths[2]
    first = (tmp_path / "evolution.png").read_bytes()
    whole = film(30)
    changed = Frame(30, 1 - whole[-1].probabilities, whole[-1].filters)
    draw_film([*whole[:-1], changed], images, labels, tmp_path)
    assert (tmp_path / "evolution.png").read_bytes() != first, "the last frame is not shown"


def test_film_of_a_holdout_that_lacks_a_digit_and_of_a_network_without_filters(
    tmp_path: Path,
) -> None:
    nine = Frame(0, torch.full((9, 10), 0.1), torch.empty(0, 1, 1))
    images, labels = torch.zeros(9, 1, 28, 28, dtype=torch.uint8), torch.arange(9)
    draw_film([nine], images, labels, tmp_path)
    assert size(tmp_path / "evolution.png")[1] > 100


def test_picture_that_fails_is_the_failure_of_its_run(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose record is not whole must not count as finished."""

    def broken(*_: object) -> None:
        raise ValueError("no ink")

    monkeypatch.setattr(run, "draw_film", broken)
    ends: list[str] = []
    monkeypatch.setattr(RunRecord, "end", lambda _, state: ends.append(state))
    config = configure("trainer.epochs=1")
    done = perform(config, Identity("inky", "train"), Tracking(), lab, Watch())
    assert (done.state, ends) == ("failed", ["failed"])
    assert "no ink" in done.reason
