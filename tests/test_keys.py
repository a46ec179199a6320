"""KEYS: the key tree, its patterns, and keys from files."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.go import GoTemplates

from etcdinit import Error, KeyTree, bytewise, clean_key, keys_from_file

LB = {
    "/lb/hosts/a.example/root": "/srv/a",
    "/lb/hosts/a.example/tls": "yes",
    "/lb/hosts/b.example/root": "/srv/b",
    "/lb/upstreams/app/1": "10.0.0.1:80",
    "/lb/upstreams/app/2": "10.0.0.2:80",
    "/lb/port": "80",
    "/lb-other/port": "81",
    "/top": "t",
}


# ---- cleaning -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("parts, key", [
    (("",), "/"), (("/",), "/"), ((), "/"), (("a",), "/a"), (("/a/",), "/a"), (("//a//b/",), "/a/b"),
    (("/a/./b/../c",), "/a/c"), (("/../../a",), "/a"), (("/a", "/b"), "/a/b"), (("/a/", "", "b/"), "/a/b"),
    (("/.hidden",), "/.hidden"), (("/a/..b",), "/a/..b"), (("/a", "../x"), "/x"), (("/ä\udcff/",), "/ä\udcff"),
])
def test_keys_are_cleaned_like_paths_in_go(parts: tuple[str, ...], key: str) -> None:
    assert clean_key(*parts) == key


def test_a_tree_cleans_the_keys_it_is_given() -> None:
    tree = KeyTree([("a//b/", "1"), ("/c\n/d", "2"), ("/e/../f", "3"), ("", "4")])
    assert dict(tree.items()) == {"/a/b": "1", "/c\n/d": "2", "/f": "3", "/": "4"}
    assert KeyTree({"a": "1"})["/a"] == "1"
    assert KeyTree({"/a\n": "1"}).items() == [("/a\n", "1")]
    assert KeyTree([("/a", "1"), ("/a/", "2")])["/a"] == "2"


def test_order_is_that_of_utf8_bytes() -> None:
    names = ["\U0001f600", "\uffff", "\udcff", "b", "a-b", "a/b", "é"]
    assert bytewise(names) == sorted(names, key=lambda name: name.encode("utf-8", "surrogateescape"))
    assert list(KeyTree({"/a/b": "", "/a-b": "", "/a": ""})) == ["/a", "/a-b", "/a/b"]


# ---- the tree -----------------------------------------------------------------------------------------

def test_a_tree_is_a_mapping_at_a_revision() -> None:
    tree = KeyTree(LB, 42)
    assert tree.revision == 42 and len(tree) == 8
    assert tree["/lb/port"] == "80" and "/lb/port" in tree and "/lb" not in tree
    assert tree.get("/nope") is None and tree.get("/nope", "d") == "d"
    assert tree.values_by_key["/top"] == "t"
    with pytest.raises(KeyError):
        tree["/nope"]


def test_its_printed_form_holds_no_value() -> None:
    assert "geheim" not in repr(KeyTree({"/password": "geheim"}))


def test_directories_list_leaves_and_directories() -> None:
    tree = KeyTree(LB)
    assert tree.children("/") == tree.children("") == ["lb", "lb-other", "top"]
    assert tree.children("/lb") == tree.children("/lb/") == ["hosts", "port", "upstreams"]
    assert tree.children("/lb/port") == tree.children("/nope") == []
    assert tree.is_dir("/") and tree.is_dir("/lb/hosts") and not tree.is_dir("/lb/port") and not tree.is_dir("/l")
    assert not KeyTree().is_dir("/") and KeyTree().children("/") == []


def test_a_callers_changes_to_a_listing_stay_with_the_caller() -> None:
    tree = KeyTree(LB)
    tree.children("/lb").reverse()
    assert tree.children("/lb") == ["hosts", "port", "upstreams"]


def test_a_key_can_be_leaf_and_directory() -> None:
    tree = KeyTree({"/a": "leaf", "/a/b": "x", "/": "root"})
    assert tree.children("/") == ["a"] and tree.is_dir("/a") and tree["/a"] == "leaf"
    assert tree.below("/a") == [("/a", "leaf"), ("/a/b", "x")]
    assert tree.below("/") == [("/", "root"), ("/a", "leaf"), ("/a/b", "x")]
    tree.delete("/a/b")
    assert tree.children("/") == ["a"] and not tree.is_dir("/a")


def test_below_keeps_the_boundary_of_a_name() -> None:
    tree = KeyTree(LB)
    assert [key for key, _ in tree.below("/lb")] == sorted(key for key in LB if key.startswith("/lb/"))
    assert tree.below("/lb/port") == [("/lb/port", "80")]
    assert tree.below("/nope") == []


def test_under_is_what_a_template_with_that_prefix_sees() -> None:
    tree = KeyTree(LB, 7).under("/lb", ["/hosts/a.example", "port", "nope"])
    assert tree.revision == 7
    assert tree.items() == [("/hosts/a.example/root", "/srv/a"), ("/hosts/a.example/tls", "yes"), ("/port", "80")]
    assert KeyTree(LB).under("/lb/port").items() == [("/", "80")]
    assert KeyTree(LB).under("/") == KeyTree(LB) == KeyTree(LB).under("")
    assert len(KeyTree(LB).under("/lb", [])) == 0


def test_put_and_delete_keep_directories_true() -> None:
    tree = KeyTree(LB)
    assert tree.children("/lb/upstreams") == ["app"]
    tree.put("/lb/upstreams/web/1", "x")
    assert tree.children("/lb/upstreams") == ["app", "web"] and tree["/lb/upstreams/web/1"] == "x"
    tree.put("/lb/upstreams/web/1", "y")
    assert tree.below("/lb/upstreams/web") == [("/lb/upstreams/web/1", "y")]
    assert tree.delete("/lb/upstreams/web/1") and not tree.delete("/lb/upstreams/web/1")
    assert tree.children("/lb/upstreams") == ["app"] and not tree.is_dir("/lb/upstreams/web")


paths = st.lists(st.sampled_from(["a", "b", "ab", "a-", ""]), min_size=1, max_size=4).map("/".join)


@given(st.dictionaries(paths, st.text(max_size=2), max_size=12), st.lists(st.tuples(paths, st.booleans()), max_size=12))
def test_a_changed_tree_equals_one_made_anew(start: dict[str, str], changes: list[tuple[str, bool]]) -> None:
    tree = KeyTree(start)
    tree.children("/")  # the index exists from here on
    expected = {clean_key(key): value for key, value in start.items()}
    for key, is_put in changes:
        if is_put:
            tree.put(key, "new")
            expected[clean_key(key)] = "new"
        else:
            assert tree.delete(key) == (clean_key(key) in expected)
            expected.pop(clean_key(key), None)
    fresh = KeyTree(expected)
    assert tree == fresh and tree.items() == fresh.items() and tree.below("/") == fresh.items()
    for key in ["/", *(clean_key(path) for path, _ in changes), *expected]:
        assert tree.children(key) == fresh.children(key)
        assert tree.is_dir(key) == fresh.is_dir(key)


# ---- patterns -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("pattern, names", [
    ("/lb/hosts/*/root", ["/lb/hosts/a.example/root", "/lb/hosts/b.example/root"]),
    ("/lb/upstreams/app/*", ["/lb/upstreams/app/1", "/lb/upstreams/app/2"]),
    ("/*", ["/top"]), ("/lb/*", ["/lb/port"]), ("/lb/**", ["/lb/port"]), ("/lb*/port", ["/lb-other/port", "/lb/port"]),
    ("/top", ["/top"]), ("/top/", []), ("top", []), ("", []), ("*", []), ("*/top", ["/top"]),
    ("/lb/hosts/?.example/root", ["/lb/hosts/a.example/root", "/lb/hosts/b.example/root"]),
    ("/lb/hosts/[b-z].example/*", ["/lb/hosts/b.example/root"]),
    ("/lb/hosts/[^b].example/r*t", ["/lb/hosts/a.example/root"]),
    ("/lb[/]port", ["/lb/port"]), ("/lb[^x]po*", ["/lb/port"]), ("[/]top", ["/top"]), ("/{top,lb}", []),
    ("/lb/*/*/*", ["/lb/hosts/a.example/root", "/lb/hosts/a.example/tls", "/lb/hosts/b.example/root",
                   "/lb/upstreams/app/1", "/lb/upstreams/app/2"]),
])
def test_a_pattern_matches_like_path_match(pattern: str, names: list[str]) -> None:
    assert KeyTree(LB).glob(pattern) == [(name, LB[name]) for name in names]


def test_an_escaped_star_is_a_star() -> None:
    tree = KeyTree({"/a*": "star", "/ab": "b", "/[x]": "x"})
    assert tree.glob(r"/a\*") == [("/a*", "star")]
    assert tree.glob(r"/\[x\]") == [("/[x]", "x")]
    assert tree.glob(r"/a[\*]") == [("/a*", "star")]


def test_the_root_key_matches_an_empty_name() -> None:
    assert KeyTree({"/": "root"}).glob("/*") == [("/", "root")]
    assert KeyTree({"/": "root"}).glob("/") == [("/", "root")]


@pytest.mark.parametrize("pattern", ["[", "/[", "/[]", "/[]a]", "/[-]", "/[a-]", "/[-a]", "/a\\", "/[a", "/[a-b-c]",
                                     "/[^]a]", "/[\\", "/[a\\", "/[\udcff]"])
def test_a_malformed_pattern_is_an_error_unless_the_tree_is_empty(pattern: str) -> None:
    with pytest.raises(ValueError, match="^syntax error in pattern$"):
        KeyTree(LB).glob(pattern)
    assert KeyTree().glob(pattern) == []


def test_a_pattern_of_many_stars_is_not_slow() -> None:
    tree = KeyTree({"/" + "a" * 2000: ""})
    assert tree.glob("/" + "*a" * 30 + "b") == []


def brute_force(pattern: str, name: str) -> bool:
    """path.Match by trying everything; classes that can match a slash are not generated."""
    if not pattern:
        return not name
    head, rest = pattern[0], pattern[1:]
    if head == "*":
        return brute_force(rest, name) or name[:1] not in ("", "/") and brute_force(pattern, name[1:])
    if head == "\\":
        return name[:1] == rest[0] and brute_force(rest[1:], name[1:])
    if head == "[":
        inside, _, rest = rest.partition("]")
        negated, inside = inside[:1] == "^", inside.lstrip("^")
        hit = any(low <= name[:1] <= high for low, high in zip(inside[::3], inside[2::3], strict=True))
        return bool(name) and hit != negated and brute_force(rest, name[1:])
    return (name[:1] not in ("", "/") if head == "?" else name[:1] == head) and brute_force(rest, name[1:])


tokens = st.sampled_from(["/", "/", "a", "b", "c", "*", "*", "?", "[a-b]", "[b-c]", r"\*", r"\a", "-"])


@given(st.lists(tokens, max_size=9).map(lambda parts: "/" + "".join(parts)),
       st.lists(st.text("abc*/-", max_size=8).map(clean_key), max_size=8))
def test_patterns_agree_with_brute_force(pattern: str, names: list[str]) -> None:
    tree = KeyTree(dict.fromkeys(names, ""))
    assert [key for key, _ in tree.glob(pattern)] == [name for name in sorted(set(names)) if brute_force(pattern, name)]


@given(st.text("ab[]^-*?\\/", max_size=8))
def test_any_text_is_a_pattern_or_a_plain_error(pattern: str) -> None:
    try:
        KeyTree({"/a/b": "", "/ab": ""}).glob("/" + pattern)
    except ValueError as error:
        assert str(error) == "syntax error in pattern"


def test_patterns_agree_with_real_go(go: GoTemplates) -> None:
    choose = random.Random(7).choice
    pieces = ["/", "/", "a", "b", "ab", "*", "*", "?", "[a-b]", "[^a]", "[/]", "[^b-z]", "[a", "]", "\\*", "\\",
              "[b-a]", "-", "é", "[é-ü]", "**"]
    names = ["a", "b", "ab", "a-", "*", "é", "aab", "]", "[a"]
    for _ in range(1500):
        store = {"/" + "/".join(choose(names) for _ in range(choose([1, 2, 2, 3]))): "" for _ in range(8)}
        pattern = choose(["/", "/", "/", ""]) + "".join(choose(pieces) for _ in range(choose([1, 3, 5, 7])))
        theirs = go.ask("{{range gets .}}{{.Key}}\n{{end}}", pattern, kv=store)
        try:
            ours = "".join(f"{key}\n" for key, _ in KeyTree(store).glob(pattern))
        except ValueError as error:
            assert theirs["error"].endswith(f"error calling gets: {error}"), (pattern, theirs)
        else:
            assert theirs["output"] == ours and not theirs["error"], (pattern, sorted(store), theirs)


# ---- size ---------------------------------------------------------------------------------------------

def test_fifty_thousand_keys() -> None:
    pairs = [(f"/svc/{n % 500:03d}/instance/{n // 500:03d}/addr", f"10.0.0.{n % 250}") for n in range(50_000)]
    tree = KeyTree(pairs)
    assert len(tree) == 50_000 and len(tree.children("/svc")) == 500
    assert tree.glob("/svc/*/instance/*/addr") == sorted(pairs) == tree.below("/svc")
    assert len(tree.under("/svc/007").glob("/instance/*/addr")) == 100


# ---- files --------------------------------------------------------------------------------------------

def test_keys_come_from_json_nested_and_flat(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps({
        "lb": {"port": 8080, "hosts": {"a": {"tls": True}}, "names": ["x", "y", {"z": False}]},
        "/lb/flat/key": "v", "/": {"root//key/": 1.5}, "big": 10 ** 19, "empty": {}, "none": []}))
    assert dict(keys_from_file(str(file)).items()) == {
        "/lb/port": "8080", "/lb/hosts/a/tls": "true", "/lb/names/0": "x", "/lb/names/1": "y", "/lb/names/2/z": "false",
        "/lb/flat/key": "v", "/root/key": "1.5", "/big": "10000000000000000000"}


def test_a_byte_order_mark_and_halves_of_surrogate_pairs_are_read_as_by_go(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text('\ufeff{"a\\udc80": "x\\ud800y", "b": "\\ud83d\\ude00"}')
    assert dict(keys_from_file(str(file)).items()) == {"/a\ufffd": "x\ufffdy", "/b": "\U0001f600"}


def test_keys_come_from_toml(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text('"/top" = "t"\n[lb]\nport = 80\nratio = 0.25\nsince = 2020-01-02T03:04:05Z\nday = 2020-01-02\n'
                    '[[lb.hosts]]\nname = "a"\n[[lb.hosts]]\nname = "b"\n')
    assert dict(keys_from_file(str(file)).items()) == {
        "/top": "t", "/lb/port": "80", "/lb/ratio": "0.25", "/lb/since": "2020-01-02T03:04:05+00:00",
        "/lb/day": "2020-01-02", "/lb/hosts/0/name": "a", "/lb/hosts/1/name": "b"}


@pytest.mark.parametrize("number, text", [
    ("1.0", "1"), ("1e6", "1000000"), ("1e21", "1000000000000000000000"), ("1e23", "100000000000000000000000"),
    ("1.5e-7", "0.00000015"), ("-0.0", "-0"), ("-2.50", "-2.5"), ("123456.789", "123456.789"), ("1e-5", "0.00001"),
    ("100.0", "100"), ("1.7976931348623157e308", "17976931348623157" + "0" * 292), ("NaN", "NaN"),
    ("-Infinity", "-Inf"),
])
def test_numbers_become_text_as_in_go(tmp_path: Path, number: str, text: str) -> None:
    file = tmp_path / "keys.json"
    file.write_text(f'{{"n": {number}}}')
    assert keys_from_file(str(file))["/n"] == text


@pytest.mark.parametrize("name, content, message", [
    ("k.json", '{"a": 1,\n "b": }', r"cannot read keys from \S+k\.json:2: expecting value \(column 7\)"),
    ("k.json", "[1]", r"cannot read keys from \S+k\.json: an object of keys is needed at the top"),
    ("k.json", '{"a": {"b": null}}', r"cannot read keys from \S+k\.json: key /a/b is null .*"),
    ("k.json", '{"a": {"b": "1"}, "/a/b": "2"}', r"cannot read keys from \S+k\.json: key /a/b is given twice"),
    ("k.json", "[" * 100_000, r"cannot read keys from \S+k\.json: nested too deep"),
    ("k.toml", "a = 1\nb = \n", r"cannot read keys from \S+k\.toml:2: invalid value \(column 5\)"),
    ("k.toml", "a = \"\xff\"", r"cannot read keys from \S+k\.toml: not UTF-8 at byte 5"),
    ("k.json", '{"a": ' + "9" * 5000 + "}", r"cannot read keys from \S+k\.json: exceeds the limit \(4300 digits\)"),
    ("no.json", None, r"cannot read keys from \S+no\.json: no such file or directory"),
])
def test_a_wrong_keys_file_is_one_clear_line(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content.encode("latin-1"))
    with pytest.raises(Error, match=f"^{message}$") as caught:
        keys_from_file(str(file))
    assert "\n" not in str(caught.value)
