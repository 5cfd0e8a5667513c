"""What the paper's run takes on 1, 2, 4, 8 GPUs of one host: `python -m benchmarks.scaling --out scaling.json`.

Each case is a run of the package's own loop (`training.loop.train`) in one process a GPU: a stage of paper-37m with 256
images a GPU, on DDP, FSDP2 or hybrid sharding (in groups of half the ranks, as if the host were two). Latents and
captions are random and come from a store through the loop's feed and its workers. Nothing is left out but the first
checkpoint, the end of the stage, samples and validation: what the loop does at a row of the log (it waits, reads the
guard, looks at activations) and what a checkpoint costs are told apart from plain steps by their time, and enter the
hours of the whole run as often as paper-37m asks for them. Stages at 512 px average weights, as in most of their
length. A step is timed by events on the GPU, without a wait.

Two checkpoints are written in cases of --checkpoints stages, on one GPU and on all: the first takes pinned memory on
the host, the second finds it there, and is the one that counts. Time that it waited for the first to be on the disk is
taken off.

Compiling is most of the time. Graphs are compiled first, by one process for each stage on one GPU, with DDP and with
sharding, which differ; these run side by side on as many GPUs, --warm-at-once on each (--warm, --only-warm). Each
process sees its own GPU alone, as the first: a graph's name in Inductor's cache has the number of its GPU. Each row has
`first_step_seconds` and the hits and misses of the cache.

The JSON is rewritten after each case. The same command goes on where it was: cases that the file has are not measured
again. None begins after --seconds, and none goes on for longer than --case-seconds; the others are listed as left out.
With --side-by-side, cases without checkpoints run at the same time on different GPUs of the machine. With --cuda-graph
steps up to the capture are not counted.

`whole_run` has hours and dollars of paper-37m by number of GPUs and mode, where all its stages were measured, beside
what the planner says (`micro-diffusion plan paper-37m --count N`) for steps of as many images. The recipe's batches of
2,048 images are 256 a GPU on eight; on fewer GPUs they are more, and communication then costs less than was measured.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.loader import write_store
from benchmarks.scaling_case import ROW_STEPS, TEXT_LENGTH, checkpoints, row_path, work
from benchmarks.scaling_plan import PAPER, Case, completed, ordered, rounds
from micro_diffusion.models.presets import PRESETS
from micro_diffusion.runtime.distributed import join
from micro_diffusion.training.parallel import BUCKETS, UNIT

MODES = ("ddp", "fsdp", "hybrid")
LEAST = 45  # seconds; a case that has less left is not begun


def launch(case: Case, args: argparse.Namespace, gpus: Sequence[str], seconds: float) -> dict[str, Any]:
    """The row of a case, from one process a rank; what there was of it if it fails or takes too long."""
    path, run = row_path(case, args), Path(args.scratch) / f"run-{case.file}"
    path.unlink(missing_ok=True)
    shutil.rmtree(run, ignore_errors=True)  # of a benchmark that was killed: it would go on from there
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    # what torchrun would tell; a rank's own GPU is the only one that it sees, and so the first
    local = max(1, case.ranks // 2) if case.mode == "hybrid" else case.ranks
    shared = os.environ | {
        "WORLD_SIZE": str(case.ranks), "LOCAL_WORLD_SIZE": str(local), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "8"),
    }  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.scaling", *sys.argv[1:], "--case", case.name]
    command += ["--ranks", *map(str, args.ranks)]
    command += ["--warming"] if args.warming else []
    begun, ranks, trouble = time.monotonic(), list[subprocess.Popen[bytes]](), ""
    for rank in range(case.ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": "0" if args.own_gpu else str(rank)}
        if args.gpu:
            own["CUDA_VISIBLE_DEVICES"] = gpus[rank] if args.own_gpu else ",".join(gpus)
        ranks.append(subprocess.Popen(command, env=shared | own))
    while any(each.poll() is None for each in ranks) and not trouble:
        time.sleep(0.2)
        if time.monotonic() - begun > seconds:
            trouble = f"stopped after {seconds:.0f} s"
        elif codes := [each.returncode for each in ranks if each.returncode]:
            trouble = f"exit code {codes[0]}"
    trouble = trouble or next((f"exit code {each.returncode}" for each in ranks if each.returncode), "")
    for each in ranks:
        if each.poll() is None:  # its loader's workers see that, and end
            each.kill()
            each.wait()
    shutil.rmtree(run, ignore_errors=True)
    row: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if trouble and not (args.warming and row):
        row["failed"] = trouble
        path.unlink(missing_ok=True)
    row["case_seconds"] = round(time.monotonic() - begun, 1)
    told = {key: value for key, value in row.items() if key not in ("all_step_seconds", "machine")}
    print(f"{'warming ' * args.warming}{case.name}: {json.dumps(told)}", flush=True)
    return row


def measure_all(args: argparse.Namespace) -> None:
    begun, gpus = time.monotonic(), args.gpus
    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"cases": {}}
    result |= {"preset": args.preset, "images_a_gpu": args.batch, "rows": args.rows, "row_steps": ROW_STEPS}
    cases = ordered(args.stages, args.ranks, args.modes)
    Path(args.scratch).mkdir(parents=True, exist_ok=True)
    if not (store := Path(args.scratch) / "store").exists():
        unfinished = store.with_name("store-unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        write_store(unfinished, rows=args.rows, tokens=TEXT_LENGTH, resolutions=(256, 512), dtype="float16")
        unfinished.rename(store)
        print(f"store: {time.monotonic() - begun:.0f} s", flush=True)

    def left() -> float:
        return args.seconds - (time.monotonic() - begun)

    def missing() -> list[Case]:
        rows = result["cases"]
        return [case for case in cases if case.name not in rows or "failed" in rows[case.name]]

    def together(some: Sequence[Case], asked: argparse.Namespace, places: Sequence[str]) -> dict[str, dict[str, Any]]:
        free, starts = list(places), []
        with ThreadPoolExecutor(len(some)) as pool:
            for case in some:
                starts.append(pool.submit(launch, case, asked, free[: case.ranks], min(args.case_seconds, left())))
                free = free[case.ranks :]
            return {case.name: start.result() for case, start in zip(some, starts, strict=True)}

    def write() -> None:
        result["left_out"] = [case.name for case in missing()]
        args.out.write_text(json.dumps(completed(result, args.price), indent=2) + "\n")

    if args.warm and args.compile:
        asked = argparse.Namespace(**vars(args) | {"warming": True})
        like = {"hybrid": "fsdp"} | ({"ddp": "fsdp", "single": "fsdp"} if args.units else {})

        def cold(cases: Sequence[Case]) -> list[Case]:
            """One for all that compile the same."""
            kinds = dict.fromkeys((case.stage, like.get(case.mode, case.mode)) for case in cases)
            return [
                case for case in (Case(stage, 1, mode) for stage, mode in kinds) if not row_path(case, asked).exists()
            ]

        places, every = gpus * args.warm_at_once, cold(missing())
        if args.side_by_side and len(every) > len(places):  # cases of one GPU compile as well themselves
            every = cold([case for case in missing() if case.ranks > 1])
        for some in rounds(every, len(places), alone=lambda case: False):
            if left() > LEAST:
                for name, row in together(some, asked, places).items():
                    result.setdefault("warming", {})[name] = row
                write()
    if args.only_warm:
        return
    for some in rounds(missing(), len(gpus), alone=lambda case: not args.side_by_side or checkpoints(case, args)):
        if left() < LEAST:
            break
        for name, row in together(some, args, gpus).items():
            result["machine"] = row.pop("machine", result.get("machine", {}))
            result["cases"][name] = row | ({"beside": len(some) - 1} if len(some) > 1 else {})
        write()
        print(f"{time.monotonic() - begun:.0f} s since the start", flush=True)
    write()
    print(f"left out: {', '.join(result['left_out']) or 'nothing'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; rewritten after each case")
    parser.add_argument("--stages", nargs="+", default=list(PAPER), choices=PAPER, metavar="PIXELS:MASK")
    parser.add_argument("--ranks", nargs="+", type=int, help="default: 1, 2, 4, 8, as far as there are GPUs")
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--checkpoints", nargs="*", choices=PAPER, help="stages that write two; default: the first one")
    parser.add_argument("--preset", choices=PRESETS, help="default: MicroDiT_XL_2, or MicroDiT_Nano_4 without a GPU")
    parser.add_argument("--batch", type=int, help="images of a step on each GPU; default: 256, or 8 without a GPU")
    parser.add_argument("--micro-batch", type=int, help="default: the recipe's, by stage")
    parser.add_argument("--window", type=float, default=12, help="seconds of steps to measure")
    parser.add_argument("--seconds", type=float, default=540, help="all of it; cases that do not fit are left out")
    parser.add_argument("--case-seconds", type=float, default=300, help="of one case")
    parser.add_argument("--price", type=float, help="dollars for an hour of a GPU; default: typical of it")
    parser.add_argument("--rows", type=int, default=4096, help="of the store")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction)
    parser.add_argument("--warm", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--warm-at-once", type=int, default=1, help="processes on a GPU while they compile")
    parser.add_argument("--only-warm", action="store_true", help="compile, and measure nothing yet")
    parser.add_argument("--own-gpu", action=argparse.BooleanOptionalAction, default=True,
                        help="each process sees its GPU alone, and shares what others compiled")  # fmt: skip
    parser.add_argument("--side-by-side", action="store_true")
    parser.add_argument(
        "--buckets", type=int, default=BUCKETS, help="all-reduces of a step of DDP; default: %(default)s"
    )
    parser.add_argument(
        "--scratch", default="/tmp/scaling-benchmark", help="store, rows and checkpoints; the store stays"
    )
    parser.add_argument("--cuda-graph", action="store_true", help="each step is replayed as one CUDA graph")
    parser.add_argument(
        "--units", action="store_true", help="DDP and one GPU compile by units of a few blocks, as FSDP2"
    )
    parser.add_argument("--unit", type=int, default=UNIT, help="blocks of a unit; default: %(default)s")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--warming", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    # counted without a context on a GPU, whose memory the ranks need
    visible, count = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    args.gpu = count > 0
    args.gpus = (visible.split(",") if visible else list(map(str, range(count)))) if count else ["cpu"] * 8
    args.ranks = args.ranks or [ranks for ranks in (1, 2, 4, 8) if ranks <= count] or [1, 2]
    if not (args.case or args.only_warm) and max(args.ranks) > len(args.gpus):
        parser.error(f"there are {len(args.gpus)} GPUs")
    args.preset = args.preset or ("MicroDiT_XL_2" if args.gpu else "MicroDiT_Nano_4")
    args.batch = args.batch or (256 if args.gpu else 8)
    args.compile = args.gpu if args.compile is None else args.compile
    args.checkpoints = args.stages[:1] if args.checkpoints is None else args.checkpoints
    if not args.case:
        measure_all(args)
        return
    with join("auto", timeout=max(60.0, args.case_seconds)) as world:
        work(Case.named(args.case), args, world)


if __name__ == "__main__":
    main()
