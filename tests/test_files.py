"""Files: what is refused before it is opened, strict JSON, and writing that leaves old or new."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

from minqwen.errors import CheckpointError, ConfigError, MinqwenError, TokenizerError
from minqwen.files import (
    and_more,
    check_regular,
    copy_regular,
    lines_of,
    parse_json,
    printable,
    quoted,
    read_json_object,
    read_small,
    read_text,
    write_text,
)

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7031645\n"


def refusal(error_class: type[MinqwenError], call, *args) -> str:
    """The one line in which a call is refused."""
    with pytest.raises(error_class) as error:
        call(*args)
    assert type(error.value) is error_class
    text = str(error.value)
    assert text.isprintable() and len(text) < 500, text
    return text


# ---- reading


def test_a_small_json_file_is_read(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"a": [1, "ü"]}', encoding="utf-8")
    assert read_json_object(file, ConfigError) == {"a": [1, "ü"]}
    assert read_text(file, ConfigError) == '{"a": [1, "ü"]}'
    link = tmp_path / "link"
    link.symlink_to(file)  # Hugging Face's cache is made of links
    assert read_small(link, ConfigError) == file.read_bytes()


def test_a_byte_order_mark_is_not_part_of_a_text(tmp_path):
    (tmp_path / "a").write_bytes(b'\xef\xbb\xbf{"a": "\xef\xbb\xbf"}')
    assert read_text(tmp_path / "a", ConfigError) == '{"a": "\ufeff"}'
    assert read_json_object(tmp_path / "a", ConfigError) == {"a": "\ufeff"}


def test_only_a_line_feed_ends_a_line():
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\rh\r\n\ni"
    assert lines_of(text) == ["a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\rh", "", "i"]
    assert lines_of("a\n") == ["a"] and lines_of("") == [] and lines_of("\n") == [""]


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


NOT_FILES = {
    "absent": (lambda path: None, "cannot be read (No such file or directory)"),
    "broken link": (lambda path: path.symlink_to("gone"), "cannot be read"),
    "link to itself": (lambda path: path.symlink_to(path.name), "cannot be read"),
    "directory": (lambda path: path.mkdir(), "is not a regular file"),
    "fifo": (a_fifo, "is not a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is not a regular file"),
    "empty": (lambda path: path.touch(), "is empty (0 bytes)"),
    "git-lfs pointer": (lambda path: path.write_bytes(LFS), "run `git lfs pull`"),
}


@pytest.mark.parametrize("make, words", NOT_FILES.values(), ids=NOT_FILES)
@pytest.mark.parametrize("read", [check_regular, read_small, read_text])
def test_what_is_not_a_file_with_contents_is_refused_before_it_is_read(make, words, read, tmp_path):
    path = tmp_path / "odd\nname"
    make(path)
    text = refusal(TokenizerError, read, path, TokenizerError)
    assert text.startswith(f"{tmp_path}/odd\\nname: ") and words in text and "expected" in text


@pytest.mark.parametrize("read", [read_small, check_regular])
def test_a_file_that_becomes_a_fifo_before_it_is_opened_does_not_hang(tmp_path, monkeypatch, read):
    os.mkfifo(tmp_path / "a")
    (tmp_path / "b").write_text("text")
    before = os.stat(tmp_path / "b")
    monkeypatch.setattr(Path, "stat", lambda path: before)
    assert "is not a regular file" in refusal(ConfigError, read, tmp_path / "a", ConfigError)


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("12345")
    (tmp_path / "b").write_text("1234")
    before = os.stat(tmp_path / "b")
    monkeypatch.setattr(os, "fstat", lambda descriptor: before)
    assert "expected at most 4" in refusal(ConfigError, read_small, tmp_path / "a", ConfigError, 4)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "big.json"
    with open(path, "wb") as file:
        file.truncate(200 << 20)  # a hole, which takes no room on the disk
    text = refusal(ConfigError, read_small, path, ConfigError)
    assert "is 209715200 bytes long, expected at most 104857600" in text
    assert len(read_small(path, ConfigError, limit=200 << 20)) == 200 << 20


def test_a_stamp_tells_that_a_file_was_replaced_or_written_to(tmp_path):
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_text("one")
    before = check_regular(path, ConfigError)
    assert check_regular(path, ConfigError) == before
    other.write_text("two")
    os.utime(other, ns=(before.modified_ns, before.modified_ns))
    os.replace(other, path)
    assert check_regular(path, ConfigError) != before
    before = check_regular(path, ConfigError)
    path.write_text("longer")
    assert check_regular(path, ConfigError) != before


@pytest.mark.parametrize(
    "data, words",
    [
        (b"{", "is not valid JSON"),
        (b'{"a": 1} {}', "is not valid JSON"),
        (b'{"a": 1, "b": 2, "a": 1}', "the key 'a' appears more than once"),
        (b'[{"b": {"x": 1, "x\\n": 2, "x\\n": 3}}]', "the key 'x\\n' appears more than once"),
        (b"\xff\xfe{}", "is not valid JSON"),
        (b"\xef\xbb\xbf" * 2 + b"{}", "is not valid JSON"),  # of two marks one is text
        (b"[" * 100_000, "is not valid JSON"),
        (b"1" * 10_000, "is not valid JSON"),  # an integer too long for Python
    ],
)
def test_json_that_is_not_plain_is_refused(data, words):
    text = refusal(CheckpointError, parse_json, data, "some/index.json", CheckpointError)
    assert text.startswith("some/index.json: ") and words in text


@pytest.mark.parametrize("data", ["[1]", "null", '"text"', "3"])
def test_json_that_is_not_an_object_is_refused_where_one_is_needed(data, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(data)
    text = refusal(ConfigError, read_json_object, path, ConfigError)
    assert f"the top level is {json.loads(data)!r}, expected a JSON object" in text


def test_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(b"ok \xff")
    assert "expected UTF-8 text" in refusal(ConfigError, read_text, tmp_path / "a", ConfigError)


def test_values_are_quoted_in_one_short_line():
    assert quoted("a\n") == "'a\\n'" and quoted([1]) == "[1]"
    assert len(quoted("x" * 1000)) == 200 and quoted("x" * 1000, 10) == "'xxxxxx..."
    assert printable("a\nb\x00ü") == "a\\nb\\x00ü"
    assert and_more("a") == "" and and_more("abcd") == " (and 3 more)"


def test_an_error_is_one_printable_line_whatever_it_quotes():
    shown = str(ConfigError("a\x1b[2J\n\u202eb\ud800"))
    assert shown == "a\\x1b[2J\\n\\u202eb\\ud800"
    long = str(ConfigError("/models/config.json: " + "x\n" * 10**6 + "; correct it"))
    assert long.isprintable() and len(long) <= 480
    assert long.startswith("/models/config.json: ") and long.endswith("; correct it")


@pytest.mark.parametrize("opens", ["[", '{"a":'])
def test_json_is_at_most_100_levels_deep(opens):
    ends = {"[": "]", '{"a":': "}"}[opens]
    at_most = opens * 100 + "1" + ends * 100
    parse_json(at_most.encode(), "x", ConfigError)
    deeper = opens + at_most + ends
    assert "more than 100 levels" in refusal(
        ConfigError, parse_json, deeper.encode(), "x", ConfigError
    )


def test_half_a_surrogate_pair_is_no_text():
    assert parse_json(b'"\\ud83d\\ude00"', "x", ConfigError) == "\U0001f600"
    assert "not valid JSON" in refusal(ConfigError, parse_json, b'"\\ud83d"', "x", ConfigError)


def test_a_copy_is_of_a_regular_file_and_keeps_its_permissions(tmp_path):
    (tmp_path / "a").write_text("mine")
    (tmp_path / "a").chmod(0o4640)
    copy_regular(tmp_path / "a", tmp_path / "b", ConfigError)
    assert (tmp_path / "b").read_text() == "mine"
    assert (tmp_path / "b").stat().st_mode & 0o7777 == 0o640
    os.mkfifo(tmp_path / "f")
    assert "not a regular" in refusal(
        ConfigError, copy_regular, tmp_path / "f", tmp_path / "c", ConfigError
    )
    assert not (tmp_path / "c").exists()


# ---- one file


def test_a_text_file_is_replaced_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "new" / "directory" / "a.json"
    write_text(path, "one", ConfigError)
    write_text(path, "ü", ConfigError)
    assert path.read_bytes() == "ü".encode()
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_a_reader_of_the_old_file_keeps_it(tmp_path):
    path = tmp_path / "a"
    write_text(path, "old", ConfigError)
    with open(path) as file:
        write_text(path, "new", ConfigError)
        assert file.read() == "old" and path.read_text() == "new"


def test_a_file_that_cannot_be_written_is_one_line_and_the_old_one_stays(tmp_path):
    (tmp_path / "file").write_text("x")
    text = refusal(ConfigError, write_text, tmp_path / "file" / "a", "text", ConfigError)
    assert f"{tmp_path}/file/a: cannot be written" in text and "expected a writable" in text
    (tmp_path / "directory").mkdir()
    refusal(ConfigError, write_text, tmp_path / "directory", "text", ConfigError)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["directory", "file"]


def test_no_room_on_the_disk_leaves_the_old_file(tmp_path):
    """A limit on the size of files stands in for a full disk."""
    path = tmp_path / "a"
    write_text(path, "old", ConfigError)
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from minqwen.errors import ConfigError; from minqwen.files import write_text\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_text(Path(sys.argv[1]), 'x' * 5000, ConfigError)\n"
        "except ConfigError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, cwd=ROOT
    )
    assert f"{path}: cannot be written ({os.strerror(errno.EFBIG)})" in done.stdout, done.stderr
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]
