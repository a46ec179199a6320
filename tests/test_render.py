"""RENDER: resources, stages, checks, swaps, reloads; the program run on real files."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import eventually, free_port, need
from support.etcd_server import EtcdServer
from support.image import Image, Ran, run

import etcdinit
from etcdinit import RenderOptions, diff_lines, effective_prefix, follow, load_resources, parse_mode, parse_resources

# ---- resource files -----------------------------------------------------------------------------------

def test_every_name_that_ends_in_toml_is_a_resource_file_in_the_order_of_names(tmp_path: Path) -> None:
    names = ["a.toml", "b/a.toml", "b/z/deep.toml", "b.toml", "footoml", "Z.toml"]
    for name in [*names, "a.toml.bak", "readme", "b/x.tml"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    found = [os.path.relpath(path, tmp_path) for path in etcdinit.resource_files(str(tmp_path))]
    assert found == ["Z.toml", "a.toml", "b/a.toml", "b/z/deep.toml", "b.toml", "footoml"]


def test_a_kubernetes_configmap_gives_each_file_once(tmp_path: Path) -> None:
    version = tmp_path / "conf.d" / "..2024_01_01"
    version.mkdir(parents=True)
    (version / "web.toml").write_text("")
    (tmp_path / "conf.d" / "..data").symlink_to("..2024_01_01")
    (tmp_path / "conf.d" / "web.toml").symlink_to("..data/web.toml")
    assert etcdinit.resource_files(str(tmp_path / "conf.d")) == [str(tmp_path / "conf.d" / "web.toml")]


def test_linked_directories_are_followed_and_loops_end(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "x.toml").write_text("")
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "more").symlink_to(tmp_path / "shared")
    (tmp_path / "shared" / "loop").symlink_to(tmp_path / "conf.d")
    assert etcdinit.resource_files(str(tmp_path / "conf.d")) == [f"{tmp_path}/conf.d/more/x.toml"]


def test_names_of_keys_are_read_in_any_case() -> None:
    text = '[Template]\nSRC = "a"\nDest = "/b"\nKeys = ["/k"]\nCheck_Cmd = "true"\nUID = 3\n'
    [resource], findings = parse_resources(text, "x.toml", "x.toml")
    assert (resource.src, resource.dest, resource.keys, resource.uid, findings) == ("a", "/b", ("/k",), 3, [])
    assert list(resource.commands) == ["check_cmd"]


def test_the_attributes_of_a_resource_are_the_rows_of_the_table() -> None:
    assert set(etcdinit.RESOURCE_KEYS) < set(etcdinit.Resource.__annotations__) == set(etcdinit.Resource.__slots__)


def test_several_templates_in_one_file(image: Image) -> None:
    image.template("t", "{{getv \"/a\"}}")
    image.keys({"a": "1"})
    one = '[[template]]\nsrc = "t"\ndest = "{}"\nkeys = ["/a"]\n'
    image.conf("both.toml", one.format(image.out / "x") + one.format(image.out / "y"))
    assert image.run().code == 0
    assert [(image.out / name).read_text() for name in "xy"] == ["1", "1"]


@pytest.mark.parametrize("text, line, message", [
    ("[template]\nsrc = 'x'\n\nx = =\n", 4, "invalid value (column 5)"),
    ("[template]\nsrc = [\n", 2, "invalid value (at end of document)"),
    ("[template]\nsrc = 'x'\nsrc = 'y'\n", 3, "cannot overwrite a value"),
    ("[template]\nmode = 0644\n", 2, "expected newline or end of document after a statement"),
    ("x = 1\n", 0, "no [template] table"),
    ("template = 1\n", 0, "no [template] table"),
    ("", 0, "no [template] table"),
    ("[template]\ndest = '/x'\n", 1, "empty src template"),
    ("[template]\nsrc = 'x'\n", 1, "empty dest"),
    ("[template]\nsrc = 1\ndest = '/x'", 2, 'cannot use src: a text in quotes is needed, as in "x"'),
    ("[template]\nsrc = 'x'\ndest = '/x'\n\nkeys = '/a'", 5, 'cannot use keys: an array of texts is needed, as in'),
    ("[template]\nsrc = 'x'\ndest = '/x'\nkeys = [1]", 4, 'cannot use keys: an array of texts is needed, as in'),
    ("[template]\nsrc = 'x'\ndest = '/x'\nuid = '33'", 4, "cannot use uid: a number is needed"),
    ("[template]\nsrc = 'x'\ndest = '/x'\ngid = -5", 4, "cannot use gid: a number is needed"),
    ("[template]\nsrc = 'x'\ndest = '/x'\nmode = 420", 4, "cannot use mode: a text in quotes is needed"),
    ("[template]\nsrc = 'x'\ndest = '/x'\nmode = 'rw'", 4,
     'cannot use mode: "rw" is not an octal number, as in "0644"'),
    ("[template]\nsrc = 'x'\ndest = '/x'\nmode = '0698'", 4, 'cannot use mode: "0698" is not an octal number'),
    ("[template]\nsrc = 'x'\ndest = '/x'\nsecret = 1", 4, "cannot use secret: true or false is needed"),
    ("[template]\nsrc = 'x'\ndest = '/x'\ncheck_timeout = 'soon'", 4,
     'cannot use check_timeout: "soon" is not a duration'),
    ("[template]\nsrc = 'x'\ndest = '/x'\nreload_timeout = 0", 4,
     "cannot use reload_timeout: a time above 0s is needed"),
    ("[template]\nsrc = 'x'\ndest = '/x'\non_missing = 'wait'", 4,
     'cannot use on_missing: one of "error", "empty", "skip" is needed'),
    ("[template]\nsrc = 'x'\ndest = '/x'\noutput_format = 'ini'", 4, 'cannot use output_format: one of "json", "toml"'),
    ("[template]\nsrc = 'x'\ndest = '/x'\ncheck_cmd = 'a {{'", 4, "cannot use check_cmd: template: check_cmd:1:"),
    ("[template]\nsrc = 'x'\ndest = '/x\\u0000'\n".replace("'", '"'), 3, "cannot use dest: a NUL character"),
])
def test_a_wrong_resource_file_is_told_with_its_line(text: str, line: int, message: str) -> None:
    resources, findings = parse_resources(text, "x.toml", "x.toml")
    errors = [finding for finding in findings if finding.level == "error"]
    assert resources == []
    assert [(error.path, error.line) for error in errors] == [("x.toml", line)]
    assert errors[0].message.startswith(message)


@pytest.mark.parametrize("text, line, message", [
    ("[template]\nsrc='a'\ndest='/b'\nchek_cmd='true'\n", 4, "unknown key chek_cmd, ignored; did you mean check_cmd?"),
    ("[template]\nsrc='a'\ndest='/b'\nfoo=1\n", 4, "unknown key foo, ignored"),
    ("[template]\nsrc='a'\ndest='/b'\n[backend]\nname='env'\n", 4, "unknown table or key backend, ignored"),
    ("[template]\nsrc='a'\ndest='/b'\n[[templates]]\n", 4,
     "unknown table or key templates, ignored; did you mean template?"),
    ("[template]\nsrc='a'\ndest='/b'\nmode='644'\n", 4, 'mode = "644" is taken as 0644; write mode = "0644"'),
    ("[template]\nsrc='a'\ndest='/b'\nmode='4755'\n", 4, 'mode = "4755" is taken as 0755'),
    ("[template]\nsrc='a'\ndest='/b'\nmode='01777'\n", 4, 'of mode = "01777" only the permission bits 0777 are used'),
    ("[template]\nsrc='a'\ndest='/b'\noutput_format='yaml'\n", 4, 'output_format = "yaml" is not checked'),
    ("[[template]]\nsrc='a'\ndest='/b'\n[[template]]\nsrc='a'\ndest='/b'\nmod='0600'\n", 7, "unknown key mod, ignored"),
])
def test_what_is_likely_not_meant_so_is_a_warning(text: str, line: int, message: str) -> None:
    resources, [finding] = parse_resources(text, "x.toml", "x.toml")
    assert resources
    assert (finding.level, finding.line) == ("warning", line)
    assert finding.message.startswith(message)


@pytest.mark.parametrize("text, as_confd, mode", [
    ("0644", False, 0o644), ("644", False, 0o644), ("0o600", False, 0o600), ("0x1a4", False, 0o644), ("0", False, 0),
    ("0644", True, 0o644), ("644", True, 0o204), ("0O640", True, 0o640), ("420", True, 0o644),
    ("0b110100000", True, 0o640),
])
def test_modes_mean_what_their_author_meant(text: str, as_confd: bool, mode: int) -> None:
    found, warning = parse_mode(text, as_confd)
    assert found == mode
    assert bool(warning) == (text[0] != "0")


@given(st.text(max_size=40) | st.binary(max_size=40).map(lambda data: data.decode("latin-1")))
def test_no_text_breaks_the_loader(text: str) -> None:
    for source in (text, f"[template]\n{text}", f"[template]\nsrc = {text}\nmode = {text!r}\n"):
        resources, findings = parse_resources(source, "x.toml", "x.toml")
        assert not resources or all(finding.level == "warning" for finding in findings)


@given(st.text(max_size=8))
def test_no_mode_breaks_the_reader_of_modes(text: str) -> None:
    for as_confd in (False, True):
        try:
            assert 0 <= parse_mode(text, as_confd)[0] <= 0o777
        except ValueError as error:
            assert "is not an octal number" in str(error)


def test_one_bad_file_does_not_stop_the_others(image: Image) -> None:
    (image.home / "conf.d" / "a.toml").write_text("[template]\nsrc =\n")
    (image.home / "conf.d" / "b.toml").write_bytes(b"[template]\nsrc = \"\xff\"\n")
    os.mkfifo(image.home / "conf.d" / "c.toml")
    (image.home / "conf.d" / "d.toml").symlink_to("nowhere")
    good = image.resource("good", "fine")
    ran = image.run()
    assert ran.code == 1
    assert good.read_text() == "fine"
    conf = image.home / "conf.d"
    assert f"ERROR Cannot process template resource {conf}/a.toml:2: invalid value" in ran.err
    assert f"{conf}/b.toml: cannot read it: not UTF-8" in ran.err
    assert f"{conf}/c.toml: cannot read it: not a regular file" in ran.err
    assert f"{conf}/d.toml: cannot read it: no such file or directory" in ran.err
    assert ran.err.splitlines()[-1].endswith("ERROR 5 template resources: 1 updated, 4 failed")


@pytest.mark.parametrize("break_it, code, message", [
    (lambda home: shutil.rmtree(home), 1, "ERROR Cannot load template resources: confdir '{home}' does not exist"),
    (lambda home: shutil.rmtree(home / "conf.d"), 1, "{home}/conf.d: cannot read it: no such file or directory"),
    (lambda home: None, 0, "WARNING Found no templates"),
])
def test_an_empty_confdir_is_told(image: Image, break_it: Callable[[Path], None], code: int, message: str) -> None:
    break_it(image.home)
    ran = image.run()
    assert ran.code == code
    assert message.format(home=image.home) in ran.err
    if "confdir" in message:
        assert image.run("--compat", "confd").code == 0


def test_resources_can_be_named(image: Image) -> None:
    for name in ("one", "two", "three"):
        image.resource(name, name)
    image.conf("bad.toml", "[template]\n")
    ran = image.run("one", "two.toml")
    assert (ran.code, sorted(path.name for path in image.out.iterdir())) == (0, ["one", "two"])
    assert image.run(str(image.out / "three")).code == 0
    assert (image.out / "three").read_text() == "three"
    ran = image.run("tow")
    assert ran.code == 2
    assert ran.err.endswith("\netcdinit: no template resource is named tow; did you mean two?\n")
    assert image.run("bad").code == 1


# ---- keys ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("above, own, joined, confd", [
    ("", "", "/", "/"), ("/a", "", "/a", "/a"), ("", "b", "/b", "/b"), ("/a", "/b", "/a/b", "/a"),
    ("a/", "b/", "/a/b", "/a"), ("/a", "/", "/a", "/a"),
])
def test_the_global_prefix_is_joined_or_as_in_confd_overrides(above: str, own: str, joined: str, confd: str) -> None:
    assert effective_prefix(above, own) == joined
    assert effective_prefix(above, own, as_confd=True) == confd


def test_prefixes_reach_the_keys(image: Image) -> None:
    image.keys({"p/r/x": "joined", "p/x": "global", "r/x": "own"})
    dest = image.resource("a", '{{getv "/x"}}', prefix="/r", keys=["/x"])
    for flags, env, text in (([], {}, "own"), (["--prefix", "/p"], {}, "joined"), ([], {"ETCD_PREFIX": "p"}, "joined"),
                             (["--prefix", "/p", "--compat", "confd"], {}, "global")):
        assert image.run(*flags, env=env).code == 0
        assert dest.read_text() == text


def test_a_resource_sees_only_the_keys_it_lists(image: Image) -> None:
    image.keys({"foo": "1", "foo/bar": "2", "foobar": "3", "other": "4"})
    dest = image.resource("a", '{{range gets "/*"}}{{.Key}} {{end}}{{range gets "/*/*"}}{{.Key}} {{end}}'
                               '{{exists "/other"}}', keys=["/foo"])
    image.resource("b", '{{getv "/other"}}', keys=["/other"])
    assert image.run().code == 0
    assert dest.read_text() == "/foo /foo/bar false"
    assert (image.out / "b").read_text() == "4"


class Counted:
    """A source that counts its reads."""

    def __init__(self, keys: dict[str, str]) -> None:
        self.keys, self.reads = keys, list[list[str]]()

    def read(self, keys: Iterable[str]) -> tuple[int, list[tuple[str, str]]]:
        self.reads.append(list(keys))
        return 7, list(self.keys.items())


def test_all_resources_are_rendered_from_one_read(image: Image) -> None:
    for name in "abc":
        image.resource(name, '{{getv "/x"}}', keys=["/x", f"/{name}"])
    source = Counted({"/x": "1"})
    assert etcdinit.render_once(source, RenderOptions(str(image.home))) == 0
    assert [sorted(set(keys)) for keys in source.reads] == [["/a", "/b", "/c", "/x"]]


def test_nothing_is_asked_when_no_resource_wants_a_key(image: Image) -> None:
    dest = image.resource("a", "{{getenv \"NAME\"}}", keys=[])
    ran = image.run("--node", "http://127.0.0.1:1", env={"NAME": "n"})
    assert (ran.code, dest.read_text()) == (0, "n")


@pytest.mark.parametrize("on_missing, code, text, message", [
    ("error", 1, "old", 'error calling getv: key does not exist: /x'),
    ("empty", 0, "[][fallback][]", "has been updated"),
    ("skip", 0, "old", 'skipped: key /x does not exist (on_missing = "skip")'),
])
def test_what_a_missing_key_does_is_for_the_resource_to_say(
        image: Image, on_missing: str, code: int, text: str, message: str) -> None:
    dest = image.resource("a", '[{{getv "/x"}}][{{getv "/x" "fallback"}}][{{(get "/x").Value}}]', on_missing=on_missing)
    dest.write_text("old")
    ran = image.run()
    assert (ran.code, dest.read_text()) == (code, text)
    assert message in ran.err
    image.keys({"x": "1"})
    assert image.run().code == 0
    assert dest.read_text() == "[1][1][1]"


def test_a_missing_key_that_is_not_listed_says_so(image: Image) -> None:
    image.keys({"x": "1", "y": "2"})
    image.resource("a", 'line\n {{getv "/x"}}', keys=["/y"])
    ran = image.run()
    assert ran.code == 1
    assert f"cannot render {image.out}/a: template: a.tmpl:2:" in ran.err
    assert (' executing "a.tmpl" at <getv "/x">: error calling getv: key does not exist: /x '
            "(keys of a.toml does not list it) (a.toml)") in ran.err


@pytest.mark.parametrize("on_missing, code", [("error", 1), ("empty", 1), ("skip", 0)])
def test_required_keys(image: Image, on_missing: str, code: int) -> None:
    dest = image.resource("a", "text", required=["/must/be"], on_missing=on_missing)
    ran = image.run()
    assert (ran.code, dest.exists()) == (code, False)
    assert "key /must/be does not exist" in ran.err
    image.keys({"must/be": ""})
    assert image.run().code == 0
    assert dest.read_text() == "text"


# ---- templates ----------------------------------------------------------------------------------------

def test_a_template_that_is_missing_or_wrong_is_told_and_the_others_go_on(image: Image) -> None:
    image.resource("a")
    image.resource("b", "1\n{{if}}")
    image.resource("c", "{{nofunction}}")
    image.resource("d", "fine")
    (image.home / "templates" / "e.tmpl").mkdir()
    image.resource("e")
    os.mkfifo(image.home / "templates" / "f.tmpl")  # reading it would take forever
    image.resource("f")
    ran = image.run()
    assert ran.code == 1
    assert f"cannot render {image.out}/a: Missing template: {image.home}/templates/a.tmpl (a.toml)" in ran.err
    assert (f"Unable to process template {image.home}/templates/b.tmpl, "
            "template: b.tmpl:2: missing value for if") in ran.err
    assert 'template: c.tmpl:1: function "nofunction" not defined' in ran.err
    assert f"cannot read template {image.home}/templates/e.tmpl: is a directory" in ran.err
    assert f"cannot read template {image.home}/templates/f.tmpl: not a regular file" in ran.err
    assert [path.name for path in image.out.iterdir()] == ["d"]
    assert ran.err.splitlines()[-1].endswith("ERROR 6 template resources: 1 updated, 5 failed")


def test_include(image: Image) -> None:
    image.keys({"x": "1"})
    image.template("parts/head", '{{getv "/x"}} {{.}} {{include "parts/tail"}}')
    image.template("parts/tail", "{{with .}}{{else}}nothing{{end}}")
    dest = image.resource("a", '<{{include "parts/head" "data"}}>')
    assert image.run().code == 0
    assert dest.read_text() == "<1 data nothing>"


@pytest.mark.parametrize("text, message", [
    ('{{include "../conf.d/a.toml"}}', 'include path "../conf.d/a.toml" is outside template directory'),
    ('{{include "a.tmpl"}}', "include cycle detected: {home}/templates/a.tmpl is already being processed"),
    ('{{include "b"}}', "include cycle detected: {home}/templates/b is already being processed"),
    ('{{include "d1"}}', "maximum include depth (10) exceeded"),
    ('{{include "none"}}', "include none: open {home}/templates/none: no such file or directory"),
    ('{{include "b" 1 2}}', "include takes a file and at most one value"),
])
def test_what_include_refuses(image: Image, text: str, message: str) -> None:
    image.template("b", '{{include "b"}}')
    for depth in range(1, 12):
        image.template(f"d{depth}", f'{{{{include "d{depth + 1}"}}}}')
    image.template("d12", "deep")
    image.resource("a", text)
    ran = image.run()
    assert ran.code == 1
    assert message.format(home=image.home) in ran.err


def test_confds_quick_start(image: Image) -> None:
    image.keys({"myapp": {"database": {"url": "db.example.com", "user": "rob"}}})
    image.conf("myconfig.toml", f'[template]\nsrc = "myconfig.conf.tmpl"\ndest = "{image.out}/myconfig.conf"\n'
                                'keys = [\n    "/myapp/database/url",\n    "/myapp/database/user",\n]\n')
    image.template("myconfig.conf.tmpl", '[myconfig]\ndatabase_url = {{getv "/myapp/database/url"}}\n'
                                         'database_user = {{getv "/myapp/database/user"}}\n')
    assert image.run().code == 0
    assert (image.out / "myconfig.conf").read_text() == (
        "[myconfig]\ndatabase_url = db.example.com\ndatabase_user = rob\n")


def test_confds_load_balancer_example(image: Image) -> None:
    image.keys({"myapp": {"subdomain": "myapp", "upstream": {"app1": "10.0.1.100:80", "app2": "10.0.1.101:80"}},
                "services/web": {"one": '{"Host": "host1", "Port": 8080}', "two": '{"Host": "host2", "Port": 8081}'}})
    image.conf("myapp-nginx.toml",
               f'[template]\nprefix = "/myapp"\nsrc = "nginx.tmpl"\ndest = "{image.out}/nginx.conf"\n'
               f'owner = "{os.getuid()}"\nmode = "0644"\nkeys = [\n  "/subdomain",\n  "/upstream",\n]\n'
               f'check_cmd = "/bin/grep -q upstream {{{{.src}}}}"\nreload_cmd = "echo reloaded >> {image.out}/log"\n')
    image.template("nginx.tmpl", """upstream {{getv "/subdomain"}} {
{{range getvs "/upstream/*"}}    server {{.}};
{{end}}}
""")
    image.conf("services.toml", f'[template]\nsrc = "s.tmpl"\ndest = "{image.out}/services"\n'
                                'keys = ["/services/web"]\n')
    image.template("s.tmpl", """{{range $dir := lsdir "/services"}}{{$custdir := printf "/services/%s/*" $dir}}\
{{range gets $custdir}}{{$data := json .Value}}{{base .Key}}: {{$data.Host}}:{{$data.Port}}
{{end}}{{end}}""".replace("\\\n", ""))
    assert image.run().code == 0
    assert (image.out / "nginx.conf").read_text() == (
        "upstream myapp {\n    server 10.0.1.100:80;\n    server 10.0.1.101:80;\n}\n")
    assert (image.out / "services").read_text() == "one: host1:8080\ntwo: host2:8081\n"
    assert (image.out / "log").read_text() == "reloaded\n"


# ---- stages and swaps ---------------------------------------------------------------------------------

def test_a_file_that_is_right_is_not_touched(image: Image) -> None:
    image.keys({"x": "1"})
    dest = image.resource("a", '{{getv "/x"}}', check_cmd=f"echo c >> {image.out}/log",
                          reload_cmd=f"echo r >> {image.out}/log")
    first = image.run()
    before = dest.stat()
    second = image.run("--log-level", "debug")
    assert (first.code, second.code) == (0, 0)
    assert (dest.stat().st_ino, dest.stat().st_ctime_ns) == (before.st_ino, before.st_ctime_ns)
    assert (image.out / "log").read_text() == "c\nr\n"
    assert f"INFO Target config {dest} out of sync" in first.err
    assert f"INFO Target config {dest} has been updated" in first.err
    assert f"DEBUG Target config {dest} in sync" in second.err
    assert second.err.splitlines()[-1].endswith("INFO 1 template resources: 1 in sync")


def test_a_changed_file_is_replaced_not_overwritten(image: Image) -> None:
    dest = image.resource("a", "new")
    dest.write_text("old")
    with dest.open() as reader:
        assert image.run().code == 0
        assert (reader.read(), dest.read_text()) == ("old", "new")
    assert image.stages() == []


@pytest.mark.parametrize("keys, before, after", [
    ({}, None, 0o644), ({"mode": "0600"}, None, 0o600), ({"mode": "644"}, None, 0o644), ({"mode": "0666"}, None, 0o666),
    ({}, 0o751, 0o751), ({"mode": "0640"}, 0o751, 0o640), ({"secret": True}, None, 0o600),
    ({"secret": True}, 0o644, 0o600), ({"secret": True}, 0o440, 0o400),
    ({"secret": True, "mode": "0640"}, None, 0o640),
])
def test_modes(image: Image, keys: dict[str, object], before: int | None, after: int) -> None:
    dest = image.resource("a", "new", **keys)
    if before is not None:
        dest.write_text("old")
        dest.chmod(before)
    assert image.run(umask=0o077).code == 0
    assert stat.S_IMODE(dest.stat().st_mode) == after


def test_a_wrong_mode_alone_is_mended_and_reloads(image: Image) -> None:
    dest = image.resource("a", "text", mode="0600", reload_cmd=f"echo r >> {image.out}/log")
    dest.write_text("text")
    dest.chmod(0o644)
    ran = image.run()
    assert f"INFO {dest} has mode -rw-r--r-- should be -rw-------" in ran.err
    assert (stat.S_IMODE(dest.stat().st_mode), (image.out / "log").read_text()) == (0o600, "r\n")
    assert image.run().code == 0
    assert (image.out / "log").read_text() == "r\n"


@pytest.mark.parametrize("keys, owner", [
    ({}, (33, 44)), ({"uid": 12}, (12, 44)), ({"gid": 13}, (33, 13)), ({"owner": "nobody"}, (65534, 44)),
    ({"group": "daemon"}, (33, 1)), ({"owner": "77", "group": "78"}, (77, 78)),
    ({"uid": 5, "owner": "nobody"}, (5, 44)),
])
def test_the_owner_of_a_file_stays_unless_the_resource_sets_it(
        image: Image, keys: dict[str, object], owner: tuple[int, int]) -> None:
    need(os.geteuid() == 0, "root, to give files away")
    dest = image.resource("a", "new", **keys)
    dest.write_text("old")
    os.chown(dest, 33, 44)
    ran = image.run()
    assert (ran.code, dest.read_text(), (dest.stat().st_uid, dest.stat().st_gid)) == (0, "new", owner)
    assert image.run().err.splitlines()[-1].endswith("1 in sync")


def test_an_owner_that_nobody_knows_leaves_the_file(image: Image) -> None:
    dest = image.resource("a", "new", owner="nosuchuser")
    dest.write_text("old")
    ran = image.run()
    assert (ran.code, dest.read_text()) == (1, "old")
    assert "owner nosuchuser is not known here" in ran.err


@pytest.mark.parametrize("check, code, message", [
    ("echo '  bad  line' ; echo more >&2; exit 3", 1, "Config check failed: exit status 3"),
    ("kill -9 $$", 1, "Config check failed: signal: 9"),
    ("exec /no/such/program", 1, "Config check failed: exit status 127"),
    ("grep -q new {{.src}} && grep -q old {{.dest}} && test -z \"$(cat)\"", 0, "has been updated"),
])
def test_the_check_decides(image: Image, check: str, code: int, message: str) -> None:
    dest = image.resource("a", "new", check_cmd=check, reload_cmd=f"touch {image.out}/reloaded")
    dest.write_text("old")
    other = image.resource("b", "other")
    ran = image.run()
    assert ran.code == code
    assert message in ran.err
    assert dest.read_text() == ("old" if code else "new")
    assert (image.out / "reloaded").exists() == (not code)
    assert other.read_text() == "other"
    assert image.stages() == []
    if "bad" in check:
        assert "ERROR check_cmd of a.toml:   bad  line\n" in ran.err
        assert "ERROR check_cmd of a.toml: more\n" in ran.err


def test_the_check_sees_the_file_as_it_will_be(image: Image) -> None:
    image.resource("a", "new", mode="0640", check_cmd=f"stat -c '%a %n' {{{{.src}}}} > {image.out}/seen")
    assert image.run().code == 0
    mode, name = (image.out / "seen").read_text().split()
    assert mode == "640"
    assert re.fullmatch(rf"{image.out}/\.a\.[0-9]+-[0-9a-f]{{12}}", name)


def alive(pid: int) -> bool:
    """True if the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_hanging_check_is_killed_with_its_children(image: Image) -> None:
    dest = image.resource("a", "new", check_timeout="500ms", check_cmd=f"""
        echo $$ >> {image.out}/pids; sleep 600 & echo $! >> {image.out}/pids; echo hanging; wait""")
    dest.write_text("old")
    ran = image.run()
    assert ran.code == 1
    assert "Config check failed: killed, it did not end within 0.5" in ran.err
    assert "ERROR check_cmd of a.toml: hanging" in ran.err
    assert (dest.read_text(), image.stages()) == ("old", [])
    pids = [int(pid) for pid in (image.out / "pids").read_text().split()]
    eventually(lambda: len(pids) == 2 and not any(map(alive, pids)), what="the check and its child are gone")


