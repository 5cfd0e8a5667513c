import hashlib

import pytest

from micro_diffusion.runtime.files import atomic_folder, remove_leftovers, sha256, write_atomic


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path):
    write_atomic(tmp_path / "a", "old")
    write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


def test_write_atomic_keeps_the_old_file_on_error(tmp_path):
    write_atomic(tmp_path / "a", "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(tmp_path / "a", "\udc80")
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_atomic_folder_appears_whole(tmp_path):
    final = tmp_path / "deep" / "final"
    with atomic_folder(final) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_text("x")
        assert not final.exists()
    assert (final / "inner" / "file").read_text() == "x"
    assert names(final.parent) == ["final"]


def test_atomic_folder_leaves_nothing_on_error(tmp_path):
    def interrupted():
        with atomic_folder(tmp_path / "final") as temporary:
            (temporary / "file").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == []


def test_atomic_folder_replaces_an_old_one_and_what_a_kill_left(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "old").write_text("x")
    (tmp_path / ".tmp-final").mkdir()
    (tmp_path / ".tmp-final" / "half").write_text("x")
    with atomic_folder(tmp_path / "final") as temporary:
        (temporary / "new").write_text("x")
    assert names(tmp_path) == ["final"]
    assert names(tmp_path / "final") == ["new"]


def test_remove_leftovers(tmp_path):
    (tmp_path / ".tmp-folder").mkdir()
    (tmp_path / ".tmp-folder" / "file").write_text("x")
    (tmp_path / ".tmp-file").write_text("x")
    (tmp_path / "kept").write_text("x")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["kept"]
