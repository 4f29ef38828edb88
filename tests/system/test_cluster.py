"""Studies on many machines: real PostgreSQL, a real MLflow server, real Ray nodes, real losses."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from conftest import DATA, TINY

from digitlab.base.errors import UserError
from digitlab.base.paths import ROOT
from digitlab.config.compose import compose
from digitlab.study.driver import sweep
from digitlab.study.storage import open_storage
from digitlab.study.trials import Search, TrialRow

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

DIGITLAB = Path(sys.executable).with_name("digitlab")
STUDY = ["study.sampler=random", "study.final_seeds=1", "study.confirm_seeds=1"]


class Site:
    """A driver and workers, each with a lab of its own, on one storage and one tracker."""

    def __init__(self, folder: Path, postgres: Any, mlflow: Any) -> None:
        self.folder, self.postgres, self.mlflow = folder, postgres, mlflow
        self.address = postgres.create()
        self.processes: list[subprocess.Popen[str]] = []
        self.secrets = {"PGPASSWORD": postgres.password, **mlflow.credentials}

    def lab(self, name: str) -> Path:
        lab = self.folder / name
        if not lab.exists():
            ignore = shutil.ignore_patterns("*.md")
            shutil.copytree(DATA, lab / "data" / "sample", ignore=ignore)
        return lab

    def start(
        self, lab: str, *arguments: str, prefix: Sequence[str] = (), **environment: str
    ) -> subprocess.Popen[str]:
        """`digitlab` in a process of its own; what it prints goes to `log` in its lab."""
        place = {"DIGITLAB_HOME": str(self.lab(lab)), "PYTHONPATH": str(ROOT / "src")}
        secrets = {k: v for k, v in self.secrets.items() if k not in environment}
        with open(self.lab(lab) / "log", "a") as log:
            process = subprocess.Popen(
                [*prefix, str(DIGITLAB), *arguments],
                env=os.environ | place | secrets | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def sweep(
        self, trials: int, *overrides: str, lab: str = "driver", prefix: Sequence[str] = ()
    ) -> subprocess.Popen[str]:
        stores = [f"study.storage={self.address}", f"tracking.uri={self.mlflow.uri}"]
        total = f"study.trials={trials}"
        return self.start(lab, "sweep", *TINY, *STUDY, *stores, total, *overrides, prefix=prefix)

    def worker(self, lab: str, **environment: str) -> subprocess.Popen[str]:
        return self.start(lab, "worker", "smoke", "--storage", self.address, **environment)

    @cached_property
    def search(self) -> Search:
        config = compose("sweep", [*TINY, *STUDY])[0].config
        storage = open_storage(self.folder, self.address, 60)
        return Search(storage, config)

    def rows(self) -> list[TrialRow]:
        return self.search.rows()

    def until(self, ended: int, seconds: float = 300) -> None:
        """Wait until so many trials have ended."""
        deadline = time.monotonic() + seconds
        while sum(row.ended for row in self.rows()) < ended:
            assert time.monotonic() < deadline, self.told()
            time.sleep(0.3)

    def log(self, lab: str) -> str:
        return (self.lab(lab) / "log").read_text()

    def told(self) -> str:
        logs = sorted(self.folder.glob("*/log"))
        return "\n".join(f"-- {log.parent.name}\n{log.read_text()[-2000:]}" for log in logs)

    def wait(self, process: subprocess.Popen[str], seconds: float = 400) -> int:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end after {seconds} s\n{self.told()}") from None

    def assert_whole(self, total: int) -> None:
        """An exact total, and both stores agree on every trial, by `digitlab audit`."""
        rows = self.rows()
        assert [row.number for row in rows] == list(range(total))
        assert all(row.ended for row in rows)
        place = {"DIGITLAB_STORAGE": self.address, "MLFLOW_TRACKING_URI": self.mlflow.uri}
        audit = self.start("audit", "audit", "smoke", "--json", **place)
        status = self.wait(audit)
        told = self.log("audit")
        assert status == 0, told
        assert json.loads(told)["problems"] == []

    def close(self) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert self.search.engine is not None
        self.search.engine.dispose()


@pytest.fixture
def site(
    tmp_path: Path, postgres: Any, mlflow_server: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Site]:
    monkeypatch.setenv("PGPASSWORD", postgres.password)
    site = Site(tmp_path, postgres, mlflow_server)
    yield site
    site.close()


def test_workers_started_by_hand_share_a_study_that_refuses_others(
    site: Site, tmp_path: Path
) -> None:
    assert site.wait(site.worker("early")) == 2
    assert "no such study" in site.log("early")
    driver = site.sweep(16, "launcher=external")
    until_waiting(site)

    second = site.sweep(16, "launcher=external", lab="second")
    shutil.copytree(ROOT / "src", tmp_path / "src")
    with open(tmp_path / "src/digitlab/lab.py", "a") as file:
        file.write("# another version\n")
    for name in ("conf", "experiments"):
        (tmp_path / name).symlink_to(ROOT / name)
    other_code = site.worker("other-code", PYTHONPATH=str(tmp_path / "src"))
    images = site.lab("other-data") / "data/sample/train-images-idx3-ubyte"
    content = bytearray(images.read_bytes())
    content[-1] ^= 1
    images.write_bytes(content)
    other_data = site.worker("other-data")
    stranger = site.worker("stranger", PGPASSWORD="wrong-password")
    refused = [second, other_code, other_data, stranger]
    assert [site.wait(process) for process in refused] == [2, 2, 2, 2], site.told()
    assert "another machine leads it already" in site.log("second")
    assert "is refused as a worker" in site.log("other-code")
    assert "source code was" in site.log("other-code")
    assert "password authentication failed" in site.log("stranger")
    assert "wrong-password" not in site.log("stranger")
    assert "is not the known file" in site.log("other-data")
    for lab in ("other-code", "stranger"):
        assert site.log(lab).count("\n") == 2, site.log(lab)  # that it joins, and why not

    workers = [site.worker(f"worker-{n}") for n in range(2)]
    assert site.wait(driver) == 0, site.told()
    assert [site.wait(worker) for worker in workers] == [0, 0], site.told()
    site.assert_whole(16)
    no_secret_is_recorded(site)


def until_waiting(site: Site) -> None:
    deadline = time.monotonic() + 180
    while "waiting for workers" not in site.log("driver"):
        assert time.monotonic() < deadline, site.told()
        time.sleep(0.2)


def no_secret_is_recorded(site: Site) -> None:
    """Neither password stands in a lab, a log, an artifact, or either database."""
    secrets = [secret.encode() for secret in site.secrets.values() if len(secret) > 8]
    assert secrets
    for path in site.folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(secret in content for secret in secrets), path
    dump = site.postgres.dump()
    assert not any(secret in dump for secret in secrets)


def test_driver_with_processes_of_its_own_is_joined_by_another_machine(site: Site) -> None:
    # Passwords stand in the lab's .env alone, as on a machine of a person's.
    (site.lab("driver") / ".env").write_text("".join(f"{k}={v}\n" for k, v in site.secrets.items()))
    unset = [word for name in site.secrets for word in ("-u", name)]
    long = ["study.pruner=none", "trainer.epochs=20"]  # s a trial: time to join
    driver = site.sweep(20, "study.workers=1", *long, prefix=["env", *unset])
    site.until(1)
    worker = site.worker("worker")
    assert site.wait(driver) == 0, site.told()
    assert site.wait(worker) == 0, site.told()
    site.assert_whole(20)
    assert " 0 trials of smoke" not in site.log("worker")


def test_workers_leave_and_trials_are_put_back(site: Site) -> None:
    driver = site.sweep(24, "launcher=external")
    until_waiting(site)
    leaves = site.worker("leaves")
    site.until(3)
    os.kill(leaves.pid, signal.SIGTERM)  # as Slurm and Kubernetes do
    assert site.wait(leaves, 60) == 130, site.told()
    assert not any(row.state == "running" for row in site.rows())
    victim, other = site.worker("victim"), site.worker("other")
    site.until(10)
    os.kill(victim.pid, signal.SIGKILL)
    assert site.wait(driver) == 0, site.told()
    assert site.wait(other) == 0, site.told()
    site.assert_whole(24)


def test_postgresql_crashes_and_the_driver_is_killed_in_the_middle(site: Site) -> None:
    driver = site.sweep(60, "launcher=external")
    until_waiting(site)
    workers = [site.worker(f"worker-{n}") for n in range(2)]
    site.until(15)
    site.postgres.stop("immediate")
    time.sleep(5)
    site.postgres.start()
    site.until(35)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    again = site.sweep(60, "launcher=external")
    assert site.wait(again) == 0, site.told()
    assert [site.wait(worker) for worker in workers] == [0, 0], site.told()
    site.assert_whole(60)


def test_mlflow_server_is_away_for_a_minute(site: Site) -> None:
    driver = site.sweep(50, "launcher=external")
    until_waiting(site)
    workers = [site.worker(f"worker-{n}") for n in range(2)]
    site.until(15)
    site.mlflow.stop()
    time.sleep(60)
    site.mlflow.start()
    assert site.wait(driver) == 0, site.told()
    assert [site.wait(worker) for worker in workers] == [0, 0], site.told()
    site.assert_whole(50)
    assert not list(site.folder.glob("worker-*/outbox/*/operations.jsonl"))


def test_machine_that_is_cut_off_comes_back_to_find_its_trial_given_away(
    network: Any,
    near_postgres: Any,
    near_mlflow: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PGPASSWORD", near_postgres.password)
    site = Site(tmp_path, near_postgres, near_mlflow)
    try:
        driver = site.sweep(12, "launcher=external", "trainer.epochs=20")  # s a trial
        until_waiting(site)
        command = ["worker", "smoke", "--storage", site.address]
        far = site.start("far", *command, prefix=network.far())
        site.until(3)
        deadline = time.monotonic() + 180
        while not any(row.state == "running" for row in site.rows()):
            assert time.monotonic() < deadline, site.told()
        network.cut()
        near = site.worker("near")
        assert site.wait(near) == 0, site.told()
        network.join()
        assert [site.wait(process) for process in (driver, far)] == [0, 0], site.told()
        assert any(row.notes.get("attempts") for row in site.rows())  # lost, and put back
        site.assert_whole(12)
        assert not list(site.lab("far").glob("outbox/*"))
    finally:
        site.close()


def ray_sweep(site: Site, cluster: Any, trials: int, *overrides: str) -> subprocess.Popen[str]:
    workers = ["launcher=ray", f"launcher.address={cluster.address}", "launcher.workers=2"]
    stores = [f"study.storage={site.address}", f"tracking.uri={site.mlflow.uri}"]
    total = f"study.trials={trials}"
    arguments = [*TINY, *STUDY, *stores, total, *workers, *overrides]
    return site.start("driver", "sweep", *arguments, **cluster.environment)


def prepare_nodes(site: Site, cluster: Any) -> None:
    for lab in cluster.labs:
        ignore = shutil.ignore_patterns("*.md")
        shutil.copytree(DATA, lab / "data" / "sample", ignore=ignore, dirs_exist_ok=True)
        secrets = "".join(f"{key}={value}\n" for key, value in site.secrets.items())
        (lab / ".env").write_text(secrets)


@pytest.mark.parametrize("seed", range(int(os.environ.get("DIGITLAB_REPEATS", "1"))))
def test_ray_node_is_killed_at_a_random_time(
    site: Site, start_ray: Callable[[], Any], seed: int
) -> None:
    cluster = start_ray()
    prepare_nodes(site, cluster)
    driver = ray_sweep(site, cluster, 60)
    site.until(random.Random(seed).randint(3, 40))
    cluster.kill(1)
    assert site.wait(driver) == 0, site.told()
    site.assert_whole(60)


def test_ray_study_is_stopped_and_its_driver_killed_and_goes_on(
    site: Site, start_ray: Callable[[], Any]
) -> None:
    cluster = start_ray()
    prepare_nodes(site, cluster)
    driver = ray_sweep(site, cluster, 40)
    site.until(5)
    os.kill(driver.pid, signal.SIGINT)
    assert site.wait(driver, 120) == 130, site.told()
    ended = sum(row.ended for row in site.rows())
    assert not any(row.state == "running" for row in site.rows())
    driver = ray_sweep(site, cluster, 40)
    site.until(ended + 8)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    assert site.wait(ray_sweep(site, cluster, 40)) == 0, site.told()
    site.assert_whole(40)


def refusal(lab: Path, *arguments: str) -> str:
    with pytest.raises(UserError) as told:
        sweep(compose("sweep", [*TINY, *arguments])[0], lab)
    return str(told.value)


def test_what_a_cluster_needs_is_asked_for(lab: Path, postgres: Any) -> None:
    address = f"study.storage={postgres.create()}"
    assert "study.storage=null" in refusal(lab, "launcher=ray")
    assert "tracking.uri=null" in refusal(lab, "launcher=external", address)
