"""Services bound to their configuration: `etcdinit init` with its renderer, a real etcd, and services that are told."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import eventually
from support.container import Container
from support.etcd_server import EtcdServer

DAEMON = """
import os, signal, sys
def load(*_):
    text = open(sys.argv[1]).read().strip()
    print("loaded", text, flush=True)
    if "crash" in text:
        os._exit(7)
    signal.setitimer(signal.ITIMER_REAL, 0.4 if "later" in text else 0)
    if len(sys.argv) > 2 and "unready" not in text:
        os.write(5, b"\\n")
        sys.argv.pop()
signal.signal(signal.SIGHUP, load)
load()
while True:
    signal.pause()
"""


class Bound(Container):
    """A container with conf.d, templates and a service `app` that reads app.conf at its start and at SIGHUP."""

    def __init__(self, program: list[str], etcd: EtcdServer) -> None:
        super().__init__(program)
        self.etcd = etcd
        self.conf = self.place / "work" / "app.conf"
        self.environ |= {"ETCD_ENDPOINTS": etcd.url, "ETCD_API": "3", "ETCDINIT_CONFDIR": str(self.place / "confd")}
        self.write("work/daemon.py", DAEMON)

    def daemon(self, name: str = "app", ready: bool = False, **files: str) -> None:
        """A service that runs the daemon on NAME.conf."""
        files |= {"notification_fd": "5\n"} if ready else {}
        place = self.place / "work"
        self.service(name, f"exec python3 -I -S {place}/daemon.py {place}/{name}.conf {'ready' * ready}", **files)

    def resource(self, name: str, template: str = "", **keys: Any) -> Path:
        """A resource NAME.toml for work/NAME, with its template; verify is short."""
        values = {"src": f"{name}.tmpl", "dest": str(self.place / "work" / name), "keys": ["/app"], "service": "app",
                  "reload": "signal HUP", "verify": "0.6s", **keys}
        self.write(f"confd/conf.d/{name}.toml", "[template]\n" + "".join(
            f"{key} = {json.dumps(value)}\n" for key, value in values.items() if value is not None))
        self.write(f"confd/templates/{name}.tmpl", template or '{{getv "/app/word"}}\n')
        return Path(values["dest"])

    def says(self, text: str, seconds: float = 30, times: int = 1) -> None:
        """Wait until the log has it so many times."""
        deadline = time.monotonic() + seconds
        while self.text("log").count(text) < times:
            assert time.monotonic() < deadline, f"not {text} in\n{self.text('log')[-4000:]}"
            time.sleep(0.02)

    def run(self, path: str) -> str:
        """A file below the container's /run, "" if there is none."""
        return self.enter("sh", "-c", f"cat /run/{path} 2>/dev/null || true").stdout

    def status(self, name: str = "app") -> dict[str, Any]:
        """What `status --json` says; with nothing in it before the service is supervised."""
        known: dict[str, Any] = json.loads(self.verb("status", "--json", name).stdout or "{}")
        return {"problem": "", "state": "", **known}

    def history(self, name: str = "app") -> list[dict[str, Any]]:
        """What is recorded of changes."""
        return [json.loads(line) for line in self.run(f"service/.confd/{name}/history").splitlines()]

    def results(self, name: str = "app") -> list[str]:
        return [row["result"] for row in self.history(name)]


@pytest.fixture
def box(program: list[str], etcd35: EtcdServer) -> Iterator[Bound]:
    made = Bound(program, etcd35)
    yield made
    made.close()


def started(box: Bound, **keys: Any) -> Path:
    """Start with one resource app.conf, and wait until the service runs on it."""
    box.daemon(**keys.pop("files", {}))
    dest = box.resource("app.conf", **keys)
    box.etcd.put("/app/word", "one")
    box.start()
    box.says("loaded one")
    eventually(lambda: box.results() == ["live"], what="the first files are live")
    time.sleep(1.0)  # it cannot tell readiness, so it gets no signal before
    return dest


# ---- a start that waits for files -------------------------------------------------------------------------

