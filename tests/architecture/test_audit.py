"""The audit of dependencies, asking a server that speaks OSV's API."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

KNOWN = {("jinja2", "2.4.1"): "CVE-2014-1402", ("torch", "2.0.0"): "CVE-2025-32434"}


class Osv(BaseHTTPRequestHandler):
    """Answers as api.osv.dev does."""

    known: dict[tuple[str, str], str]

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        name = self.known.get((asked["package"]["name"], asked["version"]))
        affected = {"package": asked["package"], "ranges": []}
        reply = {"vulns": [{"id": name, "affected": [affected]}]} if name else {}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def osv(request: pytest.FixtureRequest) -> Iterator[str]:
    answering = type("Answering", (Osv,), {"known": request.param})
    with ThreadingHTTPServer(("127.0.0.1", 0), answering) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def audit(url: str, folder: Path, *pins: str) -> subprocess.CompletedProcess[str]:
    file = folder / "constraints.txt"
    file.write_text("# pins\n\n" + "\n".join(pins), encoding="utf-8")
    chosen = {"PIP_AUDIT_VULNERABILITY_SERVICE": "osv", "PIP_AUDIT_OSV_URL": url}
    command: list[str | Path] = [sys.executable, ROOT / ".ci" / "audit.py", file]
    return subprocess.run(
        command, env=os.environ | chosen, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("osv", [KNOWN], indirect=True)
def test_a_vulnerable_pin_fails_and_is_named(osv: str, tmp_path: Path) -> None:
    ended = audit(osv, tmp_path, "torch==2.0.0+cpu", "redis==8.1.0")
    assert ended.returncode == 1
    assert "torch 2.0.0: CVE-2025-32434, mended in no release" in ended.stdout
    assert "2 packages audited, 1 vulnerabilities known" in ended.stdout
    fine = audit(osv, tmp_path, "redis==8.1.0")
    assert fine.returncode == 0
    assert "1 packages audited, 0 vulnerabilities known" in fine.stdout


@pytest.mark.parametrize("osv", [{}], indirect=True)
def test_a_source_that_knows_nothing_is_no_clean_bill(osv: str, tmp_path: Path) -> None:
    ended = audit(osv, tmp_path, "torch==2.0.0")
    assert ended.returncode == 0
    assert "AUDIT OF DEPENDENCIES SKIPPED" in ended.stderr
    assert "audited" not in ended.stdout


def test_without_a_source_it_is_skipped_in_capitals(tmp_path: Path) -> None:
    ended = audit("http://127.0.0.1:9", tmp_path, "torch==2.0.0")
    assert ended.returncode == 0
    assert "AUDIT OF DEPENDENCIES SKIPPED" in ended.stderr
