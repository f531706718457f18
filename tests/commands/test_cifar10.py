"""CIFAR-10: found, downloaded, checked, and refused."""

import contextlib
import http.server
import pathlib
import socket
import tarfile
import threading
import time

import numpy as np
import pytest

import train
from support import data
from support.data import cifar10, folder


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A CIFAR-10 of ten images a file, as an unpacked folder and as an archive on a local server."""
    monkeypatch.setattr(cifar10, "BYTES", 10 * 3073)
    folder = tmp_path / "source" / cifar10.FOLDER
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        rows = rng.integers(0, 256, (10, 3073), dtype=np.uint8)
        rows[:, 0] %= 10
        rows.tofile(folder / name)
    archive = tmp_path / "source" / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, cifar10.FOLDER)
    monkeypatch.setattr(cifar10, "MD5", __import__("hashlib").md5(archive.read_bytes()).hexdigest())
    return tmp_path / "source"


@pytest.fixture
def server(cifar, monkeypatch):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=cifar)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{httpd.server_port}/cifar-10-binary.tar.gz"
        monkeypatch.setattr(cifar10, "URL", url)
        yield url
        httpd.shutdown()


def test_cifar10_is_found_unpacked_with_its_pixels_in_place(cifar):
    """Rows of a label and 3 x 32 x 32 pixels; in --data-dir itself or in its folder."""
    for where in (cifar, cifar / cifar10.FOLDER):
        assert cifar10.load(where, train=True)[0].shape == (50, 3, 32, 32)
        test, labels = cifar10.load(where, train=False)
        raw = np.fromfile(cifar / cifar10.FOLDER / "test_batch.bin", np.uint8)
        assert test.shape == (10, 3, 32, 32) and (test[0].ravel() == raw[1:3073]).all()
        assert (labels == raw[::3073]).all()
    few = dict(part="held out", data_dir=str(cifar), limit=7)
    assert data.load("cifar10", **few).labels is None
    _, labels, classes = data.load("cifar10", **few, labels=True)
    chosen = folder.chosen(10, "all", 7)
    assert labels.tolist() == raw[::3073][chosen].tolist() and classes[3:6] == [
        "cat",
        "deer",
        "dog",
    ]
    assert len(set(chosen)) == 7 and chosen != list(range(7))


def test_cifar10_is_downloaded_checked_and_unpacked_once(server, tmp_path):
    assert cifar10.load(tmp_path / "new", train=True)[0].shape == (50, 3, 32, 32)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        cifar10.FOLDER, "cifar-10-binary.tar.gz"]  # fmt: skip


def test_cifar10_that_is_cut_or_replaced_on_the_way_is_refused_and_not_kept(server, cifar, call):
    """A broken connection, or a login page in its place."""
    archive = cifar / "cifar-10-binary.tar.gz"
    for content in (archive.read_bytes()[:5000], b"<html>log in</html>"):
        archive.write_bytes(content)
        status, _, err = call(train, "--data", "cifar10", "--data-dir", "new")
        assert status == 1 and err.count("\n") == 1
        assert f"{len(content):,} bytes came, which are not the published file" in err
        assert not list(pathlib.Path("new").iterdir())


def test_cifar10_that_is_damaged_is_refused(call, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "cifar-10-binary.tar.gz").write_text("not it")
    status, _, err = call(train, "--data", "cifar10", "--data-dir", "new")
    assert status == 1 and "not the published file" in err and "delete it" in err
    folder = tmp_path / "short" / cifar10.FOLDER
    folder.mkdir(parents=True)
    (folder / "data_batch_1.bin").write_bytes(b"short")
    status, _, err = call(train, "--data", "cifar10", "--data-dir", "short")
    assert status == 1 and "5 bytes, not 30,730" in err and "delete" in err


def test_cifar10_without_a_network_names_the_three_ways_out(call, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/cifar-10-binary.tar.gz"
        monkeypatch.setattr(cifar10, "URL", url)
        status, _, err = call(train, "--data", "cifar10", "--data-dir", "new")
    assert status == 1 and err.count("\n") == 1
    assert "connect" in err and "put http" in err and "--data-dir" in err
    assert not list(pathlib.Path("new").glob("*"))


def test_cifar10_with_a_label_above_9_is_refused(cifar, call):
    path = cifar / cifar10.FOLDER / "data_batch_3.bin"
    raw = bytearray(path.read_bytes())
    raw[3073] = 10
    path.write_bytes(raw)
    status, _, err = call(train, "--data", "cifar10", "--data-dir", cifar)
    assert (
        status == 1
        and err.count("\n") == 1
        and "data_batch_3.bin: a label is not one of 0 to 9" in err
    )


class Server(http.server.BaseHTTPRequestHandler):
    """Says what it likes of a length, and sends one byte after another, without an end."""

    length, pause = "abc", 0.0

    def do_GET(self):
        self.send_response(200)
        if self.length:
            self.send_header("Content-Length", self.length)
        self.end_headers()
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(bytes(1000))
                time.sleep(self.pause)

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("length, pause, words", [
    ("abc", 0, "which are not the published file"), ("-5", 0, "which are not the published file"),
    ("9" * 30, 0, "which are not the published file"), (None, 0.01, "bytes came in"),
])  # fmt: skip
def test_a_download_has_a_limit_and_a_deadline_whatever_the_server_says(call, monkeypatch, length, pause,
                                                                        words):  # fmt: skip
    monkeypatch.setattr(cifar10, "ARCHIVE_BYTES", 100_000)
    monkeypatch.setattr(cifar10, "DEADLINE", 0.2 if pause else 60)
    handler = type("Handler", (Server,), dict(length=length, pause=pause))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        monkeypatch.setattr(
            cifar10, "URL", f"http://127.0.0.1:{httpd.server_port}/cifar-10-binary.tar.gz"
        )
        status, _, err = call(train, "--data", "cifar10", "--data-dir", "new")
        httpd.shutdown()
    assert status == 1 and err.count("\n") == 1 and words in err, err
    assert not list(pathlib.Path("new").iterdir())
