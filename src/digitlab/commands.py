"""What each command does: it imports what it needs, builds it, runs it and closes it."""

import json
import runpy
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from digitlab.base.errors import UserError
from digitlab.base.paths import RECIPES, lab_folder

if TYPE_CHECKING:
    from digitlab.config.compose import Composed
    from digitlab.study.session import StudySession


def data(options: Namespace) -> int:
    from digitlab.data.datasets import TEST, TRAIN, load_digits

    if options.source:
        from digitlab.digits.own import import_data

        print(import_data(options.source, options.name, lab_folder(), options.prepare))
        return 0
    if options.prepare:
        raise UserError(
            "--prepare without --from is invalid: it says how images are read. Give --from PLACE."
        )
    for files in (TRAIN, TEST):
        digits = load_digits(lab_folder(), options.name, files)
        for file, digest in digits.sha256.items():
            print(f"{digest}  {file}")
    return 0


def config(options: Namespace) -> int:
    from digitlab.config.schema import describe_settings, json_schema

    print(json.dumps(json_schema(), indent=2) if options.schema else describe_settings())
    return 0


def train(options: Namespace) -> int:
    if options.config_from:
        for name in ("cfg", "config_dir", "multirun", "keep_going"):
            if getattr(options, name):
                flag = name.replace("_", "-")
                raise UserError(
                    f"--{flag} with --config-from is invalid: a recorded configuration is whole, "
                    "and one job. Leave one out."
                )
        from digitlab.base.console import outlive_reader
        from digitlab.results.reproduce import train_from

        with outlive_reader():
            return train_from(options.config_from, options.overrides, lab_folder())
    if options.cfg:
        return _print_config("train", options)
    from digitlab.config.compose import compose

    jobs = compose("train", _overrides(options), options.multirun)
    from digitlab.results.conclusion import conclude
    from digitlab.study.run import train as train_one

    lab = lab_folder()
    return _run_all(
        jobs, lambda job: train_one(job, lab, conclude=conclude).exit_status, options.keep_going
    )


def sweep(options: Namespace) -> int:
    if options.cfg:
        return _print_config("sweep", options)
    lab = lab_folder()  # whose .env the workers inherit
    from digitlab.config.compose import compose

    jobs = compose("sweep", _overrides(options), options.multirun)
    from digitlab.study.driver import is_published
    from digitlab.study.driver import sweep as lead

    if not all(is_published(job.config, lab) for job in jobs):
        from digitlab.workers.processes import preload

        preload()  # beside the rest of the parent's own imports, MLflow above all
    return _run_all(jobs, lambda job: lead(job, lab, _publish), options.keep_going)


def _publish(session: "StudySession", summary: Mapping[str, Any]) -> Mapping[str, Any]:
    """As `publish`, whose torch and charts a study that was published before does not import."""
    from digitlab.results.publish import publish

    return publish(session, summary)


def _print_config(command: str, options: Namespace) -> int:
    from digitlab.config.compose import composed_text

    print(composed_text(command, _overrides(options), options.multirun), end="")
    return 0


def _overrides(options: Namespace) -> list[str]:
    """Return the overrides, with the folder of one's own, which printed commands repeat."""
    if options.keep_going and not options.multirun:
        raise UserError(
            "--keep-going without --multirun is invalid: there is one job. Give --multirun, or "
            "leave it out."
        )
    own = [f"--config-dir={options.config_dir}"] if options.config_dir else []
    return [*own, *options.overrides]


def _run_all(
    jobs: Sequence["Composed"], run: Callable[["Composed"], int], keeps_going: bool
) -> int:
    """Run the jobs of --multirun in turn; one that is stopped ends them all.

    Args:
        keeps_going: whether one that is refused does not.
    """
    from digitlab.base.console import outlive_reader

    statuses = []
    with outlive_reader():
        for job in jobs:
            try:
                statuses.append(run(job))
            except UserError as error:
                if not keeps_going:
                    raise
                print(f"digitlab: {error}", file=sys.stderr)
                statuses.append(2)
            if statuses[-1] == 130:
                left = len(jobs) - len(statuses)
                if left:
                    print(f"{left} of {len(jobs)} jobs were not started")
                break
        if keeps_going:
            print(f"{statuses.count(0)} of {len(jobs)} jobs finished")
    return max(statuses)


# Lists


def runs(options: Namespace) -> int:
    from digitlab.results.lists import list_runs

    wanted = {"study": options.study, "kind": options.kind, "state": options.state}
    form = _form(options)
    most = options.most if form == "table" else 0
    return list_runs(lab_folder(), options.stores, wanted, form, most)


def studies(options: Namespace) -> int:
    from digitlab.results.lists import list_studies

    return list_studies(lab_folder(), options.stores, options.deleted, _form(options))


def _form(options: Namespace) -> str:
    if options.json and options.csv:
        raise UserError(
            "--json with --csv is invalid: only one form can be printed. Give one of them."
        )
    return "json" if options.json else "csv" if options.csv else "table"


def show(options: Namespace) -> int:
    from digitlab.results.show import show as show_it

    return show_it(options.name, lab_folder(), options.stores, options.json)


def best(options: Namespace) -> int:
    from digitlab.results.show import print_recipe

    return print_recipe(options.study, lab_folder(), options.stores)


# Whole studies


