"""Settings: which variables count, and what a wrong one is called."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from offramp.controller.errors import ConfigError
from offramp.controller.release.redis_registry import RedisRegistry
from offramp.deploy.serve.publishing import open_registry
from offramp.deploy.serve.settings import Settings


def refused(**environment: str) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        Settings.from_environment(environment)
    assert "\n" not in str(error.value)
    return error.value


def test_an_empty_environment_gives_the_defaults() -> None:
    assert Settings.from_environment({}) == Settings()
    assert Settings().redis_url is None
    assert Settings().channel == "default"
    assert Settings().api_key is None


def test_every_variable_is_read() -> None:
    settings = Settings.from_environment(
        {
            "REDIS_URL": "rediss://user:word@host:6379/1",
            "RAY_ADDRESS": "ray://head:10001",
            "OFFRAMP_HOME": "/srv/offramp",
            "OFFRAMP_CHANNEL": "team-a.staging_2",
            "OFFRAMP_API_KEY": "12345678",
            "OFFRAMP_ACCESS_LOG": "/var/log/offramp.jsonl",
            "PATH": "/bin",
            "OFFRAMPED": "somebody else's",
        }
    )
    assert settings == Settings(
        redis_url="rediss://user:word@host:6379/1",
        ray_address="ray://head:10001",
        home=Path("/srv/offramp"),
        channel="team-a.staging_2",
        api_key="12345678",
        access_log=Path("/var/log/offramp.jsonl"),
    )


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFRAMP_CHANNEL", "from-the-process")
    assert Settings.from_environment().channel == "from-the-process"


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("OFFRAMP_CHANEL", "OFFRAMP_CHANNEL"),
        ("OFFRAMP_APIKEY", "OFFRAMP_API_KEY"),
        ("OFFRAMP_Home", "OFFRAMP_HOME"),
        ("OFFRAMP_REDIS_URL", "REDIS_URL"),
        ("OFFRAMP_RAY_ADRESS", "RAY_ADDRESS"),
    ],
)
def test_an_unknown_variable_is_refused_with_a_suggestion(name: str, suggestion: str) -> None:
    error = refused(**{name: "redis://127.0.0.1"})
    assert error.field == name
    assert error.remedy == f"Did you mean {suggestion}"


def test_an_unknown_variable_like_no_other_is_refused_too() -> None:
    error = refused(OFFRAMP_QZXV="1")
    assert error.field == "OFFRAMP_QZXV"
    assert error.remedy == "Remove it"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OFFRAMP_CHANNEL", ""),
        ("OFFRAMP_CHANNEL", "two words"),
        ("OFFRAMP_CHANNEL", ".hidden"),
        ("OFFRAMP_CHANNEL", "a" * 65),
        ("OFFRAMP_CHANNEL", "line\n"),
        ("OFFRAMP_API_KEY", ""),
        ("OFFRAMP_API_KEY", "short"),
        ("OFFRAMP_HOME", ""),
        ("REDIS_URL", "localhost:6379"),
        ("REDIS_URL", "http://localhost:6379"),
        ("REDIS_URL", "redis://[::1"),
    ],
)
def test_a_bad_value_names_its_variable(name: str, value: str) -> None:
    error = refused(**{name: value})
    assert error.field == name
    assert "short" not in error.problem  # values may be secrets


def test_empty_addresses_are_absent_ones() -> None:
    settings = Settings.from_environment({"REDIS_URL": "", "RAY_ADDRESS": ""})
    assert settings.redis_url is None
    assert settings.ray_address is None


@pytest.mark.parametrize("channel", ["a", "0", "A.b-c_d", "x" * 64])
def test_the_registry_takes_every_channel_that_the_settings_take(channel: str) -> None:
    settings = Settings.from_environment({"OFFRAMP_CHANNEL": channel})
    RedisRegistry("redis://127.0.0.1:1", settings.channel).close()  # it connects at first use


def test_an_impossible_port_is_redis_urls_fault() -> None:
    settings = Settings.from_environment({"REDIS_URL": "redis://127.0.0.1:port"})
    with pytest.raises(ConfigError) as error:
        open_registry(settings)
    assert error.value.field == "REDIS_URL"


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        Settings().channel = "other"
