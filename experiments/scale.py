"""How many workers one driver serves: trials that sleep instead of train.

    python experiments/scale.py --workers 64 --trials 1280 --seconds 1
    python experiments/scale.py --ray --workers 4 --trials 80 --seconds 1

Without --ray the workers are entries of a clock in the driver's process, so that the driver alone
is measured: it draws values, submits jobs, receives results, and writes to Optuna's storage, and to
MLflow in the lab with --track. With --ray they are actors of a cluster that `ray start --head` has
started. Every call makes a new study, in a temporary lab or on the server of --storage. Prints one
JSON line.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from typing import Any

from bench_driver import ClockWorkers, fill, lead, open_study
from bench_tools import leave_stores
from ending import end_plainly

from digitlab.workers.base import Event, Job, Ready, Workers, WorkerSetup


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--workers", type=int, default=64, help="workers")
    parser.add_argument("--trials", type=int, default=640, help="trials to run")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a trial")
    parser.add_argument("--earlier", type=int, default=0, help="finished trials at the start")
    parser.add_argument("--sampler", default="random", help="study.sampler")
    parser.add_argument("--storage", help="postgresql+psycopg://user@host/database")
    parser.add_argument("--track", action="store_true", help="record in MLflow on sqlite")
    parser.add_argument("--ray", action="store_true", help="workers are actors of a Ray cluster")
    options = parser.parse_args()
    overrides = [f"study.name=scale-{os.getpid()}", f"study.sampler={options.sampler}"]
    overrides.append(f"tracking={'mlflow' if options.track else 'none'}")
    if options.storage:
        overrides.append(f"study.storage='{options.storage}'")
    with open_study(leave_stores(), *overrides) as session:
        fill(session.store, options.earlier)
        workers: Workers = ClockWorkers(options.workers, options.seconds)
        if options.ray:
            workers = ray_workers(WorkerSetup(session.lab, session.config.data), options)
        with workers:
            workers.start()
            ready = 0
            while options.ray and ready < options.workers:
                ready += sum(isinstance(event, Ready) for _, event in workers.events(10))
            used = time.process_time()
            seconds = lead(session, workers, options.trials)
            used = time.process_time() - used
        left = session.records.outbox.pending()
        rows = session.store.rows()
    assert len(rows) == options.earlier + options.trials, "an exact total"
    assert all(row.state == "finished" for row in rows)
    document = {
        **vars(options),
        "storage": "postgresql" if options.storage else "sqlite",
        "trials_per_s": round(options.trials / seconds, 2),
        "share_of_ideal": round(options.trials * options.seconds / options.workers / seconds, 4),
        "driver_ms_a_trial": round(1000 * used / options.trials, 1),  # of a core
        "records_not_yet_delivered": left,
        "load": os.getloadavg()[0],
    }
    print(json.dumps(document))


def ray_workers(setup: WorkerSetup, options: argparse.Namespace) -> Workers:
    """Return Ray workers whose actors sleep."""
    from digitlab.config.compose import compose
    from digitlab.workers import ray

    end = ClockWorkers(1, 0.0).course
    pause = options.seconds

    class Sleeper(ray._Actor):
        def serve(self, setup: WorkerSetup) -> Iterator[Event]:
            import ray

            yield Ready({"host": "", "node": ray.get_runtime_context().get_node_id()})
            while True:
                _, order = self.recv()
                if isinstance(order, Job):
                    time.sleep(pause)
                    yield from end

    actors: Any = ray
    actors._Actor = Sleeper
    few = [f"launcher.workers={options.workers}", "launcher.cpus=0.01"]
    return ray.RayWorkers(setup, compose("sweep", ["launcher=ray", *few])[0].config.launcher)


if __name__ == "__main__":
    end_plainly(main)