def test_a_failing_and_a_hanging_reload(image: Image) -> None:
    image.resource("a", "a", reload_cmd="echo broken; exit 7")
    image.resource("b", "b", reload_cmd="sleep 600", reload_timeout=0.3)
    image.resource("c", "c", reload_cmd=f"touch {image.out}/done")
    ran = image.run()
    assert ran.code == 1
    assert f"cannot reload after the change of {image.out}/a: exit status 7: echo broken; exit 7" in ran.err
    assert f"cannot reload after the change of {image.out}/b: killed, it did not end within 0.3" in ran.err
    assert f"ERROR reload_cmd of {image.out}/a: broken" in ran.err
    assert (image.out / "done").exists()
    assert [(image.out / name).read_text() for name in "abc"] == ["a", "b", "c"]
    assert ran.err.splitlines()[-1].endswith("ERROR 3 template resources: 3 updated, 2 reloads failed")


def test_the_same_reload_runs_once_and_after_all_swaps(image: Image) -> None:
    for name in "abc":
        image.resource(name, name, reload_cmd=f"cat {image.out}/[abc] >> {image.out}/log; echo >> {image.out}/log")
    assert image.run().code == 0
    assert (image.out / "log").read_text() == "abc\n"


def test_a_reload_learns_what_changed(image: Image) -> None:
    for name in "ab":
        image.resource(name, name, reload_cmd="cd ${OUT}; cat {{.src}} {{.dest}} >> log; echo '{{.other}}'")
    assert image.run(env={"OUT": str(image.out)}).code == 0
    assert (image.out / "log").read_text() == "aabb"


