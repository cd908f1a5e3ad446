from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.controller.errors import ConfigError, PolicyRefusedError, Refusal
from offramp.controller.release.bundle import PolicyBundle
from offramp.controller.release.certificate import Certificate, Walked
from offramp.controller.release.manifest import Manifest
from support.releases.certificates import WALKED, certificate

shares = st.floats(0, 1, exclude_min=True, exclude_max=True)


@given(
    delta=shares,
    epsilon=st.floats(0.03, 1, exclude_max=True),
    n=st.integers(1, 2**40),
    family=st.text(),
    created_at=st.floats(0, 4e9),
    later=st.floats(allow_nan=False, allow_infinity=False),
)
def test_json_there_and_back(later: float, **changes: Any) -> None:
    last = Walked(setting=later, risk=1.0, p_value=1.0, passed=False)
    first = replace(WALKED[0], leaves=(changes["delta"], 0.0))
    mine = certificate(**changes, walked=(first, WALKED[1], last))
    assert Certificate.from_bytes(mine.to_bytes()) == mine
    assert Certificate.from_bytes(mine.to_bytes()).to_bytes() == mine.to_bytes()


def conformal(**changes: Any) -> Certificate:
    walked = tuple(replace(step, p_value=None) for step in WALKED)
    given: dict[str, Any] = {
        "method": "conformal",
        "epsilon": None,
        "p_value": None,
        "walked": walked,
    }
    return certificate(**given | changes)


def test_conformal_risk_control_has_no_epsilon_and_says_so() -> None:
    assert Certificate.from_bytes(conformal().to_bytes()) == conformal()
    assert conformal().statement.startswith("expected disagreement ≤ 0.05 (conformal), 300 doc")
    assert "probability" not in conformal().statement
    assert certificate().statement == (
        "disagreement ≤ 0.05 with probability ≥ 0.9 (hoeffding-bentkus), 300 documents, "
        "decoded by project"
    )


OFF_BY_ONE = {"setting": 1.0, "risk": 0.04, "p_value": 0.4}
CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    (OFF_BY_ONE, "the last setting that passed is 2.0"),
    ({"setting": 4.0}, "the last setting that passed is 2.0"),
    ({"walked": WALKED[2:]}, "no setting passed"),
    ({"walked": (replace(WALKED[0], leaves=(0.6, 0.5)), *WALKED[1:])}, "shares that are none"),
    ({"walked": (replace(WALKED[0], leaves=(-0.1, 0.5)), *WALKED[1:])}, "shares that are none"),
    ({"walked": (WALKED[0], WALKED[2], WALKED[1])}, "tested after a failure"),
    ({"walked": ()}, "no setting passed"),
    ({"epsilon": 0.02}, "p-value 0.03 exceeds epsilon 0.02"),
    ({"epsilon": None}, "needs epsilon and p-value"),
    ({"epsilon": 1.0}, "epsilon 1.0 is not in (0, 1)"),
    ({"delta": 0.0}, "delta 0.0 is not in (0, 1)"),
    ({"n": 0}, "no data"),
    ({"max_pending": 8}, "max_pending 8 in mode project"),
    ({"decode_mode": "defer"}, "max_pending None in mode defer"),
    ({"version": 2}, "version 2 is not 1"),
]


@pytest.mark.parametrize(("changes", "problem"), CONTRADICTIONS)
def test_what_certifies_nothing_is_no_certificate(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match="certificate") as caught:
        certificate(**changes)
    assert problem in caught.value.problem
    values = certificate().to_values() | changes
    values["walked"] = [s if isinstance(s, dict) else as_dict(s) for s in values["walked"]]
    assert problem in refused(values)


def as_dict(step: Walked) -> dict[str, Any]:
    values = {each.name: getattr(step, each.name) for each in fields(Walked)}
    return values | {"leaves": list(step.leaves)}


def test_a_conformal_bound_above_delta_is_refused() -> None:
    with pytest.raises(ConfigError, match="conformal bound"):
        conformal(delta=0.023)  # (300 · 0.02 + 1) / 301 = 0.02326
    assert conformal(delta=0.0233).delta == 0.0233
    with pytest.raises(ConfigError, match="neither epsilon"):
        conformal(epsilon=0.1)


def refused(values: Any) -> str:
    with pytest.raises(PolicyRefusedError) as caught:
        Certificate.from_values(values)
    assert caught.value.reason is Refusal.BAD_FORMAT
    return caught.value.detail


WRONG: list[tuple[str, Any]] = [
    ("loss", 1),
    ("risk", "0"),
    ("delta", True),
    ("epsilon", "0.1"),
    ("n", 1.5),
    ("unit", "sentence"),
    ("method", ["binomial"]),
    ("walked", {}),
    ("walked", [1]),
    ("walked", [{"setting": 1.0}]),
    ("data", "abc"),
    ("decode_mode", "verify"),
    ("max_pending", -1),
    ("policy", None),
    ("model", "not hex"),
    ("translators", None),
    ("created_at", None),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_an_ill_typed_field_is_refused(name: str, value: Any) -> None:
    told = refused(certificate().to_values() | {name: value})
    assert "'certificate." in told
    assert name in told


@pytest.mark.parametrize("name", [each.name for each in fields(Certificate)])
def test_a_missing_field_is_named(name: str) -> None:
    values = certificate().to_values()
    del values[name]
    assert refused(values) == f"field 'certificate.{name}' is missing"


def test_unknown_and_doubled_fields_are_refused() -> None:
    assert "unknown field 'certificate.more'" in refused(certificate().to_values() | {"more": 1})
    with pytest.raises(PolicyRefusedError, match="twice"):
        Certificate.from_bytes(b'{"loss":"x",' + certificate().to_bytes()[1:])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"policy": "e" * 64}, "of policy eeee"),
        ({"model": "ab"}, "of model ab, the manifest of aa"),
        ({"tokenizer": "ba"}, "of tokenizer ba, the manifest of bb"),
    ],
)
def test_a_certificate_of_something_else_spoils_the_manifest(
    bundle: PolicyBundle, change: dict[str, Any], told: str
) -> None:
    assert bundle.manifest.certificate is not None
    borrowed = replace(bundle.manifest.certificate, **change)
    raw = replace(bundle.manifest, certificate=borrowed).to_bytes()
    with pytest.raises(PolicyRefusedError, match=told):
        Manifest.from_bytes(raw)


def test_a_spoilt_certificate_spoils_the_manifest(bundle: PolicyBundle) -> None:
    values = json.loads(bundle.manifest.to_bytes())
    values["certificate"] |= OFF_BY_ONE
    with pytest.raises(PolicyRefusedError, match="last setting that passed"):
        Manifest.from_bytes(json.dumps(values).encode())


def test_what_stands_behind_a_manifest(bundle: PolicyBundle) -> None:
    assert bundle.manifest.guarantee == "certified"
    assert replace(bundle.manifest, certificate=None).guarantee == "uncertified"
    assert replace(bundle.manifest, certificate=None, kind="never").guarantee == "full depth"


def test_a_certificate_holds_only_as_it_was_measured() -> None:
    mine = certificate()
    assert mine.gap(kv_mode="project", dtype="float32", translators="") == ""
    assert mine.gap(kv_mode="verify", dtype="bfloat16", translators="t") == ""
    gap = mine.gap(kv_mode="defer", dtype="bfloat16", translators="")
    assert "decode_mode 'project', served with 'defer'" in gap
    assert "dtype 'float32'" in gap
    replayed = certificate(decode_mode="replay")
    assert "replay" in replayed.gap(kv_mode="project", dtype="float32", translators="")
