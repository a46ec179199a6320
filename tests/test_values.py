"""The values of Go and their texts: fmt and strconv, against a table of right answers and against real Go."""

from __future__ import annotations

import random
from typing import Any

import pytest
from support.go_values import GoValues

import etcdinit
from etcdinit import (
    INVALID,
    Duration,
    Func,
    Int64,
    Ints,
    KVPair,
    KVPairs,
    Month,
    Strings,
    Uint8,
    Uint16,
    Weekday,
    format_float,
    go_type,
    print_value,
    quote,
    sprint,
    sprintf,
    sprintln,
    unquote,
)

PAIR = KVPair("/a", "1")


@pytest.mark.parametrize(("value", "name"), [
    (None, "<nil>"), (True, "bool"), (1, "int"), (1.0, "float64"), (1j, "complex128"), ("", "string"),
    ({}, "map[string]interface {}"), ([], "[]interface {}"), (Strings(), "[]string"), (Ints(), "[]int"),
    (Uint8(1), "uint8"), (Uint16(1), "uint16"), (Int64(1), "int64"), (PAIR, "main.KVPair"), (KVPairs(), "main.KVPairs"),
    (etcdinit.SRV("a.", 1, 2, 3), "*net.SRV"), (etcdinit.SRVs(), "[]*net.SRV"), (Duration(1), "time.Duration"),
    (Month(1), "time.Month"), (etcdinit.Time(0, 0), "time.Time"), (etcdinit.UTC, "*time.Location"),
    (Func("f", len, ("string", "any"), True, "int"), "func(string, ...interface {}) int"),
    (object(), "main.Opaque"), (type("Text", (str,), {})("x"), "string"),
])
def test_every_value_has_a_go_type(value: object, name: str) -> None:
    assert go_type(value) == name
    assert sprintf("%T", value) == name


PRINTED: list[tuple[tuple[Any, ...], str]] = [
    (("%d|%5d|%-5d|%05d|%+d|% d|%x|%X|%#x|%o|%O|%b|%c|%q|%U", 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42, 42,
      42),
     "42|   42|42   |00042|+42| 42|2a|2A|0x2a|52|0o52|101010|*|'*'|U+002A"),
    (("%#U %#q %+q %q", 0x1F600, "a`b", "é", 0xD800), "U+1F600 '😀' \"a`b\" \"\\u00e9\" '�'"),
    (("%f|%.2f|%8.3f|%-8.1f|%+.1e|%g|%G|%x|%08.3f", 3.14159, 3.14159, 3.14159, 3.14159, 31415.9, 1e21, 1e-7, 1.0,
      -3.14159),
     "3.141590|3.14|   3.142|3.1     |+3.1e+04|1e+21|1E-07|0x1p+00|-003.142"),
    (("%s|%10s|%-10s|%.2s|%q|%x|% X|%#x", "héllo", "héllo", "héllo", "héllo", "a\tb", "hé", "hé", "hé"),
     'héllo|     héllo|héllo     |hé|"a\\tb"|68c3a9|68 C3 A9|0x68c3a9'),
    (("%v %+v %#v", PAIR, PAIR, PAIR), '{/a 1} {Key:/a Value:1} main.KVPair{Key:"/a", Value:"1"}'),
    (("%v %d %s %q %.1f", [1, "x", None], [1, "x"], Strings("ab"), Strings("ab"), [1.0, 2.55]),
     "[1 x <nil>] [1 %!d(string=x)] [a b] [\"a\" \"b\"] [1.0 2.5]"),
    (("%v %#v", {"b": 1.0, "a": None}, {"b": [], "a": None}),
     'map[a:<nil> b:1] map[string]interface {}{"a":interface {}(nil), "b":[]interface {}{}}'),
    (("%t %v %5t", True, False, True), "true false  true"),
    (("%v %.1f", 1 + 2j, 1.55 - 2j), "(1+2i) (1.6-2.0i)"),
    (("%v %s %d %q", Duration(1_500_000_000), Month(5), Month(5), Weekday(0)), '1.5s May 5 "Sunday"'),
    (("%d%%",), "%!d(MISSING)%"),
    (("%d", "x"), "%!d(string=x)"),
    (("%s %d", None, INVALID), "%!s(<nil>) %!d(<nil>)"),
    (("%z %!", 1, 2), "%!z(int=1) %!!(int=2)"),
    (("%d", 1, "x", None), "1%!(EXTRA string=x, <nil>)"),
    (("%", ), "%!(NOVERB)"),
    (("%[2]d %[1]d", 1, 2), "2 1"),
    (("%[3]d %[x]d %[2]*.[1]*f", 1, 2), "%!d(BADINDEX) %!d(BADINDEX) %!f(int= 2)"),
    (("%*d|%-*d|%.*f", 5, 42, 4, 7, 2, 3.14159), "   42|7   |3.14"),
    (("%*d %.*d", "x", 1, -1, 2), "%!(BADWIDTH)1 %!(BADPREC)2"),
    (("%05d", 8080.0), "%!d(float64=08080)"),
    (("%s|%v|%d", "\udcff", Uint8(200), Uint16(8080)), "\udcff|200|8080"),
    (("%3c|%-3q|%#v %#v", 65, 66, Uint8(10), 10), "  A|'B'|0xa 10"),
    (("%p", 5), "%!p(int=5)"),
    (("%6.2f%%|%+v|%x", 12.5, 8.0, -255), " 12.50%|8|-ff"),
]


