"""Watch: v3 streams and v2 waits, the mirror that they keep current, and everything that can go wrong with them."""

from __future__ import annotations

import base64
import json
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import need
from support.certificates import Authority
from support.etcd_server import Cluster, EtcdServer, find_etcd, http
from support.proxy import Proxy

import etcdinit
from etcdinit import (
    Etcd,
    EtcdDenied,
    EtcdUnreachable,
    KeyTree,
    Mirror,
    Secret,
    Tls,
    Watch,
    WatchMessage,
    clean_key,
    decode_wait,
    fewer_ranges,
    key_ranges,
    watch_request,
)


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


# ---- messages, without sockets ------------------------------------------------------------------------

HEADER = {"cluster_id": "7", "member_id": "9", "revision": "12", "raft_term": "3"}


def message(**result: Any) -> WatchMessage:
    return WatchMessage(json.dumps({"result": {"header": HEADER, **result}}).encode())


def test_a_created_watch_tells_where_the_store_is() -> None:
    created = message(created=True, watch_id="4")
    assert (created.created, created.id, created.revision, created.term, created.cluster) == (True, 4, 12, 3, "7")
    assert message(created=True).id == 0 and created.events == [] and created.failure is None


def test_events_are_puts_and_deletes_with_their_revision() -> None:
    events = [{"kv": {"key": b64("/a"), "value": b64("ü"), "mod_revision": "11", "version": "1"}},
              {"kv": {"key": b64("/b"), "mod_revision": "11"}},
              {"type": "DELETE", "kv": {"key": b64("/c"), "mod_revision": "12"}}]
    assert message(events=events).events == [(11, "put", "/a", "ü"), (11, "put", "/b", ""), (12, "delete", "/c", "")]


def test_bytes_that_are_not_utf8_stay_what_they_are() -> None:
    raw = base64.b64encode(b"/\xff").decode()
    (event,) = message(events=[{"kv": {"key": raw, "value": raw, "mod_revision": "1"}}]).events
    assert event[2].encode("utf-8", "surrogateescape") == b"/\xff" == event[3].encode("utf-8", "surrogateescape")


def test_fragments_and_progress_and_compaction_are_told_apart() -> None:
    assert message(fragment=True).fragment and not message().fragment
    assert message().events == [] and message(watch_id="-1").id == -1
    compacted = WatchMessage(b'{"result":{"header":{"cluster_id":"7"},"canceled":true,"compact_revision":"37"}}')
    assert (compacted.compacted, compacted.revision, compacted.failure) == (37, 0, None)


@pytest.mark.parametrize("line, kind", [
    (b'{"error":{"grpc_code":14,"http_code":503,"message":"etcdserver: no leader","http_status":"X"}}',
     EtcdUnreachable),
    (b'{"error":{"code":14,"message":"transport is closing","details":[]}}', EtcdUnreachable),
    (b'{"code":16,"message":"etcdserver: invalid auth token","error":"etcdserver: invalid auth token"}', EtcdDenied),
    (b'{"result":{"header":{},"created":true,"canceled":true,"watch_id":"-1","cancel_reason":'
     b'"rpc error: code = Unauthenticated desc = etcdserver: invalid auth token"}}', EtcdDenied),
    (b'{"result":{"header":{},"created":true,"canceled":true,"cancel_reason":'
     b'"rpc error: code = PermissionDenied desc = etcdserver: permission denied"}}', EtcdDenied),
    (b'{"result":{"header":{},"canceled":true}}', EtcdUnreachable),
])
def test_failures_of_a_stream_have_the_kind_of_all_versions(line: bytes, kind: type) -> None:
    failure = WatchMessage(line).failure
    assert failure and failure[0] is kind and failure[2]


@pytest.mark.parametrize("line", [b"", b"{", b"[]", b"{}", b'{"result":7}', b'{"result":{"events":[{}]}}', b"\xff\xfe",
                                  b'{"result":{"events":[{"kv":{"key":"eA","mod_revision":"1"}}]}}', b"[" * 100_000,
                                  b'{"result":{"header":{"revision":"x"}}}', b'{"result":{"events":7}}', b"null"])
