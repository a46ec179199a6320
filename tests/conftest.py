"""Fixtures for all tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def program() -> list[str]:
    """The argv prefix that starts etcdinit: the built executable that ETCDINIT_PROGRAM names, else the module."""
    built = os.environ.get("ETCDINIT_PROGRAM")
    return [str(Path(built).resolve())] if built else [sys.executable, "-I", "-S", str(ROOT / "etcdinit.py")]
