"""The files that start workers on Slurm and Kubernetes are sound, and hold no password."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from digitlab.base.paths import ROOT

FOLDER = ROOT / "experiments" / "cluster"
SLURM, KUBERNETES = FOLDER / "slurm.sh", FOLDER / "kubernetes.yaml"


def documents() -> dict[str, Any]:
    found = list(yaml.safe_load_all(KUBERNETES.read_text()))
    return {document["metadata"]["name"]: document for document in found}


def pod(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = documents()[name]["spec"]["template"]["spec"]
    return spec


def test_slurm_file_passes_shellcheck() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is missing: apt-get install shellcheck")
    subprocess.run(["shellcheck", SLURM], check=True)


def run_slurm(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The file as Slurm runs it, a copy, with a `srun` that only prints its arguments."""
    place = tmp_path / "bin"
    place.mkdir()
    (place / "srun").write_text('#!/bin/sh\necho "$@" "$OMP_NUM_THREADS"\n')
    (place / "srun").chmod(0o755)
    copy = shutil.copy(SLURM, tmp_path / "slurm_script")
    environment = {"PATH": f"{place}:{os.environ['PATH']}"} | variables
    return subprocess.run(
        ["bash", copy], env=environment, capture_output=True, text=True, check=False
    )


def test_slurm_file_starts_one_worker(tmp_path: Path) -> None:
    done = run_slurm(
        tmp_path,
        STUDY="my study",
        DIGITLAB_STORAGE="postgresql+psycopg://digitlab@db/optuna",
        SLURM_SUBMIT_DIR=str(tmp_path),
        SLURM_CPUS_PER_TASK="2",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "--cpus-per-task=2 digitlab worker my study 2\n"


@pytest.mark.parametrize("missing", ["STUDY", "DIGITLAB_STORAGE", "SLURM_SUBMIT_DIR"])
def test_slurm_file_says_what_is_missing(tmp_path: Path, missing: str) -> None:
    given = {"STUDY": "default", "DIGITLAB_STORAGE": "x", "SLURM_SUBMIT_DIR": str(tmp_path)}
    given.pop(missing)
    done = run_slurm(tmp_path, **given)
    assert done.returncode != 0
    assert f"{missing}: is not set" in done.stderr
    assert done.stdout == ""


def test_slurm_warns_the_worker_before_the_time_is_over() -> None:
    options = re.findall(r"^#SBATCH (\S+)", SLURM.read_text(), re.MULTILINE)
    # Without `B:`, which would tell the shell alone.
    assert "--signal=TERM@60" in options
    assert any(option.startswith("--array=") for option in options)


def test_kubernetes_file_keeps_to_the_schemas() -> None:
    checker = pytest.importorskip(
        "kubernetes_validate",
        reason="kubernetes-validate is missing: pip install kubernetes-validate",
    )
    for document in documents().values():
        checker.validate(document, checker.latest_version(), strict=True)
        checker.validate(document, "1.31", strict=True)  # the first with stable podFailurePolicy
    broken = documents()["digitlab-workers"] | {"spec": {"paralelism": 8}}
    with pytest.raises(checker.ValidationError):
        checker.validate(broken, checker.latest_version(), strict=True)


def test_kubernetes_workers_end_when_no_trials_are_left() -> None:
    workers = documents()["digitlab-workers"]["spec"]
    assert "completions" not in workers
    assert workers["parallelism"] > 1
    assert pod("digitlab-workers")["containers"][0]["command"] == ["digitlab", "worker", "default"]
    assert "launcher=external" in pod("digitlab-driver")["containers"][0]["command"]


@pytest.mark.parametrize("name", ["digitlab-driver", "digitlab-workers"])
def test_kubernetes_pods_are_confined_and_read_passwords_from_the_secret(name: str) -> None:
    spec = pod(name)
    assert spec["restartPolicy"] == "Never"  # podFailurePolicy asks for it
    assert spec["terminationGracePeriodSeconds"] >= 60
    assert spec["securityContext"]["runAsNonRoot"]
    container = spec["containers"][0]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert not container["securityContext"]["allowPrivilegeEscalation"]
    assert {"secretRef": {"name": "digitlab"}} in container["envFrom"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounted) == {volume["name"] for volume in spec["volumes"]}
    variables = documents()["digitlab"]["data"]
    assert mounted["lab"] == variables["DIGITLAB_HOME"]
    assert all(isinstance(value, str) for value in variables.values())


def addresses() -> Iterator[str]:
    for path in (SLURM, KUBERNETES, ROOT / "experiments" / "cluster.md"):
        yield from re.findall(r"\w[\w+]*://[^\s\"'`]+", path.read_text())


def test_no_address_holds_a_password() -> None:
    found = list(addresses())
    assert any(address.startswith("postgresql+psycopg://") for address in found)
    for address in found:
        user, at, _ = address.partition("://")[2].rpartition("@")
        assert not at or ":" not in user, address
