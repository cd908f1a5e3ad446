"""Contenders take turns prompt by prompt; what they did is kept, so that a run survives a cut."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import typer

from offramp.controller.durable import write_durably
from shared.timing import Report


@dataclass(frozen=True)
class Outing:
    """What a contender did with one prompt.

    Attributes:
        drafts: None: the contender does not count them, nor what follows.
        equal: Whether it emitted the first contender's tokens; None: it draws others by design.
    """

    seconds: float
    cpu_s: float
    tokens: int
    drafts: int | None
    accepted: int
    layer_calls: int
    deciding_s: float
    equal: bool | None


Outings = dict[str, list[dict[str, Any]]]
"""What contenders did, by name and prompt, as JSON has it."""


@dataclass
class Entry:
    """A contender.

    Attributes:
        is_comparable: Whether its tokens should be the first contender's.
    """

    name: str
    run: Callable[[list[int]], Report]
    offline: float | None = None
    is_comparable: bool = True
    turns: list[Outing] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        return [turn.seconds for turn in self.turns]

    @property
    def equal(self) -> list[bool]:
        return [turn.equal for turn in self.turns if turn.equal is not None]


def compare(
    contenders: list[Entry],
    prompts: list[list[int]],
    kept: Outings | None = None,
    save: Callable[[], None] = lambda: None,
) -> None:
    """Run all on all prompts in turn; the first prompt only warms up.

    Processor time, unlike the clock, counts the reading of the prompt, alike for all of ours.

    Args:
        contenders: The first one's tokens are what others' are compared with.
        prompts: Token ids of each.
        kept: Outings of a run that was cut off, which are not taken again; more are added.
        save: Called once a prompt's turns are in ``kept``.
    """
    kept = {} if kept is None else kept
    done = min(len(kept.get(each.name, [])) for each in contenders)
    for each in contenders:
        each.turns = [Outing(**turn) for turn in kept.get(each.name, [])[:done]]
        kept[each.name] = [asdict(turn) for turn in each.turns]
    if done == len(prompts):
        return
    for index, prompt in enumerate([prompts[0], *prompts[done:]]):
        turns = take_turns(contenders, prompt, index)
        if index > 0:
            for each, turn in zip(contenders, turns, strict=True):
                each.turns.append(turn)
                kept[each.name].append(asdict(turn))
            save()


def take_turns(contenders: list[Entry], prompt: list[int], first: int) -> list[Outing]:
    """Every contender's turn on a prompt, in their order, the ``first`` of them taken first."""
    found: dict[str, tuple[Report, float]] = {}
    for turn in range(len(contenders)):
        each = contenders[(turn + first) % len(contenders)]
        cpu = time.process_time()
        report = each.run(prompt)
        found[each.name] = (report, time.process_time() - cpu)
    wanted = found[contenders[0].name][0].emitted
    return [
        turn_of(*found[each.name], found[each.name][0].emitted == wanted if each.is_comparable
                else None)
        for each in contenders
    ]  # fmt: skip


def turn_of(report: Report, cpu_s: float, equal: bool | None) -> Outing:
    rows = report.rows
    return Outing(
        seconds=report.seconds,
        cpu_s=cpu_s,
        tokens=report.tokens,
        drafts=sum(row.drafts_made for row in rows) if rows else None,
        accepted=sum(row.drafts_accepted for row in rows),
        layer_calls=sum(row.layer_calls for row in rows),
        deciding_s=report.deciding_s,
        equal=equal,
    )


class Unfinished:
    """What an unfinished run has found, in a file; cut off, the same command goes on from it.

    Args:
        path: File of what was found; None keeps nothing.
        settings: All that it depends on.

    Raises:
        typer.BadParameter: the file is of other settings.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self._path = path
        self._found: dict[str, Any] = {"settings": json.loads(json.dumps(settings)), "turns": {}}
        if path is None or not path.exists():
            return
        there = json.loads(path.read_text())
        for name, value in self._found["settings"].items():
            if there["settings"].get(name) != value:
                raise typer.BadParameter(
                    f"{path} is an unfinished run with another {name} "
                    f"({there['settings'].get(name)!r}, not {value!r}): give the same to go on, "
                    "or remove the file to begin anew"
                )
        self._found = there

    def once(self, name: str, find: Callable[[], Any]) -> Any:
        """What was found before under this name, or else is found now: plain values."""
        if name not in self._found:
            self._found[name] = find()
            self.save()
        return self._found[name]

    def turns(self, text: str) -> Outings:
        """Outings on a text's prompts; what is added is kept by the next ``save``."""
        turns: Outings = self._found["turns"].setdefault(text, {})
        return turns

    def save(self) -> None:
        if self._path is not None:
            write_durably(self._path, json.dumps(self._found).encode())

    def forget(self) -> None:
        """The run is whole."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
