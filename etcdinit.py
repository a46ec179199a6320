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
# Patterns are those of Go's path.Match, paths those of Go's path.Clean.
# ======================================================================================================

def clean_key(*parts: str) -> str:
    """One absolute key from parts, as Go's path.Join("/", parts...): no `//`, `.`, `..` or trailing slash."""
    path = "/".join(parts)
    if path[:1] == "/" and path[-1] != "/" and "//" not in path and "/." not in path:
        return path  # nearly every key there is
    names: list[str] = []
    for name in path.split("/"):
        if name == "..":
            del names[-1:]
        elif name not in ("", "."):
            names.append(name)
    return "/" + "/".join(names)


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def bytewise(texts: Iterable[str]) -> list[str]:
    """The texts in the order of their UTF-8 bytes, which is etcd's and Go's."""
    texts = list(texts)
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:  # bytes that are not UTF-8: Python would sort their surrogates too low
        return sorted(texts, key=_utf8)
    return sorted(texts)


class KeyTree:
    """The keys of a store at one revision: a mapping of absolute, cleaned keys to text, with directories.

    A key can be a leaf and a directory at once (etcd v3 allows it); a directory exists as long as a key is
    below it. `values_by_key` may be read as a plain dict; put() and delete() change it. The directory
    index is made when it is first asked for.
    """

    __slots__ = ("revision", "values_by_key", "_directories", "_sorted")

    def __init__(self, pairs: Mapping[str, str] | Iterable[tuple[str, str]] = (), revision: int = 0) -> None:
        """pairs: key and value, later ones win; revision: that of the store they were read at."""
        self.revision = revision
        values = self.values_by_key = dict(pairs)
        joined = "\n".join(values)
        if values and (joined[:1] != "/" or joined[-1] == "/" or "/\n" in joined or "//" in joined or "/." in joined
                       or joined.count("\n/") != joined.count("\n") or joined.count("\n") != len(values) - 1):
            self.values_by_key = {clean_key(key): value for key, value in values.items()}
        self._directories: dict[str, set[str]] | None = None  # path without its final slash: names below it
        self._sorted: dict[str, list[str]] = {}  # the same names in order, for the directories that were asked for

    def __getitem__(self, key: str) -> str:
        return self.values_by_key[key]

    def __contains__(self, key: object) -> bool:
        return key in self.values_by_key

    def __len__(self) -> int:
        return len(self.values_by_key)

    def __iter__(self) -> Iterator[str]:
        """Every key, in bytewise order."""
        return iter(bytewise(self.values_by_key))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeyTree) and self.values_by_key == other.values_by_key

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<KeyTree of {len(self)} keys at revision {self.revision}>"  # never a value

    def get(self, key: str, default: str | None = None) -> str | None:
        """The value of a key, or the default."""
        return self.values_by_key.get(key, default)

    def items(self) -> list[tuple[str, str]]:
        """Every key with its value, in bytewise order of the keys."""
        return [(key, self.values_by_key[key]) for key in self]

    def is_dir(self, path: str) -> bool:
        """True when a key lies below the path."""
        return bool(self._index().get(path.rstrip("/")))

    def children(self, path: str) -> list[str]:
        """The names directly below a directory, leaves and directories, each once, in bytewise order."""
        return list(self._names(path.rstrip("/")))

    def below(self, path: str) -> list[tuple[str, str]]:
        """The keys at and below a path with their values, in bytewise order; cost is that of the answer."""
        path = path.rstrip("/")
        found = [path or "/"] if (path or "/") in self.values_by_key else []
        self._collect(path, found)
        return [(key, self.values_by_key[key]) for key in bytewise(found)]

    def under(self, prefix: str, keys: Iterable[str] = ("/",)) -> KeyTree:
        """What a template sees: the tree at and below prefix joined with each key, its keys without the prefix."""
        prefix = clean_key(prefix).rstrip("/")
        pairs = [pair for key in keys for pair in self.below(clean_key(prefix, key))]
        return KeyTree([(key.removeprefix(prefix) or "/", value) for key, value in pairs], self.revision)

    def glob(self, pattern: str) -> list[tuple[str, str]]:
        """The keys that match a pattern of Go's path.Match, with their values, in bytewise order.

        Walks the directories that the pattern reaches, not all keys. ValueError for a malformed pattern,
        but, like confd, only if the tree has a key at all.
        """
        values = self.values_by_key
        if not values:
            return []
        steps, whole = _glob_steps(pattern)
        paths = [""] if steps[0] in ("", None, False) else []  # what stands before the first slash: nothing
        for step in steps[steps[0] is not False:]:
            if step is False:  # from this segment on a character class can match "/"
                reached: list[str] = []
                for path in paths:
                    self._collect(path, reached)
                paths = [key for key in reached if whole.fullmatch(key)]
                break
            paths = [f"{path}/{name}" for path in paths for name in self._matching(path, step)]
        found = [key for key in paths if key in values]
        if "/" in values and whole.fullmatch("/"):
            found.append("/")
        return [(key, values[key]) for key in bytewise(found)]

    def put(self, key: str, value: str) -> None:
        """Set a key, new or not."""
        key = clean_key(key)
        if key not in self.values_by_key and self._directories is not None:
            self._link(key)
        self.values_by_key[key] = value

    def delete(self, key: str) -> bool:
        """Remove a key; False if there was none. Directories left empty go with it."""
        key = clean_key(key)
        if self.values_by_key.pop(key, None) is None:
            return False
        directories, values = self._directories, self.values_by_key
        while directories is not None and key not in ("", "/") and key not in directories and key not in values:
            parent, _, name = key.rpartition("/")
            directories[parent].discard(name)
            self._sorted.pop(parent, None)
            if parent and not directories[parent]:
                del directories[parent]
            key = parent
        return True

    def _index(self) -> dict[str, set[str]]:
        if self._directories is None:
            directories = self._directories = {"": set()}
            for key in self.values_by_key:
                parent, _, name = key.rpartition("/")
                if parent in directories:
                    directories[parent].add(name)
                else:
                    self._link(key)
            directories[""].discard("")  # the key "/" lies in no directory
        return self._directories

    def _link(self, key: str) -> None:
        """Enter a new key into its directory, and that into its own, up to the first that exists."""
        directories = self._directories
        assert directories is not None
        while key not in ("", "/"):
            parent, _, name = key.rpartition("/")
            self._sorted.pop(parent, None)
            if parent in directories:
                directories[parent].add(name)
                return
            directories[parent] = {name}
            key = parent

    def _names(self, path: str) -> list[str]:
        names = self._sorted.get(path)
        if names is None:
            names = self._sorted[path] = bytewise(self._index().get(path, ()))
        return names

    def _collect(self, path: str, found: list[str]) -> None:
        """Append every key below a path, in no order."""
        directories, values, waiting = self._index(), self.values_by_key, [path]
        while waiting:
            path = waiting.pop()
            for name in directories.get(path, ()):
                key = f"{path}/{name}"
                if key in values:
                    found.append(key)
                if key in directories:
                    waiting.append(key)

    def _matching(self, path: str, step: Any) -> Iterable[str]:
        """The names below a path that one step of a pattern matches: a literal name, None for all, or a regex."""
        names: Iterable[str] = self._index().get(path, ())
        if step is None:
            return names
        if isinstance(step, str):
            return (step,) if step in names else ()
        return [name for name in names if step.fullmatch(name)]


