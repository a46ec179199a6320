"""Real Go's fmt, strconv, json, regexp and time, to ask them what is right: GoValues runs go_values/main.go."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path
from typing import Any

import etcdinit
from support.go import build

SCALARS = {bool: "bool", int: "int", etcdinit.Int64: "int64", etcdinit.Uint8: "uint8", etcdinit.Uint16: "uint16",
           etcdinit.Duration: "duration", etcdinit.Month: "month", etcdinit.Weekday: "weekday"}
LISTS = {list: "list", etcdinit.Strings: "strings", etcdinit.Ints: "ints", etcdinit.KVPairs: "pairs"}


def _bytes(text: str) -> str:
    return base64.b64encode(etcdinit.utf8(text)).decode()


def _encode(value: Any) -> Any:
    """A value in the tagged form that the Go program reads."""
    if value is None:
        return None
    kind = type(value)
    if kind is str:
        return ["string", _bytes(value)]
    if kind in SCALARS:
        return [SCALARS[kind], "true" if value is True else "false" if value is False else str(int(value))]
    if kind is float:
        return ["float64", repr(value)]
    if kind is complex:
        return ["complex128", repr(value.real), repr(value.imag)]
    if kind is etcdinit.Strings:
        return ["strings", *map(_bytes, value)]
    if kind is etcdinit.Ints:
        return ["ints", *map(str, value)]
    if kind in LISTS:
        return [LISTS[kind], *map(_encode, value)]
    if kind is dict:
        return ["map", *(x for k, v in value.items() for x in (_bytes(k), _encode(v)))]
    if kind is etcdinit.KVPair:
        return ["pair", _bytes(value.Key), _bytes(value.Value)]
    raise TypeError(kind)


class GoValues:
    """ask() gives Go's answers to any number of questions, all in one run of the program."""

    def __init__(self) -> None:
        self.program = build(Path(__file__).resolve().parent / "go_values")

    def ask(self, questions: list[tuple[Any, ...]]) -> list[tuple[str, str]]:
        """questions: (operation, argument, ...), see main.go; answers: (text, error), of which one is empty."""
        lines = [json.dumps({"op": op, "args": [_encode(a) for a in args]}) for op, *args in questions]
        done = subprocess.run([str(self.program)], input="\n".join(lines).encode(), stdout=subprocess.PIPE, check=True)
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(answers) == len(questions)
        return [(self._text(a["text"]), self._text(a["error"])) for a in answers]

    @staticmethod
    def _text(encoded: str | None) -> str:
        return etcdinit.go_string(base64.b64decode(encoded or ""))
