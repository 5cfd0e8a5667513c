"""Released files, Composer's checkpoints and what is wrong with a file, by the code that hub names go through."""

import json
import os
from pathlib import Path
from typing import Any

import open_clip  # noqa: F401  (here and not in a test, which would pay for the import)
import pytest
import torch
from real_formats import (
    hub_repository,
    tiny_preset,
    write_composer,
    write_official,
    write_openclip,
    write_stable_diffusion_clip,
    write_vae,
)
from safetensors.torch import save_file

from micro_diffusion.diffusion.objectives import EDM
from micro_diffusion.models.checkpoints import HUB, OSTRIS, RELEASED, SDXL, Part, config_from_shapes, load_checkpoint
from micro_diffusion.models.dit import DiT
from micro_diffusion.models.model import LatentDiffusion, create_latent_diffusion
from micro_diffusion.models.presets import PRESETS
from micro_diffusion.models.text_encoders import DFN5B
from micro_diffusion.runtime.files import UserError

SHAPES = json.loads((Path(__file__).parents[2] / "parity/data/official_state_dict_shapes.json").read_text())
PARTS = {"autoencoder": "a", "text_encoder": "b"}


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(PRESETS, "tiny", tiny_preset)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def same(one: DiT, other: DiT) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_table_is_the_papers() -> None:
    assert {file: (each.autoencoder, each.channels, each.fid, each.geneval) for file, each in RELEASED.items()} == {
        "dit_4_channel_22M_real_only_data.pt": (SDXL, 4, 12.72, 0.46),
        "dit_4_channel_37M_real_and_synthetic_data.pt": (SDXL, 4, 12.66, 0.46),
        "dit_16_channel_37M_real_and_synthetic_data.pt": (OSTRIS, 16, 13.04, 0.40),
        "dit_4_channel_0.5B_synthetic_data.pt": (SDXL, 4, 13.26, 0.52),
    }


@pytest.mark.parametrize("model", SHAPES)
def test_sizes_come_from_the_shapes(model: str) -> None:
    shapes = SHAPES[model]
    with torch.device("meta"):
        weights = {name: torch.empty(shape) for name, shape in shapes.items()}
    from micro_diffusion.models.pos_embed import sincos_2d

    tokens, dim = shapes["pos_embed"][1:]
    scale = 2.0 if tokens == 1024 else 1.0
    weights["pos_embed"] = sincos_2d(dim, int(tokens**0.5), int(tokens**0.5), scale=scale)[None]
    config = config_from_shapes(weights, where="x")
    with torch.device("meta"):
        built = DiT(config).state_dict()
    assert {name: list(tensor.shape) for name, tensor in built.items()} == shapes
    assert config.pos_interp_scale == scale and config.text_mask == "none"


@pytest.mark.parametrize("file", RELEASED)
def test_by_its_name_from_the_hub(file: str, tmp_path: Path) -> None:
    config = tiny_preset(in_channels=RELEASED[file].channels, caption_channels=1024, pos_interp_scale=2.0)
    wanted = write_official(hub_repository(tmp_path / "hub", HUB) / file, config)
    for name in (file, file.removesuffix(".pt"), f"{HUB}/{file}"):
        found, card = load_checkpoint(name)
        assert same(found, wanted) and card.dit == config
        assert card.autoencoder == Part(RELEASED[file].autoencoder, None)
        assert card.text_encoder == Part(DFN5B, None) and card.text_length == 77
        assert card.objective == EDM(p_mean=0.0, p_std=0.6) and card.resolution == 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_local_file_of_any_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    wanted = write_official(tmp_path / "mine.pt", tiny_preset(pos_interp_scale=2.0)).to(dtype)
    torch.save(wanted.state_dict(), tmp_path / "mine.pt")
    save_file(wanted.state_dict(), tmp_path / "mine.safetensors")
    for file in ("mine.pt", "mine.safetensors"):
        found, card = load_checkpoint(str(tmp_path / file), **PARTS)
        assert same(found, wanted.float()) and card.dit.pos_interp_scale == 2.0
        assert (card.autoencoder.name, card.text_encoder.name) == ("a", "b")


def test_composers_training_checkpoint(tmp_path: Path) -> None:
    wanted = write_composer(tmp_path / "latest-rank0.pt", tiny_preset())
    assert same(load_checkpoint(str(tmp_path / "latest-rank0.pt"), **PARTS)[0], wanted)


