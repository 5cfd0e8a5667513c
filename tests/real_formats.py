"""Small random models in the on-disk formats of the published ones, and a hub cache to find them in."""

import collections
import datetime
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from micro_diffusion.models.dit import DiT, DiTConfig
from micro_diffusion.models.presets import Preset

BYTES = [chr(code) for code in range(ord("!"), ord("~") + 1)]


def hub_repository(cache: Path, name: str) -> Path:
    """An empty snapshot of `name` in a hub cache, to be filled."""
    repository = cache / f"models--{name.replace('/', '--')}"
    revision = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    return snapshot


def seeded(make: Callable[[], Any]) -> Any:
    """A model with the same random weights at every call; none is zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.2)
        return model


def write_vae(
    folder: Path, *, channels: int = 4, scaling: float = 0.13025, shift: float | None = None, blocks: int = 4
) -> Any:
    """An AutoencoderKL as of SDXL (4 channels), Ostris (16) or FLUX (16, with a shift)."""
    from diffusers import AutoencoderKL

    model = seeded(
        lambda: AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks,
            block_out_channels=(8,) * blocks, norm_num_groups=4, latent_channels=channels, layers_per_block=1,
            scaling_factor=scaling, shift_factor=shift,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    return model


def write_dc_ae(folder: Path) -> Any:
    """An AutoencoderDC: 32 times down, no posterior."""
    from diffusers import AutoencoderDC

    model = seeded(
        lambda: AutoencoderDC(
            latent_channels=32, attention_head_dim=4, scaling_factor=0.41407,
            encoder_block_types="ResBlock", decoder_block_types="ResBlock",
            encoder_block_out_channels=(32,) * 6, decoder_block_out_channels=(32,) * 6,
            encoder_layers_per_block=(1,) * 6, decoder_layers_per_block=(1,) * 6,
            encoder_qkv_multiscales=((),) * 6, decoder_qkv_multiscales=((),) * 6,
            decoder_norm_types="rms_norm", decoder_act_fns="silu",
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    return model


def write_openclip(folder: Path, *, quick_gelu: bool = True, own_tokenizer: bool = False, safe: bool = False) -> Any:
    """A whole CLIP, vision tower included, as one file with OpenCLIP's configuration; returns OpenCLIP's own model."""
    import open_clip
    from safetensors.torch import save_file

    config: dict[str, Any] = {
        "embed_dim": 12,
        "quick_gelu": quick_gelu,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }
    if own_tokenizer:
        write_clip_tokenizer(folder, length=20)
        config["text_cfg"] |= {"context_length": 20, "vocab_size": 300, "hf_tokenizer_name": "example/model"}
    model = seeded(lambda: open_clip.CLIP(**config)).eval()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    if safe:
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    else:
        torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return model


def write_clip_tokenizer(folder: Path, *, length: int = 77) -> None:
    """A CLIP tokenizer whose words are single letters."""
    from transformers import CLIPTokenizer

    tokens = [*BYTES, *(f"{letter}</w>" for letter in BYTES), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=length).save_pretrained(folder)


def write_stable_diffusion_clip(folder: Path, *, length: int = 24) -> Any:
    """A pipeline folder with `text_encoder` and `tokenizer`, as of Stable Diffusion."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=300, hidden_size=20, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=length, hidden_act="quick_gelu", eos_token_id=189, bos_token_id=188,
    )  # fmt: skip
    model = seeded(lambda: CLIPTextModel(config)).eval()
    model.save_pretrained(folder / "text_encoder")
    write_clip_tokenizer(folder / "tokenizer", length=length)
    return model


def write_word_tokenizer(folder: Path, *, pad: str | None = "<pad>", length: int = 64) -> None:
    """A tokenizer of words with an end token, as T5's and SigLIP's sentence pieces have."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", "a", "red", "green", "apple", "cat", ",", "in", "style"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token="</s>", unk_token="<unk>", model_max_length=length,
        padding_side="left",
    ).save_pretrained(folder)  # fmt: skip


def write_sentence_pieces(folder: Path) -> None:
    """T5's tokenizer as it was published: a SentencePiece model and no tokenizer.json."""
    import sentencepiece

    model = io.BytesIO()
    sentences = ["a red apple", "a green cat, in style", "an elegant squirrel pirate on a ship"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, vocab_size=28, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        minloglevel=2,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(model.getvalue())
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "T5Tokenizer", "model_max_length": 512, "extra_ids": 0} | names
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps(names))


