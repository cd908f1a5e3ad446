"""``offramp publish``, ``status`` and ``watch`` on a real Redis, with what went wrong in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from offramp.controller.adapters.adapter_folder import DESCRIPTION, WEIGHTS
from offramp.controller.policies.kinds import digest_of, pack_policy
from offramp.controller.policies.protocols import FixedExit
from offramp.controller.release.bundle import PolicyBundle
from offramp.controller.release.redis_registry import RedisRegistry
from offramp.controller.release.registry import Ack, AckState
from offramp.controller.watching.tally import Tally
from offramp.deploy.serve.redis_server import EmbeddedRedis


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Any) -> Iterator[str]:
    with EmbeddedRedis(tmp_path / "redis") as server:
        monkeypatch.setenv("REDIS_URL", server.url)
        yield server.url


def bundle(folder: Path, layer: int) -> Path:
    packed = pack_policy(FixedExit(layer), np.zeros((2, 3), np.float32))
    draft = PolicyBundle.draft(
        packed, model="aa", tokenizer="bb", training={}, metrics={}, created_at=0.0
    )
    draft.save(folder / str(layer))
    return folder / str(layer)


def publish(cli: Any, folder: Path, layer: int, *options: str) -> None:
    status, output = cli("publish", bundle(folder, layer), "--uncertified", "--promote", *options)
    assert status == 0, output


def test_a_channel_that_is_named_is_the_one_that_is_written_and_read(
    cli: Any, url: str, tmp_path: Path, home: Path
) -> None:
    publish(cli, tmp_path, 3)
    for layer in (1, 2):
        publish(cli, tmp_path, layer, "--channel", "other")
    assert "generation 1" in cli("status")[1]
    assert "generation 2" in cli("status", "--channel", "other")[1]
    assert cli("rollback", "--to", 1, "--channel", "other")[0] == 0
    assert "generation 3" in cli("status", "--channel", "other")[1]
    assert cli("promote", 2, "--channel", "other")[0] == 1  # the one that serves is newer
    assert len(cli("history", "--channel", "other")[1].splitlines()) > len(
        cli("history")[1].splitlines()
    )
    assert "exits" in cli("diff", 1, 2, "--channel", "other")[1]
    assert cli.refused("status", "--channel", "no/such").startswith("OFFRAMP_CHANNEL: ")
    assert {each.name for each in (home / "ledger").iterdir()} == {"default", "other"}


def tripped(url: str, generation: int) -> Ack:
    registry = RedisRegistry(url, "default")
    ack = Ack(
        worker="worker-0-ab",
        boot="b",
        generation=0,
        digest="",
        about=generation,
        state=AckState.TRIPPED,
        reason=f"generation {generation}: full depth disagrees",
        at=0.0,
    )
    registry.acknowledge(ack, 60.0)
    registry.close()
    return ack


@pytest.mark.parametrize(
    ("bound", "said"),
    [
        ("max_exits=0.5", "guardrail: 'max_exits' is unknown"),
        ("max_disagreement=much", "max_disagreement: 'much' is no number"),
        ("max_disagreement=2", "max_disagreement: 2.0 is not a number in (0, 1)"),
        ("min_exits", "min_exits: '' is no number"),
        ("adapt_above=1", "adapt_above: 1.0 is not a number in (0, 1) or null"),
    ],
)
def test_an_unusable_guardrail_is_named_before_anything_is_signed(
    cli: Any, url: str, tmp_path: Path, home: Path, bound: str, said: str
) -> None:
    folder = bundle(tmp_path, 3)
    message = cli.refused("publish", folder, "--uncertified", "--guardrail", bound)
    assert message.startswith(said)
    assert not home.exists()


def test_a_forged_head_is_called_so_and_replaced(cli: Any, url: str, tmp_path: Path) -> None:
    publish(cli, tmp_path, 3, "--guardrail", "max_disagreement=0.1")
    client = redis.Redis.from_url(url)
    client.hset("offramp:{default}:head", "gen", 1_000_000)
    status, output = cli("status")
    assert status == 0
    assert "head: forged or damaged (bad_format: " in output
    status, output = cli("promote", "1")
    assert status == 0
    assert "head: generation 1, uncertified" in cli("status")[1]


def test_what_workers_trip_on_is_explained_and_rolled_back(
    cli: Any, url: str, tmp_path: Path
) -> None:
    publish(cli, tmp_path, 3)
    publish(cli, tmp_path, 5)
    assert cli("watch", "--once") == (0, "")
    ack = tripped(url, 2)
    assert ack.reason in " ".join(cli("status")[1].split())
    status, output = cli("watch", "--once")
    assert status == 0
    assert output.startswith(f"1 of 1 workers tripped ({ack.reason}); generation 3 serves policy")
    assert "head: generation 3" in cli("status")[1]
    assert cli("watch", "--once") == (0, "")


def test_history_and_diff_read_the_ledger(cli: Any, url: str, tmp_path: Path) -> None:
    publish(cli, tmp_path, 3)
    publish(cli, tmp_path, 5, "--guardrail", "max_disagreement=0.1")
    assert cli("rollback")[0] == 0
    status, output = cli("history")
    assert status == 0
    rows = [line.split("│")[1:-1] for line in output.splitlines() if "fixed" in line]
    table = [[cell.strip() for cell in row] for row in rows]
    assert [(row[0], row[5], row[6]) for row in table] == [
        ("3", "now", "in place of 2"),
        ("2", "before", ""),
        ("1", "before", ""),
    ]
    assert table[0][2] == table[2][2] != table[1][2]
    status, output = cli("diff", "1", "2")
    assert status == 0
    assert "guardrails.max_disagreement" in output
    assert "[3]" in output
    assert "[5]" in output
    assert "rollback_of" in cli("diff", "1", "3")[1]
    assert "differ in nothing" in cli("diff", "1", "1")[1]
    assert "generation 9 is not recorded" in cli.refused("diff", "1", "9")


def test_adapters_travel_with_the_policy_that_names_them(
    cli: Any, url: str, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bundle(tmp_path, 3)
    draft = PolicyBundle.load(folder)
    digests = {}
    for name in ("right", "wrong"):
        weights = name.encode() * 300_000
        digests[name] = digest_of(weights)
        facts = {"format": 1, "model": "aa", "exits": [3], "digest": digests[name]}
        (tmp_path / name).mkdir()
        (tmp_path / name / WEIGHTS).write_bytes(weights)
        (tmp_path / name / DESCRIPTION).write_text(json.dumps(facts))
    replace(draft, manifest=replace(draft.manifest, adapters=digests["right"])).save(folder)
    said = ("publish", folder, "--uncertified", "--promote")
    assert "Name their folder with --translators" in cli.refused(*said)
    assert "recorded through" in cli.refused(*said, "--translators", tmp_path / "wrong")
    assert not home.exists()
    (tmp_path / "right").rename(folder.parent / "translators")
    monkeypatch.setenv("OFFRAMP_MAX_ADAPTER_MB", "1")
    assert cli.refused(*said).startswith("OFFRAMP_MAX_ADAPTER_MB: the adapters have 1.4 MiB")
    monkeypatch.delenv("OFFRAMP_MAX_ADAPTER_MB")
    status, output = cli(*said)
    assert status == 0, output
    name = digests["right"][:12]
    assert f"adapters {name} travel with it, 1.4 MiB" in output
    assert f"through adapters {name}" in cli("status")[1]
    assert name in cli("history")[1].replace("\n", "")
    publish(cli, tmp_path, 5)
    assert f'"{name}' in cli("diff", "1", "2")[1]


def test_a_channel_without_a_ledger_has_no_history(cli: Any, home: Path) -> None:
    assert cli.refused("history").startswith("ledger: ")
    assert not home.exists()


def test_keys_are_made_rotated_and_distrusted(
    cli: Any, url: str, tmp_path: Path, home: Path
) -> None:
    assert "signs from now on" in cli("keys", "new")[1]
    first = cli("keys", "list")[1].split()[0]
    publish(cli, tmp_path, 3)
    assert "there" in cli.refused("keys", "rotate")
    assert "keys rotate" in cli("keys", "new")[1]
    assert cli("keys", "list")[1].count("\n") == 2
    assert "signs from now on" in cli("keys", "rotate")[1]
    listed = cli("keys", "list")[1].splitlines()
    assert listed[0] == f"{first} trusted"
    assert listed[1].endswith(" signs")
    # The old key's release is still this channel's, and can be returned to.
    assert "head: generation 1, uncertified" in cli("status")[1]
    publish(cli, tmp_path, 5)
    assert cli("rollback")[0] == 0
    assert "the key that signs" in cli.refused("keys", "distrust", listed[1].split()[0])
    assert cli("keys", "distrust", first)[0] == 0
    assert "is not trusted" in cli.refused("keys", "distrust", first)
    assert cli.refused("diff", "1", "2").startswith("policy refused (foreign_key)")
    assert (home / f"publisher-{first}.pem").stat().st_mode & 0o777 == 0o600


def test_another_publishers_key_is_trusted_from_its_file(
    cli: Any, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli("keys", "new")
    other = home / "publisher.pub"
    monkeypatch.setenv("OFFRAMP_HOME", str(tmp_path / "elsewhere"))
    cli("keys", "new")
    assert cli("keys", "trust", other)[1].count("trusted: ") == 2
    assert cli("keys", "list")[1].count("\n") == 2
    (tmp_path / "junk").write_bytes(other.read_bytes() + b"junk")
    assert cli.refused("keys", "trust", tmp_path / "junk").startswith("public key: ")


def test_an_offline_root_takes_over_and_asks_for_two_signatures(
    cli: Any, url: str, tmp_path: Path, home: Path
) -> None:
    publish(cli, tmp_path, 3)
    for name in ("offline", "second"):
        assert "is private" in cli("keys", "new", "--out", tmp_path / f"{name}.pem")[1]
    assert "is there already" in cli.refused("keys", "new", "--out", tmp_path / "second.pem")
    both = tmp_path / "both.pub"
    both.write_bytes((home / "publisher.pub").read_bytes() + (tmp_path / "second.pub").read_bytes())
    file = tmp_path / "root-1"
    options = ("--roots", tmp_path / "offline.pub", "--releasers", both, "--release-threshold")
    assert cli.refused("keys", "draft", file, *options, "3").startswith("threshold: 3 of 2 keys")
    assert "release 2 of 2," in cli("keys", "draft", file, *options, "2")[1]
    assert cli.refused("keys", "trust", file).startswith("root: ")
    assert "signed root 1" in cli("keys", "sign", file, "--key", tmp_path / "offline.pem")[1]
    assert "follow at their next poll" in cli("keys", "trust", file)[1]
    assert "may sign releases and timestamps, signs" in cli("keys", "list")[1]
    assert "a root says whose" in cli.refused("keys", "trust", both)
    assert "a root says whose" in cli.refused("keys", "distrust", "00")
    refusal = cli.refused("publish", bundle(tmp_path, 5), "--uncertified", "--promote")
    assert "1 of 2 signatures" in refusal
    assert "not trusted (below_threshold" in cli("history")[1].replace("\n", " ")
    release = home / "ledger/default/00000002.release"
    assert cli.refused("keys", "sign", release, "--key", tmp_path / "none").startswith("key: ")
    junk = tmp_path / "both.pub"
    second = tmp_path / "second.pem"
    assert "neither a root nor a release" in cli.refused("keys", "sign", junk, "--key", second)
    signed = cli("keys", "sign", release, "--key", second)[1]
    assert "generation 2 of channel default" in signed
    assert cli("promote", "2")[0] == 0
    assert "head: generation 2" in cli("status")[1]


def test_a_canary_goes_by_steps_and_is_rolled_back(cli: Any, url: str, tmp_path: Path) -> None:
    status, output = cli("promote")
    assert status == 2
    assert "generation: Name one, or give --percent" in output
    first = bundle(tmp_path, 3)
    assert cli("publish", first, "--uncertified")[0] == 0
    assert "generation 2 the others" in cli("promote", "--percent", "5")[1].replace("\n", " ")
    assert cli.refused("promote", "1").startswith("generation: 1 is older than 3")
    assert cli("promote", "--percent", "100")[0] == 0
    assert cli.refused("promote", "--percent", "5").startswith("generation: 4 is of the policy")
    assert cli("publish", bundle(tmp_path, 5), "--uncertified")[0] == 0
    for generation, percent in ((6, "5"), (7, "25")):
        status, output = cli("promote", "--percent", percent)
        assert status == 0, output
        line = f"head: generation {generation}, uncertified; a canary: it serves {percent}% of the"
        assert line in output
        assert "generation 4 the others" in " ".join(output.split())
    assert line in cli("status")[1]
    assert cli("rollback")[0] == 0
    assert "head: generation 8, uncertified\n" in cli("status")[1]
    history = cli("history")[1]
    assert "25% beside 4" in history
    assert "in place of 7" in history
    assert cli("promote", "5", "--percent", "100")[0] == 0
    assert "head: generation 9, uncertified\n" in cli("status")[1]


def test_a_watched_canary_is_moved_on_by_a_file(cli: Any, url: str, tmp_path: Path) -> None:
    steps = tmp_path / "steps.yaml"
    steps.write_text(
        "min_tokens: 10\nmin_requests: 0\nmin_audited: 10\nmax_disagreement: 0.9\nmin_speed: 0.1\n"
    )
    publish(cli, tmp_path, 3)
    assert cli("publish", bundle(tmp_path, 5), "--uncertified")[0] == 0
    assert cli("promote", "--percent", "5")[0] == 0
    said = cli("watch", "--once", "--steps", steps)
    assert said == (0, "canary 3 at 5% holds: 0 tokens of the canary, 10 are asked for\n")
    counts = {"tokens": 100, "seconds": 2.0, "layers": 500, "requests": 1, "paces": 0.02}
    counts |= {"points": 3, "point": 2, "moves": 1}
    tallies = (
        Tally(generation=1, **counts),  # type: ignore[arg-type]  # of mixed types
        Tally(generation=3, audited=50, disagreed=1, **counts),  # type: ignore[arg-type]
    )
    registry = RedisRegistry(url, "default")
    ack = replace(tripped(url, 0), state=AckState.ACK, generation=1, about=1, tallies=tallies)
    registry.acknowledge(ack, 60.0)
    assert registry.acks() == [ack]
    registry.close()
    told = cli("status")[1]
    assert "2 of 3, 2 of 3" in " ".join(told.split())
    rows = [line.split() for line in told.splitlines()]
    assert ["3", "1", "100", "50.0", "–,", "–", "5.0", "–", "0", "50"] in [
        [cell for cell in row if cell != "│"][:10] for row in rows
    ]
    status, output = cli("watch", "--once", "--steps", steps)
    assert status == 0
    assert "generation 4 serves 25% of the requests" in " ".join(output.split())
    steps.write_text("max_disagreements: 0.9\n")
    refusal = cli.refused("watch", "--once", "--steps", steps)
    assert refusal.startswith("max_disagreements: is no known setting")
