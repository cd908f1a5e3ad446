"""Looks for known vulnerabilities of pinned packages: ``make audit``.

    python .ci/audit.py constraints.txt

pip-audit passes over a package that its source does not know. A mirror of PyPI without the data
would so let everything pass; it is therefore asked first about a release that is known to be
vulnerable. If that is not found, or nobody answers, nothing is audited, which is said in capitals.
Exits with 1 if a package is vulnerable. The variables PIP_AUDIT_VULNERABILITY_SERVICE and
PIP_AUDIT_OSV_URL choose another source, as pip-audit's documentation says.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

VULNERABLE = "jinja2==2.4.1"
"""CVE-2014-1402 among others: every source of vulnerabilities knows it."""

COMMAND = (
    *(sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip"),
    *("--format", "json", "--progress-spinner", "off", "--requirement"),
)


def audited(pins: list[str]) -> list[dict[str, Any]]:
    """What pip-audit says of each pinned package; nothing if it could not ask."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "pins.txt"
        file.write_text("\n".join(pins), encoding="utf-8")
        said = subprocess.run([*COMMAND, file], capture_output=True, text=True, check=False)
    # It exits with 1 both for vulnerabilities and for want of an answer; then it says no JSON.
    packages: list[dict[str, Any]] = json.loads(said.stdout)["dependencies"] if said.stdout else []
    return packages


def pins_of(file: Path) -> list[str]:
    """The pins of a file of constraints, without the suffix of a build (``+cpu``)."""
    lines = [line.split("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
    return [line.split("+")[0] for line in lines if line]


def skip(reason: str) -> int:
    """Say that nothing is known."""
    print(f"\n*** AUDIT OF DEPENDENCIES SKIPPED: {reason} ***\n", file=sys.stderr)
    return 0


def main(file: Path) -> int:
    """Audit a file of pins; the exit status."""
    if not any(each.get("vulns") for each in audited([VULNERABLE])):
        return skip(f"no source here knows that {VULNERABLE} is vulnerable")
    packages = audited(pins_of(file))
    if not packages:
        return skip("the source of vulnerabilities answered no longer")
    unknown = [each["name"] for each in packages if "skip_reason" in each]
    found = [(each, one) for each in packages for one in each.get("vulns", ())]
    if unknown:
        print(f"not audited, for the source does not know them: {', '.join(unknown)}")
    for each, one in found:
        mended = ", ".join(one["fix_versions"]) or "no release"
        print(f"{each['name']} {each['version']}: {one['id']}, mended in {mended}")
    audits = len(packages) - len(unknown)
    print(f"{audits} packages audited, {len(found)} vulnerabilities known")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
