"""A small corpus whose documents fall into every split."""

from __future__ import annotations

from pathlib import Path

DOCUMENTS = 24


def make_corpus(folder: Path) -> Path:
    """Python-like texts of 2,000 characters or more, each its own."""
    folder.mkdir(parents=True)
    for number in range(DOCUMENTS):
        lines = [
            f"def name_{number}_{line}(value: int) -> int:\n    return value * {line} + {number}\n"
            for line in range(36)
        ]
        (folder / f"{number}.py").write_text("\n".join(lines))
    return folder
