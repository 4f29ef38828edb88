"""Workers that a Ray cluster places; one that is lost is placed again, wherever there is room."""

import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from digitlab.base.errors import UserError, first_line
from digitlab.config.types import LauncherConfig
from digitlab.workers.base import (
    Event,
    Lost,
    Order,
    Pool,
    Ready,
    WorkerSetup,
    share_main_heap,
)

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # on a node: each run sets torch's own
_CONNECT_S = 10.0
_PROBE_S = 60.0  # Ray takes half as long to notice that a node is lost


class RayWorkers(Pool):
    """Ray actors that each train one job at a time.

    Whether a lost actor is charged to its job: a task is sent to the node that the actor was on. If
    it runs there, the node lives, and the actor's process died by itself.
    """

    def __init__(self, setup: WorkerSetup, launcher: LauncherConfig) -> None:
        try:
            import ray
        except ImportError as error:
            raise UserError(
                "launcher=ray needs Ray, which is not installed. Run `make setup`, or `pip "
                "install -e '.[cluster]'` in the checkout."
            ) from error
        super().__init__(setup, launcher.workers)
        self.ray: Any = ray
        self.launcher = launcher
        self._actors: dict[int, Any] = {}
        self._streams: dict[Any, int] = {}  # generators of events
        self._nodes: dict[int, str] = {}
        self._probes: dict[Any, tuple[int, float]] = {}  # worker, and until when to wait

    def _start(self) -> None:
        """Connect to the cluster, or raise UserError, and ask it for the actors."""
        launcher, ray = self.launcher, self.ray
        before = signal.getsignal(signal.SIGTERM)
        try:
            _reach(launcher.address)
            ray.init(launcher.address, log_to_driver=False, configure_logging=False)
            resources = ray.cluster_resources()
            free = resources.get("CPU", 0) / launcher.cpus
            if launcher.gpus:
                free = min(free, resources.get("GPU", 0) / launcher.gpus)
        except Exception as error:  # Ray's own, of gRPC and of many kinds: one cause for the user
            raise UserError(
                f"launcher.address={launcher.address}: no Ray cluster is reached "
                f"({first_line(error)}). Start one with `ray start --head`, and set "
                "RAY_AUTH_MODE=token and its token as on the cluster."
            ) from error
        finally:
            signal.signal(signal.SIGTERM, before)  # Ray's own handler ends the process at once
        self.count = launcher.workers or max(1, int(free))
        super()._start()

    def close(self) -> None:
        super().close()
        self.ray.shutdown()

    def _launch(self, worker: int) -> None:
        # No restart by Ray itself: the pool sees each death, and asks for a new actor.
        options = {"num_cpus": self.launcher.cpus, "num_gpus": self.launcher.gpus}
        options |= {"max_restarts": 0, "max_task_retries": 0}
        groups = {"control": 1}
        actor = self.ray.remote(**options, concurrency_groups=groups)(_Actor).remote()
        self._actors[worker] = actor
        events = actor.serve.options(num_returns="streaming").remote(self.setup)
        self._streams[events] = worker

    def _discard(self, worker: int) -> None:
        self._streams = {s: w for s, w in self._streams.items() if w != worker}
        self._probes = {p: found for p, found in self._probes.items() if found[0] != worker}
        self._nodes.pop(worker, None)
        actor = self._actors.pop(worker, None)
        if actor is not None:
            with suppress(Exception):  # it is gone already
                self.ray.kill(actor)

    def _send(self, worker: int, message: tuple[int, Order]) -> None:
        self._actors[worker].put.options(concurrency_group="control").remote(message)

    def _receive(self, timeout_s: float) -> Iterator[tuple[int, Event]]:
        waiting = [*self._streams, *self._probes]
        self.ray.wait(waiting, timeout=timeout_s, fetch_local=False)
        there, _ = self.ray.wait(waiting, num_returns=len(waiting), timeout=0, fetch_local=False)
        late = [probe for probe, (_, until) in self._probes.items() if time.monotonic() > until]
        for source in [*there, *(probe for probe in late if probe not in there)]:
            yield from self._next(source) if source in self._streams else self._note_loss(source)

    def _next(self, stream: Any) -> Iterator[tuple[int, Event]]:
        worker = self._streams[stream]
        try:
            event: Event = self.ray.get(next(stream))
        except Exception as error:  # noqa: BLE001  the actor, its node, or the object that it sent
            del self._streams[stream]
            if worker in self._nodes:
                self._probe(worker)
            else:  # it died before it was ready
                cause = str(error).strip() or "it ended without a reason"
                yield worker, Lost(cause.splitlines()[-1], False)
            return
        if isinstance(event, Ready):
            self._nodes[worker] = event.machine["node"]
        yield worker, event

    def _probe(self, worker: int) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        place = NodeAffinitySchedulingStrategy(self._nodes[worker], soft=False)
        options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": place}
        probe = self.ray.remote(**options)(_host).remote()
        self._probes[probe] = (worker, time.monotonic() + _PROBE_S)

    def _note_loss(self, probe: Any) -> Iterator[tuple[int, Event]]:
        worker, _ = self._probes.pop(probe)
        try:
            host = self.ray.get(probe, timeout=0)
        except Exception:  # noqa: BLE001  Ray's, of many kinds
            yield worker, Lost("its node was lost", False)
        else:
            yield worker, Lost(f"its process on {host} died", True)


def _reach(address: str) -> None:
    """Raise OSError at once where Ray would wait for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), _CONNECT_S).close()


def _host() -> str:
    return socket.gethostname()


class _Actor:
    """The process on a node, and the worker's channel: orders come in, events go out."""

    def __init__(self) -> None:
        self.orders: queue.Queue[tuple[int, Order]] = queue.Queue()
        self.events: queue.Queue[Event | None] = queue.Queue()
        self.send, self.recv = self.events.put, self.orders.get

    def poll(self) -> bool:
        return not self.orders.empty()

    def put(self, order: tuple[int, Order]) -> None:
        self.orders.put(order)

    def serve(self, setup: WorkerSetup) -> Iterator[Event]:
        """Yield what the worker sends; it ends with the driver, whose actor this is."""
        share_main_heap()
        threading.Thread(target=self._serve, args=(setup,), daemon=True).start()
        while (event := self.events.get()) is not None:
            yield event

    def _serve(self, setup: WorkerSetup) -> None:
        import ray

        from digitlab.base.environment import describe_environment
        from digitlab.data.datasets import cache_training_digits
        from digitlab.workers.job import serve

        lab = Path(os.environ.get("DIGITLAB_HOME") or setup.lab).expanduser().resolve()
        node = ray.get_runtime_context().get_node_id()
        cache_training_digits()
        try:
            serve(replace(setup, lab=lab), self, {"node": node}, describe_environment())
        finally:
            self.events.put(None)
