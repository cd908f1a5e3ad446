"""Pages of the documentation site that are made of something else; mkdocs.yml runs this.

README and changelog, which lie above this folder; the list of decisions; and references, made of
the command line, of /metrics and of what each package exports. Links to files that the site does
not have are written as their names.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from typer.main import get_command

from offramp.deploy.cli.main import build_app
from offramp.deploy.http.observability.metrics import Metrics
from offramp.deploy.http.observability.worker_metrics import REPORTED, TRAFFIC
from offramp.deploy.http.served_models import ServedModels

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"

PACKAGES = ("controller", "worker", "worker/model/families", "envs")
"""Those that export names; tests/architecture pins them."""

ABOVE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "models/reference/README.md": "reference-model.md",
}
"""Pages from outside of this folder, by their path from the root, and their names on the site."""

LAYERS = 12
"""Layers of the model whose metrics are shown: the reference model's."""

METRICS_HEAD = f"""\
# Metrics

What `/metrics` says. [What they are good for](serving.md#metrics), and
[what to watch](operations.md#what-to-watch), is told elsewhere. The buckets of `offramp_exit_layer`
are here those of a model of {LAYERS} layers.

| name | kind | labels | what it says | buckets |
|---|---|---|---|---|
"""

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]*)(#[^)]*)?\)")
PICTURE = re.compile(r"(!\[[^\]]*\]\()docs/")


def on_files(files: Any, config: Any) -> Any:
    """Called by MkDocs with the pages that it found: adds those that are made."""
    from mkdocs.structure.files import File

    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(text: str, page: Any, **_: Any) -> str:
    """Called by MkDocs with each page: makes its links those of the site."""
    source = next((path for path, name in ABOVE.items() if name == page.file.src_uri), None)
    place = ROOT / source if source else DOCS / page.file.src_uri
    return linked(text, place)


def linked(text: str, place: Path) -> str:
    """A page with its links as they are on the site.

    Args:
        text: The page.
        place: Where it lies in the repository; its links start there.
    """

    def on_site(found: re.Match[str]) -> str:
        words, path, part = found[1], found[2], found[3] or ""
        if not path or "://" in path:
            return found[0]
        target = Path(*_normal((place.parent / path).parts))
        if target == DOCS / "adr":
            return f"[{words}](decisions.md)"
        if str(target.relative_to(ROOT)) in ABOVE:
            target = DOCS / ABOVE[str(target.relative_to(ROOT))]
        elif not target.is_relative_to(DOCS):
            return words
        start = place.parent if place.is_relative_to(DOCS) else DOCS
        up = "../" * len(start.relative_to(DOCS).parts)
        return f"[{words}]({up}{target.relative_to(DOCS).as_posix()}{part})"

    return LINK.sub(on_site, PICTURE.sub(r"\1", text))


def _normal(parts: tuple[str, ...]) -> list[str]:
    kept: list[str] = []
    for part in parts:
        if part == "..":
            kept.pop()
        else:
            kept.append(part)
    return kept


def pages() -> dict[str, str]:
    """Every page that is made, by its name."""
    above = {name: (ROOT / path).read_text(encoding="utf-8") for path, name in ABOVE.items()}
    made = {"decisions.md": decisions(), "commands.md": commands(), "metrics.md": metrics()}
    return above | made | {_api_page(package): api(package) for package in PACKAGES}


def decisions() -> str:
    """List the decisions by their titles."""
    files = sorted((DOCS / "adr").glob("*.md"))
    titles = [file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for file in files]
    lines = [f"- [{title}](adr/{file.name})" for file, title in zip(files, titles, strict=True)]
    return "\n".join(
        ["# Decisions", "", "What was chosen, why, and what it costs.", "", *lines, ""]
    )


def commands() -> str:
    """Describe each command with its arguments and options, as its ``--help`` does."""
    lines = ["# Commands", "", "What `offramp COMMAND --help` says, of all of them.", ""]
    for words, command in _leaves("offramp", get_command(build_app([]))):
        lines += [f"## `{words}`", "", _cell(command.help or ""), ""]
        lines += ["| | default | what it does |", "|---|---|---|"]
        lines += [_row(parameter) for parameter in command.params]
        lines.append("")
    return "\n".join(lines)


def _leaves(words: str, command: Any) -> Iterator[tuple[str, Any]]:
    inner = getattr(command, "commands", None)
    if inner is None:
        yield words, command
        return
    for name, each in sorted(inner.items()):
        yield from _leaves(f"{words} {name}", each)


def _row(parameter: Any) -> str:
    is_option = parameter.param_type_name == "option"
    names = [*parameter.opts, *parameter.secondary_opts] if is_option else [parameter.name.upper()]
    shown, default = parameter.show_default, parameter.default
    if isinstance(shown, str):
        said = shown
    elif parameter.required:
        said = "required"
    else:
        said = "" if default in (None, False, ()) else f"`{default}`"
    told = ", ".join(f"`{name}`" for name in names)
    return f"| {told} | {said} | {_cell(parameter.help or '')} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def scrape() -> str:
    """What /metrics says once a worker has reported and a request has ended."""
    fields = ["tasks", *(field for field, _ in REPORTED.values())]
    report: dict[str, Any] = dict.fromkeys(fields, 0)
    report["traffic"] = dict.fromkeys([field for field, _ in TRAFFIC.values()], 0)
    report["energy"] = [("modelled", "x", 1.0, 1)]
    says = dict.fromkeys(("worker", "digest", "guarantee", "state"), "x")
    pool: Any = SimpleNamespace(
        model_id="m", layers=LAYERS, clients=None, reports=lambda: [report | says]
    )
    counted = Metrics(ServedModels([pool]))

    with counted.by_model["m"].following(1, 0.0):  # as if its client had hung up
        pass
    counted.count_reply(200, "m")
    return counted.text().decode()


def metrics() -> str:
    """Describe each metric by its kind, its labels and its buckets."""
    lines = METRICS_HEAD.splitlines()
    for family in text_string_to_metric_families(scrape()):
        if family.name.endswith("_created"):
            continue
        labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
        edges = [sample.labels["le"] for sample in family.samples if "le" in sample.labels]
        name = family.name + "_total" * (family.type == "counter")
        told = ", ".join(f"`{label}`" for label in labels)
        buckets = ", ".join(edge.removesuffix(".0") for edge in edges)
        lines.append(f"| `{name}` | {family.type} | {told} | {family.documentation} | {buckets} |")
    return "\n".join([*lines, ""])


def api(package: str) -> str:
    """Describe each name that a package exports, by its docstring."""
    source = (ROOT / package / "__init__.py").read_text(encoding="utf-8")
    name = f"offramp.{package.replace('/', '.')}"
    lines = [f"# {name}", "", ast.get_docstring(ast.parse(source)) or "", ""]
    return "\n".join(lines + [f"::: {name}.{each}\n" for each in sorted(exported(source))])


def exported(source: str) -> list[str]:
    """Names in a module's ``__all__``."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    return []


def _api_page(package: str) -> str:
    return f"api/{package.replace('/', '-')}.md"
