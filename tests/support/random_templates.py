"""Random templates over the whole language, right ones and wrong ones, the same for the same seed."""

from __future__ import annotations

import random

DATA = {
    "name": "web", "port": 8080, "on": True, "off": False, "empty": "", "zero": 0, "nil": None, "neg": -4, "f": 2.75,
    "big": 1234567890123, "tiny": 1e-07, "huge": 1e21, "html": "<a href=\"x\">it's & co</a>", "u": "日本語 é",
    "list": ["a", "b", "c"], "nums": [1, 2.5, -3, 1e20, 1e-07], "el": [], "em": {}, "mixed": [1, "a", None, True, [2],
    {"k": 3}],
    "m": {"z": 1, "a": 2, "k": "v"}, "nested": {"a": {"b": {"c": "deep"}}, "n": None}, "key-with-dash": "dash",
    "users": [{"n": "ann", "age": 30, "tags": ["x", "y"]}, {"n": "bob", "age": 17, "tags": []}, {"n": "cy",
    "tags": None}],
    "json": "{\"x\": [1, 2.5, \"s\"], \"y\": null}", "num": "42", "tr": "true",
}
KV = {"/app/db/host": "10.0.0.1", "/app/db/port": "5432", "/app/up/a/addr": "10.1.1.1:80",
      "/app/up/b/addr": "10.1.1.2:80",
      "/app/up/c": "leaf", "/app/json": "{\"x\":[1,2]}", "/app/empty": "", "/app2/k": "v", "/app/up/a/weight": "3"}

TEXTS = ["a", "b ", " c", "\n", " \n ", "\t", "x=1;", "}", "{ ", "日本", "é", "'", '"', "#", "\r\n", "  ", "%d", "\\n"]
INTS = ["0", "1", "2", "3", "-1", "7", "42", "0x1F", "0b101", "0o17", "017", "1_000", "'a'", "'\\n'", "'é'", "1e3",
        "+5"]
FLOATS = ["1.5", "0.1", "-2.75", "1e-7", "1e21", "2.0", "100000.0", "1234567.0", "0x1p-2", ".5", "1e6", "123456789.25"]
STRINGS = ['"a"', '"b"', '""', '"x y"', '"é\\n"', '"\\t\\"q\\""', "`raw`", "`r\\n`", '"web"', '"日本語"', '"10"',
           '"<&>"', '"a,b,c"',
           '"\\xff"', '"\\u00e9"', '"true"', '"%s"']
KEYS = [f'"{key}"' for key in KV] + ['"/nope"', '"/app"', '"/app/up"', '"/app/up/c"', '"app"', '"/"', '""']
PATTERNS = ['"/app/*"', '"/app/*/*"', '"/app/up/*/addr"', '"/app/db/[hp]o*"', '"/*/k"', '"/app/db/?ort"', '"["',
            '"/none/*"']
VERBS = ["v", "s", "d", "q", "t", "f", "g", "e", "x", "X", "c", "U", "b", "o", "O", "T", "+v", "#v", "5d", "-5d",
         "05d", "+d", " d",
         "5s", "-5s", ".1s", "5.1f", ".2f", ".0f", "+.2e", "6.2g", "#x", "# x", "#o", "#U", "#q", "+q", "x", "08.3f",
         "-8q", "z", "!",
         "G", "E", "10v", "03d", "%", "*d", "[2]d", "[1]v", "[3]*d", ".*f", "[9]d", "1.v", "w"]
BAD = ["{{", "}}", "{{end}}", "{{else}}", "{{.", "|", "(", ")",
       '"', "`", "'", "$", "$x", ":=", "=", ",", "{{break}}", "nope", "{{- ",
       " -}}", "{{/*", "*/}}", "..", "0x", "1_", "é", "\x00", "@", "{{template}}", "{{define \"d\"}}", "{{if}}",
       "{{range}}", "}", " ",
       "\n", "-", "{{nil}}", ".1a", "'ab'", "&", "{{else if}}", "{{continue}}", "08", "\\"]
