"""What libFuzzer calls again and again: ``python fuzz_target.py FOLDER [its own options]``.

The first byte picks the reader, the others are what it reads. Python code of ``offramp`` is
instrumented, so that inputs which reach new branches are kept and changed further. FOLDER takes the
inputs to begin from, written by the real writers, and those that were found.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import atheris

# Not what numba compiles, which knows no calls into the fuzzer.
POLICIES = "offramp.controller.policies"
COMPILED = [f"{POLICIES}.{each}" for each in ("net_kernel", "drafts.leads", "candidate_table")]
with atheris.instrument_imports(include=["offramp", "json"], exclude=COMPILED):
    from offramp.controller.errors import PolicyRefusedError
    from support.releases.readers import READERS

NUMBERED = list(READERS.values())
IS_PLANTED = bool(os.environ.get("FUZZ_PLANTED"))
"""Whether a fault is to be found that was put there, to see that it can be."""


def read(raw: bytes) -> None:
    """Let a reader read; what is no typed refusal ends the process."""
    if not raw:
        return
    with suppress(PolicyRefusedError):
        NUMBERED[raw[0] % len(NUMBERED)].read(raw[1:])


def planted(raw: bytes) -> None:
    """Fails on one input in four thousand million, branch by branch."""
    is_found = len(raw) > 3 and raw[0] == 0xCA and raw[1] == 0xFE and raw[2] == 0xBA
    if is_found and raw[3] == 0xBE:
        raise ZeroDivisionError("the planted fault")


def main() -> None:
    """Hand over to libFuzzer."""
    folder, call = Path(sys.argv[1]), read
    if IS_PLANTED:
        call = atheris.instrument_func(planted)
    else:
        write_seeds(folder)
    atheris.Setup([sys.argv[0], *sys.argv[2:], str(folder)], call)
    atheris.Fuzz()


def write_seeds(folder: Path) -> None:
    """Write what the real writers write, each behind its reader's number."""
    for number, reader in enumerate(NUMBERED):
        for place, seed in enumerate(reader.seeds):
            (folder / f"seed-{number}-{place}").write_bytes(bytes([number]) + seed)


if __name__ == "__main__":
    main()
