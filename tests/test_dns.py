"""The DNS room, against real dnsmasq, real nsd, a server that lies, and random bytes."""

from __future__ import annotations

import random
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import dns_servers, free_port, need
from support.dns_servers import MANY, Liar, Query, a, config_for, record, srv

import etcdinit
from etcdinit import DNS_A, DNS_AAAA, DNS_CNAME, DNS_SRV, DnsError

ETCD = "_etcd-client._tcp.example.org"
BIG = "_big._tcp.example.org"


def soon(seconds: float = 1.0) -> float:
    """A deadline for lookups that are meant to fail by it."""
    return etcdinit.now() + seconds


@pytest.fixture(autouse=True)
def nothing_is_known_of_servers() -> None:
    """What one test learnt of a server must not reach the next, which may get the same port."""
    etcdinit._dns_silent.clear()
    etcdinit._dns_plain.clear()


@pytest.fixture(scope="module")
def dnsmasq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    with dns_servers.dnsmasq(tmp_path_factory.mktemp("dnsmasq")) as server:
        yield server


@pytest.fixture(scope="module")
def nsd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    with dns_servers.nsd(tmp_path_factory.mktemp("nsd")) as server:
        yield server


@pytest.fixture(params=["dnsmasq", "nsd"])
def server(request: pytest.FixtureRequest) -> tuple[str, int]:
    found: tuple[str, int] = request.getfixturevalue(request.param)
    return found


# ---- real servers -------------------------------------------------------------------------------------

def test_three_records_come_in_order_with_the_addresses_of_their_targets(server: tuple[str, int]) -> None:
    found = etcdinit.resolve_srv(ETCD + ".", config=config_for(server))
    assert [r.priority for r in found.records] == [0, 0, 10]
    assert {(r.target, r.port, r.weight, *r.addresses) for r in found.records} == {
        ("etcd1.example.org", 2379, 10, "127.0.0.1", "::1"),
        ("etcd2.example.org", 2379, 20, "127.0.0.2"),
        ("etcd3.example.org", 2379, 0, "127.0.0.3"),
    }


def test_sixty_records_come_whole_over_tcp(server: tuple[str, int]) -> None:
    found = etcdinit.resolve_srv(BIG + ".", config=config_for(server))
    assert len({r.target for r in found.records}) == MANY
    assert all(len(r.addresses) == 1 for r in found.records)


def test_sixty_records_come_whole_from_a_server_without_edns(server: tuple[str, int]) -> None:
    etcdinit._dns_plain.add(server)
    assert len(etcdinit.resolve_srv(BIG + ".", config=config_for(server), addresses=False).records) == MANY


def test_the_ttl_is_the_lowest_of_all_records_used(nsd: tuple[str, int]) -> None:
    config = config_for(nsd)
    assert etcdinit.resolve_srv(ETCD + ".", config=config).ttl == 30  # an address of etcd1
    assert etcdinit.resolve_srv("_chain._tcp.example.org.", config=config).ttl == 10  # the second alias


def test_an_alias_of_a_host_is_followed(server: tuple[str, int]) -> None:
    assert etcdinit.resolve_address("alias.example.org", config=config_for(server)) == ["127.0.0.1", "::1"]


def test_a_chain_of_aliases_leads_to_the_records(nsd: tuple[str, int]) -> None:
    found = etcdinit.resolve_srv("_chain._tcp.example.org.", config=config_for(nsd))
    assert {r.target for r in found.records} == {f"etcd{n}.example.org" for n in (1, 2, 3)}


def test_a_loop_of_aliases_is_cut(nsd: tuple[str, int]) -> None:
    with pytest.raises(etcdinit.DnsLoop, match=r"SRV _loop\._tcp\.example\.org: .*circle.*127\.0\.0\.1"):
        etcdinit.resolve_srv("_loop._tcp.example.org.", config=config_for(nsd))


def test_an_alias_of_a_missing_name_says_which_name_is_missing(nsd: tuple[str, int]) -> None:
    with pytest.raises(etcdinit.DnsNxdomain, match=r"its alias nowhere\.example\.org does not exist"):
        etcdinit.resolve_srv("_dangling._tcp.example.org.", config=config_for(nsd))


def test_the_target_dot_says_that_the_service_is_not_offered(server: tuple[str, int]) -> None:
    with pytest.raises(etcdinit.DnsNotOffered, match="not offered"):
        etcdinit.resolve_srv("_none._tcp.example.org.", config=config_for(server))


def test_a_missing_name_names_question_and_server(server: tuple[str, int]) -> None:
    with pytest.raises(etcdinit.DnsNxdomain) as caught:
        etcdinit.resolve_srv("_nothing._tcp.example.org.", config=config_for(server))
    assert str(caught.value) == (f"cannot resolve SRV _nothing._tcp.example.org: the name does not exist, says "
                                 f"[127.0.0.1]:{server[1]} (NXDOMAIN; check the spelling and the zone)")
    assert not caught.value.temporary


