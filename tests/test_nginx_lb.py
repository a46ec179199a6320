"""templates/nginx-lb: a real nginx under real traffic while keys come, change and go wrong."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pwd
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support import eventually, free_port, need
from support.certificates import Authority
from support.container import Container
from support.dns_servers import dnsmasq
from support.etcd_server import EtcdServer, find_etcd

SET = Path(__file__).resolve().parent.parent / "templates" / "nginx-lb"
PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
SHOP = "/lb/hosts/shop.example.org"


class Backends:
    """Small web servers that answer with their name and the path they were asked for."""

    def __init__(self) -> None:
        self.running: list[ThreadingHTTPServer] = []

    def start(self, name: str) -> str:
        """Start one; returns ADDRESS:PORT."""
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body = f"{name} {self.path} {self.headers['Host']} {self.headers['X-Forwarded-Proto']}".encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        self.running.append(server)
        return f"127.0.0.1:{server.server_port}"


class LoadBalancer:
    """The set with its files below a scratch directory, and an nginx that runs on what was rendered."""

    def __init__(self, scratch: Path, program: list[str]) -> None:
        self.scratch, self.program = scratch, program
        self.conf = scratch / "nginx.conf"
        self.http, self.https = free_port(), free_port()
        self.nginx: subprocess.Popen[bytes] | None = None
        (scratch / "run").mkdir()
        (scratch / "confd" / "conf.d").mkdir(parents=True)
        shutil.copytree(SET / "templates", scratch / "confd" / "templates")
        resource = (SET / "conf.d" / "nginx.toml").read_text()
        assert '"/etc/nginx/nginx.conf"' in resource
        (scratch / "confd/conf.d/nginx.toml").write_text(resource.replace("/etc/nginx/nginx.conf", str(self.conf)))
        self.env = {**os.environ, "PATH": PATH, "NGINX_LB_HTTP": f"127.0.0.1:{self.http}",
                    "NGINX_LB_HTTPS": f"127.0.0.1:{self.https}", "NGINX_LB_RUN": str(scratch / "run"),
                    "NGINX_LB_TLS": str(scratch / "tls"), "NGINX_LB_ACCESS_LOG": "off"}
        if os.geteuid() == 0:  # its workers have to get into the scratch directory
            self.env["NGINX_LB_USER"] = pwd.getpwuid(0).pw_name

    def render(self, keys: dict[str, str] | str) -> subprocess.CompletedProcess[str]:
        """`render --once` from these keys, or from the etcd at this address."""
        source = ["--node", keys] if isinstance(keys, str) else ["--keys", str(self.scratch / "keys.json")]
        if not isinstance(keys, str):
            (self.scratch / "keys.json").write_text(json.dumps(keys))
        return subprocess.run([*self.program, "render", "--once", "--confdir", str(self.scratch / "confd"), *source],
                              env=self.env, capture_output=True, text=True, timeout=60)

    def rendered(self, keys: dict[str, str] | str) -> None:
        run = self.render(keys)
        assert run.returncode == 0, run.stderr

    def start(self) -> None:
        """Start nginx on the rendered configuration and wait until it answers."""
        self.nginx = subprocess.Popen(["nginx", "-e", "stderr", "-c", str(self.conf)], env=self.env,
                                      stderr=(self.scratch / "nginx.log").open("wb"))
        eventually(lambda: self.status("nobody.example.org") == 404, what="nginx answers")

    def stop(self) -> None:
        if self.nginx:
            self.nginx.terminate()
            self.nginx.wait(20)

    def get(self, host: str, path: str = "/") -> tuple[int, str, str]:
        """(status, body, Location) of a request for a host; (0, "", "") while nobody listens."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http, timeout=20)
        try:
            connection.request("GET", path, headers={"Host": host})
            answer = connection.getresponse()
            return answer.status, answer.read().decode(), answer.headers.get("Location", "")
        except ConnectionError:
            return 0, "", ""
        finally:
            connection.close()

    def status(self, host: str, path: str = "/") -> int:
        return self.get(host, path)[0]

    def body(self, host: str, path: str = "/") -> str:
        return self.get(host, path)[1]

    def get_tls(self, host: str, certificate: Path) -> str:
        """The body of a request over TLS, to a server that must show a certificate which this one vouches for."""
        context = ssl.create_default_context(cafile=str(certificate))
        connection = http.client.HTTPSConnection("127.0.0.1", self.https, timeout=20, context=context)
        connection.sock = context.wrap_socket(socket.create_connection(("127.0.0.1", self.https), 20),
                                              server_hostname=host)
        try:
            connection.request("GET", "/", headers={"Host": host})
            return connection.getresponse().read().decode()
        finally:
            connection.close()


