"""Networks that look at pictures, or at pictures and captions, and the statistics of what they see in a folder."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from micro_diffusion.data.records import resize_crop
from micro_diffusion.evaluation.frechet import Moments
from micro_diffusion.evaluation.pictures import PictureFolder
from micro_diffusion.models import pretrained
from micro_diffusion.models.text_encoders import FILES, WEIGHTS
from micro_diffusion.runtime.ahead import ahead
from micro_diffusion.runtime.files import UserError, sha256, user_error

Look = Callable[[Sequence[Image.Image], Sequence[str]], Tensor]  # pictures and their captions to features (b, d)
Network = tuple[Look, str, str]  # with its weights' sha256 and, in words, what it does to pictures first
Reference = PictureFolder | Moments  # true pictures, or what is known of them
INCEPTION, VISION = "inception-v3-compat", "CLIPVisionModelWithProjection"


@dataclass(frozen=True)
class Settings:
    """How metrics are computed."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_size: int = 32
    weights: Mapping[str, str] = field(default_factory=dict)  # a file, a folder or a name on the hub, by network
    resize: int | None = None  # pixels a side to which the central square of every picture is scaled first
    measured: dict[tuple[Path, str], Moments] = field(default_factory=dict, repr=False)  # by folder and network


def inception(name: str, settings: Settings) -> Network:
    """torch-fidelity's Inception (2,048 features), from a file or the library's cache."""
    library = pretrained.optional_package("torch_fidelity.feature_extractor_inceptionv3")
    url: str = library.URL_INCEPTION_V3
    file = Path(settings.weights.get(name, Path(torch.hub.get_dir(), "checkpoints", Path(url).name)))
    # the library would run what a pickle says, so it is opened here first
    if not file.is_file() or "fc.weight" not in pretrained.load_pickle(file):
        raise UserError(f"{file} is no file of {name}: fetch {url} and give its place as {name}=FILE.")
    network = library.FeatureExtractorInceptionV3(name, ["2048"], str(file)).to(settings.device)

    def look(pictures: Sequence[Image.Image], captions: Sequence[str]) -> Tensor:
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
        return network(pixels.permute(0, 3, 1, 2).to(settings.device))[0]

    return look, sha256(file), "bilinear by the network, as in TensorFlow 1"


