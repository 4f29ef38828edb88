"""The files that start a study on Slurm and Kubernetes are sound, and hold no password."""

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
from digitlab.config.compose import compose

FOLDER = ROOT / "experiments" / "cluster"
SLURM, KUBERNETES = FOLDER / "slurm.sh", FOLDER / "kubernetes.yaml"
GIVEN = {
    "RECIPE": "default",
    "DIGITLAB_HOME": "/shared/lab",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_CPUS_PER_TASK": "4",
}


def documents() -> dict[str, Any]:
    found = list(yaml.safe_load_all(KUBERNETES.read_text()))
    return {document["kind"]: document for document in found}


def pods() -> dict[str, dict[str, Any]]:
    """The specs of the two pods of the Ray cluster."""
    cluster = documents()["RayJob"]["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    groups = {"head": cluster["headGroupSpec"], "worker": workers}
    return {name: group["template"]["spec"] for name, group in groups.items()}


def test_slurm_file_passes_shellcheck() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is missing: apt-get install shellcheck")
    subprocess.run(["shellcheck", SLURM], check=True)


PROGRAMS = {
    "scontrol": "echo node1; echo node2",
    "srun": 'case "$*" in *hostname*) echo "10.0.0.1 10.0.0.2 ";; *) printf "%s\\n" "$@";; esac',
}


def run_slurm(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The file as Slurm runs it, a copy, with Slurm's programs replaced by ones that print."""
    place = tmp_path / "bin"
    place.mkdir()
    for name, text in PROGRAMS.items():
        (place / name).write_text(f"#!/bin/sh\n{text}\n")
        (place / name).chmod(0o755)
    copy = shutil.copy(SLURM, tmp_path / "slurm_script")
    environment = {"PATH": f"{place}:{os.environ['PATH']}"} | variables
    return subprocess.run(
        ["bash", copy, "study.trials=9"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_slurm_file_starts_ray_on_all_nodes_and_the_driver_on_the_first(tmp_path: Path) -> None:
    done = run_slurm(tmp_path, **GIVEN, SLURM_SUBMIT_DIR=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    ray, driver = done.stdout.split("--\n")
    assert ray.split() == [
        *("--nodes=2", "--ntasks=2", "--cpus-per-task=4", "ray", "symmetric-run"),
        *("--address", "10.0.0.1:6379", "--min-nodes", "2", "--num-cpus=4"),
    ]
    assert driver.split() == [
        *("digitlab", "sweep", "experiments=default", "launcher=ray", "study.trials=9")
    ]
    compose("sweep", driver.split()[2:])


def test_ray_knows_the_options_of_the_slurm_file() -> None:
    script = pytest.importorskip("ray.scripts.symmetric_run", reason="Ray is missing")
    known = {option for parameter in script.symmetric_run.params for option in parameter.opts}
    assert {"--address", "--min-nodes"} <= known


@pytest.mark.parametrize("missing", ["RECIPE", "DIGITLAB_HOME", "SLURM_SUBMIT_DIR"])
def test_slurm_file_says_what_is_missing(tmp_path: Path, missing: str) -> None:
    given = GIVEN | {"SLURM_SUBMIT_DIR": str(tmp_path)}
    given.pop(missing)
    done = run_slurm(tmp_path, **given)
    assert done.returncode != 0
    assert f"{missing}: is not set" in done.stderr
    assert done.stdout == ""


def test_slurm_warns_the_driver_before_the_time_is_over() -> None:
    options = re.findall(r"^#SBATCH (\S+)", SLURM.read_text(), re.MULTILINE)
    # Without `B:`, which would signal the shell alone.
    assert "--signal=TERM@120" in options
    assert "--ntasks-per-node=1" in options


def test_kubernetes_file_keeps_to_the_schemas() -> None:
    checker = pytest.importorskip(
        "kubernetes_validate",
        reason="kubernetes-validate is missing: pip install kubernetes-validate",
    )
    found = documents()
    core = [found["ConfigMap"], found["PersistentVolumeClaim"]]
    # Of KubeRay's own kind only the pods are known to the schemas.
    core += [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
        for name, spec in pods().items()
    ]
    for document in core:
        checker.validate(document, checker.latest_version(), strict=True)
    broken = core[-1] | {"spec": {"containerz": []}}
    with pytest.raises(checker.ValidationError):
        checker.validate(broken, checker.latest_version(), strict=True)


def test_kubernetes_job_runs_a_study_on_its_workers() -> None:
    job = documents()["RayJob"]["spec"]
    digitlab, sweep, *overrides = job["entrypoint"].split()
    assert (digitlab, sweep) == ("digitlab", "sweep")
    (composed,) = compose("sweep", overrides)
    (workers,) = job["rayClusterSpec"]["workerGroupSpecs"]
    assert composed.config.launcher.name == "ray"
    assert composed.config.launcher.workers == workers["replicas"]
    assert job["shutdownAfterJobFinishes"]
    assert job["rayClusterSpec"]["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("name", ["head", "worker"])
def test_kubernetes_pods_are_confined_and_only_the_head_reads_passwords(name: str) -> None:
    spec = pods()[name]
    assert spec["securityContext"]["runAsNonRoot"]
    (container,) = spec["containers"]
    assert not container["securityContext"]["allowPrivilegeEscalation"]
    secret = {"secretRef": {"name": "digitlab"}}
    assert (secret in container.get("envFrom", [])) is (name == "head")
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounted) == {volume["name"] for volume in spec["volumes"]}
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    assert mounted["lab"] == variables["DIGITLAB_HOME"]


def addresses() -> Iterator[str]:
    for path in (SLURM, KUBERNETES, ROOT / "experiments" / "cluster.md"):
        yield from re.findall(r"\w[\w+]*://[^\s\"'`]+", path.read_text())


def test_no_address_holds_a_password() -> None:
    found = list(addresses())
    assert any(address.startswith("postgresql+psycopg://") for address in found)
    for address in found:
        user, at, _ = address.partition("://")[2].rpartition("@")
        assert not at or ":" not in user, address


def test_no_guide_names_a_command_that_is_gone() -> None:
    for path in (SLURM, KUBERNETES, ROOT / "experiments" / "cluster.md"):
        text = path.read_text()
        assert "digitlab worker" not in text
        assert "launcher=external" not in text
        assert "install digitlab" not in text
        assert "install 'digitlab" not in text
