"""Downloads that resume, check and never leave half a file under its final name."""

import contextlib
import hashlib
import http.client
import ssl
import sys
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock

from jdistill.errors import UsageError

TIMEOUT = 10.0
"""Seconds without an answer after which a server counts as out of reach."""

_NETWORK = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


def download(addresses: Sequence[str], path: Path, checksum: str) -> None:
    """Downloads a file unless it is there, and checks it; a `.part` left by a broken download is continued.

    Args:
      addresses: of the same file, tried in turn.
      path: where it goes; its folder is made. It appears under this name only when whole and checked.
      checksum: `"sha256:..."` or `"md5:..."`.

    Raises:
      UsageError: no address answers (the message tells where to put the file by hand), the checksum differs (the part
        is removed), or the folder cannot be written.
    """
    errors = []
    try:
        if path.exists():
            return _check(path, checksum, f"delete {path} to download it again")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        for address in addresses:
            try:
                _transfer(address, part, path)
                return _publish(part, path, checksum, f"what {address} sent was removed: try again, or get it elsewhere")
            except UsageError as error:
                errors.append(error)
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror or error}); choose another data.root") from error
    raise errors[0]


def extract(archive: Path, names: dict[str, Path], sha256: dict[str, str]) -> None:
    """Extracts single files out of a .tar.gz, each under its final name only when whole and checked.

    Args:
      archive: the .tar.gz.
      names: member name -> where it goes. Nothing else is written, whatever the archive holds.
      sha256: file name -> checksum.

    Raises:
      UsageError: the archive is broken, lacks a member or holds a different one, or the folder cannot be written.
    """
    missing, again = dict(names), f"delete {archive} to have it downloaded again"
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                source = tar.extractfile(member) if member.name in missing and member.isfile() else None
                if source is None:
                    continue
                path = missing.pop(member.name)
                path.parent.mkdir(parents=True, exist_ok=True)
                part = path.with_name(path.name + ".part")
                part.write_bytes(source.read())
                _publish(part, path, f"sha256:{sha256[path.name]}", again)
    except (tarfile.TarError, EOFError) as error:
        raise UsageError(f"{archive} is not a whole .tar.gz ({error}); {again}") from error
    except OSError as error:
        raise UsageError(f"{archive} cannot be extracted ({error.strerror or error}); {again}") from error
    if missing:
        raise UsageError(f"{archive} lacks {', '.join(missing)}; {again}")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file, so that of jobs started together one downloads and the others wait.

    Raises:
      UsageError: the lock file cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(path))
        except OSError as error:
            raise UsageError(f"{path.parent} cannot be written ({error.strerror}); choose another data.root") from error
        yield


def _publish(part: Path, path: Path, checksum: str, advice: str) -> None:
    """Gives a checked part its final name; removes a wrong one."""
    try:
        _check(part, checksum, advice)
    except UsageError:
        part.unlink()
        raise
    part.replace(path)


def _check(path: Path, checksum: str, advice: str) -> None:
    kind, _, expected = checksum.partition(":")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, kind).hexdigest()
    if expected and found != expected:
        raise UsageError(f"{path.name.removesuffix('.part')} has {kind} {found}, expected {expected}; {advice}")


def _transfer(address: str, part: Path, path: Path) -> None:
    """Fills `part`, resuming as long as each connection brings something."""
    size = part.stat().st_size if part.exists() else 0
    while True:
        try:
            return _receive(address, part)
        except _NETWORK as error:
            before, size = size, part.stat().st_size if part.exists() else 0
            if size > before:
                continue
            reason = getattr(error, "reason", None) or error
            raise UsageError(
                f"{path} is missing and {address} cannot be downloaded ({reason}); get it elsewhere and put it there, "
                f"or set JDISTILL_DATA to the folder of your data sets"
            ) from error


def _receive(address: str, part: Path) -> None:
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "jdistill", **({"Range": f"bytes={have}-"} if have else {})}
    try:
        response = urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # nothing is left to send; the checksum decides
        raise
    with response:
        resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
        have = have if resumed else 0
        total = have + int(response.headers.get("Content-Length") or 0)
        with part.open("ab" if resumed else "wb") as file:
            while chunk := response.read(1 << 16):
                have += file.write(chunk)
                _progress(part.stem, have, total)
    if have < total:
        raise ConnectionError(f"connection lost at {have} of {total} bytes")


def _progress(name: str, have: int, total: int) -> None:
    if sys.stderr.isatty():
        of_total = f" of {total / 1e6:.1f}" if total else ""
        end = "\n" if have == total else ""
        print(f"\rdownloading {name}: {have / 1e6:.1f}{of_total} MB", end=end, file=sys.stderr)
