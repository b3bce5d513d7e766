"""The manifest is one that KubeRay takes, and the Slurm script starts what it says."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from autosft.scheduler.cluster import watchdog

ROOT = Path(__file__).parents[3]

# --- Kubernetes ---------------------------------------------------------------------------------------

#: Fields of ray.io/v1 RayCluster and whether they must be there, from KubeRay's raycluster_types.go.
SPEC = {"headGroupSpec": True, "workerGroupSpecs": False, "rayVersion": False, "autoscalerOptions": False}
HEAD = {"serviceType": False, "rayStartParams": True, "template": True}
WORKERS = {
    "groupName": True,
    "replicas": False,
    "minReplicas": True,
    "maxReplicas": True,
    "rayStartParams": True,
    "template": True,
}


def check_fields(given: dict[str, object], known: dict[str, bool]) -> None:
    assert set(given) <= set(known), "KubeRay knows no such field"
    assert {name for name, is_needed in known.items() if is_needed} <= set(given)


def test_the_manifest_is_a_ray_cluster_with_a_token() -> None:
    manifest = yaml.safe_load((ROOT / "deploy" / "kuberay.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayCluster")
    spec = manifest["spec"]
    check_fields(spec, SPEC)
    check_fields(spec["headGroupSpec"], HEAD)
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in spec["workerGroupSpecs"]:
        check_fields(group, WORKERS)
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), "a map of strings"
        pod = group["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] >= 60, "time to save checkpoints"
        [container] = pod["containers"]
        environment = {item["name"]: item for item in container["env"]}
        assert environment["RAY_AUTH_MODE"]["value"] == "token"
        assert environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["key"] == "auth_token"
        mounts, volumes = container["volumeMounts"], pod["volumes"]
        assert {mount["name"] for mount in mounts} == {volume["name"] for volume in volumes}


def test_the_policy_lets_the_clusters_pods_and_the_operator_connect_and_nobody_else() -> None:
    cluster = yaml.safe_load((ROOT / "deploy" / "kuberay.yaml").read_text())
    policy = yaml.safe_load((ROOT / "deploy" / "kuberay-network.yaml").read_text())
    assert (policy["apiVersion"], policy["kind"]) == ("networking.k8s.io/v1", "NetworkPolicy")
    pods = {"matchLabels": {"ray.io/cluster": cluster["metadata"]["name"]}}  # a label of KubeRay's
    assert policy["spec"]["podSelector"] == pods
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    ours, operator = policy["spec"]["ingress"]
    assert ours == {"from": [{"podSelector": pods}]}
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]
    assert all("podSelector" in peer for peer in operator["from"]), "a namespace alone is everybody in it"


def test_the_manifest_runs_the_ray_that_is_tested() -> None:
    manifest = yaml.safe_load((ROOT / "deploy" / "kuberay.yaml").read_text())
    pinned = (ROOT / "constraints.txt").read_text()
    assert f"ray=={manifest['spec']['rayVersion']}\n" in pinned


# --- Slurm --------------------------------------------------------------------------------------------

STUBS = {
    # One node: whatever runs on it runs here.
    "srun": 'while [[ $1 == -* ]]; do shift; done\nexec "$@"',
    "scontrol": 'echo "127.0.0.1"',
    "autosft": f"""exec {sys.executable} - "$@" <<'PROGRAM'
import signal, sys, time
from autosft.scheduler.cluster.ray_cluster import connect
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
assert sys.argv[1:3] == ["tune", "--address"], sys.argv
with connect(sys.argv[3], imports=[]) as cluster:
    print("connected", sys.argv[4:], flush=True)
    if "--wait" in sys.argv:
        time.sleep(3600)  # until it is told to end
sys.exit(3)
PROGRAM""",
}


@pytest.mark.ray
@pytest.mark.faults
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_slurm_script_runs_a_study_on_one_node() -> None:
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    try:
        for name, text in STUBS.items():
            (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (folder / name).chmod(stat.S_IRWXU)
        environment = {
            **os.environ,
            "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HOME": str(folder),
            watchdog.RUN_VARIABLE: str(folder),
            "SLURM_JOB_NODELIST": "node1",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_JOB_ID": str(os.getpid()),
            "RAY_TMPDIR": str(folder),
        }
        script = [str(ROOT / "deploy" / "autosft.slurm"), "--study", "chats"]
        ended = subprocess.run(
            script, env=environment, capture_output=True, text=True, check=False, timeout=600
        )
        assert "connected ['--study', 'chats']" in ended.stdout, ended.stdout + ended.stderr
        assert ended.returncode == 3, "the study's own code"
        assert watchdog.members(str(folder), spare=frozenset({os.getpid()})) == [], "Ray still runs"

        job = subprocess.Popen([*script, "--wait"], env=environment, stdout=subprocess.PIPE, text=True)
        assert job.stdout is not None
        while "connected" not in (line := job.stdout.readline()):
            assert line, "it ended"
        job.send_signal(signal.SIGTERM)
        assert job.wait(300) == 7, "SIGTERM reaches the study, whose code is the job's"
    finally:
        watchdog.sweep(str(folder), spare=frozenset({os.getpid()}))
