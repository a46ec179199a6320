"""The real s6 tools of three releases, over the same directories as ours.

2.11 is what Debian bookworm installs; 2.13 (the 43-byte status record) and 2.15 are unpacked from the packages
of trixie and sid into a tree of their own, with their libc, and run in a chroot: that needs root and apt.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from build import debian_mirrors
from support import need

RELEASES = {  # s6 release: Debian's name for the distribution that has it, packages
    "2.11": ("", ()),
    "2.13": ("trixie", ("s6", "libs6-2.13", "libskarnet2.14t64", "libexecline2.9", "libc6", "execline")),
    "2.15": ("sid", ("s6", "libs6-2.15", "libskarnet2.15", "libexecline2.9", "libc6", "execline")),
}
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "etcdinit-tests"


class S6:
    """The tools of one release. `root` is where they see `/`; service directories must stand below `place`."""

    def __init__(self, release: str, root: str) -> None:
        self.release, self.root = release, root.rstrip("/")
        self.place = Path(tempfile.mkdtemp(prefix="etcdinit-s6-", dir=f"{self.root}/tmp"))

    def inside(self, argument: object) -> str:
        """A path as the tools see it; other arguments stay."""
        text = str(argument)
        return text[len(self.root):] if self.root and text.startswith(f"{self.root}/") else text

    def argv(self, *command: object) -> list[str]:
        """A command line with a tool of this release."""
        words = list(map(str, command))
        if self.root and words[0] in ("s6-supervise", "s6-permafailon"):  # they execute programs of this machine
            libraries = f"{self.root}/usr/lib/x86_64-linux-gnu"
            return [f"{libraries}/ld-linux-x86-64.so.2", "--library-path", libraries,
                    f"{self.root}/usr/bin/{words[0]}", *words[1:]]
        if self.root:  # s6-svwait needs its own s6-ftrigrd under /usr/bin
            return ["chroot", self.root, f"/usr/bin/{words[0]}", *map(self.inside, words[1:])]
        return words

    def run(self, *command: object, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a tool to its end, whatever its exit code."""
        return subprocess.run(self.argv(*command), capture_output=True, text=True, timeout=timeout)

    def start(self, *command: object) -> subprocess.Popen[str]:
        """Start a tool."""
        return subprocess.Popen(self.argv(*command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def supervise(self, directory: Path) -> subprocess.Popen[bytes]:
        """Start a real s6-supervise."""
        return subprocess.Popen(self.argv("s6-supervise", directory), stdin=subprocess.DEVNULL,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def close(self) -> None:
        """Remove what the tests put down."""
        shutil.rmtree(self.place, ignore_errors=True)


def s6_release(release: str) -> S6:
    """The tools of a release; skips, or fails in CI, when they are not to be had."""
    suite, packages = RELEASES[release]
    if not suite:
        need(shutil.which("s6-svc") and shutil.which("execlineb"), "s6 2.11 (Debian bookworm: apt install s6 execline)")
        return S6(release, "/")
    need(os.getuid() == 0, f"root, to chroot into s6 {release}")
    need(platform.machine() == "x86_64" and debian_mirrors() and KEYRING.exists(), "Debian's apt")
    root = CACHE / f"s6-{release}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "complete").exists():
            need(_unpack(root, suite, packages), f"the packages of s6 {release} from Debian {suite}")
    return S6(release, str(root))


def _unpack(root: Path, suite: str, packages: tuple[str, ...]) -> bool:
    shutil.rmtree(root, ignore_errors=True)
    apt = root / "apt"
    for directory in ("lists/partial", "cache/archives/partial", "debs"):
        (apt / directory).mkdir(parents=True)
    (apt / "sources.list").write_text(f"deb [signed-by={KEYRING}] {debian_mirrors()[0]} {suite} main\n")
    private = [f"-oDir::Etc::sourcelist={apt}/sources.list", "-oDir::Etc::sourceparts=-",
               f"-oDir::State::lists={apt}/lists", f"-oDir::Cache={apt}/cache",
               "-oDir::State::status=/dev/null", "-oAPT::Sandbox::User=root", "-qq"]
    for action in (["update"], ["download", *packages]):
        if subprocess.run(["apt-get", *private, *action], cwd=apt / "debs", timeout=300).returncode:
            return False
    for package in (apt / "debs").glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", str(package), str(root)], check=True, timeout=60)
    for name in ("lib", "lib64", "bin"):
        if not (root / name).exists():
            (root / name).symlink_to(f"usr/{name}")
    for name in ("dev", "run", "tmp", "proc"):
        (root / name).mkdir(exist_ok=True)
    shutil.rmtree(apt)
    (root / "complete").touch()
    return True