# ---- patterns -----------------------------------------------------------------------------------------

def _glob_steps(pattern: str) -> tuple[list[Any], re.Pattern[str]]:
    """A pattern as one step for each path segment, and as one regular expression for a whole key.

    A step is a literal name, None for `*`, a regular expression, or False from the segment on in which a
    character class can match "/" (Go lets it). ValueError: Go's path.ErrBadPattern.
    """
    tokens: list[tuple[str, str]] = []  # (kind, regular expression of one character or "")
    steps: list[Any] = []
    start = 0

    def end_of_segment() -> None:
        nonlocal start
        segment, start = tokens[start:], len(tokens) + 1
        if steps and steps[-1] is False or any(kind == "slash class" for kind, _ in segment):
            steps.append(False)
        elif all(kind == "literal" for kind, _ in segment):
            steps.append("".join(text for _, text in segment))
        elif all(kind == "star" for kind, _ in segment):
            steps.append(None)
        else:
            steps.append(re.compile(_glob_regex(segment)))

    position = 0
    while position < len(pattern):
        character = pattern[position]
        position += 1
        if character == "*":
            tokens.append(("star", ""))
        elif character == "?":
            tokens.append(("any", "[^/]"))
        elif character == "[":
            position = _glob_class(pattern, position, tokens)
        else:
            if character == "\\":
                character = pattern[position:position + 1]
                position += 1
                if not character:
                    raise ValueError("syntax error in pattern")
            if character == "/":
                end_of_segment()
            tokens.append(("literal", character))
    end_of_segment()
    return steps, re.compile(_glob_regex(tokens))


def _glob_regex(tokens: list[tuple[str, str]]) -> str:
    """The regular expression of a token list. Like Go, a chunk after a star takes the first place it fits."""
    chunks, starred = [""], [False]
    for kind, text in tokens:
        if kind == "star":
            if chunks[-1] or not starred[-1]:
                chunks.append("")
                starred.append(True)
        else:
            chunks[-1] += re.escape(text) if kind == "literal" else text
    last = len(chunks) - 1
    return "".join(chunk if not star else f"[^/]*?{chunk}" if index == last else f"(?>[^/]*?{chunk})"
                   for index, (chunk, star) in enumerate(zip(chunks, starred, strict=True)))