@pytest.mark.parametrize(("arguments", "text"), PRINTED)
def test_printf_prints_as_go(arguments: tuple[Any, ...], text: str) -> None:
    assert sprintf(*arguments) == text


@pytest.mark.parametrize(("number", "text"), [
    (0.0, "0"), (-0.0, "-0"), (1.0, "1"), (100000.0, "100000"), (999999.0, "999999"), (1e6, "1e+06"),
    (0.0001, "0.0001"),
    (0.00001, "1e-05"), (123456789.0, "1.23456789e+08"), (1e21, "1e+21"), (5e-324, "5e-324"), (float("inf"), "+Inf"),
    (float("-inf"), "-Inf"), (float("nan"), "NaN"),
])
def test_floats_print_as_short_as_they_can(number: float, text: str) -> None:
    assert format_float(number) == sprint(number) == sprintf("%v", number) == print_value(number) == text


def test_print_puts_spaces_only_between_operands_that_are_no_strings() -> None:
    assert sprint("a", 1, 2, "b", None, None) == "a1 2b<nil> <nil>"
    assert sprintln("a", 1, None) == "a 1 <nil>\n"
    assert sprint() == ""
    assert sprintln() == "\n"


def test_a_value_alone_prints_its_target_or_no_value() -> None:
    record = etcdinit.SRV("a.example.", 80, 1, 2)
    assert [print_value(value) for value in (None, INVALID, "", [None], record)] == [
        "<no value>", "<no value>", "", "[<nil>]", "{a.example. 80 1 2}"]
    assert sprint(record) == "&{a.example. 80 1 2}"


def test_width_counts_runes_even_of_bytes_that_came_together_late() -> None:
    late = "\udce6\udc97" + "\udca5"  # the three bytes of one character
    assert sprintf("%3s|%q", late, late) == "  日|\"日\""


@pytest.mark.parametrize(("text", "literal"), [
    ("", '""'), ("a\"b\\", '"a\\"b\\\\"'), ("\a\b\f\n\r\t\v\0\x7f", '"\\a\\b\\f\\n\\r\\t\\v\\x00\\x7f"'),
    ("é日😀", '"é日😀"'),
    ("\u200b\xad\U000e0001", '"\\u200b\\u00ad\\U000e0001"'), ("\udcff", '"\\xff"'),
])
def test_quoted_strings_read_back(text: str, literal: str) -> None:
    assert quote(text) == literal
    assert unquote(literal) == text
    assert unquote(quote(text, ascii_only=True)) == text


@pytest.mark.parametrize(("literal", "text"), [
    ("`a\\n\r\nb`", "a\\n\nb"), ("'x'", "x"), (r"'\''", "'"), (r'"\101\x41A\U00000041"', "AAAA"),
    (r'"\xe6\x97\xa5"', "日"),
    ('"\udcff"', "�"),
])
def test_unquote_reads_all_three_kinds_of_literals(literal: str, text: str) -> None:
    assert unquote(literal) == text


@pytest.mark.parametrize("literal", [
    "", '"', "x", '"a', "'ab'", '"\\\'"', "'\\\"'", '"a"b"', '"\n"', r'"\x4"', r'"\400"', r'"\08"', r'"\ud800"',
    r'"\U00110000"',
    r'"\q"', '"\\"', "`a`b`", '"a\'',
])
def test_unquote_refuses_what_is_no_literal(literal: str) -> None:
    with pytest.raises(ValueError, match="^invalid syntax$"):
        unquote(literal)


