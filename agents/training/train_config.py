"""A training run's settings, read from TOML; every option is described here and in the docs."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from offramp.agents.learning.jump_ppo import JumpConfig
from offramp.agents.learning.phat import PhatConfig
from offramp.agents.learning.ppo import PPOConfig
from offramp.agents.onpolicy.onpolicy import OnPolicyConfig
from offramp.controller.adapters.adapter_folder import KEPT, require_found
from offramp.controller.errors import ConfigError
from offramp.controller.policies.exits import Exit, exit_from_json

C = TypeVar("C")

GATE_FAMILIES = ("fixed exit", "CALM", "CALM on candidates", "p̂", "PPO")
"""What ``offramp train`` teaches without a file: every policy is asked at exit after exit."""

JUMP_FAMILIES = ("PPO jumps", "p̂ on best exits", "PPO on-policy")
"""What it teaches by a file that names no families: policies that skip exits, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Settings of a training run.

    Attributes:
        traces: Folder that ``offramp record`` wrote.
        costs: File that ``offramp profile`` wrote; "" takes the costs measured when recording.
        translators: Folder of the adapters that were recorded through; "" takes those that the
            recording kept. They are copied beside the policies.
        families: Which families of policies are trained and placed, beside full depth.
        seed: Seeds everything random; it replaces the stages' own seeds.
        threads: Torch threads; part of what makes a run repeatable.
        targets: Offline agreements with full depth at which every family gets a point.
        checkpoint_every: PPO rollouts (and hundreds of warm-up steps) between checkpoints. What is
            drawn in between starts from seed and count, so it is part of the result.
        tensorboard: Whether scalars are written, to the folder ``tensorboard``.
        phat: Stage (a), the classifier.
        gate: PPO that leaves or goes on to the next exit (family "PPO").
        jump: Stages (b), warm start, and (c), PPO.
        onpolicy: Stage (c) continued in the engine, through Ray.
    """

    traces: str
    costs: str = ""
    translators: str = ""
    families: tuple[str, ...] = JUMP_FAMILIES
    seed: int = 0
    threads: int = 1
    targets: tuple[float, ...] = (0.92, 0.95, 0.97, 0.985)
    checkpoint_every: int = 4
    tensorboard: bool = True
    phat: PhatConfig = field(default_factory=PhatConfig)
    gate: PPOConfig = field(default_factory=PPOConfig)
    jump: JumpConfig = field(default_factory=JumpConfig)
    onpolicy: OnPolicyConfig = field(default_factory=OnPolicyConfig)

    def __post_init__(self) -> None:
        if not self.targets or not all(0 < target < 1 for target in self.targets):
            raise ConfigError("targets", f"{self.targets} are not all in (0, 1)")
        for name in ("threads", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(name, f"{getattr(self, name)} is below 1")


def adapters_of(config: TrainConfig, digest: str) -> Path | None:
    """The adapters that a run's traces were recorded through; None if they were through none.

    Args:
        config: Settings of the run.
        digest: The adapters' digest, as the traces name them.

    Raises:
        ConfigError: they are in none of the places where they may be.
    """
    if not digest:
        if config.translators:
            raise ConfigError(
                "translators", "is given, and the traces were recorded through none", "Leave it out"
            )
        return None
    kept = Path(config.traces) / KEPT
    return require_found(digest, Path(config.translators) if config.translators else kept)


def load_config(path: Path, kind: type[C]) -> C:
    """Read and check a TOML file of settings.

    Args:
        path: A TOML file.
        kind: The dataclass of settings that it fills, such as ``TrainConfig``.

    Raises:
        ConfigError: it cannot be read, or a key is unknown, missing or of another type.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError("config", f"{path} is unreadable ({error})", "Write TOML") from error
    config = parse(kind, table)
    assert isinstance(config, kind)
    return config


def parse(kind: type[Any], table: Mapping[str, Any], prefix: str = "", base: Any = None) -> Any:
    """A dataclass from a TOML table, its own dataclasses from tables within.

    Args:
        kind: Dataclass to make.
        table: What the file says; what it leaves out stays as in ``base``.
        prefix: Dotted name of the table, for errors.
        base: A value of that kind; None takes the dataclass's defaults.

    Raises:
        ConfigError: naming the key, with the nearest known one.
    """
    hints = get_type_hints(kind)
    known = [each.name for each in fields(kind)]
    values = {}
    for key, value in table.items():
        if key not in known:
            raise ConfigError(f"{prefix}{key}", "is no known option", _suggestion(key, known))
        values[key] = _value(hints[key], value, f"{prefix}{key}", _default(kind, key, base))
    try:
        return kind(**values) if base is None else replace(base, **values)
    except TypeError as error:
        raise ConfigError(f"{prefix}{known[0]}", f"is missing ({error})", "Add it") from error


def options_of(kind: type[Any], prefix: str = "") -> list[str]:
    """Every option's dotted name."""
    hints = get_type_hints(kind)
    names = []
    for each in fields(kind):
        nested = hints[each.name]
        name = f"{prefix}{each.name}"
        inner = nested if isinstance(nested, type) and is_dataclass(nested) else None
        names += [name] if inner is None else options_of(inner, f"{name}.")
    return names


def _suggestion(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, 1)
    return f"Did you mean {close[0]}" if close else f"Use one of {', '.join(known)}"


def _default(kind: type[Any], key: str, base: Any) -> Any:
    """What a nested table starts from: a stage's own defaults, not those of its type."""
    if base is not None:
        return getattr(base, key)
    [found] = [each for each in fields(kind) if each.name == key]
    return None if found.default_factory is MISSING else found.default_factory()


def _value(hint: Any, value: Any, name: str, base: Any) -> Any:
    if is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(name, f"{value!r} is no table", f"Write [{name}]")
        assert isinstance(hint, type)
        return parse(hint, value, f"{name}.", base)
    if get_origin(hint) is tuple and isinstance(value, list):
        kind = get_args(hint)[0]
        if Exit in _types(kind):
            return _exits(name, value)
        if not all(type(each) in ((int, float) if kind is float else (kind,)) for each in value):
            wanted = "names" if kind is str else "numbers"
            raise ConfigError(name, f"{value} is no list of {wanted}", "Correct its type")
        return tuple(kind(each) for each in value)
    allowed = _types(hint)
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) not in allowed:
        names = " or ".join(kind.__name__ for kind in allowed if kind is not NoneType)
        raise ConfigError(name, f"{value!r} is no {names}", "Correct its type")
    return value


def _exits(name: str, values: list[Any]) -> tuple[int, ...]:
    try:
        return tuple(map(exit_from_json, values))
    except ValueError as error:
        problem = f"{values} is no list of exits"
        raise ConfigError(name, problem, 'Write it like ["12:int4", 3, 6]') from error


def _types(hint: Any) -> tuple[type, ...]:
    if get_origin(hint) in (Union, UnionType):
        return tuple(kind for each in get_args(hint) for kind in _types(each))
    args = get_args(hint)
    if args and all(isinstance(each, str) for each in args):  # a Literal of names
        return (str,)
    return (get_origin(hint) or hint,)
