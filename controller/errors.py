"""One tree of errors. Each carries its data; each message names the field and the remedy."""

from __future__ import annotations

import copyreg
from enum import StrEnum
from typing import Any


class OfframpError(Exception):
    """Base of every error that offramp raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Ray pickles errors across processes. Exception's own way calls the class again with
        # ``args``, which hold the message alone.
        remade = copyreg.__newobj__  # type: ignore[attr-defined]  # typeshed leaves it out
        return remade, (type(self), *self.args), vars(self)


class FieldError(OfframpError):
    """A value that the caller gave is unusable.

    Attributes:
        field: The name of the argument, option or setting.
        problem: What is wrong with it.
        remedy: What to do about it.
    """

    def __init__(self, field: str, problem: str, remedy: str = "") -> None:
        self.field = field
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{field}: {problem}." + (f" {remedy}." if remedy else ""))


class ConfigError(FieldError):
    """A setting or option is unusable."""


class ModelError(FieldError):
    """A model folder is missing, is no causal LM, or has an unsupported architecture."""


class RequestError(FieldError):
    """A generation request is unusable: prompt, sampling value or policy."""


class TraceError(FieldError):
    """A trace store or corpus is empty, corrupt or of another schema."""


class PolicyFaultError(OfframpError):
    """A policy's decision cannot be used; whoever asked goes on at full depth.

    Attributes:
        problem: What is wrong with it.
    """

    def __init__(self, problem: str) -> None:
        self.problem = problem
        super().__init__(f"the policy's decision is unusable: {problem}")


class RegistryUnavailableError(FieldError):
    """The policy registry cannot be reached."""


class DecodeFailedError(OfframpError):
    """A request, or the engine as a whole, failed while it decoded; the cause is chained."""


class OverloadedError(OfframpError):
    """Every slot is taken and the waiting line is full.

    Attributes:
        retry_after_s: Seconds after which a retry is sensible.
    """

    def __init__(self, retry_after_s: int) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(f"every slot is taken; retry after {retry_after_s} s")


class PromoteConflictError(OfframpError):
    """The registry's head moved between reading and promoting.

    Attributes:
        expected: The generation the caller believed to be the head (0: none yet).
        found: The generation that the registry holds.
    """

    def __init__(self, expected: int, found: int, problem: str) -> None:
        self.expected = expected
        self.found = found
        self.problem = problem
        super().__init__(
            f"promote refused: {problem} (expected head generation {expected}, found {found}). "
            "Read the head again and decide anew."
        )


class Refusal(StrEnum):
    """Why a worker did not take a release."""

    BAD_SIGNATURE = "bad_signature"
    BELOW_THRESHOLD = "below_threshold"
    FOREIGN_KEY = "foreign_key"
    BAD_FORMAT = "bad_format"
    EXPIRED = "expired"
    WRONG_CHANNEL = "wrong_channel"
    ROLLBACK = "rollback"
    EQUIVOCATION = "equivocation"
    WRONG_MODEL = "wrong_model"
    WRONG_TOKENIZER = "wrong_tokenizer"
    WRONG_SCHEMA = "wrong_schema"
    TOO_LARGE = "too_large"
    MISSING_BLOB = "missing_blob"
    DIGEST_MISMATCH = "digest_mismatch"
    NOT_SAFETENSORS = "not_safetensors"
    BAD_SHAPE = "bad_shape"
    WRONG_DEPTH = "wrong_depth"
    UNSUPPORTED = "unsupported"
    NOT_FINITE = "not_finite"
    CANNED_INPUTS = "canned_inputs"
    TOO_SLOW = "too_slow"


class PolicyRefusedError(OfframpError):
    """A release failed one of the worker's checks; the running policy stays.

    Attributes:
        reason: The check that failed.
        detail: The values that made it fail.
    """

    def __init__(self, reason: Refusal, detail: str) -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"policy refused ({reason.value}): {detail}")


def too_large(what: str, size: int, limit: int) -> PolicyRefusedError:
    """The refusal to fetch something over its limit, both in bytes."""
    return PolicyRefusedError(Refusal.TOO_LARGE, f"{what} has {size} bytes, over {limit}")