def test_a_reload_that_leaves_a_daemon_behind_does_not_hang(image: Image) -> None:
    image.resource("a", "a", reload_cmd=f"echo begun; sleep 600 & echo $! > {image.out}/pid")
    try:
        ran = image.run("--log-level", "debug", seconds=30)
        assert ran.code == 0
        assert "begun" in ran.err
        assert alive(int((image.out / "pid").read_text()))  # a daemon that a reload starts is none of our business
    finally:
        os.kill(int((image.out / "pid").read_text()), signal.SIGKILL)


@pytest.mark.parametrize("check, tail", [
    ("yes line | head -c 20000000; exit 1", "line"),
    ("i=0; while [ $i -lt 1000 ]; do echo line $i; i=$((i+1)); done; exit 1", "line 999"),
    ("head -c 3000000 /dev/zero | tr '\\0' x; exit 1", "xxx"),
])
def test_the_output_of_a_command_is_bounded(image: Image, check: str, tail: str) -> None:
    image.resource("a", "new", check_cmd=check)
    ran = image.run()
    assert ran.code == 1
    assert len(ran.err) < 200_000
    assert "before this are left out" in ran.err
    lines = [line for line in ran.err.splitlines() if "check_cmd of a.toml:" in line]
    assert len(lines) <= 201
    assert lines[-1].endswith(tail)


