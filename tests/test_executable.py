"""The static executable: what it is made of, how big it is, and what it needs to run: nothing."""

from __future__ import annotations

import gzip
import json
import os
import platform
import re
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import need
from support.certificates import Authority
from support.etcd_server import EtcdServer, find_etcd

import etcdinit

ROOT = Path(__file__).resolve().parent.parent
BUILT = Path(os.environ.get("ETCDINIT_PROGRAM") or ROOT / "dist" / "etcdinit")
VERSION_LINES = ("CPython", "OpenSSL", "musl", "commit")


@pytest.fixture(scope="module")
def executable() -> Path:
    """dist/etcdinit, or the executable that ETCDINIT_PROGRAM names."""
    need(BUILT.exists(), "dist/etcdinit (python3 build.py makes it)")
    return BUILT.resolve()


@pytest.fixture
def empty_root(executable: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the executable in a directory that holds nothing else, as its root: no /proc, /dev, /etc, /tmp."""
    need(os.geteuid() == 0, "root, to change the root directory")
    root = tmp_path / "root"
    root.mkdir()
    shutil.copy2(executable, root / "etcdinit")

    def run(*arguments: str, files: dict[str, str] | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
        for name, text in (files or {}).items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        return subprocess.run(["/etcdinit", *arguments], env=environ, capture_output=True, text=True, timeout=60,
                              preexec_fn=lambda: (os.chroot(root), os.chdir("/")))

    return run


# ---- what it is ---------------------------------------------------------------------------------------

def test_it_is_static(executable: Path) -> None:
    data = executable.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01"  # 64 bits, little endian
    kind, = struct.unpack_from("<H", data, 16)
    offset, = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    segments = {struct.unpack_from("<I", data, offset + size * n)[0] for n in range(count)}
    assert kind == 2  # ET_EXEC
    assert not segments & {2, 3}  # PT_DYNAMIC, PT_INTERP


def test_it_is_small(executable: Path) -> None:
    data = executable.read_bytes()
    assert len(data) <= 7_200_000
    assert len(gzip.compress(data, 9)) <= 2_900_000


def test_it_holds_no_path_of_the_machine_that_made_it(executable: Path) -> None:
    assert executable.read_bytes().count(str(ROOT).encode()) == 0


def test_the_version_tells_what_it_is_made_of(executable: Path) -> None:
    run = subprocess.run([executable, "--version"], capture_output=True, text=True, check=True)
    first, *rest = run.stdout.splitlines()
    assert first == f"etcdinit {etcdinit.__version__}"
    assert tuple(line.split()[0] for line in rest) == VERSION_LINES
    assert re.fullmatch(r"CPython 3\.13\.\d+\S*", rest[0])
    assert re.fullmatch(r"OpenSSL 3\.5\.\d+\S*", rest[1])


def test_the_module_tells_what_runs_it() -> None:
    run = subprocess.run([sys.executable, "-I", "-S", ROOT / "etcdinit.py", "--version"], stdout=subprocess.PIPE,
                         text=True, check=True)
    assert run.stdout.splitlines() == [f"etcdinit {etcdinit.__version__}",
                                       f"Python {platform.python_version()}, as a module"]


# ---- what it needs ------------------------------------------------------------------------------------

def test_it_runs_in_an_empty_root(empty_root: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    assert empty_root("--version").stdout.startswith("etcdinit ")
    rendered = empty_root("render", "--once", "--keys", "/keys.json", files={
        "keys.json": '{"a": {"1": "x", "2": "é"}}',
        "etc/confd/conf.d/a.toml": '[template]\nsrc="a"\ndest="/out"\nkeys=["/a"]\n',
        "etc/confd/templates/a": '{{range gets "/a/*"}}{{base .Key}}={{.Value}} {{end}}{{printf "%5.1f" 2.25}}'
                                 '{{regexReplaceAll "(b+)" "abbc" "<$1>"}}{{jsonArray "[1, 2.5]"}}'
                                 '{{sha256sum "x" | len}}'})
    assert (rendered.returncode, rendered.stderr.count("ERROR")) == (0, 0), rendered.stderr
    shown = empty_root("template", "/etc/confd/templates/a", "--keys", "/keys.json").stdout
    assert shown == "1=x 2=é   2.2a<bb>c[1 2.5]64"


def test_a_key_in_memory_needs_proc(empty_root: Callable[..., subprocess.CompletedProcess[str]],
                                    tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    client = authority.issue(common_name="app")
    run = empty_root("ls", "--node", "https://127.0.0.1:1", ETCD_CA=authority.pem, ETCD_CERT=client.cert,
                     ETCD_KEY=client.key)
    assert run.returncode == 2
    assert run.stderr.splitlines() == ["etcdinit: cannot use ETCD_CERT and ETCD_KEY: /proc is not mounted"]


def test_a_link_named_init_is_the_verb(executable: Path, tmp_path: Path) -> None:
    (tmp_path / "init").symlink_to(executable)
    environ = {**os.environ, "ETCDINIT_RUN": str(tmp_path / "run"), "ETCDINIT_SERVICES": str(tmp_path / "none")}
    for program in (str(tmp_path / "init"), "./init"):
        run = subprocess.run([program, "sh", "-c", "exit 7"], env=environ, cwd=tmp_path, capture_output=True, text=True,
                             timeout=60)
        assert run.returncode == 7, run.stderr


@pytest.mark.parametrize("megabytes", [4, 5, 6, 7, 8, 9, 10, 12])
def test_too_little_memory_is_told(executable: Path, megabytes: int) -> None:
    size = megabytes << 20
    run = subprocess.run([executable, "--help"], capture_output=True, text=True, timeout=60,
                         preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (size, size)))
    assert run.returncode in (0, 1, 111), f"{run.returncode} {run.stderr}"
    assert run.returncode == 0 or "memory" in run.stderr.lower()
    assert "Traceback" not in run.stderr


OPENED = re.compile(r'^(?:open|openat|stat|lstat|readlink|access|statx|newfstatat)\(.*?"([^"]*)"', re.M)


def files_touched(executable: Path, *arguments: str, **environ: str) -> set[str]:
    """The paths in the system calls that look at files."""
    need(shutil.which("strace"), "strace")
    run = subprocess.run(["strace", "-o", "/dev/stderr", "-e", "trace=file", executable, *arguments], env=environ,
                         text=True, capture_output=True, timeout=60)
    return set(OPENED.findall(run.stderr))


def test_the_version_opens_no_file(executable: Path) -> None:
    assert files_touched(executable, "--version") == set()


def test_a_render_opens_what_it_renders(executable: Path, tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "templates").mkdir()
    (tmp_path / "conf.d" / "a.toml").write_text(f'[template]\nsrc = "a"\ndest = "{tmp_path}/out"\nkeys = ["/a"]\n')
    (tmp_path / "templates" / "a").write_text('{{getv "/a"}}')
    (tmp_path / "keys.json").write_text('{"a": "1"}')
    touched = files_touched(executable, "render", "--once", "--confdir", str(tmp_path), "--keys",
                            f"{tmp_path}/keys.json")
    assert (tmp_path / "out").read_text() == "1"
    parents = {str(parent) for parent in tmp_path.parents}
    assert {path for path in touched if not path.startswith(str(tmp_path))} <= {
        "/proc/self/fd", "/etc/services.d", *parents}


def test_init_opens_what_it_supervises(executable: Path, tmp_path: Path) -> None:
    touched = files_touched(executable, "init", "true", ETCDINIT_RUN=str(tmp_path / "run"), PATH="/usr/bin:/bin",
                            ETCDINIT_SERVICES=str(tmp_path / "services"))
    outside = {path for path in touched if not path.startswith(str(tmp_path))}
    assert not [path for path in outside if path.endswith((".py", ".so", ".pyc")) or "python" in path or "ssl" in path]
    assert "/etc/resolv.conf" not in outside and "/etc/localtime" not in outside


# ---- what is inside -----------------------------------------------------------------------------------

WATCHED = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import etcdinit
for line in open(sys.argv[1]):
    etcdinit.main(line.split())
etcdinit.log.error("x")
print(*sorted(name for name, module in sys.modules.items() if module.__spec__ and module.__spec__.name == name))
"""


def test_what_runs_ask_for_is_inside(executable: Path, tmp_path: Path) -> None:
    python = ROOT / "build" / platform.machine() / "python" / "python"
    need(python.exists(), "the Python of the build (python3 build.py makes it)")
    inside = json.loads((python.parent.parent / "link-etcdinit" / "modules.json").read_text())
    (tmp_path / "keys.toml").write_text('a = "1"\n[b]\n"c.d" = "e"\n')
    (tmp_path / "t").write_text('{{range gets "/b/*"}}{{.Key}}{{end}}{{json "[1]"}}{{regexMatch "a?" "b"}}'
                                '{{sha256sum "x"}}{{datetime.Format "2006"}}{{toUpper "x"}}{{printf "%q %v" "x" 1}}')
    confd = ROOT / "templates" / "nginx-lb"
    (tmp_path / "runs").write_text("\n".join([
        f"template {tmp_path}/t --keys {tmp_path}/keys.toml", "--help", "rendr", "status", "wait --timeout 1s nothing",
        f"render --once --dry-run --diff --confdir {confd} --keys {confd}/keys.json", f"check --confdir {confd}",
        "get /a --node https://127.0.0.1:1 --log-format json", "ls --api 2 --srv-domain nowhere.invalid"]))
    (tmp_path / "watched.py").write_text(WATCHED)
    run = subprocess.run([python, "-I", "-S", tmp_path / "watched.py", ROOT, tmp_path / "runs"], stdout=subprocess.PIPE,
                         text=True, timeout=110, check=True)
    asked = set(run.stdout.splitlines()[-1].split()) - {"__main__", "zipimport", "etcdinit", "ctypes", "_ctypes"}
    assert asked - set(inside["frozen"]) - set(inside["builtin"]) == set()


def test_the_bill_of_materials_names_the_sources(executable: Path) -> None:
    path = ROOT / "dist" / "etcdinit.cdx.json"
    need(path.exists(), "dist/etcdinit.cdx.json (python3 build.py makes it)")
    bill = json.loads(path.read_text())
    assert (bill["bomFormat"], bill["metadata"]["component"]["version"]) == ("CycloneDX", etcdinit.__version__)
    assert {part["name"] for part in bill["components"]} == {"CPython", "OpenSSL", "musl"}
    assert all(len(part["hashes"][0]["content"]) == 64 for part in bill["components"])


# ---- how it is made -----------------------------------------------------------------------------------

def test_a_source_that_is_not_the_pinned_one_is_refused(tmp_path: Path) -> None:
    import build
    path = tmp_path / "musl.tar.gz"
    path.write_bytes(b"x")
    with pytest.raises(build.Failed, match=r"musl.tar.gz is not the file that SOURCES in build.py pins"):
        build.held(path, build.SOURCES["musl"].tarball)


def test_a_failing_step_shows_the_end_of_its_log(capsys: pytest.CaptureFixture[str], tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    import build
    monkeypatch.setattr(build, "BUILD", tmp_path)
    with pytest.raises(build.Failed, match=r"no such thing\ntry failed with exit code 3; the whole log is .*log"):
        build.step("try", ["sh", "-c", "seq 100; echo no such thing; exit 3"])


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_another_directory_gives_the_same_bytes(executable: Path, tmp_path: Path) -> None:
    copy = tmp_path / "a directory" / "etcdinit"
    (copy / "build").mkdir(parents=True)
    for name in ("etcdinit.py", "build.py", "pyproject.toml"):
        shutil.copy2(ROOT / name, copy / name)
    (copy / ".venv").symlink_to(ROOT / ".venv")
    told = subprocess.run([executable, "--version"], capture_output=True, text=True, check=True).stdout
    subprocess.run([sys.executable, "build.py"], cwd=copy, check=True,
                   env={**os.environ, "ETCDINIT_COMMIT": told.rpartition("commit ")[2].strip()})
    assert (copy / "dist" / "etcdinit").read_bytes() == executable.read_bytes()


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_aarch64_works_under_qemu(tmp_path: Path) -> None:
    """Template functions, files, and keys from a real etcd over TLS with a client certificate."""
    qemu = shutil.which("qemu-aarch64-static")
    need(qemu, "qemu-aarch64-static (Debian: qemu-user-static)")
    subprocess.run([sys.executable, ROOT / "build.py", "build", "--target", "aarch64"], check=True)

    def run(*arguments: str | Path, **environ: str) -> str:
        program = [str(qemu), str(ROOT / "dist" / "etcdinit-aarch64"), *map(str, arguments)]
        return subprocess.run(program, env=environ, stdout=subprocess.PIPE, text=True, check=True, timeout=120).stdout

    assert run("--version").startswith(f"etcdinit {etcdinit.__version__}\nCPython 3.13.")
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "templates").mkdir()
    (tmp_path / "keys.json").write_text('{"a": {"1": "x"}}')
    (tmp_path / "conf.d" / "a.toml").write_text(f'[template]\nsrc = "a"\ndest = "{tmp_path}/out"\nkeys = ["/a"]\n')
    (tmp_path / "templates" / "a").write_text(
        '{{range gets "/a/*"}}{{.Value}}{{end}}{{printf "%.2f" 1.5}}{{regexReplaceAll "b+" "abb" "c"}}')
    run("render", "--once", "--confdir", tmp_path, "--keys", tmp_path / "keys.json")
    assert (tmp_path / "out").read_text() == "x1.50ac"
    authority = Authority(tmp_path / "ca")
    server, client = authority.issue("IP:127.0.0.1"), authority.issue()
    etcd = EtcdServer(str(find_etcd("3.5")), tmp_path / "etcd", "--cert-file", server.cert_path,
                      "--key-file", server.key_path, "--client-cert-auth=true", "--trusted-ca-file",
                      authority.path, scheme="https", context=authority.context(client)).start()
    try:
        etcd.put("/a", "over TLS")
        assert run("get", "/a", "--node", etcd.url, ETCD_CA=authority.pem, ETCD_CERT=client.cert,
                   ETCD_KEY=client.key) == "over TLS\n"
    finally:
        etcd.kill()
