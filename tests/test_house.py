"""The order of the house: rooms use only rooms above them, the standard library only, and start-up stays cheap."""

from __future__ import annotations

import ast
import re
import subprocess
import symtable
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "etcdinit.py"
TEXT = SOURCE.read_text()
TREE = ast.parse(TEXT)
BANNER = re.compile(r"^# ={20,}\n# ([A-Z][A-Z: &]*)\n(?:#.*\n)*?# ={20,}$", re.MULTILINE)

AT_IMPORT = {  # what a fresh interpreter may load beyond its own start when it imports the module
    "etcdinit", "__future__", "errno", "os", "os.path", "posixpath", "genericpath", "stat", "_stat",
    "_collections_abc",
}


def rooms(text: str) -> list[tuple[int, str]]:
    """(line, name) of every banner, in order; what stands before the first banner is room ""."""
    return [(0, "")] + [(text.count("\n", 0, m.start()) + 1, m[1]) for m in BANNER.finditer(text)]


def room_index(line: int, found: list[tuple[int, str]]) -> int:
    return max(i for i, (start, _) in enumerate(found) if start <= line)


def targets(node: ast.AST) -> list[str]:
    """The names that a top-level statement binds, also inside if, for, try and with."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.Name):
        return [node.id] if isinstance(node.ctx, ast.Store) else []
    return [name for child in ast.iter_child_nodes(node) for name in targets(child)
            if not isinstance(node, (ast.Lambda, ast.comprehension, ast.GeneratorExp, ast.ListComp, ast.DictComp))]


def globals_of(table: symtable.SymbolTable) -> set[str]:
    """Every module-level name that a piece of source refers to, at any depth."""
    found = {s.get_name() for s in table.get_symbols()
             if s.is_referenced() and (table.get_type() == "module" or s.is_global())}
    for child in table.get_children():
        if "annotation" not in str(child.get_type()):
            found |= globals_of(child)
    return found


def upward_calls(text: str) -> list[str]:
    """What breaks the order of rooms: "LINE: ROOM uses NAME of LATER ROOM"."""
    found, tree, home = rooms(text), ast.parse(text), {}
    for node in tree.body:
        for name in targets(node):
            home.setdefault(name, room_index(node.lineno, found))
    complaints = []
    for node in tree.body:
        here = room_index(node.lineno, found)
        piece = "from __future__ import annotations\n" + ast.unparse(node)
        for name in sorted(globals_of(symtable.symtable(piece, "etcdinit.py", "exec"))):
            if home.get(name, 0) > here:
                complaints.append(f"{node.lineno}: {found[here][1]} uses {name} of {found[home[name]][1]}")
    return complaints


def test_a_room_uses_no_room_below_it() -> None:
    assert upward_calls(TEXT) == []


def test_the_check_of_the_order_sees_an_offender() -> None:
    bar = "# " + "=" * 30
    text = (f"{bar}\n# UP\n# About.\n{bar}\ndef f(x: Late):\n    main = 1\n    def g():\n        return late()\n"
            f"    return g, main\n{bar}\n# DOWN\n{bar}\ndef late(): return f\ndef main(): return 2\nclass Late: pass\n")
    assert upward_calls(text) == ["5: UP uses late of DOWN"]


def test_the_rooms_stand_in_their_order() -> None:
    order = ["", "GROUND", "DNS", "ETCD", "KEYS", "TEMPLATE: VALUES", "TEMPLATE: FUNCTIONS", "TEMPLATE: LANGUAGE",
             "RENDER", "LOGS", "SUPERVISE", "CLUSTER", "OBSERVE", "COMMAND LINE"]
    found = [name for _, name in rooms(TEXT)]
    assert found == [name for name in order if name in found]
    assert {"GROUND", "ETCD", "RENDER", "COMMAND LINE"} <= set(found)


def test_no_name_is_bound_twice() -> None:
    """A second definition further down would silently change what a room above it does."""
    bound: dict[str, int] = {}
    twice = [f"{node.lineno}: {name} is bound in line {bound[name]} too" for node in TREE.body
             if not isinstance(node, (ast.If, ast.For)) for name in targets(node)
             if bound.setdefault(name, node.lineno) != node.lineno]
    assert twice == []


def test_only_the_standard_library_is_imported() -> None:
    import etcdinit
    imported = {a.name for n in ast.walk(TREE) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module or "" for n in ast.walk(TREE) if isinstance(n, ast.ImportFrom)}
    imported |= set(etcdinit.LAZY_MODULES.values())
    assert sorted(m for m in imported if m.split(".")[0] not in sys.stdlib_module_names) == []


def test_import_loads_nothing_costly() -> None:
    code = ("import sys; before = set(sys.modules); sys.path.insert(0, sys.argv[1]); import etcdinit; "
            "print(*sorted(set(sys.modules) - before))")
    run = subprocess.run([sys.executable, "-I", "-S", "-c", code, str(SOURCE.parent)],
                         capture_output=True, text=True, check=True)
    assert set(run.stdout.split()) - AT_IMPORT == set()


@pytest.mark.parametrize("node", [n for n in TREE.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))
                                  and not n.name.startswith("_")], ids=lambda n: n.name)
def test_public_names_say_what_they_are(node: ast.FunctionDef | ast.ClassDef) -> None:
    assert ast.get_docstring(node), f"etcdinit.py:{node.lineno}: {node.name} has no docstring"
