"""A fake etcd in one file: v3 JSON gateway and v2 keys API in memory, and faults that a real one does not show.

    with FakeEtcd() as fake:
        fake.put("/a", "1")
        fake.fail("half")              # the next request gets half an answer; see FAULTS
        Etcd([fake.url]).read(["/a"])

test_etcd_fake.py replays the same requests on it and on real servers and compares answers.
"""

from __future__ import annotations

import base64
import json
import socket
import struct
import threading
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

Body = dict[str, Any]
MEMBER = {"cluster_id": "14841639068965178418", "member_id": "10276657743932975437"}

# gRPC codes and the HTTP status that the gateway gives them; 9 is 412 in etcd 3.4
STATUS = {2: 500, 3: 400, 5: 404, 7: 403, 8: 429, 9: 400, 11: 400, 14: 503, 16: 401}


class Refusal(Exception):
    """An error of the v3 API."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


class RefusalV2(Exception):
    """An error of the v2 API."""

    def __init__(self, status: int, code: int, message: str, cause: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.cause = status, code, message, cause


def error_body(version: str, code: int, message: str) -> Body:
    """The body of a failed v3 request, as each version writes it."""
    if version >= "3.6":
        return {"code": code, "message": message, "details": []}
    return {"error": message, "message": message, "code": code}


def decode(body: Body, name: str) -> bytes:
    text = body.get(name, "")
    wrong = next((index for index, character in enumerate(text) if character in "-_"), None)
    if wrong is not None or len(text) % 4:
        raise Refusal(3, f"illegal base64 data at input byte {len(text) - len(text) % 4 if wrong is None else wrong}")
    return base64.b64decode(text)


def encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


# ---- the v3 store -------------------------------------------------------------------------------------

class StoreV3:
    """Keys with all their revisions."""

    def __init__(self) -> None:
        self.revision, self.compacted = 1, 0
        self.versions: dict[bytes, list[tuple[int, Body | None]]] = {}  # key: (revision, kv or None if deleted)

    def at(self, key: bytes, revision: int) -> Body | None:
        return next((kv for since, kv in reversed(self.versions.get(key, [])) if since <= revision), None)

    def select(self, body: Body, revision: int) -> list[Body]:
        start, end = decode(body, "key"), decode(body, "range_end")
        if not start:
            raise Refusal(3, "etcdserver: key is not provided")
        keys = [key for key in self.versions if (key >= start and end in (b"\0", key) or start <= key < end
                                                 if end else key == start) or end == b"\0" and key >= start]
        return [kv for key in sorted(keys) if (kv := self.at(key, revision)) is not None]

    def range(self, body: Body, revision: int) -> Body:
        asked = int(body.get("revision", 0))
        if asked > revision:
            raise Refusal(11, "etcdserver: mvcc: required revision is a future revision")
        if 0 < asked < self.compacted:
            raise Refusal(11, "etcdserver: mvcc: required revision has been compacted")
        found = self.select(body, asked or revision)
        limit = int(body.get("limit", 0))
        answer: Body = {}
        if not body.get("count_only"):
            page = found[:limit] if limit else found
            shown = [{name: value for name, value in kv.items() if name != "value"} if body.get("keys_only") else kv
                     for kv in page]
            answer |= {"kvs": shown} if shown else {}
            answer |= {"more": True} if len(page) < len(found) else {}
        return answer | ({"count": str(len(found))} if found else {})

    def put(self, body: Body, revision: int) -> Body:
        key = decode(body, "key")
        if not key:
            raise Refusal(3, "etcdserver: key is not provided")
        old = self.at(key, revision)
        kv = {"key": encode(key), "create_revision": old["create_revision"] if old else str(revision),
              "mod_revision": str(revision), "version": str(int(old["version"]) + 1 if old else 1)}
        if body.get("value"):
            kv["value"] = body["value"]
        self.versions.setdefault(key, []).append((revision, kv))
        return {"prev_kv": old} if old and body.get("prev_kv") else {}

    def deleterange(self, body: Body, revision: int) -> Body:
        found = self.select(body, revision)
        for kv in found:
            self.versions[decode(kv, "key")].append((revision, None))
        answer: Body = {"deleted": str(len(found))} if found else {}
        return answer | ({"prev_kvs": found} if found and body.get("prev_kv") else {})

    def holds(self, compare: Body) -> bool:
        kv = self.at(decode(compare, "key"), self.revision) or {}
        target = compare.get("target", "VERSION")
        if target == "VALUE":
            have: Any = decode(kv, "value") if kv else None
            want: Any = decode(compare, "value")
        else:
            field = {"VERSION": "version", "CREATE": "create_revision", "MOD": "mod_revision"}[target]
            have, want = int(kv.get(field, 0)), int(compare.get(field, 0))
        if have is None:
            return False
        return {"EQUAL": have == want, "NOT_EQUAL": have != want, "GREATER": have > want,
                "LESS": have < want}[compare.get("result", "EQUAL")]

    def txn(self, body: Body) -> Body:
        succeeded = all(self.holds(compare) for compare in body.get("compare", []))
        operations = body.get("success" if succeeded else "failure", [])
        if len(operations) > 128:
            raise Refusal(3, "etcdserver: too many operations in txn request")
        writes = any("request_put" in operation or "request_delete_range" in operation for operation in operations)
        responses = []
        revision = self.revision + writes
        for operation in operations:
            (kind, request), = operation.items()
            call = {"request_range": self.range, "request_put": self.put,
                    "request_delete_range": self.deleterange}[kind]
            answer = {"header": {"revision": str(revision)}, **call(request, revision)}
            responses.append({kind.replace("request", "response"): answer})
        self.revision = revision
        return ({"succeeded": True} if succeeded else {}) | ({"responses": responses} if responses else {})

    def compact(self, revision: int) -> Body:
        if revision <= self.compacted:
            raise Refusal(11, "etcdserver: mvcc: required revision has been compacted")
        if revision > self.revision:
            raise Refusal(11, "etcdserver: mvcc: required revision is a future revision")
        self.compacted = revision
        return {}


# ---- the v2 store -------------------------------------------------------------------------------------

class NodeV2:
    """A file or a directory of the v2 API."""

    def __init__(self, key: str, index: int, value: str | None = None) -> None:
        self.key, self.created, self.modified, self.value = key, index, index, value
        self.nodes: dict[str, NodeV2] = {}

    def show(self, recursive: bool, ordered: bool, top: bool = True) -> Body:
        node: Body = {"key": self.key} if self.key else {}
        if self.value is not None:
            node["value"] = self.value
        else:
            node["dir"] = True
            children = [child for name, child in self.nodes.items() if not name.startswith("_")]
            if ordered:
                children.sort(key=lambda child: child.key)
            if children and (top or recursive):
                node["nodes"] = [child.show(recursive, ordered, False) for child in children]
        return node | ({"modifiedIndex": self.modified, "createdIndex": self.created} if self.key else {})


class StoreV2:
    """The tree of the v2 API."""

    def __init__(self) -> None:
        self.index, self.root = 3, NodeV2("", 0)

    def find(self, path: str) -> NodeV2:
        node = self.root
        for name in path.strip("/").split("/") if path.strip("/") else []:
            if node.value is not None:
                raise RefusalV2(400, 104, "Not a directory", node.key)
            if name not in node.nodes:
                raise RefusalV2(404, 100, "Key not found", f"{node.key}/{name}")
            node = node.nodes[name]
        return node

    def call(self, method: str, path: str, options: dict[str, str]) -> tuple[int, Body]:
        path = "/" + path.strip("/")
        return {"GET": self.get, "PUT": self.put, "DELETE": self.delete}[method](path, options)

    def get(self, path: str, options: dict[str, str]) -> tuple[int, Body]:
        node = self.find(path)
        shown = node.show(options.get("recursive") == "true", options.get("sorted") == "true")
        return 200, {"action": "get", "node": shown}

    def put(self, path: str, options: dict[str, str]) -> tuple[int, Body]:
        try:
            old: NodeV2 | None = self.find(path)
        except RefusalV2 as refusal:
            if refusal.code != 100 or options.get("prevExist") == "true" or "prevValue" in options:
                raise
            old = None
        if old is not None:
            if options.get("prevExist") == "false":
                raise RefusalV2(412, 105, "Key already exists", path)
            if old.value is None:
                raise RefusalV2(403, 102, "Not a file", path)
            if "prevValue" in options and options["prevValue"] != old.value:
                raise RefusalV2(412, 101, "Compare failed", f"[{options['prevValue']} != {old.value}]")
        self.index += 1
        before = old.show(False, False) if old else None
        node = self.root
        *above, name = path.strip("/").split("/")
        for part in above:
            node = node.nodes.setdefault(part, NodeV2(f"{node.key}/{part}", self.index))
        created = NodeV2(path, self.index, None if options.get("dir") == "true" else options.get("value", ""))
        node.nodes[name] = created
        if ("prevExist" in options or "prevValue" in options) and old:
            created.created = old.created
        action = ("compareAndSwap" if "prevValue" in options else
                  {"true": "update", "false": "create"}.get(options.get("prevExist", ""), "set"))
        answer: Body = {"action": action, "node": created.show(False, False)}
        return (200 if old else 201), answer | ({"prevNode": before} if before else {})

    def delete(self, path: str, options: dict[str, str]) -> tuple[int, Body]:
        node = self.find(path)
        recursive = options.get("recursive") == "true"
        if node.value is None and not recursive and options.get("dir") != "true":
            raise RefusalV2(403, 102, "Not a file", path)
        if node.nodes and not recursive:
            raise RefusalV2(403, 108, "Directory not empty", path)
        if "prevValue" in options and options["prevValue"] != node.value:
            raise RefusalV2(412, 101, "Compare failed", f"[{options['prevValue']} != {node.value}]")
        self.index += 1
        parent, _, name = path.rpartition("/")
        del self.find(parent).nodes[name]
        gone: Body = {"key": path, "modifiedIndex": self.index, "createdIndex": node.created}
        gone |= {"dir": True} if node.value is None else {}
        before = node.show(False, False, top=False)
        action = "compareAndDelete" if "prevValue" in options else "delete"
        return 200, {"action": action, "node": gone, "prevNode": before}


# ---- faults: what is sent instead of the answer -------------------------------------------------------

HEAD = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def _close(peer: socket.socket, answer: bytes, fake: FakeEtcd) -> None:
    """Close without an answer."""


def _reset(peer: socket.socket, answer: bytes, fake: FakeEtcd) -> None:
    """Reset the connection."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _stall(peer: socket.socket, answer: bytes, fake: FakeEtcd) -> None:
    """Never answer."""
    fake.stopping.wait(60)


