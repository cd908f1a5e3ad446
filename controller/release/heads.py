"""Reads signed releases and heads; every signature is checked before anything is parsed."""

from __future__ import annotations

from offramp.controller.errors import PolicyRefusedError, Refusal
from offramp.controller.keys.root import Root, open_envelope
from offramp.controller.release.manifest import Manifest
from offramp.controller.release.registry import Head


def open_release(envelope: bytes, trusted: Root, channel: str) -> Manifest:
    """Read a signed manifest; the signature is checked before anything is parsed.

    Raises:
        PolicyRefusedError: see ``open_envelope``; BAD_FORMAT or WRONG_CHANNEL.
    """
    manifest = Manifest.from_bytes(open_envelope(envelope, trusted))
    if manifest.channel != channel:
        detail = f"signed for {manifest.channel!r}, this is {channel!r}"
        raise PolicyRefusedError(Refusal.WRONG_CHANNEL, detail)
    return manifest


def open_head(head: Head, trusted: Root, channel: str) -> Manifest:
    """Read the signed manifest of a head, which must say no more than was signed.

    Raises:
        PolicyRefusedError: as ``open_release`` does; BAD_FORMAT if the head says otherwise, or a
            canary does not come with the release that it names.
    """
    manifest = open_release(head.envelope, trusted, channel)
    unsigned = (head.generation, head.epoch, head.digest)
    signed = (manifest.generation, manifest.epoch, manifest.digest)
    if unsigned != signed:
        detail = f"the head says {unsigned}, the signed manifest {signed}"
        raise PolicyRefusedError(Refusal.BAD_FORMAT, detail)
    if manifest.rollout.stable_generation:
        open_stable(head, manifest, trusted, channel)
    return manifest


def open_stable(head: Head, canary: Manifest, trusted: Root, channel: str) -> Manifest:
    """Read the signed manifest beside a canary, which must be of the release that it names.

    Raises:
        PolicyRefusedError: as ``open_release`` does; BAD_FORMAT if it is of another release.
    """
    manifest = open_release(head.stable, trusted, channel)
    named = (canary.rollout.stable_generation, canary.rollout.stable_digest)
    if (found := (manifest.generation, manifest.digest)) != named:
        detail = f"the canary names {named} as stable, the head has {found}"
        raise PolicyRefusedError(Refusal.BAD_FORMAT, detail)
    return manifest