def test_a_line_that_is_no_message_is_a_value_error(line: bytes) -> None:
    with pytest.raises(ValueError, match="is no watch message"):
        WatchMessage(line)


@given(st.binary(max_size=300))
def test_no_line_whatever_is_worse_than_a_value_error(line: bytes) -> None:
    for decode in (WatchMessage, decode_wait):
        try:
            decode(line)
        except ValueError:
            pass


def test_v2_events_put_and_prune() -> None:
    def event(action: str, **node: Any) -> Any:
        return decode_wait(json.dumps({"action": action, "node": {"key": "/d/x", "modifiedIndex": 7, **node}}).encode())

    for action in ("set", "update", "create", "compareAndSwap"):
        assert event(action, value="v") == (7, "put", "/d/x", "v")
    for action in ("delete", "expire", "compareAndDelete"):
        assert event(action) == event(action, dir=True) == (7, "prune", "/d/x", "")
    assert event("set", dir=True) is None


def test_one_request_creates_all_watches() -> None:
    body = watch_request([(b"/a", b"/b", 5), (b"/x", b"", 6)])
    first, second = [json.loads(line)["create_request"] for line in body.splitlines()]
    assert (first["key"], first["range_end"], first["start_revision"]) == (b64("/a"), b64("/b"), "5")
    assert "range_end" not in second and second["fragment"] is True and second["progress_notify"] is True


@given(st.sets(st.text("ab/", min_size=1, max_size=6).map(clean_key), max_size=30), st.integers(1, 9))
def test_fewer_ranges_hold_all_that_more_did(keys: set[str], most: int) -> None:
    ranges = key_ranges(keys)
    fewer = fewer_ranges(ranges, most)
    assert len(fewer) <= most
    assert [key for each in fewer for key in each[2]] == [key for each in ranges for key in each[2]]
    for start, end, _ in ranges:
        assert any(low <= start and end <= high for low, high, _ in fewer)
    assert len(ranges) > most or fewer == ranges


def test_neighbours_are_joined_where_they_have_most_in_common() -> None:
    ranges = key_ranges(["/a/x", "/a/y", "/b/x", "/b/y", "/c"])
    assert [each[2] for each in fewer_ranges(ranges, 3)] == [["/a/x", "/a/y"], ["/b/x", "/b/y"], ["/c"]]


# ---- the mirror ---------------------------------------------------------------------------------------

def test_a_mirror_tells_what_changed_and_how() -> None:
    mirror = Mirror()
    assert mirror.replace(5, [("/a/x", "1"), ("/a/y", "2")]) == {"/a/x": True, "/a/y": True}
    changed = mirror.apply([(6, "put", "/a/x", "9"), (6, "put", "/a/new", "3"), (6, "delete", "/a/y", "")])
    assert changed == {"/a/x": False, "/a/new": True, "/a/y": True} and mirror.tree.revision == 6
    assert mirror.apply([(7, "put", "/a/x", "9"), (8, "delete", "/no", "")]) == {}  # nothing is other than before
    assert mirror.replace(20, [("/a/x", "9"), ("/b", "")]) == {"/b": True, "/a/new": True}
    assert mirror.tree.items() == [("/a/x", "9"), ("/b", "")] and mirror.tree.children("/") == ["a", "b"]


def test_events_that_a_whole_read_already_holds_do_not_turn_time_back() -> None:
    mirror = Mirror()
    mirror.replace(10, [("/a", "new")])
    assert mirror.apply([(9, "put", "/a", "old"), (10, "delete", "/a", "")]) == {}
    assert mirror.tree["/a"] == "new"


