#!/usr/bin/env python3
"""Every command that a developer or a packager of etcdinit types: build, test, demo, bench.

`python3 build.py help` lists them. Needs Python 3.11 or later and nothing else: what a command wants beyond
that it gets by itself and says so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import tomllib
import venv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build"  # scratch and logs; can be deleted at any time
VENV = ROOT / ".venv"


# ======================================================================================================
# GROUND
# Say what happens, run a step with its log, make .venv.
# ======================================================================================================

class Failed(Exception):
    """A step failed; the message is for the user, in one line or with the end of a log."""


def say(text: str = "") -> None:
    """Print a line at once, also into a pipe."""
    print(text, flush=True)


def fail(message: str) -> NoReturn:
    """End the command with a message."""
    raise Failed(message)


def step(title: str, argv: Sequence[str | Path], *, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> None:
    """Run one command quietly: one line with its title and time. Its output goes to a log under build/log.

    When it fails, the end of the log is shown and where the whole of it is.
    """
    log = BUILD / "log" / ("".join(c if c.isalnum() else "-" for c in title.lower())[:60] + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"  {title} ... ", end="", flush=True)
    began = time.monotonic()
    with log.open("wb") as out:
        code = subprocess.run([str(a) for a in argv], cwd=cwd, env={**os.environ, **(env or {})},
                              stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT).returncode
    say(f"{time.monotonic() - began:.1f} s" if code == 0 else f"failed ({code})")
    if code:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
        fail(f"{tail}\n{title} failed with exit code {code}; the whole log is {log}")


def pins() -> dict[str, str]:
    """The pinned development packages of pyproject.toml: {name: "name==version"}."""
    rows = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["dev"]
    return {row.split("==")[0]: row for row in rows}


def python_env(*names: str) -> Path:
    """The Python of .venv, with these pinned packages in it (all, if none is named). Made or completed as needed."""
    python = VENV / "bin" / "python"
    if not python.exists():
        say(f"making {VENV.name} for the development packages")
        try:
            venv.create(VENV, with_pip=True)
        except (OSError, subprocess.CalledProcessError):
            fail(f"cannot make {VENV}: this Python has no venv with pip (on Debian: apt-get install python3-venv)")
    wanted = [pins()[name] for name in names] if names else list(pins().values())
    there = {f"{p.name.split('-')[0].lower().replace('_', '-')}=={p.name.split('-')[1]}"
             for p in (d.with_suffix("") for d in VENV.glob("lib/python*/site-packages/*.dist-info"))}
    missing = [row for row in wanted if row not in there]
    if missing:
        step("install " + " ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else ""),
             [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", *missing])
    return python


# ======================================================================================================
# SOURCES AND RECIPE
# The static executable: pinned sources, and the steps from them to dist/etcdinit.
# ======================================================================================================


# ======================================================================================================
# IMAGE AND PACKAGE
# What is made from the executable: apk, bill of materials, PyInstaller and zipapp variants.
# ======================================================================================================


# ======================================================================================================
# TEST
# Servers, linters, types, tests: all that must be right, in one command.
# ======================================================================================================

SERVERS = (  # Debian package, a program of it, what the tests do with it
    ("etcd-server", "etcd", "etcd 3.4, v2 and v3"),
    ("etcd-client", "etcdctl", "etcd's own client beside ours"),
    ("nginx", "nginx", "templates/nginx-lb under real traffic"),
    ("dnsmasq-base", "dnsmasq", "SRV records, odd manners"),
    ("nsd", "nsd", "SRV records, right manners"),
    ("s6", "s6-svscan", "the supervision protocol's own tools"),
    ("execline", "execlineb", "run scripts of s6 images"),
    ("iproute2", "ip", "networks between test hosts"),
    ("openssl", "openssl", "certificates for TLS tests"),
)
POLICY = Path("/usr/sbin/policy-rc.d")  # Debian asks it before a package starts a daemon
SEARCH_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"))


def install_servers() -> None:
    """Get the servers that tests run. As root on Debian by apt-get; elsewhere say which tests will be skipped."""
    missing = [row for row in SERVERS if not shutil.which(row[1], path=SEARCH_PATH)]
    if not missing:
        return
    by_apt = os.geteuid() == 0 and shutil.which("apt-get")
    say("Debian packages to install:" if by_apt else "not installed, so tests that need them are skipped:")
    for package, _, purpose in missing:
        say(f"  {package:14} {purpose}")
    if not by_apt:
        return
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    no_daemons = not POLICY.exists()
    if no_daemons:
        POLICY.write_text("#!/bin/sh\nexit 101\n")  # 101: action not allowed
        POLICY.chmod(0o755)
    try:
        step("apt-get update", ["apt-get", "update"], env=quiet)
        step("apt-get install", ["apt-get", "install", "-y", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300",
                                 *(row[0] for row in missing)], env=quiet)
    finally:
        if no_daemons:
            POLICY.unlink()


def test(arguments: list[str]) -> int:
    """Everything that must be right: ruff, mypy, pytest. Arguments go to pytest."""
    python = python_env()
    install_servers()
    tools = python.parent
    checks: dict[str, list[str | Path]] = {
        "ruff": [tools / "ruff", "check", "."],
        "mypy": [tools / "mypy", "--strict", "etcdinit.py", "build.py"],
    }
    wrong = [name for name, argv in checks.items() if subprocess.run(argv, cwd=ROOT).returncode]
    if subprocess.run([python, "-m", "pytest", *arguments], cwd=ROOT,
                      env={**os.environ, "PATH": SEARCH_PATH}).returncode:
        wrong.append("pytest")
    if wrong:
        fail(f"{' and '.join(wrong)} found something, see above")
    return 0


# ======================================================================================================
# DEMO
# ======================================================================================================


# ======================================================================================================
# BENCH
# ======================================================================================================


# ======================================================================================================
# COMMAND LINE
# ======================================================================================================

def show_help(arguments: list[str]) -> int:
    """List the commands."""
    say("usage: python3 build.py [COMMAND [ARGUMENT ...]]\n")
    for name, (_, usage, text) in COMMANDS.items():
        say(f"  {(name + ' ' + usage).strip():34} {text}")
    return 0


# name: (function of the rest of the command line that returns an exit code, its arguments, what it does)
COMMANDS: dict[str, tuple[Callable[[list[str]], int], str, str]] = {
    "help": (show_help, "", "this list"),
    "test": (test, "[PYTEST ARGUMENT ...]", "run ruff, mypy and all tests, after getting what they need"),
}


def main(argv: list[str]) -> int:
    """Run one command; returns the exit code."""
    name = "help" if not argv or argv[0] in ("-h", "--help") else argv[0]
    if name not in COMMANDS:
        say(f'build.py: there is no command "{name}"; python3 build.py help lists them')
        return 2
    try:
        return COMMANDS[name][0](argv[1:])
    except Failed as error:
        say(f"build.py {name}: {error}")
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
