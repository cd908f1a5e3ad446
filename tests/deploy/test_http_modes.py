"""The namespace ``offramp`` of a request: cache modes, and what a completion cost."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
import torch

from offramp.controller import FixedExit
from offramp.controller.errors import RequestError
from offramp.controller.policies.drafts import StaticDraft
from offramp.controller.release.certified_points import Target
from offramp.deploy.http.shapes.contract import CompletionRequest
from offramp.worker import AdaptiveEngine, Completion, KVMode, SamplingParams
from offramp.worker.decoding.request import FULL_DEPTH, PolicySnapshot
from support.releases.certificates import certificate

PROMPT = "def main():\n"
BODY = {"model": "reference", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
COST = (
    "layer_calls", "copy_calls", "prompt_calls", "exact_share",
    "drafts", "drafts_accepted", "energy",
)  # fmt: skip
MODES: tuple[KVMode, ...] = ("project", "defer", "verify")

Ask = Callable[..., httpx.Response]


@pytest.fixture
def complete(app: Any, ask: Any) -> Ask:
    """Posts a completion request that has these options in its namespace."""

    def complete(options: Any, **changes: Any) -> httpx.Response:
        body = {**BODY, "offramp": options, **changes}
        response: httpx.Response = ask(app, lambda c: c.post("/v1/completions", json=body))
        return response

    return complete


@pytest.fixture(scope="module")
def expected(engine: Any) -> dict[KVMode, Completion]:
    """The same completions without HTTP, from an engine of their own."""
    other, sampling = (
        AdaptiveEngine(engine.model, engine.tokenizer),
        SamplingParams(max_tokens=12),
    )
    policy = engine.current_policy()
    return {m: other.generate(PROMPT, sampling, policy, kv_mode=m)[0] for m in MODES}


def cost_of(completion: Completion) -> dict[str, Any]:
    return {name: getattr(completion.stats, name) for name in COST}


def chunks_of(response: httpx.Response) -> list[Any]:
    *lines, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@pytest.mark.parametrize("mode", MODES)
def test_a_request_names_its_mode_and_is_told_its_cost(
    complete: Ask, expected: dict[KVMode, Completion], mode: KVMode
) -> None:
    reply = complete({"stats": True, "kv_mode": mode}).json()
    assert reply["choices"][0]["text"] == expected[mode].text
    assert reply["offramp"] == {
        "generation": 7,
        "exit_layers": expected[mode].exit_layers,
        "mean_exit_layer": expected[mode].stats.mean_exit_layer,
        **cost_of(expected[mode]),
    }


def test_the_modes_differ(expected: dict[KVMode, Completion]) -> None:
    costs = [cost_of(each) for each in expected.values()]
    assert costs[0]["exact_share"] < costs[1]["exact_share"] <= 1.0
    assert costs[0]["layer_calls"] < costs[1]["layer_calls"] < costs[2]["layer_calls"]
    assert costs[2]["drafts"] >= costs[2]["drafts_accepted"] > 0


@pytest.mark.parametrize("mode", MODES)
def test_a_stream_is_told_its_cost_with_the_last_token(
    complete: Ask, expected: dict[KVMode, Completion], mode: KVMode
) -> None:
    *chunks, last = chunks_of(complete({"stats": True, "kv_mode": mode}, stream=True))
    assert all(set(c["offramp"]) == {"generation", "exit_layer", "token"} for c in chunks)
    tokens = [c["offramp"]["token"] for c in (*chunks, last)]
    assert tokens == expected[mode].token_ids
    assert {name: last["offramp"][name] for name in COST} == cost_of(expected[mode])


@pytest.mark.parametrize("stream", [False, True])
def test_each_of_several_choices_has_its_mode_and_cost(
    complete: Ask, expected: dict[KVMode, Completion], stream: bool
) -> None:
    response = complete({"stats": True, "kv_mode": "verify"}, n=2, stream=stream)
    if stream:
        found = [c["offramp"] for c in chunks_of(response) if c["choices"][0]["finish_reason"]]
    else:
        found = [choice["offramp"] for choice in response.json()["choices"]]
    assert len(found) == 2
    for each in found:  # greedily, both are the same
        assert each["drafts_accepted"] == expected["verify"].stats.drafts_accepted


@pytest.mark.parametrize("options", [{}, {"kv_mode": None}, {"kv_mode": "project"}])
def test_the_engines_own_mode_is_the_default(
    complete: Ask, expected: dict[KVMode, Completion], options: Any
) -> None:
    reply = complete({"stats": True, **options}).json()["offramp"]
    assert {name: reply[name] for name in COST} == cost_of(expected["project"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("mode", ["exact", "", "VERIFY", 3, True, ["verify"], {"verify": 1}])
def test_an_unknown_mode_names_its_field(complete: Ask, mode: Any, stream: bool) -> None:
    response = complete({"kv_mode": mode}, stream=stream)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == "offramp.kv_mode"
    assert error["type"] == "invalid_request_error"
    assert "project, defer, verify" in error["message"]


def test_a_request_is_told_the_certified_setting_that_it_ran_at(
    complete: Ask, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = replace(engine.current_policy(), setting=0.25)
    monkeypatch.setattr(engine, "current_policy", lambda: moved)
    assert complete({"stats": True}).json()["offramp"]["setting"] == 0.25


@pytest.mark.parametrize("quality", ["lossless", 1, 0.9])
def test_what_no_certificate_guarantees_is_verified(
    complete: Ask, expected: dict[KVMode, Completion], quality: Any
) -> None:
    reply = complete({"stats": True, "quality": quality}).json()
    assert reply["choices"][0]["text"] == expected["verify"].text
    assert reply["offramp"]["drafts"] == expected["verify"].stats.drafts > 0


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"quality": quality}, "offramp.quality")
        for quality in (1.01, -1, True, "best", [1], {"share": 1}, 10**400)
    ]
    + [({"quality": 0.9, "kv_mode": "defer"}, "offramp.quality")],
)
def test_a_quality_that_is_none_is_refused(complete: Ask, options: Any, param: str) -> None:
    response = complete(options)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({name: value}, f"offramp.{name}")
        for name in ("latency_budget_ms", "energy_weight")
        for value in (-1, True, "fast", [1], 10**400)
    ]
    + [
        ({"latency_budget_ms": 0}, "offramp.latency_budget_ms"),
        ({"latency_budget_ms": 5, "kv_mode": "defer"}, "offramp.kv_mode"),
        ({"latency_budget_ms": 5, "quality": 2}, "offramp.quality"),
        # The pool of these tests was started without a table of costs.
        ({"latency_budget_ms": 5, "quality": 0.9}, "offramp.latency_budget_ms"),
        ({"energy_weight": 0.1}, "offramp.energy_weight"),
    ],
)
def test_a_target_that_cannot_be_had_is_refused(complete: Ask, options: Any, param: str) -> None:
    response = complete(options)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_a_target_is_read_whole() -> None:
    def wish(**options: Any) -> Any:
        return CompletionRequest.model_validate({**BODY, "offramp": options}).kv_mode

    both = wish(latency_budget_ms=5, energy_weight=0.25, quality="lossless")
    assert both == Target(latency_budget_ms=5.0, energy_weight=0.25, quality=1.0)
    assert wish(latency_budget_ms=5) == Target(latency_budget_ms=5.0)
    assert wish(energy_weight=0) == Target()
    assert wish(latency_budget_ms=None) is None


def test_the_served_policy_decides_for_whom_its_certificate_says_enough() -> None:
    bounded = certificate(decode_mode="project", dtype="float32", translators="")
    served = PolicySnapshot(1, "", FixedExit(3), bounded)

    def mode(quality: float, own: KVMode = "project", adapters: str = "") -> KVMode:
        return served.mode(quality, own, torch.float32, adapters)

    assert mode(1 - bounded.delta) == "project"
    assert mode(1 - bounded.delta + 0.01) == "verify"
    assert mode(1 - bounded.delta, own="defer") == "verify"  # certified for another mode
    assert mode(1 - bounded.delta, adapters="other") == "verify"
    assert FULL_DEPTH.mode(1.0, "project", torch.float32, "") == "project"
    assert served.mode(None, "defer", torch.float32, "") == "defer"
    with pytest.raises(RequestError, match="quality"):
        mode(1.5)


def test_a_released_drafter_loses_nothing_unless_it_is_asked_to(
    engine: AdaptiveEngine, complete: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert engine.config.kv_mode == "project"
    drafter = PolicySnapshot(8, "e" * 64, StaticDraft(layer=6, length=2))
    monkeypatch.setattr(engine, "current_policy", lambda: drafter)
    drafted = complete({"stats": True}).json()
    stats = drafted["offramp"]
    assert stats["generation"] == 8
    assert stats["drafts"] > 0
    assert stats["exact_share"] == 1
    monkeypatch.setattr(engine, "current_policy", lambda: FULL_DEPTH)
    full = complete({}).json()
    assert drafted["choices"][0]["text"] == full["choices"][0]["text"]
    # Who names a mode gets it, and a policy of the caller's own is in the engine's.
    assert drafter.mode("project", "project", torch.float32, "") == "project"
    assert replace(drafter, digest="").mode(None, "project", torch.float32, "") == "project"


def test_a_request_says_how_its_prompt_is_read(engine: Any, complete: Ask) -> None:
    """The pool's worker of these tests has no policy for prompts: that is said by name."""
    told = complete({"stats": True, "prefill": "full"}).json()["offramp"]
    tokens = len(engine.tokenizer.encode(PROMPT))
    assert told["prompt_calls"] == 12 * tokens
    for way, param in (("exits", "prefill"), ("half", "offramp.prefill"), (3, "offramp.prefill")):
        refused = complete({"prefill": way})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == param
    assert complete({"prefill": None}).status_code == 200
