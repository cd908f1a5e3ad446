"""Compose and Kubernetes files hold to the published schemas, and their parts to each other."""

from __future__ import annotations

import importlib.resources
import json
import re
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from offramp.deploy.http.gate import OPEN_ROUTES
from support.shipped.shipped_files import DEPLOY, compose, manifests, parse, pods

RELEASES = ("1.31", "1.37")
"""Kubernetes' oldest and newest that the manifests are held against."""


def by_kind(kind: str) -> dict[str, dict[str, Any]]:
    return {each["metadata"]["name"]: each for each in manifests() if each["kind"] == kind}


def container(pod: str) -> dict[str, Any]:
    """The container of a pod that is named as the pod is."""
    (found,) = (each for each in pods()[pod]["containers"] if each["name"] == pod)
    return dict(found)


def test_compose_holds_to_its_schema() -> None:
    vendor = importlib.resources.files("check_jsonschema") / "builtin_schemas/vendor"
    schema = json.loads((vendor / "compose-spec.json").read_text(encoding="utf-8"))
    jsonschema.validate(compose(), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"services": {"pool": {"comand": "x"}}}, schema)


@pytest.mark.parametrize("release", RELEASES)
def test_each_manifest_holds_to_its_schema(release: str) -> None:
    for manifest in manifests():
        kubernetes_validate.validate(manifest, release, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**manifests()[0], "spek": {}}, release, strict=True)


def test_kustomize_takes_every_manifest_and_files_that_there_are() -> None:
    told = yaml.safe_load((DEPLOY / "kustomization.yaml").read_text())
    assert {f"kubernetes/{path.name}" for path in (DEPLOY / "kubernetes").iterdir()} == set(
        told["resources"]
    )
    files = [file for made in told["configMapGenerator"] for file in made["files"]]
    assert [file for file in files if not (DEPLOY / file).exists()] == []


@pytest.mark.parametrize("name", pods())
def test_no_pod_has_rights_that_it_does_not_need(name: str) -> None:
    pod = pods()[name]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for each in pod["containers"]:
        assert each["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
    # Kubernetes' own variables for a Service would be refused as unknown settings.
    assert pod["enableServiceLinks"] is False
    # Else the volume's group is given the publisher's key, which no command then takes.
    assert (
        pod["securityContext"].get("fsGroupChangePolicy", "Always") != "Always" or name == "redis"
    )


def test_the_pool_is_asked_how_it_is_where_it_answers() -> None:
    pool = container("pool")
    told, (port,) = parse(pool["args"]), pool["ports"]
    assert port["containerPort"] == told["port"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert pool[probe]["httpGet"]["port"] == port["name"]
        # What asks for a key, or says no when it is busy, is no sign of life.
        assert pool[probe]["httpGet"]["path"] in set(OPEN_ROUTES) - {"/ready"}


def test_services_budgets_and_rules_speak_of_pods_and_ports_that_there_are() -> None:
    named = {name: pod["metadata"]["labels"] for name, pod in _templates().items()}
    for kind in ("Service", "PodDisruptionBudget", "NetworkPolicy"):
        for name, found in by_kind(kind).items():
            spec = found["spec"]
            selector = spec.get("podSelector", spec.get("selector", {}))
            labels = selector if kind == "Service" else selector.get("matchLabels", {})
            assert any(labels.items() <= each.items() for each in named.values()), (kind, name)
    ports = {
        each["containerPort"] for name in ("pool", "redis") for each in container(name)["ports"]
    }
    rules = [
        port["port"]
        for rule in by_kind("NetworkPolicy").values()
        for way in (*rule["spec"].get("ingress", ()), *rule["spec"].get("egress", ()))
        for port in way["ports"]
    ]
    assert set(rules) == {*ports, 53}


def test_nobody_reaches_redis_but_who_must() -> None:
    nobody = by_kind("NetworkPolicy")["nobody"]["spec"]
    assert nobody == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    services = compose()["services"]
    assert compose()["networks"]["control"] == {"internal": True}
    reaching = {name for name, each in services.items() if "control" in each.get("networks", ())}
    assert reaching == {"redis", "publisher", "console", "pool"}
    assert "ports" not in services["redis"]
    published = [port for each in services.values() for port in each.get("ports", ())]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_secrets_are_nowhere_in_the_files() -> None:
    told = (DEPLOY / "compose/passwords.example").read_text().splitlines()
    names = {line.removesuffix("=") for line in told if not line.startswith("#")}
    text = (DEPLOY / "compose/compose.yaml").read_text()
    asked = {each["environment"] for each in compose()["secrets"].values()}
    asked |= set(re.findall(r"\$\{(\w+):\?", text))
    assert names == asked
    assert "Secret" not in {manifest["kind"] for manifest in manifests()}


def _templates() -> dict[str, dict[str, Any]]:
    return {name: found["spec"]["template"] for name, found in by_kind("StatefulSet").items()}
