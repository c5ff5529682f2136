"""Hundreds of files that are no sound checkpoint: one clear line and exit code 2 each, and nothing in them runs.

A bit flipped in the numbers of a format without checksums cannot be seen: such a file may convert, to finite weights.
"""

import argparse
import builtins
import io
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from disam_theory.__main__ import main
from disam_theory.checkpoints import CONTAINERS
from disam_theory.models import digits_mlp

AT_LEAST = 300
TRIED: set[int] = set()  # hashes of the files so far
GENERATORS: set[str] = set()  # that have run


def repeatable(examples):
    """``examples`` cases, the same ones each time."""
    suppressed = list(HealthCheck)
    return settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=suppressed
    )


def written(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def sound_files():
    torch.manual_seed(0)
    state = digits_mlp().state_dict()
    official = {"args": argparse.Namespace(backbone="resnet18"), "model": state, "results": {}, "best_acc": 0.5}
    hparams = {"resnet_dropout": np.float64(0.5), "n_meta_test": np.int64(2)}
    domainbed = {"model_hparams": hparams, "model_num_classes": 10, "model_dict": state}
    return {
        "zip": written(state),
        "legacy": written(state, _use_new_zipfile_serialization=False),
        "official": written(official),
        "domainbed": written(domainbed),
        "legacy domainbed": written(domainbed, _use_new_zipfile_serialization=False),
        "safetensors": safetensors.torch.save(state, {"settings": '{"model": "disam_theory.models:digits_mlp"}'}),
    }


SOUND = sound_files()
NAMES = st.sampled_from(sorted(SOUND))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("malformed")


class Attempt(NamedTuple):
    code: int
    said: str


@pytest.fixture
def attempt(folder, capsys, request):
    """``attempt(content)``: convert a file of these bytes; returns the exit code and what is said about it."""
    GENERATORS.add(request.node.name.partition("[")[0])

    def convert(content: bytes, suffix=".pt"):
        TRIED.add(hash(content))
        source, out = folder / f"c{suffix}", folder / "out.safetensors"
        source.write_bytes(content)
        out.unlink(missing_ok=True)
        code = main(["convert", str(source), "--out", str(out)])
        streams = capsys.readouterr()
        assert out.exists() == (code == 0)
        if code == 0:
            weights = safetensors.torch.load_file(out)
            assert all(torch.isfinite(value.double()).all() for value in weights.values())
        else:
            assert streams.out == ""
            assert streams.err.startswith(f"disam-theory: {source}: ")
            assert streams.err.count("\n") == 1
            assert len(streams.err) < 1500
            assert "Traceback" not in streams.err
        return Attempt(code, streams.err)

    return convert


def test_the_files_that_are_spoilt_below_are_sound(attempt):
    for name, content in SOUND.items():
        suffix = ".safetensors" if name == "safetensors" else ".pt"
        assert attempt(content, suffix) == (0, "")


@repeatable(80)
@given(name=NAMES, share=st.floats(0.0, 1.0, exclude_max=True))
def test_cut_short_anywhere(attempt, name, share):
    content = SOUND[name]
    assert attempt(content[: int(share * len(content))]).code == 2


@pytest.mark.parametrize("name", sorted(SOUND))
def test_cut_short_by_one_byte(attempt, name):
    assert attempt(SOUND[name][:-1]).code == 2


@repeatable(120)
@given(
    name=NAMES, places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=8)
)
def test_bits_flipped(attempt, name, places):
    content = bytearray(SOUND[name])
    for share, bit in places:
        content[int(share * len(content))] ^= 1 << bit
    assert attempt(bytes(content)).code in (0, 2)


@repeatable(60)
@given(
    name=st.sampled_from(["legacy", "legacy domainbed", "safetensors"]),
    place=st.integers(0, 900),
    byte=st.integers(0, 255),
)
def test_bytes_changed_in_the_instructions(attempt, name, place, byte):
    content = bytearray(SOUND[name])
    assume(content[place] != byte)
    content[place] = byte
    assert attempt(bytes(content)).code in (0, 2)


@repeatable(40)
@given(place=st.integers(0, 1000), byte=st.integers(0, 255))
def test_bytes_changed_in_an_archives_pickle_whose_checksum_fits(attempt, place, byte):
    def change(pickled):
        pickled = bytearray(pickled)
        pickled[place % len(pickled)] = byte
        return bytes(pickled)

    assert attempt(rezipped(SOUND["domainbed"], change)).code in (0, 2)


