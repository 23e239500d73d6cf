"""The file itself: any safetensors tool opens it, and what is not as it was written is told in one clear error."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from flax_magics.errors import FlaxMagicsError
from flax_magics.snapshot.format import read, write
from flax_magics.state.trees import _RAW, CODES, dtype_named


def arrays():
    values = {}
    for name in (*CODES, *_RAW):
        dtype = dtype_named(name)
        values[f"net/{name}"] = np.array([[0, 1, 1], [1, 0, 1]]).astype(dtype)
        values[f"scalar of {name}"] = np.array(1).astype(dtype)
        values[f"nothing of {name}"] = np.zeros((0, 3), dtype)
    return values


def same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def test_arrays_of_every_dtype_come_back_bit_by_bit(tmp_path):
    values = arrays()
    write(tmp_path / "file", {"a": [1, "text", None]}, values)
    found = read(tmp_path / "file")
    assert found.document == {"a": [1, "text", None]}
    assert list(found.arrays) == list(values)
    assert all(same(found.arrays[name], value) for name, value in values.items())


def test_other_byte_orders_and_layouts_come_back_as_the_same_numbers(tmp_path):
    values = {"big": np.arange(6, dtype=">f4").reshape(2, 3), "turned": np.arange(6.0).reshape(2, 3).T}
    write(tmp_path / "file", {}, values)
    found = read(tmp_path / "file").arrays
    assert found["big"].dtype == np.float32
    assert all((found[name] == value).all() for name, value in values.items())


def test_any_safetensors_tool_opens_it(tmp_path):
    values = arrays()
    write(tmp_path / "file", {}, values)
    found = load_file(tmp_path / "file")
    assert found.keys() == values.keys()
    assert all(same(found[name], values[name]) for name in values if values[name].dtype.name in CODES)
    assert found["net/int4"].shape == (2, 3, 1)  # bytes, where the tools have no such dtype
    with safe_open(tmp_path / "file", "numpy") as file:
        metadata = file.metadata()
    assert metadata["flax_magics"] == "1"
    assert metadata["sha256"] == hashlib.sha256(metadata["json"].encode()).hexdigest()


def assert_not_written(path, why):
    with pytest.raises(FlaxMagicsError) as error:
        write(path, {"a": 2}, {"x": np.zeros(4096)})
    assert str(error.value) == f"`{path}` cannot be written: {why}."
    assert read(path).document == {"a": 1}
    assert os.listdir(path.parent) == [path.name]


def test_a_full_disk_is_told_and_changes_nothing(tmp_path, monkeypatch):
    write(tmp_path / "file", {"a": 1}, {})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert_not_written(tmp_path / "file", "No space left on device")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_a_file_that_outgrows_what_a_process_may_write_is_told_and_changes_nothing(tmp_path):
    import resource

    write(tmp_path / "file", {"a": 1}, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        assert_not_written(tmp_path / "file", "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# -- files that are none


def told(path, data=None):
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(FlaxMagicsError) as error:
        read(path)
    assert error.value.__cause__ is None
    return str(error.value).replace(str(path.parent), "…")


SAVED_PAGE = "was the page saved in place of the file that it links to?"
NONE_OF_OURS = {
    "empty": (b"", ": it does not begin as one (0 bytes)."),
    "short": (b"abc", ": it does not begin as one (3 bytes)."),
    "text": (b"import jax\n" * 9, ": it does not begin as one (99 bytes)."),
    "zeros": (b"\0" * 999, ": it does not begin as one (999 bytes)."),
    "pickle": (pickle.dumps(list(range(99))), ", but a pickle, which would run code when it is loaded."),
    "web page": (b"\n<!DOCTYPE html>\n<html></html>", f", but a web page (HTML).\n  {SAVED_PAGE}"),
    "npy": (b"\x93NUMPY\x01\x00v\x00{'descr'", ", but a NumPy array."),
    "gzip": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00", ", but a gzip archive."),
    "hdf5": (b"\x89HDF\r\n\x1a\n\x00\x00", ", but an HDF5 file."),
    "lfs": (b"version https://git-lfs.github.com/\n", ", but the pointer of a file that Git LFS has not fetched."),
    "zip": (b"PK\x03\x04\x14\x00\x00\x00", ", but a zip archive (as .npz files and PyTorch checkpoints are)."),
}


@pytest.mark.parametrize("kind", NONE_OF_OURS)
def test_another_kind_of_file_is_told_by_its_name(tmp_path, kind):
    data, text = NONE_OF_OURS[kind]
    assert told(tmp_path / "file", data) == f"`…/file` is no file of %flax_save{text}"


def test_weights_of_others_are_told_and_how_to_read_them(tmp_path):
    save_file({"a": np.zeros(3)}, tmp_path / "file")
    assert told(tmp_path / "file") == (
        "`…/file` is a safetensors file, but none of %flax_save: there is no session in it.\n"
        "  write: import safetensors.numpy\n         arrays = safetensors.numpy.load_file('…/file')"
    )


def test_a_newer_format_is_told(tmp_path):
    save_file({}, tmp_path / "file", {"flax_magics": "2", "new": ""})
    assert told(tmp_path / "file") == (
        "`…/file` was written by a newer flax_magics: its format is 2, this one reads 1.\n"
        "  write: %pip install -U flax_magics"
    )


def test_what_is_no_file_is_told(tmp_path):
    (tmp_path / "session.safetensors").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert told(tmp_path / "folder") == "`…/folder` is a folder, not a file."
    assert told(tmp_path / "session.safetensor") == (
        "there is no file `…/session.safetensor`.\n  did you mean …/session.safetensors?"
    )
    assert told(tmp_path / "folder" / "none") == "there is no file `…/none`."
    assert "cannot be read: Too many levels of symbolic links." in told(tmp_path / "loop")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are POSIX's")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert told(tmp_path / "pipe") == "`…/pipe` is no regular file."
    assert told(Path("/dev/zero")) == "`…/zero` is no regular file."


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "file").chmod(0)
    assert told(tmp_path / "file") == "`…/file` cannot be read: Permission denied."


# -- files that are altered


class Parts:
    """A file taken apart, to be put together again with one thing changed."""

    def __init__(self, folder: Path) -> None:
        path = folder / "whole"
        write(path, {"seed": 0}, {"a": np.arange(4, dtype=np.float32), "b": np.zeros(3, bool)})
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        self.head = json.loads(data[8 : 8 + length])
        self.data = data[8 + length :]

    def set_inner(self, inner):
        text = inner if isinstance(inner, str) else json.dumps(inner)
        self.meta.update(json=text, sha256=hashlib.sha256(text.encode(errors="replace")).hexdigest())

    def part(self, name, **changes):
        inner = json.loads(self.meta["json"])
        inner["parts"][name].update(changes)
        self.set_inner(inner)

    @property
    def meta(self):
        return self.head["__metadata__"]

    def set(self, data):
        self.data = data

    def bytes(self, head=None):
        head = json.dumps(self.head) if head is None else head
        head = head.encode() if isinstance(head, str) else head
        return len(head).to_bytes(8, "little") + head + self.data


def both(parts, name, shape, offsets=None):
    parts.part(name, shape=shape)
    parts.head[name]["shape"] = shape
    if offsets:
        parts.head[name]["data_offsets"] = offsets


CUT = "it was cut short or altered"
NAMES = "its header and its JSON name other arrays"
CHECKSUM = "its JSON has not the checksum that it was written with"
OTHERWISE = "`a` has another dtype or shape in its header than in its JSON"
OTHER = "its JSON is not what it should be: "
ALTERED = {
    "an array": (lambda p: p.set(b"\1" + p.data[1:]), "`a` has not the checksum that it was written with"),
    "its JSON": (lambda p: p.meta.update(json=p.meta["json"].replace("seed", "sead")), CHECKSUM),
    "cut short": (lambda p: p.set(p.data[:-1]), CUT),
    "longer": (lambda p: p.set(p.data + b"\0"), CUT),
    "an array too many": (
        lambda p: (p.head.update(c={**p.head["b"], "data_offsets": [19, 22]}), p.set(p.data + b"\0\0\0")),
        NAMES,
    ),
    "an array too few": (lambda p: (p.head.pop("b"), p.set(p.data[:16])), NAMES),
    "overlapping": (lambda p: p.head["b"].update(data_offsets=[13, 16]), CUT),
    "a place of text": (lambda p: p.head["b"].update(data_offsets=["16", "19"]), CUT),
    "far away": (lambda p: p.head["b"].update(data_offsets=[10**30, 10**30 + 3]), CUT),
    "huge": (lambda p: both(p, "a", [1 << 50], [0, 1 << 52]), CUT),
    "nothing of a huge size": (
        lambda p: (both(p, "a", [0, 1 << 62], [0, 0]), p.head["b"].update(data_offsets=[0, 3]), p.set(p.data[16:])),
        "the shape of `a` is larger than any array",
    ),
    "too many axes": (lambda p: both(p, "a", [1] * 40 + [4]), "the shape of `a` is none"),
    "a true size": (
        lambda p: both(p, "a", [True, 4]),
        OTHER + "Expected `int`, got `bool` - at `$.parts[...].shape[0]`",
    ),
    "another shape": (lambda p: p.head["a"].update(shape=[2, 2]), OTHERWISE),
    "another dtype": (lambda p: p.head["a"].update(dtype="I32"), OTHERWISE),
    "no dtype": (lambda p: p.part("a", dtype="object"), "`object` is no dtype"),
    "a dtype of escapes": (lambda p: p.part("a", dtype="\x1b[2J<b>"), "`\\x1b[2J<b>` is no dtype"),
    "no checksum": (
        lambda p: p.part("a", sha256=None),
        OTHER + "Expected `str`, got `null` - at `$.parts[...].sha256`",
    ),
    "a field too many": (
        lambda p: p.part("a", **{"\x1b[2J": 1}),
        OTHER + "Object contains unknown field `\\x1b[2J` - at `$.parts[...]`",
    ),
    "an entry that is none": (lambda p: p.head.update(a=[1]), CUT),
    "bytes that are no bool": (
        lambda p: (p.set(p.data[:-1] + b"\2"), p.part("b", sha256=hashlib.sha256(b"\0\0\2").hexdigest())),
        "`b` has bytes that are no bool",
    ),
    "no metadata field": (lambda p: p.meta.pop("sha256"), CHECKSUM),
    "a metadata field that is no text": (lambda p: p.meta.update(json=[1]), CHECKSUM),
    "no version": (lambda p: p.meta.update(flax_magics="x"), "its format is `x`, and there is no such format"),
    "version 0": (lambda p: p.meta.update(flax_magics="0"), "its format is `0`, and there is no such format"),
    "a list for its JSON": (lambda p: p.set_inner([1]), OTHER + "Expected `object`, got `array`"),
    "no JSON": (lambda p: p.set_inner("{"), "its JSON is no JSON"),
    "a number of many digits": (lambda p: p.set_inner('{"parts": ' + "9" * 9999 + "}"), "its JSON is no JSON"),
    "a name twice": (lambda p: p.set_inner('{"parts": 1, "parts": 2}'), "its JSON has a name that stands twice"),
    "deep nesting": (lambda p: p.set_inner("[" * 99_999 + "]" * 99_999), "its JSON is nested too deeply"),
    "half a character": (
        lambda p: p.set_inner(json.dumps({"\ud800": 1})),
        OTHER + "'utf-8' codec can't encode character '\\ud800' in position 0: surrogates not allowed",
    ),
}


@pytest.mark.parametrize("kind", ALTERED)
def test_an_altered_file_is_told(tmp_path, kind):
    change, why = ALTERED[kind]
    parts = Parts(tmp_path)
    change(parts)
    text = told(tmp_path / "file", parts.bytes())
    if why is CUT:  # the library's own words follow
        assert text.startswith(f"`…/file` cannot be loaded: {CUT} (")
    else:
        assert text == f"`…/file` cannot be loaded: {why}."


@pytest.mark.parametrize(
    ("head", "why"),
    [
        ('{"a": 1, "a": 1}', "its header has a name that stands twice"),
        ('{"a"', "its header is no JSON"),
        (b'{"\xff\xfe": 1}', "its header is no text"),
        ('{"a": ' + "[" * 99_999 + "]" * 99_999 + "}", "its header is nested too deeply"),
    ],
)
def test_an_altered_header_is_told(tmp_path, head, why):
    assert told(tmp_path / "file", Parts(tmp_path).bytes(head)) == f"`…/file` cannot be loaded: {why}."


@pytest.mark.parametrize("length", [10**6, 2**31, 2**63 - 1, 2**64 - 1])
def test_a_header_that_says_it_is_longer_than_the_file_is_not_believed(tmp_path, length):
    data = Parts(tmp_path).bytes()
    why = f"its header should have {length} bytes, and the file has {len(data)}: it was cut short or altered"
    altered = length.to_bytes(8, "little") + data[8:]
    assert told(tmp_path / "file", altered) == f"`…/file` cannot be loaded: {why}."


def test_a_header_longer_than_any_is_not_read(tmp_path):
    path = tmp_path / "file"
    with open(path, "wb") as file:  # a file of holes, which takes no room
        file.write((200_000_000).to_bytes(8, "little") + b"{")
        file.truncate(300_000_000)
    why = "its header has 200000000 bytes, more than the 100000000 that a header may have"
    assert told(path) == f"`…/file` cannot be loaded: {why}."


def test_a_file_that_is_cut_short_while_it_is_read_does_not_end_the_process(tmp_path):
    path = tmp_path / "file"
    write(path, {}, {"a": np.ones(1 << 20)})
    script = """
        import os, sys, numpy as np, safetensors
        from flax_magics.errors import FlaxMagicsError
        from flax_magics.snapshot import format

        path = format.Path(sys.argv[1])
        whole = path.read_bytes()
        # Cut short at the first look at its JSON, or once it has been read.
        for module, name in ((format, "loads"), (safetensors, "deserialize")):
            call = getattr(module, name)
            def cut_short(*args):
                os.truncate(path, 5000)
                return call(*args)
            path.write_bytes(whole)
            setattr(module, name, cut_short)
            try:
                print(np.asarray(format.read(path).arrays["a"]).sum())
            except FlaxMagicsError as error:
                print(error.message[-120:].partition(" (")[0])
            setattr(module, name, call)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    first, second = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout.splitlines()
    assert first.endswith("cannot be loaded: it was cut short or altered")
    assert second == "1048576.0"  # what was read before is there
