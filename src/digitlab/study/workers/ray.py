"""Workers that a Ray cluster places, and starts again elsewhere when a node is lost."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

from digitlab.base.errors import UserError, first_line
from digitlab.base.paths import lab_folder
from digitlab.config.types import Config
from digitlab.study.join import join

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
_ANSWER_SECONDS = 10.0  # for a worker to say that it is there
_END_SECONDS = 300.0  # for it to put its trial back, or to deliver records to a tracker long away


class RayWorkers:
    """`digitlab worker` on a cluster, as often as `config.launcher` says.

    Each is an actor: where its process or its node is lost, Ray starts it again, and it takes what
    trials are left. What the lost one ran is put back as on any machine.
    """

    def __init__(self, config: Config, lab: Path) -> None:
        """Ask Ray for the workers; they start as it finds room for them.

        Raises:
            UserError: Ray is not installed, or there is no such cluster.
        """
        launcher = config.launcher
        try:
            import ray
        except ImportError as error:
            raise UserError("launcher=ray: needs Ray: pip install 'digitlab[cluster]'") from error
        self.ray: Any = ray
        before = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(launcher.address, log_to_driver=False, configure_logging=False)
            signal.signal(signal.SIGTERM, before)  # Ray has set its own, which ends us at once
            free = self.ray.cluster_resources().get("CPU", 0) / launcher.cpus
        except Exception as error:  # Ray's own, of gRPC and of many kinds: one cause for the user
            raise UserError(
                f"launcher.address={launcher.address}: no Ray cluster is reached "
                f"({first_line(error)}): start one with `ray start --head`, and set "
                "RAY_AUTH_MODE=token and its token as on the cluster"
            ) from error
        options = {"num_cpus": launcher.cpus, "max_concurrency": 2}
        lasting = self.ray.remote(**options, max_restarts=-1, max_task_retries=-1)(_RemoteWorker)
        self.count = launcher.workers or max(1, int(free))
        self.actors = [lasting.remote() for _ in range(self.count)]
        told = (config.study.name, config.study.storage, str(lab))
        self.working = {actor.work.remote(*told): actor for actor in self.actors}

    def problems(self) -> list[str]:
        """Of workers that have ended since the last call, and could not work."""
        if not self.working:
            return []
        ended, _ = self.ray.wait(list(self.working), num_returns=len(self.working), timeout=0)
        problems = []
        for reference in ended:
            del self.working[reference]
            try:
                problem = self.ray.get(reference, timeout=10)
            except Exception as error:  # noqa: BLE001  whatever ended it, the others go on
                problem = f"a worker ended: {first_line(error)}"
            problems += [problem] if problem else []
        return problems

    def close(self, now: bool) -> None:
        """Wait for the workers to end; with `now` they put back what they run first.

        A worker that Ray has found no room for does not answer, and is not waited for.
        """
        calls = {actor.end.remote(now): reference for reference, actor in self.working.items()}
        there: list[Any] = []
        if calls:
            answers, _ = self.ray.wait(list(calls), num_returns=len(calls), timeout=_ANSWER_SECONDS)
            there = [calls[answer] for answer in answers]
        if there:
            self.ray.wait(there, num_returns=len(there), timeout=_END_SECONDS)
        for actor in self.actors:
            self.ray.kill(actor)
        self.ray.shutdown()


class _RemoteWorker:
    """The process on a node. Its lab is the node's DIGITLAB_HOME, else a folder named as ours."""

    def __init__(self) -> None:
        self.stopping = threading.Event()

    def work(self, study: str, address: str | None, lab: str) -> str:
        """As `join`; returns why this node could not, empty if it could."""
        os.environ.setdefault("DIGITLAB_HOME", lab)
        try:
            join(study, address, lab_folder(), self.stopping.is_set)
        except UserError as error:
            return str(error)
        return ""

    def end(self, now: bool) -> None:
        """Answers that the worker is there; with `now`, ends it at the next batch."""
        if now:
            self.stopping.set()