def _half(peer: socket.socket, answer: bytes, fake: FakeEtcd) -> None:
    """Send all of the head and half of the body, then close."""
    peer.sendall(answer[:(answer.index(b"\r\n\r\n") + 4 + len(answer)) // 2])


def _half_stall(peer: socket.socket, answer: bytes, fake: FakeEtcd) -> None:
    """Send half of the answer, then nothing more."""
    _half(peer, answer, fake)
    _stall(peer, answer, fake)


def _garbage(peer: socket.socket, answer: bytes, fake: FakeEtcd) -> None:
    """Send bytes that are not HTTP."""
    peer.sendall(bytes(range(256)) * 40)


def _html(peer: socket.socket, answer: bytes, fake: FakeEtcd) -> None:
    """Answer 200 with a web page, as a captive portal does."""
    peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n<html></html>")


def _wrong_form(peer: socket.socket, answer: bytes, fake: FakeEtcd) -> None:
    """Answer 200 with JSON of another program."""
    peer.sendall(f"{HEAD}Content-Length: 27\r\n\r\n".encode() + b'{"kvs": 7, "node": "north"}')


def _big(peer: socket.socket, answer: bytes, fake: FakeEtcd) -> None:
    """Answer with 30 MB that are no JSON."""
    peer.sendall(f"{HEAD}Content-Length: {30 << 20}\r\n\r\n".encode())
    for _ in range(30):
        peer.sendall(b"x" * (1 << 20))


def _endless(peer: socket.socket, answer: bytes, fake: FakeEtcd) -> None:
    """Send chunks as fast as they are taken, for ever."""
    peer.sendall(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode())
    while not fake.stopping.is_set():
        peer.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")


def _drip(peer: socket.socket, answer: bytes, fake: FakeEtcd) -> None:
    """Send the right answer, ten bytes a second."""
    for byte in answer:
        if fake.stopping.wait(0.1):
            return
        peer.sendall(bytes((byte,)))


FAULTS: dict[str, Callable[[socket.socket, bytes, FakeEtcd], None]] = {
    "close": _close, "reset": _reset, "stall": _stall, "half": _half, "half stall": _half_stall, "garbage": _garbage,
    "html": _html, "wrong form": _wrong_form, "big": _big, "endless": _endless, "drip": _drip}


# ---- the server ---------------------------------------------------------------------------------------

class FakeEtcd:
    """The server; `url` is its endpoint, `requests` what it was asked: (method, target, body).

    version: shapes of errors; bases: the gateway paths that exist, () for none; v2: whether /v2/keys is there;
    largest: bytes of an answer from which the gateway refuses with code 8, as before 3.4.17.
    """

    def __init__(self, version: str = "3.5", bases: tuple[str, ...] = ("/v3", "/v3beta"), v2: bool = True,
                 largest: int = 1 << 40) -> None:
        self.version, self.bases, self.has_v2, self.largest = version, bases, v2, largest
        self.v3, self.v2 = StoreV3(), StoreV2()
        self.requests: list[tuple[str, str, Any]] = []
        self.faults: list[Any] = []
        self.before: Callable[[str], None] | None = None  # called with the path of each v3 request before it is served
        self.stopping, self.lock = threading.Event(), threading.RLock()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.peers: set[socket.socket] = set()
        self.connections = 0

    def __enter__(self) -> FakeEtcd:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        for each in (self.listener, *self.peers):
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        self.listener.close()

    def put(self, key: str, value: str) -> None:
        """Set a key in both stores."""
        with self.lock:
            raw = [base64.b64encode(text.encode("utf-8", "surrogateescape")).decode() for text in (key, value)]
            self.v3.txn({"success": [{"request_put": dict(zip(("key", "value"), raw, strict=True))}]})
            self.v2.put(key, {"value": value})

    def fail(self, fault: str | tuple[int, str], times: int = 1) -> None:
        """Answer the next requests with a fault: a name in FAULTS, or a gRPC code and message."""
        assert isinstance(fault, tuple) or fault in FAULTS
        self.faults += [fault] * times

    def _accept(self) -> None:
        while not self.stopping.is_set():
            try:
                peer, _ = self.listener.accept()
            except OSError:
                return
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connections += 1
            self.peers.add(peer)
            threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        try:
            with peer, peer.makefile("rb") as stream:
                while (line := stream.readline().decode()) and self._request(peer, stream, line):
                    pass
        except OSError:
            pass  # the client went away, or we are stopping
        finally:
            self.peers.discard(peer)

    def _request(self, peer: socket.socket, stream: Any, line: str) -> bool:
        """Read one request and answer it; False when the connection is to be closed."""
        method, target, _ = line.split(" ")
        headers: dict[str, str] = {}
        while (field := stream.readline().decode().strip()):
            name, _, value = field.partition(":")
            headers[name.lower()] = value.strip()
        body = stream.read(int(headers.get("content-length", 0)))
        with self.lock:
            self.requests.append((method, target, body))
            fault = self.faults.pop(0) if self.faults else None
            if isinstance(fault, tuple):
                status, kind, data, extra = self._refuse(*fault)
            else:
                status, kind, data, extra = self._answer(method, target, body)
        lines = [f"HTTP/1.1 {status} X", f"Content-Type: {kind}", f"Content-Length: {len(data)}", *extra, "", ""]
        answer = "\r\n".join(lines).encode() + data
        if isinstance(fault, str):
            FAULTS[fault](peer, answer, self)
            return False
        peer.sendall(answer)
        return headers.get("connection") != "close"

    def _refuse(self, code: int, message: str) -> tuple[int, str, bytes, list[str]]:
        status = 412 if code == 9 and self.version < "3.5" else STATUS[code]
        return status, "application/json", json.dumps(error_body(self.version, code, message)).encode(), []

    def _answer(self, method: str, target: str, body: bytes) -> tuple[int, str, bytes, list[str]]:
        path, _, query = target.partition("?")
        if path.startswith("/v2/keys") and self.has_v2:
            options = {**dict(urllib.parse.parse_qsl(query, True)), **dict(urllib.parse.parse_qsl(body.decode(), True))}
            return self._answer_v2(method, urllib.parse.unquote(path[len("/v2/keys"):]), options)
        if path == "/health":
            return 200, "text/plain", b'{"health":"true"}', []
        if path == "/version":
            version = {"etcdserver": f"{self.version}.0", "etcdcluster": f"{self.version}.0"}
            return 200, "application/json", json.dumps(version).encode(), []
        base = next((base for base in self.bases if path.startswith(base + "/")), None)
        call = getattr(self, "_v3" + path[len(base):].replace("/", "_"), None) if base else None
        if call is None:
            return 404, "text/plain; charset=utf-8", b"404 page not found\n" if not self.bases else b"Not Found\n", []
        if method != "POST":
            return 405, "text/plain; charset=utf-8", b"Method Not Allowed\n", []
        if self.before:
            self.before(path[len(base or ""):])
        try:
            try:
                request = json.loads(body or b"{}")
            except ValueError:
                raise Refusal(3, "invalid character") from None
            data = call(request)
        except Refusal as refusal:
            return self._refuse(refusal.code, refusal.message)
        header = {**MEMBER, "revision": str(self.v3.revision), "raft_term": "2"}
        answer = json.dumps({"header": header, **data}, separators=(",", ":")).encode()
        if len(answer) > self.largest:
            return self._refuse(8, f"grpc: received message larger than max ({len(answer)} vs. {self.largest})")
        return 200, "application/json", answer, []

    def _v3_kv_range(self, body: Body) -> Body:
        return self.v3.range(body, self.v3.revision)

    def _v3_kv_put(self, body: Body) -> Body:
        answer = self.v3.put(body, self.v3.revision + 1)
        self.v3.revision += 1
        return answer

    def _v3_kv_deleterange(self, body: Body) -> Body:
        answer = self.v3.deleterange(body, self.v3.revision + 1)
        self.v3.revision += bool(answer)
        return answer

    def _v3_kv_txn(self, body: Body) -> Body:
        return self.v3.txn(body)

    def _v3_kv_compaction(self, body: Body) -> Body:
        return self.v3.compact(int(body.get("revision", 0)))

    def _v3_maintenance_status(self, body: Body) -> Body:
        return {"version": f"{self.version}.0", "dbSize": "20480", "leader": MEMBER["member_id"], "raftIndex": "9",
                "raftTerm": "2"}

    def _v3_auth_authenticate(self, body: Body) -> Body:
        raise Refusal(9, "etcdserver: authentication is not enabled")

    def _answer_v2(self, method: str, path: str, options: dict[str, str]) -> tuple[int, str, bytes, list[str]]:
        try:
            status, data = self.v2.call(method, path, options)
        except RefusalV2 as refusal:
            status, data = refusal.status, {"errorCode": refusal.code, "message": refusal.message,
                                            "cause": refusal.cause, "index": self.v2.index}
        extra = [f"X-Etcd-Index: {self.v2.index}", "X-Raft-Index: 9", "X-Raft-Term: 2"]
        return status, "application/json", json.dumps(data).encode() + b"\n", extra


def wait_for_requests(fake: FakeEtcd, count: int, seconds: float = 10) -> None:
    """Wait until the fake was asked that often."""
    deadline = time.monotonic() + seconds
    while len(fake.requests) < count and time.monotonic() < deadline:
        time.sleep(0.01)