FIELDS = list(DATA) + ["missing"]
FIELD_OF = {
    "string": [".name", ".empty", ".html", ".u", ".num", ".json", ".m.k", ".nested.a.b.c", "$.name", ".tr"],
    "int": ["(len .list)", "(len .u)", "(atoi .num)"],
    "float": [".port", ".zero", ".f", ".neg", ".big", ".tiny", ".huge", ".m.z"],
    "bool": [".on", ".off"],
    "list": [".list", ".nums", ".el", ".users", ".mixed", "$.list"],
    "map": [".m", ".em", ".nested", ".nested.a", "."],
    "any": [".missing", ".nil", ".nested.n", ".missing.deep", ".nil.deep", ".name.deep", ".list.x", "$.users", "$",
            ".n", ".age", ".tags"],
}
FUNCTIONS = (  # name, kinds of its arguments, kind of its result; "*" repeats the last one 0 to 3 times
    ("len", ["any"], "int"), ("not", ["any"], "bool"), ("and", ["any", "any", "*"], "any"), ("or", ["any", "any",
    "*"], "any"),
    ("eq", ["string", "string", "*"], "bool"), ("eq", ["float", "float"], "bool"), ("eq", ["int", "int", "*"], "bool"),
    ("eq", ["any", "any"], "bool"), ("ne", ["any", "any"], "bool"), ("ne", ["string", "string"], "bool"),
    ("lt", ["float", "float"], "bool"), ("le", ["int", "int"], "bool"), ("gt", ["string", "string"], "bool"),
    ("ge", ["any", "any"], "bool"), ("index", ["list", "int"], "any"), ("index", ["map", "string"], "any"),
    ("index", ["string", "int"], "int"), ("index", ["map", "string", "string"], "any"), ("index", ["any"], "any"),
    ("slice", ["string", "int"], "string"), ("slice", ["list", "int", "int"], "list"), ("slice", ["string", "int",
    "int"], "string"),
    ("print", ["any", "*"], "string"), ("println", ["any", "*"], "string"), ("html", ["any", "*"], "string"),
    ("js", ["any"], "string"), ("urlquery", ["any", "*"], "string"), ("call", ["any"], "any"),
    ("printf", ["format", "any", "*"], "string"), ("printf", ["format", "string"], "string"), ("printf", ["format",
    "int"], "string"),
    ("printf", ["format", "float"], "string"), ("printf", ["format", "list"], "string"), ("printf", ["format", "map"],
    "string"),
    ("printf", ["format", "float", "int", "string"], "string"),
    ("echo", ["any"], "any"), ("typeOf", ["any"], "string"), ("fail", ["string"], "string"), ("die", [], "string"),
    ("add", ["int", "int"], "int"), ("sub", ["int", "int"], "int"), ("mul", ["int", "int"], "int"), ("div", ["int",
    "int"], "int"),
    ("mod", ["int", "int"], "int"), ("seq", ["small", "small"], "list"), ("atoi", ["string"], "int"), ("parseBool",
    ["string"], "bool"),
    ("base", ["string"], "string"), ("dir", ["string"], "string"), ("split", ["string", "string"], "list"),
    ("join", ["strings", "string"], "string"), ("replace", ["string", "string", "string", "int"], "string"),
    ("toUpper", ["string"], "string"), ("toLower", ["string"], "string"), ("contains", ["string", "string"], "bool"),
    ("trimSuffix", ["string", "string"], "string"), ("reverse", ["strings"], "list"), ("json", ["string"], "map"),
    ("jsonArray", ["string"], "list"), ("map", ["string", "any"], "map"), ("base64Encode", ["string"], "string"),
    ("base64Decode", ["string"], "string"), ("getv", ["key"], "string"), ("getv", ["key", "string"], "string"),
    ("get", ["key"], "any"), ("exists", ["key"], "bool"), ("gets", ["pattern"], "list"), ("getvs", ["pattern"], "list"),
    ("ls", ["dir"], "list"), ("lsdir", ["dir"], "list"),
)
KINDS = ["string", "int", "float", "bool", "list", "map", "any"]


