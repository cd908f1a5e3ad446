"""``offramp learn``: what it refuses, and one look on a real Redis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from offramp.controller.keys.key_files import load_or_create_key
from offramp.deploy.serve.publishing import KEY
from offramp.deploy.serve.redis_server import EmbeddedRedis
from support.recordings import make_corpus, make_recording


def test_it_needs_traffic_a_key_a_registry_and_traces(
    cli: Any, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("learn", "--traces", tmp_path / "traces", "--requests", 160)
    assert cli.refused(*asked, "--canary-steps", tmp_path / "s.yaml").startswith("canary_steps: ")
    assert cli.refused(*asked).startswith("OFFRAMP_TRAFFIC: is not set")
    monkeypatch.setenv("OFFRAMP_TRAFFIC", str(tmp_path / "traffic"))
    assert cli.refused(*asked, "--method", "luck").startswith("method: 'luck' is unknown")
    assert "and a canary has to be signed" in cli.refused(*asked)
    assert not (home / KEY).exists()  # a new one would be trusted by nobody
    load_or_create_key(home / KEY)
    assert cli.refused(*asked).startswith("REDIS_URL: is not set")
    with EmbeddedRedis(tmp_path / "redis") as server:
        monkeypatch.setenv("REDIS_URL", server.url)
        assert "does not exist. Record traces" in cli.refused(*asked)
        make_recording(tmp_path / "traces", make_corpus(tmp_path / "corpus"), tokens=20)
        status, said = cli(*asked, "--window", 30)
        assert (status, said.strip()) == (0, "waiting for 30 requests of live traffic to test")
