"""Traffic changes from code to prose: do audits notice, and does a retrained policy take over?

One worker decodes for clients that never pause, on a real Redis. Its policy was trained and
certified on what the model says after code. In mid-run the prompts become prose; from then on
nothing is done by hand: guardrails, `watch` and `learn` (the product's own code) do the rest.
Prompts are cut from the middle of a text: after its end the model begins a new text, which is code
whatever came before.

    PYTHONPATH=benchmarks python benchmarks/swapping/changing_traffic.py --plot traffic.png
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console

from offramp.agents.calibration.calibrate import Promise
from offramp.agents.retraining.retrain_config import RetrainConfig
from offramp.agents.retraining.retrainer import Retrainer
from offramp.controller.errors import OfframpError
from offramp.controller.keys.key_files import load_or_create_key
from offramp.controller.keys.root import trusted_keys
from offramp.controller.policies.kinds import pack_policy
from offramp.controller.policies.protocols import NeverExit
from offramp.controller.release.bundle import PolicyBundle
from offramp.controller.release.ledger import FolderLedger
from offramp.controller.release.publisher import Publisher
from offramp.controller.release.redis_registry import RedisRegistry
from offramp.controller.release.trust import ReleaseVerifier
from offramp.controller.watching.guardrails import PolicyWatch
from offramp.controller.watching.overseer import Overseer
from offramp.controller.watching.steps import Steps
from offramp.deploy.serve.redis_server import EmbeddedRedis
from offramp.deploy.serve.traffic_keeping import KeptTraffic
from offramp.worker.decoding.sampling import SamplingParams
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.engine.service import EngineService
from offramp.worker.following.refresh import PolicyRefresher
from offramp.worker.profiling.profile import describe_machine
from offramp.worker.spec import TrafficConfig, WorkerSpec, describe, load_engine
from swapping.traffic_lesson import DELTA, TEMPERATURE, TOKENS, learn_code, prompts_of
from swapping.traffic_run import TrafficRun, draw

CHANNEL = "traffic"
CLIENTS = 4
SAID = SamplingParams(max_tokens=TOKENS, temperature=TEMPERATURE, ignore_eos=True)
BOUNDS = {"adapt_above": DELTA, "max_disagreement": 2.5 * DELTA}
"""Guardrails of the first release, by audited early tokens; the certificate counts all tokens."""

STEPS = Steps(
    percents=(25, 100),
    min_tokens=300,
    min_requests=10,
    min_audited=60,
    max_disagreement=0.35,
    min_speed=0.5,
    max_first_p99=None,
    max_gap_p99=None,
)
"""Small numbers, for a run of minutes: a canary of a real service waits for more."""


def main(
    model: Annotated[str, typer.Option(help="Model folder.")] = "models/reference",
    code_s: Annotated[float, typer.Option(help="Seconds of code before the change.")] = 60.0,
    most_s: Annotated[float, typer.Option(help="Seconds of prose at most.")] = 300.0,
    requests: Annotated[int, typer.Option(help="Requests that are learned from.")] = 130,
    out: Annotated[Path | None, typer.Option("--json", help="File for the figures.")] = None,
    plot: Annotated[Path | None, typer.Option(help="File for the picture.")] = None,
) -> None:
    """Run it, and say what happened when."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, EmbeddedRedis(Path(name) / "redis") as redis:
        site = TrafficSite(Path(name), redis.url, model, requests)
        site.serve(code_s, most_s)
    figures = site.figures() | {"machine": describe_machine(torch.float32)}
    Console().print(figures)
    if out is not None:
        report = figures | {"stories": site.run.stories}
        out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if plot is not None:
        draw(site.run, site.changed_s, plot)