def test_a_name_without_the_record_is_told_from_a_missing_one(server: tuple[str, int]) -> None:
    with pytest.raises(etcdinit.DnsNodata, match="the name has no SRV record"):
        etcdinit.resolve_srv("etcd1.example.org.", config=config_for(server))


def test_a_no_carries_the_ttl_of_the_zone(nsd: tuple[str, int]) -> None:
    for name in ("_nothing._tcp.example.org.", "etcd1.example.org."):
        with pytest.raises(DnsError) as caught:
            etcdinit.resolve_srv(name, config=config_for(nsd))
        assert caught.value.ttl == 60


def test_a_host_without_addresses(nsd: tuple[str, int]) -> None:
    with pytest.raises(etcdinit.DnsNodata, match="neither an A nor an AAAA record"):
        etcdinit.resolve_address("text.example.org.", config=config_for(nsd))


def test_a_host_with_ipv6_alone(nsd: tuple[str, int]) -> None:
    assert etcdinit.resolve_address("six.example.org.", config=config_for(nsd)) == ["2001:db8::6"]


def test_refused_says_what_to_check(server: tuple[str, int]) -> None:
    with pytest.raises(etcdinit.DnsRefused, match=r"SRV _x\.example\.net: .*REFUSED .*check the nameserver lines"):
        etcdinit.resolve_srv("_x.example.net.", config=config_for(server))


def test_servfail_is_temporary(nsd: tuple[str, int]) -> None:
    with pytest.raises(etcdinit.DnsServfail, match="SERVFAIL") as caught:
        etcdinit.resolve_srv("_x.broken.example.", config=config_for(nsd))
    assert caught.value.temporary


def test_the_next_server_is_asked_after_refused_and_servfail(dnsmasq: tuple[str, int], nsd: tuple[str, int]) -> None:
    with Liar(lambda q: [q.answer(a(q.name, "192.0.2.7"))] if q.type == DNS_A else [q.answer()]) as third:
        config = config_for(dnsmasq, nsd, third.server)  # REFUSED, SERVFAIL, an address
        assert etcdinit.resolve_address("host.broken.example.", config=config) == ["192.0.2.7"]


def test_a_no_is_final_and_the_next_server_is_not_asked(nsd: tuple[str, int]) -> None:
    with Liar(lambda q: [q.answer(a(q.name))]) as second, pytest.raises(etcdinit.DnsNxdomain):
        etcdinit.resolve_address("nothing.example.org.", config=config_for(nsd, second.server))
    assert second.seen == []


