"""COMMAND LINE: verbs, flags, help, settings, exit codes; and that no traceback reaches anybody."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import free_port, need
from support.etcd_server import EtcdServer
from support.image import Image, run

import etcdinit
from etcdinit import SETTINGS, VERBS, UsageError, confd_form, parse_command_line

ROOT = Path(__file__).resolve().parent.parent
VERB_NAMES = ["render", "check", "template", "get", "ls"]


# ---- help and version ---------------------------------------------------------------------------------

def test_the_version(program: list[str]) -> None:
    ran = run([*program, "--version"])
    assert (ran.code, ran.out.splitlines()[0], ran.err) == (0, f"etcdinit {etcdinit.__version__}", "")


@pytest.mark.parametrize("word", ["--help", "-h", "help"])
def test_the_help_shows_every_verb_with_an_example(program: list[str], word: str) -> None:
    ran = run([*program, word])
    assert (ran.code, ran.err) == (0, "")
    for name in VERB_NAMES:
        assert re.search(rf"^  {name}( |$)", ran.out, re.M)
        assert re.search(rf"^  etcdinit {name}( |$)", ran.out, re.M)
    assert max(map(len, ran.out.splitlines())) <= 120


@pytest.mark.parametrize("name", VERB_NAMES)
def test_each_verb_explains_itself(program: list[str], name: str) -> None:
    for arguments in ([name, "--help"], [name, "-h"], ["help", name]):
        ran = run([*program, *arguments])
        assert (ran.code, ran.err) == (0, "")
        assert ran.out.startswith(f"usage: etcdinit {name}")
        assert re.search(rf"\nexample:\n  etcdinit {name}", ran.out)
        assert all(f"\n  --{flag}" in ran.out for flag in VERBS[name].flags)


def test_every_example_of_the_help_is_understood() -> None:
    for verb in VERBS.values():
        for line in verb.example.splitlines():
            program, name, *arguments = line.split()
            assert (program, name) == ("etcdinit", verb.name)
            parse_command_line(verb, arguments)


def test_every_flag_has_a_row() -> None:
    for verb in VERBS.values():
        for name in verb.flags:
            assert name in etcdinit.FLAGS or name in SETTINGS
            assert len(set(verb.flags)) == len(verb.flags)


@pytest.mark.parametrize("argument", ["--version", "--help", "render --help"])
def test_help_and_version_load_no_modules(argument: str) -> None:
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import etcdinit; before = set(sys.modules); "
            "code = etcdinit.main(sys.argv[2:]); print(code, *sorted(set(sys.modules) - before), file=sys.stderr)")
    ran = run([sys.executable, "-I", "-S", "-c", code, str(ROOT), *argument.split()])
    assert ran.err == "0\n"


# ---- what is typed wrong ------------------------------------------------------------------------------

@pytest.mark.parametrize("typed, message", [
    ("", "a verb is needed: render, check, template, get, ls"),
    ("rendr", "unknown verb rendr; did you mean render?"),
    ("quux", "unknown verb quux (etcdinit --help)"),
    ("--once render", "the verb comes first, then --once: etcdinit VERB [FLAG ...]"),
    ("render --onec", "render has no flag --onec; did you mean --once?"),
    ("render -once", "render has no flag -once; did you mean --once?"),
    ("render -onetime", "render has no flag -onetime; confd's -onetime is --once here"),
    ("render --noop", "render has no flag --noop; confd's -noop is --dry-run here"),
    ("render --zzz=1", "render has no flag --zzz (etcdinit render --help)"),
    ("render --root", "--root needs a value: --root DIR"),
    ("render --once=perhaps", 'cannot use --once: "perhaps" is neither yes nor no'),
    ("render --interval soon", 'cannot use --interval: "soon" is not a duration'),
    ("render --compat s6", 'cannot be compatible with "s6" (only with confd)'),
    ("render --api 4 --once", 'not an etcd API: "4"'),
    ("render --log-level loud", 'not a valid log level: "loud"'),
    ("render --log-format xml", 'not a valid log format: "xml"'),
    ("check x", "check takes no argument x"),
    ("get", "get needs KEY (example: etcdinit get /lb/upstreams/web/1)"),
    ("get /a /b", "get takes no argument /b"),
    ("template --keys k", "template needs FILE (example: etcdinit template nginx.conf.tmpl --keys keys.json)"),
    ("-onetime -backend etcdv3 -node http://a:2379 -node=b -confdir /c --interval 5",
     "-onetime is a flag of confd; here it is: "
     "etcdinit render --once --api 3 --node http://a:2379 --node b --confdir /c --interval 5"),
    ("--backend etcd --username u --password hunter2",
     "--backend is a flag of confd; here it is: ETCD_USERNAME=... ETCD_PASSWORD=... etcdinit render --api 2"),
])
def test_a_wrong_command_line_is_told_in_one_line(program: list[str], typed: str, message: str) -> None:
    ran = run([*program, *typed.split()])
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.splitlines()[-1].startswith(f"etcdinit: {message}")
    assert "hunter2" not in ran.err


@given(st.lists(st.sampled_from(["--once", "--node", "-", "--", "x", "--root=", "--help", "-h", "--keys", "--no", "\0",
                                 "-onetime", "--diff=yes", "", "ä", "\udcff"]) | st.text(max_size=6), max_size=6))
def test_no_arguments_break_the_parser(arguments: list[str]) -> None:
    for verb in VERBS.values():
        try:
            words, flags = parse_command_line(verb, arguments)
        except UsageError as error:
            assert str(error)
        else:
            assert set(flags) <= set(verb.flags)
            assert all(word in arguments for word in words)
    assert isinstance(confd_form(arguments), str)


@pytest.mark.parametrize("arguments, words, flags", [
    (["--root", "/r", "a", "--once", "b"], ["a", "b"], {"root": "/r", "once": True}),
    (["--root=/r=1", "--", "--once"], ["--once"], {"root": "/r=1"}),
    (["--once=no", "--diff=yes"], [], {"once": False, "diff": True}),
    (["--node", "a", "--node=b,c"], [], {"node": ["a", "b,c"]}),
    (["--root", "--once"], [], {"root": "--once"}),
    (["-"], ["-"], {}),
])
def test_how_arguments_are_read(arguments: list[str], words: list[str], flags: dict[str, object]) -> None:
    assert parse_command_line(VERBS["render"], arguments) == (words, flags)


# ---- settings -----------------------------------------------------------------------------------------

def test_a_flag_wins_over_the_environment_and_that_over_the_default(image: Image, tmp_path: Path) -> None:
    image.keys({"a": {"x": "from a"}, "b": {"x": "from b"}, "x": "from top"})
    dest = image.resource("t", '{{getv "/x"}}')
    base = [*image.program, "render", "--once", "--keys", str(tmp_path / "keys.json")]
    env = {"ETCDINIT_CONFDIR": str(tmp_path)}
    for flags, more, text in (([], {}, "from top"), ([], {"ETCD_PREFIX": "/a"}, "from a"),
                              (["--prefix", "/b"], {"ETCD_PREFIX": "/a"}, "from b"),
                              ([], {"ETCD_PREFIX": ""}, "from top")):
        assert run([*base, *flags], env={**env, **more}).code == 0
        assert dest.read_text() == text


def test_a_wrong_variable_is_named(program: list[str]) -> None:
    ran = run([*program, "render"], env={"ETCDINIT_INTERVAL": "later"})
    assert (ran.code, ran.err) == (
        2, 'etcdinit: cannot use ETCDINIT_INTERVAL: "later" is not a duration (examples: 500ms, 2s, 1m30s)\n')


def test_log_lines_can_be_json(image: Image) -> None:
    image.resource("a", "text")
    image.resource("b", "{{nope}}\n")
    ran = image.run("--log-format", "json")
    lines = [json.loads(line) for line in ran.err.splitlines()]
    assert {line["level"] for line in lines} == {"info", "error"}
    assert all(line["program"] == "etcdinit" for line in lines)
    ran = image.run(env={"ETCDINIT_LOG_FORMAT": "json", "ETCDINIT_LOG_LEVEL": "error"})
    assert [json.loads(line)["level"] for line in ran.err.splitlines()] == ["error", "error"]


# ---- template, get, ls --------------------------------------------------------------------------------

def test_one_template_to_standard_output(image: Image, tmp_path: Path) -> None:
    image.keys({"p": {"x": "1"}, "x": "2"})
    image.template("a", '{{include "b"}} {{getv "/x"}}\n')
    image.template("b", "included")
    keys, file = str(tmp_path / "keys.json"), str(tmp_path / "templates" / "a")
    for flags, text in (([], "included 2\n"), (["--prefix", "/p"], "included 1\n")):
        ran = run([*image.program, "template", file, "--keys", keys, *flags])
        assert (ran.code, ran.out, ran.err) == (0, text, "")
    ran = run([*image.program, "template", "a", "--keys", keys], cwd=tmp_path / "templates")
    assert ran.out == "included 2\n"


@pytest.mark.parametrize("text, message", [
    ('{{getv "/no"}}', 'at <getv "/no">: error calling getv: key does not exist: /no'),
    ('before {{atoi (getv "/x")}}', 'strconv.Atoi: parsing ******: invalid syntax'),
    ("{{if}}", "missing value for if"),
])
def test_a_template_that_fails_prints_nothing(image: Image, tmp_path: Path, text: str, message: str) -> None:
    image.keys({"x": "swordfish"})
    image.template("a", text)
    ran = run([*image.program, "template", str(tmp_path / "templates" / "a"), "--keys", str(tmp_path / "keys.json")])
    assert (ran.code, ran.out) == (1, "")
    assert message in ran.err
    assert "swordfish" not in ran.err


def test_a_template_that_is_not_there(image: Image, tmp_path: Path) -> None:
    ran = run([*image.program, "template", "none", "--keys", str(tmp_path / "keys.json")])
    assert ran.code == 1
    assert ran.err.endswith("ERROR cannot read template none: no such file or directory\n")


def test_get_and_ls(image: Image, tmp_path: Path) -> None:
    image.keys({"a": {"b": "1\n", "c": {"d": "ä"}}, "ab": "2", "a/c": "leaf and directory", "e/f": ""})
    keys = ["--keys", str(tmp_path / "keys.json")]

    def ask(*arguments: str) -> tuple[int, str]:
        ran = run([*image.program, *arguments, *keys])
        return ran.code, ran.out

    assert ask("get", "/a/b") == (0, "1\n\n")
    assert ask("get", "a/c/d/") == (0, "ä\n")
    assert ask("get", "/e/f") == (0, "\n")
    assert ask("get", "/a") == (1, "")
    assert ask("get", "/b", "--prefix", "/a") == (0, "1\n\n")
    assert ask("ls") == (0, "a/\nab\ne/\n")
    assert ask("ls", "/a") == (0, "b\nc\n")
    assert ask("ls", "/a/c", "--prefix", "/") == (0, "d\n")
    assert ask("ls", "c", "--prefix", "/a") == (0, "d\n")
    assert ask("ls", "/ab") == (0, "ab\n")
    assert ask("ls", "/nothing") == (1, "")


def test_get_and_ls_from_a_real_etcd(program: list[str], etcd: EtcdServer) -> None:
    etcd.put("/a/b", "1")
    etcd.put("/a/c/d", "2")
    node = ["--node", etcd.url]
    assert run([*program, "get", "/a/b", *node]).out == "1\n"
    assert run([*program, "ls", "/a"], env={"ETCD_ENDPOINTS": etcd.url}).out == "b\nc/\n"
    ran = run([*program, "get", "/a", *node])
    assert (ran.code, ran.err.endswith("ERROR key /a does not exist\n")) == (1, True)


@pytest.mark.parametrize("verb", [["get", "/a"], ["ls"], ["template", "TEMPLATE"], ["render", "--once"]])
def test_no_etcd_is_exit_code_3(image: Image, tmp_path: Path, verb: list[str]) -> None:
    image.resource("a", '{{getv "/x" "d"}}')
    verb = [str(tmp_path / "templates" / "a.tmpl") if word == "TEMPLATE" else word for word in verb]
    ran = run([*image.program, *verb, "--node", f"http://127.0.0.1:{free_port()}"],
              env={"ETCDINIT_CONFDIR": str(tmp_path)})
    assert (ran.code, ran.out) == (3, "")
    assert "connection refused" in ran.err


# ---- the terminal -------------------------------------------------------------------------------------

def on_a_terminal(argv: list[str], env: dict[str, str]) -> str:
    """What a program writes to a terminal as its standard output."""
    ours, theirs = pty.openpty()
    subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=theirs, stderr=subprocess.DEVNULL,
                   env={"PATH": os.environ["PATH"], **env})
    os.write(theirs, b"(end)")  # what a closed terminal still holds can be lost
    text = b""
    while b"(end)" not in text:
        text += os.read(ours, 65536)
    os.close(theirs)
    os.close(ours)
    return text.decode()


def test_a_diff_is_coloured_on_a_terminal_only(image: Image) -> None:
    dest = image.resource("a", "new\n\ttab \x1b]0;title\x07\n")
    dest.write_text("old\n")
    argv = image.argv("--once", "--dry-run", "--diff")
    coloured = on_a_terminal(argv, {"TERM": "xterm"})
    assert "\x1b[31m-old\x1b[0m" in coloured and "\x1b[32m+new\x1b[0m" in coloured
    assert "+\ttab \\x1b]0;title\\x07" in coloured  # a file cannot talk to the terminal
    for env in ({"TERM": "xterm", "NO_COLOR": "1"}, {"TERM": "dumb"}):
        plain = on_a_terminal(argv, env)
        assert "-old" in plain and "\x1b" not in plain
    assert image.run("--dry-run", "--diff").out.splitlines()[-3:] == ["-old", "+new", "+\ttab \x1b]0;title\x07"]


def test_names_of_keys_cannot_talk_to_a_terminal(image: Image) -> None:
    image.keys({"a\nb\x1b]0;title\x07": "1"})
    argv = [*image.program, "ls", "--keys", str(image.home / "keys.json")]
    assert on_a_terminal(argv, {}).startswith(r"a\nb\x1b]0;title\x07")
    assert subprocess.run(argv, capture_output=True, check=True).stdout == b"a\nb\x1b]0;title\x07\n"


def test_a_reader_that_leaves_is_no_error(image: Image, tmp_path: Path) -> None:
    image.keys({f"k{number:05}": "" for number in range(20_000)})
    for verb in (["ls", "--keys", str(tmp_path / "keys.json")], ["--help"]):
        with subprocess.Popen([*image.program, *verb], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout and process.stderr
            process.stdout.close()
            assert process.stderr.read() == b""


def test_a_diff_that_nobody_reads_does_not_stop_the_work(image: Image) -> None:
    dest = image.resource("a", "{{range seq 1 100000}}some line\n{{end}}")
    other = image.resource("b", "b")
    with subprocess.Popen(image.argv("--once", "--diff"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout
        process.stdout.close()
    assert process.returncode == 0
    assert dest.stat().st_size == 1_000_000 and other.read_text() == "b"


def test_an_output_that_cannot_be_written_is_told(program: list[str]) -> None:
    need(os.path.exists("/dev/full"), "/dev/full")
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*program, "--help"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("ERROR cannot write to standard output: no space left on device\n")


def test_closed_descriptors_are_not_taken_for_files(image: Image) -> None:
    dest = image.resource("a", "text", check_cmd="echo out; echo err >&2; cat; test ! -s /proc/self/fd/3")
    script = 'exec 0<&- 1>&- 2>&-; exec "$@"'
    ran = run(["sh", "-c", script, "sh", *image.argv("--once")])
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    assert dest.read_text() == "text"


def test_an_interrupt_leaves_quietly(program: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        node = f"http://127.0.0.1:{server.getsockname()[1]}"
        with subprocess.Popen([*program, "ls", "--node", node], stderr=subprocess.PIPE, text=True) as process:
            try:
                client, _ = server.accept()
                with client:
                    assert client.recv(1000)  # it has asked, and waits for our answer
                    process.send_signal(signal.SIGINT)
                    assert process.wait(20) == 130
                    assert process.stderr and process.stderr.read() == ""
            finally:
                process.kill()


def test_an_exception_that_nobody_foresaw_is_one_line(monkeypatch: pytest.MonkeyPatch,
                                                      capfd: pytest.CaptureFixture[str]) -> None:
    def broken(words: list[str], flags: dict[str, object]) -> int:
        return int("swordfish")  # its text would hold the value

    monkeypatch.setattr(VERBS["ls"], "function", broken)
    assert etcdinit.main(["ls"]) == 1
    err = capfd.readouterr().err
    assert re.search(r"ERROR unexpected ValueError in broken, line \d+ \(a bug of etcdinit [\d.]+, please", err)
    assert "swordfish" not in err and err.count("\n") == 1
