"""The transaction of a bound service under faults: killed at every step, disks that are full, members that die.

A child executes the module itself, with the calls that change something on disk, or signal somebody, counted: at the
N-th of them it is killed (SIGKILL). N grows until a whole transaction goes by unharmed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import eventually, need
from support.etcd_server import EtcdServer
from test_bind import DAEMON

ROOT = Path(__file__).resolve().parent.parent

CHILD = """
import os, sys
sys.path.insert(0, sys.argv[1])
import etcdinit
limit, armed, count, victim = int(sys.argv[2]), sys.argv[3], 0, os.environ.get("VICTIM")
def counted(name, function):
    def call(*args, **options):
        global count
        writes = name != "open" or args[1] & (os.O_WRONLY | os.O_RDWR)
        if writes and os.path.exists(armed):
            count += 1
            if count == limit:
                with real_open(armed + ".at", "w") as told:
                    told.write(f"{name} {args}")
                os.kill(etcdinit.read_status(victim).pid if victim else os.getpid(), 9)
        return function(*args, **options)
    return call
real_open = open
for name in "open write rename unlink mkdir rmdir mkfifo fsync fchmod fchown posix_spawn".split():
    setattr(os, name, counted(name, getattr(os, name)))
sys.exit(etcdinit.main(sys.argv[4:]))
"""


class Place:
    """Two files bound to one service under a real supervisor of ours, and renderers that are started one by one."""

    def __init__(self, place: Path, etcd: EtcdServer, *supervise: str) -> None:
        """supervise: the command that supervises a directory, else ours."""
        self.etcd = etcd
        self.place, self.run, self.out = place, place / "run", place / "out"
        for name in ("run", "out", "confd/conf.d", "confd/templates", "services"):
            (place / name).mkdir(parents=True)
        (place / "child.py").write_text(CHILD)
        (place / "daemon.py").write_text(DAEMON)
        self.files = [self.out / "a.conf", self.out / "b.conf"]
        for path in self.files:
            (place / f"confd/conf.d/{path.name}.toml").write_text(
                f'[template]\nsrc = "t"\ndest = "{path}"\nkeys = ["/word"]\nservice = "app"\nreload = "signal HUP"\n'
                'verify = "0.3s"\ncheck_cmd = "test -s {{.src}}"\nverify_cmd = "! grep -q refuse {{.dest}}"\n')
        (place / "confd/templates/t").write_text('{{getv "/word"}}' + "." * 5000 + "\n")
        self.put("old")
        service = self.run / "app"
        service.mkdir()
        (service / "run").write_text(
            f"#!/bin/sh\nexec python3 -I -S {place}/daemon.py {self.files[0]} >> {place}/said\n")
        (service / "run").chmod(0o755)
        (service / "down").touch()
        self.supervisor = subprocess.Popen(
            [*(supervise or (sys.executable, "-m", "support.one_service")), str(service)], cwd=ROOT / "tests",
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}, stderr=subprocess.DEVNULL)
        eventually(lambda: (service / "supervise/status").exists())
        self.renderer: subprocess.Popen[bytes] | None = None

    def put(self, word: str) -> None:
        """Change the key."""
        self.etcd.put("/word", word)

    def words(self) -> list[str]:
        """What is in the files; each has to be whole."""
        found = []
        for path in self.files:
            text = path.read_text()
            assert text.endswith("." * 5000 + "\n"), f"{path} is not whole: {text[:20]}...{len(text)}"
            found.append(text.rstrip(".\n"))
        return found

    def start(self, limit: int = 0, victim: str = "") -> None:
        """Start a renderer; it, or the service of that directory, is killed at the limit-th call after arm()."""
        with (self.place / "log").open("ab") as log:
            self.renderer = subprocess.Popen(
                [sys.executable, "-I", "-S", self.place / "child.py", ROOT, str(limit), self.place / "armed",
                 "render", "--confdir", self.place / "confd", "--node", self.etcd.url, "--api", "3",
                 "--run", self.run, "--services", self.place / "services"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "VICTIM": victim})

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End the renderer."""
        if self.renderer:
            self.renderer.send_signal(number)
            self.renderer.wait(20)

    def dead(self) -> bool:
        """Whether the renderer was killed."""
        assert self.renderer and self.renderer.poll() in (None, -signal.SIGKILL), self.text()
        return self.renderer.poll() is not None

    def arm(self, armed: bool = True) -> None:
        """Whether calls count from now on."""
        (self.place / "armed").touch()
        if not armed:
            (self.place / "armed").unlink()

    def command(self, byte: str) -> None:
        """A byte for the service."""
        fd = os.open(self.run / "app/supervise/control", os.O_WRONLY | os.O_NONBLOCK)
        os.write(fd, byte.encode())
        os.close(fd)

    def state(self) -> dict[str, object]:
        """What the renderer has written down."""
        known: dict[str, object] = json.loads((self.run / ".confd/app/state").read_text())
        return known

    def settled(self, word: str, why: str = "") -> bool:
        """Whether all is done and both files hold a word, for a reason."""
        try:
            state = self.state()
            return self.words() == [word, word] and state["phase"] == "" and str(state["why"]).partition(":")[0] == why
        except (FileNotFoundError, ValueError):
            return False

    def left_over(self) -> list[str]:
        """Stage files, and generations that nobody knows."""
        known = {str(each["number"]) for each in self.state()["generations"]}  # type: ignore[attr-defined]
        return [path.name for path in self.out.glob(".*")] + [
            path.name for path in (self.run / ".confd/app/undo").iterdir() if path.name not in known]

    def said(self) -> str:
        """The last word that the service has read."""
        lines = [line for line in (self.place / "said").read_text().splitlines() if line.startswith("loaded ")]
        return lines[-1].removeprefix("loaded ").rstrip(".") if lines else ""

    def wait(self, condition: Callable[[], object], what: object = "") -> None:
        """Wait until something is so."""
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, f"{what} {self.state()} {self.said()}\n{self.text()}"
            time.sleep(0.02)

    def text(self) -> str:
        """The end of the renderers' log."""
        return (self.place / "log").read_text()[-3000:]

    def close(self) -> None:
        """End everything."""
        if self.renderer and self.renderer.poll() is None:
            self.renderer.kill()
            self.renderer.wait()
        try:
            self.command("xd")
            self.supervisor.wait(10)
        except (OSError, subprocess.TimeoutExpired):
            self.supervisor.kill()
            self.supervisor.wait()


