"""Tiny ImageNet, on small trees in the layout of its archive."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lasnn.data.tiny_imagenet import URL, TinyImageNet
from lasnn.errors import MachineError, UserError
from lasnn.registry import datasets

# Not in the order of the alphabet, which would also be that of most disks.
WNIDS = ("n02000000", "n01000000", "n03000000")
# Numbers whose order as text is another one.
NUMBERS = (0, 2, 10, 100)
TRAIN, TEST = len(WNIDS) * len(NUMBERS), 6
# Label of val_0, val_1, ...
VAL = (2, 0, 1, 1, 2, 0)
GREY = (1, 2)


class Small(TinyImageNet):
    classes = ("0", "1", "2")
    train_size, test_size = TRAIN, TEST


def shade(label: int, number: int) -> tuple[int, int, int]:
    """The one colour of an image, which survives JPEG's compression but for rounding."""
    return 60 * label + 20, number + 30, 200 - 50 * label


def write_image(path: Path, colour, mode: str = "RGB", size=(64, 64), noise: int = 0) -> None:
    pixels = np.full((size[1], size[0], 3), colour, np.uint8)
    pixels += np.random.default_rng(0).integers(0, noise + 1, pixels.shape, np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, "JPEG", quality=95)


@pytest.fixture
def tree(tmp_path):
    """The archive's folders, with three classes, four training images a class and six validation images."""
    folder = tmp_path / "tiny-imagenet-200"
    (folder / "val/images").mkdir(parents=True)
    (folder / "test/images").mkdir(parents=True)
    write_image(folder / "test/images/test_0.JPEG", (0, 0, 0))
    (folder / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in WNIDS))
    (folder / "words.txt").write_text("n00001740\tentity\n")
    for label, wnid in enumerate(WNIDS):
        images = folder / "train" / wnid / "images"
        images.mkdir(parents=True)
        boxes = [f"{wnid}_{number}.JPEG\t0\t0\t63\t63\n" for number in NUMBERS]
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("".join(boxes))
        for number in reversed(NUMBERS):
            mode = "L" if (label, number) == GREY else "RGB"
            write_image(images / f"{wnid}_{number}.JPEG", shade(label, number), mode)
    lines = []
    for number in (3, 5, 0, 4, 1, 2):
        write_image(folder / f"val/images/val_{number}.JPEG", shade(VAL[number], number))
        lines.append(f"val_{number}.JPEG\t{WNIDS[VAL[number]]}\t0\t32\t44\t62\n")
    (folder / "val/val_annotations.txt").write_text("".join(lines))
    return folder


def failure(root: Path, kind: type[Exception] = UserError, lines: int = 1) -> str:
    """The lines with which loading fails."""
    dataset = Small(root)
    with pytest.raises(kind) as error:
        dataset.load()
    text = str(error.value)
    assert text.count("\n") == lines - 1
    # A failed load leaves the description as it was.
    assert (dataset.classes, dataset.source) == (Small.classes, "")
    return text


def test_describes_the_full_set():
    dataset = datasets.build("tiny-imagenet", "nowhere")
    assert (dataset.channels, dataset.height, dataset.width) == (3, 64, 64)
    assert (len(dataset.classes), dataset.train_size, dataset.test_size) == (200, 100_000, 10_000)
    assert dataset.augment == ("crop", "flip")
    assert dataset.source == ""


@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("order", [sorted, lambda names: sorted(names, reverse=True)])
def test_reads_every_image_in_order(tree, monkeypatch, inner, order):
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: order(listdir(folder)))
    dataset = Small(str(tree if inner else tree.parent))
    train, test = dataset.load()
    assert dataset.source == str(tree)
    assert dataset.classes == WNIDS
    assert train.pixels.shape == (TRAIN, 3, 64, 64)
    assert test.pixels.shape == (TEST, 3, 64, 64)
    assert train.pixels.is_contiguous()
    assert train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert test.labels.tolist() == list(VAL)
    expected = [shade(label, number) for label in range(3) for number in NUMBERS]
    red, green, blue = expected[4 * GREY[0] + NUMBERS.index(GREY[1])]
    # ITU-R 601, which pillow uses.
    expected[4 * GREY[0] + NUMBERS.index(GREY[1])] = (round(0.299 * red + 0.587 * green + 0.114 * blue),) * 3
    expected += [shade(label, number) for number, label in enumerate(VAL)]
    for pixels, colour in zip(torch.cat([train.pixels, test.pixels]), expected, strict=True):
        assert (pixels.int() - torch.tensor(colour)[:, None, None]).abs().max() <= 3


