from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from evaluation_folders import write_pictures
from PIL import Image
from real_formats import BYTES, seeded, write_clip
from torch import Tensor, nn

from micro_diffusion.evaluation import features
from micro_diffusion.evaluation.features import INCEPTION, NETWORKS, Network, Settings, measure
from micro_diffusion.evaluation.frechet import Moments
from micro_diffusion.evaluation.metrics import METRICS
from micro_diffusion.runtime.files import UserError, sha256

CAPTIONS = ["a red apple", "cat", "a green cat in style", "an apple", "a cat beside a much longer list of other things"]
CLIP_MEAN, CLIP_DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture
def simple(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of Inception the six colours of a picture's two halves."""

    def halves(name: str, settings: Settings) -> Network:
        def look(pictures: Sequence[Image.Image], captions: Sequence[str]) -> Tensor:
            pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).float() / 255
            return torch.cat([half.mean((1, 2)) for half in pixels.chunk(2, dim=1)], 1)

        return look, "0123456789abcdef", "not at all"

    monkeypatch.setitem(NETWORKS, INCEPTION, halves)


def cosines(model: nn.Module, pictures: Sequence[Image.Image], captions: Sequence[str], size: int) -> np.ndarray:
    """CLIP's cosine of each picture and its caption, one at a time, from its parts: letters are its words."""
    found = []
    for picture, caption in zip(pictures, captions, strict=True):
        pixels = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)) / 255
        pixels = torch.tensor((pixels - CLIP_MEAN) / CLIP_DEVIATION).float().permute(2, 0, 1)[None]
        words = caption.split(" ")
        letters = [
            BYTES.index(c) + (len(BYTES) if i == len(word) - 1 else 0) for word in words for i, c in enumerate(word)
        ]
        ids = torch.tensor([[2 * len(BYTES), *letters[:22], 2 * len(BYTES) + 1]])
        with torch.no_grad():
            seen = model.visual_projection(model.vision_model(pixels).pooler_output)[0].double()
            read = model.text_projection(model.text_model(ids).last_hidden_state[:, -1])[0].double()
        found.append(float(seen @ read / seen.norm() / read.norm()))
    return np.array(found)


@pytest.mark.parametrize("sign", [1, -1])
def test_clip_score_is_the_mean_of_positive_cosines(tmp_path: Path, sign: int) -> None:
    model = write_clip(tmp_path / "clip", size=224)
    with torch.no_grad():
        model.visual_projection.weight *= sign  # which turns every cosine round
    model.save_pretrained(tmp_path / "clip")
    pictures = write_pictures(tmp_path / "pictures", 5, captions=CAPTIONS)
    scores = METRICS["clip-score"](
        pictures, None, Settings(batch_size=2, weights={"clip-score": str(tmp_path / "clip")})
    )
    cosine = cosines(model, pictures, CAPTIONS, 224)
    assert (sign * cosine < 0).all()
    np.testing.assert_allclose(scores.each["clip-score"], 100 * cosine.clip(0), rtol=1e-4)
    assert scores.numbers == {"clip-score": pytest.approx(np.mean(scores.each["clip-score"]), rel=1e-6)}
    digest = sha256(tmp_path / "clip" / "model.safetensors")[:12]
    assert (
        scores.protocol
        == f"5 pictures (40 x 40 px, .png), central square to 224 px, bicubic; clip-score (weights {digest})"
    )


def test_pickscore_is_scaled_by_the_models_own_number(tmp_path: Path) -> None:
    model = write_clip(tmp_path / "clip", size=224)
    nn.init.constant_(model.logit_scale, 2.0)
    model.save_pretrained(tmp_path / "clip")
    pictures = write_pictures(tmp_path / "pictures", 5, captions=CAPTIONS)
    scores = METRICS["pickscore"](pictures, None, Settings(weights={"pickscore": str(tmp_path / "clip")}))
    np.testing.assert_allclose(
        scores.each["pickscore"], np.exp(2.0) * cosines(model, pictures, CAPTIONS, 224), rtol=1e-4
    )


