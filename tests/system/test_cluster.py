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

from digitlab.base.paths import ROOT
from digitlab.config.compose import compose
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


def ray_sweep(site: Site, cluster: Any, trials: int, *overrides: str) -> subprocess.Popen[str]:
    workers = ["launcher=ray", f"launcher.address={cluster.address}", "launcher.workers=2"]
    stores = [f"study.storage={site.address}", f"tracking.uri={site.mlflow.uri}"]
    total = f"study.trials={trials}"
    arguments = [*TINY, *STUDY, *stores, total, *workers, *overrides]
    return site.start("driver", "sweep", *arguments, **cluster.environment)


def prepare_nodes(cluster: Any) -> None:
    for lab in cluster.labs:
        ignore = shutil.ignore_patterns("*.md")
        shutil.copytree(DATA, lab / "data" / "sample", ignore=ignore, dirs_exist_ok=True)


@pytest.mark.parametrize("seed", range(int(os.environ.get("DIGITLAB_REPEATS", "1"))))
def test_ray_node_is_killed_at_a_random_time(
    site: Site, start_ray: Callable[[], Any], seed: int
) -> None:
    cluster = start_ray()
    prepare_nodes(cluster)
    driver = ray_sweep(site, cluster, 60)
    site.until(random.Random(seed).randint(3, 40))
    cluster.kill(1)
    assert site.wait(driver) == 0, site.told()
    site.assert_whole(60)
    no_secret_is_recorded(site)


def test_ray_study_is_stopped_and_its_driver_killed_and_goes_on(
    site: Site, start_ray: Callable[[], Any]
) -> None:
    cluster = start_ray()
    prepare_nodes(cluster)
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
