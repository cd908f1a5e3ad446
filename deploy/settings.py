"""Settings from the environment: who to talk to, under which key. Unknown ones are refused."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from offramp.controller.errors import ConfigError

PREFIX = "OFFRAMP_"


class Settings(BaseModel):
    """Read from REDIS_URL, RAY_ADDRESS and OFFRAMP_* variables.

    Attributes:
        redis_url: REDIS_URL: the registry's server; unset starts an embedded one where possible.
        ray_address: RAY_ADDRESS: the cluster to join; unset starts a local one.
        home: OFFRAMP_HOME: folder of the publisher's key and ledger.
        channel: OFFRAMP_CHANNEL: which stream of releases to write and follow.
        api_key: OFFRAMP_API_KEY: what clients must present; unset asks for none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    redis_url: str | None = None
    ray_address: str | None = None
    home: Path = Path("runs/home")
    channel: str = Field(default="default", pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    api_key: str | None = Field(default=None, min_length=8)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Read and check every variable.

        Raises:
            ConfigError: a variable is unknown or has an unusable value, naming it.
        """
        environment = os.environ if environment is None else environment
        values = {
            name.removeprefix(PREFIX).lower(): value
            for name, value in environment.items()
            if name.startswith(PREFIX)
        }
        for name in ("REDIS_URL", "RAY_ADDRESS"):
            if environment.get(name):
                values[name.lower()] = environment[name]
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise _unusable(error) from error


def _unusable(error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    name = str(first["loc"][0])
    known = [field for field in Settings.model_fields if field not in ("redis_url", "ray_address")]
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, known, 1)
        hint = f"Did you mean {PREFIX}{close[0].upper()}" if close else "Remove it"
        return ConfigError(f"{PREFIX}{name.upper()}", "is no known setting", hint)
    return ConfigError(f"{PREFIX}{name.upper()}", first["msg"], "Correct the variable")
