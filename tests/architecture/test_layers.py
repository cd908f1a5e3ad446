from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_imports_only_go_down(root: Path) -> None:
    command = "from importlinter.cli import lint_imports_command as run; run()"
    # No cache: it would be shared with a `make layers` that runs at the same time.
    arguments = [sys.executable, "-c", command, "--no-cache", "--no-logo"]
    result = subprocess.run(arguments, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 broken" in result.stdout


def module_names(root: Path, folder: str) -> list[str]:
    files = (path.relative_to(root) for path in (root / folder).rglob("*.py"))
    dotted = (".".join(("offramp", *path.with_suffix("").parts)) for path in files)
    return sorted(name.removesuffix(".__init__") for name in dotted)


def test_the_controller_loads_neither_torch_nor_ray(root: Path) -> None:
    # Named from the files, not from the installed package: a stale install must not pass.
    names = module_names(root, "controller")
    heavy = ["torch", "ray", "transformers", "stable_baselines3"]
    program = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        f"print([name for name in {heavy!r} if name in sys.modules])\n"
    )
    arguments = [sys.executable, "-c", program]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
    assert len(names) > 1


def test_no_circle_is_hidden_from_the_type_checker(root: Path, sources: list[Path]) -> None:
    hiding = [path for path in sources if "TYPE_CHECKING" in path.read_text(encoding="utf-8")]
    assert [str(path.relative_to(root)) for path in hiding] == []