def test_a_command_that_talks_without_end_is_killed(image: Image) -> None:
    image.resource("a", "new", check_cmd="yes", check_timeout="500ms")
    ran = image.run()
    assert ran.code == 1
    assert "killed, it did not end within" in ran.err


def test_a_command_inherits_nothing(image: Image) -> None:
    image.resource("a", "new", check_cmd=f"cd {image.out}; ls /proc/self/fd > fds; cat /proc/self/status > status; "
                                         "ps -o pgid= -p $$ > group; echo $$ >> group")
    need(shutil.which("ps"), "ps")
    reader, writer = os.pipe()
    try:
        assert image.run(pass_fds=[writer]).code == 0
    finally:
        os.close(reader)
        os.close(writer)
    assert (image.out / "fds").read_text().split() == ["0", "1", "2", "3"]  # 3 is ls's own
    masks = dict(re.findall(r"^(Sig(?:Ign|Blk)):\s*(\w+)$", (image.out / "status").read_text(), re.M))
    assert {int(mask, 16) & 0x7FFFFFFF for mask in masks.values()} == {0}  # 32 and 33 belong to the C library
    group, shell = (image.out / "group").read_text().split()
    assert group == shell


@pytest.mark.parametrize("format, text, message", [
    ("json", '{"a": [1, 2]}', ""), ("json", '{"a": 1,}', "output format validation failed (json): "),
    ("json", "NaN", "NaN is not JSON"),
    ("json", "[" * 100000, "output format validation failed (json): nested too deep"),
    ("toml", "a = 1\n", ""), ("toml", "a = \n", "output format validation failed (toml): "),
])
def test_the_format_of_the_output_is_checked(image: Image, format: str, text: str, message: str) -> None:
    dest = image.resource("a", text, output_format=format)
    dest.write_text("old")
    ran = image.run()
    assert (ran.code, dest.read_text()) == ((1, "old") if message else (0, text))
    assert message in ran.err
    assert image.stages() == []


