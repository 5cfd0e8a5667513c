"""What ships with the package does what the documents say of it."""

from itertools import islice
from typing import cast

import numpy as np
import torch

from micro_diffusion.data.records import decode_image
from micro_diffusion.data.sources.emoji import emoji_records
from micro_diffusion.evaluation.emoji import opinion, right
from micro_diffusion.evaluation.judges import FOLDER, Judge, load_network
from micro_diffusion.export.pipeline import MicroDiffusionPipeline
from micro_diffusion.models.autoencoders import load_autoencoder
from micro_diffusion.models.text_encoders import load_text_encoder


def test_the_autoencoder_redraws_concepts_that_it_never_saw() -> None:
    autoencoder = load_autoencoder("embedded")
    assert (autoencoder.channels, autoencoder.downscale) == (4, 8)
    records = list(islice(emoji_records(split="held_out_concept"), 0, None, 12))
    pixels = torch.from_numpy(np.stack([np.asarray(decode_image(record)) for record in records]))
    x = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    mean, std = autoencoder.encode(x)
    drawn = autoencoder.decode(mean)
    psnr = -10 * ((drawn * 255).round() / 255 - (x / 2 + 0.5)).square().mean((1, 2, 3)).log10()
    assert psnr.mean() >= 33.5
    assert 0.9 < (mean + std * torch.randn_like(std)).std() < 1.1  # the scaling factor is right


def test_captions_of_one_subject_are_closer_than_others() -> None:
    """A sanity check of the packaged text encoder: it reads words, not noise."""
    states, mask = load_text_encoder("embedded").encode(["a red apple", "a ripe red fruit", "a fast blue train"])
    means = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    apple, fruit, train = means / means.norm(dim=1, keepdim=True)
    assert states.shape[-1] == 384
    assert apple @ fruit > apple @ train + 0.1


def test_the_model_draws_what_its_captions_say_in_their_style() -> None:
    records = list(emoji_records(split="train"))
    some = records[:: len(records) // 15]
    prompts = [str(record.captions[0].text) for record in some]
    noise = torch.randn(len(some), 4, 16, 16, generator=torch.Generator().manual_seed(0))
    pictures = MicroDiffusionPipeline.from_embedded()(
        prompts, num_inference_steps=20, guidance_scale=3.0, latents=noise
    ).images  # fmt: skip
    judge = cast(Judge, load_network("judge", FOLDER))
    keys = (record.key.split("/") for record in some)
    hits = right(judge, opinion(judge, [pictures]), [{"style": style, "concept": concept} for style, concept in keys])
    assert hits["concept top-1"].sum() >= 13 and hits["both"].sum() >= 11
