"""Files of data that are not on their publisher's site in the form read, and those published as a .zip."""

import dataclasses
import hashlib
import zipfile
from pathlib import Path

from jdistill.data.download import download as download_file
from jdistill.data.download import locked
from jdistill.data.files import AGAIN, File, data_root
from jdistill.data.source import Source, fetch
from jdistill.errors import UsageError


def fetch_local(source: Source, root: str | None, *, verify: bool, advice: str) -> tuple[dict[str, File], dict[str, str]]:
    """As `fetch` without a download, for files that cannot be downloaded in this form.

    Raises:
      UsageError: a file is missing (the line ends with `advice`) or altered.
    """
    base = data_root(root)
    folders = [base / folder for folder in source.folders]
    folder = next((f for f in folders if any((f / name).is_file() for name in source.sha256)), folders[0])
    missing = [name for name in source.sha256 if not (folder / name).is_file()]
    if missing:
        raise UsageError(f"{folder / missing[0]} is missing; {advice}")
    return fetch(source, root, download=False, verify=verify)


@dataclasses.dataclass(frozen=True)
class Archive:
    """Files published as one .zip.

    Attributes:
      folder: the folder inside the archive, and below the data root.
      address: of the archive.
      md5: of the archive; "" where the publisher changes it without notice, so that it is not downloaded.
      files: the names of the files read.
    """

    folder: str
    address: str
    md5: str
    files: tuple[str, ...]


def fetch_zip(archive: Archive, root: str | None, *, download: bool) -> tuple[list[Path], dict[str, str]]:
    """The paths of the files, and their SHA-256, after extracting those that are missing.

    An archive that lies in the root is extracted; one that had to be downloaded is removed afterwards.

    Raises:
      UsageError: a file is missing and may not or cannot be downloaded, or the archive is broken.
    """
    base = data_root(root)
    brought = base / archive.address.rpartition("/")[2]
    paths = [base / archive.folder / name for name in archive.files]
    missing = [path for path in paths if not path.is_file()]
    if missing and not brought.is_file() and not (download and archive.md5):
        allow = ", or set download=true" if archive.md5 else ""
        raise UsageError(f"{missing[0]} is missing; put {archive.address} into {base}{allow}")
    if missing:
        with locked(base / f".{archive.folder}.lock"):
            kept = brought.is_file()
            if archive.md5:
                download_file([archive.address], brought, f"md5:{archive.md5}")
            _unzip(brought, archive.folder, [path for path in paths if not path.is_file()])
            if not kept:
                brought.unlink()
    return paths, {path.name: sha256(path) for path in paths}


def sha256(path: Path) -> str:
    """The SHA-256 of a file, read in pieces.

    Raises:
      UsageError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


def _unzip(brought: Path, folder: str, paths: list[Path]) -> None:
    """Extracts single files, each under its final name only when whole."""
    try:
        with zipfile.ZipFile(brought) as archive:
            for path in paths:
                path.parent.mkdir(parents=True, exist_ok=True)
                part = path.with_name(path.name + ".part")
                part.write_bytes(archive.read(f"{folder}/{path.name}"))
                part.replace(path)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UsageError(f"{brought} is not the whole archive ({error}); {AGAIN}") from error
    except OSError as error:
        raise UsageError(f"{brought} cannot be extracted ({error.strerror or error}); choose another root") from error
