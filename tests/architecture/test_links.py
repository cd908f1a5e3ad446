from __future__ import annotations

import re
from pathlib import Path

LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
FOLDERS = "controller|worker|envs|agents|deploy|research|tests|benchmarks|examples|docs"
NAMED = re.compile(rf"`((?:{FOLDERS})/[\w/.-]+)`")


def broken_links(page: Path) -> list[str]:
    """Local link targets of a Markdown page that do not exist."""
    targets = LINK.findall(page.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    return [target for target in local if not (page.parent / target).exists()]


def test_every_local_link_resolves(root: Path) -> None:
    pages = [*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("models/**/*.md")]
    assert len(pages) > 5
    broken = {page.name: broken_links(page) for page in pages if broken_links(page)}
    assert broken == {}


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("[here](page.md) [gone](docs/none.md#part) [web](https://example.org/x)")
    assert broken_links(page) == ["docs/none.md"]


def test_every_file_that_the_pages_name_exists(root: Path) -> None:
    pages = [*root.glob("*.md"), *root.glob("docs/**/*.md")]
    named = {path for page in pages for path in NAMED.findall(page.read_text(encoding="utf-8"))}
    assert len(named) > 100
    assert sorted(path for path in named if not (root / path).exists()) == []
