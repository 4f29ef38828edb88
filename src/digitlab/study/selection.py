"""From the best trials to the champion: confirmed, chosen, measured, tested."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from digitlab.base.errors import UserError
from digitlab.study.champion import (
    Fit,
    Results,
    candidates,
    confirm_fits,
    describe_selection,
    final_fits,
    finished_results,
    measure_fits,
    select_champion,
    summarise,
)
from digitlab.study.goal import TrialRow
from digitlab.study.session import StudySession
from digitlab.study.trials import TrialStore

RunFits = Callable[[str, list[Fit]], Results]  # the fits of a phase, each once


def select_and_test(
    session: StudySession, best: Sequence[TrialRow], run_fits: RunFits
) -> dict[str, Any]:
    """Return the summary of the study's champion; {} when the user stops.

    Raises:
        UserError: all its final fits failed.
    """
    config, store = session.config, session.store
    best, confirmed = confirm_candidates(session, best, run_fits)
    if session.stop():
        return {}
    choice = select_champion(config, best, finished_results(confirmed))
    champion = next((row for row in best if choice and row.number == choice.best), best[0])
    own = next((row for row in best if row.values == store.own), None)
    measured = run_fits("measure", measure_fits(config, champion, own)) if choice else {}
    if session.stop():
        return {}
    fits = final_fits(config, champion)
    looks = _note_look(store, fits)
    finals = run_fits("final", fits)
    if session.stop():
        return {}
    tested = finished_results(finals)
    if not tested:
        reason = next(iter(finals.values()))["failed"]
        raise UserError(
            f"study {config.study.name}: all final fits of its champion, trial "
            f"{champion.number}, have failed ({reason}). It has no test accuracy: "
            "start a new study with another study.space."
        )
    selection = describe_selection(config, choice, own, finished_results(measured))
    spent = {"spent": len(confirmed), "budget": config.study.confirm_fits}
    summary = summarise(champion, selection, tested) | store.goal.notes(store.rows(), best)
    return summary | {"confirm_fits": spent, "looks": looks}


def confirm_candidates(
    session: StudySession, best: Sequence[TrialRow], run_fits: RunFits
) -> tuple[Sequence[TrialRow], Results]:
    """Train the candidates on new seeds; return them, and their fits.

    Where accuracy is required, and no candidate can have it, the next best trial is one more.
    """
    config, store = session.config, session.store
    confirmed: Results = {}
    while True:
        while fits := confirm_fits(config, best, confirmed):
            confirmed |= run_fits("confirm", fits)
            if session.stop():
                return best, confirmed
        choice = select_champion(config, best, finished_results(confirmed))
        all_are_out = choice is not None and not (choice.is_settled or choice.undecided)
        wider = candidates(store.rows(), len(best) + 1, store.own, store.goal)
        is_spent = len(confirmed) >= config.study.confirm_fits
        if not all_are_out or is_spent or len(wider) == len(best):
            return best, confirmed
        best = wider


def _note_look(store: TrialStore, fits: list[Fit]) -> int:
    """Note in the study's ledger which fits will read the test set; return how many looks.

    It is written before they start: a look that is interrupted is one, and stays the same.
    """
    ledger: list[dict[str, Any]] = store.notes().get("tested", [])
    known = {key for look in ledger for key in look["fits"]}
    new = [fit.key for fit in fits if fit.key not in known]
    if new:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        ledger = [*ledger, {"when": now, "fits": new, "n": len(new)}]
        store.note("tested", ledger)
    return len(ledger)
