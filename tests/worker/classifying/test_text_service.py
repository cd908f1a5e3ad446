"""Texts that wait are classified in batches, each as it would be alone."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from offramp.controller.costs.readings import EnergyMethod
from offramp.controller.errors import DecodeFailedError, OverloadedError, RequestError
from offramp.controller.policies.protocols import FixedExit
from offramp.controller.release.manifest import Rollout
from offramp.controller.watching.guardrails import Guardrails, PolicyWatch
from offramp.controller.watching.tally import Tally
from offramp.worker.classifying.classified_text import ClassifiedText
from offramp.worker.classifying.text_service import TextService
from offramp.worker.decoding.request import FULL_DEPTH, PolicySnapshot
from offramp.worker.energy.step_meter import BATCH_TOKENS
from support.classifying.served_texts import ROWS, SHORT, WAITING, Served, sequences
from support.cost_tables import OneJoule
from support.releases.certificates import certificate


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
