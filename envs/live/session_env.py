"""What the environments of sessions share: episodes, spaces, weights and masks.

Shape suffixes: A actions, D observation columns, V objectives of a reward vector.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, SupportsInt

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.error import ResetNeeded

from offramp.controller.errors import ConfigError
from offramp.controller.features import BoolArray, FloatArray
from offramp.envs.adapters.spaces import box_of, checked_options
from offramp.envs.charges.tradeoffs import Weights
from offramp.envs.cores.batch import RewardArray
from offramp.envs.cores.walk import Actions
from offramp.envs.live.session import Moment, Question, Session


class SessionEnv(gym.Env[FloatArray, np.int64]):
    """A session whose questions the agent answers; a subclass says what answers earn.

    Args:
        session: What decodes; it is closed with the environment.
        actions: What can be done at an exit.
        weights: What observations end with, and rewards are weighed by.
        reward_space: Bounds of ``reward_vector``.
        objectives: Names of its entries.
        outlook: Columns of outlook in the session's questions.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}  # type: ignore[misc]  # gymnasium's is no ClassVar

    def __init__(
        self,
        session: Session,
        actions: Actions,
        weights: Weights,
        reward_space: spaces.Box[np.float32],
        objectives: tuple[str, ...],
        *,
        outlook: int = 0,
    ) -> None:
        self._session = session
        self._actions = actions
        self._weights = weights
        self._question: Question | None = None
        self.objectives = objectives
        self.reward_space = reward_space
        self.observation_space = box_of(session.schema.width + outlook, weights)
        self.action_space = spaces.Discrete(actions.count)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[FloatArray, dict[str, Any]]:
        """Start an episode: observation [D]; of jumps, ``action_mask`` in the info.

        Raises:
            ConfigError: an option is unknown or out of range.
        """
        super().reset(seed=seed)
        given = checked_options(options, self._weights.names)
        self._weights.draw(self.np_random, np.zeros(1, np.int64))
        for name, value in given.items():
            self._weights.assign(name, value)
        moment = self._session.begin(self.np_random)
        self._begin(moment)
        self._question = moment.question
        assert self._question is not None  # a session starts with a question
        self._obs_D = self._observe(self._question)
        return self._obs_D.copy(), self._mask_info()

    def step(self, action: SupportsInt) -> tuple[FloatArray, float, bool, bool, dict[str, Any]]:
        """Act, and let the engine run until it asks again.

        Raises:
            ConfigError: the action is none.
            ResetNeeded: no episode is running.
        """
        if self._question is None:
            raise ResetNeeded("no episode is running: call reset() before step()")
        if not self.action_space.contains(action):
            raise ConfigError("action", f"is {action!r}", self._actions.meaning)
        here = self._question.here
        target = int(self._actions.targets(np.array([here]), np.array([int(action)]))[0])
        vector_V = self._decide(here, target)
        self._question = None  # whatever the session raises, the episode is over
        moment = self._session.answer(target)
        self._settle(moment, vector_V)
        self._question = moment.question
        return self._reply(moment, vector_V)

    def action_masks(self) -> BoolArray:
        """Which actions lead somewhere that no lower action does, [A] (sb3-contrib's name)."""
        if self._question is None:
            raise ResetNeeded("no episode is running: call reset() first")
        masks_A: BoolArray = self._actions.masks(np.array([self._question.here]))[0]
        return masks_A

    def close(self) -> None:
        """Close the session that decodes."""
        self._question = None
        self._session.close()

    @abstractmethod
    def _begin(self, moment: Moment) -> None:
        """Take in the first moment of an episode."""

    @abstractmethod
    def _decide(self, here: int, target: int) -> RewardArray:
        """What a decision is worth by itself, unweighted, [V]; from ``here`` to ``target``."""

    @abstractmethod
    def _settle(self, moment: Moment, vector_V: RewardArray) -> None:
        """Add to the decision's vector what came out after it."""

    @abstractmethod
    def _totals(self) -> dict[str, Any]:
        """The info of an episode that ended, but for its weights."""

    def _reply(
        self, moment: Moment, vector_V: RewardArray
    ) -> tuple[FloatArray, float, bool, bool, dict[str, Any]]:
        reward = float(self._weights.reward(vector_V[None])[0])
        if moment.question is not None:
            self._obs_D = self._observe(moment.question)
            info = self._mask_info()
        else:
            info = self._totals()
            info |= dict(zip(self._weights.names, self._weights.value_BW[0].tolist(), strict=True))
        info["reward_vector"] = vector_V
        return self._obs_D.copy(), reward, moment.question is None, False, info

    def _observe(self, question: Question) -> FloatArray:
        parts = (question.features_F, question.outlook_C, self._weights.log_BW[0])
        return np.concatenate(parts, dtype=np.float32)

    def _mask_info(self) -> dict[str, Any]:
        return {"action_mask": self.action_masks().astype(np.int8)} if self._actions.is_jump else {}
