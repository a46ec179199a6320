"""The functions that a template can call: confd's, its fork's, the store's; and real Go's word on them."""

from __future__ import annotations

import random
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import dns_servers
from support.go_values import GoValues

import etcdinit
from etcdinit import (
    FUNCTIONS,
    GO_METHODS,
    INVALID,
    Duration,
    Ints,
    KeyTree,
    KVPair,
    KVPairs,
    Location,
    Month,
    Strings,
    Time,
    sprint,
    sprintf,
    store_functions,
)


def call(name: str, *arguments: Any) -> Any:
    return FUNCTIONS[name].call(*arguments)


@pytest.mark.parametrize(("name", "arguments", "result"), [
    ("html", ("<a href='x'>\"&\0", 1, None), "&lt;a href=&#39;x&#39;&gt;&#34;&amp;\ufffd1&lt;no value&gt;"),
    ("html", (INVALID,), "&lt;no value&gt;"),
    ("js", ("it's <\"\\ é\u2028\n",), "it\\'s \\u003C\\\"\\\\ é\\u2028\\u000A"),
    ("urlquery", ("a b&é~/", 1), "a+b%26%C3%A9~%2F1"),
    ("base", ("",), "."), ("base", ("/",), "/"), ("base", ("/a/b/",), "b"), ("base", ("a",), "a"),
    ("dir", ("",), "."), ("dir", ("/",), "/"), ("dir", ("/a/b/",), "/a/b"), ("dir", ("a/../../b/c",), "../b"),
    ("split", ("a,b,", ","), ["a", "b", ""]), ("split", ("", ","), [""]), ("split", ("é1", ""), ["é", "1"]),
    ("join", (Strings(["a", "b"]), "-"), "a-b"),
    ("replace", ("aaa", "a", "b", 2), "bba"), ("replace", ("aaa", "a", "b", -5), "bbb"),
    ("replace", ("ab", "", "-", -1), "-a-b-"),
    ("toUpper", ("straße ǆ ᾳ ﬁ",), "STRAßE Ǆ ᾼ ﬁ"), ("toLower", ("ÀİΑΣ",), "àiασ"),
    ("contains", ("abc", "bc"), True), ("trimSuffix", ("a.b.b", ".b"), "a.b"), ("trimPrefix", ("aab", "a"), "ab"),
    ("hasSuffix", ("abc", "bc"), True),
    ("map", ("a", 1, "b", "x"), {"a": 1, "b": "x"}), ("dict", (), {}),
    ("base64Encode", ("hé",), "aMOp"), ("base64Decode", ("aM\nOp",), "hé"), ("base64Decode", ("/w==",), "\udcff"),
    ("parseBool", ("T",), True), ("parseBool", ("0",), False), ("atoi", ("-0042",), -42), ("atoi", ("+7",), 7),
    ("reverse", (Strings(["a", "b"]),), ["b", "a"]), ("reverse", ("ab",), "ab"),
    ("reverse", (KVPairs([KVPair("a", "1"), KVPair("b", "2")]),), [KVPair("b", "2"), KVPair("a", "1")]),
    ("replace", ("é\udcc3", "\udcc3", "x", -1), "x\udca9x"), ("replace", ("\udcc3\udca9é", "é", "", -1), ""),
    ("split", ("aéb", "\udca9"), ["a\udcc3", "b"]), ("split", ("\udcc3\udca9b", ""), ["é", "b"]),
    ("contains", ("é", "\udca9"), True), ("trimSuffix", ("é", "\udca9"), "\udcc3"),
    ("hasSuffix", ("é", "\udca9"), True),
    ("trimPrefix", ("é", "\udcc3"), "\udca9"),
    ("sortByLength", (Strings(["ccc", "é", "aa", "b"]),), ["b", "é", "aa", "ccc"]),
    ("sortKVByLength", (KVPairs([KVPair("/aa", "1"), KVPair("/b", "2")]),), [KVPair("/b", "2"), KVPair("/aa", "1")]),
    ("add", (2**63 - 1, 1), -2**63), ("sub", (-2**63, 1), 2**63 - 1), ("mul", (2**62, 4), 0),
    ("div", (-7, 2), -3), ("div", (7, -2), -3), ("div", (-2**63, -1), -2**63), ("mod", (-7, 2), -1),
    ("mod", (7, -2), 1),
    ("seq", (2, 4), [2, 3, 4]), ("seq", (3, 1), []),
    ("default", ("d", ""), "d"), ("default", ("d", INVALID), "d"), ("default", ("d", 0.0), "d"),
    ("default", ("d", "x"), "x"),
    ("ternary", (1, 2, True), 1), ("ternary", (1, 2, False), 2),
    ("coalesce", ("", None, 0, "x", "y"), "x"), ("coalesce", ("", []), None),
    ("empty", ({},), True), ("empty", (False,), True), ("empty", (KVPair("", ""),), False),
    ("empty", (Month(0),), True),
    ("indent", (2, "a\nb\n"), "  a\n  b\n  "), ("indent", (2, ""), ""), ("indent", (-1, "a"), "a"),
    ("nindent", (2, "a"), "\n  a"), ("nindent", (2, ""), "\n"),
    ("quote", ('a"b\n',), '"a\\"b\\n"'), ("squote", ("it's",), "'it''s'"),
    ("repeat", (3, "ab"), "ababab"), ("nospace", (" a\tb\u2003c\x1f\n",), "abc\x1f"),
    ("snakecase", ("HTTPServer fooBar-baz_2",), "http_server_foo_bar_baz_2"),
    ("kebabcase", ("fooBarBAZ",), "foo-bar-baz"),
    ("camelcase", ("HTTPServer foo_bar",), "httpServerFooBar"), ("camelcase", ("",), ""),
    ("list", (1, "x", None), [1, "x", None]), ("append", ([1], 2), [1, 2]),
    ("hasKey", ({"a": None}, "a"), True), ("keys", ({"é": 1, "b": 2, "a": 3},), ["a", "b", "é"]),
    ("values", ({"b": 2, "a": 3},), [3, 2]), ("pluck", ("a", {"a": 1}, {}, {"a": 2}), [1, 2]),
    ("sha256sum", ("",), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
    ("regexMatch", (r"^\d+$", "123\n"), False), ("regexMatch", ("", "x"), True),
    ("regexMatch", (r"(?i)É\z", "caf\u00e9"), True),
    ("regexFind", (r"\d+", "ab12c3"), "12"), ("regexFind", ("x", "ab"), ""),
    ("regexReplaceAll", (r"(?P<user>\w+)@(\w+)", "a@b, c@d", "$2 ${user} $1x $$"), "b a  $, d c  $"),
    ("regexReplaceAll", ("x*", "abxd", "-"), "-a-b-d-"), ("regexReplaceAll", ("(?m)^", "a\nb", "> "), "> a\n> b"),
    ("regexReplaceAll", ("|a", "a", "-"), "-a-"), ("regexMatch", ("[[:alpha:]&&x]", "]"), False),
])
def test_functions_give_what_confds_give(name: str, arguments: tuple[Any, ...], result: Any) -> None:
    ours = call(name, *arguments)
    assert ours == result
    assert FUNCTIONS[name].returns in ("any", etcdinit.go_type(ours))


@pytest.mark.parametrize(("name", "arguments", "message"), [
    ("div", (1, 0), "runtime error: integer divide by zero"), ("mod", (1, 0), "runtime error: integer divide by zero"),
    ("map", ("a",), "invalid map call"), ("map", (1, 2), "map keys must be strings"),
    ("parseBool", ("yes",), 'strconv.ParseBool: parsing "yes": invalid syntax'),
    ("atoi", ("x\n",), 'strconv.Atoi: parsing "x\\n": invalid syntax'),
    ("atoi", ("",), 'strconv.Atoi: parsing "": invalid syntax'),
    ("atoi", ("9223372036854775808",), 'strconv.Atoi: parsing "9223372036854775808": value out of range'),
    ("atoi", ("٣",), 'strconv.Atoi: parsing "٣": invalid syntax'),
    ("atoi", ("1_0",), 'strconv.Atoi: parsing "1_0": invalid syntax'),
    ("base64Decode", ("a!",), "illegal base64 data at input byte 1"),
    ("base64Decode", ("aMO",), "illegal base64 data at input byte 0"),
    ("repeat", (-1, "a"), "strings: negative Repeat count"),
    ("repeat", (1 << 40, "a"), "strings: Repeat output length overflow"),
    ("indent", (1 << 40, "a"), "strings: Repeat output length overflow"),
    ("indent", (1 << 20, "\n" * 1000), "strings: Repeat output length overflow"),
    ("seq", (0, 1 << 40), "more than 1048576 numbers"),
    ("json", ("",), "unexpected end of JSON input"),
    ("json", ('{"a":1} x',), "invalid character 'x' after top-level value"),
    ("json", ("[]",), "json: cannot unmarshal array into Go value of type map[string]interface {}"),
    ("jsonArray", ('"x"',), "json: cannot unmarshal string into Go value of type []interface {}"),
    ("fromJson", ("NaN",), "invalid character 'N' looking for beginning of value"),
    ("fromJson", ("[Infinity]",), "invalid character 'I' looking for beginning of value"),
    ("fromJson", ("-Infinity",), "invalid character 'I' in numeric literal"),
    ("fromJson", ("1e400",), "json: cannot unmarshal number 1e400 into Go value of type float64"),
    ("fromJson", ("[" * 10_001,), "exceeded max depth"), ("fromJson", ('"\n"',), "invalid character '\\n' in string"),
    ("toJson", (float("nan"),), "json: unsupported value: NaN"),
    ("toJson", ([1j],), "json: unsupported type: complex128"),
    ("regexMatch", ("(?=a)", ""), "error parsing regexp: invalid or unsupported Perl syntax: `(?=`"),
    ("regexMatch", ("(?<!a)", ""), "error parsing regexp: invalid named capture: `(?<!a)`"),
    ("regexMatch", (r"(a)\1", ""), r"error parsing regexp: invalid escape sequence: `\1`"),
    ("regexMatch", ("[a", ""), "error parsing regexp: missing closing ]: `[a`"),
    ("regexMatch", ("a**", ""), "error parsing regexp: invalid nested repetition operator: `**`"),
    ("regexMatch", ("(" * 5000 + ")" * 5000, ""), None),
])
def test_failures_are_told_in_gos_words(name: str, arguments: tuple[Any, ...], message: str | None) -> None:
    with pytest.raises(ValueError) as failure:
        call(name, *arguments)
    if message:
        assert str(failure.value) == message


@pytest.mark.parametrize(("text", "value"), [
    (' {"a" : [1, 2.5, -0, true, null, "x"]}\n', {"a": [1.0, 2.5, -0.0, True, None, "x"]}),
    ('{"a": 1, "a": {"b": 2}}', {"a": {"b": 2.0}}),
    ('"\\ud83d\\ude00\\ud800 \\/\\u00e9"', "😀� /é"), ('"\udcff\\udcff"', "��"),
    ("12345678901234567890", 12345678901234567890.0),
])
def test_json_reads_as_go_does(text: str, value: Any) -> None:
    read = call("fromJson", text)
    assert sprintf("%#v", read) == sprintf("%#v", value)


def test_deep_json_is_read_and_written_up_to_gos_limit() -> None:
    text = '{"a":' * 9_999 + "[]" + "}" * 9_999
    assert call("toJson", call("json", text)) == text


def test_null_is_an_empty_map_or_list() -> None:
    assert call("json", "null") == {}
    assert call("jsonArray", "null") == []
    assert call("fromJson", "null") is None


def test_json_is_written_as_go_does() -> None:
    value = {"b": [1.0, 1e21, 1e20, 1e-7, -0.0, 3], "a": "<&>\u2028\n\x01\x7f\udcff\"", "c": {}, "d": Strings(["x"]),
             "e": None, "f": KVPair("k", "v"), "g": Time(0, 5), "h": True}
    assert call("toJson", value) == (
        '{"a":"\\u003c\\u0026\\u003e\\u2028\\n\\u0001\x7f�\\"","b":[1,1e+21,100000000000000000000,1e-7,-0,3],"c":{},'
        '"d":["x"],"e":null,"f":{"Key":"k","Value":"v"},"g":"1970-01-01T00:00:00.000000005Z","h":true}')
    assert call("toPrettyJson", {"a": [1, {}], "b": []}) == '{\n  "a": [\n    1,\n    {}\n  ],\n  "b": []\n}'


# ---- time, files, environment, network ----------------------------------------------------------------

def test_datetime_has_gos_methods_and_prints_with_the_monotonic_clock() -> None:
    before = time.time_ns()
    moment = call("datetime")
    assert before <= GO_METHODS[Time]["UnixNano"].call(moment) <= time.time_ns()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d+)? [-+]\d{4} \S+ m=\+\d+\.\d{9}", sprint(moment))
    assert etcdinit.Template("{{datetime.UTC.Format `-07:00`}}").render(None) == "+00:00"


