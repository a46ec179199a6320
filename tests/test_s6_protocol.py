"""The on-disk protocol of s6: real tools of three releases on our directories, real s6-supervise beside ours."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import eventually
from support.s6 import RELEASES, S6, s6_release

import etcdinit

ROOT = Path(__file__).resolve().parent.parent
SLEEPER = "#!/bin/sh\nexec sleep 1000\n"


def make_service(directory: Path, run: str | None = SLEEPER, **files: str) -> Path:
    """A service directory with these files; `_` in a name stands for `-`, run and finish are executable."""
    directory.mkdir(parents=True)
    for name, text in {"run": run, **files}.items():
        if text is not None:
            path = directory / name.replace("_", "-")
            path.write_text(text)
            path.chmod(0o755)
    return directory


def status(directory: Path) -> etcdinit.Status:
    return etcdinit.Status.unpack((directory / "supervise/status").read_bytes())


def command(directory: Path, commands: bytes) -> None:
    fd = os.open(directory / "supervise/control", os.O_WRONLY | os.O_NONBLOCK)
    os.write(fd, commands)
    os.close(fd)


def supervised(directory: Path) -> bool:
    """Whether somebody reads the control FIFO."""
    try:
        os.close(os.open(directory / "supervise/control", os.O_WRONLY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead but that nobody has reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Ours:
    """Our supervisor over some directories."""

    def __init__(self, *directories: Path) -> None:
        self.process = subprocess.Popen([sys.executable, str(ROOT / "tests/support/one_service.py"),
                                         *map(str, directories)], env={**os.environ, "PYTHONPATH": str(ROOT)})
        self.directories = directories
        for directory in directories:
            eventually(lambda d=directory: (d / "supervise/status").exists() and supervised(d), what=str(directory))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        end_services(*self.directories)


def end_services(*directories: Path) -> None:
    """Kill what the services left behind."""
    for directory in directories:
        try:
            pid = status(directory).pid
            if pid:
                os.killpg(pid, signal.SIGKILL)
        except (OSError, ValueError):
            pass


@pytest.fixture
def supervise() -> Iterator[Callable[..., Ours]]:
    running: list[Ours] = []

    def start(*directories: Path) -> Ours:
        running.append(Ours(*directories))
        return running[-1]

    yield start
    for ours in running:
        ours.close()


@pytest.fixture(params=list(RELEASES))
def s6(request: pytest.FixtureRequest) -> Iterator[S6]:
    tools = s6_release(request.param)
    yield tools
    tools.close()


# ---- formats -------------------------------------------------------------------------------------------

@given(st.integers(0, 2**40 * 10**9), st.integers(0, 2**40 * 10**9), st.integers(0, 2**22), st.integers(0, 2**22),
       st.integers(0, 0xFFFF), st.integers(0, 15))
def test_a_status_record_means_the_same_to_readers_of_35_and_of_43_bytes(
        stamp: int, ready: int, pid: int, pgid: int, wstat: int, flags: int) -> None:
    record = etcdinit.Status(stamp, ready, pid, pgid, wstat, flags).pack()
    short, long = etcdinit.Status.unpack(record[:35]), etcdinit.Status.unpack(record)
    for read in (short, long):
        assert (read.stamp, read.ready_stamp, read.pid, read.wstat, read.flags) == (stamp, ready, pid, wstat, flags)
    assert long.pgid == pgid
    assert int.from_bytes(record[32:40], "big") & 0xFFFFFFFF == pgid  # as s6 2.13 reads it


def test_the_records_of_real_s6_are_read_as_s6_means_them() -> None:
    up = etcdinit.Status.unpack(bytes.fromhex(
        "400000006b0488d22093d3fc400000006b0488d320b642600000000000007d0700000c"))
    assert (up.stamp // 10**9, up.pid, up.flags) == (1795459245, 32007, etcdinit.WANTUP | etcdinit.READY)
    killed = etcdinit.Status.unpack(bytes.fromhex(
        "400000006b0488d41e6f4228400000006b0488d320b642600000000000007d8d000906"))
    assert (killed.wstat, killed.flags) == (9, etcdinit.WANTUP | etcdinit.FINISHING)
    native43 = etcdinit.Status.unpack(bytes.fromhex(
        "400000006b048ba128767bd9400000006b048ba128e05237" + "00" * 16 + "000f08"))
    assert (native43.wstat, native43.flags, native43.pid) == (15, etcdinit.READY, 0)


@given(st.binary(max_size=100))
def test_no_bytes_in_a_status_or_tally_file_confuse_the_reader(data: bytes) -> None:
    etcdinit.unpack_deaths(data)
    if len(data) in (35, 43):
        etcdinit.Status.unpack(data)
    else:
        with pytest.raises(ValueError, match="35 or 43"):
            etcdinit.Status.unpack(data)


# ---- the table of states and commands, beside real s6-supervise -----------------------------------------

# notes every signal that it gets, tells readiness, lives until it is killed
NOTER = """#!/usr/bin/python3 -IS
import os, signal
def note(number, frame):
    fd = os.open("got", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, b"%d " % number)
    os.close(fd)
