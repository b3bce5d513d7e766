"""The files of deploy/ that start a server: what Kubernetes takes, with flags that there are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KNOWN_FLAGS = (ROOT / "tests" / "cli" / "command_line.txt").read_text(encoding="utf-8")
MANIFESTS = ("service.yaml", "kuberay-service.yaml", "kuberay.yaml", "kuberay-network.yaml")


def parts(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")))


def pods(part: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the pod templates of a part."""
    spec = part["spec"]
    groups = [spec] if "template" in spec else []
    if part["kind"] == "RayCluster":
        groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [group["template"] for group in groups]


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_takes_it(name: str) -> None:
    """By Kubernetes' own schemas; of a Ray cluster, its pods."""
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is missing")
    for part in parts(name):
        checked = [part] if part["kind"] != "RayCluster" else []
        for pod in pods(part) if not checked else []:
            metadata = {"name": "pod", **pod.get("metadata", {})}
            checked.append({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod["spec"]})
        for one in checked:
            validate.validate(one, validate.latest_version(), strict=True)


def test_a_field_that_is_wrong_is_found() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is missing")
    policy = parts("kuberay-service.yaml")[1]
    policy["spec"]["ingres"] = policy["spec"].pop("ingress")
    with pytest.raises(validate.ValidationError):
        validate.validate(policy, validate.latest_version(), strict=True)


@pytest.mark.parametrize("name", ["service.yaml", "kuberay-service.yaml"])
def test_what_it_starts_has_these_flags(name: str) -> None:
    said = []
    for part in parts(name):
        for pod in pods(part):
            for container in (*pod["spec"]["containers"], *pod["spec"].get("initContainers", ())):
                said.append(" ".join([*container.get("command", ()), *container.get("args", ())]))
    text = " ".join(said)
    commands = re.findall(r"(?:autosft )?serve (users \w+ )?(.*?)(?:[>|;]|$)", text)
    assert commands
    for users, arguments in commands:
        for flag in re.findall(r"--[a-z-]+", arguments):
            assert f"serve {users}{flag}\n" in KNOWN_FLAGS, (users, flag)


def test_the_queue_of_a_ray_cluster_is_reached_by_those_who_may() -> None:
    cluster, policy = parts("kuberay-service.yaml")
    assert (cluster["kind"], policy["kind"]) == ("RayCluster", "NetworkPolicy")
    ours = {"matchLabels": {"ray.io/cluster": cluster["metadata"]["name"]}}  # a label of KubeRay's
    assert policy["spec"]["podSelector"] == ours
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    among, clients = policy["spec"]["ingress"]
    assert among == {"from": [{"podSelector": ours}]}
    assert clients["ports"] == [{"protocol": "TCP", "port": 8090}]
    assert {"podSelector": ours} in policy["spec"]["egress"][0]["to"]
    head, *_ = pods(cluster)
    [container] = head["spec"]["containers"]
    assert {"containerPort": 8090, "name": "queue"} in container["ports"]
    # With this annotation each group has to start Ray itself.
    assert cluster["metadata"]["annotations"]["ray.io/overwrite-container-cmd"] == "true"
    for pod in pods(cluster):
        assert "$KUBERAY_GEN_RAY_START_CMD" in pod["spec"]["containers"][0]["args"][0]
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    assert f"ray=={cluster['spec']['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()


def test_every_path_of_deploy_is_described() -> None:
    page = (ROOT / "docs" / "service.md").read_text(encoding="utf-8")
    page += (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    for path in DEPLOY.iterdir():
        assert f"(../deploy/{path.name})" in page, path.name
