import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_folders import write_pictures
from PIL import Image
from real_formats import hub_repository, write_clip, write_dinov2
from torch import Tensor, nn

from micro_diffusion.evaluation import features
from micro_diffusion.evaluation.features import INCEPTION, NETWORKS, Network, Settings, measure
from micro_diffusion.evaluation.frechet import Moments
from micro_diffusion.evaluation.pictures import PictureFolder
from micro_diffusion.runtime.files import UserError, sha256

CLIP_MEAN, CLIP_DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def colours(name: str, settings: Settings) -> Network:
    """A network whose features are the mean and corner colours."""

    def look(pictures: Sequence[Image.Image], captions: Sequence[str]) -> Tensor:
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).float() / 255
        return torch.cat([pixels.mean((1, 2)), pixels[:, 0, 0]], 1)

    return look, "0123456789abcdef", "not at all"


@pytest.fixture
def simple(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, INCEPTION, colours)


def prepared(pictures: PictureFolder, size: int, mean: Sequence[float], deviation: Sequence[float]) -> Tensor:
    arrays = [np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)) / 255 for picture in pictures]
    return torch.tensor((np.stack(arrays) - mean) / deviation).float().permute(0, 3, 1, 2)


@pytest.mark.parametrize(("name", "size"), [("clip-vit-b-32", 224), ("clip-vit-l-14-336", 336)])
def test_clip_features_are_its_projected_picture(tmp_path: Path, name: str, size: int) -> None:
    model = write_clip(tmp_path / "clip", size=size)
    pictures = write_pictures(tmp_path / "pictures", 5)
    settings = Settings(batch_size=2, weights={name: str(tmp_path / "clip")})
    found = measure(pictures, name, settings, keep=True)
    with torch.no_grad():
        pooled = model.vision_model(prepared(pictures, size, CLIP_MEAN, CLIP_DEVIATION)).pooler_output
        torch.testing.assert_close(found.features, model.visual_projection(pooled), rtol=1e-4, atol=1e-5)
    assert found.made["weights"] == sha256(tmp_path / "clip" / "model.safetensors")
    assert found.made["resizing"] == f"central square to {size} px, bicubic"


def test_dino_features_are_its_normed_class_token(tmp_path: Path) -> None:
    model = write_dinov2(tmp_path / "dino")
    pictures = write_pictures(tmp_path / "pictures", 3)
    found = measure(
        pictures, "dinov2-vit-l-14", Settings(weights={"dinov2-vit-l-14": str(tmp_path / "dino")}), keep=True
    )
    with torch.no_grad():
        token = model(prepared(pictures, 224, IMAGENET_MEAN, IMAGENET_DEVIATION)).last_hidden_state[:, 0]
    torch.testing.assert_close(found.features, token, rtol=1e-4, atol=1e-5)


def test_weights_come_from_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    snapshot = hub_repository(tmp_path / "cache", "openai/clip-vit-base-patch32")
    write_clip(snapshot, size=224)
    found = measure(write_pictures(tmp_path / "pictures", 2), "clip-vit-b-32", Settings())
    assert found.made["weights"] == sha256(snapshot / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "file", "address"),
    [
        ("clip-vit-b-32", "model.safetensors", "https://huggingface.co/openai/clip-vit-base-patch32"),
        ("dinov2-vit-l-14", "model.safetensors", "https://huggingface.co/facebook/dinov2-large"),
        ("pickscore", "model.safetensors", "https://huggingface.co/yuvalkirstain/PickScore_v1"),
        ("hpsv2", "", "https://huggingface.co/xswu/HPSv2/resolve/main/HPS_v2.1_compressed.pt"),
        (INCEPTION, "", "https://github.com/toshas/torch-fidelity/.*/weights-inception-2015-12-05-6726825d.pth"),
    ],
)
def test_without_weights_the_file_and_its_address_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, file: str, address: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match=f"{file}.*{address}"):
        measure(write_pictures(tmp_path / "pictures", 2), name, Settings())