# ---- destinations -------------------------------------------------------------------------------------

def test_a_linked_destination_is_followed_not_replaced(image: Image) -> None:
    (image.out / "real").mkdir()
    (image.out / "real" / "file").write_text("old")
    (image.out / "link").symlink_to("real/file")
    (image.out / "second").symlink_to(image.out / "link")
    (image.out / "dir").symlink_to("real")
    (image.out / "dangling").symlink_to("real/not-yet")
    for name, dest in (("a", "second"), ("b", "dir/inside"), ("c", "dangling")):
        image.resource(name, f"new {name}", dest=str(image.out / dest))
    assert image.run().code == 0
    assert {path.name: path.read_text() for path in (image.out / "real").iterdir()} == {
        "file": "new a", "inside": "new b", "not-yet": "new c"}
    assert all((image.out / name).is_symlink() for name in ("link", "second", "dir", "dangling"))


def test_links_that_go_round_are_told(image: Image) -> None:
    (image.out / "a").symlink_to("b")
    (image.out / "b").symlink_to("a")
    image.resource("a", "new")
    ran = image.run()
    assert ran.code == 1
    assert re.search(f"cannot render {image.out}/a: (too many levels of symbolic links|symbolic link loop) ", ran.err)


@pytest.mark.parametrize("dest, found", [
    ("/etc/x", "/etc/x"), ("/abs/x", "/etc/x"), ("/up/x", "/etc/x"), ("/../../etc/./x", "/etc/x"),
    ("/etc/../top", "/top"), ("/chain/x", "/etc/x"), ("x", "/x"), ("/etc/no/x", "/etc/no/x"),
])
def test_links_are_read_as_inside_of_the_root(tmp_path: Path, dest: str, found: str) -> None:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "abs").symlink_to("/etc")
    (root / "up").symlink_to("../../../../etc")
    (root / "chain").symlink_to("/abs")
    assert follow(dest, str(root)) == f"{root}{found}"


def test_without_a_root_following_is_what_the_system_does(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "l").symlink_to("d/../d")
    for path in (tmp_path / "l" / "x", tmp_path / "l" / ".." / "x", tmp_path / "l"):
        assert follow(str(path)) == os.path.realpath(path)


def test_root_puts_destinations_below_a_directory(image: Image) -> None:
    root = image.home / "tree"
    image.resource("a", "text", dest="/etc/deep/a.conf", check_cmd=f"test {{{{.dest}}}} = {root}/etc/deep/a.conf")
    ran = image.run("--root", root)
    assert ran.code == 0
    assert (root / "etc/deep/a.conf").read_text() == "text"
    assert not Path("/etc/deep").exists()


@pytest.mark.parametrize("dest, keys, message", [
    ("dir", {}, "is a directory"), ("fifo", {}, "is not a regular file"),
    ("no/where/x", {}, "directory {out}/no/where does not exist (make_dirs = true makes it)"),
    ("file/x", {}, "{out}/file is not a directory"), ("file/x", {"make_dirs": True}, "not a directory"),
    ("x" * 256, {}, "file ?name too long"),  # glibc's and musl's words
])
def test_a_destination_that_cannot_be_written(image: Image, dest: str, keys: dict[str, object], message: str) -> None:
    (image.out / "dir").mkdir()
    (image.out / "file").write_text("old")
    os.mkfifo(image.out / "fifo")
    before = sorted(image.out.rglob("*"))
    image.resource("a", "new", dest=str(image.out / dest), **keys)
    ran = image.run()
    assert ran.code == 1
    words = re.escape(message.format(out=image.out)).replace(re.escape(" ?"), " ?")
    assert re.search(f"cannot render {image.out / dest}: {words}", ran.err)
    assert sorted(image.out.rglob("*")) == before


def test_missing_directories_are_made_on_request(image: Image) -> None:
    dest = image.resource("a", "new", dest=str(image.out / "no/where/x"), make_dirs=True)
    assert image.run(umask=0o022).code == 0
    assert dest.read_text() == "new"
    assert stat.S_IMODE(dest.parent.stat().st_mode) == 0o755


def test_a_name_of_the_greatest_length_can_be_staged(image: Image) -> None:
    dest = image.resource("a", "new", dest=str(image.out / ("ä" * 127)))
    assert image.run().code == 0
    assert dest.read_text() == "new"


@pytest.fixture
def powerless(image: Image) -> Image:
    """An image whose program runs without root's powers over files: as root, but with no capability."""
    need(os.geteuid() == 0 and shutil.which("setpriv"), "root and setpriv, to run without capabilities")
    image.program = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *image.program]
    return image


def test_a_directory_that_we_may_not_write_in(powerless: Image) -> None:
    locked = powerless.out / "locked"
    locked.mkdir()
    (locked / "a").write_text("old")
    os.chown(locked, 65534, 65534)
    powerless.resource("a", "new", dest=str(locked / "a"))
    powerless.resource("b", "new")
    ran = powerless.run()
    assert ran.code == 1
    assert f"cannot render {locked}/a: cannot write in {locked}: permission denied" in ran.err
    assert ((locked / "a").read_text(), (powerless.out / "b").read_text()) == ("old", "new")


def test_only_root_gives_files_away(powerless: Image) -> None:
    dest = powerless.resource("a", "new", uid=33)
    kept = powerless.resource("b", "new")
    kept.write_text("old")
    os.chown(kept, 33, 0)
    ran = powerless.run()
    assert ran.code == 1
    assert f"cannot render {dest}: cannot give it owner 33: operation not permitted (only root may)" in ran.err
    assert not dest.exists()
    assert f"WARNING cannot keep owner 33 of {kept}: operation not permitted; it gets owner 0" in ran.err
    assert (kept.read_text(), kept.stat().st_uid) == ("new", 0)
    assert powerless.stages() == []
    assert powerless.run("--compat", "confd").code == 0
    assert dest.read_text() == "new"


def in_mounts(image: Image, script: str, *flags: str) -> Ran:
    """Run a shell script with mounts of its own; in it, "$@" is the program on the image."""
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    need(shutil.which("unshare") and run([*unshare, "true"]).code == 0, "a mount namespace (root)")
    return run([*unshare, "sh", "-c", script, "sh", *image.argv("--once", *flags)])


def test_a_full_disk_leaves_the_old_file(image: Image) -> None:
    dest = image.resource("a", "{{range seq 1 100000}}some text of the new file\n{{end}}")
    ran = in_mounts(image, f"""
        mount -t tmpfs -o size=64k none {image.out} && echo old > {dest} || exit 99
        "$@"; echo "code $?"; ls -A {image.out}; cat {dest}""")
    assert ran.out == "code 1\na\nold\n"
    assert f"cannot render {dest}: no space left on device (a.toml)" in ran.err


