"""How a model's matrices are kept: as they were loaded, or in fewer bytes."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import cast, get_args

from offramp.controller.errors import ConfigError
from offramp.controller.policies.exits import Weights

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

    Raises:
        ConfigError: another name, or a group size that the kernel does not know.
    """

    weights: Weights = "native"
    group_size: int = GROUP_SIZES[0]
    head: Weights | None = None

    def __post_init__(self) -> None:
        known = get_args(Weights)
        for field, value in (("weights", self.weights), ("head_weights", self.head_weights)):
            if value not in known:
                raise ConfigError(field, f"{value!r} is unknown", f"Use one of {', '.join(known)}")
        if self.group_size not in GROUP_SIZES:
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise ConfigError("group_size", f"{self.group_size!r} is unknown", f"Use {sizes}")

    @classmethod
    def parse(cls, text: str) -> Precision:
        """Read it as commands take it: weights, group size after a colon, head after a comma.

        >>> Precision.parse("int4:64,native")
        Precision(weights='int4', group_size=64, head='native')

        Raises:
            ConfigError: it reads otherwise.
        """
        found = re.fullmatch(r"(\w+)(?::(\d{1,6}))?(?:,(\w+))?", text, re.ASCII)
        if found is None:
            raise ConfigError(
                "weights", f"{text!r} cannot be read", "Write it like int4 or int4:64,native"
            )
        weights, group_size, head = found.groups()
        return cls(
            weights=cast(Weights, weights),
            group_size=int(group_size or GROUP_SIZES[0]),
            head=cast("Weights | None", head),
        )

    @property
    def head_weights(self) -> Weights:
        """How the LM head is kept."""
        if self.head is not None:
            return self.head
        return "int8" if self.weights == "int4" else self.weights

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
        return weights if weights == head else f"{weights}, head {head}"

    def fingerprint(self, native: str) -> str:
        """The fingerprint of a model with such weights; of native ones, the model's own.

        Args:
            native: Fingerprint of the model as it was loaded.
        """
        if self.is_native:
            return native
        return hashlib.sha256(f"{native} {self.name}".encode()).hexdigest()


NATIVE = Precision()
"""The weights as they were loaded."""
