"""The variant that PyInstaller makes: its bootloader stays above the program, and nobody may notice."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import eventually, need
from support.container import Container

import build
import etcdinit


@pytest.fixture(scope="module")
def variant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need(shutil.which("objdump"), "objdump (on Debian: apt-get install binutils)")
    made = tmp_path_factory.mktemp("dist") / "etcdinit-pyinstaller"
    build.make_by_pyinstaller(build.LOADED_MAIN, made)
    return made


@pytest.fixture
def container(variant: Path) -> Iterator[Container]:
    box = Container([str(variant)])
    yield box
    box.close()


def test_it_unpacks_itself_and_leaves_nothing(variant: Path, tmp_path: Path) -> None:
    (tmp_path / "t").write_text('{{getv "/a"}} {{base64Encode "x"}} {{toUpper "ä"}}\n')
    (tmp_path / "keys.json").write_text('{"a": "1"}')
    (tmp_path / "tmp").mkdir()
    done = subprocess.run([variant, "template", tmp_path / "t", "--keys", tmp_path / "keys.json"], capture_output=True,
                          text=True, timeout=60, env={"TMPDIR": str(tmp_path / "tmp")})
    assert (done.returncode, done.stdout) == (0, "1 eA== Ä\n"), done.stderr
    assert not list((tmp_path / "tmp").iterdir())
    assert subprocess.run([variant, "nonsense"], capture_output=True, timeout=60).returncode == etcdinit.EXIT_USAGE


@pytest.mark.parametrize(("command", "code"), [("exit 7", 7), ("kill -9 $$", 137), ("exit 0", 0)])
def test_the_exit_code_comes_through_the_bootloader(container: Container, command: str, code: int) -> None:
    container.start("sh", "-c", command)
    assert container.end() == code


def test_signals_come_through_the_bootloader_and_orphans_to_the_program(container: Container) -> None:
    container.service("web", 'setsid sleep 1234 &\necho $! > "$PLACE/orphan"\nexec sleep 0.2', down="")
    container.start()
    eventually(lambda: container.verb("status", "--json", "web").returncode == 0)
    container.verb("once", "web")
    orphan = str(eventually(lambda: container.text("orphan").strip()))
    program = container.enter("sh", "-c", "ps -o pid= --ppid 1").stdout.split()[0]
    eventually(lambda: container.enter("ps", "-o", "ppid=", orphan).stdout.split() == [program], what="orphan adopted")
    container.enter("kill", "-9", orphan)
    eventually(lambda: container.enter("ps", "-o", "stat=", orphan).stdout == "", what="orphan reaped")
    assert container.stop() < 10
    assert container.end() == 0
    assert "not 1: reaping the orphans of services as a subreaper" in container.text("log")


def test_the_bootloaders_variables_reach_nobody(container: Container) -> None:
    container.environ["LD_LIBRARY_PATH"] = "/opt/lib"
    container.start("sh", "-c", "env | sort")
    assert container.end() == 0
    log = container.text("log")
    assert "\nLD_LIBRARY_PATH=/opt/lib\n" in log and "_PYI_" not in log and "_ORIG" not in log and "_MEI" not in log


FAULT = """\
real = etcdinit.Init.rescan
def faulty(self, prune):
    if os.path.exists(os.environ["PLACE"] + "/fault"):
        os.unlink(os.environ["PLACE"] + "/fault")
        raise RuntimeError("a bug")
    real(self, prune)
etcdinit.Init.rescan = faulty
sys.exit("""


@pytest.mark.long
def test_an_exception_in_its_own_code_keeps_the_process(tmp_path: Path) -> None:
    """The next image of the process is unpacked no more, and is the same process: services stay its children."""
    made = tmp_path / "etcdinit-faulty"
    build.make_by_pyinstaller(build.LOADED_MAIN.replace("sys.exit(", FAULT), made)
    box = Container([str(made)])
    try:
        box.service("web", 'echo $$ >> "$PLACE/pids"; exec sleep 1000')
        box.start("sh", "-c", 'trap "exit 8" TERM; env > "$PLACE/environ"; while :; do sleep 0.05; done')
        box.up("web")
        before = box.enter("ps", "-o", "pid=", "--ppid", "1").stdout
        (box.place / "fault").touch()
        box.signal(1)
        eventually(lambda: "went on in a fresh process image with 1 services" in box.text("log"))
        assert box.enter("ps", "-o", "pid=", "--ppid", "1").stdout == before
        assert box.verb("restart", "web", "--timeout", "10s").returncode == 0
        eventually(lambda: len(box.text("pids").split()) == 2)
        box.service("new", 'env > "$PLACE/environ"; exec sleep 1000')
        box.verb("rescan")
        box.up("new")
        assert "_PYI_" not in box.text("environ") and "LD_LIBRARY_PATH" not in box.text("environ")
        assert box.stop() < 10
        assert box.end() == 8
    finally:
        box.close()