def test_a_bind_mounted_file_is_written_in_place(image: Image) -> None:
    dest = image.resource("a", "new", mode="0600", reload_cmd="echo reloaded")
    ran = in_mounts(image, f"""
        echo a longer old text > {image.home}/real; touch {dest}
        mount --bind {image.home}/real {dest} || exit 99
        "$@"; echo "code $?"; "$@"; ls -A {image.out}; stat -c %a {dest}""", "--log-level", "debug")
    assert ran.out == "code 0\na\n600\n"
    assert (image.home / "real").read_text() == "new"
    assert ran.err.count("has been updated") == 1
    assert ran.err.count(f"Target config {dest} in sync") == 1


def test_a_bind_mounted_file_on_a_full_disk_stays(image: Image) -> None:
    dest = image.resource("a", "{{range seq 1 10000}}some text of the new file\n{{end}}")
    ran = in_mounts(image, f"""
        mkdir {image.home}/small; mount -t tmpfs -o size=64k none {image.home}/small || exit 99
        echo old > {image.home}/small/real; touch {dest}
        mount --bind {image.home}/small/real {dest} || exit 99
        "$@"; echo "code $?"; ls -A {image.out}; cat {dest}""")
    assert ran.out == "code 1\na\nold\n"
    assert f"cannot render {dest}: no space left on device" in ran.err


def test_a_read_only_file_system(image: Image) -> None:
    dest = image.resource("a", "new")
    dest.write_text("old")
    ran = in_mounts(image, f'mount --bind -o ro {image.out} {image.out} || exit 99; "$@"; echo "code $?"; cat {dest}')
    assert ran.out == "code 1\nold"
    assert f"cannot write in {image.out}: read-only file system" in ran.err


# ---- secrets, dry runs, diffs -------------------------------------------------------------------------

def test_a_secret_is_not_shown(image: Image) -> None:
    image.keys({"password": "hunter2"})
    dest = image.resource("a", '{{getv "/password"}}', secret=True, check_cmd="cat {{.src}}; exit 1")
    for flags in ((), ("--dry-run", "--diff"), ("--diff", "--log-level", "debug")):
        ran = image.run(*flags)
        assert "hunter2" not in ran.out + ran.err
    assert "1 lines of output are not shown: secret = true" in ran.err
    assert f"{dest} changes (not shown: secret = true)" in ran.out
    dest.write_text("hunter1")
    assert "hunter" not in str(image.run("--log-level", "debug", "--diff"))


@pytest.mark.parametrize("text", [
    '{{atoi (getv "/v")}}', '{{parseBool (getv "/v")}}', '{{range getv "/v" | len | printf "%s%d" (getv "/v")}}{{end}}',
    '{{eq (split (getv "/v") ",") 1}}', '{{json (getv "/v")}}', '{{(getv "/v").x}}', '{{index (getv "/v") "hunter2"}}',
    '{{template "x" (getv "/v")}}{{define "x"}}{{atoi .}}{{end}}', '{{base64Decode (getv "/v")}}',
    '{{add (getv "/v") 1}}',
    '{{include (getv "/v")}}', '{{getv (getv "/v")}}', '{{join (getv "/v") ","}}', '{{fromJson (getv "/v")}}',
    '{{eq (map "k" (getv "/v")) (get "/v")}}', '{{getv "/v" | call}}', '{{regexFind (print "(" (getv "/v")) ""}}',
])
def test_no_value_of_a_key_is_in_the_log(image: Image, text: str) -> None:
    image.keys({"v": "swordfish"})
    image.resource("a", text)
    image.resource("b", '{{getv "/v"}}', reload_cmd="true")
    ran = image.run("--log-level", "debug")
    assert ran.code == 1
    if not re.search(r"getv \(getv|include", text):  # there the value is the name of a key or of a file
        assert "swordfish" not in ran.err


def test_a_dry_run_changes_nothing_and_runs_nothing(image: Image) -> None:
    dest = image.resource("a", "new", check_cmd=f"touch {image.out}/ran", reload_cmd=f"touch {image.out}/ran")
    dest.write_text("old")
    image.resource("b", "new", dest=str(image.out / "no/b"), make_dirs=True)
    ran = image.run("--dry-run", "--diff")
    assert ran.code == 0
    assert f"WARNING Noop mode enabled. {dest} will not be modified" in ran.err
    assert [path.name for path in image.out.iterdir()] == ["a"]
    assert dest.read_text() == "old"
    assert "-old" in ran.out and "+new" in ran.out
    assert "2 out of sync" in ran.err.splitlines()[-1]


def test_sync_only_runs_nothing(image: Image) -> None:
    dest = image.resource("a", "new", check_cmd="false", reload_cmd=f"touch {image.out}/ran")
    assert image.run("--sync-only").code == 0
    assert [path.name for path in image.out.iterdir()] == [dest.name]


@pytest.mark.parametrize("old, new, lines", [
    (None, b"a\n", ["--- /dev/null", "+++ d", "@@ -0,0 +1 @@", "+a"]),
    (b"a\nb\n", b"a\nc", ["--- d", "+++ d", "@@ -1,2 +1,2 @@", " a", "-b", "+c", "\\ No newline at end of file"]),
    (b"x\x0cy\n", b"x\x0cz\n", ["--- d", "+++ d", "@@ -1 +1 @@", "-x\x0cy", "+x\x0cz"]),
    (b"", b"x" * (1 << 21), ["d changes (0 to 2097152 bytes, too large for a diff)"]),
])
def test_diffs(old: bytes | None, new: bytes, lines: list[str]) -> None:
    assert diff_lines(old, new, "d") == lines


def test_a_diff_is_one_that_patch_takes(image: Image) -> None:
    need(shutil.which("patch"), "patch")
    dest = image.resource("a", "one\ntwo\nthree")
    dest.write_text("zero\none\nthree\n")
    diff = image.run("--dry-run", "--diff").out
    subprocess.run(["patch", "-s", str(dest)], input=diff, text=True, check=True)
    assert dest.read_text() == "one\ntwo\nthree"


# ---- signals and the loop -----------------------------------------------------------------------------

def start(image: Image, *flags: str) -> subprocess.Popen[bytes]:
    """Start the program on an image; what it logs goes to the file log there."""
    with (image.home / "log").open("wb") as log:
        return subprocess.Popen(image.argv(*flags), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log,
                                env={"PATH": os.environ["PATH"]})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_loop_follows_keys_and_leaves_when_told(image: Image, number: signal.Signals) -> None:
    image.keys({"x": "1"})
    dest = image.resource("a", '{{getv "/x"}}')
    process = start(image, "--interval", "100ms")
    eventually(lambda: dest.exists() and dest.read_text() == "1")
    image.keys({"x": "2"})
    eventually(lambda: dest.read_text() == "2")
    image.resource("b", "new in conf.d")
    eventually(lambda: (image.out / "b").exists())
    process.send_signal(number)
    assert process.wait(20) == 0
    assert "Exiting..." in (image.home / "log").read_text()


def test_the_loop_survives_failures_and_retries_them_soon(image: Image) -> None:
    log, flag = image.home / "log", image.home / "flag"
    dest = image.resource("a", '{{getv "/x"}}', reload_cmd=f"cat {flag}")
    process = start(image, "--interval", "1h")
    eventually(lambda: "key does not exist: /x" in log.read_text())
    image.keys({"x": "1"})
    eventually(lambda: dest.exists(), what="rendered long before the interval is over")
    eventually(lambda: "cannot reload after the change" in log.read_text())
    assert process.poll() is None
    flag.write_text("now the reload that was due succeeds")
    eventually(lambda: "reloaded after the change" in log.read_text())
    proc = Path(f"/proc/{process.pid}")
    assert (proc / "task" / str(process.pid) / "children").read_text() == ""  # no child is left, not even a zombie
    assert sorted(os.listdir(proc / "fd")) == ["0", "1", "2", "3", "4"]  # 3 and 4: the pipe through which signals wake
    process.terminate()
    assert process.wait(20) == 0


