"""Downloads from a server on this machine that resumes, drops connections and lies."""

import dataclasses
import gzip
import hashlib
import http.server
import io
import os
import tarfile
import threading

import numpy as np
import pytest

from jdistill.data import download as module
from jdistill.data.download import download, extract
from jdistill.data.published import CIFAR100, MNIST, locate
from jdistill.errors import UsageError

CONTENT = np.random.default_rng(11).bytes(300_000)


def digest(data, kind="sha256"):
    return f"{kind}:{hashlib.new(kind, data).hexdigest()}"


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; `drop_after` ends every answer after so many bytes; `ranges` supports Range requests."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.drop_after, self.ranges, self.requests = {}, None, True, []

    def address(self, name=""):
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name, asked = self.path.rpartition("/")[2], self.headers.get("Range")
        self.server.requests.append((name, asked))
        if name not in self.server.files:
            return self.send_error(404)
        data = self.server.files[name]
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.server.ranges else 0
        if start and start >= len(data):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start:][: self.server.drop_after])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        running.files["file.bin"] = CONTENT
        yield running
        running.shutdown()
        thread.join()


def left_over(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock"))


@pytest.mark.parametrize("kind", ["sha256", "md5"])
def test_a_whole_download(server, tmp_path, kind):
    path = tmp_path / "new" / "file.bin"
    download([server.address("file.bin")], path, digest(CONTENT, kind))
    assert path.read_bytes() == CONTENT and left_over(tmp_path) == ["file.bin"]
    download(["http://127.0.0.1:9/never-asked"], path, digest(CONTENT, kind))


def test_dropped_connections_are_resumed_where_they_broke(server, tmp_path):
    server.drop_after = 100_000
    path = tmp_path / "file.bin"
    download([server.address("file.bin")], path, digest(CONTENT))
    assert path.read_bytes() == CONTENT and left_over(tmp_path) == ["file.bin"]
    assert [asked for _, asked in server.requests] == [None, "bytes=100000-", "bytes=200000-"]


def test_a_part_of_an_earlier_run_is_continued(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:250_000])
    download([server.address("file.bin")], tmp_path / "file.bin", digest(CONTENT))
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert server.requests == [("file.bin", "bytes=250000-")]


def test_a_part_that_is_whole_already_is_only_checked(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    download([server.address("file.bin")], tmp_path / "file.bin", digest(CONTENT))
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_a_server_without_ranges_starts_over(server, tmp_path):
    server.ranges = False
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:1000])
    download([server.address("file.bin")], tmp_path / "file.bin", digest(CONTENT))
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_a_connection_that_brings_nothing_more_gives_up_and_keeps_the_part(server, tmp_path):
    server.ranges, server.drop_after = False, 1000
    with pytest.raises(UsageError, match="connection lost at 1000 of 300000 bytes"):
        download([server.address("file.bin")], tmp_path / "file.bin", digest(CONTENT))
    assert len(server.requests) == 2 and left_over(tmp_path) == ["file.bin.part"]


@pytest.mark.parametrize("earlier", [b"", b"of another file"])
def test_a_wrong_checksum_is_one_line_and_leaves_nothing(server, tmp_path, earlier):
    if earlier:
        (tmp_path / "file.bin.part").write_bytes(earlier)
    expected = digest(b"something else" if not earlier else CONTENT)
    with pytest.raises(UsageError, match=r"file\.bin has sha256 [0-9a-f]{64}, expected [0-9a-f]{64}") as error:
        download([server.address("file.bin")], tmp_path / "file.bin", expected)
    assert "was removed" in str(error.value) and "\n" not in str(error.value) and left_over(tmp_path) == []


def test_a_present_file_with_a_wrong_checksum_is_kept_and_named(tmp_path):
    (tmp_path / "file.bin").write_bytes(b"mine")
    with pytest.raises(UsageError, match=f"delete {tmp_path}/file.bin to download it again"):
        download([], tmp_path / "file.bin", digest(CONTENT))
    assert left_over(tmp_path) == ["file.bin"]


@pytest.mark.parametrize("first", ["gone.bin", "lie.bin"])
def test_the_mirror_is_asked_when_the_publisher_fails(server, tmp_path, first):
    server.files["lie.bin"] = b"<html>moved</html>"
    download([server.address(first), server.address("file.bin")], tmp_path / "file.bin", digest(CONTENT))
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def unused_address():
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as closed:
        return f"http://127.0.0.1:{closed.server_address[1]}"


def test_offline_names_file_address_place_and_variable(tmp_path, server):
    source = dataclasses.replace(MNIST, addresses=(unused_address(),))
    wanted = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    with pytest.raises(UsageError) as error:
        locate(source, tmp_path, allow_download=True)
    message = str(error.value)
    assert message.startswith(f"{wanted} is missing and {source.addresses[0]}/{wanted.name} cannot be downloaded")
    assert "refused" in message and "JDISTILL_DATA" in message and "\n" not in message
    assert left_over(tmp_path) == []