def test_local_time_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "EST5EDT,M3.2.0,M11.1.0")
    time.tzset()
    try:
        moment = Time(1_710_054_000, 0, etcdinit.LOCAL)  # an hour after clocks went forward
        assert sprint(moment) == "2024-03-10 03:00:00 -0400 EDT"
        earlier = GO_METHODS[Time]["AddDate"].call(moment, 0, 0, -1)
        assert sprint(earlier) == "2024-03-09 03:00:00 -0500 EST"
    finally:
        monkeypatch.undo()
        time.tzset()


def test_getenv_takes_the_default_for_what_is_unset_or_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETCDINIT_T", "x")
    monkeypatch.setenv("ETCDINIT_E", "")
    assert [call("getenv", "ETCDINIT_T", "d"), call("getenv", "ETCDINIT_E", "d"), call("getenv", "ETCDINIT_E"),
            call("getenv", "ETCDINIT_NOT", "d")] == ["x", "d", "", "d"]


def test_file_exists_unless_it_surely_does_not(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert call("fileExists", str(tmp_path / "file")) is True
    assert call("fileExists", str(tmp_path)) is True
    assert call("fileExists", str(tmp_path / "file" / "below")) is True  # not ENOENT: confd says so too
    assert call("fileExists", str(tmp_path / "nothing")) is False
    assert call("fileExists", "a\0b") is False


def test_addresses_and_interfaces_of_this_machine() -> None:
    assert call("lookupIP", "127.0.0.1") == ["127.0.0.1"]
    assert call("lookupIPV4", "::1") == [] and call("lookupIPV6", "::1") == ["::1"]
    assert call("lookupIP", "no such host.invalid") == []
    assert call("lookupIfaceIPV4", "lo") == "127.0.0.1"
    assert call("lookupIfaceIPV4", "no-such-interface-here") == call("lookupIfaceIPV6", "none0") == ""
    if Path("/proc/net/if_inet6").exists():
        assert call("lookupIfaceIPV6", "lo") in ("::1", "")
    assert call("hostname") == socket.gethostname()


def test_services_and_hosts_are_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with dns_servers.dnsmasq(tmp_path) as (address, port):
        (tmp_path / "resolv.conf").write_text(f"nameserver [{address}]:{port}\n")
        monkeypatch.setenv("ETCDINIT_RESOLV_CONF", str(tmp_path / "resolv.conf"))
        records = call("lookupSRV", "etcd-client", "tcp", "example.org")
        assert [(r.Target, r.Port, r.Priority, r.Weight) for r in records] == [
            ("etcd1.example.org.", 2379, 0, 10), ("etcd2.example.org.", 2379, 0, 20),
            ("etcd3.example.org.", 2379, 10, 0)]
        assert call("lookupSRV", "", "", "_etcd-client._tcp.example.org")[0].Target == "etcd1.example.org."
        assert call("lookupSRV", "none", "tcp", "example.org") == call("lookupSRV", "no", "tcp", "example.org") == []
        assert call("lookupIP", "etcd1.example.org") == ["127.0.0.1", "::1"]


# ---- the store ----------------------------------------------------------------------------------------

KEYS = {"/b/y": "by", "/b/y/z": "byz", "/b/x": "bx", "/a": "1", "/empty": "", "/c/é": "2", "/dir/deep/leaf": "by"}


@pytest.fixture(params=[dict, KeyTree])
def store(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Calls a store function over KEYS, as a plain mapping and as a KeyTree."""
    keys = request.param(KEYS)
    return lambda name, *arguments, compat=True: store_functions(keys, compat)[name].call(*arguments)


def test_keys_are_read(store: Callable[..., Any]) -> None:
    assert store("exists", "/a") is True and store("exists", "/dir") is False
    assert sprintf("%+v", store("get", "/a")) == "{Key:/a Value:1}"
    assert store("getv", "/a") == "1" and store("getv", "/empty", "d") == ""
    assert store("getv", "/none", "d", "e") == "d" and store("getv", "/none", "") == ""
    for name in ("get", "getv"):
        with pytest.raises(ValueError, match="^key does not exist: /none$"):
            store(name, "/none")


def test_keys_are_matched(store: Callable[..., Any]) -> None:
    assert sprint(store("gets", "/b/*")) == "[{/b/x bx} {/b/y by}]"
    assert store("gets", "/none/*") == []
    assert store("getvs", "/*/*") == ["2", "bx", "by"]
    assert store("getvs", "/*/*/*") == ["by", "byz"]
    with pytest.raises(ValueError, match="^syntax error in pattern$"):
        store("gets", "[]a]")


def test_directories_are_listed(store: Callable[..., Any]) -> None:
    assert store("ls", "/b") == store("ls", "/b/") == ["x", "y"]
    assert store("ls", "/b/y") == ["y", "z"]  # a key that is also a directory shows itself
    assert store("ls", "/a") == ["a"]
    assert store("ls", "/none") == store("ls", "") == store("ls", "b") == []
    assert store("lsdir", "/b") == ["y"] and store("lsdir", "/dir/") == ["deep"] and store("lsdir", "b") == []


def test_the_quirks_of_confd_are_kept_on_request_only(store: Callable[..., Any]) -> None:
    assert store("ls", "/") == ["a", "empty"] and store("lsdir", "/") == []
    assert store("ls", "/", compat=False) == ["a", "b", "c", "dir", "empty"]
    assert store("lsdir", "/", compat=False) == ["b", "c", "dir"]
    pairs = store("gets", "/b/*")
    assert store("reverse", pairs) is pairs and pairs[0].Key == "/b/x"
    assert call("reverse", pairs)[0].Key == "/b/y"
    names = store("ls", "/b")
    assert store("reverse", names) is names and names == ["y", "x"]
    assert "reverse" not in store_functions(KEYS, compat=False)


def test_an_empty_store_takes_any_pattern() -> None:
    assert store_functions({})["gets"].call("[]a]") == []


# ---- against real Go ----------------------------------------------------------------------------------

TEXTS = ["", "a", "héllo", "日本語", "a\tb\n", '"q"', "\\", "\x00\x7f", "\udcff\udce6", "\u200b\u2028", "😀", "<b>&",
         "ß İ ŉ ﬁ ᾳ Σ", "\x1f\x85\xa0"]
FLOATS = [0.0, -0.0, 1.0, -1.5, 1e6, 1e20, 1e21, 1.5e21, 1e-4, 1e-6, 9.99e-7, 1e-7, 1.234e-17, 5e-324,
          1.7976931348623157e308, 123456789012345680000.0, 1e23]
PATTERN_PARTS = [
    "a", "b", "k", "K", "ſ", "é", "x", "1", "_", " ", "\n", ".", "*", "+", "?", "|", "(", ")", "(?:", "(?i)", "(?i:",
    "(?s)", "(?m)", "(?U)", "(?P<n>", "(?<m>", "[", "]", "[^", "-", "\\d", "\\D", "\\w", "\\W", "\\s", "\\S", "\\b",
    "\\B", "\\A", "\\z", "^", "$", "{2}", "{1,}", "{0,2}", "{", "}", ",", "[a-c]", "[^a]", "[[:alpha:]]",
    "[[:^digit:]]", "\\.", "\\n", "\\x41", "\\x{e9}", "\\101", "\\Q", "\\E", "\\", "[\\d-]", "[a\\]b]", "(?=", "??",
    "*?", "=", "!", "<", ">", "/"]
LAYOUTS = [
    "Jan", "January", "1", "01", "_2", "2", "02", "002", "__2", "_2006", "2006", "06", "15", "3", "03", "4", "04", "5",
    "05", "PM", "pm", "Mon", "Monday", "MST", "-0700", "-07:00", "-07", "Z07:00", "Z0700", "Z07", "-07:00:00",
    "Z070000", ".000", ".999", ",0", ".9999999999", ".00", "x", "T", " ", "_", "0", "7", "Janu", "MonD", "Mond",
    ".0001", "07", "20061"]


class Zone(Location):
    """A zone with a fixed offset."""

    __slots__ = ("offset",)

    def __init__(self, name: str, offset: int) -> None:
        super().__init__(name)
        self.offset = offset

    def zone(self, seconds: int) -> tuple[str, int]:
        return self.name, self.offset


class Maker:
    """Random questions and how we answer them, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.one_of = self.random.choice

    def text(self, parts: list[str], most: int) -> str:
        return "".join(self.random.choices(parts, k=self.random.randrange(most + 1)))

    def value(self, depth: int = 0) -> Any:
        if depth > 3 or self.random.random() < 0.6:
            return self.one_of([self.one_of(TEXTS), self.one_of(FLOATS), self.one_of([
                None, True, False, 1, -5, Month(3), Duration(5), KVPair("k", "<"), KVPairs(), Strings(["a"]),
                Ints([1, 2]), KVPairs([KVPair("a", "é")]), float("nan"), 1j])])
        items = [self.value(depth + 1) for _ in range(self.random.randrange(4))]
        return items if self.random.random() < 0.5 else {self.one_of(TEXTS): item for item in items}

    def json(self) -> str:
        """JSON, mostly with something wrong."""
        while True:
            try:
                text = list(call("toJson", self.value()))
                break
            except ValueError:
                pass
        for _ in range(self.one_of([0, 0, 1, 1, 2])):
            at = self.random.randrange(len(text) + 1)
            part = self.one_of([*'{}[],:"\\ue1209.-+tnfE x', "\\ud83d", "\\ude00", "\\u00e9", "\\n", "1e400", "\udcff",
                                "é", "\n", "\x01", "true", "NaN", "0", ""])
            text[at:at + self.random.randrange(2)] = [part]
        return "".join(text)[:None if self.random.random() < 0.9 else self.random.randrange(20)]

    def function(self) -> tuple[Any, ...]:
        kind = self.random.randrange(9)
        if kind < 3:
            return self.one_of(["json", "jsonArray", "fromJson", "fromJson"]), self.json()
        if kind < 5:
            return self.one_of(["toJson", "toPrettyJson"]), self.value()
        if kind < 8:
            name = self.one_of(["regexMatch", "regexFind", "regexReplaceAll"])
            subject = self.text([*"abkK\u212aſéÉ1_ \nxA-."], 7)
            replacement = self.one_of(["-", "$1", "${1}x", "$n", "${n}", "$$", "$", "$1x", "$0", "[$2]", "${", "$ "])
            return name, self.text(PATTERN_PARTS, 6), subject, *[replacement][name != "regexReplaceAll":]
        return self.one_of([
            ("base64Decode", self.text([*"aMOp=\n/+é-1"], 9)), ("base", self.text(["a", "b", "/", "/", "..", "."], 7)),
            ("atoi", self.text(["1", "9", "0", "-", "+", "x", "9999999999", "92233720368547758"], 4)),
            ("dir", self.text(["a", "b", "/", "/", "..", "."], 7)),
            ("parseBool", self.text(["t", "T", "rue", "1", "F"], 2)),
            *[(name, self.one_of(TEXTS)) for name in ("base64Encode", "sha256sum", "toUpper", "toLower")]])

    def time(self) -> tuple[Any, ...]:
        seconds = self.one_of([0, 1, -1, 1700000000, -62135596800, 253402300800, 951782400,
                               self.random.randrange(-10**11, 10**11)])
        zone = self.one_of([("UTC", 0), ("CET", 3600), ("X", -12600), ("NST", -9000), ("Y", 20705)])
        method = self.one_of([
            ("Format", self.text(LAYOUTS, 6)), ("String",), ("GoString",), ("Unix",), ("UnixNano",), ("UnixMilli",),
            ("Month",), ("Weekday",), ("YearDay",), ("Year",), ("Day",), ("Hour",), ("Nanosecond",), ("IsZero",),
            ("AddDate", self.random.randrange(-30, 30), self.random.randrange(-30, 30),
             self.random.randrange(-400, 400)),
            ("Add", Duration(self.random.randrange(-10**15, 10**15))),
            (self.one_of(["Truncate", "Round"]), Duration(self.one_of([0, 1, 7, 3600, 86400]) * 10**9))])
        return "time", seconds, self.one_of([0, 1, 999999999, 120000000, self.random.randrange(10**9)]), *zone, *method

    def duration(self) -> tuple[Any, ...]:
        length = self.one_of([0, 1, -1, 999, 1000, 1500, 10**6, 15 * 10**5, 10**9, 61 * 10**9, 2**63 - 1, -2**63,
                              self.random.randrange(-10**13, 10**13)])
        method = self.one_of(["String", "Hours", "Minutes", "Seconds", "Milliseconds", "Nanoseconds"])
        return "duration", Duration(length), method


def answered(name: str, *arguments: Any) -> tuple[str, str]:
    """Our answer in the form of the Go program's."""
    try:
        if name == "time":
            seconds, nanoseconds, zone, offset, method, *rest = arguments
            place = etcdinit.UTC if zone == "UTC" else Zone(zone, offset)
            result = GO_METHODS[Time][method].call(Time(seconds, nanoseconds, place), *rest)
        elif name == "duration":
            result = GO_METHODS[Duration][arguments[1]].call(arguments[0])
        else:
            return sprintf("%#v" if "json" in name or name == "fromJson" else "%v", call(name, *arguments)), ""
        return sprintf("%v %T", result, result), ""
    except ValueError as refused:
        return "", str(refused)


@pytest.mark.parametrize("kind", ["function", "time", "duration"])
def test_random_calls_are_answered_as_by_real_go(kind: str, go_values: GoValues) -> None:
    maker = Maker(3)
    questions = [getattr(maker, kind)() for _ in range(8000 if kind == "function" else 3000)]
    different = []
    for question, (text, error) in zip(questions, go_values.ask(questions), strict=True):
        if text in ("map[string]interface {}(nil)", "[]interface {}(nil)"):
            text = text.replace("(nil)", "{}")  # we have no nil maps and slices
        if answered(*question) != (text, error):
            different.append((question, answered(*question), text, error))
    assert different == []
