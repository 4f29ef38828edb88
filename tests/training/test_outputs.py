"""The files of a fit: weights, predictions and pictures."""

import json
import struct
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image
from small import configure, train

from digitlab.networks.table import build_network
from digitlab.training.checkpoint import Earlier
from digitlab.training.film import Frame, learned_last
from digitlab.training.fit import FitResult
from digitlab.training.outputs import output_files

WITHOUT_FILM = FitResult({}, torch.eye(10), torch.arange(10), torch.zeros(10, 1, 28, 28).byte(),
                         {}, {}, [], {}, list("0123456789"), Earlier())  # fmt: skip


def size(picture: bytes) -> tuple[int, int]:
    """Width and height of a PNG, in pixels."""
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", picture[16:24])
    return width, height


def test_files_of_a_fit_give_its_network_and_its_answers_back(lab: Path) -> None:
    fitted = train(lab, "trainer.epochs=1")
    files = output_files(fitted)
    pictures = ["pictures/confusion.png", "pictures/evolution.png", "pictures/misread.png"]
    others = ["pictures/evolution.gif", "predictions.safetensors", "weights.safetensors"]
    assert sorted(files) == sorted([*pictures, *others])
    network = build_network(configure().model)
    network.load_state_dict(safetensors.torch.load(files["weights.safetensors"]))
    predictions = safetensors.torch.load(files["predictions.safetensors"])
    assert torch.equal(predictions["logits"], fitted.logits)
    assert predictions["predictions"].tolist() == fitted.logits.argmax(1).tolist()
    assert predictions["labels"].tolist() == fitted.labels.tolist()
    assert all(min(size(files[name])) > 100 for name in pictures)


def test_weights_name_their_layout_and_format() -> None:
    content = output_files(WITHOUT_FILM)["weights.safetensors"]
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert header["__metadata__"] == {"layout": "channels_last", "format": "1"}


def test_same_fit_gives_the_same_bytes(lab: Path) -> None:
    fitted = train(lab, "trainer.epochs=1")
    files = output_files(fitted)
    for _ in range(5):  # safetensors alone has two orders of its metadata
        assert output_files(fitted) == files


def pictures_of(fitted: FitResult) -> list[str]:
    return [name for name in output_files(fitted) if name.startswith("pictures/")]


def test_pictures_are_those_that_have_something_to_show() -> None:
    assert pictures_of(WITHOUT_FILM) == ["pictures/confusion.png"]
    wrong = replace(WITHOUT_FILM, logits=torch.eye(10)[[7, *range(1, 10)]])
    assert pictures_of(wrong) == ["pictures/confusion.png", "pictures/misread.png"]


def film(epochs: int) -> list[Frame]:
    noise = torch.Generator().manual_seed(epochs)
    return [
        Frame(
            f"epoch {epoch}",
            torch.rand(10, 10, generator=noise),
            torch.rand(4, 3, 3, generator=noise),
        )
        for epoch in range(epochs + 1)
    ]


def evolution(frames: list[Frame], kind: str = "png") -> bytes:
    return output_files(replace(WITHOUT_FILM, film=frames))[f"pictures/evolution.{kind}"]


def test_animation_has_a_frame_a_moment_and_stays_at_the_last() -> None:
    with Image.open(BytesIO(evolution(film(4), "gif"))) as moving:
        assert (moving.n_frames, moving.info["loop"]) == (5, 0)
        times = []
        for number in range(moving.n_frames):
            moving.seek(number)
            times.append(moving.info["duration"])
    assert times[-1] > times[0] > 0


def test_what_was_wrong_until_the_latest_is_learned_last() -> None:
    sure = torch.eye(10)
    first, second = sure[[3, 1, 4, 3]], sure[[3, 1, 2, 9]]
    assert learned_last([first, second, sure[[0, 1, 2, 3]]], torch.arange(4))[:2] == [0, 3]
    unsure = 0.6 * sure[[0, 1, 2, 3]] + 0.04
    unsure[1] = sure[1]
    assert learned_last([unsure], torch.arange(4))[-1] == 1


def test_evolution_grows_with_its_frames_up_to_nine() -> None:
    one, two, eight, thirty = (size(evolution(film(epochs)))[0] for epochs in (1, 2, 8, 30))
    assert two - one > 50
    assert eight - one == pytest.approx(7 * (two - one), abs=9)
    assert thirty == eight


def test_evolution_shows_the_last_frame_of_many() -> None:
    whole = film(30)
    last = replace(whole[-1], probabilities=1 - whole[-1].probabilities)
    assert evolution(whole) != evolution([*whole[:-1], last])


def test_evolution_of_nine_digits_and_of_a_network_without_filters() -> None:
    nine = Frame("untrained", torch.full((9, 10), 0.1), torch.empty(0, 1, 1))
    labels = torch.arange(9)
    fitted = replace(WITHOUT_FILM, labels=labels, logits=torch.eye(10)[:9], film=[nine])
    assert size(output_files(fitted)["pictures/evolution.png"])[1] > 100
