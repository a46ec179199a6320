"""The life of a container: etcdinit as PID 1 of a PID namespace, and as a process among others."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import eventually, need
from support.container import TOO_MANY_FILES, Container, patched_program
from support.s6 import RELEASES, S6, s6_release

import etcdinit

ROOT = Path(__file__).resolve().parent.parent


# ---- CMD and the exit code --------------------------------------------------------------------------------

def test_the_exit_code_of_the_command_is_the_containers(program: list[str]) -> None:
    signals = [n for n in range(1, 32) if n not in (17, 18, 19, 20, 21, 22, 23, 28)]  # those that end a process
    ends = {f"exit {code}": code for code in (0, 1, 2, 32, 64, 127, 254, 255)}
    ends |= {f"ulimit -c 0; kill -{number} $$": 128 + number for number in signals}
    waiting = list(ends.items())
    while waiting:
        boxes = []
        for end, code in waiting[:8]:
            box = Container(program)
            box.start("sh", "-c", end)
            boxes.append((box, end, code))
        del waiting[:8]
        for box, end, code in boxes:
            found = box.end()
            box.close()
            assert found == code, end


@pytest.mark.parametrize(("command", "code", "told"), [
    ("no-such-program", 127, "cannot execute no-such-program: not found in PATH"),
    ("/no/such/program", 127, "cannot execute /no/such/program: no such file or directory"),
    ("/etc/passwd", 126, "cannot execute /etc/passwd: permission denied"),
])
def test_a_command_that_cannot_be_executed_is_told(container: Container, command: str, code: int, told: str) -> None:
    container.service("web")
    container.start(command)
    assert container.end() == code
    assert told in container.text("log")


def test_the_command_runs_in_the_working_directory_with_the_environment(container: Container) -> None:
    container.environ["GREETING"] = "hello"
    container.start("sh", "-c", 'pwd; echo "$GREETING $0 $1 $ETCDINIT_STATE"', "-g", "--help")
    assert container.end() == 0
    assert f"{container.place}/work\nhello -g --help \n" in container.text("log")


def test_without_a_command_services_run_until_somebody_ends_the_container(container: Container) -> None:
    container.service("web")
    process = container.start()
    container.up("web")
    assert process.poll() is None
    assert container.stop() < 5
    assert process.returncode == 0


def test_called_as_init_all_words_are_the_command(container: Container, tmp_path: Path) -> None:
    link = tmp_path / "init"
    link.symlink_to(container.program[-1])
    container.program[-1] = str(link)
    container.start("sh", "-c", "exit 4", verb=())
    assert container.end() == 4


def test_shutdown_and_the_result_file_set_the_exit_code(container: Container) -> None:
    container.service("web")
    container.start()
    container.up("web")
    container.verb("shutdown", "43")  # which may end with all the others
    assert container.end() == 43


def test_a_finish_script_written_for_s6_overlay_sets_the_exit_code(container: Container) -> None:
    container.service("web", "exit 3", finish='echo "$1" > /run/s6-linux-init-container-results/exitcode\n'
                                              "printf t > /run/service/.s6-svscan/control")
    container.start("sleep", "1000")
    assert container.end() == 3


def test_svscan_finish_is_the_last_word(container: Container) -> None:
    container.write("services/.s6-svscan/finish", '#!/bin/sh\necho "last: $1 $2 $ETCDINIT_EXITCODE $$"\nexit 42\n')
    container.start("sh", "-c", "exit 5")
    assert container.end() == 42
    assert "last: the command ended: exit code 5 5 5 1\n" in container.text("log")


# ---- hooks ------------------------------------------------------------------------------------------------

def test_hooks_run_in_order_around_services_and_command(container: Container) -> None:
    note = '#!/bin/sh\necho "$(basename $0)" >> "$PLACE/order"\n'
    for name in ("cont-init.d/10-b", "cont-init.d/02-a", "cont-finish.d/z", "cont-finish.d/a"):
        container.write(f"etc/{name}", note)
    container.write("etc/cont-init.d/05-not-executable", note).chmod(0o644)
    container.service("web", 'echo run >> "$PLACE/order"; exec sleep 1000', finish='echo finish >> "$PLACE/order"')
    container.start("sh", "-c", 'while ! grep -q run "$PLACE/order"; do sleep 0.05; done; echo cmd >> "$PLACE/order"')
    assert container.end() == 0
    assert container.text("order").split() == ["02-a", "10-b", "run", "cmd", "finish", "a", "z"]
    assert "05-not-executable is not executable" in container.text("log")


@pytest.mark.parametrize(("behaviour", "code"), [("0", 0), ("1", 0), ("2", 9)])
def test_a_failed_hook_ends_the_container_only_if_asked(container: Container, behaviour: str, code: int) -> None:
    container.environ["S6_BEHAVIOUR_IF_STAGE2_FAILS"] = behaviour
    container.write("etc/cont-init.d/1", "#!/bin/sh\nexit 9\n")
    container.write("etc/cont-init.d/2", '#!/bin/sh\ntouch "$PLACE/second"\n')
    container.start("true")
    assert container.end() == code
    assert (container.place / "second").exists() is (behaviour != "2")


# ---- signals and the shutdown -----------------------------------------------------------------------------

@pytest.mark.parametrize("number", [15, 2, 3, 10, 12, 30, 37])
def test_every_signal_that_container_engines_send_ends_it(container: Container, number: int) -> None:
    container.service("web")
    container.start()
    container.up("web")
    container.signal(number)
    assert container.end() == 0


def test_signals_can_be_mapped_forwarded_and_handled_by_scripts(container: Container) -> None:
    container.environ["ETCDINIT_SIGNALS"] = "USR1=HUP,HUP=ignore"
    container.write("services/.s6-svscan/SIGUSR2", '#!/bin/sh\necho script >> "$PLACE/got"\n')
    container.start("sh", "-c", 'for s in HUP WINCH USR1; do trap "echo $s >> $PLACE/got" $s; done\n'
                    'echo ready >> $PLACE/got; while :; do sleep 0.05; done')
    eventually(lambda: "ready" in container.text("got"))
    for number, expected in ((10, "HUP"), (28, "WINCH"), (12, "script")):
        container.signal(number)
        eventually(lambda e=expected: container.text("got").split()[-1] == e, what=expected)
    container.signal(1)
    container.signal(15)
    assert container.end() == 143
    assert container.text("got").split() == ["ready", "HUP", "WINCH", "script"]


def test_the_end_comes_at_once_when_everybody_is_gone(container: Container) -> None:
    for number in range(5):
        container.service(f"s{number}")
    container.environ["ETCDINIT_GRACE"] = "30s"
    container.start()
    container.up("s0", "s4")
    assert container.stop() < 15  # and not after the grace


def test_stubborn_stopped_and_detached_processes_are_ended_too(container: Container) -> None:
    container.environ["ETCDINIT_GRACE"] = "2s"
    container.service("stubborn", "trap '' TERM HUP INT; while :; do sleep 1; done")
    container.service("stopped", 'kill -STOP $$; exec sleep 1000', finish='echo "$2" > "$PLACE/stopped"')
    container.service("daemon", 'setsid sh -c \'trap "echo term > $PLACE/daemon; exit" TERM; echo $$ > $PLACE/pid;'
                                ' while :; do sleep 0.05; done\' & exec sleep 1000')
    container.start()
    eventually(lambda: container.text("pid"))
    container.up("stubborn", "stopped")
    assert container.stop() < 20
    assert container.text("stopped") == "15\n"
    assert container.text("daemon") == "term\n"
    assert "stubborn does not stop; killing it" in container.text("log")


def test_a_second_signal_hurries(container: Container) -> None:
    container.environ["ETCDINIT_GRACE"] = "100s"
    container.service("stubborn", "trap '' TERM; while :; do sleep 1; done")
    container.start()
    container.up("stubborn")
    container.signal(15)
    eventually(lambda: "ending: SIGTERM" in container.text("log"))
    container.signal(15)
    container.end(30)
    assert "hurrying: SIGTERM" in container.text("log")


@pytest.mark.parametrize("phase", ["hook", "start", "finish-script", "finish-hook", "restart-pause", "not-ready"])
def test_a_signal_is_obeyed_in_every_phase(container: Container, phase: str) -> None:
    container.environ["ETCDINIT_GRACE"] = "3s"
    mark = 'touch "$PLACE/there"\n'
    if phase == "hook":
        container.write("etc/cont-init.d/slow", f"#!/bin/sh\n{mark}exec sleep 1000\n")
    elif phase == "start":
        for number in range(30):
            container.service(f"s{number}", f"{mark}exec sleep 1000")
    elif phase == "finish-script":
        container.service("web", "exit 1", finish=f"{mark}exec sleep 1000", timeout_finish="0\n")
    elif phase == "finish-hook":
        container.write("etc/cont-finish.d/slow", f"#!/bin/sh\n{mark}exec sleep 1000\n")
    elif phase == "restart-pause":
        container.service("web", f"{mark}exit 1")
    else:
        container.service("web", f"{mark}exec sleep 1000", notification_fd="3\n")
        container.service("later", service_toml='after = ["web"]\n')
    container.start(*(["true"] if phase == "finish-hook" else []))
    eventually(lambda: (container.place / "there").exists())
    container.signal(15)
    assert container.end() == 0


def test_a_million_steps_are_not_needed_to_lose_no_last_words(container: Container) -> None:
    """What a service writes while it is stopped still reaches its logger, which ends only after that."""
    container.service("web", 'trap "echo last words; exit 0" TERM; echo first; while :; do sleep 0.05; done')
    container.service("web/log", 'exec cat >> "$PLACE/lines"')
    container.start()
    eventually(lambda: "first" in container.text("lines"))
    container.stop()
    assert container.text("lines") == "first\nlast words\n"


# ---- duties of PID 1 --------------------------------------------------------------------------------------

def test_a_thousand_orphans_are_reaped_while_services_flap(container: Container) -> None:
    for number in range(10):
        container.service(f"flap{number}", "exit 0")
    container.service("mother", "for i in $(seq 1000); do (true &); done; touch $PLACE/done; exec sleep 1000")
    container.start()
    eventually(lambda: (container.place / "done").exists(), 60)
    stat = r"for f in /proc/[0-9]*/stat; do sed 's/.*) \(.\).*/\1/' $f; done 2>/dev/null"
    eventually(lambda: "Z" not in container.enter("sh", "-c", stat).stdout)


def cpu_and_wakeups(pid: int) -> tuple[int, int]:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    switches = re.search(r"^voluntary_ctxt_switches:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.M)
    assert switches
    return int(fields[11]) + int(fields[12]), int(switches[1])


def test_at_rest_it_sleeps_and_holds_no_heavy_module(container: Container) -> None:
    for number in range(10):
        container.service(f"s{number}", service_toml='env = {A = "b"}\n')
    container.start()
    container.up(*(f"s{number}" for number in range(10)))
    pid = container.pid()

    def slept() -> bool:
        before = cpu_and_wakeups(pid)
        time.sleep(1.0)
        return cpu_and_wakeups(pid) == before

    eventually(slept, what="no wake-up in a second")
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert "_ssl" not in maps and "_hashlib" not in maps and "_socket" not in maps


def test_modules_at_rest() -> None:
    """What PID 1 loads, for a directory with service.toml too: no parser, no network, no regular expressions."""
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import etcdinit, os, tempfile\n"
            "place = tempfile.mkdtemp(); os.makedirs(place + '/s/a')\n"
            "open(place + '/s/a/run', 'w').write('#!/bin/sh\\nexec sleep 100\\n')\n"
            "os.chmod(place + '/s/a/run', 0o755)\n"
            "open(place + '/s/a/service.toml', 'w').write('essential = true\\n')\n"
            "before = set(sys.modules)\n"
            "init = etcdinit.Init(place + '/s', place + '/r', 'json', ['true'], 2.0, etcdinit.signal_actions(()))\n"
            "init.is_first = True; init.prepare(); init.is_first = False\n"
            "assert init.run() == 0\n"
            "print(*sorted(set(sys.modules) - before))\n")
    said = subprocess.run([sys.executable, "-I", "-S", "-c", code, str(ROOT)], capture_output=True, text=True,
                          timeout=60)
    assert said.returncode == 0, said.stderr
    loaded = set(said.stdout.splitlines()[-1].split())
    assert loaded <= {"_signal", "_struct", "_heapq", "_json", "fcntl", "select", "marshal", "resource"}, loaded


def test_a_full_or_closed_stdout_stops_nobody(container: Container) -> None:
    container.service("chatty", 'touch "$PLACE/there"; exec yes')
    container.service("quiet", 'echo x >> "$PLACE/starts"; exit 1')
    read, write = os.pipe()
    container.start(stdout=write, stderr=write)
    os.close(write)
    eventually(lambda: container.text("starts").count("x") >= 3)  # nobody reads, the supervisor still does its work
    assert container.verb("status", "chatty").returncode == 0
    os.close(read)
    count = container.text("starts").count("x")
    eventually(lambda: container.text("starts").count("x") >= count + 2)
    assert container.stop() < 20


def test_what_comes_out_is_whole_lines_in_the_style_asked_for(container: Container) -> None:
    container.service("one", 'printf "be"; sleep 0.1; printf "gin\\nnext\\n"; printf "rest"; exec sleep 1000')
    container.service("two", "i=0; while [ $i -lt 300 ]; do echo two $i; i=$((i+1)); done; exec sleep 1000")
    for style in ("prefix", "json"):
        container.log.unlink(missing_ok=True)
        container.start(flags=["--log-format", style])
        eventually(lambda: "two 299" in container.text("log") and "next" in container.text("log"))
        container.stop()
        lines = container.text("log").splitlines()
        if style == "json":
            records = [json.loads(line) for line in lines]
            one = [record["message"] for record in records if record.get("service") == "one"]
            two = [record["message"] for record in records if record.get("service") == "two"]
        else:
            one = [line.removeprefix("[one] ") for line in lines if line.startswith("[one] ")]
            two = [line.removeprefix("[two] ") for line in lines if line.startswith("[two] ")]
        assert one[:2] == ["begin", "next"]
        assert two == [f"two {number}" for number in range(300)]


def test_children_are_clean_even_when_the_parent_is_not(container: Container) -> None:
    def dirty() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM, signal.SIGCHLD})
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)

    leaked = os.open("/etc/passwd", os.O_RDONLY)
    os.set_inheritable(leaked, True)
    container.service("web", 'cat /proc/self/status > "$PLACE/web"; ls /proc/self/fd > "$PLACE/fds"; exec sleep 1000')
    container.write("etc/cont-init.d/1", '#!/bin/sh\ncat /proc/self/status > "$PLACE/hook"\n')
    container.start("sh", "-c", 'cat /proc/self/status > "$PLACE/cmd"; while ! [ -s "$PLACE/fds" ]; do sleep 0.1; done',
                    preexec_fn=dirty, close_fds=False)
    os.close(leaked)
    assert container.end() == 0
    for name in ("web", "hook", "cmd"):
        fields = dict(line.split(":\t", 1) for line in container.text(name).splitlines() if ":\t" in line)
        assert int(fields["SigBlk"], 16) == 0, name
        assert int(fields["SigIgn"], 16) & 0x7FFFFFFF == 0, name
    assert container.text("fds").split() == ["0", "1", "2", "3"]  # 3 is the directory that ls reads


def test_the_command_owns_its_terminal(container: Container) -> None:
    container.service("web")
    here, there = pty.openpty()
    process = container.start("sh", "-c", "tty; ps -o tpgid=,pgid= -p $$; echo sid $(ps -o sid= -p $$);"
                              " trap 'echo interrupted; exit 6' INT; echo waiting; while :; do sleep 0.1; done",
                              stdin=there, stdout=there, stderr=there, start_new_session=True,
                              preexec_fn=lambda: __import__("fcntl").ioctl(0, 0x540E, 0))
    os.close(there)
    said = b""

    def read() -> bytes:
        nonlocal said
        while select.select([here], [], [], 0.1)[0]:
            try:
                said += os.read(here, 4096)
            except OSError:
                break
        return said

    eventually(lambda: b"waiting" in read(), what=said.decode())
    tpgid, pgid = re.findall(rb"^\s*(\d+)\s+(\d+)\s*$", said, re.M)[0]
    assert tpgid == pgid
    assert b"/dev/" in said and b"not a tty" not in said
    os.write(here, b"\x03")  # ^C goes to the command alone
    assert process.wait(20) == 6
    assert b"interrupted" in read()
    os.close(here)


# ---- where it must work -----------------------------------------------------------------------------------

def test_noexec_run_and_read_only_definitions_are_enough(container: Container) -> None:
    container.environ["RUN_OPTIONS"] = "mode=755,noexec,nosuid,nodev"
    container.service("web", 'echo "$(cat data/x) in $PWD"; exec sleep 1000', notification_fd="3\n")
    container.write("services/web/data/x", "payload")
    (container.place / "services/web/down").touch()
    container.service("ready", 'echo >&3; exec sleep 1000', notification_fd="3\n")
    container.start()
    container.up("ready")
    assert container.verb("wait", "ready", "--timeout", "20s").returncode == 0
    assert "down" in container.verb("status", "web").stdout
    assert container.verb("start", "web").returncode == 0
    eventually(lambda: "payload in /run/service/web" in container.text("log"))


def test_an_unwritable_run_directory_is_told_in_one_sentence(container: Container) -> None:
    container.environ["RUN_OPTIONS"] = "ro"
    container.start("true")
    assert container.end() == 1
    assert len(container.text("log").splitlines()) == 1
    assert "cannot use /run/service for the state of services: read-only file system (it must be writable" in \
        container.text("log")


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead but that nobody has reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def need_path(name: str) -> str:
    path = shutil.which(name, path="/usr/local/bin:/usr/bin:/bin")
    need(path, f"{name} for everybody")
    return str(path)


def test_as_any_user_and_not_as_process_1(program: list[str], public_place: Path) -> None:
    """Also without root: orphans come to it, its end is the end of all that came from it, and of nobody else."""
    need(os.getuid() == 0, "root, to become another user")
    tmp_path = public_place
    public = [shutil.copy(program[-1], tmp_path / "etcdinit")]  # where everybody may read it
    if len(program) > 1:
        public = [need_path("python3"), *program[1:-1], *public]
    service = tmp_path / "services/web"
    service.mkdir(parents=True)
    (service / "run").write_text(f"#!/bin/sh\n(setsid sleep 1234 &)\nid -u > {tmp_path}/uid\nexec sleep 1234\n")
    (service / "run").chmod(0o755)
    stranger = subprocess.Popen(["sleep", "1234"], user=12345, group=0)
    process = subprocess.Popen([*public, "init", "--run", str(tmp_path / "run"),
                                "--services", str(tmp_path / "services")], user=12345, group=0, extra_groups=[],
                               stderr=subprocess.PIPE, text=True)
    try:
        eventually(lambda: (tmp_path / "uid").exists() and (tmp_path / "uid").read_text() == "12345\n")
        orphans = eventually(lambda: [pid for pid in etcdinit.descendants(process.pid)
                                      if Path(f"/proc/{pid}/stat").read_text().split()[3] == str(process.pid)][1:])
        assert orphans
        process.terminate()
        _, told = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "not 1: reaping the orphans of services as a subreaper" in told
        assert not any(alive(pid) for pid in orphans)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()
        process.kill()


def test_without_proc_it_works(container: Container) -> None:
    container.service("web", 'touch "$PLACE/there"; exec sleep 1000')
    container.write("etc/cont-init.d/1", "#!/bin/sh\numount -l /proc\n")
    container.start("sh", "-c", 'while ! [ -e "$PLACE/there" ]; do sleep 0.1; done; exit 5')
    assert container.end() == 5


def test_too_few_descriptors_are_survived(container: Container) -> None:
    for number in range(20):
        container.service(f"s{number:02}", 'echo x >> "$PLACE/starts"; exec sleep 1000')
    container.start(preexec_fn=lambda: __import__("resource").setrlimit(7, (64, 64)))
    eventually(lambda: re.search(TOO_MANY_FILES, container.text("log")))
    eventually(lambda: container.text("starts"))
    assert container.verb("status", "s00").returncode == 0
    assert container.stop() < 20


def test_a_full_run_directory_is_survived(container: Container) -> None:
    container.environ["RUN_OPTIONS"] = "mode=755,size=256k"
    container.service("web", 'echo x >> "$PLACE/starts"; exec sleep 1000')
    container.start()
    container.up("web")
    container.enter("sh", "-c", "dd if=/dev/zero of=/run/fill bs=4k 2>/dev/null")
    assert container.verb("restart", "web").returncode == 0
    eventually(lambda: container.text("starts").count("x") == 2)
    eventually(lambda: "cannot write the status of web: no space left on device" in container.text("log"))
    container.enter("rm", "/run/fill")
    assert container.verb("restart", "web", "--timeout", "20s").returncode == 0


# ---- services come and go ---------------------------------------------------------------------------------

def test_rescan_starts_what_is_new_and_stops_what_has_vanished(container: Container) -> None:
    container.service("old", 'trap "echo bye >> $PLACE/old; exit" TERM; while :; do sleep 0.05; done')
    container.service("old/log", 'exec cat > "$PLACE/oldlog"')
    container.service("stays", 'echo $$ >> "$PLACE/stays"; exec sleep 1000')
    container.start()
    container.up("old", "stays")
    (container.place / "services/old").rename(container.place / "gone")
    container.service("new")
    container.service("x" * 251)
    container.service("y" * 252)
    container.service("odd name \n\udcff")
    (container.place / "services/dangling").symlink_to("nowhere")
    assert container.verb("rescan").returncode == 0
    container.up("new", "x" * 251, "odd name \n\udcff")
    eventually(lambda: "old" not in container.enter("ls", "/run/service").stdout.split())
    assert container.text("old") == "bye\n"
    assert len(container.text("stays").split()) == 1
    assert "the name is longer than 251 bytes" in container.text("log")
    (container.place / "gone").rename(container.place / "services/old")
    container.signal(1)  # HUP does the same
    container.up("old")
    container.stop()


def test_a_changed_definition_is_used_at_the_next_start(container: Container) -> None:
    container.service("web", "echo first >> $PLACE/got; exec sleep 1000")
    container.start()
    container.up("web")
    container.service("web", "echo second >> $PLACE/got; exec sleep 1000", finish="echo finish >> $PLACE/got")
    assert container.verb("restart", "web", "--timeout", "20s").returncode == 0
    eventually(lambda: container.text("got").split() == ["first", "finish", "second"])


def test_numbered_lines_survive_restarts_of_both_ends(container: Container) -> None:
    """The pipe between a service and its logger outlives both."""
    container.service("web", "exec 2>&1\n" + 'cd "$PLACE/work"; [ -e n ] || echo 0 > n\n'
                      "trap 'exit 0' TERM\ni=$(cat n)\nwhile :; do i=$((i+1)); echo line $i; echo $i > n; done")
    need(shutil.which("s6-log"), "s6-log (apt install s6): a logger that ends between two lines")
    container.service("web/log", 'exec s6-log -b n20 s10000000 "$PLACE/lines"')
    container.start()
    container.up("web", "web/log")
    for number in range(6):
        before = container.text("lines/current").count("\n")
        assert container.verb("restart" if number % 2 else "start", "web", "--timeout", "20s").returncode == 0
        container.up("web/log")
        assert container.verb("signal", "TERM", "web/log").returncode == 0
        eventually(lambda b=before: container.text("lines/current").count("\n") > b + 200)
    container.stop()
    lines = [int(line.split()[1]) for line in container.text("lines/current").splitlines()]
    missing = sorted(set(range(1, max(lines))) - set(lines))
    assert not missing, missing[:10]


# ---- service.toml -----------------------------------------------------------------------------------------

def test_after_starts_when_the_others_are_ready_and_stops_before_them(container: Container) -> None:
    log = 'echo "$(basename $PWD) $1" >> "$PLACE/order"\n'
    body = log.replace("$1", "start") + "trap '" + log.replace("$1", "stop").strip() + "; exit' TERM\n"
    wait = "while :; do sleep 0.05; done"
    container.service("db", body + "sleep 0.5; " + log.replace("$1", "ready") + "echo >&3\n" + wait,
                      notification_fd="3\n")
    container.service("app", body + "echo >&3\n" + wait, service_toml='after = ["db", "migrate"]\n',
                      notification_fd="3\n")
    container.service("migrate", log.replace("$1", "run"), service_toml='oneshot = true\nafter = ["db"]\n')
    container.service("web", body + wait, service_toml='after = ["app"]\n')
    container.start()
    eventually(lambda: "web start" in container.text("order"))
    container.stop()
    assert container.text("order").splitlines() == [
        "db start", "db ready", "migrate run", "app start", "web start", "web stop", "app stop", "db stop"]


def test_the_end_of_an_essential_service_ends_the_container_with_its_code(container: Container) -> None:
    container.service("web", "sleep 0.2; exit 17", service_toml="essential = true\n")
    container.start("sleep", "1000")
    assert container.end() == 17
    assert "ending: essential service web ended: exit code 17" in container.text("log")


def test_user_group_environment_directory_and_limits(container: Container) -> None:
    container.service("web", 'echo "$(id -u) $(id -g) $(id -G) $A $PWD $(ulimit -n) $(ulimit -Hc)" ; exec sleep 1000',
                      service_toml='user = "daemon"\nenv = {A = "x y"}\ncwd = "/etc"\n'
                                   "limits = {nofile = 64, core = 0}\n")
    container.service("numeric", 'echo "numeric $(id -u) $(id -g) $(id -G)"; exec sleep 1000',
                      service_toml='user = 4321\ngroup = "4322"\n')
    container.service("unknown", service_toml='user = "nobody-knows-him"\n')
    container.start()
    eventually(lambda: "1 1 1 x y /etc 64 0" in container.text("log"))
    eventually(lambda: "numeric 4321 4322 4322" in container.text("log"))
    eventually(lambda: "cannot start unknown" in container.text("log"))


def test_secrets_reach_only_who_needs_them(container: Container) -> None:
    container.environ["ETCD_PASSWORD"] = "s3cret"
    show = 'echo "$(basename $PWD)=$ETCD_PASSWORD" >> "$PLACE/seen"; exec sleep 1000'
    container.service("web", show)
    container.service("confd", show)
    container.service("other", show, service_toml="secrets = true\n")
    container.write("etc/cont-init.d/render", '#!/bin/sh\necho "hook=$ETCD_PASSWORD" >> "$PLACE/seen"\n')
    container.start("sh", "-c", 'echo "cmd=$ETCD_PASSWORD" >> "$PLACE/seen"; exec sleep 1000')
    eventually(lambda: container.text("seen").count("\n") == 5)
    assert sorted(container.text("seen").split()) == ["cmd=", "confd=s3cret", "hook=s3cret", "other=s3cret", "web="]


def test_a_mistake_in_service_toml_is_told_and_the_service_not_started(container: Container) -> None:
    container.service("web", 'touch "$PLACE/started"', service_toml="esential = true\n")
    container.start()
    eventually(lambda: "cannot start web: service.toml: there is no key esential" in container.text("log"))
    assert not (container.place / "started").exists()
    container.service("web", 'touch "$PLACE/started"; exec sleep 1000', service_toml="essential = true\n")
    assert container.verb("rescan").returncode == 0
    eventually(lambda: (container.place / "started").exists())


def test_backoff_grows_and_give_up_ends_it(container: Container) -> None:
    container.service("web", 'date +%s.%N >> "$PLACE/starts"; exit 1', notification_fd="3\n",
                      service_toml='backoff = "2s"\ngive_up = "4/1m"\n')
    container.start()
    eventually(lambda: "gave up web: 4 deaths" in container.text("log"), 30)
    times = [float(line) for line in container.text("starts").split()]
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    assert len(times) == 4
    assert gaps[0] >= 0.75 and gaps[1] >= 1.5 and gaps[2] >= 1.5
    assert "gave up" in container.verb("status", "web").stdout
    assert container.verb("start", "web").returncode == 0
    eventually(lambda: len(container.text("starts").split()) > 4)


def test_an_unhealthy_service_is_restarted(container: Container) -> None:
    container.service("web", 'echo x >> "$PLACE/starts"; exec sleep 1000',
                      service_toml='health = {command = "exit 1", interval = "0.2s", failures = 2}\n')
    container.service("hangs", 'echo x >> "$PLACE/hangs"; exec sleep 1000',
                      service_toml='health = {command = ["sleep", "100"], interval = "0.2s", timeout = "0.2s", '
                                   "failures = 2}\n")
    container.service("well", 'echo x >> "$PLACE/well"; exec sleep 1000',
                      service_toml='health = {command = ["true"], interval = "0.1s", failures = 1}\n')
    container.start()
    eventually(lambda: container.text("starts").count("x") >= 3)
    eventually(lambda: container.text("hangs").count("x") >= 2)
    assert container.text("well") == "x\n"
    assert "restarting web: 2 health checks failed (exit code 1)" in container.text("log")


# ---- it goes on when its own code fails ---------------------------------------------------------------------

@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[Container]:
    box = Container(patched_program(tmp_path))
    yield box
    box.close()


def test_an_exception_in_its_own_code_leaves_services_pipes_and_locks_as_they_are(faulty: Container) -> None:
    faulty.service("web", 'echo $$ >> "$PLACE/pids"; i=0; while :; do i=$((i+1)); echo line $i; sleep 0.01; done')
    faulty.service("web/log", 'echo $$ >> "$PLACE/pids"; exec cat >> "$PLACE/lines"')
    faulty.service("ready", 'echo $$ >> "$PLACE/pids"; sleep 3; echo >&3; exec sleep 1000', notification_fd="3\n")
    faulty.service("off", down="")
    faulty.start("sh", "-c", 'trap "exit 8" TERM; while :; do sleep 0.05; done')
    faulty.up("web", "web/log", "ready")
    eventually(lambda: len(faulty.text("pids").split()) == 3)
    before = faulty.verb("status", "--json").stdout
    (faulty.place / "fault").touch()
    faulty.signal(1)
    eventually(lambda: "went on in a fresh process image with 4 services" in faulty.text("log"))
    assert "unexpected RuntimeError" in faulty.text("log") and "Traceback" not in faulty.text("log")

    def essence(text: str) -> list[tuple[object, ...]]:
        return [(s["name"], s["state"], s["pid"], s["since"], s["wanted"]) for s in json.loads(text)]

    assert essence(faulty.verb("status", "--json").stdout) == essence(before)
    assert faulty.verb("wait", "ready", "--timeout", "20s").returncode == 0
    assert len(faulty.text("pids").split()) == 3
    assert faulty.verb("restart", "web", "--timeout", "20s").returncode == 0
    faulty.signal(15)
    assert faulty.end() == 8
    numbers = [int(line.split()[1]) for line in faulty.text("lines").splitlines()]
    first = numbers[:numbers.index(1, 1)]
    assert first == list(range(1, len(first) + 1))


def test_a_bug_that_stays_ends_in_the_crash_script(faulty: Container) -> None:
    faulty.environ["RECOVERIES"] = "5"
    faulty.write("services/.s6-svscan/crash", '#!/bin/sh\necho "crash: $1"\nexit 77\n')
    faulty.service("web")
    faulty.start()
    faulty.up("web")
    (faulty.place / "stays").touch()
    (faulty.place / "fault").touch()
    for number in range(6):
        faulty.signal(1)
        eventually(lambda n=number: faulty.text("log").count("unexpected RuntimeError") > n)
    assert faulty.end() == 77
    assert "crash: etcdinit failed 6 times within 60s: RuntimeError" in faulty.text("log")


# ---- verbs ------------------------------------------------------------------------------------------------

@pytest.fixture(params=list(RELEASES))
def s6(request: pytest.FixtureRequest) -> Iterator[S6]:
    tools = s6_release(request.param)
    yield tools
    tools.close()


def test_verbs_command_services_of_real_s6(program: list[str], s6: S6) -> None:
    service = s6.place / "svc"
    service.mkdir()
    (service / "run").write_text("#!/bin/sh\necho x >> starts\ntrap 'echo hup >> got' HUP\ntrap 'echo 44 >> got' 44\n"
                                 "echo >&3\nexec 3>&-\nwhile :; do sleep 0.05; done\n")
    (service / "run").chmod(0o755)
    (service / "notification-fd").write_text("3\n")
    (service / "down").touch()
    real = s6.supervise(service)

    def verb(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*program, *words], capture_output=True, text=True, timeout=60)

    try:
        eventually(lambda: verb("status", str(service)).returncode == 0)
        assert re.match(r"/\S+ +down \d+s", verb("status", str(service)).stdout)
        late = verb("wait", str(service), "--timeout", "0.2s")
        assert late.returncode == 99 and "not ready after 0.2s" in late.stderr
        assert verb("start", str(service), "--timeout", "20s").returncode == 0
        assert verb("wait", str(service)).returncode == 0
        known = json.loads(verb("status", "--json", str(service)).stdout)
        assert (known["state"], known["ready"], known["wanted"]) == ("up", True, "up")
        assert known["pid"] and known["since"][:11] == time.strftime("%Y-%m-%dT", time.gmtime())
        assert verb("reload", str(service)).returncode == 0
        eventually(lambda: (service / "got").exists() and "hup" in (service / "got").read_text())
        assert verb("signal", "44", str(service)).returncode == 0
        eventually(lambda: "44" in (service / "got").read_text())
        assert verb("restart", str(service), "--timeout", "20s").returncode == 0
        assert (service / "starts").read_text() == "x\nx\n"
        assert verb("stop", str(service), "--timeout", "20s").returncode == 0
        assert verb("wait", str(service), "--down").returncode == 0
        assert "SIGTERM" in verb("status", str(service)).stdout
        assert verb("once", str(service), "--timeout", "20s").returncode == 0
        assert verb("signal", "KILL", str(service)).returncode == 0
        assert verb("wait", str(service), "--finished", "--timeout", "20s").returncode == 0
        waiter = subprocess.Popen([*program, "wait", str(service)], stderr=subprocess.PIPE, text=True)
        eventually(lambda: list((service / "event").glob("ftrig1*")))
        real.terminate()
        assert waiter.wait(20) == 1
        assert waiter.stderr and "is no longer supervised" in waiter.stderr.read()
        gone = verb("status", str(service))
        assert gone.returncode == 1 and "is not supervised" in gone.stderr
    finally:
        real.kill()
        real.wait()


def test_wait_for_any_and_for_one_that_fails_for_good(container: Container) -> None:
    container.service("never", "exec sleep 1000", notification_fd="3\n")
    container.service("soon", "sleep 0.3; echo >&3; exec sleep 1000", notification_fd="3\n")
    container.service("fails", "sleep 0.5; exit 1", finish="exit 125", notification_fd="3\n")
    container.start()
    container.up("never")
    assert container.verb("wait", "never", "soon", "--any", "--timeout", "20s").returncode == 0
    failed = container.verb("start", "fails", "--timeout", "20s")
    assert failed.returncode == 1 and "fails will not be ready: it failed for good" in failed.stderr


def test_status_shows_why_and_the_last_lines(container: Container) -> None:
    container.service("web", 'for i in $(seq 150); do echo line $i; done; kill -9 $$')
    container.start()
    eventually(lambda: "web ended: SIGKILL" in container.text("log"))
    known = json.loads(eventually(lambda: container.verb("status", "--json", "web").stdout))
    assert known["last_exit"] == "SIGKILL" and known["deaths"] >= 1
    assert len(known["output"]) == 100 and known["output"][-1] == "line 150"
    assert "SIGKILL" in container.verb("status", "web").stdout


def test_svscanctl_of_real_s6_scans_and_ends_it(container: Container) -> None:
    need(Path("/usr/bin/s6-svscanctl").exists(), "s6-svscanctl (apt install s6)")
    container.service("web")
    container.start()
    container.up("web")
    container.service("new")
    assert container.enter("s6-svscanctl", "-a", "/run/service").returncode == 0
    container.up("new")
    assert container.enter("s6-svstat", "/run/service/new").stdout.startswith("up")
    container.enter("s6-svscanctl", "-t", "/run/service")  # which may end with all the others
    assert container.end() == 0
