"""Exit codes and one clear sentence for what a user can put right."""

import errno
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from micro_diffusion.cli import main as cli
from micro_diffusion.cli.generate import Generate
from micro_diffusion.runtime.files import UserError


@pytest.fixture(autouse=True)
def _keep_signal_handler() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def run(monkeypatch: pytest.MonkeyPatch, error: BaseException | None) -> int:
    def call(self: Generate) -> None:
        if error:
            raise error

    monkeypatch.setattr(Generate, "__call__", call)
    return cli.main(["generate", "--model", "x", "a cat"])


def test_help_and_arguments_need_neither_torch_nor_pillow() -> None:
    code = "import sys, micro_diffusion.cli.main; print(sorted({'torch', 'PIL', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in ("quickstart", "prepare", "train", "generate", "plan", "bench"))


def test_unknown_setting_is_answered_with_the_nearest_known_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", "--model", "x", "--guidanse", "3"])
    assert stopped.value.code == 2
    assert "--guidance" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (None, 0, ""),
        (UserError("Give a folder."), 2, "micro-diffusion: Give a folder.\n"),
        (KeyboardInterrupt(), 130, "Stopped"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 2, "disk is full"),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), 2, "disk is full"),
    ],
)
def test_exit_codes(
    error: BaseException | None,
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, error) == code
    shown = capsys.readouterr().err
    assert words in shown and shown.count("\n") <= 1 and "Traceback" not in shown


def test_a_full_disk_is_found_behind_other_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    outer = RuntimeError("checkpoint failed")
    outer.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert run(monkeypatch, outer) == 2


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), OSError(errno.EACCES, "not allowed")])
def test_an_unexpected_error_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(type(error)):
        run(monkeypatch, error)


def test_sigterm_ends_with_143(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(self: Generate) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Generate, "__call__", call)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", "--model", "x", "a cat"])
    assert stopped.value.code == 143