class Templates:
    """template() gives the next random template text."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.variables: list[str] = []
        self.defined: list[str] = []
        self.in_range = 0

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def template(self) -> str:
        pick = self.random
        self.variables, self.defined, self.in_range = [], [], 0
        parts = []
        for _ in range(pick.choice([0, 0, 0, 1, 2])):
            parts.append(self.define())
        parts.append(self.nodes(pick.choice([1, 2, 2, 3])))
        if self.chance(0.1):
            parts.append(self.define())
        text = "".join(parts)
        if self.chance(0.12):  # spoil it
            at = pick.randrange(len(text) + 1)
            cut = at + pick.choice([0, 0, 1, 2, 5])
            text = text[:at] + pick.choice([*BAD, ""]) + text[cut:]
        return text

    def action(self, inner: str) -> str:
        left = "{{- " if self.chance(0.1) else "{{ " if self.chance(0.1) else "{{"
        right = " -}}" if self.chance(0.1) else " }}" if self.chance(0.1) else "}}"
        return left + inner + right

    def define(self) -> str:
        fresh = [name for name in ("d", "e", "t2") if name not in self.defined]
        name = self.random.choice(fresh if fresh and self.chance(0.95) else ["d", "e"])
        self.defined.append(name)
        outer, self.variables = self.variables, []
        inside, self.in_range = self.in_range, 0
        body = self.nodes(1)
        self.variables, self.in_range = outer, inside
        return self.action(f'define "{name}"') + body + self.action("end")

    def nodes(self, depth: int) -> str:
        kept = len(self.variables)
        text = "".join(self.node(depth) for _ in range(self.random.choice([1, 1, 2, 3])))
        del self.variables[kept:]
        return text

    def node(self, depth: int) -> str:
        pick = self.random
        kind = pick.choices(["text", "print", "set", "if", "with", "range", "template", "block", "comment", "leave"],
                            [20, 34, 9, 12 * (depth > 0), 6 * (depth > 0), 16 * (depth > 0), 3, 2 * (depth > 0), 2,
                             5 * (self.in_range > 0)])[0]
        if kind == "text":
            return "".join(pick.choice(TEXTS) for _ in range(pick.choice([1, 2, 3])))
        if kind == "print":
            return self.action(self.pipeline(2))
        if kind == "set":
            return self.set()
        if kind == "comment":
            return pick.choice(["{{/* c */}}", "{{- /* c\n */ -}}", "{{/**/}}"])
        if kind == "leave":
            word = pick.choice(["break", "continue"])
            return self.action(f"if {self.value('bool', 1)}") + self.action(word) + self.action("end") \
                if self.chance(0.8) else self.action(word)
        if kind == "template":
            if not self.defined and self.chance(0.8):
                return "-"
            name = pick.choice(self.defined if self.defined and self.chance(0.9) else ["d", "nope"])
            return self.action(f'template "{name}"' + ("" if self.chance(0.3) else " " + self.pipeline(1)))
        if kind == "block":
            fresh = [name for name in ("b1", "b2", "b3") if name not in self.defined]
            name = pick.choice(fresh if fresh and self.chance(0.95) else ["b1", "d"])
            self.defined.append(name)
            outer, self.variables = self.variables, []
            inside, self.in_range = self.in_range, 0
            body = self.nodes(depth - 1)
            self.variables, self.in_range = outer, inside
            return self.action(f'block "{name}" {self.pipeline(1)}') + body + self.action("end")
        return self.control(kind, depth)

    def control(self, kind: str, depth: int) -> str:
        pick = self.random
        kept = len(self.variables)
        head, fresh = self.pipeline(1, "bool" if kind == "if" and self.chance(0.6) else "any"), []
        if kind == "range":
            head = self.value(pick.choice(["list", "list", "map", "small", "any", "strings"]), 1)
            form = pick.choice(["", "", "$v := ", "$i, $v := ", "$_, $v := "] if self.chance(0.9) else
                               ["$v, $v := ", "$i, $v = ", "$v = "] if self.chance(0.8) else ["$a, $b, $c := ",
                               "v := ", "$i , $v:=", "$i $v := "])
            head = form + head
            if ":=" in form:
                fresh = ["$v", "$i"] if "$i" in form else ["$v"]
        elif self.chance(0.2):
            head, fresh = f"$c := {head}", ["$c"]
        self.variables += fresh
        self.in_range += kind == "range"
        text = self.action(f"{kind} {head}") + self.nodes(depth - 1)
        self.in_range -= kind == "range"
        if kind != "range" and self.chance(0.2):
            text += self.action(f"else {kind} {self.pipeline(1)}") + self.nodes(depth - 1)
        if self.chance(0.3):
            text += self.action("else") + self.nodes(depth - 1)
        del self.variables[kept:]
        return text + self.action("end")

    def set(self) -> str:
        pick = self.random
        if self.variables and self.chance(0.5):
            return self.action(f"{pick.choice(self.variables)} = {self.pipeline(1)}")
        name = pick.choice(["$x", "$y", "$z", "$v"])
        text = self.action(f"{name} := {self.pipeline(1)}")
        self.variables.append(name)
        return text

    def pipeline(self, depth: int, kind: str = "") -> str:
        pick = self.random
        text = self.value(kind or pick.choice(KINDS), depth, bare=True)
        for _ in range(pick.choice([0, 0, 0, 0, 0, 1, 1, 2])):
            name, kinds, _ = pick.choice([row for row in FUNCTIONS if row[1] and row[1][-1] in ("any", "*")]
                                         if self.chance(0.8) else FUNCTIONS)
            kinds = [k for k in kinds if k != "*"]
            text += pick.choice([" | ", "|"]) + " ".join([name, *(self.value(k, 0) for k in kinds[:-1])])
        return text

    def value(self, kind: str, depth: int, bare: bool = False) -> str:
        """An operand of a kind, most of the time; in parentheses where it needs them, unless bare."""
        pick = self.random
        if self.chance(0.03):
            kind = pick.choice(KINDS)
        if depth > 0 and self.chance(0.45):
            fitting = [row for row in FUNCTIONS if row[2] == kind or kind == "any"]
            if fitting:
                name, kinds, _ = pick.choice(fitting)
                wanted = [k for k in kinds if k != "*"]
                if "*" in kinds:
                    wanted += [wanted[-1]] * pick.choice([0, 0, 1, 2])
                if self.chance(0.03):
                    wanted = wanted[:-1] if self.chance(0.5) else [*wanted, "any"]
                text = " ".join([name, *(self.value(k, depth - 1) for k in wanted)])
                if bare:
                    return text
                return f"({text})" + (pick.choice([".x", ".Key", ".Value", ".k", ".a.b"]) if self.chance(0.05) else "")
        if self.variables and self.chance(0.3 if kind == "any" else 0.1):
            return pick.choice(self.variables) + (pick.choice([".n", ".Key", ".Value",
            ".k"]) if self.chance(0.2) else "")
        if self.chance(0.01):
            return pick.choice(["nil", "$nope", "(1)", "(.)", "(nil)", "(.list)", "undefinedFunc"])
        return self.leaf(kind)

    def leaf(self, kind: str) -> str:
        pick = self.random
        if kind == "string":
            return pick.choice(STRINGS if self.chance(0.5) else FIELD_OF["string"])
        if kind == "int":
            return pick.choice(INTS if self.chance(0.8) else FIELD_OF["int"])
        if kind == "small":
            return pick.choice(["0", "1", "2", "3", "4"])
        if kind == "float":
            return pick.choice(FLOATS if self.chance(0.5) else FIELD_OF["float"])
        if kind == "bool":
            return pick.choice(["true", "false", *FIELD_OF["bool"]])
        if kind == "format":
            pieces = [pick.choice(["", "a ", "[", "é"]) + "%" + pick.choice(VERBS) for _ in range(pick.choice([1, 1,
            2]))]
            return '"' + " ".join(pieces) + pick.choice(["", "]", "%", "%%"]) + '"'
        if kind == "key":
            return pick.choice(KEYS)
        if kind == "dir":
            return pick.choice(['"/app"', '"/app/up"', '"/app/up/"', '"/app/db/host"', '"/nope"', '"/app/up/c"'])
        if kind == "pattern":
            return pick.choice(PATTERNS)
        if kind == "strings":
            return pick.choice(['(split "a,b,c" ",")', '(getvs "/app/db/*")', '(ls "/app")', '(split .name "e")'])
        if kind == "any" and self.chance(0.6):
            return self.leaf(pick.choice(KINDS[:-1]))
        return pick.choice(FIELD_OF[kind])


# ---- what the grammar above does not come to ----------------------------------------------------------

TOKENS = [
    *BAD, "{{-", "-}}", "if", "else", "end", "range", "with", "define", "template", "block", "break", "continue", "nil",
    "true", ".", ".a", ".m.z", "$x", "$x.a", ":=", "+1", "1.5", "0xg", "1__0", "0b2", "0o8", "1e", "1e+", "1p3", "0x1p",
    "0x1_p1", "0x_1p1", "0x1.8", "0x.p1", "1i", "1+2", "1+2i", "0x.p1+2i", "0b1+1i", "1e999+1i", "'", "'a'", "''",
    "'\\''", "'\\q'", "'é'", '"a"', '"\\q"', '"a\nb"', "`a\nb`", "{{/* c */}}", "{{- /* c */ -}}", "{{/* c */ }}", "#",
    "\x7f", "\ufeff", "日", "a-b", "len", "print", "index", "foo", "$é", ".é", ";", "==", "||", "-1", "--1", "..5",
    "$.x", "$$", "._", "1a", "1.a", "1..2", "0.", "007", "0_7", "9223372036854775808", "99999999999999999999", "{",
    "else with", "else range", "{{if .}}", "{{range .list}}", "{{with .m}}", "{{block `b` .}}", "\r", "\v", "\udcff",
    "text", "  text  ", "\u2028", "(.m).z", "()", "(nil)", "nil.x", "true.x", "`a`.x", "len.x", ".a .b", "$x:=1",
    "$x, $y := .m", "$i, $v := range", "range $i, $v := .m", "and", "or"]
OPENINGS = ["", "", "if ", "range ", "with ", "template `a` ", "template ", "define ", "block `b` ", "else ", "end",
            "break", "$x := ", "$x = ", "len ", "(", "range $i, ", "range $i, $v := ", "range $i, $v, $w := "]
ODD = ["$", "$x", "nil", "2i", "1+2i", "-0.0", "0x10", "18446744073709551615", "1e400", '"\\x00"', "(echo nil)",
       "(index .m `zz`)", "(index `abc` 1)", "(seq 3 1)", "(json .json).y", "(list 1 nil)", "(base64Decode `/w==`)",
       "(and nil 1)", "(or .nil .list)", "(or `a` .f).x", "(die)", "(fail `x`)", "print", "len", "(1).x", "(nil).x",
       '"a".x', "$x.y", "(.missing)", "(gets `/zz*`)", "(get `/app/db/host`)"]
HEADS = [*(row[0] for row in FUNCTIONS if row[0] != "seq"), "and 1", "or 0", "and .nil", "or .on", "printf `%v|%T`",
         "printf `%#v`", ".m", ".name.x", "$x", "(print)", "nil", "1", ".", ".port", "$.m.a", "undefined"]
SEEN = [".", "$x", "$y", "$i", "$v", "$", "len $x", "print $x $y", "printf `%v-%T` $x $v", "eq $x $y", ".n", "$v.n",
        "index . 0", "1", "`s`", "add $i 1", "or $x $y", "(or $x .n).k", "slice $v 0 1", "index .mixed $i", "call $x",
        "$v | printf `%q`", "$v.Key"]
VISITED = [".list", ".nums", ".el", ".m", ".users", "3", "0", ".missing", ".nil", ".mixed", "(seq 1 3)", "$x", "$v",
           ".tags", ".", "(list 1 `b`)", ".port", "(gets `/app/*`)", "(or .el .list)", "(and .list .em)"]


def odd_tokens(seed: int) -> str:
    """Pieces of the language in any order: nearly always a parse error, of every kind that there is."""
    pick = random.Random(seed)
    soup = "".join(pick.choice(TOKENS) + pick.choice(["", " ", " "]) for _ in range(pick.choice([1, 2, 3, 4, 5, 7])))
    before = pick.choice(["", "a\n", "{{$x := 1}}", "{{range .list}}\n{{if .}}", "{{define `q`}}"])
    return before + "{{" + pick.choice(OPENINGS) + soup + "}}" + pick.choice(["", "{{end}}", "x{{else}}y{{end}}"])


def odd_calls(seed: int) -> str:
    """Every function, and what is none, with arguments of every kind."""
    pick = random.Random(seed)
    operands = [*ODD, *INTS, *FLOATS, *STRINGS, *(operand for kind in FIELD_OF.values() for operand in kind)]

    def call(most: int) -> str:
        return " ".join([pick.choice(HEADS), *(pick.choice(operands) for _ in range(pick.randint(0, most)))])

    pipe = " | ".join([pick.choice([call(4), call(2), pick.choice(operands)]),
                       *(call(2) for _ in range(pick.choice([0, 0, 0, 1, 2])))])
    pipe = pick.choice([pipe, pipe, f"print ({pipe}) {pick.choice(operands)}", f"({pipe}).Key", f"({pipe}).x.y"])
    around = pick.choice(["{{%s}}"] * 6 + ["{{range %s}}<{{.}}>{{break}}{{else}}E{{end}}",
                                           "{{range $i, $e := %s}}{{$i}}{{end}}", "{{with %s}}<{{.}}>{{end}}",
                                           "{{if %s}}T{{else}}F{{end}}",
                                           "{{define `d`}}[{{.a}}]{{end}}{{template `d` %s}}"])
    return "{{$x := 5}}é\n " + around.replace("%s", pipe)


def deep_control(seed: int) -> str:
    """Blocks in blocks, deeper than the compiler puts into one Python function, with variables that cross them."""
    pick = random.Random(seed)
    budget = pick.choice([6, 12, 20, 40])

    def body(depth: int) -> str:
        nonlocal budget
        count = min(budget, pick.choice([1, 1, 2, 3]))
        budget -= count
        return "".join(node(depth) for _ in range(count))

    def block(head: str, inside: str) -> str:
        leave = pick.choice(["", "", "", "{{break}}", "{{if $x}}{{continue}}{{end}}"])
        otherwise = pick.choice(["", "", "{{else}}e" + leave, "{{else}}{{$x = 7}}"])
        return "{{" + head + "}}" + inside + otherwise + "{{end}}"

    def node(depth: int) -> str:
        kind = pick.choice(["print", "set", "leave", "range", "range", "if", "if", "chain"] if depth > 0 else ["print"])
        if kind == "print":
            return pick.choice(["t", " \n", "{{- " + pick.choice(SEEN) + " -}}", "{{" + pick.choice(SEEN) + "}}"])
        if kind == "set":
            return "{{" + pick.choice(["$x", "$y", "$v"]) + pick.choice([" := ", " = "]) + pick.choice(SEEN) + "}}"
        if kind == "leave":
            return pick.choice(["{{break}}", "{{continue}}", "{{if $x}}{{break}}{{end}}",
                                "{{with .}}{{continue}}{{end}}"])
        if kind == "range":
            head = pick.choice(["", "", "$v := ", "$i, $v := ", "$v = ", "$i, $x = ", "$x, $x := "])
            return block(f"range {head}{pick.choice(VISITED)}", body(depth - 1))
        if kind == "if":
            word = pick.choice(["if", "with"])
            more = "{{else " + word + " " + pick.choice(SEEN) + "}}" + body(depth - 1) if pick.random() < 0.4 else ""
            return block(f"{word} {pick.choice(['', '$c := ', '$x = '])}{pick.choice(SEEN)}", body(depth - 1) + more)
        inside = body(2)
        for _ in range(pick.choice([3, 11, 12, 13, 26])):
            inside = block(pick.choice(["if $x", "with .", "range 2", "range $v := 1", "range $i, $v := .",
                                        "if $y := 1", "with $x := $x"]), inside)
        return inside

    first = pick.choice(["5", "`s`", ".list", ".m", "nil", ".nil", ".missing", "true"])
    start = "{{$x := " + first + "}}{{$y := 1}}{{$i := 0}}{{$v := .users}}"
    if pick.random() < 0.2:  # deep parentheses, long pipelines
        pipe = pick.choice(SEEN)
        for _ in range(pick.choice([2, 12, 13, 25])):
            pipe = pick.choice([f"print ({pipe})", f"or 0 ({pipe})", f"and ({pipe}) 1", f"{pipe} | echo",
                                f"{pipe} | or 0", f"({pipe})"])
        return start + "{{" + pipe + "}}"
    return start + body(pick.choice([2, 3, 5]))
