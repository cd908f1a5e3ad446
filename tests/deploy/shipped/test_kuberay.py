"""What KubeRay is told holds to its fields, and what Ray Serve is told to what offramp takes."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema
from typer.main import get_command

from offramp.controller.errors import ConfigError
from offramp.deploy.cli.pool.model_tables import read_options
from offramp.deploy.cli.pool.serving import add_to
from offramp.deploy.http.gate import OPEN_ROUTES
from offramp.deploy.http.status_routes import SERVE_HEALTH
from offramp.deploy.serve.serve_app import FEW_ARENAS, OF_SERVE
from offramp.deploy.serve.settings import Settings
from support.shipped.shipped_files import DEPLOY, ROOT, manifests

RELEASE = "1.37"

SERVICE = {"serviceUnhealthySecondThreshold", "deploymentUnhealthySecondThreshold", "serveService"}
SERVICE |= {"upgradeStrategy", "serveConfigV2", "rayClusterConfig", "excludeHeadPodFromServeSvc"}
SERVICE |= {"rayClusterDeletionDelaySeconds"}
CLUSTER = {"suspend", "managedBy", "autoscalerOptions", "headServiceAnnotations", "headGroupSpec"}
CLUSTER |= {"enableInTreeAutoscaling", "gcsFaultToleranceOptions", "rayVersion", "workerGroupSpecs"}
HEAD = {"template", "headService", "enableIngress", "rayStartParams", "serviceType"}
WORKERS = {"suspend", "groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds"}
WORKERS |= {"rayStartParams", "template", "scaleStrategy", "numOfHosts"}
"""Fields of KubeRay's RayServiceSpec, RayClusterSpec, HeadGroupSpec and WorkerGroupSpec, as its API
reference lists them; pods are held to Kubernetes' own schema."""


def of_kind(kind: str) -> dict[str, Any]:
    (found,) = (each for each in manifests("kuberay") if each.get("kind") == kind)
    return found


def clusters() -> dict[str, dict[str, Any]]:
    return {
        "RayService": of_kind("RayService")["spec"]["rayClusterConfig"],
        "RayCluster": of_kind("RayCluster")["spec"],
    }


def groups(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def require_fields(cluster: dict[str, Any]) -> None:
    assert set(cluster) <= CLUSTER
    assert set(cluster["headGroupSpec"]) <= HEAD
    for group in cluster["workerGroupSpecs"]:
        assert set(group) <= WORKERS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in groups(cluster):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = {"apiVersion": "v1", "kind": "Pod", **group["template"]}
        pod["metadata"] = {**pod["metadata"], "name": "x"}
        kubernetes_validate.validate(pod, RELEASE, strict=True)


@pytest.mark.parametrize("kind", ["RayService", "RayCluster"])
def test_what_kuberay_is_told_holds_to_its_fields(kind: str) -> None:
    manifest, cluster = of_kind(kind), clusters()[kind]
    assert manifest["apiVersion"] == "ray.io/v1"
    assert kind != "RayService" or set(manifest["spec"]) <= SERVICE
    require_fields(cluster)
    pins = (ROOT / "constraints.txt").read_text().split()
    assert f"ray=={cluster['rayVersion']}" in pins
    broken = deepcopy(cluster)
    broken["headGroupSpec"]["template"]["spec"]["contaners"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        require_fields(broken)


@pytest.mark.parametrize("kind", ["RayService", "RayCluster"])
def test_no_pod_of_a_ray_cluster_has_rights_that_it_does_not_need(kind: str) -> None:
    for group in groups(clusters()[kind]):
        pod = group["template"]["spec"]
        assert pod["automountServiceAccountToken"] is pod["enableServiceLinks"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        for each in pod["containers"]:
            assert each["securityContext"]["readOnlyRootFilesystem"] is True
            assert each["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert {"readinessProbe", "livenessProbe"} <= set(each)  # KubeRay's own may need wget
            assert "/dev/shm" in {mount["mountPath"] for mount in each["volumeMounts"]}


def test_rules_beside_them_hold_to_their_schema_and_speak_of_these_pods() -> None:
    rules = [each for each in manifests("kuberay") if each.get("kind") == "NetworkPolicy"]
    labels = [group["template"]["metadata"]["labels"] for each in clusters().values()
              for group in groups(each)]  # fmt: skip
    for rule in rules:
        kubernetes_validate.validate(rule, RELEASE, strict=True)
        selector = rule["spec"]["podSelector"]["matchLabels"]
        assert any(selector.items() <= each.items() for each in labels)
    ruled = {each["metadata"]["name"] for each in rules}
    assert ruled == {each["app"] for each in labels}


def told() -> dict[str, Any]:
    """The application that both files deploy."""
    text = (DEPLOY / "kuberay" / "pool.yaml").read_text()
    file = yaml.safe_load(text)
    assert yaml.safe_load(of_kind("RayService")["spec"]["serveConfigV2"]) == file
    ServeDeploySchema.model_validate(file)
    with pytest.raises(ValidationError):
        ServeDeploySchema.model_validate({**file, "proxy_location": "Nowhere"})
    (application,) = file["applications"]
    return dict(application)


def read(args: dict[str, Any]) -> dict[str, Any]:
    app = typer.Typer()
    add_to(app)
    like: Any = get_command(app).make_context("serve", [], resilient_parsing=True)
    params: dict[str, Any] = read_options(like, args, "args: ", "a pool").params
    return params


def test_what_ray_serve_is_told_are_options_models_and_ports_that_there_are() -> None:
    application = told()
    options = read(application["args"])
    assert [each["name"] for each in application["deployments"]] == [
        options["model"].split("/")[-1]
    ]
    service = of_kind("RayService")["spec"]
    head = groups(service["rayClusterConfig"])[0]["template"]["spec"]
    ports = {each["name"]: each["containerPort"] for each in head["containers"][0]["ports"]}
    assert ports["serve"] == options["port"]  # where KubeRay asks, at a path that needs no key
    assert SERVE_HEALTH == "/-/healthz"
    assert SERVE_HEALTH in OPEN_ROUTES
    assert service["rayClusterDeletionDelaySeconds"] > options["deadline"]
    with pytest.raises(ConfigError, match="args: modle: is no option of a pool"):
        read({**application["args"], "modle": "x"})


def test_clients_are_sent_to_the_head_alone() -> None:
    """KubeRay sends them to worker pods that are ready: these must not be, where no front is."""
    for group in clusters()["RayService"]["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        port = told()["args"]["port"]
        assert container["readinessProbe"]["httpGet"] == {"path": SERVE_HEALTH, "port": port}
        assert "ports" not in container


def test_pods_of_the_service_have_the_settings_that_a_pool_needs() -> None:
    for group in groups(clusters()["RayService"]):
        (container,) = group["template"]["spec"]["containers"]
        given = {each["name"]: each.get("value", "redis://made-up") for each in container["env"]}
        Settings.from_environment(given)
        assert given.items() >= {**OF_SERVE, FEW_ARENAS[0]: FEW_ARENAS[1]}.items()
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert {"/trust", "/var/lib/offramp", "/home/offramp", "/tmp"} <= mounts