@pytest.fixture
def place(tmp_path: Path, etcd35: EtcdServer) -> Iterator[Place]:
    made = Place(tmp_path, etcd35)
    yield made
    made.close()


def up(place: Place) -> None:
    """The service runs on the word "old"."""
    place.start()
    eventually(lambda: place.settled("old"))
    place.command("u")
    eventually((place.place / "said").exists)
    place.wait(lambda: place.said() == "old")
    place.stop()
    time.sleep(1.0)  # from then on it gets signals


def walk(place: Place, word: str, end: str, why: str, first: int, step: int) -> int:
    """Kill the renderer at call after call of a change to a word; the files hold `end` in the end. How many calls."""
    number = first
    while True:
        place.start(number)
        place.wait(lambda: "rendered" in place.text() and place.state()["phase"] == "")
        place.arm()
        place.put(word)
        place.wait(lambda: place.dead() or place.settled(end, why))
        place.arm(False)
        if not place.dead():
            place.put("old")
            place.wait(lambda: place.settled("old") and place.said() == "old")
            place.stop()
            return number
        at = (place.place / "armed.at").read_text()
        assert set(place.words()) <= {"old", word}, at  # each file is whole, the old or the new one
        place.start()  # as its supervisor would
        place.wait(lambda: place.settled(end, why) and place.said() == end, f"killed at {at}, then not all {end}:")
        place.wait(lambda: not place.left_over(), f"killed at {at}: left over {place.left_over()}")
        place.put("old")
        place.wait(lambda: place.settled("old") and place.said() == "old", f"killed at {at}, then not all old:")
        place.stop()
        (place.place / "log").write_text("")
        number += step


