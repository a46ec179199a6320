"""One template through our engine, with the answer in the shape in which real Go's is given (support/go.py)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import etcdinit


def _fail(text: str) -> str:
    raise RuntimeError(text)


def _die() -> str:
    raise RuntimeError("die")


EXAM_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "echo": lambda value: value,
    "typeOf": lambda value: etcdinit.go_type(value),
    "fail": _fail,
    "die": _die,
}


def go_numbers(data: object, num: str) -> object:
    """Data as Go has it after reading JSON: every number a float, or, for "int", whole numbers as ints."""
    parse_int = float if num == "float64" else int
    return json.loads(json.dumps(data), parse_int=parse_int)


def run_template(template: str, data: object = None, *, num: str = "float64", kv: dict[str, str] | None = None,
                 missingkey: str = "") -> dict[str, str]:
    """{"stage", "error", "output"}: as go.ask() answers."""
    functions = {**EXAM_FUNCTIONS, **etcdinit.store_functions(kv or {}, compat=True)}
    done = ""
    try:
        compiled = etcdinit.Template(template, name="t", functions=functions, missingkey=missingkey or "default")
        done = compiled.render(go_numbers(data, num))
        return {"stage": "", "error": "", "output": done}
    except etcdinit.TemplateError as error:
        return {"stage": error.stage, "error": str(error), "output": error.partial}
