"""How a model's matrices are kept: as they were loaded, or in fewer bytes."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Literal, cast, get_args

from offramp.controller.errors import ConfigError
from offramp.controller.policies.exits import Weights

HeadWeights = Weights | Literal["shortlist"]
"""How an LM head is kept: as a layer's matrix, or in int4 beside its native rows."""

Activations = Literal["native", "int8"]
"""How rows are kept that int4 weights are multiplied with."""

INT4_FORM = "scales in 8 bits"
"""Part of an int4 model's fingerprint: in another form the same weights are other numbers."""

GROUP_SIZES = (32, 64, 128, 256)
"""Weights that share a scale and a zero point, as far as the int4 kernel goes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """How a model's matrices are kept.

    Attributes:
        weights: "native" as they were loaded, "int8" with one scale per output, "int4" with a
            scale and a zero point per group.
        group_size: Weights of a group (int4).
        head: The same for the LM head; None: as ``weights``, but int8 where they are int4.
            "shortlist": an int4 head finds the likeliest tokens, at least 32, and the native one
            says their logits.
        activations: "native", or "int8" where int4 weights are multiplied: rows are rounded to
            whole numbers of 8 bits in blocks of 32, as llama.cpp does with its 4 bits. Products
            take less time, and the model is another one.

    Raises:
        ConfigError: another name, a group size that the kernel does not know, or activations
            without weights that they go with.
    """

    weights: Weights = "native"
    group_size: int = GROUP_SIZES[0]
    head: HeadWeights | None = None
    activations: Activations = "native"

    def __post_init__(self) -> None:
        layers, head = get_args(Weights), (*get_args(Weights), "shortlist")
        for field, value, known in (
            ("weights", self.weights, layers), ("head_weights", self.head_weights, head)
        ):  # fmt: skip
            if value not in known:
                raise ConfigError(field, f"{value!r} is unknown", f"Use one of {', '.join(known)}")
        if self.group_size not in GROUP_SIZES:
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise ConfigError("group_size", f"{self.group_size!r} is unknown", f"Use {sizes}")
        if self.activations not in get_args(Activations):
            problem = f"{self.activations!r} is unknown"
            raise ConfigError("activations", problem, f"Use {' or '.join(get_args(Activations))}")
        if self.activations == "int8" and not self._has_int4:
            raise ConfigError("activations", "int8 goes with int4 weights", "Use int4/int8")
        if self.activations == "int8" and self.group_size != GROUP_SIZES[0]:
            problem = f"int8 goes with groups of {GROUP_SIZES[0]}, not of {self.group_size}"
            raise ConfigError("activations", problem, f"Use group_size={GROUP_SIZES[0]}")

    @classmethod
    def for_drafts(cls, weights: Weights) -> Precision:
        """The fastest form of such weights; what its rounding costs is a draft, never a token.

        >>> Precision.for_drafts("int4").name
        'int4 in groups of 32, head shortlist, activations int8'
        """
        if weights != "int4":
            return cls(weights=weights)
        return cls(weights=weights, head="shortlist", activations="int8")

    @classmethod
    def parse(cls, text: str, *, for_drafts: bool = False) -> Precision:
        """Read it as commands take it.

        Weights, their group size after a colon, the head after a comma, activations after a stroke.

        Args:
            text: What was typed.
            for_drafts: Whether weights alone mean the fastest form of them (``for_drafts``).

        >>> Precision.parse("int4:64,native")
        Precision(weights='int4', group_size=64, head='native', activations='native')
        >>> Precision.parse("int4/int8").name
        'int4 in groups of 32, head int8, activations int8'

        Raises:
            ConfigError: it reads otherwise.
        """
        pattern = r"(\w+)(?::(\d{1,6}))?(?:,(\w+))?(?:/(\w+))?"
        found = re.fullmatch(pattern, text, re.ASCII)
        if found is None:
            raise ConfigError(
                "weights",
                f"{text!r} cannot be read",
                "Write it like int4, int4/int8 or int4:64,native",
            )
        weights, group_size, head, activations = found.groups()
        if for_drafts and text == weights:
            return cls.for_drafts(cast(Weights, weights))
        return cls(
            weights=cast(Weights, weights),
            group_size=int(group_size or GROUP_SIZES[0]),
            head=cast("HeadWeights | None", head),
            activations=cast(Activations, activations or "native"),
        )

    @classmethod
    def of_copy(cls, text: str | None) -> Precision | None:
        """Read how a copy that drafts is kept; None: there is none."""
        return cls.parse(text, for_drafts=True) if text else None

    @property
    def head_weights(self) -> HeadWeights:
        """How the LM head is kept."""
        if self.head is not None:
            return self.head
        return "int8" if self.weights == "int4" else self.weights

    @property
    def _has_int4(self) -> bool:
        return self.weights == "int4" or self.head_weights in ("int4", "shortlist")

    @property
    def is_native(self) -> bool:
        """Whether nothing is quantised."""
        return self.weights == self.head_weights == "native"

    @property
    def name(self) -> str:
        """Name it, such as ``int4 in groups of 32, head int8``."""
        grouped = f" in groups of {self.group_size}"
        weights, head = (
            each + grouped * (each == "int4") for each in (self.weights, self.head_weights)
        )
        whole = weights if weights == head else f"{weights}, head {head}"
        return whole + ", activations int8" * (self.activations == "int8")

    def fingerprint(self, native: str) -> str:
        """The fingerprint of a model with such weights; of native ones, the model's own.

        Args:
            native: Fingerprint of the model as it was loaded.
        """
        if self.is_native:
            return native
        form = f" {INT4_FORM}" if self._has_int4 else ""
        return hashlib.sha256(f"{native} {self.name}{form}".encode()).hexdigest()


NATIVE = Precision()
"""The weights as they were loaded."""
