"""The template language beyond what the recorded answers and the comparison with Go show: bounds, safety, the door."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import etcdinit


def render(text: str, data: Any = None, **options: Any) -> str:
    return etcdinit.Template(text, **options).render(data)


def error_of(text: str, data: Any = None, **options: Any) -> etcdinit.TemplateError:
    with pytest.raises(etcdinit.TemplateError) as caught:
        render(text, data, **options)
    return caught.value


# ---- the door -----------------------------------------------------------------------------------------

def test_an_error_tells_its_stage_and_what_was_written_before() -> None:
    parse = error_of("a{{.b}}{{end}}")
    assert (parse.stage, parse.partial, str(parse)) == ("parse", "", "template: t:1: unexpected {{end}}")
    run = error_of("line\nab{{index .l 3}}c", {"l": [1]}, name="n.tmpl")
    assert (run.stage, run.partial) == ("exec", "line\nab")
    assert str(run) == ('template: n.tmpl:2:4: executing "n.tmpl" at <index .l 3>: '
                        'error calling index: index out of range: 3')


def test_halves_of_surrogate_pairs_which_python_reads_from_json_are_no_characters() -> None:
    data = {"s": "a\ud800", "m": {"\ud800": "x", "b": "y"}}
    assert render("{{.s}}{{len .s}}{{range .m}}{{.}}{{end}}\ud800", data) == "a\ufffd4yx\ufffd"


def test_a_template_can_be_rendered_again_and_again() -> None:
    template = etcdinit.Template("{{$x := 0}}{{range .}}{{$x = .}}{{end}}{{$x}}")
    assert [template.render([1, 2]), template.render([]), template.render([3])] == ["2", "0", "3"]


def test_a_python_function_is_called_and_its_exception_becomes_gos_error() -> None:
    def twice(text: str, times: int = 2) -> str:
        if not text:
            raise ValueError("nothing to repeat")
        return text * times

    functions = {"twice": twice, "all": lambda *values: len(values), "one": lambda value: value}
    assert render('{{twice "a"}} {{twice "a" 3}} {{"b" | twice}} {{all 1 2 3}} {{one nil}}',
                  functions=functions) == "aa aaa bb 3 <no value>"
    assert str(error_of('{{twice ""}}', functions=functions)).endswith("error calling twice: nothing to repeat")
    assert str(error_of("{{twice 1}}", functions=functions)).endswith("expected string; found 1")
    assert str(error_of("{{twice}}", functions=functions)).endswith(
        "wrong number of args for twice: want at least 1 got 0")
    assert str(error_of("{{one 1 2}}", functions=functions)).endswith("wrong number of args for one: want 1 got 2")


def test_a_function_may_take_the_name_of_a_builtin() -> None:
    assert render('{{len "abc"}}{{and 1 2}}{{break}}', functions={
        "len": lambda value: "own", "and": lambda *values: "&", "break": lambda: "!"}) == "own&!"


def test_calls_lists_the_functions_with_their_constant_arguments_and_lines() -> None:
    calls = etcdinit.Template('{{eq "a" .x}}\n{{if len .x | printf "%d"}}{{print (index .x "k")}}{{end}}').calls
    assert sorted(calls, key=lambda call: call[0]) == [
        ("eq", ("a", None), 1), ("index", (None, "k"), 2), ("len", (None,), 2), ("print", (None,), 2),
        ("printf", ("%d",), 2)]


def test_an_unknown_missingkey_is_a_usage_error() -> None:
    with pytest.raises(etcdinit.UsageError, match="missingkey"):
        etcdinit.Template("", missingkey="never")


def test_bytes_that_were_cut_out_of_a_character_stay_bytes_and_meet_again() -> None:
    assert render('{{slice "é" 0 1}}') == "\udcc3"
    assert render('{{slice "é" 0 1}}{{slice "é" 1}}') == "é"
    assert render('{{len "é"}} {{index "é" 1}} {{printf "%T" (index "é" 1)}}') == "2 169 uint8"


# ---- corners that the comparison with Go has found -----------------------------------------------------

USERS = {"users": [{"n": "ann", "tags": ["x"]}, {"n": "bob", "tags": []}, {"n": "cy", "tags": None}],
         "list": ["a", "b", "c"], "m": {"k": "v"}, "s": "text"}


@pytest.mark.parametrize(("text", "output"), [
    ("{{range .users}}{{.n}}{{range .tags}}{{else}}{{break}}{{end}} {{end}}", "ann bob cy "),
    ("{{range .users}}{{.n}}{{range .tags}}{{else}}-{{continue}}{{end}} {{end}}", "ann bob-cy-"),
    ("{{range .users}}{{.n}}{{range .tags}}{{else}}{{if true}}-{{break}}{{end}}{{end}} {{end}}", "ann bob- cy- "),
    ("{{$z := 0}}{{range .users}}{{range .tags}}{{else}}{{$z = 7}}{{break}}{{end}}{{$z}}{{end}}", "077"),
    ("{{range .users}}{{range .tags}}{{else}}{{range $.list}}{{break}}{{end}}r{{break}}s{{end}}x{{end}}", "xrxrx"),
])
def test_break_behind_the_else_of_a_range_ends_only_that_range(text: str, output: str) -> None:
    assert render(text, USERS) == output


def test_the_index_of_a_range_is_a_plain_int_and_its_key_a_plain_string() -> None:
    assert render("{{range $i, $x := .list}}{{slice $.list $i}}{{end}}", USERS) == "[a b c][b c][c]"
    for text, found in (("{{range $i, $x := .list}}{{$i.x}}{{end}}", "int"),
                        ("{{range $k, $v := .m}}{{$k.x}}{{end}}", "string"),
                        ("{{range $k, $v := .m}}{{$v.x}}{{end}}", "interface {}")):
        assert f"can't evaluate field x in type {found}" in str(error_of(text, USERS))


@pytest.mark.parametrize(("text", "message"), [
    ("{{.s.x 1}}", "at <.s.x>: can't evaluate field x in type interface {}"),
    ('{{(get "/k").Key 1}}', 'at <"/k">: Key has arguments but cannot be invoked as function'),
    ('{{(get "/k").Key.x}}', 'at <"/k">: can\'t evaluate field x in type string'),
    ("{{slice .list .missing}}", "error calling slice: cannot index slice/array with nil"),
    ("{{slice .list .s}}", "error calling slice: cannot index slice/array with type interface {}"),
    ('{{slice .list (get "/k").Value}}', "error calling slice: cannot index slice/array with type string"),
    ("{{add 9223372036854775808 1}}", "at <9223372036854775808>: expected integer; found 9223372036854775808"),
    ("{{²}}", "unrecognized character in action: U+00B2 '²'"),
    ("{{\udcff}}", "unrecognized character in action: U+FFFD '\ufffd'"),
    ("{{0x1_p-2}}", 'illegal number syntax: "0x1_p-2"'),
    ("{{0x.p1+2i}}", 'strconv.ParseFloat: parsing "0x.p1": invalid syntax'),
    ("{{1+1e999i}}", 'strconv.ParseFloat: parsing "+1e999": value out of range'),
    ("{{0b1+1i}}", "syntax error scanning complex number"),
    ("{{1+i}}", "syntax error scanning complex number"),
    ("{{+9223372036854775808}}", 'integer overflow: "+9223372036854775808"'),
    ("{{$v := 1}}{{range $v = .list}}{{$v.x}}{{end}}", "at <$v.x>: can't evaluate field x in type interface {}"),
    ("{{range $v := .list}}{{$v = 2}}{{$v.x}}{{end}}", "at <$v.x>: can't evaluate field x in type int"),
    ("{{$x := 1 | $x 2}}", "at <$x>: undefined variable: $x"),
    ("{{1 2 | print 9223372036854775808}}", "at <1>: can't give argument to non-function 1"),
    ("{{(or .list (print 1)).x}}", "at <.list>: can't evaluate field x in type []interface {}"),
    ("{{(and .list (or .nothing .s)).x}}", "at <.s>: can't evaluate field x in type string"),
    ("{{toUpper (or 0 (and 1 .list))}}", "at <.list>: wrong type for value; expected string; got []interface {}"),
    ("{{((((((((((((((or 1 .list)))))))))))))).x}}", "at <1>: can't evaluate field x in type int"),
])
def test_errors_are_told_as_go_sees_the_value(text: str, message: str) -> None:
    functions = etcdinit.store_functions({"/k": "v"})
    assert str(error_of(text, USERS, functions=functions)).endswith(message)


def test_a_field_with_arguments_of_nothing_obeys_missingkey() -> None:
    assert str(error_of("{{(index . `a`).b 1}}", {}, missingkey="error")).endswith(
        'nil data; no entry for key "b"')
    assert render("{{(index . `a`).b 1}}{{.a.b or}}", {}) == "<no value><no value>"


# ---- nothing of Python is in reach --------------------------------------------------------------------

PYTHON_NAMES = ("__class__", "__init__", "__globals__", "__builtins__", "__import__", "get", "append", "keys", "items",
                "format", "real", "imag", "numerator", "encode", "mro", "gi_frame", "f_back")


class Opaque:
    secret = "leaked"

    def method(self) -> str:
        return self.secret


@pytest.mark.parametrize("name", [*PYTHON_NAMES, "secret", "method"])
@pytest.mark.parametrize("value", ["text", 1, 1.5, True, [1], Opaque(), print, etcdinit, Opaque.method])
def test_no_attribute_of_a_value_is_a_field(name: str, value: Any) -> None:
    for text in ("{{.%s}}", "{{.%s 1}}", "{{with .}}{{.%s.%s}}{{end}}", "{{$.%s}}", "{{(print .).%s}}"):
        text = text.replace("%s", name)
        assert f"can't evaluate field {name} in type" in str(error_of(text, value))


@pytest.mark.parametrize("name", PYTHON_NAMES)
def test_a_map_has_only_its_keys(name: str) -> None:
    assert render("{{." + name + "}}", {"a": 1}) == "<no value>"
    assert render("{{." + name + "}}", {name: "mine"}) == "mine"


@pytest.mark.parametrize("name", ["eval", "exec", "open", "type", "str", "field", "out", "depth", "V", "v1", "dot",
                                  "INVALID", "fail", "template0", "__builtins__"])
def test_names_of_python_and_of_the_compiled_code_are_no_functions_or_variables(name: str) -> None:
    assert str(error_of("{{" + name + "}}")) == f'template: t:1: function "{name}" not defined'
    assert str(error_of("{{$" + name + "}}")) == f'template: t:1: undefined variable "${name}"'
    assert render("{{$N := 1}}{{$N}}".replace("N", name)) == "1"


def test_a_compiled_template_has_no_builtins() -> None:
    world = etcdinit.Template('{{range .}}{{.a}}{{len .b}}{{end}}')._world
    assert world["__builtins__"] == {} and "open" not in world and "__import__" not in world


PIECES = [*"{}.$|()\"'`\\-/* \n\tabx019_:=,é\x00\udcff", "{{", "}}", "{{- ", " -}}", "range ", "if ", "else", "end",
          "define ", "template ", "block ", "with ", "break", "print ", "index ", "$x", ".a", "nil", "1.5", "0x1p4",
          '"s"', "`r`", "'c'", "{{/*", "*/}}"]
TEXT = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)


@settings(max_examples=400, deadline=None)
@given(TEXT)
def test_whatever_the_text_the_engine_answers_or_tells_gos_error(text: str) -> None:
    try:
        render(text, {"a": [1, "x", None], "x": {"a": 1.5}})
    except etcdinit.TemplateError as error:
        assert str(error).startswith("template: t:") and "internal" not in str(error) and "Error" not in str(error)


# ---- depth: Go's bounds and messages, never a crash ---------------------------------------------------

DEEP: list[tuple[str, str, Any, str]] = [
    ("parentheses", "{{" + "(" * 9999 + "1" + ")" * 9999 + "}}", None, "1"),
    ("calls", "{{" + "len (print (" * 1000 + "1" + "))" * 1000 + "}}", None, "1"),
    ("string arguments", "{{" + "(html " * 2000 + "1" + ")" * 2000 + "}}", None, "1"),
    ("if", "{{if true}}" * 3000 + "x" + "{{end}}" * 3000, None, "x"),
    ("with", "{{with 1}}" * 1500 + "{{.}}{{$}}" + "{{end}}" * 1500, 7, "17"),
    ("range", "{{range $.l}}" * 300 + "x" + "{{end}}" * 300, {"l": [1]}, "x"),
    ("else if", "{{if .a}}1" + "{{else if .b}}2" * 2000 + "{{else}}3{{end}}", {}, "3"),
    ("pipeline", "{{1" + " | print" * 2000 + "}}", None, "1"),
    ("fields", "{{.a" + ".b" * 2000 + "}}", {}, "<no value>"),
    ("and", "{{and" + " 1" * 5000 + "}}", None, "1"),
]


@pytest.mark.parametrize(("text", "data", "output"), [case[1:] for case in DEEP], ids=[case[0] for case in DEEP])
def test_deep_nesting_works(text: str, data: Any, output: str) -> None:
    limit = sys.getrecursionlimit()
    assert render(text, data) == output
    assert sys.getrecursionlimit() == limit


def test_too_many_parentheses_are_gos_error() -> None:
    assert str(error_of("{{" + "(" * 10001 + "1" + ")" * 10001 + "}}")) == \
        "template: t:1: max expression depth exceeded"


def test_endless_recursion_ends_with_gos_error() -> None:
    error = error_of('{{define "a"}}x{{template "b" .}}{{end}}{{define "b"}}{{if true}}{{template "a" .}}{{end}}{{end}}'
                     '{{template "a"}}')
    assert "exceeded maximum template depth (100000)" in str(error) and error.partial == "x" * 50000


# Deep blocks are split into several Python functions: variables, dot and jumps must cross their borders.

DEPTHS = (0, 5, 11, 12, 13, 25, 40)
LOOP = ("{{range $i, $x := .}}%s{{if eq $x 2}}{{continue}}{{end}}{{if eq $x 4}}{{break}}{{end}}{{$i}}{{$x}}{{.}} "
        "%s{{end}}")


@pytest.mark.parametrize("depth", DEPTHS)
def test_break_and_continue_leave_their_range_from_any_depth(depth: int) -> None:
    text = LOOP % ("{{if true}}" * depth, "{{end}}" * depth)
    assert render(text, [1, 2, 3, 4, 5]) == "011 233 "


@pytest.mark.parametrize("depth", DEPTHS)
def test_variables_and_dot_cross_any_depth(depth: int) -> None:
    text = ("{{$x := 1}}{{$y := 5}}" + "{{with .a}}" * depth + "{{$x = .v}}{{$y := 9}}{{$y}}" + "{{end}}" * depth
            + " {{$x}} {{$y}} {{$.v}}")
    data: dict[str, Any] = {"v": "inner"}
    for _ in range(depth):
        data = {"a": data}
    data["v"] = data.get("v", "outer")
    assert render(text, data) == f"9 inner {9 if not depth else 5} {data['v']}"


@pytest.mark.parametrize("depth", DEPTHS)
def test_an_error_is_told_at_its_place_at_any_depth(depth: int) -> None:
    before = "{{if true}}" * depth + "ab{{range .}}" + "{{" + "(" * depth
    error = error_of(before + 'index . "k"' + ")" * depth + "}}{{end}}" + "{{end}}" * depth, [[1]])
    column = len("{{if true}}") * depth + len("ab{{range .}}{{") + depth
    assert str(error).startswith(f'template: t:1:{column}: executing "t" at <index . "k">: error calling index:')
    assert error.partial == "ab"


@pytest.mark.parametrize("missingkey", ["default", "zero", "error"])
def test_big_templates_are_compiled(missingkey: str) -> None:
    assert render("x{{.a}}\n" * 5000, {"a": 1}, missingkey=missingkey) == "x1\n" * 5000


FUNCTIONS_OF_PYTHON: list[Callable[..., Any]] = [len, print, dict.get]


@pytest.mark.parametrize("function", FUNCTIONS_OF_PYTHON)
def test_call_never_calls_python(function: Callable[..., Any]) -> None:
    assert "error calling call: non-function" in str(error_of("{{call .f}}", {"f": function}))
