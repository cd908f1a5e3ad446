"""The closed loop for real: Ray, Redis, Ray Serve, HTTP, the official client."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from offramp.controller.adapters.adapter_folder import read_description
from offramp.controller.policies.exits import Exit
from offramp.controller.release.bundle import PolicyBundle
from offramp.deploy.demo.demo_config import DemoConfig
from offramp.worker import Precision
from support.classifying.labelled_files import encoder_folder

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


def offramp(*arguments: str, **settings: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("REDIS_URL", "RAY_ADDRESS")}
    environment |= settings
    command = [str(Path(sys.executable).parent / "offramp"), *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=heed_interrupts,
    )


def heed_interrupts() -> None:
    """A suite started in the background ignores SIGINT, and its children would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def processes_naming(text: str) -> list[str]:
    """Command lines of live processes that mention a text."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in line:
            found.append(line)
    return found


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    out = tmp_path_factory.mktemp("demo") / "run"
    process = offramp("demo", "--quick", "--out", str(out))
    output, _ = process.communicate(timeout=390)
    assert process.returncode == 0, output
    return out, json.loads((out / "report.json").read_text()), output


def test_the_report_has_every_part(demo: tuple[Path, dict[str, Any], str]) -> None:
    out, report, _ = demo
    parts = ("machine", "model", "drafting", "traces", "policies", "swap", "requests", "rollback")
    for key in (*parts, "classification"):
        assert report[key], key
    drafting = report["drafting"]
    speeds = drafting["times_full_depth"]
    assert drafting["chosen"] == max(speeds, key=speeds.__getitem__)
    assert speeds.keys() == drafting["times_full_depth_by_replay"].keys()
    assert any(name.startswith("PPO drafting") for name in speeds)
    for row in report["policies"]:
        assert {"policy", "agreement", "accuracy", "mean_layers", "wall_ratio"} <= row.keys()
    families = {row["family"] for row in report["policies"]}
    assert {"full depth", "CALM", "p̂", "PPO"} <= families
    for name in ("frontier.png", "exit_depths.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_policies_were_learned_over_a_map_of_the_fill(
    demo: tuple[Path, dict[str, Any], str],
) -> None:
    out, report, _ = demo
    filled = report["filled"]
    assert [each["layer"] for each in filled] == [3, 6, 9]
    assert filled[0]["mapped"] < filled[0]["plain"]
    adapters = PolicyBundle.load(out / "policies" / "chosen").manifest.adapters
    assert adapters == read_description(out / "kv")["digest"]


def test_no_request_failed_and_none_was_torn(demo: tuple[Path, dict[str, Any], str]) -> None:
    swap = demo[1]["swap"]
    assert swap["failed"] == swap["torn"] == 0
    assert swap["guarantee"] == "uncertified"  # and the demo says so
    assert swap["in_flight_generations"] == [[1]] * 4
    assert swap["after_generations"] == [[2]] * 4
    # Full depth to the end: the new policy, which drafts early, never decided for them.
    assert swap["in_flight_layers"] == [[12]] * 4
    # They were in flight indeed: each had tokens before the swap and tokens after it.
    assert all(before > 0 and after > 0 for before, after in swap["in_flight_tokens"])
    names = sorted(name.rpartition("-")[0] for name in swap["ack_ms"])
    assert names == ["worker-0", "worker-1"]  # each followed by what makes it the only one


def test_the_policy_took_effect_and_the_rollback_undid_it(
    demo: tuple[Path, dict[str, Any], str],
) -> None:
    report = demo[1]
    before, after = report["requests"]["before"], report["requests"]["after"]
    assert {request["generation"] for request in before} == {1}
    assert {request["generation"] for request in after} == {2}
    assert {layer for request in before for layer in request["exit_layers"]} == {12}
    assert min(layer for request in after for layer in request["exit_layers"]) < 12
    # Drafts were taken, and in float32 not one token differs.
    assert [request["text"] for request in after] == [request["text"] for request in before]
    assert report["requests"]["text_as_before"]
    assert report["rollback"]["generation"] == 3
    assert report["rollback"]["text_as_before"]


def test_texts_leave_early_at_full_depths_accuracy(demo: tuple[Path, dict[str, Any], str]) -> None:
    found = demo[1]["classification"]
    assert (found["labels"], found["layers"]) == (2, 12)
    assert found["accuracy"] >= found["accuracy_full_depth"] - 0.05 > 0.8
    assert found["mean_layers"] < 6
    assert found["wall_ratios"].keys() == {"1", "16"}


def test_the_last_act_alone_serves_nothing(cli: Any, tmp_path: Path) -> None:
    model, out = encoder_folder(tmp_path / "model"), tmp_path / "run"
    status, said = cli("demo", "--task", "classify", "--quick", "--model", model, "--out", out)
    assert status == 0, said
    report = json.loads((out / "report.json").read_text())
    assert report.keys() == {"machine", "classification", "seconds"}
    assert (report["classification"]["labels"], report["classification"]["layers"]) == (2, 5)
    assert PolicyBundle.load(out / "class_policies" / "chosen").manifest.adapters
    assert not (out / "workers").exists()


def test_an_act_that_is_none_is_named(cli: Any, tmp_path: Path) -> None:
    message = cli.refused("demo", "--task", "translate", "--out", tmp_path)
    assert message.startswith("task: 'translate' is unknown")


def test_a_copy_that_drafts_does_so_after_all_its_layers_with_its_head() -> None:
    config = DemoConfig(draft_weights="int4")
    assert config.exits(30) == (Exit(30, "int4"),)
    assert config.engine.draft_precision == Precision(weights="int4")
    assert (config.candidates, DemoConfig().candidates) == (0, 64)
    assert DemoConfig().exits(12) == ()


def test_nothing_is_left_running(demo: tuple[Path, dict[str, Any], str]) -> None:
    assert processes_naming(str(demo[0])) == []


def test_a_second_demo_refuses_a_folder_that_is_not_its_own(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("keep")
    assert cli.refused("demo", "--quick", "--out", tmp_path).startswith("out: ")
    assert (tmp_path / "precious").read_text() == "keep"


def test_an_interrupt_stops_everything_that_was_started(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = offramp("demo", "--quick", "--out", str(out))
    assert process.stdout is not None
    for line in process.stdout:
        if "Learn to draft" in line:
            break
    assert processes_naming(str(out))  # the embedded Redis runs now
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    output, _ = process.communicate(timeout=90)
    assert process.returncode != 0
    assert "Traceback" not in output
    assert "error" not in output
    assert processes_naming(str(out)) == []
    assert not (out / "report.json").exists()