def sort_into_classes(tree: Path, inner: str) -> None:
    """As the scripts do that make the validation images suit other loaders."""
    for number, label in enumerate(VAL):
        folder = tree / "val" / WNIDS[label] / inner
        folder.mkdir(parents=True, exist_ok=True)
        (tree / f"val/images/val_{number}.JPEG").rename(folder / f"val_{number}.JPEG")
    (tree / "val/images").rmdir()
    (tree / "val/val_annotations.txt").unlink()


def flatten(tree: Path) -> None:
    for wnid in WNIDS:
        for path in list((tree / "train" / wnid / "images").iterdir()):
            path.rename(tree / "train" / wnid / path.name)
        (tree / "train" / wnid / "images").rmdir()


def rename_endings(tree: Path) -> None:
    for number, path in enumerate(sorted(tree.rglob("*.JPEG"))):
        path.rename(path.with_suffix((".jpeg", ".jpg", ".JPG", ".Jpeg")[number % 4]))


def nest(tree: Path) -> None:
    tree.rename(tree.with_name("inner"))
    tree.mkdir()
    tree.with_name("inner").rename(tree / tree.name)


LAYOUTS = {
    "sorted": lambda tree: sort_into_classes(tree, ""),
    "sorted, with images folders": lambda tree: sort_into_classes(tree, "images"),
    "no images folders": flatten,
    "other endings": rename_endings,
    "nested": nest,
    "all": lambda tree: (sort_into_classes(tree, ""), flatten(tree), rename_endings(tree), nest(tree)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layouts_that_others_leave_are_the_same_data_set(tree, layout):
    before = Small(tree).load()
    LAYOUTS[layout](tree)
    for images, same in zip(Small(tree.parent).load(), before, strict=True):
        assert images.fingerprint() == same.fingerprint()


def test_sorted_validation_images_are_counted(tree):
    sort_into_classes(tree, "")
    (tree / "val" / WNIDS[1] / "val_3.JPEG").rename(tree / "val" / WNIDS[0] / "val_3.JPEG")
    assert failure(tree).endswith("3 images val_<number>.JPEG; 2 expected")


def test_rows_are_height_and_columns_are_width(tree):
    path = tree / "train" / WNIDS[0] / "images" / f"{WNIDS[0]}_0.JPEG"
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:16, :, 0] = 255
    Image.fromarray(pixels).save(path, "JPEG", quality=95, subsampling=0)
    train, _ = Small(tree).load()
    assert train.pixels[0, 0, :15].min() > 200
    assert train.pixels[0, 0, 17:].max() < 50
    assert train.pixels[0, 2].max() < 50


def test_loading_again_gives_the_same(tree):
    dataset = Small(tree)
    (first, _), (second, _) = dataset.load(), dataset.load()
    assert torch.equal(first.pixels, second.pixels)


def test_other_files_are_left_alone(tree):
    (tree / "train" / WNIDS[0] / "images" / f"._{WNIDS[0]}_0.JPEG").write_bytes(b"a Mac's")
    (tree / "val/images/Thumbs.db").write_bytes(b"Windows'")
    (tree / "wnids.txt").write_bytes("\r\n".join(WNIDS).encode())
    Small(tree).load()


def test_not_found_names_places_and_remedy(tmp_path):
    text = failure(tmp_path)
    assert str(tmp_path / "tiny-imagenet-200") in text
    assert f" {tmp_path} " in text
    assert URL in text
    assert "data.root" in text


def remove(path: Path) -> None:
    if path.is_dir():
        for inner in path.iterdir():
            remove(inner)
        path.rmdir()
    else:
        path.unlink()


MISSING = (f"train/{WNIDS[1]}/images", f"train/{WNIDS[1]}", "train", "val/images", "val/val_annotations.txt", "val")


@pytest.mark.parametrize("name", MISSING)
def test_missing_part_is_named(tree, name):
    remove(tree / name)
    text = failure(tree)
    assert text.startswith(str(tree / name))
    assert " is missing; unzip" in text


def test_folder_and_file_exchanged(tree):
    annotations = tree / "val/val_annotations.txt"
    remove(annotations)
    annotations.mkdir()
    assert failure(tree).startswith(f"{annotations}: cannot be read")
    images = tree / "train" / WNIDS[2] / "images"
    remove(images)
    images.write_text("")
    assert failure(tree).startswith(f"{images}: cannot be read")


def test_failing_disk_is_the_machines_fault(tree, monkeypatch):
    def fail(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "listdir", fail)
    assert "cannot be read (Input/output error)" in failure(tree, MachineError)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "0 classes; 3 expected"),
        ("\n".join(WNIDS[:2]), "2 classes; 3 expected"),
        ("\n".join((*WNIDS, "n04000000")), "4 classes; 3 expected"),
        ("\n".join((*WNIDS[:2], WNIDS[0])), f"'{WNIDS[0]}' is there twice"),
        (b"\x89PNG\xff\xfe", "1 classes; 3 expected"),
    ],
)
def test_wrong_classes(tree, content, reason):
    path = tree / "wnids.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert failure(tree) == f"{path}: {reason}"