def test_a_silent_first_server_costs_its_timeout_once(nsd: tuple[str, int]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        silent.setblocking(False)
        config = config_for(silent.getsockname(), nsd, options="options timeout:1")
        for _ in range(3):
            assert len(etcdinit.resolve_srv(ETCD + ".", config=config).records) == 3
        assert silent.recv(512)
        with pytest.raises(BlockingIOError):
            silent.recv(512)


def test_a_closed_first_server_costs_nothing(nsd: tuple[str, int]) -> None:
    config = config_for(("127.0.0.1", free_port()), nsd)
    assert len(etcdinit.resolve_srv(ETCD + ".", config=config).records) == 3


def test_every_dead_server_is_named_and_the_deadline_kept() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        silent_port, port = silent.getsockname()[1], free_port()
        config = config_for(("127.0.0.1", silent_port), ("127.0.0.1", port))
        with pytest.raises(DnsError) as caught:
            etcdinit.resolve_srv(ETCD, soon(0.4), config)
    assert f"[127.0.0.1]:{port}: connection refused" in str(caught.value)
    assert f":{silent_port}: timed out after" in str(caught.value)
    assert len(caught.value.servers) == 2


def test_a_deadline_that_is_over_asks_nobody() -> None:
    with Liar(lambda q: [q.answer()]) as liar, pytest.raises(etcdinit.DnsTimeout, match="no time was left"):
        etcdinit.resolve_srv(ETCD, soon(-1), config_for(liar.server))
    assert liar.seen == []


def test_a_target_without_address_does_not_hide_the_others(nsd: tuple[str, int]) -> None:
    good, lost = etcdinit.resolve_srv("_half._tcp.example.org.", config=config_for(nsd)).records
    assert (good.addresses, good.error) == (["127.0.0.1", "::1"], None)
    assert lost.addresses == [] and "missing.example.org" in str(lost.error)


def test_no_target_with_an_address_fails_and_names_target_and_service(nsd: tuple[str, int]) -> None:
    with pytest.raises(DnsError, match=r"A missing\.example\.org: .*target of SRV _lost\._tcp\.example\.org"):
        etcdinit.resolve_srv("_lost._tcp.example.org.", config=config_for(nsd))


def test_a_target_that_is_no_host_name_is_left_out(nsd: tuple[str, int]) -> None:
    found = etcdinit.resolve_srv("_odd._tcp.example.org.", config=config_for(nsd))
    assert [r.target for r in found.records] == ["etcd2.example.org"]


def test_the_hosts_file_goes_before_dns(nsd: tuple[str, int]) -> None:
    config = config_for(nsd, hosts="192.0.2.5 ETCD1.example.org\n192.0.2.6 etcd1.far.example.net # far\n")
    by_target = {r.target: r.addresses for r in etcdinit.resolve_srv(ETCD + ".", config=config).records}
    assert by_target["etcd1.example.org"] == ["192.0.2.5"]
    assert by_target["etcd2.example.org"] == ["127.0.0.2"]
    assert etcdinit.resolve_srv("_far._tcp.example.org.", config=config).records[0].addresses == ["192.0.2.6"]
    assert etcdinit.resolve_address("etcd1.example.org", config=config) == ["192.0.2.5"]


def test_the_search_list_completes_a_short_name(nsd: tuple[str, int]) -> None:
    config = config_for(nsd, options="search example.org")
    assert etcdinit.resolve_address("etcd2", config=config) == ["127.0.0.2"]
    assert etcdinit.resolve_address("short.sub", config=config) == ["127.0.0.77"]  # REFUSED as it stands
    assert len(etcdinit.resolve_srv("_etcd-client._tcp", config=config).records) == 3
    with pytest.raises(etcdinit.DnsRefused):
        etcdinit.resolve_address("etcd2.", config=config)


@pytest.mark.parametrize(("name", "ndots", "order"), [
    ("host", 1, ["host.one.test", "host.two.test", "host"]),
    ("host.sub", 1, ["host.sub", "host.sub.one.test", "host.sub.two.test"]),
    ("host.sub", 2, ["host.sub.one.test", "host.sub.two.test", "host.sub"]),
    ("host.sub.", 5, ["host.sub"]),
])
def test_search_and_ndots_set_the_order(name: str, ndots: int, order: list[str]) -> None:
    with Liar(lambda q: [q.answer(flags=0x8183)]) as liar:
        config = config_for(liar.server, options=f"search one.test two.test\noptions ndots:{ndots}")
        with pytest.raises(etcdinit.DnsNxdomain) as caught:
            etcdinit.resolve_address(name, config=config)
    assert [q.name for q in liar.seen] == order
    assert len(order) == 1 or f"asked for {', '.join(order)}" in str(caught.value)


def test_rotate_spreads_the_questions() -> None:
    with Liar(lambda q: [q.answer(a(q.name))]) as one, Liar(lambda q: [q.answer(a(q.name))]) as two:
        config = config_for(one.server, two.server, options="options rotate")
        for _ in range(40):
            etcdinit.resolve_address("host.test.", config=config)
    assert one.seen and two.seen


def test_a_nameserver_with_an_ipv6_address() -> None:
    need("00000000000000000000000000000001" in Path("/proc/net/if_inet6").read_text(), "no IPv6 on loopback")
    with Liar(lambda q: [q.answer(a(q.name, "192.0.2.6"))], "::1") as liar:
        assert "192.0.2.6" in etcdinit.resolve_address("host.test.", config=config_for(liar.server))
        scoped = config_for(("::1%lo", liar.server[1]))
        assert "192.0.2.6" in etcdinit.resolve_address("host.test.", config=scoped)


def test_addresses_and_localhost_need_no_server() -> None:
    config = config_for(("127.0.0.1", free_port()))
    assert etcdinit.resolve_address("10.1.2.3", config=config) == ["10.1.2.3"]
    assert etcdinit.resolve_address("[fe80::1%eth0]", config=config) == ["fe80::1%eth0"]
    assert etcdinit.resolve_address("LocalHost.", config=config) == ["127.0.0.1", "::1"]


def test_a_template_gets_no_address_instead_of_an_error(nsd: tuple[str, int], tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "resolv.conf").write_text(f"nameserver [127.0.0.1]:{nsd[1]}\n")
    monkeypatch.setenv("ETCDINIT_RESOLV_CONF", str(tmp_path / "resolv.conf"))
    assert etcdinit.host_addresses("etcd1.example.org") == ["127.0.0.1", "::1"]
    assert etcdinit.host_addresses("nothing.example.org") == []
    assert etcdinit.host_addresses("not a name") == []


# ---- servers that fail and lie ------------------------------------------------------------------------

def only_a(reply: Callable[[Query], list[bytes]]) -> Callable[[Query], list[bytes]]:
    """Lie about A; of AAAA there is none, and that is the truth."""
    return lambda q: reply(q) if q.type == DNS_A else [q.answer()]


def look(liar: Liar, seconds: float = 10.0, options: str = "") -> list[str]:
    return etcdinit.resolve_address("host.test.", soon(seconds), config_for(liar.server, options=options))


FALSE, TRUE = "192.0.2.66", "192.0.2.1"

LIES: dict[str, Callable[[Query], bytes]] = {
    "wrong id": lambda q: q.answer(a(q.name, FALSE), id=q.id ^ 1),
    "another name in the question": lambda q: q.answer(
        a(q.name, FALSE), question=etcdinit.encode_dns_name("other.test") + b"\0\1\0\1"),
    "another type in the question": lambda q: q.answer(
        a(q.name, FALSE), question=etcdinit.encode_dns_name(q.name) + b"\0\x1c\0\1"),
    "another class in the question": lambda q: q.answer(
        a(q.name, FALSE), question=etcdinit.encode_dns_name(q.name) + b"\0\1\0\3"),
    "no question": lambda q: struct.pack("!HHHHHH", q.id, 0x8180, 0, 1, 0, 0) + a(q.name, FALSE),
    "a query, not a response": lambda q: q.answer(a(q.name, FALSE), flags=0x0100),
    "another opcode": lambda q: q.answer(a(q.name, FALSE), flags=0x9180),
    "nothing": lambda q: b"\0",
    "half a header": lambda q: q.answer()[:7],
    "64 KB of zeros": lambda q: bytes(65507),
    "64 KB of ones": lambda q: b"\xff" * 65507,
}


@pytest.mark.parametrize("lie", LIES)
def test_a_datagram_that_is_not_the_answer_is_ignored(lie: str) -> None:
    with Liar(only_a(lambda q: [LIES[lie](q), q.answer(a(q.name, TRUE))])) as liar:
        assert look(liar) == [TRUE]
    assert not any(q.tcp for q in liar.seen)


def test_lies_alone_end_at_the_deadline() -> None:
    with Liar(lambda q: [lie(q) for lie in LIES.values()]) as liar, pytest.raises(etcdinit.DnsTimeout):
        look(liar, 0.3)


def test_a_flood_of_lies_makes_the_server_be_left() -> None:
    with Liar(lambda q: [LIES["wrong id"](q)] * 150) as liar:
        with pytest.raises(etcdinit.DnsServfail, match="100 datagrams that answer something else"):
            look(liar)


def test_the_letters_of_the_question_may_change_their_case() -> None:
    with Liar(only_a(lambda q: [q.answer(a("HOST.test", TRUE), question=q.question.upper())])) as liar:
        assert look(liar) == [TRUE]


def test_an_answer_from_another_source_is_not_heard() -> None:
    def reply(q: Query) -> list[bytes]:
        liar.elsewhere.sendto(q.answer(a(q.name, FALSE)), liar.peer)
        return [q.answer(a(q.name, TRUE))] if len(liar.seen) > 1 else []

    with Liar(only_a(reply)) as liar:
        assert look(liar, options="options timeout:1") == [TRUE]


def test_a_late_answer_does_not_reach_the_next_try() -> None:
    late: list[bytes] = []

    def reply(q: Query) -> list[bytes]:
        if not late:
            late.append(q.answer(a(q.name, FALSE)))
            return []
        return [late[0], q.answer(a(q.name, TRUE))]

    with Liar(only_a(reply)) as liar:
        assert look(liar, options="options timeout:1") == [TRUE]
    assert len({q.id for q in liar.seen}) > 1


def test_answers_for_other_names_are_not_taken() -> None:
    with Liar(only_a(lambda q: [q.answer(a("other.test", FALSE), a("host.test.evil.test", FALSE))])) as liar:
        with pytest.raises(etcdinit.DnsNodata):
            look(liar)


def test_additional_addresses_count_only_for_targets() -> None:
    def reply(q: Query) -> list[bytes]:
        if q.type == DNS_SRV:
            return [q.answer(srv(q.name, "one.test"), a("other.test", FALSE), a("_s.test", FALSE), counts=(1, 0, 2))]
        return [q.answer(a(q.name, TRUE))] if q.type == DNS_A else [q.answer()]

    with Liar(reply) as liar:
        assert etcdinit.resolve_srv("_s.test.", config=config_for(liar.server)).records[0].addresses == [TRUE]


def test_a_server_that_does_not_follow_aliases_is_asked_again() -> None:
    def reply(q: Query) -> list[bytes]:
        if q.name == "host.test":
            return [q.answer(record(q.name, DNS_CNAME, etcdinit.encode_dns_name("real.test")))]
        return [q.answer(a(q.name, TRUE))]

    with Liar(reply) as liar:
        assert look(liar)[0] == TRUE


def test_aliases_without_end_are_cut() -> None:
    def reply(q: Query) -> list[bytes]:
        return [q.answer(record(q.name, DNS_CNAME, etcdinit.encode_dns_name(f"n{len(liar.seen)}.test")))]

    with Liar(reply) as liar, pytest.raises(etcdinit.DnsLoop):
        look(liar)
    assert len(liar.seen) < 20


def loops() -> dict[str, bytes]:
    """Names that compression leads astray; they stand at offset 27, behind the question host.test A."""
    here = 12 + 11 + 4
    return {
        "a pointer to itself": struct.pack("!H", 0xC000 | here),
        "a pointer ahead": struct.pack("!H", 0xC000 | here + 40),
        "a label and back to it": b"\1a" + struct.pack("!H", 0xC000 | here),
        "a pointer into the header": struct.pack("!H", 0xC000 | 2),
        "a pointer behind the end": b"\xff\xff",
        "a label of a kind that does not exist": b"\x80abc\0",
        "a name of 300 bytes": b"\x3b" + b"x" * 59 + (b"\x3b" + b"x" * 59) * 4 + b"\0",
    }


@pytest.mark.parametrize("kind", loops())
def test_a_name_that_leads_astray_is_garbled_and_tcp_is_tried(kind: str) -> None:
    def reply(q: Query) -> list[bytes]:
        return [q.answer(a(q.name, TRUE) if q.tcp else record(loops()[kind], DNS_A, b"\1\2\3\4"))]

    with Liar(only_a(reply)) as liar:
        assert look(liar) == [TRUE]


@pytest.mark.parametrize("cut", [30, 38, 40, 45, 50, 56])
def test_an_answer_cut_in_the_middle_is_asked_for_over_tcp(cut: int) -> None:
    def reply(q: Query) -> list[bytes]:
        whole = q.answer(a(q.name, TRUE), a(q.name, "192.0.2.2"))
        return [whole if q.tcp else whole[:cut]]

    with Liar(only_a(reply)) as liar:
        assert look(liar) == [TRUE, "192.0.2.2"]


def test_garbled_over_udp_and_tcp_says_so() -> None:
    with Liar(lambda q: [q.answer(counts=(3, 0, 0))]) as liar:
        with pytest.raises(etcdinit.DnsServfail, match="garbled answer, more records than bytes"):
            look(liar)


def test_a_truncated_answer_is_thrown_away_even_if_tcp_fails() -> None:
    with Liar(lambda q: [] if q.tcp else [q.answer(a(q.name, FALSE), flags=0x8380)]) as liar:
        with pytest.raises(etcdinit.DnsServfail, match="over TCP: closed the connection before"):
            look(liar)


def test_a_firewall_that_stops_tcp_is_named() -> None:
    with Liar(lambda q: [q.answer(flags=0x8380)], tcp=False) as liar:
        with pytest.raises(etcdinit.DnsServfail, match="over TCP: connection refused"):
            look(liar)


def test_sixty_four_kilobytes_over_tcp_are_read() -> None:
    def reply(q: Query) -> list[bytes]:
        if not q.tcp:
            return [q.answer(flags=0x8380)]
        answers = [srv(q.name, f"m{n}.test", n) for n in range(1800)]
        return [q.answer(*answers)]

    with Liar(reply) as liar:
        assert len(etcdinit.resolve_srv("_s.test.", config=config_for(liar.server), addresses=False).records) == 1800


@pytest.mark.parametrize("code", [1, 4])
def test_a_server_that_dislikes_edns_is_asked_without_and_remembered(code: int) -> None:
    def reply(q: Query) -> list[bytes]:
        return [struct.pack("!HHHHHH", q.id, 0x8180 | code, 0, 0, 0, 0)] if q.edns else [q.answer(a(q.name, TRUE))]

    with Liar(only_a(reply)) as liar:
        assert look(liar) == look(liar) == [TRUE]
    assert [q.edns for q in liar.seen] == [True, False, False, False, False]


def test_a_server_that_swallows_edns_is_asked_without() -> None:
    with Liar(lambda q: [] if q.edns else [q.answer(a(q.name, TRUE))]) as liar:
        assert TRUE in look(liar, options="options timeout:1")
        assert TRUE in look(liar, options="options timeout:1")
    assert [q.edns for q in liar.seen].count(True) == 1


def test_an_extended_error_code_is_read() -> None:
    opt = b"\0" + struct.pack("!HHIH", 41, 1232, 1 << 24, 0)  # 1 << 4 | 0: BADVERS
    with Liar(only_a(lambda q: [q.answer(opt, counts=(0, 0, 1))] if q.edns else [q.answer(a(q.name, TRUE))])) as liar:
        assert look(liar) == [TRUE]


def test_a_server_that_refers_elsewhere_is_left_for_the_next(nsd: tuple[str, int]) -> None:
    with Liar(lambda q: [q.answer(flags=0x8000)]) as lame:
        assert len(etcdinit.resolve_srv(ETCD + ".", config=config_for(lame.server, nsd)).records) == 3
        with pytest.raises(etcdinit.DnsServfail, match="neither serves the zone nor asks on"):
            etcdinit.resolve_srv(ETCD + ".", config=config_for(lame.server))


def test_a_server_that_drops_aaaa_still_gives_the_ipv4_address() -> None:
    with Liar(lambda q: [q.answer(a(q.name, TRUE))] if q.type == DNS_A else []) as liar:
        assert look(liar, options="options timeout:1") == [TRUE]


def test_a_ttl_with_the_upper_bit_is_zero_and_a_huge_one_a_week() -> None:
    for ttl, seen in ((0xFFFFFFFF, 0), (0x7FFFFFFF, etcdinit.DNS_MAX_TTL), (5, 5)):
        message = etcdinit.decode_dns_message(struct.pack("!HHHHHH", 1, 0x8180, 0, 1, 0, 0) + a("x.test", ttl=ttl))
        assert message.answers[0].ttl == seen


def test_ids_and_ports_are_fresh() -> None:
    peers = set()

    def reply(q: Query) -> list[bytes]:
        peers.add(liar.peer)
        return [q.answer(a(q.name))]

    with Liar(reply) as liar:
        for _ in range(20):
            look(liar)
    assert len({q.id for q in liar.seen}) > 30 and len(peers) > 30


# ---- names and messages -------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["", "a..b", "a..", ".a", "x" * 64 + ".test", "a b.test", "höhe.test", "a\\.b.test",
                                  ".".join(["x" * 60] * 5), "a\n.test"])
