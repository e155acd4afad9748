"""Where published files lie and where they come from."""

import dataclasses
from pathlib import Path

from jdistill.data.download import download, extract, locked
from jdistill.data.files import File, data_root, read
from jdistill.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A set of published files.

    Attributes:
      name: the option's name.
      folders: below the data root, the first that has any of the files is read; downloads go to the first.
      addresses: folders of the publisher, then of a mirror.
      sha256: file name -> SHA-256, of every file read; empty where the publisher gives none.
      archive: for sets published as one .tar.gz its name, else None; its members lie in `folders[0]`.
      archive_md5: its MD5, the only checksum its publisher gives.
    """

    name: str
    folders: tuple[str, ...]
    addresses: tuple[str, ...]
    sha256: dict[str, str]
    archive: str | None = None
    archive_md5: str = ""


def fetch(source: Source, root: str | None, *, download: bool, verify: bool) -> tuple[dict[str, File], dict[str, str]]:
    """The files of a set by name, and their checksums, after downloading those that are missing.

    Raises:
      UsageError: the root is no folder; a file is missing and may not or cannot be downloaded, or is truncated or
        altered (where `verify`).
    """
    folder = locate(source, data_root(root), allow_download=download)
    read_ = {name: read(folder / name, sha256 or None if verify else None) for name, sha256 in source.sha256.items()}
    return {name: file for name, (file, _) in read_.items()}, {name: found for name, (_, found) in read_.items()}


def locate(source: Source, root: Path, *, allow_download: bool) -> Path:
    """The folder with all files of a set, after downloading or extracting those that are missing.

    An archive that lies in `root` is extracted; one that had to be downloaded is removed afterwards.

    Raises:
      UsageError: a file is missing and may not or cannot be downloaded.
    """
    folder, missing = _missing(source, root)
    brought = source.archive is not None and (root / source.archive).is_file()
    if missing and not brought and not allow_download:
        name, place = (source.archive, root) if source.archive else (missing[0], folder)
        raise UsageError(
            f"{folder / missing[0]} is missing; put {source.addresses[0]}/{name} into {place}, set JDISTILL_DATA to a "
            f"folder that has {source.folders[0]}, or set data.download=true"
        )
    if missing:
        with locked(root / f".{source.name}.lock"):
            folder, missing = _missing(source, root)  # another process may have brought them meanwhile
            if source.archive is None:
                for name in missing:
                    _download(source, name, folder / name, f"sha256:{source.sha256[name]}")
            elif missing:
                _extract(source, root / source.archive, folder, missing, keep=brought)
    return folder


def _missing(source: Source, root: Path) -> tuple[Path, list[str]]:
    found = [root / f for f in source.folders if any((root / f / name).is_file() for name in source.sha256)]
    folder = found[0] if found else root / source.folders[0]
    return folder, [name for name in source.sha256 if not (folder / name).is_file()]


def _extract(source: Source, archive: Path, folder: Path, missing: list[str], *, keep: bool) -> None:
    _download(source, archive.name, archive, f"md5:{source.archive_md5}")
    extract(archive, {f"{source.folders[0]}/{name}": folder / name for name in missing}, source.sha256)
    if not keep:
        archive.unlink()


def _download(source: Source, name: str, path: Path, checksum: str) -> None:
    download([f"{address}/{name}" for address in source.addresses], path, checksum)
