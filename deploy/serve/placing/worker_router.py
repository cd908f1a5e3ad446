"""Tells Ray Serve which worker gets a request."""

from __future__ import annotations

import random

from ray.serve.request_router import (
    FIFOMixin,
    MultiplexMixin,
    PendingRequest,
    RequestRouter,
    RunningReplica,
)


class WorkerRouter(FIFOMixin, MultiplexMixin, RequestRouter):  # type: ignore[misc]  # Ray is untyped
    """Tries the replica that a request names first, and then all, those with the least to do first.

    A request names it as its ``multiplexed_model_id``: of what a handle can be told of a request,
    that alone is passed on to routers, and no worker serves several models. The replica that it
    names has died if it is not among the candidates, and is frozen if it does not say in time how
    many requests it has.
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
        chosen = pending_request.metadata.multiplexed_model_id
        return [[each for each in everyone if each.replica_id.unique_id == chosen], everyone]
