"""Commands that are shown to a person run as they are printed, whoever called."""

import shlex

import pytest

from digitlab.base.invocation import CALLER, command, split_stores, storage_of

CASES = [
    ["sweep"],
    ["sweep", "experiments=smoke", "study.trials=9"],
    ["sweep", "experiments=smoke", "study.trials=9", "study.seed=3"],
    ["sweep", "experiments=smoke", "model.hidden=tag(log,int(interval(16,128)))"],
    ["train", "model.widths=[16,32]", "name=seed epochs=5"],
    ["train", "name=it's"],
    ["train", 'study.name="ü"', "trainer.seed=$HOME"],
    ["reproduce", "0123456789ab"],
    ["reproduce", "smoke/champion", "tracking.uri=http://host:5000"],
    ["reproduce", "seed epochs=5"],
    ["reproduce", "--study=smoke"],
    ["compare", "0123", "4567", "tracking.experiment=mine"],
    ["draw", "--run=0123"],
    ["restore", "smoke"],
]


@pytest.mark.parametrize("words", CASES, ids=" ".join)
def test_a_shell_gives_the_words_back(words: list[str]) -> None:
    assert shlex.split(command(*words)) == ["digitlab", *words]


@pytest.mark.parametrize("words", CASES, ids=" ".join)
def test_make_is_given_the_words_where_it_called(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CALLER, "make")
    printed = command(*words)
    program, target, *variables = shlex.split(printed)
    if program != "make":
        assert shlex.split(printed) == [".venv/bin/digitlab", *words]
        return
    # A recipe's line is read by a shell once more.
    values = [variable.split("=", 1) for variable in variables]
    given = [f"experiments={value}" for key, value in values if key == "EXPERIMENT"]
    given += [word for key, value in values if key != "EXPERIMENT" for word in shlex.split(value)]
    assert [target, *given] == words
    assert "'\"'" not in printed
    assert "$" not in printed


def test_make_is_named_short_and_the_default_recipe_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert command("sweep", "experiments=default") == "digitlab sweep"
    monkeypatch.setenv(CALLER, "make")
    assert command("sweep", "experiments=default") == "make sweep"
    smoke = command("sweep", "experiments=smoke", "study.trials=9")
    assert smoke == "make sweep EXPERIMENT=smoke ARGS=study.trials=9"
    searched = command("sweep", "model.hidden=int(interval(8,64))", "study.trials=9")
    assert searched == "make sweep ARGS=\"'model.hidden=int(interval(8,64))' study.trials=9\""
    assert command("reproduce", "abc") == "make reproduce RUN=abc"
    assert command("restore", "smoke") == ".venv/bin/digitlab restore smoke"


def test_words_that_name_the_place_of_records_are_split_from_the_others() -> None:
    stores = ["tracking.uri=http://host", "tracking=none", "study.storage=a", "study.storage=b"]
    others = ["smoke/7", "seed epochs=5", "study.trials=3", "tracking", "trainer.threads=2"]
    assert split_stores([*others, *stores]) == (stores, others)
    assert storage_of(stores) == "b"
    assert storage_of(others) is None


@pytest.mark.parametrize("nothing", ["", "null", "NULL"])
def test_null_and_nothing_are_no_address_as_in_a_configuration(nothing: str) -> None:
    assert storage_of(["study.storage=a", f"study.storage={nothing}"]) is None
