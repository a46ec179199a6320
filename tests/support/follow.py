"""`etcdinit render` in a process of its own, on an image, and what can be seen of it from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support import eventually
from support.image import Image

ROOT = Path(__file__).resolve().parent.parent.parent


class Follow:
    """`etcdinit render` in its own process, on an image. url: one endpoint or several, "" for none."""

    def __init__(self, image: Image, url: str | Sequence[str], *flags: str, api: str = "3",
                 env: dict[str, str] | None = None, before: Sequence[str] = (), **options: Any) -> None:
        """before: words in front of the command, as of a program that runs it."""
        self.log_path = image.home / "log"
        environ = {"PATH": os.environ["PATH"], "ETCD_API": api, **(env or {})}
        urls = [url] if isinstance(url, str) else url
        nodes = [word for each in urls if each for word in ("--node", each)]
        with self.log_path.open("ab") as log:
            argv = [*before, *image.program, "render", "--confdir", str(image.home), *nodes, *flags]
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ,
                                            **options)

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def says(self, text: str, seconds: float = 40) -> None:
        eventually(lambda: text in self.log, seconds, f"{text} in\n{self.log[-3000:]}")

    def stop(self) -> float:
        """SIGTERM, after which it has to leave with exit code 0; the seconds that it took."""
        began = time.monotonic()
        self.process.terminate()
        assert self.process.wait(40) == 0, self.log[-3000:]
        return time.monotonic() - began

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)

    def proc(self, name: str) -> str:
        """A file of /proc about the process."""
        return Path(f"/proc/{self.process.pid}/{name}").read_text()

    def descriptors(self) -> list[str]:
        return os.listdir(f"/proc/{self.process.pid}/fd")

    def children(self) -> list[str]:
        return self.proc(f"task/{self.process.pid}/children").split()

    def cpu_ticks(self) -> int:
        fields = self.proc("stat").rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    def resident_kib(self) -> int:
        line = next(line for line in self.proc("status").splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1])


def holds(dest: Path, text: str, seconds: float = 40) -> None:
    """Wait until a file has this text."""
    eventually(lambda: dest.exists() and dest.read_text() == text, seconds,
               f"{dest} is {text!r}, not {dest.read_text() if dest.exists() else None!r}")


def module_with(**constants: object) -> list[str]:
    """What starts the module with other values for some of its constants, as for shorter waits."""
    settings = "".join(f"etcdinit.{name} = {value!r}; " for name, value in constants.items())
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import etcdinit; {settings}"
    return [sys.executable, "-I", "-S", "-c", f"{code}sys.exit(etcdinit.main(sys.argv[1:]))"]
