"""MLflow's and Optuna's own pages on the lab's records, on this machine alone."""

import os
import socket
import socketserver
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from digitlab.base.errors import UserError, first_line, require
from digitlab.base.invocation import storage_of
from digitlab.pages.guard import guarded_wsgi
from digitlab.records.local import sqlite_uri
from digitlab.records.reader import lab_tracker
from digitlab.records.views import view_addresses
from digitlab.study.storage import listed_studies, open_storage

_SHOWN = 5  # studies whose addresses are printed


def serve(lab: Path, port: int) -> int:
    """Become MLflow's server on 127.0.0.1, its Host and Origin checks on, its job runner off.

    It serves the artifacts too: the records name them relative to the lab, which may be moved.

    Raises:
        UserError: the port is taken, or the records are on a server already.
    """
    require_free(port)
    elsewhere = os.environ.get("MLFLOW_TRACKING_URI")
    if elsewhere:
        raise UserError(
            f"MLFLOW_TRACKING_URI={first_line(elsewhere)} is set, so runs are recorded there. "
            "Open that page, or unset it to see the lab's own."
        )
    page = lab_tracker(lab, ["tracking=mlflow"]).runs_page().replace(":5000/", f":{port}/")
    print(f"runs:   {page}   (Ctrl-C ends it)")
    for study in listed_studies(open_storage(lab))[-_SHOWN:]:
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


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    """Answers each request in a thread that ends with the process."""

    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        """Print no line for a request."""


def dashboard(lab: Path, port: int, stores: Sequence[str] = ()) -> int:
    """Serve Optuna's dashboard on 127.0.0.1 until Ctrl-C; returns 130.

    It runs in this process, so that the storage's address, which may hold a password, is on no
    command line.

    Raises:
        UserError: the port is taken.
    """
    require_free(port)
    from optuna_dashboard import wsgi

    app = guarded_wsgi(wsgi(open_storage(lab, storage_of(stores))))
    with make_server("127.0.0.1", port, app, _Server, _QuietHandler) as server:
        print(f"studies: http://127.0.0.1:{port}   (Ctrl-C ends it)", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()
    return 130


def require_free(port: int) -> None:
    """Raise UserError unless the port is a number that nothing listens on."""
    require(0 < port < 65536, f"--port={port}", "an integer from 1 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UserError(
                f"--port={port} is taken by another program: it must be free. Stop that program, "
                f"or "
                f"give another port, such as {port + 1}."
            ) from error


def _become(*command: str) -> None:
    os.execv(command[0], command)  # noqa: S606
