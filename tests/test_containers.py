"""The supervisor in real containers: podman and runc on a real Alpine, the static executable as process 1."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import eventually
from support.podman import LIMITS, Podman

EVERYBODY = "12345:0"  # a user that no passwd file knows, in the group of OpenShift


@pytest.fixture(scope="module")
def image(podman: Podman, alpine: Path, executable: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Alpine, the executable, and hooks that tell that they ran."""
    tree = tmp_path_factory.mktemp("image") / "tree"
    shutil.copytree(alpine, tree, symlinks=True)
    shutil.copy(executable, tree / "sbin/etcdinit")
    (tree / "init").symlink_to("sbin/etcdinit")
    (tree / "usr/bin/with-contenv").symlink_to("/sbin/etcdinit")
    for name in ("cont-init.d", "cont-finish.d"):
        script = tree / f"etc/{name}/tell"
        script.parent.mkdir()
        script.write_text(f"#!/bin/sh\necho {name}\n")
        script.chmod(0o755)
    (tree / "etc/services.d").mkdir()
    return podman.image("etcdinit-supervise", tree)


class Box:
    """A container with services of its own."""

    def __init__(self, podman: Podman, image: str, place: Path) -> None:
        self.podman, self.image, self.place = podman, image, place
        self.name = f"box-{place.name}"
        self.services = place / "services"
        self.services.mkdir()

    def service(self, name: str, run: str = "exec sleep 1000", **files: str) -> None:
        """Define a service; `_` in a file's name stands for `-`, service_toml for service.toml."""
        for key, text in {"run": run, **files}.items():
            path = self.services / name / ("service.toml" if key == "service_toml" else key.replace("_", "-"))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"#!/bin/sh\n{text}\n" if key in ("run", "finish") else text)
            path.chmod(0o755)

    def argv(self, *flags: str) -> list[str]:
        return [*LIMITS, "--network=none", "-v", f"{self.services}:/etc/services.d:ro", *flags]

    def run(self, *command: str, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """`podman run --rm`, /init as its entry point."""
        return self.podman.run("--network=none", "-v", f"{self.services}:/etc/services.d:ro", *flags,
                               "--entrypoint=/init", self.image, *command, seconds=100)

    def start(self, *command: str, flags: tuple[str, ...] = ()) -> None:
        """`podman run -d`."""
        done = self.podman.podman("run", "--detach", "--name", self.name, *self.argv(*flags), "--entrypoint=/init",
                                  self.image, *command)
        assert done.returncode == 0, done.stderr

    def exec(self, *command: str) -> subprocess.CompletedProcess[str]:
        return self.podman.podman("exec", self.name, *command)

    def up(self, *names: str) -> None:
        eventually(lambda: self.exec("etcdinit", "wait", *names, "--timeout", "20s").returncode == 0, 60)

    def stop(self) -> tuple[float, int, str]:
        """`podman stop`: how long it took, the exit code, all that was said."""
        begin = time.monotonic()
        done = self.podman.podman("stop", "--time", "30", self.name)
        took = time.monotonic() - begin
        assert done.returncode == 0, done.stderr
        code = self.podman.podman("inspect", "--format", "{{.State.ExitCode}}", self.name).stdout
        logs = self.podman.podman("logs", self.name)
        return took, int(code), logs.stdout + logs.stderr

    def close(self) -> None:
        self.podman.podman("rm", "--force", "--time", "0", self.name)


@pytest.fixture
def box(podman: Podman, image: str, public_place: Path) -> Iterator[Box]:
    made = Box(podman, image, public_place)
    yield made
    made.close()


def test_the_exit_code_of_a_container(box: Box) -> None:
    expected = {("sh", "-c", "exit 0"): 0, ("sh", "-c", "exit 3"): 3, ("sh", "-c", "exit 255"): 255,
                ("sh", "-c", "kill -9 $$"): 137, ("sh", "-c", "kill -15 $$"): 143, ("no-such-program",): 127,
                ("/etc/passwd",): 126, ("etcdinit", "shutdown", "44"): 44}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda command: box.run(*command).returncode, expected))
    assert dict(zip(expected, found, strict=True)) == expected


def test_a_container_lives_and_ends_in_order(box: Box) -> None:
    """Hooks, services when those before them are ready, and back; as soon as all are gone it is gone."""
    life = "trap 'echo {0} ends; exit' TERM; echo {0} begins; {1}\nwhile :; do sleep 0.1; done"
    box.service("db", life.format("db", "sleep 0.3; echo >&3"), notification_fd="3\n")
    box.service("web", life.format("web", ""), service_toml='after = ["db"]\n')
    box.service("web/log", 'while read -r line; do echo "logged: $line"; done')
    box.start()
    box.up("web")
    known = {row["name"]: row for row in json.loads(box.exec("etcdinit", "status", "--json").stdout)}
    assert known["db"]["ready"] and known["web"]["state"] == "up" and known["web/log"]["state"] == "up"
    took, code, said = box.stop()
    lines = [line for line in said.splitlines() if "etcdinit[" not in line]
    assert lines == ["cont-init.d", "db begins", "logged: web begins", "logged: web ends", "db ends", "cont-finish.d"]
    assert code == 0 and took < 20


