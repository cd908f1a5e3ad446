"""Pages of the documentation site that are made of code, and links that are those of the site."""

from __future__ import annotations

import json
import runpy
from typing import Any

import pytest

from offramp.deploy.cli.main import TOPICS
from support.shipped.shipped_files import ROOT


@pytest.fixture(scope="module")
def site() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs/site_pages.py"))


def test_every_command_every_metric_and_every_exported_name_is_described(
    site: dict[str, Any],
) -> None:
    pages = site["pages"]()
    for command in TOPICS:
        assert f"## `offramp {command}" in pages["commands.md"]
    assert "| `--log-format` | none is written | " in pages["commands.md"]
    assert "| `offramp_policy_info` | gauge | `digest`, `guarantee`," in pages["metrics.md"]
    table = (ROOT / "tests/architecture/exported_names.json").read_text(encoding="utf-8")
    for package, names in json.loads(table).items():
        page = pages.get(f"api/{package.removeprefix('offramp.').replace('.', '-')}.md", "")
        assert [name for name in names if f"::: {package}.{name}\n" not in page] == []


@pytest.mark.parametrize(
    ("place", "link", "on_site"),
    [
        ("README.md", "[a](docs/using.md#x)", "[a](using.md#x)"),
        ("README.md", "![a](docs/gap.png)", "![a](gap.png)"),
        ("README.md", "[a](docs/adr)", "[a](decisions.md)"),
        ("docs/results.md", "[a](../models/reference/README.md)", "[a](reference-model.md)"),
        ("docs/tuning.md", "[`a`](../examples/layerskip_recipe.py)", "`a`"),
        ("docs/adr/0013-front-and-workers.md", "[4](0004-one.md)", "[4](../adr/0004-one.md)"),
        (
            "docs/results.md",
            "[a](https://example.org/x) [b](#c)",
            "[a](https://example.org/x) [b](#c)",
        ),
    ],
)
def test_links_lead_to_pages_of_the_site(
    site: dict[str, Any], place: str, link: str, on_site: str
) -> None:
    assert site["linked"](link, ROOT / place) == on_site
