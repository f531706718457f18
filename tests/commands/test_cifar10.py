"""support/data/cifar10.py: found, downloaded and checked."""

import hashlib
import http.server
import pathlib
import socket
import tarfile
import threading

import numpy as np
import pytest

from support import data
from support.data import cifar10
from support.errors import Failure


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A CIFAR-10 with ten images per file, unpacked and as an archive."""
    monkeypatch.setattr(cifar10, "BYTES", 10 * 3073)
    folder = tmp_path / "source" / cifar10.FOLDER
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in cifar10.TRAINING + cifar10.TEST:
        rows = rng.integers(0, 256, (10, 3073), dtype=np.uint8)
        rows[:, 0] %= 10
        rows.tofile(folder / name)
    archive = tmp_path / "source" / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, cifar10.FOLDER)
    monkeypatch.setattr(cifar10, "MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    return tmp_path / "source"


@pytest.fixture
def server(cifar, monkeypatch):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=cifar)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{httpd.server_port}/cifar-10-binary.tar.gz"
        monkeypatch.setattr(cifar10, "URL", url)
        yield url
        httpd.shutdown()


def test_labels_and_pixels_are_those_of_the_rows(cifar):
    """A row is a label and 3 x 32 x 32 pixels. The folder may be --data-dir itself or lie in it."""
    for where in (cifar, cifar / cifar10.FOLDER):
        assert cifar10.load(where, train=True)[0].shape == (50, 3, 32, 32)
        images, labels = cifar10.load(where, train=False)
        raw = np.fromfile(cifar / cifar10.FOLDER / "test_batch.bin", np.uint8).reshape(10, 3073)
        assert (images.reshape(10, -1) == raw[:, 1:]).all() and (labels == raw[:, 0]).all()


def test_the_test_images_are_held_out(cifar):
    training, held = data.load("cifar10", str(cifar), labels=True)
    assert np.array_equal(training.images[:], cifar10.load(cifar, train=True)[0])
    assert np.array_equal(held.images[:], cifar10.load(cifar, train=False)[0])
    assert training.classes[3:6] == ["cat", "deer", "dog"]
    assert data.load("cifar10", str(cifar))[0].labels is None
    assert np.array_equal(data.read("cifar10", str(cifar), None)[0].images, held.images[:])


def test_a_limit_is_a_seeded_choice_with_every_class(cifar):
    plain = data.load("cifar10", str(cifar), limit=12)[0]
    assert plain.images.places.tolist() == sorted(np.random.default_rng(0).permutation(50)[:12])
    for limit in (10, 12, 30):
        few = data.load("cifar10", str(cifar), labels=True, limit=limit)[0]
        assert len(few.images) == limit and (few.labels.bincount(minlength=10) > 0).all()


def test_the_archive_is_downloaded_checked_and_unpacked(server, tmp_path):
    assert cifar10.load(tmp_path / "new", train=True)[0].shape == (50, 3, 32, 32)
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == [cifar10.FOLDER, "cifar-10-binary.tar.gz"]


def test_a_download_of_something_else_is_rejected(server, cifar, tmp_path):
    (cifar / "cifar-10-binary.tar.gz").write_text("<html>log in</html>")
    with pytest.raises(Failure, match=r"cifar-10-binary.tar.gz: its MD5 is not .*; delete it"):
        cifar10.load(tmp_path / "new", train=True)
    assert not (tmp_path / "new" / cifar10.FOLDER).exists()


def test_a_damaged_file_is_named(cifar):
    path = cifar / cifar10.FOLDER / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Failure, match=r"data_batch_3.bin: damaged; delete"):
        cifar10.load(cifar, train=True)


def test_without_a_network_the_message_names_two_ways_out(tmp_path, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/cifar-10-binary.tar.gz"
        monkeypatch.setattr(cifar10, "URL", url)
        with pytest.raises(
            Failure, match=r"cannot download .*; save http.*, or name .* --data-dir"
        ):
            cifar10.load(tmp_path, train=True)
    assert not list(pathlib.Path(tmp_path).iterdir())


def test_the_python_version_is_mentioned(server, tmp_path, capsys):
    (tmp_path / "new" / "cifar-10-batches-py").mkdir(parents=True)
    cifar10.load(tmp_path / "new", train=True)
    assert "CIFAR-10 for Python, but the binary version" in capsys.readouterr().err
