"""Why a network answers as it does: evidence by pixel, and what each layer sees."""

import re
import shutil
import struct
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import Call, CallIn
from mlflow import MlflowClient
from PIL import Image
from samples import copy_digits, recorded, studies
from torch import Tensor, nn

from digitlab.config.compose import compose
from digitlab.config.types import Config
from digitlab.data.datasets import TEST, load_digits
from digitlab.data.images import as_tensors
from digitlab.digits.explain import activations, attribution
from digitlab.networks.table import build_network
from digitlab.records.local import sqlite_uri
from digitlab.records.reader import load_run

RAW = Path(__file__).parents[1] / "support" / "digits" / "t10k-images-idx3-ubyte"
DIGITS = np.fromfile(RAW, np.uint8)[16:].reshape(-1, 28, 28)
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
    _, _, network = load_run(recorded(lab, "smoke").tracker, "champion")
    return network


@pytest.mark.parametrize("name", ["convnet", "seed", "strided", "trained"])
def test_reasons_add_up_to_what_the_image_adds_to_the_difference(name: str, lab: Path) -> None:
    """Completeness (Sundararajan et al. 2017)."""
    network = network_of(name, lab).eval()
    image = as_tensors(load_digits(lab, "sample", TEST, False))[0][7:8].float() / 255
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
def explain(lab: Path, call_in: CallIn) -> Call:
    call = call_in(lab)
    return lambda *arguments: call("explain", *arguments)


def read(lab: Path, index: int) -> tuple[int, Tensor]:
    """What test image `index` is, and the champion's probabilities when it was tested."""
    study = recorded(lab, "smoke")
    [champion] = study.runs(kind="champion")
    kept = study.tracker.artifact(champion.tags["digitlab.weights_run"], "predictions.safetensors")
    tensors = safetensors.torch.load(kept)
    return int(tensors["labels"][index]), tensors["logits"][index].softmax(0)


def test_explain_says_what_the_champion_reads_and_draws_why(lab: Path, explain) -> None:
    truth, probabilities = read(lab, 3)
    sure, digits = probabilities.topk(3)
    status, out, err = explain("3")
    assert (status, err) == (0, "")
    first, second = out.splitlines()
    ranked = list(zip(digits.tolist(), sure.tolist(), strict=True))
    said = ", ".join(f"{digit} {probability:.2%}" for digit, probability in ranked)
    assert first.startswith(f"test image 3, a {truth}: ")
    assert first.endswith(f" reads {said} (uncalibrated)")
    (best, _), (other, _), _ = ranked
    assert second.startswith(f"why {best} and not {other}, ")
    picture = Path(second.rsplit(": ", 1)[1])
    assert picture.parent == lab / "explained"
    assert picture.name.endswith(f"-3-{best}-not-{other}.png")
    assert size(picture)[0] > 500


def test_explain_takes_a_run_a_digit_and_a_file(lab: Path, explain, tmp_path: Path) -> None:
    row = next(row for row in recorded(lab, "smoke").store.rows() if row.state == "finished")
    target = tmp_path / "new" / "why.png"
    arguments = ("--run", f"smoke/{row.number}", "--out", str(target))
    _, out, _ = explain("499", *arguments)
    found = re.search(rf"smoke-{row.number} reads (\d) ", out)
    assert found
    assert str(target) in out
    first = target.read_bytes()
    other = (int(found[1]) + 5) % 10
    _, out, _ = explain("499", *arguments, "--against", str(other))
    assert f"why {found[1]} and not {other}," in out
    assert target.read_bytes() != first


