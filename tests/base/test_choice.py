"""Which of several candidates is taken, and whether that is shown."""

import time
from typing import Any

import numpy as np
import pytest

from digitlab.base.choice import (
    NOTHING_CHOSEN,
    Choice,
    choose,
    choose_least_costly,
    describe_choice,
    note_predictions,
    read_right,
)
from digitlab.base.statistics import Interval, accuracy_difference, accuracy_interval

IMAGES = 10_000


def fits(n: int, misread: int, changing: int = 4, shared: int = 0) -> np.ndarray:
    """Fits that misread so many images: some in turn, each its own, the others all."""
    right = np.ones((n, IMAGES), bool)
    start = 5000 - shared
    for place in range(n):
        right[place, start : start + misread - changing] = False
        first = 9000 + changing * place
        right[place, first : first + changing] = False
    return right


def decide(groups: dict[int, np.ndarray], margin: float = 0.0005, **costs: float) -> Choice:
    """Candidates cost as much as their numbers say, unless another cost is given."""
    known = {number: (float(costs.get(f"n{number}", number)), number) for number in groups}
    return choose(groups, known, margin)


def test_the_fastest_that_is_shown_to_be_within_the_margin_is_taken() -> None:
    choice = decide({1: fits(3, 32), 2: fits(3, 30), 3: fits(3, 31)}, margin=0.002)
    assert (choice.best, choice.is_settled, choice.undecided) == (1, True, [])


def test_a_candidate_that_is_worse_by_more_than_the_margin_is_not_taken_for_being_fast() -> None:
    choice = decide({1: fits(3, 80), 2: fits(3, 30)})
    assert (choice.best, choice.is_settled, choice.undecided) == (2, True, [])


def test_where_nothing_is_shown_the_best_mean_is_taken_and_more_fits_could_decide() -> None:
    noisy = {1: fits(2, 50, 45), 2: fits(2, 46, 45), 3: fits(2, 400, 45)}
    choice = decide(noisy)
    assert (choice.best, choice.is_settled) == (2, False)
    assert choice.undecided == [2, 1]  # the third is out


def test_a_faster_one_that_may_be_within_the_margin_keeps_the_race_open() -> None:
    """The best is shown already; the faster one is neither shown nor out."""
    choice = decide({1: fits(3, 36, 20), 2: fits(3, 30, 20)}, margin=0.0008)
    assert choice.best == 2
    assert choice.is_settled
    assert choice.undecided == [2, 1]


def test_one_fit_each_shows_nothing() -> None:
    choice = decide({1: fits(1, 90), 2: fits(1, 30)})
    assert (choice.best, choice.is_settled, choice.undecided) == (2, False, [2, 1])
    assert choice.interval(1) == Interval(0.991, None, None, 1)


def test_a_lone_candidate_is_taken() -> None:
    choice = decide({4: fits(2, 30)})
    assert (choice.best, choice.undecided) == (4, [])


def test_of_equal_candidates_the_earlier_is_taken() -> None:
    groups = {5: fits(2, 30), 2: fits(2, 30), 7: fits(2, 30)}
    assert decide(groups, n5=1, n2=1, n7=1).best == 2


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_the_order_of_candidates_decides_nothing(order: tuple[int, ...]) -> None:
    groups = {1: fits(2, 49, 45), 2: fits(3, 46, 45), 3: fits(2, 50, 45)}
    choice = decide({number: groups[number] for number in order})
    assert (choice.best, choice.is_settled) == (2, False)
    assert choice.undecided == [2, 1, 3]


def test_more_candidates_need_more_to_be_shown() -> None:
    """The bounds are corrected for their number: three more of the same undo a narrow decision."""
    two = {1: fits(3, 31, 10), 2: fits(3, 30, 10)}
    margin = 0.0001
    while not decide(two, margin).is_settled:
        margin += 0.00001
    many = two | {number: fits(3, 400, 10) for number in (3, 4, 5)}
    assert not decide(many, margin).is_settled


def test_images_that_both_misread_do_not_blur_the_difference() -> None:
    apart = accuracy_difference([fits(3, 60), fits(3, 50, shared=56)], 1, 0)
    paired = accuracy_difference([fits(3, 60), fits(3, 50)], 1, 0)
    assert paired.value == pytest.approx(0.001)
    assert apart.value == pytest.approx(0.001)
    assert paired.low is not None
    assert apart.low is not None
    assert paired.low > 0 > apart.low


def test_predictions_are_noted_and_read_back() -> None:
    labels = np.arange(50, dtype=np.uint8) % 10
    guesses = [labels.copy() for _ in range(3)]
    guesses[1][[3, 49]] = 11
    guesses[2][:] = 11
    notes = [note_predictions(each, labels) for each in guesses]
    assert notes[1] == {"images": 50, "misread": [3, 49]}
    assert read_right(notes).tolist() == [(each == labels).tolist() for each in guesses]


@pytest.mark.parametrize("candidates", [3, 30])
def test_a_choice_takes_less_than_a_second(candidates: int) -> None:
    groups = {number: fits(2, 50 + number, 20) for number in range(candidates)}
    started = time.process_time()
    decide(groups).notes(0.0005)
    assert time.process_time() - started < 1


COSTS = {number: (float(number), number) for number in range(9)}
AT_995 = {"cost": "model_parameters", "costs": {1: "10 parameters"}, "required": 0.995}


