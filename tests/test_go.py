"""Real Go and our engine run the same random templates: same stage, same error to the letter, same output."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from support.go import GoTemplates
from support.random_templates import DATA, KV, Templates, deep_control, odd_calls, odd_tokens
from support.templates import run_template

BLOCK = 100
KINDS: dict[str, Callable[[int], str]] = {
    "right and wrong": lambda seed: Templates(seed).template(),
    "odd tokens": odd_tokens, "odd calls": odd_calls, "deep control": deep_control}


def differences(go: GoTemplates, seeds: range, kind: str = "right and wrong") -> list[str]:
    """One text for each seed whose template the two answer differently."""
    found = []
    for seed in seeds:
        template = KINDS[kind](seed)
        missingkey = ("", "", "zero", "error", "invalid")[seed % 5]
        num = "int" if seed % 7 == 0 else "float64"
        data = DATA if num == "float64" else {**DATA, "big": 1234}  # a range over an int as large as that does not end
        theirs = go.ask(template, data, num=num, kv=KV, missingkey=missingkey)
        try:
            ours = run_template(template, data, num=num, kv=KV, missingkey=missingkey)
        except Exception as error:  # the engine broke down: that is a difference like any other
            ours = {"stage": "crash", "error": f"{type(error).__name__}: {error}", "output": ""}
        if any(ours[field] != theirs[field] for field in ours):
            found.append(f"seed {seed} num={num} missingkey={missingkey}\n  {template!r}\n" + "".join(
                f"  {field}: ours {ours[field]!r}\n  {' ' * len(field)}  Go   {theirs[field]!r}\n"
                for field in ours if ours[field] != theirs[field]))
    return found


@pytest.mark.parametrize("start", range(0, 2000, BLOCK))
def test_the_engine_and_go_agree(go: GoTemplates, start: int) -> None:
    found = differences(go, range(start, start + BLOCK))
    if found:
        pytest.fail(f"{len(found)} of {BLOCK} differ, of them:\n" + "\n".join(sorted(found, key=len)[:3]),
                    pytrace=False)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "right and wrong"])
def test_the_engine_and_go_agree_on_the_odd(go: GoTemplates, kind: str) -> None:
    found = differences(go, range(500), kind)
    if found:
        pytest.fail(f"{len(found)} of 500 differ, of them:\n" + "\n".join(sorted(found, key=len)[:3]), pytrace=False)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_and_go_agree_on_many_more(go: GoTemplates, kind: str) -> None:
    start = int(os.environ.get("ETCDINIT_SEED", "100000"))
    found = differences(go, range(start, start + 50_000), kind)
    if found:
        pytest.fail(f"{len(found)} of 50,000 differ, of them:\n" + "\n".join(sorted(found, key=len)[:20]),
                    pytrace=False)


def test_the_random_templates_reach_the_whole_language(go: GoTemplates) -> None:
    """The generator is only worth something if most templates work and all kinds of errors come up."""
    answers = [go.ask(Templates(seed).template(), DATA, kv=KV) for seed in range(500)]
    stages = [answer["stage"] for answer in answers]
    assert stages.count("") > 150 and stages.count("exec") > 80 and stages.count("parse") > 30
