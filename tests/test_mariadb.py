"""templates/mariadb: two real servers; a key says which of them is the primary."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import eventually, free_port, need
from support.container import Container
from support.etcd_server import EtcdServer

SET = Path(__file__).resolve().parent.parent / "templates" / "mariadb"
PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))


class Database(Container):
    """A container of the set, its files below `place`."""

    def __init__(self, program: list[str], etcd: EtcdServer, name: str) -> None:
        super().__init__(program)
        self.name, self.port, self.socket = name, free_port(), self.place / "run" / "sock"
        shutil.copytree(SET / "services.d", self.place / "services", dirs_exist_ok=True)
        shutil.copytree(SET / "templates", self.place / "confd" / "templates")
        text = (SET / "conf.d" / "mariadb.toml").read_text()
        assert text.count('"/etc/mysql/') == 2
        self.write("confd/conf.d/mariadb.toml", text.replace('"/etc/mysql/', f'"{self.place}/conf/'))
        self.environ |= {
            "PATH": PATH, "ETCD_ENDPOINTS": etcd.url, "ETCD_API": "3", "ETCDINIT_CONFDIR": str(self.place / "confd"),
            "MARIADB_NAME": name, "MARIADB_CONF": str(self.place / "conf"), "MARIADB_DATA": str(self.place / "data"),
            "MARIADB_SOCKET": str(self.socket), "MARIADB_USER": "root", "MARIADB_BIND": "127.0.0.1",
            "MARIADB_PORT": str(self.port)}

    def sql(self, text: str, *flags: str) -> str:
        """What the server answers, or the error that it gives."""
        done = subprocess.run(["mariadb", "--no-defaults", f"--socket={self.socket}", "-N", *flags, "-e", text],
                              capture_output=True, text=True, timeout=60)
        return (done.stdout + done.stderr).strip()

    def as_app(self, text: str) -> str:
        """The same as a user who may only write."""
        return self.sql(text, "--user=app", "--password=app")


@pytest.fixture
def databases(program: list[str], etcd35: EtcdServer) -> Iterator[dict[str, Database]]:
    need(shutil.which("mariadbd", path=PATH) and os.getuid() == 0, "mariadbd, and root for containers")
    made = {name: Database(program, etcd35, name) for name in ("db1", "db2")}
    yield made
    for each in made.values():
        each.close()


def test_a_key_says_who_is_the_primary_and_replication_follows(databases: dict[str, Database],
                                                              etcd35: EtcdServer) -> None:
    one, two = databases.values()
    etcd35.put_many([("/mariadb/primary", "db1"), ("/mariadb/replication/password", "pass-word"),
                     ("/mariadb/settings/innodb_buffer_pool_size", "8M"),
                     ("/mariadb/settings/max_connections", "20"), ("/mariadb/settings/port", "1\nuser=x"),
                     *((f"/mariadb/members/{each.name}/address", f"127.0.0.1:{each.port}") for each in (one, two)),
                     ("/mariadb/members/db1/id", "1")])
    for each in (one, two):
        each.start()
    eventually(lambda: "key does not exist: /mariadb/members/db2/id" in two.verb("status", "mariadb").stdout)
    etcd35.put("/mariadb/members/db2/id", "2")
    for each in (one, two):
        each.up("mariadb")
        waited = each.verb("wait", "mariadb", "--timeout", "50s")
        assert waited.returncode == 0, each.text("log")[-3000:]
    one.sql("create database shop; create table shop.orders (n int primary key); create user app identified by 'app';"
            "grant insert, select on shop.* to app")
    assert one.as_app("insert into shop.orders values (1)") == ""
    eventually(lambda: two.as_app("select n from shop.orders") == "1", what=two.sql("show slave status\\G"))
    assert "read-only" in two.as_app("insert into shop.orders values (9)")

    pids = [each.verb("status", "mariadb").stdout.split("pid ")[1].split(",")[0] for each in (one, two)]
    etcd35.put("/mariadb/primary", "")
    eventually(lambda: one.sql("select @@global.read_only") == "1")
    etcd35.put("/mariadb/primary", "db2")
    eventually(lambda: two.as_app("insert into shop.orders values (2)") == "")
    eventually(lambda: one.as_app("select n from shop.orders order by n") == "1\n2",
               what=lambda: one.sql("show slave status\\G"))
    assert "read-only" in one.as_app("insert into shop.orders values (9)")
    assert pids == [each.verb("status", "mariadb").stdout.split("pid ")[1].split(",")[0] for each in (one, two)]

    etcd35.put("/mariadb/settings/max_connections", "30")
    eventually(lambda: one.sql("select @@max_connections") == "30", 60)
    etcd35.put("/mariadb/settings/no_such_setting", "1")
    for each in (one, two):
        eventually(lambda each=each: "took back the change of mariadb" in each.text("log"), 60)
        eventually(lambda each=each: each.sql("select @@max_connections") == "30", 60)
    eventually(lambda: two.as_app("insert ignore into shop.orders values (3)") == "", 60)
    eventually(lambda: one.as_app("select max(n) from shop.orders") == "3", 60)
    for each in (one, two):
        assert "pass-word" not in each.text("log") and "is ignored: not a setting" in each.text("conf/etcdinit.cnf")
