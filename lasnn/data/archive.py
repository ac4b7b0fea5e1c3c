"""Archives of data sets: verified, and unpacked beside their place before they take it.

A folder is there whole or not at all: an interrupted download or a kill while unpacking must not look like a data set.
"""

import hashlib
import os
import sys
import tarfile
import zipfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from lasnn.errors import MachineError, UserError, not_read


@dataclass(frozen=True)
class Archive:
    """A data set's archive.

    Args:
        title: the data set's name for people.
        url: where it is fetched.
        md5: its checksum.
        folder: what it unpacks to.
    """

    title: str
    url: str
    md5: str
    folder: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def find(self, root: Path, mark: str, *, download: bool) -> Path:
        """The folder that holds the file `mark`: `root`/folder or `root`, unpacked or fetched first if need be.

        Raises:
            UserError: it is in neither, and there is no archive; or the archive is damaged.
            MachineError: the download or the unpacking failed.
        """
        places = (root / self.folder, root)
        found = next((place for place in places if os.path.exists(place / mark)), None)
        if found is not None:
            return found
        packed = root / self.name
        if not packed.exists() and not download:
            raise UserError(
                f"{self.title} is in neither {places[0]} nor {places[1]} (no {mark} there); put {self.name} into "
                f"data.root (the second; it is unpacked there), fetched from {self.url}, or set data.download = true"
            )
        if places[0].exists():
            raise UserError(f"{places[0]} has no {mark}: it is not whole; remove it, and {self.name} is unpacked again")
        if not packed.exists():
            self._fetch(root)
        self.unpack(packed)
        if not os.path.exists(places[0] / mark):
            raise UserError(f"{packed} has no {self.folder}/{mark}")
        return places[0]

    def unpack(self, packed: Path) -> None:
        """Unpack the verified archive into its folder.

        Raises:
            UserError: its checksum is another one, or it would write outside its folder.
            MachineError: the disk failed, or is full.
        """
        found = md5(packed)
        if found != self.md5:
            raise UserError(f"{packed}: its md5 is {found}, not {self.md5}: truncated or damaged; fetch it again")
        root = packed.parent
        try:
            with TemporaryDirectory(dir=root, prefix=".unpack-") as inside:
                extract(packed, Path(inside))
                if not (Path(inside) / self.folder).is_dir():
                    raise UserError(f"{packed} has no folder {self.folder}")
                os.replace(Path(inside) / self.folder, root / self.folder)
        except OSError as error:
            raise MachineError(f"{packed} could not be unpacked: {error.strerror or error}") from error

    def _fetch(self, root: Path) -> None:
        from torchvision.datasets.utils import download_url

        try:
            root.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=root, prefix=".download-") as folder:
                # Standard output belongs to the command's results.
                with redirect_stdout(sys.stderr):
                    download_url(self.url, folder, self.name, self.md5)
                os.replace(Path(folder, self.name), root / self.name)
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise MachineError(f"{self.title} could not be downloaded into {root}: {reason}") from error


def extract(packed: Path, folder: Path) -> None:
    """Unpack a zip or a tar into a folder; a member that would land outside it is refused before anything is written.

    Raises:
        UserError: such a member, or the file is no archive.
    """
    try:
        if zipfile.is_zipfile(packed):
            with zipfile.ZipFile(packed) as archive:
                for name in archive.namelist():
                    if not (folder / name).resolve().is_relative_to(folder.resolve()):
                        raise UserError(f"{packed}: its member {name!r} would be written outside {folder}")
                archive.extractall(folder)
        else:
            with tarfile.open(packed) as archive:
                for member in archive.getmembers():
                    tarfile.data_filter(member, folder)
                archive.extractall(folder, filter="data")
    except tarfile.FilterError as error:
        raise UserError(f"{packed}: {error}") from error
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise UserError(f"{packed}: no whole archive ({error})") from error


def md5(path: Path) -> str:
    """The checksum by which data sets publish their files; it guards against damage, not against malice.

    Raises:
        UserError: the file cannot be read.
        MachineError: the machine failed to read it.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError as error:
        raise not_read(path, error) from error
