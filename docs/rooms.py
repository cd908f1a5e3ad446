"""Write the table of rooms in docs/structures.md: each folder, with its docstring's first sentence.

Run by ``make rooms``; tests/architecture/test_structures_page.py fails while the table is stale.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/structures.md"
FOLDERS = ("controller", "worker", "envs", "agents", "deploy", "research")
BEGIN, END = "<!-- rooms: written by `make rooms` -->\n", "<!-- end of rooms -->"


def first_sentence(package: Path) -> str:
    """The first sentence of a package's docstring, as a table cell without its full stop."""
    text = ast.get_docstring(ast.parse(package.read_text(encoding="utf-8"))) or ""
    sentence = re.split(r"(?<=\.)\s|\n\n", " ".join(text.split("\n\n")[0].split()))[0]
    return sentence.rstrip(".").replace("``", "`")


def rooms(root: Path) -> dict[str, str]:
    """First sentences of all packages by their folder, every folder ahead of those within it."""
    packages = [path for folder in FOLDERS for path in sorted((root / folder).rglob("__init__.py"))]
    found = {str(path.parent.relative_to(root)): first_sentence(path) for path in packages}
    return dict(
        sorted(found.items(), key=lambda item: (FOLDERS.index(item[0].split("/")[0]), item))
    )


def table(root: Path) -> str:
    """The table in Markdown, as it stands between the page's two marks."""
    lines = [f"| `{room}/` | {sentence} |" for room, sentence in rooms(root).items()]
    return "\n".join(["", "| room | what happens there |", "|---|---|", *lines, "", ""])


def renewed(page: str, root: Path) -> str:
    """The page with its table replaced by the one that holds now."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table(root) + END + after


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8"), ROOT), encoding="utf-8")