@pytest.fixture
def architecture(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """In place of OpenCLIP's ViT-H-14 a small one."""
    config: dict[str, Any] = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }
    monkeypatch.setattr("open_clip.factory._MODEL_CONFIGS", {"ViT-H-14": config})
    return config


def test_hpsv2_is_openclips_cosine(tmp_path: Path, architecture: dict[str, Any]) -> None:
    model = seeded(lambda: open_clip.CLIP(**architecture)).eval()
    torch.save({"state_dict": model.state_dict(), "epoch": 1}, tmp_path / "hps.pt")
    pictures = write_pictures(tmp_path / "pictures", 5, size=(64, 32), captions=CAPTIONS)
    scores = METRICS["hpsv2"](pictures, None, Settings(batch_size=2, weights={"hpsv2": str(tmp_path / "hps.pt")}))
    expected = []
    for picture, caption in zip(pictures, CAPTIONS, strict=True):
        padded = Image.new("RGB", (32, 32))  # the longer edge is what fits
        padded.paste(picture.resize((32, 16), Image.Resampling.BICUBIC), (0, 8))
        pixels = torch.tensor((np.asarray(padded) / 255 - CLIP_MEAN) / CLIP_DEVIATION).float().permute(2, 0, 1)[None]
        with torch.no_grad():
            seen, read = model.encode_image(pixels)[0], model.encode_text(open_clip.SimpleTokenizer()([caption]))[0]
        expected.append(100 * float(seen @ read / seen.norm() / read.norm()))
    np.testing.assert_allclose(scores.each["hpsv2"], expected, atol=1e-3)


@pytest.mark.usefixtures("architecture")
def test_hpsv2_refuses_other_files(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("no weights")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    for name in ("text.pt", "other.pt", "absent.pt"):
        with pytest.raises(UserError, match=f"{name} does not load as hpsv2"):
            features.hpsv2("hpsv2", Settings(weights={"hpsv2": str(tmp_path / name)}))


def test_cmmd_is_its_papers(tmp_path: Path) -> None:
    """Equation 4 of arXiv 2401.09603 and its scale of 1,000, pair by pair."""
    model = write_clip(tmp_path / "clip", size=336)
    settings = Settings(weights={"clip-vit-l-14-336": str(tmp_path / "clip")})
    drawn, true = (write_pictures(tmp_path / str(seed), 6, seed=seed) for seed in (0, 1))

    def embedded(picture: Image.Image) -> np.ndarray:
        pixels = np.asarray(picture.resize((336, 336), Image.Resampling.BICUBIC)) / 255
        pixels = torch.tensor((pixels - CLIP_MEAN) / CLIP_DEVIATION).float().permute(2, 0, 1)[None]
        with torch.no_grad():
            found = model.visual_projection(model.vision_model(pixels).pooler_output)[0].double().numpy()
        return found / np.linalg.norm(found)

    x, y = [embedded(picture) for picture in drawn], [embedded(picture) for picture in true]

    def kernel(a: list[np.ndarray], b: list[np.ndarray]) -> float:
        return float(np.mean([np.exp(-np.sum((i - j) ** 2) / 200) for i in a for j in b]))

    scores = METRICS["cmmd"](drawn, true, settings)
    assert scores.numbers["CMMD"] == pytest.approx(1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)), rel=1e-3)
    assert METRICS["cmmd"](drawn, drawn, settings).numbers["CMMD"] == pytest.approx(0, abs=1e-9)


@pytest.mark.usefixtures("simple")
def test_kid_of_as_many_pictures_as_a_subset_is_the_unbiased_estimate(tmp_path: Path) -> None:
    drawn, true = (write_pictures(tmp_path / str(seed), 9, seed=seed) for seed in (0, 1))
    x, y = (measure(each, INCEPTION, Settings(), keep=True).features.double().numpy() for each in (drawn, true))

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 6 + 1) ** 3)

    others = [[kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j] for z in (x, y)]
    expected = np.mean(others[0]) + np.mean(others[1]) - 2 * np.mean([kernel(a, b) for a in x for b in y])
    scores = METRICS["kid"](drawn, true, Settings())
    assert scores.numbers["KID mean"] == pytest.approx(expected, abs=1e-6)
    assert "9 pictures: published numbers are of 1,000 or more." in scores.warnings


