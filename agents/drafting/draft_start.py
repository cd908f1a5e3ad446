"""Where a drafter's training starts: at the best rule that trust alone gives.

A net with random weights drafts and gives up at random, and what it drafts is mostly lost. On a
copy whose drafts are nearly always right PPO then learns never to draft before it has seen one
long cycle (docs/lossless.md). So the actor first learns to say what the rule says.

Shape suffixes: B rows, D observation columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from offramp.agents.drafting.draft_replay import Decide
from offramp.envs.cores.draft_core import DraftExitCore

BATCH = 512
"""Decisions per gradient step, drawn from those that are shown."""

GRADIENT_STEPS = 400
"""Steps after which the actor says what the rule says but for a few of a hundred decisions."""

LEARNING_RATE = 5e-3

LEAST = -14.0
"""Log-probability that no action is pushed below."""

DOUBT = 0.01
"""Share of each target that is spread over all actions, so that PPO goes on trying others."""


def imitate(model: Any, core: DraftExitCore, decide: Decide, *, decisions: int, seed: int) -> None:
    """Teach a ``PPO``'s actor to decide as a rule does, along the rule's own way.

    Args:
        model: A ``PPO`` over a core such as this one.
        core: Episodes to follow; they are left where the rule leads.
        decide: The rule.
        decisions: How many of the rule's decisions are shown.
        seed: Seeds starts and batches.
    """
    obs_BD, action_B = _followed(core, decide, decisions, seed)
    nets = model.policy.mlp_extractor
    actor = [*nets.starter.parameters(), *nets.router.parameters()]
    optimiser = torch.optim.Adam(actor, lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(GRADIENT_STEPS):
        part = torch.randint(len(obs_BD), (BATCH,), generator=generator)
        # Actions that are not valid are no doubt: their logit would be driven up from never.
        log_BA = nets.forward_actor(obs_BD[part]).log_softmax(-1).clamp(min=LEAST)
        said = nn.functional.nll_loss(log_BA, action_B[part])
        loss = (1 - DOUBT) * said - DOUBT * log_BA.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def _followed(
    core: DraftExitCore, decide: Decide, decisions: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is observed along the rule's way, and what the rule does."""
    obs_BD = core.reset(seed)
    seen, done = [], []
    for _ in range(max(1, decisions // core.num_envs)):
        action_B = decide(obs_BD)
        seen.append(obs_BD)
        done.append(action_B)
        obs_BD = core.step(action_B).obs_BD
    return torch.from_numpy(np.concatenate(seen)), torch.from_numpy(np.concatenate(done))
