"""What the demo prints of requests and swaps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.text import Text

from offramp.deploy.cli.console import console, say
from offramp.deploy.demo.traffic import StreamRecord, tokens_per_s

DEPTH_STYLES = ("green", "cyan", "yellow", "magenta", "red")
"""From the earliest exit to full depth."""


def show_completion(record: StreamRecord) -> None:
    """A prompt (dim) and its completion, each token coloured by the layers it took."""
    seen = sorted(set(record.exit_layers))
    line = Text(record.prompt[-120:], style="dim")
    for text, layer in zip(record.texts, record.exit_layers, strict=True):
        line.append(text, style=_style(layer, seen))
    say(line)
    legend = Text("  layers: ")
    for layer in seen:
        count = record.exit_layers.count(layer)
        legend.append(f"{layer} ({count} tokens)  ", style=_style(layer, seen))
    console.print(legend)


def show_swap(swap: dict[str, Any]) -> None:
    """What was published, acknowledgement times, and which generation each stream ran under."""
    guarantee = swap["guarantee"]
    console.print(
        f"  generation {swap['generation']} is {guarantee}: in verify there is no loss to bound"
    )
    for worker, ms in swap["ack_ms"].items():
        console.print(f"  {worker} acknowledged generation {swap['generation']} after {ms:.0f} ms")
    console.print(f"  streams in flight during the swap: {_each(swap['in_flight_generations'])}")
    going_on = sum(after > 0 for _, after in swap["in_flight_tokens"])
    console.print(f"  of those, {going_on} went on after both workers had acknowledged")
    console.print(f"  streams begun after it: {_each(swap['after_generations'])}")
    console.print(
        f"  {swap['requests']} requests, {swap['failed']} failed, {swap['torn']} torn", style="bold"
    )


def show_speed(
    before: Sequence[StreamRecord], after: Sequence[StreamRecord], restored: Sequence[StreamRecord]
) -> None:
    """Tokens per second that one client saw, under each policy."""
    for label, records in (
        ("full depth", before),
        ("learned drafter", after),
        ("rolled back", restored),
    ):
        layers = [layer for record in records for layer in record.exit_layers]
        mean = sum(layers) / len(layers) if layers else 0.0
        console.print(
            f"  {label:15} {tokens_per_s(records):6.1f} tokens/s   mean layers {mean:.2f}"
        )


def _style(layer: int, seen: Sequence[int]) -> str:
    place = seen.index(layer) / max(1, len(seen) - 1)
    return DEPTH_STYLES[round(place * (len(DEPTH_STYLES) - 1))]


def _each(generations: Sequence[Sequence[int]]) -> str:
    counts = Counter("+".join(map(str, each)) or "none" for each in generations)
    return ", ".join(f"{count} under generation {name}" for name, count in counts.items())