def test_a_text_that_is_no_dns_name_is_told(name: str) -> None:
    with pytest.raises(etcdinit.DnsBadName, match="cannot look up"):
        etcdinit.resolve_srv(name, config=config_for(("127.0.0.1", free_port())))


def test_the_longest_name_fits() -> None:
    name = ".".join(["x" * 63] * 3 + ["x" * 61])
    assert len(name) == 253
    message = etcdinit.decode_dns_message(etcdinit.encode_dns_query(7, name, DNS_SRV))
    assert message.question == (name, DNS_SRV, 1)


def test_a_name_that_grows_too_long_by_a_pointer_is_refused() -> None:
    text = record(b"\0", 16, b"\1a" * 100 + b"\0")  # a name of 201 bytes at offset 23
    fits, grows = record(b"\xc0\x17", DNS_A, bytes(4)), record(b"\x3f" + b"x" * 63 + b"\xc0\x17", DNS_A, bytes(4))
    head = struct.pack("!HHHHHH", 1, 0x8180, 0, 3, 0, 0)
    assert len(etcdinit.decode_dns_message(head + text + fits + fits).answers) == 2
    with pytest.raises(ValueError, match="longer than 255"):
        etcdinit.decode_dns_message(head + text + fits + grows)


def test_odd_bytes_of_a_label_are_escaped() -> None:
    wire = struct.pack("!HHHHHH", 1, 0x8180, 0, 1, 0, 0) + record(b"\5a.b\0\xff\1c\0", DNS_A, b"\1\2\3\4")
    assert etcdinit.decode_dns_message(wire).answers[0].name == "a\\046b\\000\\255.c"


