"""Files that take long begin first, so that no process is left with one when the other is done."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parent

LONGEST = (
    "worker/engine/test_copy_drafts.py",
    "architecture/test_startup.py",
    "controller/test_durable.py",
    "architecture/test_audit.py",
    "worker/decoding/test_kv_modes.py",
    "agents/training/test_resuming.py",
    "deploy/pool/test_pool_trouble.py",
    "deploy/test_demo.py",  # whose half a dozen processes would all compile what is compiled by now
    "worker/decoding/test_exactness.py",
    "agents/onpolicy/test_pool.py",
    "deploy/test_cli_learning.py",
    "deploy/pool/test_class_pool.py",
    "agents/drafting/test_draft_engine.py",
    "worker/model/test_quantised.py",
    "worker/decoding/scheduling/test_schedules.py",
    "worker/engine/test_transfers.py",
    "agents/retraining/test_retrainer.py",
    "agents/recording/test_recording.py",
    "worker/model/test_device_products.py",
    "worker/model/test_graphs.py",
    "agents/drafting/test_drafting.py",
    "agents/evaluation/test_assess.py",
    "worker/decoding/test_prompt_exits.py",
    "agents/calibration/test_losses.py",
    "agents/drafting/test_draft_chances.py",
    "deploy/cli/test_classify_commands.py",
    "chaos/test_killed.py",
    "deploy/cli/test_drafting_exits.py",
    "deploy/cli/test_control_commands.py",
    "deploy/console/test_console_pictures.py",
    "deploy/console/test_operators_page.py",
)
"""The longest first, by processor time and by what they wait for.

The second to the fourth, which the second process takes while the first is in its first file, need
no kernels: on a new machine both processes would compile the same ones at once.
"""


def pytest_configure() -> None:
    """Refuse a list that names files which are gone.

    Raises:
        UsageError: a file is not there.
    """
    for name in LONGEST:
        if not (TESTS / name).is_file():
            raise pytest.UsageError(f"LONGEST: tests/{name} is not there. Remove or rename it")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files of ``LONGEST`` first; a file's own tests keep their order."""
    places = {TESTS / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