def test_keys_that_were_read_one_after_another_do_not_turn_back_either() -> None:
    mirror = Mirror()
    mirror.replace(10, [("/a", "12"), ("/d/x", "15"), ("/d/y", "15")], {"/a": 12, "/d": 15, "/e": 16})
    assert mirror.apply([(11, "put", "/a", "11"), (13, "put", "/d/x", "13"), (14, "prune", "/d", ""),
                         (16, "put", "/e", "gone again")]) == {}
    assert mirror.apply([(13, "put", "/a", "13"), (17, "put", "/e", "17"), (16, "prune", "/d/y", "")]) == {
        "/a": False, "/e": True, "/d/y": True}
    assert mirror.apply([(14, "prune", "/", "")]) == {"/a": True}
    assert mirror.tree.items() == [("/d/x", "15"), ("/e", "17")]


def test_a_comparison_knows_what_is_on_its_way_from_what_was_missed() -> None:
    mirror = Mirror()
    mirror.replace(1, [("/a", "1"), ("/b", "1"), ("/d/x", "1")])
    assert set(mirror.compare(9, [("/a", "2"), ("/b", "2")])) == {"/a", "/b", "/d/x"}
    mirror.apply([(8, "put", "/a", "2"), (9, "prune", "/d", "")])
    assert mirror.unexplained() == ["/b"] and mirror.unexplained() == []
    assert mirror.compare(9, [("/a", "2"), ("/b", "2")]) == {} and mirror.unexplained() == []


def test_two_spellings_of_one_key_make_it_doubtful() -> None:
    mirror = Mirror()
    mirror.replace(1, [("/a", "1")])
    assert not mirror.doubtful
    mirror.apply([(2, "put", "/a/", "2")])
    assert mirror.doubtful
    mirror.replace(3, [("/a", "1"), ("/a/", "2")])
    assert mirror.doubtful
    mirror.replace(4, [("/a", "1")])
    assert not mirror.doubtful


KEYS = st.sampled_from(["/a", "/a/b", "/a/b/c", "/ab", "/a/d", "/x"])


@given(st.lists(st.tuples(st.sampled_from(["put", "delete", "prune"]), KEYS, st.sampled_from("12")), max_size=40),
       st.integers(0, 40))
def test_a_mirror_is_what_a_read_would_give(steps: list[tuple[str, str, str]], read_at: int) -> None:
    mirror, model = Mirror(), dict[str, str]()
    mirror.replace(1, [])
    for revision, (kind, key, value) in enumerate(steps, 2):
        before = dict(model)
        if kind == "put":
            model[key] = value
        else:
            for each in list(model):
                if each == key or kind == "prune" and each.startswith(key + "/"):
                    del model[each]
        if revision == read_at:
            changed = mirror.replace(revision, list(model.items()))
        else:
            changed = mirror.apply([(revision, kind, key, value)])
        assert changed == {k: (k in before) != (k in model) for k in {*before, *model} if before.get(k) != model.get(k)}
        assert mirror.tree == KeyTree(model)
        for path in {"", *(key.rpartition("/")[0] for key in model)}:
            assert mirror.tree.children(path) == KeyTree(model).children(path)


# ---- what a stream may bring, byte for byte -----------------------------------------------------------

