"""A small study over what is ticked on the page, in a process of its own."""

import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from digitlab.base.errors import UserError, require
from digitlab.config.compose import Composed, compose
from digitlab.networks.settings import ConvnetConfig
from digitlab.pages.events import EventLog
from digitlab.pages.form import values_of

_WORDS = (
    *("study.confirm=1", "study.final_seeds=1", "study.workers=1", "study.trials=200"),
    *("study.pruner=none", "study.rungs=[]"),  # or a screening recipe would finish none
    "study.sampler=tpe",  # a recipe's grid would take no range
)
_NO_SPACE = ("~study.space", "+study.space={}")  # of the recipe: what is ticked alone is searched


def ranges(values: Mapping[str, Any], ticked: Sequence[str]) -> dict[str, str]:
    """Return a range around the value of each ticked field, in Hydra's sweep grammar."""
    found = {}
    for key in ticked:
        value = values.get(key)
        if key == "model.widths" and value:
            sets = [[max(1, round(width * by)) for width in value] for by in (0.5, 1, 2)]
            found[key] = f"choice({','.join(str(one).replace(' ', '') for one in sets)})"
        elif key == "optim.learning_rate" and value:
            found[key] = f"tag(log,interval({value / 4},{min(10, value * 4)}))"
        elif key == "model.hidden":
            found[key] = "choice(0,32,64,128)"
        elif key == "trainer.epochs" and value:
            found[key] = f"int(interval(1,{value + 2}))"
        elif key == "model.batch_norm":
            found[key] = "choice(true,false)"
        elif key == "model.dropout":
            found[key] = "interval(0,0.5)"
        else:
            raise UserError(
                f"{key} cannot be searched from the page: it must be widths, learning rate, "
                "hidden, epochs, batch norm or dropout. Use `digitlab sweep`."
            )
    return found


def search_words(
    composed: Composed, space: Mapping[str, str], minutes: float, name: str
) -> list[str]:
    """Return what `digitlab sweep` is called with; UserError where widths cannot be searched."""
    if "model.widths" in space and isinstance(composed.config.model, ConvnetConfig):
        model = composed.config.model
        if max(map(len, (model.kernel_sizes, model.strides, model.pools))) > 1:
            raise UserError(
                "widths cannot be searched while layers differ in kernel, stride or pool: they "
                "must be the same in all. Give all layers the same, or leave widths as they are."
            )
    # A key that is given one value leaves the space.
    kept = [text for text in composed.overrides if text.partition("=")[0] not in space]
    ranged = [f"{key}={text}" for key, text in space.items()]
    kept += _NO_SPACE if composed.config.study.space else ()
    return [*kept, *_WORDS, f"study.name={name}", f"study.minutes={minutes:g}", *ranged]


class PageSearch:
    """`digitlab sweep` for as many minutes as are given; its trials are runs of the lab."""

    def __init__(self, log: EventLog) -> None:
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        return self._process is not None

    def start(self, composed: Composed, ticked: Sequence[str], minutes: float, name: str) -> None:
        """Start a study; UserError where a field cannot be searched, or the time is none."""
        require(0 < minutes <= 60, f"minutes={minutes:g}", "a number > 0 and <= 60")
        require(bool(ticked), "a search over nothing", "over one ticked field or more")
        space = ranges(values_of(composed.config), ticked)
        words = search_words(composed, space, minutes, name)
        compose("sweep", words)  # what it refuses is refused here
        command = [sys.executable, "-m", "digitlab", "sweep", *words]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        self.log.publish("search", name=name, state="running", text=f"study {name} starts")
        threading.Thread(target=self._follow, args=(self._process, name), daemon=True).start()

    def _follow(self, process: "subprocess.Popen[bytes]", name: str) -> None:
        assert process.stdout is not None
        last = ""
        with process:
            for line in process.stdout:
                last = line.decode(errors="replace").strip() or last
                self.log.publish("search", name=name, state="running", text=last)
        status = process.returncode
        self._process = None
        state = {0: "finished", 130: "interrupted"}.get(status, "failed")
        text = "is finished: its trials are in the list" if status == 0 else last
        self.log.publish("search", name=name, state=state, text=text)
        self.log.publish("free")

    def stop(self) -> None:
        """Stop the study as Ctrl-C does; it keeps what it has."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)

    def close(self) -> None:
        process = self._process
        if process is not None:
            self.stop()
            process.wait()