class Code:
    """Runs a command when a pickle of it is opened."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("opened",)


def test_a_pickle_with_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_official(tmp_path / "evil.pt", tiny_preset())
    torch.save(torch.load("evil.pt") | {"x": Code()}, "evil.pt")
    torch.save({"x": Code()}, "old.pt", _use_new_zipfile_serialization=False)
    for file in ("evil.pt", "old.pt"):
        with pytest.raises(UserError, match="a pickle can run code") as caught:
            load_checkpoint(file, **PARTS)
        assert "\n" not in str(caught.value) and "mkdir" in str(caught.value)
    assert not Path("opened").exists()


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.01, 0.0])
def test_truncated_files(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "cut.pt"
    write_official(path, tiny_preset())
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(UserError, match="copy it again") as caught:
        load_checkpoint(str(path), **PARTS)
    assert "\n" not in str(caught.value)


def test_what_is_no_checkpoint_gets_one_sentence(tmp_path: Path) -> None:
    def refused(weights: Any, message: str, parts: dict[str, str] = PARTS) -> None:
        torch.save(weights, tmp_path / "bad.pt")
        with pytest.raises(UserError, match=message) as caught:
            load_checkpoint(str(tmp_path / "bad.pt"), **parts)
        assert "\n" not in str(caught.value)

    weights = DiT(tiny_preset(pos_interp_scale=2.0)).state_dict()
    refused([1, 2], "holds no state dict")
    refused({"state": {"model": 3}}, "holds no state dict")
    refused({"a": torch.zeros(1)}, "no MicroDiT checkpoint: it lacks 'x_embedder.proj.weight'")
    refused({name: tensor for name, tensor in weights.items() if name != "mask_token"}, "mask_token is missing")
    refused(weights | {"mask_token": torch.zeros(1, 1, 3)}, "mask_token has the shape .1, 1, 3., not .1, 1, 16.")
    refused(weights | {"surplus": torch.zeros(1)}, "nothing has a tensor surplus")
    refused(weights | {"pos_embed": weights["pos_embed"].flip(1)}, "positions .* are not those of square latents")
    refused(weights | {"pos_embed": weights["pos_embed"][:, :15]}, "not those of square latents")
    refused(weights, "4 latent channels and text 16 wide: name its --autoencoder and --text-encoder", {})
    refused({f"{name}": t.repeat(2, *[1] * (t.ndim - 1)) for name, t in weights.items()}, "like none of")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (HUB, "holds several models; choose one of: dit_4_channel_22M"),
        ("nothing.pt", "no file or folder nothing.pt, and no released model"),
        ("dit_4_channel_22M_real_only_data.pt", "check the name and the network"),
        ("someone/model", "check the name and the network"),
        ("someone/model-0.5B", "check the name and the network"),
        ("someone/model/file.pt", "check the name and the network"),
    ],
)
def test_names_of_nothing(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_checkpoint(name)


def test_the_papers_lines_work_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = tmp_path / "hub"
    write_vae(hub_repository(hub, SDXL) / "vae")
    whole_clip = write_openclip(hub_repository(hub, "apple/DFN5B-CLIP-ViT-H-14-378"))
    monkeypatch.chdir(tmp_path)
    released = write_official(
        tmp_path / "dit_4_channel_37M_real_and_synthetic_data.pt", tiny_preset(pos_interp_scale=2.0)
    )
    monkeypatch.setitem(PRESETS, "MicroDiT_XL_2", tiny_preset)
    monkeypatch.setattr("micro_diffusion.models.text_encoders.KNOWN_WIDTHS", {})

    model = create_latent_diffusion(latent_res=8, in_channels=4, pos_interp_scale=2.0).to("cpu")
    model.dit.load_state_dict(torch.load("dit_4_channel_37M_real_and_synthetic_data.pt"))
    prompts = ["An elegant squirrel pirate on a ship"] * 4
    images = model.generate(prompt=prompts, num_inference_steps=2, guidance_scale=5.0, seed=2024)
    assert images.shape == (4, 3, 64, 64) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1 and not torch.equal(images[0], images[1])

    # the released model by its name draws the same, and so do the paper's tokens
    named = LatentDiffusion.from_checkpoint(
        "dit_4_channel_37M_real_and_synthetic_data.pt", autoencoder=SDXL, text_encoder=DFN5B
    )
    settings: dict[str, Any] = {"num_inference_steps": 2, "seed": 2024, "return_only_latents": True}
    latents = model.generate(prompts, **settings)
    assert torch.equal(named.generate(prompts, **settings), latents)
    tokens = model.tokenizer.tokenize(prompts)
    by_tokens = model.generate(
        tokenized_prompts=tokens["input_ids"][:, None], attention_mask=tokens["attention_mask"][:, None], **settings
    )
    assert torch.equal(by_tokens, latents)
    assert whole_clip.text_projection is not None and not hasattr(model.text_encoder.model, "visual")

    # a whole model's state, as Composer keeps it: autoencoder and text tower beside the transformer
    other = create_latent_diffusion(latent_res=8, pos_interp_scale=2.0)
    state = {f"dit.{name}": tensor for name, tensor in released.state_dict().items()}
    other.load_state_dict(state | {"vae.x": torch.zeros(1), "text_encoder.encoder.y": torch.zeros(1)})
    assert same(other.dit, released)
    other.load_state_dict(model.state_dict())
    with pytest.raises(UserError, match="no ema"):
        other.load_state_dict(state | {"ema.x": torch.zeros(1)})


def test_parts_that_do_not_fit_the_model(tmp_path: Path) -> None:
    write_official(tmp_path / "mine.pt", tiny_preset())
    write_vae(tmp_path / "vae", channels=16)
    write_stable_diffusion_clip(tmp_path / "clip")
    model = LatentDiffusion.from_checkpoint(
        str(tmp_path / "mine.pt"), autoencoder=str(tmp_path / "vae"), text_encoder=str(tmp_path / "clip")
    )
    with pytest.raises(UserError, match="takes 4 latent channels, but .*vae' gives 16"):
        model.generate("a cat", num_inference_steps=1)
    with pytest.raises(UserError, match="takes 16 wide text, but .*clip' gives 20"):
        model.generate("a cat", num_inference_steps=1, return_only_latents=True)
