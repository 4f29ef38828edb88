"""A page in the person's own browser (--open); the variable BROWSER names another program."""

import subprocess
import sys
import webbrowser

# A process of its own: `digitlab ui` becomes MLflow's server, and keeps no thread. It ends with the
# process that serves, or when nobody has for two minutes.
_WAIT = """
import os, socket, sys, time, webbrowser
port, parent, deadline = int(sys.argv[1]), os.getppid(), time.monotonic() + 120
while os.getppid() == parent and time.monotonic() < deadline:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        time.sleep(0.1)
    else:
        webbrowser.open(f"http://127.0.0.1:{port}")
        break
"""


def open_page(address: str) -> None:
    if not webbrowser.open(address):
        print(f"no browser was found: open {address}", file=sys.stderr)


def open_when_served(port: int) -> "subprocess.Popen[bytes]":
    """Open a page of this machine as soon as something listens on its port; returns at once."""
    return subprocess.Popen([sys.executable, "-c", _WAIT, str(port)], stdin=subprocess.DEVNULL)
