"""Measured costs of a decode step's parts: workers measure them, envs charge them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from offramp.controller.costs.prices import (
    COPY_PARTS,
    PARTS,
    PROBE_PARTS,
    SPAN_PARTS,
    Batch,
    Prices,
    read_prices,
    require_batches,
)
from offramp.controller.costs.readings import EnergyMethod
from offramp.controller.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class CostTable:
    """Seconds and joules per part of a decode step, by the number of rows in the launch.

    The seven ``*_s`` fields are the view at batch 1. A table without ``batches`` is one of
    constants, written by hand: the same price at any number of rows, and no energy.

    Attributes:
        layer_s, head_s, probe_s, policy_s, fill_s, step_s, build_s: As in ``Prices``, at one row.
        layers: Number of layers L of the model measured.
        machine: What it was measured on: processor, system.
        batches: Every part, by rows, ascending from 1 (``view_of_one`` gives the view).
        spans: Layer, head and step of a launch that verifies: over several tokens of one row, by
            tokens, ascending from 1.
        passes: The same over several tokens of each of some rows, by the number of rows (above 1).
        probes: Parts that depend on the feature schema, by its name, by rows; ``ROUTED`` are those
            of candidates under a drafter that routes.
        copies: Layer and head of a copy of the layers in fewer bytes, by its weights, by rows.
        schema: Name of the schema that ``batches`` hold the probe of.
        model: Fingerprint of the model's weights; "" only in tables of constants.
        dtype: Number format of the weights.
        device: "cpu" or "cuda".
        threads: Torch threads.
        context: Tokens in the cache while timing.
        clock: Whether seconds are wall time or processor time.
        created_at: Seconds since 1970.
        energy_method: Says how the joules were obtained.
        energy_source: By which counter, or which model and coefficients.
    """

    layer_s: float
    head_s: float
    probe_s: float
    policy_s: float
    fill_s: float
    step_s: float
    build_s: float = 0.0
    layers: int
    machine: str
    batches: tuple[Batch, ...] = ()
    spans: tuple[Batch, ...] = ()
    passes: Mapping[int, tuple[Batch, ...]] = field(default_factory=dict)
    probes: Mapping[str, tuple[Batch, ...]] = field(default_factory=dict)
    copies: Mapping[str, tuple[Batch, ...]] = field(default_factory=dict)
    schema: str = ""
    model: str = ""
    dtype: str = ""
    device: str = "cpu"
    threads: int = 0
    context: int = 0
    clock: str = ""
    created_at: float = 0.0
    energy_method: EnergyMethod = EnergyMethod.UNAVAILABLE
    energy_source: str = ""

    def __post_init__(self) -> None:
        for name in ("layer_s", "head_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(name, "must be a positive number of seconds")
        if self.layers < 1:
            raise ConfigError("layers", f"{self.layers} is below 1")
        require_batches("batches", self.batches, PARTS)
        require_batches("spans", self.spans, SPAN_PARTS)
        for rows, spans in self.passes.items():
            require_batches(f"passes of {rows} rows", spans, SPAN_PARTS)
        for weights, batches in self.copies.items():
            require_batches(f"copies in {weights}", batches, COPY_PARTS)
        for name, batches in self.probes.items():
            require_batches(f"probes of {name}", batches, PROBE_PARTS)
            if [each.size for each in batches] != [each.size for each in self.batches]:
                raise ConfigError(f"probes of {name}", "are at other numbers of rows than the rest")
        for part in PARTS if self.batches else ():
            if self.batches[0].parts[part].median_s != getattr(self, f"{part}_s"):
                raise ConfigError(
                    f"{part}_s", "is not what the batches say of one row", "Use CostTable.scaled"
                )

    @property
    def full_s(self) -> float:
        """Seconds of one token at full depth with no probe: the KV-cached baseline."""
        return self.at(1).full_s

    @property
    def largest(self) -> float:
        """Most rows that ``at`` has a price for; infinite for a table of constants."""
        return self.batches[-1].size if self.batches else math.inf

    def at(self, rows: float) -> Prices:
        """Prices of a launch of that many rows, one token each.

        Between two measured numbers of rows each price is interpolated linearly.

        Raises:
            ConfigError: outside of what was measured; a guess would be no measurement.
        """
        return self._prices(rows, 1, read_prices("rows", self.batches, rows))

    def on_copy(self, weights: str, rows: float = 1) -> Prices:
        """Prices of a launch of that many rows, one token each, on a copy in such weights.

        Layer and head are the copy's, the other parts those of any launch.

        Raises:
            ConfigError: that copy was not measured, or not with so many rows.
        """
        if weights not in self.copies:
            raise ConfigError(
                "costs",
                f"do not hold those of a copy in {weights}",
                f"Run `offramp profile --draft-weights {weights}`",
            )
        own = read_prices("rows", self.batches, rows)
        return self._prices(rows, 1, own | read_prices("rows", self.copies[weights], rows))

    def launch(self, tokens: float) -> Prices:
        """Prices of a launch of that many tokens of one row, as a verifying pass takes them.

        ``full_s`` is the whole pass; layer, head and step are those of all its tokens, the other
        parts those of one row. Raises as ``at`` does.
        """
        one = read_prices("rows", self.batches, 1)
        return self._prices(1, tokens, one | read_prices("tokens", self.spans, tokens))

    def with_probe(self, schema: str) -> CostTable:
        """The same table with the probe of another feature schema.

        Raises:
            ConfigError: that schema's probe was not measured.
        """
        if schema not in self.probes:
            raise ConfigError(
                "schema",
                f"the costs of {schema!r} probes were not measured",
                f"Profile again; measured are: {', '.join(sorted(self.probes)) or 'none'}",
            )
        batches = tuple(
            replace(batch, parts={**batch.parts, **probe.parts})
            for batch, probe in zip(self.batches, self.probes[schema], strict=True)
        )
        return replace(self, schema=schema, batches=batches, **view_of_one(batches))

    def scaled(self, part: str, factor: float) -> CostTable:
        """The same table with one part at ``factor`` times its price: for what-if questions."""
        changes: dict[str, Any] = {f"{part}_s": getattr(self, f"{part}_s") * factor}
        for name in ("batches", "spans"):
            changes[name] = tuple(batch.scaled(part, factor) for batch in getattr(self, name))
        for name in ("passes", "copies"):
            changes[name] = {
                key: tuple(each.scaled(part, factor) for each in batches)
                for key, batches in getattr(self, name).items()
            }
        return replace(self, **changes)

    def require_model(self, model: str) -> None:
        """Refuse to price another model than the one measured.

        Raises:
            ConfigError: the fingerprints differ. A table of constants fits any model.
        """
        if self.model and self.model != model:
            raise ConfigError(
                "costs",
                f"were measured on model {self.model[:12]}, not on {model[:12]}",
                "Run `offramp profile` for this model",
            )

    def _prices(self, rows: float, tokens: float, values: dict[str, float]) -> Prices:
        view = {f"{part}_s": getattr(self, f"{part}_s") for part in PARTS}
        return Prices(
            rows=rows,
            tokens=tokens,
            layers=self.layers,
            energy_method=self.energy_method,
            **(view | values),
        )


def view_of_one(batches: Sequence[Batch]) -> dict[str, Any]:
    """The fields of a ``CostTable`` that repeat what its first batch says."""
    return {f"{part}_s": batches[0].parts[part].median_s for part in PARTS}
