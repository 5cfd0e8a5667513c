"""Finding and loading parts that others trained: local folders, the hub, pickles, optional packages."""

import contextlib
import datetime
import hashlib
import importlib
import os
import zipfile
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from micro_diffusion.runtime.files import UserError, sha256

Groups = Sequence[Sequence[str]]
HUB = "https://huggingface.co"
PACKAGES = {"open_clip": "open_clip_torch"}  # where the name to install is not the one to import

# What Composer's training checkpoints hold besides tensors: times and the state of numpy's generator. Plain data.
_ARRAY: Any = np.zeros(0).__reduce__()[0]
HARMLESS: list[Any] = [datetime.timedelta, np.ndarray, np.dtype, np.dtypes.UInt32DType]
HARMLESS += [(_ARRAY, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]


def part_folder(name: str, files: Sequence[str], *, weights: Groups = ((),), subfolder: str = "") -> Path:
    """The local folder of a part: `name` itself, or its `files` (patterns) from the hub or the hub's cache.

    `weights` are groups of patterns; the first group of which the hub has anything is fetched too. The part may lie in
    a `subfolder`, as in a pipeline: that is returned if it is there.
    """
    root, places = Path(name), ("", f"{subfolder}/") if subfolder else ("",)
    if not root.is_dir():
        hub = optional_package("huggingface_hub")
        for group in weights:
            wanted = [place + pattern for place in places for pattern in group]
            patterns = [*(place + file for place in places for file in files), *wanted]
            with _from_hub(name, " and ".join([*group[:1], f"the small files of {HUB}/{name}"])):
                root = Path(hub.snapshot_download(name, allow_patterns=patterns))
            found = [path.relative_to(root).as_posix() for path in root.rglob("*")]
            if any(fnmatch(path, pattern) for path in found for pattern in wanted):
                break
    return root / subfolder if (root / subfolder).is_dir() else root


def weight_files(part: str, folder: Path, groups: Groups) -> list[Path]:
    """The weights of the first group of patterns that the folder has; UserError if it has none."""
    for group in groups:
        patterns = [pattern for pattern in group if not pattern.endswith(".json")]  # an index of shards is no weights
        if found := [path for pattern in patterns for path in sorted(folder.glob(pattern))]:
            return found
    raise UserError(f"The {part} has no file {groups[0][0]} in {folder}; choose one that has.")


def hub_file(repository: str, file: str) -> Path:
    """One file of a repository, from the hub or the hub's cache."""
    hub = optional_package("huggingface_hub")
    with _from_hub(f"{repository}/{file}", f"{HUB}/{repository}/resolve/main/{file}"):
        return Path(hub.hf_hub_download(repository, file))


@contextlib.contextmanager
def _from_hub(name: str, address: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # of network, name, permission and cache alike
        raise UserError(
            f"There is no folder {name!r}, and the hub does not give it ({first_line(error)}); check the name and the "
            f"network, or download {address} elsewhere and give its place."
        ) from error


def load_tensors(path: Path) -> Any:
    """What a .safetensors file holds, or any other by `load_pickle`; mapped from the file. UserError if damaged."""
    try:
        return load_file(path) if path.suffix == ".safetensors" else load_pickle(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); copy it again.") from error


def load_pickle(path: Path) -> Any:
    """What `torch.save` wrote, tensors mapped from the file. Runs no code: UserError if it is not plain data."""
    try:
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except UnpicklingError as error:
        raise UserError(
            f"{path} is no file of tensors alone, and no other is opened: a pickle can run code ({_asked(error)}). "
            "If you trust it, load it where it was made and save its state_dict() alone."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); copy it again.") from error


def _asked(error: UnpicklingError) -> str:
    """What the pickle asked for, out of torch's long message."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line.split(". ")[0] for line in lines if "GLOBAL" in line or "global" in line), lines[0])


def weights_sha256(files: Sequence[Path]) -> str:
    """The hash of a weights file; of several, the hash of their hashes."""
    hashes = [sha256(file) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def cache_folder() -> Path:
    """Where what was made of downloads is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "micro-diffusion")


def optional_package(name: str) -> ModuleType:
    """Import a package that only this part of the program needs; UserError says how to get it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        absent = error.name or name
        missing = PACKAGES.get(absent, absent.replace("_", "-"))
        raise UserError(f"The package {missing} is missing; install it with: pip install {missing}") from error


@contextlib.contextmanager
def loading(part: str, *, library: str) -> Iterator[ModuleType]:
    """Yield transformers or diffusers with its progress bars and warnings off; what fails inside is a UserError."""
    package, messages = optional_package(library), optional_package(f"{library}.utils.logging")
    verbosity, bars = messages.get_verbosity(), messages.is_progress_bar_enabled()
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    try:
        yield package
    except (ImportError, OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"The {part} does not load ({first_line(error)}).") from error
    finally:
        messages.set_verbosity(verbosity)
        if bars:
            messages.enable_progress_bar()


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its kind, to quote in a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
