#!/usr/bin/env python3
"""etcdinit: configuration from etcd and services under supervision, in one small program.

It is read from top to bottom. Each room below opens with a banner; a room uses the rooms above it and
never one below. What a user can call stands in the last room, COMMAND LINE.
"""

from __future__ import annotations

import errno
import os
import sys
import time

__version__ = "0.1.0"

TYPE_CHECKING = False  # the typing module itself is never loaded; mypy knows this name
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any, NoReturn


# ======================================================================================================
# GROUND
# Errors, log lines, clocks and deadlines, settings from flags, environment and secret files.
# Knows nothing of etcd, templates or processes.
# ======================================================================================================

# ---- modules that are loaded at their first use -------------------------------------------------------

class Lazy:
    """A standard-library module that is imported when something of it is first used.

    PID 1 and short verbs load only what they touch; the reader still sees every import on one page.
    """

    def __init__(self, alias: str, module: str) -> None:
        self.__dict__.update(_alias=alias, _module=module)

    def __getattr__(self, attribute: str) -> Any:
        __import__(self._module)
        module = sys.modules[self._module]
        globals()[self._alias] = module  # from now on the name is the module itself
        return getattr(module, attribute)


LAZY_MODULES = {  # name in this file: module
    "ast": "_ast",  # the node classes alone; the ast module around them costs an enum import
    "binascii": "binascii",
    "datetime": "datetime",
    "difflib": "difflib",
    "fcntl": "fcntl",
    "grp": "grp",
    "hashlib": "hashlib",
    "json": "json",
    "pwd": "pwd",
    "re": "re",
    "select": "select",
    "signal": "_signal",  # the signal module wraps this one in enums
    "socket": "_socket",  # the socket module wraps this one in enums and a selector
    "ssl": "ssl",
    "struct": "_struct",
    "tomllib": "tomllib",
}

if TYPE_CHECKING:
    import _ast as ast
    import _socket as socket
    import binascii
    import datetime
    import difflib
    import fcntl
    import grp
    import hashlib
    import json
    import pwd
    import re
    import select
    import signal
    import ssl
    import struct
    import tomllib
else:
    for _alias, _module in LAZY_MODULES.items():
        globals()[_alias] = Lazy(_alias, _module)


# ---- errors -------------------------------------------------------------------------------------------

EXIT_OK = 0
EXIT_FAILED = 1  # something failed; each failure has been told
EXIT_USAGE = 2  # the command line or a setting is wrong
EXIT_NO_ETCD = 3  # etcd was not reached


class Error(Exception):
    """A failure that a user is told in one line: what failed, where, why, and what to do if it is known."""

    exit_code = EXIT_FAILED


class UsageError(Error):
    """The command line or a setting is wrong."""

    exit_code = EXIT_USAGE