def write_t5(folder: Path, *, pickled: bool = False) -> Any:
    """A whole T5, encoder and decoder, with its tokenizer; `pickled` as the DeepFloyd one is, in shards of a .bin."""
    from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    whole = seeded(lambda: T5ForConditionalGeneration(config)).eval()
    whole.save_pretrained(folder)
    write_sentence_pieces(folder)
    encoder = T5EncoderModel.from_pretrained(folder).eval()
    if pickled:
        (folder / "model.safetensors").unlink()
        names = list(state := encoder.state_dict())
        shards = {"pytorch_model-00001-of-00002.bin": names[:3], "pytorch_model-00002-of-00002.bin": names[3:]}
        for file, keys in shards.items():
            torch.save({key: state[key] for key in keys}, folder / file)
        index = {"metadata": {}, "weight_map": {key: file for file, keys in shards.items() for key in keys}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return encoder


def write_siglip(folder: Path) -> Any:
    """A whole SigLIP, vision tower included."""
    from transformers import SiglipConfig, SiglipModel, SiglipTextConfig, SiglipVisionConfig

    text = SiglipTextConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, projection_size=16,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    model = seeded(lambda: SiglipModel(SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict()))).eval()
    model.save_pretrained(folder)
    write_word_tokenizer(folder, length=8)
    return model.text_model


def write_causal(folder: Path, *, kind: str) -> Any:
    """A causal model, `qwen3` or `gemma2`, whose tokenizer pads on the left and, for qwen3, has no padding token."""
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1,
        "bos_token_id": 1,
    }  # fmt: skip
    config = {"qwen3": transformers.Qwen3Config, "gemma2": transformers.Gemma2Config}[kind](**sizes)
    whole = seeded(lambda: transformers.AutoModelForCausalLM.from_config(config)).eval()
    whole.save_pretrained(folder)
    write_word_tokenizer(folder, pad=None if kind == "qwen3" else "<pad>")
    return whole.model


tiny_preset = Preset(
    "A model size for `PRESETS`, so that files of this size are recognised.",
    dim=32, depth=2, mixer_dim=32, mixer_depth=1, head_dim=16, patch_size=2, multiple_of=16, num_experts=2,
    input_size=8, caption_channels=16,
)  # fmt: skip


def write_official(path: Path, config: DiTConfig) -> DiT:
    """A released file: a flat state dict."""
    dit: DiT = seeded(lambda: DiT(config))
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dit.state_dict(), path)
    return dit


def write_composer(path: Path, config: DiTConfig) -> DiT:
    """A training checkpoint as Composer writes it: the whole model among times, random states and an optimizer."""
    dit: DiT = seeded(lambda: DiT(config))
    weights = {f"dit.{name}": tensor for name, tensor in dit.state_dict().items()}
    beside = {
        "vae.encoder.conv_in.weight": torch.zeros(2),
        "text_encoder.encoder.clip_model.logit_scale": torch.ones(()),
    }
    timestamp = {"epoch": 1, "batch": 10, "total_wct": datetime.timedelta(seconds=5)}
    content = {
        "state": {
            "model": collections.OrderedDict(weights | beside),
            "optimizers": {"AdamW": {"state": {}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}]}},
            "timestamp": {"Timestamp": timestamp},
            "run_name": "example",
        },
        "rng": [{"python": random.Random(0).getstate(), "numpy": np.random.RandomState(0).get_state()}],
    }  # fmt: skip
    torch.save(content, path)
    return dit


def write_inception(path: Path) -> None:
    """torch-fidelity's Inception in its own format, with weights whose features are neither zero nor huge."""
    from unittest import mock

    from torch_fidelity import feature_extractor_inceptionv3 as library

    network = library.FeatureExtractorInceptionV3
    with mock.patch.object(library, "load_state_dict_from_url"), mock.patch.object(network, "load_state_dict"):
        model = seeded(lambda: network("inception-v3-compat", ["2048"]))
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, generator=generator)
    torch.save(model.state_dict(), path)


def write_clip(folder: Path, *, size: int = 32) -> Any:
    """A whole CLIP in transformers format, with tokenizer and image processor; pictures of `size` are four patches."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    text = {
        "vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 24, "eos_token_id": 189, "bos_token_id": 188, "projection_dim": 12,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": size, "patch_size": size // 2, "projection_dim": 12,
    }  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    model = seeded(lambda: CLIPModel(config)).eval()
    model.save_pretrained(folder)
    write_clip_tokenizer(folder, length=24)
    CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(folder)
    return model


def write_dinov2(folder: Path) -> Any:
    """A DINOv2 whose pictures are four patches."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=112, mlp_ratio=2
    )
    model = seeded(lambda: Dinov2Model(config)).eval()
    model.save_pretrained(folder)
    mean, deviation = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    BitImageProcessor(size={"shortest_edge": 256}, image_mean=mean, image_std=deviation).save_pretrained(folder)
    return model
