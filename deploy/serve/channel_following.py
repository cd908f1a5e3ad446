"""Has a worker follow its pool's channel, whatever it serves."""

from __future__ import annotations

from collections.abc import Callable

from offramp.controller.keys.root import load_root
from offramp.controller.release.redis_registry import RedisRegistry
from offramp.controller.release.registry import PolicyRegistry
from offramp.controller.release.trust import ReleaseVerifier
from offramp.deploy.serve.pool_config import PoolConfig, PoolModel
from offramp.worker.following.fetching import ReleaseFetcher
from offramp.worker.following.keeper import Prepare
from offramp.worker.following.refresh import PolicyRefresher
from offramp.worker.following.worker_state import StateClaim


def follow_channel(
    config: PoolConfig,
    model: PoolModel,
    claim: StateClaim,
    fingerprints: tuple[str, str],
    prepare: Prepare,
    fetcher: Callable[[PolicyRegistry], ReleaseFetcher],
    *,
    layers: int,
    vocab: int | None = None,
) -> PolicyRefresher:
    """What follows a pool's channel for one worker; it is not started.

    Args:
        config: Names the registry, and who signs for its channels.
        model: Names the channel.
        claim: The worker's name and folder.
        fingerprints: The model's and the tokenizer's.
        prepare: Told each policy before requests are pinned to it.
        fetcher: Makes what brings releases from a registry.
        layers: Number of layers of the model.
        vocab: Number of its tokens; None where policies read none.
    """
    trusted = load_root(config.trusted)
    verifier = ReleaseVerifier(trusted, model.channel, *fingerprints, layers=layers, vocab=vocab)
    registry = RedisRegistry(config.redis_url, model.channel)
    return PolicyRefresher(
        registry,
        verifier,
        claim.folder,
        claim.name,
        config.poll_s,
        prepare,
        fetcher=fetcher(registry),
    )
