"""ETCD: endpoints, the HTTP parser, reading through the v3 gateway and the v2 keys API, faults."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import eventually, need
from support.etcd_fake import FakeEtcd
from support.etcd_server import EtcdServer, b64, find_etcd
from support.image import run

from etcdinit import (
    MAX_HEAD,
    Answer,
    Endpoint,
    Error,
    Etcd,
    EtcdAnswerError,
    EtcdCompacted,
    EtcdDenied,
    EtcdError,
    EtcdTooBig,
    EtcdUnreachable,
    KeyTree,
    Secret,
    TooBig,
    UsageError,
    at_or_below,
    http_request,
    key_ranges,
    mask,
    parse_endpoint,
    range_end,
    top_keys,
    v2_failure,
    v3_failure,
)

# ---- endpoints ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, url", [
    ("http://10.0.0.1:2379", "http://10.0.0.1:2379"), ("10.0.0.1:4001", "https://10.0.0.1:4001"),
    ("etcd1", "https://etcd1:2379"), ("https://etcd-1.example.org:443/", "https://etcd-1.example.org:443"),
    ("[::1]:2379", "https://[::1]:2379"), ("https://[fd00::1]", "https://[fd00::1]:2379"),
    (" a_b:1 ", "https://a_b:1"), ("HTTP://A:1//", "http://A:1"), ("a.example.org.:1", "https://a.example.org:1"),
    ("http://[fe80::1%eth0]:1", "http://[fe80::1%eth0]:1"), ("[fe80::1%25eth0]", "https://[fe80::1%eth0]:2379"),
    ("[fe80::1%25]", "https://[fe80::1%25]:2379"), ("[::ffff:10.0.0.1]:1", "https://[::ffff:10.0.0.1]:1"),
])
def test_an_endpoint_is_read_in_all_its_forms(text: str, url: str) -> None:
    assert str(parse_endpoint(text)) == url


@pytest.mark.parametrize("text", ["", "http://", "ftp://a:1", "a:0", "a:65536", "a:b", "::1", "[::1", "a b", "a:1/x",
                                  "http://a:1\r\nX: y", "[::1]x", "a:-1", "http://a:1/v3", "http://a:1?x", "a:1#x",
                                  "[1:2]", "[::g]", "[::1%]", "http:/a:1", ".a:1", "a..b:1", "ä:1", "a:1,b:1", "a:٣"])
def test_a_wrong_endpoint_is_quoted_with_examples(text: str) -> None:
    with pytest.raises(UsageError, match="not an etcd endpoint: .*example") as caught:
        parse_endpoint(text)
    assert "\n" not in str(caught.value)


PIECES = ["http", "https", "://", "[", "]", "::1", "fe80::1", "%", "25", "eth0", ":", "2379", "0", "/", ".", "a", "@"]


@given(st.text(max_size=40) | st.lists(st.sampled_from(PIECES), max_size=9).map("".join))
def test_any_text_is_an_endpoint_or_is_refused(text: str) -> None:
    try:
        endpoint = parse_endpoint(text)
    except UsageError as error:
        assert "\n" not in str(error)
    else:
        assert str(parse_endpoint(str(endpoint))) == str(endpoint)
        assert endpoint.authority.isascii() and "%" not in endpoint.authority and " " not in endpoint.authority
        assert http_request("GET", "/", endpoint.authority, {}).count(b"\r\n") == 5


def test_user_and_password_in_an_endpoint_are_refused_and_not_shown() -> None:
    with pytest.raises(UsageError, match="holds no user and password: set ETCD_USERNAME") as caught:
        parse_endpoint("http://root:geheim@10.0.0.1:2379")
    assert "geheim" not in str(caught.value)


def test_what_a_scope_and_a_last_dot_say_stays_here() -> None:
    for text, host, authority in (("[fe80::1%eth0]:1", "fe80::1%eth0", "[fe80::1]:1"),
                                  ("a.test.:1", "a.test.", "a.test:1")):
        endpoint = parse_endpoint(text)
        assert (endpoint.host, endpoint.authority) == (host, authority)
        assert endpoint.server_name == authority.rpartition(":")[0].strip("[]")


def test_a_list_of_endpoints_may_be_untidy() -> None:
    given_so = {"ETCD_ENDPOINTS": " https://a:1, a:1 ,,http://b:2\n\thttps://A:1/  b:2,"}
    assert [str(each) for each in Etcd.from_settings({}, given_so).endpoints] == [
        "https://a:1", "http://b:2", "https://A:1", "https://b:2"]
    with pytest.raises(UsageError, match="nothing tells where etcd is"):
        Etcd.from_settings({}, {"ETCD_ENDPOINTS": " , ", "ETCD_SRV_DOMAIN": ""})


@pytest.mark.parametrize("name", ["ETCD_CONNECT_TIMEOUT", "ETCD_ANSWER_TIMEOUT"])
def test_a_timeout_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"cannot use {name}: nothing is done in 0 s"):
        Etcd.from_settings({}, {"ETCD_ENDPOINTS": "a:1", name: "0s"})


def test_no_endpoint_and_no_api_are_told() -> None:
    with pytest.raises(UsageError, match="set ETCD_SRV_DOMAIN, ETCD_SRV_RECORD, ETCD_ENDPOINTS or --node .example"):
        Etcd([])
    with pytest.raises(UsageError, match='not an etcd API: "4"'):
        Etcd(["a:1"], api="4")


# ---- ranges -------------------------------------------------------------------------------------------

def test_keys_below_other_keys_are_not_asked_twice() -> None:
    assert top_keys(["/a/b", "/a", "/a/", "/ab", "/a-b"]) == ["/a", "/a-b", "/ab"]
    assert top_keys(["/x", "/"]) == ["/"]
    assert top_keys(["/x", "", "/"]) == [""]
    assert top_keys([]) == []


def test_ranges_are_merged_to_the_fewest() -> None:
    assert key_ranges(["/lb"]) == [(b"/lb", b"/lb0", ["/lb"])]
    assert key_ranges(["/lb", "/lb-x", "/o"]) == [(b"/lb", b"/lb0", ["/lb", "/lb-x"]), (b"/o", b"/o0", ["/o"])]
    assert key_ranges(["/"]) == [(b"/", b"0", ["/"])]
    assert key_ranges(["", "/a"]) == [(b"\0", b"\0", [""])]
    assert key_ranges([]) == []


def test_the_end_of_a_prefix() -> None:
    assert range_end(b"/a") == b"/b" and range_end(b"/a\xff\xff") == b"/b" and range_end(b"\xff") == b"\0"


parts = st.lists(st.sampled_from(["a", "b", "a-", "a0", "\udcff"]), min_size=1, max_size=3)
names = parts.map(lambda path: "/" + "/".join(path))


@given(st.lists(names, max_size=5), st.lists(names, max_size=10))
def test_ranges_and_boundaries_hold_what_was_asked_and_nothing_else(asked: list[str], stored: list[str]) -> None:
    expected = [key for key in stored if any(key == ask or key.startswith(ask + "/") for ask in asked)]
    ranges, wanted = key_ranges(asked), at_or_below(top_keys(asked))
    raw = {key: key.encode("utf-8", "surrogateescape") for key in stored}
    read = [key for key in stored if any(start <= raw[key] < end for start, end, _ in ranges)]
    assert [key for key in read if wanted(key)] == expected
    assert all(first[1] < second[0] for first, second in zip(ranges, ranges[1:], strict=False))


# ---- the HTTP parser ----------------------------------------------------------------------------------

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def parsed(*parts: bytes, limit: int = 1000) -> Answer:
    answer = Answer(limit)
    for part in parts:
        answer.feed(part)
    return answer


def test_an_answer_with_a_length() -> None:
    answer = parsed(OK + b"Content-Length: 5\r\n\r\nhel", b"lo")
    assert answer.done and answer.status == 200 and answer.body == b"hello" and answer.keep_alive
    assert answer.headers["content-type"] == "application/json"


def test_an_answer_in_chunks_is_there_as_it_comes() -> None:
    answer = parsed(OK + b"Transfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n2\r\nd")
    assert answer.head_done and not answer.done and answer.take() == b"abcd" and answer.take() == b""
    answer.feed(b"e\r\n0\r\nTrailer: x\r\n\r\n")
    assert answer.done and answer.take() == b"e" and answer.keep_alive


def test_an_answer_until_the_connection_closes() -> None:
    answer = parsed(b"HTTP/1.0 200 OK\r\n\r\nabc", b"d")
    assert not answer.done
    answer.feed(b"")
    assert answer.done and answer.body == b"abcd" and not answer.keep_alive


def test_no_content_and_interim_answers_have_no_body() -> None:
    assert parsed(b"HTTP/1.1 204 No Content\r\n\r\n").done
    answer = parsed(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    assert answer.done and answer.status == 200 and not answer.keep_alive


@pytest.mark.parametrize("parts, message", [
    ([b"SSH-2.0-x\r\n"], "not HTTP"), ([b"HTTP/2 200\r\n\r\n"], "not HTTP"), ([b"HTTP/1.1 abc\r\n\r\n"], "not HTTP"),
    ([b"\x15\x03\x01\x00\x02\x02"], "not HTTP"), ([b"HTTP/1.1 20\r\n\r\n"], "not HTTP"),
    ([b""], "closed without an answer"), ([b"HTTP/1.1 2", b""], "middle of the answer"),
    ([OK + b"Content-Length: 5\r\n\r\nhel", b""], "middle of the answer"),
    ([OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhel", b""], "middle of the answer"),
    ([OK + b"Content-Length: -5\r\n\r\n"], "malformed C"), ([OK + b"Content-Length: 1e3\r\n\r\n"], "malformed C"),
    ([OK + b"Transfer-Encoding: gzip\r\n\r\n"], "unknown transfer encoding"),
    ([OK + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n"], "malformed chunk"),
    ([OK + b"Transfer-Encoding: chunked\r\n\r\n\r\n"], "malformed chunk"),
    ([OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"0" * 2000], "malformed chunk"),
    ([OK + b"Transfer-Encoding: chunked\r\n\r\n1\r\nab\r\n"], "malformed chunk"),
    ([OK + b"no colon\r\n\r\n"], "malformed header"), ([OK + b" folded: x\r\n\r\n"], "malformed header"),
])
def test_what_is_not_an_answer_is_named(parts: list[bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parsed(*parts)


@pytest.mark.parametrize("parts", [
    [OK + b"X: " + b"x" * MAX_HEAD], [OK + b"X: " + b"x" * MAX_HEAD + b"\r\n\r\n"],
    [OK + b"Content-Length: 1001\r\n\r\n"],
    [OK + b"Transfer-Encoding: chunked\r\n\r\nfffffff\r\n" + b"x" * 1001], [OK + b"\r\n" + b"x" * 1001],
    [OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"x" * MAX_HEAD * 2],
])
def test_every_part_of_an_answer_has_a_bound(parts: list[bytes]) -> None:
    with pytest.raises(TooBig):
        parsed(*parts)


ANSWERS = [
    OK + b"Content-Length: 5\r\n\r\nhello",
    OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"Content-Length: 5\r\n\r\nhello",
]


@given(st.sampled_from(ANSWERS), st.lists(st.integers(0, 120), max_size=8))
def test_it_does_not_matter_how_an_answer_is_cut(data: bytes, cuts: list[int]) -> None:
    answer = Answer()
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    for start, end in zip(edges, edges[1:], strict=False):
        answer.feed(data[start:end])
    assert answer.done and answer.body == b"hello"


damages = st.tuples(st.integers(0, 120), st.binary(max_size=3))


@given(st.sampled_from(ANSWERS), st.lists(damages, min_size=1, max_size=4))
def test_a_damaged_answer_is_an_answer_or_a_value_error(data: bytes, damages: list[tuple[int, bytes]]) -> None:
    for place, damage in damages:
        data = data[:place] + damage + data[place + len(damage):]
    try:
        parsed(data, b"")
    except ValueError:
        pass


@contextmanager
def canned(*answers: bytes, host: str = "127.0.0.1", pause: float = 0.0) -> Iterator[str]:
    """A server that answers requests with these bytes in turn, the last one for ever; its URL."""
    left = list(answers)

    def serve(peer: socket.socket) -> None:
        with peer, suppress(OSError):
            while peer.recv(65536):
                peer.sendall(left.pop(0) if len(left) > 1 else left[0])
                time.sleep(pause)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host.partition("%")[0], 0), family=family) as listener:
        threading.Thread(target=accept, daemon=True).start()
        port = listener.getsockname()[1]
        yield f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        listener.shutdown(socket.SHUT_RDWR)


def value(text: str) -> bytes:
    """An answer that says that the key has this value."""
    body = f'{{"header":{{"revision":"7"}},"kvs":[{{"key":"{b64("/a")}","value":"{b64(text)}"}}]}}'.encode()
    return OK + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)


FIELDS = st.sampled_from(["error", "message", "code", "grpc_code", "errorCode", "cause", "details"])
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=4),
                    max_leaves=6)


@given(st.integers(100, 600), st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_body_of_a_failure_is_told_on_one_line(status: int, body: bytes) -> None:
    for failure in (v3_failure, v2_failure):
        kind, code, text = failure(status, body)
        assert issubclass(kind, EtcdError) and text.isprintable() and len(text) < 6000


SHAPES = {  # what an answer holds, field by field; each may be something else
    "/version": {"etcdserver": "3.5.0"},
    "/v3/maintenance/status": {"header": {"cluster_id": "1", "member_id": "2"}, "leader": "2"},
    "/v3/kv/range": {"header": {"revision": "7"}, "kvs": [{"key": b64("/a"), "value": b64("1")}], "more": False},
    "/v3/auth/authenticate": {"header": {}, "token": "t.1"},
    "/v2/keys": {"action": "get", "node": {"key": "/a", "value": "1", "dir": True, "nodes": [{"key": "/a/b"}]}},
}


@given(st.data(), st.sampled_from(["2", "3", "auto"]))
def test_answers_of_any_shape_are_taken_or_refused(data: st.DataObject, api: str) -> None:
    """A server that sends JSON of another shape than etcd's, anywhere, causes an EtcdError and nothing worse."""
    def twist(shape: Any) -> Any:
        if data.draw(st.integers(0, 7)) == 0:
            return data.draw(JSON)
        if isinstance(shape, dict):
            return {name: twist(value) for name, value in shape.items() if data.draw(st.integers(0, 9))}
        return [twist(value) for value in shape] if isinstance(shape, list) else shape

    class Odd(Etcd):
        __slots__ = ()

        def _exchange(self, endpoint: Endpoint, method: str, target: str, headers: Any, body: bytes, limit: int,
                      request: str) -> Answer:
            shape = next((shape for path, shape in SHAPES.items() if target.startswith(path)), {})
            text = json.dumps(twist(shape)).encode()
            status = data.draw(st.sampled_from([200] * 9 + [400, 404, 503]))
            return parsed(b"HTTP/1.1 %d X\r\nX-Etcd-Index: 5\r\nContent-Length: %d\r\n\r\n%s" % (
                status, len(text), text), limit=10_000)

    login = {"username": Secret("U", "app"), "password": Secret("P", "x")} if data.draw(st.booleans()) else {}
    client = Odd(["http://127.0.0.1:1"], api=api, scheme="http", answer_timeout=0.01, **login)  # type: ignore[arg-type]
    endpoint = client.endpoints[0]
    for ask in (lambda: client.get("/a"), lambda: client.read(["/a"]), lambda: client._leads(endpoint),
                lambda: client._auth_state(endpoint), lambda: client._server_version(endpoint)):
        with suppress(EtcdError):
            ask()


