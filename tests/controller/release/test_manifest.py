from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offramp.controller.errors import ConfigError, PolicyRefusedError, Refusal
from offramp.controller.release.bundle import PolicyBundle
from offramp.controller.release.manifest import Manifest, Rollout

OPTIONAL = ("adapters", "adapter_index")
REQUIRED = [each.name for each in fields(Manifest) if each.name not in OPTIONAL]

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
quiet = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quiet
@given(
    channel=st.text(),
    generation=st.integers(0, 2**53 - 1),
    threshold=st.floats(allow_nan=False, allow_infinity=False),
    exits=st.sets(st.integers(1, 200)).map(lambda layers: tuple(sorted(layers))),
    training=st.dictionaries(st.text(), json_values, max_size=3),
    percent=st.floats(0, 100),
    expires_at=st.none() | st.floats(0, 4e9),
    rollback_of=st.none() | st.integers(0, 10**6),
)
def test_json_there_and_back(
    bundle: PolicyBundle, percent: float, threshold: float, **changes: Any
) -> None:
    changes |= {"params": {"threshold": threshold}}
    manifest = replace(bundle.manifest, rollout=Rollout(percent=percent, salt="s"), **changes)
    raw = manifest.to_bytes()
    assert Manifest.from_bytes(raw) == manifest
    assert Manifest.from_bytes(raw).to_bytes() == raw


def test_the_bytes_are_canonical(bundle: PolicyBundle) -> None:
    raw = bundle.manifest.to_bytes()
    values = json.loads(raw)
    assert raw == json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
    assert set(values) == {*REQUIRED}


def test_adapters_are_left_out_or_named_and_certified_as_they_are(bundle: PolicyBundle) -> None:
    uncertified = replace(bundle.manifest, certificate=None, adapters="a" * 64)
    named = replace(uncertified, adapter_index="b" * 64)
    assert Manifest.from_bytes(named.to_bytes()) == named
    with pytest.raises(PolicyRefusedError, match="an index of adapters is named"):
        Manifest.from_bytes(replace(named, adapters="").to_bytes())
    with pytest.raises(PolicyRefusedError, match="the certificate is of translators"):
        Manifest.from_bytes(replace(bundle.manifest, adapters="a" * 64).to_bytes())


WRONG: list[tuple[str, Any]] = [
    ("format_version", "1"),
    ("format_version", 1),
    ("channel", 3),
    ("epoch", -1),
    ("generation", True),
    ("generation", 1.0),
    ("generation", 2**53),
    ("kind", "other"),
    ("kind", ["mlp"]),
    ("exits", [0]),
    ("exits", [4, 2]),
    ("exits", [2, 2]),
    ("exits", "24"),
    ("exits", [2.0]),
    ("params", []),
    ("params", {}),
    ("params", {"threshold": "0"}),
    ("params", {"threshold": True}),
    ("params", {"threshold": 0.5, "column": "top1"}),
    ("schema", "abc"),
    ("schema", "G" * 64),
    ("model", "not hex"),
    ("model", ""),
    ("tokenizer", None),
    ("digest", None),
    ("digest", "0" * 63),
    ("size", 1.5),
    ("shapes", []),
    ("shapes", {"a": ["F32"]}),
    ("shapes", {"a": ["F32", [-1]]}),
    ("shapes", {"a": [1, [1]]}),
    ("training", None),
    ("metrics", []),
    ("certificate", 0),
    ("rollout", {"percent": 101, "salt": ""}),
    ("rollout", {"percent": 50}),
    ("rollout", {"percent": 50, "salt": "", "more": 1}),
    ("rollout", {"percent": True, "salt": ""}),
    ("guardrails", "none"),
    ("created_at", None),
    ("expires_at", "never"),
    ("rollback_of", -1),
]


def refused(raw: bytes) -> str:
    with pytest.raises(PolicyRefusedError) as caught:
        Manifest.from_bytes(raw)
    assert caught.value.reason is Refusal.BAD_FORMAT
    return caught.value.detail


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_an_ill_typed_field_is_named(bundle: PolicyBundle, name: str, value: Any) -> None:
    values = json.loads(bundle.manifest.to_bytes())
    assert name in refused(json.dumps(values | {name: value}).encode())


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_field_is_named(bundle: PolicyBundle, name: str) -> None:
    values = json.loads(bundle.manifest.to_bytes())
    del values[name]
    assert refused(json.dumps(values).encode()) == f"field {name!r} is missing"


def test_an_unknown_field_is_named(bundle: PolicyBundle) -> None:
    values = json.loads(bundle.manifest.to_bytes())
    assert refused(json.dumps(values | {"sudo": 1}).encode()) == "unknown field 'sudo'"


def test_a_doubled_field_is_refused(bundle: PolicyBundle) -> None:
    raw = bundle.manifest.to_bytes()
    assert "twice" in refused(b'{"channel":"other",' + raw[1:])


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"null", b"\xff", b"{", b'{"epoch":NaN}', b"[" * 100_000], ids=range(7)
)
def test_what_is_no_object_is_refused(raw: bytes) -> None:
    refused(raw)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1, 2}])
def test_what_json_cannot_say_is_a_config_error(bundle: PolicyBundle, value: Any) -> None:
    with pytest.raises(ConfigError, match="manifest"):
        replace(bundle.manifest, metrics={"a": value}).to_bytes()
