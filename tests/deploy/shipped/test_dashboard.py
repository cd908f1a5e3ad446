"""Panels and alarms ask for metrics and labels that a scrape of the front has."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from support.shipped.shipped_files import DEPLOY, ROOT, compose, parse

WATCHING = DEPLOY / "watching"
PANELS = json.loads((WATCHING / "dashboards" / "offramp.json").read_text())
ALERTS = yaml.safe_load((WATCHING / "alerts.yml").read_text())["groups"][0]["rules"]
ADDED = {"job", "instance"}
"""Labels that Prometheus puts on all that it scrapes."""

Labels = dict[str, set[str]]


def queries() -> dict[str, str]:
    """Every query that the dashboard and the alarms make, by whose it is."""
    found = {
        f"panel {panel['title']} {target['refId']}": target["expr"]
        for panel in PANELS["panels"]
        for target in panel.get("targets", ())
    }
    found |= {f"annotation {each['name']}": each["expr"] for each in PANELS["annotations"]["list"]}
    found |= {f"alert {rule['alert']}": rule["expr"] for rule in ALERTS}
    filled = {"$__rate_interval": "5m", "$model": ".*"}
    return {
        name: re.sub(r"\$\w+", lambda found: filled[found[0]], expr) for name, expr in found.items()
    }


@pytest.fixture(scope="module")
def scraped() -> Labels:
    """Names of the samples of a front that has heard of a worker and a request, with labels."""
    scrape = runpy.run_path(str(ROOT / "docs/site_pages.py"))["scrape"]
    found: Labels = {"up": set()}
    for family in text_string_to_metric_families(scrape()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def asked(node: Any) -> Iterator[tuple[str, set[str]]]:
    """Each metric that a parsed query reads, and the labels that are asked of it from anywhere."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node.name or "", {matcher.name for matcher in node.matchers.matchers}
        return
    grouped = (
        set(modifier.labels)
        if (modifier := getattr(node, "modifier", None)) and hasattr(modifier, "labels")
        else set()
    )
    for name in ("expr", "lhs", "rhs", "vector_selector", "param", "args"):
        inner = getattr(node, name, None)
        for each in inner if isinstance(inner, list) else [inner]:
            if each is not None and not isinstance(each, str):
                for metric, labels in asked(each):
                    yield metric, labels | grouped


def unknown(expr: str, scraped: Labels) -> list[str]:
    """What a query asks for that is not there."""
    found = list(asked(promql_parser.parse(expr)))
    assert found, expr
    return [
        f"{metric}{sorted(labels)}"
        for metric, labels in found
        if metric not in scraped or not labels <= scraped[metric] | ADDED
    ]


def test_every_query_asks_for_what_is_there(scraped: Labels) -> None:
    assert len(queries()) > 30
    wrong = {name: unknown(expr, scraped) for name, expr in queries().items()}
    assert {name: found for name, found in wrong.items() if found} == {}


def test_a_query_for_what_is_not_there_is_found(scraped: Labels) -> None:
    for expr in (
        "rate(offramp_tokens_total[5m])",
        'offramp_policy_generation{wroker="x"}',
        "sum by (reason) (offramp_request_success_total) / 2",
        "1 - histogram_quantile(0.9, sum by (le, pool) (rate(offramp_exit_layer_bucket[1m])))",
    ):
        assert unknown(expr, scraped)


def test_labels_in_legends_and_summaries_are_left_by_the_query() -> None:
    for panel in PANELS["panels"]:
        for target in panel.get("targets", ()):
            for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
                assert f"by ({label})" in target["expr"] or " by (" not in target["expr"]


def test_every_alarm_is_explained_and_every_metric_shown() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    assert [rule["alert"] for rule in ALERTS if f"**{rule['alert']}**" not in page] == []
    table = (
        (ROOT / "docs" / "serving.md").read_text().partition("## Metrics")[2].partition("\n## ")[0]
    )
    told = {
        name
        for cell in re.findall(r"^\| (.*?) \|", table, re.MULTILINE)
        for name in re.findall(r"`(\w+)", cell)
    }
    shown = " ".join(queries().values())
    assert len(told) > 15
    assert [name for name in sorted(told) if f"offramp_{name}" not in shown] == []


def test_prometheus_and_grafana_are_told_where_things_are() -> None:
    services = compose()["services"]
    told = yaml.safe_load((WATCHING / "prometheus.yml").read_text())
    (job,) = told["scrape_configs"]
    port = parse(services["pool"]["command"])["port"]
    assert job["job_name"] == "offramp"
    assert job["static_configs"] == [{"targets": [f"pool:{port}"]}]
    assert set(services["pool"]["networks"]) & set(services["prometheus"]["networks"])
    assert Path(job["authorization"]["credentials_file"]).name in services["prometheus"]["secrets"]
    assert [file for file in told["rule_files"] if not (WATCHING / file).exists()] == []
    provided = yaml.safe_load((WATCHING / "grafana/dashboards/offramp.yml").read_text())
    place = provided["providers"][0]["options"]["path"]
    assert f"../watching/dashboards:{place}:ro" in services["grafana"]["volumes"]