def _glob_class(pattern: str, position: int, tokens: list[tuple[str, str]]) -> int:
    """Read a character class from behind its `[`; append its token; the position behind its `]`."""

    def character() -> str:
        nonlocal position
        if pattern[position:position + 1] == "\\":
            position += 1
        elif pattern[position:position + 1] in ("-", "]"):
            raise ValueError("syntax error in pattern")
        found = pattern[position:position + 1]
        position += 1
        if position >= len(pattern) or "\udc80" <= found <= "\udcff":  # unclosed, or not UTF-8
            raise ValueError("syntax error in pattern")
        return found

    negated = pattern[position:position + 1] == "^"
    position += negated
    ranges: list[tuple[str, str]] = []
    while not ranges or pattern[position:position + 1] != "]":
        low = high = character()
        if pattern[position] == "-":
            position += 1
            high = character()
        ranges.append((low, high))
    inside = "".join(f"\\U{ord(low):08x}-\\U{ord(high):08x}" for low, high in ranges if low <= high)
    text = f"[{'^' * negated}{inside}]" if inside else "(?s:.)" if negated else "(?!)"
    slash = any(low <= "/" <= high for low, high in ranges) != negated
    tokens.append(("slash class" if slash else "class", text))
    return position + 1


# ---- keys from a file ---------------------------------------------------------------------------------

def keys_from_file(path: str) -> KeyTree:
    """The keys of a JSON or TOML file (by its name: .toml, else JSON), nested or flat, instead of a store's.

    Names of tables and indices of lists become path elements, a name may itself hold slashes; numbers,
    booleans and dates become text as Go writes them. Error names the file, and the line or the key.
    """
    try:
        with open(path, "rb") as file:
            text = file.read().decode("utf-8")
        data = tomllib.loads(text) if path.endswith(".toml") else json.loads(text)
    except OSError as error:
        raise Error(f"cannot read keys from {path}: {reason(error)}") from None
    except UnicodeDecodeError as error:
        raise Error(f"cannot read keys from {path}: not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise Error(f"cannot read keys from {path}: nested too deep") from None
    except json.JSONDecodeError as error:
        raise Error(f"cannot read keys from {path}:{error.lineno}: {error.msg[:1].lower()}{error.msg[1:]}"
                    f" (column {error.colno})") from None
    except ValueError as error:  # tomllib has the place in its text only: "... (at line 3, column 5)"
        message, _, place = str(error).partition(" (at line ")
        line, _, column = place.rstrip(")").partition(", ")
        raise Error(f"cannot read keys from {path}{':' * bool(line)}{line}: {message[:1].lower()}{message[1:]}"
                    + (f" ({column})" if column else "")) from None
    if not isinstance(data, dict):
        raise Error(f"cannot read keys from {path}: an object of keys is needed at the top")
    values: dict[str, str] = {}
    waiting: list[tuple[str, Any]] = [("/", data)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting.extend((clean_key(key, name), child) for name, child in reversed(value.items()))
        elif isinstance(value, list):
            waiting.extend((clean_key(key, str(index)), child) for index, child in enumerate(value))
        elif value is None:
            raise Error(f"cannot read keys from {path}: key {key} is null (leave it out, or give it a text)")
        elif key in values:
            raise Error(f"cannot read keys from {path}: key {key} is given twice")
        else:
            values[key] = _file_value(value)
    return KeyTree(values)


def _file_value(value: object) -> str:
    """A scalar of a keys file as text, the way confd's file backend (Go) writes it."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, float):  # an int, or one of TOML's dates and times
        return str(value.isoformat()) if hasattr(value, "isoformat") else str(value)
    if value != value or value in (float("inf"), float("-inf")):
        return "NaN" if value != value else "+Inf" if value > 0 else "-Inf"
    mantissa, _, exponent = repr(value).partition("e")  # strconv.FormatFloat(value, 'f', -1, 64)
    sign, mantissa = mantissa[:mantissa.startswith("-")], mantissa.lstrip("-")
    whole, _, fraction = mantissa.partition(".")
    shift = int(exponent or 0)
    digits, point = whole + fraction, len(whole) + shift
    digits = "0" * -point + digits if point < 0 else digits + "0" * (point - len(digits))
    point = max(point, 0)
    fraction = digits[point:].rstrip("0")
    return sign + (digits[:point].lstrip("0") or "0") + ("." + fraction if fraction else "")


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
