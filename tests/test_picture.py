"""Pictures of every depth and mode: the same range for all of a data set, never constant in silence."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from lasnn.data.image_folder import ImageFolder
from lasnn.data.picture import BLOCK, Ranges, Seen, common_ranges, key_of, read_image
from lasnn.errors import UserError

RAMP = np.linspace(0, 1, 64)[None].repeat(4, 0)
EIGHT = np.rint(RAMP * 255).astype(np.uint8)


def write_png(path: Path, values: np.ndarray, transparent: tuple[int, ...] = ()) -> None:
    """A PNG of 16 bits a channel, which Pillow does not write in colour; one value of it may stand for transparent."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))
    if transparent:
        head += chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def write_tiff(path: Path, values: np.ndarray, order: str) -> None:
    """An uncompressed TIFF of 16 bits in each of three channels."""
    height, width, channels = values.shape
    data = values.astype(f"{order}u2").tobytes()
    after = 8 + 2 + 12 * 9 + 4
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, after), (259, 3, 1, 1), (262, 3, 1, 2)]
    tags += [(273, 4, 1, after + 6), (277, 3, 1, channels), (278, 4, 1, height), (279, 4, 1, len(data))]
    content = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8) + struct.pack(f"{order}H", 9)
    for tag, kind, number, value in tags:
        short = kind == 3 and number == 1
        form = f"{order}HHIHH" if short else f"{order}HHII"
        content += struct.pack(form, tag, kind, number, *((value, 0) if short else (value,)))
    path.write_bytes(content + struct.pack(f"{order}IHHH", 0, 16, 16, 16) + data)


@pytest.mark.parametrize("hidden", [(60_000,), (65_535, 300, 1)])
def test_a_colour_that_stands_for_transparent_is_black_at_16_bits_too(tmp_path, hidden):
    """And none that differs from it in the lower byte of one channel."""
    values = np.empty((4, 8, len(hidden)), np.uint16)
    values[:] = hidden
    values[:, 4:, 0] -= 1
    write_png(tmp_path / "a.png", values, hidden)
    found = read_image(tmp_path / "a.png", (3, 4, 8), "stretch")
    assert not found[..., :4].any()
    assert (found[0, :, 4:] > 200).all()


def grey(path: Path, shape=(1, 4, 64), ranges=None) -> np.ndarray:
    return read_image(path, shape, "stretch", ranges)