def from_transformers(name: str, place: str, kind: str) -> tuple[Any, Path, str]:
    """A model of transformers' class `kind` in a folder or of the hub, its folder, and its weights' sha256."""
    folder = pretrained.part_folder(place, [*FILES, "preprocessor_config.json"], weights=WEIGHTS)
    files = pretrained.weight_files(name, folder, WEIGHTS)
    with pretrained.loading(name, library="transformers") as library:
        model, report = getattr(library, kind).from_pretrained(folder, local_files_only=True, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{folder} lacks weights of {name} ({missing[0]} and {len(missing) - 1} more).")
    return model.eval().float(), folder, pretrained.weights_sha256(files)


def transformer(
    name: str, settings: Settings, *, source: str, kind: str, size: int = 224, percent: bool = False
) -> Network:
    """A model of transformers' class `kind`; `source` is its name on the hub.

    Of a CLIPModel it is the cosine of picture and caption, times the model's own scale or as max(cosine, 0) in percent.
    """
    model, folder, digest = from_transformers(name, settings.weights.get(name, source), kind)
    with pretrained.loading(name, library="transformers") as library:
        processor = library.AutoProcessor.from_pretrained(folder, local_files_only=True)
    model.to(settings.device)

    def look(pictures: Sequence[Image.Image], captions: Sequence[str]) -> Tensor:
        squares = [Image.fromarray(resize_crop(picture, size)) for picture in pictures]
        text = {"text": captions, "padding": True, "truncation": True} if kind == "CLIPModel" else {}
        inputs = processor(images=squares, do_resize=False, do_center_crop=False, return_tensors="pt", **text)
        out = model(**inputs.to(settings.device))
        if kind != "CLIPModel":
            return out.image_embeds if kind == VISION else out.pooler_output
        cosine = (out.image_embeds * out.text_embeds).sum(1, keepdim=True)
        return 100 * cosine.clamp(min=0) if percent else model.logit_scale.exp() * cosine

    return look, digest, f"central square to {size} px, bicubic"


def hpsv2(name: str, settings: Settings, *, kind: str = "ViT-H-14") -> Network:
    """100 times the cosine of Human Preference Score 2.1 (Wu et al. 2023), from its file for OpenCLIP."""
    library, given = pretrained.optional_package("open_clip"), settings.weights.get(name)
    file = Path(given) if given else pretrained.hub_file("xswu/HPSv2", "HPS_v2.1_compressed.pt")
    message = f"{file} does not load as {name} ({{}})."
    with user_error(message, RuntimeError, OSError, UnpicklingError, told=pretrained.first_line):
        model, _, prepare = library.create_model_and_transforms(kind, str(file), image_resize_mode="longest")
    model, tokenizer = model.eval().to(settings.device), library.get_tokenizer(kind)

    def look(pictures: Sequence[Image.Image], captions: Sequence[str]) -> Tensor:
        seen = model.encode_image(torch.stack([prepare(p) for p in pictures]).to(settings.device), normalize=True)
        return 100 * (seen * model.encode_text(tokenizer(captions).to(settings.device), normalize=True)).sum(1, True)

    return look, sha256(file), "longer edge to 224 px, padded"


NETWORKS: dict[str, Callable[[str, Settings], Network]] = {
    INCEPTION: inception,
    "clip-vit-b-32": partial(transformer, source="openai/clip-vit-base-patch32", kind=VISION),
    "clip-vit-l-14-336": partial(transformer, source="openai/clip-vit-large-patch14-336", kind=VISION, size=336),
    "dinov2-vit-l-14": partial(transformer, source="facebook/dinov2-large", kind="Dinov2Model"),
    "clip-score": partial(transformer, source="openai/clip-vit-large-patch14", kind="CLIPModel", percent=True),
    "pickscore": partial(transformer, source="yuvalkirstain/PickScore_v1", kind="CLIPModel"),
    "hpsv2": hpsv2,
}


def measure(pictures: Reference, name: str, settings: Settings, *, keep: bool = False) -> Moments:
    """Statistics of a folder's features, with `keep` the features too; or saved ones, if made in the same way."""
    known = None if isinstance(pictures, Moments) else settings.measured.get((pictures.path, name))
    if known and (len(known.features) or not keep):
        return known
    look, weights, resizing = NETWORKS[name](name, settings)
    if settings.resize:
        resizing = f"central square to {settings.resize} px, bicubic, then {resizing}"
    moments = Moments({"network": name, "weights": weights, "resizing": resizing})
    if isinstance(pictures, Moments):
        lack = [f"the same {key}" for key in moments.made if pictures.made.get(key) != moments.made[key]]
        if lack := [*lack, *(["features"] if keep else [])]:
            raise UserError(f"The statistics lack {' and '.join(lack)}: give the folder of true pictures instead.")
        return pictures
    if name == INCEPTION and not settings.resize:
        pictures.one_size()  # or it says which picture has another
    sizes, digest, kept = set(), hashlib.sha256(), []
    cuts = (slice(start, start + settings.batch_size) for start in range(0, len(pictures), settings.batch_size))
    for batch in ahead((partial(pictures.__getitem__, cut) for cut in cuts), depth=4, workers=4, name="decode"):
        for picture in batch:
            sizes.add(f"{picture.width} x {picture.height}")
            digest.update(picture.tobytes())
        captions = [prompt.text for prompt in (pictures.prompts or [])[moments.count :][: len(batch)]]
        shown = [Image.fromarray(resize_crop(p, settings.resize)) for p in batch] if settings.resize else batch
        with torch.inference_mode():
            features = look(shown, captions).float().cpu()
        moments.update(features)
        kept += [features] if keep else []
    size, formats = " and ".join(sorted(sizes)[:2]), sorted({file.suffix.lower() for file in pictures.files})
    moments.made |= {"pictures": digest.hexdigest(), "size": size, "format": " ".join(formats)}
    moments.features = torch.cat(kept) if keep else moments.features
    settings.measured[pictures.path, name] = moments
    return moments
