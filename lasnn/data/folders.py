"""What lies in a folder of pictures: the classes, the splits, the pictures; and all that is left out, counted."""

import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from lasnn.data.picture import is_picture
from lasnn.errors import MachineError, UserError, printable

# Beside names that begin with a dot: what systems, file managers, network drives and archives leave behind. In lower
# case.
SYSTEM_NAMES = {
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "@eadir",
    "@recently-snapshot",
    "@recycle",
    "@sharebin",
    "@tmp",
    "__macosx",
    "__pycache__",
    "desktop.ini",
    "ehthumbs.db",
    "ehthumbs_vista.db",
    "found.000",
    "icon\r",
    "lost+found",
    "network trash folder",
    "recycled",
    "recycler",
    "system volume information",
    "temporary items",
    "thumbs.db",
    "~snapshot",
}

WORDS = {
    "train": ("train", "training", "trainset", "trainingset", "traindata", "trainval", "trn"),
    "val": ("val", "valid", "validation", "valset", "validset", "validationset", "dev", "devset"),
    "test": ("test", "testing", "testset", "testdata", "eval", "evaluation", "evalset", "tst"),
}
ROLE_OF = {word: role for role, words in WORDS.items() for word in words}


@dataclass
class Found:
    """What a look through folders gathers beside the pictures."""

    problems: list[str] = field(default_factory=list)
    # Reason of each file that is a picture's and cannot be read.
    lost: dict[Path, str] = field(default_factory=dict)
    # How many of what are left out.
    left: Counter = field(default_factory=Counter)
    # The endings of the files that are no pictures.
    others: Counter = field(default_factory=Counter)
    # Further lines.
    said: list[str] = field(default_factory=list)
    # The folder of the classes: a link that leads back into it would count pictures twice, or never end.
    top: Path | None = None


@dataclass(frozen=True)
class Splits:
    """Where the classes of each split lie; `test` is None where all lie in `train`, and the split is drawn."""

    train: Path
    test: Path | None = None
    # The name of a test folder that the validation folder takes the place of.
    unused: Path | None = None


def is_system(name: str) -> bool:
    """Whether a file or folder is a system's, not the user's."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def entries(folder: Path, found: Found) -> tuple[list[Path], list[Path]]:
    """The folders and the files in a folder by their names, without those of systems; links are what they lead to.

    A folder that cannot be listed is a problem; what is neither, as a pipe, is left out.
    """
    folders, files = [], []
    try:
        with os.scandir(folder) as listed:
            inside = sorted(listed, key=lambda entry: entry.name)
    except PermissionError as error:
        found.problems.append(
            f"{folder}: cannot be read ({error.strerror}): give yourself the right to, or move it away"
        )
        return [], []
    except OSError as error:
        raise MachineError(f"{folder}: cannot be read ({error.strerror})") from error
    for entry in inside:
        path = folder / entry.name
        try:
            is_folder, is_file = path.is_dir(), path.is_file()
        except OSError as error:
            found.lost[path] = f"{path}: cannot be read ({error.strerror})"
            continue
        if is_system(entry.name):
            found.left["hidden or system " + ("folder" if is_folder else "file")] += 1
        elif is_folder and entry.is_symlink() and _leads_back(path, found.top):
            found.left["link to a folder of the same pictures"] += 1
        elif is_folder:
            folders.append(path)
        elif is_file:
            files.append(path)
        elif entry.is_symlink():
            found.lost[path] = f"{path}: a link to what is not there"
        else:
            found.left["special file (a pipe or device)"] += 1
    return folders, files


def _leads_back(link: Path, top: Path | None) -> bool:
    """Whether a link leads to a folder that is read anyway, or to one that has all of them in it."""
    target = link.resolve()
    if top is None or top.is_relative_to(target):
        return top is not None
    return target.is_relative_to(top) and not any(map(is_system, target.relative_to(top).parts))


def role_of(name: str) -> tuple[str, tuple[str, ...]] | None:
    """What split a folder's name says it is ("train", "val" or "test") with the other words of the name; None: none.

    >>> role_of("seg_train"), role_of("ValidationSet"), role_of("cats")
    (('train', ('seg',)), ('val', ('set',)), None)
    """
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+|[^\W\d_A-Za-z]+", name)]
    roles = [ROLE_OF[word] for word in words if word in ROLE_OF]
    if len(roles) != 1:
        return None
    return roles[0], tuple(word for word in words if word not in ROLE_OF)


def find_splits(root: Path, found: Found) -> Splits:
    """Where the training and the test pictures of a folder lie, as the names of its folders say.

    Raises:
        UserError: the names leave open what is what, or a split is not there; the names and the choices.
    """
    folders, _ = entries(root, Found())
    if len(folders) == 1 and role_of(folders[0].name) is None:
        # Archives are often unpacked one folder too deep.
        inner = [path.name for path in entries(folders[0], Found())[0] if role_of(path.name)]
        if {role_of(name)[0] for name in inner} > {"train"}:
            found.said.append(f"read from {folders[0]}, the only folder in {root}")
            return find_splits(folders[0], found)
    named = {path: role for path in folders if (role := role_of(path.name))}
    # A class may be called "train" as well; a split has folders in it.
    named = {path: role for path, role in named.items() if len(named) == len(folders) or entries(path, Found())[0]}
    by_rest: dict[tuple[str, ...], dict[str, list[Path]]] = {}
    for path, (role, rest) in named.items():
        by_rest.setdefault(rest, {}).setdefault(role, []).append(path)
    whole = [roles for roles in by_rest.values() if "train" in roles and len(roles) > 1]
    plain = by_rest.get((), {})
    names = ", ".join(path.name for path in named)
    into_root = f"or put the classes into {root} itself"
    if not whole:
        if {role for role, _ in named.values()} > {"train"}:
            raise UserError(f"{root}: which are the training and the test pictures of {names}? Name two train and test")
        if plain and "train" in plain:
            raise UserError(f"{root} has {plain['train'][0].name} but neither val nor test; add one, {into_root}")
        if plain:
            raise UserError(f"{root} has {next(iter(plain.values()))[0].name} but no train; add it, {into_root}")
        return Splits(root)
    twice = [paths for paths in whole[0].values() if len(paths) > 1]
    if len(whole) > 1 or twice:
        raise UserError(f"{root}: which are the training and the test pictures of {names}? Leave one of each there")
    [roles] = whole
    train, val, test = (roles.get(role, [None])[0] for role in ("train", "val", "test"))
    others = [path.name for path in folders if path not in (train, val, test)]
    if others:
        found.left[f"folder beside {train.name} ({', '.join(map(printable, others[:5]))})"] += len(others)
    if val and test:
        return Splits(_inner(train), _inner(val), test)
    return Splits(_inner(train), _inner(val or test))


def _inner(folder: Path) -> Path:
    """A split's folder, or that of the same name which is all that lies in it, as some archives have it."""
    folders, _ = entries(folder, Found())
    same = len(folders) == 1 and folders[0].name.casefold() == folder.name.casefold()
    return folders[0] if same else folder


