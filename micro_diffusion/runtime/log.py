"""A run's log: one JSON object a line, ordered by images seen."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from micro_diffusion.runtime.files import write_atomic


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; a last line that a kill cut short is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class RunLog:
    """Appends rows; opened for a run that resumes at `images`, it drops the rows that will be written again."""

    def __init__(self, path: Path, *, images: int) -> None:
        self.path, self._file = path, path.open("a")
        self.rewind(images)

    def rewind(self, images: int) -> None:
        """Drop the rows after `images`."""
        self._file.close()
        kept = [row for row in read_log(self.path) if row["images"] <= images]
        write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = self.path.open("a")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row, readable by others at once."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
