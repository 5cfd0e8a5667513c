"""Files that are whole or not there: atomic writes, hashes, and the error that a user can cause."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

TEMPORARY_PREFIX = ".tmp-"


class UserError(Exception):
    """Something that the user can put right; the message says what to do. The command line exits with its code."""

    exit_code = 2


@contextlib.contextmanager
def user_error(message: str, *kinds: type[Exception], told: Callable[[Exception], str] = str) -> Iterator[None]:
    """Make errors of these kinds UserErrors; `{}` in the message is what the error says, as `told` has it."""
    try:
        yield
    except kinds as error:
        raise UserError(message.replace("{}", told(error))) from error


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader, or a kill, sees the old content or the new one and nothing between."""
    with atomic_file(Path(path)) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def atomic_file(final: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `final`, whose folder is made; on success sync and rename it, on error remove it.

    With `shared`, several processes may write the same file at once.
    """
    temporary = final.with_name(f"{TEMPORARY_PREFIX}{f'{os.getpid()}-' if shared else ''}{final.name}")
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(final)
    except BaseException:
        _remove(temporary)
        raise
    sync(final.parent)


@contextlib.contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `final`; on success sync its files and rename it to `final`, on error remove it.

    What a killed run left under the temporary name is removed first. An existing `final` is replaced: it is moved aside
    for the moment between two renames, so names that are never reused (a step number) are safer than a fixed one.
    """
    aside = final.with_name(f"{TEMPORARY_PREFIX}old-{final.name}")
    with atomic_file(final) as temporary:
        _remove(temporary)
        temporary.mkdir()
        yield temporary
        for path in temporary.rglob("*"):
            sync(path)
        if final.exists():
            _remove(aside)
            final.rename(aside)
    _remove(aside)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders that a killed run left directly in `folder`."""
    for path in Path(folder).glob(f"{TEMPORARY_PREFIX}*"):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Ask the system to put a file, or a folder's list of names, on the disk. Windows cannot open folders: skipped."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