@pytest.fixture
def backend() -> Iterator[Callable[[str], str]]:
    backends = Backends()
    yield backends.start
    for server in backends.running:
        server.shutdown()
        server.server_close()


@pytest.fixture
def lb(tmp_path: Path, program: list[str]) -> Iterator[LoadBalancer]:
    need(shutil.which("nginx", path=PATH), "nginx")
    made = LoadBalancer(tmp_path, program)
    yield made
    made.stop()


def certificate(lb: LoadBalancer, name: str) -> Path:
    """A self-signed certificate for a host, where the set looks for it."""
    need(shutil.which("openssl"), "openssl")
    directory = lb.scratch / "tls" / name
    directory.mkdir(parents=True)
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                    "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}", "-days", "2",
                    "-keyout", str(directory / "privkey.pem"), "-out", str(directory / "fullchain.pem")],
                   check=True, capture_output=True)
    return directory / "fullchain.pem"


def test_the_example_keys_give_a_configuration_that_nginx_accepts(lb: LoadBalancer) -> None:
    run = subprocess.run([*lb.program, "render", "--once", "--confdir", str(lb.scratch / "confd"),
                          "--keys", str(SET / "keys.json")], env=lb.env, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert "server 10.0.0.12:8080 weight=2;" in lb.conf.read_text()


def test_requests_go_where_host_and_path_say(lb: LoadBalancer, backend: Callable[[str], str]) -> None:
    lb.rendered({
        f"{SHOP}/upstream": "shop", f"{SHOP}/aliases": "www.example.org,*.shop.example.net", f"{SHOP}/paths/api": "api",
        f"{SHOP}/paths/api/v2": "api2", "/lb/upstreams/shop/1": backend("shop"), "/lb/upstreams/api/1": backend("api"),
        "/lb/upstreams/api2/1": backend("api2"), "/lb/hosts/*.wild.example.org/paths/x": "api"})
    lb.start()
    assert lb.body("shop.example.org", "/cart?id=1") == "shop /cart?id=1 shop.example.org http"
    assert lb.body("www.example.org") == "shop / www.example.org http"
    assert lb.body("a.shop.example.net").startswith("shop ")
    assert lb.body("shop.example.org", "/api").startswith("api /api ")
    assert lb.body("shop.example.org", "/api/v1/x").startswith("api /api/v1/x ")
    assert lb.body("shop.example.org", "/api/v2/x").startswith("api2 /api/v2/x ")
    assert lb.body("shop.example.org", "/apix").startswith("shop /apix ")
    assert lb.body("any.wild.example.org", "/x/y").startswith("api /x/y ")
    assert lb.status("any.wild.example.org", "/y") == 404
    assert lb.status("unknown.example.org") == 404


def test_traffic_moves_when_keys_change(lb: LoadBalancer, backend: Callable[[str], str], etcd35: EtcdServer) -> None:
    etcd35.put_many([(f"{SHOP}/upstream", "shop"), ("/lb/upstreams/shop/one", backend("one"))])
    lb.rendered(etcd35.url)
    lb.start()
    assert lb.body("shop.example.org").startswith("one ")
    etcd35.put("/lb/upstreams/shop/two", backend("two"))
    lb.rendered(etcd35.url)
    eventually(lambda: lb.body("shop.example.org").startswith("two "), what="the new instance gets traffic")
    etcd35.delete("/lb/upstreams/shop/one")
    lb.rendered(etcd35.url)
    eventually(lambda: all(lb.body("shop.example.org").startswith("two ") for _ in range(10)),
               what="the removed instance gets none")
    etcd35.delete("/lb/upstreams/shop/two")
    lb.rendered(etcd35.url)
    eventually(lambda: lb.status("shop.example.org") == 503, what="no instance, no service")
    etcd35.put_many([("/lb/upstreams/shop/three", backend("three")), ("/lb/hosts/new.example.org/upstream", "shop")])
    lb.rendered(etcd35.url)
    eventually(lambda: lb.body("new.example.org").startswith("three "), what="a new host is served")


def test_a_host_with_a_certificate_speaks_tls(lb: LoadBalancer, backend: Callable[[str], str]) -> None:
    host = "intranet.example.org"
    keys = {f"/lb/hosts/{host}/upstream": "in", f"/lb/hosts/{host}/tls": host, f"/lb/hosts/{host}/https_only": "true",
            "/lb/upstreams/in/1": backend("in"), f"{SHOP}/upstream": "in"}
    lb.rendered(keys)
    lb.start()
    assert lb.status(host) == 503, "without its certificate a host that wants TLS only is not served in the clear"
    pem = certificate(lb, host)
    lb.rendered(keys)
    eventually(lambda: lb.status(host) == 301, what="the certificate is in use")
    assert lb.get(host, "/a?b")[2] == f"https://{host}/a?b"
    assert lb.get_tls(host, pem) == f"in / {host} https"
    assert lb.body("shop.example.org").startswith("in ")
    with pytest.raises(ssl.SSLError):
        lb.get_tls("shop.example.org", pem)


def test_a_configuration_that_nginx_refuses_changes_nothing(lb: LoadBalancer, backend: Callable[[str], str]) -> None:
    keys = {f"{SHOP}/upstream": "shop", "/lb/upstreams/shop/1": backend("shop")}
    lb.rendered(keys)
    lb.start()
    before = lb.conf.read_bytes()
    (lb.scratch / "tls" / "broken").mkdir(parents=True)
    for name in ("fullchain.pem", "privkey.pem"):
        (lb.scratch / "tls" / "broken" / name).write_text("this is no certificate\n")
    run = lb.render({**keys, "/lb/hosts/broken.example.org/tls": "broken"})
    assert run.returncode == 1
    assert "nginx.conf" in run.stderr and "PEM" in run.stderr
    assert lb.conf.read_bytes() == before
    assert sorted(p.name for p in lb.scratch.iterdir() if "nginx.conf" in p.name) == ["nginx.conf"]
    assert lb.body("shop.example.org").startswith("shop ")


HOSTILE = [
    "evil;", "evil; }", "evil { return 200 evil; }", 'evil"', "evil'", "evil\n", "\nevil", "evil\r", "evil #", "evil\t",
    "evil\nreturn 200 evil;\n", "evil$host", "evil\\", "evil\u2028x", "evil\x00", "evil ", " evil", "evil\u00a0",
    "EVIL.example.org;evil", "../evil", "${evil}", "{{evil}}", "127.0.0.1:80; evil", "127.0.0.1:80\nevil",
    "127.0.0.1:evil", "evil.example.org:80", "[::1]:80 evil", "unix:/evil.sock", "127.0.0.1:80 weight=1 evil",
    "evil" * 100, "-evil;", ".evil;", "*evil", "evil*",
]


def hostile_keys(text: str) -> dict[str, str]:
    """A text that means harm in every place where a name or a value can stand."""
    bare = text.replace("/", "")
    return {
        f"/lb/hosts/{bare}/upstream": "good", f"/lb/hosts/a.{bare}/upstream": "good", f"{SHOP}/upstream": "good",
        "/lb/hosts/h1.example.org/upstream": text, "/lb/hosts/h2.example.org/aliases": text,
        "/lb/hosts/h3.example.org/aliases": f"ok.example.org,{text}", "/lb/hosts/h4.example.org/tls": text,
        "/lb/hosts/h5.example.org/max_body": text, "/lb/hosts/h6.example.org/https_only": text,
        f"/lb/hosts/h7.example.org/paths/{bare};": "good", f"/lb/hosts/h7.example.org/paths/x/{bare};/y": "good",
        "/lb/hosts/h8.example.org/paths/x": text, f"/lb/upstreams/{bare};/1": "127.0.0.1:9",
        f"/lb/upstreams/good/{bare}": "127.0.0.1:9 down", "/lb/upstreams/good/bad": text,
        "/lb/upstreams/alone/1": text,
    }


def test_no_value_gets_out_of_its_place(lb: LoadBalancer, backend: Callable[[str], str]) -> None:
    good = backend("good")
    for text in HOSTILE:
        lb.rendered({**hostile_keys(text), "/lb/upstreams/good/1": good})
        lines = [line for line in lb.conf.read_text().split("\n") if not line.strip().startswith("#")]
        assert not [line for line in lines if "evil" in line.lower()], text
        if lb.nginx is None:
            lb.start()
        assert lb.body("shop.example.org").startswith("good "), text


def test_a_wrong_instance_is_named_and_left_out(lb: LoadBalancer, backend: Callable[[str], str]) -> None:
    lb.rendered({f"{SHOP}/upstream": "shop", "/lb/upstreams/shop/1": backend("shop"),
                 "/lb/upstreams/shop/2": "localhost:80",
                 "/lb/upstreams/shop/3": "256.1.1.1:80", "/lb/upstreams/shop/4": "10.0.0.1:70000",
                 "/lb/upstreams/shop/5": "[2001:db8::1]:80 down", "/lb/upstreams/shop/6": "[2001:db8::1::2]:80"})
    text = lb.conf.read_text()
    for number in (2, 3, 4, 6):
        assert f'# "/lb/upstreams/shop/{number}" is ignored' in text
    assert "server [2001:db8::1]:80 down;" in text
    lb.start()
    assert lb.body("shop.example.org").startswith("shop ")


# ---- the whole image: init, renderer, nginx; three members over TLS, found by SRV -------------------------

def test_as_a_container_on_a_cluster_over_tls_found_by_srv(tmp_path: Path, program: list[str],
                                                           backend: Callable[[str], str]) -> None:
    need(shutil.which("nginx", path=PATH) and shutil.which("dnsmasq", path=PATH), "nginx and dnsmasq")
    binary_path = find_etcd("3.5")
    need(binary_path, "etcd 3.5")
    authority = Authority(tmp_path / "ca")
    signed = authority.issue("DNS:example.org", "DNS:localhost", "IP:127.0.0.1")
    ports = [(free_port(), free_port()) for _ in range(3)]
    names = ",".join(f"m{index}=http://127.0.0.1:{peer}" for index, (_, peer) in enumerate(ports))
    members = [EtcdServer(str(binary_path), tmp_path / "etcd", "--cert-file", signed.cert_path, "--key-file",
                          signed.key_path, name=f"m{index}", scheme="https", context=authority.context(),
                          cluster=names, ports=pair).spawn() for index, pair in enumerate(ports)]
    lines = ["no-resolv", "no-hosts", "bind-interfaces", "local=/example.org/", *(
        f"srv-host=_etcd-client-ssl._tcp.example.org,etcd{index}.example.org,{client}"
        for index, (client, _) in enumerate(ports)), *(
        f"host-record=etcd{index}.example.org,127.0.0.1" for index in range(3)), ""]
    box = Container(program)
    listen, stack = free_port(), contextlib.ExitStack()
    try:
        for member in members:
            member.wait()
        address, port = stack.enter_context(dnsmasq(tmp_path, "\n".join(lines)))
        (tmp_path / "resolv.conf").write_text(f"nameserver [{address}]:{port}\n")
        shutil.copytree(SET / "services.d", box.place / "services", dirs_exist_ok=True)
        shutil.copytree(SET / "templates", box.place / "etc/confd/templates")
        conf = box.place / "work" / "nginx.conf"  # /etc of this container is read-only
        box.write("etc/confd/conf.d/nginx.toml", (SET / "conf.d/nginx.toml").read_text().replace(
            "/etc/nginx/nginx.conf", str(conf)))
        box.environ |= {
            "PATH": PATH, "ETCD_SRV_DOMAIN": "example.org", "ETCD_CA": authority.pem, "NGINX_LB_USER": "root",
            "ETCDINIT_RESOLV_CONF": str(tmp_path / "resolv.conf"), "NGINX_LB_HTTP": f"127.0.0.1:{listen}",
            "NGINX_LB_ACCESS_LOG": "off", "NGINX_LB_CONF": str(conf)}
        box.start()
        eventually(lambda: box.verb("wait", "nginx", "confd", "--timeout", "5s").returncode == 0, 60,
                   lambda: box.text("log")[-3000:])

        def body(host: str) -> str:
            connection = http.client.HTTPConnection("127.0.0.1", listen, timeout=20)
            try:
                connection.request("GET", "/", headers={"Host": host})
                answer = connection.getresponse()
                return f"{answer.status} {answer.read().decode()}"
            except OSError as error:
                return str(error)
            finally:
                connection.close()

        # application containers come and go by keys, and so do members of etcd
        members[0].put_many([("/lb/upstreams/shop/one", backend("one")), (f"{SHOP}/upstream", "shop")])
        eventually(lambda: body("shop.example.org").startswith("200 one"), what=lambda: box.text("log")[-3000:])
        members[0].kill()
        time.sleep(2.5)  # if that was the leader, there is another by now
        members[1].wait()
        members[1].put("/lb/upstreams/shop/two", backend("two"))
        members[1].delete("/lb/upstreams/shop/one")
        eventually(lambda: body("shop.example.org").startswith("200 two"), what=lambda: box.text("log")[-3000:])
        members[2].delete("/lb/upstreams/shop/two")
        eventually(lambda: body("shop.example.org").startswith("503"))
        found = json.loads(box.verb("history", "nginx", "--json").stdout)
        assert {row["result"] for row in found} == {"live"} and box.verb("status", "nginx").stdout.startswith("nginx")
        assert box.stop() < 8
    finally:
        box.close()
        stack.close()
        for member in members:
            member.kill()
