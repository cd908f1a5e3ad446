"""Texts that wait are classified in batches, each as it would be alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from offramp.controller.costs.readings import EnergyMethod
from offramp.controller.errors import DecodeFailedError, OverloadedError, RequestError
from offramp.controller.policies.protocols import FixedExit
from offramp.controller.release.manifest import Rollout
from offramp.controller.watching.analysis import judge_shadow
from offramp.controller.watching.guardrails import Guardrails, PolicyWatch
from offramp.controller.watching.steps import Steps
from offramp.controller.watching.tally import Tally
from offramp.worker.classifying.classified_text import ClassifiedText
from offramp.worker.classifying.classifier import Classifier
from offramp.worker.classifying.text_service import TextService
from offramp.worker.classifying.text_watching import TextShadows
from offramp.worker.decoding.request import FULL_DEPTH, PolicySnapshot
from offramp.worker.energy.step_meter import BATCH_TOKENS
from support.certificates import certificate
from support.classifying.sequence_models import ByLength, encoder_stack, random_heads
from support.cost_tables import OneJoule

ROWS, WAITING = 4, 8
AUDITED = 60
SHORT = PolicySnapshot(7, "d" * 64, ByLength({1: 2, 3: 4}))


class Served:
    def __init__(self) -> None:
        self.classifier = Classifier(encoder_stack(), random_heads())
        self.current = SHORT
        self.service = TextService(
            self.classifier, lambda: self.current, rows=ROWS, max_waiting=WAITING
        )

    def classify(self, texts: list[list[int]], **options: Any) -> list[ClassifiedText]:
        found: list[ClassifiedText] = self.run(lambda service: service.classify(texts, **options))
        return found

    def run(self, ask: Callable[[TextService], Awaitable[Any]]) -> Any:
        async def within() -> Any:
            return await asyncio.wait_for(ask(self.service), 60)

        return asyncio.run(within())


@pytest.fixture
def served() -> Iterator[Served]:
    found = Served()
    found.service.start()
    yield found
    found.service.stop()


def sequences(count: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(5, 97, rng.integers(1, 8)).tolist() for _ in range(count)]


def test_texts_of_many_requests_come_out_as_they_would_alone(served: Served) -> None:
    texts = sequences(10)
    alone = [served.classifier.run([each], SHORT.policy) for each in texts]

    async def ask(service: TextService) -> Any:
        return await asyncio.gather(*(service.classify(texts[n : n + 2]) for n in range(0, 10, 2)))

    found = [each for pair in served.run(ask) for each in pair]
    assert [each.label for each in found] == [int(each.label_N[0]) for each in alone]
    assert [each.layers for each in found] == [int(each.layers_N[0]) for each in alone]
    assert len({each.layers for each in found}) == 3
    for each, lone in zip(found, alone, strict=True):
        assert each.probs == pytest.approx(lone.probs_NC[0].tolist(), abs=1e-5)
        assert each.generation == 7
    assert served.service.load == (0, 0)
    assert served.service.is_healthy


def test_a_quality_is_kept_by_the_certificate_or_by_full_depth(served: Served) -> None:
    bound = certificate(decode_mode="classify", translators="", delta=0.05)
    certified = replace(SHORT, certificate=bound)

    def layers(snapshot: PolicySnapshot, quality: float | None) -> tuple[int, int]:
        served.current = snapshot
        (found,) = served.run(lambda service: service.classify([[5, 6]], quality=quality))
        return found.layers, found.generation

    assert layers(certified, None) == layers(certified, 0.95) == (1, 7)
    assert layers(certified, 0.96) == layers(SHORT, 0.1) == (5, 0)
    # What was certified for tokens says nothing of labels.
    tokens = replace(SHORT, certificate=replace(bound, decode_mode="project"))
    assert layers(tokens, 0.5) == (5, 0)
    with pytest.raises(RequestError, match="quality"):
        served.run(lambda service: service.classify([[5]], quality=2.0))


def test_a_canary_serves_its_share_of_the_requests(served: Served) -> None:
    canary = replace(SHORT, generation=8, policy=FixedExit(2), rollout=Rollout(percent=50))
    served.current = replace(SHORT, canary=canary)
    names = [str(number) for number in range(WAITING)]

    async def ask(service: TextService) -> Any:
        asked = (service.classify([[5, 6]], split_by=name) for name in names)
        return await asyncio.gather(*asked)

    found = [each.generation for (each,) in served.run(ask)]
    assert found == [8 if canary.rollout.picks(name) else 7 for name in names]
    assert set(found) == {7, 8}


def watched(
    share: float, bound: float = 0.25
) -> tuple[Served, list[ClassifiedText], PolicyWatch, list[str]]:
    """Texts classified one by one under a release that is watched, with audits of a share."""
    found = Served()
    trips: list[str] = []
    watch = PolicyWatch(Guardrails(max_disagreement=bound), trips.append)
    service = TextService(
        found.classifier, lambda: replace(SHORT, watch=watch), rows=ROWS, audit_share=share
    )
    service.start()

    async def ask() -> list[ClassifiedText]:
        return [(await service.classify([each]))[0] for each in sequences(AUDITED)]

    said = asyncio.run(ask())
    service.stop()
    return found, said, watch, trips


def test_full_depth_is_asked_about_texts_that_left_early() -> None:
    found, said, watch, _ = watched(1.0)
    early = [place for place, each in enumerate(said) if each.layers < 5]
    texts = [sequences(AUDITED)[place] for place in early]
    full = found.classifier.run(texts).label_N.tolist()
    differ = [said[place].label != best for place, best in zip(early, full, strict=True)]
    assert 0 < len(early) < AUDITED
    assert (watch.tally.audited, watch.tally.disagreed) == (len(early), sum(differ))
    assert sum(differ) > 0
    assert watched(0.0)[2].tally.audited == 0


def test_a_release_that_full_depth_disagrees_with_goes_to_full_depth_at_once() -> None:
    _, said, watch, trips = watched(1.0, bound=0.01)
    assert len(trips) == 1
    assert "full depth disagrees with" in watch.tripped
    after = [each.layers for each in said[-10:]]
    assert after == [5] * 10
    assert {each.generation for each in said[-10:]} == {0}
    assert min(each.layers for each in said) == 1


def test_a_request_is_counted_once_all_its_texts_are_answered() -> None:
    """Canaries are compared by requests: without them they would wait for ever."""
    watch = PolicyWatch(Guardrails(), print, 7)
    found = Served()
    found.current = replace(SHORT, watch=watch)
    found.service.start()
    said = found.classify(sequences(10))  # three batches
    said += found.classify([[5, 6]])
    found.service.stop()
    tally = watch.tally
    layers = [each.layers for each in said]
    assert (tally.requests, sum(tally.firsts), tally.tokens) == (2, 2, 11)
    assert tally.depths == pytest.approx(sum(layers[:10]) / 10 + layers[10])
    # Whoever asked waited for all batches.
    assert tally.paces > tally.seconds / 11


def in_shadow(share: float, *, each: bool) -> tuple[Tally, Tally, list[ClassifiedText], Classifier]:
    """Texts asked one by one beside a canary in shadow, which has heads of its own.

    The next comes at once, or once the last was repeated: nothing is repeated while others wait.
    """
    stable, canary = (
        PolicyWatch(Guardrails(max_disagreement=0.99), print, each) for each in (7, 8)
    )
    shadow = replace(
        SHORT,
        generation=8,
        policy=FixedExit(2),
        watch=canary,
        rollout=Rollout(percent=0),
        adapters=random_heads(seed=5),
    )
    found = Served()
    found.current = replace(SHORT, watch=stable, canary=shadow)
    found.service._shadows = TextShadows(found.service._audits, share)
    found.service.start()
    said: list[ClassifiedText] = []
    for number, text in enumerate(sequences(AUDITED)):
        said += found.classify([text], split_by=str(number))
        while each and canary.tally.audited <= number:
            time.sleep(0.001)
    found.service.stop()
    return stable.tally, canary.tally, said, found.classifier.under(shadow)


def test_a_canary_in_shadow_is_counted_and_judged_and_serves_nobody() -> None:
    stable, canary, said, its_own = in_shadow(1.0, each=True)
    assert {each.generation for each in said} <= {0, 7}
    assert (stable.requests, stable.audited) == (AUDITED, 0)
    assert canary.tokens == canary.requests == canary.audited == canary.early == AUDITED
    assert canary.depth == 2
    texts = sequences(AUDITED)
    differ = [
        int(its_own.run([each], FixedExit(2)).label_N[0]) != int(its_own.run([each]).label_N[0])
        for each in texts
    ]
    assert canary.disagreed == sum(differ) > 0
    steps = Steps(min_tokens=AUDITED, min_requests=AUDITED, min_audited=AUDITED, max_tokens=AUDITED)
    assert "full depth disagrees with" in judge_shadow(steps, canary).reason


def test_a_shadow_takes_no_more_than_its_share_of_the_time() -> None:
    _, canary, said, _ = in_shadow(1e-9, each=False)
    assert canary.tokens <= 1 < len(said)


def test_a_release_may_bring_heads_of_its_own(served: Served) -> None:
    heads = random_heads(seed=5)
    heads.digest = "e" * 64
    certified = certificate(decode_mode="classify", translators=heads.digest, delta=0.05)
    brought = replace(SHORT, generation=8, adapters=heads, certificate=certified)
    canary = replace(brought, rollout=Rollout(percent=50))
    served.current = replace(SHORT, canary=canary)
    texts = sequences(WAITING)
    with_heads = served.classifier.under(brought)

    async def ask(service: TextService) -> Any:
        asked = (service.classify([each], split_by=str(n)) for n, each in enumerate(texts))
        return await asyncio.gather(*asked)

    found = [each for (each,) in served.run(ask)]
    assert {each.generation for each in found} == {7, 8}
    for text, each in zip(texts, found, strict=True):
        of = with_heads if each.generation == 8 else served.classifier
        alone = of.run([text], SHORT.policy)
        assert each.probs == pytest.approx(alone.probs_NC[0].tolist(), abs=1e-5)
    # Its certificate is of these heads, and full depth is theirs, too.
    served.current = brought
    assert served.service.gap(brought) == ""
    assert "translators" in served.service.gap(replace(brought, adapters=None))
    (sure,) = served.classify([[5, 6]], quality=1.0)
    assert (sure.layers, sure.generation) == (5, 8)
    full = with_heads.run([[5, 6]]).probs_NC[0]
    assert sure.probs == pytest.approx(full.tolist(), abs=1e-5)


def metered(source: OneJoule, batches: int) -> tuple[TextService, list[ClassifiedText], Tally]:
    """Texts that leave after 1 and 3 layers and after all 5, in batches of ``ROWS``."""
    texts = [[5] * (1, 3, 7, 7)[place % ROWS] for place in range(batches * ROWS)]
    watch = PolicyWatch(Guardrails(), print, 7)
    service = TextService(
        Served().classifier,
        lambda: replace(SHORT, watch=watch),
        rows=ROWS,
        max_waiting=len(texts),
        source=source,
    )

    async def ask() -> list[ClassifiedText]:
        asked = asyncio.create_task(service.classify(texts))
        await asyncio.sleep(0)  # all are in line before the first batch begins
        service.start()
        return await asked

    said = asyncio.run(ask())
    service.stop()
    return service, said, watch.tally


def test_a_batchs_energy_is_shared_by_the_layers_that_each_text_ran() -> None:
    service, said, tally = metered(OneJoule(), 4 * BATCH_TOKENS // ROWS)
    read = [each for each in said if each.energy is not None]
    layers = [each.layers for each in said[:ROWS]]
    assert len(set(layers)) > 1
    for each in said[:ROWS]:
        assert each.energy is not None
        assert each.energy.joules == pytest.approx(each.layers / sum(layers))
        assert each.energy[1:] == (EnergyMethod.ATTRIBUTED, "a counter", 1.0)
    assert service.meter.totals == {("measured_shared", "a counter"): (len(read) / ROWS, len(read))}
    assert tally.meter == "attributed: a counter"
    assert tally.token_j == pytest.approx(1 / ROWS)


@pytest.mark.parametrize("source", [OneJoule(joules=0.0), OneJoule(known=False)])
def test_a_counter_that_says_nothing_leaves_the_energy_unknown(source: OneJoule) -> None:
    _, said, tally = metered(source, 2 * BATCH_TOKENS // ROWS)
    assert {each.energy for each in said} == {None}
    assert tally.meter == ""


def test_too_many_and_unusable_texts_are_refused(served: Served) -> None:
    most = ROWS + WAITING
    assert len(served.run(lambda service: service.classify(sequences(most)))) == most
    with pytest.raises(OverloadedError):
        served.run(lambda service: service.classify(sequences(most + 1)))
    for texts, field in (([], "input"), ([[5], []], r"input\[1\]"), ([[5] * 65], r"input\[0\]")):
        with pytest.raises(RequestError, match=field):
            served.classify(texts)


def test_a_batch_that_fails_fails_alone(served: Served) -> None:
    served.current = replace(FULL_DEPTH, policy=FixedExit(9))  # no head is there
    with pytest.raises(DecodeFailedError, match="no head was fitted"):
        served.run(lambda service: service.classify([[5]]))
    served.current = SHORT
    assert served.run(lambda service: service.classify([[5]]))[0].layers == 1


def test_after_the_end_nothing_is_taken() -> None:
    found = Served()
    found.service.start()
    found.service.stop()
    with pytest.raises(DecodeFailedError, match="shutting down"):
        found.run(lambda service: service.classify([[5]]))
