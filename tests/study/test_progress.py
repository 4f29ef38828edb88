"""How far a study is."""

import pytest
from samples import configure

from digitlab.study.progress import whole_fits


def test_screened_trials_are_a_part_of_a_fit_and_those_that_finish_are_one() -> None:
    words = ("study.pruner=screening", "study.rungs=[0.1]", "study.trials=24", "study.finish=4")
    study = configure(*words).study
    found = [whole_fits(study, "trials", count) for count in (0, 10, 20, 22, 24)]
    assert found == pytest.approx([0, 1, 2, 4, 6])
    assert whole_fits(study, "confirm", 3) == 3
    assert whole_fits(configure("study.pruner=none").study, "trials", 3) == 3
