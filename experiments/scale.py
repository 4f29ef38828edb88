"""How many workers one PostgreSQL server coordinates: trials that sleep instead of train.

    python experiments/scale.py ADDRESS --workers 64 --trials 1000 --seconds 1 --earlier 0

Each worker is a process that does what `digitlab worker` does with a trial, less the training:
claim, own, choose values, sleep, tell. Workers are forked from
one process that has read the earlier trials, so that their imports and first reads (of which the
time is told) are not counted. A new study is made in the database at ADDRESS. Prints one JSON line.

`--bare direct` does the same with Optuna's own ask and tell alone, `--bare proxy` through its gRPC
proxy (which needs grpcio): no owner, no signs of life, no exact total.
"""

import argparse
import json
import multiprocessing
import os
import random
import statistics
import time
from pathlib import Path

import optuna
from optuna.samplers import RandomSampler
from optuna.storages import GrpcStorageProxy, RDBStorage
from sqlalchemy import create_engine, text

from digitlab.config.compose import compose
from digitlab.study.space import suggest
from digitlab.study.storage import open_storage
from digitlab.study.trials import Search

# Earlier trials, as many rows as real ones have; made by the server, since telling takes minutes.
_EARLIER = """
WITH made AS (
  INSERT INTO trials (number, study_id, state, datetime_start, datetime_complete)
  SELECT n, :study, 'COMPLETE', now(), now() FROM generate_series(0, :count - 1) n
  RETURNING trial_id
), valued AS (
  INSERT INTO trial_values (trial_id, objective, value, value_type)
  SELECT trial_id, 0, 0.98 + random() / 100, 'FINITE' FROM made
), noted AS (
  INSERT INTO trial_user_attributes (trial_id, key, value_json)
  SELECT trial_id, key, '{"val_accuracy": 0.98}' FROM made, unnest(ARRAY['metrics', 'curve']) key
)
INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json)
SELECT trial_id, p.param_name,
  CASE p.param_name WHEN 'model.hidden' THEN 64 + floor(random() * 190)
    WHEN 'trainer.epochs' THEN 3 + floor(random() * 3) WHEN 'model.widths' THEN floor(random() * 3)
    ELSE 0.004 + random() * 0.02 END,
  p.distribution_json
FROM made, (SELECT param_name, distribution_json FROM trial_params WHERE trial_id = :model) p
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--earlier", type=int, default=0)
    parser.add_argument("--sampler", default="random")
    parser.add_argument("--bare", choices=["direct", "proxy"])
    asked = parser.parse_args()
    chosen = [f"study.storage={asked.address}", f"study.name=scale-{os.getpid()}"]
    chosen += [f"study.sampler={asked.sampler}", "study.pruner=none", "study.rungs=[]"]
    config = compose("sweep", chosen)[0].config
    search = Search(open_storage(Path(), asked.address), config)
    server = create_engine(asked.address, isolation_level="AUTOCOMMIT")
    made = 0
    if asked.earlier:
        first = search.claim(1)  # a model for the others
        assert first is not None
        search.ask(first)
        search.tell(first, "finished", 0.98, {"metrics": {"val_accuracy": 0.98}, "curve": [0.98]})
        made = 1
        with server.connect() as connection:
            about = {"study": search.id, "count": asked.earlier, "model": search._id(first)}
            query = _EARLIER.replace("generate_series(0, :count - 1)", "generate_series(1, :count)")
            connection.execute(text(query), about)
            connection.execute(text("ANALYZE"))
        made += asked.earlier
    begun = time.perf_counter()
    search.rows()
    first_read = time.perf_counter() - begun
    context = multiprocessing.get_context("fork")
    told, ready, go = context.SimpleQueue(), context.Semaphore(0), context.Event()
    assert search.engine is not None
    search.engine.dispose()  # connections are not for children to inherit
    workers = [
        context.Process(
            target=work, args=(search, asked.seconds, made + asked.trials, told, ready, go)
        )
        for _ in range(asked.workers)
    ]
    for worker in workers:
        worker.start()
    for _ in workers:
        ready.acquire()
    before, used, begun = commits(server), processor_seconds(), time.perf_counter()
    go.set()
    waits = [wait for _ in workers for wait in told.get()]
    took = time.perf_counter() - begun
    load = processor_seconds() - used
    for worker in workers:
        worker.join()
    with server.connect() as connection:
        query = text("SELECT count(*) FROM trials WHERE study_id = :study AND state = 'COMPLETE'")
        complete = connection.execute(query, {"study": search.id}).scalar()
    assert complete == made + asked.trials == made + len(waits), "an exact total"
    waits.sort()
    document = {
        **{name: value for name, value in vars(asked).items() if name != "address"},
        "trials_a_second": round(asked.trials / took, 2),
        "share_of_ideal": round(asked.trials * asked.seconds / asked.workers / took, 4),
        "ask_and_tell_ms": {
            "median": round(1000 * statistics.median(waits), 1),
            "p99": round(1000 * waits[int(0.99 * (len(waits) - 1))], 1),
            "max": round(1000 * waits[-1], 1),
        },
        "server_cores": round(load / took, 2),
        "commits_a_trial": round((commits(server) - before) / asked.trials, 1),
        "first_read_s": round(first_read, 2),
    }
    print(json.dumps(document), flush=True)


def work(search: Search, seconds: float, total: int, told, ready, go) -> None:
    random.seed(os.getpid())
    waits = []
    search.rows()  # opens a connection of its own
    ready.release()
    go.wait()
    while True:
        begun = time.perf_counter()
        number = search.claim(total)
        if number is None:
            break
        with search.alive(number, 0):
            search.ask(number)
            asked = time.perf_counter() - begun
            time.sleep(seconds)
            begun = time.perf_counter()
            notes = {"metrics": {"val_accuracy": 0.98}, "curve": [0.97, 0.98]}
            search.tell(number, "finished", random.uniform(0.98, 0.99), notes)  # noqa: S311
        waits.append(asked + time.perf_counter() - begun)
    told.put(waits)


_PORT = 13013  # of the proxy


def proxy(address: str) -> None:
    storage = RDBStorage(address, engine_kwargs={"pool_size": 10, "max_overflow": 0})
    optuna.storages.run_grpc_proxy_server(storage, host="127.0.0.1", port=_PORT)


def bare(what, seconds: float, total: int, told, ready, go) -> None:
    address, config, knobs = what
    storage = RDBStorage(address) if address else GrpcStorageProxy(host="127.0.0.1", port=_PORT)
    study = optuna.load_study(
        study_name=config.study.name, storage=storage, sampler=RandomSampler(os.getpid())
    )
    waits = []
    ready.release()
    go.wait()
    while True:
        begun = time.perf_counter()
        trial = study.ask()
        if trial.number >= total:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            break
        suggest(trial, knobs)
        asked = time.perf_counter() - begun
        time.sleep(seconds)
        begun = time.perf_counter()
        trial.set_user_attr("metrics", {"val_accuracy": 0.98})
        trial.set_user_attr("curve", [0.97, 0.98])
        study.tell(trial, random.uniform(0.98, 0.99))  # noqa: S311
        waits.append(asked + time.perf_counter() - begun)
    told.put(waits)


def commits(server) -> int:
    with server.connect() as connection:
        query = text("SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()")
        connection.execute(text("SELECT pg_stat_force_next_flush()"))
        return int(connection.execute(query).scalar())


def processor_seconds() -> float:
    """Of all the server's processes on this machine, those that have ended as well."""
    ticks = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            name, _, rest = (process / "stat").read_text().rpartition(")")
        except OSError:
            continue
        if "(postgres" in name:
            fields = rest.split()
            ticks += sum(int(field) for field in fields[11:15])  # its own, and its children's
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