def test_a_pickle_that_runs_code_is_not_opened(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("run",)

    torch.save({"fc.weight": Runs()}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="a pickle can run code"):
        NETWORKS[INCEPTION](INCEPTION, Settings(weights={INCEPTION: str(tmp_path / "weights.pth")}))


def test_other_weights_are_not_inception(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(UserError, match="weights.pth is no file of inception-v3-compat: fetch https://"):
        NETWORKS[INCEPTION](INCEPTION, Settings(weights={INCEPTION: str(tmp_path / "weights.pth")}))


def test_a_model_without_all_its_weights_is_refused(tmp_path: Path) -> None:
    write_dinov2(tmp_path)  # of another kind than the configuration will say
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "kept")
    write_clip(tmp_path)
    shutil.move(tmp_path / "kept", tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="lacks weights of clip-vit-b-32"):
        NETWORKS["clip-vit-b-32"]("clip-vit-b-32", Settings(weights={"clip-vit-b-32": str(tmp_path)}))


@pytest.mark.usefixtures("simple")
def test_batches_leave_everything_as_it_is(tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path, 11)
    one, other = (measure(pictures, INCEPTION, Settings(batch_size=size), keep=True) for size in (3, 11))
    assert one.made == other.made and one.count == 11
    torch.testing.assert_close(one.scatter, other.scatter)
    assert one.features.shape == (11, 6) and torch.equal(one.features, other.features)
    np.testing.assert_allclose(one.scatter / 10, np.cov(one.features.double().numpy(), rowvar=False))


@pytest.mark.usefixtures("simple")
def test_statistics_say_which_pictures_they_are_of(tmp_path: Path) -> None:
    made = [
        measure(write_pictures(tmp_path / str(seed), 3, seed=seed, size=size), INCEPTION, Settings()).made
        for seed, size in ((0, (40, 40)), (1, (40, 40)), (0, (40, 30)))
    ]
    assert len({each["pictures"] for each in made}) == 3
    assert (made[0]["size"], made[2]["size"], made[0]["format"]) == ("40 x 40", "40 x 30", ".png")


@pytest.mark.usefixtures("simple")
def test_pictures_of_several_sizes_are_named_or_scaled(tmp_path: Path) -> None:
    write_pictures(tmp_path, 6)
    Image.new("RGB", (30, 60), "red").save(tmp_path / "004.png")
    pictures = PictureFolder(tmp_path)
    with pytest.raises(UserError, match="004.png is 30 x 60"):
        measure(pictures, INCEPTION, Settings(batch_size=2))
    found = measure(pictures, INCEPTION, Settings(batch_size=2, resize=16), keep=True)
    torch.testing.assert_close(found.features[4], torch.tensor([1.0, 0, 0, 1, 0, 0]))
    assert found.made["size"] == "30 x 60 and 40 x 40"
    assert found.made["resizing"] == "central square to 16 px, bicubic, then not at all"


def test_networks_that_scale_take_several_sizes(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip", size=224)
    write_pictures(tmp_path / "pictures", 3)
    write_pictures(tmp_path / "pictures", 1, size=(50, 40))
    found = measure(
        PictureFolder(tmp_path / "pictures"),
        "clip-vit-b-32",
        Settings(weights={"clip-vit-b-32": str(tmp_path / "clip")}),
    )
    assert found.count == 3 and found.made["size"] == "40 x 40 and 50 x 40"


@pytest.mark.usefixtures("simple")
def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    write_pictures(tmp_path, 6)
    (tmp_path / "003.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match="003.png is no picture"):
        measure(PictureFolder(tmp_path), INCEPTION, Settings(batch_size=2))


def test_what_is_measured_once_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []

    def counting(name: str, settings: Settings) -> Network:
        look, *rest = colours(name, settings)
        return (lambda pictures, captions: (looked.append(len(pictures)), look(pictures, captions))[1]), *rest

    monkeypatch.setitem(NETWORKS, INCEPTION, counting)
    pictures, settings = write_pictures(tmp_path / "a", 4), Settings()
    bare = measure(pictures, INCEPTION, settings)
    assert measure(pictures, INCEPTION, settings) is bare and sum(looked) == 4
    kept = measure(pictures, INCEPTION, settings, keep=True)  # the features have to be looked at once more
    assert len(kept.features) == 4 and sum(looked) == 8
    assert measure(pictures, INCEPTION, settings) is kept and sum(looked) == 8
    measure(write_pictures(tmp_path / "b", 4), INCEPTION, settings)
    assert sum(looked) == 12


@pytest.mark.usefixtures("simple")
def test_saved_statistics_must_be_of_the_same_making(tmp_path: Path) -> None:
    measure(write_pictures(tmp_path / "a", 4), INCEPTION, Settings()).save(tmp_path / "true")
    saved = Moments.load(tmp_path / "true")
    assert measure(saved, INCEPTION, Settings()) is saved
    with pytest.raises(UserError, match="The statistics lack features: give the folder"):
        measure(saved, INCEPTION, Settings(), keep=True)
    with pytest.raises(UserError, match="lack the same resizing: give the folder"):
        measure(saved, INCEPTION, Settings(resize=32))
    saved.made |= {"weights": "somebody else's"}
    with pytest.raises(UserError, match="lack the same weights"):
        measure(saved, INCEPTION, Settings())
    features.NETWORKS["other"] = colours
    try:
        with pytest.raises(UserError, match="lack the same network and the same weights and features"):
            measure(saved, "other", Settings(), keep=True)
    finally:
        del features.NETWORKS["other"]