@pytest.mark.parametrize("once, code", [(True, 143), (False, 0)])
def test_told_to_stop_in_a_check(image: Image, once: bool, code: int) -> None:
    dest = image.resource("a", "new", check_cmd=f"echo $$ > {image.out}/pid; sleep 600")
    dest.write_text("old")
    other = image.resource("b", "new")
    process = start(image, *(["--once"] if once else []))
    eventually(lambda: (image.out / "pid").exists() and (image.out / "pid").read_text().strip())
    process.terminate()
    assert process.wait(30) == code
    assert (dest.read_text(), image.stages()) == ("old", [])
    assert not (once and other.exists())  # the loop renders others while a check runs
    assert not alive(int((image.out / "pid").read_text()))


def test_told_to_stop_the_due_reload_still_runs(image: Image) -> None:
    image.resource("a", "new", reload_cmd=f"sleep 1; touch {image.out}/reloaded")
    image.resource("b", "new", check_cmd=f"touch {image.out}/checking; sleep 600")
    process = start(image)
    eventually(lambda: (image.out / "checking").exists())
    process.terminate()
    assert process.wait(30) == 0
    assert (image.out / "a").read_text() == "new"
    assert (image.out / "reloaded").exists()
    assert image.stages() == []


def test_killed_in_a_check_the_old_file_is_whole(image: Image) -> None:
    dest = image.resource("a", "new", check_cmd=f"touch {image.out}/checking; sleep 5")
    dest.write_text("old")
    process = start(image)
    eventually(lambda: (image.out / "checking").exists())
    process.kill()
    process.wait()
    assert dest.read_text() == "old"
    image.resource("a", "new", check_cmd="true")
    assert image.run().code == 0
    assert dest.read_text() == "new"


# ---- etcd ---------------------------------------------------------------------------------------------

def test_files_from_a_real_etcd(image: Image, etcd: EtcdServer) -> None:
    etcd.put("/p/app/name", "web ä")
    etcd.put("/p/app/hosts/a", "10.0.0.1")
    etcd.put("/p/app/hosts/b", "10.0.0.2")
    etcd.put("/p/apple", "not mine")
    dest = image.resource("a", '{{getv "/name"}}:{{range ls "/hosts"}} {{.}}={{printf "/hosts/%s" . | getv}}{{end}}'
                               '{{range gets "/*"}} {{.Key}}{{end}}', prefix="/app", keys=["/name", "/hosts"])
    ran = image.run("--node", etcd.url, "--prefix", "/p")
    assert ran.code == 0
    assert dest.read_text() == "web ä: a=10.0.0.1 b=10.0.0.2 /name"
    etcd.put("/p/app/hosts/b", "10.0.0.3")
    assert image.run("--node", etcd.url, "--prefix", "/p", "--api", "3").code == 0
    assert "b=10.0.0.3" in dest.read_text()


def test_bytes_reach_the_file_as_they_are_and_no_message_acts_on_a_terminal(image: Image, etcd: EtcdServer) -> None:
    every = bytes(range(256))
    etcd.put("/b/\udcff\n\x1b[31m", every.decode("utf-8", "surrogateescape"))
    dest = image.resource("a", keys=["/b"])
    (image.home / "templates" / "a.tmpl").write_bytes(b'\xfe\0{{range gets "/b/*"}}{{.Key}}={{.Value}}{{end}}\x80')
    image.resource("b", r'{{range ls "/b"}}{{getv (print "/b/" . "?")}}{{end}}', keys=["/b"])
    ran = image.run("--node", etcd.url, "--diff")
    assert dest.read_bytes() == b"\xfe\0/b/\xff\n\x1b[31m=" + every + b"\x80"
    assert r"key does not exist: /b/\xff\n\x1b[31m?" in ran.err and "\x1b" not in ran.err
    assert ran.err.splitlines()[-1].endswith("2 template resources: 1 updated, 1 failed")


def test_files_from_the_v2_api(image: Image, etcd34: EtcdServer) -> None:
    etcd34.put_v2("/app/name", "two")
    dest = image.resource("a", '{{getv "/name"}}', prefix="/app", keys=["/name"])
    assert image.run("--node", etcd34.url, "--api", "2").code == 0
    assert dest.read_text() == "two"


def test_fifty_thousand_keys(image: Image, etcd35: EtcdServer) -> None:
    etcd35.put_many((f"/many/{number % 500:03}/{number:05}", f"value {number}") for number in range(50_000))
    dest = image.resource("a", '{{range ls "/many"}}{{range gets (printf "/many/%s/*" .)}}{{.Key}}={{.Value}}\n'
                               '{{end}}{{end}}', keys=["/many"])
    assert image.run("--node", etcd35.url).code == 0
    lines = dest.read_text().splitlines()
    assert len(lines) == 50_000
    assert lines[:2] == ["/many/000/00000=value 0", "/many/000/00500=value 500"]