def classes_in(folder: Path, found: Found) -> dict[str, list[Path]]:
    """{class: its picture files, also those in folders below it}, both in the order of their names."""
    classes: dict[str, list[Path]] = {}
    found.top = folder.resolve()
    folders, files = entries(folder, found)
    if files:
        found.left["file beside the folders of classes"] += len(files)
    for inner in folders:
        if not is_text(inner.name):
            found.problems.append(f"{folder}: the name of its folder {printable(inner.name)!r} is no UTF-8; rename it")
            continue
        # The same letters, as a Mac and as others write them.
        name = unicodedata.normalize("NFC", inner.name)
        if name in classes:
            found.problems.append(f"{folder}: two folders are called {printable(name)!r} (in two spellings of Unicode)")
            continue
        others, lost = found.others.total(), len(found.lost)
        roles = {role[0] for path in entries(inner, Found())[0] if (role := role_of(path.name))}
        if roles > {"train"}:
            found.problems.append(
                f"{inner}: has splits in it; the splits come first, as in {folder / 'train' / inner.name}"
            )
        classes[name] = pictures_in(inner, found)
        if not classes[name] and len(found.lost) == lost:
            other = found.others.total() - others
            said = f" ({other} files of other kinds)" if other else ""
            found.problems.append(f"{inner}: no pictures in it{said}; move it away, or give data.root another folder")
    if not folders:
        loose = f" (but {len(files)} files): a folder a class is needed" if files else ""
        found.problems.append(f"{folder}: no folders of classes in it{loose}")
    if len(folders) == 1 and (further := entries(folders[0], Found())[0]) and len(further) > 1:
        names = ", ".join(printable(path.name) for path in further[:5])
        fix = f"if {names} are the classes, move them up or set data.root to {folders[0]}"
        found.problems.append(f"{folder}: one class, and at least 2 are needed; {fix}")
    return classes


def pictures_in(folder: Path, found: Found, above: tuple[tuple[int, int], ...] = ()) -> list[Path]:
    """The picture files in a folder and in those below it, by their names; none twice by a link."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        found.left["link to a folder of the same pictures"] += 1
        return []
    folders, files = entries(folder, found)
    kept = [path for path in files if _is_picture(path, found)]
    for inner in folders:
        kept += pictures_in(inner, found, (*above, here))
    return sorted(kept)


def _is_picture(path: Path, found: Found) -> bool:
    try:
        if is_picture(path):
            return True
    except PermissionError:
        # Nobody can say what it is.
        found.left["file without the right to read it"] += 1
        return False
    except OSError as error:
        found.lost[path] = f"{path}: cannot be read ({error.strerror})"
        return False
    found.others[path.suffix.lower() or "no ending"] += 1
    return False


def is_text(name: str) -> bool:
    """Whether a file's name is UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def count(number: int, what: str) -> str:
    """How many of what: `2 hidden or system files`, `1 link to a folder of the same pictures`."""
    first, *rest = re.split(r"(?= \(| to| in| beside| without)", what, maxsplit=1)
    return f"{number:,} {first}{'' if number == 1 else 's'}{''.join(rest)}"


def left_out(found: Found) -> list[str]:
    """What was left out, counted by reason."""
    said = [count(number, what) for what, number in sorted(found.left.items())]
    if found.others:
        kinds = found.others.most_common()
        listed = ", ".join(f"{printable(ending)} {number:,}" for ending, number in kinds[:8])
        more = f", and {len(kinds) - 8} other endings" if len(kinds) > 8 else ""
        total = found.others.total()
        said.append(
            f"{count(total, 'file')} that {'is no picture' if total == 1 else 'are no pictures'} ({listed}{more})"
        )
    return said
