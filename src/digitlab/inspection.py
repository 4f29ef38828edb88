"""`digitlab audit`: is what the two stores say of a study the same, and true?"""

import json
from pathlib import Path

from digitlab.errors import UserError, nearest
from digitlab.guard import recorded_config
from digitlab.reconcile import Problem, audit
from digitlab.search import Search
from digitlab.storage import open_storage, study_names
from digitlab.tracking import open_tracking
from digitlab.workers import only_parent


def inspect(studies: list[str], lab: Path, repair: bool, as_json: bool) -> int:
    """Audit studies, all of the lab's if none is named; 1 while anything is wrong, else 0.

    Raises:
        UserError: a study does not exist, or is running.
    """
    storage = open_storage(lab)
    known = study_names(storage)
    problems: list[Problem] = []
    for name in studies or known:
        if name not in known:
            raise UserError(f"{name}: no such study, {nearest(name, known)}")
        with only_parent(lab, name):
            notes = storage.get_study_user_attrs(storage.get_study_id_from_name(name))
            if "config" not in notes:  # its first call was refused before it began
                continue
            config = recorded_config(notes)
            search = Search(storage, config)
            problems += audit(search, open_tracking(config, lab), config, repair)
    wrong = [problem for problem in problems if not problem.mended]
    if as_json:
        told = ("kind", "trial", "run_id", "detail")
        listed = [{name: getattr(problem, name) for name in told} for problem in wrong]
        print(json.dumps({"problems": listed, "repaired": len(problems) - len(wrong)}, indent=1))
    else:
        for problem in problems:
            print(f"{'mended' if problem.mended else problem.kind}: {problem.detail}")
        print(f"{len(studies or known)} studies, {len(wrong)} problems")
    return 1 if wrong else 0