class Script:
    """A server that answers each watch request with the next of some scripted bodies; then it is silent.

    A body is the pieces of a chunked answer, each sent as one chunk; the last word is "FIN", "END" or "HOLD": close in
    the middle, end the answer in order, keep the connection open. asked: the start revisions of each request.
    """

    def __init__(self, *bodies: list[Any]) -> None:
        self.bodies, self.asked = list(bodies), list[list[int]]()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.held: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        for each in (self.listener, *self.held):
            each.close()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self.listener.accept()
                self._answer(peer)
            except OSError:
                return

    def _answer(self, peer: socket.socket) -> None:
        stream = peer.makefile("rb")
        length = 0
        while (line := stream.readline().strip()):
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        body = stream.read(length).decode()
        self.asked.append([int(json.loads(each)["create_request"]["start_revision"]) for each in body.splitlines()])
        *pieces, end = self.bodies.pop(0) if self.bodies else ["HOLD"]
        peer.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for piece in pieces:
            data = piece if isinstance(piece, bytes) else (json.dumps({"result": piece}) + "\n").encode()
            peer.sendall(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        if end == "END":
            peer.sendall(b"0\r\n\r\n")
        if end == "FIN":
            stream.close()
            peer.close()
        else:
            self.held.append(peer)


def at(revision: int) -> dict[str, str]:
    return {**HEADER, "revision": str(revision)}


def event(key: str, value: str, revision: int) -> dict[str, Any]:
    return {"kv": {"key": b64(key), "value": b64(value), "mod_revision": str(revision)}}


CREATED = {"header": at(9), "created": True}


@pytest.fixture
def scripted() -> Any:
    """Makes a script and a watch of /a from revision 9 on it; runs the watch until it has all wanted events."""
    made: list[Any] = []

    def run(wanted: list[tuple[int, str]], *bodies: list[Any], **options: Any) -> Script:
        script = Script(*bodies)
        etcd = Etcd([script.url], api="3", **options)
        etcd._base = "/v3"
        watch = Watch(etcd, ["/a"], 9)
        made.extend((script, watch, etcd))
        events, deadline = list[Any](), time.monotonic() + 40
        while [(each[0], each[3]) for each in events] != wanted or not watch.open:
            assert time.monotonic() < deadline and len(events) <= len(wanted), (events, watch.failure, script.asked)
            poll = select.poll()
            for fd in watch.descriptors():
                poll.register(fd, select.POLLIN)
            poll.poll(50)
            events += watch.step()
        return script

    yield run
    for each in reversed(made):
        each.close()


def test_a_line_that_is_cut_is_asked_for_again(scripted: Any) -> None:
    half = json.dumps({"result": {"header": at(11), "events": [event("/a", "2", 11)]}}).encode()[:-20]
    script = scripted([(10, "1"), (11, "2")],
                      [CREATED, {"header": at(10), "events": [event("/a", "1", 10)]}, half, "FIN"],
                      [CREATED | {"header": at(11)}, {"header": at(11), "events": [event("/a", "2", 11)]}, "HOLD"])
    assert script.asked == [[10], [11]]


def test_a_message_in_fragments_counts_when_it_is_whole(scripted: Any) -> None:
    first = {"header": at(10), "fragment": True, "events": [event("/a/1", "1", 10)]}
    last = {"header": at(10), "events": [event("/a/2", "2", 10)]}
    script = scripted([(10, "1"), (10, "2")], [CREATED, first, "FIN"], [CREATED, first, last, "HOLD"])
    assert script.asked == [[10], [10]]


def test_a_line_may_come_in_any_pieces_and_without_its_newline(scripted: Any) -> None:
    line = (json.dumps({"result": CREATED}) + "\n" + json.dumps(
        {"result": {"header": at(10), "events": [event("/a", "ü", 10)]}}) + "\n").encode()
    scripted([(10, "ü")], [*(line[index:index + 1] for index in range(len(line))), "HOLD"])
    script = scripted([(10, "ü")], [line[:-1], "END"], [CREATED, "HOLD"])  # as etcd 3.4 ends a stream
    assert script.asked == [[10], [11]]


@pytest.mark.parametrize("body", [
    [CREATED, {"header": at(9), "canceled": True}, "HOLD"],  # the server is done with it, and keeps the connection
    [CREATED, {"header": at(9), "canceled": True, "cancel_reason": "mvcc: store is closed"}, "HOLD"],
    [CREATED, b'{"error":{"grpc_code":14,"http_code":503,"message":"etcdserver: no leader"}}', "END"],
    [CREATED, "END"], ["END"], ["FIN"], [CREATED, b"<html>\n", "HOLD"], [CREATED, CREATED, "HOLD"],
    ["HOLD"],  # no byte ever, as from a member without a leader
])
def test_a_watch_that_ends_in_whatever_way_goes_on_where_it_was(scripted: Any, body: list[Any]) -> None:
    script = scripted([(10, "1")], body, [CREATED, {"header": at(10), "events": [event("/a", "1", 10)]}, "HOLD"],
                      answer_timeout=1.0)
    assert script.asked == [[10], [10]]


def test_a_progress_notice_moves_the_next_start(scripted: Any) -> None:
    script = scripted([(31, "1")], [CREATED, {"header": at(30)}, "FIN"],
                      [CREATED | {"header": at(31)}, {"header": at(31), "events": [event("/a", "1", 31)]}, "HOLD"])
    assert script.asked == [[10], [31]]


# ---- watches of real servers --------------------------------------------------------------------------

class Follower:
    """A Watch with its mirror, driven as the render loop does."""

    def __init__(self, urls: list[str], keys: list[str], api: str = "3", **options: Any) -> None:
        self.etcd = Etcd(urls, api=api, **options)
        self.mirror, self.keys = Mirror(), keys
        self.reads = 0
        self.batches: list[dict[str, bool]] = []
        self.story: list[str] = []  # what happened, for whoever has to find out why a test failed
        self.watch: Watch | None = None
        self.read()

    def read(self) -> None:
        revision, pairs = self.etcd.read(self.keys)
        self.reads += 1
        self.mirror.replace(revision, pairs, self.etcd.floors)
        if self.watch:
            self.watch.restart(revision)
        else:
            self.watch = self.etcd.watch(self.keys, revision)

    def run(self, until: Callable[[], object], seconds: float = 30) -> None:
        """Drive the watch until a condition holds."""
        deadline = time.monotonic() + seconds
        assert self.watch
        while not until():
            assert time.monotonic() < deadline, "\n".join([*self.story[-60:], str(self.mirror.tree.items()[:9])])
            poll = select.poll()
            for fd in self.watch.descriptors():
                poll.register(fd, select.POLLIN)
            poll.poll(min(50, max(0, (self.watch.deadline - time.monotonic()) * 1000)))
            events = self.watch.step()
            changed = self.mirror.apply(events)
            if changed:
                self.batches.append(changed)
            spans = [(span.next, span.id) for span in self.watch._spans]
            state = f"{self.watch._endpoint} {self.watch.open=} {self.watch.failure} {self.watch.stale} {spans}"
            if events or not self.story or not self.story[-1].endswith(state):
                self.story.append(f"{time.monotonic():.3f} {events[:3]} {state}")
            if self.watch.stale or self.mirror.doubtful:
                try:
                    self.read()
                except EtcdUnreachable:
                    time.sleep(0.1)

    def pause(self, seconds: float, until: Callable[[], object] = lambda: False) -> None:
        """Drive the watch for some time, or until a condition holds."""
        end = time.monotonic() + seconds
        self.run(lambda: until() or time.monotonic() > end)

    def sees(self, key: str, value: str | None, seconds: float = 30) -> None:
        self.run(lambda: self.mirror.tree.get(key) == value, seconds)

    def close(self) -> None:
        if self.watch:
            self.watch.close()
        self.etcd.close()


@pytest.fixture
def followers() -> Any:
    """Makes followers and closes them."""
    made: list[Follower] = []

    def make(*args: Any, **options: Any) -> Follower:
        made.append(Follower(*args, **options))
        return made[-1]

    yield make
    for follower in made:
        follower.close()


def test_changes_arrive_within_key_boundaries(etcd: EtcdServer, followers: Any) -> None:
    etcd.put_many([("/lb/a", "1"), ("/lbx", "no"), ("/o", "1")])
    follower = followers([etcd.url], ["/lb", "/o"])
    assert follower.mirror.tree.items() == [("/lb/a", "1"), ("/o", "1")]
    etcd.put("/lb-x/a", "no")
    etcd.put("/lbx", "no2")
    etcd.put("/lb/a", "2")
    etcd.put("/o/x", "3")
    follower.sees("/o/x", "3")
    follower.sees("/lb/a", "2")
    assert follower.mirror.tree.items() == [("/lb/a", "2"), ("/o", "1"), ("/o/x", "3")]
    etcd.call("/kv/deleterange", {"key": b64("/lb/"), "range_end": b64("/lb0")})
    follower.sees("/lb/a", None)
    assert follower.reads == 1


def test_many_keys_are_watched_by_few_requests(etcd: EtcdServer, followers: Any) -> None:
    keys = [f"/many/{group}{index:03d}" for group in ("a", "b/", "c/d/") for index in range(100)]
    for _ in range(5):  # etcd forgets what it has not read of a request when it answers: no luck shall be needed
        follower = followers([etcd.url], keys)
        follower.run(lambda follower=follower: follower.watch.open, 4)
        assert follower.watch.failure is None and len(follower.watch.descriptors()) <= 8
    etcd.put_many([(f"/many/{group}{index:03d}{end}", "1") for group in ("a", "b/", "c/d/") for index in range(100)
                   for end in ("", "x", "/y")])
    follower.run(lambda: len(follower.mirror.tree) == 600)
    assert not [key for key, _ in follower.mirror.tree.items() if key.endswith("x")] and follower.reads == 1


def test_a_transaction_arrives_as_one(etcd: EtcdServer, followers: Any) -> None:
    follower = followers([etcd.url], ["/t"])
    follower.run(lambda: follower.watch.open)
    for value in "123":
        etcd.put_many([(f"/t/{index}", value * 1000) for index in range(100)])
    follower.run(lambda: len(follower.mirror.tree) == 100 and follower.mirror.tree["/t/99"] == "3" * 1000)
    assert all(len(batch) == 100 for batch in follower.batches)


def test_a_large_catch_up_comes_in_fragments(etcd: EtcdServer, followers: Any) -> None:
    follower = followers([etcd.url], ["/big"])
    for index in range(12):
        etcd.put(f"/big/{index}", str(index % 10) * 500_000)
    follower.run(lambda: len(follower.mirror.tree) == 12)
    assert follower.reads == 1 and follower.mirror.tree["/big/3"] == "3" * 500_000


def test_tls_keeps_nothing_back(followers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcdinit, "READ_AT_ONCE", 50_000)
    monkeypatch.setattr(etcdinit, "PROBE_INTERVAL", 1000.0)  # nothing else shall make it look
    authority = Authority(tmp_path / "ca")
    certificate = authority.issue("IP:127.0.0.1")
    binary = find_etcd("3.5")
    need(binary, "etcd 3.5")
    assert binary
    server = EtcdServer(binary, tmp_path / "etcd", "--cert-file", certificate.cert_path, "--key-file",
                        certificate.key_path, scheme="https", context=authority.context()).start()
    try:
        follower = followers([server.url], ["/t"], tls=Tls(ca=Secret("ETCD_CA", authority.pem)))
        follower.run(lambda: follower.watch.open)
        for index in range(12):
            server.put(f"/t/{index:02d}", str(index % 10) * 200_000)
        poll = select.poll()
        poll.register(follower.watch.descriptors()[0], select.POLLIN)
        deadline = time.monotonic() + 60
        while len(follower.mirror.tree) < 12:  # as the render loop does it
            assert time.monotonic() < deadline
            poll.poll(max(0, int((follower.watch.deadline - time.monotonic()) * 1000) + 1) if
                      follower.watch.deadline < deadline else 45_000)
            follower.mirror.apply(follower.watch.step())
        assert time.monotonic() < deadline - 30
    finally:
        server.kill()


def test_a_compacted_revision_means_a_new_whole_read(etcd: EtcdServer, followers: Any) -> None:
    etcd.put("/c/a", "1")
    follower = followers([etcd.url], ["/c"])
    etcd.put("/c/a", "2")
    etcd.call("/kv/deleterange", {"key": b64("/c/a")})
    etcd.compact(etcd.put("/c/b", "3"))
    follower.sees("/c/b", "3")
    assert follower.reads == 2 and follower.mirror.tree.items() == [("/c/b", "3")]
    etcd.put("/c/b", "4")
    follower.sees("/c/b", "4")


def test_keys_spelled_in_two_ways_are_read_again(etcd: EtcdServer, followers: Any) -> None:
    etcd.put("/w/a", "1")
    follower = followers([etcd.url], ["/w"])
    etcd.put("/w/a/", "2")
    follower.sees("/w/a", "2")
    etcd.call("/kv/deleterange", {"key": b64("/w/a/")})
    follower.sees("/w/a", "1")


def test_the_wait_loop_of_v2_follows_too(etcd34: EtcdServer, followers: Any) -> None:
    for key in ("/w/a", "/w/d/x", "/w/d/y", "/o/k", "/wx"):
        etcd34.put_v2(key, "1")
    follower = followers([etcd34.url], ["/w", "/o"], "2")
    assert len(follower.mirror.tree) == 4
    for index in range(20):
        etcd34.put_v2("/w/a", str(index))
    etcd34.put_v2("/wx", "no")
    etcd34.put_v2("/o/k", "ü")
    follower.sees("/w/a", "19")
    follower.sees("/o/k", "ü")
    delete_v2(etcd34, "/w/d?recursive=true")
    follower.sees("/w/d/y", None)
    assert follower.mirror.tree.items() == [("/o/k", "ü"), ("/w/a", "19")] and follower.reads == 1


def delete_v2(server: EtcdServer, path: str) -> None:
    status, data, _ = http("DELETE", f"{server.url}/v2/keys{path}")
    assert status == 200, data


def test_a_v2_history_that_is_gone_means_a_new_whole_read(etcd34: EtcdServer, followers: Any) -> None:
    etcd34.put_v2("/h/a", "1")
    follower = followers([etcd34.url], ["/h"], "2")
    follower.close()
    etcd34.put_v2("/h/a", "2")
    for index in range(1001):  # the history holds 1000 events of the whole store
        etcd34.put_v2("/elsewhere", str(index))
    follower.sees("/h/a", "2")
    assert follower.reads == 2
    etcd34.put_v2("/h/a", "3")
    follower.sees("/h/a", "3")


# ---- what networks and members do ---------------------------------------------------------------------

@pytest.mark.parametrize("api", ["3", "2"])
def test_a_stream_cut_anywhere_loses_and_repeats_nothing(etcd34: EtcdServer, followers: Any, api: str) -> None:
    put = etcd34.put if api == "3" else etcd34.put_v2
    put("/p/a", "-")
    with Proxy(etcd34.port) as proxy:
        follower = followers([proxy.url], ["/p"], api)
        follower.run(lambda: follower.watch.open)
        for step, cut in enumerate([0, 1, 100, 200, 250, 300, 333, 400, 500, 700]):
            proxy.cut_after = cut
            proxy.cut()
            put("/p/a", f"{step}-{'x' * 20}")
            put("/p/b", f"{step}")
            follower.pause(0.3)
            proxy.cut_after = None
            proxy.cut()
            follower.sees("/p/a", f"{step}-{'x' * 20}")
            follower.sees("/p/b", f"{step}")
    assert follower.reads == 1


@pytest.mark.parametrize("api", ["3", "2"])
def test_a_silent_member_is_found_by_the_probe_and_left(etcd34: EtcdServer, followers: Any, api: str,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    put = etcd34.put if api == "3" else etcd34.put_v2
    monkeypatch.setattr(etcdinit, "PROBE_INTERVAL", 0.3)
    with Proxy(etcd34.port) as one, Proxy(etcd34.port) as two:
        follower = followers([one.url, two.url], ["/s"], api, answer_timeout=1.0)
        follower.run(lambda: follower.watch.open)
        assert not two.accepted
        one.frozen = True
        put("/s/a", "1")
        follower.sees("/s/a", "1")
        assert two.accepted and follower.reads == 1
        two.frozen, one.frozen = True, False
        put("/s/a", "2")
        follower.sees("/s/a", "2")


def test_an_idle_watch_costs_one_small_probe_in_its_interval(etcd35: EtcdServer, followers: Any,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcdinit, "PROBE_INTERVAL", 0.2)
    with Proxy(etcd35.port) as proxy:
        follower = followers([proxy.url], ["/i"])
        follower.run(lambda: follower.watch.open)
        connections, sent, began = proxy.accepted, proxy.upward, time.monotonic()
        follower.run(lambda: time.monotonic() > began + 2)
        probes = (time.monotonic() - began) / 0.2
        assert proxy.accepted == connections and sent < proxy.upward <= sent + probes * 350
        assert follower.watch.open and follower.reads == 1


def test_a_stopped_member_with_a_full_backlog_of_changes(etcd: EtcdServer, followers: Any,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcdinit, "PROBE_INTERVAL", 0.2)
    etcd.put("/z/a", "0")
    follower = followers([etcd.url], ["/z"], answer_timeout=0.5)
    follower.run(lambda: follower.watch.open)
    etcd.pause()
    try:
        follower.run(lambda: follower.watch.failure)
        assert isinstance(follower.watch.failure, EtcdUnreachable) and "no answer within" in str(follower.watch.failure)
    finally:
        etcd.resume()
    etcd.put("/z/a", "1")
    follower.sees("/z/a", "1")
    assert follower.watch.failure is None


def test_a_restored_cluster_with_a_lower_revision_is_taken_over(followers: Any, tmp_path: Path) -> None:
    binary = find_etcd("3.5")
    need(binary, "etcd 3.5")
    assert binary
    old = EtcdServer(binary, tmp_path / "old").start()
    for value in range(10):
        old.put("/r/a", str(value))
    follower = followers([old.url], ["/r"])
    follower.run(lambda: follower.watch.open)
    old.kill()
    new = EtcdServer(binary, tmp_path / "new", ports=(old.port, int(old.peer_url.rpartition(":")[2]))).start()
    try:
        new.put("/r/b", "restored")
        follower.sees("/r/b", "restored")
        assert follower.mirror.tree.items() == [("/r/b", "restored")]
        new.put("/r/b", "again")
        follower.sees("/r/b", "again")
    finally:
        new.kill()


@pytest.mark.parametrize("version, api", [("3.5", "3"), ("3.4", "2")])
def test_a_cluster_loses_members_and_its_quorum(version: str, api: str, followers: Any, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcdinit, "PROBE_INTERVAL", 0.5)
    binary = find_etcd(version)
    need(binary, f"etcd {version}")
    assert binary
    cluster = Cluster(binary, tmp_path, *(["--enable-v2=true"] if api == "2" else [])).start()
    members = cluster.members
    put = [member.put if api == "3" else member.put_v2 for member in members]
    try:
        put[0]("/k/a", "0")
        follower = followers(cluster.urls, ["/k"], api, answer_timeout=2.0)
        follower.run(lambda: follower.watch.open)
        members[0].kill()  # the one that we watch
        arrives(put[1], follower, "1")
        members[0].start()
        members[1].pause()
        arrives(put[2], follower, "2")
        members[0].kill()  # no quorum: one of three is left
        follower.run(lambda: follower.watch.failure)
        members[1].resume()
        arrives(put[1], follower, "3")
        assert follower.reads <= 3  # a member that is behind may look like an older state
    finally:
        cluster.kill()


def arrives(put: Callable[[str, str], object], follower: Follower, value: str) -> None:
    """Put a key until the follower has it: a put that fails without a leader may still happen, later."""
    deadline = time.monotonic() + 40
    while follower.mirror.tree.get("/k/a") != value:
        assert time.monotonic() < deadline, follower.story[-40:]
        try:
            put("/k/a", value)
        except (AssertionError, OSError):
            time.sleep(0.2)
        follower.pause(5, lambda: follower.mirror.tree.get("/k/a") == value)


def test_clean_keys_are_what_the_mirror_holds() -> None:
    mirror = Mirror()
    mirror.replace(1, [("/a//b/", "1")])
    assert mirror.tree.items() == [(clean_key("/a//b/"), "1")] and mirror.doubtful
