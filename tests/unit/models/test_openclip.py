"""OpenCLIP text towers out of whole models, against OpenCLIP itself."""

import json
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from real_formats import hub_repository, write_openclip

from micro_diffusion.models import openclip
from micro_diffusion.models.text_encoders import load_text_encoder, text_encoder_width, text_mask_policy
from micro_diffusion.runtime.files import UserError

CAPTIONS = ["An elegant squirrel pirate on a ship", "a cat", ""]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "micro-diffusion"


def all_positions(model: open_clip.CLIP, tokens: torch.Tensor) -> torch.Tensor:
    """What the released models were trained on, by OpenCLIP's own modules: every position after the final norm."""
    with torch.no_grad():
        x = model.token_embedding(tokens) + model.positional_embedding
        return model.ln_final(model.transformer(x, attn_mask=model.attn_mask))


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("safe", [True, False])
def test_agrees_with_open_clip(tmp_path: Path, quick_gelu: bool, safe: bool) -> None:
    whole = write_openclip(tmp_path / "clip", quick_gelu=quick_gelu, safe=safe)
    encoder = load_text_encoder(f"openclip:{tmp_path / 'clip'}")
    tokens = open_clip.get_tokenizer("ViT-H-14")(CAPTIONS)
    assert torch.equal(encoder.tokenizer.tokenize(CAPTIONS)["input_ids"], tokens)
    states, mask = encoder.encode(CAPTIONS)
    assert states.shape == (3, 77, 16) and mask.all() and encoder.width == 16
    torch.testing.assert_close(states, all_positions(whole, tokens), atol=1e-5, rtol=1e-5)
    pooled = states[torch.arange(3), tokens.argmax(1)] @ whole.text_projection
    torch.testing.assert_close(pooled, whole.encode_text(tokens).detach(), atol=1e-5, rtol=1e-5)
    assert torch.equal(encoder.encode(tokens[:, None]).states, states)


def test_the_activation_is_the_one_in_the_configuration(tmp_path: Path) -> None:
    states = []
    for quick in (True, False):
        write_openclip(tmp_path / str(quick), quick_gelu=quick)
        states.append(load_text_encoder(f"openclip:{tmp_path / str(quick)}").encode(CAPTIONS).states)
    assert (states[0] - states[1]).abs().max() > 1e-3


def test_by_the_hubs_name_and_without_a_vision_tower(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    write_openclip(hub_repository(tmp_path, "apple/clip"))
    with monkeypatch.context() as patch:
        for name in ("VisionTransformer", "_build_vision_tower", "CLIP", "CustomTextCLIP"):
            patch.delattr(open_clip.model, name)
        encoder = load_text_encoder("openclip:hf-hub:apple/clip")
    assert text_encoder_width("openclip:hf-hub:apple/clip") == 16
    assert not [name for name, _ in encoder.named_modules() if "visual" in name]
    (tower,) = cache.iterdir()
    whole = hub_repository(tmp_path / "other", "x/y").parents[3] / "models--apple--clip"
    assert tower.stat().st_size < next(whole.rglob("*.bin")).stat().st_size

    monkeypatch.setattr(openclip, "load_tensors", lambda path: pytest.fail("the large file was read again"))
    again = load_text_encoder("openclip:hf-hub:apple/clip")
    assert again.sha256 == encoder.sha256 and torch.equal(
        again.encode(CAPTIONS).states, encoder.encode(CAPTIONS).states
    )


def test_the_large_pickle_is_mapped_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_openclip(tmp_path / "clip")
    load, asked = torch.load, []
    monkeypatch.setattr(torch, "load", lambda path, **settings: asked.append(settings) or load(path, **settings))
    load_text_encoder(f"openclip:{tmp_path / 'clip'}")
    assert [(each["mmap"], each["weights_only"]) for each in asked] == [(True, True)]


def test_another_file_in_the_same_place_is_cut_out_anew(tmp_path: Path) -> None:
    name = f"openclip:{tmp_path / 'clip'}"
    whole = write_openclip(tmp_path / "clip")
    before = load_text_encoder(name).sha256
    torch.save({key: tensor * 2 for key, tensor in whole.state_dict().items()}, tmp_path / "clip" / openclip.WEIGHTS[1])
    assert load_text_encoder(name).sha256 != before


def test_masked_for_models_trained_here(tmp_path: Path) -> None:
    write_openclip(tmp_path / "clip", own_tokenizer=True)
    name = f"openclip:{tmp_path / 'clip'}"
    assert (text_mask_policy(name), text_mask_policy(f"{name}?mask=padding")) == ("none", "padding")
    whole, masked = load_text_encoder(name), load_text_encoder(f"{name}?mask=padding")
    states, mask = masked.encode(["a cat", "red"])
    assert mask.sum(1).tolist() == [6, 5] and states.shape == (2, 20, 16)  # letters between start and end
    torch.testing.assert_close(states, whole.encode(["a cat", "red"]).states * mask[..., None])


def test_bad_folders_get_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="check the name and the network"):
        load_text_encoder("openclip:hf-hub:apple/no-such-clip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no OpenCLIP folder: it needs open_clip_config.json"):
        load_text_encoder(f"openclip:{tmp_path / 'empty'}")

    write_openclip(tmp_path / "clip")
    name = f"openclip:{tmp_path / 'clip'}"
    with pytest.raises(UserError, match="layer and length are settings of transformers"):
        load_text_encoder(f"{name}?layer=-2")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "open_clip", None)
        with pytest.raises(UserError, match="pip install open_clip_torch"):
            load_text_encoder(name)
    config = json.loads((tmp_path / "clip" / openclip.CONFIG).read_text())
    config["model_cfg"]["text_cfg"]["layers"] = 3
    (tmp_path / "clip" / openclip.CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match="text tower in .* does not load"):
        load_text_encoder(name)
    weights = tmp_path / "clip" / openclip.WEIGHTS[1]
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match="damaged"):
        load_text_encoder(name)
