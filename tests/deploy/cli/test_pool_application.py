"""A pool from a file of Ray Serve: what is built, and what is refused before anything starts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.serve._private.build_app import build_app

from offramp.controller.errors import ConfigError, ModelError
from offramp.deploy.cli.pool.pool_application import pool
from offramp.deploy.serve.publishing import public_key_path
from offramp.deploy.serve.redis_server import EmbeddedRedis
from offramp.deploy.serve.settings import Settings

MODEL = str(Path(__file__).parents[3] / "models/reference")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("application") / "home"
    public_key_path(Settings(home=home))
    return home


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with EmbeddedRedis(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, home: Path, redis_url: str) -> None:
    """The environment of a machine of the cluster."""
    monkeypatch.setenv("OFFRAMP_HOME", str(home))
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def built(args: dict[str, Any]) -> dict[str, Any]:
    """Settings of each deployment, as Ray Serve reads them."""
    app = build_app(pool({"model": MODEL, "threads": 1, **args}), name="mine")
    return {each.name: each._deployment_config for each in app.deployments}


def test_it_is_the_workers_of_each_model_and_who_keeps_the_front(tmp_path: Path) -> None:
    assert set(built({})) == {"reference", "entrance"}
    file = tmp_path / "models.toml"
    file.write_text('["org/one"]\nreplicas = 3\n["two"]\nmax_replicas = 4\nchannel = "two"\n')
    found = built({"models": str(file)})
    assert set(found) == {"org%2Fone", "two", "entrance"}
    assert found["org%2Fone"].num_replicas == 3
    assert found["two"].autoscaling_config.max_replicas == 4
    assert found["entrance"].num_replicas == 1


@pytest.mark.parametrize(
    ("args", "field"),
    [
        ({"modle": MODEL}, "args: modle"),
        ({"port": "x"}, "args: port"),
        ({"redis_port": 6390}, "args: redis_port"),
        ({"replicas": 0}, "args: replicas"),
        ({"host": "0.0.0.0"}, "host"),
        ({"served_model_name": "entrance"}, "models"),
    ],
)
def test_what_is_no_option_or_cannot_be_is_refused(args: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as error:
        pool({"model": MODEL, **args})
    assert error.value.field == field


def test_a_model_that_is_not_on_the_machine_is_refused() -> None:
    with pytest.raises(ModelError):
        pool({"model": "/nowhere"})


def test_a_registry_that_all_machines_reach_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REDIS_URL")
    with pytest.raises(ConfigError, match="ray start") as error:
        pool({"model": MODEL})
    assert error.value.field == "REDIS_URL"
