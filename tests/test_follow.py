"""The render loop: `etcdinit render` follows a real etcd, and what it does when something goes wrong."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import eventually, free_port, need
from support.etcd_server import EtcdServer, find_etcd
from support.follow import holds, module_with
from support.image import Image
from support.proxy import Proxy

from etcdinit import (
    Asked,
    KeyTree,
    Renderer,
    RenderOptions,
    Template,
    UsageError,
    glob_regex,
    parse_resources,
    store_functions,
)

# ---- what a template has asked for --------------------------------------------------------------------

TEMPLATES = [
    '{{range gets "/a/*"}}{{.Key}}={{.Value}} {{end}}', '{{range getvs "/a/*/x"}}{{.}} {{end}}',
    '{{range ls "/a"}}{{.}} {{end}}', '{{range lsdir "/"}}{{.}} {{end}}', '{{range lsdir "/a/b/"}}{{.}} {{end}}',
    '{{if exists "/a/b"}}yes{{end}}', '{{getv "/a/c" "none"}}', '{{(get "/a/c").Value}}',
    '{{range ls "/a"}}{{getv (printf "/a/%s" .) "-"}} {{end}}', '{{range gets "/[ab]/?"}}{{.Value}}{{end}}',
    '{{range gets "/*/*/x"}}{{.Value}}{{end}}', '{{range ls "/a/b/x"}}{{.}}{{end}}',
    '{{range gets "*"}}{{.Value}}{{end}}', '{{range gets "/"}}{{.Value}}{{end}}',
]
KEYS = ["/a", "/a/b", "/a/b/x", "/a/c", "/a/d/x", "/b", "/b/x", "/c/d/e", "/a/b/x/y"]


@given(st.sampled_from(TEMPLATES), st.dictionaries(st.sampled_from(KEYS), st.sampled_from("12"), max_size=7),
       st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(["", "1", "2"])), min_size=1, max_size=6))
def test_no_change_that_matters_is_taken_for_one_that_does_not(text: str, keys: dict[str, str],
                                                               changes: list[tuple[str, str]]) -> None:
    tree, asked = KeyTree(keys), Asked()
    functions = store_functions(tree, compat=False)
    template = Template(text, functions={**functions, **asked.noting(functions)})

    def render() -> str:
        asked.clear()
        try:
            return template.render()
        except Exception as error:
            return str(error)

    before = render()
    for key, value in changes:
        had = tree.get(key)
        if value:
            tree.put(key, value)
        else:
            tree.delete(key)
        if tree.get(key) != had and asked.touched({key: (had is None) != (tree.get(key) is None)}):
            before = render()
        fresh = KeyTree(dict(tree.items()))
        assert before == _rendered(text, fresh)


def _rendered(text: str, tree: KeyTree) -> str:
    try:
        return Template(text, functions=store_functions(tree, compat=False)).render()
    except Exception as error:
        return str(error)


def test_what_was_not_asked_for_does_not_matter() -> None:
    tree, asked = KeyTree({"/a/b": "1", "/x/y": "2"}), Asked()
    functions = store_functions(tree, compat=False)
    text = '{{getv "/a/b"}}{{range gets "/x/*"}}{{.Value}}{{end}}{{range ls "/d"}}{{.}}{{end}}'
    Template(text, functions={**functions, **asked.noting(functions)}).render()
    for key, came_or_went, matters in [("/a/b", False, True), ("/a/c", True, False), ("/a", True, False),
                                       ("/x/z", True, True), ("/x/y/z", True, False), ("/d/e", True, True),
                                       ("/d/e", False, False), ("/e", True, False), ("/d/e/f", True, True)]:
        assert asked.touched({key: came_or_went}) is matters, key


def test_a_malformed_pattern_matters_whatever_changes() -> None:
    asked = Asked()
    asked.patterns.add("/a[")
    assert asked.touched({"/b": False})
    with pytest.raises(ValueError):
        glob_regex("/a[")


def test_what_is_asked_for_anew_in_each_run_does_not_pile_up() -> None:
    tree, asked = KeyTree({"/a/b": "1"}), Asked()
    functions = {name: func.call for name, func in asked.noting(store_functions(tree, compat=False)).items()}
    for run in range(1000):
        asked.clear()
        functions["gets"](f"/a/{run}*")
        functions["ls"](f"/none/{run}")
        assert not asked.touched({"/a/b": False})
    assert len(asked._regexes) == len(asked.patterns) == len(asked.directories) == 1 and not tree._sorted


# ---- what resources see -------------------------------------------------------------------------------

SCOPES = [("", '["/"]'), ("", '["/a"]'), ("/a", '["/b"]'), ("/a", '["/b", "/b/x", "/d"]'), ("", '["/a/b", "/c/"]'),
          ("/b", '["/"]'), ("/a/d", '["x"]')]


@given(st.dictionaries(st.sampled_from([*KEYS, "/", "/ab", "/a/bc"]), st.sampled_from("12"), max_size=7),
       st.lists(st.tuples(st.sampled_from([*KEYS, "/", "/ab", "/a/bc"]), st.sampled_from(["", "1", "2"])), max_size=6))
def test_what_resources_see_is_kept_current(keys: dict[str, str], changes: list[tuple[str, str]]) -> None:
    renderer = Renderer(None, RenderOptions("nowhere"), 600.0)
    renderer.mirror.replace(1, keys.items())
    resources = [parse_resources(f'[template]\nsrc = "a"\ndest = "/b"\nprefix = "{prefix}"\nkeys = {listed}\n',
                                 "a", "a")[0][0] for prefix, listed in SCOPES]
    views = [renderer._view(resource) for resource in resources]
    for revision, (key, value) in enumerate(changes, 2):
        renderer._tell(renderer.mirror.apply([(revision, "put" if value else "delete", key, value)]), 0.0)
        assert views == [renderer.mirror.tree.under(resource.prefix, resource.keys) for resource in resources]


# ---- debounce -----------------------------------------------------------------------------------------

def debounce(text: str) -> Any:
    resources, findings = parse_resources(f'[template]\nsrc = "a"\ndest = "/b"\ndebounce = "{text}"\n', "a", "a")
    return resources[0].debounce if resources else findings[0].message


def test_debounce_is_a_quiet_time_and_a_longest_one() -> None:
    assert debounce("50ms") == (0.05, 0.2) and debounce("50ms:2s") == (0.05, 2.0) and debounce("0s") == (0.0, 0.0)
    assert "cannot use debounce" in debounce("2s:1s") and "cannot use debounce" in debounce("soon")


# ---- the program on a real etcd -----------------------------------------------------------------------

def test_a_change_is_in_the_file_and_reloaded(image: Image, follow: Any, etcd: EtcdServer) -> None:
    reloads = image.home / "reloads"
    dest = image.resource("a", '{{getv "/x"}}', prefix="/app", keys=["/x"], check_cmd="grep -q . {{.src}}",
                          reload_cmd=f"cat {image.out}/a >> {reloads}; echo >> {reloads}")
    etcd.put("/app/x", "1")
    following = follow(etcd.url)
    holds(dest, "1")
    etcd.put("/app/x", "2")
    holds(dest, "2")
    etcd.put("/app/xy", "no")
    etcd.put("/x", "no")
    etcd.put("/app/x", "3")
    holds(dest, "3")
    eventually(lambda: reloads.read_text().endswith("3\n"))  # what changes while a reload runs makes it run again
    assert reloads.read_text().split() == sorted(reloads.read_text().split())
    following.stop()
    assert image.stages() == []


def test_only_what_read_the_key_is_rendered(image: Image, follow: Any, etcd35: EtcdServer) -> None:
    one = image.resource("one", '{{getv "/one"}}')
    two = image.resource("two", '{{range gets "/two/*"}}{{.Value}}{{end}}')
    etcd35.put("/one", "1")
    etcd35.put("/two/a", "a")
    following = follow(etcd35.url, "--log-level", "debug")
    holds(two, "a")
    holds(one, "1")
    asked = following.log.count("in sync")
    etcd35.put("/three", "3")
    etcd35.put("/two/b", "b")
    holds(two, "ab")
    etcd35.put("/one", "2")
    holds(one, "2")
    eventually(lambda: following.log.count("has been updated") == 4, what=following.log)
    assert following.log.count("in sync") == asked


def test_the_wait_loop_of_v2_renders_too(image: Image, follow: Any, etcd34: EtcdServer) -> None:
    dest = image.resource("a", '{{range gets "/d/*"}}{{.Value}}{{end}}', keys=["/d"])
    etcd34.put_v2("/d/a", "1")
    following = follow(etcd34.url, api="2")
    holds(dest, "1")
    etcd34.put_v2("/d/b", "2")
    holds(dest, "12")
    following.stop()


def test_bursts_are_one_render_and_the_last_value_arrives(image: Image, follow: Any, etcd35: EtcdServer) -> None:
    reloads = image.home / "reloads"
    dest = image.resource("a", '{{getv "/x"}}', debounce="300ms:10s", reload_cmd=f"echo >> {reloads}")
    etcd35.put("/x", "start")
    follow(etcd35.url)
    holds(dest, "start")
    for value in range(50):
        etcd35.put("/x", str(value))
    holds(dest, "49")
    eventually(lambda: reloads.exists() and 2 <= reloads.read_text().count("\n"))
    assert reloads.read_text().count("\n") <= 4


def test_a_failed_check_is_told_once_and_tried_again(image: Image, follow: Any, etcd35: EtcdServer) -> None:
    good = image.home / "good"
    dest = image.resource("a", '{{getv "/x"}}', check_cmd=f"test -e {good}")
    other = image.resource("b", '{{getv "/x"}}')
    etcd35.put("/x", "1")
    following = follow(etcd35.url)
    holds(other, "1")
    following.says("Config check failed")
    time.sleep(3.5)  # two more tries at least
    assert following.log.count("Config check failed") == 1 and not dest.exists()
    good.touch()
    holds(dest, "1")
    following.says("is right again")
    good.unlink()
    etcd35.put("/x", "2")
    holds(other, "2")
    eventually(lambda: following.log.count("Config check failed") == 2)
    assert dest.read_text() == "1" and image.stages() == []


def test_a_hanging_check_or_reload_does_not_keep_others_waiting(image: Image, follow: Any, etcd35: EtcdServer) -> None:
    hangs = image.resource("a", '{{getv "/x"}}', check_cmd="sleep 600", reload_cmd="true")
    reloads = image.resource("b", '{{getv "/x"}}', reload_cmd="sleep 601")
    free = image.resource("c", '{{getv "/x"}}')
    etcd35.put("/x", "1")
    following = follow(etcd35.url)
    holds(free, "1")
    holds(reloads, "1")
    for value in "2345":
        etcd35.put("/x", value)
        holds(free, value)
        holds(reloads, value)
    assert not hangs.exists()
    began = time.monotonic()
    following.stop()
    assert time.monotonic() - began < 15 and image.stages() == []
    shells = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert "sleep 600" not in shells and "sleep 601" not in shells


def test_a_failed_reload_stays_due_until_it_succeeds(image: Image, follow: Any, etcd35: EtcdServer) -> None:
    up, done = image.home / "up", image.home / "done"
    dest = image.resource("a", '{{getv "/x"}}', reload_cmd=f"test -e {up} && cp {image.out}/a {done}")
    etcd35.put("/x", "1")
    following = follow(etcd35.url)
    holds(dest, "1")
    following.says("cannot reload after the change")
    time.sleep(2.5)
    assert following.log.count("cannot reload after the change") == 1
    up.touch()
    holds(done, "1")
    following.says("reloaded after the change")


def test_conf_d_and_templates_are_read_again_when_they_change(image: Image, follow: Any, etcd35: EtcdServer) -> None:
    dest = image.resource("a", 'one {{getv "/x"}}{{include "part.tmpl"}}', keys=["/x"])
    image.template("part.tmpl", "!")
    etcd35.put("/x", "1")
    etcd35.put("/y", "2")
    following = follow(etcd35.url)
    holds(dest, "one 1!")
    image.template("a.tmpl", 'two {{getv "/x"}}{{include "part.tmpl"}}')
    holds(dest, "two 1!")
    image.template("part.tmpl", "?")
    holds(dest, "two 1?")
    other = image.resource("b", '{{getv "/y"}}', keys=["/y"])  # a key that was not followed before
    holds(other, "2")
    etcd35.put("/y", "3")
    holds(other, "3")
    image.conf("b.toml", "not TOML")
    following.says("Cannot process template resource")
    etcd35.put("/y", "4")
    holds(other, "4")  # as it was before the mistake
    image.template("a.tmpl", "three")
    following.process.send_signal(signal.SIGHUP)
    holds(dest, "three", 10)


def test_files_that_others_changed_are_repaired_by_the_periodic_pass(image: Image, follow: Any,
                                                                     etcd35: EtcdServer) -> None:
    image.program = module_with(MISSED_PATIENCE=1.0)
    dest = image.resource("a", '{{getv "/x"}}')
    etcd35.put("/x", "1")
    following = follow(etcd35.url, "--interval", "1s")
    holds(dest, "1")
    dest.write_text("spoiled")
    holds(dest, "1")
    for value in range(300):  # passes meet changes that are on their way
        etcd35.put("/x", str(value))
        time.sleep(0.01)
    holds(dest, "299")
    time.sleep(3)
    assert "a bug" not in following.log


def test_it_waits_for_an_etcd_that_is_not_there_yet(image: Image, follow: Any, tmp_path: Path) -> None:
    binary = find_etcd("3.5")
    need(binary, "etcd 3.5")
    assert binary
    ports = free_port(), free_port()
    dest = image.resource("a", '{{getv "/x"}}')
    following = follow(f"http://127.0.0.1:{ports[0]}")
    following.says("waiting for etcd: cannot")
    time.sleep(2)
    assert following.log.count("waiting for etcd") == 1 and "connection refused" in following.log
    server = EtcdServer(binary, tmp_path / "etcd", ports=ports).start()
    try:
        server.put("/x", "1")
        holds(dest, "1")
        server.kill()
        server.start()
        server.put("/x", "2")
        holds(dest, "2")
        server.kill()
        following.says("waiting for etcd: cannot watch", 30)
        assert dest.read_text() == "2"
        server.start()
        following.says("etcd is back after", 30)
    finally:
        server.kill()
    following.stop()


def test_it_gives_up_after_the_longest_outage_if_it_shall(image: Image, follow: Any) -> None:
    image.resource("a", '{{getv "/x"}}')
    following = follow(f"http://127.0.0.1:{free_port()}", "--max-outage", "1s")
    assert following.process.wait(20) == 3
    assert "etcd was away for 1 s (--max-outage)" in following.log


def test_readiness_is_told_to_s6_and_systemd_once_all_is_rendered(image: Image, follow: Any, etcd35: EtcdServer,
                                                                  tmp_path: Path) -> None:
    image.resource("a", '{{getv "/x"}}')
    image.resource("b", '{{getv "/later"}}')
    etcd35.put("/x", "1")
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(address)
        systemd.settimeout(20)
        read, write = os.pipe()
        following = follow(etcd35.url, "--notify-fd", str(write), env={"NOTIFY_SOCKET": address}, pass_fds=[write])
        os.close(write)
        following.says("key does not exist: /later")
        os.set_blocking(read, False)
        with pytest.raises(BlockingIOError):
            os.read(read, 10)
        etcd35.put("/later", "1")
        os.set_blocking(read, True)
        assert os.read(read, 10) == b"\n" and os.read(read, 10) == b""
        assert systemd.recv(100) == b"READY=1"
        os.close(read)


def test_a_descriptor_that_is_not_open_is_a_usage_error(image: Image, follow: Any) -> None:
    following = follow("http://127.0.0.1:1", "--notify-fd", "77")
    assert following.process.wait(20) == UsageError.exit_code and "no open descriptor" in following.log


def test_at_rest_it_sleeps(image: Image, follow: Any, etcd35: EtcdServer) -> None:
    dest = image.resource("a", '{{getv "/x"}}')
    etcd35.put("/x", "1")
    with Proxy(etcd35.port) as proxy:
        following = follow(proxy.url)
        holds(dest, "1")
        time.sleep(1)
        ticks, sent, descriptors = following.cpu_ticks(), proxy.upward, following.descriptors()
        time.sleep(4)
        assert following.cpu_ticks() - ticks <= 4  # hundredths of a second
        assert proxy.upward == sent  # nothing is asked of etcd
        assert following.descriptors() == descriptors and following.children() == []


def test_no_value_is_in_the_log(image: Image, follow: Any, etcd35: EtcdServer) -> None:
    dest = image.resource("a", '{{getv "/x"}}{{if eq (getv "/x") "hunter3"}}{{getv "/no"}}{{end}}', check_cmd="true")
    etcd35.put("/x", "hunter2")
    following = follow(etcd35.url, "--log-level", "debug")
    holds(dest, "hunter2")
    etcd35.put("/x", "hunter3")
    following.says("key does not exist: /no")
    assert not re.search("hunter", following.log)
