"""A confdir in a scratch directory, and the program run on it: what the tests of rendering stand on."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any


class Ran:
    """What a run of the program left: exit code, standard output and error as text."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def __repr__(self) -> str:
        return f"exit code {self.code}\n--- out\n{self.out}--- err\n{self.err}"


class Image:
    """A directory with conf.d/, templates/, keys.json and out/, in which destinations lie."""

    def __init__(self, program: list[str], home: Path) -> None:
        self.program, self.home = program, home
        self.out = home / "out"
        home.mkdir(exist_ok=True)
        for name in ("conf.d", "templates", "out"):
            (home / name).mkdir()
        self.keys({})

    def keys(self, keys: dict[str, Any]) -> None:
        """Write the keys that the next runs see."""
        (self.home / "keys.json").write_text(json.dumps(keys))

    def template(self, name: str, text: str) -> None:
        """Write a template."""
        path = self.home / "templates" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def conf(self, name: str, text: str) -> Path:
        """Write a resource file as it is."""
        path = self.home / "conf.d" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def resource(self, name: str, text: str | None = None, /, **keys: Any) -> Path:
        """Write NAME.toml and NAME.tmpl (its text, if given); returns the destination, out/NAME if none is given."""
        values = {"src": f"{name}.tmpl", "dest": str(self.out / name), "keys": ["/"], **keys}
        lines = [f"{key} = {json.dumps(value)}\n" for key, value in values.items()]  # JSON's scalars and lists are TOML
        self.conf(f"{name}.toml", "[template]\n" + "".join(lines))
        if text is not None:
            self.template(f"{name}.tmpl", text)
        return Path(values["dest"])

    def argv(self, *flags: str | Path, verb: str = "render") -> list[str]:
        """The command line of a run on this image with keys.json."""
        return [*self.program, verb, "--confdir", str(self.home), *(["--keys", str(self.home / "keys.json")]
                if verb != "check" and "--node" not in flags else []), *map(str, flags)]

    def run(self, *flags: str | Path, verb: str = "render", **options: Any) -> Ran:
        """Run `render --once` (or another verb) on this image."""
        argv = self.argv(*(["--once"] if verb == "render" else []), *flags, verb=verb)
        return run(argv, **options)

    def stages(self) -> list[str]:
        """What lies hidden below out/: stage files that were left behind."""
        return [str(path) for path in self.out.rglob(".*")]


def run(argv: list[str], env: dict[str, str] | None = None, seconds: float = 60, **options: Any) -> Ran:
    """Run a command with a bare environment; a run that takes longer than seconds fails the test."""
    environ = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", **(env or {})}
    done = subprocess.run(argv, env=environ, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, **options)
    return Ran(done.returncode, done.stdout.decode("utf-8", "surrogateescape"),
               done.stderr.decode("utf-8", "surrogateescape"))
