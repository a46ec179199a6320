"""The render loop under what etcd, networks, clocks and people do to it."""

from __future__ import annotations

import base64
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from support import eventually, free_port, need
from support.etcd_server import EtcdServer, find_etcd
from support.follow import holds, module_with
from support.image import Image
from support.proxy import Proxy


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def server_of(version: str, directory: Path, *flags: str, **options: Any) -> EtcdServer:
    binary = find_etcd(version)
    need(binary, f"etcd {version}")
    assert binary
    return EtcdServer(binary, directory, *flags, **options).start()


# ---- what a change costs ------------------------------------------------------------------------------

def test_a_change_asks_etcd_for_nothing_however_many_resources_there_are(image: Image, follow: Any,
                                                                         etcd: EtcdServer) -> None:
    files = [image.resource(f"f{number}", '{{getv "/x"}}', keys=["/x", f"/y{number}"]) for number in range(20)]
    etcd.put("/x", "start")
    with Proxy(etcd.port) as proxy:
        follow(proxy.url)
        for path in files:
            holds(path, "start")
        eventually(lambda: proxy.accepted >= 2)  # the read, and one watch for all
        time.sleep(0.5)
        sent, connections = proxy.upward, proxy.accepted
        for value in range(50):
            etcd.put("/x", str(value))
        for path in files:
            holds(path, "49")
        assert (proxy.upward, proxy.accepted) == (sent, connections) and connections == 2


def test_a_wait_of_v2_costs_one_request_a_change(image: Image, follow: Any, etcd34: EtcdServer) -> None:
    files = [image.resource(f"f{number}", '{{getv "/d/x"}}', keys=["/d"]) for number in range(20)]
    etcd34.put_v2("/d/x", "start")
    with Proxy(etcd34.port) as proxy:
        follow(proxy.url, api="2")
        for path in files:
            holds(path, "start")
        time.sleep(0.5)
        sent, connections = proxy.upward, proxy.accepted
        for value in range(50):
            etcd34.put_v2("/d/x", str(value))
        for path in files:
            holds(path, "49")
        assert proxy.accepted == connections and proxy.upward - sent < 50 * 250


def test_changes_without_end_are_rendered_at_the_longest_wait(image: Image, follow: Any, etcd35: EtcdServer) -> None:
    dest = image.resource("a", '{{getv "/x"}}', debounce="200ms:600ms", reload_cmd=f"echo >> {image.home}/reloads")
    etcd35.put("/x", "start")
    follow(etcd35.url)
    holds(dest, "start")
    seen, end, value = set(), time.monotonic() + 4, 0
    while time.monotonic() < end:  # never 200 ms of quiet
        etcd35.put("/x", str(value))
        value += 1
        seen.add(dest.read_text())
        time.sleep(0.02)
    holds(dest, str(value - 1))
    assert 3 <= len(seen) <= 9, seen


# ---- what the watch may miss --------------------------------------------------------------------------

def test_what_the_watch_missed_is_repaired_and_told_as_a_bug(image: Image, follow: Any, etcd35: EtcdServer) -> None:
    image.program = module_with(PROBE_INTERVAL=0.5, MISSED_PATIENCE=1.5)
    dest = image.resource("a", '{{getv "/x"}}')
    etcd35.put("/x", "1")
    with Proxy(etcd35.port) as proxy:
        following = follow(proxy.url, "--interval", "2s")
        holds(dest, "1")
        time.sleep(0.5)
        proxy.rewrite = lambda data: data.replace(b64("/x").encode(), b64("/z").encode())
        etcd35.put("/x", "2")
        time.sleep(0.2)
        proxy.rewrite = None
        assert dest.read_text() == "1"
        holds(dest, "2")
        following.says("a bug: the watch has missed changes of 2 keys, as /x, /z; they are rendered now")


def test_a_pass_while_the_watched_member_hangs_is_not_taken_for_a_bug(image: Image, follow: Any,
                                                                      etcd35: EtcdServer) -> None:
    image.program = module_with(PROBE_INTERVAL=2.0, MISSED_PATIENCE=0.3)
    dest = image.resource("a", '{{getv "/x"}}')
    etcd35.put("/x", "1")
    with Proxy(etcd35.port) as one, Proxy(etcd35.port) as two:
        following = follow([one.url, two.url], "--interval", "2s")
        holds(dest, "1")
        time.sleep(0.5)
        one.frozen = True
        etcd35.put("/x", "2")
        holds(dest, "2")
        time.sleep(6)
        etcd35.put("/x", "3")
        holds(dest, "3")
        assert two.accepted and "a bug" not in following.log


# ---- outages ------------------------------------------------------------------------------------------

def test_an_outage_is_told_in_one_line_a_minute(image: Image, follow: Any, tmp_path: Path) -> None:
    image.program = module_with(OUTAGE_REMINDER=1.5, OUTAGE_SILENCE=0.5, READ_LIMIT=0.3, RECONNECT_LIMIT=0.3)
    dest = image.resource("a", '{{getv "/x"}}')
    server = server_of("3.5", tmp_path / "etcd")
    url = server.url
    server.put("/x", "1")
    try:
        following = follow(url)
        holds(dest, "1")
        server.kill()
        began = time.monotonic()
        time.sleep(5)
        told, most = following.log.count("waiting for etcd: cannot watch"), 1 + (time.monotonic() - began) / 1.5
        assert 2 <= told <= most and "connection refused" in following.log and dest.read_text() == "1"
        assert following.log.count("\n") - told < 12  # and no other line instead
    finally:
        server.kill()


