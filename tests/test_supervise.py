"""What service.toml and odd surroundings make of services: policies, mistakes, want of everything, hostile files."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import eventually, need
from support.container import TOO_MANY_FILES, Container, patched_program

import etcdinit

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[Container]:
    box = Container(patched_program(tmp_path))
    yield box
    box.close()


def log_has(container: Container, text: str, seconds: float = 20) -> None:
    eventually(lambda: text in container.text("log"), seconds, f"{text!r} in the log")


# ---- service.toml -----------------------------------------------------------------------------------------

def test_stop_delay_waits_before_the_stop_signal(container: Container) -> None:
    note = "trap 'date +%s.%N > $PLACE/{}; exit' TERM; touch $PLACE/up-{}; while :; do sleep 0.02; done"
    container.service("slow", note.format("slow", "slow"), service_toml='stop_delay = "1.5s"\n')
    container.service("quick", note.format("quick", "quick"))
    container.start()
    eventually(lambda: (container.place / "up-slow").exists() and (container.place / "up-quick").exists())
    begin = time.time()
    container.stop()
    assert float(container.text("slow")) - begin >= 1.5 > float(container.text("quick")) - begin


def test_services_that_wait_for_none_or_each_other_are_told(container: Container) -> None:
    container.service("a", service_toml='after = ["b"]\n')
    container.service("b", service_toml='after = ["c"]\n')
    container.service("c", service_toml='after = ["a"]\n')
    container.service("d", service_toml='after = ["nobody"]\n')
    container.service("e", service_toml='after = ["e"]\n')
    container.service("well")
    container.start()
    container.up("well")
    log_has(container, "a waits for b: which waits for a: neither can start")
    log_has(container, "e waits for e: which waits for e: neither can start")
    log_has(container, "d waits for nobody: there is no such service")
    assert "waits for nobody" in container.verb("status", "d").stdout
    assert container.verb("start", "a", "--timeout", "20s").returncode == 0  # a command wins, and b, which waits for c,
    container.stop()  # is stopped with the others


def test_a_logger_has_a_policy_of_its_own(container: Container) -> None:
    container.service("web", "id -un; exec sleep 1000")
    container.service("web/log", 'read who; echo "$who to $(id -un)" > "$PLACE/work/seen"; exec cat',
                      service_toml='user = "daemon"\n')
    (container.place / "work").chmod(0o777)
    container.start()
    eventually(lambda: container.text("work/seen") == "root to daemon\n")


def test_a_long_healthy_life_ends_the_backoff(tmp_path: Path) -> None:
    """HEALTHY seconds up (here 2), and the next pause is the first again."""
    container = Container(patched_program(tmp_path, "etcdinit.HEALTHY = 2.0"))
    try:
        a_long_healthy_life(container)
    finally:
        container.close()


def a_long_healthy_life(container: Container) -> None:
    container.service("web", 'date +%s.%N >> "$PLACE/starts"; n=$(wc -l < "$PLACE/starts")\n'
                             '[ "$n" = 3 ] && exec sleep 2.3; exit 1', service_toml='backoff = "8s"\n')
    container.start()
    eventually(lambda: len(container.text("starts").split()) >= 5, 60)
    at = [float(line) for line in container.text("starts").split()]
    gaps = [b - a for a, b in zip(at, at[1:], strict=False)]
    assert gaps[0] >= 0.75 and gaps[1] >= 1.5
    assert 2.3 + 0.75 <= gaps[2] < 2.3 + 3.0, gaps  # the first pause again, not the third (4 s, at least 3)


def test_what_ends_while_all_ends_does_not_hurry_it(container: Container) -> None:
    container.environ["ETCDINIT_GRACE"] = "30s"
    container.service("first", "sleep 0.5; exit 3", service_toml="essential = true\n")
    container.service("second", 'while ! grep -q ending "$PLACE/log"; do sleep 0.05; done; exit 4',
                      service_toml="essential = true\n")
    container.start("sh", "-c", "trap 'sleep 1.5; exit 0' TERM; while :; do sleep 0.05; done")
    assert container.end() == 3
    assert "hurrying" not in container.text("log")


def test_processes_are_as_the_container_made_them(container: Container) -> None:
    container.service("web", 'echo "$(umask) $(nice) $(cat /proc/self/oom_score_adj) $(ulimit -Sn):$(ulimit -Hn)"'
                      ' > "$PLACE/seen"; exec sleep 1000')

    def unusual() -> None:
        os.umask(0o027)
        os.nice(3)
        Path("/proc/self/oom_score_adj").write_text("123")
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 300))

    container.start(preexec_fn=unusual)
    eventually(lambda: container.text("seen") == f"0027 {os.nice(0) + 3} 123 200:300\n")


def test_a_new_pid_namespace_where_it_is_allowed(container: Container) -> None:
    container.service("web", 'trap "exit 7" TERM; echo $$ > "$PLACE/pid"; while :; do sleep 0.05; done',
                      flag_newpidns="", finish='echo "$1 $2" > "$PLACE/end"')
    container.start()
    eventually(lambda: container.text("pid") == "1\n")
    assert container.verb("stop", "web", "--timeout", "20s").returncode == 0
    assert container.text("end") == "7 0\n"
    assert container.verb("start", "web", "--timeout", "20s").returncode == 0
    container.control("web", "k")
    eventually(lambda: container.text("end") == "256 9\n")


def test_what_keeps_a_script_from_running_is_told(container: Container) -> None:
    container.service("one", "#!/no/such/shell\n")
    container.service("two", "#!/bin/sh\n").joinpath("run").chmod(0o644)
    container.service("three", "exec sleep 1").joinpath("run").write_text("exec sleep 1\n")
    container.start()
    log_has(container, "cannot start one: no such file or directory (its first line names /no/such/shell)")
    log_has(container, "cannot start two: permission denied (it is not executable: chmod +x)")
    log_has(container, "cannot start three: exec format error (it has no #! line)")


def test_scripts_that_say_with_contenv_run(container: Container) -> None:
    """As in images of s6-overlay; the name is a link to etcdinit."""
    link = container.place / "with-contenv"
    link.symlink_to(container.program[-1])
    words = " ".join([*container.program[:-1], str(link)])
    container.write("etc/cont-init.d/1", "#!/bin/sh\nmkdir -p /run/s6/container_environment\n"
                    "printf 'from a hook\\n' > /run/s6/container_environment/GIVEN\n")
    container.environ["OWN"] = "of the container"
    container.service("web", f'[ -n "$GIVEN" ] || exec {words} sh "$0" again\n'
                             'grep SigIgn /proc/self/status > "$PLACE/ignored"\n'
                             'echo "$GIVEN, $OWN, $1" > "$PLACE/seen"; exec sleep 1000')
    container.start()
    eventually(lambda: container.text("seen") == "from a hook, of the container, again\n")
    assert int(container.text("ignored").split()[1], 16) & 0x7FFFFFFF == 0


# ---- lives after each other ---------------------------------------------------------------------------------

def test_a_container_that_is_started_again_begins_afresh(container: Container) -> None:
    """/run is often no tmpfs: down files, links and state of the life before must not count."""
    container.environ["ETCDINIT_RUN"] = str(container.place / "run")
    container.service("web")
    container.service("web/log", "exec cat")
    container.service("old")
    for life in range(2):
        container.start()
        container.up("web", *(["old"] if not life else []))
        if not life:
            container.control("web", "D")
            eventually(lambda: (container.place / "run/web/down").exists())
        container.verb("shutdown", "5")
        assert container.end() == 5
        if not life:
            assert (container.place / "run/web/supervise/status").exists()
            shutil.rmtree(container.place / "services/old")
    assert not (container.place / "run/old").exists()
    container.start("true")
    assert container.end() == 0  # 5 was the exit code of another life


def test_who_may_not_write_in_run_can_still_say_the_exit_code(program: list[str], public_place: Path) -> None:
    need(os.getuid() == 0, "root, to become another user")
    place = public_place
    (place / "services/web").mkdir(parents=True)
    (place / "services/web/run").write_text("#!/bin/sh\nexec sleep 1000\n")
    (place / "services/web/run").chmod(0o755)
    (place / "run").mkdir(mode=0o777)
    (place / "run").chmod(0o777)
    public = [shutil.copy(program[-1], place / Path(program[-1]).name)]
    if len(program) > 1:
        public = [str(shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin")), *program[1:-1], *public]
        if Path(public[-1]).suffix == ".pyc":  # of another Python, perhaps
            public[-1] = shutil.copy(ROOT / "etcdinit.py", place)
    user: dict[str, Any] = {"user": 12345, "group": 0, "extra_groups": []}
    environ = {"PATH": os.environ["PATH"], "ETCDINIT_RUN": f"{place}/run", "ETCDINIT_SERVICES": f"{place}/services"}
    process = subprocess.Popen([*public, "init"], env=environ, **user)
    try:
        eventually(lambda: subprocess.run([*public, "wait", "web"], env=environ, stderr=subprocess.DEVNULL,
                                          timeout=60, **user).returncode == 0)
        subprocess.run([*public, "shutdown", "44"], env=environ, check=True, timeout=60, **user)
        assert process.wait(30) == 44
    finally:
        process.kill()
        process.wait()


# ---- verbs --------------------------------------------------------------------------------------------------

def test_status_follows_and_tells_the_next_start(container: Container) -> None:
    container.service("web", "exit 3", service_toml='backoff = "1m"\n', finish="exit 0")
    container.service("off", down="")
    container.start()
    log_has(container, "web ended: exit code 3")
    follower = subprocess.Popen(["nsenter", "-t", str(container.pid()), "-m", "-p", *container.program, "status",
                                 "--json", "--follow", "off"], stdout=subprocess.PIPE, text=True,
                                env=container.environ)
    try:
        assert follower.stdout
        assert json.loads(follower.stdout.readline())["state"] == "down"
        assert container.verb("start", "off").returncode == 0
        assert json.loads(follower.stdout.readline())["state"] == "up"
        assert container.verb("stop", "off").returncode == 0
        while (last := json.loads(follower.stdout.readline()))["state"] == "up":
            pass
        assert last["last_exit"] == "SIGTERM"
    finally:
        follower.kill()
        follower.wait()
    known = json.loads(container.verb("status", "--json", "web").stdout)
    assert known["state"] == "down" and known["next_start"] > known["since"] and known["last_exit"] == "exit code 3"
    refused = container.verb("signal", "USR1", "off")
    assert refused.returncode == 1 and "cannot signal off: it is not up" in refused.stderr


@pytest.fixture
def small_cgroup() -> Iterator[tuple[Path, str]]:
    """A cgroup of 48 MB: its directory, and where a container sees it."""
    need(os.getuid() == 0, "root, for cgroups")
    for base, limit, seen in ((Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "/sys/fs/cgroup/memory"),
                              (Path("/sys/fs/cgroup"), "memory.max", "/sys/fs/cgroup")):
        group = base / f"etcdinit-test-{os.getpid()}"
        try:
            group.mkdir()
            (group / limit).write_text(str(48 << 20))
        except OSError:
            if group.exists():
                group.rmdir()
            continue
        yield group, seen
        eventually(lambda g=group: not (g / "cgroup.procs").read_text())
        group.rmdir()
        return
    need(False, "a cgroup with a memory controller")


def test_a_death_for_want_of_memory_is_named(container: Container, small_cgroup: tuple[Path, str]) -> None:
    group, seen = small_cgroup
    container.service("eater", f'exec {sys.executable} -c "x = bytearray(1 << 28); print(x[::4096])"')
    container.write("etc/cont-init.d/cgroup", f"#!/bin/sh\nmount --bind {group} {seen}\n")
    container.start(preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())))
    log_has(container, "eater ended: SIGKILL (killed by the kernel: out of memory)", 60)
    known = json.loads(container.verb("status", "--json", "eater").stdout)
    assert known["out_of_memory"] is True and known["last_exit"] == "SIGKILL"
    container.stop()
    container.close()


# ---- the terminal -------------------------------------------------------------------------------------------

class Terminal:
    """A person at a terminal: types, and reads until something is there."""

    def __init__(self) -> None:
        self.here, self.there = pty.openpty()
        self.said = b""

    def type(self, text: str) -> None:
        os.write(self.here, text.encode())

    def until(self, text: str) -> None:
        """Read until the text comes, and forget all up to it."""
        deadline = time.monotonic() + 30
        while text.encode() not in self.said:
            assert time.monotonic() < deadline, f"no {text!r} in {self.said!r}"
            if select.select([self.here], [], [], 0.1)[0]:
                self.said += os.read(self.here, 4096)
        self.said = self.said.partition(text.encode())[2]


def test_a_shell_on_a_terminal_has_job_control(container: Container) -> None:
    need(shutil.which("bash"), "bash")
    terminal = Terminal()
    container.environ.update(PS1="$ ", HISTFILE="", TERM="dumb")
    container.service("web", "while :; do echo noise >&2; sleep 0.2; done")
    with (container.place / "noise").open("wb") as noise:
        process = container.start("bash", "--norc", "--noprofile", "--noediting", "-i", stdin=terminal.there,
                                  stdout=terminal.there, stderr=noise, start_new_session=True,
                                  preexec_fn=lambda: __import__("fcntl").ioctl(0, 0x540E, 0))
    os.close(terminal.there)
    terminal.type("exec 2>&1; echo re\"\"ady; tty\n")
    terminal.until("ready\r\n")
    terminal.until("/dev/")
    terminal.type("sleep 1000\n")
    terminal.until("sleep 1000")
    time.sleep(0.5)
    terminal.type("\x1a")  # ^Z stops the job, not the shell
    terminal.until("Stopped")
    terminal.type("jobs; fg\n")
    terminal.until("Stopped")
    terminal.until("sleep 1000")
    time.sleep(0.3)
    terminal.type("\x03")  # ^C ends it
    terminal.type('echo "code $?"; (exit 5); echo no"" job: $(jobs | wc -l)\n')
    terminal.until("code 130")
    terminal.until("no job: 0")
    terminal.type("exit 23\n")
    assert process.wait(30) == 23
    os.close(terminal.here)


def test_without_standard_input_it_works(container: Container) -> None:
    container.service("web", 'cat; touch "$PLACE/end-of-file"; exec sleep 1000')
    container.start("sh", "-c", "cat; while ! [ -e $PLACE/end-of-file ]; do sleep 0.05; done; exit 3",
                    preexec_fn=lambda: os.close(0))
    assert container.end() == 3


# ---- want of everything -------------------------------------------------------------------------------------

def test_a_read_only_run_directory_is_survived(container: Container) -> None:
    container.service("web", 'echo $$ >> "$PLACE/starts"; exec sleep 1000')
    container.start()
    container.up("web")
    for options in (["--bind", "/run/service"], ["-o", "remount,bind,ro"]):
        assert container.enter("mount", *options, "/run/service").returncode == 0
    container.control("web", "t")
    eventually(lambda: container.text("starts").count("\n") == 2)
    log_has(container, "cannot write the status of web: read-only file system")
    assert container.enter("umount", "-l", "/run/service").returncode == 0
    pid = int(container.text("starts").split()[1])
    eventually(lambda: json.loads(container.verb("status", "--json", "web").stdout)["pid"] == pid)  # it catches up
    assert container.stop() < 20


def test_too_few_processes_are_survived(program: list[str], public_place: Path) -> None:
    """EAGAIN on fork: told, tried again a little later; commands are still obeyed."""
    need(os.getuid() == 0, "root, to become another user")
    place = public_place
    (place / "run").mkdir()
    (place / "run").chmod(0o777)
    for number in range(8):
        service = place / f"services/s{number}"
        service.mkdir(parents=True)
        (service / "run").write_text("#!/bin/sh\nexec sleep 1000\n")
        (service / "run").chmod(0o755)
    source = [str(shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin")), "-I", "-S",
              str(shutil.copy(ROOT / "etcdinit.py", place))] if len(program) > 1 else [
                  str(shutil.copy(program[0], place))]
    uid = 50_000 + os.getpid() % 10_000
    process = subprocess.Popen([*source, "init", "--services", f"{place}/services", "--run", f"{place}/run"], user=uid,
                               group=0, extra_groups=[], stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NPROC, (4, 100)))
    try:
        def up() -> int:
            found = [place / f"run/s{number}/supervise/status" for number in range(8)]
            return sum(etcdinit.Status.unpack(path.read_bytes()).up for path in found if path.exists())

        eventually(lambda: up() == 3)
        time.sleep(0.5)
        assert up() == 3 and process.poll() is None
        subprocess.run(["prlimit", "--pid", str(process.pid), "--nproc=100:100"], user=uid, group=0, extra_groups=[],
                       check=True, timeout=60)
        eventually(lambda: up() == 8, 30)
        process.terminate()
        _, told = process.communicate(timeout=30)
        assert "cannot start s7: resource temporarily unavailable" in told
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


def test_too_few_descriptors_for_pipes_and_policies_are_survived(container: Container) -> None:
    for number in range(30):
        container.service(f"s{number:02}", 'echo x >> "$PLACE/starts"; exec sleep 1000', service_toml="after = []\n")
        container.service(f"s{number:02}/log", "exec cat")
    container.start(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)))
    eventually(lambda: re.search(TOO_MANY_FILES, container.text("log")))
    assert "unexpected" not in container.text("log")
    container.service("s00", "exec sleep 1000")
    assert container.verb("status").returncode == 0
    assert container.stop() < 20


def test_want_of_memory_is_survived(container: Container) -> None:
    """Its address space cannot grow: what it cannot do is told, services go on, and commands are obeyed."""
    container.service("web", 'echo x >> "$PLACE/starts"; exec sleep 1000')
    container.start()
    container.up("web")
    pid = container.pid()
    size = int(next(line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines()
                    if line.startswith("VmSize:"))) << 10
    for number in range(60):
        container.service(f"many{number}", "exec sleep 1000", service_toml='env = {A = "' + "x" * 20000 + '"}\n')
    resource.prlimit(pid, resource.RLIMIT_AS, (size + (1 << 20), resource.RLIM_INFINITY))
    container.signal(signal.SIGHUP)
    time.sleep(1.0)
    assert container.process and container.process.poll() is None
    resource.prlimit(pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    container.control("web", "t")
    eventually(lambda: container.text("starts").count("x") >= 2)
    container.signal(signal.SIGHUP)
    container.up("many0", "many59")
    assert container.stop() < 20


JUMPING = """
real, count = time.time_ns, [0]
def jumping():
    count[0] += 1
    return real() + (count[0] % 3 - 1) * 3600 * 10**9
