from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI

from offramp.controller.policies.protocols import FixedExit
from offramp.deploy.cli.main import main
from offramp.deploy.cli.pool import serving
from offramp.deploy.clients.client_keys import ClientKeys
from offramp.deploy.http.backend import EngineBackend
from offramp.deploy.http.http_app import create_app
from offramp.deploy.serve.pool_config import PoolConfig
from offramp.worker import AdaptiveEngine
from offramp.worker.decoding.request import PolicySnapshot
from offramp.worker.engine.service import EngineService

REFERENCE = Path(__file__).parents[2] / "models" / "reference"
POLICY = PolicySnapshot(7, "d" * 64, FixedExit(6))
PATIENCE_S = 60.0

Ask = Callable[[FastAPI, Callable[[httpx.AsyncClient], Awaitable[Any]]], Any]


class StandIn(EngineBackend):
    """What the routes need of a worker, without Ray or Redis."""

    def __init__(self, service: EngineService, api_key: str | None = None) -> None:
        super().__init__("reference", service, ClientKeys(shared=api_key))
        self.started_at = 1_800_000_000


@pytest.fixture(scope="session")
def stand_in() -> type[StandIn]:
    return StandIn


@pytest.fixture(scope="module")
def engine() -> AdaptiveEngine:
    torch.set_num_threads(1)
    return AdaptiveEngine.from_pretrained(REFERENCE, slots=2, current_policy=lambda: POLICY)


@pytest.fixture(scope="module")
def service(engine: AdaptiveEngine) -> Iterator[EngineService]:
    service = EngineService(engine, max_waiting=1)
    service.start()
    yield service
    service.stop()


@pytest.fixture
def app(service: EngineService) -> FastAPI:
    return create_app(StandIn(service))


@pytest.fixture(scope="session")
def ask() -> Ask:
    """Lets an in-process HTTP client do something."""

    def ask(app: FastAPI, call: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
        async def within() -> Any:
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://offramp") as client:
                return await asyncio.wait_for(call(client), PATIENCE_S)

        return asyncio.run(within())

    return ask


class Cli:
    """The offramp command, in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys = capsys
        self._monkeypatch = monkeypatch

    def __call__(self, *arguments: object) -> tuple[int, str]:
        """Exit status and output of a run."""
        self._monkeypatch.setattr("sys.argv", ["offramp", *map(str, arguments)])
        self._capsys.readouterr()
        try:
            main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        captured = self._capsys.readouterr()
        return status, captured.out + captured.err

    def refused(self, *arguments: object) -> str:
        """The one sentence of a run that must fail."""
        status, output = self(*arguments)
        assert status == 1, output
        assert "Traceback" not in output
        errors = [line for line in output.splitlines() if line.startswith("error ")]
        assert len(errors) == 1, output
        assert output.rstrip().endswith(errors[0]), "the error is not the last that is said"
        return errors[0].removeprefix("error ")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """OFFRAMP_HOME of the commands under test; does not exist yet."""
    return tmp_path / "home"


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, home: Path) -> Cli:
    """Runs commands; whoever starts Ray fails the test."""

    def no_ray(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started before the arguments were checked")

    for name in list(os.environ):
        if name in ("REDIS_URL", "RAY_ADDRESS") or name.startswith("OFFRAMP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OFFRAMP_HOME", str(home))
    monkeypatch.chdir(REFERENCE.parents[1])
    monkeypatch.setattr("ray.init", no_ray)
    return Cli(capsys, monkeypatch)


@pytest.fixture
def bad_model(tmp_path: Path) -> Callable[[str], Path]:
    """Model folders that cannot be served, each for its own reason."""
    configs = {
        "no causal LM": {"model_type": "bert", "architectures": ["BertModel"]},
        "unsupported": {"model_type": "bloom", "architectures": ["BloomForCausalLM"]},
    }

    def make(kind: str) -> Path:
        folder = tmp_path / "model"
        if kind == "missing":
            return folder
        folder.mkdir()
        if kind in configs:
            (folder / "config.json").write_text(json.dumps(configs[kind]))
        if kind == "damaged":
            shutil.copy(REFERENCE / "config.json", folder)
            (folder / "model.safetensors").write_bytes(b"garbage" * 9)
        return folder

    return make


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


def snapshot_of(folder: Path) -> dict[str, bytes | None]:
    """Everything under a folder, to see that nothing was changed."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def untouched(tmp_path: Path) -> Iterator[Callable[[], None]]:
    """Call it when all is laid out; at the end of the test it must still be so."""
    before: list[dict[str, bytes | None]] = []
    yield lambda: before.append(snapshot_of(tmp_path))
    assert before, "the test never said what must stay"
    assert snapshot_of(tmp_path) == before[-1]


@pytest.fixture
def served(cli: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., PoolConfig]:
    """What ``offramp serve`` would start."""
    found: list[PoolConfig] = []
    monkeypatch.setattr(serving, "_serve", lambda config, *_: found.append(config))
    monkeypatch.setattr(serving, "require_free", lambda *_: None)

    def served(*arguments: object) -> PoolConfig:
        status, output = cli("serve", *arguments)
        assert status == 0, output
        return found.pop()

    return served
