"""Following etcd through everything at once: a cluster that loses members, links and history while its keys change.

A writer gives 200 keys ever higher values, each as a pair of keys in one transaction (v2: one key); a disturber breaks
the cluster and the check commands. Whatever happens: no file ever shows an older value after a newer one, or half of a
transaction, and at the end each has the last. SOAK_SEED repeats a run; the long ones: `build.py test -m long FILE`.
"""

from __future__ import annotations

import base64
import ctypes
import http.client
import json
import os
import random
import re
import select
import struct
import threading
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import eventually, need
from support.etcd_server import Cluster, EtcdServer, find_etcd
from support.follow import Follow, holds
from support.hosts import Hosts
from support.image import Image

KEYS = 200
FILES = 40  # each shows KEYS / FILES keys
CHECKED = 6  # of them have a check command, and as many a reload command


# ---- the writer ---------------------------------------------------------------------------------------

def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


class Writer:
    """Writes each value once, whatever the members do.

    A write that was not answered may still come to pass, or not, or later; so each names the revision that it
    replaces. Then a late one cannot undo a later one, and asking tells whether it happened.
    """

    def __init__(self, servers: list[tuple[str, int]], api: str) -> None:
        self.servers, self.api = servers, api
        self.connection: http.client.HTTPConnection | None = None
        self.known: dict[str, int] = {}  # the revision of each key
        self.last: dict[str, int] = {}  # the value of each key
        self.retries = 0

    def write(self, key: str, value: int, seconds: float = 90) -> None:
        """Set a key to a higher value than it had."""
        deadline = time.monotonic() + seconds
        while not (self._try_v3 if self.api == "3" else self._try_v2)(key, str(value)):
            assert time.monotonic() < deadline, f"cannot write {key}"
            self.retries += 1
        self.last[key] = value

    def ask(self, method: str, target: str, body: str, kind: str) -> tuple[int, Any] | None:
        """One request to the present server; None if there is no answer: then the next one is asked next time."""
        try:
            if self.connection is None:
                self.connection = http.client.HTTPConnection(*self.servers[0], timeout=2)
            self.connection.request(method, target, body, {"Content-Type": kind})
            answer = self.connection.getresponse()
            data = json.loads(answer.read())
            if answer.status < 500:
                return answer.status, data
        except (OSError, http.client.HTTPException, ValueError):
            pass
        if self.connection:
            self.connection.close()
        self.connection = None
        self.servers.append(self.servers.pop(0))
        time.sleep(0.05)
        return None

    def _try_v3(self, key: str, value: str) -> bool:
        puts = [{"request_put": {"key": b64(f"/soak/{key}/{part}"), "value": b64(value)}} for part in ("one", "two")]
        body = {"compare": [{"key": b64(f"/soak/{key}/one"), "target": "MOD",
                             "mod_revision": str(self.known.get(key, 0))}],
                "success": puts, "failure": [{"request_range": {"key": b64(f"/soak/{key}/one")}}]}
        found = self.ask("POST", "/v3/kv/txn", json.dumps(body), "application/json")
        if found is None or found[0] != 200:
            return False
        if found[1].get("succeeded"):
            self.known[key] = int(found[1]["header"]["revision"])
            return True
        there = found[1]["responses"][0]["response_range"]["kvs"][0]
        self.known[key] = int(there["mod_revision"])
        return base64.b64decode(there["value"]).decode() == value

    def _try_v2(self, key: str, value: str) -> bool:
        path, known = f"/v2/keys/soak/{key}/one", self.known.get(key)
        form = {"value": value, **({"prevIndex": str(known)} if known else {"prevExist": "false"})}
        found = self.ask("PUT", path, urllib.parse.urlencode(form), "application/x-www-form-urlencoded")
        if found and found[0] in (200, 201):
            self.known[key] = found[1]["node"]["modifiedIndex"]
            return True
        if found is None or found[1].get("errorCode") not in (101, 105):
            return False
        found = self.ask("GET", f"{path}?quorum=true", "", "text/plain")
        if found is None or found[0] != 200:
            return False
        self.known[key] = found[1]["node"]["modifiedIndex"]
        return bool(found[1]["node"]["value"] == value)