@pytest.mark.usefixtures("simple")
def test_precision_and_recall_ask_for_neighbours_in_balls(tmp_path: Path) -> None:
    drawn = write_pictures(tmp_path / "drawn", 12, seed=0)
    true = write_pictures(tmp_path / "true", 10, seed=1)
    x, y = (measure(each, INCEPTION, Settings(), keep=True).features.double().numpy() for each in (drawn, true))

    def within(points: np.ndarray, balls: np.ndarray) -> float:
        radii = [sorted(np.linalg.norm(balls - ball, axis=1))[3] for ball in balls]
        return float(np.mean([(np.linalg.norm(balls - point, axis=1) <= radii).any() for point in points]))

    numbers = METRICS["precision-recall"](drawn, true, Settings()).numbers
    assert (numbers["precision"], numbers["recall"]) == pytest.approx((within(x, y), within(y, x)))
    assert 0 < numbers["precision"] < 1 and numbers["precision"] != numbers["recall"]


@pytest.mark.usefixtures("simple")
def test_statistics_stand_for_the_pictures_that_they_are_of(tmp_path: Path) -> None:
    drawn, true = (write_pictures(tmp_path / str(seed), 8, seed=seed) for seed in (0, 1))
    measure(true, INCEPTION, Settings()).save(tmp_path / "true")
    from_folder = METRICS["fid"](drawn, true, Settings())
    assert METRICS["fid"](drawn, Moments.load(tmp_path / "true"), Settings()) == from_folder
    assert from_folder.numbers["FID"] > 0
    with pytest.raises(UserError, match="statistics lack features"):
        METRICS["kid"](drawn, Moments.load(tmp_path / "true"), Settings())


@pytest.mark.usefixtures("simple")
def test_numbers_that_are_not_comparable_say_why(tmp_path: Path) -> None:
    few = write_pictures(tmp_path / "few", 5, suffix="jpg")
    large = write_pictures(tmp_path / "large", 9, size=(80, 80))
    assert list(METRICS["fid"](few, large, Settings()).warnings) == [
        "5 pictures are fewer than the 6 features: the covariance is singular.",
        "5 pictures: published numbers are of 30,000 or more.",
        "40 x 40 pixels against 80 x 80: scale both to one size.",
        "Pictures in .jpg may be compressed, which features show: draw PNGs.",
    ]
    scaled = METRICS["fid"](large, large, Settings(resize=20))
    assert list(scaled.warnings) == ["9 pictures: published numbers are of 30,000 or more."]
    assert scaled.protocol == (
        "9 pictures (80 x 80 px, .png) against 9 pictures (80 x 80 px, .png), central square to 20 px, bicubic, then "
        "not at all; inception-v3-compat (weights 0123456789ab)"
    )


@pytest.mark.usefixtures("simple")
@pytest.mark.parametrize("name", ["fid", "kid", "precision-recall"])
def test_what_a_distance_needs(tmp_path: Path, name: str) -> None:
    pictures = write_pictures(tmp_path, 4)
    with pytest.raises(UserError, match="give a folder of them, or their statistics"):
        METRICS[name](pictures, None, Settings())
    with pytest.raises(UserError, match="4 pictures are too few"):
        METRICS[name](pictures, pictures, Settings())


@pytest.mark.parametrize("name", ["clip-score", "pickscore", "hpsv2"])
def test_scores_of_captions_need_captions(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="has no captions: put NAME.txt beside every NAME.png"):
        METRICS[name](write_pictures(tmp_path, 4, captions=CAPTIONS[:3]), None, Settings())


def test_every_metric_has_its_network() -> None:
    assert {metric.network for metric in METRICS.values()} == set(features.NETWORKS)