time.time_ns = jumping
time.time = lambda: jumping() / 1e9
"""


def test_a_wall_clock_that_jumps_by_hours_changes_nothing(tmp_path: Path) -> None:
    container = Container(patched_program(tmp_path, JUMPING))
    try:
        container.service("web", 'cut -d" " -f1 /proc/uptime >> "$PLACE/starts"; exit 1')
        container.service("stubborn", "trap '' TERM; while :; do sleep 0.1; done", timeout_kill="500\n")
        container.start()
        eventually(lambda: len(container.text("starts").split()) >= 5)
        at = [float(line) for line in container.text("starts").split()]
        assert all(1.0 <= b - a + 0.02 for a, b in zip(at, at[1:], strict=False)), at
        assert container.stop() < 15
    finally:
        container.close()


def test_an_exception_while_a_hook_runs_leaves_the_order_of_hooks(faulty: Container) -> None:
    for name in ("cont-init.d/1", "cont-init.d/2", "cont-finish.d/1", "cont-finish.d/2"):
        faulty.write(f"etc/{name}", '#!/bin/sh\necho "begin $0" >> "$PLACE/order"; sleep 1\n'
                                    'echo "end $0" >> "$PLACE/order"\n')
    faulty.start("true")
    for name in ("cont-init.d/1", "cont-init.d/2"):
        eventually(lambda n=name: f"begin /etc/{n}" in faulty.text("order"))
        (faulty.place / "fault").touch()
        faulty.signal(signal.SIGHUP)
        eventually(lambda: not (faulty.place / "fault").exists())
    assert faulty.end() == 0
    assert faulty.text("order").splitlines() == [
        f"{what} /etc/{name}" for name in ("cont-init.d/1", "cont-init.d/2", "cont-finish.d/1", "cont-finish.d/2")
        for what in ("begin", "end")]


# ---- hostile files ------------------------------------------------------------------------------------------

NAMES = ["run", "finish", "down", "notification-fd", "timeout-kill", "timeout-finish", "down-signal", "reload-signal",
         "max-death-tally", "lock-fd", "flag-newpidns", "flag-timeout-killpg", "service.toml", "log", "data", "env",
         "supervise", "event", "log/run", "supervise/control", "supervise/status", "supervise/lock", "-x", "a b\n"]
KINDS = ["text", "empty", "directory", "fifo", "loop", "dangling", "device", "socket", "unreadable", "huge", "binary"]


def put(path: Path, kind: str, text: bytes) -> None:
    """Make something of a kind at a path, if nothing is in the way."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "directory":
            path.mkdir()
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind in ("loop", "dangling", "device"):
            path.symlink_to({"loop": path.name, "dangling": "/nowhere/at/all", "device": "/dev/zero"}[kind])
        elif kind == "socket":
            os.mknod(path, 0o140600)
        else:
            path.write_bytes({"empty": b"", "huge": text * 5000, "binary": os.urandom(200)}.get(kind, text))
            path.chmod(0 if kind == "unreadable" else 0o755)
    except OSError:
        pass


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(KINDS), st.sampled_from(
    [b"#!/bin/sh\nexit 1\n", b"#!/bin/sh\nexec sleep 1000\n", b"3\n", b"-1", b"99999999999999999999\n", b"TERM\n",
     b"SIGRTMIN+31\n", b"\0\xff\xfe", b"essential = 1\n", b'after = ["s0", "s1"]\nuser = "nobody"\n', b"[[[[",
     b'limits = {nofile = -5}\nhealth = {command = "exit 1", interval = 0}\n', b'limits = {stack = "0:0"}\n'])),
    max_size=12), st.binary(max_size=64))