def test_the_least_costly_that_is_shown_to_be_accurate_enough_is_taken() -> None:
    choice = choose_least_costly({1: fits(3, 80), 2: fits(3, 20), 3: fits(3, 10)}, COSTS, 0.995)
    assert (choice.best, choice.is_settled, choice.undecided) == (2, True, [])
    assert "it is the smallest that is at least 99.5 % accurate" in notes(choice, None, goal=AT_995)


def test_a_less_costly_one_that_may_be_accurate_enough_keeps_the_race_open() -> None:
    choice = choose_least_costly({1: fits(3, 46), 2: fits(3, 20)}, COSTS, 0.995)
    assert (choice.best, choice.is_settled, choice.undecided) == (2, True, [1])
    text = notes(choice, None, goal=AT_995)
    assert "candidate 2 is shown to be at least 99.5 % accurate; 6 fits do not decide" in text
    assert "whether a smaller one is, too. More fits: study.confirm_fits=12" in text
    assert "on new seeds, 10 parameters" in text


def test_one_fit_shows_no_candidate_to_be_accurate_enough() -> None:
    choice = choose_least_costly({1: fits(1, 80), 2: fits(1, 20), 3: fits(1, 10)}, COSTS, 0.995)
    assert (choice.best, choice.is_settled, choice.undecided) == (2, False, [1, 2, 3])
    text = notes(choice, None, goal=AT_995)
    assert "3 fits do not decide: candidate 2 is not shown to be at least 99.5 % accurate" in text


def test_nothing_is_said_where_no_candidate_was_measured() -> None:
    assert describe_choice(NOTHING_CHOSEN | AT_995) == []


def test_where_none_can_be_accurate_enough_the_best_is_taken_and_that_is_said() -> None:
    choice = choose_least_costly({1: fits(3, 300), 2: fits(3, 200)}, COSTS, 0.995)
    assert (choice.best, choice.is_settled, choice.undecided) == (2, False, [])
    assert "no candidate is at least 99.5 % accurate" in notes(choice, None, goal=AT_995)


ACCURATE = {"cost": "training_flops", "costs": {}, "required": None}


def notes(
    choice: Choice,
    own: int | None,
    budget: int = 6,
    goal: dict[str, Any] = ACCURATE,
    **measured: np.ndarray,
) -> str:
    """What is said of a choice; `measured` are fits of the `best` and of `its_own` values."""
    spent = sum(len(group) for group in choice.groups.values())
    noted = {"trial": choice.best, "accuracy": 0.997, "own": own} | goal
    noted |= {"confirm_fits": {"spent": spent, "budget": budget}}
    if measured:
        noted |= choice.measure(measured["best"], measured.get("its_own"))
    return "\n".join(describe_choice(noted | choice.notes(0.0005)))


def test_the_text_says_what_was_shown_what_was_saved_and_what_it_was_worth() -> None:
    groups = {1: fits(3, 80), 2: fits(3, 30)}
    text = notes(decide(groups), 1, 8, best=fits(2, 40), its_own=fits(2, 80))
    assert f"candidate 2: validation {accuracy_interval(list(groups.values()), 1)} on new" in text
    assert (
        "the fastest to train within 0.05 points of the best, as shown; 2 of 8 fits saved" in text
    )
    assert "validation 99.60 % (99." in text
    assert "the search was worth +0.40 points (" in text
    assert "its trial's 99.70 % was 0.10 points too high" in text
    assert "saved" not in notes(decide(groups), own=1)


def test_the_text_says_what_was_not_settled_and_how_it_may_be() -> None:
    choice = decide({1: fits(2, 50, 45), 2: fits(2, 46, 45)})
    text = notes(choice, 1, 4, best=fits(2, 46, 45), its_own=fits(2, 50, 45))
    assert (
        "4 fits do not decide: candidate 2 has the best mean, but another may truly be more than "
        "0.05 points better. More fits: study.confirm_fits=8" in text
    )
    assert "the search found nothing shown to be better: +0.04 points (-" in text


@pytest.mark.parametrize(
    ("misread", "off"),
    [(40, "0.10 points too high"), (25, "0.05 points too low"), (30, "neither too high nor")],
)
def test_the_text_says_whether_the_trials_accuracy_was_too_high_or_too_low(
    misread: int, off: str
) -> None:
    text = notes(decide({1: fits(3, 80), 2: fits(3, 30)}), None, best=fits(2, misread))
    assert f"its trial's 99.70 % was {off}" in text


def test_what_was_measured_is_said_of_a_candidate_that_alone_has_finished_fits() -> None:
    lone = decide({2: fits(2, 30)})
    text = notes(lone, 1, best=fits(2, 40), its_own=fits(2, 80))
    assert "candidate 2: validation 99.70 % (" in text
    assert "it is the only candidate that has a finished fit on new seeds" in text
    assert "as shown" not in text
    assert "validation 99.60 % (" in text
    assert "the search was worth +0.40 points (" in text
    assert notes(lone, 1) == ""


def test_a_champion_with_the_recipe_s_own_values_was_worth_nothing() -> None:
    text = notes(decide({1: fits(3, 30), 2: fits(3, 80)}), 1, best=fits(2, 30))
    assert "the search found nothing better than the recipe's own values (trial 1)" in text
    assert "points (" not in text


def test_single_fits_have_no_interval_in_the_text() -> None:
    text = notes(decide({1: fits(1, 50), 2: fits(1, 46)}), 1, best=fits(1, 46), its_own=fits(1, 50))
    assert "candidate 1: validation 99.50 % (n=1)" in text
    assert "worth anything, by a single seed: +0.04 points (n=1) over the recipe's own" in text
    assert "a larger study.measure_seeds may show it" in text
    assert "was worth" not in text
    assert " to " not in text.replace("to be", "")