def test_deep_values_print_without_end_of_pythons_stack() -> None:
    value: list[Any] = []
    for _ in range(20_000):
        value = [value]
    assert sprint(value) == "[" * 20_001 + "]" * 20_001
    assert len(sprintf("%#v", value)) > 20_000


def test_nothing_of_python_shows_in_a_text() -> None:
    class Secret:
        password = "hunter2"

    assert sprintf("%v %+v %#v %s", Secret(), [Secret()], Secret(), Secret) == "{} [{}] main.Opaque{} {}"


@pytest.mark.parametrize(("layout", "text"), [
    ("2006-01-02 15:04:05", "2024-02-09 16:05:07"), ("Mon Jan _2 3:04PM 06", "Fri Feb  9 4:05PM 24"),
    ("Monday, 2 January", "Friday, 9 February"), (".000 .999999999 ,9", ".012 .012 ,0"),
    ("MST -0700 Z07:00", "UTC +0000 Z"),
    ("002 __2 pm 03", "040  40 pm 04"), ("Janus Mont 20060102", "Janus Mont 20240209"), ("no parts", "no parts"),
])
def test_layouts_are_gos(layout: str, text: str) -> None:
    assert etcdinit.format_time(etcdinit.Time(1707494707, 12_000_000), layout) == text.replace(" ,0", " ")


# ---- against real Go ----------------------------------------------------------------------------------

TEXTS = ["", "a", "héllo", "日本語", "a\tb\n", "`", '"q"', "\\", "\x00\x7f", "\udcff\udce6", "\u200b\u2028", "😀",
         "\ufeff", "%d"]
NUMBERS = [0, 1, -1, 42, 255, -255, 65, 0x1F600, 0xD800, 0x110000, 2**63 - 1, -2**63, 1000000, 39, 10, 0xE9, 0xFFFD]
FLOATS = [0.0, -0.0, 1.0, -1.5, 3.14159, 1e6, 1e5, 123456789.0, 1e20, 1e21, 1e-4, 1e-5, 2.5, 0.1, 1 / 3, 5e-324, 100.0,
          1e100,
          1.7976931348623157e308, float("inf"), float("-inf"), float("nan"), 999999.5, 8080.0, 2.0**60]
TYPED = [Uint8(200), Uint16(8080), Int64(-7), Duration(1500000000), Duration(0), Month(5), Month(13), Weekday(0),
         Weekday(-1),
         True, False, None, None, PAIR, KVPair("", "\n")]


