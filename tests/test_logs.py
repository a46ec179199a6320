"""The output of services on its way out: whole lines, nothing lost, nothing blocked."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import eventually
from support.container import Container, patched_program

import etcdinit

ROOT = Path(__file__).resolve().parent.parent


# ---- lines ------------------------------------------------------------------------------------------------

@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=6), st.sampled_from(["text", "prefix", "json"]))
def test_however_bytes_come_whole_lines_leave(data: bytes, cuts: list[int], style: str) -> None:
    output = etcdinit.Output("web", style)
    out = b""
    for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), 400], strict=True):
        part = output.feed(data[begin:end])
        assert not part or part.endswith(b"\n")
        out += part
    out += output.feed(b"", last=True)
    lines = data.split(b"\n")
    lines = lines if lines[-1] else lines[:-1]
    if style == "json":
        said = [json.loads(line) for line in out.splitlines()]
        assert [record["message"] for record in said] == [line.decode("utf-8", "replace").rstrip("\r")
                                                          for line in lines]
        assert all(record["service"] == "web" for record in said)
    else:
        head = b"[web] " if style == "prefix" else b""
        assert out == b"".join(head + line + b"\n" for line in lines)
    assert output.tail() == [line.decode("utf-8", "replace") for line in lines][-100:]


@given(st.lists(st.integers(0, 300), max_size=300))
def test_the_last_hundred_lines_are_kept_in_little_memory(lengths: list[int]) -> None:
    output = etcdinit.Output("web")
    lines = [f"{number} " + "x" * length for number, length in enumerate(lengths)]
    for line in lines:
        output.feed(line.encode() + b"\n")
    kept = output.tail()
    assert len(output.kept) <= 2 * etcdinit.TAIL_BYTES
    assert len(kept) <= 100
    whole = kept[1:] if kept and kept[0] not in lines else kept  # the first may be cut
    assert whole == lines[len(lines) - len(whole):]
    assert len(kept) >= min(len(lines), 100) or sum(map(len, kept)) + len(kept) >= etcdinit.TAIL_BYTES


def messages(container: Container, service: str) -> list[str]:
    """What a service said, from the container's output in JSON lines."""
    whole = container.text("log").rpartition("\n")[0]  # the last line may be on its way
    found = [json.loads(line) for line in whole.split("\n") if line]
    return [record["message"] for record in found if record.get("service") == service]


def test_lines_of_every_kind_arrive(container: Container) -> None:
    """A megabyte without a newline goes on in pieces; NUL, bytes that are no UTF-8, CR and LF stay one record."""
    write = "import os, sys\n"
    container.write("services/long/run", f"#!{sys.executable} -IS\n{write}data = b'x' * (1 << 20) + b'\\n'\n"
                    "while data: data = data[os.write(1, data):]\nimport time; time.sleep(1000)\n")
    container.write("services/odd/run", f"#!{sys.executable} -IS\n{write}"
                    "os.write(1, b'a\\0b\\n\\xff\\xfe\\ncr\\r\\n1%\\r2%\\n\\n\\x1b[31mred\\ntab\\t\"quote\"\\n')\n"
                    "import time; time.sleep(1000)\n")
    container.start(flags=["--log-format", "json"])
    eventually(lambda: len(messages(container, "odd")) == 7)
    assert messages(container, "odd") == ["a\0b", "\ufffd\ufffd", "cr", "1%\r2%", "", "\x1b[31mred", 'tab\t"quote"']
    eventually(lambda: sum(map(len, messages(container, "long"))) == 1 << 20)
    assert set("".join(messages(container, "long"))) == {"x"}


def test_an_unfinished_line_ends_with_its_process(container: Container) -> None:
    container.service("web", 'printf "no newline from $$"; exit 1', finish='printf "nor here"')
    container.start(flags=["--log-format", "prefix"])
    eventually(lambda: container.text("log").count("[web] no newline") >= 3, 30)
    container.stop()
    lines = [line for line in container.text("log").splitlines() if "no" in line and "[web]" in line]
    assert lines and all(line == "[web] nor here" or line.removeprefix("[web] no newline from ").isdigit()
                         for line in lines), lines


def test_two_writers_of_one_service_do_not_break_each_others_lines(container: Container) -> None:
    body = 'i=0; while [ $i -lt 2000 ]; do echo "%s $i abcdefghijklmnopqrstuvwxyz"; i=$((i+1)); done'
    container.service("web", f"({body % 'one'}) & ({body % 'two'}) >&2 & wait; exec sleep 1000")
    container.start(flags=["--log-format", "prefix"])
    eventually(lambda: container.text("log").count("[web]") == 4000, 30)
    for name in ("one", "two"):
        assert [line for line in container.text("log").splitlines() if f"[web] {name}" in line] == [
            f"[web] {name} {number} abcdefghijklmnopqrstuvwxyz" for number in range(2000)]


