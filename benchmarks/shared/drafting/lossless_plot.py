"""Pictures of lossless drafting: how many times full depth each way to draft is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from offramp.agents.evaluation.figure_style import (
    INK,
    MUTED,
    OTHER,
    colour,
    mark_full_depth,
    one_row_each,
)

SOURCES = {
    "static": "fixed exit and length (LayerSkip)",
    "confidence stop": "confidence stop (Kangaroo)",
    "headless confidence stop": "confidence stop without the LM head",
    "DEL": "DEL",
    "Thompson sampling": "Thompson sampling (EESD)",
    "PPO": "learned (PPO), with the LM head",
    "headless PPO": "learned (PPO), without the LM head",
    "HF assistant_early_exit": "Hugging Face assistant_early_exit",
}
"""What a reader knows the contenders by; the names in the file go on with their settings."""

BEST, STATIC = "headless PPO", "static"


def draw_lossless(found: dict[str, Any], path: Path) -> None:
    """Bars with 95 % intervals, the fastest on top, and how far it is ahead of the best static.

    Args:
        found: What the benchmark's JSON file holds.
        path: PNG to write.
    """
    rows = {_family(row["policy"]): row for row in found["rows"] if row["policy"] != "full depth"}
    order = sorted(rows, key=lambda family: -rows[family]["ratio_full"])
    title = "Lossless drafting at batch 1"
    label = (
        f"tokens per second ÷ full depth, 95 % interval; {found['test_documents']} test documents, "
        f"{found['new_tokens']} new tokens each"
    )
    names = [SOURCES.get(family, family) for family in order]
    with one_row_each(names, path, title=title, label=label, height=0.36) as axes:
        for place, family in enumerate(order):
            row = rows[family]
            low, high = row["ratio_full_low"], row["ratio_full_high"]
            axes.barh(place, row["ratio_full"], height=0.62, color=_shade(family))
            axes.plot([low, high], [place, place], color=INK, lw=1.3, alpha=0.75)
            weight = "bold" if family == BEST else "normal"
            text = f"{row['ratio_full']:.2f} ×"
            axes.text(high + 0.03, place, text, va="center", color=INK, weight=weight)
        mark_full_depth(axes)
        axes.set_xlim(0, 2.25)
        axes.set_xticks([0, 0.5, 1, 1.5, 2])
        if BEST in rows and STATIC in rows:
            _compare(axes, rows[BEST], (order.index(BEST), order.index(STATIC)))


def _family(policy: str) -> str:
    return policy.split(",")[0].split("=")[0]


def _shade(family: str) -> str:
    if family == STATIC:
        return colour("fixed exit")
    return colour("PPO jumps") if family == BEST else OTHER


def _compare(axes: Any, best: dict[str, Any], places: tuple[int, int]) -> None:
    """A bracket from the best to the static one, with the gain and its interval."""
    gain, low, high = (100 * (best[f"ratio_static{end}"] - 1) for end in ("", "_low", "_high"))
    at = 2.17
    axes.plot([at - 0.03, at, at, at - 0.03], [places[0]] * 2 + [places[1]] * 2, color=MUTED, lw=1)
    middle = sum(places) / 2
    text = f"+{gain:.1f} %\n[{low:.1f}, {high:.1f}]"
    axes.text(at + 0.03, middle, text, va="center", color=colour("PPO jumps"), size=9.5)


TEXT_COLOURS = {"chat": "#1b6ca8", "humaneval": "#d95f02", "gsm8k": "#0a8f6c"}
"""A colour for each text of the real model's contest."""


def draw_real_model(found: dict[str, Any], path: Path) -> None:
    """A row for each contender, in it a dot with its 95 % interval for each text.

    Args:
        found: What the benchmark's JSON file holds.
        path: PNG to write.
    """
    rows = [row for row in found["rows"] if row["policy"] != "full depth"]
    texts = list(dict.fromkeys(row["text"] for row in rows))
    ratios: dict[str, list[float]] = {}
    for row in rows:
        ratios.setdefault(row["policy"], []).append(row["ratio_full"])
    order = sorted(ratios, key=lambda policy: -sum(ratios[policy]) / len(ratios[policy]))
    sizes = found["sizes"]
    label = (
        f"tokens per second ÷ full depth, 95 % interval; {sizes['prompts']} prompts of each text, "
        f"{sizes['new_tokens']} new tokens, temperature {sizes['temperature']:g}"
    )
    title = "Lossless drafting on a model nobody trained to exit, batch 1"
    names = [_plain_name(policy) for policy in order]
    with one_row_each(names, path, title=title, label=label, height=0.42) as axes:
        for number, text in enumerate(texts):
            shade = TEXT_COLOURS.get(text, OTHER)
            shift = 0.2 * (number - (len(texts) - 1) / 2)
            for row in (row for row in rows if row["text"] == text):
                place = order.index(row["policy"]) + shift
                axes.plot([row["ratio_low"], row["ratio_high"]], [place] * 2, color=shade, lw=1.6)
                axes.plot(row["ratio_full"], place, "o", color=shade, ms=5)
            axes.plot([], [], "o-", color=shade, label=text)
        mark_full_depth(axes)
        axes.set_xlim(left=0)
        axes.legend(frameon=False, loc="upper left")


def _plain_name(policy: str) -> str:
    """A contender's name in words: the exit after all layers of a copy is that copy."""
    of_copy = re.sub(r"exits? \d+:(\w+)", r"\1 copy", policy)
    return re.sub(r"exits? ([\d, ]+\d|\d+)(?!:)", r"adapters after \1", of_copy)
