"""The README tells what the program does now."""

from __future__ import annotations

from pathlib import Path

import build

ROOT = Path(build.__file__).resolve().parent
README = (ROOT / "README.md").read_text()


def test_the_reference_is_that_of_the_program() -> None:
    assert README == build.readme_text(), "run `python3 build.py readme`"


def test_ci_runs_the_command_that_the_readme_gives() -> None:
    command = "python3 build.py test"
    assert command in README
    assert command in (ROOT / ".ci" / "run").read_text()


def test_every_command_that_the_readme_gives_exists() -> None:
    given = {line.split()[2] for line in README.splitlines() if line.startswith("python3 build.py ")}
    assert {"demo", "test"} <= given <= set(build.COMMANDS)
