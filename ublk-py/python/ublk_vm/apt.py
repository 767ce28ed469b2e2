"""Debian packages of another suite, by a private apt configuration.

The machine's own apt configuration and package lists stay as they are. Its mirror is reused, so that whoever set
the machine up keeps the say over where it downloads from; apt checks the signatures against Debian's own keyring.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


class AptError(Exception):
    """Debian's packages cannot be had right now."""


def mirrors() -> list[str]:
    """The repositories that the machine's own apt reads, without the security ones (they have other suites).

    Also before the first `apt-get update`, or after the lists were removed, as images of containers have it: left
    alone, apt tells of no repository whose Release file it has not got.
    """
    try:
        out = subprocess.run(
            ["apt-get", "indextargets", "--no-release-info", "--format", "$(REPO_URI)", "Created-By: Packages"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError) as e:
        raise AptError(f"cannot read this machine's apt sources: {e}") from e
    uris = dict.fromkeys(line.strip().rstrip("/") for line in out.splitlines() if line.strip())
    return sorted((u for u in uris if "security" not in u), key=lambda u: not u.endswith("/debian"))


class Apt:
    """apt with its own lists and sources in `state`."""

    def __init__(self, state: Path, mirror: str, suites: Sequence[str]) -> None:
        (state / "lists" / "partial").mkdir(parents=True)
        lines = [f"deb [arch=amd64 signed-by={KEYRING}] {mirror} {suite} main" for suite in suites]
        (state / "sources.list").write_text("\n".join(lines) + "\n")
        self._state = state
        self._options = [
            *("-o", f"Dir::Etc::SourceList={state}/sources.list", "-o", "Dir::Etc::SourceParts=/dev/null"),
            *("-o", f"Dir::State::Lists={state}/lists", "-o", f"Dir::Cache={state}"),
            *("-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3", "-o", "APT::Architecture=amd64"),
        ]

    def _run(self, tool: str, *args: str) -> str:
        done = subprocess.run(
            [tool, *self._options, *args], cwd=self._state, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise AptError(f"{tool} {args[0]} failed: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def update(self) -> None:
        """Fetch the signed package lists; an unreachable or wrongly signed suite is an error, not a warning."""
        self._run("apt-get", "-o", "APT::Update::Error-Mode=any", "update", "-qq")

    def names(self, prefix: str) -> list[str]:
        """Names of the packages that begin with `prefix`."""
        return self._run("apt-cache", "pkgnames", prefix).split()

    def versions(self, package: str) -> list[str]:
        """Versions of a package, newest first."""
        return [line.split("|")[1].strip() for line in self._run("apt-cache", "madison", package).splitlines()]

    def field(self, package: str, name: str) -> str:
        """A field of a package's newest record, folded lines joined."""
        record = self._run("apt-cache", "show", "--no-all-versions", package)
        found = re.search(rf"^{name}: (.*(?:\n .*)*)", record, re.MULTILINE)
        return found[1].replace("\n", "") if found else ""

    def unpack(self, packages: Sequence[str], into: Path) -> None:
        """Download packages, signatures checked by apt, and unpack them."""
        self._run("apt-get", "download", "-qq", *packages)
        for deb in sorted(self._state.glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", deb, into], check=True)
            deb.unlink()


@contextmanager
def opened(suites: Sequence[str]) -> Iterator[Apt]:
    """An apt over the first of the machine's mirrors that carries all `suites`, properly signed."""
    if not KEYRING.exists():
        raise AptError(f"{KEYRING} is missing: apt-get install debian-archive-keyring")
    failures = []
    found = mirrors()
    if not found:
        raise AptError("this machine's apt has no repository of packages: see /etc/apt/sources.list.d")
    for mirror in found:
        with tempfile.TemporaryDirectory(prefix="ublk-apt.") as d:
            apt = Apt(Path(d), mirror, suites)
            try:
                apt.update()
            except AptError as e:
                failures.append(f"{mirror}: {e}")
                continue
            yield apt
            return
    raise AptError(
        "no mirror of this machine's apt sources carries " + ", ".join(suites) + ": " + "; ".join(failures)
    )
