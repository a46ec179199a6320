"""ETCD: SRV, TLS, authentication and failover, against real servers."""

from __future__ import annotations

import base64
import json
import os
import pty
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import eventually, need
from support.certificates import Authority, Certificate
from support.container import Container
from support.dns_servers import dnsmasq
from support.etcd_fake import FakeEtcd
from support.etcd_server import Cluster, EtcdServer, find_etcd, http

import etcdinit
from etcdinit import (
    Etcd,
    EtcdDenied,
    EtcdTlsError,
    EtcdUnreachable,
    Secret,
    Tls,
    UsageError,
    examine,
    public_environment,
    secret,
)

VERSIONS = ["3.4", "3.5"]


def binary(version: str) -> str:
    found = find_etcd(version)
    need(found, f"etcd {version} is not installed")
    assert found is not None
    return found


# ---- credentials --------------------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def nothing_concealed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(etcdinit, "_secrets", [])
    monkeypatch.setattr(etcdinit, "SECRETS_DIRECTORY", str(tmp_path / "run-secrets"))


def test_a_credential_is_a_flag_a_variable_a_file_or_a_container_secret(tmp_path: Path) -> None:
    file, secrets = tmp_path / "word", tmp_path / "run-secrets"
    file.write_text("from-file\n")
    secrets.mkdir()
    (secrets / "etcd_password").write_text("from-run-secrets\r\n")

    def found(flags: dict[str, str], **environ: str) -> str:
        credential = secret("password", flags, environ)
        assert credential is not None
        return credential.text()

    both = {"ETCD_PASSWORD": "from-variable", "ETCD_PASSWORD_FILE": str(file)}
    assert found({"password": "from-flag"}, **both) == "from-flag"
    assert found({}, **both) == "from-variable"
    assert found({}, ETCD_PASSWORD_FILE=str(file)) == "from-file"
    assert found({}) == "from-run-secrets"
    (secrets / "ETCD_PASSWORD").write_text("upper")
    assert found({}) == "upper"
    assert secret("username", {}, {}) is None
    assert etcdinit.mask("from-flag from-variable from-file from-run-secrets upper y") == "****** " * 5 + "y"


def test_a_credential_file_is_read_again_when_it_changes_and_kept_when_it_vanishes(tmp_path: Path) -> None:
    file = tmp_path / "word"
    file.write_text("one")
    credential = Secret("ETCD_PASSWORD_FILE", path=str(file), hidden=True)
    assert credential.text() == "one"
    file.write_text("second")
    assert credential.text() == "second"
    file.unlink()
    assert credential.text() == "second"
    with pytest.raises(UsageError, match="cannot read ETCD_KEY_FILE from .*: no such file or directory"):
        Secret("ETCD_KEY_FILE", path=str(file)).text()


def test_what_is_no_file_with_a_credential_is_told_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")  # to open it would block for ever
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "huge").write_bytes(b"x" * (etcdinit.SECRET_SIZE + 1))
    for file, why in (("", "it is a directory"), ("fifo", "it is not a regular file"), ("empty", "it is empty"),
                      ("none", "no such file"), ("huge", "it is larger than 1048576 bytes"), ("empty/x", "not a dir")):
        environ = {"ETCD_ENDPOINTS": "http://127.0.0.1:1", "ETCD_SCHEME": "http", "ETCD_USERNAME": "u",
                   "ETCD_PASSWORD_FILE": f"{tmp_path}/{file}"}
        with pytest.raises(UsageError, match=f"cannot read ETCD_PASSWORD_FILE from {tmp_path}/{file}: {why}"):
            Etcd.from_settings({}, environ).password.text()  # type: ignore[union-attr]
        assert [step[:2] for step in examine({}, ["/"], environ)] == [("environment", False)]
    for empty in ({"ETCD_PASSWORD": ""}, {"ETCD_PASSWORD_FILE": ""}):
        assert secret("password", {}, empty) is None
    of_echo = secret("password", {}, {"ETCD_PASSWORD": "word\n"})
    assert of_echo and of_echo.text() == "word"


