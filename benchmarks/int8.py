"""What int8 caption states change: the states themselves, and the validation loss of a trained model; JSON on stdout.

    python -m benchmarks.int8 --store STORE --run RUN

The store holds float16 states; each is put through `quantise` and back. The loss is the run's objective on every
held-out picture at `--draws` noise levels, the same noise for both.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from micro_diffusion.data.loader import Loader
from micro_diffusion.data.store import Store, quantise
from micro_diffusion.models.dit import conditioned
from micro_diffusion.models.model import LatentDiffusion
from micro_diffusion.runtime.random import draw_normal


def through_int8(text: torch.Tensor) -> torch.Tensor:
    """States as a reader of an int8 store sees them."""
    rows = text.reshape(-1, text.shape[-1]).half().numpy()
    small, scales = quantise(rows)
    return torch.from_numpy(small.astype(np.float32) * scales[:, None].astype(np.float32)).reshape(text.shape)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=8)
    args = parser.parse_args()
    store, model = Store.open(args.store), LatentDiffusion.from_checkpoint(str(args.run), device="cpu")
    (name,) = store.info.text_encoders
    loader = Loader(
        [store], resolution=max(store.info.resolutions), text_encoder=name, seed=0, split="validation",
        text_length=model.text_length,
    )  # fmt: skip
    batch = loader.rows(range(len(loader)))
    small = through_int8(batch.text)
    real, near = batch.text[batch.text_mask], small[batch.text_mask]
    losses: dict[str, list[float]] = {"float16": [], "int8": []}
    for draw in range(args.draws):
        positions = torch.arange(len(batch.latents)) + draw * len(batch.latents)
        levels = model.objective.noise_level(draw_normal(0, "sigma", positions))
        noise = draw_normal(0, "noise", positions, tuple(batch.latents.shape[1:]))
        for kind, text in (("float16", batch.text), ("int8", small)):
            network = conditioned(model.dit, text, batch.text_mask, precision="float32")
            terms = model.objective.loss(network, batch.latents, levels, noise, patch_size=model.dit.config.patch_size)
            losses[kind].append(float(terms.mean))
    print(
        json.dumps(
            {
                "pictures": len(batch.latents),
                "tokens": len(real),
                "relative_error_of_a_state": float(((real - near).norm(dim=1) / real.norm(dim=1)).mean()),
                "cosine": float(torch.cosine_similarity(real, near).mean()),
                **{f"loss_{kind}": float(np.mean(values)) for kind, values in losses.items()},
                "loss_change": float(np.mean(losses["int8"]) / np.mean(losses["float16"]) - 1),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
