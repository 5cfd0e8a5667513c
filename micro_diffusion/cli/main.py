"""The command line: one verb a file. A verb imports torch and the rest only when it runs, so that --help is quick."""

import errno
import signal
import sys
from collections.abc import Sequence

import tyro

from micro_diffusion.cli.data import Data
from micro_diffusion.cli.ema import Ema
from micro_diffusion.cli.evaluate import Evaluate
from micro_diffusion.cli.export import Export
from micro_diffusion.cli.generate import Generate
from micro_diffusion.cli.plan import Bench, Plan
from micro_diffusion.cli.prepare import Prepare
from micro_diffusion.cli.quickstart import Quickstart
from micro_diffusion.cli.runs import Runs
from micro_diffusion.cli.train import Train
from micro_diffusion.runtime.files import UserError

VERBS = {"quickstart": Quickstart, "prepare": Prepare, "data": Data, "train": Train, "runs": Runs, "ema": Ema,
         "generate": Generate, "evaluate": Evaluate, "export": Export, "plan": Plan, "bench": Bench}  # fmt: skip
DESCRIPTION = "Train a text-to-image model from scratch on a micro-budget."
DISK_FULL = "The disk is full. What was finished before is kept; free some space, then run this again."
INTERRUPTED, TERMINATED = 130, 143


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; the exit code is 0, 2 (the user can put it right), 3 (training gave up), 130 or 143 (stopped)."""
    verb = tyro.extras.subcommand_cli_from_dict(VERBS, prog="micro-diffusion", description=DESCRIPTION, args=arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        verb()
        return 0
    except UserError as error:
        message, code = str(error), error.exit_code
    except KeyboardInterrupt:
        message, code = "Stopped; the same command goes on from here.", INTERRUPTED
    except Exception as error:
        if not disk_is_full(error):
            raise
        message, code = DISK_FULL, UserError.exit_code
    print(f"micro-diffusion: {message}", file=sys.stderr)
    return code


def disk_is_full(error: BaseException | None) -> bool:
    """Whether a full disk (or quota) is behind the error; libraries wrap the system's error or only quote it."""
    while error is not None:
        told = "No space left on device" in str(error) or "Disk quota exceeded" in str(error)
        if told or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
            return True
        error = error.__cause__ or error.__context__
    return False
