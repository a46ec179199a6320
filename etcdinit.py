#!/usr/bin/env python3
"""etcdinit: configuration from etcd and services under supervision, in one small program.

It is read from top to bottom. Each room below opens with a banner; a room uses the rooms above it and
never one below. What a user can call stands in the last room, COMMAND LINE.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import time

__version__ = "0.1.0"

TYPE_CHECKING = False  # the typing module itself is never loaded; mypy knows this name
if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
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
    "ctypes": "ctypes",
    "datetime": "datetime",
    "difflib": "difflib",
    "fcntl": "fcntl",
    "gc": "gc",
    "grp": "grp",
    "heapq": "_heapq",  # heapq without its Python half
    "json": "json",
    "json_c": "_json",  # the quoting of strings alone: json itself loads re
    "marshal": "marshal",
    "md5": "_md5",  # hashlib would load OpenSSL, several MB
    "pwd": "pwd",
    "re": "re",
    "resource": "resource",
    "select": "select",
    "sha2": "_sha2" if sys.version_info >= (3, 12) else "_sha256",  # as md5
    "signal": "_signal",  # the signal module wraps this one in enums
    "sre": "_sre",  # ready-made patterns, without re
    "socket": "_socket",  # the socket module wraps this one in enums and a selector
    "ssl": "_ssl",  # the ssl module brings socket, selectors and enum: 3 MB
    "struct": "_struct",
    "tomllib": "tomllib",
}

if TYPE_CHECKING:
    import _ast as ast
    import _json as json_c
    import _md5 as md5  # type: ignore[import-not-found]
    import _sha256 as sha2  # type: ignore[import-not-found]
    import _socket as socket
    import _sre as sre  # type: ignore[import-not-found]
    import _ssl as ssl
    import binascii
    import ctypes
    import datetime
    import difflib
    import fcntl
    import gc
    import grp
    import heapq
    import json
    import marshal
    import pwd
    import re
    import resource
    import select
    import signal
    import struct
    import tomllib
else:
    for _alias, _module in LAZY_MODULES.items():
        globals()[_alias] = Lazy(_alias, _module)


# of the static executable: subreaper(), trim(), BUILD (the versions of what it is made of); see LAUNCHER in build.py
native: Any = __import__("_etcdinit") if "_etcdinit" in sys.builtin_module_names else None


# ---- short ways to json, re and tomllib ----------------------------------------------------------------
# The modules themselves cost more than all the rest of a render of a few keys: json 5 ms, re 5 ms, tomllib 10 ms.

_regexes: dict[str, re.Pattern[str]] = {}


def regex(pattern: str) -> re.Pattern[str]:
    """A regular expression, compiled once; the executable has those ready that are constants of this file."""
    found = _regexes.get(pattern)
    if found is None:
        ready = __import__("_etcdinit_patterns").PATTERNS.get(pattern) if native else None
        found = _regexes[pattern] = sre.compile(pattern, *ready) if ready else re.compile(pattern)
    return found


class _JsonRules:
    """What the scanner of JSON wants to know."""

    strict, object_hook, object_pairs_hook, parse_float, parse_int = True, None, None, float, int
    parse_constant = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}.__getitem__


def from_json(data: bytes | bytearray | str) -> Any:
    """json.loads: the same values and errors, without loading the module unless there is an error to describe."""
    try:
        text = data if isinstance(data, str) else data.decode("utf-8", "strict")
        text = text.strip(" \t\n\r")
        value, end = json_c.make_scanner(_JsonRules)(text, 0)  # type: ignore[arg-type]
        if end == len(text):
            return value
    except (StopIteration, ValueError):
        pass
    return json.loads(data)


def to_json(value: Any) -> str:
    """json.dumps of dictionaries, lists, texts, numbers and None, without blanks."""
    encoder = json_c.make_encoder(None, None, json_c.encode_basestring_ascii,  # type: ignore[arg-type]
                                  None, ":", ",", False, False, True)
    return "".join(encoder(value, 0))


_TOML_VALUE = r"""(?:"[^"\\\x00-\x1f\x7f]*"|'[^'\x00-\x1f\x7f]*'|true|false|0|[1-9][0-9]{0,17})"""
_TOML_LINE = (r"(?a)[ \t]*(?:\[([\w-]+)\]|\[\[([\w-]+)\]\]|([\w-]+)[ \t]*=[ \t]*"  # table, element, key
              rf"(?:({_TOML_VALUE})|(\[[ \t\n]*(?:{_TOML_VALUE}[ \t\n]*,[ \t\n]*)*(?:{_TOML_VALUE}[ \t\n]*)?\])))?"
              r"[ \t]*(?:#[^\x00-\x08\x0a-\x1f\x7f]*)?(?:\n|\Z)")


def _toml_value(text: str) -> Any:
    return text[1:-1] if text[0] in "\"'" else text == "true" if text[0] in "tf" else int(text)


def from_toml(text: str) -> dict[str, Any]:
    """tomllib.loads. What files of conf.d mostly are, tables of plain texts, numbers and lists, is read right here."""
    document: dict[str, Any] = {}
    arrays: dict[str, list[dict[str, Any]]] = {}
    table, line, item, at = document, regex(_TOML_LINE), regex(_TOML_VALUE), 0
    while at < len(text):
        found = line.match(text, at)
        if found is None:
            return tomllib.loads(text)
        at = found.end()
        name, element, key, value, array = found.groups()
        if name or element:
            if name in document or element in document and element not in arrays:
                return tomllib.loads(text)
            table = {}
            if name:
                document[name] = table
            else:
                document[element] = arrays.setdefault(element, [])
                arrays[element].append(table)
        elif key:
            if key in table:
                return tomllib.loads(text)
            table[key] = _toml_value(value) if value else [_toml_value(each) for each in item.findall(array)]
    return document


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


def bug(error: BaseException) -> str:
    """What to tell of an exception that nobody foresaw: its type and place, not its text, which may hold a value."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" in {trace.tb_frame.f_code.co_name}, line {trace.tb_lineno}" if trace is not None else ""
    return f"{type(error).__name__}{place} (a bug of etcdinit {__version__}, please report it)"


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: "; did you mean X?" if a known one is near, else ""."""
    found = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {found[0]}?" if found else ""


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


def conceal(secret: str, instead_of: str = "") -> str:
    """Register a secret: from now on mask() blots it out of every log line and error. Returns it.

    instead_of: one that it replaces, which nobody needs to hide any more.
    """
    for old in {instead_of, printable(instead_of)} & set(_secrets):
        _secrets.remove(old)
    for form in {secret, printable(secret)} - {"", *_secrets}:  # an error may have made control characters visible
        _secrets.append(form)
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
    return "".join(c if c.isprintable() else ascii(c)[1:-1] if ord(c) < 0xD800
                   or ord(c) > 0xDFFF else f"\\x{ord(c) & 0xFF:02x}" for c in text)


def json_text(text: str) -> str:
    """The text as a JSON string, quotes included, in ASCII; bytes that were no UTF-8 become `?`."""
    return json_c.encode_basestring_ascii(text.encode("utf-8", "replace").decode())


def readable(fd: int, seconds: float) -> bool:
    """Whether the descriptor can be read, or is at its end, within that time."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def writable(fd: int) -> bool:
    """Whether the descriptor takes up to PIPE_BUF bytes now without blocking, or says at once that it cannot."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(0))


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
        if format not in ("text", "json", "prefix", "raw"):  # the last two are about lines of services alone
            raise UsageError(f'not a valid log format: "{format}" (text, json, prefix or raw)')
        self.threshold, self.format = LOG_LEVELS[level], format

    def line(self, level: str, message: str, fields: Mapping[str, object]) -> str:
        """The log line itself, without its newline."""
        wall = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(wall))
        if self.format == "json":
            record = {"time": f"{stamp}.{int(wall * 1000) % 1000:03d}Z", "level": level, "program": self.program,
                      "message": mask(message), **{k: mask(str(v)) for k, v in fields.items()}}
            pairs = ", ".join(f"{json_text(key)}: {json_text(value)}" for key, value in record.items())
            return f'{{{pairs}, "pid": {os.getpid()}}}'
        text = "".join([message, *(f" {key}={value}" for key, value in fields.items())])
        return f"{stamp}Z {os.uname().nodename} {self.program}[{os.getpid()}]: {level.upper()} {printable(mask(text))}"

    def __call__(self, level: str, message: str, **fields: object) -> None:
        """Log a message at a level (see LOG_LEVELS), with optional fields."""
        if LOG_LEVELS[level] < self.threshold:
            return
        data = (self.line(level, message, fields) + "\n").encode("utf-8", "backslashreplace")
        try:
            if writable(self.fd):
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


# ---- signals ------------------------------------------------------------------------------------------

SIGNALS = {  # Linux's numbers, so that no module is loaded to know them
    "HUP": 1, "INT": 2, "QUIT": 3, "ILL": 4, "TRAP": 5, "ABRT": 6, "BUS": 7, "FPE": 8, "KILL": 9, "USR1": 10,
    "SEGV": 11, "USR2": 12, "PIPE": 13, "ALRM": 14, "TERM": 15, "STKFLT": 16, "CHLD": 17, "CONT": 18, "STOP": 19,
    "TSTP": 20, "TTIN": 21, "TTOU": 22, "URG": 23, "XCPU": 24, "XFSZ": 25, "VTALRM": 26, "PROF": 27, "WINCH": 28,
    "IO": 29, "PWR": 30, "SYS": 31}
SIGNAL_NAMES = {number: f"SIG{name}" for name, number in SIGNALS.items()}


def signal_number(text: str) -> int:
    """The signal that a name (TERM, SIGTERM, RTMIN+3), or a number, stands for; ValueError for anything else."""
    name = text.strip().upper().removeprefix("SIG")
    if name.isascii() and name.isdigit() and 0 < int(name) <= 64:
        return int(name)
    base, _, offset = name.partition("+")
    if base == "RTMIN" and (offset or "0").isdigit() and int(offset or 0) <= 30:
        return 34 + int(offset or 0)  # as every C library but musl counts, and as container engines send it
    if name not in SIGNALS:
        raise ValueError(f'"{text}" is not a signal')
    return SIGNALS[name]


# ---- small files --------------------------------------------------------------------------------------

def read_small(path: str, limit: int = 4096) -> bytes | None:
    """The begin of a file, None if there is none. Never blocks, whatever stands there; OSError otherwise."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return os.read(fd, limit)
    except BlockingIOError:  # a FIFO that somebody writes to
        return b""
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes) -> None:
    """Write all of it to a descriptor. OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view):]


def replace_file(path: str, data: bytes, mode: int = 0o644) -> None:
    """Put a whole file in the place of another, so that no reader ever sees half of one. OSError."""
    fd = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        write_all(fd, data)
    finally:
        os.close(fd)
    os.rename(f"{path}.new", path)


def remove_file(path: str) -> None:
    """Remove a file that may be gone already. OSError."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def remove_tree(path: str) -> None:
    """Remove a directory and all in it; links are removed, not followed. What cannot be removed stays."""
    try:
        for entry in list(os.scandir(path)):
            if entry.is_dir(follow_symlinks=False):
                remove_tree(entry.path)
            else:
                os.unlink(entry.path)
        os.rmdir(path)
    except OSError as error:
        log.warning(f"cannot remove {path}: {reason(error)}")


# ---- settings -----------------------------------------------------------------------------------------

class Setting:
    """One row of the settings table: a flag --name, its environment variable, kind, default and help."""

    __slots__ = ("name", "env", "kind", "default", "help")

    def __init__(self, name: str, env: str, kind: str, default: Any, help: str) -> None:
        self.name, self.env, self.kind, self.default, self.help = name, env, kind, default, help


# kinds: text, flag (a boolean), list (repeatable flag; between commas or spaces in the environment), duration (Go's),
# credential (for secret(): the text, or by NAME_FILE or /run/secrets a file), secret (the same, and never shown)
SETTINGS = {row.name: row for row in (
    Setting("confdir", "ETCDINIT_CONFDIR", "text", "/etc/confd", "directory with conf.d/ and templates/"),
    Setting("compat", "ETCDINIT_COMPAT", "text", "", 'keep the quirks of a peer: "confd"'),
    Setting("prefix", "ETCD_PREFIX", "text", "", "prefix put before the prefix of every resource"),
    Setting("node", "ETCD_ENDPOINTS", "list", (), "etcd endpoint, as in https://10.0.0.1:2379; repeatable"),
    Setting("api", "ETCD_API", "text", "auto", "etcd API: auto, 2 or 3"),
    Setting("srv-domain", "ETCD_SRV_DOMAIN", "text", "", "domain whose DNS SRV records tell where etcd is"),
    Setting("srv-name", "ETCD_SRV_NAME", "text", "", "suffix of etcd's SRV names: _etcd-client-ssl-NAME._tcp"),
    Setting("srv-record", "ETCD_SRV_RECORD", "text", "", "SRV record that is asked as it stands, instead of a domain"),
    Setting("scheme", "ETCD_SCHEME", "text", "", "https (default), or http: must be said to send a password so"),
    Setting("username", "ETCD_USERNAME", "credential", "", "etcd user"),
    Setting("password", "ETCD_PASSWORD", "secret", "", "its password"),
    Setting("ca", "ETCD_CA", "credential", "", "CA certificates to trust: a path, PEM text, or base64 of PEM"),
    Setting("cert", "ETCD_CERT", "credential", "", "client certificate, in the same forms"),
    Setting("key", "ETCD_KEY", "secret", "", "its key, in the same forms; as text it stays in memory"),
    Setting("tls-server-name", "ETCD_TLS_SERVER_NAME", "text", "",
            'name that certificates must hold; else the SRV domain or host ("target": the SRV target)'),
    Setting("insecure-skip-verify", "ETCD_INSECURE_SKIP_VERIFY", "flag", False, "do not verify certificates"),
    Setting("connect-timeout", "ETCD_CONNECT_TIMEOUT", "duration", 2.0, "time for a connection to one endpoint"),
    Setting("answer-timeout", "ETCD_ANSWER_TIMEOUT", "duration", 5.0, "time for a request, over all endpoints"),
    Setting("resolv-conf", "ETCDINIT_RESOLV_CONF", "text", "/etc/resolv.conf",
            "whom to ask for names; a nameserver may have a port there, as in [10.0.0.1]:5353"),
    Setting("keep-secrets", "ETCDINIT_KEEP_SECRETS", "flag", False, "leave secrets in the environment of services"),
    Setting("interval", "ETCDINIT_INTERVAL", "duration", 600.0, "time between two full passes"),
    Setting("max-outage", "ETCDINIT_MAX_OUTAGE", "duration", 0.0,
            "leave with exit code 3 when etcd was away for that long; 0: never"),
    Setting("log-level", "ETCDINIT_LOG_LEVEL", "text", "info", "debug, info, warning, error or fatal"),
    Setting("log-format", "ETCDINIT_LOG_FORMAT", "text", "text", "text or json; for services also prefix or raw"),
    Setting("services", "ETCDINIT_SERVICES", "text", "/etc/services.d", "directory with a directory for each service"),
    Setting("run", "ETCDINIT_RUN", "text", "/run/service", "directory for the state of services; it must be writable"),
    Setting("grace", "ETCDINIT_GRACE", "duration", 8.0, "time that a shutdown may take before all is killed"),
    Setting("signals", "ETCDINIT_SIGNALS", "list", (),
            "what a signal to init does: stop, rescan, ignore, forward, or the signal that CMD gets; repeatable"),
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
    return tuple(dict.fromkeys(word for part in parts for word in part.replace(",", " ").split()))


_SETTING_KINDS: dict[str, Callable[[Any], Any]] = {"text": str, "flag": _boolean, "list": _words, "duration": duration,
                                                   "credential": str, "secret": str}


# ---- credentials and secrets --------------------------------------------------------------------------

SECRETS_DIRECTORY = "/run/secrets"  # where container runtimes put secrets as files
SECRET_SIZE = 1 << 20  # bytes of a credential file: a bundle of all public authorities has 200 KB


def read_regular(path: str, limit: int) -> bytes:
    """A whole file. OSError, also for more than limit bytes, and for a FIFO or a device, which may block for ever."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        kind = os.fstat(file).st_mode
        if not stat.S_ISREG(kind):
            raise OSError(errno.EINVAL, "it is a directory" if stat.S_ISDIR(kind) else "it is not a regular file")
        data = b""
        while piece := os.read(file, limit + 1 - len(data)):
            data += piece
    finally:
        os.close(file)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit} bytes")
    return data


class Secret:
    """A credential: a text, or a file that is read again when it changes.

    where: the setting it came from, for messages; hidden: its text is blotted out of everything that is shown.
    """

    __slots__ = ("where", "path", "hidden", "_text", "_stamp")

    def __init__(self, where: str, text: str = "", path: str = "", hidden: bool = False) -> None:
        self.where, self.path, self.hidden = where, path, hidden
        self._text = text.rstrip("\r\n")  # `echo pass | base64` has made many a Kubernetes secret
        self._stamp: tuple[int, ...] = ()  # of the file when it was read
        self._hide()

    def __str__(self) -> str:
        return self.path or self.where  # never the text

    def text(self) -> str:
        """The credential without trailing line ends. UsageError if its file holds none and never did."""
        if not self.path:
            return self._text
        try:
            status = os.stat(self.path)
            stamp = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            if stamp != self._stamp:
                text = read_regular(self.path, SECRET_SIZE).decode("utf-8", "surrogateescape").rstrip("\r\n")
                if not text:  # who writes it in place has emptied it first
                    raise OSError(errno.ENODATA, "it is empty")
                self._text, self._stamp = text, stamp
                self._hide()
        except OSError as error:
            if not self._text:
                raise UsageError(f"cannot read {self.where} from {self.path}: {reason(error)}") from None
            if self._stamp:
                log.warning(f"cannot read {self.where} again from {self.path}, the last one is used: {reason(error)}")
            self._stamp = ()
        return self._text

    def _hide(self) -> None:
        for line in (self._text, *self._text.split("\n")) if self.hidden else ():
            if not line.startswith("-----"):  # of a PEM text each line, as log lines are broken up
                conceal(line)


def secret(name: str, flags: Mapping[str, Any] = {}, environ: Mapping[str, str] = os.environ) -> Secret | None:
    """A credential from its flag, its variable NAME, the file that NAME_FILE names, or /run/secrets/NAME (or name)."""
    row = SETTINGS[name]
    hidden = row.kind == "secret"
    if flags.get(name):
        return Secret(f"--{name}", str(flags[name]), hidden=hidden)
    if environ.get(row.env):
        return Secret(row.env, environ[row.env], hidden=hidden)
    if environ.get(row.env + "_FILE"):
        return Secret(row.env + "_FILE", path=environ[row.env + "_FILE"], hidden=hidden)
    for file in (row.env, row.env.lower()):
        path = os.path.join(SECRETS_DIRECTORY, file)
        if os.path.isfile(path):
            return Secret(row.env, path=path, hidden=hidden)
    return None


def public_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment for processes that are not ours: without secrets, unless ETCDINIT_KEEP_SECRETS is set."""
    if setting("keep-secrets", {}, environ):
        return dict(environ)
    secrets = {row.env for row in SETTINGS.values() if row.kind == "secret"}
    return {name: value for name, value in environ.items() if name not in secrets}


# ======================================================================================================
# DNS
# resolv.conf, message codec, resolver over UDP (EDNS) and TCP, SRV ordering.
# RFC 1035, 2181, 2308, 2782, 6891. Does not know what a name is looked up for.
#
# A resolver of its own, because musl's cannot ask for SRV, and older ones lose truncated answers. Doors:
# resolve_srv, resolve_address, host_addresses. Names are text without the last dot; the root is ".".
# ======================================================================================================

DNS_PORT = 53
DNS_MAX_SERVERS = 3  # more are ignored, as every libc does
DNS_TIMEOUT = 2.0  # seconds for one server, where resolv.conf says nothing; libc's 5 outlasts most callers
DNS_ATTEMPTS = 2  # rounds through the servers
DNS_PATIENCE = 10.0  # seconds for a whole lookup when the caller names no deadline
DNS_EDNS_SIZE = 1232  # the largest answer that fits one datagram on every path (DNS flag day 2020)
DNS_MAX_ALIASES = 16  # CNAMEs in a row
DNS_MAX_TTL = 604800  # a week; RFC 2181 lets a resolver cap what it is told
DNS_MAX_STRANGE = 100  # datagrams that answer something else, before a server is left
DNS_SILENCE = 60.0  # seconds for which a server that was silent is asked last

DNS_A, DNS_CNAME, DNS_SOA, DNS_AAAA, DNS_SRV, _DNS_OPT = 1, 5, 6, 28, 33, 41
DNS_TYPE_NAMES = {DNS_A: "A", DNS_CNAME: "CNAME", DNS_SOA: "SOA", DNS_AAAA: "AAAA", DNS_SRV: "SRV"}
DNS_IN = 1

_DNS_RESPONSE, _DNS_OPCODE, _DNS_AUTHORITATIVE, _DNS_TRUNCATED = 0x8000, 0x7800, 0x0400, 0x0200
_DNS_RECURSE, _DNS_RECURSES = 0x0100, 0x0080
_DNS_OK, _DNS_FORMERR, _DNS_NXDOMAIN, _DNS_NOTIMP, _DNS_REFUSED, _DNS_BADVERS = 0, 1, 3, 4, 5, 16
_DNS_RCODE_NAMES = {0: "NOERROR", 1: "FORMERR", 2: "SERVFAIL", 3: "NXDOMAIN", 4: "NOTIMP", 5: "REFUSED", 16: "BADVERS"}


class DnsError(Error):
    """A lookup that gave nothing. The message names the question, the servers asked, and the remedy.

    question: as in "SRV _etcd-client._tcp.example.org". servers: addresses asked. ttl: seconds for which the
    "no" may be remembered (RFC 2308), 0 if the server named none. temporary: whether asking again may help soon.
    """

    temporary = True

    def __init__(self, message: str, question: str = "", servers: Sequence[str] = (), ttl: int = 0) -> None:
        super().__init__(message)
        self.question, self.servers, self.ttl = question, tuple(servers), ttl


class DnsNxdomain(DnsError):
    """The name does not exist. At boot that can mean: not yet."""

    temporary = False


class DnsNodata(DnsError):
    """The name exists and has no record of the type."""

    temporary = False


class DnsNotOffered(DnsNodata):
    """The SRV record has the target ".": the service is decidedly not available (RFC 2782)."""


class DnsLoop(DnsError):
    """CNAMEs lead in a circle, or through too many names."""

    temporary = False


class DnsBadName(DnsError):
    """The text cannot be a DNS name."""

    temporary = False


class DnsTimeout(DnsError):
    """No server answered in time."""


class DnsRefused(DnsError):
    """The servers answer REFUSED."""


class DnsServfail(DnsError):
    """The servers answer SERVFAIL or other nonsense, or cannot be reached."""


_DNS_REMEDIES = {
    DnsTimeout: "check that {source} names the right servers and that UDP and TCP to their port pass",
    DnsRefused: "the server does not serve this zone or this client; check the nameserver lines of {source}",
    DnsServfail: "check that the servers in {source} work and can reach the zone",
}


# ---- messages (no sockets here) -----------------------------------------------------------------------

class DnsRecord:
    """A resource record: owner name, type, ttl in seconds, and data by type.

    A and AAAA: address text; CNAME: name; SRV: (priority, weight, port, target); SOA: its "minimum", seconds.
    """

    __slots__ = ("name", "type", "ttl", "data")

    def __init__(self, name: str, type: int, ttl: int, data: Any) -> None:
        self.name, self.type, self.ttl, self.data = name, type, ttl, data


class DnsMessage:
    """A decoded message: id, flags, rcode, question (name, type, class) or None, and three lists of DnsRecord.

    server is who sent it, once that is known.
    """

    __slots__ = ("id", "flags", "rcode", "question", "answers", "authority", "additional", "server")

    def __init__(self, id: int, flags: int, question: tuple[str, int, int] | None) -> None:
        self.id, self.flags, self.rcode, self.question = id, flags, flags & 0xF, question
        self.answers: list[DnsRecord] = []
        self.authority: list[DnsRecord] = []
        self.additional: list[DnsRecord] = []
        self.server = ""

    def answers_to(self, id: int, name: str, type: int) -> bool:
        """Whether this is the answer to that query. A bare refusal may lack the question."""
        if self.id != id or self.flags & (_DNS_RESPONSE | _DNS_OPCODE) != _DNS_RESPONSE:
            return False
        if self.question is None:
            return self.rcode not in (_DNS_OK, _DNS_NXDOMAIN)
        return self.question == (name.lower(), type, DNS_IN)


_DNS_PLAIN = bytes(c for c in range(33, 127) if c not in b".\\")  # what a label shows unescaped


def encode_dns_name(name: str) -> bytes:
    """A name in wire form, uncompressed (RFC 1035, 3.1). DnsBadName if it cannot be one."""
    wire = bytearray()
    for label in name.split(".") if name != "." else ():
        octets = label.encode("utf-8", "replace")
        if not 0 < len(octets) < 64 or octets.translate(None, _DNS_PLAIN):
            raise DnsBadName(f'cannot look up "{name}": not a DNS name (1 to 63 ASCII characters between two dots; '
                             "an international name needs its xn-- form)", name)
        wire.append(len(octets))
        wire += octets
    if len(wire) > 254:
        raise DnsBadName(f'cannot look up "{name}": longer than the 253 characters of a DNS name', name)
    return bytes(wire) + b"\0"


def encode_dns_query(id: int, name: str, type: int, edns: bool = True) -> bytes:
    """A query for one name and type, recursion desired; with edns, an OPT record that allows 1232 bytes."""
    query = struct.pack("!HHHHHH", id, _DNS_RECURSE, 1, 0, 0, int(edns)) + encode_dns_name(name)
    query += struct.pack("!HH", type, DNS_IN)
    return query + struct.pack("!BHHIH", 0, _DNS_OPT, DNS_EDNS_SIZE, 0, 0) if edns else query


def _read_dns_name(data: bytes, at: int, names: dict[int, tuple[list[str], int]]) -> tuple[str, int]:
    """The name at an offset, and the offset behind it.

    names: labels and length of what earlier pointers led to, so that nothing is read twice.
    """
    labels: list[str] = []
    jumps: list[tuple[int, int, int]] = []  # offset jumped to; labels and length before
    behind, floor, length = 0, at, 1
    while size := data[at]:
        if size < 64:
            label = data[at + 1:at + 1 + size]
            if len(label) < size:
                raise ValueError("ends inside a name")
            labels.append(label.decode() if not label.translate(None, _DNS_PLAIN) else
                          "".join(chr(c) if c in _DNS_PLAIN else f"\\{c:03d}" for c in label))
            length += size + 1
            at += size + 1
        elif size >= 192:
            behind = behind or at + 2
            at = (size & 0x3F) << 8 | data[at + 1]
            if not 12 <= at < floor:  # strictly backwards, so that no pointer comes round again
                raise ValueError("a compression pointer does not lead back")
            floor = at
            if at in names:
                suffix, more = names[at]
                labels += suffix
                length += more
                break
            jumps.append((at, len(labels), length))
        else:
            raise ValueError("a label of unknown kind")
        if length > 255 or len(jumps) > 127:
            raise ValueError("a name longer than 255 bytes")
    if length > 255:
        raise ValueError("a name longer than 255 bytes")
    for target, count, before in jumps:
        names[target] = labels[count:], length - before
    return ".".join(labels) or ".", behind or at + 1


def _read_dns_data(data: bytes, type: int, at: int, end: int, names: dict[int, tuple[list[str], int]]) -> Any:
    """The data of a record that lies between two offsets."""
    if type == DNS_A or type == DNS_AAAA:
        return socket.inet_ntop(socket.AF_INET if type == DNS_A else socket.AF_INET6, data[at:end])
    if type == DNS_SOA:
        at = _read_dns_name(data, _read_dns_name(data, at, names)[1], names)[1]  # primary server, mailbox
        value, at = struct.unpack_from("!IIIII", data, at)[4], at + 20
    elif type == DNS_SRV:
        target, behind = _read_dns_name(data, at + 6, names)
        value, at = (*struct.unpack_from("!HHH", data, at), target), behind
    else:
        value, at = _read_dns_name(data, at, names)
    if at != end:
        raise ValueError("a record's data do not fill its length")
    return value


def decode_dns_message(data: bytes, head: bool = False) -> DnsMessage:
    """A message from its wire form; ValueError for anything malformed. Linear in the size of the message.

    Records of other types and classes are left out. With head, and for a truncated message, only header and
    question are read: part of an answer is worse than none.
    """
    try:
        id, flags, questions, *counts = struct.unpack_from("!HHHHHH", data)
        if questions > 1:
            raise ValueError("more than one question")
        names: dict[int, tuple[list[str], int]] = {}
        at, question = 12, None
        if questions:
            name, at = _read_dns_name(data, at, names)
            type, group = struct.unpack_from("!HH", data, at)
            at, question = at + 4, (name.lower(), type, group)
        message = DnsMessage(id, flags, question)
        if head or flags & _DNS_TRUNCATED:
            return message
        if sum(counts) * 11 > len(data):  # a record takes 11 bytes at least
            raise ValueError("more records than bytes")
        for section, count in zip((message.answers, message.authority, message.additional), counts, strict=True):
            for _ in range(count):
                name, at = _read_dns_name(data, at, names)
                type, group, ttl, size = struct.unpack_from("!HHIH", data, at)
                at += 10
                if at + size > len(data):
                    raise ValueError("ends inside a record")
                if type == _DNS_OPT:
                    message.rcode |= ttl >> 24 << 4  # the upper bits of an extended rcode (RFC 6891)
                elif type in DNS_TYPE_NAMES and group == DNS_IN:
                    ttl = min(ttl, DNS_MAX_TTL) if ttl < 1 << 31 else 0
                    section.append(DnsRecord(name, type, ttl, _read_dns_data(data, type, at, at + size, names)))
                at += size
        return message
    except (IndexError, struct.error):
        raise ValueError("ends in the middle") from None


# ---- resolv.conf and hosts ----------------------------------------------------------------------------

class DnsConfig:
    """Whom to ask and how: what resolv.conf(5), RES_OPTIONS, LOCALDOMAIN and hosts(5) say.

    servers: (address, port) pairs; search: suffixes; timeout in seconds; hosts: name to addresses.
    """

    __slots__ = ("source", "servers", "search", "ndots", "timeout", "attempts", "rotate", "hosts")

    def __init__(self, source: str = "/etc/resolv.conf") -> None:
        self.source = source
        self.servers: list[tuple[str, int]] = []
        self.search: list[str] = []
        self.ndots, self.timeout, self.attempts, self.rotate = 1, DNS_TIMEOUT, DNS_ATTEMPTS, False
        self.hosts: dict[str, list[str]] = {}


_DNS_OPTIONS = {"ndots": (0, 15), "timeout": (1, 30), "attempts": (1, 5)}  # name: (lowest, highest), as in glibc


def parse_resolv_conf(text: str, environ: Mapping[str, str] = {}, source: str = "/etc/resolv.conf") -> DnsConfig:
    """A DnsConfig from the text of a resolv.conf; LOCALDOMAIN and RES_OPTIONS in environ override it.

    A nameserver may carry a port, as in [10.0.0.1]:5353. Without a usable one it is 127.0.0.1, as in libc.
    """
    config, options = DnsConfig(source), []
    for line in text.splitlines():
        word, *rest = line.split() or [""]
        if word == "nameserver" and rest and len(config.servers) < DNS_MAX_SERVERS:
            address, _, port_text = rest[0].removeprefix("[").partition("]:")
            try:
                _socket_address(address, 0)
                port = int(port_text or DNS_PORT)
                if not 0 < port < 65536:
                    raise ValueError
                config.servers.append((address, port))
            except (OSError, ValueError):
                log.debug(f"ignoring nameserver {rest[0]}: not an address", file=source)
        elif word in ("search", "domain") and rest:
            config.search = rest if word == "search" else rest[:1]  # the last line of either kind wins
        elif word == "options":
            options += rest
    config.search = environ.get("LOCALDOMAIN", "").split() or config.search
    config.search = [name for suffix in config.search if (name := suffix.strip(".").lower())]
    for option in options + environ.get("RES_OPTIONS", "").split():
        name, _, number = option.partition(":")
        if name in _DNS_OPTIONS and number.isascii() and number.isdigit():
            low, high = _DNS_OPTIONS[name]
            setattr(config, name, min(max(int(number[:9]), low), high))
        elif name == "rotate":
            config.rotate = True
    config.servers = config.servers or [("127.0.0.1", DNS_PORT)]
    return config


def parse_hosts(text: str) -> dict[str, list[str]]:
    """The addresses of each name in the text of a hosts(5) file, in its order; names in lower case."""
    hosts: dict[str, list[str]] = {}
    for line in text.splitlines():
        address, *names = line.partition("#")[0].split() or [""]
        if names and is_address(address):
            for name in names:
                known = hosts.setdefault(name.lower().removesuffix("."), [])
                if address not in known:
                    known.append(address)
    return hosts


def load_dns_config(resolv_conf: str = "", hosts: str = "/etc/hosts",
                    environ: Mapping[str, str] = os.environ) -> DnsConfig:
    """The DnsConfig of this machine, read anew. ETCDINIT_RESOLV_CONF names another file than /etc/resolv.conf."""
    source = resolv_conf or setting("resolv-conf", {}, environ)
    config = parse_resolv_conf(_file_text(source), environ, source)
    config.hosts = parse_hosts(_file_text(hosts))
    return config


def _file_text(path: str) -> str:
    """The text of a file; of one that cannot be read, nothing: both files may be absent in a container."""
    try:
        return read_regular(path, 16 << 20).decode("utf-8", "replace")
    except OSError as error:
        log.debug(f"cannot read {path}: {reason(error)}")
        return ""


def _socket_address(address: str, port: int) -> tuple[Any, ...]:
    """What connect() takes for an address text, IPv6 scope included. OSError if it is no address."""
    if ":" not in address:
        socket.inet_pton(socket.AF_INET, address)
        return (address, port)
    host, _, scope = address.partition("%")
    socket.inet_pton(socket.AF_INET6, host)
    return (host, port, 0, int(scope) if scope.isdigit() else socket.if_nametoindex(scope) if scope else 0)


def is_address(text: str) -> bool:
    """Whether the text is an IPv4 or IPv6 address (with or without scope), not a name."""
    try:
        if ":" in text:
            socket.inet_pton(socket.AF_INET6, text.partition("%")[0])
        else:
            socket.inet_pton(socket.AF_INET, text)
    except (OSError, ValueError):
        return False
    return True


# ---- asking servers -----------------------------------------------------------------------------------

_dns_silent: dict[tuple[str, int], float] = {}  # server: when it was last silent
_dns_plain: set[tuple[str, int]] = set()  # servers that answer only without EDNS


def _server_text(server: tuple[str, int]) -> str:
    return server[0] if server[1] == DNS_PORT else f"[{server[0]}]:{server[1]}"


def _dns_connect(server: tuple[str, int], kind: int, until: float) -> socket.socket:
    """A connected socket: the kernel then drops what comes from elsewhere, and picks a fresh port."""
    connection = socket.socket(socket.AF_INET6 if ":" in server[0] else socket.AF_INET, kind)
    try:
        connection.settimeout(_time_left(until))
        connection.connect(_socket_address(*server))
    except BaseException:
        connection.close()
        raise
    return connection


def _time_left(until: float) -> float:
    left = until - now()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


def _ask_udp(server: tuple[str, int], query: bytes, id: int, name: str, type: int, until: float) -> bytes:
    """The datagram that answers the query; others are ignored. OSError (TimeoutError) if there is none."""
    connection = _dns_connect(server, socket.SOCK_DGRAM, until)
    try:
        connection.send(query)
        for _ in range(DNS_MAX_STRANGE):
            connection.settimeout(_time_left(until))
            data = connection.recv(65535)
            try:
                if decode_dns_message(data, head=True).answers_to(id, name, type):
                    return data
            except ValueError:
                pass
            log.debug("ignoring a datagram that is not the answer", server=_server_text(server), bytes=len(data))
        raise OSError(errno.EBADMSG, f"sent {DNS_MAX_STRANGE} datagrams that answer something else")
    finally:
        connection.close()


def _ask_tcp(server: tuple[str, int], query: bytes, until: float) -> bytes:
    """The message that a server sends for a query over TCP. OSError if there is none."""
    connection = _dns_connect(server, socket.SOCK_STREAM, until)
    try:
        connection.settimeout(_time_left(until))
        connection.sendall(struct.pack("!H", len(query)) + query)
        data, size = bytearray(), 2
        while len(data) < size:
            connection.settimeout(_time_left(until))
            piece = connection.recv(65537 - len(data))
            if not piece:
                raise OSError(errno.ECONNRESET, "closed the connection before its answer was whole")
            data += piece
            size = 2 + int.from_bytes(data[:2], "big") if len(data) > 1 else 2
        return bytes(data[2:size])
    finally:
        connection.close()


def _ask_server(server: tuple[str, int], name: str, type: int, edns: bool, patience: float,
                deadline: float) -> DnsMessage:
    """One server's answer: UDP, and TCP for what UDP cuts off or garbles.

    OSError if there is none. ValueError if there is, but nothing to go by.
    """
    id = int.from_bytes(os.urandom(2), "big")
    data = _ask_udp(server, encode_dns_query(id, name, type, edns), id, name, type, min(deadline, now() + patience))
    try:
        message = decode_dns_message(data)
        whole = not message.flags & _DNS_TRUNCATED
    except ValueError:  # it is the answer, and garbled: some forwarders cut without saying so
        whole = False
    if not whole:
        id = int.from_bytes(os.urandom(2), "big")
        try:
            data = _ask_tcp(server, encode_dns_query(id, name, type, edns), min(deadline, now() + patience))
        except OSError as error:  # a firewall that passes UDP alone is a classic: say that it is TCP
            kind = TimeoutError if isinstance(error, TimeoutError) else OSError
            raise kind(errno.EIO, f"over TCP: {reason(error)}") from None
        message = decode_dns_message(data)
        if message.flags & _DNS_TRUNCATED or not message.answers_to(id, name, type):
            raise ValueError("sent something else over TCP")
    if edns and message.rcode in (_DNS_FORMERR, _DNS_NOTIMP, _DNS_BADVERS):
        _dns_plain.add(server)
        return _ask_server(server, name, type, False, patience, deadline)
    return message


def _dns_failure(message: DnsMessage) -> tuple[type[DnsError], str] | None:
    """Why an answer is none, and the next server is to be asked; nothing if it settles the question."""
    if message.rcode == _DNS_REFUSED:
        return DnsRefused, "REFUSED"
    if message.rcode not in (_DNS_OK, _DNS_NXDOMAIN):
        return DnsServfail, _DNS_RCODE_NAMES.get(message.rcode, f"error code {message.rcode}")
    lame = not message.flags & (_DNS_AUTHORITATIVE | _DNS_RECURSES) and not message.answers and not message.authority
    if lame and message.rcode == _DNS_OK:
        return DnsServfail, "neither serves the zone nor asks on"
    return None


def _ask(name: str, type: int, config: DnsConfig, deadline: float) -> DnsMessage:
    """The first answer that settles the question.

    The servers are asked in turn, in the second round without EDNS. One that was silent lately is asked last.
    The time to the deadline is shared among the tries, so that the last server gets its turn too.
    """
    first = _random_below(len(config.servers)) if config.rotate else 0
    servers = config.servers[first:] + config.servers[:first]
    servers.sort(key=lambda server: server in _dns_silent and now() - _dns_silent[server] < DNS_SILENCE)
    failures: dict[tuple[str, int], tuple[Callable[..., DnsError], str]] = {}
    question, tries = f"{DNS_TYPE_NAMES[type]} {name}", servers * config.attempts
    for count, server in enumerate(tries):
        start = now()
        patience = min(config.timeout, (deadline - start) / (len(tries) - count))
        if patience <= 0:
            break
        again = count >= len(servers)
        try:
            message = _ask_server(server, name, type, not again and server not in _dns_plain, patience, deadline)
            failure = _dns_failure(message)
        except TimeoutError as error:
            _dns_silent[server] = now()
            failure = DnsTimeout, f"{reason(error)} after {now() - start:.1f}s"
        except OSError as error:
            failure = DnsServfail, reason(error)
        except ValueError as error:
            failure = DnsServfail, f"garbled answer, {error}"
        log.debug(f"asked for {question}", server=_server_text(server), answer=failure[1] if failure else
                  f"{_DNS_RCODE_NAMES[message.rcode]} {len(message.answers)} records", seconds=f"{now() - start:.3f}")
        if failure is None:
            _dns_silent.pop(server, None)
            if again:
                _dns_plain.add(server)
            message.server = _server_text(server)
            return message
        failures[server] = failure
    kinds = [kind for kind, _ in failures.values()]
    worst = next((kind for kind in (DnsServfail, DnsRefused) if kind in kinds), DnsTimeout)
    told = "; ".join(f"{_server_text(server)}: {why}" for server, (_, why) in failures.items())
    raise worst(f"cannot resolve {question}: {told or 'no time was left to ask'} "
                f"({_DNS_REMEDIES[worst].format(source=config.source)})",
                question, [_server_text(server) for server in failures])


# ---- names to records ---------------------------------------------------------------------------------

class SrvRecord:
    """One place where a service is: priority, weight, port, target (a name), addresses of the target.

    addresses is empty if they were not asked for, or if they were not found: then error says why.
    """

    __slots__ = ("priority", "weight", "port", "target", "addresses", "error")

    def __init__(self, priority: int, weight: int, port: int, target: str) -> None:
        self.priority, self.weight, self.port, self.target = priority, weight, port, target
        self.addresses: list[str] = []
        self.error: DnsError | None = None


class SrvAnswer:
    """What resolve_srv found: records in the order to try them, ttl in seconds (the lowest of all used records)."""

    __slots__ = ("records", "ttl")

    def __init__(self, records: list[SrvRecord], ttl: int) -> None:
        self.records, self.ttl = records, ttl


def _random_below(limit: int) -> int:
    """A random number from 0 to limit - 1, without the cost of loading the random module."""
    return int.from_bytes(os.urandom(8), "big") % limit


def order_srv(records: Iterable[SrvRecord], random_below: Callable[[int], int] = _random_below) -> list[SrvRecord]:
    """The records in the order to try them: by priority, and within one by weighted chance (RFC 2782)."""
    waiting: dict[int, list[SrvRecord]] = {}
    for record in records:
        group = waiting.setdefault(record.priority, [])
        group.insert(random_below(len(group) + 1), record)  # so that weights of 0 alone spread the load too
    ordered: list[SrvRecord] = []
    for _, group in sorted(waiting.items()):
        group.sort(key=lambda record: record.weight > 0)
        total = sum(record.weight for record in group)
        while group:
            rest = random_below(total + 1)
            for record in group:
                rest -= record.weight
                if rest <= 0:
                    break
            group.remove(record)
            ordered.append(record)
            total -= record.weight
    return ordered


def _records(name: str, type: int, config: DnsConfig, deadline: float) -> tuple[DnsMessage, list[DnsRecord], int]:
    """The records that a name has, its CNAMEs followed; with them the message they came in, and the lowest ttl."""
    question, wanted, ttl = f"{DNS_TYPE_NAMES[type]} {name}", name.lower(), DNS_MAX_TTL
    seen = {wanted}
    while True:
        asked = wanted
        message = _ask(asked, type, config, deadline)
        server = message.server
        aliases = {record.name.lower(): record for record in message.answers if record.type == DNS_CNAME}
        while alias := aliases.get(wanted):
            wanted, ttl = alias.data.lower(), min(ttl, alias.ttl)
            if wanted in seen or len(seen) > DNS_MAX_ALIASES:
                raise DnsLoop(f"cannot resolve {question}: its aliases (CNAME) go round in a circle or are more than "
                              f"{DNS_MAX_ALIASES}, at {wanted}, says {server} (correct the zone)", question, [server])
            seen.add(wanted)
        records = [record for record in message.answers if record.type == type and record.name.lower() == wanted]
        if records and message.rcode == _DNS_OK:
            return message, records, min(ttl, *(record.ttl for record in records))
        no = [min(record.ttl, record.data) for record in message.authority if record.type == DNS_SOA]
        subject = "the name" if wanted == name.lower() else f"its alias {wanted}"
        if message.rcode == _DNS_NXDOMAIN:
            raise DnsNxdomain(f"cannot resolve {question}: {subject} does not exist, says {server} "
                              "(NXDOMAIN; check the spelling and the zone)", question, [server], min(no, default=0))
        if wanted == asked or no:  # else this server does not follow aliases: ask for the last one
            raise DnsNodata(f"cannot resolve {question}: {subject} has no {DNS_TYPE_NAMES[type]} record, says {server} "
                            "(add it to the zone)", question, [server], min(no, default=0))


def _search(name: str, config: DnsConfig, look: Callable[[str], Any]) -> Any:
    """What look() finds for the name or for it with a suffix of the search list, in the order of resolv.conf(5)."""
    if name.endswith("."):
        return look(name.removesuffix(".") or ".")
    names = [longer for suffix in config.search if len(longer := f"{name}.{suffix}") < 254]
    names.insert(0 if name.count(".") >= config.ndots else len(names), name)
    failures: list[DnsError] = []
    for candidate in names:
        try:
            return look(candidate)
        except (DnsNxdomain, DnsNodata, DnsServfail, DnsRefused) as error:
            failures.append(error)
    kinds = (DnsServfail, DnsRefused, DnsNotOffered, DnsNodata, DnsNxdomain)  # the one that says most
    failure = next(error for kind in kinds for error in failures if isinstance(error, kind))
    if len(names) > 1:
        failure.args = (f"{failure}; asked for {', '.join(names)} (search list of {config.source})",)
    raise failure


def _host_records(name: str, config: DnsConfig, deadline: float) -> tuple[list[str], int]:
    """The addresses that DNS has for a name, IPv4 first, and their ttl."""
    addresses: list[str] = []
    ttl, nothing = DNS_MAX_TTL, None
    for type in (DNS_A, DNS_AAAA):
        try:
            _, records, lowest = _records(name, type, config, deadline)
        except DnsNodata as error:
            nothing = error
        except DnsError:
            if addresses:
                break  # some servers fail, or answer nonsense, when asked for AAAA
            raise
        else:
            addresses += [record.data for record in records]
            ttl = min(ttl, lowest)
            deadline = min(deadline, now() + config.timeout)
    if nothing and not addresses:
        raise DnsNodata(f"cannot resolve {name}: the name has neither an A nor an AAAA record, "
                        f"says {nothing.servers[0]} (add one to the zone)", f"A {name}", nothing.servers, nothing.ttl)
    return addresses, ttl


def _addresses(host: str, config: DnsConfig, deadline: float) -> tuple[list[str], int]:
    """The addresses of a host, from itself, from hosts(5), or from DNS, and their ttl."""
    name = host.removeprefix("[").removesuffix("]")
    if is_address(name):
        return [name], DNS_MAX_TTL
    name = host.lower().removesuffix(".")
    if name in config.hosts:
        return list(config.hosts[name]), DNS_MAX_TTL
    if name == "localhost" or name.endswith(".localhost"):  # RFC 6761; the hosts file may be absent
        return ["127.0.0.1", "::1"], DNS_MAX_TTL
    found: tuple[list[str], int] = _search(host, config, lambda candidate: _host_records(candidate, config, deadline))
    return found


def _srv_records(name: str, config: DnsConfig, deadline: float) -> tuple[list[SrvRecord], int]:
    """The SRV records of a name, with the addresses that came along for their targets, and their ttl."""
    message, answers, ttl = _records(name, DNS_SRV, config, deadline)
    question = f"SRV {name}"
    glue: dict[str, list[DnsRecord]] = {}
    for record in message.additional:
        if record.type in (DNS_A, DNS_AAAA):
            glue.setdefault(record.name.lower(), []).append(record)
    records: list[SrvRecord] = []
    for data in dict.fromkeys(answer.data for answer in answers):
        found = SrvRecord(*data)
        if found.target == ".":
            continue
        if not all(c.isalnum() or c in "-_." for c in found.target):  # names of other shapes end up in URLs
            log.warning(f"ignoring a target of {question}: not a host name", target=found.target)
            continue
        for extra in sorted(glue.get(found.target.lower(), ()), key=lambda extra: extra.type):
            found.addresses.append(extra.data)
            ttl = min(ttl, extra.ttl)
        records.append(found)
    if not records:
        raise DnsNotOffered(f'cannot resolve {question}: {message.server} names no target that is a host; "." says '
                            "that the service is not offered (check the zone)", question, [message.server], ttl)
    return records, ttl


# ---- doors --------------------------------------------------------------------------------------------

def resolve_srv(name: str, deadline: float | None = None, config: DnsConfig | None = None, addresses: bool = True,
                random_below: Callable[[int], int] = _random_below) -> SrvAnswer:
    """Where a service is, as in _etcd-client._tcp.example.org: a SrvAnswer in the order of RFC 2782.

    A name that ends in a dot is asked as it stands, another goes through the search list. deadline is a point
    on now(), by default 10 s away. The targets' addresses come from hosts(5), from the answer, or are looked up,
    unless addresses is False; one target without any does not fail the lookup, none with any does. Raises DnsError.
    """
    config = config or load_dns_config()
    until = now() + DNS_PATIENCE if deadline is None else deadline
    records, ttl = _search(name, config, lambda candidate: _srv_records(candidate, config, until))
    hosts: dict[str, tuple[list[str], int]] = {}
    for record in records if addresses else ():
        target = record.target.lower()
        if record.addresses and target not in config.hosts:
            continue
        try:
            if target not in hosts:
                hosts[target] = _addresses(target + ".", config, until)
            record.addresses = hosts[target][0]
            ttl = min(ttl, hosts[target][1])
        except DnsError as error:
            record.error = error
    failed = [record.error for record in records if record.error]
    if len(failed) == len(records):
        failed[0].args = (f"{failed[0]}; it is a target of SRV {name}",)
        raise failed[0]
    return SrvAnswer(order_srv(records, random_below), ttl)


def resolve_address(host: str, deadline: float | None = None, config: DnsConfig | None = None) -> list[str]:
    """The addresses of a host, IPv4 first; an address is its own. deadline as in resolve_srv. Raises DnsError."""
    until = now() + DNS_PATIENCE if deadline is None else deadline
    if is_address(host.removeprefix("[").removesuffix("]")):
        return [host.removeprefix("[").removesuffix("]")]  # nobody has to be asked
    return _addresses(host, config or load_dns_config(), until)[0]


def host_addresses(host: str) -> list[str]:
    """The addresses of a host, or none if they cannot be found: what a template asks for."""
    try:
        return resolve_address(host)
    except DnsError as error:
        log.debug(str(error))
        return []


# ======================================================================================================
# ETCD
# Endpoints, HTTP/1.1, the v3 JSON gateway, the v2 keys API. etcd API v3 (gRPC gateway) and v2 (keys),
# RFC 9112. Knows nothing of templates and files.
# ======================================================================================================

CONNECT_TIMEOUT = 2.0  # seconds until a connection stands
ANSWER_TIMEOUT = 5.0  # seconds for a request over all endpoints; below the 7 s after which etcd itself gives up
FIRST_TRY = 0.2  # part of that time that one of several endpoints gets in the first round; doubled in each further one
ROUND_FIRST, ROUND_LONGEST = 0.1, 1.0  # seconds between rounds over all endpoints while none can serve
CIRCUIT_FIRST, CIRCUIT_LONGEST = 1.0, 30.0  # seconds for which an endpoint that failed is asked last
NOT_NOW = 0.1  # the same, for one that answers that it cannot serve now
SRV_PATIENCE = 15.0  # seconds that DNS gets at start to know the SRV name: it may come up later than we
SRV_SHORTEST, SRV_RETRY = 5, 60.0  # seconds: the least time between two lookups; until the next after a failed one
SLOWEST_ANSWER = 256 * 1024  # bytes a second that a large answer must bring to be waited for beyond that
MAX_HEAD = 64 * 1024  # bytes of status line and header fields
MAX_ANSWER = 16 * 1024 * 1024  # bytes of one answer; a v3 range that is larger is asked in smaller pages
MAX_ANSWER_V2 = 64 * 1024 * 1024  # the v2 API has no pages
PAGE = 5000  # keys in one range answer: fewer cost etcd more, as it counts what remains for each page
MAX_KEYS = 5_000_000  # of one read
MAX_RESTARTS = 5  # of a paged read whose revision was compacted meanwhile


# ---- errors -------------------------------------------------------------------------------------------

class EtcdError(Error):
    """etcd refused or failed a request.

    endpoint: its URL; request: what was asked, as in "read /lb"; text: etcd's message or what went wrong;
    code: the gRPC status code (v3) or errorCode (v2), None if there is none.
    """

    def __init__(self, endpoint: str, request: str, text: str, code: int | None = None) -> None:
        where = f" at etcd {endpoint}" if endpoint else ""
        super().__init__(f"cannot {printable(request)}{where}: {text}")
        self.endpoint, self.request, self.text, self.code = endpoint, request, text, code


class EtcdUnreachable(EtcdError):
    """No connection, no answer in time, or an answer that says that the member cannot serve now."""

    exit_code = EXIT_NO_ETCD


class EtcdTlsError(EtcdUnreachable):
    """TLS failed: a certificate, a name, a version, or no TLS at all."""


class EtcdDenied(EtcdError):
    """Authentication or permission is missing or wrong."""


class EtcdCompacted(EtcdError):
    """The revision (v2: index) that was asked for is not there, or not there any more."""


class EtcdNoGateway(EtcdError):
    """The endpoint serves no path of the v3 JSON gateway."""


class EtcdAnswerError(EtcdError):
    """What came back is not an answer of etcd: garbage, or half of one."""


class EtcdTooBig(EtcdAnswerError):
    """The answer is larger than this program or etcd's gateway takes: ask for less."""


# ---- HTTP/1.1, without sockets ------------------------------------------------------------------------

class TooBig(ValueError):
    """An HTTP answer exceeds its bound."""


class Answer:
    """One HTTP/1.1 answer, fed with bytes as they arrive.

    feed() takes what was received, b"" for the end of the connection, and raises ValueError with the
    reason for anything that is not HTTP, ends early or is too big. `head_done` says that status and headers
    stand, `done` that the body is whole. take() hands out body bytes as they come, for endless answers.
    """

    __slots__ = ("status", "headers", "body", "head_done", "done", "keep_alive", "limit", "_pending", "_left", "_step")

    def __init__(self, limit: int = MAX_ANSWER) -> None:
        """limit: the most body bytes that may be gathered at a time."""
        self.status, self.headers, self.body = 0, dict[str, str](), bytearray()
        self.head_done = self.done = self.keep_alive = False
        self.limit = limit
        self._pending = bytearray()  # received, not yet understood
        self._left = 0  # bytes to come of the body or of the chunk
        self._step: Callable[[], bool] = self._head  # reads one element; False when it needs more bytes

    def feed(self, data: bytes) -> None:
        """Take received bytes; b"" means that the other side has closed the connection."""
        self._pending += data
        while not self.done and self._step():
            pass
        if not data and not self.done:
            if self._step != self._until_close:
                raise ValueError("the connection was closed in the middle of the answer" if self._pending
                                 or self.head_done else "the connection was closed without an answer")
            self.done = True

    @property
    def excess(self) -> int:
        """How many bytes have come behind the answer, which nobody asked for."""
        return len(self._pending)

    def take(self) -> bytes:
        """The body bytes that have arrived since the last call."""
        data = bytes(self.body)
        self.body.clear()
        return data

    def _head(self) -> bool:
        end = self._pending.find(b"\r\n\r\n")
        if end < 0 and len(self._pending) <= MAX_HEAD:
            if not b"HTTP/1.".startswith(self._pending[:7]):
                raise ValueError("the answer is not HTTP")
            return False
        if not 0 <= end <= MAX_HEAD:
            raise TooBig(f"the header of the answer is larger than {MAX_HEAD} bytes")
        status_line, *lines = self._pending[:end].decode("latin-1").split("\r\n")
        del self._pending[:end + 4]
        version, _, rest = status_line.partition(" ")
        if version not in ("HTTP/1.0", "HTTP/1.1") or not (rest[:3].isascii() and rest[:3].isdigit() and len(rest) > 2):
            raise ValueError("the answer is not HTTP")
        self.status, self.headers = int(rest[:3]), {}
        for line in lines:
            name, colon, value = line.partition(":")
            if not colon or not name or name != name.strip():
                raise ValueError("the answer has a malformed header line")
            self.headers[name.lower()] = value.strip()
        if 100 <= self.status < 200:  # an interim answer; the real one follows
            return True
        self.head_done = True
        self.keep_alive = version == "HTTP/1.1" and "close" not in self.headers.get("connection", "").lower()
        self._step = self._body_kind()
        return True

    def _body_kind(self) -> Callable[[], bool]:
        coding, length = self.headers.get("transfer-encoding", "").lower(), self.headers.get("content-length")
        if coding == "chunked":
            return self._chunk_size
        if coding:
            raise ValueError(f"the answer has an unknown transfer encoding: {printable(coding[:40])}")
        if self.status in (204, 304):
            length = "0"
        if length is None:
            self.keep_alive = False
            return self._until_close
        if not (length.isascii() and length.isdigit() and len(length) < 16):
            raise ValueError(f"the answer has a malformed Content-Length: {printable(length[:40])}")
        self._left = int(length)
        if self._left > self.limit:
            raise TooBig(f"the answer of {self._left} bytes is larger than {self.limit}")
        return self._sized

    def _sized(self) -> bool:
        self._move(self._left)
        self.done = self._left == 0
        return False

    def _until_close(self) -> bool:
        self._move(len(self._pending))
        return False

    def _chunk_size(self) -> bool:
        end = self._pending.find(b"\r\n")
        if end < 0 and len(self._pending) < 1024:
            return False
        digits = bytes(self._pending[:max(end, 0)]).partition(b";")[0].strip()
        if not 0 < len(digits) <= 12 or digits.strip(b"0123456789abcdefABCDEF"):
            raise ValueError("the answer has a malformed chunk")
        del self._pending[:end + 2]
        self._left = int(digits, 16)
        self._step = self._chunk_data if self._left else self._trailer
        return True

    def _chunk_data(self) -> bool:
        self._move(self._left)
        if self._left or len(self._pending) < 2:
            return False
        if self._pending[:2] != b"\r\n":
            raise ValueError("the answer has a malformed chunk")
        del self._pending[:2]
        self._step = self._chunk_size
        return True

    def _trailer(self) -> bool:
        end = self._pending.find(b"\r\n")
        if end < 0 or end > MAX_HEAD:
            if len(self._pending) > MAX_HEAD:
                raise TooBig(f"the trailer of the answer is larger than {MAX_HEAD} bytes")
            return False
        del self._pending[:end + 2]
        self.done = end == 0
        return not self.done

    def _move(self, count: int) -> None:
        """Move up to count received bytes to the body."""
        part = self._pending[:count]
        del self._pending[:count]
        self.body += part
        self._left -= len(part)
        if len(self.body) > self.limit:
            raise TooBig(f"the answer is larger than {self.limit} bytes")


def http_request(method: str, target: str, host: str, headers: Mapping[str, str], body: bytes = b"") -> bytes:
    """The bytes of an HTTP/1.1 request. The body is complete: etcd answers nothing before it has all of it."""
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", f"User-Agent: etcdinit/{__version__}",
             f"Content-Length: {len(body)}", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


# ---- endpoints ----------------------------------------------------------------------------------------

def jitter(seconds: float) -> float:
    """A random time between half of it and all of it, so that many clients do not come back together."""
    return seconds * (0.5 + _random_below(1000) / 2000)


class Endpoint:
    """Where one etcd member listens for clients, and how it fared.

    scheme; host: a name, or an address without brackets; port; server_name: whom its certificate must name;
    source: what named it; priority: of its SRV record; addresses: that came with the SRV record.
    A failed endpoint is asked last until retry_at (see now()); trouble says why it failed.
    """

    __slots__ = ("scheme", "host", "port", "server_name", "source", "priority", "addresses", "failures", "retry_at",
                 "trouble")

    def __init__(self, scheme: str, host: str, port: int, source: str = "", server_name: str = "", priority: int = 0,
                 addresses: Sequence[str] = ()) -> None:
        self.scheme, self.host, self.port, self.source = scheme, host, port, source
        self.server_name, self.priority, self.addresses = server_name or self.plain_host, priority, addresses
        self.failures, self.retry_at, self.trouble = 0, 0.0, ""

    @property
    def plain_host(self) -> str:
        """The host without what matters here only: the scope of an address (RFC 6874), the last dot of a name."""
        return self.host.partition("%")[0].removesuffix(".")

    @property
    def authority(self) -> str:
        """host:port for the Host field."""
        host = self.plain_host
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://[{self.host}]:{self.port}" if ":" in self.host else f"{self.scheme}://{self.authority}"

    def failed(self, why: str, longest: float = CIRCUIT_LONGEST) -> None:
        """Open the circuit: each failure in a row doubles the seconds, up to longest, for which others go first."""
        self.failures, self.trouble = self.failures + 1, why
        self.retry_at = now() + jitter(min(longest, CIRCUIT_FIRST * 2 ** min(self.failures - 1, 10)))

    def works(self) -> None:
        """Close the circuit."""
        self.failures, self.retry_at, self.trouble = 0, 0.0, ""


_ENDPOINT = (r"(?ai)(?:(https?)://)?(\[[0-9A-F:.]+(?:%(?:25)?[\w.-]+)?\]|\w[\w-]*(?:\.[\w-]+)*\.?)"
             r"(?::([0-9]{1,5}))?/*")


def parse_endpoint(text: str, scheme: str = "https", source: str = "") -> Endpoint:
    """An endpoint from "http://host:port", "host:port", "host" (port 2379), "[::1]:2379" or "[fe80::1%eth0]".

    scheme: the one for an endpoint that names none. UsageError says what is wrong.
    """
    parts = regex(_ENDPOINT).fullmatch(text.strip())
    if "@" in text:  # not quoted: what stands before it is likely a password
        raise UsageError("an etcd endpoint holds no user and password: set ETCD_USERNAME and ETCD_PASSWORD")
    host = regex("%25(?=.)").sub("%", parts[2].strip("[]")) if parts else ""
    if not parts or not 0 < int(parts[3] or 2379) < 65536 or parts[2][0] == "[" and not is_address(host):
        raise UsageError(f'not an etcd endpoint: "{printable(text)}"'
                         " (examples: http://10.0.0.1:2379, etcd1:2379, https://[::1]:2379)")
    return Endpoint((parts[1] or scheme).lower(), host, int(parts[3] or 2379), source)


# ---- TLS ----------------------------------------------------------------------------------------------

CA_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/ssl/cert.pem", "/etc/pki/tls/certs/ca-bundle.crt")

_IS_IT_HTTPS = "is it https? then say https:// in the endpoint, and not ETCD_SCHEME=http"
_TLS_CLOSED = ("the connection was closed in the TLS handshake"
               " (is it http? then say ETCD_SCHEME=http, or http:// in the endpoint)")
_TLS_REMEDIES: dict[int | str, str] = {  # OpenSSL's number for a failed verification, or its name for a failure
    9: "its certificate is not valid yet (is the clock of one side wrong?)",
    10: "its certificate has expired (renew it on the server; is the clock here right?)",
    18: "its certificate is signed by itself, not by an authority that is trusted here (set ETCD_CA)",
    19: "its certificate is signed by an authority that is not trusted here (set ETCD_CA to that CA's certificate)",
    20: "its certificate is signed by an authority that is not trusted here (set ETCD_CA to that CA's certificate)",
    21: "its certificate is signed by an authority that is not trusted here (set ETCD_CA to that CA's certificate)",
    62: "its certificate is not for {name} (use a name that it holds, or set ETCD_TLS_SERVER_NAME to one)",
    64: "its certificate is not for the address {name} (use a name that it holds, or set ETCD_TLS_SERVER_NAME to one)",
    "WRONG_VERSION_NUMBER": "it does not speak TLS (is it http? say ETCD_SCHEME=http, or http:// in the endpoint)",
    "UNSUPPORTED_PROTOCOL": "it offers nothing newer than TLS 1.1; TLS 1.2 or later is needed",
    "TLSV1_ALERT_PROTOCOL_VERSION": "it offers nothing newer than TLS 1.1; TLS 1.2 or later is needed",
    **dict.fromkeys(
        ("SSLV3_ALERT_BAD_CERTIFICATE", "TLSV13_ALERT_CERTIFICATE_REQUIRED", "TLSV1_ALERT_UNKNOWN_CA",
         "SSLV3_ALERT_CERTIFICATE_UNKNOWN", "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE", "SSLV3_ALERT_HANDSHAKE_FAILURE",
         "SSLV3_ALERT_CERTIFICATE_EXPIRED"),
        "it wants a client certificate that it can accept: signed by its --trusted-ca-file, valid, and for client"
        " authentication (set ETCD_CERT and ETCD_KEY)"),
}


def tls_failure(error: ssl.SSLError, name: str) -> str:
    """A failure of TLS in one sentence, with what to change if that is known; name: what the certificate must hold."""
    number = getattr(error, "verify_code", 0)
    told = _TLS_REMEDIES.get(number) or _TLS_REMEDIES.get(error.reason or "")
    if told:
        return told.format(name=name)
    if number:
        return f"its certificate is not accepted: {getattr(error, 'verify_message', number)}"
    return "TLS failed: " + (error.reason or str(error)).lower().replace("_", " ")


class Tls:
    """How https is spoken: whom to trust, who we are. Credentials in files are read again when they change.

    ca, cert, key: PEM as text or base64, or a path to it, None for none (ca: the system's authorities).
    """

    __slots__ = ("ca", "cert", "key", "verify", "_context", "_made_of", "_told")

    def __init__(self, ca: Secret | None = None, cert: Secret | None = None, key: Secret | None = None,
                 verify: bool = True) -> None:
        self.ca, self.cert, self.key, self.verify = _as_file(ca), _as_file(cert), _as_file(key), verify
        if bool(cert) != bool(key):
            missing = "ETCD_KEY" if cert else "ETCD_CERT"
            raise UsageError(f"ETCD_CERT and ETCD_KEY belong together: {missing} is not set")
        self._context: Any = None  # an ssl._SSLContext
        self._made_of: tuple[str, ...] = ()
        self._told = ""  # what is wrong with the files now

    def context(self) -> Any:
        """The context for new connections: TLS 1.2 or later, no ALPN (h2 would bring HTTP/2).

        UsageError if the credentials cannot be used; once they could, changed ones that cannot are told and left.
        """
        try:
            texts = tuple(source.text() if source else "" for source in (self.ca, self.cert, self.key))
            if self._context is None or texts != self._made_of:
                self._context, self._made_of, self._told = self._make(), texts, ""
        except UsageError as error:  # as between the new certificate and its key
            if self._context is None:
                raise
            if str(error) != self._told:
                log.warning(f"{error}; the last ones are used")
            self._told = str(error)
        return self._context

    def _make(self) -> Any:
        ca, cert, key = _pem(self.ca, "CERTIFICATE"), _pem(self.cert, "CERTIFICATE"), _pem(self.key, "PRIVATE KEY")
        context: Any = ssl._SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.PROTO_TLSv1_2
        context.check_hostname = self.verify
        context.verify_mode = ssl.CERT_REQUIRED if self.verify else ssl.CERT_NONE
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # what ETCD_CA holds is trusted, a root or not, as in Go
        if ca:
            try:
                context.load_verify_locations(None, None, ca)
            except OSError as error:
                raise UsageError(f"cannot use {self.ca.where if self.ca else ''}: {_openssl_words(error)}") from None
        elif self.verify:
            context.set_default_verify_paths()  # SSL_CERT_FILE and SSL_CERT_DIR, or where OpenSSL was built to look
            bundle = next((path for path in CA_BUNDLES if os.path.isfile(path)), None)
            if bundle and "SSL_CERT_FILE" not in os.environ:
                context.load_verify_locations(bundle)
        if key:
            self._load_identity(context, cert, key)
        return context

    def _load_identity(self, context: Any, cert: str, key: str) -> None:
        """Load certificate and key from memory: OpenSSL reads files only, so the file is one without a name."""
        where = f"{self.cert.where if self.cert else ''} and {self.key.where if self.key else ''}"
        file = -1
        try:
            file = os.memfd_create("etcdinit")
            os.write(file, (cert + key).encode("ascii"))
            context.load_cert_chain(f"/proc/self/fd/{file}", None, lambda: "")  # else OpenSSL asks at the terminal
        except OSError as error:
            text = "/proc is not mounted" if not os.path.exists("/proc/self/fd") else _openssl_words(error)
            raise UsageError(f"cannot use {where}: {text}") from None
        finally:
            if file >= 0:
                os.close(file)


_OPENSSL_WORDS = {  # a part of OpenSSL's reason: what it means here
    "key values mismatch": "key values mismatch: the key is not that of the certificate",
    "pem lib": "its PEM text is no certificate or key", "bad base64": "its PEM text is damaged",
}


def _openssl_words(error: OSError) -> str:
    """What OpenSSL or the system has against a certificate or key."""
    words = str(getattr(error, "reason", "") or reason(error)).lower().replace("_", " ")
    return next((told for part, told in _OPENSSL_WORDS.items() if part in words), words.partition(" ( ssl.c")[0])


def _as_file(source: Secret | None) -> Secret | None:
    """A credential whose text is a path becomes one that is read from there."""
    if source and not source.path:
        text = source.text()
        if text.startswith(("/", "./", "../")) or len(text) < 4096 and "\n" not in text and os.path.isfile(text):
            if source.hidden:
                conceal("", instead_of=text)  # a path is none
            return Secret(source.where, path=text, hidden=source.hidden)
    return source


_PEM_BLOCK = r"(?s)-----BEGIN ([A-Z0-9 ]+)-----(.*?)-----END \1-----"


def _pem(source: Secret | None, kind: str) -> str:
    """The PEM text of a credential in any of its forms, "" for none. UsageError.

    kind: the blocks that are taken, others are left out: "CERTIFICATE" or "PRIVATE KEY". The lines are made anew:
    what variables and YAML did to them (CRLF, indentation, blanks, a written \\n) does not matter.
    """
    if source is None:
        return ""
    text = source.text()
    if "-----BEGIN" not in text:
        try:
            text = binascii.a2b_base64("".join(text.split()).encode(), strict_mode=True).decode()
        except ValueError:
            text = ""
        if "-----BEGIN" not in text:
            raise _bad_pem(source, "neither PEM text, nor base64 of it, nor a path")
        if source.hidden:
            Secret(source.where, text, hidden=True)  # the decoded form is as secret
    if kind == "PRIVATE KEY" and "ENCRYPTED" in text:  # in its label, or in the header of the old format
        raise _bad_pem(source, "the key is encrypted, and nobody is here to ask for its password"
                               " (openssl pkey -in KEY -out PLAIN takes the encryption off)")
    blocks = regex(_PEM_BLOCK).findall(text.replace("\\n", "\n"))
    if not blocks:
        raise _bad_pem(source, "its PEM text is cut off: -----BEGIN without -----END")
    lines: list[str] = []
    for label, body in blocks:
        if label.endswith(kind):
            body = "".join(body.split())
            if not body.isascii():
                raise _bad_pem(source, "its PEM text is damaged")
            lines += [f"-----BEGIN {label}-----", *(body[at:at + 64] for at in range(0, len(body), 64)),
                      f"-----END {label}-----", ""]
    if not lines:
        held = ", ".join(dict.fromkeys(label for label, _ in blocks))
        raise _bad_pem(source, f"it holds no {kind}, but {held}")
    return "\n".join(lines)


def _bad_pem(source: Secret, why: str) -> UsageError:
    return UsageError(f"cannot use {source.where}{' from ' * bool(source.path)}{source.path}: {why}")


# ---- connections --------------------------------------------------------------------------------------

def wait_readable(fd: int, deadline: float, writable: bool = False) -> None:
    """Wait until a descriptor can be read (or written); TimeoutError when the deadline has passed."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT if writable else select.POLLIN)
    if not poll.poll(max(0.0, deadline - now()) * 1000):
        raise TimeoutError(errno.ETIMEDOUT, "timed out")


_SOCKET_OPTIONS = (  # no delay; and on a connection that is silent for 20 s, TCP asks by itself whether it stands
    ("IPPROTO_TCP", "TCP_NODELAY", 1), ("SOL_SOCKET", "SO_KEEPALIVE", 1), ("IPPROTO_TCP", "TCP_KEEPIDLE", 20),
    ("IPPROTO_TCP", "TCP_KEEPINTVL", 5), ("IPPROTO_TCP", "TCP_KEEPCNT", 3))


class Connection:
    """One connection to an endpoint, with TLS or without. Never blocks beyond the deadline that a call is given."""

    __slots__ = ("endpoint", "used", "_socket", "_tls", "_incoming", "_outgoing")

    def __init__(self, endpoint: Endpoint, deadline: float, tls: Tls | None = None) -> None:
        """Connect to the first address that takes it. OSError (TimeoutError, ssl.SSLError), DnsError, UsageError."""
        self.endpoint = endpoint
        self.used = False  # an answer has come over it: it may have been closed meanwhile
        self._tls: Any = None  # an ssl._SSLSocket between the two buffers, once it is asked for
        addresses = endpoint.addresses or resolve_address(endpoint.host, deadline)
        for index, address in enumerate(addresses):
            self._socket = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
            try:
                share = (deadline - now()) / (len(addresses) - index)  # a dead address leaves time for the next
                self._connect(_socket_address(address, endpoint.port), now() + share)
                if tls:
                    self._handshake(tls, deadline)
                return
            except OSError:
                self._socket.close()
                if index == len(addresses) - 1:
                    raise
            except BaseException:
                self._socket.close()
                raise

    def _connect(self, address: Any, deadline: float) -> None:
        self._socket.setblocking(False)
        for level, option, value in _SOCKET_OPTIONS:
            self._socket.setsockopt(getattr(socket, level), getattr(socket, option), value)
        failure = self._socket.connect_ex(address)
        if failure == errno.EINPROGRESS:
            wait_readable(self.fileno(), deadline, writable=True)
            failure = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if failure:
            raise OSError(failure, os.strerror(failure))

    def _handshake(self, tls: Tls, deadline: float) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = tls.context()._wrap_bio(self._incoming, self._outgoing, False, self.endpoint.server_name)
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                try:
                    self._flush(deadline)
                    data = self._receive_raw()
                except (ConnectionResetError, BrokenPipeError):
                    data = b""
                if data is None:
                    wait_readable(self.fileno(), deadline)
                elif data:
                    self._incoming.write(data)
                else:
                    raise OSError(errno.ECONNRESET, _TLS_CLOSED) from None
            except ssl.SSLError:
                try:
                    self._flush(now() + 0.1)  # our alert tells the server why
                except OSError:
                    pass  # it has gone already; why we would not have it is what counts
                raise
        self._flush(deadline)

    def _flush(self, deadline: float) -> None:
        if self._outgoing.pending:
            self._send_raw(self._outgoing.read(), deadline)

    def tls_version(self) -> str:
        """As in "TLSv1.3", "" for a connection without TLS."""
        return (self._tls.version() or "") if self._tls else ""

    def certificate_end(self) -> str:
        """Until when the other side's certificate is valid, as in "Nov 24 09:00:00 2027 GMT"; "" if not verified."""
        return str(self._tls.getpeercert().get("notAfter", "")) if self._tls else ""

    def fileno(self) -> int:
        """The descriptor, for poll()."""
        return self._socket.fileno()

    def send(self, data: bytes, deadline: float) -> None:
        """Send all of it. OSError, TimeoutError."""
        if self._tls is None:
            self._send_raw(data, deadline)
            return
        self._tls.write(data)
        self._flush(deadline)

    def _send_raw(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[self._socket.send(view, socket.MSG_NOSIGNAL):]
            except BlockingIOError:
                wait_readable(self.fileno(), deadline, writable=True)

    def receive(self) -> bytes | None:
        """What has arrived: b"" when the other side has closed, None when there is nothing now. OSError."""
        if self._tls is None:
            return self._receive_raw()
        while True:
            try:
                return bytes(self._tls.read(64 * 1024))
            except ssl.SSLWantReadError:
                data = self._receive_raw()
                if data is None:
                    return None
                if data:
                    self._incoming.write(data)
                else:
                    self._incoming.write_eof()
            except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
                return b""

    def _receive_raw(self) -> bytes | None:
        try:
            return self._socket.recv(64 * 1024)
        except BlockingIOError:
            return None

    def close(self) -> None:
        """Close it; nothing more is sent."""
        self._socket.close()

    def exchange(self, request: bytes, timeout: float, limit: int = MAX_ANSWER) -> Answer:
        """Send a request and return its whole answer.

        OSError and TimeoutError from the network, ValueError (TooBig) for an answer that is none. The
        deadline moves on only as fast as SLOWEST_ANSWER allows, so a dripping answer ends too.
        """
        deadline, received = now() + timeout, 0
        answer = Answer(limit)
        try:
            self.send(request, deadline)
        except (ConnectionResetError, BrokenPipeError):
            pass  # what came before, as a TLS alert, may tell why
        while not answer.done:
            data = self.receive()
            if data is None:
                wait_readable(self.fileno(), min(deadline, now() + timeout))
                continue
            answer.feed(data)
            received += len(data)
            if received > 4 * MAX_HEAD + 2 * len(answer.body):  # interim answers, empty chunks, trailers without end
                raise TooBig(f"{received} bytes have come, {len(answer.body)} of them belong to the answer")
            deadline += len(data) / SLOWEST_ANSWER
            if now() > deadline and not answer.done:
                raise TimeoutError(errno.ETIMEDOUT, "timed out")
        self.used = True
        answer.keep_alive = answer.keep_alive and not answer.excess
        return answer

    def is_over(self) -> bool:
        """Whether, while nothing was asked, it has been closed, or something has come that nobody asked for."""
        return readable(self.fileno(), 0)


# ---- what both APIs mean ------------------------------------------------------------------------------

V3_BASES = ("/v3", "/v3beta", "/v3alpha")  # etcd 3.4 and later, 3.3, 3.2

# A gRPC status code (v3) or errorCode (v2) and the error it is raised as; messages decide first where etcd gives
# one code to different things.
_V3_CODES = {4: EtcdUnreachable, 7: EtcdDenied, 8: EtcdTooBig, 14: EtcdUnreachable, 16: EtcdDenied}
_V3_MESSAGES = (  # a part of the message, the error, what to do about it
    ("has been compacted", EtcdCompacted, ""), ("is a future revision", EtcdCompacted, ""),
    ("user name is empty", EtcdDenied, "set ETCD_USERNAME and ETCD_PASSWORD"),
    ("authentication failed", EtcdDenied, "check ETCD_USERNAME and ETCD_PASSWORD"),
    ("auth store is old", EtcdDenied, ""), ("permission denied", EtcdDenied, "the role of the user does not hold it"),
    ("CommonName of client", EtcdDenied, "with auth on, etcd's JSON gateway takes client certificates with an empty CN"
                                         " only: make one, and set ETCD_USERNAME and ETCD_PASSWORD"),
    ("HTTP request to an HTTPS server", EtcdUnreachable, _IS_IT_HTTPS),
    ("context deadline exceeded", EtcdUnreachable, ""), ("request timed out", EtcdUnreachable, ""),
    ("no leader", EtcdUnreachable, "its cluster has no quorum, or is electing: look at the other members"),
    ("authentication handshake failed", EtcdUnreachable, "the server's certificate must be for client authentication"
                                                         " too: etcd's gateway connects to itself with it"),
)
_V2_CODES = {110: EtcdDenied, 300: EtcdUnreachable, 301: EtcdUnreachable, 401: EtcdCompacted}
_TOKEN_REFUSED = ("invalid auth token", "user name is empty", "auth store is old")  # log in again, once


def key_text(data: bytes) -> str:
    """A key or value of etcd as text: UTF-8, other bytes as surrogates (surrogateescape)."""
    return data.decode("utf-8", "surrogateescape")


def key_bytes(text: str) -> bytes:
    """The bytes of a key or value; the inverse of key_text()."""
    return text.encode("utf-8", "surrogateescape")


def base64_text(data: bytes) -> str:
    """Standard base64 with padding, the only form that the gateway takes."""
    return binascii.b2a_base64(data, newline=False).decode("ascii")


def range_end(prefix: bytes) -> bytes:
    """The end of the range of all keys that begin with a prefix; b"\\0" means that there is no end."""
    prefix = prefix.rstrip(b"\xff")
    return prefix[:-1] + bytes((prefix[-1] + 1,)) if prefix else b"\0"


def top_keys(keys: Iterable[str]) -> list[str]:
    """The keys without those that lie below another one, sorted, without trailing slashes; "/" stays."""
    tops: list[str] = []
    for key in sorted({key.rstrip("/") + "/" if key else "" for key in keys}):
        if not tops or not key.startswith(tops[-1]):
            tops.append(key)
    return sorted((key[:-1] if len(key) > 1 else key for key in tops), key=key_bytes)


def key_ranges(keys: Iterable[str]) -> list[tuple[bytes, bytes, list[str]]]:
    """The fewest ranges (start, end, the keys in it) that hold everything at and below the given keys.

    A key and all below it is the range from KEY to before KEY0 ("0" follows "/"), which also holds siblings
    as in KEY-x: what comes back is to be filtered. The key "" stands for all keys there are.
    """
    ranges: list[tuple[bytes, bytes, list[str]]] = []
    for key in top_keys(keys):
        if not key:
            return [(b"\0", b"\0", [""])]
        start = key_bytes(key)
        end = range_end(start.rstrip(b"/") + b"/")
        if ranges and start <= ranges[-1][1]:
            first, last, inside = ranges.pop()
            ranges.append((first, max(last, end), [*inside, key]))
        else:
            ranges.append((start, end, [key]))
    return ranges


def at_or_below(keys: Iterable[str]) -> Callable[[str], bool]:
    """A test whether a key is one of the given ones or lies below one: /foo holds /foo/bar, not /foobar."""
    exact = frozenset(keys)
    prefixes = tuple(key.rstrip("/") + "/" if key else "" for key in exact)
    return lambda key: key in exact or key.startswith(prefixes)


def v3_failure(status: int, body: bytes) -> tuple[type[EtcdError], int | None, str]:
    """The error that a v3 answer means, its gRPC code and etcd's message.

    Bodies of etcd 3.4, 3.5 and 3.6 differ ({"error", "message", "code"}, or {"error": {"grpc_code", ...}} in a
    stream), and the gateway answers some faults in plain text.
    """
    code, message = None, ""
    try:
        data = from_json(body)
    except (ValueError, RecursionError):
        data = None
        text = body[:2000].decode("utf-8", "replace").strip()
        title = re.search("<title>([^<]{1,100})</title>", text, re.IGNORECASE)
        message = f"HTTP status {status}: {title[1].strip() if title else 'a web page'} (is that etcd, or a proxy?)" \
            if text.startswith("<") else text[:200].partition("\n")[0]
    if isinstance(data, dict):
        inner = data.get("error")
        data = inner if isinstance(inner, dict) else data
        code = data.get("code", data.get("grpc_code"))
        code = code if isinstance(code, int) else None
        message = str(data.get("message") or data.get("error") or "")
    message = printable(message[:500]) or f"HTTP status {status} without a message"
    kind = _V3_CODES.get(code or 0, EtcdUnreachable if status >= 500 and code is None else EtcdError)
    kind, remedy = next(((found, remedy) for text, found, remedy in _V3_MESSAGES if text in message), (kind, ""))
    return kind, code, f"{message} ({remedy})" if remedy else message


def v3_headers(token: str | None) -> dict[str, str]:
    """The header fields of a v3 request. Without a leader it fails at once, and a watch ends."""
    headers = {"Content-Type": "application/json", "Grpc-Metadata-hasleader": "true"}
    return {**headers, "Authorization": token} if token else headers


def v2_failure(status: int, body: bytes) -> tuple[type[EtcdError], int | None, str]:
    """The error that a v2 answer means, its errorCode and etcd's message with its cause."""
    try:
        data = from_json(body)
        code, message, cause = data["errorCode"], str(data["message"]), str(data.get("cause") or "")
        if not isinstance(code, int):
            raise ValueError
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        kind, code, message = v3_failure(status, body)
        return EtcdDenied if status == 401 else kind, code, message
    kind = _V2_CODES.get(code, EtcdUnreachable if status >= 500 else EtcdError)
    if code == 110:  # etcd says the same for a missing user, a wrong password, and a role that does not hold the key
        cause += "; check ETCD_USERNAME, ETCD_PASSWORD and the role of the user"
    return kind, code, printable(f"{message} ({cause})"[:500] if cause else message[:500])


def _v2_text(text: str) -> str:
    return text if text.isascii() else key_text(text.encode("utf-8", "surrogatepass"))


def v2_pairs(node: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The keys and values below a node of the v2 API."""
    pairs, waiting = [], [node]
    while waiting:
        node = waiting.pop()
        if node.get("dir"):
            waiting.extend(node.get("nodes") or ())
        else:
            pairs.append((_v2_text(node["key"]), _v2_text(node.get("value", ""))))
    return pairs


def v2_target(key: str, query: str = "", slash: str = "") -> str:
    """The request target of a key in the v2 API; with a slash behind it if told so."""
    quoted = "".join(chr(byte) if chr(byte).isalnum() and byte < 128 or byte in b"/-._~" else f"%{byte:02X}"
                     for byte in key_bytes(key.rstrip("/")))
    return f"/v2/keys{quoted}{slash}{'?' if query else ''}{query}"


# ---- endpoints from DNS -------------------------------------------------------------------------------

def srv_questions(domain: str, record: str, name: str, scheme: str) -> list[tuple[str, str]]:
    """The SRV names to ask, in order, each with the scheme of what it names: the record alone, or those of a domain.

    etcd's own names come first (name: their suffix, etcd's --discovery-srv-name), then confd's. UsageError.
    """
    if record:
        return [(record, scheme)]
    if domain.startswith("_"):
        raise UsageError(f'cannot use ETCD_SRV_DOMAIN: "{printable(domain)}" is a whole SRV name'
                         " (say ETCD_SRV_RECORD, or the domain alone, as in example.org)")
    suffix = f"-{name}" if name else ""
    questions = [(f"_etcd-client-ssl{suffix}._tcp.{domain}", "https"), (f"_etcd-client{suffix}._tcp.{domain}", scheme)]
    if scheme == "http":
        questions.reverse()
    return questions + [(f"_etcd._tcp.{domain}", scheme)] * (not name)


def srv_domain(question: str) -> str:
    """The domain of an SRV name, as example.org of _etcd-client._tcp.example.org: what certificates must hold."""
    labels = question.rstrip(".").split(".")
    while len(labels) > 1 and labels[0].startswith("_"):
        del labels[0]
    return ".".join(labels)


def srv_endpoints(questions: Sequence[tuple[str, str]], deadline: float) -> tuple[list[Endpoint], int]:
    """The endpoints of the first SRV name that has any, in RFC 2782 order, and their ttl in seconds. DnsError."""
    failures: list[DnsError] = []
    for question, scheme in questions:
        # First as it stands: with Kubernetes' ndots:5 every search domain would be asked before.
        for name in dict.fromkeys((question.rstrip(".") + ".", question)):
            try:
                answer = resolve_srv(name, deadline)
            except DnsError as error:
                failures.append(error)
                if error.temporary:
                    break
                continue
            source = f"SRV {question.rstrip('.')}"
            return [Endpoint(scheme, record.target, record.port, source, srv_domain(question),
                             record.priority, tuple(record.addresses)) for record in answer.records], answer.ttl
    raise next((failure for failure in failures if failure.temporary), failures[0])


# ---- the client ---------------------------------------------------------------------------------------

def _asking(verb: str, keys: list[str]) -> str:
    """What is asked, for errors: "read /a, /b, /c and 4 more"."""
    return f"{verb} {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"


def _reading(keys: list[str]) -> str:
    return _asking("read", keys)


class Etcd:
    """A client of one etcd cluster over HTTP/1.1: one kept connection, other endpoints when one fails.

    endpoints is the list in the order of preference; the one that answered last is asked first. A request has
    answer_timeout for all endpoints together. Raises EtcdError, which tells what was asked and who answered what.
    floors: of the last read by v2, the index at which each of the topmost keys was read; {} for v3.
    """

    __slots__ = ("api", "endpoints", "floors", "connect_timeout", "answer_timeout", "username", "password", "tls",
                 "server_name", "questions", "_connection", "_current", "_base", "_token", "_deadline", "_srv_until",
                 "_srv_asked", "_srv_failed")

    def __init__(self, endpoints: Iterable[str] = (), *, api: str = "auto", connect_timeout: float = CONNECT_TIMEOUT,
                 answer_timeout: float = ANSWER_TIMEOUT, scheme: str = "", username: Secret | None = None,
                 password: Secret | None = None, tls: Tls | None = None, server_name: str = "",
                 questions: Sequence[tuple[str, str]] = (), source: str = "") -> None:
        """endpoints: URLs, or questions: SRV names with schemes (see srv_questions), asked at the first request.

        api: "auto" (asks the server: 3 unless it is not there), "2", "3". scheme: for endpoints that name none, https
        unless it is "http"; a password is sent over http only with that. server_name: what certificates must hold
        instead of the endpoint's host or SRV domain; "target" is the SRV target's name. UsageError.
        """
        if api not in ("auto", "2", "3"):
            raise UsageError(f'not an etcd API: "{printable(api)}" (auto, 2 or 3)')
        if scheme not in ("", "http", "https"):
            raise UsageError(f'not a scheme: "{printable(scheme)}" (https or http)')
        if bool(username) != bool(password):
            missing = "ETCD_PASSWORD" if username else "ETCD_USERNAME"
            raise UsageError(f"ETCD_USERNAME and ETCD_PASSWORD belong together: {missing} is not set")
        if not regex(r"(?a)[\w-][\w.:-]*").fullmatch(server_name or "target"):
            raise UsageError(f'cannot use ETCD_TLS_SERVER_NAME: "{printable(server_name)}" is not a host name, an'
                             ' address or "target"')
        for name, seconds in (("ETCD_CONNECT_TIMEOUT", connect_timeout), ("ETCD_ANSWER_TIMEOUT", answer_timeout)):
            if not seconds:
                raise UsageError(f"cannot use {name}: nothing is done in 0 s")
        parsed = [parse_endpoint(endpoint, scheme or "https", source) for endpoint in endpoints]
        self.endpoints = list({str(endpoint): endpoint for endpoint in parsed}.values())
        if not self.endpoints and not questions:
            raise UsageError("nothing tells where etcd is: set ETCD_SRV_DOMAIN, ETCD_SRV_RECORD, ETCD_ENDPOINTS or"
                             " --node (examples: ETCD_SRV_DOMAIN=example.org,"
                             " ETCD_ENDPOINTS=https://etcd1.example.org:2379)")
        plain = [str(endpoint) for endpoint in self.endpoints if endpoint.scheme == "http"]
        plain += [question for question, scheme_there in questions if scheme_there == "http"]
        if password and plain and scheme != "http":
            raise UsageError(f"the password is not sent over plain http to {plain[0]}:"
                             " use https, or say ETCD_SCHEME=http")
        self.api = 0 if api == "auto" else int(api)  # 0 until the server was asked
        self.floors: dict[str, int] = {}
        self.connect_timeout, self.answer_timeout = connect_timeout, answer_timeout
        self.username, self.password, self.tls, self.server_name = username, password, tls or Tls(), server_name
        self.questions = tuple(questions)
        self._connection: Connection | None = None
        self._current: Endpoint | None = None  # it answered last
        self._base = ""  # of the v3 gateway, once it answered
        self._token: str | None = None  # "" when auth is off, None when we have not asked
        self._deadline = 0.0  # for the endpoint that is being asked
        self._srv_until = self._srv_asked = 0.0  # when the SRV answer ends, when it was asked for
        self._srv_failed = False  # the last lookup has, and that was told
        self._name_servers(self.endpoints)

    @classmethod
    def from_settings(cls, flags: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Etcd:
        """The client that flags and environment describe. --node goes before SRV names, they before ETCD_ENDPOINTS."""
        def value(name: str) -> Any:
            return setting(name, flags, environ)

        questions: list[tuple[str, str]] = []
        if not flags.get("node") and (value("srv-record") or value("srv-domain")):
            questions = srv_questions(value("srv-domain").strip(), value("srv-record").strip(), value("srv-name"),
                                      value("scheme") or "https")
        if value("insecure-skip-verify"):
            log.warning("ETCD_INSECURE_SKIP_VERIFY is set: anybody on the way can pretend to be etcd")
        tls = Tls(secret("ca", flags, environ), secret("cert", flags, environ), secret("key", flags, environ),
                  not value("insecure-skip-verify"))
        return cls(() if questions else value("node"), api=value("api"), scheme=value("scheme"), questions=questions,
                   connect_timeout=value("connect-timeout"), answer_timeout=value("answer-timeout"), tls=tls,
                   username=secret("username", flags, environ), password=secret("password", flags, environ),
                   server_name=value("tls-server-name"), source="--node" if flags.get("node") else "ETCD_ENDPOINTS")

    @property
    def source(self) -> str:
        """What tells where etcd is, and what it says: "ETCD_ENDPOINTS: https://etcd1:2379", or the SRV names."""
        if self.questions:
            return ", ".join(f"SRV {question}" for question, _ in self.questions)
        return f"{self.endpoints[0].source}: {', '.join(map(str, self.endpoints))}"

    def close(self) -> None:
        """Close the kept connection. The client can be used again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    # -- reading

    def watch(self, keys: Iterable[str], revision: int) -> Watch:
        """Follow everything at and below the keys from the revision of a read() on."""
        return Watch(self, keys, revision)

    def read(self, keys: Iterable[str]) -> tuple[int, list[tuple[str, str]]]:
        """Everything at and below the keys: the revision it was read at, and the keys with their values.

        v3: all of one revision. v2 has no snapshots: the revision is the index before the first answer, so a
        wait from there on misses nothing. A key that does not exist is no error.
        """
        tops = top_keys(keys)
        if not tops:
            return 0, []
        found: tuple[int, list[tuple[str, str]]]
        found = self._by_version(lambda: self._read_v3(tops), lambda: self._read_v2(tops))
        return found

    def get(self, key: str) -> str | None:
        """The value of one key, None if there is none."""
        request = f"read {key}"

        def by_v2() -> str | None:
            _, node = self._v2("GET", v2_target(key, "quorum=true"), request, missing=True)
            return None if node is None or node.get("dir") else _v2_text(str(node.get("value", "")))

        def by_v3() -> str | None:
            data = self._v3("/kv/range", {"key": base64_text(key_bytes(key))}, request)
            pairs = self._v3_pairs(data, request)
            return pairs[0][1] if pairs else None

        value: str | None = self._by_version(by_v3, by_v2)
        return value

    def _by_version(self, by_v3: Callable[[], Any], by_v2: Callable[[], Any]) -> Any:
        """What the API that was asked for gives; if none was, v3, or v2 where there is no v3. Which it was is kept."""
        if self.api != 2:
            try:
                found = by_v3()
                self.api = 3
                return found
            except EtcdDenied:
                self.api = 3  # it is there
                raise
            except EtcdNoGateway:
                if self.api:
                    raise
        try:
            found = by_v2()
        except EtcdDenied:
            self.api = 2  # it is there
            raise
        if not self.api:
            log.debug("the server has no v3 gateway, using the v2 API")
            self.api = 2
        return found

    def _read_v3(self, tops: list[str]) -> tuple[int, list[tuple[str, str]]]:
        for restarts in range(MAX_RESTARTS + 1):
            revision, pairs = 0, list[tuple[str, str]]()
            try:
                for start, end, inside in key_ranges(tops):
                    try:
                        request = _reading(inside if self.api else tops)  # at first it is all that cannot be read
                        revision = self._pages(start, end, revision, request, pairs)
                    except EtcdDenied:
                        revision = self._permitted(inside, revision, pairs)
            except EtcdCompacted as error:
                if restarts == MAX_RESTARTS:
                    raise
                log.debug("read again from the start", reason=error.text)
                continue
            wanted = at_or_below(tops)
            return revision, [pair for pair in pairs if wanted(pair[0])]
        raise AssertionError("not reached")

    def _permitted(self, keys: list[str], revision: int, pairs: list[tuple[str, str]]) -> int:
        """Read keys and what is below them one by one: a role may hold `/lb/` or the key `/lb/port` only."""
        for key in keys:
            denied: list[EtcdDenied] = []
            start = key_bytes(key)
            below = start.rstrip(b"/") + b"/"
            for first, last in ((start, b""), (below, range_end(below))):
                try:
                    revision = self._pages(first, last, revision, f"read {key}", pairs)
                except EtcdDenied as error:
                    denied.append(error)
            if len(denied) == 2:
                raise denied[1]
        return revision

    def _pages(self, start: bytes, end: bytes, revision: int, request: str, pairs: list[tuple[str, str]]) -> int:
        """Append a range to pairs, page by page at one revision (0: the newest); the revision."""
        limit, more = PAGE, True
        while more:
            body: dict[str, Any] = {"key": base64_text(start), "limit": limit}
            if end:
                body["range_end"] = base64_text(end)
            if revision:
                body["revision"] = revision
            try:
                data = self._v3("/kv/range", body, request)
            except EtcdTooBig:
                if limit == 1:
                    raise
                limit = max(1, limit // 2)
                continue
            page = self._v3_pairs(data, request)
            pairs += page
            revision = revision or int(data["header"]["revision"])
            more = bool(data.get("more")) and bool(page)
            if more and (key_bytes(page[-1][0]) < start or len(pairs) > MAX_KEYS):  # it would go on for ever
                raise EtcdTooBig(self._endpoint(), request, f"more than {len(pairs)} keys, or the same ones again")
            if more:
                start = key_bytes(page[-1][0]) + b"\0"
        return revision

    def _v3_pairs(self, data: dict[str, Any], request: str) -> list[tuple[str, str]]:
        decode = binascii.a2b_base64
        try:
            int(data["header"]["revision"])
            return [(decode(kv["key"]).decode("utf-8", "surrogateescape"),
                     decode(kv.get("value", "")).decode("utf-8", "surrogateescape")) for kv in data.get("kvs") or ()]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise EtcdAnswerError(self._endpoint(), request, "the answer has not the form of a range") from None

    def _read_v2(self, tops: list[str]) -> tuple[int, list[tuple[str, str]]]:
        index, pairs = 0, list[tuple[str, str]]()
        self.floors = {}
        for key in tops:
            request = f"read {key}"
            try:
                found, node = self._v2("GET", v2_target(key, "recursive=true&quorum=true"), request, missing=True)
            except EtcdDenied:  # a role that holds /lb/* may ask for /lb/, one that holds a key for that alone
                try:
                    target = v2_target(key, "recursive=true&quorum=true", "/")
                    found, node = self._v2("GET", target, request, missing=True)
                except EtcdDenied:
                    found, node = self._v2("GET", v2_target(key, "quorum=true"), request, missing=True)
                    if node and node.get("dir"):
                        raise
            index = index or found
            self.floors[key] = found
            try:
                pairs += v2_pairs(node or {"dir": True})
            except (KeyError, TypeError, ValueError, AttributeError):
                raise EtcdAnswerError(self._endpoint(), request, "the answer has not the form of a node") from None
        return index, pairs

    # -- one request

    def _v3(self, path: str, body: Mapping[str, Any], request: str) -> dict[str, Any]:
        """POST to the v3 gateway; the decoded answer."""

        def ask(endpoint: Endpoint) -> dict[str, Any]:
            if self.username and self._token is None:
                self._log_in(endpoint)
            try:
                return self._post(endpoint, path, body, request, self._token or "")
            except EtcdDenied as error:
                if not self.username or error.code != 16 and not any(text in error.text for text in _TOKEN_REFUSED):
                    raise
            self._log_in(endpoint)  # the token was forgotten, or auth was switched on or off
            return self._post(endpoint, path, body, request, self._token or "")

        found: dict[str, Any] = self._first(ask, request)
        return found

    def _log_in(self, endpoint: Endpoint) -> None:
        """Get a token. etcd spends 60 ms on checking a password, so one is kept until it is refused."""
        assert self.username and self.password
        old, self._token = self._token or "", None
        name = self.username.text()
        request = f'log in as "{printable(name)}"'
        try:
            data = self._post(endpoint, "/auth/authenticate", {"name": name, "password": self.password.text()}, request)
        except EtcdError as error:
            if error.code != 9:  # authentication is not enabled
                raise
            data = {"token": ""}
        token = data.get("token")
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise EtcdAnswerError(str(endpoint), request, "the answer holds no token (is it an etcd?)")
        self._token = conceal(token, instead_of=old)

    def _post(self, endpoint: Endpoint, path: str, body: Mapping[str, Any], request: str,
              token: str = "") -> dict[str, Any]:
        """One request to one endpoint's v3 gateway, at the path that it has."""
        data = to_json(body).encode("ascii")
        headers = v3_headers(token)
        for base in dict.fromkeys((self._base or V3_BASES[0], *V3_BASES)):
            answer = self._exchange(endpoint, "POST", base + path, headers, data, MAX_ANSWER, request)
            if answer.status == 404 and answer.body[:1] != b"{":
                continue  # no such path, as opposed to a JSON error with code 5
            self._base = base
            if answer.status != 200:
                kind, code, text = v3_failure(answer.status, bytes(answer.body))
                raise kind(str(endpoint), request, text, code)
            return self._object(answer, endpoint, request)
        raise EtcdNoGateway(str(endpoint), request, "it has no v3 JSON gateway (needed: etcd 3 with"
                            " --enable-grpc-gateway=true, or --enable-v2=true and ETCD_API=2)", 404)

    def _v2_headers(self) -> dict[str, str]:
        if not self.username or not self.password:
            return {}
        login = base64_text(key_bytes(f"{self.username.text()}:{self.password.text()}"))
        return {"Authorization": "Basic " + conceal(login)}

    def _v2(self, method: str, target: str, request: str, missing: bool = False) -> tuple[int, dict[str, Any] | None]:
        """One request of the v2 keys API: X-Etcd-Index and the node; None for a missing key where that is no error."""
        headers = self._v2_headers()

        def ask(endpoint: Endpoint) -> tuple[int, dict[str, Any] | None]:
            answer = self._exchange(endpoint, method, target, headers, b"", MAX_ANSWER_V2, request)
            digits = answer.headers.get("x-etcd-index", "")
            index = int(digits) if digits.isascii() and digits.isdigit() else 0
            if answer.status in (200, 201):
                node = self._object(answer, endpoint, request).get("node")
                if not isinstance(node, dict):
                    raise EtcdAnswerError(str(endpoint), request, "the answer has not the form of a node")
                return index, node
            kind, code, text = v2_failure(answer.status, bytes(answer.body))
            if code == 100 and missing:
                return index, None
            if answer.status == 404 and code is None:
                text = "it has no v2 API (needed: etcd up to 3.5 with --enable-v2=true, or ETCD_API=3)"
                if not self.api:
                    text = "it has neither a v3 JSON gateway (--enable-grpc-gateway) nor a v2 API (--enable-v2=true)"
            raise kind(str(endpoint), request, text, code)

        found: tuple[int, dict[str, Any] | None] = self._first(ask, request)
        return found

    # -- which endpoint

    def _first(self, ask: Callable[[Endpoint], Any], request: str) -> Any:
        """The answer of the first endpoint that gives one, within answer_timeout.

        Each of several endpoints gets a part of it only: a stopped member takes connections and is silent. They are
        asked again as long as one may come to serve, as when a leader is being elected.
        """
        self._look_up(request)
        deadline = now() + self.answer_timeout
        patience, pause = FIRST_TRY * self.answer_timeout, ROUND_FIRST
        failures: dict[str, EtcdError] = {}  # the last of each endpoint
        while True:
            late = False
            for endpoint in self._order():
                left = deadline - now()
                if left <= 0 and failures:
                    break
                self._deadline = now() + (left if len(self.endpoints) == 1 else min(left, patience))
                try:
                    answer = ask(endpoint)
                except (EtcdUnreachable, EtcdAnswerError) as error:
                    if isinstance(error, EtcdTooBig):
                        raise
                    self.close()
                    endpoint.failed(error.text, NOT_NOW if error.code else CIRCUIT_LONGEST)
                    failures[str(endpoint)] = error
                    late = late or bool(error.code) or now() >= self._deadline
                    log.debug(str(error))
                    continue
                except EtcdError:
                    self._current = endpoint  # it serves; the request is what it does not like
                    raise
                endpoint.works()
                self._current = endpoint
                return answer
            if self._look_up(request, again=True):
                continue  # DNS has others meanwhile
            if not late or now() + pause >= deadline:
                break
            time.sleep(jitter(pause))
            patience, pause = 2 * patience, min(2 * pause, ROUND_LONGEST)
        if len(failures) == 1:
            raise next(iter(failures.values()))
        told = "; ".join(f"{endpoint}: {failure.text}" for endpoint, failure in failures.items())
        raise EtcdUnreachable("", request, f"no etcd endpoint answers: {told}")

    def _order(self) -> list[Endpoint]:
        """The endpoints in the order to ask them: the current one, others, then those that failed lately."""
        moment = now()
        return sorted(self.endpoints, key=lambda endpoint: (
            endpoint.retry_at if endpoint.retry_at > moment else 0.0, endpoint is not self._current))

    def _name_servers(self, endpoints: list[Endpoint]) -> None:
        """Set whom the certificates must name, where a setting says so."""
        for endpoint in endpoints:
            if self.server_name:
                endpoint.server_name = endpoint.host if self.server_name == "target" else self.server_name

    def _look_up(self, request: str, again: bool = False, wait: bool = True) -> bool:
        """Ask DNS for the endpoints: at first, when its answer has become old, or again as all of them failed.

        True if there are endpoints or addresses that were not there before. Those that DNS does not name any more are
        dropped, the others keep their place and state. At first NXDOMAIN is not believed for SRV_PATIENCE, if wait.
        """
        patience_at_start = SRV_PATIENCE if wait else 0.0
        if not self.questions or now() < (self._srv_asked + SRV_SHORTEST if again else self._srv_until):
            return False
        first, pause, started = not self.endpoints, ROUND_FIRST, now()
        while True:
            try:
                patience = self.answer_timeout if first else self.connect_timeout
                found, ttl = srv_endpoints(self.questions, now() + patience)
                break
            except DnsBadName as error:
                raise UsageError(f"{error} (see ETCD_SRV_DOMAIN, ETCD_SRV_RECORD, ETCD_SRV_NAME)") from None
            except DnsError as error:
                self._srv_asked, self._srv_until = now(), now() + jitter(SRV_RETRY)
                if not first or now() + pause > started + patience_at_start:
                    if first:
                        self._srv_until = 0.0
                        raise EtcdUnreachable("", request, f"DNS does not tell where etcd is: {error}") from None
                    log("debug" if self._srv_failed else "warning", f"the last endpoints are used: {error}")
                    self._srv_failed = True
                    return False
                if pause == ROUND_FIRST:
                    log.info(f"waiting for DNS: {error}")
            time.sleep(jitter(pause))
            pause = min(2 * pause, ROUND_LONGEST)
        self._srv_asked, self._srv_until, self._srv_failed = now(), now() + max(ttl, SRV_SHORTEST), False
        self._name_servers(found)
        known = {str(endpoint): endpoint for endpoint in self.endpoints}
        named = {str(endpoint): endpoint for endpoint in reversed(found)}  # of a target named twice, the better place
        kept = [endpoint for url, endpoint in known.items() if url in named]
        new = [endpoint for endpoint in found if named[str(endpoint)] is endpoint and str(endpoint) not in known]
        moved = False
        for endpoint in kept:
            there = named[str(endpoint)]
            moved = moved or bool(set(there.addresses) - set(endpoint.addresses))
            endpoint.addresses, endpoint.priority = there.addresses, there.priority
        self.endpoints = sorted(kept + new, key=lambda endpoint: endpoint.priority)
        if new or len(kept) < len(known):
            log.debug("endpoints by DNS", endpoints=",".join(map(str, self.endpoints)))
        return moved or bool(new)

    # -- what there is to know about the endpoints

    def survey(self) -> list[dict[str, Any]]:
        """What each endpoint says of itself: a row for each, of text, numbers and booleans; "" and None for unknown.

        endpoint, source, priority, tls (version, "none", "TLSv1.3 unverified"), certificate_end, version,
        latency_ms (of one request on an open connection), leader (True if it leads), auth, error.
        """
        self._look_up("list the endpoints", wait=False)
        return [self._survey_one(endpoint) for endpoint in self.endpoints]

    def _survey_one(self, endpoint: Endpoint) -> dict[str, Any]:
        row: dict[str, Any] = {"endpoint": str(endpoint), "source": endpoint.source, "priority": endpoint.priority,
                               "tls": "", "certificate_end": "", "version": "", "latency_ms": None, "leader": None,
                               "auth": "", "error": ""}
        self._deadline = now() + self.answer_timeout
        try:
            connection = self._connect(endpoint, "connect")
            row["tls"] = connection.tls_version() + " unverified" * (not self.tls.verify) or "none"
            row["certificate_end"] = connection.certificate_end()
            row["version"] = self._server_version(endpoint)
            started = now()
            self._server_version(endpoint)
            row["latency_ms"] = round((now() - started) * 1000, 2)
            row["leader"], _ = self._leads(endpoint)
            row["auth"] = self._auth_state(endpoint)
        except EtcdError as error:
            row["error"] = error.text
        self.close()
        return row

    def _server_version(self, endpoint: Endpoint) -> str:
        answer = self._exchange(endpoint, "GET", "/version", {}, b"", MAX_HEAD, "ask for the version")
        return str(self._object(answer, endpoint, "ask for the version").get("etcdserver", ""))

    def _leads(self, endpoint: Endpoint) -> tuple[bool, str]:
        """Whether the member is the leader, and of which cluster ("": unknown). EtcdUnreachable if it knows of none."""
        request = "ask for the leader"
        try:
            data = self._post(endpoint, "/maintenance/status", {}, request)
        except EtcdNoGateway:
            answer = self._exchange(endpoint, "GET", "/v2/stats/self", {}, b"", MAX_HEAD, request)
            return self._object(answer, endpoint, request).get("state") == "StateLeader", ""
        header = data.get("header")
        if not isinstance(header, dict):
            return False, ""
        return data.get("leader") == header.get("member_id"), str(header.get("cluster_id", ""))

    def _auth_state(self, endpoint: Endpoint) -> str:
        """What the server makes of our credentials: "off", "needed", or who we are. EtcdDenied if it refuses them."""
        try:
            if self.username:
                self._log_in(endpoint)
                return f"as {printable(self.username.text())}" if self._token else "off"
            self._post(endpoint, "/kv/range", {"key": "AA==", "count_only": True}, "find out about authentication")
        except EtcdDenied as error:
            if self.username or "user name is empty" not in error.text:
                raise
            return "needed"
        except EtcdNoGateway:
            return ""  # the v2 API tells it only for each key
        return "off"

    # -- one request to one endpoint

    def _exchange(self, endpoint: Endpoint, method: str, target: str, headers: Mapping[str, str], body: bytes,
                  limit: int, request: str) -> Answer:
        """Send one HTTP request over the kept connection or a new one; the answer, whatever its status."""
        message = http_request(method, target, endpoint.authority, headers, body)
        started = now()
        while True:
            connection = self._connection
            if connection is None or connection.endpoint is not endpoint or connection.used and connection.is_over():
                connection = self._connect(endpoint, request)
            try:
                answer = connection.exchange(message, self._deadline - now(), limit)
            except (OSError, ValueError) as error:
                self.close()
                if isinstance(error, TimeoutError):
                    text = f"no answer within {round(now() - started, 1):g} s"
                    raise EtcdUnreachable(str(endpoint), request, text) from None
                if isinstance(error, TooBig):
                    raise EtcdTooBig(str(endpoint), request, str(error)) from None
                if connection.used:  # the server may have closed it since its last use: once more on a new one
                    continue
                raise self._failure(endpoint, request, error) from None
            if not answer.keep_alive:
                self.close()
            return answer

    def _connect(self, endpoint: Endpoint, request: str, plain: bool = False) -> Connection:
        self.close()
        started = now()
        deadline = min(self._deadline, started + self.connect_timeout)
        try:
            tls = self.tls if endpoint.scheme == "https" and not plain else None
            if tls:
                tls.context()  # what is wrong with our own certificates goes before what is wrong elsewhere
            self._connection = Connection(endpoint, deadline, tls)
        except TimeoutError:
            text = f"no connection within {round(now() - started, 1):g} s"
            raise EtcdUnreachable(str(endpoint), request, text) from None
        except (OSError, DnsError) as error:
            raise self._failure(endpoint, request, error) from None
        return self._connection

    def _failure(self, endpoint: Endpoint, request: str, error: Exception) -> EtcdError:
        """The error for a connection that failed."""
        if endpoint.scheme == "https" and isinstance(error, ssl.SSLError):
            return EtcdTlsError(str(endpoint), request, tls_failure(error, endpoint.server_name))
        if reason(error) == _TLS_CLOSED:
            return EtcdTlsError(str(endpoint), request, _TLS_CLOSED)
        unanswered = str(error).endswith("without an answer")
        kind = EtcdAnswerError if isinstance(error, ValueError) and not unanswered else EtcdUnreachable
        hint = f" ({_IS_IT_HTTPS})" if unanswered and endpoint.scheme == "http" else ""
        return kind(str(endpoint), request, reason(error) + hint)

    def _object(self, answer: Answer, endpoint: Endpoint, request: str) -> dict[str, Any]:
        try:
            data = from_json(answer.body)
        except (ValueError, RecursionError):
            data = None
        if not isinstance(data, dict):
            raise EtcdAnswerError(str(endpoint), request, f"the answer of {len(answer.body)} bytes is not a JSON object"
                                  " (is it an etcd?)")
        return data

    def _endpoint(self) -> str:
        return str(self._connection.endpoint if self._connection else self.endpoints[0])


# ---- what is wrong with the way to etcd ---------------------------------------------------------------

_CONNECT_REMEDIES = {  # a part of why there is no connection: what to look at
    "connection refused": "nothing listens there: is etcd running, is this its client port and an address that its"
                          " --listen-client-urls names?",
    "no connection within": "is the host up, the address right, and no firewall between?",
    "no route to host": "is the host up, and in a network that this one reaches?",
    "unreachable": "is there a route to it from here?",
}


def examine(flags: Mapping[str, Any], keys: Iterable[str],
            environ: Mapping[str, str] = os.environ) -> Iterator[tuple[str, bool, str]]:
    """Walk the way to etcd: for each step its name, whether it is passable, and what was seen or what to do.

    Ends with the first step that fails; a step fails when no endpoint is left that passes it.
    """
    known = [row.env for row in SETTINGS.values()]
    doubts = [f"{name} is no setting, did you mean {near[0]}?" for name in sorted(environ) if name.startswith("ETCD")
              and name.removesuffix("_FILE") not in known and (near := difflib.get_close_matches(name, known, 1, 0.8))]
    try:
        client = Etcd.from_settings(flags, environ)
        if client.questions or any(endpoint.scheme == "https" for endpoint in client.endpoints):
            client.tls.context()
        user = f'as "{printable(client.username.text())}" ({client.username})' if client.username else "without a user"
        password = f"password from {client.password}" if client.password and client.password.text() else ""
    except UsageError as error:
        yield "environment", False, "; ".join([str(error), *doubts])
        return
    tls = client.tls
    told = [client.source, user, password, f"CA from {tls.ca}" if tls.ca else "",
            f"client certificate from {tls.cert}, its key from {tls.key}" if tls.cert else "",
            "" if tls.verify else "certificates are not verified (ETCD_INSECURE_SKIP_VERIFY)", *doubts]
    yield "environment", True, "; ".join(filter(None, told))
    if client.questions or not all(is_address(endpoint.host) for endpoint in client.endpoints):
        config = load_dns_config(environ=environ)
        search = f"; search {' '.join(config.search)}" if config.search else ""
        absent = "" if os.path.isfile(config.source) else f" ({config.source} is not there)"
        yield "resolv.conf", True, f"nameservers {', '.join(map(_server_text, config.servers))}{absent}{search}"
    if client.questions:
        try:
            client._look_up("find etcd", wait=False)
        except Error as error:
            yield "SRV", False, error.text if isinstance(error, EtcdError) else str(error)
            return
        listed = ", ".join(f"{endpoint} (priority {endpoint.priority})" for endpoint in client.endpoints)
        yield "SRV", True, f"{client.endpoints[0].source}: {listed}"
    passable = list(client.endpoints)
    clusters: dict[str, Endpoint] = {}

    def connect(endpoint: Endpoint) -> str:
        try:
            client._connect(endpoint, "connect", plain=True)
        except EtcdUnreachable as error:
            remedy = next((remedy for part, remedy in _CONNECT_REMEDIES.items() if part in error.text), "")
            raise EtcdUnreachable(error.endpoint, error.request,
                                  f"{error.text} ({remedy})" if remedy else error.text) from None
        return "connected"

    def handshake(endpoint: Endpoint) -> str:
        if endpoint.scheme == "http":
            return "none, as it is http"
        connection = client._connect(endpoint, "connect")
        verified = f"for {endpoint.server_name}, valid until {connection.certificate_end()}"
        return f"{connection.tls_version()}, certificate {verified if client.tls.verify else 'not verified'}"

    def ask_version(endpoint: Endpoint) -> str:
        client.close()  # what connect() left behind speaks no TLS
        version, (leads, cluster) = client._server_version(endpoint), client._leads(endpoint)
        if cluster:
            clusters.setdefault(cluster, endpoint)
        return f"{version}, {'leader' if leads else 'follower'}"

    def log_in(endpoint: Endpoint) -> str:
        state = client._auth_state(endpoint)
        if state == "needed":
            raise EtcdDenied(str(endpoint), "log in", "it wants a user (set ETCD_USERNAME and ETCD_PASSWORD)")
        return state or "told by the v2 API only for each key"

    for step, look in (("connect", connect), ("TLS", handshake), ("etcd", ask_version), ("authentication", log_in)):
        seen: list[str] = []
        for endpoint in list(passable):
            client._deadline = now() + client.answer_timeout
            try:
                seen.append(f"{endpoint}: {look(endpoint)}")
            except EtcdError as error:
                passable.remove(endpoint)
                seen.append(f"{endpoint}: {error.text}")
        if len(clusters) > 1:
            others = " and ".join(map(str, clusters.values()))
            seen, passable = [f"{others} belong to different clusters (name members of one only)"], []
        yield step, bool(passable), "; ".join(seen)
        if not passable:
            return
    asked = top_keys(keys)
    try:
        revision, pairs = client.read(asked)
        inside = {key: at_or_below([key]) for key in asked}
        empty = [key for key in asked if not any(inside[key](name) for name, _ in pairs)]
        nothing = f"no key at or below {', '.join(empty)}"
        found = f"{len(pairs)} keys at or below {', '.join(asked)} at revision {revision}, by API v{client.api}"
        yield "read", bool(pairs), found + f"; {nothing}" * bool(empty) if pairs else (
            f"there is {nothing} in API v{client.api} (check ETCD_PREFIX, and that the keys were written by the same"
            " API)")
    except EtcdError as error:
        yield "read", False, str(error)
    client.close()


# ---- watch streams ------------------------------------------------------------------------------------
#
# A watch is silent as long as nothing changes; so is one of a member that was stopped, cut off or left alone by
# its cluster. An idle watch is therefore probed by a read of the same member, over the client's own connection.

PROBE_INTERVAL = 10.0  # seconds of silence after which the member is asked whether it still answers
RECONNECT_FIRST, RECONNECT_LIMIT = 0.2, 10.0  # seconds: the longest first pause and the longest of all
MAX_MESSAGE = MAX_ANSWER  # bytes of one line of a stream, and of the fragments of one message
READ_AT_ONCE = 1 << 20  # bytes of one stream after which others get their turn
MOST_RANGES = 4  # that are watched one by one; of more, neighbours are watched together and sorted out here
WATCH_BODY = 512  # bytes of one request: when etcd answers the first watch in it, it throws away what it has not read

if TYPE_CHECKING:
    Event = tuple[int, str, str, str]  # revision; "put", "delete" or "prune" (the key and all below it); key; value


class WatchMessage:
    """One message of a v3 watch stream.

    revision, term, cluster: of its header, 0 or "" if they are not told; compacted: the revision below which nothing
    is left, if that is why it is canceled; failure: (error class, code, text) if the stream or the watch failed.
    """

    __slots__ = ("id", "revision", "term", "cluster", "created", "canceled", "compacted", "fragment", "events",
                 "failure", "size")

    def __init__(self, line: bytes) -> None:
        """Decode one line. ValueError: it is no watch message."""
        try:
            data = from_json(line)
            result = data.get("result")
            self.failure = None if isinstance(result, dict) else v3_failure(500, line)
            if not isinstance(result, dict):
                result = {}
                if "error" not in data:
                    raise ValueError
            header = result.get("header") or {}
            self.id, self.revision = int(result.get("watch_id", 0)), int(header.get("revision", 0))
            self.term, self.cluster = int(header.get("raft_term", 0)), str(header.get("cluster_id", ""))
            self.created, self.canceled = bool(result.get("created")), bool(result.get("canceled"))
            self.compacted, self.fragment = int(result.get("compact_revision", 0)), bool(result.get("fragment"))
            self.events, self.size = [_v3_event(event) for event in result.get("events") or ()], len(line)
            if self.canceled and not self.compacted:
                text = printable(str(result.get("cancel_reason") or "the server has canceled the watch")[:500])
                words = text.lower()
                denied = "auth" in words or "permission" in words or "user name" in words
                self.failure = (EtcdDenied if denied else EtcdUnreachable, None, text)
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            raise ValueError(f"a line of {len(line)} bytes is no watch message") from None


def _v3_event(event: Mapping[str, Any]) -> Event:
    kv, decode = event["kv"], binascii.a2b_base64
    kind = "delete" if event.get("type") == "DELETE" else "put"
    return int(kv["mod_revision"]), kind, key_text(decode(kv["key"])), key_text(decode(kv.get("value", "")))


_V2_ENDS = ("delete", "expire", "compareAndDelete")


def decode_wait(body: bytes) -> Event | None:
    """The event of a v2 wait answer; None for one that changes no key, as a new directory. ValueError: it is none."""
    try:
        data = from_json(body)
        action, node = data["action"], data["node"]
        index, key = int(node["modifiedIndex"]), _v2_text(node["key"])
        if action in _V2_ENDS:
            return index, "prune", key, ""
        return None if node.get("dir") else (index, "put", key, _v2_text(node.get("value", "")))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise ValueError(f"a body of {len(body)} bytes is no event") from None


def watch_request(spans: Iterable[tuple[bytes, bytes, int]]) -> bytes:
    """The body that creates v3 watches, one for each span: key, range_end (b"": that key alone), first revision."""
    requests = []
    for start, end, revision in spans:
        create: dict[str, Any] = {"key": base64_text(start), "start_revision": str(revision), "progress_notify": True,
                                  "fragment": True}
        if end:
            create["range_end"] = base64_text(end)
        requests.append(to_json({"create_request": create}))
    return "\n".join(requests).encode("ascii")


def fewer_ranges(ranges: Sequence[tuple[bytes, bytes, list[str]]],
                 most: int) -> list[tuple[bytes, bytes, list[str]]]:
    """At most that many ranges which hold all of the given, sorted ones: those are joined that have most in common."""
    def common(index: int) -> int:
        return len(os.path.commonprefix([ranges[index - 1][0], ranges[index][0]]))

    cuts = sorted(sorted(range(1, len(ranges)), key=common)[:most - 1])
    parts = [ranges[start:end] for start, end in zip([0, *cuts], [*cuts, len(ranges)], strict=True)]
    return [(part[0][0], part[-1][1], [key for each in part for key in each[2]]) for part in parts if part]


class _Span:
    """A range of keys that is watched: start and end of the range, the next revision that is not known of it yet."""

    __slots__ = ("start", "end", "key", "next", "id", "fragments", "size")

    def __init__(self, start: bytes, end: bytes, key: str, next: int) -> None:
        self.start, self.end, self.key, self.next = start, end, key, next
        self.forget()

    def forget(self) -> None:
        """What belongs to one stream only: the watch id, -1 before it is created, and a half message."""
        self.id, self.size = -1, 0
        self.fragments: list[Event] = []


class _Stream:
    """A request whose answer is taken as it arrives. failure: why no more will come; more: some may be here unread."""

    __slots__ = ("connection", "answer", "spans", "fresh", "began", "deadline", "failure", "more", "_pending")

    def __init__(self, connection: Connection, message: bytes, timeout: float, spans: Sequence[_Span] = (),
                 fresh: bool = False) -> None:
        self.connection, self.spans, self.fresh = connection, spans, fresh
        self.answer, self._pending = Answer(MAX_MESSAGE), bytearray()
        self.failure: Exception | None = None
        self.more = False
        self.began = now()
        self.deadline = self.began + timeout  # for the sign that it works
        connection.send(message, self.deadline)

    def receive(self) -> bool:
        """Take in what is there; True if there was something. What came before a failure is not lost."""
        got = 0
        try:
            while got < READ_AT_ONCE and not self.answer.done:
                data = self.connection.receive()
                if data is None:
                    break
                got += len(data) or 1
                self.answer.feed(data)
        except (OSError, ValueError) as error:
            self.failure = error
        self.more = got >= READ_AT_ONCE  # what TLS has read ahead wakes no poll()
        return got > 0

    def lines(self) -> list[bytes]:
        """The whole lines that have arrived; the last one of a stream may lack its newline."""
        searched = len(self._pending)
        self._pending += self.answer.take()
        if self.answer.done:
            self._pending += b"\n"
        if self._pending.find(b"\n", searched) < 0:
            if len(self._pending) > MAX_MESSAGE:
                raise TooBig(f"a line of the watch is larger than {MAX_MESSAGE} bytes")
            return []
        *lines, rest = self._pending.split(b"\n")
        self._pending = rest
        return [bytes(line) for line in lines if line.strip()]


class Watch:
    """Follows everything at and below some keys, from the revision after a read on, over v3 or v2.

    Whoever owns it polls descriptors() for reading until the deadline and then calls step(). It reconnects by itself,
    with growing pauses, and never gives up: `failure` is why it is down now (None: it is not), `since` when that
    began. `stale` says why only a new whole read helps; restart() goes on from there. `behind`: v2 gives one event an
    answer, and the last one told that the store was further already.
    """

    __slots__ = ("keys", "failure", "since", "stale", "behind", "_etcd", "_wanted", "_spans", "_streams", "_attempts",
                 "_retry_at", "_heard", "_probe", "_fresh", "_identity", "_narrow", "_open", "_endpoint")

    def __init__(self, etcd: Etcd, keys: Iterable[str], revision: int) -> None:
        """keys: absolute, as for Etcd.read(); revision: what a read of them gave."""
        self._etcd, self.keys = etcd, top_keys(keys)
        self._wanted = at_or_below(self.keys)
        self._streams: list[_Stream] = []
        self._probe: _Stream | None = None
        self._identity: tuple[str, int] | None = None  # of the cluster: its id, the highest term seen
        self._narrow = self._open = self.behind = False
        self._endpoint = etcd._current or etcd.endpoints[0]  # the member that is watched
        self.failure: Error | None = None
        self.since = self._heard = now()
        self.restart(revision)

    def restart(self, revision: int) -> None:
        """Follow from the revision of a new whole read on."""
        self.close()
        self.stale, self._fresh = "", True
        self._attempts, self._retry_at = 0, now()
        ranges = [(*each[:2], ", ".join(each[2])) for each in fewer_ranges(key_ranges(self.keys), MOST_RANGES)]
        if self._etcd.api == 2:
            ranges = [(b"", b"", key) for key in self.keys]  # a wait knows one key only
        self._spans = [_Span(start, end, key, revision + 1) for start, end, key in ranges]
        self._narrow = False

    def close(self) -> None:
        """Close its connections, which ends the watch on the server too."""
        for stream in (*self._streams, *([self._probe] if self._probe else [])):
            stream.connection.close()
        self._streams, self._probe, self._open = [], None, False

    @property
    def open(self) -> bool:
        """True when the server has confirmed every watch and what it sends is taken."""
        return self._open

    @property
    def heard(self) -> float:
        """When (now()) the member that is watched last gave a sign of life."""
        return self._heard

    def descriptors(self) -> list[int]:
        """What to poll for reading."""
        return [stream.connection.fileno() for stream in (*self._streams, *([self._probe] if self._probe else []))]

    @property
    def deadline(self) -> float:
        """When step() is to be called even if nothing has arrived."""
        if self.stale or not self.keys:
            return float("inf")
        if not self._streams:
            return self._retry_at
        if any(stream.more for stream in self._streams):
            return now()
        if not self._open:
            return min(stream.deadline for stream in self._streams)
        return self._probe.deadline if self._probe else self._heard + PROBE_INTERVAL

    def step(self) -> list[Event]:
        """Do what is due, without waiting (but to connect); the events that have arrived.

        Each change comes once, in the order of revisions for each key, and those of one revision and range together.
        """
        events: list[Event] = []
        if self.stale or not self.keys:
            return events
        try:
            self._follow_dns()
            if not self._streams and now() >= self._retry_at:
                self._connect()
            for stream in list(self._streams):
                if stream.receive():
                    self._heard = now()
                    (self._wait_answer if self._etcd.api == 2 else self._messages)(stream, events)
                if stream.failure:
                    raise stream.failure
            self._find_open()
            self._step_probe()
        except EtcdCompacted as error:
            self.stale = error.text
            self.close()
        except (OSError, ValueError, Error) as error:
            self._failed(error)
        return [event for event in events if event[1] == "prune" or self._wanted(event[2])]

    # -- connections

    @property
    def _request(self) -> str:
        return _asking("watch", self.keys)

    def _connect(self) -> None:
        etcd = self._etcd
        etcd._look_up(self._request, again=self._attempts >= len(etcd.endpoints))
        self._endpoint = etcd._order()[0]
        if self._narrow:
            self._spans, self._narrow = self._permitted(), False
        if etcd.username and etcd.api == 3 and etcd._token is None:
            etcd._deadline = now() + etcd.answer_timeout
            etcd._log_in(self._endpoint)
        for group in self._groups():
            self._streams.append(self._start(group))
        self._heard = now()

    def _groups(self) -> list[list[_Span]]:
        """The spans of each request: for v3 as many as WATCH_BODY holds."""
        groups: list[list[_Span]] = []
        room = 0
        for span in self._spans:
            size = len(watch_request([(span.start, span.end, span.next)])) + 1
            if size > room or self._etcd.api == 2:
                groups.append([])
                room = WATCH_BODY
            groups[-1].append(span)
            room -= size
        return groups

    def _follow_dns(self) -> None:
        """Leave a member that DNS does not name any more, however well it is."""
        if self._streams:
            self._etcd._look_up(self._request)
            if self._endpoint not in self._etcd.endpoints:
                log.info(f"DNS does not name {self._endpoint} any more: another member is watched")
                self.close()
                self._retry_at = now()

    def _link(self) -> Connection:
        """A new connection to the member that is watched."""
        tls = self._etcd.tls if self._endpoint.scheme == "https" else None
        return Connection(self._endpoint, now() + self._etcd.connect_timeout, tls)

    def _start(self, spans: Sequence[_Span], connection: Connection | None = None) -> _Stream:
        """Ask the member for the changes of spans."""
        endpoint = self._endpoint
        for span in spans:
            span.forget()
        if self._etcd.api == 2:
            target = v2_target(spans[0].key, f"wait=true&recursive=true&waitIndex={spans[0].next}")
            message = http_request("GET", target, endpoint.authority, self._etcd._v2_headers())
        else:
            headers = v3_headers(self._etcd._token)
            body = watch_request((span.start, span.end, span.next) for span in spans)
            message = http_request("POST", f"{self._etcd._base}/watch", endpoint.authority, headers, body)
        return _Stream(connection or self._link(), message, self._etcd.answer_timeout, spans, self._fresh)

    def _failed(self, error: Exception) -> None:
        """Close all, take the next endpoint, after a pause that grows."""
        endpoint = self._endpoint
        if isinstance(error, TimeoutError):
            error = EtcdUnreachable(str(endpoint), self._request, f"no answer within {self._etcd.answer_timeout:g} s")
        elif not isinstance(error, Error):
            error = self._etcd._failure(endpoint, self._request, error)
        log.debug(str(error))
        if self.failure is None:
            self.since = now()
        self.failure = error
        self.close()
        if isinstance(error, EtcdDenied):  # the member is well; what it refuses we have to find out
            self._narrow = self._etcd.api == 3
        else:
            endpoint.failed(reason(error))  # the others first
        pause = min(RECONNECT_LIMIT, RECONNECT_FIRST * 2 ** min(self._attempts, 20))
        self._retry_at = now() + pause * int.from_bytes(os.urandom(2), "big") / 65536
        self._attempts += 1

    def _find_open(self) -> None:
        if self._open or not self._streams:
            return
        if self._etcd.api == 2:
            self._open = all(stream.answer.head_done and stream.answer.status == 200 for stream in self._streams)
        else:
            self._open = all(span.id >= 0 for span in self._spans)
        if self._open:
            self._fresh, self._attempts, self.failure = False, 0, None
            self._endpoint.works()
            self._etcd._current = self._endpoint
        elif now() >= min(stream.deadline for stream in self._streams):
            raise TimeoutError(errno.ETIMEDOUT, "timed out")

    def _permitted(self) -> list[_Span]:
        """The spans again, without what may not be read: a role may hold `/lb/` or the key `/lb/port` only.

        The reads that find it out renew the token too, if that was what the refusal meant.
        """
        spans: list[_Span] = []
        for span in self._spans:
            pieces, found = [(span.start, span.end, span.key)], list[_Span]()
            for start, end, key in pieces:
                body = {"key": base64_text(start), **({"range_end": base64_text(end)} if end else {}), "limit": 1}
                try:
                    self._etcd._v3("/kv/range", {**body, "keys_only": True}, f"watch {key}")
                    found.append(_Span(start, end, key, span.next))
                except EtcdDenied as error:
                    refusal = error
                    if len(pieces) == 1:
                        for each in span.key.split(", "):
                            below = key_bytes(each).rstrip(b"/") + b"/"
                            pieces += [(key_bytes(each), b"", each), (below, range_end(below), each)]
            if not found:
                raise refusal
            spans += found
        return spans

    def _older(self, what: str, found: int, known: int) -> EtcdCompacted:
        return EtcdCompacted(str(self._endpoint), self._request, "this is another cluster, or an older state of it"
                             f" ({what} {found} after {known})")

    # -- what arrives

    def _messages(self, stream: _Stream, events: list[Event]) -> None:
        """Take the lines of a v3 stream."""
        if not stream.answer.head_done:
            return
        if stream.answer.status != 200:
            if stream.answer.done:
                kind, code, text = v3_failure(stream.answer.status, bytes(stream.answer.body))
                raise kind(str(self._endpoint), self._request, text, code)
            return
        for line in stream.lines():
            message = WatchMessage(line)
            if message.compacted:
                raise EtcdCompacted(str(self._endpoint), self._request,
                                    f"revisions before {message.compacted} are compacted")
            if message.failure:
                kind, code, text = message.failure
                raise kind(str(self._endpoint), self._request, text, code)
            if message.created:
                self._created(stream, message)
            for span in stream.spans:
                if span.id == message.id or message.id == -1:
                    self._take(span, message, events)
        if stream.answer.done:
            raise ValueError("the server has ended the watch")

    def _created(self, stream: _Stream, message: WatchMessage) -> None:
        span = next((span for span in stream.spans if span.id < 0), None)
        if span is None:
            raise ValueError("the server tells of a watch that was not asked for")
        span.id = message.id
        known = self._identity
        self._identity = message.cluster, max(message.term, known[1] if known else 0)
        if self._fresh:
            self._identity = message.cluster, message.term
        elif message.revision < span.next - 1 or known and (known[0] != message.cluster or known[1] > message.term):
            raise self._older("revision", message.revision, span.next - 1)

    def _take(self, span: _Span, message: WatchMessage, events: list[Event]) -> None:
        """Pass on the events of a message once it is whole."""
        span.fragments += message.events
        span.size += message.size
        if message.fragment:
            if span.size > 4 * MAX_MESSAGE:
                raise EtcdCompacted(str(self._endpoint), self._request, "a message in fragments is too large")
            return
        fresh = [event for event in span.fragments if event[0] >= span.next]
        events += fresh
        if span.fragments:
            span.next = max(span.next, span.fragments[-1][0] + 1)
        elif not message.created:  # a progress notice: nothing up to here is still to come
            span.next = max(span.next, message.revision + 1)
        span.fragments, span.size = [], 0

    def _wait_answer(self, stream: _Stream, events: list[Event]) -> None:
        """Take the answer of a v2 wait, if it is whole, and wait for the next event."""
        answer, (span,) = stream.answer, stream.spans
        digits = answer.headers.get("x-etcd-index", "")
        if digits.isdecimal() and answer.status == 200 and not stream.fresh and int(digits) < span.next - 1:
            raise self._older("index", int(digits), span.next - 1)
        if not answer.done:
            return
        body = bytes(answer.body)
        if answer.status != 200:
            kind, code, text = v2_failure(answer.status, body)
            raise kind(str(self._endpoint), self._request, text, code)
        if body.strip():
            event = decode_wait(body)
            index = event[0] if event else int(from_json(body)["node"]["modifiedIndex"])
            if event and index >= span.next:
                events.append(event)
            self.behind = digits.isdecimal() and int(digits) > index
            span.next = max(span.next, index + 1)
        elif now() - stream.began < 1:
            raise ValueError("the server ends waits at once")
        kept = stream.connection if answer.keep_alive and not stream.failure else None
        if not kept:
            stream.connection.close()
        fresh = self._start(stream.spans, kept)
        self._streams[self._streams.index(stream)] = fresh
        stream.failure = None

    # -- signs of life

    def _step_probe(self) -> None:
        """Ask a silent member for a sign of life, and be not content with silence."""
        probe, etcd = self._probe, self._etcd
        if not probe:
            if self._open and now() >= self._heard + PROBE_INTERVAL:
                connection = etcd._connection
                if connection is None or connection.endpoint is not self._endpoint:
                    connection = self._link()
                else:
                    etcd._connection = None  # it is ours until the answer is there
                self._probe = self._start_probe(connection)
            return
        probe.receive()
        if probe.failure and probe.connection.used and not isinstance(probe.failure, TimeoutError):
            probe.connection.close()  # the server may have closed it while it was not in use
            self._probe = self._start_probe(self._link())
        elif probe.failure:
            raise probe.failure
        elif probe.answer.done:
            self._probe_answer(probe)
        elif self._heard > probe.began:
            probe.connection.close()  # the watch itself has given the sign
            self._probe = None
        elif now() >= probe.deadline:
            raise TimeoutError(errno.ETIMEDOUT, "timed out")

    def _start_probe(self, connection: Connection) -> _Stream:
        authority = connection.endpoint.authority
        if self._etcd.api == 2:
            message = http_request("GET", "/health", authority, {})
        else:  # a linearizable read: the member must reach a quorum for it
            headers = v3_headers(self._etcd._token)
            body = to_json({"key": base64_text(self._spans[0].start), "count_only": True}).encode("ascii")
            message = http_request("POST", f"{self._etcd._base}/kv/range", authority, headers, body)
        try:
            return _Stream(connection, message, self._etcd.answer_timeout)
        except OSError:
            connection.close()
            raise

    def _probe_answer(self, probe: _Stream) -> None:
        answer, body = probe.answer, bytes(probe.answer.body)
        self._probe, self._heard = None, now()
        probe.connection.used = True
        if answer.keep_alive and self._etcd._connection is None:
            self._etcd._connection = probe.connection
        else:
            probe.connection.close()
        if answer.status >= 500:
            kind, code, text = v3_failure(answer.status, body)
            raise kind(str(self._endpoint), self._request, text, code)
        if answer.status == 200 and self._etcd.api == 3:
            try:
                revision = int(from_json(body)["header"]["revision"])
            except (ValueError, RecursionError, KeyError, TypeError):
                raise ValueError("the answer to a probe is none of etcd") from None
            last = max(span.next for span in self._spans) - 1
            if revision < last:
                raise self._older("revision", revision, last)


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


def parents(key: str) -> Iterator[str]:
    """The directories above a cleaned key, from the nearest to "/"."""
    while key != "/":
        key = key.rpartition("/")[0] or "/"
        yield key


def utf8(text: str) -> bytes:
    """The bytes of a text in which surrogates stand for what is not UTF-8, as in Go's strings."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a surrogate pair, which no Go string holds
        return "".join("�" if "\ud800" <= c <= "\udc7f" or "\udd00" <= c <= "\udfff" else c
                       for c in text).encode("utf-8", "surrogateescape")


def bytewise(texts: Iterable[str]) -> list[str]:
    """The texts in the order of their UTF-8 bytes, which is etcd's and Go's."""
    texts = list(texts)
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:  # bytes that are not UTF-8: Python would sort their surrogates too low
        return sorted(texts, key=utf8)
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
        index, (steps, tokens) = self._index(), _glob_steps(pattern)
        paths = [""] if steps[0] in ("", None, False) else []  # what stands before the first slash: nothing
        for step in steps[steps[0] is not False:]:
            if step is False:  # from this segment on a character class can match "/"
                reached: list[str] = []
                for path in paths:
                    self._collect(path, reached)
                whole = re.compile(_glob_regex(tokens))
                paths = [key for key in reached if whole.fullmatch(key)]
                break
            if step is None:
                paths = [f"{path}/{name}" for path in paths for name in self._names(path)]
            elif isinstance(step, str):
                paths = [f"{path}/{step}" for path in paths if step in index.get(path, ())]
            else:
                paths = [f"{path}/{name}" for path in paths for name in index.get(path, ()) if step.fullmatch(name)]
        found = [key for key in paths if key in values]
        if "/" in values and re.compile(_glob_regex(tokens)).fullmatch("/"):
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
            names = bytewise(self._index().get(path, ()))
            if names:  # there is no end of directories that do not exist
                self._sorted[path] = names
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


# ---- a tree that follows a store ----------------------------------------------------------------------

class Mirror:
    """A KeyTree that follows a store: whole reads and events go in, and what they changed comes out.

    What changed is {key: True if the key came or went, False if it has another value}. `doubtful` says that keys are
    spelled in two ways (`/a` and `/a/` are one key here): then events cannot be trusted, only whole reads.
    """

    __slots__ = ("tree", "doubtful", "_floor", "_floors", "_suspects")

    def __init__(self) -> None:
        self.tree = KeyTree()
        self.doubtful = False
        self._floor = 0  # the revision of the last whole read: no event up to it has anything new
        self._floors: Mapping[str, int] = {}  # the same for what is at and below some keys, if each was read by itself
        self._suspects: set[str] = set()  # keys that a whole read found changed, and no event has told so yet

    def replace(self, revision: int, pairs: Iterable[tuple[str, str]],
                floors: Mapping[str, int] | None = None) -> dict[str, bool]:
        """Take over a whole read; floors: as Etcd.floors."""
        fresh = KeyTree(pairs := list(pairs), revision)
        old, new = self.tree.values_by_key, fresh.values_by_key
        self.doubtful = any(key not in new for key, _ in pairs)
        self._floor, self._floors, self.tree.revision, self._suspects = revision, floors or {}, revision, set()
        if not old:
            self.tree = fresh
            return dict.fromkeys(new, True)
        changed = {key: key not in old for key, value in new.items() if old.get(key) != value}
        changed.update((key, True) for key in [key for key in old if key not in new])
        for key in changed:
            if key in new:
                self.tree.put(key, new[key])
            else:
                self.tree.delete(key)
        return changed

    def compare(self, revision: int, pairs: Iterable[tuple[str, str]],
                floors: Mapping[str, int] | None = None) -> dict[str, bool]:
        """Take over a whole read that should bring nothing new but what is on its way; see unexplained()."""
        suspects = self._suspects
        changed = self.replace(revision, pairs, floors)
        self._suspects = suspects | set(changed)
        return changed

    def unexplained(self) -> list[str]:
        """The keys that compare() changed and that no event has told of since: the watch has missed them."""
        found, self._suspects = bytewise(self._suspects), set()
        return found

    def apply(self, events: Iterable[Event]) -> dict[str, bool]:
        """Take over events; those of one revision have to come together."""
        changed: dict[str, bool] = {}
        tree = self.tree
        for revision, kind, key, value in events:
            clean = clean_key(key)
            if self._suspects:
                self._suspects = {each for each in self._suspects if each != clean and not (
                    kind == "prune" and each.startswith(clean + "/"))}
            if revision <= self._floor:
                continue
            self.doubtful = self.doubtful or clean != key
            tree.revision = max(tree.revision, revision)
            if kind == "put":
                old = tree.get(clean)
                if old != value and not self._outdated(revision, clean):
                    tree.put(clean, value)
                    changed[clean] = changed.get(clean, False) or old is None
                continue
            for gone in [pair[0] for pair in tree.below(clean)] if kind == "prune" else [clean]:
                if not self._outdated(revision, gone) and tree.delete(gone):
                    changed[gone] = True
        return changed

    def _outdated(self, revision: int, key: str) -> bool:
        """True if what was read of the key is newer than this event."""
        while self._floors and key:
            if key in self._floors:
                return revision <= self._floors[key]
            key = key.rpartition("/")[0]
        return revision <= self._floors.get("/", 0)


# ---- patterns -----------------------------------------------------------------------------------------

def glob_regex(pattern: str) -> re.Pattern[str]:
    """A pattern of Go's path.Match as a regular expression for a whole key. ValueError if it is malformed."""
    return re.compile(_glob_regex(_glob_steps(pattern)[1]))


def _glob_steps(pattern: str) -> tuple[list[Any], list[tuple[str, str]]]:
    """A pattern as one step for each path segment, and as the tokens of a regular expression for a whole key.

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
    return steps, tokens


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
            text = file.read().decode("utf-8").removeprefix("\ufeff")
        data = from_toml(text) if path.endswith(".toml") else json.loads(text)
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
        message, _, place = str(error).partition(" for integer string conversion")[0].partition(" (at line ")
        line, _, column = place.rstrip(")").partition(", ")
        raise Error(f"cannot read keys from {path}{':' * bool(line)}{line}: {message[:1].lower()}{message[1:]}"
                    + (f" ({column})" if column else "")) from None
    if not isinstance(data, dict):
        raise Error(f"cannot read keys from {path}: an object of keys is needed at the top")
    values: dict[str, str] = {}
    waiting: list[tuple[str, Any]] = [("/", data)]
    while waiting:
        key, value = waiting.pop()
        key = _whole_pairs(key)
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


def _whole_pairs(text: str) -> str:
    r"""A text of JSON with U+FFFD for each half of a surrogate pair (\ud800), as Go reads it."""
    return text if text.isascii() else re.sub("[\ud800-\udfff]", "\ufffd", text)


def _file_value(value: object) -> str:
    """A scalar of a keys file as text, the way confd's file backend (Go) writes it."""
    if isinstance(value, str):
        return _whole_pairs(value)
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

# ---- types --------------------------------------------------------------------------------------------
#
# nil is None; bool, int, float, complex, str, dict and list stand for bool, int, float64, complex128, string,
# map[string]interface {} and []interface {}. The classes below are the other types a template can meet.
# A Go string is bytes: what is not UTF-8 in it is kept as surrogate escapes.

class Invalid:
    """The type of INVALID, which stands for reflect's invalid value: a missing map key, a dug-out nil."""

    __slots__ = ()

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "INVALID"


INVALID = Invalid()


class Strings(list[str]):
    """[]string."""

    __slots__ = ()


class Ints(list[int]):
    """[]int."""

    __slots__ = ()


class Int64(int):
    """int64, as from Time.Unix."""

    __slots__ = ()


class Uint8(int):
    """uint8, as from `index "abc" 1`."""

    __slots__ = ()


class Uint16(int):
    """uint16, as SRV.Port."""

    __slots__ = ()


class KVPair:
    """A key and its value, as the store's get and gets return them."""

    __slots__ = ("Key", "Value")

    def __init__(self, Key: str, Value: str) -> None:
        self.Key, self.Value = Key, Value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KVPair) and (self.Key, self.Value) == (other.Key, other.Value)

    def __hash__(self) -> int:
        return hash((self.Key, self.Value))

    def __repr__(self) -> str:
        return f"KVPair({self.Key!r}, {self.Value!r})"


class KVPairs(list[KVPair]):
    """The pairs that gets returns."""

    __slots__ = ()


class PairList(list[KVPair]):
    """[]KVPair: pairs whose type has lost its name, as sortKVByLength returns them."""

    __slots__ = ()


class SRV:
    """*net.SRV, as lookupSRV returns it."""

    __slots__ = ("Target", "Port", "Priority", "Weight")

    def __init__(self, Target: str, Port: int, Priority: int, Weight: int) -> None:
        self.Target, self.Port = Target, Uint16(Port)
        self.Priority, self.Weight = Uint16(Priority), Uint16(Weight)


class SRVs(list[SRV]):
    """[]*net.SRV."""

    __slots__ = ()


class Func:
    """A function that a template can call.

    params are Go type names, receiver not counted: "string", "int", "bool", "any" (interface {}), "value"
    (reflect.Value: gets INVALID and None as they are), "[]string", ...; with variadic the last is the type of
    each further argument. returns is the Go type of the result where it is always the same, else "any".
    The caller checks and converts arguments; a call that fails raises an exception whose text is Go's message.
    """

    __slots__ = ("name", "call", "params", "variadic", "returns")

    def __init__(self, name: str, call: Callable[..., Any], params: tuple[str, ...] = (), variadic: bool = False,
                 returns: str = "any") -> None:
        self.name, self.call, self.params, self.variadic, self.returns = name, call, params, variadic, returns


def _func_type(function: Func) -> str:
    """Go's text of a function's type."""
    params = [{"any": "interface {}", "value": "reflect.Value"}.get(param, param) for param in function.params]
    if function.variadic:
        params[-1] = "..." + params[-1]
    return f"func({', '.join(params)}) {'interface {}' if function.returns == 'any' else function.returns}"


_STORE = "main"  # the Go package that the store's types seem to come from
_OPAQUE = "main.Opaque"  # any other Python object: a struct without fields
_GO_TYPES: dict[type, str] = {
    type(None): "<nil>", Invalid: "<nil>", bool: "bool", int: "int", float: "float64", complex: "complex128",
    str: "string", dict: "map[string]interface {}", list: "[]interface {}", Strings: "[]string", Ints: "[]int",
    Int64: "int64", Uint8: "uint8", Uint16: "uint16", KVPair: f"{_STORE}.KVPair", KVPairs: f"{_STORE}.KVPairs",
    PairList: f"[]{_STORE}.KVPair", SRV: "*net.SRV", SRVs: "[]*net.SRV",
}
_GO_INTS = {int, Int64, Uint8, Uint16}
_GO_UNSIGNED = {Uint8, Uint16}
_GO_SLICES = {list, Strings, Ints, KVPairs, PairList, SRVs}
_GO_POINTERS = {SRV}
GO_FIELDS: dict[type, tuple[str, ...]] = {KVPair: KVPair.__slots__, SRV: SRV.__slots__}
_GO_STRING: dict[type, Callable[[Any], str]] = {}  # fmt.Stringer: what %v, %s, %q, %x print of these types
_GO_SYNTAX: dict[type, Callable[[Any], str]] = {}  # fmt.GoStringer: what %#v prints


def _go_class(value: object) -> type:
    """The class in _GO_TYPES that a value belongs to; object for any that a template cannot look into."""
    kind = type(value)
    if kind not in _GO_TYPES:
        for base in kind.__mro__:
            if base in _GO_TYPES:
                return base
    return kind


def go_type(value: object) -> str:
    """Go's name of a value's type, as %T prints it."""
    kind = _go_class(value)
    return _func_type(value) if isinstance(value, Func) else _GO_TYPES.get(kind, _OPAQUE)


def go_string(data: bytes) -> str:
    """The Go string that has these bytes."""
    return data.decode("utf-8", "surrogateescape")


def runes(text: str) -> str:
    """The string with one character a rune: escaped bytes that have come to form UTF-8 are joined."""
    if text.isascii():
        return text
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return go_string(utf8(text))


# ---- strconv: numbers ---------------------------------------------------------------------------------

def _shortest(value: float) -> tuple[str, int]:
    """The fewest decimal digits that give back a finite value >= 0, and where the point stands in them."""
    if not value:
        return "0", 1
    mantissa, _, exponent = repr(value).partition("e")
    whole, _, fraction = mantissa.partition(".")
    digits = (whole + fraction).lstrip("0")
    point = len(whole) + int(exponent or 0) - (len(whole + fraction) - len(digits))
    return digits.rstrip("0") or "0", point


def format_float(value: float, verb: str = "g", precision: int | None = None) -> str:
    """strconv.FormatFloat for float64: verb is one of e E f g G b x X; precision None means as short as exact."""
    if value != value:
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "+Inf" if value > 0 else "-Inf"
    if verb in "xX":
        return _hex_float(value, verb, precision)
    if verb == "b":
        mantissa, exponent = value.hex().lstrip("-")[2:].split("p")
        sign = "-" if value.hex()[0] == "-" else ""
        return f"{sign}{int(mantissa.replace('.', ''), 16)}p{(int(exponent) if value else -1022) - 52:+d}"
    if precision is not None:
        return f"%.*{verb}" % (max(precision, 1) if verb in "gG" else precision, value)
    if verb in "gG" and (1e-4 <= abs(value) < 1e6 or value == 0):
        text = repr(value)
        return text[:-2] if text.endswith(".0") else text
    digits, point = _shortest(abs(value))
    if verb == "f":
        sign = "-" * (repr(value)[0] == "-")
        if point <= 0:
            return f"{sign}0.{'0' * -point}{digits}"
        whole, fraction = digits[:point].ljust(point, "0"), digits[point:]
        return f"{sign}{whole}.{fraction}" if fraction else sign + whole
    return f"%.*{'E' if verb in 'EG' else 'e'}" % (len(digits) - 1, value)


def _hex_float(value: float, verb: str, precision: int | None) -> str:
    """Go's %x of a float: 0x1.8p+01, normalized, rounded to even at `precision` hexadecimal digits."""
    sign, text = ("-", value.hex()[3:]) if value.hex()[0] == "-" else ("", value.hex()[2:])
    digits, exponent_text = text.split("p")
    mantissa, exponent = int(digits.replace(".", ""), 16), int(exponent_text)
    if not mantissa:
        exponent = 0
    while mantissa and mantissa < 1 << 52:  # a denormal
        mantissa, exponent = mantissa << 1, exponent - 1
    if precision is not None and precision < 13:
        unit = 1 << 4 * (13 - precision)
        rest = mantissa % unit
        mantissa -= rest
        if 2 * rest > unit or 2 * rest == unit and mantissa & unit:
            mantissa += unit
        if mantissa >> 53:
            mantissa, exponent = mantissa >> 1, exponent + 1
    fraction = f"{mantissa & (1 << 52) - 1:013x}"
    fraction = fraction.rstrip("0") if precision is None else fraction[:precision].ljust(precision, "0")
    text = f"0x{mantissa >> 52}{'.' if fraction else ''}{fraction}p{'-' if exponent < 0 else '+'}{abs(exponent):02d}"
    return sign + (text.upper() if verb == "X" else text)


# ---- strconv: quoted strings --------------------------------------------------------------------------

_ESCAPES = {"\a": "\\a", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\v": "\\v", "\\": "\\\\"}


def _escape(character: str, mark: str, ascii_only: bool) -> str:
    """One rune as it stands in a quoted Go string; mark is the quotation mark."""
    if character == mark:
        return "\\" + mark
    code = ord(character)
    if character in _ESCAPES:
        return _ESCAPES[character]
    if character.isprintable() and (code < 128 or not ascii_only):
        return character
    if code < 32 or code == 127:
        return f"\\x{code:02x}"
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8
        return f"\\x{code & 0xFF:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def quote(text: str, ascii_only: bool = False) -> str:
    """strconv.Quote (%q), or QuoteToASCII (%+q)."""
    if text.isascii() and text.isprintable() and '"' not in text and "\\" not in text:
        return f'"{text}"'
    return '"' + "".join(_escape(c, '"', ascii_only) for c in runes(text)) + '"'


def _rune(code: int) -> str:
    """The character with this number, U+FFFD if there is none."""
    return chr(code) if 0 <= code < 0xD800 or 0xDFFF < code <= 0x10FFFF else "�"


def _can_backquote(text: str) -> bool:
    return all((c >= " " or c == "\t") and c not in "`\x7f\ufeff" and not "\ud800" <= c <= "\udfff" for c in text)


def sharp_u(character: str) -> str:
    """%#U of a character: U+00E9 'é'; U+FFFD for a byte that is not UTF-8."""
    return sprintf("%#U", ord(_rune(ord(character))))


_UNESCAPES = {escape[1]: character for character, escape in _ESCAPES.items()}
_ESCAPE_DIGITS = {"x": 2, "u": 4, "U": 8}


def unquote(text: str) -> str:
    """strconv.Unquote: the value of a Go literal in "double", `back` or 'single' quotes; ValueError if it is none."""
    bad = ValueError("invalid syntax")
    mark = text[:1]
    if len(text) < 2 or mark not in ('"', "'", "`") or text[-1] != mark:
        raise bad
    body = text[1:-1]
    if mark == "`":
        if "`" in body:
            raise bad
        return body.replace("\r", "")
    if "\n" in body:
        raise bad
    if mark == '"' and "\\" not in body:
        if '"' in body:
            raise bad
        return "".join("�" if "\udc80" <= c <= "\udcff" else c for c in runes(body)) if not body.isascii() else body
    out, at, count = bytearray(), 0, 0
    body = runes(body)
    while at < len(body):
        character, count = body[at], count + 1
        at += 1
        if character == mark:
            raise bad
        if character != "\\":
            out += b"\xef\xbf\xbd" if "\udc80" <= character <= "\udcff" else utf8(character)
            continue
        escape, at = body[at:at + 1], at + 1
        if escape in _ESCAPE_DIGITS:
            digits, base = body[at:at + _ESCAPE_DIGITS[escape]], 16
            at += _ESCAPE_DIGITS[escape]
            if len(digits) != _ESCAPE_DIGITS[escape]:
                raise bad
        elif escape and escape in "01234567":
            digits, base, at = body[at - 1:at + 2], 8, at + 2
            if len(digits) != 3:
                raise bad
        elif escape == mark or escape in _UNESCAPES and escape:
            out += _UNESCAPES.get(escape, escape).encode()
            continue
        else:
            raise bad
        if digits.strip("01234567" if base == 8 else "0123456789abcdefABCDEF"):
            raise bad
        code = int(digits, base)
        if escape in "uU":
            if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
                raise bad
            out += chr(code).encode()
        elif code > 255:
            raise bad
        else:
            out.append(code)
    if mark == "'" and count != 1:
        raise bad
    return go_string(bytes(out))


# ---- time ---------------------------------------------------------------------------------------------

class Duration(int):
    """time.Duration: nanoseconds."""

    __slots__ = ()


class Month(int):
    """time.Month: 1 is January."""

    __slots__ = ()


class Weekday(int):
    """time.Weekday: 0 is Sunday."""

    __slots__ = ()


class Location:
    """*time.Location: UTC, or the machine's local time."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def zone(self, seconds: int) -> tuple[str, int]:
        """Abbreviation and offset from UTC in seconds, at a Unix time."""
        if self.name == "Local":
            try:
                local = time.localtime(seconds)
                return local.tm_zone, local.tm_gmtoff
            except (OverflowError, OSError, ValueError):
                pass  # a year that the system does not know
        return "UTC", 0


UTC, LOCAL = Location("UTC"), Location("Local")
_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
           "November", "December")
_WEEKDAYS = ("Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")


def _days_from_civil(year: int, month: int, day: int) -> int:
    """Days from 1970-01-01 to a date of the proleptic Gregorian calendar; month and day may overflow."""
    year, month = year + (month - 1) // 12, (month - 1) % 12 + 1
    year, month = (year, month - 3) if month > 2 else (year - 1, month + 9)  # the year from March on
    return 365 * year + year // 4 - year // 100 + year // 400 + (153 * month + 2) // 5 + day - 1 - 719468


def _civil_from_days(days: int) -> tuple[int, int, int]:
    """Year, month and day of a number of days from 1970-01-01."""
    era, day = divmod(days + 719468, 146097)
    year = (day - day // 1460 + day // 36524 - day // 146096) // 365
    day -= 365 * year + year // 4 - year // 100
    month = (5 * day + 2) // 153
    day -= (153 * month + 2) // 5
    return 400 * era + year + (month > 9), month + 3 if month < 10 else month - 9, day + 1


class Time:
    """time.Time: Unix seconds and nanoseconds, a location, and the monotonic reading that time.Now leaves in it."""

    __slots__ = ("seconds", "nanoseconds", "location", "monotonic")

    def __init__(self, seconds: int, nanoseconds: int, location: Location = UTC, monotonic: int | None = None) -> None:
        self.seconds, self.nanoseconds = seconds + nanoseconds // 1_000_000_000, nanoseconds % 1_000_000_000
        self.location, self.monotonic = location, monotonic

    def date(self) -> tuple[int, int, int]:
        """Year, month, day."""
        return _civil_from_days((self.seconds + self.zone()[1]) // 86400)

    def clock(self) -> tuple[int, int, int]:
        """Hour, minute, second."""
        second = (self.seconds + self.zone()[1]) % 86400
        return second // 3600, second // 60 % 60, second % 60

    def zone(self) -> tuple[str, int]:
        """Abbreviation and offset in seconds."""
        return self.location.zone(self.seconds)

    def weekday(self) -> int:
        """0 is Sunday."""
        return ((self.seconds + self.zone()[1]) // 86400 + 4) % 7

    def year_day(self) -> int:
        """1 is January 1."""
        return (self.seconds + self.zone()[1]) // 86400 - _days_from_civil(self.date()[0], 1, 1) + 1

    def at(self, seconds: int, nanoseconds: int = 0) -> Time:
        """The instant of a Unix time, in the same location."""
        return Time(seconds, nanoseconds, self.location)

    def add(self, nanoseconds: int) -> Time:
        """This much later."""
        later = self.at(self.seconds, self.nanoseconds + nanoseconds)
        later.monotonic = None if self.monotonic is None else self.monotonic + nanoseconds
        return later

    def add_date(self, years: int, months: int, days: int) -> Time:
        """That many years, months and days later, at the same time of day."""
        year, month, day = self.date()
        hour, minute, second = self.clock()
        wall = 86400 * _days_from_civil(year + years, month + months, day + days) + 3600 * hour + 60 * minute + second
        seconds = wall - self.zone()[1]
        for _ in range(2):  # the offset is that of the new date
            seconds = wall - self.location.zone(seconds)[1]
        return self.at(seconds, self.nanoseconds)

    def round(self, unit: int, up: bool) -> Time:
        """Down to a multiple of `unit` nanoseconds since year 1, or to the nearest one, halves up."""
        if unit <= 0:
            return self.at(self.seconds, self.nanoseconds)
        total = (self.seconds + 62135596800) * 1_000_000_000 + self.nanoseconds
        rest = total % unit
        return self.at(self.seconds, self.nanoseconds - rest + (unit if up and 2 * rest >= unit else 0))

    def since(self, other: Time) -> Duration:
        """The time between another instant and this one, at most what a Duration can hold."""
        if self.monotonic is not None and other.monotonic is not None:
            return Duration(self.monotonic - other.monotonic)
        apart = (self.seconds - other.seconds) * 1_000_000_000 + self.nanoseconds - other.nanoseconds
        return Duration(max(-1 << 63, min(apart, (1 << 63) - 1)))

    def within(self, location: Location) -> Time:
        """The same instant as another location's clocks show it."""
        return Time(self.seconds, self.nanoseconds, location, self.monotonic)


_LAYOUT = (  # the parts of Go's reference time, the longer first where one begins another
    r"January|Jan(?![a-z])|Monday|Mon(?![a-z])|MST|2006|002|__2|_2(?!006)|0[1-6]|15|PM|pm|[12345]"
    r"|-07:00:00|-070000|-07:00|-0700|-07|Z07:00:00|Z070000|Z07:00|Z0700|Z07|[.,](?:0+|9+)(?![0-9])")


def format_time(moment: Time, layout: str) -> str:
    """Time.Format: the layout with the parts of "Mon Jan 2 15:04:05 MST 2006" replaced."""
    year, month, day = moment.date()
    hour, minute, second = moment.clock()
    zone, offset = moment.zone()
    parts = {
        "January": _MONTHS[month - 1], "Jan": _MONTHS[month - 1][:3], "1": str(month), "01": f"{month:02}",
        "Monday": _WEEKDAYS[moment.weekday()], "Mon": _WEEKDAYS[moment.weekday()][:3],
        "2": str(day), "_2": f"{day:2}", "02": f"{day:02}",
        "__2": f"{moment.year_day():3}", "002": f"{moment.year_day():03}",
        "15": f"{hour:02}", "3": str(hour % 12 or 12), "03": f"{hour % 12 or 12:02}",
        "PM": "PM" if hour >= 12 else "AM", "pm": "pm" if hour >= 12 else "am",
        "4": str(minute), "04": f"{minute:02}", "5": str(second), "05": f"{second:02}",
        "2006": f"{year:04}" if year >= 0 else f"-{-year:04}", "06": f"{abs(year) % 100:02}", "MST": zone,
    }

    def part(match: re.Match[str]) -> str:
        text = match[0]
        if text in parts:
            return parts[text]
        if text[0] in ".,":
            digits = f"{moment.nanoseconds:09}"[:len(text) - 1]
            if text[1] == "9":
                digits = digits.rstrip("0")
            return text[0] + digits if digits else ""
        if text[0] == "Z" and not offset:
            return "Z"
        away, colon = abs(offset), ":" if ":" in text else ""
        fields = (f"{away // 3600:02}", f"{away // 60 % 60:02}", f"{away % 60:02}")
        count = len(text.replace(":", "")) // 2
        return ("-" if offset < 0 else "+") + colon.join(fields[:count])

    return re.sub(_LAYOUT, part, layout)


def _time_text(moment: Time) -> str:
    """Time.String."""
    text = format_time(moment, "2006-01-02 15:04:05.999999999 -0700 MST")
    if moment.monotonic is not None:
        sign, away = "-" if moment.monotonic < 0 else "+", abs(moment.monotonic)
        text += f" m={sign}{away // 1_000_000_000}.{away % 1_000_000_000:09}"
    return text


def _time_syntax(moment: Time) -> str:
    """Time.GoString."""
    year, month, day = moment.date()
    hour, minute, second = moment.clock()
    name = _MONTHS[month - 1]
    place = moment.location.name
    place = place if place in ("UTC", "Local") else f"Location({quote(place)})"
    return f"time.Date({year}, time.{name}, {day}, {hour}, {minute}, {second}, {moment.nanoseconds}, time.{place})"


def _duration_text(duration: int) -> str:
    """Duration.String: 1h2m3.5s."""
    sign, away = "-" if duration < 0 else "", abs(int(duration))

    def decimal(value: int, unit: int) -> str:
        whole, rest = divmod(value, unit)
        fraction = f"{rest:0{len(str(unit)) - 1}}".rstrip("0") if rest else ""
        return f"{whole}.{fraction}" if fraction else str(whole)

    for unit, name in ((1, "ns"), (1000, "µs"), (1_000_000, "ms")):
        if 0 < away < 1000 * unit:
            return f"{sign}{decimal(away, unit)}{name}"
    minutes, rest = divmod(away, 60_000_000_000)
    text = f"{decimal(rest, 1_000_000_000)}s"
    if minutes:
        text = f"{minutes % 60}m{text}"
    if minutes >= 60:
        text = f"{minutes // 60}h{text}"
    return sign + text


def _numbered(number: int, names: tuple[str, ...], first: int) -> str:
    """The String method of a Month or Weekday."""
    known = 0 <= number - first < len(names)
    return names[number - first] if known else f"%!{type(number).__name__}({number & (1 << 64) - 1})"


_GO_TYPES.update({Time: "time.Time", Duration: "time.Duration", Month: "time.Month", Weekday: "time.Weekday",
                  Location: "*time.Location"})
_GO_INTS.update((Duration, Month, Weekday))
_GO_STRING.update({Time: _time_text, Duration: _duration_text, Location: lambda place: place.name,
                   Month: lambda month: _numbered(month, _MONTHS, 1),
                   Weekday: lambda day: _numbered(day, _WEEKDAYS, 0)})
_GO_SYNTAX[Time] = _time_syntax


# ---- fmt ----------------------------------------------------------------------------------------------

_LARGEST = 1_000_000  # fmt takes no greater width or precision


class _Printer:
    """One call of fmt: the flags of the verb at work and what has been written so far."""

    __slots__ = ("out", "sharp", "plus", "minus", "zero", "space", "sharp_v", "plus_v", "width", "precision",
                 "erroring")

    def __init__(self) -> None:
        self.out: list[str] = []
        self.erroring = False  # within %!verb(...), where no String method is called
        self.clear()

    def clear(self) -> None:
        self.sharp = self.plus = self.minus = self.zero = self.space = self.sharp_v = self.plus_v = False
        self.width: int | None = None
        self.precision: int | None = None

    # -- leaves

    def pad(self, text: str, zero: bool = False) -> None:
        """Write text at the width asked for; zero: zeros may fill the left."""
        missing = (self.width or 0) - len(text)
        if missing <= 0:
            self.out.append(text)
        elif self.minus:
            self.out.append(text + " " * missing)
        else:
            self.out.append(("0" if zero and self.zero else " ") * missing + text)

    def text(self, text: str) -> None:
        if self.width is not None or self.precision is not None:
            self.pad(runes(text)[:self.precision], zero=True)
        else:
            self.out.append(text)

    def boolean(self, value: bool, verb: str) -> None:
        if verb in "tv":
            self.pad("true" if value else "false", zero=True)
        else:
            self.bad_verb(value, verb)

    def string(self, value: str, verb: str, original: object = None) -> None:
        if verb == "s" or verb == "v" and not self.sharp_v:
            self.text(value)
        elif verb in "vq":
            text = runes(value)[:self.precision]
            if self.sharp and _can_backquote(text):
                self.pad(f"`{text}`", zero=True)
            else:
                self.pad(quote(text, self.plus), zero=True)
        elif verb in "xX":
            data = utf8(value)[:self.precision]
            prefix = "0" + verb if self.sharp and data else ""
            text = prefix + (data.hex(" ") if self.space else data.hex()).replace(" ", " " + prefix)
            self.pad(text.upper() if verb == "X" else text, zero=True)
        else:
            self.bad_verb(value if original is None else original, verb)

    def integer(self, value: int, verb: str, unsigned: bool = False) -> None:
        if verb in "dv" and not (unsigned and self.sharp_v):
            digits, prefix = str(abs(int(value))), ""
        elif verb == "b":
            digits, prefix = f"{abs(value):b}", "0b" if self.sharp else ""
        elif verb in "oO":
            digits, prefix = f"{abs(value):o}", "0o" if verb == "O" else ""
        elif verb in "xXv":
            digits = f"{abs(value):X}" if verb == "X" else f"{abs(value):x}"
            prefix = "0" + verb if self.sharp and verb != "v" else "0x" if verb == "v" else ""
        elif verb == "c":
            return self.pad(_rune(value), zero=True)
        elif verb == "q":
            return self.pad(f"'{_escape(_rune(value), chr(39), self.plus)}'", zero=True)
        elif verb == "U":
            return self.unicode(value)
        else:
            return self.bad_verb(value, verb)
        sign = "-" if value < 0 else "+" if self.plus else " " if self.space else ""
        if self.precision is not None:
            if self.precision == 0 and value == 0:
                return self.pad("")
            digits = digits.rjust(self.precision, "0")
        elif self.zero and not self.minus and self.width is not None:
            digits = digits.rjust(self.width - len(sign), "0")
        if self.sharp and verb in "oO" and digits[0] != "0":
            digits = "0" + digits
        self.pad(sign + prefix + digits)

    def unicode(self, value: int) -> None:
        code = value & 0xFFFF_FFFF_FFFF_FFFF
        text = f"{code:X}".rjust(max(self.precision or 0, 4), "0")
        printable = self.sharp and code <= 0x10FFFF and chr(code).isprintable()
        self.pad(f"U+{text} '{chr(code)}'" if printable else f"U+{text}")

    def float(self, value: float, verb: str, original: object = None) -> None:
        if verb not in "vbgGxXfFeE":
            return self.bad_verb(value if original is None else original, verb)
        form = {"v": "g", "F": "f"}.get(verb, verb)
        precision = self.precision if self.precision is not None else 6 if form in "feE" else None
        text = format_float(value, form, precision)
        if text[0] not in "+-":
            text = "+" + text
        if self.space and text[0] == "+" and not self.plus:
            text = " " + text[1:]
        if text[1] in "IN":
            return self.pad(text if text[1] == "I" or self.plus or self.space else text[1:])
        if self.sharp and form != "b":
            text = _with_point(text, form, 6 if precision is None else precision)
        if not self.plus and text[0] == "+":
            self.pad(text[1:], zero=True)
        elif self.zero and not self.minus and self.width is not None and self.width > len(text):
            self.out.append(text[0] + text[1:].rjust(self.width - 1, "0"))
        else:
            self.pad(text, zero=True)

    def complex(self, value: complex, verb: str) -> None:
        if verb not in "vbgGxXfFeE":
            return self.bad_verb(value, verb)
        plus = self.plus
        self.out.append("(")
        self.float(value.real, verb)
        self.plus = True
        self.float(value.imag, verb)
        self.out.append("i)")
        self.plus = plus

    def pointer(self, value: object, verb: str) -> None:
        address = 0xC000000000 + id(value) % 0x10000000
        sharp = self.sharp
        if verb in "vp":
            if self.sharp_v and verb == "v":
                self.out.append(f"({go_type(value)})(0x{address:x})")
                return
            self.sharp = not sharp
            self.integer(address, "x")
            self.sharp = sharp
        elif verb in "bodxX":
            self.integer(address, verb, unsigned=True)
        else:
            self.bad_verb(value, verb)

    def bad_verb(self, value: object, verb: str) -> None:
        self.out.append(f"%!{verb}(")
        if value is None or value is INVALID:
            self.out.append("<nil>)")
            return
        self.erroring = True
        self.out.append(go_type(value) + "=")
        self.value(value, "v")
        self.erroring = False
        self.out.append(")")

    # -- values

    def argument(self, value: object, verb: str) -> None:
        """One operand of print, println or printf."""
        if value is None or value is INVALID:
            if verb in "Tv":
                self.pad("<nil>", zero=True)
            else:
                self.bad_verb(None, verb)
        elif verb == "T":
            self.text(go_type(value))
        elif verb == "p":
            if _go_class(value) in (dict, Func) or _go_class(value) in _GO_SLICES | _GO_POINTERS:
                self.pointer(value, verb)
            else:
                self.bad_verb(value, verb)
        else:
            self.value(value, verb)

    def leaf(self, value: Any, kind: type, verb: str) -> bool:
        """Write a value that has no parts; False if it has."""
        if kind is str:
            self.string(value, verb)
        elif kind is bool:
            self.boolean(value, verb)
        elif not self.erroring and verb == "w":
            self.bad_verb(value, verb)
        elif not self.erroring and not self.sharp_v and kind in _GO_STRING and verb in "vsxXq":
            self.string(_GO_STRING[kind](value), verb, value)
        elif not self.erroring and self.sharp_v and kind in _GO_SYNTAX:
            self.text(_GO_SYNTAX[kind](value))
        elif kind in _GO_INTS:
            self.integer(value, verb, kind in _GO_UNSIGNED)
        elif kind is float:
            self.float(value, verb)
        elif kind is complex:
            self.complex(value, verb)
        elif kind is Func:
            self.pointer(value, verb)
        else:
            return False
        return True

    def value(self, value: Any, verb: str) -> None:
        """A value and its parts. A stack of our own, since templates read JSON that is deeper than Python's."""
        kind = _go_class(value)
        if self.leaf(value, kind, verb):
            return
        between = ", " if self.sharp_v else " "
        todo: list[tuple[int, Any]] = [(0, value)]  # depth, and a value or (at depth -1) text to write
        while todo:
            depth, value = todo.pop()
            kind = _go_class(value)
            if depth < 0:
                self.out.append(value)
            elif value is None or value is INVALID:
                self.out.append("interface {}(nil)" if self.sharp_v else "<nil>")
            elif self.leaf(value, kind, verb):
                pass
            elif kind in _GO_POINTERS and depth:
                self.pointer(value, verb)
            else:
                parts: list[tuple[int, Any]] = []
                if kind is dict:
                    start, end = (go_type(value) + "{", "}") if self.sharp_v else ("map[", "]")
                    for key in bytewise(value):
                        parts += (depth + 1, key), (-1, ":"), (depth + 1, value[key]), (-1, between)
                elif kind in _GO_SLICES:
                    start, end = (go_type(value) + "{", "}") if self.sharp_v else ("[", "]")
                    for part in value:
                        parts += (depth + 1, part), (-1, between)
                else:
                    named, end = self.plus_v or self.sharp_v, "}"
                    start = "&" * (kind in _GO_POINTERS) + (go_type(value).lstrip("*") if self.sharp_v else "") + "{"
                    for field in GO_FIELDS.get(kind, ()):
                        parts += (-1, field + ":" if named else ""), (depth + 1, getattr(value, field)), (-1, between)
                self.out.append(start)
                todo.append((-1, end))
                todo += parts[-2::-1]  # without the separator after the last part

    # -- formats

    def format(self, format: str, arguments: Sequence[object]) -> None:
        """Write what Go's Printf would."""
        at, end, used, reordered, good = 0, len(format), 0, False, True

        def number(start: int) -> tuple[int | None, int]:
            """The number at start, and where it ends; a crazy long one ends the format."""
            stop = start
            value: int | None = None
            while stop < end and format[stop] in "0123456789":
                if value is not None and value > _LARGEST:
                    return None, end
                value, stop = (value or 0) * 10 + int(format[stop]), stop + 1
            return value, stop

        def argument_number() -> bool:
            """Take an index like [2] at this place; True if there was one and it could be read."""
            nonlocal at, used, reordered, good
            if format[at:at + 1] != "[":
                return False
            reordered = True
            closing = format.find("]", at)
            if closing < 0 or end - at < 3:
                good, at = False, at + 1
                return False
            digits, at = format[at + 1:closing], closing + 1
            readable = digits.isascii() and digits.isdigit() and len(digits) < 99 and int("0" + digits[:-1]) <= _LARGEST
            if readable and 0 < int(digits) <= len(arguments):
                used = int(digits) - 1
            else:
                good = False
            return readable

        def star() -> int | None:
            """The int argument that stands for a `*`."""
            nonlocal used
            if used >= len(arguments):
                return None
            value: Any = arguments[used]
            used += 1
            return int(value) if _go_class(value) in _GO_INTS and abs(value) <= _LARGEST else None

        while at < end:
            good = True
            percent = format.find("%", at)
            if percent < 0:
                self.out.append(format[at:])
                break
            if percent > at:
                self.out.append(format[at:percent])
            at = percent + 1
            self.clear()
            while at < end and format[at] in "#0+- ":
                flag, at = format[at], at + 1
                if flag == "#":
                    self.sharp = True
                elif flag == "0":
                    self.zero = True
                elif flag == "+":
                    self.plus = True
                elif flag == "-":
                    self.minus = True
                else:
                    self.space = True
            indexed = argument_number()
            if format[at:at + 1] == "*":
                at += 1
                self.width = star()
                if self.width is None:
                    self.out.append("%!(BADWIDTH)")
                elif self.width < 0:
                    self.width, self.minus, self.zero = -self.width, True, False
                indexed = False
            else:
                self.width, at = number(at)
                if indexed and self.width is not None:  # %[3]2d
                    good = False
            if at + 1 < end and format[at] == ".":
                at += 1
                if indexed:  # %[3].2d
                    good = False
                indexed = argument_number()
                if format[at:at + 1] == "*":
                    at += 1
                    self.precision = star()
                    if self.precision is None or self.precision < 0:
                        self.precision = None
                        self.out.append("%!(BADPREC)")
                    indexed = False
                else:
                    self.precision, at = number(at)
                    self.precision = self.precision or 0
            if not indexed:
                argument_number()
            if at >= end:
                self.out.append("%!(NOVERB)")
                break
            verb, at = format[at], at + 1
            if "\ud800" <= verb <= "\udfff":
                verb = "�"
            if verb == "%":
                self.out.append("%")
            elif not good:
                self.out.append(f"%!{verb}(BADINDEX)")
            elif used >= len(arguments):
                self.out.append(f"%!{verb}(MISSING)")
            else:
                if verb in "vw":
                    self.sharp_v, self.sharp, self.plus_v, self.plus = self.sharp, False, self.plus, False
                self.argument(arguments[used], verb)
                used += 1
        if not reordered and used < len(arguments):
            self.clear()
            self.out.append("%!(EXTRA ")
            for n, value in enumerate(arguments[used:]):
                self.out.append(", " if n else "")
                if value is None or value is INVALID:
                    self.out.append("<nil>")
                else:
                    self.out.append(go_type(value) + "=")
                    self.argument(value, "v")
            self.out.append(")")


def _with_point(number: str, verb: str, digits: int) -> str:
    """A signed number in the form that the flag # asks for: with a point and, for g, G and x, its trailing zeros."""
    if verb not in "gGx":
        digits = 0
    at = next((i for i, c in enumerate(number) if c in ("pP" if verb in "xX" else "eE")), len(number))
    number, tail = number[:at], number[at:]
    significant = number[1:].replace(".", "").lstrip("0")
    digits -= len(significant)
    if "." not in number:
        if number[1:] == "0":
            digits -= 1
        number += "."
    return number + "0" * digits + tail


def sprint(*arguments: object) -> str:
    """fmt.Sprint: a space only between two operands of which neither is a string."""
    if len(arguments) == 1 and type(arguments[0]) is str:
        return arguments[0]
    printer = _Printer()
    after_string = True
    for value in arguments:
        is_string = isinstance(value, str)
        if not is_string and not after_string:
            printer.out.append(" ")
        printer.argument(value, "v")
        after_string = is_string
    return "".join(printer.out)


def sprintln(*arguments: object) -> str:
    """fmt.Sprintln: a space between all operands, a newline at the end."""
    printer = _Printer()
    for n, value in enumerate(arguments):
        if n:
            printer.out.append(" ")
        printer.argument(value, "v")
    printer.out.append("\n")
    return "".join(printer.out)


# Most formats of templates are %s, %d, %v or %.2f of strings and numbers, which Python's % prints alike: such a
# format is kept as the Python format, the types that it is right for, and whether the values need a look: only
# ASCII is as wide in Python as in Go, only finite numbers look the same.
_plans: dict[str, tuple[str, tuple[frozenset[type], ...], bool] | None] = {}
_PLAN_ROWS = (  # flags, width, precision and verb; the types; whether the values need a look
    ("s", (str,), False), ("v", (str, int), False), (r"-?([1-9]\d{0,4})?(\.\d{1,3})?s", (str,), True),
    (r"[-+ 0]*\d{0,5}[dxX]", (int,), False), (r"[-+ 0]*\d{0,5}(\.\d{0,3})?[feE]", (float,), True),
)


def _plan(format: str) -> tuple[str, tuple[frozenset[type], ...], bool] | None:
    """Learn a format. None if it needs fmt whatever the arguments are."""
    if len(_plans) > 1000:
        _plans.clear()
    _plans[format] = None
    types, look = [], False
    directives = regex(r"(?s)%(?:%|[^a-zA-Z%]*.?)").findall(format)
    for directive in directives:
        row = next((row for row in _PLAN_ROWS if regex("(?a)%" + row[0]).fullmatch(directive)), None)
        if row is not None:
            types.append(frozenset(row[1]))
            look = look or row[2]
        elif directive != "%%":
            return None
    python = regex("%%|%v").sub(lambda m: "%%" if m[0] == "%%" else "%s", format)
    plan = _plans[format] = python, tuple(types), look
    return plan


def sprintf(format: str, *arguments: object) -> str:
    """fmt.Sprintf."""
    plan = _plans[format] if format in _plans else _plan(format)
    if plan is not None and len(plan[1]) == len(arguments):
        for value, types in zip(arguments, plan[1], strict=True):
            if type(value) not in types or plan[2] and not _looks_alike(value):
                break
        else:
            return plan[0] % arguments
    printer = _Printer()
    printer.format(format, arguments)
    return "".join(printer.out)


def _looks_alike(value: Any) -> bool:
    """Whether Python pads this string, or prints this number, as Go does."""
    return value.isascii() if type(value) is str else value - value == 0


def print_value(value: Any) -> str:
    """A value as {{value}} prints it: like %v, but <no value> for nil, and a pointer's target."""
    kind = type(value)
    if kind is str:
        return str(value)
    if kind is int or kind is float and value and -1e6 < value < 1e6 and value == int(value):
        return str(int(value))  # what most templates print, at a tenth of the cost
    if value is None or value is INVALID:
        return "<no value>"
    text = sprint(value)
    return text[1:] if type(value) in _GO_POINTERS else text


# ======================================================================================================
# TEMPLATE: FUNCTIONS
# What a template can call: Go's builtins, confd's functions and those of its maintained fork, the store's.
# ======================================================================================================

# Functions take and return the values of the room above; they raise ValueError with Go's message.
# Arguments have been checked and converted by the caller, see Func.

_LONGEST = 1 << 28  # characters that repeat and indent make of a short text
_MOST_NUMBERS = 1 << 20  # that seq makes


# ---- printing and escaping ----------------------------------------------------------------------------

def _printed(arguments: tuple[object, ...]) -> str:
    """What html, js and urlquery escape: print's text, but <no value> for nil and a pointer's target."""
    if len(arguments) == 1:
        return print_value(arguments[0])
    return sprint(*("<no value>" if a is None or a is INVALID else a for a in arguments))


_HTML = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&#34;", "'": "&#39;", "\0": "\ufffd"})
_JS = {"\\": "\\\\", "'": "\\'", '"': '\\"', "<": "\\u003C", ">": "\\u003E", "&": "\\u0026", "=": "\\u003D"}


def _html(*arguments: object) -> str:
    return _printed(arguments).translate(_HTML)


def _js(*arguments: object) -> str:
    text = _printed(arguments)
    if text.isascii() and text.isprintable() and not any(c in text for c in _JS):
        return text
    return "".join(_JS.get(c) or (c if c.isprintable() or c == "\x7f" or "\udc80" <= c <= "\udcff"
                                  else f"\\u{ord(c):04X}") for c in runes(text))


def _urlquery(*arguments: object) -> str:
    return "".join("+" if b == 32 else chr(b) if b < 128 and chr(b).isalnum() or b in b"-_.~" else f"%{b:02X}"
                   for b in utf8(_printed(arguments)))


# ---- strings ------------------------------------------------------------------------------------------

def _valid(text: str) -> str:
    """The runes of a string, U+FFFD for each byte that is not UTF-8: what strings.Map sees."""
    return text if text.isascii() else re.sub("[\udc80-\udcff]", "\ufffd", runes(text))


def _to_upper(text: str) -> str:
    """strings.ToUpper: one rune for one, so that ß stays."""
    if text.isascii():
        return text.upper()
    return "".join(u if len(u := c.upper()) == 1 else t if len(t := c.title()) == 1 else c for c in _valid(text))


def _to_lower(text: str) -> str:
    return text.lower() if text.isascii() else "".join(c.lower()[0] for c in _valid(text))


def _on_bytes(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that looks for one string in another as Go does: where one is no UTF-8, byte by byte."""
    def call(text: str, part: str, *rest: Any) -> Any:
        if text.isascii() and part.isascii():
            return function(text, part, *rest)
        try:
            (text + part).encode()
        except UnicodeEncodeError:
            if part:
                found = function(*(utf8(each).decode("latin-1") if isinstance(each, str) else each
                                   for each in (text, part, *rest)))
                if isinstance(found, Strings):
                    return Strings(go_string(each.encode("latin-1")) for each in found)
                return go_string(found.encode("latin-1")) if isinstance(found, str) else found
        return function(runes(text), part, *rest)

    return call


def _split(text: str, separator: str) -> Strings:
    return Strings(text.split(separator) if separator else text)


def _clean(path: str) -> str:
    """path.Clean, relative paths too."""
    if path.startswith("/"):
        return clean_key(path)
    names: list[str] = []
    for name in path.split("/"):
        if name == ".." and names and names[-1] != "..":
            names.pop()
        elif name not in ("", "."):
            names.append(name)
    return "/".join(names) or "."


def _base(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2] or ("/" if path else ".")


def _dir(path: str) -> str:
    return _clean(path[:path.rfind("/") + 1])


def _repeat(count: int, text: str) -> str:
    if count < 0:
        raise ValueError("strings: negative Repeat count")
    if count * len(text) > _LONGEST:
        raise ValueError("strings: Repeat output length overflow")
    return text * count


def _indent(spaces: int, text: str) -> str:
    pad = _repeat(max(spaces, 0), " ")
    if len(pad) * text.count("\n") > _LONGEST:
        raise ValueError("strings: Repeat output length overflow")
    return pad + text.replace("\n", "\n" + pad) if text else ""


def _nospace(text: str) -> str:
    return "".join(c for c in _valid(text) if not c.isspace() or "\x1c" <= c <= "\x1f")


def _case_words(text: str) -> list[str]:
    """The words of an identifier: split at _, -, space and where capitals begin (HTTPServer: HTTP, Server)."""
    words = [""]
    for n, c in enumerate(text):
        if c in "_- ":
            words.append("")
            continue
        if c.isupper() and words[-1] and (text[n + 1:n + 2].islower() or not text[n - 1].isupper()):
            words.append("")
        words[-1] += c
    return [word for word in words if word]


def _camelcase(text: str) -> str:
    first, *others = [_to_lower(word) for word in _case_words(text)] or [""]
    return first + "".join(_to_upper(word[0]) + word[1:] for word in others)


_BOOLEANS = {**dict.fromkeys(("1", "t", "T", "TRUE", "true", "True"), True),
             **dict.fromkeys(("0", "f", "F", "FALSE", "false", "False"), False)}


def _parse_bool(text: str) -> bool:
    if text not in _BOOLEANS:
        raise ValueError(f"strconv.ParseBool: parsing {quote(text)}: invalid syntax")
    return _BOOLEANS[text]


def _atoi(text: str) -> int:
    digits = text[1:] if text[:1] in ("+", "-") else text
    leading = digits[:len(digits) - len(digits.lstrip("0123456789"))].lstrip("0")
    too_long = len(leading) > 20 or int(leading or 0) >= 1 << 64  # Go looks no further than here
    if not digits or leading != digits.lstrip("0") and not too_long:
        raise ValueError(f"strconv.Atoi: parsing {quote(text)}: invalid syntax")
    value = 0 if too_long else int(text)
    if too_long or not -1 << 63 <= value < 1 << 63:
        raise ValueError(f"strconv.Atoi: parsing {quote(text)}: value out of range")
    return value


def _base64_encode(text: str) -> str:
    return binascii.b2a_base64(utf8(text), newline=False).decode()


def _base64_decode(text: str) -> str:
    plain = text.replace("\r", "").replace("\n", "")
    match = re.fullmatch("(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?", plain)
    if match:
        return go_string(binascii.a2b_base64(plain))
    data, good = utf8(text), 0  # find the byte that Go complains about
    for at, byte in enumerate(data):
        if byte in b"\r\n":
            continue
        if chr(byte).isalnum() and byte < 128 or byte in b"+/":
            good += 1
            continue
        if byte == 61 and good % 4 >= 2:
            rest = at + 1
            if good % 4 == 2:
                while data[rest:rest + 1] in (b"\r", b"\n"):
                    rest += 1
                if data[rest:rest + 1] != b"=":
                    at = len(data) if rest == len(data) else rest - 1
                    break
                rest += 1
            while data[rest:rest + 1] in (b"\r", b"\n"):
                rest += 1
            at = rest
        break
    else:
        at = len(data) - good % 4
    raise ValueError(f"illegal base64 data at input byte {at}")


def _sha256sum(text: str) -> str:
    return str(sha2.sha256(utf8(text)).hexdigest())


# ---- numbers ------------------------------------------------------------------------------------------

def _int64(value: int) -> int:
    """What is left of a result in Go's int."""
    return (value + (1 << 63) & (1 << 64) - 1) - (1 << 63)


def _div(a: int, b: int) -> int:
    if not b:
        raise ValueError("runtime error: integer divide by zero")
    return _int64(-(-a // b) if (a < 0) != (b < 0) else a // b)


def _mod(a: int, b: int) -> int:
    if not b:
        raise ValueError("runtime error: integer divide by zero")
    return abs(a) % abs(b) * (-1 if a < 0 else 1)


def _seq(first: int, last: int) -> Ints:
    if last - first >= _MOST_NUMBERS:
        raise ValueError(f"more than {_MOST_NUMBERS} numbers")
    return Ints(range(first, last + 1))


# ---- lists and maps -----------------------------------------------------------------------------------

def _map(*arguments: Any) -> dict[str, Any]:
    if len(arguments) % 2:
        raise ValueError("invalid map call")
    if not all(isinstance(key, str) for key in arguments[::2]):
        raise ValueError("map keys must be strings")
    return dict(zip(arguments[::2], arguments[1::2], strict=True))


def _empty(value: Any) -> bool:
    return not value if _go_class(value) in _FALSY else False


_FALSY = {type(None), Invalid, bool, int, float, str, dict} | _GO_INTS | _GO_SLICES


def _coalesce(*arguments: object) -> object:
    return next((value for value in arguments if not _empty(value)), None)


def _reverse(value: Any) -> Any:
    """A reversed copy of a list; anything else as it is."""
    return type(value)(value[::-1]) if _go_class(value) in _GO_SLICES else value


def _reverse_in_place(value: Any) -> Any:
    """confd's reverse: the list itself, and only of strings or sorted pairs (what gets returns stays as it is)."""
    if type(value) in (Strings, PairList):
        value.reverse()
    return value


def _sort_by_length(strings: Strings) -> Strings:
    strings.sort(key=lambda s: len(utf8(s)))
    return strings


def _pluck(key: str, *maps: dict[str, Any]) -> list[Any]:
    return [m[key] for m in maps if key in m]


# ---- JSON ---------------------------------------------------------------------------------------------

_JSON_DEPTH = 10_000  # what is nested deeper is an error in Go
_JSON_WORDS: dict[str, tuple[str, bool | None]] = {"t": ("true", True), "f": ("false", False), "n": ("null", None)}
_JSON_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_JSON_NUMBER = r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?"
_json_decoder: Any = None


def _json_float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(text)
    return value


def _json_refused(text: str) -> NoReturn:
    raise ValueError(text)  # NaN and the infinities, which Python would read


def _from_json(text: str, wanted: type | None = None) -> Any:
    """encoding/json.Unmarshal into an interface {}, or into a map or slice (wanted: dict or list)."""
    global _json_decoder
    if _json_decoder is None:
        _json_decoder = json.JSONDecoder(parse_float=_json_float, parse_int=_json_float, parse_constant=_json_refused)
    try:
        text.encode()
        if re.search(r"\\u[dD]", text):  # halves of surrogate pairs, perhaps without the other half
            return _read_json(text, wanted)
        value = _json_decoder.decode(text)
    except (ValueError, RecursionError):
        return _read_json(text, wanted)  # for Go's error, or because Python gives up too early
    return value if wanted is None or type(value) is wanted else _json_wanted(value, wanted)


def _json_wanted(value: Any, wanted: type) -> Any:
    """null gives an empty map or slice, other kinds of values are errors."""
    if value is None:
        return wanted()
    kind = {dict: "object", list: "array", str: "string", float: "number", bool: "bool"}[type(value)]
    raise ValueError(f"json: cannot unmarshal {kind} into Go value of type {_GO_TYPES[wanted]}")


def _json_unexpected(text: str, at: int, where: str) -> ValueError:
    """Go's error for the character at this place, or for the end of the text."""
    if at >= len(text):
        return ValueError("unexpected end of JSON input")
    return ValueError(f"invalid character '{_escape(text[at], chr(39), False)}' {where}")


def _json_space(text: str, at: int) -> int:
    while text[at:at + 1] in (" ", "\t", "\r", "\n"):
        at += 1
    return at


def _json_string(text: str, at: int) -> tuple[str, int]:
    """The string whose opening quote is before `at`, and the place behind it."""
    out = []
    plain = re.compile(r'[^"\\\x00-\x1f]*')
    while True:
        end = plain.match(text, at).end()  # type: ignore[union-attr]
        out.append(re.sub("[\ud800-\udfff]", "\ufffd", text[at:end]))
        at = end
        if text[at:at + 1] != "\\":
            break
        letter = text[at + 1:at + 2]
        if letter in _JSON_ESCAPES:
            out.append(_JSON_ESCAPES[letter])
            at += 2
        elif letter == "u" and re.fullmatch("[0-9A-Fa-f]{4}", text[at + 2:at + 6]):
            out.append(chr(int(text[at + 2:at + 6], 16)))
            at += 6
        elif at + 1 >= len(text) or letter == "u" and re.fullmatch("[0-9A-Fa-f]{0,3}", text[at + 2:]):
            raise _json_unexpected(text, len(text), "")
        else:
            escape = go_string(utf8(text[at:at + 6])[:6 if letter == "u" else 2])
            plain_text = all(c.isprintable() and c not in " `\ufffd" for c in escape)
            shown = f"`{escape}`" if plain_text else quote(escape)
            raise ValueError(f"invalid escape sequence {shown} in string")
    if text[at:at + 1] != '"':
        raise _json_unexpected(text, at, "in string")
    joined = re.sub("[\ud800-\udbff][\udc00-\udfff]", lambda pair: chr(
        0x10000 + (ord(pair[0][0]) - 0xD800 << 10) + ord(pair[0][1]) - 0xDC00), "".join(out))
    return re.sub("[\ud800-\udfff]", "\ufffd", joined), at + 1


def _json_key(text: str, at: int) -> tuple[str, int]:
    """The key of an object and its colon, and the place behind it."""
    at = _json_space(text, at)
    if text[at:at + 1] != '"':
        raise _json_unexpected(text, at, "looking for beginning of object key string")
    key, at = _json_string(text, at + 1)
    at = _json_space(text, at)
    if text[at:at + 1] != ":":
        raise _json_unexpected(text, at, "after object key")
    return key, at + 1


def _json_scalar(text: str, at: int) -> tuple[Any, int]:
    """The string, word or number at this place, and the place behind it; a number too large is an infinity."""
    start = text[at:at + 1]
    if start == '"':
        return _json_string(text, at + 1)
    if start in _JSON_WORDS:
        word, value = _JSON_WORDS[start]
        for n, c in enumerate(word):
            if text[at + n:at + n + 1] != c:
                raise _json_unexpected(text, at + n, f"in literal {word} (expecting '{c}')")
        return value, at + len(word)
    if not start or start not in "-0123456789":
        raise _json_unexpected(text, at, "looking for beginning of value")
    number = re.compile(_JSON_NUMBER).match(text, at)
    if not number:
        raise _json_unexpected(text, at + 1, "in numeric literal")
    end = number.end()
    if text[end:end + 1] == "." and not number[1] and not number[2]:
        raise _json_unexpected(text, end + 1, "in numeric literal")
    if text[end:end + 1] in ("e", "E") and not number[2]:
        raise _json_unexpected(text, end + 1 + (text[end + 1:end + 2] in ("+", "-")), "in numeric literal")
    return float(number[0]), end


def _read_json(text: str, wanted: type | None) -> Any:
    """_from_json, slowly: for Go's errors and depth, and for text that is not quite Unicode."""
    text = runes(text)
    around: list[tuple[Any, str]] = []  # the objects and arrays that we are in, and the key at work
    at, too_large = 0, ""
    while True:  # a value begins here
        at = _json_space(text, at)
        value: Any
        if text[at:at + 1] in ("{", "["):
            if len(around) >= _JSON_DEPTH:
                raise ValueError("exceeded max depth")
            value, end = ({}, "}") if text[at] == "{" else ([], "]")
            at = _json_space(text, at + 1)
            if text[at:at + 1] != end:
                key, at = _json_key(text, at) if end == "}" else ("", at)
                around.append((value, key))
                continue
            at += 1
        else:
            start = at
            value, at = _json_scalar(text, at)
            if value in (float("inf"), float("-inf")) and not too_large:
                path = [k.replace("~", "~0").replace("/", "~1") if type(c) is dict else str(len(c)) for c, k in around]
                place = f"{'Go struct field ' * (type(around[-1][0]) is dict)}.{'.'.join(path)}" if path else "Go value"
                too_large = f"json: cannot unmarshal number {text[start:at]} into {place} of type float64"
        while around:  # a value ends here, and perhaps what it is in
            container, key = around[-1]
            if type(container) is dict:
                container[key] = value
            else:
                container.append(value)
            at = _json_space(text, at)
            if text[at:at + 1] == ",":
                if type(container) is dict:
                    key, at = _json_key(text, at + 1)
                    around[-1] = (container, key)
                else:
                    at += 1
                break
            if text[at:at + 1] != ("}" if type(container) is dict else "]"):
                where = "object key:value pair" if type(container) is dict else "array element"
                raise _json_unexpected(text, at, f"after {where}")
            at += 1
            value, _ = around.pop()
        else:
            at = _json_space(text, at)
            if at < len(text):
                raise _json_unexpected(text, at, "after top-level value")
            if wanted is not None and type(value) is not wanted:
                return _json_wanted(value, wanted)
            if too_large:
                raise ValueError(too_large)
            return value


_JSON_QUOTED = {n: f"\\u{n:04x}" for n in (*range(32), *b"<>&", 0x2028, 0x2029)}
_JSON_QUOTED.update({ord(c): f"\\{name}" for name, c in _JSON_ESCAPES.items() if name != "/"})


def _json_text(value: Any, kind: type) -> str | None:
    """A value without parts as JSON; None if it has parts."""
    if kind is str:
        return f'"{_valid(value).translate(_JSON_QUOTED)}"'
    if value is None or value is INVALID:
        return "null"
    if kind is bool:
        return "true" if value else "false"
    if kind is float:
        if value != value or value in (float("inf"), float("-inf")):
            raise ValueError(f"json: unsupported value: {format_float(value)}")
        small = value != 0 and not 1e-6 <= abs(value) < 1e21
        return format_float(value, "e").replace("e-0", "e-") if small else format_float(value, "f")
    if kind in _GO_INTS:
        return str(int(value))
    if kind is Time:
        return f'"{format_time(value, "2006-01-02T15:04:05.999999999Z07:00")}"'
    if kind in (complex, Func):
        raise ValueError(f"json: unsupported type: {go_type(value)}")
    return None


def _to_json(value: Any, indent: str = "") -> str:
    """encoding/json.Marshal; with indent MarshalIndent."""
    out: list[str] = []
    todo: list[tuple[int, Any]] = [(0, value)]  # depth, and a value or (at depth -1) text to write
    while todo:
        depth, value = todo.pop()
        kind = _go_class(value)
        text = value if depth < 0 else _json_text(value, kind)
        if text is not None:
            out.append(text)
            continue
        if kind is dict:
            names: Any = [(_json_text(key, str), value[key]) for key in bytewise(value)]
        else:
            names = [(_json_text(field, str), getattr(value, field)) for field in GO_FIELDS.get(kind, ())]
        start, end = "{", "}"
        if kind in _GO_SLICES:
            names, start, end = [(None, part) for part in value], "[", "]"
        line = "\n" + indent * (depth + 1) if indent else ""
        parts: list[tuple[int, Any]] = []
        for name, part in names:
            prefix = "" if name is None else f"{name}: " if indent else f"{name}:"
            parts += (-1, line + prefix), (depth + 1, part), (-1, ",")
        out.append(start)
        todo.append((-1, "\n" + indent * depth + end if indent and parts else end))
        todo += parts[-2::-1]
    return "".join(out)


# ---- regular expressions: RE2's syntax on Python's engine ---------------------------------------------

_RE_PERL = {"d": "0-9", "w": "0-9A-Za-z_", "s": r"\t\n\f\r "}
_RE_POSIX = {
    "alnum": "0-9A-Za-z", "alpha": "A-Za-z", "ascii": r"\x00-\x7f", "blank": r"\t ", "cntrl": r"\x00-\x1f\x7f",
    "digit": "0-9", "graph": "!-~", "lower": "a-z", "print": " -~", "punct": r"!-/:-@\[-`{-~",
    "space": r"\t\n\v\f\r ", "upper": "A-Z", "word": "0-9A-Za-z_", "xdigit": "0-9A-Fa-f",
}
_RE_ESCAPES = {"a": "\a", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_RE_REPEATS = 1000  # RE2's limit
_patterns: dict[str, tuple[re.Pattern[str], dict[str, list[int]]]] = {}


class _Pattern:
    """Reads one regular expression of RE2's syntax and writes it in Python's."""

    __slots__ = ("text", "at", "flags", "names", "groups")

    def __init__(self, text: str) -> None:
        self.text, self.at, self.flags, self.groups = text, 0, "", 0
        self.names: dict[str, list[int]] = {}  # group numbers, as Go allows a name more than once

    def bad(self, what: str, start: int, end: int | None = None) -> ValueError:
        return ValueError(f"error parsing regexp: {what}: `{self.text[start:end]}`")

    def peek(self, text: str) -> bool:
        return self.text.startswith(text, self.at)

    def translate(self) -> str:
        """The whole expression in Python's syntax."""
        for n, c in enumerate(self.text):
            if "\udc80" <= c <= "\udcff":
                raise self.bad("invalid UTF-8", n)
        out = [""]  # finished pieces; the last one is what a repetition operator takes
        weights = [0]  # how often each piece is repeated at most; 0: nothing to repeat
        groups: list[tuple[list[str], list[int], str]] = []
        last_operator = -1  # where a repetition operator stood, if it stands right before this place
        while self.at < len(self.text):
            start, c = self.at, self.text[self.at]
            operator = self.repetition() if c in "*+?{" else None
            if operator:
                piece, count = operator
                if last_operator >= 0:
                    raise self.bad("invalid nested repetition operator", last_operator, self.at)
                if not weights[-1]:
                    raise self.bad("missing argument to repetition operator", start, self.at)
                weights[-1] *= count
                if weights[-1] > _RE_REPEATS:
                    raise self.bad("invalid repeat count", start, self.at)
                out[-1] = f"(?:{out[-1]}){piece}"
                last_operator = start
                continue
            last_operator = -1
            self.at += 1
            if c == "(":
                opening = self.group()
                if opening is not None:
                    flags, text = opening
                    groups.append((out, weights, self.flags))
                    self.flags, out, weights = flags, [text], [0]
            elif c == ")":
                if not groups:
                    raise self.bad("unexpected )", 0)
                inner, weight = "".join(out), max(1, *weights)
                out, weights, self.flags = groups.pop()
                out.append(inner + ")")
                weights.append(weight)
            elif c == "|":
                out.append("|")
                weights.append(0)
            elif c == "\\" and self.peek("Q"):
                end = self.text.find("\\E", self.at)
                literal = self.text[self.at + 1:end if end >= 0 else None]
                self.at = end + 2 if end >= 0 else len(self.text)
                out += [self.cased(re.escape(character)) for character in literal]
                weights += [1] * len(literal)
            else:
                out.append(self.atom(c, start))
                weights.append(1)
        if groups:
            raise self.bad("missing closing )", 0)
        return "".join(out)

    def cased(self, piece: str) -> str:
        return f"(?i:{piece})" if "i" in self.flags else piece

    def repetition(self) -> tuple[str, int] | None:
        """The operator at this place in Python's syntax and its greatest count; None for a literal brace."""
        start, count = self.at, 1
        operator = self.text[start]
        if operator == "{":
            match = re.compile(r"\{([0-9]+)(,?)([0-9]*)\}", re.A).match(self.text, start)
            if not match or not match[2] and match[3] or any(len(n) > 1 and n[0] == "0" for n in match.group(1, 3)):
                return None
            low, high = min(int(match[1][:9]), 10**8), min(int((match[3] or match[1])[:9]), 10**8)
            self.at = match.end()
            if low > _RE_REPEATS or high > _RE_REPEATS or high < low:
                raise self.bad("invalid repeat count", start, self.at)
            operator, count = match[0], max(high, 1)
        else:
            self.at += 1
        lazy = self.peek("?")
        self.at += lazy
        return operator + "?" * (lazy != ("U" in self.flags)), count

    def group(self) -> tuple[str, str] | None:
        """What follows a parenthesis: the flags within and Python's opening; None if only flags were set."""
        start = self.at - 1
        if not self.peek("?"):
            self.groups += 1
            return self.flags, "("
        if self.peek("?P<") or self.peek("?<"):
            name_at = self.text.index("<", start) + 1
            end = self.text.find(">", name_at)
            if end < 0:
                raise self.bad("invalid named capture", start)
            if not re.fullmatch("[0-9A-Za-z_]+", self.text[name_at:end]):
                raise self.bad("invalid named capture", start, end + 1)
            self.at = end + 1
            self.groups += 1
            self.names.setdefault(self.text[name_at:end], []).append(self.groups)
            return self.flags, "("
        flags, minus, seen = self.flags, False, False
        self.at += 1
        while self.at < len(self.text):
            c = self.text[self.at]
            self.at += 1
            if c in "imsU":
                seen = True
                flags = flags.replace(c, "") if minus else flags + c
            elif c == "-" and not minus:
                minus, seen = True, False
            elif c in ":)" and (seen or not minus):
                if c == ":":
                    return flags, "(?:"
                self.flags = flags
                return None
            else:
                break
        raise self.bad("invalid or unsupported Perl syntax", start, self.at)

    def atom(self, c: str, start: int) -> str:
        """One thing that can be repeated; its first character c has been read."""
        if c == ".":
            return r"[\s\S]" if "s" in self.flags else r"[^\n]"
        if c == "^":
            return "(?m:^)" if "m" in self.flags else r"\A"
        if c == "$":
            return "(?m:$)" if "m" in self.flags else r"\Z"
        if c == "[":
            return self.cased(self.character_class(start))
        if c != "\\":
            return self.cased(re.escape(c))
        letter = self.text[self.at:self.at + 1]
        special = {"A": r"\A", "z": r"\Z", "b": r"(?a:\b)", "B": r"(?:(?a:\B)|\A\Z)"}.get(letter)
        if special or letter and letter in "dwsDWS":
            self.at += 1
            return special or self.cased(f"[{'^' * letter.isupper()}{_RE_PERL[letter.lower()]}]")
        if letter in ("p", "P"):
            raise self.unicode_class(start)
        return self.cased(re.escape(chr(self.escape())))

    def unicode_class(self, start: int) -> ValueError:
        r"""\p{...}: nothing here knows Unicode's classes."""
        end = self.text.find("}", start) if self.text[start + 2:start + 3] == "{" else start + 2
        return self.bad("Unicode classes are not supported", start, end + 1 if end >= 0 else None)

    def escape(self) -> int:
        """The character that an escape stands for; the backslash has been read."""
        start = self.at - 1
        c = self.text[self.at:self.at + 1]
        if not c:
            raise self.bad("trailing backslash at end of expression", self.at)
        self.at += 1
        octal = re.compile("[0-7]{1,3}" if c == "0" else "[1-7][0-7]{1,2}").match(self.text, self.at - 1)
        if octal:
            self.at = octal.end()
            return int(octal[0], 8)
        if c == "x":
            return self.hexadecimal(start)
        if c in _RE_ESCAPES:
            return ord(_RE_ESCAPES[c])
        if c.isalnum() or not c.isascii():
            raise self.bad("invalid escape sequence", start, self.at)
        return ord(c)

    def hexadecimal(self, start: int) -> int:
        r"""The character of \x41 or \x{41}; the x has been read."""
        if not self.peek("{"):
            digits, self.at = self.text[self.at:self.at + 2], self.at + 2
            if not re.fullmatch("[0-9A-Fa-f]{2}", digits):
                raise self.bad("invalid escape sequence", start, self.at)
            return int(digits, 16)
        code, end = 0, self.at + 1
        while code <= 0x10FFFF and re.match("[0-9A-Fa-f]", self.text[end:end + 1]):
            code, end = 16 * code + int(self.text[end], 16), end + 1
        if code > 0x10FFFF:
            raise self.bad("invalid escape sequence", start, end)
        if end == self.at + 1 or self.text[end:end + 1] != "}":
            raise self.bad("invalid escape sequence", start, end + 1)
        self.at = end + 1
        return code

    def character_class(self, start: int) -> str:
        """The class whose bracket has been read, in Python's syntax."""
        negated = self.peek("^")
        self.at += negated
        inside, first = [], True
        while first or not self.peek("]"):
            if self.at >= len(self.text):
                raise self.bad("missing closing ]", start)
            first = False
            named = re.compile(r"\[:(\^?)(.*?):\]", re.S).match(self.text, self.at)
            if named:
                if named[2] not in _RE_POSIX:
                    raise self.bad("invalid character class range", self.at, named.end())
                self.at = named.end()
                inside.append(_re_negated(_RE_POSIX[named[2]]) if named[1] else _RE_POSIX[named[2]])
                continue
            letter = self.text[self.at + 1:self.at + 2] if self.peek("\\") else ""
            if letter in ("p", "P"):
                raise self.unicode_class(self.at)
            if letter and letter in "dwsDWS":
                self.at += 2
                inside.append(_RE_PERL[letter] if letter.islower() else _re_negated(_RE_PERL[letter.lower()]))
                continue
            range_at = self.at
            low = high = self.class_character(start)
            if self.peek("-") and self.text[self.at + 1:self.at + 2] not in ("]", ""):
                self.at += 1
                high = self.class_character(start)
                if high < low:
                    raise self.bad("invalid character class range", range_at, self.at)
            inside.append(f"\\U{low:08x}-\\U{high:08x}")
        self.at += 1
        return f"[{'^' * negated}{''.join(inside)}]"

    def class_character(self, start: int) -> int:
        if self.at >= len(self.text):
            raise self.bad("missing closing ]", start)
        self.at += 1
        c = self.text[self.at - 1]
        return self.escape() if c == "\\" else ord(c)


def _re_negated(inside: str) -> str:
    """What an ASCII class leaves out, as the inside of a class."""
    others = [n for n in range(128) if not re.match(f"[{inside}]", chr(n))]
    return "".join(f"\\x{n:02x}" for n in others) + "\\U00000080-\\U0010ffff"


def _pattern(text: str) -> tuple[re.Pattern[str], dict[str, list[int]]]:
    """A compiled regular expression of RE2's syntax and the numbers of its named groups."""
    if text not in _patterns:
        reader = _Pattern(runes(text))
        try:
            compiled = re.compile(reader.translate())
        except RecursionError:
            raise ValueError(f"error parsing regexp: expression nests too deeply: `{text}`") from None
        if len(_patterns) > 200:
            _patterns.clear()
        _patterns[text] = compiled, reader.names
    return _patterns[text]


def _regex_match(pattern: str, text: str) -> bool:
    return _pattern(pattern)[0].search(runes(text)) is not None


def _regex_find(pattern: str, text: str) -> str:
    match = _pattern(pattern)[0].search(runes(text))
    return match[0] if match else ""


def _regex_replace_all(pattern: str, text: str, replacement: str) -> str:
    """Regexp.ReplaceAllString: $1, ${1}, $name and ${name} stand for groups, $$ for $."""
    compiled, names = _pattern(pattern)
    text = runes(text)

    def expanded(reference: re.Match[str]) -> str:
        assert match
        name = reference[1] or reference[2]
        if name is None:
            return "$"
        numbers = [int(name[:9])] if name.isdigit() and name.isascii() else names.get(name, [])
        return next((match[n] for n in numbers if n <= compiled.groups and match[n] is not None), "")

    out, at, end = [], 0, -1  # up to where the text is written, and where the last match ended
    start = 0
    while start <= len(text):
        match = compiled.search(text, start)
        if not match:
            break
        out.append(text[at:match.start()])
        at = match.end()
        if match.end() > end or match.start() == 0 and end < 0:  # no empty match right behind another match
            out.append(re.sub(r"\$(?:\{(\w+)\}|(\w+)|\$)", expanded, replacement))
        end = match.end()
        start = end + 1 if match.start() == end else end
    return "".join(out) + text[at:]


# ---- time, files, environment, network ----------------------------------------------------------------

_started = time.monotonic_ns()


def _datetime() -> Time:
    """time.Now."""
    return Time(0, time.time_ns(), LOCAL, time.monotonic_ns() - _started)


def _getenv(name: str, *default: str) -> str:
    return os.environ.get(name) or (default[0] if default else "")


def _file_exists(path: str) -> bool:
    try:
        os.stat(path)
    except (FileNotFoundError, ValueError):
        return False
    except OSError:
        pass  # it may be there
    return True


def _lookup_ip(host: str) -> Strings:
    """All addresses of a host, sorted as strings; none if it cannot be looked up."""
    return Strings(sorted(host_addresses(host)))


def _lookup_srv(service: str, protocol: str, name: str) -> SRVs:
    """net.LookupSRV, in confd's order, which is not that of the priorities; none if it fails."""
    full = f"_{service}._{protocol}.{name}" if service or protocol else name
    try:
        answer = resolve_srv(full, addresses=False)
    except DnsError as error:
        log.debug(str(error))
        return SRVs()
    found = [SRV(record.target.rstrip(".") + ".", record.port, record.priority, record.weight)
             for record in answer.records]
    return SRVs(sorted(found, key=lambda srv: f"{srv.Target}{srv.Port}{srv.Priority}{srv.Weight}"))


def _lookup_interface_ipv4(name: str) -> str:
    """The first IPv4 address of an interface; empty if it has none."""
    probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        answer = fcntl.ioctl(probe.fileno(), 0x8915, utf8(name)[:15].ljust(40, b"\0"))  # SIOCGIFADDR
        return ".".join(map(str, answer[20:24]))
    except OSError:
        return ""
    finally:
        probe.close()


def _lookup_interface_ipv6(name: str) -> str:
    """The first IPv6 address of an interface, global ones before others; empty if it has none."""
    try:
        with open("/proc/net/if_inet6", encoding="ascii") as file:
            rows = [line.split() for line in file]
    except OSError:
        return ""
    rows = sorted((row for row in rows if row[5:] == [name]), key=lambda row: row[3])  # column 4 is the scope
    return str(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(rows[0][0]))) if rows else ""


# ---- the tables ---------------------------------------------------------------------------------------

_ANY_MAP, _ANY_LIST = "map[string]interface {}", "[]interface {}"
FUNCTIONS: dict[str, Func] = {row.name: row for row in (
    # Go's own
    Func("print", sprint, ("any",), True, "string"),
    Func("printf", sprintf, ("string", "any"), True, "string"),
    Func("println", sprintln, ("any",), True, "string"),
    Func("html", _html, ("value",), True, "string"),
    Func("js", _js, ("value",), True, "string"),
    Func("urlquery", _urlquery, ("value",), True, "string"),
    # confd 0.16
    Func("base", _base, ("string",), returns="string"),
    Func("dir", _dir, ("string",), returns="string"),
    Func("split", _on_bytes(_split), ("string", "string"), returns="[]string"),
    Func("join", lambda strings, separator: separator.join(strings), ("[]string", "string"), returns="string"),
    Func("replace", _on_bytes(lambda text, old, new, n: text.replace(old, new, max(n, -1))),
         ("string", "string", "string", "int"), returns="string"),
    Func("toUpper", _to_upper, ("string",), returns="string"),
    Func("toLower", _to_lower, ("string",), returns="string"),
    Func("contains", _on_bytes(lambda text, part: part in text), ("string", "string"), returns="bool"),
    Func("trimSuffix", _on_bytes(str.removesuffix), ("string", "string"), returns="string"),
    Func("json", lambda text: _from_json(text, dict), ("string",), returns=_ANY_MAP),
    Func("jsonArray", lambda text: _from_json(text, list), ("string",), returns=_ANY_LIST),
    Func("map", _map, ("any",), True, _ANY_MAP),
    Func("getenv", _getenv, ("string", "string"), True, "string"),
    Func("datetime", _datetime, (), returns="time.Time"),
    Func("lookupIP", _lookup_ip, ("string",), returns="[]string"),
    Func("lookupIPV4", lambda host: Strings(a for a in _lookup_ip(host) if "." in a), ("string",), returns="[]string"),
    Func("lookupIPV6", lambda host: Strings(a for a in _lookup_ip(host) if ":" in a), ("string",), returns="[]string"),
    Func("lookupSRV", _lookup_srv, ("string", "string", "string"), returns="[]*net.SRV"),
    Func("fileExists", _file_exists, ("string",), returns="bool"),
    Func("base64Encode", _base64_encode, ("string",), returns="string"),
    Func("base64Decode", _base64_decode, ("string",), returns="string"),
    Func("parseBool", _parse_bool, ("string",), returns="bool"),
    Func("atoi", _atoi, ("string",), returns="int"),
    Func("reverse", _reverse, ("any",)),
    Func("sortByLength", _sort_by_length, ("[]string",), returns="[]string"),
    Func("sortKVByLength", lambda pairs: PairList(sorted(pairs, key=lambda pair: len(utf8(pair.Key)))),
         (_GO_TYPES[KVPairs],), returns=_GO_TYPES[PairList]),
    Func("add", lambda a, b: _int64(a + b), ("int", "int"), returns="int"),
    Func("sub", lambda a, b: _int64(a - b), ("int", "int"), returns="int"),
    Func("mul", lambda a, b: _int64(a * b), ("int", "int"), returns="int"),
    Func("div", _div, ("int", "int"), returns="int"),
    Func("mod", _mod, ("int", "int"), returns="int"),
    Func("seq", _seq, ("int", "int"), returns="[]int"),
    # its maintained fork, and calico's confd (hasSuffix)
    Func("hasSuffix", _on_bytes(str.endswith), ("string", "string"), returns="bool"),
    Func("hostname", lambda: os.uname().nodename, (), returns="string"),
    Func("lookupIfaceIPV4", _lookup_interface_ipv4, ("string",), returns="string"),
    Func("lookupIfaceIPV6", _lookup_interface_ipv6, ("string",), returns="string"),
    Func("default", lambda default, value: default if _empty(value) else value, ("any", "any")),
    Func("ternary", lambda yes, no, condition: yes if condition else no, ("any", "any", "bool")),
    Func("coalesce", _coalesce, ("any",), True),
    Func("empty", _empty, ("any",), returns="bool"),
    Func("toJson", _to_json, ("any",), returns="string"),
    Func("toPrettyJson", lambda value: _to_json(value, "  "), ("any",), returns="string"),
    Func("fromJson", _from_json, ("string",)),
    Func("indent", _indent, ("int", "string"), returns="string"),
    Func("nindent", lambda spaces, text: "\n" + _indent(spaces, text), ("int", "string"), returns="string"),
    Func("quote", quote, ("string",), returns="string"),
    Func("squote", lambda text: "'" + text.replace("'", "''") + "'", ("string",), returns="string"),
    Func("regexMatch", _regex_match, ("string", "string"), returns="bool"),
    Func("regexFind", _regex_find, ("string", "string"), returns="string"),
    Func("regexReplaceAll", _regex_replace_all, ("string", "string", "string"), returns="string"),
    Func("trimPrefix", _on_bytes(str.removeprefix), ("string", "string"), returns="string"),
    Func("repeat", _repeat, ("int", "string"), returns="string"),
    Func("nospace", _nospace, ("string",), returns="string"),
    Func("snakecase", lambda text: "_".join(map(_to_lower, _case_words(text))), ("string",), returns="string"),
    Func("kebabcase", lambda text: "-".join(map(_to_lower, _case_words(text))), ("string",), returns="string"),
    Func("camelcase", _camelcase, ("string",), returns="string"),
    Func("dict", _map, ("any",), True, _ANY_MAP),
    Func("list", lambda *values: list(values), ("any",), True, _ANY_LIST),
    Func("hasKey", lambda m, key: key in m, (_ANY_MAP, "string"), returns="bool"),
    Func("keys", lambda m: Strings(bytewise(m)), (_ANY_MAP,), returns="[]string"),
    Func("values", lambda m: [m[key] for key in bytewise(m)], (_ANY_MAP,), returns=_ANY_LIST),
    Func("append", lambda values, value: [*values, value], (_ANY_LIST, "any"), returns=_ANY_LIST),
    Func("pluck", _pluck, ("string", _ANY_MAP), True, _ANY_LIST),
    Func("sha256sum", _sha256sum, ("string",), returns="string"),
)}


def _methods(*rows: Func) -> dict[str, Func]:
    return {row.name: row for row in rows}


def _timed(name: str, nanoseconds: int) -> Func:
    """A method of Duration that gives a float64 number of some unit."""
    return Func(name, lambda d: (d - _mod(d, nanoseconds)) // nanoseconds + _mod(d, nanoseconds) / nanoseconds,
                returns="float64")


def _nanoseconds(value: Any) -> int:
    """A Duration argument, which in a template is nearly always an int constant."""
    if type(value) not in (Duration, int):
        raise ValueError(f"wrong type for value; expected time.Duration; got {go_type(value)}")
    return int(value)


# What a template can call on a value; the value itself is the first argument of `call`.
GO_METHODS: dict[type, dict[str, Func]] = {
    Time: _methods(
        Func("Format", format_time, ("string",), returns="string"),
        Func("String", _time_text, returns="string"),
        Func("GoString", _time_syntax, returns="string"),
        Func("Unix", lambda t: Int64(t.seconds), returns="int64"),
        Func("UnixMilli", lambda t: Int64(t.seconds * 1000 + t.nanoseconds // 1_000_000), returns="int64"),
        Func("UnixMicro", lambda t: Int64(t.seconds * 1_000_000 + t.nanoseconds // 1000), returns="int64"),
        Func("UnixNano", lambda t: Int64(_int64(t.seconds * 1_000_000_000 + t.nanoseconds)), returns="int64"),
        Func("UTC", lambda t: t.within(UTC), returns="time.Time"),
        Func("Local", lambda t: t.within(LOCAL), returns="time.Time"),
        Func("In", Time.within, ("*time.Location",), returns="time.Time"),
        Func("Location", lambda t: t.location, returns="*time.Location"),
        Func("Year", lambda t: t.date()[0], returns="int"),
        Func("Month", lambda t: Month(t.date()[1]), returns="time.Month"),
        Func("Day", lambda t: t.date()[2], returns="int"),
        Func("Weekday", lambda t: Weekday(t.weekday()), returns="time.Weekday"),
        Func("YearDay", Time.year_day, returns="int"),
        Func("Hour", lambda t: t.clock()[0], returns="int"),
        Func("Minute", lambda t: t.clock()[1], returns="int"),
        Func("Second", lambda t: t.clock()[2], returns="int"),
        Func("Nanosecond", lambda t: t.nanoseconds, returns="int"),
        Func("Add", lambda t, d: t.add(_nanoseconds(d)), ("any",), returns="time.Time"),
        Func("AddDate", Time.add_date, ("int", "int", "int"), returns="time.Time"),
        Func("Truncate", lambda t, d: t.round(_nanoseconds(d), False), ("any",), returns="time.Time"),
        Func("Round", lambda t, d: t.round(_nanoseconds(d), True), ("any",), returns="time.Time"),
        Func("Sub", Time.since, ("time.Time",), returns="time.Duration"),
        Func("Before", lambda t, other: t.since(other) < 0, ("time.Time",), returns="bool"),
        Func("After", lambda t, other: t.since(other) > 0, ("time.Time",), returns="bool"),
        Func("Equal", lambda t, other: t.since(other) == 0, ("time.Time",), returns="bool"),
        Func("IsZero", lambda t: t.seconds == -62135596800 and not t.nanoseconds, returns="bool"),
    ),
    Duration: _methods(
        Func("String", _duration_text, returns="string"),
        _timed("Hours", 3_600_000_000_000),
        _timed("Minutes", 60_000_000_000),
        _timed("Seconds", 1_000_000_000),
        Func("Milliseconds", lambda d: Int64(_div(d, 1_000_000)), returns="int64"),
        Func("Microseconds", lambda d: Int64(_div(d, 1000)), returns="int64"),
        Func("Nanoseconds", lambda d: Int64(d), returns="int64"),
    ),
    Month: _methods(Func("String", _GO_STRING[Month], returns="string")),
    Weekday: _methods(Func("String", _GO_STRING[Weekday], returns="string")),
    Location: _methods(Func("String", _GO_STRING[Location], returns="string")),
}


# ---- the store ----------------------------------------------------------------------------------------

def store_functions(store: Mapping[str, str] | KeyTree, compat: bool = True) -> dict[str, Func]:
    """exists, get, getv, gets, getvs, ls and lsdir over the keys of a store.

    compat keeps what is odd in confd: `ls "/"` shows only keys, no directories, `lsdir "/"` shows nothing, and
    reverse does not turn around what gets returned.
    """
    tree = store if isinstance(store, KeyTree) else KeyTree(store)
    values = tree.values_by_key

    def get(key: str) -> KVPair:
        if key not in values:
            raise ValueError(f"key does not exist: {key}")
        return KVPair(key, values[key])

    def getv(key: str, *default: str) -> str:
        if key in values:
            return values[key]
        if default:
            return default[0]
        raise ValueError(f"key does not exist: {key}")

    def ls(path: str) -> Strings:
        if not path:
            return Strings()
        clean = _clean(path)
        names = tree.children(clean) if clean.startswith("/") else []
        if compat and clean == "/":
            names = [name for name in names if "/" + name in values]
        if path in values:
            names = bytewise({*names, _base(path)})
        return Strings(names)

    def lsdir(path: str) -> Strings:
        clean = _clean(path)
        if not clean.startswith("/") or compat and clean == "/":
            return Strings()
        prefix = clean.rstrip("/") + "/"
        return Strings(name for name in tree.children(clean) if tree.is_dir(prefix + name))

    functions = _methods(
        Func("exists", lambda key: key in values, ("string",), returns="bool"),
        Func("get", get, ("string",), returns=_GO_TYPES[KVPair]),
        Func("getv", getv, ("string", "string"), True, "string"),
        Func("gets", lambda pattern: KVPairs(KVPair(*pair) for pair in tree.glob(pattern)), ("string",),
             returns=_GO_TYPES[KVPairs]),
        Func("getvs", lambda pattern: Strings(bytewise(value for _, value in tree.glob(pattern))), ("string",),
             returns="[]string"),
        Func("ls", ls, ("string",), returns="[]string"),
        Func("lsdir", lsdir, ("string",), returns="[]string"),
    )
    if compat:
        functions["reverse"] = Func("reverse", _reverse_in_place, ("any",))
    return functions


# ======================================================================================================
# TEMPLATE: LANGUAGE
# Go's text/template: lexer, parser, compiler to Python code, execution. Package text/template of Go 1.27.
# Does not know where keys come from.
# ======================================================================================================

# ---- errors -------------------------------------------------------------------------------------------

class TemplateError(Error):
    """A template that cannot be parsed or executed; its text is Go's message.

    stage is "parse" or "exec"; partial is what had been written before the error (it never reaches a file).
    """

    def __init__(self, message: str, stage: str, partial: str = "") -> None:
        super().__init__(message)
        self.stage, self.partial = stage, partial


class _Failure(Exception):
    """An error of the engine itself while a template runs: Go's message, its place not yet added."""


# ---- lexer --------------------------------------------------------------------------------------------
# A token is (kind, position, text). Kinds of tokens that have one spelling are that spelling.

_SPACE = " \t\r\n"
_KEYWORDS = frozenset("block break continue define else end if nil range template with".split())
_ACTION_TOKENS = r"""(?x)
    (?P<space>[ \t\r\n]+) | (?P<declare>:=) | (?P<assign>=) | (?P<pipe>\|) | (?P<open>\() | (?P<close>\))
  | (?P<string>"(?:\\[^\n]|[^"\\\n])*") | (?P<raw>`[^`]*`) | (?P<character>'(?:\\[^\n]|[^'\\\n])*')
  | (?P<number>(?=[+-]|\.?[0-9]) [+-]?
       (?: 0[xX][0-9a-fA-F_]*(?:\.[0-9a-fA-F_]*)?(?:[pP][+-]?[0-9_]*)? | 0[oO][0-7_]*(?:\.[0-7_]*)?
         | 0[bB][01_]*(?:\.[01_]*)? | [0-9_]*(?:\.[0-9_]*)?(?:[eE][+-]?[0-9_]*)? ) i?)
  | (?P<variable>\$\w*) | (?P<field>\.\w*) | (?P<word>\w+)
"""
_UNFINISHED = {"": "unclosed action", ":": "expected :=", '"': "unterminated quoted string",
               "`": "unterminated raw quoted string", "'": "unterminated character constant"}
_action_token: Any = None  # the compiled pattern, made for the first template


def _lex(text: str, keywords: frozenset[str]) -> Iterator[tuple[str, int, str]]:
    """The tokens of a template (text/template/parse/lex.go); the last one is "EOF" or "error"."""
    position, size = 0, len(text)
    while True:
        start = text.find("{{", position)
        if start < 0:
            if position < size:
                yield "text", position, text[position:]
            yield "EOF", size, ""
            return
        trim = text.startswith("-", start + 2) and text[start + 3:start + 4] in (" ", "\t", "\r", "\n")
        chunk = text[position:start]
        if chunk := chunk.rstrip(_SPACE) if trim else chunk:
            yield "text", position, chunk
        position = start + (4 if trim else 2)
        if text.startswith("/*", position):
            end = text.find("*/", position + 2) + 2
            width = _right_delimiter(text, end) if end > 1 else 0
            if not width:
                yield "error", position, "unclosed comment" if end < 2 else "comment ends before closing delimiter"
                return
            position = end + width
        else:
            yield "{{", start, "{{"
            position, width = yield from _lex_action(text, position, keywords)
            if not width:
                return
        if width == 4:  # a trimming delimiter swallows the space behind it
            while text[position:position + 1] in (" ", "\t", "\r", "\n"):
                position += 1


def _right_delimiter(text: str, position: int) -> int:
    """The width of the right delimiter that begins here: 2 for }}, 4 for -}} with its space, 0 for none."""
    if text.startswith("}}", position):
        return 2
    return 4 if text.startswith("-}}", position + 1) and text[position] in _SPACE else 0


def _lex_action(text: str, position: int, keywords: frozenset[str]) -> Any:
    """The tokens of one action; returns the position behind it and the width of its delimiter (0: an error)."""
    global _action_token
    if _action_token is None:
        _action_token = regex(_ACTION_TOKENS).match
    parentheses = 0
    while True:
        if width := _right_delimiter(text, position):
            if parentheses:
                yield "error", position, "unclosed left paren"
                return position, 0
            yield "}}", position + width - 2, "}}"
            return position + width, width
        match = _action_token(text, position)
        if match is None:
            character = text[position:position + 1]
            if character not in _UNFINISHED and " " <= character <= "~":
                yield "char", position, character
                position += 1
                continue
            error = _UNFINISHED.get(character) or f"unrecognized character in action: {sharp_u(character)}"
            yield "error", position, error
            return position, 0
        kind, value, end = match.lastgroup, match[0], match.end()
        error = ""
        if kind == "space" and text.startswith("-}}", end):
            end -= 1  # the last space belongs to the delimiter
            if end == position:
                yield "}}", position + 2, "}}"
                return position + 4, 4
        elif kind == "open":
            parentheses += 1
        elif kind == "close":
            parentheses -= 1
            error = "unexpected right paren" if parentheses < 0 else ""
        elif kind == "number":
            kind, end, error = _lex_number(text, position, end)
        elif kind in ("word", "field", "variable"):
            if not value.isascii():
                end = position + (kind != "word")
                while end < len(text) and _is_alphanumeric(text[end]):
                    end += 1
            if end == position:
                error = f"unrecognized character in action: {sharp_u(text[end])}"
            elif not (text[end:end + 1] in ("", " ", "\t", "\r", "\n", *".,|:()") or text.startswith("}}", end)):
                error = f"bad character {sharp_u(text[end])}"
            value = text[position:end]
            if kind == "word":
                kind = value if value in keywords else "bool" if value in ("true", "false") else "identifier"
            elif value == ".":
                kind = "dot" if end < len(text) else "number"
        if error:
            yield "error", position, error
            return position, 0
        yield kind, position, text[position:end]
        position = end


def _is_alphanumeric(character: str) -> bool:
    return character == "_" or character.isalpha() or character.isdecimal()


def _lex_number(text: str, position: int, end: int) -> tuple[str, int, str]:
    """Kind, end and error of the number that begins at position; its first part ends at end."""
    kind = "number"
    if text[end:end + 1] in ("+", "-"):  # 1+2i: no space, and the second part must be imaginary
        kind, end = "complex", _action_token(text, end).end()
    if text[end:end + 1] and _is_alphanumeric(text[end]):
        end += 1
    elif kind == "number" or text[end - 1] == "i":
        return kind, end, ""
    return kind, end, f"bad number syntax: {quote(text[position:end])}"


# ---- syntax tree --------------------------------------------------------------------------------------
# Every node knows its position in the text and prints itself (show), so that each error can quote its piece.
# show() is a plain recursion in Python: deep trees must not use up the C stack.

class _Text:
    """Literal text."""

    __slots__ = ("position", "text")

    def __init__(self, position: int, text: str) -> None:
        self.position, self.text = position, text

    def show(self) -> str:
        """The text itself."""
        return self.text


class _Jump(_Text):
    """{{break}}, {{continue}}; for the parser also {{else}} and {{end}}. text is the keyword."""

    __slots__ = ()

    def show(self) -> str:
        """The action, as Go prints it."""
        return "{{" + self.text + "}}"


class _Word(_Text):
    """An operand in one word: kind dot, nil, bool, number, string, identifier, field or variable.

    value is the constant, or the tuple of names of a field (.a.b) or variable ($x.a).
    """

    __slots__ = ("kind", "value")

    def __init__(self, position: int, text: str, kind: str, value: Any = None) -> None:
        super().__init__(position, text)
        self.kind, self.value = kind, value


class _Chain:
    """Fields of a parenthesized pipeline or of a function's result: (pipe).a.b"""

    __slots__ = ("position", "base", "fields")

    def __init__(self, position: int, base: Any, fields: tuple[str, ...]) -> None:
        self.position, self.base, self.fields = position, base, fields

    def show(self) -> str:
        """The base, and its fields."""
        base = self.base.show()
        return ".".join([f"({base})" if type(self.base) is _Pipe else base, *self.fields])


class _Command:
    """Operands side by side: a function or a field with its arguments, or a single value."""

    __slots__ = ("position", "words")

    def __init__(self, position: int) -> None:
        self.position = position
        self.words: list[Any] = []

    def show(self) -> str:
        """The operands, parentheses restored."""
        shown = []
        for word in self.words:
            text = word.show()
            shown.append(f"({text})" if type(word) is _Pipe else text)
        return " ".join(shown)


class _Pipe:
    """Commands joined by |, with the variables that get the result: names, and whether by = instead of :=."""

    __slots__ = ("position", "names", "assign", "commands")

    def __init__(self, position: int) -> None:
        self.position = position
        self.names: list[str] = []
        self.assign = False
        self.commands: list[_Command] = []

    def show(self) -> str:
        """Declarations and commands."""
        shown = []
        for command in self.commands:
            shown.append(command.show())
        names = ", ".join(self.names)
        return (names + (" = " if self.assign else " := ") if names else "") + " | ".join(shown)


class _Action:
    """{{pipe}}"""

    __slots__ = ("position", "pipe")

    def __init__(self, position: int, pipe: _Pipe) -> None:
        self.position, self.pipe = position, pipe

    def show(self) -> str:
        """The action in its delimiters."""
        return "{{" + self.pipe.show() + "}}"


class _Branch:
    """{{if}}, {{with}} or {{range}} (keyword), with its body and what follows {{else}} (or None)."""

    __slots__ = ("position", "keyword", "pipe", "body", "otherwise")

    def __init__(self, position: int, keyword: str, pipe: _Pipe, body: list[Any], otherwise: list[Any] | None) -> None:
        self.position, self.keyword, self.pipe, self.body, self.otherwise = position, keyword, pipe, body, otherwise

    def show(self) -> str:
        """The whole of it, from {{if}} to {{end}}."""
        parts = ["{{" + self.keyword + " " + self.pipe.show() + "}}"]
        for node in self.body:
            parts.append(node.show())
        if self.otherwise is not None:
            parts.append("{{else}}")
            for node in self.otherwise:
                parts.append(node.show())
        return "".join(parts) + "{{end}}"


class _Invoke:
    """{{template "name" pipe}}"""

    __slots__ = ("position", "name", "pipe")

    def __init__(self, position: int, name: str, pipe: _Pipe | None) -> None:
        self.position, self.name, self.pipe = position, name, pipe

    def show(self) -> str:
        """The action in its delimiters."""
        return "{{template " + quote(self.name) + (f" {self.pipe.show()}" if self.pipe else "") + "}}"


# ---- constants ----------------------------------------------------------------------------------------

class _Number:
    """A numeric constant as Go keeps it: untyped, with every representation that is exact (None where none is)."""

    __slots__ = ("integer", "floating", "complex", "ideal")

    def __init__(self, text: str, kind: str) -> None:
        self.integer: int | None = None
        self.floating: float | None = None
        self.complex: complex | None = None
        if kind == "character":
            self.integer = _parse_rune(text)
            self.floating = float(self.integer)
        elif kind == "complex" or text.endswith("i"):
            self._read_complex(text, kind)
        else:
            self._read_real(text)
        if self.integer is None and self.floating is None and self.complex is None:
            raise ValueError(f"illegal number syntax: {quote(text)}")
        self.ideal = self._choose(text, kind)

    def _read_complex(self, text: str, kind: str) -> None:
        parts = [text[:-1]]
        if kind == "complex":
            match = re.fullmatch(f"({_FLOAT})([+-](?!i){_FLOAT})i", text)
            if not match:
                raise ValueError("syntax error scanning complex number")
            parts = [match[1], match[2]]
        values = [0.0]
        for part in parts:
            value = _parse_float(part)
            if value is None and kind == "complex":
                wrong = "invalid syntax" if _reads_float(part) is None else "value out of range"
                raise ValueError(f"strconv.ParseFloat: parsing {quote(part)}: {wrong}")
            if value is None:
                return
            values.append(value)
        real, imaginary = values[-2:]
        self.complex = complex(real, imaginary)
        if not imaginary:
            self._take_float(real)

    def _read_real(self, text: str) -> None:
        integer = _parse_integer(text)
        if integer is not None and -1 << 63 <= integer < 1 << 64 - (text[0] == "+"):
            self.integer, self.floating = integer, float(integer)
        elif (floating := _parse_float(text)) is not None:
            if not any(letter in text for letter in ".eEpP"):  # a huge number that fits no integer
                raise ValueError(f"integer overflow: {quote(text)}")
            self._take_float(floating)

    def _take_float(self, floating: float) -> None:
        self.floating = floating
        if abs(floating) < 1 << 63 and floating == int(floating):
            self.integer = int(floating)

    def _choose(self, text: str, kind: str) -> Any:
        """The value where no type asks for another: complex, float if it looks like one, else int; None: too large."""
        if self.complex is not None:
            return self.complex
        hexadecimal = text[:2].lower() == "0x" and not any(letter in text for letter in "pP")
        looks_float = kind != "character" and not hexadecimal and any(letter in text for letter in ".eEpP")
        if looks_float:
            return self.floating
        return self.integer if self.integer is None or self.integer < 1 << 63 else None


def _parse_rune(text: str) -> int:
    """The code point of a character constant in its quotes."""
    try:
        rune = ord(unquote(text))
    except ValueError:
        for end in range(2, len(text)):  # one good character, and more behind it?
            try:
                unquote(text[:end] + "'")
            except ValueError:
                continue
            raise ValueError(f"malformed character constant: {text}") from None
        raise
    return rune - 0xDC00 if 0xDC80 <= rune <= 0xDCFF else rune  # \xff is the number 255


def _parse_integer(text: str) -> int | None:
    """strconv.ParseInt(text, 0, 64) without its range: a leading 0 means octal, _ may separate digits."""
    sign, digits = (text[:1], text[1:]) if text[:1] in ("+", "-") else ("", text)
    if len(digits) > 1 and digits[0] == "0" and digits[1] in "01234567_":
        digits = "0o" + digits[1:]
    if not digits[:1].isdigit():
        return None
    try:
        return int(sign + digits, 0)
    except ValueError:
        return None


_FLOAT = (r"[+-]?(?:0[xX][0-9a-fA-F_]*(?:\.[0-9a-fA-F_]*)?(?:[pP][+-]?[0-9_]*)?"
          r"|[0-9_]*(?:\.[0-9_]*)?(?:[eE][+-]?[0-9_]*)?)")


def _parse_float(text: str) -> float | None:
    """strconv.ParseFloat: decimal or hexadecimal (which needs its p exponent); None for bad syntax or overflow."""
    value = _reads_float(text)
    return None if value is None or value in (float("inf"), float("-inf")) else value


def _reads_float(text: str) -> float | None:
    """As _parse_float, but an overflow is an infinity."""
    try:
        if "0x" not in text.lower():
            return float(text) if text[:1] in "+-.0123456789" else None
        if "p" not in text.lower() or re.search("[^0-9a-fA-FxX]_|_(?![0-9a-fA-F])", text):
            return None
        return float.fromhex(text.replace("_", ""))
    except OverflowError:
        return float("-inf" if text[0] == "-" else "inf")
    except ValueError:
        return None


# ---- parser -------------------------------------------------------------------------------------------

_MAX_PARENTHESES = 10000  # Go's own bound
_OPERANDS = frozenset(("bool", "character", "complex", "dot", "field", "identifier", "number", "nil", "raw",
                       "string", "variable", "open"))
_PRINTED_AS_WORD = _KEYWORDS | {"dot"}


class _Parser:
    """Recursive descent over the tokens (text/template/parse/parse.go). trees: one list of nodes a template name."""

    def __init__(self, text: str, name: str, functions: Mapping[str, Any]) -> None:
        self.text, self.name, self.functions = text, name, functions
        self.tokens = _lex(text, _KEYWORDS - ({"break", "continue"} & functions.keys()))
        self.trees: dict[str, list[Any]] = {}
        self.calls: list[tuple[str, tuple[str | None, ...], int]] = []  # function, constant arguments, position
        self.ahead: list[tuple[str, int, str]] = []  # tokens put back; the next one is the last
        self.latest: tuple[str, int, str] = ("EOF", 0, "")  # read last from the lexer: errors name its line
        self.variables = ["$"]
        self.ranges = 0  # how many {{range}} are open
        self.parentheses = 0
        self.action_start = -1  # the position of the action that is read now

    # -- tokens --

    def next(self) -> tuple[str, int, str]:
        """The next token."""
        if self.ahead:
            return self.ahead.pop()
        self.latest = next(self.tokens, self.latest)
        return self.latest

    def peek(self) -> tuple[str, int, str]:
        """The next token, left in place."""
        if not self.ahead:
            self.ahead.append(self.next())
        return self.ahead[-1]

    def next_word(self) -> tuple[str, int, str]:
        """The next token that is not space."""
        while (token := self.next())[0] == "space":
            pass
        return token

    def peek_word(self) -> tuple[str, int, str]:
        """The next token that is not space, left in place; the space before it is gone."""
        token = self.next_word()
        self.ahead.append(token)
        return token

    def line_of(self, position: int) -> int:
        """The line of a position, from 1 on."""
        return 1 + self.text.count("\n", 0, position)

    def fail(self, message: str) -> NoReturn:
        """Raise a parse error at the line of the token that was read last."""
        raise TemplateError(f"template: {self.name}:{self.line_of(self.latest[1])}: {message}", "parse")

    def unexpected(self, token: tuple[str, int, str], context: str) -> NoReturn:
        """Raise Go's error for a token that cannot stand here."""
        kind, position, text = token
        if kind == "error":
            if self.action_start >= 0 and self.line_of(self.action_start) != self.line_of(position):
                started = f" in action started at {self.name}:{self.line_of(self.action_start)}"
                text += started[len(" in action"):] if text.endswith(" action") else started
            self.fail(text)
        if kind == "EOF":
            shown = "EOF"
        elif kind in _PRINTED_AS_WORD:
            shown = f"<{text}>"
        else:
            shown = quote(text[:10]) + "..." if len(utf8(text)) > 10 else quote(text)
        self.fail(f"unexpected {shown} in {context}")

    def expect(self, kinds: tuple[str, ...], context: str) -> tuple[str, int, str]:
        """The next word, which must be of one of these kinds."""
        token = self.next_word()
        if token[0] not in kinds:
            self.unexpected(token, context)
        return token

    def unquoted(self, token: tuple[str, int, str]) -> str:
        """The value of a string token."""
        try:
            return unquote(token[2])
        except ValueError as error:
            self.fail(str(error))

    # -- the grammar, from the outside in --

    def parse(self) -> None:
        """Fill trees."""
        root: list[Any] = []
        while self.peek()[0] != "EOF":
            delimiter = self.next()
            if delimiter[0] == "{{":
                word = self.next_word()
                if word[0] == "define":
                    self.definition()
                    continue
                self.ahead.append(word)
            self.ahead.append(delimiter)
            node = self.text_or_action()
            if type(node) is _Jump and node.text in ("end", "else"):
                self.fail(f"unexpected {node.show()}")
            root.append(node)
        self.add(self.name, root)

    def definition(self) -> None:
        """{{define "name"}} ... {{end}}"""
        name = self.unquoted(self.expect(("string", "raw"), "define clause"))
        self.expect(("}}",), "define clause")
        self.add(name, self.separate_body("define clause"))

    def separate_body(self, context: str) -> list[Any]:
        """A list of nodes up to {{end}} that sees no variable of its surroundings: define and block."""
        outside = self.variables, self.ranges, self.action_start
        latest = self.latest
        self.variables, self.ranges, self.action_start = ["$"], 0, -1
        body, end = self.nodes()
        if end.text != "end":
            if context == "block clause":
                self.latest = latest  # Go tells the line where the block begins
            self.fail(f"unexpected {end.show()} in {context}")
        self.variables, self.ranges, self.action_start = outside
        return body

    def add(self, name: str, tree: list[Any]) -> None:
        """Put a template into trees; of two with one name, one must be empty."""
        if not _is_empty(self.trees.get(name, [])):
            if not _is_empty(tree):
                self.fail(f"template: multiple definition of template {quote(name)}")
            return
        self.trees[name] = tree

    def nodes(self) -> tuple[list[Any], _Jump]:
        """The nodes up to {{end}} or {{else}}, and that."""
        found: list[Any] = []
        while self.peek_word()[0] != "EOF":
            node = self.text_or_action()
            if type(node) is _Jump and node.text in ("end", "else"):
                return found, node
            found.append(node)
        self.fail("unexpected EOF")

    def text_or_action(self) -> Any:
        """One node."""
        token = self.next_word()
        kind, position, text = token
        if kind == "text":
            return _Text(position, text)
        if kind != "{{":
            self.unexpected(token, "input")
        self.action_start = position
        node = self.action()
        self.action_start = -1
        return node

    def action(self) -> Any:
        """What stands behind a left delimiter."""
        token = self.next_word()
        kind, position, _ = token
        if kind in ("if", "with", "range"):
            return self.branch(position, kind)
        if kind in ("break", "continue"):
            if (wrong := self.next_word())[0] != "}}":
                self.unexpected(wrong, "{{" + kind + "}}")
            if not self.ranges:
                self.fail("{{" + kind + "}} outside {{range}}")
            return _Jump(position, kind)
        if kind == "end":
            return _Jump(self.expect(("}}",), "end")[1], "end")
        if kind == "else":
            following = self.peek_word()
            if following[0] not in ("if", "with"):  # {{else if}} is {{else}}{{if}} with one {{end}}: see branch
                self.expect(("}}",), "else")
            return _Jump(following[1], "else")
        if kind in ("block", "template"):
            return self.invocation(kind)
        self.ahead.append(token)
        return _Action(position, self.pipeline("command", "}}"))

    def branch(self, position: int, keyword: str) -> _Branch:
        """{{if}}, {{with}}, {{range}}, up to the {{end}}"""
        mark = len(self.variables)
        pipe = self.pipeline(keyword, "}}")
        self.ranges += keyword == "range"
        body, end = self.nodes()
        self.ranges -= keyword == "range"
        otherwise: list[Any] | None = None
        if end.text == "else":
            following = self.peek()
            if keyword in ("if", "with") and following[0] == keyword:
                self.next()
                otherwise = [self.branch(following[1], keyword)]
            else:
                otherwise, end = self.nodes()
                if end.text != "end":
                    self.fail(f"expected end; found {end.show()}")
        del self.variables[mark:]
        return _Branch(pipe.position, keyword, pipe, body, otherwise)

    def invocation(self, keyword: str) -> _Invoke:
        """{{template "name" pipe}}, and {{block "name" pipe}} ... {{end}} which also defines the template"""
        context = f"{keyword} clause"
        token = self.expect(("string", "raw"), context)
        name = self.unquoted(token)
        pipe = None
        if keyword == "block" or self.peek_word()[0] != "}}":
            pipe = self.pipeline(context, "}}")
        else:
            self.next()
        if keyword == "block":
            self.add(name, self.separate_body(context))
        return _Invoke(token[1], name, pipe)

    def pipeline(self, context: str, end: str) -> _Pipe:
        """Declarations and commands, up to and including the token that ends them."""
        pipe = _Pipe(self.peek_word()[1])
        self.declarations(pipe, context)
        while True:
            token = self.next_word()
            if token[0] == end:
                break
            if token[0] not in _OPERANDS:
                self.unexpected(token, context)
            self.ahead.append(token)
            pipe.commands.append(self.command())
        if not pipe.commands:
            self.fail(f"missing value for {context}")
        for stage, command in enumerate(pipe.commands[1:], 2):
            first = command.words[0]
            if type(first) is _Word and first.kind in ("bool", "dot", "nil", "number", "string"):
                self.fail(f"non executable command in pipeline stage {stage}")
        return pipe

    def declarations(self, pipe: _Pipe, context: str) -> None:
        """`$x :=`, `$x =` and, for range, `$i, $x :=`"""
        while (variable := self.peek_word())[0] == "variable":
            self.next()
            behind = self.peek()
            token = self.peek_word()
            if token[0] in ("assign", "declare") or token[2] == "," and token[0] == "char":
                self.next_word()
                pipe.names.append(variable[2])
                self.variables.append(variable[2])
                if token[0] != "char":
                    pipe.assign = token[0] == "assign"
                    return
                if context != "range" or len(pipe.names) > 1:
                    self.fail(f"too many declarations in {context}")
                if self.peek_word()[0] not in ("variable", "}}", "close"):
                    self.fail("range can only initialize variables")
                continue
            if behind[0] == "space":
                self.ahead.append(behind)  # it separates the variable from what follows
            self.ahead.append(variable)
            return

    def command(self) -> _Command:
        """Operands up to a | (which is read) or the end of the pipeline (which is not)."""
        command = _Command(self.peek_word()[1])
        while True:
            self.peek_word()
            operand = self.operand()
            if operand is not None:
                command.words.append(operand)
            token = self.next()
            if token[0] == "space":
                continue
            if token[0] in ("}}", "close"):
                self.ahead.append(token)
            elif token[0] != "pipe":
                self.unexpected(token, "operand")
            break
        if not command.words:
            self.fail("empty command")
        first = command.words[0]
        if type(first) is _Word and first.kind == "identifier":
            constants = tuple(word.value if type(word) is _Word and word.kind == "string" else None
                              for word in command.words[1:])
            self.calls.append((first.text, constants, first.position))
        return command

    def operand(self) -> Any:
        """A term with the fields that follow it; None if no operand stands here."""
        term = self.term()
        if term is None or self.peek()[0] != "field":
            return term
        position = self.peek()[1]
        text = ""
        while self.peek()[0] == "field":
            text += self.next()[2]
        fields = tuple(text[1:].split("."))
        if type(term) is not _Word or term.kind == "identifier":
            return _Chain(position, term, fields)
        if term.kind in ("field", "variable"):
            return _Word(position, term.text + text, term.kind, term.value + fields)
        self.fail(f"unexpected . after term {quote(term.show())}")

    def term(self) -> Any:
        """A constant, dot, field, variable, function or parenthesized pipeline; None if it is none of them."""
        token = self.next_word()
        kind, position, text = token
        if kind == "identifier":
            if text not in self.functions:
                self.fail(f"function {quote(text)} not defined")
            return _Word(position, text, kind)
        if kind == "field":
            return _Word(position, text, kind, (text[1:],))
        if kind == "variable":
            if text not in self.variables:
                self.fail(f"undefined variable {quote(text)}")
            return _Word(position, text, kind, (text,))
        if kind in ("dot", "nil"):
            return _Word(position, text, kind)
        if kind == "bool":
            return _Word(position, text, kind, text == "true")
        if kind in ("string", "raw"):
            return _Word(position, text, "string", self.unquoted(token))
        if kind in ("number", "complex", "character"):
            try:
                return _Word(position, text, "number", _Number(text, kind))
            except ValueError as error:
                self.fail(str(error))
        if kind == "open":
            if self.parentheses >= _MAX_PARENTHESES:
                self.fail("max expression depth exceeded")
            self.parentheses += 1
            pipe = self.pipeline("parenthesized pipeline", "close")
            self.parentheses -= 1
            return pipe
        self.ahead.append(token)
        return None


def _is_empty(tree: list[Any]) -> bool:
    """Whether a template has nothing but space in it: such a one yields to another of its name."""
    return all(type(node) is _Text and not node.text.strip(_SPACE + "\v\f\x85\xa0") for node in tree)


# ---- what compiled templates call ---------------------------------------------------------------------
# Values in here may be INVALID (Go's zero reflect.Value: a missing key) or None (a nil interface). A ValueError
# becomes `error calling NAME: ...`, a _Failure stands for itself.

def _fail(message: str) -> NoReturn:
    raise _Failure(message)


def _field(receiver: Any, name: str, origin: Any, missingkey: str) -> Any:
    """.name of a value (exec.go evalField). origin: the list or map that the value came out of, or None."""
    if receiver is INVALID:
        return _fail(f"nil data; no entry for key {quote(name)}") if missingkey == "error" else INVALID
    if receiver is None:
        _fail(f"nil pointer evaluating interface {{}}.{name}")
    kind = type(receiver)
    if name in GO_METHODS.get(kind, ()):
        method = _method(receiver, name)
        return method() if method else INVALID
    if name in GO_FIELDS.get(kind, ()):
        return getattr(receiver, name)
    if isinstance(receiver, dict):
        value = receiver.get(name, INVALID)
        if value is INVALID and missingkey == "error":
            _fail(f"map has no entry for key {quote(name)}")
        return None if value is INVALID and missingkey == "zero" else value
    _fail(f"can't evaluate field {name} in type "
          + ("interface {}" if type(origin) in (list, dict) else go_type(receiver)))


def _method(receiver: Any, name: str, origin: Any = None, missingkey: str = "") -> Callable[..., Any] | None:
    """The method of a value as a function that checks its arguments; a field or key cannot take arguments.

    None for a value that is not there: it is nothing again, whatever its arguments.
    """
    function = GO_METHODS.get(type(receiver), {}).get(name)
    if function is None:
        if name in GO_FIELDS.get(type(receiver), ()):
            _fail(f"{name} has arguments but cannot be invoked as function")
        if isinstance(receiver, dict):
            _fail(f"{name} is not a method but has arguments")
        _field(receiver, name, origin, missingkey)
        return None

    def call(*arguments: Any) -> Any:
        if error := _wrong_count(function, len(arguments)):
            _fail(error)
        wanted = [*function.params, *function.params[-1:] * len(arguments)]
        converted = [_convert(value, type_name) for value, type_name in zip(arguments, wanted, strict=False)]
        try:
            return function.call(receiver, *converted)
        except Exception as error:
            _fail(f"error calling {name}: {error}")
    return call


def _wrong_count(function: Func, got: int, shown: int | None = None) -> str:
    """Go's error for a wrong number of arguments, or ""."""
    wanted = len(function.params)
    if function.variadic:
        if got < wanted - 1:
            shown = got if shown is None else shown
            return f"wrong number of args for {function.name}: want at least {wanted - 1} got {shown}"
    elif got != wanted:
        return f"wrong number of args for {function.name}: want {wanted} got {got}"
    return ""


_NILLABLE: dict[str, Callable[[], Any]] = {  # Go types that nil converts to, and what a nil one is here
    "any": lambda: None, "value": lambda: INVALID, "[]string": Strings, "[]int": Ints,
    "[]interface {}": list, "map[string]interface {}": dict,
}


def _convert(value: Any, wanted: str) -> Any:
    """A value as an argument of a Go type (exec.go validateType): no conversion but nil's, only a check."""
    if value is INVALID:
        return _NILLABLE[wanted]() if wanted in _NILLABLE else _fail(f"invalid value; expected {wanted}")
    if wanted in ("any", "value"):
        return value
    found = "interface {}" if value is None else go_type(value)
    if found != wanted:
        _fail(f"wrong type for value; expected {wanted}; got {found}")
    return value


def _elements(value: Any) -> Sequence[Any]:
    """What {{range}} visits: the elements of a list, the values of a map by the order of its keys, 0..n-1 of an int."""
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        return [value[key] for key in bytewise(value)]
    if value is INVALID or value is None:
        return ()
    if isinstance(value, int) and not isinstance(value, bool):
        kind = type(value)
        return range(value) if kind is int else [kind(number) for number in range(value)]
    _fail(f"range can't iterate over {print_value(value)}")


def _items(value: Any) -> Sequence[tuple[Any, Any]]:
    """As _elements, each with its index or key."""
    if isinstance(value, dict):
        return [(key, value[key]) for key in bytewise(value)]
    if isinstance(value, int) and not isinstance(value, bool):
        _fail(f"can't use {value} to iterate over more than one variable")
    return list(enumerate(_elements(value)))



# ---- Go's own functions -------------------------------------------------------------------------------

_BASIC_KINDS = {bool: "bool", Uint8: "uint", int: "int", float: "float", complex: "complex", str: "string"}


def _basic_kind(value: Any) -> str | None:
    kind = type(value)
    if kind in _BASIC_KINDS:
        return _BASIC_KINDS[kind]
    return next((name for base, name in _BASIC_KINDS.items() if isinstance(value, base)), None)


def _equal(first: Any, *others: Any) -> bool:
    """eq: whether the first argument equals any of the others."""
    if not others:
        raise ValueError("missing argument for comparison")
    return any(_equal_two(first, other) for other in others)


def _equal_two(one: Any, other: Any) -> bool:
    if type(one) is type(other) and type(one) in _BASIC_KINDS:
        return bool(one == other)
    kind, other_kind = _basic_kind(one), _basic_kind(other)
    none, other_none = one is INVALID or one is None, other is INVALID or other is None
    if kind == other_kind and kind is not None or {kind, other_kind} == {"int", "uint"}:
        return bool(one == other)
    if none or other_none:
        return none and other_none
    if kind != other_kind:
        raise ValueError(f"incompatible types for comparison: {go_type(one)} and {go_type(other)}")
    if _shape(one) is not _shape(other):
        raise ValueError("non-comparable types " + sprintf("%s: ", one) + f"{go_type(one)}, {go_type(other)}: "
                         + sprintf("%v", other))
    if isinstance(other, (list, dict)):
        raise ValueError("non-comparable type " + sprintf("%s: ", other) + go_type(other))
    return bool(type(one) is type(other) and one == other)


def _shape(value: Any) -> type:
    return next((kind for kind in (list, dict) if isinstance(value, kind)), object)


def _not_equal(one: Any, other: Any) -> bool:
    """ne"""
    return not _equal_two(one, other)


def _less(one: Any, other: Any) -> bool:
    """lt: numbers of one kind by value, strings by their bytes."""
    kind, other_kind = _basic_kind(one), _basic_kind(other)
    if kind is None or other_kind is None:
        raise ValueError("invalid type for comparison")
    if kind != other_kind and {kind, other_kind} != {"int", "uint"}:
        raise ValueError(f"incompatible types for comparison: {go_type(one)} and {go_type(other)}")
    if kind in ("bool", "complex"):
        raise ValueError("invalid type for comparison")
    if kind == "string" and not (one.isascii() and other.isascii()):
        return utf8(one) < utf8(other)
    return bool(one < other)


def _less_or_equal(one: Any, other: Any) -> bool:
    """le"""
    return _less(one, other) or _equal_two(one, other)


def _greater(one: Any, other: Any) -> bool:
    """gt: not le, as in Go; so with NaN it is true."""
    return not _less_or_equal(one, other)


def _greater_or_equal(one: Any, other: Any) -> bool:
    """ge: not lt"""
    return not _less(one, other)


_INTERFACE = object()  # stands for an index that Go's slice refuses: see _Compiler.interface


def _position(index: Any, bound: int) -> int:
    """An index or bound for index and slice, 0..bound."""
    if index is INVALID or index is None:
        raise ValueError("cannot index slice/array with nil")
    if isinstance(index, bool) or not isinstance(index, int):
        shown = "interface {}" if index is _INTERFACE else go_type(index)
        raise ValueError(f"cannot index slice/array with type {shown}")
    if not 0 <= index <= bound:
        raise ValueError(f"index out of range: {int(index)}")
    return index


def _index(item: Any, *indexes: Any) -> Any:
    """index: item[i][j]... of maps, lists and strings (whose elements are bytes)."""
    if item is INVALID or item is None:
        raise ValueError("index of untyped nil")
    for index in indexes:
        if item is None:
            raise ValueError("index of nil pointer")
        if isinstance(item, dict):
            if index is INVALID or index is None:
                raise ValueError("value is nil; should be of type string")
            if not isinstance(index, str):
                raise ValueError(f"value has type {go_type(index)}; should be string")
            item = item.get(index)
        elif isinstance(item, str):
            data = utf8(item)
            if _position(index, len(data)) == len(data):
                raise ValueError("reflect: string index out of range")
            item = Uint8(data[index])
        elif isinstance(item, list):
            if _position(index, len(item)) == len(item):
                raise ValueError("reflect: slice index out of range")
            item = item[index]
        else:
            raise ValueError(f"can't index item of type {go_type(item)}")
    return item


def _slice(item: Any, *indexes: Any) -> Any:
    """slice: item[i:j:k] of lists and strings (by bytes)."""
    if item is INVALID or item is None:
        raise ValueError("slice of untyped nil")
    if len(indexes) > 3:
        raise ValueError(f"too many slice indexes: {len(indexes)}")
    data: Any = item
    if isinstance(item, str):
        if len(indexes) == 3:
            raise ValueError("cannot 3-index slice a string")
        data = utf8(item)
    elif not isinstance(item, list):
        raise ValueError(f"can't slice item of type {go_type(item)}")
    size = len(data)
    # A list that Go read from JSON has room for the next power of two, and nil there.
    room = 1 << (size - 1).bit_length() if type(item) is list and 0 < size <= 256 else size
    bounds = [0, size]
    bounds[:len(indexes)] = [_position(index, room) for index in indexes]
    for low, high in zip(bounds, bounds[1:], strict=False):
        if low > high:
            raise ValueError(f"invalid slice index: {low} > {high}")
    if isinstance(data, bytes):
        return go_string(data[bounds[0]:bounds[1]])
    return type(item)((data + [None] * (room - size))[bounds[0]:bounds[1]])


def _length(item: Any) -> int:
    """len of a string (in bytes), list or map."""
    if isinstance(item, str):
        return len(item) if item.isascii() else len(utf8(item))
    if isinstance(item, (list, dict)):
        return len(item)
    if item is None:
        raise ValueError("len of nil pointer")
    if item is INVALID:
        raise ValueError("reflect: call of reflect.Value.Type on zero Value")
    raise ValueError(f"len of type {go_type(item)}")


def _call(shown: str | None, function: Any, *arguments: Any) -> Any:
    """call: no value in a template is a function, so this is always an error, and Go's."""
    if function is INVALID or function is None:
        raise ValueError("call of nil")
    if shown is None:  # it came out of a pipe
        shown = function if isinstance(function, str) else f"<{go_type(function)} Value>"
    raise ValueError(f"non-function {shown} of type {go_type(function)}")


BUILTINS = {function.name: function for function in (  # and, or, not are never called: see _Compiler.invocation
    Func("and", _fail, ("value", "value"), True), Func("or", _fail, ("value", "value"), True),
    Func("not", _fail, ("value",), returns="bool"),
    Func("eq", _equal, ("value", "value"), True, "bool"), Func("ne", _not_equal, ("value", "value"), returns="bool"),
    Func("lt", _less, ("value", "value"), returns="bool"),
    Func("le", _less_or_equal, ("value", "value"), returns="bool"),
    Func("gt", _greater, ("value", "value"), returns="bool"),
    Func("ge", _greater_or_equal, ("value", "value"), returns="bool"),
    Func("index", _index, ("value", "value"), True), Func("slice", _slice, ("value", "value"), True),
    Func("len", _length, ("value",), returns="int"), Func("call", _call, ("value", "value"), True),
)}


_SHORT_CIRCUITS = (BUILTINS["and"], BUILTINS["or"])


# ---- compiler -----------------------------------------------------------------------------------------
# A template becomes Python functions, built as syntax trees (never as source text) and compiled once. Of the text
# only constants get in; names are our own, and the code's globals are the table in _Compiler.world: nothing else of
# Python is in reach. Every expression that can fail has a line number of its own, an index into `places`: the line
# in a traceback tells the node, at no cost while nothing fails.

_CODE_NAME = "<template>"
_MAX_TEMPLATE_DEPTH = 100000  # Go's bound for templates that invoke each other
_MAX_NESTING = 12  # deeper blocks and parentheses become functions of their own: Python's compiler has bounds
_STACK = 1_000_000  # Python frames while a template is parsed or runs; they live on the heap
_PYTHON_TYPES = {"string": "str", "int": "int", "bool": "bool", "float64": "float"}
_DIRECTIVE = r"%%|%[-+# 0]*[0-9]{0,3}(?:\.[0-9]{0,3})?[A-Za-z]"  # of printf: what needs no other argument
_SIMPLE_FORMAT = rf"(?:[^%]|{_DIRECTIVE})*"


class _Scope:
    """What a node sees: variables (Go name, number, origin), dot (a Python name) and its origin, nesting.

    origin: the number of the variable that keeps what a {{range}} visits, for values that came out of it; else 0.
    boxed: variables are entries of the dict V, shared by the functions of one template, instead of Python locals.
    loop: how break leaves: "for" (a statement of this function) or "return" (told to the caller).
    """

    __slots__ = ("variables", "dot", "origin", "nesting", "boxed", "loop")

    def __init__(self, boxed: bool) -> None:
        self.variables: list[tuple[str, int, int]] = []
        self.dot, self.origin, self.nesting, self.boxed, self.loop = "dot", 0, 0, boxed, ""

    def inner(self, **changes: Any) -> _Scope:
        """A copy for a block inside, with changes; what it declares is not seen outside."""
        scope = _Scope(self.boxed)
        scope.variables, scope.dot, scope.origin = list(self.variables), self.dot, self.origin
        scope.nesting, scope.loop = self.nesting + 1, self.loop
        for name, value in changes.items():
            setattr(scope, name, value)
        return scope


class _Compiler:
    """Turns the trees of a template into Python functions; see compile()."""

    def __init__(self, trees: Mapping[str, list[Any]], functions: Mapping[str, Func], missingkey: str) -> None:
        self.trees, self.functions, self.missingkey = trees, functions, missingkey
        self.entries: dict[str, str] = {}  # by template name: the function's
        self.places: list[tuple[Any, str, str]] = [(None, "", "")]  # by line: node, template, function called
        self.tree = ""  # the template that is compiled now
        self.last_origin: Any = None  # what the fields came out of that were compiled last
        self.serial = self.temporary = 0
        self.lasts: dict[Any, Any] = {}
        self.stops: dict[Any, int] = {}  # by `and` or `or`: the variable that counts its operands
        self.known_names: dict[tuple[str, Any], Any] = {}
        self.definitions: list[Any] = []
        self.load, self.store = ast.Load(), ast.Store()
        self.world: dict[str, Any] = {
            "__builtins__": {}, "INVALID": INVALID, "KVPair": KVPair, "type": type, "dict": dict, "str": str,
            "int": int, "bool": bool, "float": float, "fail": _fail, "convert": _convert, "elements": _elements,
            "items": _items, "show": print_value, "put": dict.__setitem__, "equal": _equal_two,
            "field": lambda receiver, name, origin: _field(receiver, name, origin, missingkey),
            "method": lambda receiver, name, origin: _method(receiver, name, origin, missingkey),
            "within": lambda value, origin: (
                _INTERFACE if type(origin) in (list, dict) and value is not INVALID else value),
            "form": lambda form, value: sprintf(form, None if value is INVALID else value),
        }

    def compile(self) -> dict[str, Any]:
        """The functions, by template name; each takes (out, dot, depth) and calls out with pieces of text."""
        self.entries = {name: f"template{number}" for number, name in enumerate(self.trees)}
        for name, tree in self.trees.items():
            self.tree = name
            scope = _Scope(boxed=_nesting(tree) > _MAX_NESTING)
            scope.variables.append(("$", self.number(), 0))
            body = [self.make(ast.Assign, 0, [self.name("V", self.store)], self.make(ast.Dict, 0, [], []))]
            body = body if scope.boxed else []
            body.append(self.make(ast.Expr, 0, self.keep(scope, scope.variables[0][1], self.name("dot"))))
            self.nodes(tree, scope, body)
            self.define(self.entries[name], ("out", "dot", "depth"), body)
        module = ast.Module(self.definitions, [])
        exec(compile(module, _CODE_NAME, "exec", dont_inherit=True), self.world)
        return {name: self.world[entry] for name, entry in self.entries.items()}

    # -- pieces of Python --

    def number(self) -> int:
        """A number that no other variable or function of this template has."""
        self.serial += 1
        return self.serial

    def place(self, node: Any, function: str = "") -> int:
        """The line number that stands for a node (and the function that is called there)."""
        self.places.append((node, self.tree, function))
        return len(self.places) - 1

    def make(self, kind: Any, line: int, *fields: Any) -> Any:
        """A syntax tree node on a line."""
        made = kind(*fields)
        made.lineno, made.col_offset = line or 1, 0
        return made

    def name(self, name: str, context: Any = None) -> Any:
        """A name, to be read unless context says otherwise."""
        key = name, context or self.load
        if key not in self.known_names:  # one node serves everywhere: this halves the cost of a big template
            self.known_names[key] = self.make(ast.Name, 0, *key)
        return self.known_names[key]

    def constant(self, value: Any) -> Any:
        """A constant."""
        return self.make(ast.Constant, 0, value)

    def call(self, function: str, *arguments: Any, line: int = 0) -> Any:
        """A call of a function of the world."""
        return self.make(ast.Call, line, self.name(function), list(arguments), [])

    def last(self, node: Any) -> Any:
        """The node that Go touches last when it evaluates this one: errors that come after are reported there.

        Where that is an operand of `and` or `or`, it is (number, nodes): only the run can tell, see invocation().
        """
        outer = node
        while type(node) not in (_Word, tuple):
            if node in self.lasts:  # deep parentheses ask again at each level
                node = self.lasts[node]
            elif type(node) is _Pipe:
                node = node.commands[-1]
            elif type(node) is _Chain:
                node = node.base
            else:
                first = node.words[0]
                if type(first) is not _Word or first.kind != "identifier":
                    node = first
                elif self.functions[first.text] in _SHORT_CIRCUITS and len(node.words) > 2:
                    node = self.stops.setdefault(node, self.number()), [self.last(word) for word in node.words[1:]]
                else:
                    node = node.words[-1]
        self.lasts[outer] = node
        return node

    def fail(self, message: str, node: Any) -> Any:
        """An expression that raises Go's error at a node."""
        return self.call("fail", self.constant(message), line=self.place(node))

    def bind(self, value: Any) -> tuple[Any, Any]:
        """An expression that keeps its value in a local name until the end of the statement, and that name."""
        self.temporary += 1
        name = f"t{self.temporary}"
        return self.make(ast.NamedExpr, 0, self.name(name, self.store), value), self.name(name)

    def either(self, test: Any, then: Any, otherwise: Any) -> Any:
        """`then if test else otherwise`"""
        return self.make(ast.IfExp, 0, test, then, otherwise)

    def compare(self, left: Any, operator: Any, right: Any) -> Any:
        """`left operator right`"""
        return self.make(ast.Compare, 0, left, [operator], [right])

    def has_type(self, value: Any, type_name: str) -> Any:
        """`type(value) is type_name`"""
        return self.compare(self.call("type", value), ast.Is(), self.name(type_name))

    def sequence(self, first: Any, then: Any) -> Any:
        """Evaluate both in this order, give the second."""
        pair = self.make(ast.Tuple, 0, [first, then], self.load)
        return self.make(ast.Subscript, 0, pair, self.constant(1), self.load)

    def define(self, name: str, parameters: Sequence[str], body: list[Any]) -> None:
        """Add a function to the module."""
        arguments = ast.arguments([], [self.make(ast.arg, 0, parameter, None) for parameter in parameters],
                                  None, [], [], None, [])
        body = body or [self.make(ast.Pass, 0)]
        function = self.make(ast.FunctionDef, 0, name, arguments, body, [], None, None)
        function.type_params = []
        self.definitions.append(function)

    # -- variables --

    def keep(self, scope: _Scope, number: int, value: Any) -> Any:
        """An expression that stores a value in a variable and gives it."""
        if scope.boxed:
            bound, name = self.bind(value)
            return self.sequence(self.call("put", self.name("V"), self.constant(number), bound), name)
        return self.make(ast.NamedExpr, 0, self.name(f"v{number}", self.store), value)

    def find(self, name: str, variables: Sequence[tuple[str, int, int]]) -> int | None:
        """The number of the variable that a name means, the innermost one."""
        return next((number for known, number, _ in reversed(variables) if known == name), None)

    def read(self, scope: _Scope, number: int, line: int = 0) -> Any:
        """The value of a variable."""
        if scope.boxed:
            return self.make(ast.Subscript, line, self.name("V"), self.constant(number), self.load)
        return self.make(ast.Name, line, f"v{number}", self.load)

    def variable(self, word: Any, scope: _Scope) -> tuple[Any, int]:
        """The value of the variable that a word names, and its origin (see _Scope)."""
        for name, number, origin in reversed(scope.variables):
            if name == word.value[0]:
                return self.read(scope, number, self.place(word)), origin
        return self.fail(f"undefined variable: {word.value[0]}", word), 0

    def store_names(self, pipe: _Pipe, value: Any, scope: _Scope) -> Any:
        """The value of a pipeline, stored in the variables that it declares or assigns."""
        for name in pipe.names:
            number = self.find(name, scope.variables) if pipe.assign else self.number()
            if number is None:
                return self.sequence(value, self.fail(f"undefined variable: {name}", self.last(pipe)))
            value = self.keep(scope, number, value)
            if pipe.assign:
                scope.variables = [(*each[:2], 0) if each[1] == number else each for each in scope.variables]
            else:
                scope.variables.append((name, number, 0))
        return value

    # -- statements --

    def nodes(self, nodes: Sequence[Any], scope: _Scope, into: list[Any]) -> None:
        """Append the statements for a list of nodes."""
        for node in nodes:
            kind = type(node)
            self.temporary = 0
            if kind is _Text:
                into.append(self.make(ast.Expr, 0, self.call("out", self.constant(node.text))))
            elif kind is _Action:
                value, type_name = self.pipeline(node.pipe, scope)
                if not node.pipe.names:
                    value = self.call("out", self.shown(value, type_name))
                into.append(self.make(ast.Expr, 0, value))
            elif kind is _Branch:
                (self.range if node.keyword == "range" else self.condition)(node, scope.inner(), into)
            elif kind is _Invoke:
                self.invoke(node, scope, into)
            elif scope.loop == "for":
                into.append(self.make(ast.Break if node.text == "break" else ast.Continue, 0))
            else:
                into.append(self.make(ast.Return, 0, self.constant(node.text)))

    def shown(self, value: Any, type_name: str) -> Any:
        """A value as text, as {{value}} prints it."""
        if type_name == "string":
            return value
        if type_name != "any":
            return self.call("show", value)
        bound, name = self.bind(value)
        return self.either(self.has_type(bound, "str"), name, self.call("show", name))

    def block(self, nodes: Sequence[Any], scope: _Scope, of_range: bool = False) -> list[Any]:
        """The statements of a nested list; where the nesting gets too deep, the call of a function that holds them.

        of_range: it stands behind the {{else}} of a {{range}}, where {{break}} means that range, which is over.
        """
        statements: list[Any] = []
        ends_range = of_range and any(_jumps(node) for node in nodes)
        if not ends_range and (not scope.boxed or scope.nesting % _MAX_NESTING):
            self.nodes(nodes, scope, statements)
            return statements or [self.make(ast.Pass, 0)]
        name = f"block{self.number()}"
        parameters = dict.fromkeys(("out", "dot", scope.dot, "depth", "V"))
        self.nodes(nodes, scope.inner(loop="return"), statements)
        self.define(name, list(parameters), statements)
        call = self.call(name, *map(self.name, parameters))
        if not any(_jumps(node) for node in nodes):
            return [self.make(ast.Expr, 0, call)]
        bound, left = self.bind(call)  # None, "break" or "continue"
        if ends_range:
            bound = self.compare(bound, ast.Eq(), self.constant("continue"))
        if scope.loop == "return":
            leave = self.make(ast.Return, 0, left)
        else:
            leave = self.make(ast.If, 0, self.compare(left, ast.Eq(), self.constant("break")),
                              [self.make(ast.Break, 0)], [self.make(ast.Continue, 0)])
        return [self.make(ast.If, 0, bound, [leave], [])]

    def condition(self, node: _Branch, scope: _Scope, into: list[Any]) -> None:
        """{{if}} and {{with}}: Go's truth is Python's, since INVALID is false and structs are plain objects."""
        value, _ = self.pipeline(node.pipe, scope)
        inside = scope
        if node.keyword == "with":
            inside = scope.inner(dot=f"dot{self.number()}", origin=0, nesting=scope.nesting)
            value = self.make(ast.NamedExpr, 0, self.name(inside.dot, self.store), value)
        body = self.block(node.body, inside.inner(nesting=inside.nesting))
        otherwise = self.block(node.otherwise, scope) if node.otherwise else []
        into.append(self.make(ast.If, 0, value, body, otherwise))

    def range(self, node: _Branch, scope: _Scope, into: list[Any]) -> None:
        """{{range}}: a Python for; with {{else}}, below an if."""
        outside, origin = len(scope.variables), self.number()
        value = self.keep(scope, origin, self.pipeline(node.pipe, scope)[0])
        pairs = len(node.pipe.names) > 1
        things = self.call("items" if pairs else "elements", value, line=self.place(self.last(node.pipe)))
        dot, index = f"dot{self.number()}", f"index{self.number()}"
        inside = scope.inner(dot=dot, origin=origin, loop="for", nesting=scope.nesting)
        if node.pipe.assign:
            numbers = [self.find(name, scope.variables[:outside]) for name in node.pipe.names]
            inside.variables = [(name, number, origin if number == numbers[-1] else old)
                                for name, number, old in inside.variables]
        else:
            declared = inside.variables[len(scope.variables) - len(node.pipe.names):]
            numbers = [number for _, number, _ in declared]
            name, number, _ = inside.variables.pop() if declared else ("", 0, 0)
            inside.variables += [(name, number, origin)] * bool(declared)  # a key or index came out of nothing
        values = [index, dot] if pairs else [dot]
        body = [self.make(ast.Expr, 0, self.keep(inside, number, self.name(value_name)))
                for number, value_name in zip(numbers, values, strict=False) if number is not None]
        body += self.block(node.body, inside)
        target = self.name(dot, self.store)
        if pairs:
            target = self.make(ast.Tuple, 0, [self.name(index, self.store), target], self.store)
        if not node.otherwise:
            into.append(self.make(ast.For, 0, target, things, body, [], None))
            return
        bound, name = self.bind(things)
        loop = self.make(ast.For, 0, target, name, body, [], None)
        into.append(self.make(ast.If, 0, bound, [loop], self.block(node.otherwise, scope, of_range=True)))

    def invoke(self, node: _Invoke, scope: _Scope, into: list[Any]) -> None:
        """{{template}}: a call of another function, one level deeper."""
        if node.name not in self.entries:
            into.append(self.make(ast.Expr, 0, self.fail(f"template {quote(node.name)} not defined", node)))
            return
        too_deep = self.fail(f"exceeded maximum template depth ({_MAX_TEMPLATE_DEPTH})", node)
        at_bound = self.compare(self.name("depth"), ast.Eq(), self.constant(_MAX_TEMPLATE_DEPTH))
        into.append(self.make(ast.If, 0, at_bound, [self.make(ast.Expr, 0, too_deep)], []))
        value = self.pipeline(node.pipe, scope)[0] if node.pipe else self.name("INVALID")
        deeper = self.make(ast.BinOp, 0, self.name("depth"), ast.Add(), self.constant(1))
        call = self.call(self.entries[node.name], self.name("out"), value, deeper, line=self.place(node))
        into.append(self.make(ast.Expr, 0, call))

    # -- expressions: each method gives a Python expression and its Go type, "any" where only the run will tell --

    def pipeline(self, pipe: _Pipe, scope: _Scope) -> tuple[Any, str]:
        """The value of a pipeline; never None, since Go looks into the interface and finds nothing."""
        value, type_name = None, ""
        staged: list[Any] | None = [] if len(pipe.commands) > _MAX_NESTING else None
        before: Any = pipe
        for command in pipe.commands:
            value, type_name = self.command(command, (value, type_name) if type_name else None, scope, before)
            if type_name == "any":
                bound, name = self.bind(value)
                is_nil = self.compare(bound, ast.Is(), self.constant(None))
                value = self.either(is_nil, self.name("INVALID"), name)
            before = command
            if staged is not None:
                staged.append(self.make(ast.Assign, 0, [self.name("value", self.store)], value))
                value = self.name("value")
        if staged is not None:
            value = self.outlined([*staged, self.make(ast.Return, 0, value)], scope)
        return self.store_names(pipe, value, scope), type_name

    def outlined(self, body: list[Any], scope: _Scope) -> Any:
        """The call of a new function with this body: for expressions that are too deep for one."""
        name = f"value{self.number()}"
        parameters = list(dict.fromkeys(("dot", scope.dot, "depth", "V")))
        self.define(name, parameters, body)
        return self.call(name, *map(self.name, parameters))

    def parentheses(self, pipe: _Pipe, scope: _Scope) -> tuple[Any, str]:
        """The value of (pipeline)."""
        scope.nesting += 1
        value, type_name = self.pipeline(pipe, scope)
        if scope.boxed and not scope.nesting % _MAX_NESTING:
            value = self.outlined([self.make(ast.Return, 0, value)], scope)
        scope.nesting -= 1
        return value, type_name

    def command(self, command: _Command, final: tuple[Any, str] | None, scope: _Scope, before: Any) -> tuple[Any, str]:
        """The value of a command; final is what the pipeline hands it as last argument; before: the node until now."""
        first, arguments = command.words[0], command.words[1:]
        given = bool(arguments) or final is not None
        if type(first) is _Word and first.kind == "identifier":
            return self.function(first, command, arguments, final, scope)
        if type(first) is _Chain or type(first) is _Word and (
                first.kind == "field" or first.kind == "variable" and len(first.value) > 1):
            return self.access(first, arguments, final, scope) if given else self.operand(first, scope)
        if given:
            node = first if type(first) is not _Pipe else self.last(before) if type(before) is _Command else before
            failure = self.fail(f"can't give argument to non-function {first.show()}", node)
            if type(first) is _Word and first.kind == "variable":  # one that is not set yet is the first thing wrong
                failure = self.sequence(self.variable(first, scope)[0], failure)
            return (self.sequence(final[0], failure) if final else failure), "any"
        if type(first) is _Word and first.kind == "nil":
            return self.fail("nil is not a command", first), "any"
        return self.operand(first, scope)

    def operand(self, word: Any, scope: _Scope) -> tuple[Any, str]:
        """The value of an operand that gets no arguments."""
        if type(word) is _Pipe:
            return self.parentheses(word, scope)
        if type(word) is _Chain or word.kind in ("field", "variable") and word.value[word.kind == "variable":]:
            receiver, names, origin = self.receiver(word, scope)
            return self.fields(receiver, names, origin, self.last(word))[0], "any"
        if word.kind == "variable":
            return self.variable(word, scope)[0], "any"
        if word.kind == "dot":
            return self.name(scope.dot), "any"
        if word.kind == "identifier":
            return self.function(word, word, [], None, scope)
        if word.kind == "number":
            if word.value.ideal is not None:
                return self.constant(word.value.ideal), go_type(word.value.ideal)
            return self.fail(f"{word.text} overflows int", word), "int"
        return self.constant(word.value), go_type(word.value)

    def receiver(self, word: Any, scope: _Scope) -> tuple[Any, tuple[str, ...], Any]:
        """Where fields start: the value, the names of the fields, an expression for the value's origin."""
        if type(word) is _Chain:
            if type(word.base) is _Word and word.base.kind == "nil":
                value = self.fail(f"indirection through explicit nil in {word.show()}", word)
            else:
                value = self.operand(word.base, scope)[0]
            return value, word.fields, self.constant(None)
        if word.kind == "field":
            return self.name(scope.dot), word.value, self.origin(scope, scope.origin)
        value, origin = self.variable(word, scope)
        return value, word.value[1:], self.origin(scope, origin)

    def origin(self, scope: _Scope, number: int) -> Any:
        """An expression for what a value came out of (see _Scope)."""
        return self.read(scope, number) if number else self.constant(None)

    def fields(self, value: Any, names: Sequence[str], origin: Any, node: Any) -> tuple[Any, Any]:
        """value.name.name... (dict lookups at once, all else through _field), and the origin of that."""
        line = self.place(node, names[-1] if names else "")
        for name in names:
            bound, local = (value, value) if type(value) is ast.Name else self.bind(value)
            slow = self.call("field", local, self.constant(name), origin, line=line)
            if self.missingkey in ("zero", "error"):
                value = self.call("field", bound, self.constant(name), origin, line=line)
            else:
                get = self.make(ast.Attribute, 0, local, "get", self.load)
                fast = self.make(ast.Call, 0, get, [self.constant(name), self.name("INVALID")], [])
                if name in KVPair.__slots__:
                    slot = self.make(ast.Attribute, 0, local, name, self.load)
                    slow = self.either(self.has_type(local, "KVPair"), slot, slow)
                value = self.either(self.has_type(bound, "dict"), fast, slow)
            origin = local
        self.last_origin = origin
        return value, origin

    def access(self, word: Any, arguments: Sequence[Any], final: tuple[Any, str] | None,
               scope: _Scope) -> tuple[Any, str]:
        """Fields, the last of which gets arguments: it must be a method."""
        receiver, names, origin = self.receiver(word, scope)
        value, origin = self.fields(receiver, names[:-1], origin, self.last(word))
        line = self.place(self.last(word), names[-1])
        there, method = self.bind(self.call("method", value, self.constant(names[-1]), origin, line=line))
        values = [self.argument(argument, "any", scope) for argument in arguments]
        bound, name = self.bind(final[0]) if final else (None, None)
        called = self.make(ast.Call, line, method, [*values, name] if final else values, [])
        called = self.either(self.compare(there, ast.Is(), self.constant(None)), self.name("INVALID"), called)
        return self.sequence(bound, called) if final else called, "any"

    def function(self, word: _Word, node: Any, arguments: Sequence[Any], final: tuple[Any, str] | None,
                 scope: _Scope) -> tuple[Any, str]:
        """A function call; node is what an error quotes."""
        function = self.functions[word.text]
        wanted = [*function.params, *function.params[-1:] * (len(arguments) + 1)]
        early, last = None, final[0] if final else None
        sure = all(type(argument) is _Word and argument.kind in ("string", "number", "bool", "dot")
                   and want in ("any", "value", argument.kind)
                   and not (argument.kind == "number" and argument.value.ideal is None)
                   for argument, want in zip(arguments, wanted, strict=False))
        if final and (not sure or function.name in ("and", "or")):  # Go evaluates the earlier command first
            early, last = self.bind(final[0])
        if error := _wrong_count(function, len(arguments) + bool(final), len(arguments)):
            value, type_name = self.fail(error, word), "any"
            early = final[0] if final else None
        else:
            inline = None
            if function is FUNCTIONS.get("printf"):
                inline = self.simple_format(arguments, (last, final[1]) if final else None, scope)
            if inline is not None:
                value = inline
            else:
                values: list[Any] = []
                for argument, want in zip(arguments, wanted, strict=False):
                    value = self.argument(argument, want, scope)
                    if values and function is BUILTINS["slice"]:  # its indexes: Go does not look into interfaces
                        value = self.interface(value, argument, scope)
                    values.append(value)
                if final:
                    at = arguments[-1] if arguments else word
                    values.append(self.converted(last, final[1], wanted[len(arguments)], at))
                value = self.invocation(function, node, values, arguments, scope)
            type_name = function.returns
        return (self.sequence(early, value) if early is not None else value), type_name

    def invocation(self, function: Func, node: Any, values: list[Any], arguments: Sequence[Any], scope: _Scope) -> Any:
        """The Python expression for a call with these values."""
        if function is BUILTINS["not"]:
            return self.make(ast.UnaryOp, 0, ast.Not(), values[0])
        if function in _SHORT_CIRCUITS:
            if len(arguments) > 1:
                number = self.stops.setdefault(node, self.number())
                for n in range(len(arguments)):
                    reached = self.keep(scope, number, self.constant(n + 1))
                    values[n] = self.make(ast.BoolOp, 0, ast.And(), [reached, values[n]])
            operator = ast.And() if function.name == "and" else ast.Or()
            return self.make(ast.BoolOp, 0, operator, values) if len(values) > 1 else values[0]
        if function is BUILTINS["call"]:
            values = [self.constant(arguments[0].show() if arguments else None), *values]
        name = f"call_{function.name}"
        self.world[name] = function.call
        if function is BUILTINS["eq"] and len(values) == 2:
            name = "equal"
        return self.call(name, *values, line=self.place(node, function.name))

    def interface(self, value: Any, word: Any, scope: _Scope) -> Any:
        """The value of an operand, or _INTERFACE if Go sees it as the content of a map or list."""
        if type(word) is _Chain or type(word) is _Word and (
                word.kind == "field" or word.kind == "variable" and len(word.value) > 1):
            return self.call("within", value, self.last_origin)
        if type(word) is _Word and word.kind in ("dot", "variable"):
            number = scope.origin if word.kind == "dot" else self.variable(word, scope)[1]
            return self.call("within", value, self.origin(scope, number))
        return value

    def simple_format(self, arguments: Sequence[Any], final: tuple[Any, str] | None, scope: _Scope) -> Any:
        """printf as a Python f-string where its format is a constant that takes each argument once; else None."""
        first = arguments[0] if arguments else None
        if type(first) is not _Word or first.kind != "string" or not regex(_SIMPLE_FORMAT).fullmatch(first.value):
            return None
        pieces = regex(f"({_DIRECTIVE})").split(first.value)
        if sum(verb != "%%" for verb in pieces[1::2]) != len(arguments) - 1 + bool(final):
            return None
        values = [self.argument_value(argument, "any", scope) for argument in arguments[1:]]
        values += [final] if final else []
        parts: list[Any] = []
        for literal, verb in zip(pieces[::2], [*pieces[1::2], ""], strict=True):
            parts.append(self.constant(literal + "%" * (verb == "%%")))
            if verb in ("", "%%"):
                continue
            value, type_name = values.pop(0)
            exact = {"%s": "string", "%v": "string", "%d": "int"}.get(verb)
            if type(value) is ast.Constant:
                value = self.constant(sprintf(verb, value.value))
            elif exact is None:
                value = self.call("form", self.constant(verb), value)
            elif type_name != exact:
                bound, name = self.bind(value)
                value = self.either(self.has_type(bound, _PYTHON_TYPES[exact]), name,
                                    self.call("form", self.constant(verb), name))
            parts.append(self.make(ast.FormattedValue, 0, value, -1, None))
        return self.make(ast.JoinedStr, 0, parts)

    def argument(self, word: Any, wanted: str, scope: _Scope) -> Any:
        """An operand as an argument of a Go type."""
        return self.argument_value(word, wanted, scope)[0]

    def argument_value(self, word: Any, wanted: str, scope: _Scope) -> tuple[Any, str]:
        """As argument, with the Go type it is known to have."""
        kind = word.kind if type(word) is _Word else ""
        if kind == "nil":
            if wanted not in _NILLABLE:
                return self.fail(f"cannot assign nil to {wanted}", word), "any"
            return self.converted(self.name("INVALID"), "any", wanted, word), "any"
        if kind in ("string", "number", "bool"):
            return self.constant_argument(word, wanted, scope), go_type(word.value) if kind != "number" else "any"
        value, type_name = self.operand(word, scope)
        return self.converted(value, type_name, wanted, word), type_name

    def constant_argument(self, word: _Word, wanted: str, scope: _Scope) -> Any:
        """A constant as an argument: the only place where Go converts, since constants have no type."""
        if wanted in ("any", "value"):
            return self.operand(word, scope)[0]
        if wanted not in _PYTHON_TYPES:
            return self.fail(f"can't handle {word.show()} for arg of type {wanted}", word)
        value = word.value
        if word.kind == "number":
            value = value.integer if wanted == "int" else value.floating if wanted == "float64" else None
            value = None if wanted == "int" and value and value >= 1 << 63 else value
        elif word.kind != wanted:
            value = None
        if value is None:
            expected = {"int": "integer", "float64": "float"}.get(wanted, wanted)
            return self.fail(f"expected {expected}; found {word.show()}", word)
        return self.constant(value)

    def converted(self, value: Any, type_name: str, wanted: str, node: Any) -> Any:
        """A value checked against the Go type that a function wants; node is where Go reports a mismatch."""
        if wanted == "value" or type_name != "any" and wanted in (type_name, "any"):
            return value
        bound, name = self.bind(value)
        if wanted == "any":
            return self.either(self.compare(bound, ast.Is(), self.name("INVALID")), self.constant(None), name)
        line = self.place(self.last(node))
        if wanted not in _PYTHON_TYPES:
            return self.call("convert", value, self.constant(wanted), line=line)
        slow = self.call("convert", name, self.constant(wanted), line=line)
        return self.either(self.has_type(bound, _PYTHON_TYPES[wanted]), name, slow)


def _jumps(node: Any) -> bool:
    """Whether a {{break}} or {{continue}} in this node leaves a range outside it."""
    if type(node) is _Branch and node.keyword != "range":
        for inner in (*node.body, *(node.otherwise or ())):
            if _jumps(inner):
                return True
    elif type(node) is _Branch:  # its body is its own, its {{else}} is not
        for inner in node.otherwise or ():
            if _jumps(inner):
                return True
    return type(node) is _Jump


def _nesting(nodes: Sequence[Any]) -> int:
    """How deep blocks and parentheses are nested; a long pipeline counts as deep."""
    deepest = 0
    for node in nodes:
        depth = 0
        if type(node) is _Pipe:
            depth = _MAX_NESTING + 1 if len(node.commands) > _MAX_NESTING else 1 + _nesting(node.commands)
        elif type(node) is _Command:
            depth = _nesting(node.words)
        elif type(node) is _Chain:
            depth = _MAX_NESTING + 1 if len(node.fields) > _MAX_NESTING else _nesting([node.base])
        elif type(node) in (_Action, _Invoke):
            depth = _nesting([node.pipe])
        elif type(node) is _Branch:
            depth = 1 + max(_nesting([node.pipe]), _nesting(node.body), _nesting(node.otherwise or ()))
            if node.keyword == "range" and any(_jumps(inner) for inner in node.otherwise or ()):
                depth = _MAX_NESTING + 1  # see _Compiler.block
        deepest = max(deepest, depth)
    return deepest


# ---- the door -----------------------------------------------------------------------------------------

def _deep(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function with room for deep recursion in Python code."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, _STACK))
    try:
        return function(*arguments)
    finally:
        sys.setrecursionlimit(limit)


_GO_ANNOTATIONS = {"str": "string", "int": "int", "bool": "bool", "float": "float64"}


def _as_func(name: str, function: Any) -> Func:
    """A Python callable as a template function: arity and, where annotated, types from its signature."""
    if isinstance(function, Func):
        return function
    code = getattr(function, "__code__", None)
    if code is None:
        return Func(name, function, ("any",), True)
    bound = getattr(function, "__self__", None) is not None
    names = code.co_varnames[bound:code.co_argcount]
    required = len(names) - len(function.__defaults__ or ())
    annotations = getattr(function, "__annotations__", {})
    params = []
    for parameter in names[:required]:
        annotation = annotations.get(parameter)
        params.append(_GO_ANNOTATIONS.get(str(getattr(annotation, "__name__", annotation)), "any"))
    if required < len(names) or code.co_flags & 0x04:  # 0x04: it takes *arguments
        return Func(name, function, (*params, "any"), True)
    return Func(name, function, tuple(params))


class Template:
    """A Go template (text/template of Go 1.27), compiled.

    text is the template, name its name in errors, functions what it can call beside Go's and confd's own (Func, or
    any Python callable), missingkey Go's option: "default" or "invalid", "zero", "error". Raises TemplateError.
    """

    def __init__(self, text: str, name: str = "t", functions: Mapping[str, Any] | None = None,
                 missingkey: str = "default") -> None:
        if missingkey not in ("default", "invalid", "zero", "error"):
            raise UsageError(f'missingkey is default, invalid, zero or error, not "{missingkey}"')
        table = {**BUILTINS, **FUNCTIONS}
        table.update((key, _as_func(key, function)) for key, function in (functions or {}).items())
        self.text, self.name = text, name
        parser = _Parser(text, name, table)
        compiler = _Compiler(parser.trees, table, missingkey)
        collecting = gc.isenabled()
        gc.disable()  # all that is made here lives until the end: looking for garbage would take half the time
        try:
            _deep(parser.parse)
            self._run = _deep(compiler.compile)[name]
        except (RecursionError, MemoryError):
            raise TemplateError(f"template: {name}:1: max expression depth exceeded", "parse") from None
        finally:
            if collecting:
                gc.enable()
        self._calls, self._places, self._world = parser.calls, compiler.places, compiler.world

    @property
    def calls(self) -> list[tuple[str, tuple[str | None, ...], int]]:
        """The function calls in the text: name, constant string arguments (None for any other), line."""
        return [(name, arguments, 1 + self.text.count("\n", 0, position)) for name, arguments, position in self._calls]

    def render(self, data: Any = None) -> str:
        """Execute with data as the dot. Raises TemplateError (stage "exec", partial)."""
        pieces: list[str] = []
        try:
            _deep(self._run, pieces.append, INVALID if data is None else data, 0)
        except Exception as error:
            raise TemplateError(_deep(self._explain, error), "exec", "".join(pieces)) from None
        text = "".join(pieces)
        try:
            text.encode()
        except UnicodeEncodeError:  # halves of a character that were cut apart may have met again
            text = go_string(utf8(text))
        return text

    def _explain(self, error: Exception) -> str:
        """Go's message for what went wrong, with the place that the traceback tells."""
        line, trace = 0, error.__traceback__
        variables: dict[str, Any] = {}
        while trace is not None:
            if trace.tb_frame.f_globals is self._world:
                line, variables = trace.tb_lineno or 0, trace.tb_frame.f_locals
            trace = trace.tb_next
        node, tree, function = self._places[line]
        while type(node) is tuple:
            number, nodes = node
            node = nodes[variables.get("V", {}).get(number, variables.get(f"v{number}", len(nodes))) - 1]
        if isinstance(error, _Failure):
            message = str(error)
        elif isinstance(error, (UnboundLocalError, KeyError)) and type(node) is _Word and node.kind == "variable":
            message = f"undefined variable: {node.value[0]}"
        elif isinstance(error, RecursionError):
            message = f"exceeded maximum template depth ({_MAX_TEMPLATE_DEPTH})"
        else:
            message = f"error calling {function}: {error}"
        if node is None:
            return f"template: {self.name}: {message}"
        start = self.text.rfind("\n", 0, node.position) + 1
        column = len(utf8(self.text[start:node.position]))
        place = f"{self.name}:{1 + self.text.count(chr(10), 0, node.position)}:{column}"
        return f"template: {place}: executing {quote(tree)} at <{node.show()}>: {message}"


# ======================================================================================================
# RENDER
# Template resources: staging, check, swap, reload. confd's conf.d/*.toml and its own additions.
# Does not know how processes are run for good.
# ======================================================================================================

# ---- what is wrong with a file that a person wrote ----------------------------------------------------

class Finding:
    """A mistake in a file: its path, line (0: the file as a whole), level ("error", "warning") and message."""

    __slots__ = ("path", "line", "level", "message")

    def __init__(self, path: str, line: int, level: str, message: str) -> None:
        self.path, self.line, self.level, self.message = path, line, level, message

    @property
    def place(self) -> str:
        """path:line, or the path alone."""
        return f"{self.path}:{self.line}" if self.line else self.path

    def __str__(self) -> str:
        return f"{self.place}: {self.level}: {self.message}" if self.path else f"{self.level}: {self.message}"


# ---- the keys of a template resource ------------------------------------------------------------------

class ResourceKey:
    """One row of the table of resource keys: name in [template], kind, default and help."""

    __slots__ = ("name", "kind", "default", "help")

    def __init__(self, name: str, kind: str, default: Any, help: str) -> None:
        self.name, self.kind, self.default, self.help = name, kind, default, help


# kinds: those of _RESOURCE_KINDS, or the words that are allowed
RESOURCE_KEYS = {row.name: row for row in (
    ResourceKey("src", "text", "", "the template, a path below templates/ (needed)"),
    ResourceKey("dest", "text", "", "the file to write (needed); a symlink is followed"),
    ResourceKey("foreach", "pattern", "", 'one file for each match, as of "/lb/hosts/*"; the last part of dest is a '
                'template then, as in "/etc/x/{{.Name}}.conf", and both templates see .Key, .Name and .Value'),
    ResourceKey("keys", "list of texts", (), "keys that the template may read, each with all below it"),
    ResourceKey("prefix", "text", "", "put before every key; --prefix goes before that"),
    ResourceKey("mode", "octal", None, "permission bits as in \"0644\"; else those of the file, 0644 for a new one"),
    ResourceKey("uid", "number", -1, "owner by number; else that of the file, for a new one that of the renderer"),
    ResourceKey("gid", "number", -1, "group by number, likewise"),
    ResourceKey("owner", "text", "", "owner by name; uid wins"),
    ResourceKey("group", "text", "", "group by name; gid wins"),
    ResourceKey("make_dirs", "true/false", False, "make missing directories above dest"),
    ResourceKey("check_cmd", "text", "", "shell command that must succeed before the swap; {{.src}} is the new file"),
    ResourceKey("check_timeout", "duration", 30.0, "time after which check_cmd is killed and has failed"),
    ResourceKey("reload_cmd", "text", "", "shell command to run after a change; {{.src}} and {{.dest}} are the file"),
    ResourceKey("reload_timeout", "duration", 60.0, "time after which reload_cmd is killed and has failed"),
    ResourceKey("service", "name", "", "the service that the file belongs to: it starts when its files are there"),
    ResourceKey("reload", "signal NAME|restart|command|none", "",
                "how the service takes up new files; else reload_cmd, without one restart"),
    ResourceKey("verify", "time", 2.0,
                "how long the service must stay up and ready after that, else the old files come back"),
    ResourceKey("verify_cmd", "text", "", "shell command that must succeed by then (it is tried again until it does)"),
    ResourceKey("debounce", "min[:max]", (0.0, 0.0),
                'wait for quiet before rendering, as in "50ms", but no longer than four times that, or "50ms:2s"'),
    ResourceKey("output_format", "json|toml", "", "the new file must be well-formed JSON or TOML"),
    ResourceKey("on_missing", "error|empty|skip", "error",
                "a key that getv or get wants does not exist: fail, take an empty text, or leave dest as it is"),
    ResourceKey("required", "list of texts", (), "keys without which it fails (on_missing = \"skip\": is skipped)"),
    ResourceKey("secret", "true/false", False, "the owner alone reads it unless mode is set; contents are never shown"),
)}

_RESOURCE_ALIASES = {"check_cmd_timeout": "check_timeout", "reload_cmd_timeout": "reload_timeout"}  # of confd's fork


def _a_text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError('a text in quotes is needed, as in "x"')
    if "\0" in value:
        raise ValueError("a NUL character cannot be in it")
    return value


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError('an array of texts is needed, as in ["/a", "/b"]')
    return tuple(value)


def _id(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not -1 <= value < 1 << 32:
        raise ValueError("a number is needed, as in 33")
    return value


def _yes_or_no(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false is needed")
    return value


def _timeout(value: Any) -> float:
    seconds = duration(value)
    if not seconds:
        raise ValueError("a time above 0s is needed, as in \"30s\"")
    return seconds


def _name(value: object) -> str:
    name = _a_text(value)
    if name[:1] in ("", ".") or "/" in name or not name.isprintable():
        raise ValueError("the name of a directory of services.d is needed")
    return name


def _keys_pattern(value: object) -> str:
    pattern = clean_key(_a_text(value))
    glob_regex(pattern)
    return pattern


def _reload_way(value: object) -> str:
    word, _, name = _a_text(value).partition(" ")
    if word == "signal":
        return f"signal {signal_number(name)}"
    if value not in ("restart", "command", "none"):
        raise ValueError('one of "signal HUP", "restart", "command", "none" is needed')
    return word


def _times(value: object) -> tuple[float, float]:
    least, _, most = _a_text(value).partition(":")
    times = duration(least), duration(most) if most else 4 * duration(least)
    if times[1] < times[0]:
        raise ValueError("the second time is the longest wait, it cannot be shorter than the first")
    return times


_RESOURCE_KINDS: dict[str, Callable[[Any], Any]] = {
    "text": _a_text, "list of texts": _texts, "number": _id, "true/false": _yes_or_no,
    "duration": _timeout, "time": duration, "min[:max]": _times, "octal": _a_text, "name": _name,
    "pattern": _keys_pattern,
    "signal NAME|restart|command|none": _reload_way}


def parse_mode(text: str, as_confd: bool = False) -> tuple[int, str]:
    """Permission bits from a resource's mode, and a warning or "". ValueError if it is no octal number.

    confd calls strconv.ParseUint(text, 0, 32): without its leading 0, "644" is decimal and means --w----r--.
    Nobody ever meant that, so it is 0644 here, with a warning; as_confd keeps confd's reading.
    """
    digits, warning = text.strip().lower(), ""
    try:
        if not digits.isalnum():
            raise ValueError
        if digits[:1] != "0":
            meant = int(digits, 10 if as_confd else 8)
            warning = f'mode = "{text}" is taken as {meant & 0o777:04o}; write mode = "0{digits}"'
        else:
            meant = int(digits, 0 if digits[1:2] in "xbo" and digits != "0" else 8)
    except ValueError:
        raise ValueError(f'"{text}" is not an octal number, as in "0644"') from None
    if meant & ~0o777 and not warning:
        warning = f'of mode = "{text}" only the permission bits {meant & 0o777:04o} are used'
    return meant & 0o777, warning


class Resource:
    """A template resource: one checked [template] of a file in conf.d. Every row of RESOURCE_KEYS is an attribute.

    name: the file's path below conf.d, with [n] from the second template of one file on; path: that file; lines: the
    line of each key in it, "" for the header; prefix: already joined with the global one; lookups: the keys to
    fetch; commands: those that there are of check_cmd, reload_cmd and verify_cmd, as templates.
    """

    __slots__ = ("name", "path", "lines", "lookups", "commands", *RESOURCE_KEYS)

    name: str
    path: str
    lines: dict[str, int]
    lookups: list[str]
    commands: dict[str, Template]
    src: str
    dest: str
    foreach: str
    keys: tuple[str, ...]
    prefix: str
    mode: int | None
    uid: int
    gid: int
    owner: str
    group: str
    make_dirs: bool
    check_cmd: str
    check_timeout: float
    reload_cmd: str
    reload_timeout: float
    service: str
    reload: str
    verify: float
    verify_cmd: str
    debounce: tuple[float, float]
    output_format: str
    on_missing: str
    required: tuple[str, ...]
    secret: bool

    def command(self, name: str, src: str, dest: str) -> str:
        """check_cmd, reload_cmd or verify_cmd for a file; "" if there is none. TemplateError."""
        return self.commands[name].render({"src": src, "dest": dest}) if name in self.commands else ""

    def is_named(self, word: str) -> bool:
        """True if a word of the command line means this resource: its name, its file's, or its destination."""
        return word in (self.name, self.dest) or _file_is_named(self.name.partition("[")[0], word)


def _file_is_named(name: str, word: str) -> bool:
    names = (name, name.rpartition("/")[2])
    return word in names or word in [name.removesuffix(".toml") for name in names]


def effective_prefix(above: str, own: str, as_confd: bool = False) -> str:
    """A resource's prefix below the global one: joined; as_confd (0.12 to 0.16): the global one instead of it."""
    return clean_key(above or own) if as_confd else clean_key(above, own)


def parse_resources(text: str, path: str, name: str, prefix: str = "",
                    as_confd: bool = False) -> tuple[list[Resource], list[Finding]]:
    """The resources of one file, and what is wrong with it. A template with an error is not among the resources.

    path: the file, for findings; name: what to call its resources; prefix: the global one.
    """
    findings: list[Finding] = []
    try:
        document = from_toml(text.removeprefix("\ufeff"))
    except RecursionError:
        return [], [Finding(path, 0, "error", "nested too deep")]
    except ValueError as error:  # "what is wrong (at line 3, column 5)" or "what is wrong (at end of document)"
        message, _, place = str(error).partition(" (at line ")
        line, _, column = place.rstrip(")").partition(", ")
        message = message[:1].lower() + message[1:] + (f" ({column})" if column else "")
        return [], [Finding(path, int(line) if line.isdigit() else 1 + text.rstrip().count("\n"), "error", message)]
    lines = text.splitlines()
    tables: list[Any] = []
    for key, value in document.items():
        if key.lower() == "template":
            tables += value if isinstance(value, list) else [value]
        else:
            findings.append(Finding(path, _line_of(lines, key, -1), "warning",
                                    f"unknown table or key {key}, ignored{nearest(key.lower(), ['template'])}"))
    if not tables or not all(isinstance(table, dict) for table in tables):
        findings.append(Finding(path, 0, "error", "no [template] table"))
        return [], findings
    resources = []
    for index, table in enumerate(tables):
        label = f"{name}[{index + 1}]" if index else name
        resource = _resource(table, path, label, lines, index, prefix, as_confd, findings)
        if resource:
            resources.append(resource)
    return resources, findings


def _resource(table: dict[str, Any], path: str, name: str, text: Sequence[str], index: int, prefix: str,
              as_confd: bool, findings: list[Finding]) -> Resource | None:
    """One resource from its TOML table, the index-th of text; None, and why in findings, if it cannot be used."""
    values: dict[str, Any] = {row.name: row.default for row in RESOURCE_KEYS.values()}
    lines = {"": _line_of(text, "", index)}
    sound = True

    def fault(key: str, message: str, level: str = "error") -> None:
        nonlocal sound
        sound = sound and level != "error"
        findings.append(Finding(path, lines.get(key, lines[""]), level, message))

    for written, value in table.items():
        key = _RESOURCE_ALIASES.get(written.lower(), written.lower())
        lines[key] = lines[written] = _line_of(text, written, index)
        if key not in RESOURCE_KEYS:
            fault(written, f"unknown key {written}, ignored{nearest(key, RESOURCE_KEYS)}", "warning")
            continue
        kind = RESOURCE_KEYS[key].kind
        try:
            if kind in _RESOURCE_KINDS:
                values[key] = _RESOURCE_KINDS[kind](value)
            elif value in kind.split("|"):
                values[key] = value
            elif key == "output_format" and value in ("", "yaml", "yml", "xml"):  # confd's fork knows them
                fault(written, f'output_format = "{value}" is not checked (only json and toml are)', "warning")
            else:
                raise ValueError("one of " + ", ".join(f'"{word}"' for word in kind.split("|")) + " is needed")
            if kind == "octal":
                values[key], warning = parse_mode(value, as_confd)
                if warning:
                    fault(written, warning, "warning")
        except ValueError as error:
            fault(written, f"cannot use {written}: {error}")
    for key in ("src", "dest"):
        if not values[key] and sound:
            fault(key, f"empty {key}{' template' * (key == 'src')}")
    resource = Resource()
    commands: dict[str, Template] = {}
    for key in ("check_cmd", "reload_cmd", "verify_cmd", *(["dest"] if values["foreach"] else [])):
        try:
            if values[key]:
                commands[key] = Template(os.path.basename(values[key]) if key == "dest" else values[key], name=key)
        except TemplateError as error:
            fault(key, f"cannot use {key}: {error}")
    above, _, last = values["dest"].rpartition("/")
    if values["foreach"] and ("{{" in above or "{{" not in last):
        fault("dest", 'with foreach the last part of dest, and no other, is a template: "/etc/x/{{.Name}}.conf"')
    if values["reload"] == "command" and not values["reload_cmd"]:
        fault("reload", 'reload = "command" needs a reload_cmd')
    for key in ("reload", "verify", "verify_cmd") if not values["service"] else ():
        if key in lines:
            fault(key, f"{key} does nothing without service", "warning")
    values["reload"] = values["reload"] or ("command" if values["reload_cmd"] else "restart")
    values["prefix"] = effective_prefix(prefix, values["prefix"], as_confd)
    values["lookups"] = [clean_key(values["prefix"], key) for key in values["keys"]]
    values.update(name=name, path=path, lines=lines, commands=commands)
    for key in values if sound else ():
        setattr(resource, key, values[key])
    return resource if sound else None


def _line_of(lines: Sequence[str], key: str, index: int) -> int:
    """The line (from 1) on which a key of the index-th [template] stands; -1: of no template; "": the header itself.

    tomllib tells no lines, so this searches; a key in an unusual place gets the line of its header.
    """
    table, header = -1, 0
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if text.startswith("["):
            word = text.strip("[").partition("]")[0].strip().strip("\"'")
            if word.lower() == "template":
                table += 1
                header = number if table == index else header
            elif index == -1 and word == key:
                return number
            if table == index and not key:
                return number
        elif key and (table == index or index == -1) and text.partition("=")[0].strip().strip("\"'") == key:
            return number
    return header


def resource_files(directory: str) -> list[str]:
    """The resource files at and below conf.d in confd's order: every name that ends in "toml", each real file once.

    Symlinks are followed, so Kubernetes' ConfigMap volumes work; their hidden "..data" directories are left out,
    because what counts are the links that point into them. OSError if conf.d cannot be read.
    """
    found: list[str] = []
    seen: set[object] = set()

    def walk(directory: str, above: frozenset[object]) -> None:
        here = os.stat(directory)
        around = above | {(here.st_dev, here.st_ino)}
        if around == above:
            return  # a link to a directory above itself
        for name in sorted(os.listdir(directory), key=os.fsencode):
            path = f"{directory}/{name}"
            if name.startswith(".."):
                continue
            try:
                status = os.stat(path)
                there: object = status.st_dev, status.st_ino
                if stat.S_ISDIR(status.st_mode):
                    walk(path, around)
                    continue
            except FileNotFoundError:  # a link that leads nowhere
                there = path
            if name.endswith("toml") and there not in seen:
                seen.add(there)
                found.append(path)

    walk(directory, frozenset())
    return found


def load_resources(confdir: str, prefix: str = "", as_confd: bool = False,
                   names: Sequence[str] = (), optional: bool = False) -> tuple[list[Resource], list[Finding]]:
    """All resources below confdir/conf.d in their order, and what is wrong with the files there.

    optional: the directory need not be there.
    names: only these resources (see Resource.is_named); UsageError for one that is nobody's name.
    """
    if not os.path.isdir(confdir):
        level = "warning" if as_confd or optional else "error"
        return [], [Finding("", 0, level, f"Cannot load template resources: confdir '{confdir}' does not exist")]
    directory = os.path.join(confdir, "conf.d")
    resources: list[Resource] = []
    findings: list[Finding] = []
    files: list[str] = []
    try:
        files = resource_files(directory)
    except OSError as error:
        findings.append(Finding(str(error.filename or directory), 0, "error", f"cannot read it: {reason(error)}"))
    unmet = set(names)
    for path in files:
        name = os.path.relpath(path, directory)
        asked = {word for word in names if _file_is_named(name, word)}
        try:
            if not os.path.isfile(path) and os.path.exists(path):
                raise OSError(errno.EINVAL, "not a regular file")
            with open(path, encoding="utf-8") as file:
                loaded, found = parse_resources(file.read(), path, name, prefix, as_confd)
        except (OSError, UnicodeDecodeError) as error:
            why = reason(error) if isinstance(error, OSError) else "not UTF-8"
            loaded, found = [], [Finding(path, 0, "error", f"cannot read it: {why}")]
        if names:
            chosen = [resource for resource in loaded if any(resource.is_named(word) for word in names)]
            asked |= {word for word in names for resource in chosen if resource.is_named(word)}
            loaded, found = chosen, found if asked else []
        unmet -= asked
        resources += loaded
        findings += found
    for word in sorted(unmet):
        known = [os.path.relpath(path, directory).removesuffix(".toml") for path in files]
        raise UsageError(f"no template resource is named {word}{nearest(word, known)}")
    return resources, findings


def bound_services(confdir: str) -> list[str]:
    """The services that resources of conf.d name, as far as the files there can be read."""
    found: set[str] = set()
    try:
        files = resource_files(os.path.join(confdir, "conf.d"))
    except OSError:
        return []
    for path in files:
        try:
            text = (read_small(path, 1 << 20) or b"").decode("utf-8", "replace")
        except OSError:
            continue
        # by the line: of a file with a mistake in it the service is to wait all the more
        found.update(re.findall(r"""(?im)^\s*service\s*=\s*["']([^"'./][^"'/]*)["']""", text))
    return sorted(found)


def conf_stamps(confdir: str) -> list[tuple[str, Any]]:
    """What changes when a resource file comes, goes or is written: each file with its file_stamp()."""
    try:
        return [(path, file_stamp(path)) for path in resource_files(os.path.join(confdir, "conf.d"))]
    except OSError as error:
        return [("", reason(error))]


# ---- where the keys come from -------------------------------------------------------------------------

class KeyFile:
    """Keys from a JSON or TOML file instead of etcd; read anew each time."""

    __slots__ = ("path",)
    floors: Mapping[str, int] = {}

    def __init__(self, path: str) -> None:
        self.path = path

    def read(self, keys: Iterable[str]) -> tuple[int, list[tuple[str, str]]]:
        """The revision (0) and the pairs at and below the keys."""
        tree = keys_from_file(self.path)
        return 0, [pair for key in keys for pair in tree.below(key)]

    def watch(self, keys: Iterable[str], revision: int) -> KeyFileWatch:
        """Follow the file from a read() on."""
        return KeyFileWatch(self.path, keys)

    def get(self, key: str) -> str | None:
        """The value of one key, None if it does not exist."""
        return keys_from_file(self.path).get(key)

    def close(self) -> None:
        """Nothing is held open."""


class KeyFileWatch:
    """What Watch is to etcd, for a file of keys: a look at it from time to time."""

    __slots__ = ("keys", "stale", "deadline", "_path", "_stamp")
    failure, open, heard, behind = None, True, float("inf"), False

    def __init__(self, path: str, keys: Iterable[str]) -> None:
        self._path, self.keys = path, top_keys(keys)
        self.restart(0)

    def restart(self, revision: int) -> None:
        """A new read has been made."""
        self.stale, self._stamp, self.deadline = "", file_stamp(self._path), now() + FILES_INTERVAL

    def step(self) -> list[Event]:
        """Look whether the file has changed: then `stale` says so."""
        if now() >= self.deadline:
            self.deadline = now() + FILES_INTERVAL
            if file_stamp(self._path) != self._stamp:
                self.stale = f"{self._path} has changed"
        return []

    def descriptors(self) -> list[int]:
        """None: a file cannot be polled."""
        return []

    def close(self) -> None:
        """Nothing is held open."""


def file_stamp(path: str) -> tuple[int, ...]:
    """What changes when a file does, () if it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return status.st_mtime_ns, status.st_size, status.st_ino, status.st_dev


# ---- from keys to text --------------------------------------------------------------------------------

INCLUDE_DEPTH = 10


def resource_functions(tree: KeyTree, templates: str, source: str = "", on_missing: str = "error",
                       as_confd: bool = False, load: Callable[[str], Template] | None = None) -> dict[str, Func]:
    """What a resource's template can call besides the general functions: the store's, and include.

    templates: the directory that include reads from; source: the template itself, which nobody may include;
    load: compiles the template of a path, with these functions.
    """
    functions = dict(store_functions(tree, compat=as_confd))
    if on_missing == "empty":
        values, pair = tree.values_by_key, functions["get"].call
        functions["getv"] = Func("getv", lambda key, *default: values.get(key, default[0] if default else ""),
                                 ("string", "string"), True, "string")
        functions["get"] = Func("get", lambda key: pair(key) if key in values else KVPair(key, ""), ("string",), False)
    templates = os.path.normpath(templates)
    active = [source]

    def include(name: str, *data: object) -> str:
        path = os.path.normpath(f"{templates}/{name}")
        if len(data) > 1:
            raise ValueError("include takes a file and at most one value")
        if not path.startswith(f"{templates}/"):
            raise ValueError(f'include path "{name}" is outside template directory')
        if path in active:
            raise ValueError(f"include cycle detected: {path} is already being processed")
        if len(active) > INCLUDE_DEPTH:
            raise ValueError(f"maximum include depth ({INCLUDE_DEPTH}) exceeded")
        active.append(path)
        try:
            template = load(path) if load else compile_file(path, functions)
            return template.render(data[0] if data else None)
        except OSError as error:
            raise ValueError(f"include {name}: open {path}: {reason(error)}") from None
        finally:
            active.pop()

    functions["include"] = Func("include", include, ("string", "any"), True, "string")
    return functions


def read_text(path: str, pipes: bool = False) -> str:
    """A whole file as text; bytes that are not UTF-8 are kept as surrogates. OSError.

    pipes: take what is no regular file, too; reading it may take forever.
    """
    if not pipes and not stat.S_ISREG(mode := os.stat(path).st_mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "not a regular file")
    with open(path, "rb") as file:
        return file.read().decode("utf-8", "surrogateescape")


def compile_file(path: str, functions: Mapping[str, Func]) -> Template:
    """The template in a file. OSError, TemplateError."""
    return Template(read_text(path), name=os.path.basename(path), functions=functions)


# Where Go puts a value into the text of an error; keys have values that nobody may see in a log.
_VALUES_IN_ERRORS = (r'(parsing )"(?:[^"\\]|\\.)*"', r"(range can't iterate over )[\s\S]+",
                     r"(non-comparable type )[\s\S]+(?=: )", r"(non-comparable types )[\s\S]+",
                     r"(cannot unmarshal number )\S+", r"(non-function )[\s\S]+(?= of type )",
                     r"(error parsing regexp: [^`]*)`[\s\S]*`")


def without_values(message: str) -> str:
    """The text of a template error without the values of keys that Go quotes in some of them."""
    for pattern in _VALUES_IN_ERRORS:
        message = re.sub(pattern, rf"\g<1>{MASK}", message)
    return message


class Skipped(Exception):
    """A resource that is left alone on purpose, because of on_missing = "skip"; the text says which key."""


class Asked:
    """What a template has asked the store for: keys, patterns, directories. Knows whether a change can matter to it."""

    __slots__ = ("keys", "patterns", "directories", "_listed", "_places", "_regexes")

    def __init__(self) -> None:
        self.keys, self.patterns, self.directories = set[str](), set[str](), set[str]()
        self._listed = set[str]()  # the directories, cleaned
        self._places: dict[str, list[re.Pattern[str]]] | None = None  # directory: patterns that match only below it
        self._regexes: dict[str, tuple[str, re.Pattern[str]]] = {}

    def clear(self) -> None:
        """Forget all of it."""
        self.keys.clear()
        self.patterns.clear()
        self.directories.clear()
        self._places = None

    def noting(self, functions: Mapping[str, Func]) -> dict[str, Func]:
        """The store's functions among the given ones, which from now on note here what they are asked for."""
        kinds = {"key": self.keys, "pattern": self.patterns, "directory": self.directories}
        noted = {}
        for name, kind in _STORE_READERS.items():
            plain = functions[name]
            call = _noting(plain.call, kinds[kind].add)
            noted[name] = Func(name, call, plain.params, plain.variadic, plain.returns)
        return noted

    def touched(self, changed: Mapping[str, bool]) -> bool:
        """True if the answer to something that was asked may be another now; changed: as Mirror tells it."""
        if self._places is None:
            self._places = {}
            known = self._regexes
            self._regexes = {pattern: known.get(pattern) or _pattern_place(pattern) for pattern in self.patterns}
            for place, regex in self._regexes.values():
                self._places.setdefault(place, []).append(regex)
            self._listed = {clean_key(path).rstrip("/") for path in self.directories}
        for key, came_or_went in changed.items():
            if key in self.keys:
                return True
            above = key.rstrip("/")
            while True:
                if came_or_went and above in self._listed:
                    return True
                if any(regex.fullmatch(key) for regex in self._places.get(above, ())):
                    return True
                if not above:
                    break
                above = above.rpartition("/")[0]
        return False


def _noting(call: Callable[..., Any], note: Callable[[str], None]) -> Callable[..., Any]:
    def noted(asked: str, *rest: Any) -> Any:
        note(asked)
        return call(asked, *rest)

    return noted


def _pattern_place(pattern: str) -> tuple[str, re.Pattern[str]]:
    """The directory below which a pattern can match at all, and the pattern as a regular expression."""
    try:
        regex = glob_regex(pattern)
    except ValueError:  # it fails as soon as there is a key at all
        return "", re.compile("[\\s\\S]*")
    return re.split(r"[*?\[\\]", pattern)[0].rpartition("/")[0], regex


class Page:
    """One resource made ready to be rendered again and again.

    view: the keys that it sees, to be kept current in place; asked: notes what its last run wanted (None: nobody
    does); stamps: the template files of its last run, each with its file_stamp().
    """

    __slots__ = ("resource", "view", "asked", "stamps", "_path", "_functions", "_compiled")

    def __init__(self, resource: Resource, view: KeyTree, templates: str, as_confd: bool = False,
                 asked: Asked | None = None) -> None:
        self.resource, self.view, self.asked = resource, view, asked
        self.stamps: dict[str, tuple[int, ...]] = {}
        self._path = os.path.normpath(f"{templates}/{resource.src}")
        self._compiled: dict[str, tuple[tuple[int, ...], Template]] = {}
        functions = resource_functions(view, templates, self._path, resource.on_missing, as_confd, self._load)
        self._functions = {**functions, **(asked.noting(functions) if asked else {})}

    def _load(self, path: str) -> Template:
        """The template of a file, compiled when the file is new. OSError, TemplateError."""
        stamp = self.stamps[path] = file_stamp(path)
        if path not in self._compiled or self._compiled[path][0] != stamp:
            self._compiled[path] = stamp, compile_file(path, self._functions)
        return self._compiled[path][1]

    def parts(self) -> list[tuple[Resource, dict[str, str | None]]]:
        """The text of every destination, from the keys as they are now, and the resource that says how to write it.

        Error, or Skipped when a key is missing and may be.
        """
        self.stamps.clear()
        if self.asked:
            self.asked.clear()
        return [(self.resource, {self.resource.dest: self._text(None)})]

    def _text(self, dot: Any) -> str:
        resource = self.resource
        if self.asked:
            self.asked.keys.update(map(clean_key, resource.required))
        try:
            template = self._load(self._path)
            for key in map(clean_key, resource.required):
                if key not in self.view:
                    _missing(resource, f"required key {key} does not exist", key)
            return template.render(dot)
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                raise Error(f"Missing template: {self._path}") from None
            raise Error(f"cannot read template {self._path}: {reason(error)}") from None
        except TemplateError as error:
            message = without_values(str(error))
            if error.stage == "parse":
                raise Error(f"Unable to process template {self._path}, {message}") from None
            found = re.search(r"error calling getv?: key does not exist: (.*)", message)
            if found:
                _missing(resource, message, found[1])
            raise Error(message) from None


class EnvironmentPage(Page):
    """The files of env/ in a service directory: a variable from each key directly below one, and from secret files.

    A key wins over a file in /run/secrets, and both over the container's environment.
    """

    __slots__ = ()

    def parts(self) -> list[tuple[Resource, dict[str, str | None]]]:
        """The value of every variable; None for those that are no more."""
        dest, (key,) = self.resource.dest, self.resource.keys
        if os.path.islink(dest):
            raise Error(f"the service has an env/ of its own, {os.readlink(dest)}")
        self.stamps.clear()
        found: dict[str, str] = {}
        for name in sorted(os.listdir(SECRETS_DIRECTORY)) if os.path.isdir(SECRETS_DIRECTORY) else ():
            path = f"{SECRETS_DIRECTORY}/{name}"
            if re.fullmatch("(?!ETCD_|ETCDINIT_)[A-Z_][A-Z0-9_]*", name):  # those are ours
                self.stamps[path] = file_stamp(path)
                found[name] = read_text(path).rstrip("\r\n")
        if self.asked:
            self.asked.clear()
        for pair in self._functions["gets"].call(f"{clean_key(key).rstrip('/')}/*"):
            name = pair.Key.rpartition("/")[2]
            if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
                log.warning(f"key {pair.Key} cannot be a variable of {self.resource.service}")
            elif "\0" in pair.Value:
                raise Error(f"key {pair.Key} cannot be a variable of {self.resource.service}: it has a NUL character")
            else:
                found[name] = pair.Value
        gone = set(os.listdir(dest)) - set(found) if os.path.isdir(dest) else set[str]()
        return [(self.resource, {f"{dest}/{name}": found.get(name) for name in sorted({*found, *gone})})]


class ManyPage(Page):
    """A resource with foreach: a file for each match, and a manifest of those that we have written.

    A file whose key is gone is removed if the manifest has it. The manifest lies beside the files, .NAME.manifest, so
    that it lives as long as they do.
    """

    __slots__ = ("manifest",)

    def __init__(self, resource: Resource, *others: Any) -> None:
        super().__init__(resource, *others)
        name = re.sub("[^A-Za-z0-9._-]", "_", resource.name)
        path = f"{os.path.dirname(resource.dest)}/.{name}.manifest"
        self.manifest = plain_resource(f"manifest of {resource.name}", resource.service, dest=path, mode=0o600,
                                       make_dirs=resource.make_dirs, reload="none")

    def parts(self) -> list[tuple[Resource, dict[str, str | None]]]:
        """The texts of all matches, None for a file that is to go; last the manifest."""
        resource, directory = self.resource, os.path.dirname(self.resource.dest)
        self.stamps.clear()
        if self.asked:
            self.asked.clear()
        written = self._written()
        texts: dict[str, str | None] = {}
        keys: dict[str, str] = {}
        for key in self._matches():
            dot = {"Key": key, "Name": key.rpartition("/")[2], "Value": self.view.get(key) or ""}
            name = safe_name(resource.commands["dest"].render(dot))
            if name in keys:
                raise Error(f"keys {keys[name]} and {key} want the same file, {directory}/{name}")
            keys[name] = key
            try:
                texts[f"{directory}/{name}"] = self._text(dot)
            except Skipped as skipped:
                log.info(f'{directory}/{name} skipped: {skipped} (on_missing = "skip")')
            except Error as error:
                raise Error(f"{directory}/{name}: {error}") from None
        texts.update((f"{directory}/{name}", None) for name in written if name not in keys)
        return [(resource, texts), (self.manifest, {self.manifest.dest: json.dumps(sorted(keys)) + "\n"})]

    def _matches(self) -> list[str]:
        """The keys and directories that foreach matches."""
        found = [""]
        for part in self.resource.foreach.strip("/").split("/"):
            regex = glob_regex(part)
            if self.asked:
                self.asked.directories.update(place or "/" for place in found)
            found = [f"{place}/{name}" for place in found for name in self.view.children(place or "/")
                     if regex.fullmatch(name)]
        if self.asked:
            self.asked.keys.update(found)
        return found

    def _written(self) -> list[str]:
        """The names in the manifest. Error if it is there and cannot be read."""
        try:
            data = read_small(self.manifest.dest, 1 << 24)
            names = [] if data is None else json.loads(data)
            return [name for name in names if re.fullmatch("[A-Za-z0-9_@:+,=%-][A-Za-z0-9._@:+,=%-]*", name)]
        except (OSError, ValueError, TypeError) as error:
            raise Error(f"cannot read {self.manifest.dest}, which tells the files that may be removed: {reason(error)}"
                        ) from None


def safe_name(text: str) -> str:
    """A name for a file made of a text that anybody may have written: odd characters, a dot in front as %XX. Error."""
    if not text:
        raise Error("the name of a file is empty (dest)")
    return re.sub("^[.]|[^A-Za-z0-9._@:+,=-]",
                  lambda odd: "".join(f"%{byte:02X}" for byte in odd[0].encode("utf-8", "surrogateescape")), text)


def plain_resource(name: str, service: str, **keys: Any) -> Resource:
    """A resource that no file in conf.d stands for, with keys of [template]."""
    resource = Resource()
    for row in RESOURCE_KEYS.values():
        setattr(resource, row.name, keys.get(row.name, row.default))
    resource.name, resource.path, resource.lines, resource.service = name, "", {"": 0}, service
    resource.commands = {}
    resource.lookups = [clean_key(resource.prefix, key) for key in resource.keys]
    return resource


def _missing(resource: Resource, message: str, key: str) -> NoReturn:
    if resource.on_missing == "skip":
        raise Skipped(f"key {key} does not exist")
    listed = any(f"{key}/".startswith(clean_key(known).rstrip("/") + "/") for known in resource.keys)
    raise Error(message + ("" if listed else f" (keys of {resource.name} does not list it)"))


def check_format(text: str, format: str) -> str:
    """What is wrong with a text as json or toml; "" if nothing."""
    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        if format == "json":
            json.loads(text, parse_constant=no_constant)
        else:
            tomllib.loads(text)
    except RecursionError:
        return "nested too deep"
    except ValueError as error:
        return str(error)
    return ""


# ---- SIGTERM and SIGINT -------------------------------------------------------------------------------

class Stopped(BaseException):
    """SIGTERM or SIGINT has come; raised only where it does no harm."""


class Stop:
    """Makes a request of SIGTERM and SIGINT: it breaks off a wait, and never what is between two waits.

    signal: the one that has come, 0 before; at: when (now()).
    """

    __slots__ = ("signal", "at", "breakable")

    def __init__(self) -> None:
        self.signal, self.at = 0, 0.0
        self.breakable = False

    def install(self) -> None:
        """Take SIGTERM and SIGINT over from now on; see to it that ends of children are told to us."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def __call__(self, number: int, frame: object) -> None:
        if not self.signal:
            self.signal, self.at = number, now()
        if self.breakable:
            self.breakable = False  # a second one does not disturb the clearing up
            raise Stopped

    def during(self, wait: Callable[..., Any], *args: Any) -> Any:
        """wait(*args), which a signal ends with Stopped; at once if it has come before."""
        self.breakable = True
        try:
            if self.signal:
                raise Stopped
            return wait(*args)
        finally:
            self.breakable = False


stop = Stop()


# ---- commands -----------------------------------------------------------------------------------------

OUTPUT_LIMIT = 65536  # bytes of a command's output that are kept, its last ones
OUTPUT_LINES = 200  # lines of it that are logged, the last ones
STOP_GRACE = 5.0  # seconds that reloads have left once we are told to stop; checks have none
KILL_PATIENCE = 5.0  # seconds after which a process that even SIGKILL does not end is left alone


class Command:
    """A shell command in a process group of its own, with a deadline. Nothing in here waits.

    After start(), whoever drives it polls descriptors() until the deadline and calls advance() until that is True.
    Then failure is "" or why it failed, in Go's words as confd tells it, and output the last of what it said.
    """

    __slots__ = ("text", "timeout", "deadline", "failure", "output", "dropped", "_began", "_pid", "_pipe", "_pidfd",
                 "_killed")

    def __init__(self, text: str, timeout: float) -> None:
        self.text, self.timeout = text, timeout
        self.deadline = self._began = 0.0
        self.failure, self.output, self.dropped = "", bytearray(), 0
        self._pid = 0
        self._pipe = self._pidfd = -1
        self._killed = False

    def start(self) -> None:
        """Run it: /bin/sh -c, standard input empty, output and errors to us, no other descriptor, signals as new."""
        _seal_descriptors()
        log.debug(f"Running {self.text}")
        self._began = now()
        self.deadline = self._began + self.timeout
        self._pipe, write = os.pipe()
        os.set_blocking(self._pipe, False)
        actions = [(os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                   (os.POSIX_SPAWN_DUP2, write, 1), (os.POSIX_SPAWN_DUP2, write, 2)]
        try:
            self._pid = os.posix_spawn("/bin/sh", ["/bin/sh", "-c", self.text], public_environment(),
                                       file_actions=actions,
                                       setpgroup=0, setsigmask=(), setsigdef=(signal.SIGPIPE, signal.SIGXFSZ))
        except (OSError, ValueError) as error:
            self.failure = f"cannot run /bin/sh: {reason(error)}"
            self._close()
        finally:
            os.close(write)
        if self._pid:
            try:
                self._pidfd = os.pidfd_open(self._pid)
            except (OSError, AttributeError):
                pass  # an old kernel, or a sandbox that forbids it: wait() then looks often

    def descriptors(self) -> list[int]:
        """What to poll for reading: there is output, or it has ended."""
        return [fd for fd in (self._pipe, self._pidfd) if fd >= 0]

    @property
    def wake_at(self) -> float:
        """When to call advance() even if no descriptor has anything."""
        due = self.deadline + KILL_PATIENCE * self._killed
        return min(due, now() + 0.02) if self._pidfd < 0 else due

    def wait(self) -> None:
        """Wait until advance() has something to do: the thin layer for those who drive one command only."""
        poll = select.poll()
        for fd in self.descriptors():
            poll.register(fd, select.POLLIN)
        poll.poll(max(0, int(1000 * (self.wake_at - now())) + 1))

    def advance(self) -> bool:
        """Read what it said, see whether it ended, kill its group when time is up. True when it is over."""
        if not self._pid:
            return True
        self._read()
        try:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
        except ChildProcessError:  # somebody else has reaped it
            pid, status = self._pid, 0
        if pid:
            code = os.waitstatus_to_exitcode(status)
            if self._killed:
                self.failure = f"killed, it did not end within {now() - self._began:.3g}s"
            elif code:
                self.failure = f"exit status {code}" if code > 0 else f"signal: {-code}"
            self._read()
        elif now() < self.deadline + KILL_PATIENCE * self._killed:
            return False
        elif not self._killed:
            self._killed = True
            try:
                os.killpg(self._pid, signal.SIGKILL)
            except OSError:
                pass
            return False
        else:
            self.failure = f"it did not end within {now() - self._began:.3g}s, not even by SIGKILL"
        self._close()
        return True

    def lines(self) -> list[str]:
        """What it said, without empty lines: the last OUTPUT_LINES of them."""
        text = self.output.decode("utf-8", "backslashreplace")
        lines = [line.rstrip() for line in text.splitlines() if line.strip()]
        left_out = len(lines) - OUTPUT_LINES
        if left_out > 0 or self.dropped:
            lines = [f"({max(left_out, 0)} lines and {self.dropped} bytes before this are left out)",
                     *lines[-OUTPUT_LINES:]]
        return lines

    def _read(self) -> None:
        while self._pipe >= 0:
            try:
                data = os.read(self._pipe, OUTPUT_LIMIT)
            except BlockingIOError:
                return
            if not data:
                os.close(self._pipe)
                self._pipe = -1
            self.output += data
            excess = len(self.output) - OUTPUT_LIMIT
            if excess > 0:
                del self.output[:excess]
                self.dropped += excess
                if now() >= self.deadline:
                    return  # it talks without end; let its time run out

    def _close(self) -> None:
        for fd in self.descriptors():
            os.close(fd)
        self._pid, self._pipe, self._pidfd = 0, -1, -1


def _seal_descriptors() -> None:
    """Let no child inherit what we were started with, such as a readiness descriptor; ours are sealed anyway."""
    try:
        names = os.listdir("/proc/self/fd")
    except OSError:
        names = [str(fd) for fd in range(3, 256)]
    for fd in map(int, names):
        try:
            if fd > 2 and os.get_inheritable(fd):
                os.set_inheritable(fd, False)
        except OSError:
            pass  # the one that listdir had open


def finish_command(command: Command, grace: float = 0.0) -> None:
    """Wait until a command that runs has ended, at its timeout, or at its grace after we were told to stop."""
    while not command.advance():
        try:
            if stop.signal:
                command.deadline = min(command.deadline, stop.at + grace)
                command.wait()
            else:
                stop.during(command.wait)
        except Stopped:
            pass  # stop.signal tells it from now on


def run_command(text: str, timeout: float, grace: float = 0.0) -> Command:
    """Run a shell command to its end or its timeout (seconds), or to its grace after we were told to stop."""
    command = Command(text, timeout)
    command.start()
    finish_command(command, grace)
    return command


def log_output(command: Command, what: str, secret: bool) -> None:
    """Log what a command said: as an error if it failed."""
    level = "error" if command.failure else "debug"
    lines = command.lines()
    if secret and lines:
        lines = [f"({len(lines)} lines of output are not shown: secret = true)"]
    for line in lines:
        log(level, f"{what}: {line}")


# ---- destinations -------------------------------------------------------------------------------------

def follow(dest: str, root: str = "") -> str:
    """The file that a destination means: below root, with symlinks followed as they read for one inside of root.

    What does not exist yet is taken as it stands. OSError (ELOOP) after 40 links.
    """
    root = os.path.realpath(root) if root else ""
    path, links = root, 0
    waiting = (dest if root else os.path.abspath(dest)).split("/")[::-1]
    while waiting:
        name = waiting.pop()
        if name in ("", "."):
            continue
        if name == "..":
            path = root if path == root else path.rpartition("/")[0]
            continue
        try:
            link = os.readlink(f"{path}/{name}")
        except OSError:  # no symlink, or not there
            path = f"{path}/{name}"
            continue
        links += 1
        if links > 40:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), dest)
        if link.startswith("/"):
            path = root
        waiting += link.split("/")[::-1]
    return path or "/"


class Present:
    """A destination as it is now: its contents (None: there is none), mode (permission bits), uid and gid."""

    __slots__ = ("data", "mode", "uid", "gid")

    def __init__(self, path: str) -> None:
        """Error if it is something else than a file; OSError if it cannot be read."""
        self.data: bytes | None = None
        self.mode = self.uid = self.gid = -1
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            return
        if not stat.S_ISREG(status.st_mode):
            raise Error("is a directory" if stat.S_ISDIR(status.st_mode) else "is not a regular file")
        self.mode, self.uid, self.gid = stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid
        with open(path, "rb") as file:
            self.data = file.read()

    @classmethod
    def of(cls, data: bytes | None, mode: int, uid: int, gid: int) -> Present:
        """A destination as it was."""
        self = cls.__new__(cls)
        self.data, self.mode, self.uid, self.gid = data, mode, uid, gid
        return self


class Wanted:
    """A destination as it shall be: contents, mode, uid and gid (-1: as it comes); asked: the resource sets these."""

    __slots__ = ("data", "mode", "uid", "gid", "asked")

    def __init__(self, data: bytes, mode: int, uid: int = -1, gid: int = -1,
                 asked: tuple[bool, bool] = (False, False)) -> None:
        self.data, self.mode, self.uid, self.gid, self.asked = data, mode, uid, gid, asked

    @classmethod
    def by(cls, resource: Resource, data: bytes, present: Present) -> Wanted:
        """What a resource makes of these contents. Error for an owner or group that nobody knows."""
        uid = owner_id(resource.owner, resource.uid, "owner")
        gid = owner_id(resource.group, resource.gid, "group")
        mode = resource.mode
        if mode is None and present.data is None:
            mode = 0o600 if resource.secret else 0o644
        elif mode is None:
            mode = present.mode & 0o700 if resource.secret else present.mode
        return cls(data, mode, uid if uid >= 0 else present.uid, gid if gid >= 0 else present.gid, (uid >= 0, gid >= 0))

    def differences(self, present: Present, dest: str, secret: bool) -> list[str]:
        """Why a present file is not as wanted, in confd's words; empty if it is."""
        if present.data is None:
            return [f"{dest} does not exist"]
        found = []
        for what, has, should in (("UID", present.uid, self.uid), ("GID", present.gid, self.gid)):
            if should not in (-1, has):
                found.append(f"{dest} has {what} {has} should be {should}")
        if present.mode != self.mode:
            found.append(f"{dest} has mode {mode_text(present.mode)} should be {mode_text(self.mode)}")
        if present.data != self.data:
            sums = ["a secret" if secret else md5.md5(data).hexdigest()
                    for data in (present.data, self.data)]
            found.append(f"{dest} has md5sum {sums[0]} should be {sums[1]}")
        return found


def owner_id(name: str, number: int, what: str) -> int:
    """The id that owner/uid or group/gid ask for (what: "owner" or "group"); -1 for none. Error: nobody knows the name.

    A number wins over a name, as in confd's fork.
    """
    if number >= 0 or not name:
        return number
    if name.isdecimal():
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid if what == "owner" else grp.getgrnam(name).gr_gid
    except KeyError:
        raise Error(f"{what} {name} is not known here") from None


def mode_text(mode: int) -> str:
    """Permission bits as ls shows them, -rw-r--r--."""
    return stat.filemode(stat.S_IFREG | mode)


def write_stage(path: str, wanted: Wanted, lenient: bool = False) -> str:
    """Write the wanted file beside its destination, complete and on disk; its path. OSError, Error: nothing is left.

    Nobody else can read it before its mode is set, and no link that was laid there is followed. lenient: an
    owner that we may not give is a warning even if the resource asks for it, as in confd.
    """
    directory, name = os.path.split(path)
    stage = f"{directory}/.{os.fsdecode(os.fsencode(name)[:200])}.{os.getpid()}-{os.urandom(6).hex()}"
    try:
        fd = os.open(stage, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Error(f"cannot write in {directory}: {reason(error)}") from None
    try:
        try:
            write_all(fd, wanted.data)
            _give(fd, path, wanted, lenient)
            os.fsync(fd)
        finally:
            os.close(fd)
    except BaseException:
        os.unlink(stage)
        raise
    return stage


def sweep_stages(directory: str) -> None:
    """Remove what renderers that are no more have staged in a directory."""
    try:
        names = os.listdir(directory)
    except OSError:
        return
    for name in names:
        writer = re.fullmatch(r"\..*\.([0-9]+)-[0-9a-f]{12}", name)
        try:
            if writer:
                os.kill(int(writer[1]), 0)
        except ProcessLookupError:
            log.info(f"removing {directory}/{name}, left over from a renderer that was killed")
            os.unlink(f"{directory}/{name}")
        except (OSError, OverflowError):
            pass  # it lives, under another user


def _give(fd: int, path: str, wanted: Wanted, lenient: bool) -> None:
    """Set owner, group and mode of an open file."""
    status = os.fstat(fd)
    for what, has, should, asked in (("owner", status.st_uid, wanted.uid, wanted.asked[0]),
                                     ("group", status.st_gid, wanted.gid, wanted.asked[1])):
        if should in (-1, has):
            continue
        try:
            os.fchown(fd, should if what == "owner" else -1, should if what == "group" else -1)
        except PermissionError as error:
            if asked and not lenient:
                raise Error(f"cannot give it {what} {should}: {reason(error)} (only root may)") from None
            log.warning(f"cannot keep {what} {should} of {path}: {reason(error)}; it gets {what} {has}")
    os.fchmod(fd, wanted.mode)


def swap(stage: str, path: str, wanted: Wanted, lenient: bool = False) -> None:
    """Put a stage file in the place of its destination, by renaming it; on disk when this returns. OSError.

    A file that is itself a mount point cannot be replaced: it is then written in place.
    """
    try:
        os.rename(stage, path)
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.EXDEV):
            raise
        log.debug(f"Rename target is likely a mount. Trying to write instead: {path}")
        write_in_place(path, wanted, lenient)
        os.unlink(stage)
    try:
        directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:  # the new file is there all the same, and its reload is due
        if error.errno != errno.EINVAL:  # a file system that cannot do this for directories
            log.warning(f"cannot make the change of {path} last through a power failure: {reason(error)}")


def put_back(path: str, old: Present, lenient: bool = True) -> None:
    """Make a file again what it was. OSError, Error: nothing has changed."""
    if old.data is None:
        remove_file(path)
        return
    wanted = Wanted(old.data, old.mode, old.uid, old.gid)
    stage = write_stage(path, wanted, lenient)
    try:
        swap(stage, path, wanted, lenient)
    except BaseException:
        remove_file(stage)
        raise


def write_in_place(path: str, wanted: Wanted, lenient: bool = False) -> None:
    """Overwrite a file that cannot be replaced. If that fails, the old contents are put back. OSError."""
    with open(path, "rb") as file:
        old = file.read()
    fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        try:
            _reserve(fd, len(wanted.data))
            write_all(fd, wanted.data)
            os.ftruncate(fd, len(wanted.data))
            os.fsync(fd)
        except BaseException:
            os.lseek(fd, 0, os.SEEK_SET)
            write_all(fd, old)
            os.ftruncate(fd, len(old))
            raise
        _give(fd, path, wanted, lenient)
    finally:
        os.close(fd)


def _reserve(fd: int, size: int) -> None:
    """Have the file system set the room aside, so that a full disk is known before the first byte is lost."""
    try:
        if size:
            os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        # else it cannot be done here; write() will tell


DIFF_LIMIT = 1 << 20  # bytes of a file from which on a diff takes too long


def diff_lines(old: bytes | None, new: bytes, dest: str, secret: bool = False) -> list[str]:
    """A unified diff of a destination's old (None: there is none) and new contents, line by line without newlines."""
    if secret:
        return [f"{dest} changes (not shown: secret = true)"]
    if max(len(old or b""), len(new)) > DIFF_LIMIT:
        return [f"{dest} changes ({len(old or b'')} to {len(new)} bytes, too large for a diff)"]
    found = difflib.unified_diff(_diff_input(old or b""), _diff_input(new), "/dev/null" if old is None else dest, dest,
                                 lineterm="")
    return "\n".join(found).split("\n")


def _diff_input(data: bytes) -> list[str]:
    *lines, last = data.decode("utf-8", "backslashreplace").split("\n")
    return [*lines, f"{last}\n\\ No newline at end of file"] if last else lines


# ---- one pass over all resources ----------------------------------------------------------------------

class RenderOptions:
    """How to render: directories, the global prefix, which resources, and what to leave out.

    show: takes the lines of a diff if one is wanted; services: where services are defined; run: where their state is;
    door: gives the door to a service by its name (see Bond), None if files are not to be bound to services; optional:
    a confdir need not be there.
    """

    __slots__ = ("confdir", "prefix", "as_confd", "names", "root", "dry_run", "sync_only", "show", "services", "run",
                 "door", "optional")

    def __init__(self, confdir: str, prefix: str = "", as_confd: bool = False, names: Sequence[str] = (),
                 root: str = "", dry_run: bool = False, sync_only: bool = False,
                 show: Callable[[list[str]], None] | None = None, services: str = "", run: str = "",
                 door: Callable[[str], Any] | None = None, optional: bool = False) -> None:
        self.confdir, self.prefix, self.as_confd, self.names = confdir, prefix, as_confd, names
        self.root, self.dry_run, self.sync_only, self.show = root, dry_run, sync_only, show
        self.services, self.run, self.optional = services, run, optional
        self.door = None if root or dry_run or sync_only else door

    @property
    def templates(self) -> str:
        """The directory of the templates."""
        return os.path.join(self.confdir, "templates")


class Reload:
    """A reload command that has to run: for whose sake, how long it may take, whether its output may be shown.

    template: reload_cmd as it stands in the resource. The rest is for the render loop: the command while it runs,
    whether a change came meanwhile, failures in a row, when to try again (0: at once), the last failure told.
    """

    __slots__ = ("dest", "timeout", "secret", "template", "command", "again", "attempts", "due", "told")

    def __init__(self, dest: str, timeout: float, secret: bool, template: str) -> None:
        self.dest, self.timeout, self.secret, self.template = dest, timeout, secret, template
        self.command: Command | None = None
        self.again = False
        self.attempts, self.due, self.told = 0, 0.0, ""


class FileChange:
    """A destination that is not as it should be: path (links followed), dest (for people), what it is and shall be.

    wanted: None if it is to go; stage: where its new contents wait, "" if they do not; reload: the text of reload_cmd.
    """

    __slots__ = ("resource", "path", "dest", "present", "wanted", "stage", "reload")

    def __init__(self, resource: Resource, path: str, dest: str, present: Present, wanted: Wanted | None,
                 reload: str) -> None:
        self.resource, self.path, self.dest = resource, path, dest
        self.present, self.wanted, self.reload = present, wanted, reload
        self.stage = ""

    def diff(self) -> list[str]:
        """What changes, line by line."""
        return diff_lines(self.present.data, self.wanted.data if self.wanted else b"", self.dest, self.resource.secret)


def find_change(resource: Resource, name: str, text: str | None, options: RenderOptions,
                level: str = "info") -> FileChange | None:
    """How the destination `name` of a resource has to change to hold a text (None: to be gone); None if it is right.

    Error or OSError say why it cannot be.
    """
    path = follow(name, options.root)
    dest = path if options.root else name
    parent = os.path.dirname(path)
    if not (resource.make_dirs or options.root) and not os.path.isdir(parent):
        raise Error(f"{parent} is not a directory" if os.path.lexists(parent)
                    else f"directory {parent} does not exist (make_dirs = true makes it)")
    present = Present(path)
    reload = "" if options.sync_only else resource.command("reload_cmd", path, path)
    if text is None:
        if present.data is None:
            return None
        log(level, f"{dest} is obsolete")
        return FileChange(resource, path, dest, present, None, reload)
    wanted = Wanted.by(resource, text.encode("utf-8", "surrogateescape"), present)
    differences = wanted.differences(present, dest, resource.secret)
    if not differences:
        log.debug(f"Target config {dest} in sync")
        return None
    for difference in differences:
        log(level, difference)
    log(level, f"Target config {dest} out of sync")
    fault = resource.output_format and check_format(text, resource.output_format)
    if fault:
        why = "not shown: secret = true" if resource.secret else fault
        raise Error(f"output format validation failed ({resource.output_format}): {why}")
    return FileChange(resource, path, dest, present, wanted, reload)


def stage_steps(resource: Resource, texts: Mapping[str, str | None], options: RenderOptions,
                quiet: bool = False) -> Generator[Command, None, list[FileChange]]:
    """Put beside the destinations of a resource what differs from these texts, and check it.

    In steps: what it yields is to be started and run to its end. Returns the changes, ready for swap_all(); Error or
    OSError say why that cannot be, and nothing is left then. quiet: this has failed before, so tell less.
    """
    changes: list[FileChange] = []
    try:
        for name, text in texts.items():
            change = find_change(resource, name, text, options, "debug" if quiet else "info")
            if not change:
                continue
            changes.append(change)
            if options.show:
                options.show(change.diff())
            if options.dry_run:
                log.warning(f"Noop mode enabled. {change.dest} will not be modified")
            elif change.wanted:
                if resource.make_dirs or options.root:
                    os.makedirs(os.path.dirname(change.path), 0o755, exist_ok=True)
                change.stage = write_stage(change.path, change.wanted, options.as_confd)
                yield from _check_steps(change, options, quiet)
    except BaseException:
        discard(changes)
        raise
    return changes


def _check_steps(change: FileChange, options: RenderOptions, quiet: bool) -> Iterator[Command]:
    resource = change.resource
    text = resource.command("check_cmd", change.stage, change.path)
    if text and not options.sync_only:
        command = Command(text, resource.check_timeout)
        yield command
        if not quiet:
            log_output(command, f"check_cmd of {resource.name}", resource.secret)
        if command.failure:
            raise Error(f"Config check failed: {command.failure}")


def discard(changes: Iterable[FileChange]) -> None:
    """Take stage files away."""
    for change in changes:
        if change.stage:
            remove_file(change.stage)  # a command may have taken it away
            change.stage = ""


def swap_all(changes: Sequence[FileChange], lenient: bool = False) -> None:
    """Put what is staged in its place, and remove what is to go. OSError: everything is as it was before."""
    swapped: list[FileChange] = []
    try:
        if stop.signal:
            raise Stopped
        for change in changes:
            if change.wanted:
                swap(change.stage, change.path, change.wanted, lenient)
                change.stage = ""
            else:
                remove_file(change.path)
            swapped.append(change)
    except BaseException:
        discard(changes)
        for change in swapped:
            try:
                put_back(change.path, change.present)
            except (Error, OSError) as error:
                log.error(f"cannot put the old {change.dest} back: {reason(error)}")
        raise
    for change in changes:
        log.info(f"Target config {change.dest} has been {'updated' if change.wanted else 'removed'}")


def note_reloads(changes: Iterable[FileChange], reloads: dict[str, Reload]) -> None:
    """Have the reload_cmds of changed files run."""
    for change in changes:
        if change.reload:
            resource = change.resource
            due = reloads.setdefault(change.reload, Reload(change.dest, resource.reload_timeout, resource.secret,
                                                           resource.reload_cmd))
            due.again, due.due = bool(due.command), 0.0


def ways_to_reload(changes: Iterable[FileChange]) -> list[str]:
    """How the service of these files is to be told: "restart" alone, or "signal N" and "command TEXT", each once."""
    ways: dict[str, None] = {}
    for change in changes:
        way = change.resource.reload
        if way != "none":
            ways[f"command {change.reload}" if way == "command" else way] = None
    return ["restart"] if "restart" in ways else list(ways)


def run_to_end(steps: Generator[Command, None, Any]) -> Any:
    """Take all steps, each command to its end; what they return."""
    while True:
        try:
            command = next(steps)
        except StopIteration as end:
            return end.value
        command.start()
        finish_command(command)


def run_reloads(reloads: dict[str, Reload]) -> int:
    """Run the commands that are due, each once; those that fail stay due. Returns how many failed."""
    failed = 0
    for text, reload in list(reloads.items()):
        command = run_command(text, reload.timeout, STOP_GRACE)
        log_output(command, f"reload_cmd of {reload.dest}", reload.secret)
        if command.failure:
            failed += 1
            log.error(f"cannot reload after the change of {reload.dest}: {command.failure}: {text}")
        else:
            del reloads[text]
    return failed


def resources_of(options: RenderOptions) -> tuple[list[Resource], list[Finding]]:
    """The resources that options ask for, and what is wrong with conf.d."""
    return load_resources(options.confdir, options.prefix, options.as_confd, options.names, options.optional)


def log_findings(findings: Iterable[Finding]) -> None:
    """Tell what is wrong with conf.d."""
    for finding in findings:
        words = "Cannot process template resource " if finding.path and finding.level == "error" else ""
        log(finding.level, words + (f"{finding.place}: " if finding.path else "") + finding.message)


def together(resources: Sequence[Resource], tables: Mapping[str, Mapping[str, Any]]) -> list[list[Resource]]:
    """What is changed together, in order: resources without a service each alone, then those of each service.

    tables: see service_tables; services stand in the order of their `after`.
    """
    services: dict[str, list[Resource]] = {}
    for resource in resources:
        if resource.service:
            services.setdefault(resource.service, []).append(resource)

    def depth(name: str, below: tuple[str, ...] = ()) -> int:
        after = tables.get(name, {}).get("after", ()) if name not in below else ()
        above = [depth(other, (*below, name)) for other in after if isinstance(other, str)]
        return 1 + max(above, default=0)

    return [[resource] for resource in resources if not resource.service] + sorted(
        services.values(), key=lambda unit: depth(unit[0].service))


def service_tables(directory: str) -> dict[str, dict[str, Any]]:
    """What the service.toml files say, by the names of services, as far as they can be read."""
    tables: dict[str, dict[str, Any]] = {}
    for name in sorted(os.listdir(directory)) if directory and os.path.isdir(directory) else ():
        try:
            tables[name] = tomllib.loads((read_small(f"{directory}/{name}/service.toml", 1 << 20) or b"").decode())
        except (OSError, ValueError, RecursionError):
            pass  # who supervises it complains
    return tables


def environments(tables: Mapping[str, Mapping[str, Any]], options: RenderOptions) -> list[Resource]:
    """The resources that stand for `environment` in service.toml files."""
    return [plain_resource(f"environment of {name}", name, dest=f"{options.run}/{name}/env", keys=(key,), mode=0o600,
                           prefix=effective_prefix(options.prefix, ""), secret=True, make_dirs=True, reload="restart")
            for name, table in tables.items()
            if isinstance(key := table.get("environment"), str) and key and options.door]


def make_page(resource: Resource, view: KeyTree, options: RenderOptions, asked: Asked | None = None) -> Page:
    """The page of a resource."""
    kind = ManyPage if resource.foreach else Page if resource.src else EnvironmentPage
    return kind(resource, view, options.templates, options.as_confd, asked)


def render_unit(unit: Sequence[Resource], tree: KeyTree, options: RenderOptions,
                reloads: dict[str, Reload]) -> dict[str, int]:
    """Bring the destinations of resources that are changed together up to date; how many had which outcome.

    Reloads that this calls for are added to reloads, but a service that runs is told at once. A failure is told, and
    then all destinations are as before.
    """
    changes: list[FileChange] = []
    counts: dict[str, int] = {}
    for resource in unit:
        before = len(changes)
        try:
            page = make_page(resource, tree.under(resource.prefix, resource.keys), options)
            for part, texts in page.parts():
                changes += run_to_end(stage_steps(part, texts, options))
        except Skipped as skipped:
            log.info(f'{resource.dest} skipped: {skipped} (on_missing = "skip")')
            outcome = "skipped"
        except Exception as error:
            why = reason(error) if isinstance(error, (Error, OSError)) else bug(error)
            log.error(f"cannot render {resource.dest}: {why} ({resource.name})")
            outcome = "failed"
        except Stopped:
            discard(changes)
            raise
        else:
            changed = len(changes) > before
            outcome = "in sync" if not changed else "out of sync" if options.dry_run else "updated"
        counts[outcome] = counts.get(outcome, 0) + 1
    if options.dry_run or not changes:
        return counts
    service = unit[0].service
    try:
        if "failed" in counts:
            discard(changes)
            raise Error(f"the files of {service or resource.name} are changed together or not at all")
        swap_all(changes, options.as_confd)
        if options.door and service:
            options.door(service).reload(ways_to_reload(changes))
        note_reloads([change for change in changes if not service or change.resource.reload == "command"], reloads)
    except (Error, OSError) as error:
        log.error(f"cannot render {', '.join(change.dest for change in changes)}: {reason(error)}")
        counts["failed"] = counts.get("failed", 0) + counts.pop("updated", 0)
    return counts


def render_once(source: Any, options: RenderOptions) -> int:
    """Render every resource once from one read of source; returns the exit code, after a line for each failure.

    source: has read(keys) -> (revision, pairs), like Etcd and KeyFile.
    """
    reloads: dict[str, Reload] = {}
    count = {"updated": 0, "in sync": 0, "out of sync": 0, "skipped": 0, "failed": 0}
    resources, findings = resources_of(options)
    log_findings(findings)
    count["failed"] += len({finding.place for finding in findings if finding.level == "error"})
    total = len(resources) + count["failed"]
    if not resources and not findings:
        log.warning("Found no templates")
    keys = [key for resource in resources for key in resource.lookups]
    code = EXIT_OK
    tree = KeyTree()
    due = resources
    try:
        if keys:
            revision, pairs = stop.during(source.read, keys)
            tree = KeyTree(pairs, revision)
    except Exception as error:
        log.error(str(error) if isinstance(error, Error) else bug(error))
        code, due = getattr(error, "exit_code", EXIT_FAILED), []
        count["failed"] += len(resources)
    for unit in together(due, service_tables(options.services)):
        if stop.signal:
            break
        try:
            for outcome, number in render_unit(unit, tree, options, reloads).items():
                count[outcome] += number
        except Stopped:
            break
    failed_reloads = run_reloads(reloads)
    if stop.signal:
        raise Stopped
    parts = [f"{number} {outcome}" for outcome, number in count.items() if number]
    if failed_reloads:
        parts.append(f"{failed_reloads} reload{'s' * (failed_reloads > 1)} failed")
    failed = bool(count["failed"] or failed_reloads)
    log("error" if failed else "info", f"{total} template resources: {', '.join(parts) or 'nothing to do'}")
    return code or (EXIT_FAILED if failed else EXIT_OK)


# ---- trying again -------------------------------------------------------------------------------------

RETRY_FIRST, RETRY_LIMIT = 1.0, 60.0  # seconds: the first pause and the longest, after a failed render or reload


def backoff(attempts: int, first: float, limit: float) -> float:
    """Seconds to pause after so many failures (from 1 on) in a row: doubled each time, and half of it by chance."""
    return min(limit, first * (1 << min(attempts - 1, 20))) * (0.5 + os.urandom(1)[0] / 512)


# ---- services that are bound to their files -----------------------------------------------------------
#
# RUN/.confd/NAME/ keeps what must outlive the renderer; whatever is written there is there whole or not at all:
#   state     JSON of Bond.SAVED          history   a JSON line for each change
#   undo/N/   what generation N replaced: plan (JSON, a row for each file) and the old contents 0, 1, ...
#   released  the service may be started: PID 1 looks for it
#   hold, rollback, release               what somebody asks for by these verbs
#
# A change is journalled: undo/N, then phase "swap", the swaps, phase "reload", the reload, phase "verify", phase "".
# Whoever finds "swap" puts the old files back; the other phases go on where they are.

RENDERER = "confd"  # the service that renders files; it is built in
STATE_DIRECTORY = ".confd"  # below RUN; s6-svscan passes over names with a dot
UNDO_LIMIT = 8  # generations of files that can be taken back one by one
HISTORY_LIMIT = 100  # changes that are remembered
ASK_AGAIN, ASK_PATIENCE = 0.25, 10.0  # seconds between two tries of verify_cmd; the least that one may take
LOOK_AGAIN = 0.1  # seconds between two looks at a service whose events cannot be had
KILLS_FORGIVEN = 3  # deaths by SIGKILL that do not count against a change
TOLD_LINES = 40  # lines of a diff, and of a service's output, that are logged when a change is taken back


BROKEN_OFF = "the change was broken off"


def _ways(*lists: list[str]) -> list[str]:
    ways = [way for each in lists for way in each]
    return ["restart"] if "restart" in ways else list(dict.fromkeys(ways))


class Generation:
    """One set of files that was swapped in.

    number: of undo/N; revision: of its keys; before: the one it replaced, -1 for the first; digest: of its texts; ways:
    see ways_to_reload; files; began: when its first change came (seconds since the epoch); proved: the service bore it.
    """

    SAVED = ("number", "revision", "before", "digest", "ways", "files", "began", "proved")
    __slots__ = (*SAVED, "until")

    def __init__(self, number: int, revision: int, before: int, digest: str, ways: list[str], files: list[str],
                 began: float, proved: bool = False) -> None:
        self.number, self.revision, self.before, self.digest = number, revision, before, digest
        self.ways, self.files, self.began, self.proved = ways, files, began, proved
        self.until = 0.0  # point on now() at which it is proved


class Bond:
    """A service and the files that it is bound to: what it runs on, and the change that is being made.

    door: to the service, by s6's protocol alone: look(), listen(), deaths(), descriptors(), command(), signal(),
    catches(), lines(), scan(), hush(). Nothing in here waits: whoever drives it polls descriptors() until wake_at and
    calls advance().
    """

    SAVED = ("revision", "wanted", "why", "bad", "phase", "ways", "undone", "count")

    def __init__(self, name: str, run: str, door: Any) -> None:
        """Take up what an earlier renderer has left. OSError."""
        self.name, self.directory, self.door = name, f"{run}/{STATE_DIRECTORY}/{name}", door
        self.revision = self.wanted = -1  # what it runs on, and what it should
        self.why = ""  # why these differ
        self.bad = ""  # digest of the texts that it did not bear
        self.phase, self.ways = "", list[str]()  # what is to be done, and how to tell the service
        self.undone = False  # the files are old ones that came back
        self.count = 0  # the last number of a generation
        self.generations: list[Generation] = []
        self.verify, self.timeout, self.questions, self.secret = 0.0, 60.0, list[str](), False
        self.command: Command | None = None
        self.due, self.attempts, self.told = 0.0, 0, ""
        self.forgiven = 0
        self.was_held = False
        self.awaiting = False  # whether it has to come up
        self.pid, self.deaths_left = 0, 0  # of the process that counts, or must not be the one; deaths that may happen
        self.until = self.patience = self.ask_at = 0.0
        self.open_questions: list[str] = []
        self.answer = ""
        os.makedirs(f"{self.directory}/undo", 0o700, exist_ok=True)
        self._load()

    def bind(self, resources: Iterable[Resource]) -> None:
        """Take over what its resources say of reload and verification."""
        known = list(resources)
        self.secret = any(resource.secret for resource in known)
        self.verify = max((resource.verify for resource in known), default=0.0)
        self.timeout = max((resource.reload_timeout for resource in known), default=60.0)
        self.questions = list(dict.fromkeys(text for resource in known
                                            if (text := resource.command("verify_cmd", resource.dest, resource.dest))))

    # -- what it knows

    @property
    def open(self) -> bool:
        """Whether files can be swapped now: no reload runs, none has to be awaited, nothing is being taken back."""
        return self.phase in ("", "verify", "reload") and not self.awaiting and not (
            self.command and self.phase == "reload")

    @property
    def held(self) -> bool:
        """Whether somebody wants the files to stay as they are."""
        return os.path.exists(f"{self.directory}/hold")

    @property
    def released(self) -> bool:
        """Whether the service may be started."""
        return os.path.exists(f"{self.directory}/released")

    def asked(self, verb: str) -> bool:
        """Whether a verb has asked for something since the last call."""
        try:
            os.unlink(f"{self.directory}/{verb}")
        except OSError:
            return False
        return True

    def descriptors(self) -> list[int]:
        """What to poll for reading."""
        return [*(self.door.descriptors() if self.phase == "verify" else ()),
                *(self.command.descriptors() if self.command else ())]

    @property
    def wake_at(self) -> float:
        """When to call advance() even if no descriptor has anything."""
        if not self.phase:
            return float("inf")
        if self.command:
            return self.command.wake_at
        if self.phase != "verify":
            return self.due
        times = [self.patience if self.awaiting else self.until]
        times += [generation.until for generation in self.generations if not generation.proved and generation.until]
        if self.open_questions and not self.awaiting:
            times.append(self.ask_at)
        if not self.door.descriptors():
            times.append(now() + LOOK_AGAIN)
        return min(times)

    # -- what a render brings

    def wait(self, why: str) -> None:
        """Nothing can be rendered so far."""
        if not self.released and why != self.why:
            self.why = why
            self._save()

    def refuse(self, revision: int, why: str) -> None:
        """The files of this revision cannot be made, or are not wanted: the old ones stay."""
        if why != self.why:
            self._record("refused", why, revision)
        if (revision, why) != (self.wanted, self.why):
            self.wanted, self.why = revision, why
            self._save()

    def settle(self, revision: int) -> None:
        """The files are as this revision wants them."""
        released = self.released
        if (self.revision, self.wanted, self.why, self.bad, released) != (revision, revision, "", "", True):
            self.revision, self.wanted, self.why, self.bad = revision, revision, "", ""
            if not released and not self.phase:
                self.phase = "reload"
            self._save()

    def take(self, changes: Sequence[FileChange], revision: int, digest: str, began: float, lenient: bool) -> None:
        """Swap staged files in. Error, OSError: all is as before, and nothing staged is left."""
        self.rest()
        before = self.phase
        self.count += 1
        generation = Generation(self.count, revision, self.revision, digest, ways_to_reload(changes),
                                [change.dest for change in changes], began)
        try:
            self._write_plan(self.count, [(change.path, change.dest, change.resource.secret, change.present)
                                          for change in changes])
            self.generations.append(generation)
            self.phase = "swap"
            self._save(must=True)
            swap_all(changes, lenient)
        except BaseException:
            discard(changes)
            self.generations = [other for other in self.generations if other is not generation]
            self.phase = before
            self._save()
            self._forget(generation.number)
            raise
        gone: list[int] = []
        if len(self.generations) > UNDO_LIMIT:
            gone = [self.generations.pop(0).number] if self.generations[0].proved else self._join()
        self.ways = _ways(self.ways, generation.ways)
        self.revision, self.wanted, self.why, self.bad, self.undone = revision, revision, "", "", False
        self._begin("reload")
        for number in gone:
            self._forget(number)

    def take_back(self, why: str) -> str:
        """Somebody wants the files back that were there before; why not, "" if they come."""
        if not self.open:
            return "a change is being made"
        if not self.generations or self.generations[-1].before < 0:
            return "there are no files to go back to"
        self.rest()
        self.why = why
        self._begin("undo")
        return ""

    def rest(self) -> None:
        """Leave everything as it is: no command runs, nobody is listened to."""
        if self.command:
            self.command.deadline = now()
            finish_command(self.command)
            self.command = None
        self.door.hush()

    # -- the phases

    def advance(self) -> None:
        """Do what can be done now."""
        phases = {"undo": self._undo, "reload": self._reload, "verify": self._verify}
        while self.phase and phases[self.phase]():
            pass

    def _begin(self, phase: str) -> bool:
        self.phase, self.due, self.attempts, self.told = phase, 0.0, 0, ""
        self.forgiven = 0 if phase == "reload" else self.forgiven
        self.patience = now() + self.timeout
        self.awaiting, self.open_questions = False, []
        self._save()
        return True

    def _put_off(self, what: str) -> bool:
        """It cannot be done now: tell it once, and try again later."""
        self.attempts += 1
        self.due = now() + backoff(self.attempts, RETRY_FIRST, RETRY_LIMIT)
        log("debug" if what == self.told else "error", what)
        self.told = what
        return False

    def _reload(self) -> bool:
        """Tell the service of its new files: it has to be there, and to have started."""
        if self.command:
            if not self.command.advance():
                return False
            command, self.command = self.command, None
            if not command.failure or not self.told:
                log_output(command, f"reload_cmd of {self.name}", self.secret)
            if command.failure:
                return self._put_off(f"cannot reload {self.name}: {command.failure}: {command.text}")
            self.ways = self.ways[1:]
        if self.due > now():
            return False
        try:
            self.door.listen()
            seen = self.door.look()
            self.door.deaths()
            if not self.released:
                replace_file(f"{self.directory}/released", b"", 0o600)
                log.info(f"{self.name} has its files and may start")
                self.door.scan()
                if not seen.up:
                    return self._done()
            if not seen.up and not seen.wanted and not seen.gave_up or seen.waits:
                return self._done()  # it starts with these files when it is time
            if not seen.up or "restart" in self.ways:
                self.pid = seen.pid if seen.up else 0
                self.door.command("r" if seen.up else "u")
                return self._await_up(int(seen.up))
        except (Error, OSError) as error:
            return self._put_off(f"cannot reload {self.name}: {reason(error)}")
        self.pid, self.deaths_left = seen.pid, 0
        if self.ways and now() < self.patience and not (seen.settled or self.door.catches(seen.pid, self.ways[0])):
            self.due = now() + LOOK_AGAIN / 5  # a signal would kill what has not set up its handlers yet
            return False
        if self.ways and self.ways[0].startswith("command "):
            self.command = Command(self.ways[0].removeprefix("command "), self.timeout)
            self.command.start()
            return False
        if self.ways:
            try:
                self.door.signal(int(self.ways[0].removeprefix("signal ")))
            except Error as error:
                return self._put_off(f"cannot reload {self.name}: {error}")
            self.ways = self.ways[1:]
            return True
        self._begin("verify")
        self._count_from_now()
        return True

    def _await_up(self, deaths: int) -> bool:
        self.ways = []
        self._begin("verify")
        self.awaiting, self.deaths_left = True, deaths
        return True

    def _count_from_now(self) -> None:
        """The service is up: from now on it has to stay so."""
        self.awaiting, self.until, self.ask_at = False, now() + self.verify, now()
        self.open_questions, self.answer = list(self.questions), ""
        for generation in self.generations:
            generation.until = generation.until or self.until

    def _verify(self) -> bool:
        """See whether the service comes up again and stays so."""
        self.deaths_left -= self.door.deaths()
        try:
            seen = self.door.look()
        except Error as error:
            return self._failed(str(error))
        if not seen.up and (seen.waits or not seen.wanted and not seen.gave_up):
            return self._done()  # somebody has stopped it
        died = self.deaths_left < 0 or not self.awaiting and not (seen.up and seen.pid == self.pid)
        if died and seen.ended == "SIGKILL" and not seen.gave_up and self.forgiven < KILLS_FORGIVEN:
            self.forgiven += 1  # it does not do that to itself: its files get another chance to prove themselves
            log.warning(f"{self.name} was killed while its files of revision {self.revision} were verified")
            return self._await_up(0)
        if died or seen.gave_up:
            return self._failed(f"it ended: {seen.ended}")
        if self.awaiting:
            if seen.up and seen.pid != self.pid and seen.ready:
                self.pid = seen.pid
                self._count_from_now()
            elif now() >= self.patience:
                return self._failed(f"it was not {'ready' if seen.up else 'up'} within {self.timeout:g}s")
            elif seen.startable and seen.pid != self.pid:
                self.door.command("u")  # a restart that we asked for needs no pause
            return not self.awaiting
        if self.open_questions and not self._answered():
            if now() < self.until or not self.answer or self.command:
                return False
            return self._failed(f"verify_cmd: {self.answer}: {self.open_questions[0]}")
        aged = [generation for generation in self.generations if not generation.proved and generation.until <= now()]
        for generation in aged:
            self._prove(generation)
        if self.until <= now():
            return self._done()
        if aged:
            self._save()
        return False

    def _answered(self) -> bool:
        """Whether verify_cmd has succeeded; asks if it is time to."""
        while self.open_questions:
            if not self.command:
                if now() < self.ask_at or (now() >= self.until and self.answer):
                    return False
                self.command = Command(self.open_questions[0], max(self.until - now(), ASK_PATIENCE))
                self.command.start()
            if not self.command.advance():
                return False
            command, self.command = self.command, None
            self.ask_at, self.answer = now() + ASK_AGAIN * bool(command.failure), command.failure
            if not command.failure:
                del self.open_questions[0]
        return True

    def _prove(self, generation: Generation) -> None:
        generation.proved = True
        self._record("live", "", generation.revision, generation)

    def _done(self) -> bool:
        """The service bears its files, or is not there to tell."""
        for generation in self.generations:
            if not generation.proved:
                self._prove(generation)
        if self.undone:
            log.info(f"{self.name} is on the files of revision {self.revision} again")
        self.undone, self.ways = False, []
        self.door.hush()
        return not self._begin("")

    def _failed(self, why: str) -> bool:
        """The service does not bear its files."""
        self.rest()
        last = self.generations[-1] if self.generations else None
        if last and last.before >= 0 and not last.proved:
            self.why = why
            return self._begin("undo")
        what = "fails on its old files too" if self.undone else "fails"
        log.error(f"{self.name} {what}: {why}; there are no older files to go back to")
        self._tell_output()
        self._record("failed", why, self.revision, last)
        if last:
            last.proved = True  # it is the best there is
        return self._done()

    def _undo(self) -> bool:
        """Bring back what the last generation replaced: all of it, or nothing yet."""
        if self.due > now():
            return False
        generation = self.generations[-1]
        try:
            olds = self._plan(generation.number)
            lines = [line for _, dest, secret, old in olds for line in self._diff(dest, old, secret)]
            self._put_back(olds)
        except (FileNotFoundError, ValueError) as error:
            log.error(f"the files that {self.name} had before are lost: {reason(error)}")
            lines = []
        except (Error, OSError) as error:
            return self._put_off(f"cannot take the files of {self.name} back: {reason(error)}")
        self.generations.pop()
        self.revision, self.undone = generation.before, True
        self.ways = _ways(self.ways, generation.ways)
        if self.why == BROKEN_OFF:
            log.warning(f"a change of {self.name} to revision {generation.revision} was broken off; its old files are "
                        "back")
        else:
            self.bad = generation.digest
            self._tell_undone(generation, lines)
        for each in self.generations:
            each.until = 0.0
        self._begin("reload")
        self._forget(generation.number)
        return True

    def _tell_undone(self, generation: Generation, lines: list[str]) -> None:
        log.error(f"took back the change of {self.name} to revision {generation.revision}, its files are those of "
                  f"revision {self.revision} again: {self.why}")
        for line in lines[:TOLD_LINES] + ["..."] * (len(lines) > TOLD_LINES):
            log.error(f"{self.name}: {line}")
        self._tell_output()
        self._record("taken back", self.why, generation.revision, generation)

    def _tell_output(self) -> None:
        for line in self.door.lines()[-TOLD_LINES:]:
            log.error(f"{self.name} said: {line}")

    # -- what is on disk

    def _load(self) -> None:
        try:
            state = json.loads(read_small(f"{self.directory}/state", 1 << 20) or b"{}")
            self.generations = [Generation(**row) for row in state.pop("generations", ())]
            for name in self.SAVED:
                setattr(self, name, state.get(name, getattr(self, name)))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            log.error(f"cannot read the state of {self.name} in {self.directory}: {reason(error)}; it begins anew")
        known = {str(generation.number) for generation in self.generations}
        for name in set(os.listdir(f"{self.directory}/undo")) - known:
            self._forget(name)
        if self.phase == "swap":
            self.wanted, self.why = self.generations[-1].revision, BROKEN_OFF
            self._begin("undo")
        elif self.phase == "verify":
            self._begin("verify")
            self.awaiting, self.deaths_left = True, 1

    def _save(self, must: bool = False) -> None:
        state = {name: getattr(self, name) for name in self.SAVED}
        state["generations"] = [{name: getattr(each, name) for name in Generation.SAVED} for each in self.generations]
        try:
            replace_file(f"{self.directory}/state", json.dumps(state).encode(), 0o600)
        except OSError as error:
            if must:
                raise
            log.error(f"cannot write {self.directory}/state: {reason(error)}")  # after a crash more is done anew

    def _record(self, result: str, why: str, revision: int, generation: Generation | None = None) -> None:
        """Add a line to the history."""
        row = {"time": time.time(), "revision": revision, "files": generation.files if generation else [],
               "result": result, "why": mask(why),
               "seconds": round(max(0.0, time.time() - generation.began), 3) if generation else None}
        path = f"{self.directory}/history"
        try:
            lines = (read_small(path, 1 << 22) or b"").splitlines(keepends=True)[1 - HISTORY_LIMIT:]
            replace_file(path, b"".join(lines) + json.dumps(row).encode() + b"\n", 0o600)
        except OSError as error:
            log.error(f"cannot write {path}: {reason(error)}")

    def _write_plan(self, number: int, olds: Iterable[tuple[str, str, bool, Present]]) -> None:
        """Write what a generation replaces: path, destination for people, whether it is secret, what it was."""
        place = f"{self.directory}/undo/{number}"
        os.makedirs(f"{place}.new", 0o700, exist_ok=True)
        plan = []
        for index, (path, dest, secret, old) in enumerate(olds):
            if old.data is not None:
                replace_file(f"{place}.new/{index}", old.data, 0o600)
            plan.append([path, dest, secret, old.mode, old.uid, old.gid])
        replace_file(f"{place}.new/plan", json.dumps(plan).encode("ascii"), 0o600)
        os.rename(f"{place}.new", place)

    def _plan(self, number: int) -> list[tuple[str, str, bool, Present]]:
        """What _write_plan has written. OSError, ValueError."""
        place = f"{self.directory}/undo/{number}"
        with open(f"{place}/plan", "rb") as file:
            rows = json.loads(file.read())
        found = []
        for index, (path, dest, secret, mode, uid, gid) in enumerate(rows):
            old = Present.of(None, mode, uid, gid)
            if mode >= 0:
                with open(f"{place}/{index}", "rb") as file:
                    old.data = file.read()
            found.append((path, dest, secret, old))
        return found

    def _put_back(self, olds: Sequence[tuple[str, str, bool, Present]]) -> None:
        """Make files what they were: stage all, then swap all. OSError, Error: nothing has changed, or half of it."""
        staged: list[tuple[str, str, Wanted]] = []
        try:
            for path, _, _, old in olds:
                if old.data is not None:
                    wanted = Wanted(old.data, old.mode, old.uid, old.gid)
                    staged.append((write_stage(path, wanted, True), path, wanted))
            for path, _, _, old in olds:
                if old.data is None:
                    remove_file(path)
            while staged:
                stage, path, wanted = staged[0]
                swap(stage, path, wanted, True)
                del staged[0]
        finally:
            for stage, _, _ in staged:
                remove_file(stage)

    def _diff(self, dest: str, old: Present, secret: bool) -> list[str]:
        """What is to be taken back, line by line."""
        data = Present(follow(dest)).data
        return diff_lines(old.data, data or b"", dest, secret) if data != old.data else []

    def _join(self) -> list[int]:
        """Make one generation of the two oldest, which are then taken back together; what is to be forgotten for it."""
        older, newer = self.generations[:2]
        rows = {row[0]: row for number in (newer.number, older.number) for row in self._plan(number)}
        gone = [newer.number, older.number]
        self.count += 1
        self._write_plan(self.count, rows.values())
        newer.number, newer.before, newer.ways = self.count, older.before, _ways(older.ways, newer.ways)
        newer.files = sorted({*newer.files, *older.files})
        self.generations.remove(older)
        return gone

    def _forget(self, number: int | str) -> None:
        """Remove what a generation replaced."""
        for place in (f"{self.directory}/undo/{number}", f"{self.directory}/undo/{number}.new"):
            if os.path.isdir(place):
                remove_tree(place)


def _reap_orphans() -> None:
    """As process 1 of a container we inherit what commands leave behind; no command of ours runs now."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


# ---- the render loop ----------------------------------------------------------------------------------
#
# One poll loop over the watch, its probe, and the commands that run. Nothing in it waits but connecting and whole
# reads, which have short deadlines, and a render, which asks nobody for anything.

READ_FIRST, READ_LIMIT = 0.5, 10.0  # the same between whole reads while etcd does not answer
OUTAGE_SILENCE = 3.0  # seconds that etcd may be away before a log line tells it
OUTAGE_REMINDER = 60.0  # seconds between two log lines about one outage
FILES_INTERVAL = 2.0  # seconds between two looks at conf.d and templates: one stat(2) a file, no inotify needed
SETTLE = 0.002  # seconds for the other parts of one revision to arrive, when several ranges are watched
CATCH_UP = 0.05  # seconds in which v2's waits, one event each, may catch up with the store before a render
MISSED_PATIENCE = 5.0  # seconds that a living watch has to tell of what a periodic whole read found changed
MOST_CHECKS = 4  # check commands that run at a time


def lock_state(run: str) -> int:
    """Take the state of services below RUN for this renderer; the descriptor of the lock, which holds our pid.

    Error: it is another's. OSError.
    """
    os.makedirs(f"{run}/{STATE_DIRECTORY}", 0o700, exist_ok=True)
    fd = os.open(f"{run}/{STATE_DIRECTORY}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        other = os.read(fd, 32).decode("ascii", "replace").strip()
        os.close(fd)
        raise Error(f"another renderer looks after the services in {run}: process {other}") from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def bond_state(run: str, name: str) -> dict[str, Any]:
    """What the renderer says of the files of a service, for people; {} if it has none."""
    try:
        state = json.loads(read_small(f"{run}/{STATE_DIRECTORY}/{name}/state", 1 << 20) or b"{}")
        if not state:
            return {}
        generations = state["generations"]
        return {"revision": state["revision"] if state["revision"] >= 0 else None, "why": mask(state["why"]) or None,
                "wanted": state["wanted"] if state["wanted"] >= 0 else None, "phase": state["phase"] or None,
                "held": os.path.exists(f"{run}/{STATE_DIRECTORY}/{name}/hold"),
                "can_roll_back": bool(generations) and generations[-1]["before"] >= 0}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def renderer_problem(run: str) -> str:
    """Why the renderer has not everything right, "" if it has."""
    try:
        return (read_small(f"{run}/{STATE_DIRECTORY}/problem", 65536) or b"").decode("utf-8", "replace")
    except OSError:
        return ""


def bound_history(run: str, name: str) -> list[dict[str, Any]]:
    """The last changes of the files of a service: time (s since the epoch), revision, files, result, why, seconds."""
    try:
        lines = (read_small(f"{run}/{STATE_DIRECTORY}/{name}/history", 1 << 22) or b"").splitlines()
        return [{"service": name, **json.loads(line)} for line in lines]
    except (OSError, ValueError):
        return []


def ask_renderer(run: str, name: str, request: str) -> None:
    """Leave a request (hold, release, rollback) for the renderer, and wake it. Error if none is there to take it."""
    place = f"{run}/{STATE_DIRECTORY}"
    if not os.path.isdir(f"{place}/{name}"):
        known = [each for each in os.listdir(place) if os.path.isdir(f"{place}/{each}")] if os.path.isdir(place) else []
        raise Error(f"{name} is not bound to any files{nearest(name, known)}")
    try:
        if request == "release":
            remove_file(f"{place}/{name}/hold")
        os.close(os.open(f"{place}/{name}/{request}", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        fd = os.open(f"{place}/lock", os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            raise Error(f"no renderer runs that could do it now: it will when it starts (etcdinit status {RENDERER})")
        except BlockingIOError:
            os.kill(int(os.read(fd, 32)), signal.SIGUSR1)
        finally:
            os.close(fd)
    except (OSError, ValueError) as error:
        raise Error(f"cannot ask the renderer to {request} {name}: {reason(error)}") from None


class Unit:
    """What is changed together: one resource, or those of a service, which is then bound to them (bond).

    since, due: when the first change not rendered yet came, and when to render (0: no); began: the same as since, for
    the render that is made now, on the wall clock.
    """

    __slots__ = ("pages", "bond", "since", "due", "began", "steps", "command", "told", "attempts", "done")

    def __init__(self, pages: list[Page], bond: Bond | None = None) -> None:
        self.pages, self.bond = pages, bond
        self.since = self.due = self.began = 0.0
        self.steps: Generator[Command, None, None] | None = None  # of a render that waits for a check
        self.command: Command | None = None
        self.told, self.attempts = "", 0  # the last failure that was logged, failures in a row
        self.done = False  # it was rendered at least once

    @property
    def resources(self) -> list[Resource]:
        """The resources of its pages."""
        return [page.resource for page in self.pages]

    @property
    def name(self) -> str:
        """What it is called when conf.d is read again."""
        return self.resources[0].service and f"service {self.resources[0].service}" or self.resources[0].name

    @property
    def commands(self) -> set[str]:
        """Units that share one are checked and swapped one after another."""
        return {resource.reload_cmd or resource.check_cmd for resource in self.resources} - {""}

    def touch(self, quiet: float, resource: Resource | None = None) -> None:
        """It is to be rendered once no more change has come for the debounce time, at least quiet seconds."""
        least, most = resource.debounce if resource else (0.0, 0.0)
        moment = now()
        self.since = self.since or moment
        self.due = min(moment + max(least, quiet), self.since + max(most, quiet))


class Renderer:
    """Keeps the files of conf.d's resources what etcd's keys make them. run() ends with Stopped, or with Error."""

    def __init__(self, source: Any, options: RenderOptions, interval: float, max_outage: float = 0.0,
                 ready: Callable[[], None] | None = None) -> None:
        """source: has read() and watch(), as Etcd and KeyFile; interval: seconds between whole reads; max_outage:
        seconds without etcd after which to give up (0: never); ready: called once every file has been right."""
        self.source, self.options, self.interval = source, options, interval
        self.max_outage, self.ready = max_outage, ready
        self.mirror = Mirror()
        self.watch: Any = None
        self.units: list[Unit] = []
        self.bonds: dict[str, Bond] = {}
        self.views: dict[tuple[str, tuple[str, ...]], KeyTree] = {}  # what a prefix and keys show
        self.scopes: dict[str, list[tuple[str, KeyTree]]] = {}  # a key: the views that hold all below it, their prefix
        self.reloads: dict[str, Reload] = {}
        self.reread = False  # SIGHUP has come
        self.asked = False  # SIGUSR1 has come: a verb has left a request
        self._lock = -1  # of the state of services
        self._rendered = False  # something, since the last look at files
        self._untrimmed = True
        self._problem = ""  # what keeps this from being ready, as it was told last
        self._sound = True  # conf.d could be read whole
        self._stamps: list[tuple[str, Any]] = []  # of conf.d's files
        self._files_at = self._pass_at = self._read_at = 0.0
        self._missed_at, self._compared_at = float("inf"), 0.0
        self._reads_failed = 0
        self._away_reason = ""
        self._away_since = self._told_at = 0.0  # since when etcd is away; when that is to be told

    def run(self) -> NoReturn:
        """The loop."""
        wake, wake_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGHUP, self._on_hangup)
        signal.signal(signal.SIGUSR1, self._on_request)
        signal.set_wakeup_fd(wake_end, warn_on_full_buffer=False)
        try:
            if self.options.optional and self.options.door:  # we are a service
                try:
                    self._lock = lock_state(self.options.run)
                except OSError as error:
                    log.debug(f"cannot keep a state in {self.options.run}: {reason(error)}")
            self._load(resources_of(self.options))
            while True:
                self._step()
                poll = select.poll()
                poll.register(wake, select.POLLIN)
                for fd in self._descriptors():
                    poll.register(fd, select.POLLIN)
                stop.during(poll.poll, max(0, int((self._deadline() - now()) * 1000) + 1))
                try:
                    os.read(wake, 512)
                except BlockingIOError:
                    pass
        finally:
            self._abandon()
            signal.set_wakeup_fd(-1)
            for fd in (wake, wake_end):
                os.close(fd)

    def _on_hangup(self, number: int, frame: object) -> None:
        self.reread = True

    def _on_request(self, number: int, frame: object) -> None:
        self.asked = True

    def _step(self) -> None:
        """Everything that is due now."""
        if stop.signal:
            raise Stopped
        if self.asked or self.reread or now() >= self._files_at:
            self._look_at_requests()
        if self.reread or now() >= self._files_at:
            self._look_at_files()
        self._follow()
        self._advance_commands()
        for unit in self.units:
            if unit.due and unit.due <= now() and not unit.steps and self.watch and self._may_start(unit):
                self._start(unit)
        for bond in self.bonds.values():
            bond.advance()
        for text, reload in list(self.reloads.items()):
            busy = any(unit.steps or unit.since for unit in self.units for resource in unit.resources
                       if not unit.bond and resource.reload_cmd == reload.template)
            if not reload.command and reload.due <= now() and not (busy and reload.due == 0.0):
                reload.command, reload.again = Command(text, reload.timeout), False
                reload.command.start()
        self._report()
        if self.ready and self._sound and self.watch and all(unit.done for unit in self.units):
            log.info("every template resource is rendered")
            self.ready()
            self.ready = None

    def _report(self) -> None:
        """Write down for `etcdinit status` what keeps us from having everything right."""
        problem = "; ".join(dict.fromkeys(unit.told for unit in self.units if unit.told))
        if not self._sound:
            problem = "a file of conf.d has a mistake (etcdinit check)"
        if self._away_since and not self.watch:
            problem = self._away_reason
        if problem != self._problem and self._lock >= 0:
            self._problem = problem
            place = f"{self.options.run}/{STATE_DIRECTORY}"
            try:
                replace_file(f"{place}/problem", mask(problem).encode("utf-8", "replace"), 0o600)
            except OSError as error:
                log.error(f"cannot write in {place}: {reason(error)}")

    def _descriptors(self) -> list[int]:
        found: list[int] = self.watch.descriptors() if self.watch else []
        for command in self._running():
            found += command.descriptors()
        for bond in self.bonds.values():
            found += bond.descriptors()
        return found

    def _running(self) -> list[Command]:
        """The commands that run: checks and reloads; not those of services."""
        commands = [unit.command for unit in self.units] + [reload.command for reload in self.reloads.values()]
        return [command for command in commands if command]

    def _deadline(self) -> float:
        """When something is due even if no descriptor has anything."""
        times = [self._files_at, self._missed_at, self._pass_at if self.watch else self._read_at]
        if self.watch:
            times.append(self._read_at if self.watch.stale else self.watch.deadline)
        if self._away_since:
            times.append(self._told_at)
            if self.max_outage:
                times.append(self._away_since + self.max_outage)
        for unit in self.units:
            if unit.due and not unit.steps and self.watch and self._may_start(unit):
                times.append(unit.due)
        times += [bond.wake_at for bond in self.bonds.values()]
        times += [reload.due for reload in self.reloads.values() if reload.due and not reload.command]
        times += [command.wake_at for command in self._running()]
        return min(times)

    # -- conf.d and templates

    def _look_at_files(self) -> None:
        """Read conf.d again if it has changed or we were told to, and render what a changed template belongs to."""
        self._files_at = now() + FILES_INTERVAL
        if native and not self._rendered and self._untrimmed:
            self._untrimmed = False
            gc.collect()
            native.trim()  # as PID 1 does: code that is not needed at rest is in the page cache too
        self._untrimmed = self._untrimmed or self._rendered
        self._rendered = False
        if not self._running() and not any(bond.command for bond in self.bonds.values()):
            _reap_orphans()
        stamps = self._conf_stamps()
        if self.reread or stamps != self._stamps:
            log.info("reading conf.d again")
            self.reread = False
            try:
                self._load(resources_of(self.options))
            except Error as error:
                log.error(str(error))
            return
        for unit in self.units:
            for page in unit.pages:
                if any(file_stamp(path) != stamp for path, stamp in page.stamps.items()):
                    page.stamps.clear()
                    unit.touch(0.0)

    def _look_at_requests(self) -> None:
        """Do what verbs have asked for: files that are to be held, released, taken back."""
        self.asked = False
        for unit in self.units:
            bond = unit.bond
            if not bond:
                continue
            if bond.asked("release") or bond.held != bond.was_held:
                bond.was_held, bond.bad = bond.held, ""
                unit.touch(0.0)
            if bond.asked("rollback"):
                why_not = bond.take_back("etcdinit rollback")
                if why_not:
                    log.error(f"cannot roll {bond.name} back: {why_not}")

    def _load(self, loaded: tuple[list[Resource], list[Finding]]) -> None:
        """Take over the resources of conf.d. What has an error now but had none before goes on as it was."""
        resources, findings = loaded
        log_findings(findings)
        self._stamps, self._files_at = self._conf_stamps(), now() + FILES_INTERVAL
        wrong = {finding.path for finding in findings if finding.level == "error"}
        self._sound = not wrong
        done = {unit.name for unit in self.units if unit.done}
        kept = [resource for unit in self.units for resource in unit.resources if resource.path in wrong
                and resource.name not in {resource.name for resource in resources}]
        if not resources and not kept and not findings:
            log.warning("Found no templates")
        self._abandon_checks()
        self.views, self.scopes, self.units = {}, {}, []
        tables = service_tables(self.options.services)
        resources += environments(tables, self.options) if not self.options.names else []
        for each in together([*resources, *kept], tables):
            bond = self._bond(each) if each[0].service and self.options.door else None
            pages = [make_page(resource, self._view(resource), self.options, Asked()) for resource in each]
            unit = Unit(pages, bond)
            unit.done = unit.name in done
            unit.touch(0.0)
            self.units.append(unit)
            for resource in each:
                sweep_stages(os.path.dirname(follow(resource.dest, self.options.root)))
        bound = {unit.bond.name for unit in self.units if unit.bond}
        for name in [name for name in self.bonds if name not in bound]:
            self.bonds.pop(name).rest()
        wanted = top_keys(self._keys())
        if self.watch is None or wanted != self.watch.keys:
            self._close_watch()

    def _keys(self) -> list[str]:
        return [key for unit in self.units for resource in unit.resources for key in resource.lookups]

    def _view(self, resource: Resource) -> KeyTree:
        """What a resource sees of the mirror; the same for those that see the same."""
        seen = resource.prefix, resource.keys
        if seen not in self.views:
            view = self.views[seen] = self.mirror.tree.under(*seen)
            for key in resource.keys:
                scope = self.scopes.setdefault(clean_key(resource.prefix, key), [])
                scope.append((clean_key(resource.prefix).rstrip("/"), view))
        return self.views[seen]

    def _conf_stamps(self) -> list[tuple[str, Any]]:
        """What changes when conf.d or a service.toml does."""
        services = self.options.services
        known = sorted(os.listdir(services)) if self.options.door and os.path.isdir(services) else []
        paths = [f"{services}/{name}/service.toml" for name in known]
        return conf_stamps(self.options.confdir) + [(path, file_stamp(path)) for path in paths]

    def _bond(self, resources: Sequence[Resource]) -> Bond:
        """The bond of the service of these resources. Error if its state cannot be kept."""
        name = resources[0].service
        run = self.options.run
        try:
            if self._lock < 0:
                self._lock = lock_state(run)
            if name not in self.bonds:
                assert self.options.door
                self.bonds[name] = Bond(name, run, self.options.door(name))
        except OSError as error:
            raise Error(f"cannot keep the state of {name} in {run}/{STATE_DIRECTORY}: {reason(error)} "
                        "(it must be writable: ETCDINIT_RUN names another directory)") from None
        self.bonds[name].bind(resources)
        return self.bonds[name]

    # -- etcd

    def _follow(self) -> None:
        """Read whole or take events, as it is; let the resources know."""
        if self.watch is None or self.watch.stale:
            if now() >= self._read_at:
                self._read_whole()
        elif now() >= self._pass_at and self.watch.open:
            self._full_pass()
        if self.watch and not self.watch.stale:
            events = self.watch.step()
            changed = self.mirror.apply(events) if events else {}
            if self.mirror.doubtful and events:
                self.watch.stale = "keys are spelled in two ways"
            elif changed:
                log.debug(f"revision {self.mirror.tree.revision}: {len(changed)} keys changed")
                self._tell(changed, CATCH_UP if self.watch.behind else SETTLE if len(self.watch.keys) > 1 else 0.0)
            if self.watch.stale:
                log.info(f"reading all keys again: {self.watch.stale}")
                self._read_at = 0.0
        if now() >= self._missed_at and not self._watch_lives_since(self._compared_at + 1.0):
            self._missed_at = now() + 1.0  # a silent member may tell it yet, or is left for another that will
        elif now() >= self._missed_at:
            self._missed_at = float("inf")
            missed = self.mirror.unexplained()
            if missed:
                log.error(f"a bug: the watch has missed changes of {len(missed)} keys, as {', '.join(missed[:5])};"
                          " they are rendered now")
        self._mind_outage()

    def _watch_lives_since(self, moment: float) -> bool:
        return bool(self.watch and not self.watch.stale and self.watch.open and self.watch.heard > moment)

    def _read_whole(self) -> None:
        try:
            keys = self._keys()
            revision, pairs = stop.during(self.source.read, keys) if keys else (0, [])
        except Error as error:
            if isinstance(error, UsageError) and not self._reads_failed and self.mirror.tree.revision == 0:
                raise  # as a certificate that is no PEM: waiting will not help
            self._reads_failed += 1
            self._read_at = now() + backoff(self._reads_failed, READ_FIRST, READ_LIMIT)
            self._away(error)
            return
        self._reads_failed, self._read_at = 0, 0.0
        changed = self.mirror.replace(revision, pairs, self.source.floors)
        if self.watch is None:
            self.watch = self.source.watch(keys, revision)
            self._next_pass()
        else:
            self._read_at = now() + backoff(1, READ_FIRST, READ_LIMIT)  # the soonest time for another one
            self.watch.restart(revision)
        self._tell(changed, 0.0)

    def _full_pass(self) -> None:
        """Compare the mirror with etcd, and every file with what it should be."""
        self._next_pass()
        try:
            keys = self._keys()
            revision, pairs = stop.during(self.source.read, keys) if keys else (0, [])
        except Error as error:
            log.warning(f"the periodic pass is put off: {error}")
            self._pass_at = now() + RETRY_LIMIT
            return
        changed = self.mirror.compare(revision, pairs, self.source.floors)
        self._tell(changed, 0.0)
        if changed:
            self._compared_at = now()
            self._missed_at = self._compared_at + MISSED_PATIENCE
        for unit in self.units:
            unit.touch(0.0)

    def _next_pass(self) -> None:
        self._pass_at = now() + self.interval * (0.95 + os.urandom(1)[0] / 2560)

    def _tell(self, changed: Mapping[str, bool], quiet: float) -> None:
        """Bring the views up to date, and have those resources rendered that have asked for what changed."""
        values = self.mirror.tree.values_by_key
        seen: dict[int, dict[str, bool]] = {}  # what changed in each view
        for key, came_or_went in changed.items():
            for place in (key, *parents(key)):
                for top, view in self.scopes.get(place, ()):
                    name = key.removeprefix(top) or "/"
                    seen.setdefault(id(view), {})[name] = came_or_went
                    if key in values:
                        view.put(name, values[key])
                    else:
                        view.delete(name)
        for unit in self.units if seen else ():
            for page in unit.pages:
                if id(page.view) in seen and page.asked and page.asked.touched(seen[id(page.view)]):
                    unit.attempts = 0
                    unit.touch(quiet, page.resource)

    def _close_watch(self) -> None:
        if self.watch:
            self.watch.close()
        self.watch, self._read_at = None, 0.0

    # -- etcd is away

    def _away(self, error: Error) -> None:
        self._away_reason = f"waiting for etcd: {error}"
        for bond in self.bonds.values() if not self.watch else ():
            bond.wait(self._away_reason)
        if not self._away_since:
            self._away_since = now()
            self._told_at = now() + (OUTAGE_SILENCE if self.watch else 0.0)
        if now() >= self._told_at:
            log.warning(f"waiting for etcd: {error}", away=f"{now() - self._away_since:.0f}s")
            self._told_at = now() + OUTAGE_REMINDER
        if self.max_outage and now() - self._away_since >= self.max_outage:
            gone = EtcdUnreachable("", "render", f"etcd was away for {self.max_outage:g} s (--max-outage): {error}")
            raise gone

    def _mind_outage(self) -> None:
        """Tell, once a minute, that etcd is away, and when it is back."""
        if self.watch and self.watch.failure:
            self._away(self.watch.failure)
        elif self._away_since and self.watch and self.watch.open:
            if self._told_at > self._away_since + OUTAGE_SILENCE:
                log.info(f"etcd is back after {now() - self._away_since:.1f}s")
            self._away_since = 0.0

    # -- renders and commands

    def _may_start(self, unit: Unit) -> bool:
        """Whether a unit that is due can be rendered now: services come last, and after those that they come after."""
        running = [other for other in self.units if other.steps]
        if len(running) >= MOST_CHECKS or any(unit.commands & other.commands for other in running):
            return False
        if not unit.bond:
            return True
        earlier = self.units[:self.units.index(unit)]
        if any(other.steps or 0.0 < other.due <= now() or other.bond and not other.bond.open for other in earlier
               if not other.attempts):
            return False
        return unit.bond.open

    def _start(self, unit: Unit) -> None:
        """Render, up to the first check command if there is one."""
        self._rendered = True
        unit.began = time.time() - (now() - unit.since if unit.since else 0.0)
        unit.since = unit.due = 0.0
        bond, revision = unit.bond, self.mirror.tree.revision
        if bond and bond.held:
            self._told(unit, f"{bond.name} keeps its files (etcdinit release {bond.name} ends that)", "warning")
            bond.refuse(revision, "held by etcdinit hold")
            unit.done = True
            return
        found: list[tuple[Resource, dict[str, str | None]]] = []
        why = ""
        for page in unit.pages:
            try:
                found += page.parts()
            except Skipped as skipped:
                why = f'{page.resource.dest} skipped: {skipped} (on_missing = "skip")'
                if bond and not os.path.exists(page.resource.dest):
                    bond.refuse(revision, str(skipped))
                    unit.done = True
                    self._told(unit, why, "info")
                    return
            except Exception as error:
                self._failed(unit, page.resource, error)
                return
        if not found:
            self._told(unit, why, "info")
            unit.done, unit.attempts = True, 0
            return
        everything = repr([sorted(texts.items()) for _, texts in found]).encode("utf-8", "surrogateescape")
        digest = md5.md5(everything).hexdigest()
        if bond and bond.bad == digest:
            unit.done = True
            bond.refuse(revision, bond.why)
            return
        unit.steps = self._unit_steps(unit, found, revision, digest)
        self._go_on(unit)

    def _unit_steps(self, unit: Unit, found: Sequence[tuple[Resource, Mapping[str, str | None]]], revision: int,
                    digest: str) -> Generator[Command, None, None]:
        """Stage and check all, then swap all: what it yields is to be started and run to its end."""
        bond, changes, count = unit.bond, list[FileChange](), unit.bond.count if unit.bond else 0
        try:
            for resource, texts in found:
                try:
                    changes += yield from stage_steps(resource, texts, self.options, quiet=bool(unit.told))
                except Exception as error:
                    error.add_note(resource.name.removeprefix("manifest of "))
                    raise
            if self.options.dry_run or not changes:
                if bond:
                    bond.settle(revision)
            elif not bond:
                swap_all(changes, self.options.as_confd)
                note_reloads(changes, self.reloads)
            elif bond.open and bond.count == count:
                bond.take(changes, revision, digest, unit.began, self.options.as_confd)
            else:  # files have come back meanwhile
                unit.touch(0.0)
        finally:
            discard(changes)

    def _go_on(self, unit: Unit) -> None:
        """Take the next step of a render: to its end, or until it needs a command."""
        assert unit.steps
        try:
            unit.command = next(unit.steps)
            unit.command.start()
            return
        except StopIteration:
            if unit.told:
                log.info(f"{', '.join(resource.dest for resource in unit.resources)} is right again")
            unit.told, unit.attempts, unit.done = "", 0, True
        except Exception as error:
            names = getattr(error, "__notes__", [])
            self._failed(unit, next((r for r in unit.resources if r.name in names), unit.resources[0]), error)
        unit.steps = unit.command = None

    def _failed(self, unit: Unit, resource: Resource, error: Exception) -> None:
        """Tell a failure, once for each cause, and try again later."""
        unit.attempts += 1
        why = reason(error) if isinstance(error, (Error, OSError)) else bug(error)
        self._told(unit, f"cannot render {resource.dest}: {why} ({resource.name})", "error")
        if unit.bond:
            unit.bond.refuse(self.mirror.tree.revision, f"{resource.dest}: {why}")
        if not unit.due:
            unit.since = now()
            unit.due = now() + backoff(unit.attempts, RETRY_FIRST, RETRY_LIMIT)

    def _told(self, unit: Unit, message: str, level: str) -> None:
        log("debug" if unit.told == message else level, message)
        unit.told = message

    def _advance_commands(self) -> None:
        for unit in self.units:
            if unit.command and unit.command.advance():
                unit.command = None
                self._go_on(unit)
        for text, reload in list(self.reloads.items()):
            command = reload.command
            if not command or not command.advance():
                continue
            reload.command = None
            if command.failure:
                reload.attempts += 1
                reload.due = now() + backoff(reload.attempts, RETRY_FIRST, RETRY_LIMIT)
                message = f"cannot reload after the change of {reload.dest}: {command.failure}: {text}"
                if reload.told != message:
                    log_output(command, f"reload_cmd of {reload.dest}", reload.secret)
                log("debug" if reload.told == message else "error", message)
                reload.told = message
                continue
            log_output(command, f"reload_cmd of {reload.dest}", reload.secret)
            if reload.told:
                log.info(f"reloaded after the change of {reload.dest}: {text}")
            if reload.again:
                reload.told, reload.attempts, reload.due = "", 0, 0.0
            else:
                del self.reloads[text]

    def _abandon_checks(self) -> None:
        """Kill the check commands that run, and take their stage files away."""
        for unit in self.units:
            if unit.command:
                unit.command.deadline = now()
                finish_command(unit.command)
            if unit.steps:
                unit.steps.close()
            unit.steps = unit.command = None

    def _abandon(self) -> None:
        """Leave nothing behind: no stage file, no command. Reloads that run or are due have STOP_GRACE to end."""
        self._abandon_checks()
        for bond in self.bonds.values():
            bond.rest()
        for text, reload in self.reloads.items():
            if not reload.command and not reload.attempts:
                reload.command = Command(text, STOP_GRACE)
                reload.command.start()
            if reload.command:
                finish_command(reload.command, STOP_GRACE)
        self._close_watch()


def tell_ready(fd: int = -1, environ: Mapping[str, str] = os.environ) -> None:
    """Say that we are ready: a newline to fd, which is then closed (s6), and READY=1 to $NOTIFY_SOCKET (systemd)."""
    try:
        if fd >= 0:
            os.write(fd, b"\n")
            os.close(fd)
    except OSError as error:
        log.warning(f"cannot tell readiness to descriptor {fd}: {reason(error)}")
    address = environ.get("NOTIFY_SOCKET", "")
    if address:
        try:
            link = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            link.connect("\0" + address[1:] if address[0] == "@" else address)
            link.send(b"READY=1")
            link.close()
        except OSError as error:
            log.warning(f"cannot tell readiness to {address}: {reason(error)}")


# ---- what can be told without etcd --------------------------------------------------------------------

_STORE_READERS = {"exists": "key", "get": "key", "getv": "key", "gets": "pattern", "getvs": "pattern",
                  "ls": "directory", "lsdir": "directory"}


def lint(confdir: str, prefix: str = "", as_confd: bool = False) -> list[Finding]:
    """Every mistake that can be found in conf.d and templates without keys, in the order of the resources."""
    resources, findings = load_resources(confdir, prefix, as_confd)
    if not resources and not findings:
        findings.append(Finding(f"{confdir}/conf.d", 0, "warning", "Found no templates"))
    writers: dict[str, Resource] = {}
    for resource in resources:
        findings += _lint_destination(resource, writers)
        findings += _lint_template(resource, f"{confdir}/templates", resource.src, [])
    return list({str(finding): finding for finding in findings}.values())


def _lint_destination(resource: Resource, writers: dict[str, Resource]) -> list[Finding]:
    found = []

    def fault(key: str, level: str, message: str) -> None:
        found.append(Finding(resource.path, resource.lines.get(key, resource.lines[""]), level, message))

    path = os.path.abspath(resource.dest)
    other = writers.setdefault(path, resource)
    if other is not resource:
        fault("dest", "error", f"{path} is also written by {other.name}")
    if os.path.isdir(path):
        fault("dest", "error", f"{path} is a directory")
    elif not resource.make_dirs and not os.path.isdir(os.path.dirname(path)):
        fault("dest", "warning", f"directory {os.path.dirname(path)} does not exist here (make_dirs = true makes it)")
    for key in resource.required:
        if not at_or_below(map(clean_key, resource.keys))(clean_key(key)):
            fault("required", "error", f'keys does not list the required "{key}"')
    for key, number in (("owner", resource.uid), ("group", resource.gid)):
        try:
            owner_id(getattr(resource, key), number, key)
        except Error as error:
            fault(key, "warning", str(error))
    return found


def _lint_template(resource: Resource, templates: str, name: str, above: list[str]) -> list[Finding]:
    """The mistakes of a resource's template and of what it includes; above: those that include this one."""
    path = os.path.normpath(f"{templates}/{name}")
    try:
        text = read_text(path)
    except OSError as error:
        why = f"Missing template: {path}" if isinstance(error, FileNotFoundError) else f"{path}: {reason(error)}"
        return [Finding(resource.path, resource.lines["src"], "error", why)]
    functions = resource_functions(KeyTree(), templates)
    try:
        template = Template(text, name=os.path.basename(path), functions=functions)
    except TemplateError as error:
        place = re.match(r"template: .*?:(\d+)(?::\d+)?: ", str(error))
        message = str(error)[place.end():] if place else str(error)
        return [Finding(path, int(place[1]) if place else 0, "error", message)]
    found = []
    for called, arguments, line in template.calls:
        word = arguments[0] if arguments else None
        if not isinstance(word, str):
            continue
        if called == "include" and word not in above and len(above) < INCLUDE_DEPTH:
            found += _lint_template(resource, templates, word, [*above, name])
        elif called in _STORE_READERS:
            complaint = _unlisted(_STORE_READERS[called], word, resource)
            if complaint:
                found.append(Finding(path, line, "error", f'{called} "{word}": {complaint}'))
    for bare in re.finditer(r"\{\{-?\s*datetime\s*-?\}\}", text):
        found.append(Finding(path, 1 + text.count("\n", 0, bare.start()), "warning",
                             "datetime without .Format changes the file at every pass"))
    return found


def _unlisted(kind: str, wanted: str, resource: Resource) -> str:
    """Why a template can never find what it asks the store for, "" if it may."""
    listed = [clean_key(key) for key in resource.keys]
    if kind == "key":
        if wanted != clean_key(wanted):
            return f'no key reads so, it would be "{clean_key(wanted)}"'
        if at_or_below(listed)(wanted):
            return ""
    else:
        if kind == "pattern":
            wanted = re.split(r"[*?\[\\]", wanted)[0].rpartition("/")[0]
        wanted = clean_key(wanted)
        if at_or_below(listed)(wanted) or any(map(at_or_below([wanted]), listed)):
            return ""
    return f"keys of {resource.name} does not list it"


# ======================================================================================================
# LOGS
# The output of services on its way out: whole lines, a prefix or JSON around them, the last ones kept.
# Does not know who wrote a line.
# ======================================================================================================

LINE_MAX = 65536  # bytes; a longer line goes on in pieces
TAIL_LINES = 100  # lines of every service that are kept for status and crash reports
TAIL_BYTES = 8192  # ... as long as they are not longer than this together
OUTLET_CHUNK = 4096  # bytes; a pipe that polls writable takes as many without blocking (PIPE_BUF)
OUTLET_HIGH = 131072  # bytes that may wait for a slow reader before the services have to wait too


def _json_lines(name: str, lines: bytes) -> bytes:
    wall = time.time()
    head = (f'{{"time":"{time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(wall))}.{int(wall * 1000) % 1000:03d}Z",'
            f'"service":{json_text(name)},"message":').encode()
    return b"".join(head + json_text(line.decode("utf-8", "replace").rstrip("\r")).encode() + b"}\n"
                    for line in lines[:-1].split(b"\n"))


def _prefixed_lines(name: str, lines: bytes) -> bytes:
    head = f"[{name}] ".encode("utf-8", "surrogateescape")
    return head + lines[:-1].replace(b"\n", b"\n" + head) + b"\n"


# ETCDINIT_LOG_FORMAT: how whole lines of a service leave; "raw" is not here: such services own the stdout themselves
OUTPUT_STYLES: dict[str, Callable[[str, bytes], bytes]] = {
    "text": lambda name, lines: lines,
    "prefix": _prefixed_lines,
    "json": _json_lines,
}


class Output:
    """The output of one service: bytes go in as they are read, whole lines come out in the style asked for."""

    __slots__ = ("name", "style", "partial", "kept")

    def __init__(self, name: str, style: str = "text") -> None:
        self.name, self.style = name, style
        self.partial = b""  # the begin of a line whose end was not read yet
        self.kept = b""  # at least the last TAIL_LINES lines, or TAIL_BYTES bytes

    def feed(self, data: bytes, last: bool = False) -> bytes:
        """What can go on, now that data was read; with last, the rest of an unfinished line too."""
        data = self.partial + data
        cut = data.rfind(b"\n") + 1
        if last or (not cut and len(data) > LINE_MAX):
            cut = len(data)
        self.partial, lines = data[cut:], data[:cut]
        if not lines:
            return b""
        if not lines.endswith(b"\n") and (last or self.style != "text"):
            lines += b"\n"
        self.kept += lines[-TAIL_BYTES:]
        if len(self.kept) > 2 * TAIL_BYTES:
            self.kept = self.kept[-TAIL_BYTES:]
        return OUTPUT_STYLES[self.style](self.name, lines)

    def tail(self) -> list[str]:
        """The last lines, at most TAIL_LINES, the unfinished one included."""
        lines = (self.kept[-TAIL_BYTES:] + self.partial[-TAIL_BYTES:]).decode("utf-8", "replace").split("\n")
        return (lines if lines[-1] else lines[:-1])[-TAIL_LINES:]


def nonblocking_twin(fd: int) -> int:
    """Another descriptor of the same pipe or terminal that never blocks; the same one where that cannot be had.

    O_NONBLOCK on fd itself would reach everybody who shares it.
    """
    try:
        if os.fstat(fd).st_mode & 0o170000 in (0o010000, 0o020000):
            return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        pass
    return fd


class Outlet:
    """The container's standard output. Writing never blocks: what it does not take now waits here in order.

    When more than OUTLET_HIGH bytes wait, `full` is true and nobody should bring more; nothing is dropped
    but after the reader closed its end.
    """

    __slots__ = ("fd", "waiting")

    def __init__(self, fd: int) -> None:
        self.fd = nonblocking_twin(fd)
        self.waiting = bytearray()

    @property
    def full(self) -> bool:
        """Whether the writers should wait."""
        return len(self.waiting) > OUTLET_HIGH

    def write(self, data: bytes) -> bool:
        """Take data, write what can be written now; False when something still waits."""
        self.waiting += data
        done = 0
        while done < len(self.waiting) and writable(self.fd):
            try:
                done += os.write(self.fd, self.waiting[done:done + OUTLET_CHUNK])
            except BlockingIOError:
                break
            except OSError:  # nobody reads any more, or the disk is full: the services must not suffer from it
                done = len(self.waiting)
        del self.waiting[:done]
        return not self.waiting


# ======================================================================================================
# SUPERVISE
# Service directories, the state machine, the on-disk protocol of s6 (status, control FIFO, events, lock),
# the duties of PID 1, the order of a shutdown. One process for all services. Works with the tools of every
# s6 release from 2.10 to 2.15: skarnet.org/software/s6/servicedir.html, s6-supervise.html, fifodir.html.
# Knows nothing of etcd and templates.
# ======================================================================================================

KILL_AGAIN = 5.0  # seconds between two SIGKILLs to a process that has not died of the first
FINISH_TIMEOUT_MS = 5000  # default of timeout-finish
RESTART_PAUSE = 1.0  # seconds; s6's rule, see Supervisor.bury
FAILED_START_PAUSE = 60.0  # seconds after a run script that could not be executed, or a fork that failed
EXEC_PATIENCE = 2.0  # seconds that a child may need to execute its program before PID 1 goes on without its report
DEATH_TALLY, DEATH_TALLY_MAX = 100, 4096  # deaths that are remembered: default and limit of max-death-tally
NAME_MAX, SERVICES_MAX = 251, 1000  # of s6-svscan

def ending(wstat: int) -> str:
    """How a process ended, in words: `exit code 3`, `SIGKILL`."""
    if wstat & 0x7F:
        return SIGNAL_NAMES.get(wstat & 0x7F, f"signal {wstat & 0x7F}")
    return f"exit code {wstat >> 8 & 0xFF}"


def exit_code(wstat: int) -> int:
    """The exit code that stands for a waitpid status: 128 + N for a death by signal N, as in a shell."""
    return 128 + (wstat & 0x7F) if wstat & 0x7F else wstat >> 8 & 0xFF


# ---- formats: time stamps, status record, death tally --------------------------------------------------

TAI_OFFSET = 2**62 + 37  # TAI64 label of the Unix epoch as skalibs counts it: with the leap seconds up to 2017


def pack_stamp(wall_ns: int) -> bytes:
    """A TAI64N label (12 bytes) of nanoseconds since the Unix epoch."""
    return (TAI_OFFSET + wall_ns // 1_000_000_000).to_bytes(8, "big") + (wall_ns % 1_000_000_000).to_bytes(4, "big")


def unpack_stamp(label: bytes) -> int:
    """Nanoseconds since the Unix epoch of a TAI64N label; 0 for one that stands for no time."""
    return max(0, (int.from_bytes(label[:8], "big") - TAI_OFFSET) * 1_000_000_000
               + int.from_bytes(label[8:12], "big"))


PAUSED, FINISHING, WANTUP, READY = 1, 2, 4, 8  # flags of the status record


class Status:
    """What supervise/status says of a service.

    stamp: last change between up and down; ready_stamp: last change of readiness (both ns since the epoch);
    pid: of run, while finishing of finish, 0 when down; wstat: how run ended last, as waitpid tells it.
    """

    __slots__ = ("stamp", "ready_stamp", "pid", "pgid", "wstat", "flags")

    def __init__(self, stamp: int, ready_stamp: int, pid: int, pgid: int, wstat: int, flags: int) -> None:
        self.stamp, self.ready_stamp, self.pid, self.pgid = stamp, ready_stamp, pid, pgid
        self.wstat, self.flags = wstat, flags

    @property
    def up(self) -> bool:
        """Whether run runs."""
        return bool(self.pid) and not self.flags & FINISHING

    @property
    def ready(self) -> bool:
        """Whether an up service has said that it is ready, or a down one can be started again."""
        return bool(self.flags & READY)

    def pack(self) -> bytes:
        """The 43 bytes that every release reads rightly.

        s6 up to 2.12 and from 2.14 on reads the first 35: two stamps, pid, wstat, flags. s6 2.13 reads all:
        two stamps, pid, process group as 8 bytes of which it keeps the low 4, wstat, flags.
        """
        tail = (self.wstat & 0xFFFF).to_bytes(2, "big") + bytes((self.flags,))
        return (pack_stamp(self.stamp) + pack_stamp(self.ready_stamp) + self.pid.to_bytes(8, "big")
                + tail + b"\0" + self.pgid.to_bytes(4, "big") + tail)

    @classmethod
    def unpack(cls, record: bytes) -> Status:
        """Read the record of any s6 release from 2.10 on, or our own; ValueError if it is neither."""
        if len(record) not in (35, 43):
            raise ValueError(f"a status record has 35 or 43 bytes, not {len(record)}")
        tail, pgid = record[-3:], int.from_bytes(record[36:40], "big") if len(record) == 43 else 0
        return cls(unpack_stamp(record[:12]), unpack_stamp(record[12:24]),
                   int.from_bytes(record[28:32], "big"), pgid, int.from_bytes(tail[:2], "big"), tail[2])


def pack_death(wall_ns: int, wstat: int) -> bytes:
    """One record (14 bytes) of supervise/death_tally."""
    return pack_stamp(wall_ns) + bytes((exit_code(wstat), wstat & 0x7F))


def unpack_deaths(tally: bytes) -> list[tuple[int, int, int]]:
    """The records of a death tally: time (ns since the epoch), exit code, signal; a broken end is left out."""
    return [(unpack_stamp(tally[at:at + 12]), tally[at + 12], tally[at + 13]) for at in range(0, len(tally) - 13, 14)]


# ---- events --------------------------------------------------------------------------------------------
# A fifodir: every listener puts a FIFO of its own in it, the notifier writes one letter to each.
# s supervisor started, u up, U ready, d died, D can be started again, O failed for good, x supervisor left

FIFO_PREFIX, FIFO_LENGTH = "ftrig1:@", 39  # ftrig1:@<24 hex digits of a TAI64N label>:<6 letters>


def make_fifodir(path: str) -> None:
    """Make a directory for events: only members of our group may listen. One that is there stays as it is."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return
    try:
        os.chown(path, -1, os.getegid())
    except PermissionError:
        pass
    os.chmod(path, 0o3730)


def notify(fifodir: str, events: bytes) -> None:
    """Send events to every listener. A FIFO without a reader is removed, a full one is passed over."""
    try:
        names = os.listdir(fifodir)
    except OSError:
        return
    for name in names:
        if len(name) != FIFO_LENGTH or not name.startswith(FIFO_PREFIX):
            continue
        path = f"{fifodir}/{name}"
        try:
            fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno == errno.ENXIO:
                _unlink(path)
            continue
        try:
            if events and _is_fifo(fd):
                os.write(fd, events)
        except BrokenPipeError:
            _unlink(path)
        except OSError:
            pass
        finally:
            os.close(fd)


def _is_fifo(fd: int) -> bool:
    return os.fstat(fd).st_mode & 0o170000 == 0o010000


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass


class Listener:
    """A FIFO of ours in a fifodir; fd can be polled for the letters of events. close() removes it."""

    __slots__ = ("fd", "path")

    def __init__(self, fifodir: str) -> None:
        """OSError if the directory is not there or not ours to listen in."""
        name = f"{FIFO_PREFIX}{pack_stamp(time.time_ns()).hex()}:{os.urandom(3).hex()}"
        hidden, self.path = f"{fifodir}/.{name}", f"{fifodir}/{name}"
        os.mkfifo(hidden, 0o622)
        try:
            os.chmod(hidden, 0o622)
            self.fd = os.open(hidden, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)  # a reader and, against EOF, a writer
            os.rename(hidden, self.path)
        except OSError:
            _unlink(hidden)
            raise

    def read(self) -> bytes:
        """The events that came since the last call."""
        try:
            return os.read(self.fd, 4096)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        """Stop listening."""
        _unlink(self.path)
        os.close(self.fd)


# ---- the state machine ---------------------------------------------------------------------------------
# state x input -> next state, actions, event. Inputs are the bytes of the control FIFO and what happens:
# "timeout" the deadline passed, "started"/"failed" a start did or did not succeed, "ready" a newline came
# on the notification fd, "death" the process died, "fatal" finish ended with 125. Actions are methods of
# Supervisor, numbers are signals to the process. What is not in the table does nothing. The status is
# written before the event goes out; "start" and "start_finish" give "started" or "failed" in their turn.

DOWN, UP, FINISH, LAST_UP, LAST_FINISH, GONE = "down", "up", "finish", "last-up", "last-finish", "gone"

SIGNAL_BYTES = {"a": 14, "b": 6, "q": 3, "h": 1, "k": 9, "t": 15, "i": 2, "1": 10, "2": 12, "y": 28}

Row = tuple[str, tuple[str | int, ...], bytes]


def _up_rows(state: str, next_state: str) -> dict[str, Row]:
    return {
        **{byte: (state, (number,), b"") for byte, number in SIGNAL_BYTES.items()},
        "p": (state, (SIGNALS["STOP"], "set_paused", "tell"), b""),
        "c": (state, (SIGNALS["CONT"], "set_running", "tell"), b""),
        "P": (state, (-SIGNALS["STOP"], "set_paused", "tell"), b""),
        "C": (state, (-SIGNALS["CONT"], "set_running", "tell"), b""),
        "K": (state, (-SIGNALS["KILL"],), b""),
        "r": (state, ("kill_softly",), b""),
        "l": (state, ("ask_reload",), b""),
        **dict.fromkeys("oO", (state, ("want_down", "tell"), b"")),
        "Q": (state, ("want_down", "make_down_file", "tell"), b""),
        "d": (state, ("want_down", "kill_softly", SIGNALS["CONT"], "set_running", "arm_kill", "tell"), b""),
        "D": (state, ("want_down", "make_down_file", "kill_softly", SIGNALS["CONT"], "set_running", "arm_kill",
                      "tell"), b""),
        "ready": (state, ("set_ready", "tell"), b"U"),
        "timeout": (state, ("kill_hard",), b""),
        "death": (next_state, ("bury", "start_finish"), b""),
    }


def _finish_rows(state: str, next_state: str) -> dict[str, Row]:
    return {
        "started": (state, ("arm_finish", "tell"), b"d"),
        "failed": (next_state, ("rest", "tell"), b"dD"),
        "given-up": (next_state, ("want_down", "rest", "tell"), b"dOD"),  # as failed and then fatal
        "timeout": (state, ("kill_finish",), b""),
        "death": (next_state, ("rest", "tell"), b"D"),
        "fatal": (next_state, ("want_down", "rest", "tell"), b"OD"),
        **dict.fromkeys("oOd", (state, ("want_down", "tell"), b"")),
        **dict.fromkeys("QD", (state, ("want_down", "make_down_file", "tell"), b"")),
    }


# `=` is ours: every release of s6 passes over it
TABLE: dict[str, dict[str, Row]] = {
    DOWN: {
        "timeout": (DOWN, ("start_if_wanted",), b""),
        "started": (UP, ("set_up", "tell"), b"u"),
        "failed": (DOWN, ("start_later",), b""),
        "u": (DOWN, ("want_up", "tell", "start"), b""),
        "U": (DOWN, ("want_up", "remove_down_file", "tell", "start"), b""),
        "o": (DOWN, ("want_down", "tell", "start"), b""),
        **dict.fromkeys("dO", (DOWN, ("want_down", "set_running", "tell"), b"")),
        **dict.fromkeys("DQ", (DOWN, ("want_down", "set_running", "make_down_file", "tell"), b"")),
        "x": (GONE, ("leave",), b""),
    },
    UP: {
        **_up_rows(UP, FINISH),
        "u": (UP, ("want_up", "tell"), b""),
        "U": (UP, ("want_up", "remove_down_file", "tell"), b""),
        "x": (LAST_UP, (), b""),
    },
    FINISH: {
        **_finish_rows(FINISH, DOWN),
        "u": (FINISH, ("want_up", "tell"), b""),
        "U": (FINISH, ("want_up", "remove_down_file", "tell"), b""),
        "x": (LAST_FINISH, (), b""),
    },
    LAST_UP: _up_rows(LAST_UP, LAST_FINISH),
    LAST_FINISH: _finish_rows(LAST_FINISH, GONE),
    GONE: {"timeout": (GONE, ("return_to_duty",), b"")},
}
for _state in (DOWN, UP, FINISH, LAST_UP, LAST_FINISH):
    TABLE[_state]["="] = (_state, ("write_output",), b"")


# ---- the definition of a service -----------------------------------------------------------------------

def read_number(directory: str, name: str, default: int, maximum: int) -> int:
    """The number in a file of a service directory: its first line, strictly; the default if it is absent or not one."""
    line = _first_line(directory, name)
    if line is None:
        return default
    if not (line.isascii() and line.isdigit() and len(line) <= 10 and int(line) <= maximum):
        log.warning(f"cannot use {directory}/{name}: not a number from 0 to {maximum}; using {default}")
        return default
    return int(line)


def read_signal(directory: str, name: str, default: int) -> int:
    """The signal in a file of a service directory; the default if it is absent or not one."""
    line = _first_line(directory, name)
    try:
        return default if line is None else signal_number(line)
    except ValueError as error:
        log.warning(f"cannot use {directory}/{name}: {error}; using {SIGNAL_NAMES[default]}")
        return default


def _first_line(directory: str, name: str) -> str | None:
    try:
        data = read_small(f"{directory}/{name}")
    except OSError as error:
        log.warning(f"cannot read {directory}/{name}: {reason(error)}")
        return None
    return None if data is None else data.split(b"\n", 1)[0].decode("utf-8", "backslashreplace")


def link_definition(definition: str, live: str) -> None:
    """Make the live directory of a service show its definition: a link for each file of it.

    The links let scripts run from a read-only root while /run is mounted noexec. `down` is copied, and only
    into a new directory: commands make and remove it. supervise/, event/ and log/ are the live directory's own.
    """
    fresh = not os.path.isdir(live)
    os.makedirs(live, 0o755, exist_ok=True)
    wanted = {name for name in os.listdir(definition) if name not in ("supervise", "event", "log", "down")}
    for name in os.listdir(live):
        path = f"{live}/{name}"
        if os.path.islink(path) and name not in wanted and os.readlink(path) == f"{definition}/{name}":
            _unlink(path)
    for name in wanted:
        path = f"{live}/{name}"
        if not os.path.lexists(path):
            os.symlink(f"{definition}/{name}", path)
    if fresh and os.path.exists(f"{definition}/down"):
        os.close(os.open(f"{live}/down", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))


# ---- the start of a child ------------------------------------------------------------------------------

def spawn(argv: Sequence[str], directory: str, environ: Mapping[str, str], fds: Mapping[int, int],
          **asked: Any) -> int:
    """Start a program in a process of its own and return its pid; OSError says why it could not be executed.

    fds: number in the child -> descriptor here; 0, 1 and 2 must be among them. The child has these alone, no
    signal blocked or ignored, and its own session. asked: path (of the program, else argv[0]), terminal (a
    descriptor of the terminal that it shall own), lock (path, number in the child), user, group, limits ({name:
    (soft, hard)}), new_pids (a PID namespace of its own: its parent must then be who reaps orphans).
    """
    plain = not any(asked.get(what) for what in ("lock", "user", "group", "new_pids")) and asked.get("terminal") is None
    return (_spawn_plain if plain and not {*asked.get("limits", ())} - {"nofile"} else _spawn_by_fork)(
        argv, directory, environ, fds, asked)


def _spawn_plain(argv: Sequence[str], directory: str, environ: Mapping[str, str], fds: Mapping[int, int],
                 asked: Mapping[str, Any]) -> int:
    # posix_spawn copies neither memory nor page tables: several times faster. It inherits directory and limits,
    # so for the moment they are ours
    above = max(fds) + 1
    moved = {source: fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, above) for source in {*fds.values()}
             if source < above}  # so that no target overwrites the source of another
    here = os.open(".", os.O_PATH | os.O_CLOEXEC)
    pair, ours = asked.get("limits", {}).get("nofile"), resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        os.chdir(directory)
        if pair:
            if pair[1] != ours[1]:
                return _spawn_by_fork(argv, directory, environ, fds, asked)  # a hard limit cannot be had back
            resource.setrlimit(resource.RLIMIT_NOFILE, pair)
        everything = signal.valid_signals()
        return os.posix_spawn(
            asked.get("path", argv[0]), list(argv), environ, setsid=True, setsigmask=(),
            setsigdef=everything - {SIGNALS["KILL"], SIGNALS["STOP"]},
            file_actions=[(os.POSIX_SPAWN_DUP2, moved.get(source, source), number) for number, source in fds.items()])
    finally:
        if pair:
            resource.setrlimit(resource.RLIMIT_NOFILE, ours)
        os.fchdir(here)
        for fd in (here, *moved.values()):
            os.close(fd)


def _spawn_by_fork(argv: Sequence[str], directory: str, environ: Mapping[str, str], fds: Mapping[int, int],
                   asked: Mapping[str, Any]) -> int:
    report, told = os.pipe()
    everything = signal.valid_signals()
    signal.pthread_sigmask(signal.SIG_BLOCK, everything)  # no handler of ours may run in the child
    try:
        pid = os.fork()
        if not pid:
            try:
                _become(argv, directory, environ, fds, told, asked)
            except BaseException as error:  # whatever it is, this process must end here
                code = error.errno if isinstance(error, OSError) and error.errno else errno.EINVAL
                os.write(_told[-1] if _told else told, f"{code} {reason(error)}".encode("utf-8", "replace"))
            finally:
                os._exit(127)
    except OSError:
        os.close(report)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.close(told)
    try:
        answer = os.read(report, 4096) if readable(report, EXEC_PATIENCE) else b""
    finally:
        os.close(report)
    if asked.get("new_pids") and answer.startswith(b"pid "):  # of the first process there: its parent is gone
        os.waitpid(pid, 0)
        first, _, answer = answer.removeprefix(b"pid ").partition(b"\n")
        pid = int(first)
    if answer:
        os.waitpid(pid, 0)
        number, _, why = answer.decode("utf-8", "replace").partition(" ")
        raise OSError(int(number), why, argv[0])
    return pid


_told: list[int] = []  # in a child: where the report pipe is now


def _become(argv: Sequence[str], directory: str, environ: Mapping[str, str], fds: Mapping[int, int], told: int,
            asked: Mapping[str, Any]) -> None:
    if asked.get("new_pids"):
        unshare: Callable[[int], Any] = getattr(os, "unshare", None) or ctypes.CDLL(None).unshare
        if unshare(0x20000000):  # CLONE_NEWPID: its first process will be our next child
            raise OSError(errno.EPERM, "flag-newpidns is not allowed here (it needs CAP_SYS_ADMIN)")
        pid = os.fork()
        if pid:
            os.write(told, f"pid {pid}\n".encode())
            os._exit(0)
    above = max(fds) + 1
    lock = asked.get("lock")
    if lock:
        above = max(above, lock[1] + 1)
    _told.append(told)
    _told.append(fcntl.fcntl(told, fcntl.F_DUPFD_CLOEXEC, above))
    sources = {number: fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, above) for number, source in fds.items()}
    for number, source in sources.items():
        os.dup2(source, number)
    terminal = asked.get("terminal")
    if terminal is None:
        os.setsid()
    else:
        _take_terminal(terminal)
    for each in signal.valid_signals() - {SIGNALS["KILL"], SIGNALS["STOP"]}:
        signal.signal(each, signal.SIG_DFL)
    os.chdir(directory)
    for name, pair in asked.get("limits", {}).items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name.upper()}"), pair)
    if asked.get("user") or asked.get("group"):
        _become_user(asked.get("user"), asked.get("group"))
    if lock:
        _take_lock(*lock)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.execve(asked.get("path", argv[0]), list(argv), dict(environ))


def _take_terminal(fd: int) -> None:
    # as the leader of our session PID 1 shares its terminal; else the child gets it in a session of its own
    try:
        os.tcgetpgrp(fd)
    except OSError:
        os.setsid()
        try:
            fcntl.ioctl(fd, 0x540E, 0)  # TIOCSCTTY
        except OSError:
            pass  # somebody else's terminal: it still is our stdin
        return
    os.setpgid(0, 0)
    os.tcsetpgrp(fd, os.getpid())  # SIGTTOU is blocked here


def _take_lock(path: str, number: int) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    os.dup2(fd, number)  # first: a close of any descriptor of the file would undo the lock
    os.close(fd)
    try:
        fcntl.lockf(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        log.warning(f"another process holds {path}; waiting for it")
        os.close(_told[-1])  # as far as the supervisor is concerned, this service runs
        os.close(_told[-2])
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        fcntl.lockf(number, fcntl.LOCK_EX)


def _become_user(user: str | None, group: str | None) -> None:
    entry = None
    if user:
        entry = pwd.getpwuid(int(user)) if user.isdigit() and _has_uid(int(user)) else \
            None if user.isdigit() else pwd.getpwnam(user)
    gid = entry.pw_gid if entry else None
    if group:
        gid = int(group) if group.isdigit() else grp.getgrnam(group).gr_gid
    if gid is not None:
        os.setgid(gid)
        if entry and os.getuid() == 0:
            os.initgroups(entry.pw_name, gid)
        elif os.getuid() == 0:
            os.setgroups([gid])
    if user:
        os.setuid(entry.pw_uid if entry else int(user))


def _has_uid(uid: int) -> bool:
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True


# ---- service.toml: what s6 has no file for ---------------------------------------------------------------

POLICY = {  # key: kind, default, help
    "after": ("list of names", [], "start when these services are ready (oneshots: done); stop before them"),
    "backoff": ("duration", 0.0, "restart after 1s, then twice as long each time up to this; 0: as s6 does"),
    "give_up": ("deaths/time", [0, 0.0], '"5/1m": after 5 deaths within a minute stay down'),
    "essential": ("true/false", False, "its end ends the container, with its exit code"),
    "oneshot": ("true/false", False, "runs once; it is done when it ended with exit code 0"),
    "user": ("text", "", "run as this user (name or number) and its groups"),
    "group": ("text", "", "run as this group (name or number)"),
    "env": ("table of texts", {}, "more environment variables"),
    "secrets": ("true/false", False, "keep ETCD_PASSWORD and ETCD_KEY in its environment; the service confd has them"),
    "cwd": ("text", "", "working directory of run; else the service directory"),
    "limits": ("table", {}, '{nofile = 4096, core = 0, ...}: resource limits; "unlimited" and "SOFT:HARD" too'),
    "health": ("health check", {}, '{command = [...], interval = "10s", timeout = "5s", failures = 3}: else it is '
                                   "restarted"),
    "environment": ("text", "", "variables from the keys directly below this one, and from files in /run/secrets"),
    "stop_delay": ("duration", 0.0, "at a shutdown wait so long before the stop signal"),
}
BACKOFF_FIRST = 1.0  # seconds
HEALTHY = 10.0  # seconds up after which the next death counts as the first again
HEALTH_DEFAULTS = {"interval": 10.0, "timeout": 5.0, "failures": 3}
LIMITS = ("as", "core", "cpu", "data", "fsize", "memlock", "nofile", "nproc", "rss", "stack")


def check_policy(table: Mapping[str, Any]) -> dict[str, Any]:
    """The policy that a parsed service.toml stands for, plain values only; ValueError says what is wrong in it."""
    policy = {key: default for key, (_, default, _) in POLICY.items()}
    for key, value in table.items():
        if key not in POLICY:
            raise ValueError(f"there is no key {key} (known: {', '.join(POLICY)})")
        try:
            policy[key] = _POLICY_KINDS[POLICY[key][0]](value)
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"{key}: {error}") from None
    return policy


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false is needed")
    return value


def _toml_text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)) or "\0" in str(value):
        raise ValueError("a text is needed")
    return str(value)


def _toml_texts(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise ValueError("a list of texts is needed")
    return [_toml_text(item) for item in value]


def _rate(value: Any) -> list[float]:
    count, slash, within = _toml_text(value).partition("/")
    if not slash or not count.isdigit() or not int(count):
        raise ValueError(f'"{value}" is not a number of deaths and a time (example: 5/1m)')
    return [int(count), duration(within)]


def _limits(value: Any) -> dict[str, list[int]]:
    limits = {}
    for name, pair in dict(value).items():
        if name not in LIMITS:
            raise ValueError(f"there is no limit {name} (known: {', '.join(LIMITS)})")
        soft, _, hard = str(pair).partition(":")
        limits[name] = [-1 if part == "unlimited" else int(part) for part in (soft, hard or soft)]
    return limits


def _health(value: Any) -> dict[str, Any]:
    table = dict(value)
    unknown = set(table) - {"command", *HEALTH_DEFAULTS}
    if unknown or not table.get("command"):
        raise ValueError(f"there is no key {min(unknown)}" if unknown else "a command is needed")
    command = table["command"]
    failures = table.get("failures", HEALTH_DEFAULTS["failures"])
    if isinstance(failures, bool) or not isinstance(failures, int) or failures < 1:
        raise ValueError("failures: a number from 1 on is needed")
    return {"command": ["/bin/sh", "-c", command] if isinstance(command, str) else _toml_texts(command),
            "interval": max(0.1, duration(table.get("interval", HEALTH_DEFAULTS["interval"]))),
            "timeout": duration(table.get("timeout", HEALTH_DEFAULTS["timeout"])), "failures": failures}


_POLICY_KINDS: dict[str, Callable[[Any], Any]] = {
    "list of names": _toml_texts, "duration": duration, "deaths/time": _rate, "true/false": _truth, "text": _toml_text,
    "table": _limits, "health check": _health,
    "table of texts": lambda value: {name: _toml_text(text) for name, text in dict(value).items()}}
NO_POLICY = check_policy({})


def ask_child(work: Callable[[], Any]) -> Any:
    """What a function returns (plain values) when a child calls it.

    What it loads does not stay in the memory of PID 1. OSError if it fails.
    """
    answer, told = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if not pid:
            try:
                write_all(told, marshal.dumps(work()))
            finally:
                os._exit(0)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.close(told)
    data, deadline = b"", now() + 10.0
    while readable(answer, max(0.0, deadline - now())):
        more = os.read(answer, 65536)
        if not more:
            break
        data += more
    os.close(answer)
    os.kill(pid, SIGNALS["KILL"])
    os.waitpid(pid, 0)
    try:
        return marshal.loads(data)
    except (EOFError, ValueError, TypeError):
        raise OSError(errno.ENOMEM, "the process that reads service.toml files failed") from None


def load_policies(paths: Mapping[str, str]) -> dict[str, dict[str, Any] | str]:
    """What the service.toml files at these paths say, or in words why they cannot be used, by their names. OSError."""
    policies: dict[str, dict[str, Any] | str] = ask_child(lambda: {name: _load_policy(path)
                                                                   for name, path in paths.items()})
    return policies


def _load_policy(path: str) -> dict[str, Any] | str:
    try:
        text = (read_small(path, 1 << 20) or b"").decode()
        return check_policy(from_toml(text))
    except (OSError, ValueError, RecursionError) as error:
        return reason(error)


# ---- services ------------------------------------------------------------------------------------------

DESCRIPTORS_FREE = 24  # as many are kept for what comes and goes: starts, status files, events
SUPERVISE_AGAIN = 10.0  # seconds until a service directory that could not be taken into supervision is tried again
TELL_AGAIN = 1.0  # seconds until a status file that could not be written is tried again
BUSY = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)  # why a start can fail that works a little later
BUSY_PAUSE = 5.0  # seconds until then
SETTLED = 2.0  # seconds after which what a change needed of our own program is no longer kept in memory


def _linked_place(path: str) -> str:
    # supervise and event of a read-only service directory can be links to places that are not there yet
    return os.path.join(os.path.dirname(path), os.readlink(path)) if os.path.islink(path) else path


def _lock_whole(path: str) -> int:
    """Open a file and lock it as s6 does, so that its tools see that somebody is there; Error if somebody is."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        # a lock of the open file description: one of the process would be lost with any close of the same file
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))
    except OSError as error:
        os.close(fd)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise Error(f"another process supervises here: it holds {path}") from None
        raise
    return fd


def execution_hint(path: str, error: Exception) -> str:
    """What a script lacks that could not be executed, where the system's words do not say it; "" if they do."""
    number = error.errno if isinstance(error, OSError) else 0
    if number == errno.ENOEXEC:
        return " (it has no #! line)"
    try:
        first = (read_small(path, 256) or b"").split(b"\n")[0].decode("utf-8", "replace")
        if number == errno.ENOENT and first.startswith("#!") and first[2:].split():
            return f" (its first line names {first[2:].split()[0]})"
        if number == errno.EACCES and not os.access(path, os.X_OK):
            return " (it is not executable: chmod +x)"
    except OSError:
        pass
    return ""


class Service:
    """One service directory under supervision: where it is, in which state, and until when.

    Times: stamp and ready_stamp are wall-clock nanoseconds for the status file; deadline, next_start and
    ready_since are points on now().
    """

    __slots__ = ("name", "directory", "definition", "state", "deadline", "pid", "pgid", "wstat", "wantup", "ready",
                 "paused", "stamp", "ready_stamp", "ready_since", "next_start", "control", "lock", "notification",
                 "pipe", "output", "output_fds", "note", "vanished", "asked", "policy", "deaths", "up_since",
                 "check_failures", "untold", "told", "fresh")

    # what another process image needs to go on with it; the rest is made anew
    SAVED = ("name", "directory", "definition", "state", "deadline", "pid", "pgid", "wstat", "wantup", "ready",
             "paused", "stamp", "ready_stamp", "ready_since", "next_start", "control", "lock", "notification",
             "pipe", "output_fds", "note", "vanished", "asked", "policy", "deaths", "up_since", "check_failures",
             "told")

    def __init__(self, name: str, directory: str, definition: str) -> None:
        self.name = name  # NAME or NAME/log
        self.directory = directory  # live: supervise/, event/ and where run is started
        self.definition = definition  # where its files come from; may be the same
        self.state = GONE
        self.deadline: float | None = None
        self.pid = self.pgid = self.wstat = 0
        self.wantup = self.ready = self.paused = False
        self.stamp = self.ready_stamp = 0
        self.ready_since = self.next_start = 0.0
        self.control = self.lock = self.notification = -1  # descriptors
        self.pipe: tuple[int, int] | None = None  # of a service with log/: read by the logger, written by the service
        self.output: Output | None = None  # of a service without
        self.output_fds: tuple[int, int] | None = None
        self.note: dict[str, str] = {}  # what the status record has no place for, in supervise/note
        self.vanished = False  # its definition is gone: it is to be forgotten once it is down
        self.asked = False  # told to stop for good, in a shutdown
        self.policy: dict[str, Any] = NO_POLICY
        self.deaths: list[float] = []  # of late, for backoff and give_up
        self.up_since = 0.0
        self.check_failures = 0  # health checks that failed in a row
        self.untold = False  # the status file is not up to date
        self.told = False  # to end, by a command: then its end is no failure
        self.fresh = False  # the live directory has just been brought up to date

    @property
    def flags(self) -> int:
        """The flags of the status record."""
        return (PAUSED * self.paused | FINISHING * (self.state in (FINISH, LAST_FINISH)) | WANTUP * self.wantup
                | READY * self.ready)


def oom_kills() -> int:
    """How many processes of this container the kernel has killed for want of memory so far (cgroup v2 or v1)."""
    for path in ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"):
        try:
            lines = (read_small(path) or b"").decode("ascii", "replace").splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, count = line.partition(" ")
            if name == "oom_kill" and count.isdigit():
                return int(count)
    return 0


def find_program(name: str, environ: Mapping[str, str]) -> str:
    """The path of a program as execvp finds it; the name itself if it is not found."""
    if "/" not in name:
        for directory in environ.get("PATH", DEFAULT_PATH).split(":"):
            if os.access(f"{directory or '.'}/{name}", os.X_OK) and not os.path.isdir(f"{directory or '.'}/{name}"):
                return f"{directory or '.'}/{name}"
    return name


def read_environment(directory: str) -> dict[str, str]:
    """The variables of a directory with a file for each, as of s6-envdir, but with their line ends."""
    found = {}
    for name in _listed(directory):
        if name.replace("_", "a").isalnum() and name.isascii():
            try:
                found[name] = (read_small(f"{directory}/{name}", 1 << 20) or b"").decode("utf-8", "surrogateescape")
            except OSError as error:
                log.warning(f"cannot read {directory}/{name}: {reason(error)}")
    return found


DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def _no_action(number: int, frame: object) -> None:
    """What a signal does itself; set_wakeup_fd has told the loop of it already."""


class Supervisor:
    """All services of one process, and the loop that waits for them: descriptors, signals, deaths, deadlines."""

    def __init__(self, services: str, run: str, style: str = "raw", confdir: str = "",
                 renderer: Sequence[str] = ()) -> None:
        """services: directory of the definitions; run: of the live directories; style: see OUTPUT_STYLES, or raw.

        renderer: the command of the service `confd` where none is defined; confdir: with the files that bind services.
        """
        self.services_directory, self.run_directory, self.style = services, run, style
        self.confdir, self.renderer = confdir, list(renderer)
        self.bound: list[str] = []  # services that wait for files of theirs
        self.conf_stamps: list[tuple[str, Any]] = []  # of the files that this was read from
        self.services: dict[str, Service] = {}
        self.policies: dict[str, tuple[object, dict[str, Any]]] = {}  # name: stamp of the file it was read from, policy
        self.left = 0  # how many services were left so far
        self.oom_kills = oom_kills()
        self.reaps_orphans = os.getpid() == 1
        self.settling = False
        self.children: dict[int, Callable[[int], object]] = {}  # pid: what to do with its waitpid status
        self.watched: dict[int, tuple[Callable[[Any], object], Any]] = {}  # descriptor: what to do when it is readable
        self.timers: list[tuple[float, int, Callable[[Any], object], Any]] = []  # a heap
        self.timer_count = 0
        self.signals: list[int] = []
        self.troubles: dict[str, float] = {}  # what was complained of, and when
        self.environ = {name: value for name, value in os.environ.items() if name != STATE_VARIABLE}
        self.public_environ = public_environment(self.environ)
        self.child_limits: dict[str, list[int]] = {}  # what children get back of what we changed for ourselves
        self.checks: dict[int, Service] = {}  # pid of a running health check
        self.null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self.outlet = Outlet(1)
        self.outlet_watched = False
        self.epoll = select.epoll()
        self.wake, self.wake_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.watch(self.wake, self.read_signals, None)

    # -- descriptors, deadlines, deaths

    def watch(self, fd: int, action: Callable[[Any], object], argument: Any) -> None:
        """Call action(argument) whenever the descriptor can be read."""
        self.watched[fd] = (action, argument)
        self.epoll.register(fd, select.EPOLLIN)

    def unwatch(self, fd: int) -> None:
        """No longer; the descriptor is closed."""
        if self.watched.pop(fd, None):
            self.epoll.unregister(fd)
        os.close(fd)

    def at(self, deadline: float, action: Callable[[Any], object], argument: Any) -> None:
        """Call action(argument) once when the deadline has passed."""
        self.timer_count += 1
        heapq.heappush(self.timers, (deadline, self.timer_count, action, argument))

    def arm(self, service: Service, deadline: float | None) -> None:
        """Set the deadline of a service: its state machine gets a "timeout" then. None: no deadline."""
        service.deadline = deadline
        if deadline is not None:
            self.at(deadline, self.expire, service)

    def expire(self, service: Service) -> None:
        """A deadline that was set for a service has come; it may have been moved since."""
        if service.deadline is not None and service.deadline <= now():
            service.deadline = None
            self.step(service, "timeout")

    def catch_signals(self) -> None:
        """From now on signals wake the loop. Every signal gets a handler: the kernel drops others to PID 1."""
        signal.set_wakeup_fd(self.wake_end, warn_on_full_buffer=False)
        fatal = {SIGNALS[name] for name in ("KILL", "STOP", "SEGV", "BUS", "FPE", "ILL", "TRAP", "SYS")}
        for number in signal.valid_signals() - fatal:
            signal.signal(number, _no_action)
        for name in ("TTIN", "TTOU"):  # CMD may own the terminal that our messages go to
            signal.signal(SIGNALS[name], signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def read_signals(self, _: None) -> None:
        """Take the signals that came from the wake-up pipe."""
        try:
            self.signals += os.read(self.wake, 65536)
        except BlockingIOError:
            pass

    def reap(self) -> None:
        """Take every dead child there is; those that nobody asked for are orphans."""
        while True:
            try:
                pid, wstat = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            action = self.children.pop(pid, None)
            if action:
                action(wstat)

    def turn(self, deadline: float | None = None) -> None:
        """Wait for the next thing to happen, or the deadline, and deal with it."""
        if self.timers and (deadline is None or self.timers[0][0] < deadline):
            deadline = self.timers[0][0]
        for fd, _ in self.epoll.poll(None if deadline is None else max(0.0, deadline - now()) + 0.0005):
            action = self.watched.get(fd)
            if action:
                action[0](action[1])
        self.reap()
        while self.timers and self.timers[0][0] <= now():
            _, _, action_of, argument = heapq.heappop(self.timers)
            action_of(argument)

    def trouble(self, what: str, error: BaseException | str, level: str = "error") -> None:
        """Log what does not work, but the same thing only once a minute."""
        message = f"{what}: {reason(error) if isinstance(error, BaseException) else error}"
        if self.troubles.get(message, -60.0) <= now() - 60.0:
            if len(self.troubles) > 1000:
                self.troubles.clear()
            self.troubles[message] = now()
            log(level, message)

    # -- becoming and ceasing to be the supervisor of a service

    def supervise(self, service: Service) -> bool:
        """Take a service into supervision, as s6-supervise does when it starts: lock, FIFO, first status, event s."""
        supervise, event = f"{service.directory}/supervise", f"{service.directory}/event"
        try:
            self.refresh(service)
            make_fifodir(_linked_place(event))
            os.makedirs(_linked_place(supervise), 0o700, exist_ok=True)
            service.lock = _lock_whole(f"{supervise}/lock")
            try:
                os.mkfifo(f"{supervise}/control", 0o600)
            except FileExistsError:
                pass
            # read-write: with a writer of our own there is never an end of file
            service.control = os.open(f"{supervise}/control", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            if not _is_fifo(service.control):
                raise Error(f"{supervise}/control is not a FIFO")
            os.close(os.open(f"{supervise}/death_tally", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644))
            if not service.output_fds and self.style in OUTPUT_STYLES and (
                    not service.pipe or service.name.endswith("/log")):
                service.output, service.output_fds = Output(service.name, self.style), os.pipe()
                os.set_blocking(service.output_fds[0], False)
                self.watch(service.output_fds[0], self.read_output, service)
            if service.control + DESCRIPTORS_FREE >= resource.getrlimit(resource.RLIMIT_NOFILE)[0]:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))  # the others must still be able to start
            self.watch(service.control, self.read_control, service)
        except (OSError, Error) as error:
            self.trouble(f"cannot supervise {service.name}", error)
            for fd in (service.lock, service.control):
                if fd >= 0:
                    os.close(fd)
            for fd in service.output_fds or ():
                self.unwatch(fd)
            service.output_fds = None
            service.lock = service.control = -1
            self.arm(service, now() + SUPERVISE_AGAIN)
            return False
        notify(event, b"")  # nobody listens to what an earlier supervisor left there
        service.fresh = not os.path.exists(f"{service.directory}/down")
        service.state, service.pid, service.ready = DOWN, 0, True
        service.asked = False
        service.paused = True  # of a down service: not started yet (s6 2.13.2 and later; others take no notice)
        service.wantup = service.fresh
        service.stamp = service.ready_stamp = time.time_ns()
        self.tell(service)
        notify(event, b"s")
        return True

    def leave(self, service: Service) -> None:
        """Cease to supervise a service that is down, as s6-supervise does when it exits."""
        notify(f"{service.directory}/event", b"x")
        self.unwatch(service.control)
        os.close(service.lock)
        service.control = service.lock = -1
        service.deadline = None
        self.left += 1
        if service.asked or service.vanished:
            self.dismiss_logger(service)
        if service.vanished:
            self.forget(service)
        elif not service.asked:
            self.arm(service, now() + 1.0)  # s6-svscan gives a service another s6-supervise after a second

    def return_to_duty(self, service: Service) -> None:
        """Supervise a service again whose supervision was ended by a command, or could not begin."""
        if self.supervise(service):
            self.step(service, "timeout")

    def read_control(self, service: Service) -> None:
        """Do what the bytes in the control FIFO say."""
        try:
            commands = os.read(service.control, 4096)
        except BlockingIOError:
            return
        for byte in commands.decode("latin-1"):
            self.step(service, byte)

    # -- the state machine at work

    def step(self, service: Service, happened: str) -> None:
        """Let one input of TABLE happen to a service."""
        row = TABLE[service.state].get(happened)
        if row is None:
            return
        service.state, actions, event = row
        for action in actions:
            if isinstance(action, int):
                self.kill(service, action)
            else:
                getattr(self, action)(service)
        if event:
            notify(f"{service.directory}/event", event)
            self.changed(service)
        if service.state == GONE and service.control >= 0:
            self.leave(service)

    def kill(self, service: Service, number: int) -> None:
        """Send a signal to the process of a service, a negative one to its process group."""
        if service.pid:
            try:
                (os.killpg if number < 0 else os.kill)(service.pid, abs(number))
            except OSError as error:
                self.trouble(f"cannot send {SIGNAL_NAMES.get(abs(number))} to {service.name}", error)

    def tell(self, service: Service) -> None:
        """Write the status file."""
        if native and not self.settling:
            self.settling = True
            self.at(now() + SETTLED, self.settle, None)
        record = Status(service.stamp, service.ready_stamp, service.pid, service.pgid, service.wstat, service.flags)
        try:
            replace_file(f"{service.directory}/supervise/status", record.pack())
            service.untold = False
        except OSError as error:
            self.trouble(f"cannot write the status of {service.name}", error)
            if not service.untold:
                service.untold = True
                self.at(now() + TELL_AGAIN, self.tell_again, service)

    def settle(self, _: None) -> None:
        """Give back the memory of the static executable's own code and constants: the page cache has them too."""
        self.settling = False
        native.trim()

    def tell_again(self, service: Service) -> None:
        """Write a status that could not be written before: nobody shall wait for what has come already."""
        if service.untold and service.control >= 0:
            service.untold = False
            self.tell(service)

    def remark(self, service: Service, **notes: str) -> None:
        """Write what the status file has no place for into supervise/note, as lines NAME=TEXT."""
        if all(service.note.get(name, "") == text for name, text in notes.items()):
            return
        service.note = {name: text for name, text in {**service.note, **notes}.items() if text}
        text = "".join(f"{name}={printable(text)}\n" for name, text in service.note.items())
        try:
            replace_file(f"{service.directory}/supervise/note", text.encode("utf-8", "backslashreplace"))
        except OSError as error:
            self.trouble(f"cannot write the note of {service.name}", error)

    def refresh(self, service: Service) -> None:
        """Bring the live directory up to date with the definition."""
        if service.definition != service.directory and os.path.isdir(service.definition):
            link_definition(service.definition, service.directory)

    def want_up(self, service: Service) -> None:
        service.wantup = True
        self.remark(service, given_up="")

    def want_down(self, service: Service) -> None:
        service.wantup = False

    def set_paused(self, service: Service) -> None:
        service.paused = True

    def set_running(self, service: Service) -> None:
        service.paused = False

    def make_down_file(self, service: Service) -> None:
        try:
            os.close(os.open(f"{service.directory}/down", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))
        except OSError as error:
            log.warning(f"cannot make {service.directory}/down: {reason(error)}")

    def remove_down_file(self, service: Service) -> None:
        try:
            remove_file(f"{service.directory}/down")
        except OSError as error:
            log.warning(f"cannot remove {service.directory}/down: {reason(error)}")

    def kill_softly(self, service: Service) -> None:
        service.told = True
        self.kill(service, read_signal(service.directory, "down-signal", SIGNALS["TERM"]))

    def ask_reload(self, service: Service) -> None:
        self.kill(service, read_signal(service.directory, "reload-signal", SIGNALS["HUP"]))

    def arm_kill(self, service: Service) -> None:
        timeout_ms = read_number(service.directory, "timeout-kill", 0, 2**31)
        self.arm(service, now() + timeout_ms / 1000 if timeout_ms else None)

    def kill_hard(self, service: Service) -> None:
        group = os.path.exists(f"{service.directory}/flag-timeout-killpg")
        for name in ("KILL", "CONT"):
            self.kill(service, -SIGNALS[name] if group else SIGNALS[name])
        self.arm(service, now() + KILL_AGAIN)

    def arm_finish(self, service: Service) -> None:
        timeout_ms = read_number(service.directory, "timeout-finish", FINISH_TIMEOUT_MS, 2**31)
        self.arm(service, now() + timeout_ms / 1000 if timeout_ms else None)

    def kill_finish(self, service: Service) -> None:
        log.warning(f"finish of {service.name} takes too long; killing it")
        for name in ("CONT", "KILL"):
            self.kill(service, SIGNALS[name])
        self.arm(service, now() + KILL_AGAIN)

    def start_if_wanted(self, service: Service) -> None:
        if not service.wantup:
            return
        waits_for = [name for name in service.policy["after"] if not self.satisfied(name)]
        configured = self.configured(service)
        self.remark(service, waits=" ".join(waits_for + ["configuration"] * (not configured)))
        if not configured:
            return
        for name in waits_for:
            if name not in self.services:
                self.trouble(f"{service.name} waits for {name}", "there is no such service", "warning")
            elif service.name in self.needed(name):
                self.trouble(f"{service.name} waits for {name}", f"which waits for {service.name}: neither can start")
        service.fresh = service.fresh and not waits_for
        if not waits_for:
            self.start(service)

    def configured(self, service: Service) -> bool:
        """Whether the files of a service are there, as far as it is bound to any: the renderer says so."""
        bound = service.name in self.bound or service.policy.get("environment")
        return not bound or os.path.exists(f"{self.run_directory}/{STATE_DIRECTORY}/{service.name}/released")

    def needed(self, name: str) -> set[str]:
        """The services that must be ready before this one can start, at any distance."""
        found: set[str] = set()
        waiting = [name]
        while waiting:
            after = self.services[waiting.pop()].policy["after"]
            waiting += [each for each in after if each not in found and each in self.services]
            found.update(after)
        return found

    def satisfied(self, name: str) -> bool:
        """Whether those who come after this service can start."""
        service = self.services.get(name)
        if not service:
            return False
        if service.policy["oneshot"]:
            return service.note.get("done") == "yes"
        if service.state != UP:
            return False
        return service.ready or not os.path.exists(f"{service.directory}/notification-fd")

    def changed(self, service: Service) -> None:
        """An event of a service: those that wait for it may start now."""
        for other in list(self.services.values()):
            if service.name in other.policy["after"] and other.state == DOWN and "waits" in other.note:
                self.start_if_wanted(other)

    def start(self, service: Service) -> None:
        """Execute run; gives "started" or "failed"."""
        ready_pipe: tuple[int, int] | None = None
        policy = service.policy
        try:
            if "broken" in policy:
                raise Error(policy["broken"])
            if not service.fresh:
                self.refresh(service)
            service.fresh = False
            fds = self.standard_fds(service)
            number = read_number(service.directory, "notification-fd", 0, 2**20)
            if number:
                ready_pipe = os.pipe()
                fds[number] = ready_pipe[1]
            new_pids = os.path.exists(f"{service.directory}/flag-newpidns")
            if new_pids and not self.reaps_orphans:
                raise Error("flag-newpidns is not allowed here: neither process 1 nor a subreaper")
            lock = read_number(service.directory, "lock-fd", 0, 2**20)
            command = policy.get("command")
            service.pid = spawn(
                command or ["./run", service.name], policy["cwd"] or service.directory, self.environ_of(service), fds,
                lock=(f"{service.directory}/supervise/service-lock", lock) if lock else None,
                path="/proc/self/exe" if command and os.path.exists("/proc/self/exe") else command[0] if command else
                f"{service.directory}/run" if policy["cwd"] else "./run",
                user=policy["user"], group=policy["group"], limits={**self.child_limits, **policy["limits"]},
                new_pids=new_pids)
        except (OSError, Error) as error:
            if ready_pipe:
                os.close(ready_pipe[0])
            hint = execution_hint(f"{service.directory}/run", error)
            self.trouble(f"cannot start {service.name}", f"{reason(error)}{hint}")
            self.remark(service, problem=f"cannot start: {reason(error)}{hint}")
            self.step(service, "failed")
            if isinstance(error, OSError) and error.errno in BUSY:
                self.arm(service, now() + BUSY_PAUSE)
            return
        finally:
            if ready_pipe:
                os.close(ready_pipe[1])
        if ready_pipe:
            os.set_blocking(ready_pipe[0], False)
            service.notification = ready_pipe[0]
            self.watch(service.notification, self.read_notification, service)
        self.await_death(service)
        self.remark(service, problem="", waits="", done="")
        self.step(service, "started")
        if policy["health"]:
            service.check_failures = 0
            self.at(now() + policy["health"]["interval"], self.check_health, (service, service.pid))

    def environ_of(self, service: Service) -> dict[str, str]:
        """The environment of a service: the container's; its secrets only for those that reach etcd with them."""
        secrets = service.policy["secrets"] or service.name == "confd"
        return {**(self.environ if secrets else self.public_environ), **service.policy["env"],
                **(read_environment(f"{service.directory}/env") if service.policy.get("environment") else {})}

    def standard_fds(self, service: Service) -> dict[int, int]:
        """Which descriptors of ours are 0, 1 and 2 of a service."""
        source = self.null
        if service.pipe and not service.name.endswith("/log"):
            return {0: source, 1: service.pipe[1], 2: service.pipe[1]}
        if service.pipe:
            source = service.pipe[0]
        if not service.output_fds:
            return {0: source, 1: 1, 2: 2}
        return {0: source, 1: service.output_fds[1], 2: service.output_fds[1]}

    def start_later(self, service: Service) -> None:
        self.arm(service, now() + FAILED_START_PAUSE)

    def set_up(self, service: Service) -> None:
        service.stamp, service.ready, service.paused, service.deadline = time.time_ns(), False, False, None
        service.pgid, service.up_since = service.pid, now()

    def set_ready(self, service: Service) -> None:
        service.ready_stamp, service.ready, service.ready_since = time.time_ns(), True, now()

    def read_notification(self, service: Service) -> None:
        """A newline on the notification fd says ready; then, or at its end, the pipe is of no more use."""
        try:
            data = os.read(service.notification, 4096)
        except BlockingIOError:
            return
        if data and b"\n" not in data:
            return
        self.close_notification(service)
        if data:
            self.step(service, "ready")

    def close_notification(self, service: Service) -> None:
        if service.notification >= 0:
            self.unwatch(service.notification)
            service.notification = -1

    def await_death(self, service: Service) -> None:
        """Have died() called with the end of its process."""
        self.children[service.pid] = lambda wstat: self.died(service, wstat)

    def died(self, service: Service, wstat: int) -> None:
        """The process of a service is dead: run or finish. What it began to write ends here."""
        if service.output:
            self.read_output(service)
            self.put_out(service.output.feed(b"", last=True))
        if service.state in (FINISH, LAST_FINISH):
            given_up = wstat == 125 << 8 or "given_up" in service.note
            self.step(service, "fatal" if given_up else "death")
            return
        if service.notification >= 0:
            self.read_notification(service)  # what it said before it died comes first
        service.wstat = wstat
        self.step(service, "death")

    def bury(self, service: Service) -> None:
        """Note the death of run. A service that was ready for a second starts again at once, others wait one."""
        service.next_start = service.ready_since + RESTART_PAUSE if service.ready else 0.0
        self.report_death(service)
        service.stamp, service.ready, service.paused, service.deadline = time.time_ns(), False, False, None
        self.close_notification(service)
        size = read_number(service.directory, "max-death-tally", DEATH_TALLY, DEATH_TALLY_MAX) * 14
        path = f"{service.directory}/supervise/death_tally"
        try:
            tally = (read_small(path, DEATH_TALLY_MAX * 14) or b"") + pack_death(service.stamp, service.wstat)
            if size:
                replace_file(path, tally[-size:])
        except OSError as error:
            self.trouble(f"cannot write the death tally of {service.name}", error)

    def start_finish(self, service: Service) -> None:
        """Execute finish; gives "started", or "failed" when there is none."""
        signalled = service.wstat & 0x7F
        argv = ["./finish", "256" if signalled else str(service.wstat >> 8), str(signalled), service.name,
                str(service.pgid)]
        service.pid = 0
        try:
            self.refresh(service)
        except OSError as error:
            self.trouble(f"cannot link the definition of {service.name}", error)
        if os.access(f"{service.directory}/finish", os.F_OK):
            try:
                service.pid = spawn(argv, service.directory, self.environ_of(service), self.standard_fds(service),
                                    limits=self.child_limits)
            except OSError as error:
                self.trouble(f"cannot run finish of {service.name}", error)
        if service.pid:
            self.await_death(service)
        self.step(service, "started" if service.pid else "given-up" if "given_up" in service.note else "failed")

    def rest(self, service: Service) -> None:
        """The service is down and can be started again."""
        service.pid = service.pgid = 0
        service.ready, service.ready_stamp = True, time.time_ns()
        self.arm(service, max(now(), service.next_start) if service.next_start else now() + RESTART_PAUSE)
        if service.wantup and service.deadline:
            self.remark(service, next=f"{time.time() + service.deadline - now():.3f}")

    # -- what service.toml adds

    def report_death(self, service: Service) -> None:
        """Tell of an end that nobody asked for, and decide what comes of it."""
        policy, wstat = service.policy, service.wstat
        killed_for_memory = False
        if wstat & 0x7F == SIGNALS["KILL"]:
            kills = oom_kills()
            killed_for_memory, self.oom_kills = kills > self.oom_kills, kills
        how = ending(wstat) + (" (killed by the kernel: out of memory)" if killed_for_memory else "")
        self.remark(service, ended=how, oom="yes" if killed_for_memory else "")
        told, service.told = service.told, False
        if service.state == LAST_FINISH or told or (not service.wantup and not policy["oneshot"]):
            return  # somebody asked for it
        if policy["oneshot"]:
            service.wantup = False
            self.remark(service, done="yes" if not wstat else "")
        if not (policy["oneshot"] and not wstat):
            self.write_output(service)
            self.trouble(f"{service.name} ended", how, "warning")
            if "command" in policy and wstat == EXIT_NO_ETCD << 8:
                self.fail("etcd was away too long (ETCDINIT_MAX_OUTAGE)", EXIT_NO_ETCD)
            if policy["essential"]:
                self.fail(f"essential service {service.name} ended: {how}", exit_code(wstat))
        if policy["backoff"] or policy["give_up"][0]:
            if now() - service.up_since >= HEALTHY:
                service.deaths.clear()
            service.deaths = [*service.deaths[-100:], now()]
            recent = [death for death in service.deaths if death > now() - policy["give_up"][1]]
            if policy["give_up"][0] and len(recent) >= policy["give_up"][0]:
                service.deaths.clear()
                self.remark(service, given_up="yes")
                log.error(f"gave up {service.name}: {len(recent)} deaths within {policy['give_up'][1]:g}s"
                          f" (etcdinit start {service.name} tries again)")
            elif policy["backoff"]:
                pause = min(policy["backoff"], BACKOFF_FIRST * 2.0 ** min(len(service.deaths) - 1, 60))
                service.next_start = now() + pause * (0.75 + os.urandom(1)[0] / 512)  # jitter: 0.75 to 1.25

    def fail(self, why: str, code: int) -> None:
        """An essential service has ended; see Init."""

    def check_health(self, checked: tuple[Service, int]) -> None:
        """Run the health command of a service, if it still is the process that the check was meant for."""
        service, pid = checked
        health = service.policy["health"]
        if service.pid != pid or service.state != UP or not health:
            return
        self.at(now() + health["interval"], self.check_health, checked)
        if service in self.checks.values():
            return  # the last one is not done yet
        try:
            check = spawn(health["command"], service.directory, self.environ_of(service),
                          {0: self.null, 1: self.null, 2: self.null},
                          path=find_program(health["command"][0], self.environ),
                          user=service.policy["user"], group=service.policy["group"])
        except OSError as error:
            self.checked(service, pid, f"cannot run it: {reason(error)}")
            return
        self.checks[check] = service
        self.children[check] = lambda wstat: self.check_ended(check, pid, wstat)
        self.at(now() + health["timeout"], self.end_check, check)

    def check_ended(self, check: int, pid: int, wstat: int) -> None:
        """A health check of the process pid has ended."""
        self.checked(self.checks.pop(check), pid, ending(wstat) if wstat else "")

    def end_check(self, check: int) -> None:
        """The time of a health check is over."""
        if check in self.checks:
            try:
                os.killpg(check, SIGNALS["KILL"])
            except OSError:
                pass

    def checked(self, service: Service, pid: int, failure: str) -> None:
        """A health check is done; after so many failures in a row the service is restarted."""
        if service.pid != pid or service.state != UP or not service.policy["health"]:
            return
        service.check_failures = service.check_failures + 1 if failure else 0
        self.remark(service, unhealthy=failure)
        if service.check_failures >= service.policy["health"]["failures"]:
            log.warning(f"restarting {service.name}: {service.check_failures} health checks failed ({failure})")
            service.check_failures = 0
            self.kill_softly(service)
            service.told = False
            self.kill(service, SIGNALS["CONT"])
            self.arm_kill(service)

    # -- output

    def read_output(self, service: Service) -> None:
        """Pass on what a service has written."""
        if not service.output_fds or not service.output:
            return
        try:
            data = os.read(service.output_fds[0], 65536)
        except BlockingIOError:
            data = b""
        self.put_out(service.output.feed(data))

    def put_out(self, data: bytes) -> None:
        """Write to the container's standard output; while its reader is too slow, read nothing from the services."""
        if not data:
            return
        if not self.outlet.write(data) and not self.outlet_watched:
            try:
                self.epoll.register(self.outlet.fd, select.EPOLLOUT)
                self.watched[self.outlet.fd] = (self.continue_output, None)
                self.outlet_watched = True
            except OSError as error:
                self.trouble("cannot wait for the standard output", error)
        if self.outlet.full:
            self.read_outputs(False)

    def continue_output(self, _: None) -> None:
        """The reader of the standard output has taken something."""
        if self.outlet.write(b""):
            self.epoll.unregister(self.outlet.fd)
            del self.watched[self.outlet.fd]
            self.outlet_watched = False
            self.read_outputs(True)

    def read_outputs(self, wanted: bool) -> None:
        """Whether to wait for output of the services."""
        for service in self.services.values():
            if service.output_fds:
                self.epoll.modify(service.output_fds[0], select.EPOLLIN if wanted else 0)

    def write_output(self, service: Service) -> None:
        """Put the last lines of a service where `etcdinit status` and crash reports find them."""
        if service.output:
            text = "".join(f"{line}\n" for line in service.output.tail())
            try:
                replace_file(f"{service.directory}/supervise/output", text.encode("utf-8", "replace"))
            except OSError as error:
                self.trouble(f"cannot write the last lines of {service.name}", error)

    # -- the directory of services

    def scan(self, prune: bool = True) -> None:
        """Begin to supervise what is new in the directory of services; with prune, stop what has vanished from it."""
        names = self.defined()
        if names is None:
            return
        new = [name for name in names if name not in self.services]
        added: list[Service] = []
        try:
            self.read_policies(names)
            self.read_bound()
            for name in names:
                if name in self.services:
                    self.services[name].vanished = False
                    self.refresh(self.services[name])
            for name in new:
                added += self.add(name)
        except OSError as error:  # too many processes or descriptors, a full disk
            self.trouble("cannot take all services into supervision", error)
            self.at(now() + SUPERVISE_AGAIN, self.rescan, prune)
        for service in added:  # each starts while the next is prepared
            if self.supervise(service):
                self.step(service, "timeout")
        for service in list(self.services.values()):
            if service.state == DOWN and ("waits" in service.note or
                                          "problem" in service.note and "broken" not in service.policy):
                self.step(service, "timeout")  # its definition may have been mended, its files may be there
        if prune:
            for service in [self.services[name] for name in list(self.services)
                            if name.removesuffix("/log") not in names]:
                if not service.name.endswith("/log"):
                    self.retire(service)

    def rescan(self, prune: bool) -> None:
        """Scan later, if it still is the time for it."""
        self.scan(prune)

    def defined(self) -> list[str] | None:
        """The names of the services that are defined, sorted; None if that cannot be told now."""
        entries: list[str] = []
        try:
            entries = os.listdir(self.services_directory)
        except FileNotFoundError:
            pass
        except OSError as error:
            self.trouble(f"cannot read {self.services_directory}", error)
            return None
        names = sorted(name for name in entries
                       if not name.startswith(".") and os.path.isdir(f"{self.services_directory}/{name}"))
        for name in [name for name in names if len(os.fsencode(name)) > NAME_MAX]:
            self.trouble(f"cannot supervise {name[:40]}...", f"the name is longer than {NAME_MAX} bytes")
            names.remove(name)
        if self.renderer and RENDERER not in names:
            names.insert(0, RENDERER)
        if len(names) > SERVICES_MAX:
            self.trouble(f"cannot supervise all of {self.services_directory}", f"more than {SERVICES_MAX} services")
        return names[:SERVICES_MAX]

    def add(self, name: str) -> list[Service]:
        """New services for a name: itself and, if it has log/, its logger, which comes first."""
        live, definition = f"{self.run_directory}/{name}", f"{self.services_directory}/{name}"
        same = os.path.samefile(self.run_directory, self.services_directory)
        service = Service(name, live, live if same else definition)
        service.policy = self.policies.get(name, (None, NO_POLICY))[1]
        if name == RENDERER and self.renderer and not os.path.isdir(definition):
            self.build_in(service)
            self.services[name] = service
            return [service]
        if not os.path.isdir(f"{definition}/log"):
            self.services[name] = service
            return [service]
        logger = Service(f"{name}/log", f"{live}/log", f"{live}/log" if same else f"{definition}/log")
        logger.policy = self.policies.get(logger.name, (None, NO_POLICY))[1]
        service.pipe = logger.pipe = os.pipe()  # both ends stay open here, so it outlives both processes
        self.services[name], self.services[logger.name] = service, logger
        return [logger, service]

    def build_in(self, service: Service) -> None:
        """Make the service directory of the built-in renderer, which needs no run script."""
        service.definition = service.directory
        service.policy = {**NO_POLICY, "command": self.renderer, "env": {
            "ETCDINIT_RUN": self.run_directory, "ETCDINIT_SERVICES": self.services_directory,
            "ETCDINIT_CONFDIR": self.confdir}}
        try:
            os.makedirs(service.directory, 0o755, exist_ok=True)
            replace_file(f"{service.directory}/notification-fd", b"3\n")
            replace_file(f"{service.directory}/run", b"#!/bin/sh\nexec etcdinit render --notify-fd 3\n", 0o755)
        except OSError as error:
            self.trouble(f"cannot make {service.directory}", error)

    def read_bound(self) -> None:
        """Read again which services are bound to files, if conf.d has changed."""
        stamps = conf_stamps(self.confdir) if self.confdir else []
        if stamps != self.conf_stamps:
            self.bound = ask_child(lambda: bound_services(self.confdir))
            self.conf_stamps = stamps

    def read_policies(self, names: Sequence[str]) -> None:
        """Read the service.toml files that have changed, those of loggers too. OSError if no process can do it."""
        changed: dict[str, object] = {}
        for name in [each for both in names for each in (both, f"{both}/log")]:
            try:
                found = os.stat(f"{self.services_directory}/{name}/service.toml")
                stamp: object = (found.st_ino, found.st_size, found.st_mtime_ns)
            except OSError:
                stamp = None
            if stamp != self.policies.get(name, (None, {}))[0]:
                changed[name] = stamp
        gone = {name: NO_POLICY for name, stamp in changed.items() if stamp is None}
        there = {name: f"{self.services_directory}/{name}/service.toml" for name, stamp in changed.items() if stamp}
        for name, policy in {**gone, **(load_policies(there) if there else {})}.items():
            if isinstance(policy, str):
                policy = {**NO_POLICY, "broken": f"service.toml: {policy}"}
            self.policies[name] = (changed[name], policy)
            if name in self.services:
                self.services[name].policy = policy

    def retire(self, service: Service) -> None:
        """Stop a service whose definition is gone, and forget it when it is down."""
        service.vanished = True
        if service.state == GONE:
            self.dismiss_logger(service)
            self.forget(service)
        elif service.state in (DOWN, UP, FINISH):
            log.info(f"stopping {service.name}: it is no longer in {self.services_directory}")
            self.step(service, "x")
            self.step(service, "d")

    def dismiss_logger(self, service: Service) -> None:
        """Let the logger of a service that is gone for good read the rest, and end at the end of the file."""
        logger = self.services.get(f"{service.name}/log")
        if not service.pipe or not logger or service is logger:
            return
        if logger.state == DOWN and logger.wantup:
            self.step(logger, "u")
        logger.asked, logger.vanished = service.asked, service.vanished
        for fd in service.pipe:
            os.close(fd)
        service.pipe = logger.pipe = None
        self.step(logger, "x")

    def forget(self, service: Service) -> None:
        """Remove a service that is gone, and its live directory."""
        self.services.pop(service.name, None)
        self.policies.pop(service.name, None)
        if service.output_fds:
            self.read_output(service)
            if service.output:
                self.put_out(service.output.feed(b"", last=True))
            for fd in service.output_fds:
                self.unwatch(fd)
        if service.definition != service.directory and f"{service.name}/log" not in self.services:
            producer = service.directory.removesuffix("/log")
            remove_tree(service.directory if service.name.removesuffix("/log") in self.services else producer)

# ---- the life of a container ------------------------------------------------------------------------------

RESULT = "/run/s6-linux-init-container-results/exitcode"  # scripts written for s6-overlay put an exit code there
HOOKS_START, HOOKS_STOP = "/etc/cont-init.d", "/etc/cont-finish.d"
STATE_VARIABLE = "ETCDINIT_STATE"  # names the descriptor that holds the state, when a process goes on as a new image
LOADER: dict[str, str] = {}  # what such an image needs in its environment, too; the PyInstaller variant fills it
RECOVERIES, RECOVERY_TIME = 5, 60.0  # so many exceptions within so many seconds are too many to go on

# What a signal to PID 1 does: stop, rescan, ignore, forward (to CMD), or the name of the signal that CMD gets instead.
# ETCDINIT_SIGNALS changes it: "HUP=forward,USR1=HUP". 37 is what container engines mean by SIGRTMIN+3.
SIGNAL_ACTIONS = {**{SIGNALS[name]: "stop" for name in ("TERM", "INT", "QUIT", "USR1", "USR2", "PWR")},
                  SIGNALS["HUP"]: "rescan", SIGNALS["ALRM"]: "rescan", SIGNALS["WINCH"]: "forward", 37: "stop"}
OWN_RESULT = ".s6-svscan/exitcode"  # below the live directories: the same for those who may not write there
SVSCAN_BYTES = {"a": "scan", "h": "rescan", "n": "rescan", "N": "rescan", "t": "stop", "i": "stop", "q": "stop",
                "b": "stop"}  # of .s6-svscan/control; z, "reap", is always done


def signal_actions(changes: Iterable[str]) -> dict[int, str]:
    """SIGNAL_ACTIONS with changes like "HUP=forward". UsageError."""
    actions = dict(SIGNAL_ACTIONS)
    for change in changes:
        name, equals, action = change.partition("=")
        try:
            if not equals:
                raise ValueError("SIGNAL=ACTION is needed")
            if action not in ("stop", "rescan", "ignore", "forward"):
                action = str(signal_number(action))
            actions[signal_number(name)] = action
        except ValueError as error:
            raise UsageError(f'cannot use "{change}" in ETCDINIT_SIGNALS: {error}') from None
    return actions


if TYPE_CHECKING:
    Wait = tuple[Callable[[], Any], Callable[[], float | None]]  # until that is true, or the point in time has come


class Init(Supervisor):
    """A container's life: hooks, services, the command, the shutdown. One pass of life() is one life.

    phase: hooks, services, run, end or finish; with the services it is what another process image needs to go on.
    """

    def __init__(self, services: str, run: str, style: str, command: Sequence[str], grace: float,
                 actions: Mapping[int, str], confdir: str = "", renderer: Sequence[str] = ()) -> None:
        """grace: seconds that a shutdown may take; actions: see signal_actions; others: see Supervisor."""
        super().__init__(services, run, style, confdir, renderer)
        self.command, self.grace, self.actions = list(command), grace, actions
        self.directory = os.getcwd()
        self.phase, self.hooks_done = "hooks", 0  # hooks: how many of cont-init.d, later of cont-finish.d
        self.command_pid = self.hook_pid = 0
        self.reason, self.code = "", 0  # why the container ends, "" while it does not, and its exit code
        self.end_begin = self.end_limit = 0.0
        self.hurried = 0
        self.recoveries: list[float] = []
        self.scan_lock = self.scan_control = -1
        self.is_first = os.getpid() == 1

    # -- begin and end of the process

    def prepare(self) -> None:
        """What must be there before anything starts; Error says in one sentence what is missing."""
        try:
            os.makedirs(f"{self.run_directory}/.s6-svscan", 0o700, exist_ok=True)
            definition = f"{self.services_directory}/.s6-svscan"
            if os.path.isdir(definition) and not os.path.samefile(definition, f"{self.run_directory}/.s6-svscan"):
                link_definition(definition, f"{self.run_directory}/.s6-svscan")
            self.scan_lock = _lock_whole(f"{self.run_directory}/.s6-svscan/lock")
            self.clear()
            path = f"{self.run_directory}/.s6-svscan/control"
            os.mkfifo(path, 0o600)
            self.scan_control = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise Error(f"cannot use {self.run_directory} for the state of services: {reason(error)} "
                        "(it must be writable: mount a tmpfs there, or set ETCDINIT_RUN)") from None
        states = f"{self.run_directory}/{STATE_DIRECTORY}"
        for name in _listed(states):
            _unlink(f"{states}/{name}/released")  # the files of an earlier life may be gone
        self.watch(self.scan_control, self.read_scan_control, None)
        self.write_result(0)
        if not self.is_first:
            self.reaps_orphans = become_subreaper()
            log.info(f"running as process {os.getpid()}, not 1: " + (
                "reaping the orphans of services as a subreaper" if self.reaps_orphans else
                "orphans of services go to somebody else, this process cannot be a subreaper"))

    def clear(self) -> None:
        """Remove what an earlier life left behind, as when a container is started again. OSError."""
        for name in ("control", os.path.basename(OWN_RESULT)):
            remove_file(f"{self.run_directory}/.s6-svscan/{name}")
        if os.path.realpath(self.run_directory) == os.path.realpath(self.services_directory):
            return
        for name in service_names(self.run_directory):
            if "/" not in name and not is_supervised(f"{self.run_directory}/{name}"):
                remove_tree(f"{self.run_directory}/{name}")

    def prepare_process(self) -> None:
        """What every image of this process needs: signals, descriptors, limits."""
        for fd in open_descriptors():
            os.set_inheritable(fd, False)
        log.fd = nonblocking_twin(2)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            self.child_limits = {"nofile": [soft, hard]}
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            except (OSError, ValueError):
                self.child_limits = {}
        self.catch_signals()

    def run(self) -> int:
        """Live; returns the exit code of the container, or goes on as another program (finish, crash)."""
        self.prepare_process()
        while True:
            try:
                code = self.live()
                break
            except Exception as error:  # whatever it is: PID 1 must not end of it
                self.recover(error)
        self.drain()
        return self.leave_to("finish", self.reason, code)

    def drain(self) -> None:
        """Pass on what services wrote last, as fast as its reader takes it, but not after the end of the grace."""
        for service in self.services.values():
            if service.output and service.output_fds:
                self.read_output(service)
                self.outlet.write(service.output.feed(b"", last=True))
        poll = select.poll()
        poll.register(self.outlet.fd, select.POLLOUT)
        deadline = max(self.end_limit, now() + 0.5)
        while not self.outlet.write(b"") and deadline > now():
            poll.poll((deadline - now()) * 1000 + 1)

    def live(self) -> int:
        """Run life() to its end, turning in between."""
        life = self.life()
        wait = next(life)
        while True:
            while self.signals:
                self.obey(self.signals.pop(0))
            happened, deadline = wait
            limit = deadline()
            if happened() or (limit is not None and limit <= now()):
                try:
                    wait = next(life)
                except StopIteration as end:
                    return int(end.value)
                continue
            self.turn(limit)

    def leave_to(self, name: str, why: str, code: int) -> int:
        """Execute finish or crash of .s6-svscan, with the reason and the exit code, if there is one; else the code."""
        path = f"{self.run_directory}/.s6-svscan/{name}"
        if os.access(path, os.X_OK):
            try:
                os.chdir(self.run_directory)
                for number in signal.valid_signals() - {SIGNALS["KILL"], SIGNALS["STOP"]}:
                    signal.signal(number, signal.SIG_DFL)
                os.execve(path, [path, why, str(code)],
                          {**self.environ, "ETCDINIT_REASON": why, "ETCDINIT_EXITCODE": str(code)})
            except OSError as error:
                log.error(f"cannot execute {path}: {reason(error)}")
        return code

    def recover(self, error: Exception) -> None:
        """Our own code has failed: go on as a fresh image of this program, in the same state."""
        log.error(f"unexpected {bug(error)}; services go on, etcdinit starts anew")
        self.recoveries = [at for at in self.recoveries if at > now() - RECOVERY_TIME] + [now()]
        if len(self.recoveries) > RECOVERIES:
            why = f"etcdinit failed {len(self.recoveries)} times within {RECOVERY_TIME:g}s: {bug(error)}"
            log.error(f"{why}; giving up")
            os._exit(self.leave_to("crash", why, 111))
        try:
            self.execute_anew()
        except Exception as failure:  # no memory, no descriptor
            log.error(f"cannot start anew: {reason(failure)}; going on as it is")
            time.sleep(0.1)

    # -- the state in another process image

    def execute_anew(self) -> None:
        """Execute this program again, with everything it needs to go on; OSError if that cannot be done."""
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # what comes now waits for the new image
        fd = -1
        try:
            self.read_signals(None)  # what came before goes with the state
            fd = os.memfd_create("etcdinit state", 0)
            os.write(fd, self.state())
            os.lseek(fd, 0, os.SEEK_SET)
            for kept in [fd, self.scan_lock, self.scan_control, *(fd for service in self.services.values() for fd in (
                    service.control, service.lock, service.notification, *(service.pipe or ()),
                    *(service.output_fds or ())))]:
                if kept >= 0:
                    os.set_inheritable(kept, True)
            program = "/proc/self/exe" if os.path.exists("/proc/self/exe") else sys.executable
            os.execve(program, sys.orig_argv, {**self.environ, **LOADER, STATE_VARIABLE: str(fd)})
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            if fd >= 0:
                os.close(fd)

    def state(self) -> bytes:
        """What adopt() needs to know, descriptors by their numbers."""
        services = [tuple(getattr(service, name) for name in Service.SAVED) +
                    ((service.output.partial, service.output.kept) if service.output else (b"", b""),)
                    for service in self.services.values()]
        return marshal.dumps({
            "services": services, "phase": self.phase, "hooks_done": self.hooks_done, "command_pid": self.command_pid,
            "hook_pid": self.hook_pid, "signals": self.signals, "reaps_orphans": self.reaps_orphans,
            "reason": self.reason, "code": self.code, "end_begin": self.end_begin, "end_limit": self.end_limit,
            "hurried": self.hurried, "recoveries": self.recoveries, "scan_lock": self.scan_lock,
            "scan_control": self.scan_control, "child_limits": self.child_limits, "oom_kills": self.oom_kills,
            "waiting": bytes(self.outlet.waiting), "policies": self.policies, "directory": self.directory})

    def adopt(self, fd: int) -> None:
        """Take over the state that execute_anew left at a descriptor."""
        state = b""
        while more := os.read(fd, 1 << 20):
            state += more
        os.close(fd)
        saved = marshal.loads(state)
        self.outlet.waiting += saved.pop("waiting")
        services = saved.pop("services")
        for name, value in saved.items():
            setattr(self, name, value)
        for values in services:
            service = Service("", "", "")
            for name, value in zip(Service.SAVED, values[:-1], strict=True):
                setattr(service, name, value)
            self.services[service.name] = service
            if service.control >= 0:
                self.watch(service.control, self.read_control, service)
            if service.notification >= 0:
                self.watch(service.notification, self.read_notification, service)
            if service.output_fds:
                service.output = Output(service.name, self.style)
                service.output.partial, service.output.kept = values[-1]
                self.watch(service.output_fds[0], self.read_output, service)
            if service.pid:
                self.await_death(service)
                if service.policy["health"] and service.state == UP:
                    self.at(now(), self.check_health, (service, service.pid))
            if service.deadline is not None:
                self.arm(service, service.deadline)
        self.watch(self.scan_control, self.read_scan_control, None)
        if self.command_pid > 0:
            self.children[self.command_pid] = self.command_ended
        log.warning(f"went on in a fresh process image with {len(self.services)} services")

    # -- what comes from outside

    def obey(self, number: int) -> None:
        """Do what a signal asks for."""
        action = self.actions.get(number, "ignore")
        name = SIGNAL_NAMES.get(number, f"signal {number}")
        handler = f"{self.run_directory}/.s6-svscan/{name}"
        if number != SIGNALS["CHLD"] and os.access(handler, os.X_OK):
            try:
                spawn([handler], self.run_directory, self.environ, {0: self.null, 1: 1, 2: 2}, limits=self.child_limits)
                return
            except OSError as error:
                self.trouble(f"cannot run {handler}", error)
        if action == "stop":
            self.end(name, 0)
        elif action == "rescan":
            self.rescan(True)
        elif action != "ignore" and self.command_pid > 0:
            try:
                os.kill(self.command_pid, number if action == "forward" else int(action))
            except OSError as error:
                self.trouble(f"cannot forward {name}", error)

    def read_scan_control(self, _: None) -> None:
        """Do what the bytes in .s6-svscan/control say."""
        try:
            commands = os.read(self.scan_control, 4096)
        except BlockingIOError:
            return
        for byte in commands.decode("latin-1"):
            action = SVSCAN_BYTES.get(byte)
            if action == "stop":
                self.end(f"command {byte}", 0)
            elif action:
                self.rescan(action == "rescan")

    def rescan(self, prune: bool) -> None:
        """Scan, when it is time for services."""
        if self.phase == "run" and not self.reason:
            self.scan(prune)

    def end(self, why: str, code: int) -> None:
        """Begin to end the container; the first reason counts, each further one leaves less time."""
        if not self.reason:
            log.info(f"ending: {why}")
            self.reason, self.code = why, code
            self.end_begin, self.end_limit = now(), now() + self.grace
            if code:
                self.write_result(code)
            return
        self.hurried += 1
        log.info(f"hurrying: {why}")
        self.end_limit = min(self.end_limit, now() + (1.0 if self.hurried == 1 else 0.1))

    def fail(self, why: str, code: int) -> None:
        """An essential service has ended, and with it the container; what ends while all ends is no reason to hurry."""
        if not self.reason:
            self.end(why, code)

    def write_result(self, code: int) -> None:
        """Note the exit code where finish hooks can see and change it; not everybody may."""
        try:
            os.makedirs(os.path.dirname(RESULT), exist_ok=True)
            replace_file(RESULT, f"{code}\n".encode())
        except OSError:
            pass

    def result(self) -> int:
        """The exit code of the container."""
        for path in (f"{self.run_directory}/{OWN_RESULT}", RESULT):
            try:
                text = (read_small(path) or b"").strip()
            except OSError:
                continue
            if text.isdigit():
                return int(text) & 0xFF
        return self.code

    # -- one life

    def life(self) -> Generator[Wait, None, int]:
        """All phases in their order; gives what to wait for, and at last the exit code."""
        if self.phase == "hooks":
            yield from self.start_hooks()
            self.phase = "services"
        if self.phase == "services" and not self.reason:
            self.scan()
            if not self.services and not self.command:
                log.warning(f"there is neither a service in {self.services_directory} nor a command to run")
            self.phase = "run"
            self.start_command()
        if self.phase in ("services", "run"):
            yield lambda: self.reason, lambda: None
            self.phase = "end"
        if self.phase == "end":
            yield from self.stop_command()
            yield from self.stop_services()
            self.phase, self.hooks_done = "finish", 0
        yield from self.stop_hooks()
        yield from self.stop_rest()
        return self.result()

    def part(self, share: float, at: float = 1e12) -> Callable[[], float]:
        """The point in time when a share of the grace is over (it moves when somebody hurries), at the latest `at`."""
        return lambda: min(at, self.end_begin + share * (self.end_limit - self.end_begin))

    def until(self, at: float) -> Callable[[], float]:
        """That point in time."""
        return lambda: at

    def moved(self) -> Callable[[], bool]:
        """Whether, from now on, a service was left or somebody hurries."""
        before = self.left, self.hurried
        return lambda: before != (self.left, self.hurried)

    def hook(self, path: str, deadline: Callable[[], float | None],
             broken_off: Callable[[], Any]) -> Generator[Wait, None, int]:
        """Run one hook to its end, its deadline, or until it is broken off; returns its waitpid status."""
        ended: list[int] = []
        pid = self.hook_pid  # it runs already if this is a fresh process image
        try:
            pid = self.hook_pid = pid or spawn([path], self.directory, self.environ, {0: self.null, 1: 1, 2: 2},
                                               limits=self.child_limits)
        except OSError as error:
            log.error(f"cannot run {path}: {reason(error)}")
            self.hooks_done += 1
            return 127 << 8
        self.children[pid] = ended.append
        yield lambda: ended or broken_off(), deadline
        if not ended:
            for number in ("TERM", "CONT"):
                os.killpg(pid, SIGNALS[number])
            yield lambda: ended, self.until(now() + 1.0)
        if not ended:
            os.killpg(pid, SIGNALS["KILL"])
            yield lambda: ended, lambda: None
        self.hook_pid, self.hooks_done = 0, self.hooks_done + 1
        return ended[0]

    def start_hooks(self) -> Iterator[Wait]:
        """The scripts of cont-init.d, in order; S6_BEHAVIOUR_IF_STAGE2_FAILS says what comes of a failure."""
        behaviour = self.environ.get("S6_BEHAVIOUR_IF_STAGE2_FAILS", "0")
        for path in hooks(HOOKS_START)[self.hooks_done:]:
            if self.reason and not self.hook_pid:
                return
            wstat = yield from self.hook(path, lambda: None, lambda: self.reason)
            log("info" if not wstat else "warning", f"{path} ended: {ending(wstat)}")
            if wstat and behaviour == "2" and not self.reason:
                self.end(f"{path} failed: {ending(wstat)}", exit_code(wstat))

    def start_command(self) -> None:
        """Start CMD: in the container's working directory and environment, with its terminal if there is one."""
        if not self.command:
            return
        path = find_program(self.command[0], self.environ)
        try:
            if "/" not in path:
                raise FileNotFoundError(errno.ENOENT, "not found in PATH")
            environ = self.environ if os.path.basename(path) == "etcdinit" else self.public_environ
            self.command_pid = spawn(self.command, self.directory, environ, {0: 0, 1: 1, 2: 2}, path=path,
                                     limits=self.child_limits, terminal=0 if os.isatty(0) else None)
        except OSError as error:
            self.command_pid = -1
            log.error(f"cannot execute {self.command[0]}: {reason(error)}")
            self.end("the command could not be executed", 127 if error.errno == errno.ENOENT else 126)
            return
        self.children[self.command_pid] = self.command_ended

    def command_ended(self, wstat: int) -> None:
        """CMD has ended, and with it the container; its exit code is the container's, whoever ended it."""
        self.command_pid = -1
        if self.reason:
            if not self.result():  # nobody has said yet what it shall be
                self.code = exit_code(wstat)
                self.write_result(self.code)
        else:
            self.end(f"the command ended: {ending(wstat)}", exit_code(wstat))

    def stop_command(self) -> Iterator[Wait]:
        """CMD uses the services, so it goes first."""
        if self.command_pid > 0:
            for name in ("TERM", "CONT"):
                os.kill(self.command_pid, SIGNALS[name])
            yield lambda: self.command_pid < 0, self.part(0.25)

    def stop_services(self) -> Iterator[Wait]:
        """Each service when those that come after it are gone; loggers when they have read everything."""
        forced = False
        while True:
            moved = self.moved()
            alive = [service for service in self.services.values()
                     if service.state != GONE and not service.name.endswith("/log")]
            for service in list(self.services.values()):
                if service.state == GONE and service.deadline is not None:
                    service.asked, service.deadline = True, None  # it does not come back
                    self.dismiss_logger(service)
            if not alive:
                break
            needed = {name for service in alive for name in service.policy["after"] if name != service.name}
            free = [service for service in alive if service.name not in needed] or alive
            due = [self.end_begin + (0.0 if self.hurried else service.policy["stop_delay"]) for service in free]
            for service, at in zip(free, due, strict=True):
                if not service.asked and at <= now():
                    service.asked = True
                    self.step(service, "x")
                    self.step(service, "d")
            if self.part(0.8)() <= now():
                if forced:
                    break
                forced = True
                for service in alive:
                    log.warning(f"{service.name} does not stop; killing it")
                    service.asked = True
                    self.step(service, "x")
                    self.kill(service, -SIGNALS["KILL"])
            coming = min([at for at in due if at > now()], default=1e12)
            yield moved, self.until(now() + 0.5) if forced else self.part(0.8, coming)
        loggers = [service for service in self.services.values() if service.name.endswith("/log")]
        yield lambda: all(service.state == GONE for service in loggers), self.part(0.87)

    def stop_hooks(self) -> Iterator[Wait]:
        """The scripts of cont-finish.d, in order."""
        try:
            each = int(self.environ.get("S6_KILL_FINISH_MAXTIME", "5000")) / 1000
        except ValueError:
            each = 5.0
        for path in hooks(HOOKS_STOP)[self.hooks_done:]:
            wstat = yield from self.hook(path, self.part(0.95, now() + each), lambda: False)
            if wstat:
                log.warning(f"{path} ended: {ending(wstat)}")

    def stop_rest(self) -> Iterator[Wait]:
        """Whoever is left: TERM, and KILL at the end of the grace. Leaves as soon as nobody is left."""
        if self.nobody_left():
            return
        self.kill_rest("TERM")
        self.kill_rest("CONT")
        pause = 0.002
        while not self.nobody_left() and now() < self.part(1.0)():
            yield self.nobody_left, self.part(1.0, now() + pause)
            pause = min(0.05, pause * 2)
        if not self.nobody_left():
            log.warning("some processes do not stop; killing them")
            self.kill_rest("KILL")
            for _ in range(20):
                yield self.nobody_left, self.until(now() + 0.025)

    def nobody_left(self) -> bool:
        """Whether there is no process but this one that it has to end."""
        if not self.is_first:
            return not descendants(os.getpid()) and not self.children
        try:
            os.kill(-1, 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass
        return False

    def kill_rest(self, name: str) -> None:
        """Send a signal to everybody: as PID 1 to all processes, else only to those that come from us."""
        if self.is_first:
            try:
                os.kill(-1, SIGNALS[name])
            except OSError:
                pass
            return
        for pid in {*descendants(os.getpid()), *self.children}:
            try:
                os.kill(pid, SIGNALS[name])
            except OSError:
                pass


def hooks(directory: str) -> list[str]:
    """The executable files of a directory of hooks, in order."""
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        return []
    paths = [f"{directory}/{name}" for name in names if not name.startswith(".")]
    for path in paths:
        if os.path.isfile(path) and not os.access(path, os.X_OK):
            log.warning(f"{path} is not executable; passing over it")
    return [path for path in paths if os.path.isfile(path) and os.access(path, os.X_OK)]


def open_descriptors() -> list[int]:
    """The descriptors of this process from 3 on."""
    try:
        fds = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        fds = list(range(3, 1024))
    found = []
    for fd in fds:
        try:
            os.fstat(fd)
        except OSError:
            continue
        if fd > 2:
            found.append(fd)
    return found


def become_subreaper() -> bool:
    """Have orphans of our services come to us as they come to PID 1; whether that can be had."""
    try:
        failed = native.subreaper() if native else ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
        return not failed
    except (OSError, ImportError, AttributeError):
        return False


def descendants(pid: int) -> set[int]:
    """The processes that come from a process and are not dead; none if /proc is not there."""
    parents: dict[int, int] = {}
    for name in _listed("/proc"):
        if name.isdigit():
            try:
                fields = (read_small(f"/proc/{name}/stat") or b"").rpartition(b")")[2].split()
            except OSError:
                continue
            if len(fields) > 1 and fields[0] not in (b"Z", b"X"):
                parents[int(name)] = int(fields[1])
    found: set[int] = set()
    more = {pid}
    while more:
        more = {child for child, parent in parents.items() if parent in more} - found
        found |= more
    return found


def _listed(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


# ---- commands to a supervisor -----------------------------------------------------------------------------
# They speak the protocol of s6 and nothing else, so they work on a service of a real s6-supervise too.

EXIT_TIMEOUT = 99  # as of s6-svwait


def service_path(name: str, run: str) -> str:
    """The service directory that a word on the command line means: a path if it has a slash, else a name in run."""
    return name.rstrip("/") if name.startswith(("/", "./", "../")) else f"{run}/{name}"


def read_status(directory: str) -> Status:
    """The status of a service; Error if nobody supervises it."""
    try:
        record = read_small(f"{directory}/supervise/status")
        if record is None or not is_supervised(directory):
            raise Error(f"{directory} is not supervised")
        return Status.unpack(record)
    except (OSError, ValueError) as error:
        raise Error(f"cannot read the status of {directory}: {reason(error)}") from None


def is_supervised(directory: str) -> bool:
    """Whether somebody reads the control FIFO of a service directory."""
    try:
        fd = os.open(f"{directory}/supervise/control", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError:
        return True  # it is there, and we are just not allowed to command it
    except OSError:
        return False
    os.close(fd)
    return True


def send_command(directory: str, commands: str) -> None:
    """Write command bytes into the control FIFO of a service; Error says why that is not possible."""
    try:
        fd = os.open(f"{directory}/supervise/control", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        why = "it is not supervised" if error.errno in (errno.ENXIO, errno.ENOENT) else reason(error)
        raise Error(f"cannot command {directory}: {why}") from None
    try:
        os.write(fd, commands.encode())
    except OSError as error:
        raise Error(f"cannot command {directory}: {reason(error)}") from None
    finally:
        os.close(fd)


def send_signal(name: str, directory: str, number: int) -> None:
    """Send a signal to a service: by its control FIFO, or as itself if s6 has no command for it. Error."""
    known = {**SIGNAL_BYTES, "p": SIGNALS["STOP"], "c": SIGNALS["CONT"]}
    byte = next((byte for byte, meant in known.items() if meant == number), "")
    status = read_status(directory)
    if not status.up:
        raise Error(f"cannot signal {name}: it is not up")
    if byte:
        send_command(directory, byte)
        return
    try:
        os.kill(status.pid, number)
    except OSError as error:
        raise Error(f"cannot signal {name}: {reason(error)}") from None


HANDLERS_SET = 1.0  # seconds up after which a service that cannot tell readiness has set up its signal handlers


class ServiceLook:
    """How a service fares, as another program can see it.

    up and pid; ready: up, and ready if it can tell; settled: ready, or up for HANDLERS_SET; wanted: it shall be up;
    waits: for whom, by our supervisor; gave_up: our supervisor did; startable: down, but nothing hinders a start;
    ended: how it ended last.
    """

    __slots__ = ("up", "pid", "ready", "settled", "wanted", "waits", "gave_up", "startable", "ended")

    def __init__(self, directory: str) -> None:
        """Error if nobody supervises it."""
        status, notes = read_status(directory), read_notes(directory)
        tells = os.path.exists(f"{directory}/notification-fd")
        self.up, self.pid, self.wanted = status.up, status.pid, bool(status.flags & WANTUP)
        self.ready = status.up and (status.ready or not tells)
        self.settled = self.ready and (tells or time.time() - status.stamp / 1e9 >= HANDLERS_SET)
        self.waits, self.gave_up = notes.get("waits", ""), "given_up" in notes
        self.startable = self.wanted and not self.waits and not status.pid and status.ready
        self.ended = notes.get("ended") or ending(status.wstat)


class ServiceDoor:
    """All that the renderer knows of a service and can ask of it: s6's protocol, so a real s6-supervise will do."""

    __slots__ = ("name", "directory", "_run", "_listener")

    def __init__(self, name: str, run: str) -> None:
        self.name, self.directory, self._run = name, service_path(name, run), run
        self._listener: Listener | None = None

    def look(self) -> ServiceLook:
        """How it fares. Error if nobody supervises it."""
        return ServiceLook(self.directory)

    def listen(self) -> None:
        """Hear of its events from now on, if that is allowed."""
        if not self._listener:
            try:
                self._listener = Listener(f"{self.directory}/event")
            except OSError:
                pass  # look() has to do

    def hush(self) -> None:
        """No longer."""
        if self._listener:
            self._listener.close()
            self._listener = None

    def deaths(self) -> int:
        """How often it died since the last call, while listening."""
        return self._listener.read().count(b"d") if self._listener else 0

    def descriptors(self) -> list[int]:
        """What to poll for its events."""
        return [self._listener.fd] if self._listener else []

    def command(self, commands: str) -> None:
        """Send command bytes. Error."""
        send_command(self.directory, commands)

    def signal(self, number: int) -> None:
        """Send a signal. Error."""
        send_signal(self.name, self.directory, number)

    def catches(self, pid: int, way: str) -> bool:
        """Whether its process has a handler for the signal of "signal N", as far as that can be seen."""
        word, _, number = way.partition(" ")
        try:
            status = (read_small(f"/proc/{pid}/status", 65536) or b"").partition(b"\nSigCgt:")[2]
            return word == "signal" and bool(int(status.split()[0], 16) >> int(number) - 1 & 1)
        except (OSError, ValueError, IndexError):
            return False

    def lines(self) -> list[str]:
        """The last lines that it wrote, if our supervisor keeps them."""
        return last_lines(self.directory)

    def scan(self) -> None:
        """Have the supervisor look for services that can be started now."""
        try:
            scan_command(self._run, "a")
        except Error as error:
            log.debug(str(error))

    def reload(self, ways: Sequence[str]) -> None:
        """Tell it of new files if it is up: "restart", "signal N"; others are not ours. Error."""
        if ways and is_supervised(self.directory) and read_status(self.directory).up:
            for way in ways:
                if way == "restart":
                    self.command("r")
                elif way.startswith("signal "):
                    self.signal(int(way.removeprefix("signal ")))


def scan_command(run: str, byte: str) -> None:
    """Send a command byte to whoever scans a directory of services. Error."""
    path = f"{run}/.s6-svscan/control"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.write(fd, byte.encode())
        os.close(fd)
    except OSError as error:
        why = "no etcdinit init runs there" if error.errno in (errno.ENXIO, errno.ENOENT) else reason(error)
        raise Error(f"cannot command {run}: {why}") from None


WAITS: dict[str, tuple[str, Callable[[Status], bool]]] = {  # state: the event that brings it, how the status tells it
    "up": ("u", lambda status: status.up),
    "ready": ("U", lambda status: status.up and status.ready),
    "down": ("d", lambda status: not status.up),
    "finished": ("D", lambda status: not status.up and status.ready),
}


class StateWait:
    """Waits for a state of one service: subscribed first, then the status read, so that nothing is missed."""

    __slots__ = ("name", "directory", "listener", "state", "reached", "failed")

    def __init__(self, name: str, directory: str, state: str) -> None:
        """Error if the service is not supervised, or we may not listen."""
        self.name, self.directory, self.state = name, directory, state
        if state == "ready" and not os.path.exists(f"{directory}/notification-fd"):
            self.state = "up"  # a service that cannot tell readiness is ready when it is up
        try:
            self.listener = Listener(f"{directory}/event")
        except OSError as error:
            why = f"{directory} is not supervised" if error.errno == errno.ENOENT else reason(error)
            raise Error(f"cannot wait for {name}: {why}") from None
        self.reached = WAITS[self.state][1](read_status(directory))
        self.failed = ""

    def take(self) -> None:
        """Take the events that came."""
        for event in self.listener.read().decode("latin-1"):
            if event in "uUdD":
                self.reached = event == WAITS[self.state][0] or (event == "D" and self.state == "down") \
                    or (event == "U" and self.state == "up")
            elif event == "O" and self.state in ("up", "ready"):
                self.failed = "failed for good"
            elif event == "x" and not self.reached:
                self.failed = "is no longer supervised"


def wait_for(names: Sequence[str], state: str, any_of_them: bool, timeout: float | None, run: str,
             then: str = "", afresh: bool = False) -> int:
    """Wait until services are in a state (see WAITS); `then` are commands to send once it is being waited.

    With afresh the state must come anew after the command, even if it is there already.
    Returns an exit code: 0, 1 if one cannot get there any more, EXIT_TIMEOUT.
    """
    watches: list[StateWait] = []
    deadline = None if timeout is None else now() + timeout
    poll = select.poll()
    try:
        for name in names:
            watches.append(StateWait(name, service_path(name, run), state))
            poll.register(watches[-1].listener.fd, select.POLLIN)
        for watch in watches if then else ():
            watch.reached = watch.reached and not afresh
            send_command(watch.directory, then)
        while True:
            missing = [watch for watch in watches if not watch.reached]
            if not missing or (any_of_them and len(missing) < len(watches)):
                return EXIT_OK
            failed = [watch for watch in missing if watch.failed]
            if failed and (not any_of_them or len(failed) == len(watches)):
                raise Error(f"{failed[0].name} will not be {state}: it {failed[0].failed}")
            left = None if deadline is None else deadline - now()
            if left is not None and left <= 0:
                for watch in missing:
                    problem = describe(watch.name, watch.directory, lines=False)["problem"]
                    log.error(f"not {state} after {timeout:g}s: {watch.name}" + (f" ({problem})" if problem else ""))
                return EXIT_TIMEOUT
            if left is None or left > 5.0:
                left = 5.0  # a supervisor that was killed sends no event
            poll.poll(left * 1000 + 1)
            for watch in missing:
                watch.take()
                if not watch.reached and not watch.failed and not is_supervised(watch.directory):
                    watch.failed = "is no longer supervised"
    finally:
        for watch in watches:
            watch.listener.close()


def read_notes(directory: str) -> dict[str, str]:
    """What our supervisor adds to the status of a service; nothing from others."""
    try:
        text = (read_small(f"{directory}/supervise/note", 65536) or b"").decode("utf-8", "replace")
    except OSError:
        return {}
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def last_lines(directory: str) -> list[str]:
    """The last lines of output of a service of ours: asked for, and waited for a moment."""
    path = f"{directory}/supervise/output"

    def stamp() -> tuple[int, int]:
        try:
            found = os.stat(path)
            return found.st_ino, found.st_mtime_ns
        except OSError:
            return 0, 0

    before = stamp()
    try:
        send_command(directory, "=")
    except Error:
        pass
    deadline = now() + 0.2
    while stamp() == before and now() < deadline and os.path.exists(f"{directory}/supervise/note"):
        time.sleep(0.002)
    try:
        return (read_small(path, 65536) or b"").decode("utf-8", "replace").splitlines()
    except OSError:
        return []


def describe(name: str, directory: str, lines: bool = True) -> dict[str, Any]:
    """All that is known of a service, as plain values; Error if nobody supervises it."""
    status, note = read_status(directory), read_notes(directory)
    state = "up" if status.up else "finishing" if status.flags & FINISHING else "down"
    deaths = unpack_deaths(read_small(f"{directory}/supervise/death_tally", DEATH_TALLY_MAX * 14) or b"")
    known: dict[str, Any] = {
        "name": name, "state": state, "pid": status.pid or None, "since": _iso(status.stamp),
        "seconds": round(max(0.0, time.time() - status.stamp / 1e9), 3),
        "ready": bool(status.up and status.ready), "ready_since": _iso(status.ready_stamp) if status.ready else None,
        "wanted": "up" if status.flags & WANTUP else "down", "paused": bool(status.up and status.flags & PAUSED),
        "tells_readiness": os.path.exists(f"{directory}/notification-fd"),
        "normally": "down" if os.path.exists(f"{directory}/down") else "up",
        "last_exit": ending(status.wstat) if deaths or status.wstat else None,
        "out_of_memory": note.get("oom") == "yes", "deaths": len(deaths),
        "problem": note.get("problem") or ("gave up" if "given_up" in note else None)
        or (f"waits for {note['waits']}" if "waits" in note else None)
        or (f"unhealthy: {note['unhealthy']}" if "unhealthy" in note and status.up else None),
        "next_start": _iso(_note_ns(note.get("next", ""))) if state == "down" and status.flags & WANTUP else None,
        "configuration": bond_state(os.path.dirname(directory), name) or None,
    }
    why = (known["configuration"] or {}).get("why") or (
        renderer_problem(os.path.dirname(directory)) if name == RENDERER else "")
    if why and (known["problem"] == "waits for configuration" or name == RENDERER and not known["problem"]):
        known["problem"] = (known["problem"] + ": " if known["problem"] else "") + why
    if lines:
        known["output"] = last_lines(directory)
    return known


def _note_ns(seconds: str) -> int:
    try:
        return int(float(seconds) * 1e9)
    except (ValueError, OverflowError):
        return 0


def _iso(wall_ns: int) -> str | None:
    if not 0 < wall_ns < 2**63:  # not a time that anybody meant
        return None
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(wall_ns // 10**9)) + f".{wall_ns // 10**6 % 1000:03d}Z"


def status_line(known: Mapping[str, Any]) -> str:
    """One service in one line for people: `nginx    up 12s, pid 31, ready`."""
    if "pid" not in known:
        return f"{known['name']:16} {known['problem']}"
    parts = [f"{known['state']} {known['seconds']:.0f}s"]
    if known["pid"]:
        parts.append(f"pid {known['pid']}")
    if known["state"] == "up":
        parts.append("ready" if known["ready"] else "not ready" if known["tells_readiness"] else "")
        parts.append("paused" if known["paused"] else "")
    if known["last_exit"] and known["state"] != "up":
        parts.append(known["last_exit"] + (" (out of memory)" if known["out_of_memory"] else ""))
    if (known["state"] == "up") != (known["wanted"] == "up"):
        parts.append(f"wanted {known['wanted']}")
    if known["deaths"]:
        parts.append(f"{known['deaths']} deaths")
    files = known["configuration"] or {}
    if files.get("revision") is not None:
        parts.append(f"revision {files['revision']}" + (f" (wanted {files['wanted']}: {files['why']})" if files["why"]
                                                        else f" ({files['phase']})" if files["phase"] else ""))
    parts.append("held" if files.get("held") else "")
    parts.append(known["problem"] or "")
    return f"{known['name']:16} " + ", ".join(part for part in parts if part)


def service_names(run: str) -> list[str]:
    """The services in a directory of live directories, loggers after their producers."""
    names = sorted(name for name in _listed(run) if not name.startswith("."))
    both = [name for each in names for name in (each, f"{each}/log")]
    return [name for name in both if os.path.isdir(f"{run}/{name}/supervise")]


# ======================================================================================================
# COMMAND LINE
# Verbs, flags, help. Everything a user types; it knows only the doors of the rooms above.
# The tables below are the parser, the help and the reference in README.md.
# ======================================================================================================

# ---- flags and verbs ----------------------------------------------------------------------------------

class Flag:
    """One row of the table of flags that are no settings: name, kind (as in SETTINGS), word for its value, help."""

    __slots__ = ("name", "kind", "value", "help")

    def __init__(self, name: str, kind: str, value: str, help: str) -> None:
        self.name, self.kind, self.value, self.help = name, kind, value, help


FLAGS = {row.name: row for row in (
    Flag("once", "flag", "", "render once and leave"),
    Flag("keys", "text", "FILE", "take the keys from a JSON or TOML file instead of etcd"),
    Flag("dry-run", "flag", "", "change no file and run no command"),
    Flag("diff", "flag", "", "print a unified diff of every file that changes"),
    Flag("sync-only", "flag", "", "run neither check_cmd nor reload_cmd"),
    Flag("root", "text", "DIR", "put the destinations below DIR, making directories there; commands run as always"),
    Flag("notify-fd", "text", "FD", "write a newline to this descriptor once every file has been rendered (s6)"),
    Flag("up", "flag", "", "wait until they are up"),
    Flag("ready", "flag", "", "wait until they have said that they are ready (the default); up, if they cannot say it"),
    Flag("down", "flag", "", "wait until they are down"),
    Flag("finished", "flag", "", "wait until they are down and their finish script has ended"),
    Flag("any", "flag", "", "wait for one of them instead of all"),
    Flag("timeout", "duration", "TIME", "how long to wait for it; exit code 99 if it took longer"),
    Flag("json", "flag", "", "print JSON"),
    Flag("follow", "flag", "", "go on, and print it again whenever it changes"),
    Flag("help", "flag", "", "show this help"),
)}

_VALUE_WORDS = {"confdir": "DIR", "compat": "confd", "prefix": "KEY", "node": "URL", "api": "2|3", "interval": "TIME",
                "max-outage": "TIME",
                "log-level": "LEVEL", "log-format": "FORMAT",
                "services": "DIR", "run": "DIR", "grace": "TIME", "signals": "SIGNAL=ACTION"}
_KEY_FLAGS = ("keys", "node", "api", "prefix")  # where keys come from
_ETCD_FLAGS = _KEY_FLAGS[1:]
_LOG_FLAGS = ("log-level", "log-format", "help")
_RUN_FLAGS = ("run", *_LOG_FLAGS)


class Verb:
    """One row of the table of verbs: name, positional arguments as help shows them, flags, help, example, function.

    arguments: "FILE" is needed, "[KEY]" is not, "[NAME ...]" takes any number. function(words, flags) returns the
    exit code.
    """

    __slots__ = ("name", "arguments", "flags", "help", "example", "function")

    def __init__(self, name: str, arguments: str, flags: tuple[str, ...], help: str, example: str,
                 function: Callable[[list[str], dict[str, Any]], int]) -> None:
        self.name, self.arguments, self.flags, self.help = name, arguments, flags, help
        self.example, self.function = example, function


def _flag_row(name: str) -> tuple[str, str, str, str]:
    """kind, word for the value, help, and where the value comes from otherwise, of a flag or setting."""
    if name in FLAGS:
        flag = FLAGS[name]
        return flag.kind, flag.value, flag.help, ""
    row = SETTINGS[name]
    default = _default_of(row)
    value = _VALUE_WORDS.get(name, "TEXT") if row.kind != "flag" else ""
    return row.kind, value, row.help, row.env + (f", else {default}" if default else "")


def parse_command_line(verb: Verb, arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The words and the flags ({name: text, list of texts, or True}) of a verb's arguments. UsageError."""
    words: list[str] = []
    flags: dict[str, Any] = {}
    waiting = list(arguments)[::-1]
    while waiting:
        argument = waiting.pop()
        if argument == "--":
            words += waiting[::-1]
            break
        if argument == "-" or not argument.startswith("-"):
            words.append(argument)
            if verb.arguments == "[CMD ...]":  # its flags are its own
                words += waiting[::-1]
                break
            continue
        name, equals, value = argument[2:].partition("=") if argument.startswith("--") else (argument, "", "")
        if argument == "-h":
            name = "help"
        if name not in verb.flags:
            raise UsageError(f"{verb.name} has no flag {argument.partition('=')[0]}{_flag_hint(verb, argument)}")
        kind = _flag_row(name)[0]
        if kind == "flag":
            if equals:
                value = _one_setting(name, kind, value)
            flags[name] = value if equals else True
            continue
        if not equals:
            if not waiting:
                raise UsageError(f"--{name} needs a value: --{name} {_flag_row(name)[1]}")
            value = waiting.pop()
        if kind == "list":
            flags.setdefault(name, []).append(value)
        else:
            flags[name] = value
    needed = sum(1 for word in verb.arguments.split() if word.isupper() and "[" not in word and "]" not in word)
    if "help" not in flags:
        if len(words) < needed:
            raise UsageError(f"{verb.name} needs {verb.arguments} (example: {verb.example.splitlines()[0]})")
        if "..." not in verb.arguments and len(words) > len(verb.arguments.split()):
            raise UsageError(f"{verb.name} takes no argument {words[len(verb.arguments.split())]}")
    return words, flags


def _one_setting(name: str, kind: str, value: str) -> Any:
    try:
        return _SETTING_KINDS[kind](value)
    except ValueError as error:
        raise UsageError(f"cannot use --{name}: {error}") from None


def _flag_hint(verb: Verb, argument: str) -> str:
    """What to write instead of an unknown flag, as the end of a message."""
    name = argument.lstrip("-").partition("=")[0]
    if name in verb.flags:
        return f"; did you mean --{name}?"
    if name in CONFD_FLAGS and CONFD_FLAGS[name].startswith("--"):
        return f"; confd's -{name} is {CONFD_FLAGS[name].partition(' ')[0]} here"
    return nearest(f"--{name}", [f"--{flag}" for flag in verb.flags]) or f" (etcdinit {verb.name} --help)"


# ---- help ---------------------------------------------------------------------------------------------

def _indented(pairs: Sequence[tuple[str, str]]) -> str:
    width = max(len(left) for left, _ in pairs)
    return "".join(f"  {left:{width}}  {right}\n" for left, right in pairs)


def verb_help(verb: Verb) -> str:
    """The help of one verb."""
    flags = []
    for name in verb.flags:
        _, value, help, otherwise = _flag_row(name)
        flags.append((f"--{name} {value}".rstrip(), help + (f" ({otherwise})" if otherwise else "")))
    example = "".join(f"  {line}\n" for line in verb.example.splitlines())
    usage = f"usage: etcdinit {verb.name} [FLAG ...] {verb.arguments}".rstrip()
    return f"{usage}\n\n{verb.help}\n\nflags:\n{_indented(flags)}\nexample:\n{example}"


def program_help() -> str:
    """The help of the program."""
    verbs = [(f"{verb.name} {verb.arguments}".rstrip(), verb.help.partition("\n")[0]) for verb in VERBS.values()]
    examples = "".join(f"  {verb.example.splitlines()[0]}\n" for verb in VERBS.values())
    variables = [(row.env + "*" * (row.kind in ("credential", "secret")), row.help) for row in environment_only()]
    return (f"usage: etcdinit VERB [FLAG ...] [ARGUMENT ...]\n\n{__doc__.partition(chr(10))[0] if __doc__ else ''}\n\n"
            f"verbs (etcdinit VERB --help tells more):\n{_indented(verbs)}\nexamples:\n{examples}\n"
            f"environment (*: {CREDENTIAL_FORMS}):\n{_indented(variables)}\n"
            f"Every flag wins over its environment variable, and that over the default.\n"
            f"Exit code: {EXIT_MEANINGS}.\n")


def environment_only() -> list[Setting]:
    """The settings that no verb has a flag for: secrets do not belong on command lines, where all can read them."""
    flags = {name for verb in VERBS.values() for name in verb.flags}
    return [row for row in SETTINGS.values() if row.name not in flags]


def _default_of(row: Setting) -> str:
    """The default of a setting as its variable would say it."""
    if isinstance(row.default, (str, tuple)):
        return row.default if isinstance(row.default, str) else ",".join(row.default)
    return f"{row.default:g}"


CREDENTIAL_FORMS = "NAME can also be NAME_FILE, the path of a file that holds it, or a file /run/secrets/NAME or /name"

EXIT_MEANINGS = (f"{EXIT_OK} all done, {EXIT_FAILED} something failed and was told, {EXIT_USAGE} wrong usage, "
                 f"{EXIT_NO_ETCD} etcd not reached")


def reference() -> str:
    """The reference in README.md, in Markdown: verbs, flags with environment and defaults, keys of resources."""
    def table(*rows: tuple[str, ...]) -> str:
        head, *body = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
        return "".join(f"| {line} |\n" for line in [head, " | ".join("---" for _ in rows[0]), *body])

    verbs = [(f"`etcdinit {verb.name} {verb.arguments}".rstrip() + "`", verb.help.replace("\n", " "),
              f"`{verb.example.splitlines()[0]}`") for verb in VERBS.values()]
    names = dict.fromkeys(name for verb in VERBS.values() for name in verb.flags)
    flags = []
    for name in names:
        _, value, help, otherwise = _flag_row(name)
        env, _, default = otherwise.partition(", else ")
        flags.append((f"`--{name} {value}".rstrip() + "`", env and f"`{env}`", default and f"`{default}`", help))
    keys = [(f"`{row.name}`", row.kind, _default_text(row), row.help) for row in RESOURCE_KEYS.values()]
    variables = [(f"`{row.env}`", "yes" * (row.kind in ("credential", "secret")),
                  f"`{_default_of(row)}`" * bool(_default_of(row)), row.help) for row in environment_only()]
    policies = [(f"`{name}`", kind, "false" if default is False else "", help)
                for name, (kind, default, help) in POLICY.items()]
    return "\n".join([table(("verb", "what it does", "example"), *verbs),
                      table(("flag", "environment", "default", "meaning"), *flags),
                      table(("environment, without a flag", "or in a file", "default", "meaning"), *variables),
                      table(("key in [template]", "kind", "default", "meaning"), *keys),
                      table(("key in service.toml", "kind", "default", "meaning"), *policies),
                      f"Exit code: {EXIT_MEANINGS}.\n"])


def _default_text(row: ResourceKey) -> str:
    if row.kind == "true/false":
        return "false"
    if row.kind in ("duration", "time"):
        return f'"{row.default:g}s"'
    return f'"{row.default}"' if row.default and row.kind not in ("number", "min[:max]") else ""


# ---- what confd's users type --------------------------------------------------------------------------

CONFD_FLAGS = {  # confd's flag: its form here; {} takes the value; a name in capitals goes into the environment
    "onetime": "--once", "watch": "", "interval": "--interval {}", "noop": "--dry-run", "sync-only": "--sync-only",
    "confdir": "--confdir {}", "prefix": "--prefix {}", "node": "--node {}", "backend": "--api {}", "file": "--keys {}",
    "log-level": "--log-level {}", "username": "ETCD_USERNAME", "password": "ETCD_PASSWORD",
    "client-ca-keys": "ETCD_CA", "client-cert": "ETCD_CERT", "client-key": "ETCD_KEY", "srv-domain": "ETCD_SRV_DOMAIN",
    "srv-record": "ETCD_SRV_RECORD", "scheme": "ETCD_SCHEME", "basic-auth": "", "keep-stage-file": "",
    "config-file": "",
}
_CONFD_BACKENDS = {"etcd": "--api 2", "etcdv3": "--api 3"}
_CONFD_WITH_VALUE = {"config-file", *(name for name, form in CONFD_FLAGS.items() if "{}" in form or form.isupper())}


def confd_form(arguments: Sequence[str]) -> str:
    """The etcdinit command line for one of confd, "" if it has none of confd's flags. Secrets are left out."""
    environment: list[str] = []
    command: list[str] = ["etcdinit render"]
    waiting = list(arguments)[::-1]
    known = False
    while waiting:
        name, equals, value = waiting.pop().lstrip("-").partition("=")
        if name not in CONFD_FLAGS:
            continue
        known = True
        form = CONFD_FLAGS[name]
        if name in _CONFD_WITH_VALUE and not equals:
            value = waiting.pop() if waiting else "..."
        if name == "backend":
            form = _CONFD_BACKENDS.get(value, "")
        if form.isupper():
            environment.append(f"{form}=...")
        elif form:
            command.append(form.format(printable(value)))
    return " ".join(environment + command) if known else ""


# ---- verbs --------------------------------------------------------------------------------------------

def write_out(text: str) -> None:
    """Write to standard output; quietly not if nobody reads it any more. Error if it cannot be written."""
    try:
        write_all(1, text.encode("utf-8", "surrogateescape"))
    except BrokenPipeError:
        pass
    except OSError as error:
        raise Error(f"cannot write to standard output: {reason(error)}") from None


_DIFF_COLOURS = {"+": "\x1b[32m", "-": "\x1b[31m", "@": "\x1b[36m"}


def show_diff(lines: list[str]) -> None:
    """Print a diff; on a terminal in colours (unless NO_COLOR is set) and with control characters made visible."""
    if os.isatty(1):
        lines = ["\t".join(map(printable, line.split("\t"))) for line in lines]
        if not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
            lines = [f"{_DIFF_COLOURS[line[0]]}{line}\x1b[0m" if line[:1] in _DIFF_COLOURS else line for line in lines]
    write_out("".join(line + "\n" for line in lines))


def _source(flags: Mapping[str, Any]) -> Any:
    """Where keys come from: the file of --keys, else etcd."""
    if flags.get("keys"):
        return KeyFile(flags["keys"])
    return Etcd.from_settings(flags)


def _as_confd(flags: Mapping[str, Any]) -> bool:
    peer = setting("compat", flags)
    if peer not in ("", "confd"):
        raise UsageError(f'cannot be compatible with "{peer}" (only with confd)')
    return bool(peer)


def descriptor(text: str) -> int:
    """The number of a descriptor that is open, -1 for none. UsageError."""
    try:
        number = int(text)
        if number >= 0:
            os.fstat(number)
    except (ValueError, OSError):
        raise UsageError(f'cannot use --notify-fd: "{text}" is no open descriptor') from None
    return number


def render_verb(words: list[str], flags: dict[str, Any]) -> int:
    """etcdinit render."""
    options = RenderOptions(setting("confdir", flags), setting("prefix", flags), _as_confd(flags), words,
                            flags.get("root") or "", bool(flags.get("dry-run")), bool(flags.get("sync-only")),
                            show_diff if flags.get("diff") else None, setting("services", flags), setting("run", flags),
                            lambda name: ServiceDoor(name, setting("run", flags)), "notify-fd" in flags)
    interval = setting("interval", flags)
    source = _source(flags)
    questions = getattr(source, "questions", ())  # told in confd's words
    log.info(f"SRV record set to {', '.join(name for name, _ in questions)}" if questions else
             f"Backend source(s) set to {flags.get('keys') or ', '.join(map(str, source.endpoints))}")
    stop.install()
    try:
        if flags.get("once"):
            return render_once(source, options)
        notify_fd = descriptor(flags.get("notify-fd") or "-1")
        Renderer(source, options, interval, setting("max-outage", flags), lambda: tell_ready(notify_fd)).run()
    except Stopped:
        log.info(f"Captured {'interrupt' if stop.signal == signal.SIGINT else 'terminated'}. Exiting...")
        return 128 + stop.signal if flags.get("once") else EXIT_OK
    finally:
        source.close()


def check_verb(words: list[str], flags: dict[str, Any]) -> int:
    """etcdinit check."""
    findings = lint(setting("confdir", flags), setting("prefix", flags), _as_confd(flags))
    write_out("".join(f"{printable(str(finding))}\n" for finding in findings))
    errors = sum(finding.level == "error" for finding in findings)
    log.info(f"{errors} errors, {len(findings) - errors} warnings")
    return EXIT_FAILED if errors else EXIT_OK


def template_verb(words: list[str], flags: dict[str, Any]) -> int:
    """etcdinit template."""
    path, prefix = words[0], effective_prefix("", setting("prefix", flags))
    source = _source(flags)
    try:
        revision, pairs = source.read([prefix])
    finally:
        source.close()
    tree = KeyTree(pairs, revision).under(prefix)
    path = os.path.abspath(path)
    functions = resource_functions(tree, os.path.dirname(path), path, as_confd=_as_confd(flags))
    try:
        text = Template(read_text(path, True), name=os.path.basename(path), functions=functions).render(None)
    except OSError as error:
        raise Error(f"cannot read template {words[0]}: {reason(error)}") from None
    except TemplateError as error:
        raise Error(f"cannot render {words[0]}: {without_values(str(error))}") from None
    write_out(text)
    return EXIT_OK


def get_verb(words: list[str], flags: dict[str, Any]) -> int:
    """etcdinit get."""
    key = effective_prefix(setting("prefix", flags), words[0])
    source = _source(flags)
    try:
        value = source.get(key)
    finally:
        source.close()
    if value is None:
        raise Error(f"key {key} does not exist")
    write_out(value + "\n")
    return EXIT_OK


def ls_verb(words: list[str], flags: dict[str, Any]) -> int:
    """etcdinit ls."""
    key = effective_prefix(setting("prefix", flags), words[0] if words else "")
    source = _source(flags)
    try:
        revision, pairs = source.read([key])
    finally:
        source.close()
    tree = KeyTree(pairs, revision)
    if not len(tree) and key != "/":
        raise Error(f"key {key} does not exist")
    base = key.rstrip("/")
    names = [name + "/" * (tree.is_dir(f"{base}/{name}") and tree.get(f"{base}/{name}") is None)
             for name in tree.children(key)]
    names = names or [key.rpartition("/")[2]] * (key in tree)
    names = list(map(printable, names)) if os.isatty(1) else names  # a key cannot talk to the terminal
    write_out("".join(f"{name}\n" for name in names))
    return EXIT_OK


# ---- verbs that look at the way to etcd ---------------------------------------------------------------

def _columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines, aligned, without secrets and control characters."""
    shown = [[printable(mask(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    return "".join("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() + "\n"
                   for row in shown)


def _json_out(value: object) -> None:
    write_out(mask(json.dumps(value, indent=2)) + "\n")


def endpoints_verb(words: list[str], flags: dict[str, Any]) -> int:
    """etcdinit endpoints."""
    client = Etcd.from_settings(flags)
    rows = client.survey()
    if flags.get("json"):
        _json_out(rows)
    else:
        head = ("ENDPOINT", "SOURCE", "PRIORITY", "VERSION", "LATENCY", "LEADER", "AUTH", "TLS", "STATE")
        yes = {True: "yes", False: "no", None: "-"}
        write_out(_columns([head, *(
            (row["endpoint"], row["source"], str(row["priority"]), row["version"] or "-",
             "-" if row["latency_ms"] is None else f"{row['latency_ms']:.2f} ms", yes[row["leader"]],
             row["auth"] or "-", row["tls"] + f" until {row['certificate_end']}" * bool(row["certificate_end"]) or "-",
             row["error"] or "ok") for row in rows)]))
    return EXIT_OK if any(not row["error"] for row in rows) else EXIT_NO_ETCD


_DOCTOR_CODES = {"environment": EXIT_USAGE, "authentication": EXIT_FAILED, "read": EXIT_FAILED}  # others: no etcd


def doctor_verb(words: list[str], flags: dict[str, Any]) -> int:
    """etcdinit doctor."""
    prefix = setting("prefix", flags)
    keys = [effective_prefix(prefix, word) for word in words]
    resources = load_resources(setting("confdir", flags), prefix)[0]
    keys = keys or [key for resource in resources for key in resource.lookups] or [effective_prefix("", prefix)]
    code, steps = EXIT_OK, []
    for step, passable, told in examine(flags, keys):
        if not passable:
            code = _DOCTOR_CODES.get(step, EXIT_NO_ETCD)
        steps.append({"step": step, "ok": passable, "text": told})
        if not flags.get("json"):
            write_out(f"{'ok' if passable else 'FAILED':6}  {step:14}  {printable(mask(told))}\n")
    if flags.get("json"):
        _json_out(steps)
    return code


# ---- verbs of the supervisor --------------------------------------------------------------------------

def own_command(*arguments: str) -> list[str]:
    """The command line that executes this program with other arguments."""
    interpreter = [word for word in sys.orig_argv[:len(sys.orig_argv) - len(sys.argv)] if word != "-m"]
    return [*interpreter, os.path.realpath(sys.argv[0]) if interpreter else "etcdinit", *arguments]


def init_verb(words: list[str], flags: dict[str, Any]) -> int:
    """etcdinit init."""
    confdir = setting("confdir", flags)
    renders = any(os.environ.get(SETTINGS[name].env) for name in ("node", "srv-domain", "srv-record")) or any(
        path for path, _ in conf_stamps(confdir))
    init = Init(setting("services", flags), setting("run", flags), setting("log-format", flags), words,
                setting("grace", flags), signal_actions(setting("signals", flags)), confdir,
                own_command("render", "--notify-fd", "3") if renders else ())
    state = os.environ.get(STATE_VARIABLE, "")
    if state.isdigit():
        init.adopt(int(state))
    else:
        init.prepare()
    return init.run()


def wait_verb(words: list[str], flags: dict[str, Any]) -> int:
    """etcdinit wait."""
    states = [state for state in WAITS if flags.get(state)]
    if len(states) > 1:
        raise UsageError(f"--{states[0]} and --{states[1]} cannot be waited for together")
    return wait_for(words, states[0] if states else "ready", bool(flags.get("any")), _patience(flags),
                    setting("run", flags))


def _patience(flags: Mapping[str, Any]) -> float | None:
    try:
        return duration(flags["timeout"]) if "timeout" in flags else None
    except ValueError as error:
        raise UsageError(f"cannot use --timeout: {error}") from None


def _commanded(words: Sequence[str], flags: Mapping[str, Any], commands: str, state: str) -> int:
    """Send commands to services; with --timeout wait for what comes of it."""
    if "timeout" in flags:
        return wait_for(words, state, False, _patience(flags), setting("run", flags), commands, "r" in commands)
    for word in words:
        send_command(service_path(word, setting("run", flags)), commands)
    return EXIT_OK


def start_verb(words: list[str], flags: dict[str, Any]) -> int:
    """etcdinit start."""
    return _commanded(words, flags, "u", "ready")


def stop_verb(words: list[str], flags: dict[str, Any]) -> int:
    """etcdinit stop."""
    return _commanded(words, flags, "d", "finished")


def restart_verb(words: list[str], flags: dict[str, Any]) -> int:
    """etcdinit restart."""
    return _commanded(words, flags, "ru", "ready")


def once_verb(words: list[str], flags: dict[str, Any]) -> int:
    """etcdinit once."""
    return _commanded(words, flags, "o", "up")


def signal_verb(words: list[str], flags: dict[str, Any]) -> int:
    """etcdinit signal."""
    try:
        number = signal_number(words[0])
    except ValueError as error:
        raise UsageError(str(error)) from None
    for word in words[1:]:
        send_signal(word, service_path(word, setting("run", flags)), number)
    return EXIT_OK


def reload_verb(words: list[str], flags: dict[str, Any]) -> int:
    """etcdinit reload: its reload-signal; sent as the signal itself, for s6 before 2.15.1 has no command for it."""
    for word in words:
        directory = service_path(word, setting("run", flags))
        number = read_signal(directory, "reload-signal", SIGNALS["HUP"])
        signal_verb([str(number), word], flags)
    return EXIT_OK


def status_verb(words: list[str], flags: dict[str, Any]) -> int:
    """etcdinit status."""
    run, follow = setting("run", flags), bool(flags.get("follow"))
    told: object = None
    while True:
        names = words or service_names(run)
        if not names:
            raise Error(f"there is no service in {run}")
        listeners = _listen([service_path(name, run) for name in names] if follow else [])  # first: no event is missed
        try:
            found = [_describe(name, service_path(name, run), bool(words), bool(words or flags.get("json")))
                     for name in names]
            facts = [{key: value for key, value in known.items() if key != "seconds"} for known in found]
            if facts != told:
                write_out(_status_text(found, bool(flags.get("json")), bool(words), follow))
            told = facts
            if not follow:
                return EXIT_OK
            poll = select.poll()
            for listener in listeners:
                poll.register(listener.fd, select.POLLIN)
            if poll.poll(FOLLOW_AGAIN * 1000):
                time.sleep(0.05)  # so that events that come together make one line
        finally:
            for listener in listeners:
                listener.close()


def _describe(name: str, directory: str, named: bool, lines: bool) -> dict[str, Any]:
    try:
        return describe(name, directory, lines)
    except Error as error:
        if named:
            raise
        return {"name": name, "state": "unsupervised", "problem": str(error)}


FOLLOW_AGAIN = 5.0  # seconds until status --follow looks for what sends no event: output, health, new services


def _status_text(found: Sequence[Mapping[str, Any]], as_json: bool, named: bool, follow: bool) -> str:
    if as_json:
        what = found[0] if named and len(found) == 1 else found
        return json.dumps(what, indent=None if follow else 2) + "\n"
    return "".join(status_line(known) + "\n" + "".join(f"    {printable(line)}\n" for line in
                   known.get("output", ())[-10:]) for known in found)


def _listen(directories: Sequence[str]) -> list[Listener]:
    listeners: list[Listener] = []
    try:
        for directory in directories:
            listeners.append(Listener(f"{directory}/event"))
    except OSError as error:
        for listener in listeners:
            listener.close()
        raise Error(f"cannot follow {directory}: {reason(error)}") from None
    return listeners


def history_verb(words: list[str], flags: dict[str, Any]) -> int:
    """etcdinit history."""
    run = setting("run", flags)
    states = f"{run}/{STATE_DIRECTORY}"
    names = words if words or not os.path.isdir(states) else sorted(os.listdir(states))
    rows = sorted((row for name in names for row in bound_history(run, name)), key=lambda row: row["time"])
    if flags.get("json"):
        write_out(json.dumps(rows, indent=2) + "\n")
        return EXIT_OK
    for row in rows:
        took = f"{row['seconds']:.3f}s" if row["seconds"] is not None else "-"
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(row["time"]))
        write_out(printable(f"{moment} {row['service']:16} {row['revision']:8} {row['result']:10} {took:>9} "
                            f"{' '.join(row['files']) or '-'}{': ' * bool(row['why'])}{row['why']}") + "\n")
    return EXIT_OK


def rollback_verb(words: list[str], flags: dict[str, Any]) -> int:
    """etcdinit rollback."""
    run, name = setting("run", flags), words[0]
    state = bond_state(run, name)
    if state and not state["can_roll_back"]:
        raise Error(f"{name} has no files to go back to")
    before = bound_history(run, name)[-1:]
    ask_renderer(run, name, "rollback")
    deadline = now() + (_patience(flags) or 10.0)
    while now() < deadline:
        last = bound_history(run, name)[-1:]
        if last != before and last[0]["result"] == "taken back":
            log.info(f"{name} has the files of revision {bond_state(run, name).get('revision')} until a key of theirs "
                     f"changes (etcdinit hold {name}: longer)")
            return EXIT_OK
        time.sleep(0.02)
    log.error(f"{name} is not rolled back so far; the log of {RENDERER} tells why")
    return EXIT_TIMEOUT


def hold_verb(words: list[str], flags: dict[str, Any]) -> int:
    """etcdinit hold."""
    for name in words:
        ask_renderer(setting("run", flags), name, "hold")
    return EXIT_OK


def release_verb(words: list[str], flags: dict[str, Any]) -> int:
    """etcdinit release."""
    for name in words:
        ask_renderer(setting("run", flags), name, "release")
    return EXIT_OK


def rescan_verb(words: list[str], flags: dict[str, Any]) -> int:
    """etcdinit rescan."""
    scan_command(setting("run", flags), "h")
    return EXIT_OK


def shutdown_verb(words: list[str], flags: dict[str, Any]) -> int:
    """etcdinit shutdown."""
    if words:
        if not words[0].isdigit() or int(words[0]) > 255:
            raise UsageError(f'"{words[0]}" is not an exit code (0 to 255)')
        try:
            try:
                replace_file(RESULT, f"{words[0]}\n".encode())
            except OSError:
                replace_file(f"{setting('run', flags)}/{OWN_RESULT}", f"{words[0]}\n".encode())
        except OSError as error:
            raise Error(f"cannot set the exit code: {reason(error)}") from None
    scan_command(setting("run", flags), "t")
    return EXIT_OK


VERBS = {row.name: row for row in (
    Verb("render", "[RESOURCE ...]",
         ("once", "interval", "max-outage", "notify-fd", "confdir",
          "dry-run", "diff", "sync-only", "root", "services", "run", "compat", *_KEY_FLAGS, *_LOG_FLAGS),
         "Render the template resources of conf.d: check, swap in, reload.\n"
         "Without --once it stays and follows etcd: a change is in the files within milliseconds. RESOURCE is a file "
         "of conf.d or a destination; without any, all are rendered.",
         "etcdinit render --once --node http://10.0.0.1:2379\n"
         "etcdinit render --once --dry-run --diff --keys keys.json nginx", render_verb),
    Verb("check", "", ("confdir", "prefix", "compat", *_LOG_FLAGS),
         "Search conf.d and templates for mistakes, without etcd; file:line of each.\n"
         "The exit code is 1 if there is an error; warnings alone are 0.",
         "etcdinit check --confdir ./image/etc/confd", check_verb),
    Verb("template", "FILE", ("compat", *_KEY_FLAGS, *_LOG_FLAGS),
         "Render one template to standard output.",
         "etcdinit template nginx.conf.tmpl --keys keys.json", template_verb),
    Verb("get", "KEY", (*_KEY_FLAGS, *_LOG_FLAGS), "Print the value of a key (below --prefix).",
         "etcdinit get /lb/upstreams/web/1", get_verb),
    Verb("ls", "[KEY]", (*_KEY_FLAGS, *_LOG_FLAGS), "List the names directly below a key (below --prefix).",
         "etcdinit ls /lb/upstreams", ls_verb),
    Verb("endpoints", "", ("json", *_ETCD_FLAGS, *_LOG_FLAGS),
         "List the members of etcd: what named them, version, latency, leader, auth, TLS.\n"
         "The exit code is 3 if none of them answers.",
         "etcdinit endpoints\netcdinit endpoints --json --node https://10.0.0.1:2379", endpoints_verb),
    Verb("doctor", "[KEY ...]", ("json", "confdir", *_ETCD_FLAGS, *_LOG_FLAGS),
         "Walk the way to etcd and stop at the first thing wrong, with its remedy.\n"
         "Steps: environment, resolv.conf, SRV, connect, TLS, etcd, authentication, read of KEY, or else of the keys "
         "that the resources of conf.d need.",
         "etcdinit doctor\netcdinit doctor /lb --node http://10.0.0.1:2379", doctor_verb),
    Verb("init", "[CMD ...]", ("services", "confdir", "run", "grace", "signals", *_LOG_FLAGS),
         "Be the init process of a container: hooks, services, then CMD.\n"
         "It ends with CMD, with an essential service, or when it is told to; called as /init all words are CMD.",
         "etcdinit init\netcdinit init sh -c 'exit 3'", init_verb),
    Verb("wait", "NAME [NAME ...]", ("up", "ready", "down", "finished", "any", "timeout", *_RUN_FLAGS),
         "Wait until services are ready, or in another state.\n"
         "NAME is one in the directory of services, or the path of any service directory of s6.",
         "etcdinit wait confd --timeout 30s", wait_verb),
    Verb("start", "NAME [NAME ...]", ("timeout", *_RUN_FLAGS), "Start services and keep them up.",
         "etcdinit start nginx --timeout 10s", start_verb),
    Verb("stop", "NAME [NAME ...]", ("timeout", *_RUN_FLAGS), "Stop services; they stay down.",
         "etcdinit stop nginx --timeout 10s", stop_verb),
    Verb("restart", "NAME [NAME ...]", ("timeout", *_RUN_FLAGS),
         "Stop services with their down-signal; they start again.",
         "etcdinit restart nginx --timeout 10s", restart_verb),
    Verb("reload", "NAME [NAME ...]", _RUN_FLAGS, "Send services their reload-signal (default HUP).",
         "etcdinit reload nginx", reload_verb),
    Verb("once", "NAME [NAME ...]", ("timeout", *_RUN_FLAGS), "Start services, but not again when they end.",
         "etcdinit once backup", once_verb),
    Verb("signal", "SIGNAL NAME [NAME ...]", _RUN_FLAGS, "Send a signal to services.",
         "etcdinit signal USR1 nginx", signal_verb),
    Verb("status", "[NAME ...]", ("json", "follow", *_RUN_FLAGS),
         "Show how services fare; of named ones the last lines of output too.",
         "etcdinit status\netcdinit status --json nginx", status_verb),
    Verb("history", "[NAME ...]", ("json", *_RUN_FLAGS),
         "Show the last changes of the files that services are bound to.\n"
         "Time, service, revision, result (live, refused, taken back, failed), time from key to proof, files, reason.",
         "etcdinit history nginx", history_verb),
    Verb("rollback", "NAME", ("timeout", *_RUN_FLAGS),
         "Bring back the files that a service had before its last change, and reload it.\n"
         "They stay until a key of theirs changes. Up to eight changes can be taken back, one after another.",
         "etcdinit rollback nginx", rollback_verb),
    Verb("hold", "NAME [NAME ...]", _RUN_FLAGS, "Keep the files of services as they are, whatever keys change.",
         "etcdinit hold nginx", hold_verb),
    Verb("release", "NAME [NAME ...]", _RUN_FLAGS,
         "End a hold; try again what a service did not bear or what was rolled back.",
         "etcdinit release nginx", release_verb),
    Verb("rescan", "", _RUN_FLAGS, "Start services that are new in the directory, stop those that vanished.",
         "etcdinit rescan", rescan_verb),
    Verb("shutdown", "[CODE]", _RUN_FLAGS, "End the container, with an exit code.",
         "etcdinit shutdown 3", shutdown_verb),
)}


# ---- main ---------------------------------------------------------------------------------------------

def run_command_line(argv: Sequence[str]) -> int:
    """One command line; raises Error for whatever fails as a whole."""
    word = argv[0] if argv else ""
    if word in ("--version", "-version", "version"):
        made_of = native.BUILD if native else f"Python {sys.version.split()[0]}, as a module"
        write_out(f"etcdinit {__version__}\n{made_of}\n")
        return EXIT_OK
    if word in ("--help", "-h", "-help", "help"):
        asked = argv[1] if len(argv) > 1 else ""
        write_out(verb_help(VERBS[asked]) if asked in VERBS else program_help())
        return EXIT_OK
    if not word:
        raise UsageError("a verb is needed: " + ", ".join(VERBS) + " (etcdinit --help)")
    if word not in VERBS:
        instead = confd_form(argv) if word.startswith("-") else ""
        if instead:
            raise UsageError(f"{word.partition('=')[0]} is a flag of confd; here it is: {instead}")
        if word.startswith("-"):
            raise UsageError(f"the verb comes first, then {word.partition('=')[0]}: etcdinit VERB [FLAG ...]")
        raise UsageError(f"unknown verb {word}{nearest(word, VERBS) or ' (etcdinit --help)'}")
    verb = VERBS[word]
    words, flags = parse_command_line(verb, argv[1:])
    if flags.get("help"):
        write_out(verb_help(verb))
        return EXIT_OK
    log.configure(setting("log-level", flags), setting("log-format", flags))
    return verb.function(words, flags)


CONTAINER_ENVIRONMENT = "/run/s6/container_environment"  # where scripts for s6-overlay leave variables, a file each


def with_contenv(argv: Sequence[str]) -> int:
    """The program of that name of s6-overlay, as in `#!/usr/bin/with-contenv bash`: run another one with its variables.

    Services have the container's environment anyway; what is added is what scripts have written for each other.
    """
    environ = dict(os.environ)
    for name in os.listdir(CONTAINER_ENVIRONMENT) if os.path.isdir(CONTAINER_ENVIRONMENT) else ():
        if not name.startswith(".") and "=" not in name:
            text = read_small(f"{CONTAINER_ENVIRONMENT}/{name}", 1 << 17) or b""
            environ[name] = text.replace(b"\0", b"\n").decode("utf-8", "surrogateescape").removesuffix("\n")
    for ignored in ("PIPE", "XFSZ"):  # by Python, which the other program must not inherit
        signal.signal(SIGNALS[ignored], signal.SIG_DFL)
    command = list(argv) or ["sh"]
    try:
        os.execve(find_program(command[0], environ), command, environ)
    except OSError as error:
        raise Error(f"cannot execute {command[0]}: {reason(error)}") from None


def main(argv: Sequence[str] = ()) -> int:
    """Run one command line (without the program's name); returns the exit code. Lets no exception out."""
    try:
        for fd in (0, 1, 2):
            _keep_open(fd)
        name = os.path.basename(sys.argv[0])
        if name == "with-contenv":
            return with_contenv(argv)
        if name == "init":
            argv = ["init", "--", *argv]
        return run_command_line(argv)
    except KeyboardInterrupt:
        return 130
    except UsageError as error:
        os.write(2, f"etcdinit: {printable(mask(str(error)))}\n".encode("utf-8", "backslashreplace"))
        return error.exit_code
    except Error as error:
        log.error(str(error))
        return error.exit_code
    except Exception as error:
        log.error(f"unexpected {bug(error)}")
        return EXIT_FAILED


def _keep_open(fd: int) -> None:
    """See to it that no file of ours becomes standard input, output or error because that was closed."""
    try:
        os.fstat(fd)
    except OSError:
        try:
            os.dup2(os.open("/dev/null", os.O_RDWR), fd)
            os.set_inheritable(fd, True)
        except OSError:
            pass


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