def test_the_longest_outage_counts_later_too(image: Image, follow: Any, tmp_path: Path) -> None:
    image.program = module_with(OUTAGE_SILENCE=0.3, RECONNECT_LIMIT=0.3)
    dest = image.resource("a", '{{getv "/x"}}')
    server = server_of("3.5", tmp_path / "etcd")
    server.put("/x", "1")
    try:
        following = follow(server.url, "--max-outage", "5s")
        holds(dest, "1")
        for outage in (1, 2):  # each counts for itself
            server.kill()
            eventually(lambda count=outage: following.log.count("waiting for etcd") == count)
            server.start()
            eventually(lambda count=outage: following.log.count("etcd is back after") == count)
        server.kill()
        began = time.monotonic()
        assert following.process.wait(40) == 3 and "etcd was away for 5 s (--max-outage)" in following.log
        assert time.monotonic() - began > 4
        assert dest.read_text() == "1" and image.stages() == []
    finally:
        server.kill()


@pytest.mark.parametrize("version", ["3.4", "3.5"])
def test_a_cluster_restored_from_a_backup_brings_its_older_values(image: Image, follow: Any, tmp_path: Path,
                                                                  version: str) -> None:
    need(shutil.which("etcdctl"), "etcdctl")
    old = server_of(version, tmp_path / "old")
    values = image.resource("a", '{{range gets "/r/*"}}{{base .Key}}={{.Value}} {{end}}')
    etcdctl = ["etcdctl", "--endpoints", old.url]
    env = {**os.environ, "ETCDCTL_API": "3"}
    try:
        for value in range(5):
            old.put("/r/a", str(value))
        subprocess.run([*etcdctl, "snapshot", "save", str(tmp_path / "backup")], check=True, env=env,
                       capture_output=True)
        for value in range(5, 30):
            old.put("/r/a", str(value))
        old.put("/r/late", "x")
        following = follow(old.url)
        holds(values, "a=29 late=x ")
        old.kill()
        ports = old.port, int(old.peer_url.rpartition(":")[2])
        subprocess.run([*etcdctl, "snapshot", "restore", str(tmp_path / "backup"), "--name", "one", "--data-dir",
                        str(tmp_path / "new" / "one"), "--initial-cluster", f"one={old.peer_url}",
                        "--initial-advertise-peer-urls", old.peer_url], check=True, env=env, capture_output=True)
        new = server_of(version, tmp_path / "new", ports=ports)
        try:
            holds(values, "a=4 ")
            new.put("/r/a", "5")
            holds(values, "a=5 ")
            following.stop()
            assert "reading all keys again: this is another cluster, or an older state of it" in following.log
        finally:
            new.kill()
    finally:
        old.kill()


# ---- credentials --------------------------------------------------------------------------------------

@pytest.mark.parametrize("version", ["3.4", "3.5"])
def test_a_token_that_expired_is_renewed_when_the_watch_is(image: Image, follow: Any, tmp_path: Path,
                                                           version: str) -> None:
    dest = image.resource("a", '{{getv "/app/x"}}', keys=["/app"])  # of which the role holds less
    server = server_of(version, tmp_path / "etcd", "--auth-token-ttl", "1", "--bcrypt-cost", "4")
    try:
        server.put("/app/x", "1")
        for name, password in (("root", "rootpw"), ("app", "geheim")):
            server.call("/auth/role/add", {"name": name})
            server.call("/auth/user/add", {"name": name, "password": password})
            server.call("/auth/user/grant", {"user": name, "role": name})
        server.call("/auth/role/grant", {"name": "app", "perm": {"permType": "READ", "key": b64("/app/"),
                                                                 "range_end": b64("/app0")}})
        server.call("/auth/enable", {})

        def put(value: str) -> None:
            token = server.call("/auth/authenticate", {"name": "root", "password": "rootpw"})["token"]
            server.put("/app/x", value, token)

        with Proxy(server.port) as proxy:
            env = {"ETCD_USERNAME": "app", "ETCD_PASSWORD": "geheim", "ETCD_SCHEME": "http"}
            following = follow(proxy.url, env=env)
            holds(dest, "1")
            time.sleep(3)  # the token is gone; the watch that it opened goes on
            put("2")
            holds(dest, "2")
            proxy.cut()  # a new watch has to log in first
            put("3")
            holds(dest, "3")
            server.kill()  # tokens are in its memory
            server.start()
            put("4")
            holds(dest, "4")
            assert "geheim" not in following.log and not re.search("ERROR|denied", following.log), following.log
    finally:
        server.kill()


# ---- clocks -------------------------------------------------------------------------------------------

