"""Go's own answers: 611 templates whose result, to the byte and to the text of the error, was told by text/template."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from support.go import GoTemplates
from support.templates import run_template

import etcdinit

CASES = [json.loads(line) for line in (Path(__file__).parent / "data" / "go-template.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_the_engine_answers_as_go(case: dict[str, Any]) -> None:
    expect = case["expect"]
    result = run_template(case["template"], case["data"], num=case["num"], kv=case.get("kv"),
                          missingkey=case.get("missingkey", ""))
    if expect["ok"]:
        wanted = expect.get("output")
        if wanted is None:
            wanted = base64.b64decode(expect["output_b64"]).decode("utf-8", "surrogateescape")
        assert result == {"stage": "", "error": "", "output": wanted}
    else:
        assert result == {"stage": expect["stage"], "error": expect["error"],
                          "output": expect.get("partial_output", "")}


def test_the_recorded_answers_are_those_of_the_go_beside_us(go: GoTemplates) -> None:
    """Keeps the recorded cases and the program that the differential tests ask in step."""
    different = []
    for case in CASES:
        answer = go.ask(case["template"], case["data"], num=case["num"], kv=case.get("kv"),
                        missingkey=case.get("missingkey", ""))
        expect = case["expect"]
        wanted = expect.get("output", expect.get("partial_output"))
        if wanted is None and "output_b64" in expect:
            wanted = base64.b64decode(expect["output_b64"]).decode("utf-8", "surrogateescape")
        if (answer["stage"], answer["error"], answer["output"]) != (
                expect.get("stage", ""), expect.get("error", ""), wanted or ""):
            different.append((case["name"], case["template"], answer, expect))
    assert different == []


def test_every_case_is_there() -> None:
    assert len(CASES) == 611 and hasattr(etcdinit, "Template")
