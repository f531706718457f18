"""support/files.py: complete files, and existing files that are moved aside."""

import errno
import os
import pathlib

import pytest

from support import files
from support.errors import Failure


def test_a_file_is_replaced_only_when_it_is_complete(tmp_path):
    """A link stays; an exception inside leaves the old content and no other file."""
    target = tmp_path / "a.pt"
    target.write_bytes(b"old")
    (tmp_path / "link.pt").symlink_to("a.pt")
    with pytest.raises(KeyboardInterrupt), files.replacing(tmp_path / "link.pt") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert target.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2
    with files.replacing(tmp_path / "link.pt") as file:
        file.write(b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    assert (tmp_path / "link.pt").is_symlink() and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("writer", [files.replacing, files.replacing_folder])
def test_a_full_disk_is_an_error_that_names_the_file_as_it_was_typed(tmp_path, monkeypatch, writer):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError) as caught, writer("new"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.filename == "new"
    assert not list(tmp_path.iterdir())


def test_a_folder_is_replaced_only_if_it_is_empty(tmp_path):
    for name in ("new", "empty"):
        if name == "empty":
            (tmp_path / name).mkdir()
        with files.replacing_folder(tmp_path / name) as folder:
            (folder / "a").touch()
        assert (tmp_path / name / "a").is_file()
    with pytest.raises(OSError), files.replacing_folder(tmp_path / "new"):
        pass
    assert (tmp_path / "new" / "a").is_file() and len(list(tmp_path.iterdir())) == 2


def test_what_cannot_be_written_is_a_failure_before_the_work_and_names_the_flag(tmp_path):
    (tmp_path / "file").touch()
    for path, words in (
        (tmp_path, "is not a file"),
        (f"{tmp_path}/new/", "is not a file"),
        (tmp_path / "nowhere" / "a.pt", "No such file or directory"),
        ("/dev/null", "is not a file"),
        (f"{tmp_path}/file/", "is not a file"),
    ):
        with pytest.raises(Failure, match=f"--log .*{words}"):
            files.writable(str(path), "--log")
    for path in (tmp_path / "file", f"{tmp_path}/file/"):
        with pytest.raises(Failure, match="is not a folder"):
            files.writable(path, folder=True)
    files.writable(str(tmp_path / "file"))
    files.writable(tmp_path / "new", folder=True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_read_only_folder_is_a_failure_before_the_work(tmp_path, monkeypatch):
    def touch(*args, **how):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(pathlib.Path, "touch", touch)
    with pytest.raises(Failure, match=r"^--out .*a\.pt: cannot be written: Read-only file system$"):
        files.writable(str(tmp_path / "a.pt"))


def test_two_paths_to_one_file_are_recognised(tmp_path):
    (tmp_path / "a.pt").touch()
    (tmp_path / "link").symlink_to("a.pt")
    assert files.same(tmp_path / "link", tmp_path / "a.pt")
    assert not files.same(tmp_path / "b.pt", tmp_path / "a.pt")


@pytest.mark.parametrize("name", ["ckpt.pt", "a", "x[1].pt", "ckpt.1.pt"])
def test_a_checkpoint_is_moved_aside_with_its_own_grids(tmp_path, name):
    """Grids are listed in the order of their epochs. No picture of another run moves."""
    out = str(tmp_path / name)
    others = {"ckpt.pt", "a", "x[1].pt", "ckpt.1.pt", "x1.pt"} - {name}
    for each in (name, *others):
        (tmp_path / each).write_text(each)
        for epoch in (2, 10, 20_000):
            pathlib.Path(files.grid_name(str(tmp_path / each), epoch)).write_text(each)
    (tmp_path / f"{out.removesuffix('.pt')}.003.png").touch()
    assert list(files.grids(out)) == [2, 10, 20_000]
    new = files.free_name(out)
    files.make_way(out)
    assert pathlib.Path(new).read_text() == name and not os.path.exists(out)
    assert [pathlib.Path(path).read_text() for path in files.grids(new).values()] == [name] * 3
    assert not files.grids(out)
    files.make_way(out)  # there is nothing to rename
    for each in others:
        paths = files.grids(str(tmp_path / each)).values()
        assert [pathlib.Path(path).read_text() for path in paths] == [each] * 3


def test_the_version_of_a_file_changes_with_every_write(tmp_path):
    path = tmp_path / "a"
    seen = {files.version(path)}
    for _ in range(3):
        with files.replacing(path) as file:
            file.write(b"same")
        seen.add(files.version(path))
    assert len(seen) == 4 and None in seen
