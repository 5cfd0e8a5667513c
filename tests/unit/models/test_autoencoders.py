"""Autoencoders: small random ones of each kind on disk, against diffusers itself."""

import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from real_formats import hub_repository, write_dc_ae, write_vae
from safetensors.torch import load_file, save_file
from tiny_parts import write_autoencoder

from micro_diffusion.models import autoencoders
from micro_diffusion.models.autoencoders import FILE, load_autoencoder
from micro_diffusion.runtime.files import UserError, sha256


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_autoencoder(tmp_path / "autoencoder")


def test_agrees_with_diffusers(folder: Path) -> None:
    ours, theirs = load_autoencoder(str(folder)), AutoencoderKL.from_pretrained(folder)
    assert (ours.channels, ours.downscale, ours.scaling_factor, ours.shift_factor) == (3, 4, 0.5, 0.25)
    assert ours.sha256 == sha256(folder / FILE)

    images = torch.rand(2, 3, 16, 24) * 2 - 1
    mean, std = ours.encode(images)
    posterior = theirs.encode(images).latent_dist
    assert mean.shape == (2, 3, 4, 6)
    torch.testing.assert_close(mean, (posterior.mean - 0.25) * 0.5)
    torch.testing.assert_close(std, posterior.std * 0.5)

    decoded = ours.decode(mean)
    assert decoded.shape == images.shape and decoded.min() >= 0 and decoded.max() <= 1
    torch.testing.assert_close(decoded, (theirs.decode(posterior.mean).sample / 2 + 0.5).clamp(0, 1))
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_chunks_change_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    autoencoder = load_autoencoder(str(folder))
    images = torch.rand(5, 3, 16, 16)
    mean, decoded = autoencoder.encode(images).mean, autoencoder.decode(torch.randn(0, 3, 4, 4).new_ones(5, 3, 4, 4))
    monkeypatch.setitem(autoencoders.PIXELS_AT_ONCE, "cpu", 2 * 16 * 16)
    torch.testing.assert_close(autoencoder.encode(images).mean, mean)
    torch.testing.assert_close(autoencoder.decode(torch.ones(5, 3, 4, 4)), decoded)


def test_low_precision_weights_give_float32_latents(folder: Path) -> None:
    autoencoder = load_autoencoder(str(folder), dtype=torch.bfloat16)
    mean, std = autoencoder.encode(torch.rand(1, 3, 16, 16))
    assert {mean.dtype, std.dtype, autoencoder.decode(mean).dtype} == {torch.float32}


def test_pipeline_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    folder.rename(tmp_path / "pipeline" / "vae")
    assert load_autoencoder(str(tmp_path / "pipeline")).channels == 3


def test_bad_folders_get_one_sentence(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no folder 'no/such-autoencoder'"):
        load_autoencoder("no/such-autoencoder")
    with pytest.raises(UserError, match="no file diffusion_pytorch_model.safetensors"):
        load_autoencoder(str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "diffusers", None)
        with pytest.raises(UserError, match="pip install diffusers"):
            load_autoencoder(str(folder))

    weights = load_file(folder / FILE)
    del weights["decoder.conv_in.weight"]
    save_file(weights, folder / FILE, metadata={"format": "pt"})
    with pytest.raises(UserError, match="decoder.conv_in.weight"):
        load_autoencoder(str(folder))

    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-100])
    with pytest.raises(UserError, match="does not load"):
        load_autoencoder(str(folder))

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "VQModel"}))
    with pytest.raises(UserError, match="holds a VQModel"):
        load_autoencoder(str(folder))


def test_picture_sides_must_fit(folder: Path) -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        load_autoencoder(str(folder)).encode(torch.zeros(1, 3, 18, 16))


@pytest.mark.parametrize(
    ("name", "inner", "channels", "scaling", "shift"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", "vae", 4, 0.13025, None),
        ("ostris/vae-kl-f8-d16", "", 16, 0.3611, None),
        ("black-forest-labs/FLUX.1-schnell", "vae", 16, 0.3611, 0.1159),
    ],
)
def test_published_layouts_by_the_hubs_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, inner: str, channels: int, scaling: float, shift: float
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    theirs = write_vae(hub_repository(tmp_path, name) / inner, channels=channels, scaling=scaling, shift=shift)
    ours = load_autoencoder(name)
    assert (ours.channels, ours.downscale) == (channels, 8)
    mean, _ = ours.encode(images := torch.rand(1, 3, 16, 16) * 2 - 1)
    z = theirs.encode(images).latent_dist.mean.detach()
    torch.testing.assert_close(mean, (z - (shift or 0)) * scaling)
    torch.testing.assert_close(ours.decode(mean), (theirs.decode(z).sample.detach() / 2 + 0.5).clamp(0, 1))


def test_dc_ae_has_no_posterior(tmp_path: Path) -> None:
    theirs = write_dc_ae(tmp_path)
    ours = load_autoencoder(str(tmp_path))
    assert (ours.channels, ours.downscale, ours.scaling_factor) == (32, 32, 0.41407)
    mean, std = ours.encode(images := torch.rand(2, 3, 64, 32) * 2 - 1)
    z = theirs.encode(images).latent.detach()
    assert mean.shape == (2, 32, 2, 1) and not std.any()
    torch.testing.assert_close(mean, z * 0.41407)
    torch.testing.assert_close(ours.decode(mean), (theirs.decode(z).sample.detach() / 2 + 0.5).clamp(0, 1))


def test_float16_weights_decode_without_overflow(tmp_path: Path) -> None:
    theirs = write_vae(tmp_path)
    theirs.decoder.conv_in.weight.data *= 1e5  # activations of SDXL's kind, far beyond float16's 65,504
    theirs.save_pretrained(tmp_path)
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    exact = load_autoencoder(str(tmp_path)).decode(latents)
    assert theirs.half().decode((latents / 0.13025).half()).sample.isnan().any()
    for dtype in (torch.float16, torch.bfloat16):
        decoded = load_autoencoder(str(tmp_path), dtype=dtype).decode(latents)
        assert decoded.isfinite().all() and (decoded - exact).abs().mean() < 0.05
    late = load_autoencoder(str(tmp_path))
    late.to(torch.float16)
    assert late.encode(torch.rand(1, 3, 16, 16)).mean.isfinite().all()


def test_large_pictures_are_decoded_in_tiles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    autoencoder, sizes = load_autoencoder(str(folder)), []
    latents = torch.randn(2, 3, 37, 20, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(autoencoders, "TILE", 64)
    # a decoder without a view beyond its pixel must give the same picture, seams included
    monkeypatch.setattr(
        autoencoder,
        "_decode",
        lambda z: sizes.append(z.shape[-2:]) or z.repeat_interleave(4, 2).repeat_interleave(4, 3),
    )
    wanted = (latents / 0.5 + 0.25).repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(autoencoder.decode(latents), wanted)
    assert set(sizes) == {(16, 16)} and len(sizes) == 2 * 3 * 2


def test_tiles_look_like_the_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    autoencoder = load_autoencoder(str(folder))
    latents = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = autoencoder.decode(latents)
    monkeypatch.setattr(autoencoders, "TILE", 48)
    tiled = autoencoder.decode(latents)
    assert tiled.shape == whole.shape and (tiled - whole).abs().mean() < 0.2 * whole.std()


def test_scales_by_channel_are_refused(tmp_path: Path) -> None:
    write_vae(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"latents_mean": [0.1] * 4}))
    with pytest.raises(UserError, match="scales each channel by itself"):
        load_autoencoder(str(tmp_path))