def liar(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that answers every connection in its own way, until the generator is closed."""
    server = socket.create_server(("127.0.0.1", 0))
    closing = threading.Event()

    def serve() -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=talk, args=(client,), daemon=True).start()

    def talk(client: socket.socket) -> None:
        with client:
            try:
                client.recv(65536)
                answer(client)
            except OSError:
                pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}"
    closing.set()
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()


def _half(client: socket.socket) -> None:
    client.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"kvs": [')


def _huge(client: socket.socket) -> None:
    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 31457280\r\n\r\n" + b" " * 31457280)


@pytest.mark.parametrize("answer", [
    lambda client: None, lambda client: time.sleep(30), _half,
    lambda client: client.sendall(b"\0\xff garbage\r\n" * 100),
    lambda client: client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n[1, 2, 3]"), _huge,
], ids=["closes", "stalls", "half", "garbage", "not an object", "30 MB"])
def test_an_etcd_that_does_not_answer_leaves_the_files(image: Image, answer: Callable[[socket.socket], None]) -> None:
    dest = image.resource("a", '{{getv "/x" "default"}}')
    dest.write_text("old")
    servers = liar(answer)
    url = next(servers)
    try:
        ran = image.run("--node", url)
    finally:
        next(servers, None)
    assert ran.code in (1, 3)
    assert url in ran.err
    assert "Traceback" not in ran.err
    assert ran.err.splitlines()[-1].endswith("ERROR 1 template resources: 1 failed")
    assert (dest.read_text(), image.stages()) == ("old", [])


def test_an_etcd_that_is_not_there_is_exit_code_3(image: Image) -> None:
    dest = image.resource("a", '{{getv "/x" "default"}}')
    ran = image.run("--node", f"http://127.0.0.1:{free_port()}")
    assert (ran.code, dest.exists()) == (3, False)
    assert "connection refused" in ran.err


def test_keys_that_are_no_keys(image: Image) -> None:
    image.resource("a", "x")
    (image.home / "keys.json").write_text("{\n  \"a\": \n}")
    ran = image.run()
    assert ran.code == 1
    assert f"cannot read keys from {image.home}/keys.json:3:" in ran.err


# ---- what is found without keys -----------------------------------------------------------------------

@pytest.mark.parametrize("text, keys, line, message", [
    ('\n{{getv "/b"}}', ["/a"], 2, 'getv "/b": keys of a.toml does not list it'),
    ('{{getv "/b" "default"}}', ["/a"], 1, 'getv "/b": keys of a.toml does not list it'),
    ('{{if exists "/ab"}}{{end}}', ["/a"], 1, 'exists "/ab": keys'),
    ('{{range gets "/b/*"}}{{end}}', ["/a"], 1, 'gets "/b/*": keys'),
    ('{{range getvs "/b/x*"}}{{end}}', ["/a/x"], 1, 'getvs "/b/x*": keys'),
    ('{{range ls "/b"}}{{end}}', ["/a"], 1, 'ls "/b": keys'),
    ('{{getv "/a/"}}', ["/a"], 1, 'getv "/a/": no key reads so, it would be "/a"'),
    ('{{get "a"}}', ["/a"], 1, 'get "a": no key reads so, it would be "/a"'),
    ('{{if true}}\n{{getv}', ["/a"], 2, "bad character U+007D '}'"),
    ('{{\nnope}}', ["/a"], 2, 'function "nope" not defined'),
])
def test_lint_finds_what_cannot_work(image: Image, text: str, keys: list[str], line: int, message: str) -> None:
    image.resource("a", text, keys=keys)
    ran = image.run(verb="check")
    assert ran.code == 1
    assert ran.out.startswith(f"{image.home}/templates/a.tmpl:{line}: error: {message}")


@pytest.mark.parametrize("text, keys", [
    ('{{getv "/a"}}{{getv "/a/b"}}{{exists "/a/b/c"}}', ["/a"]), ('{{getv "/anything"}}', ["/"]),
    ('{{gets "/a/*"}}{{ls "/a"}}{{lsdir "/"}}', ["/a/b"]), ('{{gets "/*/x"}}', ["/a"]),
    ('{{getv (printf "/%s" "x")}}', ["/a"]),
    ('{{datetime.Format "2006"}}', []), ('{{$k := "/b"}}{{getv $k}}', ["/a"]), ('{{gets "*"}}', ["/a"]),
])
def test_lint_is_content_with_what_can_work(image: Image, text: str, keys: list[str]) -> None:
    image.resource("a", text, keys=keys)
    ran = image.run(verb="check")
    assert (ran.code, ran.out) == (0, "")
    assert ran.err.endswith("INFO 0 errors, 0 warnings\n")


def test_lint_names_every_file_and_line(image: Image) -> None:
    image.resource("a", "{{datetime}}", mode="644", typo=1)
    image.resource("b", '{{include "part"}}')
    image.template("part", '\n\n{{getv "/z"}}')
    image.resource("c", dest=str(image.out / "no" / "c"))
    image.resource("d", "", dest=str(image.out / "a"), required=["/q"], keys=["/r"], owner="nosuchuser")
    image.conf("e.toml", "[template]\nsrc = =\n")
    image.resource("b2", "", dest=str(image.out))
    ran = image.run(verb="check")
    conf, templates = image.home / "conf.d", image.home / "templates"
    assert ran.code == 1
    assert sorted(ran.out.splitlines()) == sorted([
        f'{conf}/a.toml:5: warning: mode = "644" is taken as 0644; write mode = "0644"',
        f"{conf}/a.toml:6: warning: unknown key typo, ignored",
        f"{templates}/a.tmpl:1: warning: datetime without .Format changes the file at every pass",
        f"{conf}/b2.toml:3: error: {image.out} is a directory",
        f"{conf}/c.toml:3: warning: directory {image.out}/no does not exist here (make_dirs = true makes it)",
        f"{conf}/c.toml:2: error: Missing template: {templates}/c.tmpl",
        f"{conf}/d.toml:3: error: {image.out}/a is also written by a.toml",
        f'{conf}/d.toml:5: error: keys does not list the required "/q"',
        f"{conf}/d.toml:6: warning: owner nosuchuser is not known here",
        f"{conf}/e.toml:2: error: invalid value (column 7)",
    ])


def test_lint_of_an_included_template_that_reads_what_is_not_listed(image: Image) -> None:
    image.resource("b", '{{include "part"}}', keys=["/a"])
    image.template("part", '\n\n{{getv "/z"}}')
    ran = image.run(verb="check")
    assert (ran.code, ran.out) == (
        1, f'{image.home}/templates/part:3: error: getv "/z": keys of b.toml does not list it\n')


def test_lint_of_our_own_templates(program: list[str]) -> None:
    sets = [path.parent for path in (Path(__file__).parent.parent / "templates").glob("*/conf.d")]
    assert sets
    for directory in sets:
        ran = run([*program, "check", "--confdir", str(directory)])
        assert ran.code == 0, ran


def test_resource_names_can_be_loaded_from_python(tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "x.toml").write_text(json.dumps("x").join(["[template]\nsrc = ", "\ndest = '/y'\n"]))
    [resource], findings = load_resources(str(tmp_path), prefix="/p")
    assert (resource.name, resource.prefix, resource.lines["dest"], findings) == ("x.toml", "/p", 3, [])


# ---- one file for each match ------------------------------------------------------------------------------

def hosts(image: Image, **keys: object) -> Path:
    """A resource with a file for each /hosts/NAME; the directory of the files."""
    image.resource("hosts", "{{.Name}} of {{.Key}}: {{getv (printf \"%s/to\" .Key) \"nowhere\"}} {{.Value}}\n",
                   dest=str(image.out / "vhosts" / "{{.Name}}.conf"), foreach="/hosts/*", make_dirs=True, **keys)
    return image.out / "vhosts"


def test_foreach_writes_a_file_for_each_match_and_removes_only_its_own(image: Image) -> None:
    place = hosts(image)
    image.keys({"hosts": {"a": {"to": "1"}, "b": "leaf", "c.d": {"x": {"y": "deep"}}}, "other": "x"})
    assert image.run().code == 0
    assert {path.name: path.read_text() for path in place.glob("*.conf")} == {
        "a.conf": "a of /hosts/a: 1 \n", "b.conf": "b of /hosts/b: nowhere leaf\n",
        "c.d.conf": "c.d of /hosts/c.d: nowhere \n"}
    (place / "mine.conf").write_text("not of a key")
    image.keys({"hosts": {"b": "leaf"}})
    ran = image.run()
    assert ran.code == 0 and "a.conf has been removed" in ran.err
    assert sorted(path.name for path in place.glob("*.conf")) == ["b.conf", "mine.conf"]
    (place / ".hosts.toml.manifest").unlink()
    image.keys({})
    assert image.run().code == 0
    assert sorted(path.name for path in place.glob("*.conf")) == ["b.conf", "mine.conf"]  # nobody says it is ours


def test_foreach_goes_nowhere_else_whatever_a_key_is_called(image: Image) -> None:
    place = hosts(image)
    names = ["...", ".hidden", "a b", "x;y", "\n", "ü", "a$(id)", "-rf"]
    image.keys({"hosts": dict.fromkeys(names, "1")})
    before = set(image.out.parent.rglob("*"))
    assert image.run().code == 0
    made = set(image.out.parent.rglob("*")) - before - {place}
    assert {path.parent for path in made} == {place}
    assert sorted(path.name for path in made) == [
        "%0A.conf", "%2E...conf", "%2Ehidden.conf", "%C3%BC.conf", "-rf.conf", ".hosts.toml.manifest",
        "a%20b.conf", "a%24%28id%29.conf", "x%3By.conf"]
    image.resource("hosts", "", dest=str(place / "{{.Value}}"), foreach="/hosts/*")
    image.keys({"hosts": {"a": "../../etc/passwd", "b": "/x", "c": "..", "d": "."}})
    assert image.run().code == 0
    found = sorted(path.name for path in place.iterdir() if not path.name.endswith((".conf", ".manifest")))
    assert found == ["%2E", "%2E.", "%2E.%2F..%2Fetc%2Fpasswd", "%2Fx"]


def test_foreach_refuses_two_keys_for_one_file_and_a_directory_from_a_key(image: Image) -> None:
    place = hosts(image)
    image.resource("hosts", "", dest=str(place / "{{.Value}}"), foreach="/hosts/*", make_dirs=True)
    image.keys({"hosts": {"a": "1", "b": "1"}})
    ran = image.run()
    assert ran.code == 1 and f"keys /hosts/a and /hosts/b want the same file, {place}/1" in ran.err
    image.resource("hosts", "", dest=str(image.out / "{{.Name}}" / "x"), foreach="/hosts/*")
    assert "with foreach the last part of dest, and no other, is a template" in image.run().err


def test_foreach_changes_all_files_or_none(image: Image) -> None:
    place = hosts(image, check_cmd="! grep -q bad {{.src}}")
    image.keys({"hosts": {"a": {"to": "1"}, "b": {"to": "2"}}})
    assert image.run().code == 0
    image.keys({"hosts": {"a": {"to": "new"}, "c": {"to": "bad"}}})
    assert image.run().code == 1
    assert sorted(path.name for path in place.glob("*.conf")) == ["a.conf", "b.conf"]
    assert (place / "a.conf").read_text() == "a of /hosts/a: 1 \n" and image.stages() == [
        str(place / ".hosts.toml.manifest")]
