"""What a file is, by its content: its ending says little (`.ckpt`, `.bin` and `.pth` are anything)."""

import zipfile
from pathlib import Path

from lasnn.errors import UserError, printable

# The three kinds of files that weights are read from.
SAFETENSORS, ZIP, LEGACY = "safetensors", "a zip of torch.save", "what torch.save wrote before PyTorch 1.6"

# A pickled integer, the first thing in a legacy file of torch.save.
LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# The footer of LevelDB's tables, which TensorFlow keeps its checkpoints' indices in.
TABLE_FOOTER = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"
AS_STATE_DICT = "load it in the program that wrote it and save torch's: torch.save(network.state_dict(), FILE)"
UNPACK = "unpack it, and give the file of weights that is in it"
DOWNLOAD = "download the file itself"
RENAME_KEYS = "convert it to a PyTorch state_dict, and give that"

# (where it stands, the bytes, what the file is then, the way out)
SIGNATURES = (
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file it stands for", "fetch it: git lfs pull"),
    (0, b"\x1f\x8b", "compressed by gzip", UNPACK),
    (0, b"BZh", "compressed by bzip2", UNPACK),
    (0, b"\xfd7zXZ\x00", "compressed by xz", UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd", UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (0, b"Rar!", "a rar archive", UNPACK),
    (257, b"ustar", "a tar archive", UNPACK),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes", RENAME_KEYS),
    (4, b"TFL3", "a TensorFlow Lite model", RENAME_KEYS),
    (0, b"\x93NUMPY", "a NumPy array", AS_STATE_DICT),
    (0, b"GGUF", "a GGUF model", RENAME_KEYS),
    (0, b"%PDF", "a PDF document", DOWNLOAD),
    (0, b"\x89PNG", "a picture", DOWNLOAD),
    (0, b"\xff\xd8\xff", "a picture", DOWNLOAD),
)
# (ending of an entry of the archive, what the archive is then, the way out)
ENTRIES = (
    ("/constants.pkl", "a TorchScript program", "torch.save(torch.jit.load(FILE).state_dict(), NEW)"),
    ("/archive_format", "a program of torch.export", "torch.save(torch.export.load(FILE).state_dict, NEW)"),
    ("model.weights.h5", "a Keras model", RENAME_KEYS),
    (".npy", "a NumPy archive", AS_STATE_DICT),
)


def kind_of(path: Path) -> str:
    """SAFETENSORS, ZIP or LEGACY, found out from the content.

    Raises:
        UserError: it is something else, or cut off; what it is, and the way out.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(1024)
            file.seek(max(0, size - len(TABLE_FOOTER)))
            foot = file.read()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if size == 0:
        raise UserError(f"{path} is empty: copy or download it again")
    if head.startswith(b"PK\x03\x04"):
        _check_zip(path)
        return ZIP
    if LEGACY_MAGIC in head[:16]:
        return LEGACY
    # The header of safetensors is JSON behind its length in eight bytes.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= 100 * 2**20:
        return SAFETENSORS
    what, fix = _named(path, head, foot)
    raise UserError(f"{path} is {what}: {fix}")


def _check_zip(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is not a whole file of weights: it is cut off; copy or download it again")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    for ending, what, fix in ENTRIES:
        if any(f"/{name}".endswith(ending) for name in names):
            raise UserError(f"{path} is {what}, not a file of weights: {fix}")
    if not any(name.endswith("/data.pkl") for name in names):
        inside = ", ".join(printable(name, 60) for name in names[:3]) or "nothing"
        raise UserError(f"{path} is a zip archive (of {inside}), not a file of weights: {UNPACK}")


def _named(path: Path, head: bytes, foot: bytes) -> tuple[str, str]:
    """What a file is that weights cannot be read from, and what to do."""
    for at, signature, what, fix in SIGNATURES:
        if head[at : at + len(signature)] == signature:
            return what, fix
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page, not the file it links to", DOWNLOAD
    if text.startswith((b"{", b"[")):
        return "JSON text, as an index of files or a message of a server", "give the file of weights itself"
    if foot == TABLE_FOOTER or ".ckpt." in path.name or path.suffix in (".index", ".meta", ".pb"):
        return "a part of a TensorFlow checkpoint", RENAME_KEYS
    # ONNX is a protocol buffer: a version, then the producer's name.
    if path.suffix == ".onnx" or (head[:1] == b"\x08" and head[1:2] < b"\x20" and head[2:3] in (b"\x12", b"\x3a")):
        return "an ONNX model", AS_STATE_DICT
    if path.suffix in (".msgpack", ".npz", ".h5", ".keras", ".params"):
        return f"a {path.suffix} file of another library", RENAME_KEYS
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        return "a Python pickle, whose reading runs code, not what torch.save wrote", AS_STATE_DICT
    text = head[:8].decode("ascii", "replace")
    return f"not a whole file of weights (it begins with {text!r}): give what torch.save or safetensors wrote", (
        "safetensors.torch.save_file(network.state_dict(), FILE)"
    )
