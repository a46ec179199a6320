"""Certificates for tests, made by the openssl command: an authority, and what it signs."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path

from support import need


class Certificate:
    """A certificate and its key, as files and as text."""

    def __init__(self, cert: Path, key: Path) -> None:
        self.cert_path, self.key_path = str(cert), str(key)
        self.cert, self.key = cert.read_text(), key.read_text()


class Authority:
    """A certificate authority of its own in a directory."""

    def __init__(self, directory: Path, name: str = "Test CA") -> None:
        need(shutil.which("openssl"), "the openssl command (on Debian: apt-get install openssl)")
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.serial = directory, 0
        self._openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "ca.key")
        self._openssl("req", "-x509", "-new", "-key", "ca.key", "-subj", f"/CN={name}", "-days", "30", "-out", "ca.pem")
        self.path = str(directory / "ca.pem")
        self.pem = (directory / "ca.pem").read_text()

    def _openssl(self, *arguments: str) -> None:
        run = subprocess.run(["openssl", *arguments], cwd=self.directory, capture_output=True, text=True, timeout=60)
        assert run.returncode == 0, run.stderr

    def issue(self, *names: str, common_name: str = "", usage: str = "serverAuth,clientAuth",
              days: int = 30) -> Certificate:
        """A certificate for names as openssl writes them ("IP:127.0.0.1", "DNS:x"); days < 0 makes an expired one."""
        self.serial += 1
        base = f"issued-{self.serial}"
        subject = f"/CN={common_name}" if common_name else "/"
        self._openssl("req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                      "-subj", subject, "-keyout", f"{base}.key", "-out", f"{base}.csr")
        lines = [f"subjectAltName={','.join(names)}"] if names else []
        (self.directory / f"{base}.ext").write_text("\n".join([*lines, f"extendedKeyUsage={usage}", ""]))
        self._openssl("x509", "-req", "-in", f"{base}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-set_serial",
                      str(self.serial), "-days", str(days), "-extfile", f"{base}.ext", "-out", f"{base}.pem")
        return Certificate(self.directory / f"{base}.pem", self.directory / f"{base}.key")

    def context(self, client: Certificate | None = None) -> ssl.SSLContext:
        """A context of Python's own ssl that trusts the authority, whatever name a certificate holds."""
        context = ssl.create_default_context(cadata=self.pem)
        context.check_hostname = False
        if client:
            context.load_cert_chain(client.cert_path, client.key_path)
        return context