@given(st.lists(st.text("abcXYZ019-_", min_size=1, max_size=63), max_size=4), st.integers(0, 65535),
       st.sampled_from([DNS_A, DNS_AAAA, DNS_SRV]), st.booleans())
def test_a_query_reads_back_as_it_was_written(labels: list[str], id: int, type: int, edns: bool) -> None:
    name = ".".join(labels) or "."
    message = etcdinit.decode_dns_message(etcdinit.encode_dns_query(id, name, type, edns))
    assert (message.id, message.question) == (id, (name.lower(), type, 1))
    assert not message.answers_to(id, name, type)  # a query is no answer


def decodes_or_says_why(data: bytes) -> bool:
    """Whether it decodes; ValueError is the one way not to, and seconds of CPU time are out of the question."""
    start = time.process_time()
    try:
        message = etcdinit.decode_dns_message(data)
    except ValueError as error:
        assert str(error)
        decoded = False
    else:
        for found in message.answers + message.authority + message.additional:
            assert len(found.name) <= 4 * 255 and found.ttl <= etcdinit.DNS_MAX_TTL
        decoded = True
    assert time.process_time() - start < 2
    return decoded


@settings(max_examples=2000, deadline=None)
@given(st.binary(max_size=600))
def test_random_bytes_are_decoded_or_refused(data: bytes) -> None:
    decodes_or_says_why(data)