def test_a_service_starts_when_its_files_are_there(box: Bound) -> None:
    box.daemon()
    box.daemon("other")
    box.write("work/other.conf", "other")
    box.resource("app.conf", required=["/app/word"], template='{{getv "/app/word" "none"}}')
    box.start()
    box.says("loaded other")  # who has no resources does not wait
    box.says("required key /app/word does not exist")
    assert box.verb("wait", "app", "--up", "--timeout", "1s").returncode == 99
    assert box.verb("wait", "confd", "--timeout", "0.1s").returncode == 99
    box.etcd.put("/app/word", "one")
    box.says("loaded one")
    assert box.verb("wait", "app", "confd", "--timeout", "20s").returncode == 0
    assert box.status("confd")["ready"]


def test_a_start_by_hand_does_not_wait(box: Bound) -> None:
    box.daemon()
    box.write("work/app.conf", "by hand")
    box.resource("app.conf")
    box.start()
    box.says("key does not exist: /app/word")
    assert box.verb("start", "app").returncode == 0
    box.says("loaded by hand")


def test_those_that_come_after_confd_start_when_everything_is_rendered(box: Bound) -> None:
    box.daemon()
    box.service("last", 'echo "last: $(cat "$PLACE/work/app.conf")"; exec sleep 1000',
                service_toml='after = ["confd"]\n')
    box.resource("app.conf")
    box.start()
    box.says("key does not exist: /app/word")
    assert "last:" not in box.text("log")
    box.etcd.put("/app/word", "one")
    box.says("last: one")


def test_a_renderer_that_is_killed_starts_again(box: Bound) -> None:
    started(box)
    before = box.status("confd")["pid"]
    box.enter("kill", "-9", str(before))
    eventually(lambda: (box.status("confd")["pid"] or before) != before and box.status("confd")["ready"])
    box.etcd.put("/app/word", "two")
    box.says("loaded two")


# ---- one change, one transaction --------------------------------------------------------------------------

def test_a_change_is_one_reload_of_all_files_of_one_revision(box: Bound) -> None:
    other = box.resource("other.conf", template='{{getv "/app/word"}}{{getv "/app/more" ""}}')
    dest = started(box)
    assert other.read_text() == "one"
    box.etcd.put_many([("/app/word", "two"), ("/app/more", "!")])
    box.says("loaded two")
    assert (dest.read_text(), other.read_text()) == ("two\n", "two!")
    eventually(lambda: box.results() == ["live", "live"])
    assert box.text("log").count("loaded") == 2
    last = box.history()[-1]
    assert last["files"] == [str(dest), str(other)] and last["seconds"] < 20 and last["revision"] > 0


def test_one_failure_keeps_all_files_of_a_service(box: Bound) -> None:
    other = box.resource("other.conf", template='{{getv "/app/more" "x"}}',
                         check_cmd="! grep -q bad {{.src}}")
    dest = started(box)
    box.etcd.put_many([("/app/word", "two"), ("/app/more", "bad")])
    box.says("Config check failed")
    assert (dest.read_text(), other.read_text()) == ("one\n", "x")
    assert box.status()["state"] == "up" and "loaded two" not in box.text("log")
    eventually(lambda: box.results() == ["live", "refused"])
    box.etcd.put("/app/more", "good")
    box.says("loaded two")
    assert [str(path) for path in box.place.rglob(".*-*")] == []


@pytest.mark.parametrize(("word", "why", "reload"), [
    ("crash", "it ended: exit code 7", "signal HUP"), ("crash", "it ended: exit code 7", "restart"),
    ("later", "it ended: SIGALRM", "signal HUP"), ("refuse", "verify_cmd: exit status 1", "restart")])
def test_what_a_service_does_not_bear_is_taken_back(box: Bound, word: str, why: str, reload: str) -> None:
    secret = box.resource("secret.conf", template='{{getv "/app/word"}} {{getv "/app/secret" ""}}', secret=True)
    verify = "2s" if word == "refuse" else "5s"  # a slow machine may need seconds to start it anew
    dest = started(box, verify_cmd="! grep -q refuse {{.dest}}", reload=reload, verify=verify)
    dest.chmod(0o640)
    os.chown(dest, 12, 34)
    box.etcd.put_many([("/app/word", word), ("/app/secret", "hunter2")])
    box.says("took back the change of app")
    assert f"again: {why}" in box.text("log")
    box.says("app is on the files of revision")
    assert (dest.read_text(), secret.read_text()) == ("one\n", "one ")
    assert (dest.stat().st_mode & 0o777, dest.stat().st_uid, dest.stat().st_gid) == (0o640, 12, 34)
    assert box.status()["state"] == "up"
    log = box.text("log")
    assert "app: -one" in log and f"app: +{word}" in log and "hunter2" not in log  # the diff
    assert f"app said: loaded {word}" in log
    assert box.results()[-1] == "taken back"
    time.sleep(2.5)  # a look at files comes, and what is bad is not tried again
    assert box.text("log").count(f"loaded {word}\n") == log.count(f"loaded {word}\n")
    box.etcd.put("/app/word", "two")
    box.says("loaded two")
    eventually(lambda: box.results()[-1] == "live")