DEEP = {
    "16 bits": ("a.png", (RAMP * 65_535).astype(np.uint16)),
    "12 of 16 bits": ("a.png", (RAMP * 4095).astype(np.uint16)),
    "10 of 16 bits": ("a.tif", (RAMP * 1023).astype(np.uint16)),
    "8 of 16 bits": ("a.tif", (RAMP * 255).astype(np.uint16)),
    "32 bits": ("a.tif", (RAMP * (2**31 - 1)).astype(np.int32)),
    "16 of 32 bits": ("a.tif", (RAMP * 65_535).astype(np.int32)),
    "negative": ("a.tif", (RAMP * 3000 - 1000).astype(np.int32)),
    "floats to 1": ("a.tif", RAMP.astype(np.float32)),
    "floats": ("a.tif", (RAMP * 7e6 - 3e6).astype(np.float32)),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("what", DEEP)
def test_a_ramp_stays_a_ramp(tmp_path, what, channels):
    name, values = DEEP[what]
    Image.fromarray(values).save(tmp_path / name)
    found = grey(tmp_path / name, (channels, 4, 64)).astype(int)
    assert np.abs(found - EIGHT).max() <= 1


@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("form", ["RGB", "RGBA", "LA", "<", ">"])
def test_colour_of_16_bits_keeps_all_of_them(tmp_path, form, bits):
    top = 2**bits - 1
    colour = np.rint(np.dstack([RAMP, RAMP[:, ::-1], RAMP / 2]) * top).astype(np.uint16)
    alpha = np.full((4, 64, 1), 65_535, np.uint16)
    path = tmp_path / "a.png"
    if form in "<>":
        write_tiff(path := tmp_path / "a.tif", colour, form)
    else:
        some = colour[..., :1] if form == "LA" else colour
        write_png(path, np.dstack([some, alpha]) if "A" in form else some)
    found = read_image(path, (3, 4, 64), "stretch").astype(int)
    wanted = np.rint((colour[..., :1].repeat(3, 2) if form == "LA" else colour) * (255 / top)).transpose(2, 0, 1)
    assert np.abs(found - wanted).max() <= 1


def test_all_pictures_of_a_data_set_have_one_range(tmp_path):
    for label, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        for number in range(4):
            values = np.rint(RAMP * (500 if label else 4000) - number).clip(0).astype(np.uint16)
            Image.fromarray(values).save(tmp_path / name / f"{number}.png")
    data = ImageFolder(tmp_path, size=[4, 64], grey=True)
    train, test = data.load()
    assert train.ranges == test.ranges == Ranges(integers=(0.0, 4095.0))
    peaks = {"a": 0, "b": 0}
    for split in (train, test):
        for number, path in enumerate(split.paths):
            peaks[path.parent.name] = max(peaks[path.parent.name], int(split.read([number]).max()))
    assert abs(peaks["a"] - 8 * peaks["b"]) < 10
    assert "values   of 8 pictures deeper than 8 bits: 0 becomes black, 4,095 white, in all alike" in data.notes()


def test_ranges_of_many_pictures():
    def seen(kind, *limits):
        return [Seen((1, 1), kind, low, high) for low, high in limits]

    assert common_ranges(seen(None, (0, 0))) == Ranges()
    assert common_ranges(seen("integers", (0, 5), (100, 1024))) == Ranges(integers=(0.0, 4095.0))
    assert common_ranges(seen("integers", (-5, 5), (0, 900))) == Ranges(integers=(-5, 900))
    both = common_ranges(seen("floats", (0.2, 0.2), (0.9, 1)) + seen("integers", (0, 0)))
    assert both == Ranges(integers=(0.0, 255.0), floats=(0.0, 1.0))
    with pytest.raises(UserError, match="all have the one value 7: there is nothing to see"):
        common_ranges(seen("floats", (7, 7), (7, 7)))


def test_values_that_are_no_numbers_are_named(tmp_path):
    Image.fromarray(np.array([[0, np.nan]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif: some of its values are not finite numbers"):
        grey(tmp_path / "a.tif")


def test_first_pages_are_read_and_the_others_counted(tmp_path):
    for label, name in enumerate(("a", "b")):
        for number in range(3):
            path = tmp_path / name / f"{number}.tif"
            path.parent.mkdir(exist_ok=True)
            page = Image.new("L", (8, 8), 10 * number + 100 * label)
            page.save(path, save_all=True, append_images=[Image.new("L", (8, 8), 255)] if number else [])
    data = ImageFolder(tmp_path, size=8)
    train, _ = data.load()
    assert train.read(range(len(train.paths))).max() < 255
    assert data.notes()[-1] == "left out further frames or pages of 4 pictures"


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "LAB"])
def test_modes_keep_a_ramp(tmp_path, mode):
    image = Image.fromarray(EIGHT).convert("RGB")
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    else:
        image = image.convert(mode)
    image.save(path := tmp_path / ("a.png" if mode in ("P", "LA", "RGBA") else "a.tif"))
    for channels in (1, 3):
        found = read_image(path, (channels, 4, 64), "stretch").astype(int)
        # Means, for one bit is dithered.
        assert found[..., :8].mean() < 40
        assert found[..., -8:].mean() > 215


def test_keys_are_of_the_content_wherever_it_lies(tmp_path):
    content = bytes(range(256)) * (2 * BLOCK // 64)
    path = tmp_path / "a"
    path.write_bytes(content)
    known = key_of(path)
    (tmp_path / "b").write_bytes(content)
    assert key_of(tmp_path / "b") == known
    for at in (0, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert key_of(path) != known
    path.write_bytes(content + b"x")
    assert key_of(path) != known