@settings(max_examples=2000, deadline=None)
@given(st.binary(min_size=8, max_size=8), st.lists(st.one_of(
    st.binary(max_size=12), st.integers(12, 80).map(lambda at: struct.pack("!H", 0xC000 | at)),
    st.sampled_from([a("x.test"), srv("x.test", "y.test"), record("x", DNS_CNAME, b"\xc0\x0c"), b"\0", b"\1a\0"]),
    st.sampled_from([b"\0\1\0\1", b"\0\x21\0\1\0\0\0\1\0\x08", b"\0\x06\0\1\0\0\0\1\0\x18"])), max_size=20))
def test_pieces_of_messages_in_any_order_are_decoded_or_refused(counts: bytes, pieces: list[bytes]) -> None:
    small = bytes(byte & (7 if index % 2 else 0) for index, byte in enumerate(counts))
    decodes_or_says_why(b"\0\1\x81\x80" + small + b"".join(pieces))


def raw(server: tuple[str, int], name: str, type: int) -> bytes:
    with socket.create_connection(server, 10) as tcp:
        query = etcdinit.encode_dns_query(1, name, type)
        tcp.sendall(struct.pack("!H", len(query)) + query)
        stream = tcp.makefile("rb")
        return stream.read(int.from_bytes(stream.read(2), "big"))


