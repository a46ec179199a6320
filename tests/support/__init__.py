"""What tests share: the real servers, the fake one, and the rule about things that are not there."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable

import pytest


def need(there: object, reason: str) -> None:
    """Go on only if `there` is true: a condition, or what shutil.which() and the like found.

    On a user's machine the test is skipped and says why; in CI, where everything must be there, it fails.
    """
    if there:
        return
    if os.environ.get("CI"):
        pytest.fail(f"needed in CI: {reason}")
    pytest.skip(reason)


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def eventually(condition: Callable[[], object], seconds: float = 20.0, what: str | Callable[[], str] = "") -> object:
    """Poll until the condition gives something true and return that; fail when the deadline has passed.

    The deadline is generous: it ends a hopeless test, it never decides a slow one.
    """
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            pytest.fail(f"still not so after {seconds:g} s: {what() if callable(what) else what or condition}")
        time.sleep(0.02)
