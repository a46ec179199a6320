"""DNS servers for tests, on high loopback ports: real dnsmasq, real nsd, and one that lies."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import etcdinit
from support import eventually, free_port, need

SBIN = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"))
MANY = 60  # SRV records of _big._tcp: too many for a datagram

DNSMASQ = """
no-resolv
no-hosts
bind-interfaces
edns-packet-max=1232
local=/example.org/
srv-host=_etcd-client._tcp.example.org,etcd1.example.org,2379,0,10
srv-host=_etcd-client._tcp.example.org,etcd2.example.org,2379,0,20
srv-host=_etcd-client._tcp.example.org,etcd3.example.org,2379,10,0
srv-host=_none._tcp.example.org
cname=alias.example.org,etcd1.example.org
host-record=etcd1.example.org,127.0.0.1,::1
host-record=etcd2.example.org,127.0.0.2
host-record=etcd3.example.org,127.0.0.3
""" + "".join(f"srv-host=_big._tcp.example.org,member-{n}.of-a-cluster-with-a-long-name.example.org,2379,{n % 3},{n}\n"
              f"host-record=member-{n}.of-a-cluster-with-a-long-name.example.org,127.0.1.{n}\n" for n in range(MANY))

NSD = """
$ORIGIN example.org.
$TTL 300
@ IN SOA ns hostmaster\\.of\\.dns ( 1 3600 600 86400 60 )
@ IN NS ns
ns IN A 127.0.0.1
_etcd-client._tcp 120 IN SRV 0 10 2379 etcd1
_etcd-client._tcp 120 IN SRV 0 20 2379 etcd2
_etcd-client._tcp 120 IN SRV 10 0 2379 etcd3
etcd1 IN A 127.0.0.1
etcd1 30 IN AAAA ::1
etcd2 IN A 127.0.0.2
etcd3 IN A 127.0.0.3
alias IN CNAME etcd1
_chain._tcp 20 IN CNAME _chain2._tcp
_chain2._tcp 10 IN CNAME _etcd-client._tcp
_loop._tcp IN CNAME _pool._tcp
_pool._tcp IN CNAME _loop._tcp
_dangling._tcp IN CNAME nowhere
_none._tcp IN SRV 0 0 0 .
_far._tcp IN SRV 0 0 2379 etcd1.far.example.net.
_half._tcp IN SRV 0 0 2379 etcd1
_half._tcp IN SRV 1 0 2379 missing
_lost._tcp IN SRV 0 0 2379 missing
_odd._tcp IN SRV 0 0 2379 a\\.b\\@c
_odd._tcp IN SRV 0 0 2379 etcd2
text IN TXT "no address here"
six IN AAAA 2001:db8::6
short.sub IN A 127.0.0.77
""" + "".join(f"_big._tcp IN SRV {n % 3} {n} 2379 member-{n}.of-a-cluster-with-a-long-name\n"
              f"member-{n}.of-a-cluster-with-a-long-name IN A 127.0.1.{n}\n" for n in range(MANY))


def config_for(*servers: tuple[str, int], options: str = "", hosts: str = "") -> etcdinit.DnsConfig:
    """What a resolv.conf with these servers says, with the text of a hosts file."""
    lines = [f"nameserver [{address}]:{port}" for address, port in servers]
    config = etcdinit.parse_resolv_conf("\n".join([*lines, options]))
    config.hosts = etcdinit.parse_hosts(hosts)
    return config


@contextmanager
def running(argv: list[str], port: int) -> Iterator[tuple[str, int]]:
    """A DNS server while the block runs; it must answer something before the block begins."""
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def answers() -> bool:
        if process.poll() is not None:
            raise AssertionError(f"{argv[0]} ended: {process.communicate()[0].decode()}")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
            probe.settimeout(0.5)
            probe.connect(("127.0.0.1", port))
            probe.send(etcdinit.encode_dns_query(1, "example.org", etcdinit.DNS_SOA))
            return bool(probe.recv(512))
        return False

    try:
        eventually(answers, what=f"{argv[0]} answers")
        yield "127.0.0.1", port
    finally:
        process.terminate()
        process.communicate(timeout=10)


@contextmanager
def dnsmasq(directory: Path, text: str = DNSMASQ) -> Iterator[tuple[str, int]]:
    """A real dnsmasq with these lines of configuration: its address and port."""
    program = shutil.which("dnsmasq", path=SBIN)
    need(program, "dnsmasq is not installed (on Debian: apt-get install dnsmasq-base)")
    port = free_port()
    user = "user=root\n" if os.geteuid() == 0 else ""
    file = directory / "dnsmasq.conf"
    file.write_text(f"port={port}\nlisten-address=127.0.0.1\npid-file\n{user}{text}")
    with running([str(program), "--keep-in-foreground", "--log-facility=-", f"--conf-file={file}"], port) as server:
        yield server


@contextmanager
def nsd(directory: Path, zone: str = NSD) -> Iterator[tuple[str, int]]:
    """A real nsd with the zone example.org, and broken.example, whose file is missing: its address and port."""
    program = shutil.which("nsd", path=SBIN)
    need(program, "nsd is not installed (on Debian: apt-get install nsd)")
    port = free_port()
    (directory / "example.org.zone").write_text(zone)
    (directory / "nsd.conf").write_text(f"""