def test_what_comes_behind_an_answer_is_not_taken_for_the_next_one() -> None:
    with canned(value("1") + value("false"), value("2")) as url:
        client = impatient(url)
        assert client.get("/a") == "1" and client._connection is None
        assert client.get("/a") == "2"
        client.close()


def test_what_comes_while_nothing_is_asked_is_not_taken_for_an_answer() -> None:
    with canned(value("1"), value("2")) as url:
        client = impatient(url)
        assert client.get("/a") == "1" and client._connection
        assert not client._connection.is_over()
        client._connection._socket, ours = socket.socketpair()  # type: ignore[assignment]
        client._connection._socket.setblocking(False)
        ours.sendall(value("false"))
        assert client.get("/a") == "2"
        client.close()


@pytest.mark.parametrize("padding", [b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n", b"HTTP/1.1 100 C\r\n\r\n"])
def test_interim_answers_are_skipped_and_come_to_an_end(padding: bytes) -> None:
    with canned(padding * 50 + value("1")) as url:
        client = impatient(url)
        assert client.get("/a") == "1"
        client.close()
    with canned(padding * 20_000) as url, pytest.raises(EtcdTooBig, match="0 of them belong to the answer"):
        impatient(url).get("/a")


@pytest.mark.parametrize("part, belongs", [
    (b"1;a=" + b"x" * 900 + b"\r\nx\r\n", r"\d+"), (b"0\r\n" + b"X-Trailer: x\r\n" * 100_000, "0")])
def test_wrapping_around_nothing_comes_to_an_end(part: bytes, belongs: str) -> None:
    head = OK + b"Transfer-Encoding: chunked\r\n\r\n"
    with canned(head + part * (1 if b"Trailer" in part else 5000)) as url:
        with pytest.raises(EtcdTooBig, match=f"bytes have come, {belongs} of them belong to the answer"):
            impatient(url).get("/a")


def test_endpoints_with_an_ipv6_address_and_a_scope_are_reached() -> None:
    need("00000000000000000000000000000001" in Path("/proc/net/if_inet6").read_text(), "no IPv6 on loopback")
    for host in ("::1", "::1%lo"):
        with canned(value("6"), host=host) as url:
            client = impatient(url)
            assert client.get("/a") == "6"
            client.close()
    with pytest.raises(EtcdUnreachable, match=r"http://\[fe80::1%no-such\]:1: no (interface|such)"):
        impatient("http://[fe80::1%no-such]:1").get("/a")


def test_a_token_that_is_none_is_no_way_into_our_requests() -> None:
    for token in ('"x\\r\\nX-Evil: 1"', '"\u20ac"', "7", "null"):
        body = f'{{"header":{{}},"token":{token}}}'.encode()
        with canned(OK + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)) as url:
            login = {"username": Secret("U", "app"), "password": Secret("P", "x")}
            client = Etcd([url], scheme="http", answer_timeout=1.0, **login)  # type: ignore[arg-type]
            with pytest.raises(EtcdAnswerError, match='cannot log in as "app" at .*: the answer holds no token'):
                client.get("/a")


def test_a_token_is_blotted_out_of_what_a_server_says(fake: FakeEtcd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("etcdinit._secrets", [])
    body = b'{"header":{},"token":"token-one.7"}'
    echo = b"you sent Authorization: token-one.7"
    with canned(OK + b"Content-Length: %d\r\n\r\n%s" % (len(body), body),
                b"HTTP/1.1 400 Bad\r\nContent-Length: %d\r\n\r\n%s" % (len(echo), echo)) as url:
        client = Etcd([url], api="3", scheme="http", username=Secret("U", "app"), password=Secret("P", "x"))
        with pytest.raises(EtcdError) as caught:
            client.get("/a")
    assert "token-one.7" in str(caught.value) and "token-one.7" not in mask(str(caught.value))


def test_proxies_of_the_environment_are_not_asked(fake: FakeEtcd, program: list[str]) -> None:
    proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"), "http://127.0.0.1:1")
    assert run([*program, "get", "/a", "--node", fake.url], env=proxies).out == "1\n"


def test_a_request_is_complete() -> None:
    assert http_request("POST", "/x", "h:1", {"A": "b"}, b"{}").endswith(b"\r\nContent-Length: 2\r\nA: b\r\n\r\n{}")


COMPACTED = "etcdserver: mvcc: required revision has been compacted"


@pytest.mark.parametrize("status, body, kind, code, text", [
    (400, f'{{"error":"{COMPACTED}","message":"{COMPACTED}","code":11}}'.encode(), EtcdCompacted, 11, COMPACTED),
    (403, b'{"code":7,"message":"not you","details":[]}', EtcdDenied, 7, "not you"),
    (200, b'{"error":{"grpc_code":14,"http_code":503,"message":"no","http_status":"x"}}', EtcdUnreachable, 14, "no"),
    (200, b'{"error":{"code":14,"message":"no","details":[]}}', EtcdUnreachable, 14, "no"),
    (429, b'{"error":"big","code":8}', EtcdTooBig, 8, "big"),
    (405, b"Method Not Allowed\n", EtcdError, None, "Method Not Allowed"),
    (502, b"<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n<body>", EtcdUnreachable, None,
     "HTTP status 502: 502 Bad Gateway (is that etcd, or a proxy?)"),
    (503, b"<html>\nbad", EtcdUnreachable, None, "HTTP status 503: a web page (is that etcd, or a proxy?)"),
    (500, b"", EtcdUnreachable, None, "HTTP status 500 without a message"),
    (400, b"[" * 50_000, EtcdError, None, "[" * 200), (400, b'{"code":"x","message":7}', EtcdError, None, "7"),
    (400, b"\x1b[31m\r\n", EtcdError, None, "\\x1b[31m"),
])
def test_error_bodies_of_every_version_are_understood(status: int, body: bytes, kind: type[EtcdError],
                                                      code: int | None, text: str) -> None:
    assert v3_failure(status, body) == (kind, code, text)


# ---- reading from real servers ------------------------------------------------------------------------

LB = [("/lb", "leaf"), ("/lb/empty", ""), ("/lb/hosts/ä", "ü\n\"<>"), ("/lb/port", "80"), ("/lb-other/x", "no"),
      ("/lb.d", "no"), ("/lbx", "no"), ("/other/y", "y")]


def test_v3_reads_keys_with_their_boundaries(etcd: EtcdServer) -> None:
    revision = etcd.put_many(LB)
    client = Etcd([etcd.url])
    assert client.read(["/lb"]) == (revision, sorted(LB[:4]))
    assert client.api == 3
    assert client.read(["/lb/", "/lb/port", "/other/y", "/nope"]) == (revision, sorted(LB[:4]) + [("/other/y", "y")])
    assert sorted(client.read(["/"])[1]) == sorted(LB)
    assert client.read(["/nope"]) == (revision, [])
    assert client.read([]) == (0, [])
    assert client.get("/lb/port") == "80" and client.get("/lb/empty") == "" and client.get("/lb/hosts") is None
    client.close()
    assert client.get("/lb") == "leaf"  # it connects again
    client.close()


def test_v3_keeps_bytes_that_are_not_utf8(etcd: EtcdServer) -> None:
    etcd.put("/b/\udcff\udc80", "\udcfe\x00")
    client = Etcd([etcd.url])
    assert client.read(["/b"])[1] == [("/b/\udcff\udc80", "\udcfe\x00")]
    assert client.get("/b/\udcff\udc80") == "\udcfe\x00"
    client.close()


def test_v3_reads_the_whole_store_with_the_empty_key(etcd: EtcdServer) -> None:
    etcd.put_many([("stolon/x", "1"), ("/a", "2")])
    client = Etcd([etcd.url])
    assert client.read([""])[1] == [("/a", "2"), ("stolon/x", "1")]
    assert client.read(["/"])[1] == [("/a", "2")]
    assert client.read(["stolon"])[1] == [("stolon/x", "1")]
    client.close()


def test_fifty_thousand_keys_come_in_pages_of_one_revision(etcd: EtcdServer) -> None:
    pairs = [(f"/big/{n % 100:02d}/key-{n:05d}", f"value-of-some-length-{n:024d}") for n in range(50_000)]
    revision = etcd.put_many(pairs)
    client = Etcd([etcd.url])
    found, read = client.read(["/big"])
    client.close()
    assert found == revision and read == sorted(pairs)
    assert len(KeyTree(read, found).children("/big/42")) == 500


def test_v2_reads_keys(etcd34: EtcdServer) -> None:
    for key, value in [("/lb/port", "80"), ("/lb/empty", ""), ("/lb/hosts/ä b%", "ü\n\"<>"), ("/lbx", "no"),
                       ("/other", "y"), ("/lb/_hidden/x", "h")]:
        etcd34.put_v2(key, value)
    client = Etcd([etcd34.url], api="2")
    index, pairs = client.read(["/lb", "/other/", "/nope"])
    assert index > 0
    assert sorted(pairs) == [("/lb/empty", ""), ("/lb/hosts/ä b%", "ü\n\"<>"), ("/lb/port", "80"), ("/other", "y")]
    assert ("/lbx", "no") in client.read(["/"])[1]
    assert client.get("/lb/hosts/ä b%") == "ü\n\"<>" and client.get("/lb") is None and client.get("/nope") is None
    assert client.read(["/lb/_hidden"])[1] == [("/lb/_hidden/x", "h")]  # hidden from listings, there by its name
    client.close()


def test_api_auto_takes_v3_where_both_are(etcd34: EtcdServer) -> None:
    client = Etcd([etcd34.url])
    client.read(["/x"])
    assert client.api == 3
    client.close()


def test_a_server_without_v2_says_so(etcd35: EtcdServer) -> None:
    with pytest.raises(EtcdError, match=r"cannot read /x at etcd http://127.0.0.1:\d+: it has no v2 API .*ETCD_API=3"):
        Etcd([etcd35.url], api="2").read(["/x"])


def test_without_the_v3_gateway_v2_is_used_or_the_flag_is_named(tmp_path: Path) -> None:
    binary = find_etcd("3.4")
    need(binary, "etcd 3.4 is not installed")
    assert binary is not None
    server = EtcdServer(binary, tmp_path, "--enable-v2=true", "--enable-grpc-gateway=false").start()
    try:
        server.put_v2("/a/b", "1")
        client = Etcd([server.url])
        assert client.read(["/a"])[1] == [("/a/b", "1")] and client.api == 2
        client.close()
        with pytest.raises(EtcdError, match="no v3 JSON gateway .*--enable-grpc-gateway=true"):
            Etcd([server.url], api="3").read(["/a"])
    finally:
        server.kill()
    server = EtcdServer(binary, tmp_path / "neither", "--enable-grpc-gateway=false").start()
    try:
        with pytest.raises(EtcdError, match="neither a v3 JSON gateway .* nor a v2 API"):
            Etcd([server.url]).read(["/a"])
    finally:
        server.kill()


def test_an_endpoint_that_refuses_is_left_for_the_next(etcd: EtcdServer) -> None:
    etcd.put("/a", "1")
    client = Etcd(["http://127.0.0.1:1", etcd.url])
    assert client.get("/a") == "1"
    dead, working = client.endpoints
    assert dead.failures == 1 and dead.trouble == "connection refused" and dead.retry_at > 0
    assert client._order() == [working, dead]  # and it stays with the one that works
    client.close()


def test_when_no_endpoint_answers_each_is_named() -> None:
    dead = "http://127.0.0.1:1"
    with pytest.raises(EtcdUnreachable) as caught:
        Etcd([dead, "http://127.0.0.1:2"], api="3").read(["/a", "/b"])
    assert str(caught.value) == ("cannot read /a: no etcd endpoint answers: http://127.0.0.1:1: connection refused;"
                                 " http://127.0.0.1:2: connection refused")
    assert caught.value.exit_code == 3
    many = [f"/k{number}\n" for number in range(5)]
    with pytest.raises(EtcdUnreachable, match=r"^cannot read /k0\\n, /k1\\n, /k2\\n and 2 more at etcd "):
        Etcd([dead]).read(many)
    with pytest.raises(EtcdUnreachable, match=f"^cannot read /a at etcd {dead}: connection refused$") as caught:
        Etcd([dead], api="3").get("/a")
    assert isinstance(caught.value, Error)
    assert (caught.value.request, caught.value.endpoint, caught.value.code) == ("read /a", dead, None)


def test_an_endpoint_prints_as_its_url() -> None:
    assert str(Endpoint("http", "::1", 2379)) == "http://[::1]:2379"


# ---- faults -------------------------------------------------------------------------------------------

@pytest.fixture
def fake() -> Iterator[FakeEtcd]:
    with FakeEtcd() as server:
        server.put("/a", "1")
        yield server


def impatient(*urls: str, api: str = "3") -> Etcd:
    return Etcd(urls, api=api, connect_timeout=0.5, answer_timeout=0.5)


@pytest.mark.parametrize("api", ["2", "3"])
@pytest.mark.parametrize("fault, kind, message", [
    ("close", EtcdUnreachable, r"the connection was closed without an answer \(is it https\? then say https:// .*\)"),
    ("reset", EtcdUnreachable, "connection reset by peer"),
    ("stall", EtcdUnreachable, r"no answer within 0\.\d s"),
    ("half", EtcdAnswerError, "the connection was closed in the middle of the answer"),
    ("half stall", EtcdUnreachable, r"no answer within 0\.\d s"),
    ("drip", EtcdUnreachable, r"no answer within [\d.]+ s"),
    ("garbage", EtcdAnswerError, "the answer is not HTTP"),
    ("html", EtcdAnswerError, r"the answer of 13 bytes is not a JSON object \(is it an etcd\?\)"),
    ("wrong form", EtcdAnswerError, "the answer has not the form of a (range|node)"),
    ("endless", EtcdTooBig, "the answer is larger than .*"),
])
def test_a_broken_answer_ends_in_time_with_its_reason(fake: FakeEtcd, api: str, fault: str, kind: type[EtcdError],
                                                      message: str) -> None:
    fake.fail(fault, 20)
    client = impatient(fake.url, api=api) if "within" in message else Etcd([fake.url], api=api)
    with pytest.raises(EtcdError, match=f"^cannot read /a at etcd {fake.url}: {message}$") as caught:
        client.read(["/a"])
    assert type(caught.value) is kind
    fake.faults.clear()
    assert client.read(["/a"])[1] == [("/a", "1")]  # nothing of it stays in the client
    client.close()


def test_thirty_megabytes_of_garbage_are_refused_before_they_are_read(fake: FakeEtcd) -> None:
    fake.fail("big", 20)
    with pytest.raises(EtcdTooBig, match="cannot read /a at .* the answer of 31457280 bytes is larger than 16777216"):
        impatient(fake.url).read(["/a"])
    fake.faults[:] = ["big"]
    with pytest.raises(EtcdAnswerError, match="the answer of 31457280 bytes is not a JSON object"):
        Etcd([fake.url], api="2").read(["/a"])


@pytest.mark.parametrize("fault", ["close", "reset", "stall", "half", "garbage", "html", (14, "etcdserver: no leader"),
                                   (2, "context deadline exceeded")])
def test_a_broken_member_is_left_for_the_next(fake: FakeEtcd, fault: str | tuple[int, str]) -> None:
    with FakeEtcd() as broken:
        broken.fail(fault, 20)
        client = impatient(broken.url, fake.url)
        assert client.read(["/a"])[1] == [("/a", "1")]
        asked = len(broken.requests)
        assert client.get("/a") == "1" and len(broken.requests) == asked
        client.close()


def test_a_connection_that_the_server_closed_meanwhile_is_opened_again(fake: FakeEtcd) -> None:
    client = impatient(fake.url)
    assert client.get("/a") == "1" and client.get("/a") == "1" and fake.connections == 1
    fake.fail("close")
    assert client.get("/a") == "1" and fake.connections == 2
    client.close()


def test_a_connection_that_the_server_has_closed_is_not_used(fake: FakeEtcd) -> None:
    client = impatient(fake.url)
    assert client.get("/a") == "1" and client._connection
    for peer in list(fake.peers):
        peer.shutdown(socket.SHUT_RDWR)  # as etcd does with connections that nobody uses
    assert eventually(client._connection.is_over)
    asked = len(fake.requests)
    assert client.get("/a") == "1" and fake.connections == 2
    assert len(fake.requests) == asked + 1  # and nothing was asked twice
    client.close()


def test_a_refusal_names_endpoint_request_and_message(fake: FakeEtcd) -> None:
    fake.fail((7, "etcdserver: permission denied"), 3)
    with pytest.raises(EtcdDenied) as caught:
        impatient(fake.url).read(["/a"])
    assert str(caught.value) == f"cannot read /a at etcd {fake.url}: etcdserver: permission denied" \
                                " (the role of the user does not hold it)"
    assert (caught.value.code, caught.value.exit_code) == (7, 1)


@pytest.mark.parametrize("version", ["3.4", "3.5", "3.6"])
def test_a_compaction_between_two_pages_starts_again(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr("etcdinit.PAGE", 10)
    with FakeEtcd(version) as fake:
        for number in range(25):
            fake.put(f"/k/{number:02d}", "old")
        ranges = 0

        def compact(path: str) -> None:
            nonlocal ranges
            ranges += 1
            if ranges == 2:
                fake.put("/k/00", "new")
                fake.v3.compact(fake.v3.revision)

        fake.before = compact
        client = impatient(fake.url)
        revision, pairs = client.read(["/k"])
        assert revision == fake.v3.revision and len(pairs) == 25 and pairs[0] == ("/k/00", "new")
        assert ranges == 2 + 3

        def compact_always(path: str) -> None:
            fake.put("/k/00", "newer")
            fake.v3.compact(fake.v3.revision)

        fake.before = compact_always
        with pytest.raises(EtcdCompacted, match="cannot read /k at .*required revision has been compacted"):
            client.read(["/k"])
        client.close()


def test_a_real_compaction_between_two_pages_starts_again(etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("etcdinit.PAGE", 10)
    first = etcd.put_many((f"/k/{number:02d}", "x") for number in range(25))
    client = Etcd([etcd.url], api="3")
    with pytest.raises(EtcdCompacted, match="required revision is a future revision"):
        client._pages(b"/k/", b"/k0", first + 99, "read /k", [])
    etcd.compact(etcd.put("/k/00", "y"))
    with pytest.raises(EtcdCompacted, match="required revision has been compacted"):
        client._pages(b"/k/", b"/k0", first, "read /k", [])
    assert client.read(["/k"])[1][0] == ("/k/00", "y")
    client.close()


def test_pages_are_halved_until_the_gateway_can_carry_them() -> None:
    with FakeEtcd("3.4", largest=2000) as fake:
        for number in range(40):
            fake.put(f"/k/{number:02d}", "v" * 100)
        client = impatient(fake.url)
        assert len(client.read(["/k"])[1]) == 40
        fake.put("/k/00", "v" * 3000)
        with pytest.raises(EtcdTooBig, match=r"grpc: received message larger than max \(\d+ vs. 2000\)"):
            client.read(["/k"])
        client.close()


def test_pages_are_halved_when_they_are_larger_than_our_own_bound(etcd: EtcdServer) -> None:
    for number in range(20):
        etcd.put(f"/big/{number:02d}", "x" * 1_000_000)
    client = Etcd([etcd.url])
    pairs = client.read(["/big"])[1]
    assert [len(value) for _, value in pairs] == [1_000_000] * 20
    client.close()


def test_pages_that_never_end_are_noticed(fake: FakeEtcd, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        fake.put(f"/k/{number}", "x")
    whole = fake.v3.range
    fake.v3.range = lambda body, revision: {**whole({**body, "key": b64("/k")}, revision), "more": True}  # type: ignore
    with pytest.raises(EtcdTooBig, match="cannot read /k at .*the same ones again"):
        impatient(fake.url).read(["/k"])


@pytest.mark.parametrize("bases", [("/v3beta",), ("/v3beta", "/v3alpha"), ("/v3alpha",)])
def test_the_gateway_of_older_servers_is_found(bases: tuple[str, ...]) -> None:
    with FakeEtcd("3.4", bases=bases, v2=False) as fake:
        fake.put("/a", "1")
        client = impatient(fake.url, api="auto")
        assert client.read(["/a"])[1] == [("/a", "1")]
        fake.requests.clear()
        assert client.get("/a") == "1"
        assert [target for _, target, _ in fake.requests] == [f"{bases[0]}/kv/range"]
        client.close()


def test_errors_never_hold_a_value(fake: FakeEtcd) -> None:
    fake.put("/a", "geheim")
    fake.fail("half", 3)
    with pytest.raises(EtcdError) as caught:
        impatient(fake.url).read(["/a"])
    assert "geheim" not in str(caught.value) and b64("geheim") not in str(caught.value)