def test_a_hundred_thousand_mutations_of_real_messages(dnsmasq: tuple[str, int], nsd: tuple[str, int]) -> None:
    names = (ETCD, "_chain._tcp.example.org", "_loop._tcp.example.org", "_nothing.example.org", "etcd1.example.org")
    small = [raw(server, name, type) for server in (dnsmasq, nsd) for name in names for type in (DNS_SRV, DNS_A)]
    small.append(raw(nsd, "example.org", etcdinit.DNS_SOA))
    large = [raw(server, BIG, DNS_SRV) for server in (dnsmasq, nsd)]
    dice, decoded = random.Random(4), 0
    for count in range(100_000):
        data = bytearray(dice.choice(large if count % 100 == 0 else small))
        for _ in range(dice.randint(1, 4)):
            at = dice.randrange(len(data) + 1)
            kind = dice.randrange(5)
            if kind == 0:
                data[at:at + 1] = bytes([dice.randrange(256)])
            elif kind == 1:
                data[at:at + 2] = struct.pack("!H", 0xC000 | dice.randrange(len(data) + 2))
            elif kind == 2:
                del data[at:]
            elif kind == 3:
                data[at:at] = dice.randbytes(dice.randint(1, 8))
            elif len(data) > 12:
                data[4 + dice.randrange(8)] = dice.randrange(256)
        decoded += decodes_or_says_why(bytes(data))
    assert 10_000 < decoded < 90_000  # the mutations are neither all harmless nor all crude


def worst_cases() -> dict[str, bytes]:
    """64 KB that would be quadratic to a careless decoder."""
    head = struct.pack("!HHHHHH", 1, 0x8180, 0, 4000, 0, 0)
    deep = b"\1a" * 126 + b"\0"  # at offset 23, in the data of a TXT record
    chain = b"".join(struct.pack("!H", 0xC000 | at) for at in (23, *range(276, 276 + 2 * 3998, 2)))  # at offset 276
    pointers = [struct.pack("!H", 0xC000 | at) for at in range(276, 276 + 2 * 3999, 2)]

    def cname(owner: bytes, target: bytes) -> bytes:
        return record(owner, DNS_CNAME, target)

    return {
        "records without names": head + bytes(65000),
        "names that all point to a long one": head + record(b"\0", 16, deep) + cname(b"\xc0\x17", b"\xc0\x17") * 3999,
        "names that point to ever longer chains": head + record(b"\0", 16, deep + chain) + b"".join(
            cname(pointer, pointer) for pointer in pointers),
        "names that point from the far end of a chain": head + record(b"\0", 16, deep + chain) + b"".join(
            cname(pointer, pointer) for pointer in reversed(pointers)),
        "labels without end": head + b"\x3f" * 65000,
    }


@pytest.mark.parametrize("case", worst_cases())
def test_nothing_is_quadratic(case: str) -> None:
    decodes_or_says_why(worst_cases()[case][:65535])


def test_a_lookup_fed_with_mutations_ends_in_an_answer_or_a_told_error(nsd: tuple[str, int]) -> None:
    dice = random.Random(5)
    real = raw(nsd, ETCD, DNS_SRV)

    def reply(q: Query) -> list[bytes]:
        answers = []
        for _ in range(20):
            data = bytearray(struct.pack("!H", q.id) + real[2:])
            for _ in range(dice.randint(1, 3)):
                data[dice.randrange(2, len(data))] = dice.randrange(256)
            answers.append(bytes(data))
        return answers[:3] if q.tcp else [*answers, q.answer()]

    outcomes = set()
    with Liar(reply) as liar:
        for _ in range(150):
            try:
                etcdinit.resolve_srv(ETCD + ".", soon(3), config_for(liar.server, options="options timeout:1"))
                outcomes.add("an answer")
            except DnsError as error:
                assert "cannot" in str(error)
                outcomes.add("an error")
    assert outcomes == {"an answer", "an error"}


# ---- RFC 2782 order -----------------------------------------------------------------------------------

def records(*rows: tuple[int, int]) -> list[etcdinit.SrvRecord]:
    return [etcdinit.SrvRecord(priority, weight, index, "host") for index, (priority, weight) in enumerate(rows)]


def share_of_first(rows: list[etcdinit.SrvRecord], draws: int = 20_000) -> dict[int, float]:
    """How often a record of each port came first, with a fixed seed."""
    dice = random.Random(2782)
    firsts = [etcdinit.order_srv(rows, dice.randrange)[0].port for _ in range(draws)]
    return {row.port: firsts.count(row.port) / draws for row in rows}


