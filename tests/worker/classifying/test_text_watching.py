"""What a release does with texts is counted, audited, and tried in shadow."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from offramp.controller.policies.protocols import FixedExit
from offramp.controller.release.manifest import Rollout
from offramp.controller.watching.analysis import StepOutcome, judge_shadow
from offramp.controller.watching.guardrails import Guardrails, PolicyWatch
from offramp.controller.watching.steps import Steps
from offramp.controller.watching.tally import Tally
from offramp.worker.classifying.class_heads import ClassHeads
from offramp.worker.classifying.classified_text import ClassifiedText
from offramp.worker.classifying.classifier import Classifier
from offramp.worker.classifying.text_service import TextService
from offramp.worker.classifying.text_watching import TextShadows
from support.classifying.sequence_models import like_heads, random_heads
from support.classifying.served_texts import ROWS, SHORT, WAITING, Served, sequences
from support.releases.certificates import certificate

AUDITED = 60


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


def test_what_a_request_took_is_the_wait_for_all_its_batches() -> None:
    watch = PolicyWatch(Guardrails(), print, 7)
    found = Served()
    found.current = replace(SHORT, watch=watch)
    found.service.start()
    found.classify(sequences(3 * ROWS))
    found.service.stop()
    assert sum(watch.tally.gaps) == 3
    assert watch.tally.paces * 3 * ROWS > watch.tally.seconds


def in_shadow(
    share: float, *, each: bool, heads: ClassHeads | None = None
) -> tuple[Tally, Tally, list[ClassifiedText], Served]:
    """Texts asked one by one beside a canary in shadow, which may have heads of its own.

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
        adapters=heads,
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
    return stable.tally, canary.tally, said, found


@pytest.mark.parametrize("brings", [False, True])
def test_a_canary_in_shadow_is_counted_and_judged_and_serves_nobody(brings: bool) -> None:
    """What its heads say is compared with the stable release's at full depth."""
    heads = random_heads(seed=5)
    heads.digest = "e" * 64
    stable, canary, said, found = in_shadow(1.0, each=True, heads=heads if brings else None)
    its_own = Classifier(found.classifier.stack, heads) if brings else found.classifier
    assert {each.generation for each in said} <= {0, 7}
    assert (stable.requests, stable.audited) == (AUDITED, 0)
    assert canary.tokens == canary.requests == canary.audited == canary.early == AUDITED
    assert canary.depth == 2
    texts = sequences(AUDITED)
    differ = [
        its_own.run([each], FixedExit(2)).label_N[0] != found.classifier.run([each]).label_N[0]
        for each in texts
    ]
    assert canary.disagreed == sum(differ) > 0
    steps = Steps(min_tokens=AUDITED, min_requests=AUDITED, min_audited=AUDITED, max_tokens=AUDITED)
    assert judge_shadow(steps, canary).outcome is StepOutcome.FAIL


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


def test_the_best_is_found_by_the_heads_that_a_release_brought(served: Served) -> None:
    heads = like_heads([torch.tensor([[1.0, 50.0]] * 3)] * 4)
    served.current = brought = replace(SHORT, generation=8, adapters=heads)
    found = served.classify(sequences(4), best=0)
    (best,) = [each for each in found if each.is_best]
    full = served.classifier.under(brought).run(sequences(4)).probs_NC[:, 0]
    assert best.probs[0] == pytest.approx(full.max(), abs=1e-5)
    assert {each.generation for each in found} == {8}