def test_a_silent_server_is_given_up_after_the_timeout(tmp_path, monkeypatch, server):
    monkeypatch.setattr(module, "TIMEOUT", 0.2)
    monkeypatch.setattr(Handler, "do_GET", lambda self: threading.Event().wait(1))
    with pytest.raises(UsageError, match="timed out"):
        download([server.address("file.bin")], tmp_path / "file.bin", digest(CONTENT))


def test_not_found_is_an_error_with_its_code(server, tmp_path):
    with pytest.raises(UsageError, match=r"cannot be downloaded \(.*Not Found.*\)"):
        download([server.address("gone.bin")], tmp_path / "gone.bin", digest(CONTENT))


def test_a_folder_that_cannot_be_made_is_one_line(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cannot be written .* choose another data\.root"):
        download([server.address("file.bin")], tmp_path / "file" / "file.bin", digest(CONTENT))


def test_locate_downloads_only_what_is_missing(server, tmp_path):
    files = {name: gzip.compress(name.encode()) for name in MNIST.sha256}
    server.files.update(files)
    source = dataclasses.replace(
        MNIST, addresses=(server.address("data"),), sha256={n: hashlib.sha256(d).hexdigest() for n, d in files.items()}
    )
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "train-labels-idx1-ubyte.gz").write_bytes(files["train-labels-idx1-ubyte.gz"])
    folder = locate(source, tmp_path, allow_download=True)
    assert {name: (folder / name).read_bytes() for name in files} == files
    assert len(server.requests) == 3 and left_over(tmp_path) == sorted(files)


def archive(members):
    """A .tar.gz of (name, content) members, with what a hostile one could hold besides."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("cifar-100-binary/link.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return buffer.getvalue()


TRAIN, TEST = b"train rows", b"test rows"
MEMBERS = [("../outside", b"x"), ("cifar-100-binary/train.bin", TRAIN), ("cifar-100-binary/test.bin", TEST)]


def cifar(server, packed):
    server.files["cifar-100-binary.tar.gz"] = packed
    return dataclasses.replace(
        CIFAR100,
        addresses=(server.address("kriz"),),
        archive_md5=hashlib.md5(packed).hexdigest(),
        sha256={"train.bin": hashlib.sha256(TRAIN).hexdigest(), "test.bin": hashlib.sha256(TEST).hexdigest()},
    )


def test_an_archive_is_downloaded_extracted_and_removed(server, tmp_path):
    root = tmp_path / "a" / "b"
    folder = locate(cifar(server, archive(MEMBERS)), root, allow_download=True)
    assert (folder / "train.bin").read_bytes() == TRAIN and (folder / "test.bin").read_bytes() == TEST
    assert left_over(tmp_path) == ["test.bin", "train.bin"]


def test_an_archive_put_there_by_hand_needs_no_network_and_stays(server, tmp_path):
    source = cifar(server, archive(MEMBERS))
    (tmp_path / source.archive).write_bytes(archive(MEMBERS))
    source = dataclasses.replace(source, archive_md5=hashlib.md5((tmp_path / source.archive).read_bytes()).hexdigest())
    locate(source, tmp_path, allow_download=False)
    assert server.requests == [] and left_over(tmp_path) == [source.archive, "test.bin", "train.bin"]
    (tmp_path / "cifar-100-binary" / "test.bin").unlink()
    (tmp_path / source.archive).write_bytes(b"altered")
    with pytest.raises(UsageError, match=r"cifar-100-binary\.tar\.gz has md5 .* delete .* to download it again"):
        locate(source, tmp_path, allow_download=False)


def test_broken_archives_are_one_line(server, tmp_path):
    names = {"cifar-100-binary/train.bin": tmp_path / "train.bin", "cifar-100-binary/link.bin": tmp_path / "link.bin"}
    sums = cifar(server, b"").sha256
    packed, path = archive(MEMBERS), tmp_path / "a.tar.gz"
    for data, wanted, message in (
        (packed, names, "lacks cifar-100-binary/link.bin"),
        (packed[:-30], {"none": tmp_path / "none"}, "not a whole .tar.gz|cannot be extracted"),
        (b"no archive", names, "not a whole .tar.gz"),
        (archive([("cifar-100-binary/train.bin", b"other")]), names, "train.bin has sha256"),
    ):
        path.write_bytes(data)
        with pytest.raises(UsageError, match=message) as error:
            extract(path, wanted, sums)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "link.bin").exists() and not (tmp_path / "train.bin.part").exists()


def test_processes_started_together_download_once(server, tmp_path):
    source = cifar(server, archive(MEMBERS))
    threads = [threading.Thread(target=locate, args=(source, tmp_path), kwargs={"allow_download": True}) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.requests) == 1 and left_over(tmp_path) == ["test.bin", "train.bin"]


def test_progress_is_shown_on_a_terminal_only(server, tmp_path, monkeypatch, capsys):
    download([server.address("file.bin")], tmp_path / "file.bin", digest(CONTENT))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: True, raising=False)
    os.remove(tmp_path / "file.bin")
    download([server.address("file.bin")], tmp_path / "file.bin", digest(CONTENT))
    assert capsys.readouterr().err.endswith("\rdownloading file.bin: 0.3 of 0.3 MB\n")