def test_a_renderer_killed_at_some_steps_leaves_old_or_new_files_and_then_new_ones(place: Place) -> None:
    up(place)
    assert walk(place, "new", "new", "", 3, 5) > 40


def test_a_renderer_killed_at_some_steps_of_taking_back_goes_on_with_it(place: Place) -> None:
    up(place)
    assert walk(place, "refuse", "old", "verify_cmd", 46, 9) > 70


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_renderer_killed_at_every_step_leaves_old_or_new_files_and_then_new_ones(place: Place) -> None:
    up(place)
    print("steps:", walk(place, "new", "new", "", 1, 1), walk(place, "refuse", "old", "verify_cmd", 1, 1))


def test_a_service_killed_at_some_steps_gets_its_new_files_all_the_same(place: Place) -> None:
    up(place)
    for number in range(1, 60, 8):
        place.start(number, str(place.run / "app"))
        place.wait(lambda: "rendered" in place.text() and place.state()["phase"] == "")
        place.arm()
        place.put("new")
        place.wait(lambda: place.settled("new") and place.said() == "new")
        place.arm(False)
        place.put("old")
        place.wait(lambda: place.settled("old") and place.said() == "old")
        place.stop()
        (place.place / "log").write_text("")


def test_an_etcd_that_is_killed_after_a_change_does_not_stop_it(place: Place) -> None:
    up(place)
    place.start()
    place.wait(lambda: "rendered" in place.text())
    try:
        place.put("new")
        place.etcd.kill()
        place.wait(lambda: place.words() == ["new", "new"] or place.words() == ["old", "old"])
    finally:
        place.etcd.start()
    place.wait(lambda: place.settled("new") and place.said() == "new")


# ---- somebody else's supervisor ---------------------------------------------------------------------------

def test_a_service_under_a_real_s6_supervise_is_bound_as_well(tmp_path: Path, etcd35: EtcdServer) -> None:
    need(shutil.which("s6-supervise"), "s6-supervise (apt install s6)")
    place = Place(tmp_path, etcd35, "s6-supervise")
    try:
        up(place)
        place.start()
        place.wait(lambda: "rendered" in place.text())
        place.put("new")
        place.wait(lambda: place.settled("new") and place.said() == "new")
        for word, why in (("refuse", "verify_cmd"), ("crash", "it ended")):
            place.put(word)
            place.wait(lambda why=why: place.settled("new", why) and place.said() == "new")
    finally:
        place.close()


# ---- a full disk ------------------------------------------------------------------------------------------

@pytest.fixture
def small_disk(place: Place) -> Iterator[Callable[[bool], None]]:
    """The destinations are on a file system with little room; fills it, or makes room again."""
    need(os.getuid() == 0, "root, to mount a tmpfs")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place.out], check=True)

    def fill(full: bool) -> None:
        filler = place.out / "filler"
        if not full:
            filler.unlink()
            return
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

    yield fill
    subprocess.run(["umount", "-l", place.out], check=True)


def test_on_a_full_disk_the_old_files_stay_until_there_is_room(
        place: Place, small_disk: Callable[[bool], None]) -> None:
    up(place)
    place.start()
    place.wait(lambda: "rendered" in place.text())
    small_disk(True)
    place.put("new")
    place.wait(lambda: "no space left on device" in place.text())
    assert place.words() == ["old", "old"] and "no space left" in str(place.state()["why"])
    small_disk(False)
    place.wait(lambda: place.settled("new") and place.said() == "new")
    assert not place.left_over()


def test_a_disk_that_is_full_when_files_come_back_gets_all_of_them_later(
        place: Place, small_disk: Callable[[bool], None]) -> None:
    up(place)
    place.start()
    place.wait(lambda: "rendered" in place.text())
    place.put("refuse")
    place.wait(lambda: place.words() == ["refuse", "refuse"])
    small_disk(True)
    place.wait(lambda: "cannot take the files of app back: no space left on device" in place.text())
    assert place.words() == ["refuse", "refuse"]
    small_disk(False)
    place.wait(lambda: place.settled("old", "verify_cmd") and place.said() == "old")
    assert not place.left_over()