def test_wrong_number_of_images_in_a_class(tree):
    images = tree / "train" / WNIDS[2] / "images"
    extra = images / f"{WNIDS[2]}_11.JPEG"
    write_image(extra, (0, 0, 0))
    assert failure(tree) == f"{images}: 5 images {WNIDS[2]}_<number>.JPEG; 4 expected"
    extra.unlink()
    # An image of another class does not stand in for one of this.
    (images / f"{WNIDS[2]}_10.JPEG").rename(images / f"{WNIDS[0]}_10.JPEG")
    assert failure(tree) == f"{images}: 3 images {WNIDS[2]}_<number>.JPEG; 4 expected"


def change_lines(change):
    """Change the lines of val_annotations.txt, of which the first is of val_3 and the last of val_2."""

    def apply(tree: Path) -> Path:
        path = tree / "val/val_annotations.txt"
        path.write_text("".join(change(path.read_text().splitlines(keepends=True))))
        return path

    return apply


def replace_in_second(old: str, new: str):
    return change_lines(lambda lines: [lines[0], lines[1].replace(old, new), *lines[2:]])


ANNOTATIONS = {
    "unknown class": (replace_in_second(WNIDS[0], "n09999999"), ", line 2: 'n09999999' is not in wnids.txt"),
    "missing image": (replace_in_second("val_5", "val_77"), ", line 2: there is no image 'val_77.JPEG' in "),
    "not an image": (replace_in_second("val_5.JPEG", "../val_5"), ", line 2: there is no image '../val_5'"),
    "repeated": (replace_in_second("val_5", "val_3"), ", line 2: 'val_3.JPEG' has an earlier line"),
    "spaces": (replace_in_second("\t", " "), ", line 2: 1 fields separated by tabs; 6 expected"),
    "empty line": (change_lines(lambda lines: [*lines, "\n"]), ", line 7: 1 fields"),
    "cut short": (change_lines(lambda lines: [*lines[:-1], lines[-1][:12]]), ", line 6: 2 fields"),
    "changed label": (replace_in_second(WNIDS[0], WNIDS[1]), f": 1 images of class {WNIDS[0]}; 2 expected"),
}


@pytest.mark.parametrize("damage", ANNOTATIONS)
def test_broken_annotations(tree, damage):
    change, reason = ANNOTATIONS[damage]
    path = change(tree)
    text = failure(tree)
    assert text.startswith(f"{path}{reason}")