for number in (1, 2, 3, 6, 10, 12, 14, 15, 18, 28):
    signal.signal(number, note)
os.write(3, b"\\n")
os.close(3)
while True:
    signal.pause()
"""
COMMANDS = "abqhkti12pcyrlPCKoOQdDuUx" + "sS !\n"  # all commands, and bytes that are none


def observed(directory: Path, listener: etcdinit.Listener, seen: dict[Path, bytes], late: bytes) -> dict[str, Any]:
    """All that can be told from outside of a service and what happened to it.

    late: the event of the state that it was brought into, which comes a moment after its status.
    """
    seen[directory] = seen.get(directory, b"") + listener.read()
    now = status(directory)
    try:
        process = Path(f"/proc/{now.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        process = ""
    got = directory / "got"
    return {"up": now.up, "flags": now.flags, "wstat": now.wstat, "stopped": process == "T",
            "events": seen[directory].replace(b"s", b"").removeprefix(late), "down": (directory / "down").exists(),
            "supervised": supervised(directory),
            "got": sorted(set(got.read_text().split())) if got.exists() else []}


@pytest.mark.parametrize("state", ["down", "up", "finish", "last-up", "last-finish"])
def test_every_command_in_every_state_does_what_s6_does(s6: S6, state: str, supervise: Callable[..., Ours]) -> None:
    commands = COMMANDS.translate({ord(c): "" for c in {"2.11": "lPCK", "2.13": "l", "2.15": "Q"}[s6.release]})
    pairs: list[tuple[str, Path, Path]] = []
    for number, letter in enumerate(commands):
        files = {"notification_fd": "3\n", "timeout_finish": "0\n", "timeout_kill": "400\n" if letter == "D" else "0\n"}
        if state == "down":
            files["down"] = ""
        if state.endswith("finish"):
            files["finish"] = SLEEPER
        both = [make_service(s6.place / f"{whose}-{number}", NOTER, **files) for whose in ("real", "ours")]
        pairs.append((letter, *both))
    real = [s6.supervise(theirs) for _, theirs, _ in pairs]
    directories = [directory for _, *both in pairs for directory in both]
    listeners: dict[Path, etcdinit.Listener] = {}
    try:
        supervise(*[our for _, _, our in pairs])
        for directory in directories:
            eventually(lambda d=directory: (d / "supervise/status").exists() and supervised(d))
        ready = etcdinit.READY if state == "down" else etcdinit.READY | etcdinit.WANTUP
        for directory in directories:
            eventually(lambda d=directory: status(d).flags & 12 == ready, what=f"{directory} ready")
        if state.endswith("finish"):
            for directory in directories:
                command(directory, b"k")
            for directory in directories:
                eventually(lambda d=directory: status(d).flags & etcdinit.FINISHING, what=f"{directory} finishing")
        for directory in directories:
            listeners[directory] = etcdinit.Listener(f"{directory}/event")
            command(directory, b"x" if state.startswith("last") else b"")
        time.sleep(0.1)  # two writes, in this order, whatever a reader makes of one
        for letter, *both in pairs:
            for directory in both:
                if supervised(directory):
                    command(directory, letter.encode())
        time.sleep(1.3)  # so that a wrong effect, which comes later than the right one, is seen too
        seen: dict[Path, bytes] = {}
        compare(pairs, listeners, seen, state, s6)
        for directory in directories:  # and what comes after the end of the process
            end_services(directory)
        compare(pairs, listeners, seen, f"{state}, then killed", s6)
    finally:
        for process in real:
            process.kill()
            process.wait()
        end_services(*directories)


def compare(pairs: list[tuple[str, Path, Path]], listeners: dict[Path, etcdinit.Listener], seen: dict[Path, bytes],
            when: str, s6: S6) -> None:
    different = ["?"]
    late = b"U" if "up" in when else b"d" if "finish" in when else b""

    def alike() -> bool:
        different.clear()
        for letter, theirs, our in pairs:
            a, b = (observed(one, listeners[one], seen, late) for one in (theirs, our))
            if when.startswith("down") and letter not in "uUo" and s6.release != "2.15":  # no "not started yet" there
                a["flags"], b["flags"] = a["flags"] | 1, b["flags"] | 1
            for key in a:
                if a[key] != b[key]:
                    different.append(f"{when}, {letter!r}: {key} of s6 {a[key]!r}, ours {b[key]!r}")
        return not different

    deadline = time.monotonic() + 10
    while not alike():
        assert time.monotonic() < deadline, "\n".join(different)
        time.sleep(0.1)


# ---- the tools of s6 over our directories ----------------------------------------------------------------

READY_AFTER = "#!/bin/sh\nsleep 0.2\necho >&3\nexec 3>&-\nexec sleep 1000\n"


def test_svok_and_a_second_supervisor_see_that_somebody_is_there(s6: S6, supervise: Callable[..., Ours]) -> None:
    service = make_service(s6.place / "svc")
    assert s6.run("s6-svok", service).returncode == 1
    ours = supervise(service)
    assert s6.run("s6-svok", service).returncode == 0
    other = s6.supervise(service)
    assert other.wait(20) == 100
    assert s6.run("s6-svok", service).returncode == 0
    ours.process.kill()
    ours.process.wait()
    assert s6.run("s6-svok", service).returncode == 1  # no child keeps the lock of a dead supervisor
    end_services(service)


def test_we_do_not_take_a_service_that_a_real_supervisor_has(s6: S6) -> None:
    service = make_service(s6.place / "svc")
    real = s6.supervise(service)
    try:
        eventually(lambda: s6.run("s6-svok", service).returncode == 0)
        second = subprocess.run([sys.executable, str(ROOT / "tests/support/one_service.py"), str(service)],
                                env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=30)
        assert second.returncode == 100
        assert "another process supervises here" in second.stderr
    finally:
        real.kill()
        real.wait()
        end_services(service)


def svstat(s6: S6, service: Path) -> str:
    """What s6-svstat says, without the numbers that pass."""
    said = s6.run("s6-svstat", service)
    assert not said.stderr
    words = said.stdout.split()
    return " ".join("N" if word.strip("),").isdigit() and words[at - 1] not in ("(exitcode",) else word
                    for at, word in enumerate(words))


def test_svstat_says_of_our_service_what_it_says_of_its_own(s6: S6, supervise: Callable[..., Ours]) -> None:
    both = [make_service(s6.place / name, READY_AFTER, notification_fd="3\n", finish="#!/bin/sh\nexec sleep 0.5\n")
            for name in ("theirs", "ours")]
    for service in both:
        (service / "down").touch()
    real = s6.supervise(both[0])
    supervise(both[1])
    try:
        for service in both:
            eventually(lambda s=service: (s / "supervise/status").exists() and supervised(s))
        listeners = [etcdinit.Listener(f"{service}/event") for service in both]
        seen, expected = [b"", b""], b""
        for commands, events in ((b"u", b"uU"), (b"p", b""), (b"c", b""), (b"o", b""), (b"u", b""), (b"t", b"dDuU"),
                                 (b"d", b"d"), (b"", b"D"), (b"U", b"uU"), (b"k", b"d"), (b"", b"DuU"), (b"Od", b"dD")):
            expected += events
            for service in both:
                command(service, commands)

            def happened(expected: bytes = expected) -> bool:
                for at in range(2):
                    seen[at] += listeners[at].read().replace(b"s", b"")
                return seen == [expected, expected]

            eventually(happened, what=f"{events!r} after {commands!r}: {seen}")
            eventually(lambda: svstat(s6, both[0]) == svstat(s6, both[1]),
                       what=f"after {commands!r}: {svstat(s6, both[0])!r}, ours {svstat(s6, both[1])!r}")
    finally:
        real.kill()
        real.wait()
        end_services(*both)


def test_svwait_and_svc_wait_for_our_services(s6: S6, supervise: Callable[..., Ours]) -> None:
    service = make_service(s6.place / "svc", READY_AFTER, notification_fd="3\n", down="")
    supervise(service)
    for wait, then, code in (("-D", b"", 0), ("-u", b"u", 0), ("-U", b"", 0), ("-d", b"d", 0), ("-D", b"", 0),
                             ("-U", b"u", 0), ("-r", b"r", 0), ("-U", b"", 0), ("-D", b"d", 0)):
        waiter = s6.start("s6-svwait", wait, "-t", "20000", service)
        if wait == "-r":
            eventually(lambda: list((service / "event").glob("ftrig1*")))
        command(service, then)
        assert waiter.communicate()[1] == ""
        assert waiter.returncode == code, wait
    assert s6.run("s6-svc", "-uwU", "-T", "20000", service).returncode == 0
    assert status(service).flags & etcdinit.READY
    assert s6.run("s6-svc", "-dwD", "-T", "20000", service).returncode == 0
    assert s6.run("s6-svwait", "-U", "-t", "300", service).returncode == 99
    listened = s6.run("s6-svlisten1", "-U", service, "s6-svc" if not s6.root else "/usr/bin/s6-svc", "-u", service)
    assert listened.returncode == 0, listened


def test_wait_then_up_never_misses_the_event(s6: S6, supervise: Callable[..., Ours], rounds: int = 8) -> None:
    """Whenever a listener subscribes, it learns it: first the status is written, then the event sent."""
    service = make_service(s6.place / "svc", "#!/bin/sh\necho >&3\nexec sleep 1000\n", notification_fd="3\n", down="")
    supervise(service)
    for _ in range(rounds):
        waiter = s6.start("s6-svwait", "-U", "-t", "20000", service)
        command(service, b"u")
        assert waiter.wait(30) == 0
        waiter = s6.start("s6-svwait", "-D", "-t", "20000", service)
        command(service, b"d")
        assert waiter.wait(30) == 0


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_wait_then_up_never_misses_the_event_in_500_rounds(s6: S6, supervise: Callable[..., Ours]) -> None:
    test_wait_then_up_never_misses_the_event(s6, supervise, 500)


def test_death_tally_is_read_by_svdt_and_permafailon(s6: S6, supervise: Callable[..., Ours]) -> None:
    service = make_service(s6.place / "svc", "#!/bin/sh\necho x >> starts\nexec kill -9 $$\n", max_death_tally="3\n")
    supervise(service)
    for number in range(2, 5):  # `u` ends the pause of a second
        eventually(lambda: status(service).pid == 0 and status(service).wstat == 9)
        command(service, b"u")
        eventually(lambda n=number: (service / "starts").read_text().count("x") >= n)
    command(service, b"O")
    eventually(lambda: not status(service).flags & etcdinit.WANTUP and not status(service).pid)
    tally = (service / "supervise/death_tally").read_bytes()
    assert len(tally) == 3 * 14
    assert [(code, number) for _, code, number in etcdinit.unpack_deaths(tally)] == [(137, 9)] * 3
    said = s6.run("s6-svdt", service)
    assert said.stdout.count("signal SIGKILL") == 3, said
    assert s6.run("s6-svdt", "-n", "1", service).stdout.count("\n") == 1
    failed = subprocess.run(s6.argv("s6-permafailon", "60", "3", "SIGKILL", "true"), cwd=service, timeout=20)
    assert failed.returncode == 125


# ---- events, readiness, timing, finish --------------------------------------------------------------------

def events_of(service: Path, commands: bytes, end: bytes, seconds: float = 20) -> bytes:
    """Subscribe, send commands, collect events until these are the last."""
    listener = etcdinit.Listener(f"{service}/event")
    seen = b""

    def ended() -> bool:
        nonlocal seen
        seen += listener.read().replace(b"s", b"")  # which may come a moment after the first status
        return seen.endswith(end)

    try:
        command(service, commands)
        eventually(ended, seconds, f"events up to {end!r}, so far {seen!r}")
        return seen
    finally:
        listener.close()


@pytest.mark.parametrize(("files", "commands", "events"), [
    ({}, b"u", b"u"),
    ({"run": READY_AFTER, "notification_fd": "3\n"}, b"u", b"uU"),
    ({"run": "#!/bin/sh\nexit 3\n"}, b"o", b"udD"),
    ({"run": "#!/bin/sh\nexit 3\n", "finish": "#!/bin/sh\nexit 0\n"}, b"o", b"udD"),
    ({"run": "#!/bin/sh\nexit 3\n", "finish": "#!/bin/sh\nexit 125\n"}, b"u", b"udOD"),
    ({"run": "#!/bin/sh\nexit 3\n", "finish": "not executable by any kernel\n"}, b"o", b"udD"),
    ({"run": "#!/bin/sh\nexit 3\n"}, b"u", b"udDudD"),
    ({"run": "#!/bin/sh\nprintf x >&3\nsleep 0.1; echo >&3; echo >&3; exit 1\n", "notification_fd": "3\n"},
     b"o", b"uUdD"),
    ({"run": "#!/bin/sh\nprintf 'no newline' >&3\nexit 1\n", "notification_fd": "3\n"}, b"o", b"udD"),
    ({"run": "#!/bin/sh\nexec 3>&-\nexec sleep 0.2\n", "notification_fd": "3\n"}, b"o", b"udD"),
    ({"run": SLEEPER, "notification_fd": "-3\n"}, b"u", b"u"),
    ({"run": SLEEPER, "notification_fd": "three\n"}, b"u", b"u"),
    ({"run": SLEEPER}, b"ux", b"u"),
    ({"run": SLEEPER}, b"uxd", b"udDx"),
    ({"run": SLEEPER}, b"x", b"x"),
])
def test_events_tell_the_life_of_a_service(tmp_path: Path, supervise: Callable[..., Ours], files: dict[str, str],
                                           commands: bytes, events: bytes) -> None:
    service = make_service(tmp_path / "svc", **{"run": SLEEPER, "down": "", **files})
    supervise(service)
    assert events_of(service, commands, events) == events


def test_listeners_that_are_gone_full_or_none_do_no_harm(tmp_path: Path, supervise: Callable[..., Ours]) -> None:
    service = make_service(tmp_path / "svc", down="")
    supervise(service)
    event = service / "event"
    assert stat.S_IMODE(event.stat().st_mode) == 0o3730
    listeners = [etcdinit.Listener(str(event)) for _ in range(50)]
    name = listeners[0].path.rsplit("/", 1)[1]
    stale, full = event / (name[:-6] + "stale0"), event / (name[:-6] + "full00")
    os.mkfifo(stale)
    os.mkfifo(full)
    writer = os.open(full, os.O_RDWR | os.O_NONBLOCK)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    (event / (name[:-6] + "plain0")).write_text("a file")
    (event / (name[:-6] + "link00")).symlink_to(tmp_path / "elsewhere")
    os.mkfifo(event / "ftrig1:odd")
    os.mkfifo(event / "other")
    command(service, b"u")
    for listener in listeners:
        eventually(lambda one=listener: one.read() == b"u")
        listener.close()
    assert {path.name[-6:] for path in event.iterdir()} == {"full00", "plain0", "link00", "g1:odd", "other"}
    assert (event / (name[:-6] + "plain0")).read_text() == "a file"
    os.close(writer)


def starts(service: Path) -> list[float]:
    path = service / "starts"
    return [float(line) for line in path.read_text().split()] if path.exists() else []


STAMP = "#!/bin/sh\ndate +%s.%N >> starts\n"


@pytest.mark.parametrize(("rest", "least", "most"), [
    ("exit 1\n", 1.0, 5.0),  # never ready: a second after its end
    ("echo >&3; exec sleep 1.1\n", 1.1, 1.1 + 0.8),  # ready for a second: at once
    ("echo >&3; exec sleep 0.3\n", 1.0, 5.0),  # ready for less: a second after it was ready
])
def test_a_service_is_restarted_by_the_rule_of_s6(tmp_path: Path, supervise: Callable[..., Ours], rest: str,
                                                  least: float, most: float) -> None:
    service = make_service(tmp_path / "svc", STAMP + rest, notification_fd="3\n")
    supervise(service)
    eventually(lambda: len(starts(service)) >= 3)
    a, b, c = starts(service)[:3]
    assert least <= b - a and least <= c - b
    assert min(b - a, c - b) < most


def test_up_ends_the_pause_and_a_missing_run_does_not_spin(tmp_path: Path, supervise: Callable[..., Ours]) -> None:
    service = make_service(tmp_path / "svc", None)
    supervise(service)
    command(service, b"u")
    time.sleep(0.2)
    assert status(service).flags & etcdinit.WANTUP and not status(service).pid
    assert "no such file" in (service / "supervise/note").read_text()
    (service / "run").write_text("exec sleep 1000\n")
    (service / "run").chmod(0o755)
    command(service, b"u")
    eventually(lambda: "no #! line" in (service / "supervise/note").read_text())
    (service / "run").write_text(SLEEPER)
    command(service, b"u")
    eventually(lambda: status(service).up)
    assert (service / "supervise/note").read_text() == ""


FINISH_ARGUMENTS = '#!/bin/sh\necho "$*" >> ends\n'


@pytest.mark.parametrize(("end", "arguments"), [("exit 0", "0 0"), ("exit 3", "3 0"), ("exit 255", "255 0"),
                                                ("kill -9 $$", "256 9"), ("kill -15 $$", "256 15")])
def test_finish_is_told_how_run_ended(tmp_path: Path, supervise: Callable[..., Ours], end: str, arguments: str) -> None:
    service = make_service(tmp_path / "svc", f"#!/bin/sh\necho $$ > pid\n{end}\n", finish=FINISH_ARGUMENTS, down="")
    supervise(service)
    assert events_of(service, b"o", b"D") == b"udD"
    assert (service / "ends").read_text() == f"{arguments} svc {(service / 'pid').read_text()}"


def test_finish_that_hangs_is_killed_and_one_that_runs_is_not_disturbed(
        tmp_path: Path, supervise: Callable[..., Ours]) -> None:
    service = make_service(tmp_path / "svc", "#!/bin/sh\nexit 1\n", down="", finish=SLEEPER, timeout_finish="300\n")
    supervise(service)
    assert events_of(service, b"o", b"D") == b"udD"
    (service / "timeout-finish").write_text("0\n")
    assert events_of(service, b"o", b"ud") == b"ud"
    command(service, b"tkud")  # no signal reaches finish; wanted up, then down again
    time.sleep(0.2)
    assert status(service).flags == etcdinit.FINISHING
    os.kill(status(service).pid, signal.SIGKILL)
    eventually(lambda: status(service).flags == etcdinit.READY)


@pytest.mark.parametrize("group", [False, True])
def test_a_service_that_ignores_its_signal_is_killed_after_timeout_kill(
        tmp_path: Path, supervise: Callable[..., Ours], group: bool) -> None:
    run = "#!/bin/sh\ntrap '' TERM USR1\nsleep 1000 &\necho $! > child\nwhile :; do wait; sleep 0.1; done\n"
    files = {"flag_timeout_killpg": ""} if group else {}
    service = make_service(tmp_path / "svc", run, timeout_kill="300\n", down_signal="USR1\n", down="", **files)
    supervise(service)
    assert events_of(service, b"u", b"u") == b"u"
    child = int(str(eventually(lambda: (service / "child").exists() and (service / "child").read_text())))
    command(service, b"r")  # asks, but arms no kill
    time.sleep(0.6)
    assert status(service).up
    assert events_of(service, b"d", b"dD") == b"dD"
    assert status(service).wstat == 9
    if group:
        eventually(lambda: not alive(child))
    else:
        assert alive(child)
        os.kill(child, signal.SIGKILL)


def test_what_children_inherit_is_clean(tmp_path: Path, supervise: Callable[..., Ours]) -> None:
    show = ("#!/bin/sh\nls -l /proc/self/fd > fds\ncat /proc/self/status > status\n"
            "ps -o pid=,sid=,pgid= -p $$ > ids\numask > umask\n")
    service = make_service(tmp_path / "svc", show + "exec sleep 1000\n", notification_fd="5\n", lock_fd="7\n", down="")
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGHUP})
    leaked = os.open("/etc/passwd", os.O_RDONLY)
    try:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        ours = Ours(service)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)
        os.close(leaked)
    try:
        command(service, b"u")
        eventually(lambda: (service / "umask").exists() and (service / "umask").read_text())
        proc = dict(line.split(":\t", 1) for line in (service / "status").read_text().splitlines() if ":\t" in line)
        assert int(proc["SigBlk"], 16) == 0
        assert int(proc["SigIgn"], 16) & 0x7FFFFFFF == 0
        fds = {line.split()[8] for line in (service / "fds").read_text().splitlines()[1:]}
        assert fds == {"0", "1", "2", "3", "5", "7"}  # 3 is the directory that ls reads
        assert len(set((service / "ids").read_text().split())) == 1
        assert "service-lock" in (service / "fds").read_text()
    finally:
        ours.close()


def test_lock_fd_keeps_a_second_instance_waiting(tmp_path: Path, supervise: Callable[..., Ours]) -> None:
    service = make_service(tmp_path / "svc", "#!/bin/sh\necho $$ >> starts\nexec sleep 1000\n", lock_fd="3\n")
    first = supervise(service)
    eventually(lambda: (service / "starts").exists() and (service / "starts").read_text())
    orphan = int((service / "starts").read_text())
    first.process.kill()
    first.process.wait()
    supervise(service)
    eventually(lambda: status(service).up and status(service).pid != orphan)
    time.sleep(0.3)
    assert (service / "starts").read_text() == f"{orphan}\n"
    os.kill(orphan, signal.SIGKILL)
    eventually(lambda: len((service / "starts").read_text().split()) == 2)


def test_down_files_are_made_and_removed_by_commands(tmp_path: Path, supervise: Callable[..., Ours]) -> None:
    service = make_service(tmp_path / "svc")
    supervise(service)
    for commands, there in ((b"Q", True), (b"U", False), (b"D", True), (b"U", False)):
        command(service, commands)
        eventually(lambda want=there: (service / "down").exists() is want)


def test_garbage_and_floods_in_the_control_fifo_are_survived(tmp_path: Path, supervise: Callable[..., Ours]) -> None:
    service = make_service(tmp_path / "svc", down="")
    supervise(service)
    stays = os.open(service / "supervise/control", os.O_WRONLY)  # a writer that never leaves
    harmless = bytes(byte for byte in range(256) if chr(byte) not in "oOuUdDQx")
    for _ in range(20):
        os.write(stays, (harmless * 17)[:4096])
    os.write(stays, b"u" * 4000 + b"duud"[:2] + b"Uo" + b"u")
    eventually(lambda: status(service).up and status(service).flags & etcdinit.WANTUP)
    os.close(stays)


@pytest.mark.parametrize("name", ["notification-fd", "timeout-kill", "timeout-finish", "down-signal",
                                  "max-death-tally", "lock-fd"])
def test_odd_files_in_a_service_directory_are_survived(tmp_path: Path, supervise: Callable[..., Ours],
                                                       name: str) -> None:
    short = {"run": "#!/bin/sh\nexit 1\n", "finish": "#!/bin/sh\nexit 0\n"}
    directories = []
    for number, text in enumerate(["", "\n", "9" * 20, "-1\n", "0x10\n", "1" * 10000, "\0\xff\n", "\u0663\n"]):
        directories.append(make_service(tmp_path / f"text{number}", **short))
        (directories[-1] / name).write_bytes(text.encode("latin-1", "replace"))
    for kind in ("fifo", "directory", "loop", "device"):
        directories.append(make_service(tmp_path / kind, **short))
        path = directories[-1] / name
        {"fifo": os.mkfifo, "directory": os.mkdir, "loop": lambda p: os.symlink(p, p),
         "device": lambda p: os.symlink("/dev/zero", p)}[kind](path)
    supervise(*directories)
    for directory in directories:
        eventually(lambda d=directory: status(d).wstat == 256 and not status(d).pid, what=str(directory))
        command(directory, b"d")
