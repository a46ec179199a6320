"""A container without an engine: a PID, a mount and a proc of its own (unshare), /run a tmpfs, /etc with additions.

Needs root. The program is the first process of its PID namespace, exactly as in a container.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support import eventually, need

ROOT = Path(__file__).resolve().parent.parent.parent
TOO_MANY_FILES = "too many open files|no file descriptors available"  # in the words of glibc, of musl
SET_UP = """
set -e
mount -t tmpfs -o "$RUN_OPTIONS" tmpfs /run
mount -t overlay overlay -o "lowerdir=$PLACE/etc:/etc" /etc
cd "$PLACE/work"
exec "$@"
"""


PATCHED = """
import os, sys, time
sys.path.insert(0, {root!r})
import etcdinit
{patch}
sys.exit(etcdinit.main(sys.argv[1:]))
"""
FAULTY = """
real = etcdinit.Init.rescan
def faulty(self, prune):
    if os.path.exists(os.environ["PLACE"] + "/fault"):
        if not os.path.exists(os.environ["PLACE"] + "/stays"):
            os.unlink(os.environ["PLACE"] + "/fault")
        raise RuntimeError("a bug")
    real(self, prune)
etcdinit.Init.rescan = faulty
etcdinit.RECOVERIES = int(os.environ.get("RECOVERIES", "1000"))
"""


def patched_program(directory: Path, patch: str = FAULTY) -> list[str]:
    """etcdinit after some lines of Python; with FAULTY HUP raises if there is a file PLACE/fault.

    That file goes away then, unless PLACE/stays is there.
    """
    script = directory / "patched.py"
    script.write_text(PATCHED.format(root=str(ROOT), patch=patch))
    return [sys.executable, str(script)]


class Container:
    """Files below `place`: services/ (ETCDINIT_SERVICES), etc/ (over /etc), work/ (working directory of CMD)."""

    def __init__(self, program: Sequence[str]) -> None:
        need(os.getuid() == 0 and shutil.which("unshare"), "root and unshare, for PID namespaces")
        self.program = list(program)
        self.place = Path(tempfile.mkdtemp(prefix="etcdinit-container-"))
        self.place.chmod(0o755)
        for name in ("services", "etc", "work"):
            (self.place / name).mkdir()
        self.process: subprocess.Popen[bytes] | None = None
        self.environ = {"PATH": os.environ["PATH"], "ETCDINIT_SERVICES": str(self.place / "services"),
                        "PLACE": str(self.place), "RUN_OPTIONS": "mode=755"}
        self.log = self.place / "log"

    def write(self, path: str, text: str) -> Path:
        """Put an executable file below place."""
        target = self.place / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        target.chmod(0o755)
        return target

    def service(self, name: str, run: str = "exec sleep 1000", **files: str) -> Path:
        """Define a service; run and finish are bodies of shell scripts, `_` in other names stands for `-`."""
        for key, text in {"run": run, **files}.items():
            shell = key in ("run", "finish") and not text.startswith("#!")
            file = key.replace("_", "-") if key != "service_toml" else "service.toml"
            self.write(f"services/{name}/{file}", f"#!/bin/sh\n{text}\n" if shell else text)
        return self.place / "services" / name

    def start(self, *command: str, flags: Sequence[str] = (), verb: Sequence[str] = ("init",),
              **popen: Any) -> subprocess.Popen[bytes]:
        """Start `init` as PID 1, with a command; its output goes to the file log unless told otherwise."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                ["unshare", "--fork", "--pid", "--mount", "--mount-proc", "--kill-child", "sh", "-c", SET_UP, "sh",
                 *self.program, *verb, *flags, *command],
                env=self.environ, **{"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, **popen})
        return self.process

    def pid(self) -> int:
        """The PID, as seen from outside, of the container's PID 1."""
        assert self.process
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return int(str(eventually(lambda: children.read_text().split())).strip("[]'"))

    def enter(self, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command inside."""
        return subprocess.run(["nsenter", "-t", str(self.pid()), "-m", "-p", *command], capture_output=True, text=True,
                              errors="replace", env=self.environ, timeout=60, **options)

    def verb(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run an etcdinit verb inside."""
        return self.enter(*self.program, *words)

    def up(self, *names: str) -> None:
        """Wait until services are up."""
        eventually(lambda: self.verb("wait", *names, "--up", "--timeout", "20s").returncode == 0, what=f"{names} up")

    def control(self, name: str, commands: str) -> None:
        """Write command bytes to a service, as s6-svc does."""
        path = f"/proc/{self.pid()}/root{self.environ.get('ETCDINIT_RUN', '/run/service')}/{name}/supervise/control"
        fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        os.write(fd, commands.encode())
        os.close(fd)

    def signal(self, number: int) -> None:
        """Send a signal to PID 1 from outside, as the container engine does."""
        os.kill(self.pid(), number)

    def end(self, seconds: float = 30) -> int:
        """Wait for the end; the exit code."""
        assert self.process
        return self.process.wait(seconds)

    def stop(self) -> float:
        """TERM, and how long the end took."""
        begin = time.monotonic()
        self.signal(signal.SIGTERM)
        self.end()
        return time.monotonic() - begin

    def text(self, path: str) -> str:
        """A file below place, "" if there is none."""
        target = self.place / path
        return target.read_text(errors="replace") if target.exists() else ""

    def close(self) -> None:
        """End and remove everything."""
        if self.process:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.place, ignore_errors=True)
