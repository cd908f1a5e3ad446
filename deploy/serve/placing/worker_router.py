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

from offramp.deploy.serve.placing import workers_heard


class WorkerRouter(FIFOMixin, MultiplexMixin, RequestRouter):  # type: ignore[misc]  # Ray is untyped
    """Tries the replica that a request names first, and then all, those with the least to do first.

    A request names it as its ``multiplexed_model_id``: of what a handle can be told of a request,
    that alone is passed on to routers, and no worker serves several models. One that was heard of
    lately gets it at once, and refuses it if it has too many: Ray would ask it first how many it
    has, unless it sent another just before, a call there and back that the first token waits for.
    Of others Ray asks: one has died if it is not among the candidates, and is frozen if it does
    not answer in time.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Rank the replicas for one request; see ``RequestRouter``."""
        # At random: of replicas that have equally much to do, Ray takes the first.
        everyone = random.sample(candidate_replicas, len(candidate_replicas))
        # Others are new, and report in a moment, or another front's, whom an update will end.
        heard = [each for each in everyone if workers_heard.HEARD.knows(each.replica_id.unique_id)]
        everyone = heard or everyone
        if pending_request is None:
            return [everyone]
        pending_request.routing_context.should_backoff = True
        name = pending_request.metadata.multiplexed_model_id
        chosen = [each for each in everyone if each.replica_id.unique_id == name]
        for each in chosen:
            is_awake = bool(workers_heard.HEARD.awake([name]))
            if is_awake and self.replica_queue_len_cache.get(each.replica_id) is None:
                # As far as the front has counted it has room; else it says so itself.
                self.on_new_queue_len_info(each.replica_id, 0)
        return [chosen, everyone]
