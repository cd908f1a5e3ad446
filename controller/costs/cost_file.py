"""A cost table as a JSON file: strict when read, whole or absent when written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from offramp.controller.costs.prices import PARTS, Batch, Timing
from offramp.controller.costs.readings import EnergyMethod
from offramp.controller.costs.table import CostTable, view_of_one
from offramp.controller.durable import write_durably
from offramp.controller.errors import ConfigError

COSTS_VERSION = 2
"""Version of the file's form. The first held seconds at batch 1, without intervals."""

PLAIN = {
    "layers": int,
    "machine": str,
    "schema": str,
    "model": str,
    "dtype": str,
    "device": str,
    "threads": int,
    "context": int,
    "clock": str,
    "created_at": float,
    "energy_source": str,
}
"""Fields that are one JSON value, and their types."""

FIELDS = {"version", "batches", "spans", "probes", "energy_method", *PLAIN}


def save_costs(path: Path, costs: CostTable) -> None:
    """Write a table, replacing what is there only once the new one is whole.

    A table of constants is written as one batch of one row.

    Raises:
        ConfigError: the file cannot be written (permission, full disk); an old one is untouched.
    """
    try:
        write_durably(path, json.dumps(to_json(costs), indent=1).encode())
    except OSError as error:
        raise ConfigError(
            "costs",
            f"cannot be written to {str(path)!r} ({error.strerror or error})",
            "Name a writable file on a disk with room",
        ) from error


def load_costs(path: Path) -> CostTable:
    """Read a table.

    Raises:
        ConfigError: the file is missing, damaged, of another version, or says what cannot be.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _refusal(path, f"is unreadable ({error})") from error
    try:
        return from_json(record)
    except ConfigError as error:
        raise _refusal(path, f"holds no cost table ({error.field}: {error.problem})") from error


def to_json(costs: CostTable) -> dict[str, Any]:
    """The table as JSON values."""
    batches = costs.batches or (_constants(costs),)
    return {
        "version": COSTS_VERSION,
        **{name: getattr(costs, name) for name in PLAIN},
        "energy_method": costs.energy_method.value,
        "batches": [asdict(batch) for batch in batches],
        "spans": [asdict(span) for span in costs.spans],
        "probes": {name: [asdict(each) for each in part] for name, part in costs.probes.items()},
    }


def from_json(record: Any) -> CostTable:
    """The table again.

    Raises:
        ConfigError: naming the field that is missing, unknown or unusable.
    """
    if not isinstance(record, dict):
        raise ConfigError("file", "is no JSON object")
    version = record.get("version", 1)
    if version != COSTS_VERSION:
        raise ConfigError("version", f"is {version}, not {COSTS_VERSION}")
    _require_names("file", record, FIELDS)
    batches = _batches("batches", record["batches"])
    if not batches:
        raise ConfigError("batches", "are empty")
    _require_names("batches", batches[0].parts, PARTS)
    if not isinstance(record["probes"], dict):
        raise ConfigError("probes", "are no object")
    plain = {name: _plain(name, record[name], kind) for name, kind in PLAIN.items()}
    return CostTable(
        **plain,
        **view_of_one(batches),
        batches=batches,
        spans=_batches("spans", record["spans"]),
        probes={name: _batches("probes", part) for name, part in record["probes"].items()},
        energy_method=_method(record["energy_method"]),
    )


def _refusal(path: Path, problem: str) -> ConfigError:
    return ConfigError(str(path), problem, "Run `offramp profile` to measure this machine")


def _constants(costs: CostTable) -> Batch:
    seconds = {part: getattr(costs, f"{part}_s") for part in PARTS}
    timings = {
        part: Timing(median_s=value, low_s=value, high_s=value) for part, value in seconds.items()
    }
    return Batch(size=1, parts=timings)


def _require_names(where: str, record: Mapping[str, Any], names: Sequence[str] | set[str]) -> None:
    missing, unknown = set(names) - set(record), set(record) - set(names)
    if missing or unknown:
        problem = f"lacks {sorted(missing)}" if missing else f"has unknown {sorted(unknown)}"
        raise ConfigError(where, problem)


def _plain(name: str, value: Any, kind: type) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(name, f"{value!r} is no {kind.__name__}")
    return value


def _method(value: Any) -> EnergyMethod:
    try:
        return EnergyMethod(value)
    except ValueError as error:
        raise ConfigError("energy_method", f"{value!r} is none") from error


def _batches(name: str, records: Any) -> tuple[Batch, ...]:
    if not isinstance(records, list) or not all(isinstance(each, dict) for each in records):
        raise ConfigError(name, "are no list of objects")
    for record in records:
        _require_names(name, record, {"size", "parts"})
        if not isinstance(record["parts"], dict):
            raise ConfigError(name, "have parts that are no object")
    return tuple(
        Batch(
            size=_plain("size", record["size"], int),
            parts={part: _timing(part, value) for part, value in record["parts"].items()},
        )
        for record in records
    )


def _timing(part: str, record: Any) -> Timing:
    if not isinstance(record, dict):
        raise ConfigError(part, "is no object")
    _require_names(part, record, {"median_s", "low_s", "high_s", "joules", "repeats"})
    joules = record["joules"]
    seconds = {name: _plain(name, record[name], float) for name in ("median_s", "low_s", "high_s")}
    return Timing(
        **seconds,
        joules=None if joules is None else _plain("joules", joules, float),
        repeats=_plain("repeats", record["repeats"], int),
    )