def delete(options: Namespace) -> int:
    from digitlab.results.removal import delete_study

    given = (options.study, lab_folder(), options.stores, options.yes)
    return _to_its_end(lambda: delete_study(*given))


def restore(options: Namespace) -> int:
    from digitlab.results.removal import restore_study

    return _to_its_end(lambda: restore_study(options.study, lab_folder(), options.stores))


def export(options: Namespace) -> int:
    from digitlab.results.exchange import export_study

    given = (options.study, options.file, lab_folder(), options.stores)
    return _to_its_end(lambda: export_study(*given))


def import_study(options: Namespace) -> int:
    from digitlab.results.exchange import import_study as record

    return _to_its_end(lambda: record(options.file, lab_folder(), options.stores))


def audit(options: Namespace) -> int:
    from digitlab.results.audit import audit_studies

    given = (options.study, lab_folder(), options.repair, options.json, options.stores)
    return _to_its_end(lambda: audit_studies(*given))


def _to_its_end(work: Callable[[], int]) -> int:
    """Return the status of work that goes on where nobody reads what it prints any more."""
    from digitlab.base.console import outlive_reader

    with outlive_reader():
        return work()


def bench(options: Namespace) -> int:
    script = RECIPES / "bench.py"
    if not script.is_file():
        raise UserError("bench is not available here: it needs a checkout. Clone the repository.")
    sys.argv[1:] = options.rest
    sys.path.insert(0, str(RECIPES))  # where its other files are
    runpy.run_path(str(script), run_name="__main__")
    return 0


# Recorded runs


def reproduce(options: Namespace) -> int:
    changed = [word for word in options.words if _is_override(word)]
    named = [word for word in options.words if word not in changed]
    if len([*named, *filter(None, (options.study, options.config))]) != 1:
        raise UserError(
            "reproduce needs exactly one of RUN, --study STUDY and --config FILE. "
            "See `digitlab reproduce --help`."
        )
    if options.at_commit and not named:
        raise UserError(
            "--at-commit without RUN is invalid: only a run records a commit. Name a run."
        )
    if (options.json and options.config) or (changed and options.study):
        raise UserError(
            "--json with --config, or KEY=VALUE with --study, is invalid: it would have no effect. "
            "Leave it out."
        )

    from digitlab.base.console import outlive_reader

    lab = lab_folder()  # whose .env the workers inherit
    if options.study:
        from digitlab.workers.processes import preload

        preload()
        from digitlab.results.replay import replay

        with outlive_reader():
            return replay(options.study, lab, options.json, options.stores)
    from digitlab.results.reproduce import reproduce as train_again
    from digitlab.results.reproduce import reproduce_file

    overrides = [*changed, *options.stores]
    how = {"at_commit": options.at_commit, "is_trusted": options.yes}
    with outlive_reader():
        if options.config:
            return reproduce_file(Path(options.config), overrides, lab)
        return train_again(named[0], overrides, lab, options.json, **how).exit_status


def _is_override(word: str) -> bool:
    """Whether a word is KEY=VALUE; the name of a run, such as `seed epochs=5`, has a space."""
    return "=" in word and " " not in word.partition("=")[0]


def compare(options: Namespace) -> int:
    from digitlab.results.compare import compare as compare_runs

    return compare_runs(options.runs, options.stores, lab_folder(), options.json, options.out)


def report(options: Namespace) -> int:
    from digitlab.results.report import write_report

    target = write_report(options.study, options.out, lab_folder(), options.stores)
    if options.open:
        from digitlab.pages.browser import open_page

        open_page(target.absolute().as_uri())
    return 0


# New digits


def predict(options: Namespace) -> int:
    from digitlab.digits.predict import predict as read

    return read(
        options.image,
        options.run,
        as_json=options.json,
        explain=options.explain,
        save=options.out,
        lab=lab_folder(),
        stores=options.stores,
        recursive=options.recursive,
    )


def explain(options: Namespace) -> int:
    from digitlab.digits.explain import explain as draw_why

    given = (options.image, options.run, options.against, options.out)
    return draw_why(*given, lab_folder(), options.stores)


def evaluate(options: Namespace) -> int:
    from digitlab.digits.shift import evaluate_shift

    given = (options.run, options.prepared, options.json, lab_folder(), options.stores)
    return _to_its_end(lambda: evaluate_shift(*given))


# Pages


def draw(options: Namespace) -> int:
    from digitlab.pages.play import draw as serve

    _open_later(options)
    return serve(options.run, lab_folder(), options.port, options.stores)


def play(options: Namespace) -> int:
    from digitlab.workers.processes import preload

    lab = lab_folder()  # whose .env the worker inherits
    preload()  # beside the parent's own imports
    from digitlab.pages.play import play as serve

    _open_later(options)
    return serve(options.overrides, lab, options.port)


def ui(options: Namespace) -> int:
    from digitlab.pages.ui import serve

    _open_later(options)
    return serve(lab_folder(), options.port)


def dashboard(options: Namespace) -> int:
    from digitlab.pages.ui import dashboard as serve

    _open_later(options)
    return serve(lab_folder(), options.port, options.stores)


def _open_later(options: Namespace) -> None:
    if options.open:
        from digitlab.pages.browser import open_when_served
        from digitlab.pages.ui import require_free

        require_free(options.port)  # or what listens there is opened
        open_when_served(options.port)