server:
    ip-address: 127.0.0.1@{port}
    username: ""
    chroot: ""
    zonesdir: "{directory}"
    database: ""
    xfrdfile: ""
    pidfile: ""
    zonelistfile: "{directory}/zone.list"
    server-count: 1
remote-control:
    control-enable: no
zone:
    name: example.org
    zonefile: example.org.zone
zone:
    name: broken.example
    zonefile: missing.zone
""")
    with running([str(program), "-d", "-c", str(directory / "nsd.conf")], port) as server:
        yield server


class Query:
    """What a client asked: the bytes, their parts, whether over TCP, and a way to answer from elsewhere."""

    def __init__(self, data: bytes, tcp: bool) -> None:
        message = etcdinit.decode_dns_message(data)
        assert message.question
        self.data, self.tcp, self.id = data, tcp, message.id
        self.name, self.type = message.question[:2]
        self.edns = data[11] == 1
        self.question = data[12:-11] if self.edns else data[12:]

    def answer(self, *records: bytes, flags: int = 0x8180, counts: tuple[int, int, int] | None = None,
               id: int | None = None, question: bytes | None = None) -> bytes:
        """An answer with these records in wire form, right in all that is not given otherwise."""
        head = struct.pack("!HHHHHH", self.id if id is None else id, flags, 1, *(counts or (len(records), 0, 0)))
        return head + (self.question if question is None else question) + b"".join(records)


def record(name: str | bytes, type: int, data: bytes, ttl: int = 60) -> bytes:
    """A resource record in wire form; a name in bytes is taken as it is."""
    owner = name if isinstance(name, bytes) else etcdinit.encode_dns_name(name)
    return owner + struct.pack("!HHIH", type, 1, ttl, len(data)) + data


def a(name: str, address: str = "192.0.2.1", ttl: int = 60) -> bytes:
    """An A record."""
    return record(name, etcdinit.DNS_A, socket.inet_aton(address), ttl)


def srv(name: str, target: str, port: int = 2379, priority: int = 0, weight: int = 0) -> bytes:
    """An SRV record."""
    place = struct.pack("!HHH", priority, weight, port) + etcdinit.encode_dns_name(target)
    return record(name, etcdinit.DNS_SRV, place)


class Liar:
    """A server on UDP, and TCP, that answers as its `reply` says: a list of datagrams (over TCP: of messages).

    seen: all queries. elsewhere: a UDP socket with another port, for answers from there; peer: who asked last.
    """

    def __init__(self, reply: Callable[[Query], list[bytes]], address: str = "127.0.0.1", tcp: bool = True) -> None:
        self.reply = reply
        self.seen: list[Query] = []
        self.peer: tuple[str, int] = ("", 0)
        self.server = (address, free_port())
        self.family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.udp = socket.socket(self.family, socket.SOCK_DGRAM)
        self.udp.bind(self.server)
        self.elsewhere = socket.socket(self.family, socket.SOCK_DGRAM)
        self.elsewhere.bind((address, 0))
        self.tcp = socket.create_server(self.server, family=self.family) if tcp else None
        serve = (self.serve_udp, self.serve_tcp) if tcp else (self.serve_udp,)
        self.threads = [threading.Thread(target=run, daemon=True) for run in serve]

    def serve_udp(self) -> None:
        while True:
            data, self.peer = self.udp.recvfrom(4096)
            if not data:
                return
            query = Query(data, tcp=False)
            self.seen.append(query)
            for answer in self.reply(query):
                self.udp.sendto(answer, self.peer)

    def serve_tcp(self) -> None:
        while self.tcp:
            connection, _ = self.tcp.accept()
            with connection, suppress(OSError):
                connection.settimeout(20)
                size = connection.recv(2)
                if not size:
                    return
                query = Query(connection.recv(int.from_bytes(size, "big")), tcp=True)
                self.seen.append(query)
                for answer in self.reply(query):
                    connection.sendall(struct.pack("!H", len(answer)) + answer)

    def __enter__(self) -> Liar:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with socket.socket(self.family, socket.SOCK_DGRAM) as end:
            end.sendto(b"", self.server)
        if self.tcp:
            socket.create_connection(self.server).close()
        for thread in self.threads:
            thread.join(10)
        for each in (self.udp, self.elsewhere, self.tcp):
            if each:
                each.close()
