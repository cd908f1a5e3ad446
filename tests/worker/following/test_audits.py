"""What full depth is asked of early tokens, and what happens when it disagrees too often."""

from __future__ import annotations

from typing import Any

import pytest

from offramp.controller.errors import ConfigError
from offramp.controller.policies.protocols import FixedExit, NeverExit
from offramp.controller.watching.guardrails import FIRST_AUDITED, Guardrails, PolicyWatch
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.decoding.request import PolicySnapshot
from offramp.worker.decoding.sequence import Sequence
from offramp.worker.engine.engine_config import EngineConfig
from support.models import LAYERS, make_model
from support.rows import RAGGED, RandomExit, drain, full_logits

GREEDY = SamplingParams(max_tokens=40, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=40, ignore_eos=True, temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama")


def engine_of(model: Any, share: float = 1.0, **config: Any) -> AdaptiveEngine:
    config = {"audit_share": share, **config}
    return AdaptiveEngine.from_pretrained(model, slots=4, config=EngineConfig(**config))


def watched(policy: Any, told: list[str], **bounds: Any) -> PolicySnapshot:
    watch = PolicyWatch(Guardrails(**bounds), told.append)
    return PolicySnapshot(3, "d" * 64, policy, None, watch)


def run(
    engine: AdaptiveEngine, snapshot: PolicySnapshot, sampling: SamplingParams = GREEDY, **how: Any
) -> list[Sequence]:
    requests = [engine.submit(prompt, sampling, snapshot, **how) for prompt in RAGGED]
    return drain(engine, requests)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("kv_mode", ["project", "defer"])
def test_audits_count_what_full_depth_would_not_have_said(
    model: Any, kv_mode: Any, sampling: SamplingParams
) -> None:
    told: list[str] = []
    snapshot = watched(RandomExit(0.4), told, max_disagreement=0.999)
    rows = run(engine_of(model), snapshot, sampling, kv_mode=kv_mode)
    audited = disagreed = 0
    for row in rows:
        best_T = full_logits(model, row).argmax(-1).tolist()
        early = [n for n, layer in enumerate(row.exit_layers) if layer < LAYERS]
        judged = early[: row.judged]  # the last ones may still have been pending at the end
        audited += len(judged)
        disagreed += sum(row.proposed[n] != best_T[n] for n in judged)
        assert len(early) - row.judged <= engine_of(model).config.max_pending
    assert snapshot.watch is not None
    assert (snapshot.watch.tally.audited, snapshot.watch.tally.disagreed) == (audited, disagreed)
    assert audited > 20
    assert 0 < disagreed < audited
    assert told == []


def test_an_audit_changes_no_token_of_a_deferring_request(model: Any) -> None:
    def snapshot() -> PolicySnapshot:
        return watched(RandomExit(0.4), [], max_disagreement=0.999)

    audited = run(engine_of(model), snapshot(), kv_mode="defer")
    plain = run(engine_of(model, 0.0), snapshot(), kv_mode="defer")
    assert [row.emitted for row in audited] == [row.emitted for row in plain]
    assert [row.judged for row in plain] == [0] * len(plain)


def test_the_share_is_kept_and_the_rest_is_left_alone(model: Any) -> None:
    engine = engine_of(model, 0.25)
    snapshot = watched(FixedExit(2), [])
    first, *_ = [engine.submit([5, 17], GREEDY, snapshot) for _ in range(FIRST_AUDITED)]
    requests = [engine.submit([5, 17], GREEDY, snapshot) for _ in range(40)]
    picked = [request.audited for request in (first, *requests)]
    assert picked == [True] + [True, False, False, False] * 10
    newer = watched(FixedExit(3), [])
    assert all(engine.submit([5], GREEDY, newer).audited for _ in range(FIRST_AUDITED))
    assert sum(engine.submit([5], GREEDY, newer).audited for _ in range(4)) == 1
    assert {request.kv_mode for request in requests if request.audited} == {"defer"}
    assert {request.kv_mode for request in requests if not request.audited} == {"project"}


def test_who_is_not_watched_forced_or_verified_is_not_audited(model: Any) -> None:
    engine = engine_of(model)
    snapshot = watched(FixedExit(2), [])
    assert not engine.submit([5], GREEDY, FixedExit(2)).audited
    assert not engine.submit([5], GREEDY, snapshot, kv_mode="verify").audited
    assert not engine.submit([5], policy=snapshot, forced=[1, 2]).audited
    assert engine.submit([5], GREEDY, snapshot).audited  # the control


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_out_of_range_is_named(share: float) -> None:
    with pytest.raises(ConfigError, match="audit_share"):
        EngineConfig(audit_share=share)


def test_garbage_trips_within_200_audited_tokens_and_goes_deep_at_once(model: Any) -> None:
    told: list[str] = []
    snapshot = watched(FixedExit(1), told)
    long = SamplingParams(max_tokens=200, ignore_eos=True)
    rows = run(engine_of(model), snapshot, long)
    watch = snapshot.watch
    assert watch is not None
    assert told == [watch.tripped]
    assert "full depth disagrees with" in told[0]
    assert watch.tally.audited <= 200
    # Requests under way keep their label, and leave early no more.
    assert all(row.exit_layers[-50:] == [LAYERS] * 50 for row in rows)
    assert all(1 in row.exit_layers for row in rows)


def test_a_good_policy_does_not_trip(model: Any) -> None:
    told: list[str] = []
    run(engine_of(model), watched(NeverExit(), told))
    assert told == []


class RaisesWhenAsked:
    """Raises whenever it is asked."""

    exits = (2,)
    schema = None
    candidates_VK = None

    def leave(self, features_NF: Any) -> Any:
        raise ZeroDivisionError


def test_a_policy_that_keeps_failing_trips(model: Any) -> None:
    told: list[str] = []
    engine, snapshot = engine_of(model), watched(RaisesWhenAsked(), told)
    for _ in range(4):
        run(engine, snapshot)
    assert told
    assert told[0].startswith("the policy failed ")


def test_a_drafter_slower_than_full_depth_trips_and_loses_no_token(model: Any) -> None:
    told: list[str] = []
    long = SamplingParams(max_tokens=200, ignore_eos=True)
    engine = engine_of(model)
    runs = [
        run(engine, watched(policy, told if policy.exits else []), long, kv_mode="verify")
        for policy in (FixedExit(3), NeverExit())
    ]
    drafted, plain = ([row.emitted for row in rows] for rows in runs)
    assert drafted == plain
    assert told[0].startswith("drafting is slower than full depth: ")
    # From then on nobody drafts.
    assert all(row.exit_layers[-50:] == [LAYERS] * 50 for row in runs[0])


def test_late_tokens_trip_where_a_bound_is_set(model: Any) -> None:
    told: list[str] = []
    run(engine_of(model), watched(NeverExit(), told, max_token_ms=1e-6))
    assert "took more than" in told[0]