def test_a_weight_is_a_share_of_the_load() -> None:
    shares = share_of_first(records((0, 10), (0, 20), (0, 70)))
    assert shares == pytest.approx({0: 11 / 101, 1: 20 / 101, 2: 70 / 101}, abs=0.015)


def test_weight_zero_is_rarely_chosen_beside_others() -> None:
    shares = share_of_first(records((0, 99), (0, 0)))
    assert shares == pytest.approx({0: 0.99, 1: 0.01}, abs=0.004)


def test_weights_of_zero_alone_spread_the_load() -> None:
    assert share_of_first(records((0, 0), (0, 0), (0, 0))) == pytest.approx(dict.fromkeys(range(3), 1 / 3), abs=0.015)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 65535))), st.randoms(use_true_random=False))
def test_every_record_comes_once_and_lower_priorities_first(rows: list[tuple[int, int]], dice: random.Random) -> None:
    given_records = records(*rows)
    ordered = etcdinit.order_srv(given_records, dice.randrange)
    assert sorted(r.port for r in ordered) == list(range(len(rows)))
    assert [r.priority for r in ordered] == sorted(priority for priority, _ in rows)


# ---- resolv.conf and hosts ----------------------------------------------------------------------------

def test_a_resolv_conf_as_glibc_reads_it() -> None:
    config = etcdinit.parse_resolv_conf("""
# comment
; another
nameserver 10.0.0.1
nameserver fe80::1%lo
  nameserver	2001:db8::1
nameserver 10.0.0.4
domain example.net
search One.test. two.test
options ndots:5 timeout:3 attempts:9 rotate edns0 trust-ad timeout:x
""")
    assert config.servers == [("10.0.0.1", 53), ("fe80::1%lo", 53), ("2001:db8::1", 53)]
    assert config.search == ["one.test", "two.test"]
    assert (config.ndots, config.timeout, config.attempts, config.rotate) == (5, 3, 5, True)


def test_the_last_of_search_and_domain_wins() -> None:
    assert etcdinit.parse_resolv_conf("search a.test b.test\ndomain c.test d.test").search == ["c.test"]
    assert etcdinit.parse_resolv_conf("domain c.test\nsearch a.test .").search == ["a.test"]


def test_the_environment_overrides_the_file() -> None:
    environ = {"RES_OPTIONS": "ndots:2 timeout:99", "LOCALDOMAIN": "x.test y.test"}
    config = etcdinit.parse_resolv_conf("search a.test\noptions ndots:7", environ)
    assert (config.ndots, config.timeout, config.search) == (2, 30, ["x.test", "y.test"])


def test_without_a_usable_nameserver_it_is_the_local_one(tmp_path: Path) -> None:
    local = [("127.0.0.1", 53)]
    for text in ("", "nameserver dns.example.org\nnameserver fe80::1%no-such-link\nnameserver [10.0.0.1]:x\n"
                 "nameserver [10.0.0.1]:65536\nnameserver [10.0.0.1]:0\nnameserver 10.0.0.1%lo"):
        assert etcdinit.parse_resolv_conf(text).servers == local
    config = etcdinit.load_dns_config(str(tmp_path / "none"), str(tmp_path / "none either"), {})
    assert config.servers == local and config.hosts == {}


def test_the_files_and_their_places(tmp_path: Path) -> None:
    (tmp_path / "resolv.conf").write_text("nameserver 10.9.8.7\nnameserver [10.9.8.6]:5353\nnameserver [::1]:5353\n")
    (tmp_path / "hosts").write_text("127.0.0.1 me\n")
    config = etcdinit.load_dns_config("", str(tmp_path / "hosts"),
                                      {"ETCDINIT_RESOLV_CONF": str(tmp_path / "resolv.conf")})
    assert config.servers == [("10.9.8.7", 53), ("10.9.8.6", 5353), ("::1", 5353)]
    assert config.hosts == {"me": ["127.0.0.1"]} and config.source == str(tmp_path / "resolv.conf")


def test_a_hosts_file() -> None:
    assert etcdinit.parse_hosts("""
127.0.0.1\tlocalhost  # this machine
::1 localhost ip6-localhost
10.0.0.1 Etcd1.Example.org etcd1
10.0.0.1 etcd1
not-an-address etcd1
10.0.0.9
10.0.0.9%lo etcd1
#10.0.0.8 etcd1
""") == {"localhost": ["127.0.0.1", "::1"], "ip6-localhost": ["::1"], "etcd1.example.org": ["10.0.0.1"],
         "etcd1": ["10.0.0.1"]}


@given(st.text())
def test_any_text_is_a_resolv_conf_and_a_hosts_file(text: str) -> None:
    assert etcdinit.parse_resolv_conf(text + "\nnameserver " + text, {"RES_OPTIONS": text}).servers
    etcdinit.parse_hosts(text + "\n10.0.0.1 " + text)