def test_a_clock_that_jumps_by_years_disturbs_nothing(image: Image, follow: Any, etcd35: EtcdServer) -> None:
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    need(library, "faketime")
    image.program = module_with(PROBE_INTERVAL=0.5)  # LD_PRELOAD does nothing to a static executable
    clock = image.home / "clock"
    clock.write_text("+0")
    dest = image.resource("a", '{{getv "/x"}}', debounce="50ms")
    failing = image.resource("b", '{{getv "/x"}}', check_cmd="false")
    etcd35.put("/x", "start")
    env = {"LD_PRELOAD": str(library), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1",
           "FAKETIME_DONT_FAKE_MONOTONIC": "1", "FAKETIME_DONT_RESET": "1"}
    with Proxy(etcd35.port) as proxy:
        following = follow(proxy.url, "--interval", "3s", "--max-outage", "20s", env=env)
        holds(dest, "start")
        for step, offset in enumerate(["+12y", "-20y", "+0", "-1h", "+1h"]):
            clock.write_text(offset)
            began, sent, ticks = time.monotonic(), proxy.upward, following.cpu_ticks()
            etcd35.put("/x", str(step))
            holds(dest, str(step), 3)  # the next thing due is not years away
            time.sleep(max(0.0, began + 1.5 - time.monotonic()))
            assert proxy.upward - sent < 4000 and following.cpu_ticks() - ticks < 60  # nor is everything due at once
        assert not failing.exists()
        following.stop()
        stamps = {int(year) for year in re.findall(r"^(\d{4})-", following.log, re.MULTILINE)}
        assert max(stamps) - min(stamps) > 25, "the clock did not jump"
        assert following.log.count("Config check failed") == 1 and "waiting for etcd" not in following.log


def test_a_monotonic_clock_that_began_elsewhere_is_as_good(image: Image, follow: Any, etcd35: EtcdServer) -> None:
    need(os.geteuid() == 0 and shutil.which("unshare"), "root, for time namespaces")
    dest = image.resource("a", '{{getv "/x"}}', debounce="50ms")
    etcd35.put("/x", "1")
    for offset in ("400000000", "-0"):  # 12 years up
        following = follow(etcd35.url, before=["unshare", "--time", "--monotonic", offset, "--boottime", offset])
        holds(dest, "1")
        etcd35.put("/x", "2")
        holds(dest, "2")
        etcd35.put("/x", "1")
        holds(dest, "1")
        following.stop()


def test_a_machine_that_slept_catches_up(image: Image, follow: Any, etcd: EtcdServer) -> None:
    dest = image.resource("a", '{{getv "/x"}}')
    etcd.put("/x", "start")
    following = follow(etcd.url)
    holds(dest, "start")
    following.process.send_signal(signal.SIGSTOP)
    for value in range(300):
        revision = etcd.put("/x", f"{value}" + "x" * 20_000)  # more than buffers take
    etcd.compact(revision)
    time.sleep(1)
    following.process.send_signal(signal.SIGCONT)
    holds(dest, "299" + "x" * 20_000, 30)


# ---- SIGTERM ------------------------------------------------------------------------------------------

def test_a_reload_that_runs_is_finished_before_it_leaves(image: Image, follow: Any, etcd35: EtcdServer) -> None:
    begun, done = image.home / "begun", image.home / "done"
    image.resource("a", '{{getv "/x"}}', reload_cmd=f"touch {begun}; sleep 2; touch {done}")
    etcd35.put("/x", "1")
    following = follow(etcd35.url)
    eventually(begun.exists)
    assert following.stop() < 5 and done.exists()


def test_a_reload_that_does_not_end_is_killed_after_its_grace(image: Image, follow: Any, etcd35: EtcdServer) -> None:
    image.program = module_with(STOP_GRACE=1.0)
    begun = image.home / "begun"
    image.resource("a", '{{getv "/x"}}', reload_cmd=f"touch {begun}; trap '' TERM; sleep 619; sleep 619")
    etcd35.put("/x", "1")
    following = follow(etcd35.url)
    eventually(begun.exists)
    assert following.stop() < 8
    assert "sleep 619" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


def test_a_check_that_runs_is_abandoned(image: Image, follow: Any, etcd35: EtcdServer) -> None:
    begun = image.home / "begun"
    dest = image.resource("a", '{{getv "/x"}}', check_cmd=f"touch {begun}; trap '' TERM INT; sleep 621; sleep 621")
    etcd35.put("/x", "1")
    following = follow(etcd35.url)
    eventually(begun.exists)
    assert len(image.stages()) == 1
    assert following.stop() < 5
    assert image.stages() == [] and not dest.exists()
    assert "sleep 621" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


def test_sigterm_is_heard_while_etcd_is_away_or_silent(image: Image, follow: Any, etcd35: EtcdServer) -> None:
    image.resource("a", '{{getv "/x"}}')
    following = follow(f"http://127.0.0.1:{free_port()}")
    following.says("waiting for etcd")
    assert following.stop() < 3
    with Proxy(etcd35.port) as proxy:
        proxy.frozen = True
        following = follow(proxy.url)
        time.sleep(0.7)
        assert following.stop() < 3
