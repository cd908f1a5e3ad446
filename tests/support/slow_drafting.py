"""A slow, plain simulation of draft-and-verify cycles, and traces for it.

Shape suffixes: T tokens, E exits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from offramp.controller.costs.table import CostTable
from offramp.controller.features import CANDIDATES_V1
from offramp.controller.policies.exits import is_on_copy
from offramp.controller.traces import TraceChunk, TraceHeader
from offramp.envs import TokenTraces


def drafted_traces(
    documents: int = 3,
    tokens: int = 12,
    exits: tuple[int, ...] = (2, 4, 7),
    layers: int = 12,
    seed: int = 0,
    model: str = "ab" * 32,
) -> TokenTraces:
    """Invented documents whose exits are right about half of the time."""
    rng = np.random.default_rng(seed)
    chunks = []
    for index in range(documents):
        shape = (tokens, len(exits))
        exit_token_TE = rng.integers(2, size=shape, dtype=np.int32)
        full_token_T = rng.integers(2, size=tokens, dtype=np.int32)
        gap_TE = np.where(exit_token_TE == full_token_T[:, None], 0, -1).astype(np.float32)
        chunks.append(
            TraceChunk(
                document=f"{index:064x}",
                position_T=np.arange(tokens, dtype=np.int32),
                features_TEF=rng.random((*shape, CANDIDATES_V1.width), np.float32),
                softmax_TES=rng.random((*shape, 3), np.float32),
                exit_token_TE=exit_token_TE,
                full_token_T=full_token_T,
                next_token_T=full_token_T,
                gap_TE=gap_TE,
            )
        )
    header = TraceHeader(model=model, schema=CANDIDATES_V1.digest, exits=exits, layers=layers)
    return TokenTraces.from_chunks(header, chunks)


@dataclass
class Open:
    """A token some of whose layers have not run, and the layers that hold an entry of it."""

    depth: int
    entries: set[int]


@dataclass
class SlowEpisode:
    """One row of the engine in ``verify``, told in loops and lists.

    Every call of ``run`` goes layer by layer, takes in the open tokens that stand at that layer,
    and pays for one launch of so many tokens.
    """

    traces: TokenTraces
    costs: CostTable
    token: int
    end: int
    max_pending: int
    base: int = field(init=False)
    open: list[Open] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    here: int = -1
    depth: int = 0
    seconds: float = 0.0
    tokens: int = 0
    cycles: int = 0
    calls: int = 0
    copy_depth: int = 0
    copy_calls: int = 0

    def __post_init__(self) -> None:
        self.base = self.token
        self.probe = self.costs.with_probe("softmax").at(1)

    @property
    def is_over(self) -> bool:
        return self.base == self.end

    def run(self, until: int) -> None:
        for layer in range(self.depth, until):
            taking_part = 1 + sum(each.depth <= layer for each in self.open)
            self.seconds += self.costs.launch(taking_part).layer_s
            self.calls += taking_part
        for each in self.open:
            each.depth = max(each.depth, until)
            each.entries.update(range(until))
        self.depth = until

    def run_copy(self, until: int) -> None:
        for each in self.open:  # what the copy reads of them is filled, once
            self.fill(each)
        for _ in range(self.copy_depth, until):
            self.seconds += self.costs.on_copy("int4").layer_s
            self.copy_calls += 1
        self.copy_depth = until

    def fill(self, token: Open) -> None:
        missing = set(range(self.traces.header.layers)) - token.entries
        self.seconds += len(missing) * self.costs.at(1).fill_s
        token.entries |= missing

    def act(self, action: int) -> None:
        exits = self.traces.header.exits
        if self.here < 0:
            self.seconds += self.probe.policy_s
            target = action
        elif action == 0:
            self.leave()
            self.forced()
            return
        else:
            target = len(exits) if action == len(exits) else self.here + action
        if target >= len(exits):
            self.verify()
            self.forced()
            return
        changes = self.here < 0 or is_on_copy(exits[self.here]) != is_on_copy(exits[target])
        self.seconds += self.probe.build_s if changes else 0.0
        self.seconds += self.probe.probe_s + self.probe.policy_s
        if is_on_copy(exits[target]):
            self.run_copy(exits[target])
            self.seconds += self.costs.on_copy("int4").head_s - self.costs.at(1).head_s
        else:
            self.run(exits[target])
        self.here = target

    def leave(self) -> None:
        self.seconds += self.probe.step_s
        self.right.append(bool(self.traces.agree_NE[self.token, self.here]))
        on_copy = is_on_copy(self.traces.header.exits[self.here])
        executed = self.copy_depth if on_copy else self.depth
        self.open.append(Open(0 if on_copy else executed, set(range(executed))))
        if on_copy:
            self.fill(self.open[-1])
        self.begin(self.token + 1)

    def verify(self) -> None:
        self.run(self.traces.header.layers)
        passed = self.costs.launch(1 + len(self.open))
        self.seconds += passed.head_s + passed.step_s
        accepted = 0
        while accepted < len(self.right) and self.right[accepted]:
            accepted += 1
        self.tokens += accepted + 1
        self.cycles += 1
        self.base += accepted + 1
        self.open, self.right = [], []
        self.begin(self.base)

    def begin(self, token: int) -> None:
        self.token, self.here, self.depth, self.copy_depth = token, -1, 0, 0

    def forced(self) -> None:
        while not self.is_over and (
            len(self.open) == self.max_pending or self.token == self.end - 1
        ):
            self.verify()
