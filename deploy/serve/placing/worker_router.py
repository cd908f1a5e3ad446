"""Tells Ray Serve which worker gets a request."""

from __future__ import annotations

import random
import time

from ray.serve.request_router import (
    FIFOMixin,
    MultiplexMixin,
    PendingRequest,
    RequestRouter,
    RunningReplica,
)

AWAKE_S = 1.5
"""A worker that has reported so recently is not asked first whether it answers. They report each
second; one that froze after its last report is found out by its silence."""

FORGET_S = 60.0
"""Nothing is kept of workers that have not reported for so long: they are gone."""


class WorkersHeard:
    """When each worker of this process's pools has reported last; routers read it in their thread.

    Ray makes routers itself, and asks each worker how many requests it has before it sends one to
    it, unless it sent another just before: a call there and back, 6 to 8 ms of a first token.
    """

    def __init__(self) -> None:
        self._heard_s: dict[str, float] = {}

    def note(self, replica: str) -> None:
        """Note that a worker has reported."""
        now_s = time.monotonic()
        self._heard_s[replica] = now_s
        for each, heard_s in list(self._heard_s.items()):
            if now_s - heard_s > FORGET_S:
                del self._heard_s[each]

    def is_awake(self, replica: str) -> bool:
        """Whether it has reported within ``AWAKE_S``."""
        return time.monotonic() - self._heard_s.get(replica, float("-inf")) < AWAKE_S


HEARD = WorkersHeard()
"""Of this process: the front's backends note, and its routers read."""


class WorkerRouter(FIFOMixin, MultiplexMixin, RequestRouter):  # type: ignore[misc]  # Ray is untyped
    """Tries the replica that a request names first, and then all, those with the least to do first.

    A request names it as its ``multiplexed_model_id``: of what a handle can be told of a request,
    that alone is passed on to routers, and no worker serves several models. One that was heard of
    lately gets it at once, and refuses it if it has too many. Of another Ray asks first: it has
    died if it is not among the candidates, and is frozen if it does not answer in time.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Rank the replicas for one request; see ``RequestRouter``."""
        # At random: of replicas that have equally much to do, Ray takes the first.
        everyone = random.sample(candidate_replicas, len(candidate_replicas))
        if pending_request is None:
            return [everyone]
        pending_request.routing_context.should_backoff = True
        name = pending_request.metadata.multiplexed_model_id
        chosen = [each for each in everyone if each.replica_id.unique_id == name]
        for each in chosen:
            if HEARD.is_awake(name) and self.replica_queue_len_cache.get(each.replica_id) is None:
                self.on_new_queue_len_info(each.replica_id, 0)
        return [chosen, everyone]