class TrafficSite:
    """A worker, its clients, its publisher, and those who watch and learn."""

    def __init__(self, folder: Path, url: str, model: str, requests: int) -> None:
        self.run, self.changed_s = TrafficRun(), 0.0
        self._folder, self._url = folder, url
        self._spec = WorkerSpec(model=model, slots=4, engine=EngineConfig(audit_share=1.0))
        self._engine = load_engine(self._spec)
        self._facts = describe(self._engine)
        self._prompts = prompts_of(self._engine.tokenizer)
        self._kind, self._stopping = "code", False
        self._watches: dict[int, PolicyWatch] = {}
        self._moves: dict[int, int] = {}
        self._audited: dict[int, int] = {}
        self._audits = self._audits_before = 0
        self._start_s = time.monotonic()
        self.config = RetrainConfig(
            traces=folder / "traces",
            traffic=folder / "kept",
            out=folder / "learning",
            window=30,
            requests=requests,
            promise=Promise(delta=DELTA, epsilon=0.05, method="betting"),
            percent=25,
            steps=65_536,
        )
        self._first = learn_code(self._spec, self._prompts["code"], self.config)

    def serve(self, code_s: float, most_s: float) -> None:
        """Serve code, then prose, until a retrained policy serves everybody or time is up."""
        key = load_or_create_key(self._folder / "key.pem")
        registry = RedisRegistry(self._url, CHANNEL, 5.0)
        publisher = Publisher(registry, FolderLedger(self._folder / "ledger"), key, CHANNEL)
        publisher.promote(self._release(publisher, None))
        first = self._release(publisher, self._first)
        self._refresher = refresher = self._follower(trusted_keys(key.public_bytes))
        config = TrafficConfig(folder=self.config.traffic, time_share=0.5)
        traffic = KeptTraffic(self._engine, config, "w0")
        service = EngineService(self._engine, after_step=traffic.work)
        publisher.promote(first)
        refresher.start()
        service.start()
        clients = threading.Thread(target=lambda: asyncio.run(self._clients(service)))
        noting = threading.Thread(target=self._note_always)
        self._start_s = time.monotonic()
        clients.start()
        noting.start()
        try:
            watch = Overseer(publisher, registry, 1, STEPS)
            self._follow(watch, Retrainer(self.config, publisher, registry), code_s, most_s)
        finally:
            self._stopping = True
            clients.join()
            noting.join()
            service.stop()
            refresher.stop()
            traffic.close()

    def _follow(self, watch: Overseer, learn: Retrainer, code_s: float, most_s: float) -> None:
        over_s = float("inf")
        while self._now() < min(code_s + most_s, over_s):
            if self._kind == "code" and self._now() > code_s:
                self._kind, self.changed_s = "prose", self._now()
                self._tell("the prompts become prose")
                self._audits_before = self._audits
            for story in (watch.look(), learn.look()):
                if story:
                    self._tell(story)
                if "the round is over" in story or "not published" in story:
                    over_s = min(over_s, self._now() + code_s / 2)
            time.sleep(0.5)

    def _note_always(self) -> None:
        """Look each half second: who trains in this process has no time to."""
        while not self._stopping:
            self._note()
            time.sleep(0.5)

    def _note(self) -> None:
        """Write down what the worker's counts say, and where it stands."""
        tallies = [each.tally for each in list(self._watches.values())]
        counts = sum(each.audited for each in tallies), sum(each.disagreed for each in tallies)
        current = self._refresher.current
        self.run.audits.append((self._now(), *counts))
        setting = np.nan if current.setting is None else current.setting
        self.run.settings.append((self._now(), current.generation, setting))
        for each in tallies:
            # A canary's step lets its stable release count anew, too.
            last = self._audited.get(each.generation, 0)
            self._audits += each.audited - (last if each.audited >= last else 0)
            self._audited[each.generation] = each.audited
            if each.moves != self._moves.get(each.generation, 0):
                self._moves[each.generation] = each.moves
                since = self._audits - self._audits_before
                self._tell(
                    f"generation {each.generation} moves to certified setting {each.point} of "
                    f"{each.points}, {since} audited tokens after the change"
                )

    def _tell(self, story: str) -> None:
        self.run.stories.append((self._now(), story))
        Console(stderr=True).print(f"{self._now():6.1f} s  {story}")

    async def _clients(self, service: EngineService) -> None:
        await asyncio.gather(*(self._client(service, number) for number in range(CLIENTS)))

    async def _client(self, service: EngineService, number: int) -> None:
        rng = np.random.default_rng(number)
        while not self._stopping:
            prompts = self._prompts[self._kind]
            said = replace(SAID, seed=int(rng.integers(2**31)))
            try:
                request, events = await service.submit(prompts[rng.integers(len(prompts))], said)
                if (seen := request.snapshot.watch) is not None:
                    self._watches[request.snapshot.generation] = seen
                places = [(self._now(), e.exit_layer, e.generation) async for e in events]
                self.run.tokens += places[1:]
                self.run.ended += 1
            except OfframpError as error:
                self.run.errors.append(repr(error))

    def _release(self, publisher: Publisher, bundle: PolicyBundle | None) -> int:
        packed = bundle.packed if bundle else pack_policy(NeverExit(), np.zeros((1, 1), np.float32))
        release = publisher.release(
            packed,
            model=self._facts.model,
            tokenizer=self._facts.tokenizer,
            training={},
            metrics={},
            certificate=bundle.manifest.certificate if bundle else None,
            guardrails=BOUNDS if bundle else None,
        )
        return release.generation

    def _follower(self, root: Any) -> PolicyRefresher:
        engine, facts = self._engine, self._facts
        verifier = ReleaseVerifier(
            root, CHANNEL, facts.model, facts.tokenizer, layers=facts.layers, vocab=facts.vocab
        )
        refresher = PolicyRefresher(
            RedisRegistry(self._url, CHANNEL),
            verifier,
            self._folder / "w0",
            "w0",
            prepare=engine.prepare,
        )
        engine.current_policy = lambda: refresher.current
        return refresher

    def _now(self) -> float:
        return time.monotonic() - self._start_s

    def figures(self) -> dict[str, Any]:
        """Requests, errors, audits and layers by generation."""
        layers: dict[int, list[int]] = {}
        for _, layer, generation in self.run.tokens:
            layers.setdefault(generation, []).append(layer)
        tallies = {g: watch.tally for g, watch in sorted(self._watches.items())}
        return {
            "requests": self.run.ended,
            "errors": len(self.run.errors),
            "changed_s": self.changed_s,
            "layers": {g: float(np.mean(each)) for g, each in sorted(layers.items())},
            "audits": {g: (each.audited, each.disagreed) for g, each in tallies.items()},
        }


if __name__ == "__main__":
    typer.run(main)
