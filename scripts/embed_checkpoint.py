"""Put a finished run's model into the package: `python scripts/embed_checkpoint.py RUN`.

RUN is a run folder of `micro-diffusion train`, or one that `benchmarks/quality.py --save` left. Written are the weights
in float16 with their config.json, and the run's recipe.json and log.jsonl, into micro_diffusion/embedded/checkpoint.
"""

import argparse
import shutil
from pathlib import Path

from micro_diffusion.models.checkpoints import SHIPPED, build, read_checkpoint, write_folder
from micro_diffusion.runtime.files import UserError, atomic_folder

MOST, BESIDE = 18e6, ("recipe.json", "log.jsonl")  # bytes; files that are copied


def embed(run: Path, out: Path = SHIPPED) -> int:
    """Write the folder, whole or not at all; its size in bytes. UserError for a run that cannot ship."""
    weights, card = read_checkpoint(str(run))
    build(weights, card, where=str(run))  # they fit
    if others := {part.name.partition("?")[0] for part in (card.autoencoder, card.text_encoder)} - {"embedded"}:
        raise UserError(f"{run} needs {others.pop()}, which is not in the package; train with the embedded encoders.")
    halves = {name: tensor.half() for name, tensor in weights.items()}
    if not all(tensor.isfinite().all() for tensor in halves.values()):
        raise UserError(f"Some weights of {run} do not fit into float16.")
    if missing := [name for name in BESIDE if not (run / name).is_file()]:
        raise UserError(f"{run} has no {missing[0]}; give the run's own folder.")
    with atomic_folder(out) as temporary:
        write_folder(temporary, halves, card=card)
        for name in BESIDE:
            shutil.copyfile(run / name, temporary / name)
        size = sum(file.stat().st_size for file in temporary.iterdir())
        if size > MOST:
            raise UserError(f"The checkpoint would be {size / 1e6:.1f} MB, the package has room for {MOST / 1e6:g}.")
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=SHIPPED)
    args = parser.parse_args()
    try:
        print(f"{args.out}: {embed(args.run, args.out) / 1e6:.1f} MB")
    except UserError as error:
        raise SystemExit(f"embed_checkpoint: {error}") from None


if __name__ == "__main__":
    main()
