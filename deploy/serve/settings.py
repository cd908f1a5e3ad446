"""Settings from the environment: who to talk to, under which key. Unknown ones are refused."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from offramp.controller.adapters.adapter_index import MAX_ADAPTER_MB
from offramp.controller.errors import ConfigError
from offramp.controller.redis_client import SCHEMES

PREFIX = "OFFRAMP_"

SHARED = ("redis_url", "ray_address")
"""Settings whose variables other programs know too: they have no prefix."""


class Settings(BaseModel):
    """Read from REDIS_URL, RAY_ADDRESS and OFFRAMP_* variables.

    Attributes:
        redis_url: REDIS_URL: the registry's server; unset starts an embedded one where possible.
        ray_address: RAY_ADDRESS: the cluster to join; unset starts a local one.
        home: OFFRAMP_HOME: folder of the publisher's key and ledger.
        channel: OFFRAMP_CHANNEL: which stream of releases to write and follow.
        epoch: OFFRAMP_EPOCH: incarnation of the channel that is written; raise it when the channel
            is begun anew without its ledger, so that workers take lower generations again.
        api_key: OFFRAMP_API_KEY: a key that clients may present, beside those of their own.
        console_key: OFFRAMP_CONSOLE_KEY: the key that ``offramp console`` asks for; unset, it draws
            one and prints it.
        access_log: OFFRAMP_ACCESS_LOG: file that gets a line of JSON per HTTP request.
        otlp_endpoint: OFFRAMP_OTLP_ENDPOINT: URL that gets a span per request that makes tokens,
            as OTLP over HTTP, such as http://127.0.0.1:4318/v1/traces; needs the extra ``otel``.
        max_adapter_mb: OFFRAMP_MAX_ADAPTER_MB: most MiB of adapters that are published, or that a
            worker fetches with a release.
        traffic: OFFRAMP_TRAFFIC: folder where workers keep traces of live traffic, and ``learn``
            finds them; unset keeps none. On several machines it must be one that they share.
        traffic_mb: OFFRAMP_TRAFFIC_MB: most MiB that each worker keeps; the oldest give way.
        traffic_share: OFFRAMP_TRAFFIC_SHARE: most of a worker's time that recording may take.
        traffic_text: OFFRAMP_TRAFFIC_TEXT: true keeps the text, prompts included, as token ids;
            without, no text is kept.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    redis_url: str | None = None
    ray_address: str | None = None
    home: Path = Path("runs/home")
    channel: str = Field(default="default", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    epoch: int = Field(default=1, ge=1)
    api_key: str | None = Field(default=None, min_length=8, pattern=r"^[!-~]+$")
    console_key: str | None = Field(default=None, min_length=16, pattern=r"^[!-~]+$")
    access_log: Path | None = None
    otlp_endpoint: str | None = Field(default=None, pattern=r"^https?://[!-~]+$")
    max_adapter_mb: float = Field(default=MAX_ADAPTER_MB, gt=0, allow_inf_nan=False)
    traffic: Path | None = None
    traffic_mb: float = Field(default=64.0, gt=0, allow_inf_nan=False)
    traffic_share: float = Field(default=0.02, gt=0, lt=1)
    traffic_text: bool = False

    @field_validator("redis_url")
    @classmethod
    def _is_an_address(cls, url: str | None) -> str | None:
        if url is not None and urlsplit(url).scheme not in SCHEMES:
            raise ValueError(f"it begins with none of {', '.join(SCHEMES)}, each with ://")
        return url

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str] | None = None, channel: str | None = None
    ) -> Settings:
        """Read and check every variable.

        Args:
            environment: The variables; None: the process's own.
            channel: In place of OFFRAMP_CHANNEL; None: that.

        Raises:
            ConfigError: a variable is unknown or has an unusable value, naming it.
        """
        environment = os.environ if environment is None else environment
        if channel is not None:
            environment = {**environment, _variable("channel"): channel}
        fields = {_variable(field): field for field in cls.model_fields}
        for name, value in environment.items():
            if name.startswith(PREFIX) and name not in fields:
                raise _unknown(name)
            if name.startswith(PREFIX) and not value:
                raise ConfigError(name, "is empty", "Give it a value or unset it")
        values = {field: environment[name] for name, field in fields.items() if name in environment}
        for field in SHARED:
            # Other programs read these too, and take an empty one for an absent one.
            if not values.get(field):
                values.pop(field, None)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise _unusable(error) from error


def _variable(field: str) -> str:
    return field.upper() if field in SHARED else PREFIX + field.upper()


def _unusable(error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    name = _variable(str(first["loc"][0]))
    return ConfigError(name, first["msg"], "Correct the variable")


def _unknown(name: str) -> ConfigError:
    close = difflib.get_close_matches(
        name.removeprefix(PREFIX).lower(), list(Settings.model_fields), 1
    )
    hint = f"Did you mean {_variable(close[0])}" if close else "Remove it"
    return ConfigError(name, "is no known setting", hint)