# ---- who looks at the files ---------------------------------------------------------------------------

IN_MOVED_TO, IN_CLOSE_WRITE = 0x80, 0x8


class Observer(threading.Thread):
    """Reads each file whenever it was replaced; wrong: what it saw that must not be."""

    def __init__(self, directory: Path) -> None:
        super().__init__(daemon=True)
        self.directory, self.seen, self.wrong = directory, dict[str, int](), list[str]()
        self.versions = 0
        self.stopping = False
        libc = ctypes.CDLL(None, use_errno=True)
        self.fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert libc.inotify_add_watch(self.fd, os.fsencode(directory), IN_MOVED_TO | IN_CLOSE_WRITE) > 0

    def run(self) -> None:
        while not self.stopping:
            if not select.select([self.fd], [], [], 0.1)[0]:
                continue
            data, names = os.read(self.fd, 65536), set()
            while data:
                length = struct.unpack_from("=iIII", data)[3]
                names.add(data[16:16 + length].rstrip(b"\0").decode())
                data = data[16 + length:]
            for name in names:
                if not name.startswith("."):
                    self.look(self.directory / name)
        os.close(self.fd)

    def look(self, path: Path) -> None:
        self.versions += 1
        for line in path.read_text().splitlines():
            key, *values = line.split()
            if not values or len(set(values)) > 1:
                self.wrong.append(f"{path.name}: half of a transaction: {line}")
            if int(values[0]) < self.seen.get(key, 0):
                self.wrong.append(f"{path.name}: {line} after {self.seen[key]}")
            self.seen[key] = max(int(values[0]), self.seen.get(key, 0))


# ---- the disturber ------------------------------------------------------------------------------------

class Disturber(threading.Thread):
    """Breaks one thing after another, and mends it before it goes on; story: what it did."""

    def __init__(self, cluster: Cluster, hosts: Hosts, following: Follow, chance: random.Random, api: str,
                 longest: float) -> None:
        super().__init__(daemon=True)
        self.cluster, self.hosts, self.following = cluster, hosts, following
        self.chance, self.longest, self.stopping = chance, longest, threading.Event()
        self.story: list[str] = []
        self.failure: BaseException | None = None
        self.acts: list[Callable[[int], None]] = [self.kill, self.freeze, self.partition, self.restart, self.no_quorum]
        self.acts += [self.compact] if api == "3" else []

    def watched(self) -> int:
        """The member that the program has a connection to, else any."""
        table = self.following.proc("net/tcp")
        for index, host in enumerate(self.hosts.all()):
            address = "".join(f"{int(part):02X}" for part in reversed(host.address.split(".")))
            if re.search(rf" {address}:094B 01 ", table):  # 2379, established
                return index
        return self.chance.randrange(3)

    def run(self) -> None:
        try:
            self.stopping.wait(1)
            while True:
                for act in self.chance.sample(self.acts, len(self.acts)):
                    if self.stopping.is_set():
                        return
                    member = self.watched() if self.chance.random() < 0.7 else self.chance.randrange(3)
                    self.story.append(f"{act.__name__} {member}")
                    act(member)
                    self.stopping.wait(self.chance.uniform(0.2, 1))
        except BaseException as error:
            self.failure = error

    def pause(self) -> None:
        time.sleep(self.chance.uniform(0.5, self.longest))

    def kill(self, member: int) -> None:
        self.cluster.members[member].kill()
        self.pause()
        self.cluster.members[member].start()

    def restart(self, member: int) -> None:
        server = self.cluster.members[member]
        server.signal(15)
        assert server.process
        server.process.wait(30)
        server.start()

    def freeze(self, member: int) -> None:
        self.cluster.members[member].pause()
        self.pause()
        self.cluster.members[member].resume()

    def partition(self, member: int) -> None:
        host = self.hosts.all()[member]
        host.cut()
        self.pause()
        host.heal()

    def no_quorum(self, member: int) -> None:
        for other in range(3):
            if other != member:
                self.cluster.members[other].pause()
        self.pause()
        for each in self.cluster.members:
            each.resume()

    def compact(self, member: int) -> None:
        try:
            self.cluster.members[member].compact(self.cluster.members[member].put("/elsewhere", "x"))
        except (AssertionError, OSError):
            pass  # it is not well yet