def rezipped(content, change, compression=zipfile.ZIP_STORED):
    """The archive with its pickle changed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for entry in old.infolist():
            data = old.read(entry)
            new.writestr(entry.filename, change(data) if entry.filename.endswith("data.pkl") else data)
    return buffer.getvalue()


MAGICS = [
    b"",
    b"PK\x03\x04",
    b"\x80\x02",
    b"\x80\x04\x95",
    b"\x89HDF\r\n\x1a\n",
    b"GGUF",
    b"\x93NUMPY\x01\x00",
    b"\x1f\x8b\x08",
    b"version https://git-lfs.github.com/spec/v1\n",
    b"<!doctype html>",
    b"\x7fELF",
    b"%PDF-1.7",
    b"\x89PNG\r\n\x1a\n",
    b"{",
    b"import torch\n",
]


@repeatable(60)
@given(magic=st.sampled_from(MAGICS), rest=st.binary(max_size=300), suffix=st.sampled_from([".pt", ".safetensors", ""]))
def test_foreign_files(attempt, magic, rest, suffix):
    assert attempt(magic + rest, suffix).code == 2


# --- wrong nesting, and values that are no tensors ---

KEYS = st.one_of(
    st.sampled_from([*CONTAINERS, "args", "settings", "provenance", "model_hparams", "arch", "version", "best_acc1"]),
    st.sampled_from(
        ["pytorch-lightning_version", "state_dict_ema", "0.weight", "featurizer.network.x", "classifier.w"]
    ),
    st.text(max_size=4),
    st.integers(-3, 3),
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from([torch.ones(2), torch.tensor(torch.nan), torch.zeros(0), torch.tensor(3), torch.ones(2).bool()]),
    st.sampled_from([argparse.Namespace(backbone=3), argparse.Namespace(backbone="x"), np.float32(2), Path("a/b")]),
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)


@repeatable(80)
@given(content=VALUES)
def test_nested_in_other_ways(attempt, content):
    assert attempt(written(content)).code in (0, 2)


@pytest.mark.parametrize("key", CONTAINERS)
def test_a_file_that_holds_itself(attempt, key):
    content = {}
    content[key] = content
    assert "no state dict" in attempt(written(content)).said


def test_what_is_nested_without_end(attempt):
    content = {"w": torch.ones(1)}
    for _ in range(300):
        content = {"model": content}
    assert attempt(written(content)).code == 2


def test_a_value_that_unfolds_to_billions_is_not_unfolded(attempt):
    value = ["lol"] * 10
    for _ in range(12):
        value = [value] * 10
    assert attempt(written({"w": torch.ones(1), "args": {"x": value}})).code == 0


def test_attributes_that_stand_for_methods(attempt):
    state = Call(OrderedDict, [("w", torch.ones(2))], state={"items": 3, "keys": 3, "get": 3})
    assert attempt(written(state)).code == 0
    methods = {"detach": 3, "numel": 3, "element_size": 3, "clone": 3}
    spoilt = Call(torch._tensor._rebuild_from_type_v2, torch.Tensor, torch.Tensor, ([1.0],), methods)
    assert attempt(written({"w": spoilt})).code == 0


# --- code ---


class Call:
    """Pickled as a call of ``function``: what unpickling without care runs."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments, state)

    def __reduce__(self):
        return self.call


def attacks(canary):
    text = str(canary)
    touch = f"touch {text}"
    return {
        "posix.system": Call(os.system, touch),
        "subprocess.Popen": Call(subprocess.Popen, ["touch", text]),
        "subprocess.check_output": Call(subprocess.check_output, ["touch", text]),
        "eval": Call(builtins.eval, f"open({text!r}, 'w')"),
        "exec": Call(builtins.exec, f"open({text!r}, 'w')"),
        "io.open": Call(open, text, "w"),
        "shutil.copyfile": Call(shutil.copyfile, __file__, text),
        "torch.hub.load": Call(torch.hub.load, str(canary.parent), "x"),
        "torch.serialization.load": Call(torch.load, text),
        "getattr": Call(random.seed, 0),
        "numpy.load": Call(np.load, text, None, True),
        "pickle.loads": Call(pickle.loads, f"cposix\nsystem\n(V{touch}\ntR.".encode()),
    }


def in_a_state_dict(attack):
    return {"state_dict": {"w": torch.ones(2), "x": attack}}


def test_the_canary_appears_where_the_same_file_is_unpickled_without_care(folder):
    canary = folder / "canary"
    pickle.loads(pickle.dumps(attacks(canary)["posix.system"]))
    assert canary.exists()
    canary.unlink()


