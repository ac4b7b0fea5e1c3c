import errno
import os
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from lasnn import files, weights
from lasnn.errors import MachineError, UserError


def test_weights_round_trip_with_their_description(tmp_path):
    path = tmp_path / "w.safetensors"
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5)}
    weights.save_weights(path, tensors, {"num_classes": 10})
    read, description = weights.load_weights(path)
    assert description == {"num_classes": 10}
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_state_loads_without_code(tmp_path):
    path = tmp_path / "last.pt"
    weights.save_state(
        path, {"phase": "student", "step": 0, "epoch": 3, "module": {"w": torch.ones(2)}, "sums": {"loss": 0.5}}
    )
    assert torch.load(path, weights_only=True)["epoch"] == 3
    assert weights.load_state(path)["sums"] == {"loss": 0.5}


def test_a_state_with_code_is_refused(tmp_path):
    path = tmp_path / "last.pt"
    # As someone would make it who wants it to be run: with the digest of what lasnn writes.
    weights.save_state(path, {"x": os.system})
    with pytest.raises(
        UserError, match="is damaged, or holds pickled code, which lasnn does not run; it takes a whole checkpoint"
    ):
        weights.load_state(path)
    torch.save({"x": os.system}, path)
    with pytest.raises(UserError, match="is not a whole checkpoint: it is damaged, or lasnn did not write it"):
        weights.load_state(path)


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_damaged_states_are_named(tmp_path, damage):
    path = tmp_path / "last.pt"
    weights.save_state(path, {"module": {"w": torch.randn(1000)}})
    content = bytearray(path.read_bytes())
    if damage == "flip":
        with zipfile.ZipFile(path) as archive:
            entry = next(item for item in archive.infolist() if item.file_size == 4000)
        content[entry.header_offset + 500] ^= 1
    path.write_bytes({"truncate": content[: len(content) // 2], "flip": content, "empty": b""}[damage])
    with pytest.raises(UserError, match="last.pt is (damaged|not a whole)"):
        weights.load_state(path)


def test_a_file_that_is_no_state_is_refused(tmp_path):
    weights.save_state(tmp_path / "last.pt", {"module": {}})
    with pytest.raises(UserError, match="is not the state of a run"):
        weights.load_state(tmp_path / "last.pt")


def test_a_flipped_bit_of_the_weights_is_found(tmp_path):
    path = tmp_path / "w.safetensors"
    weights.save_weights(path, {"a": torch.randn(100), "n": torch.tensor(3), "e": torch.zeros(0)}, {})
    weights.load_weights(path)
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="w.safetensors is damaged"):
        weights.load_weights(path)


def test_truncated_weights_are_named(tmp_path):
    path = tmp_path / "w.safetensors"
    weights.save_weights(path, {"a": torch.randn(100)}, {})
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="w.safetensors is not a whole safetensors file"):
        weights.load_weights(path)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    files.write(path, "old")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError, match=r"cannot write .*summary.json: No space left on device"):
        files.write(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["summary.json"]


def test_written_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        files.write(tmp_path / "x", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


def test_the_same_weights_are_the_same_bytes(tmp_path):
    """One key of metadata: safetensors writes several in another order each time."""
    tensors, contents = {"a": torch.arange(6.0), "b": torch.ones(2, 3)}, set()
    for number in range(8):
        weights.save_weights(tmp_path / f"{number}.safetensors", tensors, {"role": "teacher", "classes": ["é", "b"]})
        contents.add((tmp_path / f"{number}.safetensors").read_bytes())
    assert len(contents) == 1
    with safe_open(tmp_path / "0.safetensors", framework="pt") as file:
        assert list(file.metadata()) == ["lasnn"]


def test_weights_that_share_memory_are_saved_by_each_name(tmp_path):
    whole = torch.arange(6.0)
    tied = {"a": whole, "b": whole, "part": whole[2:4], "turned": whole.view(2, 3).T}
    weights.save_weights(tmp_path / "w.safetensors", tied, {})
    read, _ = weights.load_weights(tmp_path / "w.safetensors")
    assert all(torch.equal(read[name], value) for name, value in tied.items())


def test_metadata_of_others_under_our_key_are_named(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(save({"a": torch.ones(1)}, metadata={"lasnn": "not json"}))
    with pytest.raises(UserError, match="a key 'lasnn' that lasnn did not write; save it again"):
        weights.load_weights(path)
