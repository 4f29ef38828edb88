"""MLflow's own pages on the lab's records."""

import os
import socket
import sys
from pathlib import Path

from digitlab.compose import compose
from digitlab.errors import UserError
from digitlab.tracking import open_tracking, sqlite_uri


def serve(lab: Path, port: int) -> int:
    """Become MLflow's server on 127.0.0.1, its Host and Origin checks on, its job runner off.

    Raises:
        UserError: the port is taken.
    """
    if not 0 < port < 65536:
        raise UserError(f"--port={port}: allowed is 1 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UserError(
                f"--port={port}: taken by another program: end it, or give another port "
                f"(make ui PORT={port + 1})"
            ) from error
    tracking = open_tracking(compose("train", ["tracking=mlflow"])[0].config, lab)
    experiment = getattr(tracking, "experiment", "0")
    print(
        f"runs: http://127.0.0.1:{port}/#/experiments/{experiment}/runs?workflowType=machine_learning"
        "   (Ctrl-C ends it)",
        flush=True,
    )
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # of the GenAI side; 8 processes
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    os.execv(sys.executable, [*command, "--workers", "1", "--backend-store-uri", sqlite_uri(lab)])  # noqa: S606