SHAPES = {
    "alone": lambda attack: attack,
    "in a state dict": in_a_state_dict,
    "among the arguments": lambda attack: {"args": argparse.Namespace(x=attack), "model": {"w": torch.ones(2)}},
    "as a name": lambda attack: [("w", 1), {"k": (attack,)}],
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", attacks(Path("x")))
def test_a_pickle_that_would_run_code_is_refused_by_name(attempt, folder, name, shape):
    canary = folder / "canary"
    content = SHAPES[shape](attacks(canary)[name])
    ways = [written(content), written(content, _use_new_zipfile_serialization=False)]
    ways += [written(content, pickle_protocol=4), rezipped(written(content), lambda data: data, zipfile.ZIP_DEFLATED)]
    if shape == "alone":
        ways += [pickle.dumps(content, protocol) for protocol in (2, 4)]
    for way in ways:
        code, said = attempt(way)
        assert code == 2
        assert name.rpartition(".")[2] in said.partition("refused")[2]
        assert not canary.exists()


ASSEMBLED = {
    "INST": b"(S'touch {}'\niposix\nsystem\n.",
    "GLOBAL and REDUCE": b"cposix\nsystem\n(S'touch {}'\ntR.",
    "OBJ": b"(cposix\nsystem\nS'touch {}'\no.",
    "BUILD of a Namespace": b"\x80\x02cargparse\nNamespace\n)\x81}X\x09\x00\x00\x00__class__cposix\nsystem\nsb.",
    "an extension": b"\x80\x02\x82\x01.",
    "NEWOBJ of a function": b"\x80\x02cposix\nsystem\n(S'touch {}'\nt\x81.",
    "an allowed number that is an object": b"\x80\x02cnumpy\ndtype\nX\x01\x00\x00\x00O\x89\x88\x87R.",
    "a number with half its bytes": b"\x80\x02cnumpy._core.multiarray\nscalar\ncnumpy\ndtype\nX\x02\x00\x00\x00f8"
    b"\x89\x88\x87Rc_codecs\nencode\nX\x01\x00\x00\x00aX\x06\x00\x00\x00latin1\x86R\x86R.",
}


@pytest.mark.parametrize("kind", ASSEMBLED)
def test_pickles_put_together_by_hand(attempt, folder, kind):
    canary = folder / "canary"
    instructions = ASSEMBLED[kind].replace(b"{}", str(canary).encode())
    assert attempt(instructions).code == 2
    assert attempt(rezipped(SOUND["zip"], lambda data: instructions)).code == 2
    assert not canary.exists()


# --- sizes ---


@pytest.mark.parametrize("size", [10**9, 10**11, 10**14])
def test_tensors_that_claim_more_than_there_is(attempt, size):
    assert attempt(written({"w": torch.ones(1).expand(size)})).code == 2
    assert attempt(written({"w": Call(torch.Tensor, size)})).code == 2
    assert attempt(written({"w": Call(bytearray, size)})).code == 2


@pytest.mark.parametrize("gib", [1, 8])
def test_archives_that_unpack_to_far_more_than_they_are(attempt, gib):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/data/0", bytes(2**20))
    bomb = buffer.getvalue()
    at = bomb.index(b"PK\x01\x02", bomb.index(b"PK\x01\x02", bomb.index(b"PK\x01\x02") + 1) + 1)  # its third entry
    spoilt = bomb[: at + 24] + struct.pack("<I", min(gib * 2**30, 2**32 - 2)) + bomb[at + 28 :]
    assert "claim to unpack to" in attempt(spoilt).said


# --- safetensors ---

HEADERS = st.one_of(
    st.text(max_size=40).map(str.encode),
    st.recursive(
        st.none() | st.integers(-(2**70), 2**70) | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["w", "__metadata__", "dtype", "shape", "data_offsets"]), inner, max_size=3
            )
        ),
        max_leaves=8,
    ).map(lambda value: json.dumps(value).encode()),
    st.builds(
        lambda dtype, shape, offsets: json.dumps(
            {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}
        ).encode(),
        st.sampled_from(["F32", "F64", "BF16", "F8_E4M3", "F8_E8M0", "F4", "I64", "BOOL", "U16", "X", ""]),
        st.lists(st.sampled_from([0, 1, 2, 16, 2**40, 2**63]), max_size=3),
        st.lists(st.sampled_from([0, 4, 8, 64, 2**40, 2**64 - 1]), min_size=1, max_size=3),
    ),
)


@repeatable(100)
@given(
    header=HEADERS,
    claimed=st.one_of(st.none(), st.sampled_from([0, 1, 7, 100, 10**8, 10**8 + 1, 2**40, 2**63, 2**64 - 1])),
    body=st.binary(max_size=64),
    suffix=st.sampled_from([".pt", ".safetensors"]),
)
def test_half_written_safetensors(attempt, header, claimed, body, suffix):
    length = len(header) if claimed is None else claimed
    assert attempt(struct.pack("<Q", length) + header + body, suffix).code in (0, 2)


def test_there_were_at_least_300():
    """The last of this file; alone it has nothing to count."""
    if len(GENERATORS) < 15:
        pytest.skip("not all generators have run")
    assert len(TRIED) >= AT_LEAST