def test_a_credential_file_that_is_written_in_place_is_not_lost_meanwhile(tmp_path: Path,
                                                                        capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "word"
    file.write_text("alpha")
    credential = Secret("ETCD_PASSWORD_FILE", path=str(file), hidden=True)
    assert credential.text() == "alpha"
    file.write_text("")
    assert [credential.text() for _ in range(3)] == ["alpha"] * 3
    assert capfd.readouterr().err.count("the last one is used: it is empty") == 1
    file.write_text("beta")
    assert credential.text() == "beta" and etcdinit.mask("alpha beta") == "****** ******"


def test_a_secret_is_blotted_out_in_its_visible_form_too() -> None:
    etcdinit.conceal("tab\tbell\x07")
    assert etcdinit.mask("tab\tbell\x07 " + etcdinit.printable("tab\tbell\x07")) == "****** ******"


def test_every_variable_that_is_read_is_in_the_table() -> None:
    import re
    text = Path(etcdinit.__file__).read_text()
    known = {row.env for row in etcdinit.SETTINGS.values()}
    read = set(re.findall(r'"(ETCD_[A-Z_]+)"', text)) | set(re.findall(r'environ(?:\.get\(|\[)"(ETCD[A-Z_]+)"', text))
    assert read <= known


def test_services_get_no_secret_unless_told_so() -> None:
    environ = {"ETCD_PASSWORD": "p", "ETCD_KEY": "k", "ETCD_USERNAME": "u", "ETCD_CA": "c", "PATH": "/bin"}
    assert public_environment(environ) == {"ETCD_USERNAME": "u", "ETCD_CA": "c", "PATH": "/bin"}
    assert public_environment({**environ, "ETCDINIT_KEEP_SECRETS": "1"})["ETCD_PASSWORD"] == "p"


@pytest.mark.parametrize("environ, message", [
    ({}, "set ETCD_SRV_DOMAIN, ETCD_SRV_RECORD, ETCD_ENDPOINTS or --node .examples: ETCD_SRV_DOMAIN=example.org, "
         "ETCD_ENDPOINTS=https://"),
    ({"ETCD_ENDPOINTS": "a:1", "ETCD_USERNAME": "u"},
     "ETCD_USERNAME and ETCD_PASSWORD belong together: ETCD_PASSWORD is not set"),
    ({"ETCD_ENDPOINTS": "a:1", "ETCD_KEY": "u"}, "ETCD_CERT and ETCD_KEY belong together: ETCD_CERT is not set"),
    ({"ETCD_ENDPOINTS": "a:1", "ETCD_SCHEME": "ftp"}, 'not a scheme: "ftp"'),
    ({"ETCD_ENDPOINTS": "http://a:1", "ETCD_USERNAME": "u", "ETCD_PASSWORD": "geheim"},
     "the password is not sent over plain http to http://a:1: use https, or say ETCD_SCHEME=http"),
])
def test_wrong_settings_are_told(environ: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Etcd.from_settings({}, environ)
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize("environ, message", [
    ({"ETCD_SRV_DOMAIN": "_etcd._tcp.d.org"}, 'cannot use ETCD_SRV_DOMAIN: "_etcd._tcp.d.org" is a whole SRV name'),
    ({"ETCD_ENDPOINTS": "a:1", "ETCD_TLS_SERVER_NAME": "*.d.org"}, 'cannot use ETCD_TLS_SERVER_NAME: ".*.d.org" is '),
    ({"ETCD_ENDPOINTS": "a:1", "ETCD_TLS_SERVER_NAME": ".d.org"}, "cannot use ETCD_TLS_SERVER_NAME"),
    ({"ETCD_ENDPOINTS": "a:1", "ETCD_TLS_SERVER_NAME": "höhe.org"}, "cannot use ETCD_TLS_SERVER_NAME"),
    ({"ETCD_SRV_DOMAIN": "d .org"}, 'cannot look up "_etcd-client-ssl._tcp.d .org": not a DNS name .*ETCD_SRV_DOMAIN'),
    ({"ETCD_SRV_RECORD": "_x._tcp.höhe.org"}, "xn-- form.*ETCD_SRV_RECORD"),
    ({"ETCD_SRV_DOMAIN": "d.org", "ETCD_SRV_NAME": "a..b"}, "not a DNS name .*ETCD_SRV_NAME"),
])
def test_names_that_can_be_none_are_told_without_asking_anybody(environ: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Etcd.from_settings({}, environ).get("/a")


def test_https_is_the_default_and_the_flag_goes_before_srv_and_that_before_the_variable() -> None:
    assert str(Etcd.from_settings({}, {"ETCD_ENDPOINTS": "a:1,http://b:2"}).endpoints[0]) == "https://a:1"
    assert str(Etcd.from_settings({}, {"ETCD_ENDPOINTS": "a:1", "ETCD_SCHEME": "http"}).endpoints[0]) == "http://a:1"
    client = Etcd.from_settings({}, {"ETCD_ENDPOINTS": "a:1", "ETCD_SRV_DOMAIN": "d.org"})
    assert client.endpoints == [] and client.questions == (
        ("_etcd-client-ssl._tcp.d.org", "https"), ("_etcd-client._tcp.d.org", "https"), ("_etcd._tcp.d.org", "https"))
    client = Etcd.from_settings({"node": ["c:3"]}, {"ETCD_ENDPOINTS": "a:1", "ETCD_SRV_DOMAIN": "d.org"})
    assert [str(endpoint) for endpoint in client.endpoints] == ["https://c:3"] and not client.questions
    client = Etcd.from_settings({}, {"ETCD_SRV_DOMAIN": "d.org", "ETCD_SRV_NAME": "blue", "ETCD_SCHEME": "http"})
    assert client.questions == (("_etcd-client-blue._tcp.d.org", "http"), ("_etcd-client-ssl-blue._tcp.d.org", "https"))
    client = Etcd.from_settings({}, {"ETCD_SRV_RECORD": "_x._tcp.d.org"})
    assert client.questions == (("_x._tcp.d.org", "https"),)


# ---- TLS ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


def server_flags(certificate: Certificate) -> tuple[str, ...]:
    return "--cert-file", certificate.cert_path, "--key-file", certificate.key_path


def tls_server(version: str, directory: Path, authority: Authority, certificate: Certificate, *flags: str,
               client: Certificate | None = None) -> EtcdServer:
    return EtcdServer(binary(version), directory, *server_flags(certificate), *flags, scheme="https",
                      context=authority.context(client)).start()


@pytest.fixture(scope="module", params=VERSIONS)
def secure(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory,
           authority: Authority) -> Iterator[EtcdServer]:
    """A real etcd behind TLS, its certificate for 127.0.0.1 and etcd.example.org; it holds /a = 1."""
    certificate = authority.issue("IP:127.0.0.1", "DNS:etcd.example.org")
    server = tls_server(request.param, tmp_path_factory.mktemp("tls"), authority, certificate, "--enable-v2=true")
    server.put("/a", "1")
    server.put_v2("/a", "1")
    yield server
    server.kill()


def value_of_a(url: str, **environ: str) -> str | None:
    client = Etcd.from_settings({}, {"ETCD_ENDPOINTS": url, **environ})
    try:
        return client.get("/a")
    finally:
        client.close()


def test_a_ca_is_a_path_pem_text_base64_or_a_file(secure: EtcdServer, authority: Authority, tmp_path: Path) -> None:
    encoded = base64.b64encode(authority.pem.encode()).decode()
    (tmp_path / "b64").write_text(encoded + "\n")
    for form in ({"ETCD_CA": authority.path}, {"ETCD_CA": authority.pem}, {"ETCD_CA": encoded},
                 {"ETCD_CA": authority.pem.replace("\n", "\\n")}, {"ETCD_CA_FILE": authority.path},
                 {"ETCD_CA_FILE": str(tmp_path / "b64")}):
        assert value_of_a(secure.url, **form) == "1"
    assert value_of_a(secure.url, ETCD_CA=authority.pem, ETCD_API="2") == "1"
    (tmp_path / "run-secrets").mkdir()
    (tmp_path / "run-secrets" / "etcd_ca").write_text(authority.pem)
    assert value_of_a(secure.url) == "1"


MANGLED = {  # what variables, YAML and editors do to PEM text
    "CRLF": lambda pem: pem.replace("\n", "\r\n"),
    "indented": lambda pem: pem.replace("\n", "\n    "),
    "on one line": lambda pem: pem.replace("\n", " "),
    "a written newline": lambda pem: pem.replace("\n", "\\n"),
    "text around it": lambda pem: f"subject=x\n\ufeff{pem}\ntext",
    "lines of 76 characters": lambda pem: "\n".join((lambda head, *body: [
        head, *textwrap.wrap("".join(body[:-1]), 76), body[-1]])(*pem.strip().split("\n"))),
    "base64 with line breaks": lambda pem: base64.encodebytes(pem.encode()).decode(),
    "base64, indented, with CRLF": lambda pem: base64.encodebytes(pem.encode()).decode().replace("\n", "\r\n  "),
}


@pytest.mark.parametrize("form", MANGLED)
def test_mangled_pem_text_is_understood(authority: Authority, form: str) -> None:
    ours, mangle = authority.issue(), MANGLED[form]
    tls = Tls(Secret("CA", mangle(authority.pem)), Secret("CERT", mangle(ours.cert)), Secret("KEY", mangle(ours.key)))
    assert len(tls.context().get_ca_certs()) == 1


@settings(deadline=None)
@given(st.sampled_from(["CERTIFICATE", "PRIVATE KEY", "X", "EC PRIVATE KEY"]), st.one_of(
    st.text(max_size=80), st.binary(max_size=120).map(lambda data: base64.b64encode(data).decode())), st.booleans())
def test_any_text_is_a_credential_or_is_refused(label: str, body: str, wrapped: bool) -> None:
    text = f"-----BEGIN {label}-----\n{body}\n-----END {label}-----" if wrapped else body
    for sources in ((Secret("ETCD_CA", text), None, None), (None, Secret("ETCD_CERT", text), Secret("ETCD_KEY", text))):
        try:
            Tls(*sources).context()
        except UsageError as error:
            assert str(error).startswith("cannot ") and "\n" not in etcdinit.printable(str(error))


def test_chains_and_combined_files_are_understood(authority: Authority, tmp_path: Path) -> None:
    ours, other = authority.issue(), authority.issue()
    both = tmp_path / "both.pem"
    both.write_text(ours.key + ours.cert + authority.pem)
    Tls(cert=Secret("CERT", path=str(both)), key=Secret("KEY", path=str(both))).context()
    Tls(cert=Secret("CERT", other.key + ours.cert + authority.pem), key=Secret("KEY", ours.key + other.cert)).context()
    assert len(Tls(Secret("CA", authority.pem + ours.cert + authority.pem)).context().get_ca_certs()) >= 1


def test_an_encrypted_key_is_told_and_nobody_is_asked(authority: Authority, program: list[str], tmp_path: Path) -> None:
    ours = authority.issue()
    encrypted = {}
    for name, command in (("pkcs8", ["pkey", "-aes128"]), ("legacy", ["ec", "-aes128"])):
        file = tmp_path / f"{name}.key"
        subprocess.run(["openssl", *command, "-in", ours.key_path, "-out", file, "-passout", "pass:geheim"], check=True,
                       capture_output=True)
        encrypted[name] = file
    assert "Proc-Type" in encrypted["legacy"].read_text()
    for key in (encrypted["pkcs8"], encrypted["legacy"]):
        with pytest.raises(UsageError, match=f"cannot use ETCD_KEY from {key}: the key is encrypted, and nobody"):
            Tls(cert=Secret("ETCD_CERT", ours.cert), key=Secret("ETCD_KEY", str(key))).context()
    ours_end, theirs = pty.openpty()  # here it could ask, as OpenSSL does by itself
    environ = {"ETCD_ENDPOINTS": "https://127.0.0.1:1", "ETCD_CERT": ours.cert, "PATH": os.environ["PATH"],
               "ETCD_KEY": encrypted["pkcs8"].read_text().replace("ENCRYPTED ", "")}
    on_tty = ["setsid", "-w", "sh", "-c", 'exec <>"$0" && exec "$@"', os.ttyname(theirs)]
    ended = subprocess.run([*on_tty, *program, "get", "/a"], env=environ, stderr=subprocess.PIPE, text=True, timeout=30)
    os.close(ours_end)
    os.close(theirs)
    assert ended.returncode == 2 and "cannot use ETCD_CERT and ETCD_KEY: " in ended.stderr, ended.stderr


def test_an_unknown_authority_is_refused_with_the_remedy(secure: EtcdServer, tmp_path: Path) -> None:
    with pytest.raises(EtcdTlsError, match="signed by an authority that is not trusted here .set ETCD_CA") as caught:
        value_of_a(secure.url)
    assert caught.value.exit_code == 3
    with pytest.raises(EtcdTlsError, match="not trusted here"):
        value_of_a(secure.url, ETCD_CA=Authority(tmp_path / "other", "Other CA").pem)


def test_a_certificate_must_be_for_the_endpoint_or_the_name_that_is_set(tmp_path: Path, authority: Authority) -> None:
    certificate = authority.issue("DNS:etcd.example.org")
    server = tls_server("3.5", tmp_path, authority, certificate)
    try:
        trusted = {"ETCD_CA": certificate.cert, "ETCD_TLS_SERVER_NAME": "etcd.example.org"}  # itself, not its authority
        assert value_of_a(server.url, **trusted) is None
        with pytest.raises(EtcdTlsError, match="is not for the address 127.0.0.1 .*ETCD_TLS_SERVER_NAME"):
            value_of_a(server.url, ETCD_CA=authority.pem)
        with pytest.raises(EtcdTlsError, match="is not for localhost .*ETCD_TLS_SERVER_NAME"):
            value_of_a(f"https://localhost:{server.port}", ETCD_CA=authority.pem)
        with pytest.raises(EtcdTlsError, match="is not for other.example.org"):
            value_of_a(server.url, ETCD_CA=authority.pem, ETCD_TLS_SERVER_NAME="other.example.org")
        assert value_of_a(server.url, ETCD_CA=authority.pem, ETCD_TLS_SERVER_NAME="etcd.example.org") is None
    finally:
        server.kill()


def test_an_expired_certificate_is_told(tmp_path: Path, authority: Authority) -> None:
    certificate = authority.issue("IP:127.0.0.1", days=-1)
    server = EtcdServer(binary("3.5"), tmp_path, *server_flags(certificate), scheme="https",
                        context=ssl._create_unverified_context()).start()
    try:
        with pytest.raises(EtcdTlsError, match="its certificate has expired"):
            value_of_a(server.url, ETCD_CA=authority.pem)
        assert value_of_a(server.url, ETCD_CA=authority.pem, ETCD_INSECURE_SKIP_VERIFY="1") is None
    finally:
        server.kill()


def test_skipping_verification_works_and_warns(secure: EtcdServer, capfd: pytest.CaptureFixture[str]) -> None:
    assert value_of_a(secure.url, ETCD_INSECURE_SKIP_VERIFY="1") == "1"
    assert "WARNING ETCD_INSECURE_SKIP_VERIFY is set" in capfd.readouterr().err


def test_http_where_https_is_and_the_other_way_round_are_told(secure: EtcdServer, etcd: EtcdServer) -> None:
    with pytest.raises(EtcdUnreachable, match="closed without an answer .is it https. then say https:// in the"):
        value_of_a(secure.url.replace("https", "http"))
    with pytest.raises(EtcdTlsError, match="closed in the TLS handshake .is it http"):
        value_of_a(etcd.url.replace("http", "https"))


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_a_server_with_old_tls_is_told(authority: Authority) -> None:
    certificate = authority.issue("IP:127.0.0.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.cert_path, certificate.key_path)
    context.set_ciphers("DEFAULT@SECLEVEL=0")
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def serve() -> None:
            peer, _ = listener.accept()
            try:
                context.wrap_socket(peer, server_side=True)
            except OSError:
                pass

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(EtcdTlsError, match="nothing newer than TLS 1.1"):
            value_of_a(f"https://127.0.0.1:{listener.getsockname()[1]}", ETCD_CA=authority.pem)


@pytest.mark.parametrize("version", VERSIONS)
def test_client_certificates(version: str, tmp_path: Path, authority: Authority) -> None:
    nameless, named = authority.issue(), authority.issue(common_name="app")
    wrong_use = authority.issue(usage="serverAuth")
    stranger = Authority(tmp_path / "other", "Other CA").issue()
    server = tls_server(version, tmp_path, authority, authority.issue("IP:127.0.0.1"), "--client-cert-auth=true",
                        "--trusted-ca-file", authority.path, "--bcrypt-cost", "4", client=nameless)
    trust = {"ETCD_CA": authority.pem}
    try:
        for refused in ({}, {"ETCD_CERT": stranger.cert, "ETCD_KEY": stranger.key},
                        {"ETCD_CERT": wrong_use.cert, "ETCD_KEY": wrong_use.key}):
            with pytest.raises(EtcdTlsError, match="wants a client certificate .*ETCD_CERT and ETCD_KEY"):
                value_of_a(server.url, **trust, **refused)
        server.put("/a", "1")
        encoded = [base64.b64encode(text.encode()).decode() for text in (nameless.cert, nameless.key)]
        for cert, key in ((nameless.cert, nameless.key), (nameless.cert_path, nameless.key_path), encoded,
                          (named.cert, named.key)):
            assert value_of_a(server.url, **trust, ETCD_CERT=cert, ETCD_KEY=key) == "1"
        enable_auth(server)
        login = {"ETCD_USERNAME": "app", "ETCD_PASSWORD": "geheim"}
        with pytest.raises(EtcdDenied, match="takes client certificates with an empty CN only"):
            value_of_a(server.url, **trust, **login, ETCD_CERT=named.cert, ETCD_KEY=named.key)
        client = Etcd.from_settings({}, {"ETCD_ENDPOINTS": server.url, **trust, **login, "ETCD_CERT": nameless.cert,
                                         "ETCD_KEY": nameless.key})
        assert client.read(["/app"])[1] == [("/app/x", "1")]
        client.close()
    finally:
        server.kill()


def test_a_key_given_as_text_is_in_no_file_and_in_no_log_line(tmp_path: Path, authority: Authority,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = authority.issue()
    monkeypatch.chdir(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    opened: list[object] = []
    sys.addaudithook(lambda event, details: opened.append(details[0]) if event == "open" else None)
    Tls(key=Secret("ETCD_KEY", certificate.key, hidden=True), cert=Secret("ETCD_CERT", certificate.cert)).context()
    assert opened == [] and len(os.listdir("/proc/self/fd")) == before
    line = certificate.key.splitlines()[1]
    assert etcdinit.mask(f"the key is {line}") == "the key is ******"


@pytest.mark.parametrize("ca, cert, key, message", [
    ("nonsense", "", "", "cannot use ETCD_CA: neither PEM text, nor base64 of it, nor a path"),
    ("-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----", "", "", "cannot use ETCD_CA: "),
    ("/no/such/file", "", "", "cannot read ETCD_CA from /no/such/file: no such file"),
    ("", "CERT", "-----BEGIN ENCRYPTED PRIVATE KEY-----\nx", "the key is encrypted"),
    ("", "CERT", "OTHER", "cannot use ETCD_CERT and ETCD_KEY: key values mismatch"),
    ("", "-----BEGIN CERTIFICATE-----\nx", "KEY", "cannot use ETCD_CERT: its PEM text is cut off"),
    ("", "-----BEGIN CERTIFICATE-----\nxx\n-----END CERTIFICATE-----", "KEY", "and ETCD_KEY: its PEM text is no cert"),
    ("", "-----BEGIN CERTIFICATE-----\nä\n-----END CERTIFICATE-----", "KEY", "cannot use ETCD_CERT: its PEM text is d"),
    ("", "KEY", "KEY", "cannot use ETCD_CERT: it holds no CERTIFICATE, but PRIVATE KEY"),
    ("", "CERT", "CERT", "cannot use ETCD_KEY: it holds no PRIVATE KEY, but CERTIFICATE"),
    ("KEY", "", "", "cannot use ETCD_CA: it holds no CERTIFICATE, but PRIVATE KEY"),
    ("/tmp", "", "", "cannot read ETCD_CA from /tmp: it is a directory"),
    ("\udcff\x00", "", "", "cannot use ETCD_CA: neither PEM text"),
])
def test_wrong_certificates_here_are_told(authority: Authority, ca: str, cert: str, key: str, message: str) -> None:
    one, two = authority.issue(), authority.issue()
    texts = {"CERT": one.cert, "KEY": one.key, "OTHER": two.key}
    ours = [Secret(name, texts.get(text, text)) if text else None
            for name, text in (("ETCD_CA", ca), ("ETCD_CERT", cert), ("ETCD_KEY", key))]
    with pytest.raises(UsageError, match=message) as caught:
        Tls(*ours).context()
    assert "\n" not in str(caught.value)


def test_a_changed_certificate_file_is_read_again(secure: EtcdServer, authority: Authority, tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    file.write_text(Authority(tmp_path / "other", "Other CA").pem)
    client = Etcd.from_settings({}, {"ETCD_ENDPOINTS": secure.url, "ETCD_CA": str(file)})
    with pytest.raises(EtcdTlsError, match="not trusted"):
        client.get("/a")
    file.write_text(authority.pem)
    assert client.get("/a") == "1"
    client.close()


def test_new_certificate_files_are_used_once_they_fit_together(authority: Authority, tmp_path: Path,
                                                              capfd: pytest.CaptureFixture[str]) -> None:
    """A rotation writes two files; between them, the old pair stays in use, and one line says why."""
    old, new = authority.issue("IP:127.0.0.1"), authority.issue("IP:127.0.0.1")
    cert, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    cert.write_text(old.cert)
    key.write_text(old.key)
    server = tls_server("3.5", tmp_path / "etcd", authority, authority.issue("IP:127.0.0.1"), "--client-cert-auth=true",
                        "--trusted-ca-file", authority.path, client=old)
    try:
        client = Etcd.from_settings({}, {"ETCD_ENDPOINTS": server.url, "ETCD_CA": authority.path,
                                         "ETCD_CERT": str(cert), "ETCD_KEY": str(key)})
        for file, text in ((cert, old.cert), (cert, new.cert), (key, ""), (key, "-----BEGIN"), (key, new.key)):
            file.write_text(text)
            client.close()  # the next one has to show its certificate
            before = client.tls._context
            assert client.get("/a") is None and client.get("/a") is None
        assert client.tls._context is not before
        client.close()
    finally:
        server.kill()
    told = capfd.readouterr().err
    assert told.count("key values mismatch: the key is not that of the certificate; the last ones are used") == 1
    assert told.count("cannot read ETCD_KEY again") == 1 and "is cut off" in told


def test_tls_ends_in_time_when_the_other_side_is_silent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = Etcd([f"https://127.0.0.1:{listener.getsockname()[1]}"], connect_timeout=0.3, answer_timeout=0.5)
        with pytest.raises(EtcdUnreachable, match=r"no connection within 0\.\d s"):
            client.get("/a")


# ---- authentication -----------------------------------------------------------------------------------

def enable_auth(server: EtcdServer) -> None:
    """root, and app with password geheim, whose role may read /app/ and the key /single; the store holds some keys."""
    for key, value in (("/app/x", "1"), ("/app-secret", "no"), ("/single", "s"), ("/other", "o")):
        server.put(key, value)
    b64 = etcdinit.base64_text
    for name, password in (("root", "rootpw"), ("app", "geheim")):
        server.call("/auth/role/add", {"name": name})
        server.call("/auth/user/add", {"name": name, "password": password})
        server.call("/auth/user/grant", {"user": name, "role": name})
    for start, end in ((b"/app/", b"/app0"), (b"/single", b"")):
        permission = {"permType": "READ", "key": b64(start), "range_end": b64(end)}
        server.call("/auth/role/grant", {"name": "app", "perm": permission})
    server.call("/auth/enable", {})


def disable_auth(server: EtcdServer) -> None:
    token = http("POST", f"{server.url}/v3/auth/authenticate", {"name": "root", "password": "rootpw"})[1]["token"]
    server.call("/auth/disable", {}, token)


@pytest.fixture(params=VERSIONS)
def guarded(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EtcdServer]:
    """A real etcd with short-lived tokens; auth is off."""
    server = EtcdServer(binary(request.param), tmp_path, "--auth-token-ttl", "1", "--bcrypt-cost", "4").start()
    yield server
    server.kill()


def as_app(server: EtcdServer, password: str = "geheim") -> Etcd:
    return Etcd([server.url], scheme="http", username=Secret("ETCD_USERNAME", "app"),
                password=Secret("ETCD_PASSWORD", password, hidden=True))


def test_a_user_reads_what_its_role_holds(guarded: EtcdServer) -> None:
    enable_auth(guarded)
    client = as_app(guarded)
    revision, pairs = client.read(["/app", "/single"])
    assert pairs == [("/app/x", "1"), ("/single", "s")] and revision > 0
    assert client.get("/single") == "s"
    with pytest.raises(EtcdDenied, match="cannot read /other at .*permission denied .the role of the user"):
        client.read(["/app", "/other"])
    with pytest.raises(EtcdDenied, match="permission denied"):
        client.read(["/"])
    client.close()
    with pytest.raises(EtcdDenied, match='cannot log in as "app" at .*authentication failed, .*check ETCD_USERNAME'):
        as_app(guarded, "wrong").read(["/app"])
    with pytest.raises(EtcdDenied, match="user name is empty .set ETCD_USERNAME and ETCD_PASSWORD"):
        Etcd([guarded.url]).read(["/app"])


def test_a_token_that_expired_after_five_idle_seconds_is_replaced(tmp_path: Path) -> None:
    servers = [EtcdServer(binary(version), tmp_path / version, "--auth-token-ttl", "5", "--bcrypt-cost", "4").start()
               for version in VERSIONS]
    try:
        clients, tokens, watches = [], [], []
        for server in servers:
            enable_auth(server)
            client = as_app(server)
            revision, pairs = client.read(["/app"])
            assert pairs == [("/app/x", "1")]
            token = client._token or ""
            assert client.get("/app/x") == "1" and client._token == token  # kept: a login costs etcd 60 ms
            clients.append(client)
            tokens.append(token)
            watches.append(client.watch(["/app"], revision))
            follow(watches[-1], lambda: watches[-1].open)
        for wait in (7, 7, 7, 7):  # each use of a token renews it
            time.sleep(wait)
            asked = [http("POST", f"{server.url}/v3/kv/range", {"key": "AA=="}, headers={"Authorization": token})[0]
                     for server, token in zip(servers, tokens, strict=True)]
            if asked == [401, 401]:
                break
        else:
            pytest.fail("the tokens do not expire")
        for server, client, token, watch in zip(servers, clients, tokens, watches, strict=True):
            watch.close()  # a new one is refused, as permission denied by 3.5, and that is no reason to give up
            assert client._token == token
            as_root(server, "/kv/put", {"key": etcdinit.base64_text(b"/app/x"), "value": etcdinit.base64_text(b"2")})
            assert follow(watch) == [("put", "/app/x", "2")]
            assert client._token != token
            client._token = token
            assert client.get("/app/x") == "2" and client._token != token
            watch.close()
            client.close()
    finally:
        for server in servers:
            server.kill()


def follow(watch: etcdinit.Watch, until: Callable[[], object] | None = None,
           seconds: float = 30) -> list[tuple[str, str, str]]:
    """Drive a watch until a condition holds, or else an event has come; the events."""
    seen: list[tuple[str, str, str]] = []
    deadline = time.monotonic() + seconds
    while not (until() if until else seen):
        assert time.monotonic() < deadline, (watch.failure, watch.stale)
        if watch.descriptors():
            etcdinit.readable(watch.descriptors()[0], 0.05)
        seen += [event[1:] for event in watch.step()]
    return seen


def as_root(server: EtcdServer, path: str, body: Any) -> Any:
    """One request of root, while auth is on."""
    token = http("POST", f"{server.url}/v3/auth/authenticate", {"name": "root", "password": "rootpw"})[1]["token"]
    return server.call(path, body, token)


def test_auth_is_switched_on_and_off_while_a_client_runs(guarded: EtcdServer) -> None:
    client = as_app(guarded)
    guarded.put("/app/x", "0")
    assert client.get("/app/x") == "0" and client._token == ""
    enable_auth(guarded)
    assert client.get("/app/x") == "1" and client._token
    disable_auth(guarded)
    assert client.get("/app/x") == "1" and client._token == ""
    guarded.call("/auth/enable", {})
    assert client.read(["/app"])[1] == [("/app/x", "1")]
    client.close()


def test_auth_is_switched_on_and_off_while_a_watch_runs(guarded: EtcdServer) -> None:
    guarded.put("/app/x", "0")
    client = as_app(guarded)
    watch = client.watch(["/app"], client.read(["/app"])[0])
    follow(watch, lambda: watch.open)
    enable_auth(guarded)
    assert follow(watch) == [("put", "/app/x", "1")]
    for enabled in (True, False, True):
        for value, cut in (("a", False), ("b", True)):  # over the stream that was open, and over one that is new
            if cut:
                watch.close()
            put = {"key": etcdinit.base64_text(b"/app/x"), "value": etcdinit.base64_text(value.encode())}
            as_root(guarded, "/kv/put", put) if enabled else guarded.call("/kv/put", put)
            assert follow(watch) == [("put", "/app/x", value)], (enabled, cut)
        disable_auth(guarded) if enabled else guarded.call("/auth/enable", {})
    watch.close()
    client.close()


def test_a_changed_password_file_is_used_at_the_next_login(guarded: EtcdServer, tmp_path: Path) -> None:
    enable_auth(guarded)
    file = tmp_path / "password"
    file.write_text("geheim\n")
    client = Etcd.from_settings({}, {"ETCD_ENDPOINTS": guarded.url, "ETCD_SCHEME": "http", "ETCD_USERNAME": "app",
                                     "ETCD_PASSWORD_FILE": str(file)})
    assert client.get("/app/x") == "1"
    token = http("POST", f"{guarded.url}/v3/auth/authenticate", {"name": "root", "password": "rootpw"})[1]["token"]
    guarded.call("/auth/user/changepw", {"name": "app", "password": "neu"}, token)
    file.write_text("neu\n")
    assert client.get("/app/x") == "1"  # its old token died with the old password
    client.close()


def test_v2_basic_authentication(tmp_path: Path) -> None:
    server = EtcdServer(binary("3.4"), tmp_path, "--enable-v2=true").start()
    try:
        server.put_v2("/app/x", "1")
        server.put_v2("/other", "o")
        permissions = {"kv": {"read": ["/app", "/app/*"], "write": []}}
        json_type = {"Content-Type": "application/json"}
        for path, body in (("users/root", {"user": "root", "password": "rootpw"}),
                           ("roles/app", {"role": "app", "permissions": permissions}),
                           ("users/app", {"user": "app", "password": "geheim", "roles": ["app"]}), ("enable", {})):
            status, data, _ = http("PUT", f"{server.url}/v2/auth/{path}", body, headers=json_type)
            assert status in (200, 201), data
        revoke = {"role": "guest", "revoke": {"kv": {"read": ["/*"], "write": ["/*"]}}}
        basic = {"Authorization": "Basic " + base64.b64encode(b"root:rootpw").decode(), **json_type}
        assert http("PUT", f"{server.url}/v2/auth/roles/guest", revoke, headers=basic)[0] == 200
        client = as_app(server)
        client.api = 2
        assert client.read(["/app"])[1] == [("/app/x", "1")]
        assert client.read(["/app/x"])[1] == [("/app/x", "1")]
        for key in ("/other", "/app0", "/"):
            with pytest.raises(EtcdDenied, match=f"cannot read {key} at .*The request requires user authentication"):
                client.read([key])
        client.close()
        with pytest.raises(EtcdDenied, match="Insufficient credentials"):
            Etcd([server.url], api="2").read(["/app"])
    finally:
        server.kill()


# ---- endpoints by DNS ---------------------------------------------------------------------------------

@pytest.fixture
def zone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that (re)starts a real dnsmasq with lines for example.org, and makes it our resolver."""
    running: list[Any] = []

    def serve(*lines: str) -> None:
        for server in running:
            server.__exit__(None, None, None)
        text = "\n".join(["no-resolv", "no-hosts", "bind-interfaces", "local=/example.org/", *lines, ""])
        running[:] = [dnsmasq(tmp_path, text)]
        address, port = running[0].__enter__()
        (tmp_path / "resolv.conf").write_text(f"nameserver [{address}]:{port}\noptions timeout:1\n")
        monkeypatch.setenv("ETCDINIT_RESOLV_CONF", str(tmp_path / "resolv.conf"))

    yield serve
    for server in running:
        server.__exit__(None, None, None)


def test_etcd_is_found_by_its_srv_record_and_its_certificate_holds_the_domain(zone: Any, tmp_path: Path,
                                                                              authority: Authority) -> None:
    server = tls_server("3.5", tmp_path / "etcd", authority, authority.issue("DNS:example.org"))
    other = tls_server("3.5", tmp_path / "other", authority, authority.issue("DNS:etcd2.example.org"))
    try:
        server.put("/a", "1")
        other.put("/a", "2")
        host = "host-record=etcd1.example.org,127.0.0.1"
        zone(f"srv-host=_etcd-client-ssl._tcp.example.org,etcd1.example.org,{server.port}", host)
        client = Etcd.from_settings({}, {"ETCD_SRV_DOMAIN": "example.org", "ETCD_CA": authority.pem})
        assert client.get("/a") == "1"
        endpoint, = client.endpoints
        assert str(endpoint) == f"https://etcd1.example.org:{server.port}"
        assert (endpoint.source, endpoint.server_name) == ("SRV _etcd-client-ssl._tcp.example.org", "example.org")
        client.close()
        zone(f"srv-host=_odd._tcp.example.org,etcd2.example.org,{other.port}", host.replace("etcd1", "etcd2"))
        record = {"ETCD_SRV_RECORD": "_odd._tcp.example.org", "ETCD_CA": authority.pem}
        with pytest.raises(EtcdTlsError, match="its certificate is not for example.org "):
            Etcd.from_settings({}, record).get("/a")
        client = Etcd.from_settings({}, {**record, "ETCD_TLS_SERVER_NAME": "target"})
        assert client.get("/a") == "2"
        client.close()
    finally:
        server.kill()
        other.kill()


def test_the_plain_names_are_asked_too_and_priority_is_kept(zone: Any) -> None:
    with FakeEtcd() as first, FakeEtcd() as second:
        first.put("/a", "first")
        second.put("/a", "second")
        ports = [server.url.rpartition(":")[2] for server in (first, second)]
        zone(f"srv-host=_etcd-client._tcp.example.org,b.example.org,{ports[1]},20",
             f"srv-host=_etcd-client._tcp.example.org,a.example.org,{ports[0]},10",
             f"srv-host=_etcd-client._tcp.example.org,a.example.org,{ports[0]},30",
             "host-record=a.example.org,127.0.0.1", "host-record=b.example.org,127.0.0.1")
        client = Etcd.from_settings({}, {"ETCD_SRV_DOMAIN": "example.org", "ETCD_SCHEME": "http"})
        assert client.get("/a") == "first"
        first.__exit__()
        client.close()
        assert client.get("/a") == "second"
        client.close()


def test_etcd_that_moves_in_dns_is_followed(zone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcdinit, "SRV_SHORTEST", 0)
    with FakeEtcd() as new:
        new.put("/a", "new")
        with FakeEtcd() as old:
            old.put("/a", "old")
            ports = [server.url.rpartition(":")[2] for server in (old, new)]
            zone(f"srv-host=_etcd._tcp.example.org,a.example.org,{ports[0]}", "host-record=a.example.org,127.0.0.1")
            client = Etcd.from_settings({}, {"ETCD_SRV_DOMAIN": "example.org.", "ETCD_SCHEME": "http"})
            assert client.get("/a") == "old"
        zone(f"srv-host=_etcd._tcp.example.org,a.example.org,{ports[1]}", "host-record=a.example.org,127.0.0.9")
        client.close()
        with pytest.raises(EtcdUnreachable, match="connection refused"):
            client.get("/a")  # DNS names it with an address where nobody is
        assert [str(endpoint) for endpoint in client.endpoints] == [f"http://a.example.org:{ports[1]}"]
        zone(f"srv-host=_etcd._tcp.example.org,a.example.org,{ports[1]}", "host-record=a.example.org,127.0.0.1")
        assert client.get("/a") == "new"
        client.close()


def test_dns_that_is_late_is_waited_for_and_one_that_never_knows_is_an_error(zone: Any, monkeypatch: pytest.MonkeyPatch,
                                                                           capfd: pytest.CaptureFixture[str]) -> None:
    with FakeEtcd() as fake:
        fake.put("/a", "1")
        zone("host-record=a.example.org,127.0.0.1")
        resolv = os.environ["ETCDINIT_RESOLV_CONF"]
        before = Path(resolv).read_text()
        zone(f"srv-host=_etcd._tcp.example.org,a.example.org,{fake.url.rpartition(':')[2]}",
             "host-record=a.example.org,127.0.0.1")
        after = Path(resolv).read_text()
        monkeypatch.setattr(etcdinit, "SRV_PATIENCE", 0.3)
        Path(resolv).write_text("nameserver [127.0.0.1]:1\noptions timeout:1 attempts:1\n")
        environ = {"ETCD_SRV_DOMAIN": "example.org", "ETCD_SCHEME": "http"}
        with pytest.raises(EtcdUnreachable, match="DNS does not tell where etcd is: .*_etcd-client._tcp.example.org"):
            Etcd.from_settings({}, environ).get("/a")
        monkeypatch.setattr(etcdinit, "SRV_PATIENCE", 20.0)
        timer = threading.Timer(1.0, Path(resolv).write_text, [after])
        timer.start()
        client = Etcd.from_settings({}, environ)
        assert client.get("/a") == "1"
        client.close()
        assert capfd.readouterr().err.count("waiting for DNS") == 2 and before != after


def test_a_name_that_does_not_exist_yet_is_waited_for(zone: Any, capfd: pytest.CaptureFixture[str]) -> None:
    with FakeEtcd() as fake:
        fake.put("/a", "1")
        zone("host-record=a.example.org,127.0.0.1")  # NXDOMAIN for the services
        client = Etcd.from_settings({}, {"ETCD_SRV_DOMAIN": "example.org", "ETCD_SCHEME": "http"})
        record = f"srv-host=_etcd-client._tcp.example.org,a.example.org,{fake.url.rpartition(':')[2]}"
        timer = threading.Timer(1.5, zone, [record, "host-record=a.example.org,127.0.0.1"])
        timer.start()
        assert client.get("/a") == "1"
        timer.join()
        client.close()
    told = capfd.readouterr().err
    assert told.count("\n") == told.count("waiting for DNS") == 1 and "does not exist, says" in told


def test_a_lookup_holds_as_long_as_its_ttl_and_a_failed_one_costs_nothing(zone: Any, capfd: pytest.CaptureFixture[str],
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeEtcd() as fake:
        fake.put("/a", "1")
        zone("local-ttl=40", f"srv-host=_etcd._tcp.example.org,a.example.org,{fake.url.rpartition(':')[2]}",
             "host-record=a.example.org,127.0.0.1,40")
        client = Etcd.from_settings({}, {"ETCD_SRV_DOMAIN": "example.org", "ETCD_SCHEME": "http"})
        assert client.get("/a") == "1"
        assert 30 < client._srv_until - etcdinit.now() <= 40
        asked: list[str] = []
        lookup = etcdinit.resolve_srv
        monkeypatch.setattr(etcdinit, "resolve_srv", lambda name, until: (asked.append(name), lookup(name, until))[1])
        assert client.get("/a") == "1" and not asked
        Path(os.environ["ETCDINIT_RESOLV_CONF"]).write_text("nameserver [127.0.0.1]:1\noptions timeout:1 attempts:1\n")
        for _ in range(3):
            client._srv_until = 0.0  # as if the time were over
            assert client.get("/a") == "1" and client._srv_until > etcdinit.now() + 20
        assert asked and capfd.readouterr().err.count("the last endpoints are used: cannot resolve SRV _etcd") == 1
        client.close()


def test_a_member_that_dns_drops_is_left_though_it_works(zone: Any, monkeypatch: pytest.MonkeyPatch,
                                                         etcd34: EtcdServer, etcd35: EtcdServer) -> None:
    """By requests, and by a watch, which would stay for ever: so a fleet moves to another cluster."""
    monkeypatch.setattr(etcdinit, "SRV_SHORTEST", 0)
    etcd34.put("/a", "old")
    etcd35.put("/a", "new")
    host = "host-record=a.example.org,127.0.0.1"
    zone(f"srv-host=_etcd._tcp.example.org,a.example.org,{etcd34.port}", host)
    client, watching = (Etcd.from_settings({}, {"ETCD_SRV_DOMAIN": "example.org", "ETCD_SCHEME": "http"}) for _ in "12")
    assert client.get("/a") == "old"
    revision, _ = watching.read(["/a"])
    watch = watching.watch(["/a"], revision)
    follow(watch, lambda: watch.open)
    zone(f"srv-host=_etcd._tcp.example.org,a.example.org,{etcd35.port}", host)
    assert client.get("/a") == "new" and [endpoint.port for endpoint in client.endpoints] == [etcd35.port]
    follow(watch, lambda: watch.stale)
    assert "this is another cluster" in watch.stale
    revision, pairs = watching.read(["/a"])
    assert pairs == [("/a", "new")]
    watch.restart(revision)
    etcd35.put("/a", "newer")
    assert follow(watch) == [("put", "/a", "newer")]
    watch.close()
    watching.close()
    client.close()


# ---- failover -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module", params=VERSIONS)
def three(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(binary(request.param), tmp_path_factory.mktemp("three")).start()
    cluster.members[0].put("/a", "1")
    yield cluster
    cluster.kill()


def read_anew(cluster: Cluster) -> str | None:
    """What a fresh client reads, as `render --once` makes one."""
    client = Etcd(cluster.urls)
    try:
        return client.get("/a")
    finally:
        client.close()


@pytest.mark.parametrize("which", ["leader", "follower"])
@pytest.mark.parametrize("harm", ["kill", "pause"])
def test_one_harmed_member_of_three_costs_no_read(three: Cluster, which: str, harm: str) -> None:
    lasting = Etcd(three.urls)
    assert lasting.get("/a") == "1"
    leader = three.leader()
    member = three.members[leader if which == "leader" else (leader + 1) % 3]
    getattr(member, harm)()
    try:
        for _ in range(3):
            assert read_anew(three) == "1"
            assert lasting.get("/a") == "1"
            time.sleep(0.2)
    finally:
        member.spawn() if harm == "kill" else member.resume()
    for _ in range(4):  # while it comes back: it listens, and does not serve yet
        assert read_anew(three) == "1" and lasting.get("/a") == "1"
        time.sleep(0.2)
    lasting.close()
    member.wait()


def test_a_lost_quorum_is_told_and_its_return_is_noticed(three: Cluster) -> None:
    lasting = Etcd(three.urls)
    assert lasting.get("/a") == "1"
    for member in three.members[1:]:
        member.kill()
    try:
        for client in (lasting, Etcd(three.urls)):
            with pytest.raises(EtcdUnreachable, match="no etcd endpoint answers: .*(no leader|no answer)") as caught:
                client.get("/a")
            assert caught.value.exit_code == 3
            client.close()
    finally:
        for member in three.members[1:]:
            member.spawn()
    for member in three.members:
        member.wait()
    assert lasting.get("/a") == "1" and read_anew(three) == "1"
    lasting.close()


def test_one_request_has_one_deadline_however_many_endpoints_are_silent() -> None:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(20)]
    client = Etcd([f"http://127.0.0.1:{listener.getsockname()[1]}" for listener in listeners], answer_timeout=1.0)
    with pytest.raises(EtcdUnreachable, match="no answer within 0.2 s") as caught:
        client.get("/a")
    assert 4 <= str(caught.value).count("no answer within") <= 6
    for listener in listeners:
        listener.close()


def test_no_answer_is_not_asked_for_in_a_busy_loop() -> None:
    with FakeEtcd() as fake:
        fake.fail((14, "etcdserver: no leader"), 10_000)
        with pytest.raises(EtcdUnreachable, match="no leader"):
            Etcd([fake.url], answer_timeout=2.0).get("/a")
        assert 3 <= len(fake.requests) < 15


# ---- what `etcdinit endpoints` and `etcdinit doctor` show ---------------------------------------------

def test_a_survey_tells_of_each_endpoint(three: Cluster) -> None:
    client = Etcd([*three.urls, "http://127.0.0.1:1"], source="--node")
    rows = client.survey()
    assert [row["endpoint"] for row in rows] == [*three.urls, "http://127.0.0.1:1"]
    assert [row["leader"] for row in rows] == [index == three.leader() for index in range(3)] + [None]
    for row in rows[:3]:
        assert row["version"].startswith(("3.4.", "3.5.")) and row["latency_ms"] > 0
        assert (row["source"], row["tls"], row["auth"], row["error"]) == ("--node", "none", "off", "")
    assert rows[3]["error"] == "connection refused" and rows[3]["version"] == ""


def test_a_survey_tells_of_tls_and_auth(secure: EtcdServer, authority: Authority, guarded: EtcdServer) -> None:
    row, = Etcd.from_settings({}, {"ETCD_ENDPOINTS": secure.url, "ETCD_CA": authority.pem}).survey()
    assert row["tls"] in ("TLSv1.2", "TLSv1.3") and row["certificate_end"].endswith("GMT") and row["leader"] is True
    row, = Etcd.from_settings({}, {"ETCD_ENDPOINTS": secure.url, "ETCD_INSECURE_SKIP_VERIFY": "yes"}).survey()
    assert row["tls"].endswith("unverified")
    assert as_app(guarded).survey()[0]["auth"] == "off"
    enable_auth(guarded)
    assert as_app(guarded).survey()[0]["auth"] == "as app"
    assert Etcd([guarded.url]).survey()[0]["auth"] == "needed"
    assert "authentication failed" in as_app(guarded, "wrong").survey()[0]["error"]


def steps(keys: list[str], **environ: str) -> list[tuple[str, bool, str]]:
    return list(examine({}, keys, environ))


def test_the_way_is_walked_to_the_keys(secure: EtcdServer, authority: Authority, zone: Any) -> None:
    zone(f"srv-host=_etcd-client-ssl._tcp.example.org,etcd.example.org,{secure.port}",
         "host-record=etcd.example.org,127.0.0.1")
    found = steps(["/a"], ETCD_SRV_DOMAIN="example.org", ETCD_CA=authority.pem, ETCD_TLS_SERVER_NAME="target",
                  ETCDINIT_RESOLV_CONF=os.environ["ETCDINIT_RESOLV_CONF"])
    assert [(step, passable) for step, passable, _ in found] == [(step, True) for step in (
        "environment", "resolv.conf", "SRV", "connect", "TLS", "etcd", "authentication", "read")]
    told = {step: text for step, _, text in found}
    assert "SRV _etcd-client-ssl._tcp.example.org" in told["environment"]
    assert told["SRV"] == f"SRV _etcd-client-ssl._tcp.example.org: https://etcd.example.org:{secure.port} (priority 0)"
    assert "certificate for etcd.example.org, valid until" in told["TLS"]
    assert "1 keys at or below /a at revision" in told["read"]


def test_the_walk_ends_where_the_way_does(secure: EtcdServer, authority: Authority, guarded: EtcdServer) -> None:
    for environ, step, text in (
        ({}, "environment", "nothing tells where etcd is"),
        ({"ETCD_ENDPOINTS": "127.0.0.1", "ETCD_CA": "nonsense"}, "environment", "cannot use ETCD_CA"),
        ({"ETCD_ENDPOINT": "a:1", "ETCD_SERVICE_HOST": "10.0.0.1", "ETCD_PORT": "tcp://10.0.0.1:2379"}, "environment",
         "2379); ETCD_ENDPOINT is no setting, did you mean ETCD_ENDPOINTS?"),
        ({"ETCD_ENDPOINTS": "http://127.0.0.1:1"}, "connect", "connection refused"),
        ({"ETCD_ENDPOINTS": secure.url}, "TLS", "not trusted here"),
        ({"ETCD_ENDPOINTS": secure.url.replace("https", "http")}, "etcd", "is it https"),
        ({"ETCD_ENDPOINTS": secure.url, "ETCD_CA": authority.pem}, "read", "no key at or below /nope in API v3"),
    ):
        found = steps(["/nope"], **environ)
        assert found[-1][:2] == (step, False) and text in found[-1][2] and "ETCD_PORT" not in found[-1][2]
        assert all(passable for _, passable, _ in found[:-1])
    enable_auth(guarded)
    found = steps(["/app"], ETCD_ENDPOINTS=guarded.url)
    assert found[-1][:2] == ("authentication", False) and "set ETCD_USERNAME and ETCD_PASSWORD" in found[-1][2]
    login = {"ETCD_ENDPOINTS": guarded.url, "ETCD_SCHEME": "http", "ETCD_USERNAME": "app", "ETCD_PASSWORD": "geheim"}
    assert steps(["/app"], **login)[-1][:2] == ("read", True)
    assert steps(["/other"], **login)[-1][:2] == ("read", False)
    assert "geheim" not in str(steps(["/other"], **login))


# ---- the program --------------------------------------------------------------------------------------

def test_endpoints_is_a_table_or_json(program: list[str], three: Cluster, zone: Any) -> None:
    nodes = {"ETCD_ENDPOINTS": ",".join([*three.urls, "http://127.0.0.1:1"])}
    told = run(program, "endpoints", **nodes)
    head, *lines = told.stdout.splitlines()
    assert told.returncode == 0 and head.split() == [
        "ENDPOINT", "SOURCE", "PRIORITY", "VERSION", "LATENCY", "LEADER", "AUTH", "TLS", "STATE"]
    rows = [line.split() for line in lines]
    assert [row[0] for row in rows] == [*three.urls, "http://127.0.0.1:1"]
    assert sorted(row[6] for row in rows[:3]) == ["no", "no", "yes"] and rows[three.leader()][6] == "yes"
    for row in rows[:3]:
        assert row[1:3] == ["ETCD_ENDPOINTS", "0"] and row[3].startswith("3.") and float(row[4]) > 0
        assert row[5] == "ms" and row[7:] == ["off", "none", "ok"]
    assert rows[3][3:] == ["-", "-", "-", "-", "-", "connection", "refused"]
    assert {line.index("3.") for line in lines[:3]} == {head.index("VERSION")}
    found = json.loads(run(program, "endpoints", "--json", **nodes).stdout)
    assert [row["endpoint"] for row in found] == [row[0] for row in rows]
    assert set(found[0]) == {"endpoint", "source", "priority", "tls", "certificate_end", "version", "latency_ms",
                             "leader", "auth", "error"}
    zone(*(f"srv-host=_etcd-client._tcp.example.org,a.example.org,{member.port},{10 * index}"
           for index, member in enumerate(three.members)), "host-record=a.example.org,127.0.0.1")
    by_dns = {"ETCD_SRV_DOMAIN": "example.org", "ETCD_SCHEME": "http",
              "ETCDINIT_RESOLV_CONF": os.environ["ETCDINIT_RESOLV_CONF"]}
    found = json.loads(run(program, "endpoints", "--json", **by_dns).stdout)
    assert [(row["priority"], row["source"]) for row in found] == [
        (priority, "SRV _etcd-client._tcp.example.org") for priority in (0, 10, 20)]
    nobody = run(program, "endpoints", ETCD_ENDPOINTS="http://127.0.0.1:1")
    assert nobody.returncode == 3 and "connection refused" in nobody.stdout


def test_doctor_walks_and_stops_where_something_is_wrong(program: list[str], guarded: EtcdServer,
                                                         tmp_path: Path) -> None:
    enable_auth(guarded)
    login = {"ETCD_ENDPOINTS": guarded.url, "ETCD_SCHEME": "http", "ETCD_USERNAME": "app", "ETCD_PASSWORD": "geheim"}
    for arguments, environ, code, last in (
        (["/app"], login, 0, ["ok", "read", "1 keys at or below /app at revision"]),
        (["/app", "/single"], login, 0, ["ok", "read", "2 keys at or below /app, /single"]),
        (["x", "--prefix", "/app"], login, 0, ["ok", "read", "1 keys at or below /app/x"]),
        (["--confdir", str(confdir(tmp_path, "/single"))], login, 0, ["ok", "read", "at or below /single"]),
        (["/app/x", "/app/y"], login, 0, ["ok", "read", "; no key at or below /app/y"]),
        (["/app/y"], login, 1, ["FAILED", "read", "(check ETCD_PREFIX, and that the keys were written by the same"]),
        (["/other"], login, 1, ["FAILED", "read", "permission denied (the role of the user does not hold it)"]),
        ([], {**login, "ETCD_PASSWORD": "falsch"}, 1, ["FAILED", "authentication", "(check ETCD_USERNAME and ETCD_P"]),
        ([], {"ETCD_ENDPOINTS": guarded.url}, 1, ["FAILED", "authentication", "(set ETCD_USERNAME and ETCD_PASSWORD)"]),
        ([], {"ETCD_ENDPOINTS": "http://127.0.0.1:1"}, 3, ["FAILED", "connect", "nothing listens there"]),
        ([], {}, 2, ["FAILED", "environment", "(examples: ETCD_SRV_DOMAIN="]),
    ):
        told = run(program, "doctor", *arguments, **environ)
        assert told.returncode == code, told.stdout
        *above, line = told.stdout.splitlines()
        assert line.split()[:2] == last[:2] and last[2] in line, line
        assert all(each.startswith("ok  ") for each in above)
        assert "geheim" not in told.stdout and "falsch" not in told.stdout
    found = json.loads(run(program, "doctor", "--json", "/app", **login).stdout)
    assert [(row["step"], row["ok"]) for row in found] == [(step, True) for step in (
        "environment", "connect", "TLS", "etcd", "authentication", "read")]
    assert found[0]["text"].endswith('as "app" (ETCD_USERNAME); password from ETCD_PASSWORD')


def test_doctor_sees_members_of_two_clusters(program: list[str], etcd34: EtcdServer, etcd35: EtcdServer) -> None:
    told = run(program, "doctor", ETCD_ENDPOINTS=f"{etcd34.url},{etcd35.url}")
    assert told.returncode == 3 and told.stdout.splitlines()[-1].endswith(
        f"etcd            {etcd34.url} and {etcd35.url} belong to different clusters (name members of one only)")


def test_a_path_to_a_key_is_no_secret(program: list[str], authority: Authority) -> None:
    for form in ({"ETCD_KEY": "/no/such/key"}, {"ETCD_KEY_FILE": "/no/such/key"}):
        ended = run(program, "get", "/a", ETCD_ENDPOINTS="127.0.0.1", ETCD_CERT=authority.pem, **form)
        assert ended.returncode == 2 and "from /no/such/key: no such file" in ended.stderr


def test_doctor_names_the_name_that_dns_does_not_know(program: list[str], zone: Any) -> None:
    zone("host-record=a.example.org,127.0.0.1")
    resolv_conf = os.environ["ETCDINIT_RESOLV_CONF"]
    told = run(program, "doctor", ETCD_SRV_DOMAIN="example.org", ETCDINIT_RESOLV_CONF=resolv_conf)
    *_, resolv, srv = told.stdout.splitlines()
    assert told.returncode == 3 and resolv.startswith("ok      resolv.conf     nameservers [127.0.0.1]:")
    assert srv.startswith("FAILED  SRV ") and "(NXDOMAIN; check the spelling and the zone)" in srv and not told.stderr


def confdir(directory: Path, key: str, check: str = "true") -> Path:
    """A confd directory with one resource that writes the value of a key to DIRECTORY/out."""
    for part in ("conf.d", "templates"):
        (directory / "confd" / part).mkdir(parents=True)
    (directory / "confd" / "templates" / "out.tmpl").write_text(f'{{{{getv "{key}"}}}}\n')
    (directory / "confd" / "conf.d" / "out.toml").write_text(
        f'[template]\nsrc = "out.tmpl"\ndest = "{directory}/out"\nkeys = ["{key}"]\ncheck_cmd = """{check}"""\n')
    return directory / "confd"


def run(program: list[str], *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ETCD")}
    return subprocess.run([*program, *arguments], capture_output=True, text=True, timeout=60, env={**clean, **environ})


def test_render_once_in_a_loop_succeeds_whenever_a_quorum_is_there(program: list[str], three: Cluster,
                                                                 tmp_path: Path) -> None:
    """While members are stopped, killed and started, one after the other; and twice the quorum is lost."""
    once = ["render", "--once", "--confdir", str(confdir(tmp_path, "/a"))]
    nodes = {"ETCD_ENDPOINTS": ",".join(three.urls)}
    lost: list[tuple[float, float]] = []
    told = threading.Event()  # a run has said that etcd is away

    def disturb() -> None:
        for member in three.members:
            member.pause()
            time.sleep(1.0)
            member.resume()
            member.kill()
            time.sleep(0.5)
            member.spawn().wait()
        for harm, members in (("pause", three.members[:2]), ("kill", three.members[1:])):
            begin = time.monotonic()
            for member in members:
                getattr(member, harm)()
            told.wait(30) if harm == "pause" else time.sleep(1.0)
            for member in members:
                member.resume() if harm == "pause" else member.spawn()
            for member in three.members:
                member.wait()
            lost.append((begin, time.monotonic()))

    assert run(program, *once, **nodes).returncode == 0 and (tmp_path / "out").read_text() == "1\n"
    disturber = threading.Thread(target=disturb)
    disturber.start()
    runs = []
    try:
        while disturber.is_alive():
            (tmp_path / "out").unlink(missing_ok=True)
            began = time.monotonic()
            ended = run(program, *once, **nodes)
            runs.append((began, time.monotonic(), ended))
            if ended.returncode == 3:
                told.set()
            assert (ended.returncode == 0) == (tmp_path / "out").exists()
    finally:
        disturber.join()
    assert run(program, *once, **nodes).returncode == 0
    for start, end, ended in runs:
        if any(start < over and end > begin for begin, over in lost):
            assert ended.returncode == 0 or ended.returncode == 3 and "no etcd endpoint answers" in ended.stderr
        else:
            assert ended.returncode == 0, ended.stderr
    assert len([1 for _, _, ended in runs if ended.returncode == 0]) >= 3 and told.is_set()
    print(f"{len(runs)} runs, the longest {max(end - start for start, end, _ in runs):.2f} s")


def test_services_and_their_logs_know_no_secret(program: list[str], tmp_path: Path, authority: Authority) -> None:
    """A whole container: init with the renderer and services, all that it writes, and its process table."""
    client = authority.issue()
    server = tls_server("3.5", tmp_path / "etcd", authority, authority.issue("IP:127.0.0.1"), "--client-cert-auth=true",
                        "--trusted-ca-file", authority.path, "--bcrypt-cost", "4", client=client)
    box = Container(program)
    try:
        enable_auth(server)
        box.environ |= {"ETCD_ENDPOINTS": server.url, "ETCD_CA": authority.pem, "ETCD_CERT": client.cert,
                        "ETCD_KEY": client.key, "ETCD_USERNAME": "app", "ETCD_PASSWORD": "geheim",
                        "ETCDINIT_LOG_LEVEL": "debug", "TMPDIR": str(box.place / "work")}
        directory = confdir(box.place, "/app/x", "env; cat /proc/self/cmdline")
        me = " ".join(program)
        box.service("confd", f"exec {me} render --confdir {directory}")
        box.service("web", "env; exec sleep 1000")
        box.service("crash", "env; exit 1", finish="env")
        box.service("wrong", f"exec env ETCD_PASSWORD=geheimer {me} render --confdir {directory}",
                    service_toml="secrets = true\n")
        box.start("sh", "-c", "env; exec sleep 1000", flags=["--log-level", "debug"])
        eventually(lambda: (box.place / "out").exists())
        eventually(lambda: "authentication failed" in box.text("log"))
        box.up("web")
        for verb in (["status"], ["status", "--json", "crash"], ["endpoints"], ["endpoints", "--json"], ["doctor"],
                     ["get", "/app/x"], ["get", "/other"]):
            told = box.verb(*verb, *(["--log-level", "debug"] if verb != ["status"] else []))
            box.write(f"told/{'-'.join(verb).replace('/', '')}", told.stdout + told.stderr)
        assert "PASSWORD" not in box.text("told/doctor") or "password from ETCD_PASSWORD" in box.text("told/doctor")
        processes = box.enter("sh", "-c", "for p in /proc/[0-9]*; do echo; tr '\\0' ' ' <$p/cmdline; done; "
                              "for p in /proc/[0-9]*; do case $(tr '\\0' ' ' <$p/cmdline) in sleep*) "
                              "tr '\\0' ' ' <$p/environ;; esac; done; find /run /dev/shm -xdev -type f -exec cat {} + "
                              "2>/dev/null").stdout
        assert "sleep 1000" in processes and "ETCD_USERNAME=app" in processes
        box.write("told/processes", processes)
    finally:
        box.signal(15)
        box.end()
        files = [file for file in box.place.rglob("*") if file.is_file()]
        texts = {str(file.relative_to(box.place)): file.read_text(errors="replace") for file in files}
        box.close()
        server.kill()
    assert {"log", "told/doctor", "told/processes", "out"} <= set(texts)
    for hidden in ("geheim", *client.key.splitlines()[1:-1], base64.b64encode(client.key.encode()).decode()[30:90]):
        found = [name for name, text in texts.items() if hidden in text]
        assert found == ["services/wrong/run"] * (hidden == "geheim")  # where the test itself has put it


def test_secrets_are_nowhere_to_be_found(program: list[str], tmp_path: Path, authority: Authority) -> None:
    """Not in logs, nor in files, nor in the process table, nor in the environment of commands."""
    client = authority.issue()
    server = tls_server("3.5", tmp_path / "etcd", authority, authority.issue("IP:127.0.0.1"), "--client-cert-auth=true",
                        "--trusted-ca-file", authority.path, "--bcrypt-cost", "4", client=client)
    password = "pass-4711-word"
    work = tmp_path / "work"
    work.mkdir()
    look = "cat /proc/self/environ /proc/$PPID/cmdline /proc/self/cmdline > {0}/seen; ls -l /proc/$PPID/fd >> {0}/seen"
    try:
        enable_auth(server)
        token = http("POST", f"{server.url}/v3/auth/authenticate", {"name": "root", "password": "rootpw"},
                     context=server.context)[1]["token"]
        server.call("/auth/user/changepw", {"name": "app", "password": password}, token)
        environ = {"ETCD_ENDPOINTS": server.url, "ETCD_CA": authority.pem, "ETCD_CERT": client.cert,
                   "ETCD_KEY": client.key, "ETCD_USERNAME": "app", "ETCD_PASSWORD": password, "TMPDIR": str(work)}
        directory = confdir(work, "/app/x", look.format(work))
        told = []
        for log_format in ("text", "json"):
            for extra in ({}, {"ETCD_PASSWORD": password + "x"}, {"ETCD_KEY": client.key[:-40]},
                          {"ETCD_KEY": password}):
                ended = run(program, "render", "--once", "--confdir", str(directory), "--log-level", "debug",
                            "--log-format", log_format, **{**environ, **extra})
                assert (ended.returncode == 0) == (not extra), ended.stderr
                told.append(ended.stdout + ended.stderr)
    finally:
        server.kill()
    assert (work / "out").read_text() == "1\n" and "PATH=" in (work / "seen").read_text()
    for file in work.rglob("*"):
        if file.is_file():
            told.append(file.read_text(errors="replace"))
    for hidden in (password, *client.key.splitlines()[1:-1]):
        assert not [text for text in told if hidden in text]
