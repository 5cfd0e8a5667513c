"""Autoencoders: a tiny random AutoencoderKL on disk, against diffusers itself."""

import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from tiny_parts import write_autoencoder

from micro_diffusion.models import autoencoders
from micro_diffusion.models.autoencoders import WEIGHTS, load_autoencoder
from micro_diffusion.runtime.files import UserError, sha256


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_autoencoder(tmp_path / "autoencoder")


def test_agrees_with_diffusers(folder: Path) -> None:
    ours, theirs = load_autoencoder(str(folder)), AutoencoderKL.from_pretrained(folder)
    assert (ours.channels, ours.downscale, ours.scaling_factor, ours.shift_factor) == (3, 4, 0.5, 0.25)
    assert ours.sha256 == sha256(folder / WEIGHTS)

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
    monkeypatch.setattr(autoencoders, "PIXELS_AT_ONCE", 2 * 16 * 16)
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

    weights = load_file(folder / WEIGHTS)
    del weights["decoder.conv_in.weight"]
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match="decoder.conv_in.weight"):
        load_autoencoder(str(folder))

    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(UserError, match="does not load"):
        load_autoencoder(str(folder))

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "VQModel"}))
    with pytest.raises(UserError, match="holds a VQModel"):
        load_autoencoder(str(folder))


def test_picture_sides_must_fit(folder: Path) -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        load_autoencoder(str(folder)).encode(torch.zeros(1, 3, 18, 16))