def test_a_service_that_does_not_get_ready_again_gets_its_old_files(box: Bound) -> None:
    box.daemon(ready=True)
    dest = box.resource("app.conf", reload="restart", reload_timeout="1s")
    box.etcd.put("/app/word", "one")
    box.start()
    box.up("app")
    assert box.verb("wait", "app", "--timeout", "20s").returncode == 0
    box.etcd.put("/app/word", "unready")
    box.says("it was not ready within 1s")
    eventually(lambda: dest.read_text() == "one\n" and box.status()["ready"])


def test_a_change_while_another_is_verified_is_live_at_once_and_the_newest_is_blamed_first(box: Bound) -> None:
    dest = started(box, verify="3s")
    box.etcd.put("/app/word", "two")
    box.says("loaded two")
    box.etcd.put("/app/word", "crash")
    box.says("took back the change of app")
    eventually(lambda: dest.read_text() == "two\n")  # not "one", though "two" was not proved yet
    eventually(lambda: box.results() == ["live", "taken back", "live"])


def test_many_changes_in_a_row_are_all_live_and_all_kept_for_a_while(box: Bound) -> None:
    dest = started(box, verify="2s")
    for number in range(20):
        box.etcd.put("/app/word", f"n{number}")
        box.says(f"loaded n{number}\n")
    eventually(lambda: "live" in box.results()[-1] and json.loads(box.run("service/.confd/app/state"))["phase"] == "")
    kept = box.enter("sh", "-c", "ls /run/service/.confd/app/undo").stdout.split()
    assert 1 <= len(kept) <= 8 and dest.read_text() == "n19\n"


def test_a_reload_stays_pending_until_the_service_is_there(box: Bound) -> None:
    box.resource("app.conf")
    box.etcd.put("/app/word", "one")
    box.start("sleep", "1000")
    box.says("cannot reload app: ")
    box.says("is not supervised")
    box.daemon()
    assert box.verb("rescan").returncode == 0
    box.says("loaded one")


def test_a_reload_command_is_repeated_until_it_succeeds(box: Bound) -> None:
    started(box, reload="command", reload_cmd=f"test -e {box.place}/ok && touch {box.place}/done")
    box.etcd.put("/app/word", "two")
    box.says("cannot reload app: exit status 1")
    pid = box.status("confd")["pid"]
    box.enter("kill", "-9", str(pid))
    eventually(lambda: (box.status("confd")["pid"] or pid) != pid and box.status("confd")["ready"])
    box.write("ok", "")
    eventually((box.place / "done").exists)
    eventually(lambda: box.results() == ["live", "live"])


def test_a_stopped_service_gets_its_files_and_is_not_started(box: Bound) -> None:
    dest = started(box)
    assert box.verb("stop", "app", "--timeout", "20s").returncode == 0
    box.etcd.put("/app/word", "two")
    eventually(lambda: dest.read_text() == "two\n")
    eventually(lambda: box.results() == ["live", "live"])
    assert box.status()["state"] == "down"
    assert box.verb("start", "app").returncode == 0
    box.says("loaded two")


def test_files_without_a_service_come_first_and_services_in_their_order(box: Bound) -> None:
    note = 'echo {{.dest}} >> "$PLACE/order"'
    box.daemon("app", service_toml='after = ["base"]\n')
    box.daemon("base")
    box.resource("app.conf", check_cmd=note)
    box.resource("base.conf", service="base", check_cmd=note)
    box.resource("plain.conf", service=None, reload=None, verify=None, check_cmd=f"sleep 0.3; {note}")
    box.etcd.put("/app/word", "one")
    box.start()
    box.says("loaded one", times=2)
    names = [Path(line).name for line in box.text("order").split()]
    assert names == ["plain.conf", "base.conf", "app.conf"]