def test_image_without_annotation(tree):
    path = change_lines(lambda lines: lines[:-1])(tree)
    image = tree / "val/images/val_2.JPEG"
    assert failure(tree) == f"{image}: has no line in {path}"
    # Consistent, but one too few.
    image.unlink()
    assert failure(tree) == f"{image.parent}: 5 images val_<number>.JPEG; 6 expected"


def write_png(path: Path) -> None:
    Image.new("RGB", (64, 64)).save(path, "PNG")


def cut_to(size: int):
    def apply(path: Path) -> None:
        # Noise, so that most of the file is pixels.
        write_image(path, (20, 20, 20), noise=200)
        path.write_bytes(path.read_bytes()[:size])

    return apply


IMAGES = {
    "empty": (cut_to(0), "empty; unzip"),
    "marker only": (cut_to(2), "truncated or damaged JPEG"),
    "cut in the header": (cut_to(200), "truncated or damaged JPEG"),
    "cut in the pixels": (cut_to(2000), "truncated or damaged JPEG"),
    "cut near the end": (cut_to(-100), "truncated or damaged JPEG"),
    "text": (lambda path: path.write_text("<html>not found</html>"), "not a JPEG image"),
    "png": (write_png, "not a JPEG image"),
    "wide": (lambda path: write_image(path, (0, 0, 0), size=(65, 64)), "65 x 64 pixels; 64 x 64 expected"),
    "high": (lambda path: write_image(path, (0, 0, 0), size=(64, 32)), "64 x 32 pixels; 64 x 64 expected"),
}


@pytest.mark.parametrize("name", [f"train/{WNIDS[1]}/images/{WNIDS[1]}_10.JPEG", "val/images/val_4.JPEG"])
@pytest.mark.parametrize("damage", IMAGES)
def test_broken_image_is_named(tree, damage, name):
    change, reason = IMAGES[damage]
    change(tree / name)
    first, last = failure(tree, lines=2).splitlines()
    assert first.startswith(f"{tree / name}: ")
    assert reason in first
    assert last == "1 of 18 images cannot be read: replace them, or set data.skip_unreadable = true"


def test_absurd_size_is_refused_unread(tree):
    path = tree / "val/images/val_4.JPEG"
    content = path.read_bytes()
    # The start-of-frame marker, its length and precision; then the height and the width, two bytes each.
    at = content.index(b"\xff\xc0") + 5
    path.write_bytes(content[:at] + b"\xff\xff\xff\xff" + content[at + 4 :])
    assert failure(tree, lines=2).startswith(f"{path}: ")


def test_unreadable_images_are_named_and_counted_and_skipped_if_asked(tree, monkeypatch):
    broken = [tree / "train" / wnid / "images" / f"{wnid}_2.JPEG" for wnid in WNIDS[1:]]
    broken.append(tree / "val/images/val_4.JPEG")
    for path in broken:
        path.write_bytes(b"")
    *lines, last = failure(tree, lines=4).splitlines()
    assert [line.partition(":")[0] for line in lines] == list(map(str, broken))
    assert last.startswith("3 of 18 images cannot be read")
    monkeypatch.setattr("lasnn.data.dataset.NAMED", 2)
    assert failure(tree, lines=4).splitlines()[2] == "and 1 more"

    data = Small(tree, skip_unreadable=True)
    for _ in range(2):
        train, test = data.load()
        assert data.source == f"{tree}, 3 unreadable images skipped"
        assert (data.train_size, data.test_size) == (len(train), len(test)) == (10, 5)
        assert train.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 3
        assert test.labels.tolist() == [label for number, label in enumerate(VAL) if number != 4]
        for images, wanted in ((train, [(2, 0), (2, 10), (2, 100)]), (test, [(VAL[5], 5)])):
            for pixels, colour in zip(images.pixels[-len(wanted) :], wanted, strict=True):
                assert (pixels.int() - torch.tensor(shade(*colour))[:, None, None]).abs().max() <= 3
    for number in NUMBERS:
        (tree / "train" / WNIDS[0] / "images" / f"{WNIDS[0]}_{number}.JPEG").write_bytes(b"")
    with pytest.raises(UserError, match=f"no readable training image of class {WNIDS[0]}$"):
        Small(tree, skip_unreadable=True).load()