class Maker:
    """Random values, formats and calls, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.one_of = self.random.choice

    def some(self, make: Any, most: int) -> list[Any]:
        return [make() for _ in range(self.random.randrange(most + 1))]

    def text(self) -> str:
        return self.one_of(TEXTS)

    def scalar(self) -> Any:
        number = self.random.uniform(-1, 1) * 10 ** self.random.randrange(-10, 25)
        return self.one_of([self.text(), self.text(), self.one_of(NUMBERS), self.one_of(FLOATS), number,
                            self.one_of(TYPED),
                            complex(self.one_of(FLOATS), self.one_of(FLOATS))])

    def value(self, depth: int = 0) -> Any:
        if depth > 2 or self.random.random() < 0.6:
            return self.scalar()
        return self.one_of([
            lambda: self.some(lambda: self.value(depth + 1), 3),
            lambda: {self.text(): self.value(depth + 1) for _ in range(self.random.randrange(4))},
            lambda: Strings(self.some(self.text, 3)),
            lambda: Ints(self.some(lambda: self.one_of(NUMBERS), 3)),
            lambda: KVPairs(self.some(lambda: KVPair(self.text(), self.text()), 2)),
        ])()

    def directive(self) -> str:
        def maybe(share: float, *parts: str) -> str:
            return self.one_of(parts) if self.random.random() < share else ""

        flags = "".join(self.some(lambda: self.one_of("+-# 0"), 2)) if self.random.random() < 0.4 else ""
        index = maybe(0.08, "[1]", "[2]", "[3]", "[0]", "[x]", "[9]", "[", "[]", "[-1]", "[1", "[10000000]")
        width = maybe(0.3, "5", "10", "1", "0", "12", "*", "*", "99999999")
        precision = maybe(0.3, ".", ".0", ".1", ".2", ".3", ".10", ".20", ".*", ".[1]*", ".-1")
        verb = maybe(0.98, *"vvvvTtdbcoqxXOUeEfFgGsszw!%é")
        return f"%{flags}{index}{width}{precision}{maybe(0.05, '[1]', '[2]')}{verb}"

    def format(self) -> str:
        def part() -> str:
            return self.directive() if self.random.random() < 0.6 else self.one_of(["", "a", "é ", " ", "\udcff", "%%"])

        return "".join([part(), *self.some(part, 2)])

    def question(self) -> tuple[Any, ...]:
        values = self.some(self.value, 3)
        return self.one_of([("sprintf", self.format(), *values)] * 8 + [
            ("sprint", *values), ("sprintln", *values), ("html", *values), ("js", *values), ("urlquery", *values),
            ("quote", self.text() + self.text())])


CALLS = {"sprintf": sprintf, "sprint": sprint, "sprintln": sprintln, "quote": quote,
         **{name: etcdinit.FUNCTIONS[name].call for name in ("html", "js", "urlquery")}}


def test_the_table_of_formats_is_gos(go_values: GoValues) -> None:
    questions = [("sprintf", *(None if a is INVALID else a for a in arguments)) for arguments, _ in PRINTED]
    answers = go_values.ask(questions)
    assert answers == [(text, "") for _, text in PRINTED]


def test_ten_thousand_random_calls_of_fmt_print_as_real_go(go_values: GoValues) -> None:
    maker = Maker(7)
    questions = [maker.question() for _ in range(10_000)]
    answers = zip(questions, go_values.ask(questions), strict=True)
    different = [(question, ours, answer) for question, (answer, error) in answers
                 if error or (ours := CALLS[question[0]](*question[1:])) != answer]
    assert different == []


def test_the_short_way_for_simple_formats_prints_as_real_go(go_values: GoValues) -> None:
    chance = random.Random(10)
    values = {"s": ["", "abc", "héllo", "\udcff"], "v": ["s", 1, -7, 1.5], "f": [0.0, -0.0, 1.5, 1e21, float("inf")],
              "d": [0, 5, -42, 10**12]}
    questions = []
    for _ in range(5000):
        verbs = chance.choices("svdxXfe", k=chance.randrange(1, 4))
        directives = ["%" + chance.choice(["", "", "-", "0", "+", " ", "-0"]) + chance.choice(["", "", "5", "12", "1"])
                      + chance.choice(["", "", ".2", "."]) + verb + chance.choice(["", "é", "%%"]) for verb in verbs]
        arguments = [chance.choice(values.get(verb, values["f" if verb == "e" else "d"])) for verb in verbs]
        questions.append(("sprintf", "".join(directives), *arguments))
    answers = zip(questions, go_values.ask(questions), strict=True)
    different = [(question, answer) for question, (answer, _) in answers if sprintf(*question[1:]) != answer]
    assert different == []


def test_random_literals_are_read_as_real_go_reads_them(go_values: GoValues) -> None:
    chance = random.Random(8)
    parts = ["a", "é", "'", '"', "`", "\\", "\\n", "\\x4", "1", "\\u00e", "9", "\\U0001f60", "0", "\\7", "7", "\n",
             "\r", "\udcff", "\\'", '\\"', "\\\\", "\\ud800"]
    literals = [mark + "".join(chance.choices(parts, k=chance.randrange(4))) + mark
                for mark in "\"'`" for _ in range(1000)]
    answers = go_values.ask([("unquote", literal) for literal in literals])
    different = []
    for literal, (answer, error) in zip(literals, answers, strict=True):
        try:
            ours = (unquote(literal), "")
        except ValueError as refused:
            ours = ("", str(refused))
        if ours != (answer, error):
            different.append((literal, ours, answer, error))
    assert different == [("''", ("", "invalid syntax"), "", "")] * literals.count("''")  # Go's one slip


def test_random_floats_are_formatted_as_real_go_formats_them(go_values: GoValues) -> None:
    chance = random.Random(9)
    questions: list[tuple[Any, ...]] = []
    for _ in range(3000):
        value = chance.choice([chance.choice(FLOATS), chance.uniform(-1, 1) * 10.0 ** chance.randrange(-320, 308)])
        questions.append(("float", value, chance.choice("eEfgGbxX"),
                          chance.choice([-1, 0, 1, 2, 3, 6, 10, 13, 17, 30])))
    different = []
    for (_, value, verb, precision), (answer, error) in zip(questions, go_values.ask(questions), strict=True):
        ours = etcdinit.format_float(value, verb, None if precision < 0 else precision)
        if error or ours != answer:
            different.append((value, verb, precision, ours, answer))
    assert different == []