def reason(error: BaseException) -> str:
    """Why an operation failed, without Python's decoration: the system's words for an OSError, else its text."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[:1].lower() + error.strerror[1:]
    return str(error) or type(error).__name__


# ---- clocks and durations -----------------------------------------------------------------------------

now = time.monotonic  # seconds on a clock that nobody sets; every deadline is a point on it

_DURATION_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def duration(text: str | float) -> float:
    """Seconds from Go's notation (time.ParseDuration: "50ms", "1m30s", "1.5h"); a bare number is seconds.

    Raises ValueError for anything else, for negative and for non-finite values.
    """
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        seconds = float(text)
        if not 0 <= seconds < 1e12:
            raise ValueError(f"a duration from 0s on is needed, not {text}")
        return seconds
    source = str(text).strip()
    rest, seconds = source, 0.0
    if rest.replace(".", "", 1).isascii() and rest.replace(".", "", 1).isdigit():
        return duration(float(rest))
    while rest:
        digits = len(rest) - len(rest.lstrip("0123456789."))
        unit_end = digits
        while unit_end < len(rest) and rest[unit_end] not in "0123456789.":
            unit_end += 1
        unit = _DURATION_UNITS.get(rest[digits:unit_end])
        if unit is None or not rest[:digits].replace(".", "", 1).isdigit():
            break
        seconds += float(rest[:digits]) * unit
        rest = rest[unit_end:]
    if rest or not source:
        raise ValueError(f'"{source}" is not a duration (examples: 500ms, 2s, 1m30s)')
    return duration(seconds)


# ---- log lines ----------------------------------------------------------------------------------------

LOG_LEVELS = {"debug": 0, "info": 1, "warning": 2, "error": 3, "fatal": 4}
_LOG_LEVEL_NAMES = {"warn": "warning", "panic": "fatal"}  # confd takes these words too
_secrets: list[str] = []  # texts that never leave the program; see conceal()
MASK = "******"


def conceal(secret: str) -> str:
    """Register a secret: from now on mask() blots it out of every log line and error. Returns it."""
    if secret and secret not in _secrets:
        _secrets.append(secret)
        _secrets.sort(key=len, reverse=True)  # a secret that contains another goes first
    return secret


def mask(text: str) -> str:
    """The text without any registered secret."""
    for secret in _secrets:
        if secret in text:
            text = text.replace(secret, MASK)
    return text


def printable(text: str) -> str:
    """The text on one line: control characters become Go-style escapes, so no input can forge a log line."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() if ord(c) < 0xD800
                   or ord(c) > 0xDFFF else f"\\x{ord(c) & 0xFF:02x}" for c in text)


class Log:
    """Writes log lines to standard error: `TIME HOST etcdinit[PID]: LEVEL message key=value`, or JSON.

    A line is one write(2), so lines of several processes do not mix. A full or closed pipe loses lines; it
    never blocks or ends the program. Callers name keys and files, never values of keys.
    """

    def __init__(self) -> None:
        self.threshold = LOG_LEVELS["info"]
        self.format = "text"
        self.fd = 2
        self.program = "etcdinit"

    def configure(self, level: str = "info", format: str = "text") -> None:
        """Set level (debug, info, warning, error, fatal) and format (text, json); UsageError for others."""
        level = _LOG_LEVEL_NAMES.get(level.lower(), level.lower())
        if level not in LOG_LEVELS:
            raise UsageError(f'not a valid log level: "{level}" (one of {", ".join(LOG_LEVELS)})')
        if format not in ("text", "json"):
            raise UsageError(f'not a valid log format: "{format}" (text or json)')
        self.threshold, self.format = LOG_LEVELS[level], format

    def line(self, level: str, message: str, fields: Mapping[str, object]) -> str:
        """The log line itself, without its newline."""
        wall = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(wall))
        if self.format == "json":
            record = {"time": f"{stamp}.{int(wall * 1000) % 1000:03d}Z", "level": level, "program": self.program,
                      "pid": os.getpid(), "message": mask(message), **{k: mask(str(v)) for k, v in fields.items()}}
            return json.dumps(record)
        text = "".join([message, *(f" {key}={value}" for key, value in fields.items())])
        return f"{stamp}Z {os.uname().nodename} {self.program}[{os.getpid()}]: {level.upper()} {printable(mask(text))}"

    def __call__(self, level: str, message: str, **fields: object) -> None:
        """Log a message at a level (see LOG_LEVELS), with optional fields."""
        if LOG_LEVELS[level] < self.threshold:
            return
        data = (self.line(level, message, fields) + "\n").encode("utf-8", "backslashreplace")
        try:
            os.write(self.fd, data)
        except OSError:
            pass  # nobody is left who could be told

    def debug(self, message: str, **fields: object) -> None:
        """What a person who searches for a fault needs."""
        self("debug", message, **fields)

    def info(self, message: str, **fields: object) -> None:
        """What happened, in normal work."""
        self("info", message, **fields)

    def warning(self, message: str, **fields: object) -> None:
        """What works but is likely not meant so."""
        self("warning", message, **fields)

    def error(self, message: str, **fields: object) -> None:
        """What failed."""
        self("error", message, **fields)


log = Log()


# ---- settings -----------------------------------------------------------------------------------------