# ---- all together -------------------------------------------------------------------------------------

def resources(image: Image, api: str) -> None:
    """FILES resources: plain ones, some with a check command that may fail, some with a reload command that may."""
    parts = ("one", "two") if api == "3" else ("one",)
    for number in range(FILES):
        keys = range(number * KEYS // FILES, (number + 1) * KEYS // FILES)
        text = "".join(f'k{key:03d}' + "".join(f' {{{{getv "/soak/k{key:03d}/{part}"}}}}' for part in parts) + "\n"
                       for key in keys)
        options: dict[str, Any] = {}
        broken = f"test ! -e {image.home}/broken || test $(od -An -N1 -tu1 /dev/urandom)"
        if number < CHECKED:  # one of them hangs at times
            hang = f"{broken} -gt 12 || exec sleep 617; " if number == 0 else ""
            options = {"check_cmd": f"{hang}{broken} -gt 80", "check_timeout": "1s"}
        elif number < 2 * CHECKED:
            done = image.home / f"reloaded-{number}"
            options = {"reload_cmd": f"{broken} -gt 80 && cp {image.out}/f{number} {done}", "reload_timeout": "2s"}
        elif number < 3 * CHECKED:
            options = {"debounce": "20ms:200ms"}
        image.resource(f"f{number}", text, keys=[f"/soak/k{key:03d}" for key in keys], **options)


def soak(program: list[str], home: Path, version: str, api: str, writes: int, longest: float, rate: float) -> str:
    """One run; what there is to tell about it. rate: writes a second; longest: seconds of one disturbance."""
    seed = os.environ.get("SOAK_SEED") or str(random.randrange(1 << 32))
    chance = random.Random(seed)
    binary = find_etcd(version)
    need(binary, f"etcd {version}")
    need(os.geteuid() == 0, "root, for network namespaces")
    assert binary
    image = Image(program, home / "image")
    resources(image, api)
    with Hosts("a", "b", "c") as hosts:
        cluster = Cluster(binary, home / "etcd", *(["--enable-v2=true"] if api == "2" else []), hosts=hosts.all())
        observer = Observer(image.out)
        following = disturber = None
        try:
            cluster.start()
            writer = Writer([(host.address, 2379) for host in hosts.all()], api)
            for key in range(KEYS):
                writer.write(f"k{key:03d}", 1)
            observer.start()
            following = Follow(image, cluster.urls, "--interval", "5s", api=api)
            for number in range(FILES):
                eventually((image.out / f"f{number}").exists, 60)
            before = len(following.descriptors())
            (image.home / "broken").touch()
            disturber = Disturber(cluster, hosts, following, chance, api, longest)
            disturber.start()
            began = time.monotonic()
            for value in range(2, 2 + writes):
                writer.write(f"k{chance.randrange(KEYS):03d}", value)
                time.sleep(max(0.0, began + value / rate - time.monotonic()))
            written = time.monotonic() - began
            disturber.stopping.set()
            disturber.join(90)
            assert not disturber.is_alive() and disturber.failure is None, disturber.failure
            (image.home / "broken").unlink()
            for each in cluster.members:
                each.wait()
            began = time.monotonic()
            for number in range(FILES):
                keys = [f"k{key:03d}" for key in range(number * KEYS // FILES, (number + 1) * KEYS // FILES)]
                text = "".join(f"{key}{f' {writer.last[key]}' * (2 if api == '3' else 1)}\n" for key in keys)
                holds(image.out / f"f{number}", text, 90)
                if CHECKED <= number < 2 * CHECKED:
                    holds(image.home / f"reloaded-{number}", text, 90)
            settled = time.monotonic() - began
            eventually(lambda: following.children() == [], 10)
            eventually(lambda: len(following.descriptors()) <= before + 1, 10)  # one for a probe
            assert observer.wrong == [] and observer.versions > FILES
            assert image.stages() == []
            following.stop()
            assert image.stages() == [] and "617" not in _commands()
            log = following.log
            assert "a bug" not in log and "Traceback" not in log, log[-3000:]
            return (f"etcd {version}, v{api}: {writes} values in {written:.0f} s ({writer.retries} writes repeated), "
                    f"{len(disturber.story)} disturbances, {observer.versions} versions of files seen, "
                    f"{log.count('reading all keys again')} whole reads, {log.count('Config check failed')} failed "
                    f"checks told, all right {settled:.1f} s after the last write")
        except BaseException:
            print(f"SOAK_SEED={seed}", disturber and disturber.story, observer.wrong[:5])
            print(following and following.log[-4000:])
            raise
        finally:
            observer.stopping = True
            if following:
                following.kill()
            if disturber:
                disturber.stopping.set()
                disturber.join(90)
            cluster.kill()


def _commands() -> str:
    """The arguments of all sleeping processes there are."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text.startswith("sleep"):
            found.append(text)
    return "\n".join(found)


KINDS = [("3.4", "3"), ("3.5", "3"), ("3.4", "2")]


@pytest.mark.parametrize("version, api", KINDS)
def test_files_follow_a_cluster_that_breaks_all_the_time(program: list[str], tmp_path: Path, version: str,
                                                         api: str) -> None:
    print(soak(program, tmp_path, version, api, writes=600, longest=1.0, rate=60))


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("version, api", [*KINDS, ("3.5", "2")])
def test_files_follow_it_for_minutes(program: list[str], tmp_path: Path, version: str, api: str) -> None:
    print(soak(program, tmp_path, version, api, writes=20_000, longest=20.0, rate=100))


# ---- nothing grows ------------------------------------------------------------------------------------

@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("version, api", [("3.4", "3"), ("3.5", "3"), ("3.4", "2")])
def test_nothing_grows_over_a_hundred_thousand_changes(program: list[str], tmp_path: Path, version: str,
                                                       api: str) -> None:
    binary = find_etcd(version)
    need(binary, f"etcd {version}")
    assert binary
    image = Image(program, tmp_path / "image")
    values = [image.resource(f"f{number}", f'{{{{range gets "/soak/k0{number}?/*"}}}}{{{{.Value}}}} {{{{end}}}}',
                             keys=["/soak"]) for number in range(10)]
    checked = image.resource("checked", '{{getv "/soak/k000/one"}}', debounce="500ms:2s", check_cmd="true",
                             keys=["/soak"], reload_cmd="true")
    server = EtcdServer(binary, tmp_path / "etcd", *(["--enable-v2=true"] if api == "2" else [])).start()
    following = None
    try:
        writer = Writer([("127.0.0.1", server.port)], api)
        for key in range(100):
            writer.write(f"k{key:03d}", 0)
        following = Follow(image, server.url, api=api)
        holds(checked, "0")
        sizes: list[int] = []
        changes = 100_000 if api == "2" else 50_000  # of two keys each
        for value in range(1, changes + 1):
            writer.write(f"k{value % 100:03d}", value)
            if value % (changes // 50) == 0:
                last = [str(writer.last[f"k{key:03d}"]) for key in range(90, 100)]
                holds(values[9], "".join(f"{each} " * (2 if api == "3" else 1) for each in last))
                eventually(lambda: not following.children())
                sizes.append(following.resident_kib())
                if len(sizes) == 5:
                    descriptors = sorted(following.descriptors())
        holds(checked, str(writer.last["k000"]))
        eventually(lambda: not following.children())
        print(f"etcd {version}, v{api}: RSS after each 2,000 changes, KiB: {sizes}")
        assert abs(len(following.descriptors()) - len(descriptors)) <= 1  # one may be a probe's
        assert max(sizes[25:]) - max(sizes[3:25]) <= 512
        following.stop()
    finally:
        if following:
            following.kill()
        server.kill()
