"""The package for Alpine, in the hands of Alpine's own apk; and the program as a zipapp."""

from __future__ import annotations

import filecmp
import hashlib
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from support import need
from support.alpine import Tree

import build
import etcdinit

PACKAGE = f"etcdinit-{etcdinit.__version__}-r0"
ALONE = ("--no-network", "--repositories-file", "/dev/null")  # Alpine's own repositories are not asked
ADD = ("/sbin/apk", "add", *ALONE, "--repository", "/repository", "etcdinit")
DELETE = ("/sbin/apk", "del", *ALONE, "etcdinit")


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need(shutil.which("openssl"), "the openssl command (on Debian: apt-get install openssl)")
    made = tmp_path_factory.mktemp("key") / "packager@example.org-1.rsa"
    subprocess.run(["openssl", "genrsa", "-out", made, "2048"], check=True, capture_output=True)
    return made


@pytest.fixture(scope="module")
def repository(key: Path, executable: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `build.py apk` makes: x86_64/ with package and index, and the public key."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "DIST", tmp_path_factory.mktemp("dist"))
        patch.setattr(build, "built", lambda target: executable)
        assert build.main(["apk", "--key", str(key)]) == 0
        assert filecmp.cmp(build.DIST / f"{PACKAGE}.apk", build.DIST / f"apk/x86_64/{PACKAGE}.apk", shallow=False)
        return build.DIST / "apk"


@pytest.fixture
def tree(alpine: Path, repository: Path, tmp_path: Path) -> Tree:
    """An Alpine with a copy of the repository in /repository, that knows the packager's key."""
    made = Tree(tmp_path / "tree", alpine)
    shutil.copytree(repository, made.path / "repository")
    shutil.copy(next(repository.glob("*.pub")), made.path / "etc/apk/keys")
    (made.path / "dev/null").touch()
    return made


def state(tree: Tree) -> set[tuple[str, str]]:
    """Every path, with a digest of its content if it is a file: all that a package can leave behind."""
    found = set()
    for name in tree.files() - {"var/log/apk.log"}:  # apk's own diary
        path = tree.path / name
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        if path.name == "scripts.tar.gz":  # packed anew at each change
            with tarfile.open(path) as scripts:
                content = "\n".join(sorted(scripts.getnames())).encode()
        found.add((name, hashlib.sha256(content).hexdigest()))
    return found


def test_apk_installs_the_package_and_removes_all_of_it(tree: Tree, executable: Path) -> None:
    before = state(tree)
    added = tree.chroot(*ADD)
    assert added.returncode == 0, added
    assert "UNTRUSTED" not in added.stderr
    assert tree.chroot("/sbin/etcdinit", "--version").stdout.startswith(f"etcdinit {etcdinit.__version__}\n")
    assert filecmp.cmp(tree.path / "sbin/etcdinit", executable, shallow=False)
    assert (tree.path / "sbin/etcdinit").stat().st_mode == 0o100755
    assert {name for name, _ in state(tree) - before if (tree.path / name).is_dir()} == {"etc/confd", *build.CONTRACT}
    assert f"{PACKAGE} x86_64 {{etcdinit}} (MIT) [installed]" in tree.chroot("/sbin/apk", "list", "--installed").stdout
    assert "owned by " + PACKAGE in tree.chroot("/sbin/apk", "info", "--who-owns", "/sbin/etcdinit").stdout
    audit = ("/sbin/apk", "audit", "--system")
    assert "sbin/etcdinit" not in tree.chroot(*audit).stdout  # its checksum is that of the database
    (tree.path / "sbin/etcdinit").write_bytes(b"changed")
    assert "U sbin/etcdinit" in tree.chroot(*audit).stdout
    removed = tree.chroot(*DELETE)
    assert removed.returncode == 0, removed
    assert state(tree) ^ before == set()


def test_files_of_the_user_stay_when_the_package_goes(tree: Tree) -> None:
    assert tree.chroot(*ADD).returncode == 0
    (tree.path / "etc/confd/conf.d/mine.toml").write_text("[template]\n")
    assert tree.chroot(*DELETE).returncode == 0
    assert (tree.path / "etc/confd/conf.d/mine.toml").exists() and not (tree.path / "etc/services.d").exists()


def test_apk_refuses_what_the_packager_has_not_signed(tree: Tree) -> None:
    key = next((tree.path / "etc/apk/keys").glob("packager*"))
    elsewhere = key.rename(tree.path / key.name)
    refused = tree.chroot(*ADD)
    assert refused.returncode != 0 and "UNTRUSTED" in refused.stderr
    elsewhere.rename(key)
    package = tree.path / f"repository/x86_64/{PACKAGE}.apk"
    content = bytearray(package.read_bytes())
    content[-1000] ^= 1
    package.write_bytes(content)
    assert tree.chroot(*ADD).returncode != 0
    assert not (tree.path / "sbin/etcdinit").exists()


def test_a_package_file_is_enough(tree: Tree) -> None:
    added = tree.chroot("/sbin/apk", "add", *ALONE, f"/repository/x86_64/{PACKAGE}.apk")
    assert added.returncode == 0, added
    assert tree.chroot("/sbin/etcdinit", "--version").returncode == 0


def test_the_same_executable_and_key_give_the_same_package(repository: Path, executable: Path, key: Path) -> None:
    whole, _ = build.package(executable.read_bytes(), "x86_64", build.source_date(), key)
    assert bool(whole == (repository / f"x86_64/{PACKAGE}.apk").read_bytes())  # bool: no diff of megabytes


def test_a_key_that_signs_nothing_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], executable: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "built", lambda target: executable)
    (tmp_path / "no.rsa").write_text("no key")
    assert build.main(["apk", "--key", str(tmp_path / "no.rsa")]) == 1
    assert f"cannot sign with {tmp_path}/no.rsa" in capsys.readouterr().out


# ---- zipapp -----------------------------------------------------------------------------------------------

def test_the_zipapp_runs_where_python_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "DIST", tmp_path)
    assert build.main(["--zipapp"]) == 0
    (tmp_path / "t").write_text('{{getv "/a"}}\n')
    (tmp_path / "keys.json").write_text('{"a": "1"}')
    for argv in ([str(tmp_path / "etcdinit.pyz")], [sys.executable, "-I", "-S", str(tmp_path / "etcdinit.pyz")]):
        words = ["template", str(tmp_path / "t"), "--keys", str(tmp_path / "keys.json")]
        done = subprocess.run([*argv, *words], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
        assert subprocess.run([*argv, "nonsense"], capture_output=True, timeout=60).returncode == 2
    shutil.copy(tmp_path / "etcdinit.pyz", tmp_path / "first")
    assert build.main(["--zipapp"]) == 0
    assert filecmp.cmp(tmp_path / "etcdinit.pyz", tmp_path / "first", shallow=False)