def test_an_essential_service_can_be_restarted_by_its_configuration(box: Bound) -> None:
    started(box, reload="restart", files={"service_toml": "essential = true\n"})
    box.etcd.put("/app/word", "two")
    box.says("loaded two")
    eventually(lambda: box.results() == ["live", "live"])


# ---- what a person sees and does --------------------------------------------------------------------------

def test_status_tells_which_key_is_missing(box: Bound) -> None:
    box.daemon()
    box.resource("app.conf", required=["/app/port"], template='{{getv "/app/word" ""}}')
    box.etcd.put("/app/word", "one")
    box.start()
    eventually(lambda: "waits for configuration: " in box.verb("status", "app").stdout)
    assert "required key /app/port does not exist" in box.status()["problem"]
    assert "required key /app/port does not exist" in box.status("confd")["problem"]
    waited = box.verb("wait", "app", "--timeout", "0.1s")
    assert waited.returncode == 99 and "app (waits for configuration: " in waited.stderr
    box.etcd.put("/app/port", "80")
    box.says("loaded one")
    eventually(lambda: not box.status()["problem"] and not box.status("confd")["problem"])


@pytest.mark.parametrize(("name", "text", "told"), [
    ("confd/templates/app.conf.tmpl", "{{if}}", "missing value for if"),
    ("confd/templates/app.conf.tmpl", "{{getv 3}}", "expected string; found 3"),
    ("confd/conf.d/app.conf.toml", '[template]\nservice = "app"\nsrc = 3\n', "a file of conf.d has a mistake"),
    ("confd/conf.d/app.conf.toml", '[template]\nservice = "app"\n[[[\n', "a file of conf.d has a mistake"),
])
def test_a_start_with_a_broken_template_or_resource(box: Bound, name: str, text: str, told: str) -> None:
    box.daemon()
    box.resource("app.conf")
    good = box.text(name)
    box.write(name, text)
    box.etcd.put("/app/word", "one")
    box.start()
    eventually(lambda: told in (box.status("confd")["problem"] or ""), what=told)
    assert box.status()["problem"].startswith("waits for configuration")
    assert box.status()["state"] == "down" and box.verb("wait", "app", "--timeout", "0.1s").returncode == 99
    assert box.verb("render", "--once").returncode == 1
    box.write(name, good)
    box.says("loaded one")


@pytest.mark.parametrize("seconds", [0, pytest.param(20, marks=pytest.mark.long)])
def test_a_start_without_etcd(box: Bound, seconds: int) -> None:
    box.daemon()
    box.daemon("other")
    box.write("work/other.conf", "other")
    box.resource("app.conf")
    box.etcd.put("/app/word", "one")
    box.etcd.kill()
    try:
        began = time.monotonic()
        box.start()
        eventually(lambda: "waiting for etcd: " in (box.status()["problem"] or ""))
        box.says("loaded other")  # who has no resources runs
        other = box.status("other")["pid"]
        assert box.verb("render", "--once").returncode == 3
        while True:  # all the time it stays as it is, and tells why
            assert box.status()["problem"].startswith("waits for configuration: waiting for etcd: ")
            assert "waiting for etcd: " in box.status("confd")["problem"] and "waiting for etcd: " in box.text("log")
            assert "waits for configuration: waiting for etcd: " in box.verb("status", "app").stdout
            assert box.status()["state"] == "down" and not box.status("confd")["ready"]
            assert box.status("other")["state"] == "up" and box.status("other")["pid"] == other
            if time.monotonic() > began + seconds:
                break
            time.sleep(1)
    finally:
        box.etcd.start()
    box.says("loaded one")
    eventually(lambda: not box.status()["problem"] and box.status("confd")["ready"], what="all is well")
    assert box.status("other")["pid"] == other


def test_a_longest_outage_ends_the_container(box: Bound) -> None:
    box.environ |= {"ETCD_ENDPOINTS": "http://127.0.0.1:1", "ETCDINIT_MAX_OUTAGE": "1s"}
    box.daemon()
    box.resource("app.conf")
    box.start()
    assert box.end() == 3