def test_no_service_directory_brings_the_supervisor_down(pieces: list[tuple[str, str, bytes]], commands: bytes) -> None:
    """Odd names, huge values, links, FIFOs where files should be; then any commands; a good service is not touched."""
    need(os.getuid() == 0, "root")
    place = Path(tempfile.mkdtemp(prefix="etcdinit-fuzz-"))
    try:
        good = place / "services/good"
        good.mkdir(parents=True)
        put(good / "run", "text", b"#!/bin/sh\nexec sleep 1000\n")
        for number, (name, kind, text) in enumerate(pieces):
            put(place / f"services/s{number % 3}" / name, kind, text)
        init = etcdinit.Init(str(place / "services"), str(place / "run"), "prefix", [], 0.3,
                             etcdinit.signal_actions(()))
        pid = os.fork()
        if not pid:
            code = 99
            try:
                quiet = os.open(place / "log", os.O_WRONLY | os.O_CREAT)
                for fd in (1, 2):
                    os.dup2(quiet, fd)
                os.setsid()
                init.prepare()
                init.run_directory = str(place / "run")
                code = init.run()
            finally:
                os._exit(code)
        status = place / "run/good/supervise/status"
        eventually(lambda: status.exists() and etcdinit.Status.unpack(status.read_bytes()).up)
        for number in range(3):
            try:
                fd = os.open(place / f"run/s{number}/supervise/control", os.O_WRONLY | os.O_NONBLOCK)
                os.write(fd, commands)
                os.close(fd)
            except OSError:
                pass
        os.kill(pid, signal.SIGHUP)
        time.sleep(0.1)
        assert etcdinit.Status.unpack(status.read_bytes()).up
        os.kill(pid, signal.SIGTERM)
        _, wstat = os.waitpid(pid, 0)
        said = (place / "log").read_text(errors="replace")
        assert "unexpected" not in said and "Traceback" not in said, said
        assert os.waitstatus_to_exitcode(wstat) < 99, said
    finally:
        for path in place.rglob("*"):
            if not path.is_symlink() and path.is_dir():
                path.chmod(0o755)
        shutil.rmtree(place, ignore_errors=True)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.one_of(st.binary(max_size=80), st.binary(min_size=35, max_size=35), st.binary(min_size=43, max_size=43)),
       st.one_of(st.binary(max_size=200), st.text(max_size=60).map(lambda text: f"next={text}\noom=yes\n".encode())),
       st.binary(max_size=100), st.binary(max_size=300))
def test_whatever_others_write_as_status_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, record: bytes,
                                                            note: bytes, tally: bytes, output: bytes) -> None:
    place = tmp_path_factory.mktemp("status")
    (place / "supervise").mkdir()
    os.mkfifo(place / "supervise/control")
    reader = os.open(place / "supervise/control", os.O_RDWR | os.O_NONBLOCK)
    for name, data in (("status", record), ("note", note), ("death_tally", tally), ("output", output)):
        (place / "supervise" / name).write_bytes(data)
    try:
        known = etcdinit.describe("x", str(place), lines=False)
        json.dumps(known)
        assert "\n" not in etcdinit.status_line(known)
    except etcdinit.Error as error:
        assert "\n" not in str(error)
    finally:
        os.close(reader)
        shutil.rmtree(place)
