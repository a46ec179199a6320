"""GROUND: the short ways to json, re and tomllib give what the modules give."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import etcdinit

ROOT = Path(__file__).resolve().parent.parent
JSON_VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), lambda
                           inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4))


def outcome(function: Any, argument: Any) -> tuple[str, str]:
    try:
        return "value", repr(function(argument))
    except (ValueError, RecursionError, TypeError) as error:
        return type(error).__name__, str(error)


# ---- JSON ---------------------------------------------------------------------------------------------

@settings(deadline=None)
@given(JSON_VALUES)
def test_json_is_written_and_read_as_the_module_does(value: Any) -> None:
    text = etcdinit.to_json(value)
    assert text == json.dumps(value, separators=(",", ":"))
    assert etcdinit.from_json(text) == json.loads(text) == etcdinit.from_json(bytearray(text, "utf-8"))


@settings(deadline=None)
@given(JSON_VALUES, st.integers(0, 60), st.sampled_from(["", "}", "]", '"', ",", " ", "\n", "\0", "\\u12", "é", "NaN"]))
def test_broken_json_has_the_errors_of_the_module(value: Any, at: int, put: str) -> None:
    text = json.dumps(value, ensure_ascii=False)
    broken = text[:at] + put + text[at + 1:]
    assert outcome(etcdinit.from_json, broken) == outcome(json.loads, broken)
    data = broken.encode("utf-8", "surrogatepass")
    assert outcome(etcdinit.from_json, data) == outcome(json.loads, data)


@pytest.mark.parametrize("data", [
    b"", b" ", b"\xff", b'"\xff"', b"\xef\xbb\xbf{}", "[1]".encode("utf-16"), "{}".encode("utf-32-le"),
    b"[NaN, -Infinity]", b"[" * 100_000, b'{"a": 1} x', b" \t\r\n[1]\n", b"\x0b[1]"], ids=lambda data: repr(data[:12]))
def test_odd_json_is_what_the_module_says_it_is(data: bytes) -> None:
    assert outcome(etcdinit.from_json, data) == outcome(json.loads, data)


# ---- TOML ---------------------------------------------------------------------------------------------

KEYS = st.sampled_from(["src", "dest", "keys", "a-b", "A_1", "1", "[x]", '"q"', "a.b", ""])
TOML_VALUES = st.sampled_from([
    '"x"', "'y'", '""', "''", '"a b # c"', "'\"'", '"\\t"', '"""z"""', "true", "false", "0", "7", "-1", "+1", "0x1f",
    "01", "1.5", "1_000", "1979-05-27", "[]", "[1, 2]", '["a", \'b\',]', '[\n  "a",\n  "b"\n]', "[[1], 2]", "[1 2]",
    "[,]", '["a" # c\n]', "{a = 1}", "inf", "", "é", '"é\u2028"', '[true, "x", 3 ]', "99999999999999999999"])
TOML_PAIRS = st.tuples(KEYS, st.sampled_from(["=", " = ", "  =\t", " "]), TOML_VALUES,
                       st.sampled_from(["", " # c", " x", "\t"])).map("".join)
TOML_LINES = TOML_PAIRS | st.sampled_from([
    "", "# a comment", "[template]", "[[template]]", " [ template ]", "[a]", "[[a]]", "[a.b]", "[template] # c",
    "#\x01", "\t", "[template", "]", "a = []"])


@settings(deadline=None)
@given(st.lists(TOML_LINES, max_size=8), st.sampled_from(["\n", "\r\n"]), st.sampled_from(["", "\n"]))
def test_toml_is_read_as_the_module_does(lines: list[str], newline: str, end: str) -> None:
    text = newline.join(lines) + end
    assert outcome(etcdinit.from_toml, text) == outcome(tomllib.loads, text)


def test_files_of_conf_d_do_not_load_tomllib() -> None:
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import etcdinit\n"
            "for path in sys.argv[2:]: etcdinit.from_toml(open(path).read())\n"
            "print('tomllib' in sys.modules)")
    paths = sorted(map(str, ROOT.glob("templates/*/conf.d/*.toml")))
    assert paths
    run = subprocess.run([sys.executable, "-I", "-S", "-c", code, str(ROOT), *paths], stdout=subprocess.PIPE, text=True,
                         check=True)
    assert run.stdout == "False\n"


# ---- regular expressions ------------------------------------------------------------------------------

def test_a_pattern_is_compiled_once() -> None:
    assert etcdinit.regex("a(?i)".replace("(?i)", "+")) is etcdinit.regex("a+")
    assert etcdinit.regex("(?x) a b").fullmatch("ab")
    assert isinstance(etcdinit.regex("a+"), re.Pattern)
