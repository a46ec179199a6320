"""The fake etcd is held against the real ones: the same requests, the same answers."""

from __future__ import annotations

from typing import Any

import pytest
from support.etcd_fake import FakeEtcd
from support.etcd_server import EtcdServer, b64, http

A, B, C, END = b64("/t/a"), b64("/t/b"), b64("/t/c"), b64("/t0")
ALL = {"key": b64("/t/"), "range_end": END}
PUT, RANGE, DELETE, TXN = "/kv/put", "/kv/range", "/kv/deleterange", "/kv/txn"

# (path, body); REV(n) is the revision n after the first put
V3: list[tuple[str, Any]] = [
    (RANGE, {"key": A}), (RANGE, ALL), (PUT, {"key": A, "value": b64("1")}),
    (PUT, {"key": B, "value": b64("ü\udcff\x00")}),
    (PUT, {"key": C}), (RANGE, ALL), (RANGE, {"key": A}), (RANGE, {**ALL, "limit": 2}), (RANGE, {**ALL, "limit": "3"}),
    (RANGE, {**ALL, "count_only": True}), (RANGE, {**ALL, "keys_only": True}), (RANGE, {"key": B, "range_end": "AA=="}),
    (RANGE, {"key": "AA==", "range_end": "AA==", "limit": 1}), (RANGE, {**ALL, "revision": "REV0"}),
    (RANGE, {**ALL, "revision": "REV99"}), (RANGE, {}), (RANGE, {"key": ""}), (PUT, {"value": A}),
    (RANGE, {"key": "_w=="}), (RANGE, {"key": "YQ"}), (RANGE, {"key": B, "range_end": A}),
    (PUT, {"key": A, "value": b64("2"), "prev_kv": True}), (PUT, {"key": A, "value": b64("3")}), (RANGE, {"key": A}),
    (DELETE, {"key": B, "prev_kv": True}), (DELETE, {"key": B}), (RANGE, {**ALL, "revision": "REV1"}), (RANGE, ALL),
    (TXN, {"success": [{"request_put": {"key": B, "value": b64("x")}}, {"request_range": {"key": B}},
                       {"request_delete_range": {"key": C}}]}),
    (TXN, {"compare": [{"key": A, "target": "VALUE", "value": b64("3")}], "success": [{"request_range": {"key": A}}]}),
    (TXN, {"compare": [{"key": A, "target": "VERSION", "version": "9"}], "success": [{"request_range": {"key": A}}],
           "failure": [{"request_put": {"key": C, "value": b64("f")}}]}),
    (TXN, {"compare": [{"key": b64("/t/no"), "target": "CREATE", "create_revision": 0}]}),
    (TXN, {"success": [{"request_range": {"key": A}}] * 129}), (TXN, {}),
    ("/kv/compaction", {"revision": "REV3"}), ("/kv/compaction", {"revision": "REV2"}),
    ("/kv/compaction", {"revision": "REV99"}), (RANGE, {**ALL, "revision": "REV2"}),
    (RANGE, {**ALL, "revision": "REV3"}),
    ("/auth/authenticate", {"name": "u", "password": "p"}), ("/no/such", {}), ("/kv/range/", {"key": A}),
]

V2: list[tuple[str, str, dict[str, str] | None]] = [
    ("GET", "/t", None), ("PUT", "/t/a", {"value": "1"}), ("PUT", "/t/a", {"value": "2"}),
    ("PUT", "/t/d/e/f", {"value": "ü \n"}), ("PUT", "/t/d/b", {"value": ""}),
    ("PUT", "/t/dir", {"dir": "true"}), ("PUT", "/t/_h/x", {"value": "h"}),
    ("GET", "/t", None),
    ("GET", "/t?recursive=true&quorum=true&sorted=true", None),
    ("GET", "/t/?recursive=true", None),
    ("GET", "/t/a?recursive=true&quorum=true", None), ("GET", "/t/_h?recursive=true", None), ("GET", "/t/no", None),
    ("GET", "/t/a/b", None), ("GET", "/t/d/e", None), ("GET", "/t/dir", None),
    ("PUT", "/t/a", {"value": "3", "prevExist": "false"}), ("PUT", "/t/no", {"value": "3", "prevExist": "true"}),
    ("PUT", "/t/a", {"value": "3", "prevExist": "true"}), ("PUT", "/t/a", {"value": "4", "prevValue": "nope"}),
    ("PUT", "/t/a", {"value": "4", "prevValue": "3"}), ("PUT", "/t/d", {"value": "x"}),
    ("PUT", "/t/a/x", {"value": "x"}),
    ("DELETE", "/t/d", None), ("DELETE", "/t/d?dir=true", None), ("DELETE", "/t/dir?dir=true", None),
    ("DELETE", "/t/a?prevValue=no", None), ("DELETE", "/t/a", None), ("DELETE", "/t/d?recursive=true", None),
    ("GET", "/t?recursive=true", None),
]


def normal(value: Any, base: int) -> Any:
    """An answer without what differs between clusters: ids, terms, and where revisions begin."""
    if isinstance(value, list):
        return [normal(item, base) for item in value]
    if not isinstance(value, dict):
        return value
    changed: dict[str, Any] = {}
    for name, item in value.items():
        if name in ("cluster_id", "member_id", "raft_term"):
            item = "any"
        elif name in ("revision", "create_revision", "mod_revision", "modifiedIndex", "createdIndex", "index"):
            item = int(item) - base
        elif name == "nodes":
            item = sorted(normal(item, base), key=lambda node: str(node["key"]))
        else:
            item = normal(item, base)
        changed[name] = item
    return changed


def replay_v3(url: str) -> list[Any]:
    base = int(http("POST", f"{url}/v3/kv/range", {"key": A})[1]["header"]["revision"])
    answers = []
    for path, body in V3:
        revision = str(body.get("revision", ""))
        if revision.startswith("REV"):
            body = {**body, "revision": base + 1 + int(revision[3:])}
        status, data, headers = http("POST", f"{url}/v3{path}", body)
        answers.append((path, body if "revision" not in body else revision, status, normal(data, base)))
    return answers


def replay_v2(url: str) -> list[Any]:
    base = int(http("GET", f"{url}/v2/keys/")[2]["x-etcd-index"])
    answers = []
    for method, path, form in V2:
        status, data, headers = http(method, f"{url}/v2/keys{path}", form=form, headers={
            "Content-Type": "application/x-www-form-urlencoded"})
        answers.append((method, path, form, status, int(headers["x-etcd-index"]) - base, normal(data, base)))
    return answers


def test_the_fake_answers_like_v3(etcd: EtcdServer, request: pytest.FixtureRequest) -> None:
    version = "3.4" if etcd is request.getfixturevalue("_etcd34") else "3.5"
    with FakeEtcd(version=version) as fake:
        for faked, real in zip(replay_v3(fake.url), replay_v3(etcd.url), strict=True):
            assert faked == real


def test_the_fake_answers_like_v2(etcd34: EtcdServer) -> None:
    with FakeEtcd() as fake:
        for faked, real in zip(replay_v2(fake.url), replay_v2(etcd34.url), strict=True):
            assert faked == real


def test_the_fake_has_no_v3_where_a_real_one_has_none() -> None:
    with FakeEtcd(bases=(), v2=False) as fake:
        assert http("POST", f"{fake.url}/v3/kv/range", {"key": A})[:2] == (404, "404 page not found\n")
        assert http("GET", f"{fake.url}/v2/keys/")[:2] == (404, "404 page not found\n")
