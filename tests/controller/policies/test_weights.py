"""Packing and unpacking. Shape suffixes: N rows, F features, V vocabulary, K candidates."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from offramp.controller.errors import ConfigError, PolicyRefusedError, Refusal, RequestError
from offramp.controller.features import CANDIDATES_V1, SOFTMAX_V2, FeatureSchema, FloatArray
from offramp.controller.policies.codec import CLOSE_LOGIT
from offramp.controller.policies.kinds import MAX_BLOB_BYTES, PackedPolicy, pack_policy
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.policies.protocols import ExitPolicy, FixedExit, NeverExit, ThresholdPolicy
from offramp.controller.release.bundle import PolicyBundle

MakeMlp = Callable[..., MlpPolicy]


def bundled(packed: PackedPolicy) -> PolicyBundle:
    return PolicyBundle.draft(
        packed, model="aa", tokenizer="bb", training={}, metrics={}, created_at=0.0
    )


@pytest.mark.parametrize(
    "policy",
    [
        NeverExit(),
        NeverExit((2, 4), CANDIDATES_V1, np.zeros((5, 2), np.int32)),
        FixedExit(3),
        ThresholdPolicy((2, 4), CANDIDATES_V1, "top1", 0.1),
        ThresholdPolicy((1,), CANDIDATES_V1, "margin", 0.9, np.zeros((5, 2), np.int32)),
    ],
    ids=["never", "never probing", "fixed", "threshold", "threshold with candidates"],
)
def test_simple_policies_come_back(policy: Any, canned_NF: FloatArray) -> None:
    found = bundled(pack_policy(policy, canned_NF)).policy()
    assert type(found) is type(policy)
    assert found.exits == policy.exits
    assert found.schema == policy.schema
    assert getattr(found, "threshold", None) == getattr(policy, "threshold", None)
    assert getattr(found, "column", None) == getattr(policy, "column", None)
    if policy.candidates_VK is None:
        assert found.candidates_VK is None
    else:
        np.testing.assert_array_equal(found.candidates_VK, policy.candidates_VK)


def test_an_mlp_comes_back_bit_for_bit(make_mlp: MakeMlp, canned_NF: FloatArray) -> None:
    policy = make_mlp(3)
    found = bundled(pack_policy(policy, canned_NF)).policy()
    assert isinstance(found, MlpPolicy)
    np.testing.assert_array_equal(found.logits(canned_NF), policy.logits(canned_NF))
    np.testing.assert_array_equal(found.candidates_VK, policy.candidates_VK)
    assert (found.exits, found.threshold) == (policy.exits, policy.threshold)


def test_the_same_policy_gives_the_same_bytes(make_mlp: MakeMlp, canned_NF: FloatArray) -> None:
    first, second = (pack_policy(make_mlp(3), canned_NF) for _ in range(2))
    assert first == second
    assert first.digest == second.digest
    assert pack_policy(make_mlp(4), canned_NF).digest != first.digest


def test_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    # Hash randomisation must not reach the bytes.
    script = (
        "import numpy as np\n"
        "from offramp.controller.policies.kinds import pack_policy\n"
        "from offramp.controller.policies.protocols import ThresholdPolicy\n"
        "from offramp.controller.features import CANDIDATES_V1\n"
        "policy = ThresholdPolicy((2, 4), CANDIDATES_V1, 'top1', 0.5, np.zeros((5, 2), np.int32))\n"
        "print(pack_policy(policy, np.ones((4, 11), np.float32)).digest)\n"
    )
    run = [sys.executable, "-c", script]
    here = ThresholdPolicy((2, 4), CANDIDATES_V1, "top1", 0.5, np.zeros((5, 2), np.int32))
    there = subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()
    assert there == pack_policy(here, np.ones((4, 11), np.float32)).digest


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (FixedExit(2), FixedExit(3)),
        (
            ThresholdPolicy((2,), CANDIDATES_V1, "top1", 9.0),
            ThresholdPolicy((2,), CANDIDATES_V1, "top1", 9.5),
        ),
        (
            ThresholdPolicy((2,), CANDIDATES_V1, "top1", 9.0),
            ThresholdPolicy((2,), CANDIDATES_V1, "margin", 9.0),
        ),
    ],
)
def test_the_digest_tells_policies_apart_that_decide_alike(
    one: ExitPolicy, other: ExitPolicy, canned_NF: FloatArray
) -> None:
    assert pack_policy(one, canned_NF).digest != pack_policy(other, canned_NF).digest


def test_canned_inputs_leave_out_what_rounding_could_turn(make_mlp: MakeMlp) -> None:
    policy = make_mlp(0)
    rng = np.random.default_rng(1)
    rows_NF = rng.normal(size=(64, CANDIDATES_V1.width)).astype(np.float32)
    policy.threshold = float(policy.logits(rows_NF)[5])
    kept_NF = load(pack_policy(policy, rows_NF).blob)["canned.features"]
    assert len(kept_NF) < len(rows_NF)
    assert (np.abs(policy.logits(kept_NF) - policy.threshold) > CLOSE_LOGIT / 2).all()
    with pytest.raises(RequestError, match="no clear decision"):
        pack_policy(policy, rows_NF[5:6])


@pytest.mark.parametrize("shape", [(4,), (4, 3), (2, 4, 11)])
def test_canned_inputs_of_another_shape_are_refused(
    make_mlp: MakeMlp, shape: tuple[int, ...]
) -> None:
    with pytest.raises(RequestError, match="canned_features_NF"):
        pack_policy(make_mlp(), np.zeros(shape, np.float32))


def test_weights_that_are_not_finite_are_not_packed(
    make_mlp: MakeMlp, canned_NF: FloatArray
) -> None:
    with pytest.raises(RequestError, match=r"canned\.features"):
        pack_policy(FixedExit(1), np.full((2, 3), np.nan, np.float32))
    policy = make_mlp()
    policy.weights[0][0][0, 0] = np.inf  # saturates a unit, so that every logit stays finite
    with pytest.raises(RequestError, match=r"layers\.0\.weight"):
        pack_policy(policy, canned_NF)


def test_an_unknown_kind_of_policy_is_refused(canned_NF: FloatArray) -> None:
    class Mine:
        exits = ()
        schema = None
        candidates_VK = None

        def leave(self, features_NF: FloatArray) -> Any:
            return np.zeros(len(features_NF), np.bool_)

    with pytest.raises(RequestError, match="Mine"):
        pack_policy(Mine(), canned_NF)


def test_a_policy_over_the_limit_is_not_packed(canned_NF: FloatArray) -> None:
    table_VK = np.zeros((MAX_BLOB_BYTES // 8, 3), np.int32)
    with pytest.raises(ConfigError, match="over"):
        pack_policy(NeverExit(candidates_VK=table_VK), canned_NF)


def test_a_schema_of_another_version_is_refused(canned_NF: FloatArray) -> None:
    newer = FeatureSchema("candidates", 99, CANDIDATES_V1.columns)
    packed = pack_policy(ThresholdPolicy((2,), newer, "top1", 0.5), canned_NF)
    with pytest.raises(PolicyRefusedError) as caught:
        bundled(packed).policy()
    assert caught.value.reason is Refusal.WRONG_SCHEMA
    known = ThresholdPolicy((2,), SOFTMAX_V2, "margin", 0.5)
    assert bundled(pack_policy(known, canned_NF[:, :7])).policy() == known


def test_a_folder_holds_a_bundle(bundle: PolicyBundle, tmp_path: Path) -> None:
    bundle.save(tmp_path / "policy")
    assert PolicyBundle.load(tmp_path / "policy") == bundle
    assert bundle.packed.digest == bundle.manifest.digest
    assert {path.name for path in (tmp_path / "policy").iterdir()} == {
        "manifest.json",
        "weights.safetensors",
    }


def test_a_damaged_or_missing_folder_is_refused(bundle: PolicyBundle, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="policy folder"):
        PolicyBundle.load(tmp_path)
    bundle.save(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(bundle.blob[:-1] + b"\x07")
    with pytest.raises(PolicyRefusedError) as caught:
        PolicyBundle.load(tmp_path)
    assert caught.value.reason is Refusal.DIGEST_MISMATCH
