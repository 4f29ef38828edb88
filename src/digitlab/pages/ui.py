"""MLflow's and Optuna's own pages on the lab's records, on this machine alone."""

import os
import socket
import sys
from pathlib import Path

from digitlab.base.errors import UserError, first_line
from digitlab.records.local import sqlite_uri
from digitlab.records.reader import lab_tracker
from digitlab.records.views import view_addresses
from digitlab.study.storage import open_storage, study_names

_SHOWN = 5  # studies whose addresses are printed


def serve(lab: Path, port: int) -> int:
    """Become MLflow's server on 127.0.0.1, its Host and Origin checks on, its job runner off.

    It serves the artifacts too: the records name them relative to the lab, which may be moved.

    Raises:
        UserError: the port is taken, or the records are on a server already.
    """
    require_free(port, "ui")
    elsewhere = os.environ.get("MLFLOW_TRACKING_URI")
    if elsewhere:
        given = f"MLFLOW_TRACKING_URI={first_line(elsewhere)}"
        raise UserError(
            f"{given} is set, so the records are there: open that page, or unset it for the lab's."
        )
    page = lab_tracker(lab, ["tracking=mlflow"]).runs_page().replace(":5000/", f":{port}/")
    print(f"runs:   {page}   (Ctrl-C ends it)")
    for study in study_names(open_storage(lab))[-_SHOWN:]:
        for kind, address in view_addresses(page, study).items():
            print(f"{study}, {kind}: {address}")
    sys.stdout.flush()
    become_mlflow(lab, port)
    return 0


def become_mlflow(lab: Path, port: int) -> None:
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # of the GenAI side; 8 processes
    place = ["--host", "127.0.0.1", "--port", str(port), "--backend-store-uri", sqlite_uri(lab)]
    place += ["--serve-artifacts", "--artifacts-destination", str(lab / "artifacts")]
    _become(sys.executable, "-m", "mlflow", "server", "--workers", "1", *place)


def dashboard(lab: Path, port: int) -> int:
    """Become optuna-dashboard on 127.0.0.1.

    Raises:
        UserError: the port is taken.
    """
    require_free(port, "dashboard")
    open_storage(lab)  # or it says in many lines that there is none
    address = os.environ.get("DIGITLAB_STORAGE") or f"sqlite:///{lab / 'optuna.db'}"
    print(f"studies: http://127.0.0.1:{port}   (Ctrl-C ends it)", flush=True)
    program = str(Path(sys.executable).with_name("optuna-dashboard"))
    _become(program, "--server", "wsgiref", "--host", "127.0.0.1", "--port", str(port),
            address)  # fmt: skip
    return 0


def require_free(port: int, target: str) -> None:
    if not 0 < port < 65536:
        raise UserError(f"--port={port}: allowed is 1 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UserError(
                f"--port={port}: taken by another program: end it, or give another port "
                f"(make {target} PORT={port + 1})"
            ) from error


def _become(*command: str) -> None:
    os.execv(command[0], command)  # noqa: S606
