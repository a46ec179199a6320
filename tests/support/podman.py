"""Real containers: images made by buildah, run by podman and runc. Nothing is pulled, nothing of it outlives the tests.

Debian's versions run as root without a daemon. All of their storage is in one directory that is thrown away.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from support import need

LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024")  # runc must not be asked for more than we have
TOOLS = (("podman", "podman"), ("buildah", "buildah"), ("runc", "runc"))


class Podman:
    """Images and containers in a storage of their own below a directory."""

    def __init__(self, directory: Path) -> None:
        need(os.getuid() == 0, "root, for containers")
        for tool, package in TOOLS:
            need(shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin"),
                 f"{tool} (on Debian: apt-get install {package})")
        self.directory = directory
        self.storage = ["--root", str(directory / "root"), "--runroot", str(directory / "run")]
        self.environ = {**os.environ, "STORAGE_DRIVER": "vfs", "BUILDAH_ISOLATION": "chroot"}

    def buildah(self, *words: str | Path, seconds: float = 110) -> str:
        """A command of buildah that has to succeed; its standard output."""
        done = self._call(["buildah", *self.storage, *map(str, words)], seconds)
        assert done.returncode == 0, f"buildah {words}:\n{done.stdout}\n{done.stderr}"
        return done.stdout.strip()

    def podman(self, *words: str | Path, seconds: float = 60) -> subprocess.CompletedProcess[str]:
        """A command of podman, whatever comes of it."""
        return self._call(["podman", *self.storage, "--cgroup-manager=cgroupfs", "--runtime=runc", *map(str, words)],
                          seconds)

    def _call(self, argv: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
        return subprocess.run(argv, env=self.environ, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              errors="replace", timeout=seconds)

    def image(self, name: str, tree: Path) -> str:
        """Make an image of a directory tree."""
        container = self.buildah("from", "scratch")
        self.buildah("add", "--quiet", container, tree, "/")
        self.buildah("commit", "--quiet", container, f"localhost/{name}")
        self.buildah("rm", container)
        return f"localhost/{name}"

    def build(self, name: str, context: Path, *words: str | Path, seconds: float = 110) -> str:
        """Build a Dockerfile, from images that are there."""
        self.buildah("bud", "--pull-never", "--tag", f"localhost/{name}", *words, context, seconds=seconds)
        return f"localhost/{name}"

    def run(self, *words: str | Path, seconds: float = 60) -> subprocess.CompletedProcess[str]:
        """`podman run --rm` without a network of its own: flags, image, command."""
        return self.podman("run", "--rm", *LIMITS, *words, seconds=seconds)

    def inspect(self, image: str) -> dict[str, Any]:
        """What podman tells of an image."""
        found: list[dict[str, Any]] = json.loads(self.podman("inspect", "--type=image", image).stdout)
        return found[0]

    def files(self, image: str) -> Path:
        """The root directory of an image, mounted until unmount()."""
        done = self.podman("image", "mount", image)
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.strip())

    def close(self) -> None:
        """Remove every container and image."""
        self.podman("rm", "--all", "--force", "--time", "0")
        self.podman("image", "umount", "--all", "--force")
        shutil.rmtree(self.directory, ignore_errors=True)