@pytest.mark.parametrize("flags", [("--stop-signal=37",), ("--stop-signal=SIGRTMIN+3",), ("--stop-signal=SIGINT",)])
def test_stop_signals_of_engines(box: Box, flags: tuple[str, ...]) -> None:
    box.service("web")
    box.start(flags=flags)
    box.up("web")
    took, code, _ = box.stop()
    assert code == 0 and took < 20


def test_anybody_with_a_read_only_root(box: Box) -> None:
    box.service("web", 'echo "$(id -u):$(id -g)"; echo >&3; exec sleep 1000', notification_fd="3\n")
    state = box.place / "state"
    state.mkdir()
    state.chmod(0o777)
    box.start(flags=("--read-only", "--read-only-tmpfs=false", "-v", f"{state}:/run:noexec", f"--user={EVERYBODY}"))
    box.up("web")
    assert box.exec("etcdinit", "restart", "web", "--timeout", "20s").returncode == 0
    assert box.exec("etcdinit", "shutdown", "9").returncode == 0
    eventually(lambda: "9" in box.podman.podman("inspect", "--format", "{{.State.ExitCode}}", box.name).stdout)
    logs = box.podman.podman("logs", box.name)
    assert logs.stdout.splitlines().count(EVERYBODY) == 2
    assert "cont-finish.d" in logs.stdout


def test_without_a_writable_run_it_says_so(box: Box) -> None:
    done = box.run("true", flags=("--read-only", "--read-only-tmpfs=false", f"--user={EVERYBODY}"))
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if "cannot use /run/service for the state of services" in line
            and "mount a tmpfs there" in line]


def test_not_process_1_in_a_container(box: Box) -> None:
    """Under a shell, as under `docker run --init`: orphans come to it and end with it, the shell lives on."""
    box.service("web", "(setsid sh -c 'trap \"echo orphan ends; exit\" TERM; while :; do sleep 0.1; done' &)\n"
                       "echo started; exec sleep 1000")
    done = box.podman.run(*box.argv()[len(LIMITS):], "--entrypoint=/bin/sh", box.image, "-c",
                          "etcdinit init & pid=$!; sleep 2; kill $pid; wait $pid; echo code $?", seconds=100)
    assert "as a subreaper" in done.stderr, done
    assert done.stdout.splitlines()[-1] == "code 0"
    assert {"started", "orphan ends"} < set(done.stdout.splitlines())


def test_a_run_script_of_s6_overlay(box: Box) -> None:
    box.service("web")
    (box.services / "web/run").write_text('#!/usr/bin/with-contenv sh\necho "$GREETING $1"; exec sleep 1000\n')
    box.start(flags=("-e", "GREETING=hello"))
    box.up("web")
    eventually(lambda: "hello web\n" in box.podman.podman("logs", box.name).stdout)


def test_orphans_leave_no_zombies(box: Box) -> None:
    box.service("mother", "for i in $(seq 500); do (true &); done; echo >&3; exec sleep 1000", notification_fd="3\n")
    for number in range(5):
        box.service(f"flap{number}", "exit 0")
    box.start()
    box.up("mother")
    eventually(lambda: " Z" not in box.exec("sh", "-c", "cat /proc/[0-9]*/stat").stdout.replace(") Z", "  Z"))
    box.stop()


def test_a_container_that_is_started_again(box: Box) -> None:
    """`podman stop`, `podman start`: /run is of the container, not of its life."""
    box.service("web")
    box.start()
    box.up("web")
    assert box.exec("sh", "-c", "printf D > /run/service/web/supervise/control").returncode == 0
    box.stop()
    assert box.podman.podman("start", box.name).returncode == 0
    box.up("web")
    assert box.stop()[1] == 0


def test_a_shell_on_a_terminal(box: Box) -> None:
    box.service("web")
    here, there = pty.openpty()
    process = subprocess.Popen(["podman", *box.podman.storage, "--cgroup-manager=cgroupfs", "--runtime=runc", "run",
                                "--rm", "-it", *box.argv("-e", "PS1=$ "), "--entrypoint=/init", box.image, "sh", "-i"],
                               stdin=there, stdout=there, stderr=there, env=box.podman.environ, start_new_session=True)
    os.close(there)
    said = b""

    def until(text: str) -> None:
        nonlocal said
        deadline = time.monotonic() + 60
        while text.encode() not in said:
            assert time.monotonic() < deadline, f"no {text!r} in {said!r}"
            if select.select([here], [], [], 0.1)[0]:
                said += os.read(here, 4096)
        said = said.partition(text.encode())[2]

    try:
        until("$ ")
        os.write(here, b"tty; sleep 1000\n")
        until("/dev/pts/")
        time.sleep(0.5)
        os.write(here, b"\x1a")
        until("Stopped")
        os.write(here, b"fg\n")
        until("sleep 1000")
        time.sleep(0.5)
        os.write(here, b"\x03")
        os.write(here, b"echo code $?\n")
        until("code 130")
        os.write(here, b"exit 9\n")
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if select.select([here], [], [], 0.1)[0]:
                try:
                    os.read(here, 4096)
                except OSError:
                    break
        assert process.wait(60) == 9
    finally:
        process.kill()
        process.wait()
        os.close(here)
