"""Cost tables as JSON files: strict when read, whole or absent when written."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from offramp.controller.costs.prices import PARTS, Batch, batches_from_json, require_names, typed
from offramp.controller.costs.readings import EnergyMethod
from offramp.controller.costs.table import CostTable, view_of_one
from offramp.controller.durable import write_durably
from offramp.controller.errors import ConfigError

COSTS_VERSION = 4
"""Version of the file's form: the first held seconds at batch 1, the second no ``passes``, the
third no ``step`` of launches that verify."""

PLAIN: dict[str, type] = {
    **dict.fromkeys(("machine", "schema", "model", "dtype", "device", "clock"), str),
    **dict.fromkeys(("layers", "threads", "context"), int),
    "created_at": float,
    "energy_source": str,
}
"""Fields that are one JSON value, and their types."""

FIELDS = {"version", "batches", "spans", "passes", "probes", "copies", "energy_method", *PLAIN}


def save_costs(path: str | Path, costs: CostTable) -> None:
    """Write a table, replacing what is there only once the new one is whole.

    A table of constants is written as one batch of one row.

    Raises:
        ConfigError: the file cannot be written (permission, full disk); an old one is untouched.
    """
    try:
        write_durably(Path(path), json.dumps(to_json(costs), indent=1).encode())
    except OSError as error:
        raise ConfigError(
            "costs",
            f"cannot be written to {str(path)!r} ({error.strerror or error})",
            "Name a writable file on a disk with room",
        ) from error


def load_costs(path: str | Path) -> CostTable:
    """Read a table.

    Raises:
        ConfigError: the file is missing, damaged, of another version, or says what cannot be.
    """
    path = Path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _refusal(path, f"is unreadable ({error})") from error
    try:
        return from_json(record)
    except ConfigError as error:
        raise _refusal(path, f"holds no cost table ({error.field}: {error.problem})") from error


def to_json(costs: CostTable) -> dict[str, Any]:
    """The table as JSON values."""
    batches = costs.batches or (
        Batch.of_constants({part: getattr(costs, f"{part}_s") for part in PARTS}),
    )
    tables: dict[str, Any] = {"passes": costs.passes, "probes": costs.probes}
    if costs.copies:
        tables["copies"] = costs.copies
    return {
        "version": COSTS_VERSION,
        **{name: getattr(costs, name) for name in PLAIN},
        "energy_method": costs.energy_method.value,
        "batches": [asdict(batch) for batch in batches],
        "spans": [asdict(span) for span in costs.spans],
        **{
            name: {str(key): [asdict(each) for each in found] for key, found in table.items()}
            for name, table in tables.items()
        },
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
    record = {"copies": {}} | record  # which only tables of an engine with a copy have
    require_names("file", record, FIELDS)
    batches = batches_from_json("batches", record["batches"])
    if not batches:
        raise ConfigError("batches", "are empty")
    require_names("batches", batches[0].parts, PARTS)
    for name in ("passes", "probes", "copies"):
        if not isinstance(record[name], dict):
            raise ConfigError(name, "are no object")
    if not all(rows.isdecimal() and int(rows) > 1 for rows in record["passes"]):
        raise ConfigError("passes", f"are of {sorted(record['passes'])}, not of rows above 1")
    try:
        method = EnergyMethod(record["energy_method"])
    except ValueError as error:
        raise ConfigError("energy_method", f"{record['energy_method']!r} is none") from error
    plain = {name: typed(name, record[name], kind) for name, kind in PLAIN.items()}
    return CostTable(
        **plain,
        **view_of_one(batches),
        batches=batches,
        spans=batches_from_json("spans", record["spans"]),
        passes={int(n): batches_from_json("passes", s) for n, s in record["passes"].items()},
        probes={name: batches_from_json("probes", part) for name, part in record["probes"].items()},
        copies={name: batches_from_json("copies", part) for name, part in record["copies"].items()},
        energy_method=method,
    )


def _refusal(path: Path, problem: str) -> ConfigError:
    return ConfigError(str(path), problem, "Run `offramp profile` to measure this machine")
