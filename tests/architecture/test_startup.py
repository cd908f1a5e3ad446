from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "ray", "transformers", "stable_baselines3")


def loaded_by(command: str) -> set[str]:
    """Heavy packages that a fresh process has loaded once the command's options are known."""
    program = (
        "import sys\n"
        "from offramp.deploy.cli.main import build_app\n"
        f"build_app([{command!r}])\n"
        f"print(*[name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("command", ["publish", "promote", "rollback", "status"])
def test_operators_commands_start_without_the_heavy_packages(command: str) -> None:
    assert loaded_by(command) == set()


def test_the_check_can_fail() -> None:
    assert "torch" in loaded_by("record")


UNSERVED = (
    "offramp.worker.profiling",
    "offramp.worker.recording",
    "offramp.agents",
    "offramp.envs",
)
"""What a serving replica has no use for: to profile, to record, to learn."""


def imported_by(module: str) -> set[str]:
    """Modules that a fresh process has loaded once it has imported one."""
    program = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    return set(done.stdout.split())


def unserved(modules: set[str]) -> list[str]:
    others = {"stable_baselines3", "gymnasium"} & modules
    return sorted(others | {name for name in modules if name.startswith(UNSERVED)})


def test_the_serving_app_loads_nothing_that_profiles_records_or_learns() -> None:
    loaded = imported_by("offramp.deploy.serve.serve_app")
    assert "offramp.worker.engine.core" in loaded
    assert unserved(loaded) == []


def test_the_serving_check_can_fail() -> None:
    assert "offramp.worker.profiling.profile" in unserved(
        imported_by("offramp.worker.recording.recording_actor")
    )