def test_a_picture_is_explained_as_it_is_read_without_its_lines(explain, tmp_path: Path) -> None:
    picture = Image.new("L", (420, 140))
    picture.paste(Image.fromarray(DIGITS[0]).resize((112, 112)), (150, 14))
    picture.paste(255, (0, 68, 420, 72))
    picture.save(tmp_path / "crossed.png")
    status, out, err = explain(str(tmp_path / "crossed.png"))
    assert (status, err) == (0, "")
    assert "reads" in out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["500"], "a file, or the index of a test image, from 0 to 499"),
        (["-1"], "a file, or the index of a test image, from 0"),
        ([""], "a file, or the index of a test image, from 0"),
        (["three"], "three is missing: it must be a file"),
        (["3", "--against", "10"], "10"),
        (["3", "--run", "smoek"], "smoek: no such run"),
        (["3", "--run", "smoke"], "trained nothing itself"),
        (["3", "--run", "stopped-1"], "interrupted"),
    ],
)
def test_what_cannot_be_explained_is_refused_in_one_line(
    explain, arguments: list[str], named: str
) -> None:
    status, out, err = explain(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert named in err


def test_explain_knows_the_classes_of_the_data_set(call_in: CallIn, tmp_path: Path) -> None:
    lab = copy_digits(tmp_path / "lab")
    digits = load_digits(lab, "sample", TEST)
    for number, (image, label) in enumerate(zip(digits.images, digits.labels, strict=True)):
        if label < 3:
            folder = tmp_path / "photos" / ("ant", "bee", "cat")[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number}.png")
    call = call_in(lab)
    assert call("data", "beasts", "--from", str(tmp_path / "photos"))[0] == 0
    more = ("data.name=beasts", "data.validation_images=20", "data.batch_size=20", "name=wild")
    assert call("train", *SMALL, *more)[0] == 0
    status, out, err = call("explain", "0", "--run", "wild", "--against", "9")
    rule = "it must be a class of beasts: 0 (ant), 1 (bee), 2 (cat)."
    assert (status, out, err) == (2, "", f"digitlab: --against 9 is invalid: {rule}\n")
    for against in ("0", "1", "2"):
        status, out, _ = call("explain", "0", "--run", "wild", "--against", against)
        assert (status, bool(re.search(r"why (ant|bee|cat) and not (ant|bee|cat),", out))) == (0, 1)


def test_the_answer_itself_is_compared_with_the_next_best(
    lab: Path, explain, tmp_path: Path
) -> None:
    best, second = read(lab, 3)[1].topk(2).indices.tolist()
    _, out, _ = explain("3", "--against", str(best), "--out", str(tmp_path / "why.png"))
    assert f"why {best} and not {second}," in out


def test_run_whose_name_is_a_path_writes_in_the_lab_alone(lab: Path, explain) -> None:
    [champion] = recorded(lab, "smoke").runs(kind="champion")
    run_id = champion.tags["digitlab.weights_run"]
    client = MlflowClient(sqlite_uri(lab))
    name = client.get_run(run_id).info.run_name
    client.set_tag(run_id, "mlflow.runName", "../../../evil/x\x1b[31m")
    try:
        status, out, _ = explain("3", "--run", run_id)
    finally:
        client.set_tag(run_id, "mlflow.runName", name)
    assert status == 0
    picture = Path(out.splitlines()[1].rsplit(": ", 1)[1])
    assert picture.parent == lab / "explained"
    assert re.fullmatch(r"[\w.=,-]+\.png", picture.name)


def test_picture_that_cannot_be_written_is_reported_in_one_line(explain, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    status, _, err = explain("3", "--out", str(tmp_path / "file" / "why.png"))
    assert (status, err.count("\n")) == (2, 1)
    assert f"--out {tmp_path / 'file' / 'why.png'} cannot be written" in err


def test_an_option_that_was_not_given_is_not_named(
    lab: Path, tmp_path: Path, call_in: CallIn
) -> None:
    mine = shutil.copytree(lab, tmp_path / "lab")
    shutil.rmtree(mine / "explained", ignore_errors=True)
    (mine / "explained").touch()
    status, _, err = call_in(mine)("explain", "3", "--run", "smoke/champion")
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith(f"digitlab: {mine / 'explained'}")
    assert err.endswith("Repair that folder.\n")


# ---- the film ------------------------------------------------------------------------------------


def test_runs_with_a_validation_set_keep_their_film_and_final_fits_none(lab: Path) -> None:
    study = recorded(lab, "smoke")
    kept = {}
    for kind in ("trial", "confirm", "final"):
        for row in study.runs(kind=kind, state="finished"):
            folder = lab / "artifacts" / row.run_id / "artifacts" / "pictures"
            kept[row.run_id] = (kind, (folder / "evolution.png").exists())
    assert {kind for kind, _ in kept.values()} == {"trial", "confirm", "final"}
    assert all(is_there == (kind != "final") for kind, is_there in kept.values()), kept


def size(picture: Path) -> tuple[int, int]:
    """Width and height of a PNG, in pixels."""
    content = picture.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    return width, height
