"""A certificate that holds together, for any policy."""

from __future__ import annotations

from typing import Any

from offramp.controller.release.certificate import Certificate, Walked

WALKED = (
    Walked(setting=4.0, risk=0.001, p_value=1e-9, passed=True),
    Walked(setting=2.0, risk=0.02, p_value=0.03, passed=True),
    Walked(setting=1.0, risk=0.04, p_value=0.4, passed=False),
)


def certificate(policy: str = "c" * 64, **changes: Any) -> Certificate:
    values: dict[str, Any] = {
        "loss": "disagreement",
        "risk": 0.02,
        "delta": 0.05,
        "epsilon": 0.1,
        "n": 300,
        "unit": "document",
        "method": "hoeffding-bentkus",
        "p_value": 0.03,
        "family": "p̂",
        "parameter": "threshold, logits",
        "setting": 2.0,
        "walked": WALKED,
        "data": "d" * 64,
        "decode_mode": "project",
        "max_pending": None,
        "dtype": "float32",
        "prompt_tokens": 64,
        "new_tokens": 96,
        "policy": policy,
        "model": "aa",
        "tokenizer": "bb",
        "translators": "",
        "created_at": 1_800_000_000.25,
    }
    return Certificate(**values | changes)
