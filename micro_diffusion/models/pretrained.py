"""Finding and loading parts that others trained: local folders, the hub, optional packages."""

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from safetensors import SafetensorError

from micro_diffusion.runtime.files import UserError


def part_folder(name: str, files: Sequence[str]) -> Path:
    """The local folder of a part: `name` itself, or its `files` (patterns) from the hub or the hub's cache."""
    if Path(name).is_dir():
        return Path(name)
    hub = optional_package("huggingface_hub")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=list(files)))
    except (OSError, ValueError) as error:
        raise UserError(f"There is no folder {name!r}, and the hub does not give it ({first_line(error)}).") from error


def optional_package(name: str) -> ModuleType:
    """Import a package that only this part of the program needs; UserError says how to get it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or name).replace("_", "-")
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
