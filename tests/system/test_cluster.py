"""Studies on many machines: real PostgreSQL, a real MLflow server, real Ray nodes, real losses."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import worker_faults
from conftest import DATA, SHARE, TINY
from optuna.storages import RDBStorage

from digitlab.base.paths import ROOT
from digitlab.base.retry import retry
from digitlab.base.server import is_away
from digitlab.config.compose import compose
from digitlab.study.goal import TrialRow
from digitlab.study.storage import open_storage
from digitlab.study.trials import TrialStore

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

DIGITLAB = Path(sys.executable).with_name("digitlab")
HOOKS = ROOT / "tests" / "support" / "hooks.py"
STUDY = [*TINY, "study.sampler=random", "study.pruner=none"]
TRIALS = max(12, int(60 * SHARE))
WAIT_S = 300.0  # for what must come: only a failing test takes so long


class Site:
    """Machines, each with a lab of its own, on one storage and one tracker."""

    def __init__(self, folder: Path, postgres: Any, mlflow: Any) -> None:
        self.folder, self.postgres, self.mlflow = folder, postgres, mlflow
        self.address = postgres.create()
        self.processes: list[subprocess.Popen[str]] = []
        self.secrets = {"PGPASSWORD": postgres.password, **mlflow.credentials}

    def lab(self, name: str) -> Path:
        lab = self.folder / name
        if not lab.exists():
            copy_data(lab)
        return lab

    def start(self, lab: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """`digitlab` in a process of its own; what it prints goes to `log` in its lab."""
        place = {"DIGITLAB_HOME": str(self.lab(lab)), "PYTHONPATH": str(ROOT / "src")}
        with open(self.lab(lab) / "log", "a") as log:
            process = subprocess.Popen(
                [str(DIGITLAB), *arguments],
                env=os.environ | place | self.secrets | environment,
                cwd=self.lab(lab),
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def sweep(
        self, trials: int, *overrides: str, lab: str = "driver", **environment: str
    ) -> subprocess.Popen[str]:
        stores = [f"study.storage={self.address}", f"tracking.uri={self.mlflow.uri}"]
        arguments = [*STUDY, *stores, f"study.trials={trials}", *overrides]
        return self.start(lab, "sweep", *arguments, **environment)

    def audit(self, lab: str = "audit", *flags: str) -> tuple[int, str]:
        before = len(self.log(lab))
        audit = self.start(lab, "audit", "smoke", *flags, DIGITLAB_STORAGE=self.address)
        return self.wait(audit), self.log(lab)[before:]

    @cached_property
    def storage(self) -> RDBStorage:
        return open_storage(self.folder, self.address)

    def rows(self) -> list[TrialRow]:
        """Return the study's trials; none where it does not exist yet."""
        return retry(self._rows, is_away, WAIT_S)  # after a restart, old connections fail

    def _rows(self) -> list[TrialRow]:
        for study in self.storage.get_all_studies():
            if "fingerprint" in self.storage.get_study_user_attrs(study._study_id):
                return TrialStore(self.storage, compose("sweep", STUDY)[0].config).rows()
        return []

    def ended(self) -> int:
        return sum(row.is_ended for row in self.rows())

    def until(self, condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
        """Wait until something holds, for as long as the process runs."""
        while not condition():
            assert process.poll() is None, self.logs()
            time.sleep(0.2)

    def log(self, lab: str) -> str:
        path = self.lab(lab) / "log"
        return path.read_text() if path.exists() else ""

    def logs(self) -> str:
        logs = sorted(self.folder.glob("*/log"))
        return "\n".join(f"-- {log.parent.name}\n{log.read_text()[-2000:]}" for log in logs)

    def wait(self, process: subprocess.Popen[str], seconds: float = WAIT_S) -> int:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end after {seconds} s\n{self.logs()}") from None

    def assert_whole(self, total: int) -> None:
        """An exact total, and both stores agree on every trial, by `digitlab audit`."""
        rows = self.rows()
        assert [row.number for row in rows] == list(range(total))
        assert {row.state for row in rows} == {"finished"}
        status, text = self.audit("audit", "--json")
        assert status == 0, text
        assert json.loads(text)["problems"] == []
        assert not list(self.folder.glob("*/outbox/*"))

    def close(self) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.storage.engine.dispose()


def copy_data(lab: Path) -> None:
    ignore = shutil.ignore_patterns("*.md")
    shutil.copytree(DATA, lab / "data" / "sample", ignore=ignore, dirs_exist_ok=True)


def open_site(
    folder: Path, postgres: Any, mlflow: Any, patch: pytest.MonkeyPatch
) -> Iterator[Site]:
    for name, value in {"PGPASSWORD": postgres.password, **mlflow.credentials}.items():
        patch.setenv(name, value)
    site = Site(folder, postgres, mlflow)
    yield site
    site.close()


@pytest.fixture
def site(
    tmp_path: Path, postgres: Any, mlflow_server: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Site]:
    yield from open_site(tmp_path, postgres, mlflow_server, monkeypatch)


@pytest.fixture
def near_site(
    tmp_path: Path, near_postgres: Any, near_mlflow: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Site]:
    """As `site`, on the near side of a network that can be cut."""
    yield from open_site(tmp_path, near_postgres, near_mlflow, monkeypatch)


def no_secret_is_recorded(site: Site) -> None:
    """Neither password stands in a lab, a log, an artifact, or either database."""
    secrets = [secret.encode() for secret in site.secrets.values() if len(secret) > 8]
    assert len(secrets) == 2
    for path in site.folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(secret in content for secret in secrets), path
    dump = site.postgres.dump()
    assert not any(secret in dump for secret in secrets)


def test_mlflow_is_away_and_postgresql_crashes_in_the_middle(site: Site) -> None:
    # Passwords stand in the lab's .env alone, as on a machine of a person's.
    secrets, site.secrets = site.secrets, {}
    (site.lab("driver") / ".env").write_text("".join(f"{k}={v}\n" for k, v in secrets.items()))
    driver = site.sweep(TRIALS, "study.workers=2")
    site.until(lambda: site.ended() >= 2, driver)
    site.mlflow.stop()
    before = site.ended()
    site.until(lambda: site.ended() >= before + 4, driver)  # nothing waits for it
    site.postgres.stop("immediate")
    site.postgres.start()
    before = site.ended()
    site.until(lambda: site.ended() >= before + 2, driver)
    site.mlflow.start()
    assert site.wait(driver) == 0, site.logs()
    (site.lab("driver") / ".env").unlink()
    site.secrets = secrets
    site.assert_whole(TRIALS)
    no_secret_is_recorded(site)


def test_one_machine_leads_and_obeys_ctrl_c_while_postgresql_is_away(site: Site) -> None:
    (site.lab("driver") / "faults.json").write_text(json.dumps({"record": True}))
    driver = site.sweep(100_000, "study.workers=2", DIGITLAB_FAULTS=str(HOOKS))
    site.until(lambda: site.ended() >= 1, driver)

    second = site.sweep(100_000, lab="second")
    assert site.wait(second) == 2, site.logs()
    assert "study.name=smoke is in use" in site.log("second")
    for flags in ([], ["--repair"]):
        status, text = site.audit("third", *flags)
        assert status == 2
        assert "study.name=smoke is in use" in text

    site.postgres.stop("fast")
    site.until(lambda: is_writing(site.lab("driver") / "points"), driver)
    os.kill(driver.pid, signal.SIGINT)
    started = time.monotonic()
    assert site.wait(driver) == 130, site.logs()
    assert time.monotonic() - started < 60, "far less than an outage may last"
    assert "Traceback" not in site.log("driver")

    site.postgres.start()
    total = max(4, len(site.rows()))
    assert site.wait(site.sweep(total)) == 0, site.logs()
    site.assert_whole(total)


def is_writing(points: Path) -> bool:
    """Whether the driver's last point is one before a write to the storage."""
    trial = [point for point in points.read_text().split() if point.startswith("trial.")]
    return trial[-1] in ("trial.before_tell", "trial.drawn")


# Ray


def prepare_nodes(cluster: Any) -> None:
    for lab in cluster.labs:
        copy_data(lab)


def ray_sweep(site: Site, cluster: Any, trials: int, workers: int = 2) -> subprocess.Popen[str]:
    ray = ["launcher=ray", f"launcher.address={cluster.address}", f"launcher.workers={workers}"]
    return site.sweep(trials, *ray, **cluster.environment)


@pytest.mark.parametrize("seed", range(int(os.environ.get("DIGITLAB_REPEATS", "1"))))
def test_a_ray_node_is_killed_at_a_random_trial(
    site: Site, start_ray: Callable[..., Any], seed: int
) -> None:
    cluster = start_ray()
    prepare_nodes(cluster)
    driver = ray_sweep(site, cluster, TRIALS)
    count = random.Random(seed).randint(3, TRIALS // 2)
    site.until(lambda: site.ended() >= count, driver)
    cluster.kill(1)
    assert site.wait(driver) == 0, site.logs()
    site.assert_whole(TRIALS)
    assert {row.notes.get("charged", 0) for row in site.rows()} == {0}


def test_a_ray_node_is_cut_off_while_it_has_a_result_to_send(
    near_site: Site, start_ray: Callable[..., Any], network: Any, tmp_path: Path
) -> None:
    site, orders = near_site, tmp_path / "orders"
    orders.mkdir()
    cluster = start_ray(nodes=1, network=network)
    faults = {"DIGITLAB_FAULTS": worker_faults.__file__, "DIGITLAB_FAULT_ORDERS": str(orders)}
    cluster.add(1, **faults)
    prepare_nodes(cluster)
    cluster.wait(2)
    driver = ray_sweep(site, cluster, TRIALS)
    site.until(lambda: site.ended() >= 2, driver)
    order = orders / "hang@job.finished"
    order.touch()
    site.until(lambda: not order.exists(), driver)  # the far worker has trained, and waits
    network.cut()
    orders.rename(tmp_path / "gone")  # it sends its result now, which goes nowhere
    assert site.wait(driver) == 0, site.logs()
    site.assert_whole(TRIALS)
    assert {row.notes.get("charged", 0) for row in site.rows()} == {0}
    assert max(row.attempt for row in site.rows()) == 2


def test_a_study_on_ray_is_stopped_and_its_driver_killed_and_goes_on(
    site: Site, start_ray: Callable[..., Any]
) -> None:
    cluster = start_ray(nodes=1, cpus=2)
    prepare_nodes(cluster)
    driver = ray_sweep(site, cluster, TRIALS)
    site.until(lambda: site.ended() >= 3, driver)
    os.kill(driver.pid, signal.SIGINT)
    assert site.wait(driver) == 130, site.logs()
    ended = site.ended()
    assert not any(row.state == "running" for row in site.rows())
    driver = ray_sweep(site, cluster, TRIALS)
    site.until(lambda: site.ended() >= min(TRIALS - 2, ended + 3), driver)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    assert site.wait(ray_sweep(site, cluster, TRIALS)) == 0, site.logs()
    site.assert_whole(TRIALS)


def test_nodes_with_other_data_or_code_are_refused_and_the_study_goes_on(
    site: Site, start_ray: Callable[..., Any], tmp_path: Path
) -> None:
    cluster = start_ray(nodes=2)
    prepare_nodes(cluster)
    images = cluster.labs[1] / "data/sample/train-images-idx3-ubyte"
    content = bytearray(images.read_bytes())
    content[-1] ^= 1
    images.write_bytes(content)
    shutil.copytree(ROOT / "src", tmp_path / "code" / "src")
    with open(tmp_path / "code/src/digitlab/training/fit.py", "a") as file:
        file.write("# another version\n")
    for name in ("conf", "experiments"):
        (tmp_path / "code" / name).symlink_to(ROOT / name)
    node = cluster.add(PYTHONPATH=str(tmp_path / "code" / "src"))
    copy_data(node.lab)
    cluster.wait(3)
    assert site.wait(ray_sweep(site, cluster, 6, workers=3)) == 0, site.logs()
    refusals = [line for line in site.log("driver").splitlines() if "cannot serve" in line]
    assert len(refusals) == 2, site.logs()
    assert any("train-images-idx3-ubyte" in line for line in refusals)
    assert any("its source code is" in line for line in refusals)
    site.assert_whole(6)