class Setting:
    """One row of the settings table: a flag --name, its environment variable, kind, default and help."""

    __slots__ = ("name", "env", "kind", "default", "help")

    def __init__(self, name: str, env: str, kind: str, default: Any, help: str) -> None:
        self.name, self.env, self.kind, self.default, self.help = name, env, kind, default, help


# kinds: text, flag (a boolean), list (repeatable flag; comma-separated in the environment), duration (Go's)
SETTINGS = {row.name: row for row in (
    Setting("confdir", "ETCDINIT_CONFDIR", "text", "/etc/confd", "directory with conf.d/ and templates/"),
    Setting("compat", "ETCDINIT_COMPAT", "text", "", 'keep the quirks of a peer: "confd"'),
    Setting("prefix", "ETCD_PREFIX", "text", "", "prefix put before the prefix of every resource"),
    Setting("node", "ETCD_ENDPOINTS", "list", (), "etcd endpoint, as in http://10.0.0.1:2379; repeatable"),
    Setting("api", "ETCD_API", "text", "auto", "etcd API: auto, 2 or 3"),
    Setting("interval", "ETCDINIT_INTERVAL", "duration", 600.0, "time between two full passes"),
    Setting("log-level", "ETCDINIT_LOG_LEVEL", "text", "info", "debug, info, warning, error or fatal"),
    Setting("log-format", "ETCDINIT_LOG_FORMAT", "text", "text", "text or json"),
)}


def setting(name: str, flags: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Any:
    """The value of a setting: flag, else environment, else default. UsageError names what is wrong and where."""
    row = SETTINGS[name]
    where, value = f"--{name}", flags.get(name)
    if value is None:
        where, value = row.env, environ.get(row.env) or None
    if value is None:
        return row.default
    try:
        return _SETTING_KINDS[row.kind](value)
    except ValueError as error:
        raise UsageError(f"cannot use {where}: {error}") from None


def _boolean(value: str | bool) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if isinstance(value, bool):
        return value
    if value.lower() not in words:
        raise ValueError(f'"{value}" is neither yes nor no')
    return words[value.lower()]


def _words(value: str | Sequence[str]) -> tuple[str, ...]:
    parts = [value] if isinstance(value, str) else value
    return tuple(word.strip() for part in parts for word in part.split(",") if word.strip())


_SETTING_KINDS: dict[str, Callable[[Any], Any]] = {"text": str, "flag": _boolean, "list": _words, "duration": duration}


# ======================================================================================================
# DNS
# resolv.conf, message codec, resolver over UDP (EDNS) and TCP, SRV ordering.
# RFC 1035, 2782, 6891. Does not know what a name is looked up for.
# ======================================================================================================


# ======================================================================================================
# ETCD
# Endpoints, HTTP/1.1, the v3 JSON gateway, the v2 keys API. etcd API v3 (gRPC gateway) and v2 (keys).
# Knows nothing of templates and files.
# ======================================================================================================


# ======================================================================================================
# KEYS
# KeyTree: the keys at one revision, indexed by directory. Knows nothing of files and templates.
# ======================================================================================================


# ======================================================================================================
# TEMPLATE: VALUES
# Go's values in Python, and how Go prints them. Packages fmt and strconv of Go 1.27.
# ======================================================================================================


# ======================================================================================================
# TEMPLATE: FUNCTIONS
# What a template can call: Go's builtins, confd's functions and those of its maintained fork, the store's.
# ======================================================================================================


# ======================================================================================================
# TEMPLATE: LANGUAGE
# Go's text/template: lexer, parser, compiler to Python code, execution. Package text/template of Go 1.27.
# Does not know where keys come from.
# ======================================================================================================


# ======================================================================================================
# RENDER
# Template resources: staging, check, swap, reload. confd's conf.d/*.toml and its own additions.
# Does not know how processes are run for good.
# ======================================================================================================


# ======================================================================================================
# COMMAND LINE
# Verbs, flags, help. Everything a user types; it knows only the doors of the rooms above.
# ======================================================================================================

def main(argv: Sequence[str] = ()) -> int:
    """Run one command line (without the program's name); returns the exit code."""
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
