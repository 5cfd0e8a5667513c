"""Small random parts in the real on-disk formats: a text encoder, an autoencoder, a transformer's configuration."""

from dataclasses import replace
from pathlib import Path

import torch

from micro_diffusion.models.dit import DiTConfig
from micro_diffusion.models.presets import PRESETS

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "green", "apple", "cat", ",", "in", "style"]
TEXT_WIDTH, MAX_LENGTH, CHANNELS, DOWNSCALE = 16, 12, 3, 4


def write_text_encoder(folder: Path) -> Path:
    """A BERT with a vocabulary of a few words, in transformers format."""
    from transformers import BertConfig, BertModel

    folder.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(WORDS), hidden_size=TEXT_WIDTH, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=MAX_LENGTH,
        )  # fmt: skip
        BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    return folder


def write_autoencoder(folder: Path) -> Path:
    """An AutoencoderKL with scale and shift, in diffusers format."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8), norm_num_groups=4, latent_channels=CHANNELS,
            scaling_factor=0.5, shift_factor=0.25,
        ).save_pretrained(folder)  # fmt: skip
    return folder


def dit_config(*, input_size: int | tuple[int, int] = 8, text_mask: str = "padding") -> DiTConfig:
    """A transformer that fits the two: two backbone blocks behind one of the mixer."""
    return replace(
        PRESETS["MicroDiT_Nano_4"](in_channels=CHANNELS, caption_channels=TEXT_WIDTH, text_mask=text_mask),
        input_size=input_size, dim=32, depth=2, head_dim=16, multiple_of=16, patch_mixer_dim=32, patch_mixer_depth=1,
        qkv_multipliers=(0.5, 1.0), ffn_multipliers=(0.5, 4.0),
    )  # fmt: skip