def test_a_change_can_be_rolled_back_by_hand_and_released(box: Bound) -> None:
    dest = started(box)
    assert box.verb("rollback", "app").returncode == 1  # there is nothing before the first files
    box.etcd.put("/app/word", "two")
    box.says("loaded two")
    done = box.verb("rollback", "app")
    assert done.returncode == 0 and dest.read_text() == "one\n", done.stderr
    box.says("loaded one", times=2)
    eventually(lambda: box.status()["configuration"]["phase"] is None)
    known = box.status()["configuration"]
    assert known["revision"] < known["wanted"] and known["why"] == "etcdinit rollback"
    assert f"revision {known['revision']} (wanted {known['wanted']}: etcdinit rollback)" in box.verb("status").stdout
    assert box.verb("release", "app").returncode == 0
    box.says("loaded two", times=2)
    eventually(lambda: box.results() == ["live", "taken back", "live"] or box.results() == [
        "live", "live", "taken back", "live"])
    lines = box.verb("history", "app").stdout.splitlines()
    assert len(lines) == len(box.results()) and lines[-1].split()[1] == "app" and str(dest) in lines[-1]
    assert json.loads(box.verb("history", "--json").stdout)[-1]["result"] == "live"


def test_a_hold_keeps_the_files_until_it_is_released(box: Bound) -> None:
    dest = started(box)
    assert box.verb("hold", "app").returncode == 0
    eventually(lambda: box.status()["configuration"]["why"] == "held by etcdinit hold")
    box.etcd.put("/app/word", "two")
    pid = box.status("confd")["pid"]
    box.enter("kill", "-9", str(pid))
    eventually(lambda: (box.status("confd")["pid"] or pid) != pid and box.status("confd")["ready"])
    eventually(lambda: box.status()["configuration"]["wanted"] > box.status()["configuration"]["revision"])
    assert dest.read_text() == "one\n" and ", held" in box.verb("status", "app").stdout
    assert box.verb("release", "app").returncode == 0
    box.says("loaded two")
    assert box.verb("hold", "nobody").returncode == 1


# ---- variables from keys ------------------------------------------------------------------------------------

def test_keys_become_variables_of_a_service(box: Bound) -> None:
    box.environ |= {"FROM": "container", "STAY": "container"}
    box.service("app", 'echo "$FROM $STAY $TOKEN $TWO"; exec sleep 1000', service_toml='environment = "/env"\n')
    box.write("etc/cont-init.d/secrets", "#!/bin/sh\nmkdir -p /run/secrets\nprintf 'quiet\\n' > /run/secrets/TOKEN\n"
                                         "printf file > /run/secrets/FROM\nprintf x > /run/secrets/ETCD_CA_FILE\n")
    box.etcd.put_many([("/env/FROM", "etcd"), ("/env/TWO", "a\nb"), ("/env/not-one", "x"), ("/env/deep/er", "x")])
    box.start()
    box.says("etcd container quiet a\nb\n")
    assert "key /env/not-one cannot be a variable of app" in box.text("log")
    found = box.enter("sh", "-c", "cd /run/service/app/env; stat -c '%n %a' *").stdout.split("\n")
    assert found[:-1] == ["FROM 600", "TOKEN 600", "TWO 600"]
    box.etcd.put("/env/STAY", "changed")
    box.etcd.delete("/env/FROM")
    box.says("file changed quiet a\nb\n")


def test_a_file_for_each_key_comes_and_goes_with_the_others(box: Bound) -> None:
    started(box)
    box.resource("part.conf", template="{{.Name}}", dest=str(box.place / "work" / "part-{{.Name}}"),
                 foreach="/app/parts/*")
    box.etcd.put_many([("/app/parts/a", "1"), ("/app/parts/b", "2")])
    parts = [box.place / "work" / f"part-{name}" for name in "ab"]
    eventually(lambda: all(part.exists() for part in parts))
    box.etcd.delete("/app/parts/a")
    eventually(lambda: not parts[0].exists())
    box.etcd.put_many([("/app/parts/c", "3"), ("/app/word", "crash")])
    box.says("took back the change of app")
    eventually(lambda: box.conf.read_text() == "one\n" and not (box.place / "work" / "part-c").exists())
    assert json.loads((box.place / "work" / ".part.conf.toml.manifest").read_text()) == ["part-b"]