def test_the_last_words_of_all_reach_a_slow_reader(container: Container) -> None:
    """What is written while the container ends waits for its reader until the grace is over."""
    for name in ("a", "b"):
        container.service(name, f"trap 'seq -f \"{name} %g\" 20000; exit 0' TERM; touch $PLACE/{name}\n"
                          "while :; do sleep 0.05; done")
    read, write = os.pipe()
    process = container.start(stdout=write)
    os.close(write)
    eventually(lambda: (container.place / "a").exists() and (container.place / "b").exists())
    container.signal(signal.SIGTERM)
    time.sleep(1.0)
    said = b""
    while data := os.read(read, 4096):
        said += data
    os.close(read)
    assert process.wait(20) == 0
    for letter in "ab":
        assert [line for line in said.decode().splitlines() if line.startswith(letter)] == [
            f"{letter} {number}" for number in range(1, 20001)]


def test_a_reader_that_never_reads_does_not_outlast_the_grace(container: Container) -> None:
    container.environ["ETCDINIT_GRACE"] = "2s"
    container.service("web", "trap 'yes | head -c 300000; exit 0' TERM; touch $PLACE/there\n"
                      "while :; do sleep 0.05; done")
    read, write = os.pipe()
    container.start(stdout=write)
    os.close(write)
    eventually(lambda: (container.place / "there").exists())
    assert container.stop() < 20
    os.close(read)


# ---- pipes that outlive both ends ---------------------------------------------------------------------------

# writes numbered lines, goes on after a restart where it was; killed between line and count it repeats one line
PRODUCER = """#!{python} -IS
import mmap, os, signal, time
file = os.open("{place}/count", os.O_RDWR | os.O_CREAT)
os.ftruncate(file, 8)
count = mmap.mmap(file, 8)
ended = []
signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))
number = int.from_bytes(count[:8], "little")
while number < {total} and not ended:
    number += 1
    os.write(1, b"%d\\n" % number)
    count[:8] = number.to_bytes(8, "little")
    if not number % 100:
        time.sleep({rest})
while not ended:
    signal.pause()
"""
# moves what comes into a file inside the kernel: whenever it is killed, nothing is between pipe and file
CONSUMER = """#!{python} -IS
import os
out = os.open("{place}/lines", os.O_WRONLY | os.O_CREAT)
os.lseek(out, 0, os.SEEK_END)
while os.splice(0, out, 1 << 16):
    pass
"""


def numbered_lines(box: Container, total: int, seed: int, pause: float) -> None:
    """Run producer and consumer through random deaths of both and of the supervisor's own process image.

    pause: seconds between two deaths, at most; there are thirty or more.
    """
    chance = random.Random(seed)
    for name, text in (("web", PRODUCER), ("web/log", CONSUMER)):
        box.write(f"services/{name}/run", text.format(python=sys.executable, place=box.place, total=total,
                                                      rest=1500 * pause / total))
    box.start()
    box.up("web", "web/log")
    count, kills, deaths = box.place / "count", 0, 0
    eventually(lambda: count.exists() and count.stat().st_size == 8)
    while int.from_bytes(count.read_bytes(), "little") < total:
        what = chance.choice(["web:t", "web:k", "web/log:t", "web/log:k", "web:du", "web/log:du", "web:ku", "fault"])
        deaths += 1
        kills += what.startswith("web:k")
        if what == "fault":
            (box.place / "fault").touch()
            box.signal(signal.SIGHUP)
            eventually(lambda: not (box.place / "fault").exists())
        else:
            name, _, commands = what.partition(":")
            for letter in commands:
                box.control(name, letter)
        time.sleep(chance.random() * pause)
    box.control("web/log", "u")
    assert deaths >= 20
    assert box.stop() < 60
    lines = box.text("lines").split("\n")
    assert lines.pop() == ""
    numbers = list(map(int, lines))
    assert set(numbers) == set(range(1, total + 1))
    again = [at for at in range(1, len(numbers)) if numbers[at] != numbers[at - 1] + 1]
    assert all(numbers[at] == numbers[at - 1] for at in again) and len(again) <= kills, again[:10]


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[Container]:
    box = Container(patched_program(tmp_path))
    yield box
    box.close()


def test_numbered_lines_pass_through_random_deaths_of_both_ends(faulty: Container) -> None:
    numbered_lines(faulty, 40_000, 1, 0.3)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(3))
def test_a_million_numbered_lines_pass_through_random_deaths_of_both_ends(faulty: Container, seed: int) -> None:
    numbered_lines(faulty, 1_000_000, seed, 4.0)
