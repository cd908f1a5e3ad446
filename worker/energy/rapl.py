"""The processor's own energy counters (RAPL), as Linux shows them under /sys/class/powercap.

A package counts its cores and caches; ``dram`` its memory, which no package includes; ``psys``
the whole board, packages included, so it is left out. Others' work on the same package counts too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from offramp.controller.costs.readings import EnergyMethod, EnergyReading

POWERCAP = Path("/sys/class/powercap")

PATIENCE_S = 0.25
"""A counter that has not moved by then does not count: hardware updates it every millisecond."""

Readings = dict[Path, int]


@dataclass(frozen=True, slots=True)
class RaplSource:
    """Packages and memory of one machine.

    Attributes:
        domains: Folder of each counter, and the microjoules at which it starts again from 0.
    """

    domains: tuple[tuple[Path, int], ...]

    def start(self) -> Readings:
        """Microjoules of every counter now."""
        return {folder: _number(folder / "energy_uj") for folder, _ in self.domains}

    def stop(self, before: Readings, window_s: float) -> EnergyReading:
        """What they counted since; a window is to be shorter than a counter's round (minutes)."""
        after = self.start()
        counted = sum((after[path] - before[path]) % limit for path, limit in self.domains)
        return EnergyReading(
            joules=counted * 1e-6,
            method=EnergyMethod.MEASURED_SHARED,
            source="RAPL " + ", ".join(_label(path) for path, _ in self.domains),
            scope="processor packages, whoever used them",
            window_s=window_s,
        )


def open_rapl(
    root: Path = POWERCAP, work: Callable[[], None] | None = None
) -> tuple[RaplSource | None, str]:
    """The machine's counters, or None and why there are none.

    Args:
        root: Where the kernel shows them.
        work: Something that takes energy, tried again and again until every counter has moved;
            by default this process spins.
    """
    folders = sorted(path for path in root.glob("*-rapl:*") if _counts(path))
    if not folders:
        return None, f"no RAPL counters under {root}"
    try:
        domains = tuple((path, 1 + _number(path / "max_energy_range_uj")) for path in folders)
        source = RaplSource(domains)
        stuck = _stuck(source, work or _spin)
    except (OSError, ValueError) as error:
        return None, f"RAPL counters cannot be read ({error})"
    if stuck:
        return None, "RAPL counters do not move: " + ", ".join(map(_label, stuck))
    return source, ""


def _counts(folder: Path) -> bool:
    """Whether a domain is a package, or memory, which no package includes."""
    try:
        name = (folder / "name").read_text(encoding="utf-8").strip()
    except OSError:
        return False
    return name.startswith("package") or name == "dram"


def _stuck(source: RaplSource, work: Callable[[], None]) -> list[Path]:
    before = source.start()
    deadline = time.monotonic() + PATIENCE_S
    while True:
        work()
        now = source.start()
        stuck = [path for path, value in before.items() if now[path] == value]
        if not stuck or time.monotonic() > deadline:
            return stuck


def _spin() -> None:
    end = time.monotonic() + 0.01
    while time.monotonic() < end:
        pass


def _label(folder: Path) -> str:
    return (folder / "name").read_text(encoding="utf-8").strip()


def _number(file: Path) -> int:
    return int(file.read_text(encoding="utf-8"))
