"""Weights that users bring: read whatever was put around them, or refused with what they are and the way out."""

import argparse
import gzip
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lasnn.compatibility import fitted_weights
from lasnn.errors import UserError
from lasnn.network.staged import build
from lasnn.network.units import ann_units

NETWORK = build("vgg5", ann_units(), in_channels=1, num_classes=3, width=2)
STATE = {name: value.clone() for name, value in NETWORK.state_dict().items()}
COUNT = len(STATE)
OTHER = {name: value + 1 for name, value in STATE.items()}


def fitted(saved, path, **options):
    """Save as a user would, and fit to the network."""
    torch.save(saved, path, **options)
    return fitted_weights(path, NETWORK, {"num_classes": 3})


def prefixed(prefix, state=STATE):
    return {prefix + name: value for name, value in state.items()}


def same(weights):
    return sorted(weights) == sorted(STATE) and all(torch.equal(weights[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize("form", ["pth", "safetensors"])
@pytest.mark.parametrize(
    "prefix",
    [
        *("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "net.", "network.", "teacher."),
        *("backbone.encoder.", "a.b.c.", "stage1.", "_fsdp_wrapped_module."),
    ],
)
def test_prefixes_that_all_names_have(tmp_path, prefix, form):
    path = tmp_path / f"t.{form}"
    (save_file if form == "safetensors" else torch.save)(prefixed(prefix), path)
    weights, notes = fitted_weights(path, NETWORK, {})
    assert same(weights)
    assert all(f"{COUNT} names" in note for note in notes)
    assert notes


def test_a_wrapper_within_the_names(tmp_path):
    inner = {name.replace("stage2.", "stage2._orig_mod."): value for name, value in STATE.items()}
    weights, [note] = fitted(inner, tmp_path / "t.pth")
    assert same(weights)
    assert note.startswith("'_orig_mod.' taken out of ")


def test_a_prefix_of_some_names_is_not_taken_off(tmp_path):
    with pytest.raises(UserError, match=r"those under 'student\.' or 'teacher\.' fit: save them alone"):
        fitted(prefixed("student.") | prefixed("teacher."), tmp_path / "t.pth")
    with pytest.raises(UserError, match=r"unexpected keys: .*; those under 'model\.' fit"):
        fitted(prefixed("model.") | {"criterion.weight": torch.ones(3)}, tmp_path / "t.pth")


@pytest.mark.parametrize(
    "saved",
    [
        *(
            {name: STATE, "epoch": 3, "acc": 0.5}
            for name in ("state_dict", "model_state_dict", "model", "net", "params")
        ),
        {"resnet": STATE, "epoch": 3},
        {"checkpoint": {"model": STATE, "step": 1}},
        {"state_dict": prefixed("model."), "hyper_parameters": {"lr": 0.1}, "optimizer_states": [{"state": {}}]},
        {"model": STATE, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "rng": torch.get_rng_state()},
        {"model": STATE, "best": np.float64(93.2), "done": np.bool_(True), "curve": np.arange(3, dtype=">i4")[::-1]},
        {name: value.numpy() for name, value in STATE.items()},
        {name: value.numpy().copy(order="F") for name, value in STATE.items()},
        STATE | {"total_ops": torch.zeros(1), "stage1.0.total_params": torch.zeros(1)},
        prefixed("module.") | {"n_averaged": torch.tensor(3), "total_ops": torch.zeros(1)},
        STATE | {"epoch": 3},
        {name: value for name, value in STATE.items() if not name.endswith("num_batches_tracked")},
        nn.ParameterDict({}).state_dict() | {name: nn.Parameter(v, v.is_floating_point()) for name, v in STATE.items()},
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_what_stands_around_the_weights(tmp_path, saved, legacy):
    weights, _ = fitted(saved, tmp_path / "t", _use_new_zipfile_serialization=not legacy)
    assert same(weights)


@pytest.mark.parametrize("ending", [".ckpt", ".pth.tar", ".bin", ".th", ".pt", ".pkl", ".safetensors", ""])
def test_the_content_decides_not_the_ending(tmp_path, ending):
    assert same(fitted(STATE, tmp_path / f"t{ending}")[0])
    save_file(STATE, tmp_path / f"s{ending}")
    assert same(fitted_weights(tmp_path / f"s{ending}", NETWORK, {})[0])


@pytest.mark.parametrize(
    ("saved", "note"),
    [
        (
            {"state_dict": STATE, "state_dict_ema": OTHER},
            "the raw weights, 'state_dict', are taken, not 'state_dict_ema'",
        ),
        ({"ema": {"module": OTHER}, "model": STATE}, "the raw weights, 'model', are taken, not 'ema.module'"),
        ({"model_ema": prefixed("module."), "epoch": 1}, "the weights are averaged ones, 'model_ema'; there are no"),
        ({"resnet": STATE, "epoch": 1}, "the weights are those under 'resnet'; there are no others"),
        ({"net": OTHER, "model": STATE}, "the usual weights, 'model', are taken, not 'net'"),
    ],
)
def test_a_choice_is_said(tmp_path, saved, note):
    weights, notes = fitted(saved, tmp_path / "t.pth")
    assert same(weights)
    assert note in notes[0]


def test_what_was_left_out_or_converted_is_said(tmp_path):
    _, notes = fitted(prefixed("module.") | {"total_ops": torch.zeros(1)}, tmp_path / "t.pth")
    assert notes == [
        "left out 1 name that no network has ('total_ops')",
        f"prefix 'module.' taken off {COUNT} names",
    ]
    half = {name: value.half() if value.is_floating_point() else value for name, value in STATE.items()}
    weights, [note] = fitted(half, tmp_path / "t.pth")
    assert note.endswith(" float16 weights converted to fp32")
    assert {value.dtype for value in weights.values()} == {torch.float32, torch.int64}


def changed(**values):
    return STATE | {"head.2.weight": values.pop("to", STATE["head.2.weight"])} | values


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (changed(to=torch.full((3, 8), torch.nan)), "NaN or infinite: 'head.2.weight': its training diverged"),
        (changed(to=torch.full((3, 8), torch.inf).half()), "NaN or infinite: 'head.2.weight'"),
        (changed(to=torch.ones(3, 8, dtype=torch.int8)), r"no floating-point numbers \(int8: 'head.2.weight'\)"),
        (changed(to=torch.ones(3, 8).to(torch.float8_e4m3fn)), r"\(float8_e4m3fn: 'head.2.weight'\)"),
        (changed(to=torch.eye(3, 8).to_sparse()), r"\(sparse: 'head.2.weight'\)"),
        (changed() | {"head.2._packed_params": (torch.ones(1), None)}, "holds quantised weights"),
        ({"student": STATE, "teacher": STATE}, r"several state dicts \('student', 'teacher'\): save the one"),
        ({"epoch": 1, "lr": 0.1}, r"holds no state_dict \(its keys: epoch, lr\)"),
        ([STATE], r"holds no state_dict \(list\); save the weights alone: torch.save\(network.state_dict\(\), file\)"),
        (
            nn.Linear(1, 1),
            r"more than weights \(torch.nn.modules.linear.Linear\), or is damaged; save the weights alone",
        ),
        ({"model": STATE, "args": argparse.Namespace()}, r"more than weights \(argparse.Namespace\).*save the weights"),
        ({"model": STATE, "x": os.system}, "holds more than weights"),
        ({"model": STATE, "x": np.array([None])}, "NumPy values of type 'O8'.*; save the weights alone"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, saved, message):
    with pytest.raises(UserError, match=f"t.pth .*{message}") as caught:
        fitted(saved, tmp_path / "t.pth")
    assert "\n" not in str(caught.value)


class Runs:
    """Leaves a file where its pickle is run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_code_is_run(tmp_path):
    for number, save in enumerate((torch.save, lambda saved, path: path.write_bytes(pickle.dumps(saved)))):
        save({"model": STATE, "x": Runs(tmp_path / "ran")}, tmp_path / f"{number}.pth")
        with pytest.raises(UserError, match="code|more than weights"):
            fitted_weights(tmp_path / f"{number}.pth", NETWORK, {})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: copy or download it again"),
        (b"<!DOCTYPE html><html>", "is a web page, not the file it links to: download"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer, .*: git lfs pull"),
        (gzip.compress(b"x", mtime=0), "is compressed by gzip: unpack it"),
        (b"a".ljust(257, b"\0") + b"ustar\x0000", "is a tar archive: unpack it"),
        (b"\x89HDF\r\n\x1a\n", "is an HDF5 file, as Keras writes: convert it"),
        (b"\x08\x07\x12\x07pytorch", "is an ONNX model: "),
        (bytes(99) + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb", "is a part of a TensorFlow checkpoint: convert it"),
        (b'{"error": "not found"}', "is JSON text"),
        (b"\x93NUMPY\x01\0", "is a NumPy array: "),
        (pickle.dumps({"w": np.ones(2)}), "is a Python pickle, whose reading runs code"),
        (b"PK\x03\x04" + bytes(50), "is not a whole file of weights: it is cut off; copy or download"),
        (b"anything else", "is not a whole file of weights .*give what torch.save or safetensors wrote"),
    ],
)
def test_files_of_other_kinds_are_named(tmp_path, content, message):
    path = tmp_path / "t.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"t.pth {message}") as caught:
        fitted_weights(path, NETWORK, {})
    assert "\n" not in str(caught.value)


def test_archives_of_other_kinds_are_named(tmp_path):
    linear = nn.Linear(2, 2)
    torch.jit.script(linear).save(tmp_path / "script.pt")
    torch.export.save(torch.export.export(linear, (torch.ones(1, 2),)), tmp_path / "program.pt2")
    np.savez(tmp_path / "arrays.npz", a=np.ones(2))
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("inner/weights.pth", "x")
    for name, message in {
        "script.pt": r"TorchScript program, .*torch.jit.load\(FILE\)",
        "program.pt2": r"program of torch.export, .*torch.export.load\(FILE\)",
        "arrays.npz": "NumPy archive",
        "other.pth": r"zip archive \(of inner/weights.pth\), .*: unpack it",
    }.items():
        with pytest.raises(UserError, match=f"{name} is a {message}"):
            fitted_weights(tmp_path / name, NETWORK, {})
