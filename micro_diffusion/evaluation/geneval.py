"""GenEval (arXiv 2310.11513): does a picture show the objects, counts, colours and places that its prompt asks for?

Prompts, thresholds and logic follow the authors' create_prompts.py and evaluate_images.py (djghosh13/geneval).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, normalize, pad

from micro_diffusion.data.sources.emoji_scenes import RELATIONS, TASKS
from micro_diffusion.evaluation.features import from_transformers
from micro_diffusion.evaluation.pictures import PictureFolder, Prompt, Scores
from micro_diffusion.models import openclip, pretrained
from micro_diffusion.runtime.files import UserError, user_error
from micro_diffusion.runtime.random import derive_seed

COLOURS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
OBJECTS = """person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign
parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase
frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass
cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant
bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,oven,toaster,sink
refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush""".replace("\n", ",").split(",")  # COCO's order
SURE, SURE_TO_COUNT, MOST, SLACK = 0.3, 0.9, 16, 0.1  # scores; objects of a class; share of the sizes of two boxes
DETECTOR, CLIP = "facebook/mask2former-swin-small-coco-instance", "timm/vit_large_patch14_clip_224.openai"
TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")

Truth = Mapping[str, Any]  # {"tag", "include": [{"class", "count", "color"?, "position"?}], "exclude"?, "prompt"}
Box = tuple[float, float, float, float]


class Detection(NamedTuple):
    """An object in a picture."""

    label: str
    box: Box  # left, top, right, bottom in pixels
    score: float = 1.0
    colour: str | None = None  # filled in where the task asks for colours
    mask: Image.Image | None = None  # of mode "1": its pixels, where the detector says so


class Verdict(NamedTuple):
    """Whether a picture shows what it should, and if not, why."""

    correct: bool
    reason: str


Detect = Callable[[Image.Image], Sequence[Detection]]
ColourOf = Callable[[Detection], str | None]


def verdict(truth: Truth, found: Sequence[Detection], *, colour_of: ColourOf | None = None) -> Verdict:
    """Whether what was `found` is all that `truth` (a line of the benchmark's metadata) includes, and nothing excluded.

    Colour and place are asked of the surest `count` objects. Boxes at one place all count: the authors merge none.
    """
    least = SURE_TO_COUNT if truth["tag"] == "counting" else SURE
    kept = [each for each in sorted(found, key=attrgetter("score"), reverse=True) if each.score > least]
    objects = {name: [each for each in kept if each.label == name][:MOST] for name in {each.label for each in kept}}
    groups, faults = list[list[Detection]](), list[str]()  # the objects that fulfil each clause; none if they do not
    for wanted in truth.get("include", []):
        name, count, (relation, target) = wanted["class"], wanted["count"], wanted.get("position", ("", 0))
        group = objects.get(name, [])[:count]
        colours = [(colour_of or attrgetter("colour"))(each) for each in group] if "color" in wanted else []
        others, before = groups[target] if relation else [], len(faults)
        sides = [relative_position(one.box, other.box) for one in group for other in others]
        if len(group) < count:
            faults.append(f"expected {count} {name}, found {len(group)}")
        elif any(colour != wanted["color"] for colour in colours):
            faults.append(f"expected {wanted['color']} {name}, found {', '.join(map(str, colours))}")
        elif relation and not others:
            faults.append(f"found nothing for {name} to be {relation}")
        elif wrong := [" and ".join(side) or "neither side" for side in sides if relation not in side]:
            faults.append(f"expected {name} {relation} {others[0].label}, found {wrong[0]}")
        groups.append(group if len(faults) == before else [])
    for bad in truth.get("exclude", []):
        if (count := len(objects.get(bad["class"], []))) >= bad["count"]:
            faults.append(f"expected fewer than {bad['count']} {bad['class']}, found {count}")
    return Verdict(not faults, "; ".join(faults))


def relative_position(box: Box, other: Box) -> list[str]:
    """Sides of `other` on which a box lies: there its offset, less `SLACK` of the sizes, is over half of the whole."""
    corners = np.array([box, other], dtype=float).reshape(2, 2, 2)  # box, corner, axis
    offset, sizes = -np.diff(corners.mean(1), axis=0)[0], np.ptp(corners, axis=1).sum(0)
    beyond = np.maximum(np.abs(offset) - SLACK * sizes, 0) * np.sign(offset)
    x, y = beyond / np.hypot(*offset) if np.abs(beyond).max() >= 1e-3 else (0, 0)
    return [name for name, share in zip(RELATIONS, (-x, x, -y, y), strict=True) if share > 0.5]


def task_scores(truths: Sequence[Truth], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Share of right pictures by task, in the order of `TASKS`, and "overall": the mean of the tasks that are there."""
    right: dict[str, list[bool]] = {}
    for truth, each in zip(truths, verdicts, strict=True):
        right.setdefault(truth["tag"], []).append(each.correct)
    scores = {task: sum(right[task]) / len(right[task]) for task in sorted(right, key=TASKS.index)}
    return scores | {"overall": sum(scores.values()) / len(scores)}


def geneval_prompts(seed: int = 43) -> list[Truth]:
    """Prompts by the benchmark's scheme, as metadata: with its own seed its own 553, with another others."""
    rng, truths = np.random.default_rng(seed), dict[str, Truth]()

    def draw(pool: Sequence[str], size: int | None = None) -> list[str]:
        return np.atleast_1d(rng.choice(pool, size, replace=size is None)).tolist()

    singles = draw(OBJECTS, len(OBJECTS))
    for task in [TASKS[0]] * len(OBJECTS) + [task for task in TASKS[1:] for _ in range(100)]:
        size, coloured, count = None if task in ("counting", "colors") else 2, "color" in task, 1
        names = [singles.pop(0)] if singles else draw(OBJECTS[coloured:], size)  # no person has a colour
        colours = draw(COLOURS, size) if coloured else []
        words = [f"{colour} {name}" for colour, name in zip(colours, names, strict=False)] or names
        link = draw(list(RELATIONS))[0] if task == "position" else "and"
        text = f" {link} ".join(f"{'an' if word[0] in 'aeiou' else 'a'} {word}" for word in words)
        if task == "counting":
            count = int(rng.integers(2, 5))
            text = f"{('two', 'three', 'four')[count - 2]} {names[0]}{'es' if names[0].endswith('s') else 's'}"
        extras = [{"color": colour} for colour in colours] or [{}, {}]
        include = [{"class": name, "count": count} | extra for name, extra in zip(names, extras, strict=False)]
        if task == "position":
            include = [include[1], include[0] | {"position": [link, 0]}]
        exclude = [{"class": names[0], "count": count + 1}] if task == "counting" else []
        truths[text] = {"tag": task, "include": include, "exclude": exclude, "prompt": f"a photo of {text}"}
    return list(truths.values())


def read_metadata(path: Path) -> list[Truth]:
    """The lines of the benchmark's evaluation_metadata.jsonl; UserError names the first that is none."""
    truths: list[Truth] = []
    kinds = ValueError, TypeError, KeyError, AttributeError
    for number, line in enumerate(path.read_bytes().rstrip().splitlines() if path.is_file() else [], 1):
        with user_error(f"Line {number} of {path} is not a prompt of GenEval ({{}}).", *kinds):
            truths.append(json.loads(line))
            known = truths[-1]["tag"] in TASKS and isinstance(truths[-1]["prompt"], str)
            for index, clause in enumerate([*truths[-1]["include"], *truths[-1].get("exclude", [])]):
                relation, target = clause.get("position", ("above", 0))
                known &= clause["class"] in OBJECTS and clause["count"] > 0 and clause.get("color", "red") in COLOURS
                known &= relation in RELATIONS and ("position" not in clause or target in range(index))
            if not known:
                raise ValueError("its task, a class, count, colour or position is not one of the benchmark's")
    if not truths:
        raise UserError(f"There is no prompt in {path}; give the benchmark's evaluation_metadata.jsonl.")
    return truths


class GenEval:
    """The benchmark: four pictures for each of `truths`, by default its own prompts.

    `weights` says where "mask2former" and "clip-vit-l-14" are (folder or name on the hub); `detect` replaces the first.
    """

    def __init__(self, weights: Mapping[str, str], *, truths: Sequence[Truth] = (), detect: Detect | None = None):
        self.weights, self.truths, self.detect = weights, truths or geneval_prompts(), detect

    def prompts(self) -> list[Prompt]:
        """The pictures of a prompt are neighbours."""
        truths = [truth for truth in self.truths for _ in range(4)]
        return [Prompt(truth["prompt"], derive_seed(0, "geneval", i), truth) for i, truth in enumerate(truths)]

    def score(self, pictures: PictureFolder, device: torch.device) -> Scores:
        """Each picture by the truth that it was drawn for; UserError for a folder of other pictures."""
        truths = [prompt.truth for prompt in pictures.prompts or [] if prompt.truth.get("tag") in TASKS]
        if len(truths) != len(pictures):
            raise UserError(f"{pictures.path} was not drawn for GenEval: draw its prompts into a folder of their own.")
        own = (self.detect, "a detector of your own", False) if self.detect else None
        detect, eye, known = own or mask2former(self.weights.get("mask2former", DETECTOR), device)
        colour_of, clip, usual = clip_colours(self.weights.get("clip-vit-l-14", CLIP), device)
        drawn = zip(truths, pictures, strict=True)
        verdicts = [verdict(truth, detect(each), colour_of=partial(colour_of, each)) for truth, each in drawn]
        warnings = [] if usual and known else [f"Not comparable with GenEval: it is measured by {eye} and {clip}."]
        if sorted(truth["prompt"] for truth in truths) != sorted(truth["prompt"] for truth in geneval_prompts() * 4):
            warnings.append("Not comparable with GenEval: these are not its 553 prompts, each drawn four times.")
        protocol = f"{len(truths)} pictures; objects by {eye}, colours by {clip}, thresholds of GenEval's authors"
        each = {"GenEval": [float(one.correct) for one in verdicts]}
        return Scores(protocol, task_scores(truths, verdicts), each, warnings, [one.reason for one in verdicts])


def mask2former(place: str, device: torch.device) -> tuple[Detect, str, bool]:
    """A detector by transformers' Mask2Former of COCO, its name and hash, and whether it is of the authors' size.

    Pictures are scaled as by mmdet, whatever the folder says: bilinear, to bytes, without smoothing.
    """
    model, folder, digest = from_transformers("mask2former", place, "Mask2FormerForUniversalSegmentation")
    if model.config.num_labels != len(OBJECTS):
        raise UserError(f"{folder} is not a whole Mask2Former of COCO's {len(OBJECTS)} classes; take {DETECTOR}.")
    model, swin = model.to(device), model.config.backbone_config.to_dict()
    mean, std = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]], device=device).view(2, 3, 1, 1)

    @torch.inference_mode()
    def detect(picture: Image.Image) -> Sequence[Detection]:
        scale = min(800 / min(picture.size), 1333 / max(picture.size))
        width, height = (int(side * scale + 0.5) for side in picture.size)
        pixels = torch.tensor(np.asarray(picture), device=device).permute(2, 0, 1)[None].float()
        pixels = (interpolate(pixels, (height, width), mode="bilinear").round() - mean) / std
        pixels = pad(pixels, (0, -width % 32, 0, -height % 32))
        out = model(pixel_values=pixels)
        masks = interpolate(out.masks_queries_logits, pixels.shape[-2:], mode="bilinear")[..., :height, :width]
        return instances(out.class_queries_logits[0], interpolate(masks, picture.size[::-1], mode="bilinear")[0])

    usual = swin.get("embed_dim") == 96 and swin.get("depths") == [2, 2, 18, 2]
    return detect, f"Mask2Former ({place}, {digest[:12]})", usual


def instances(classes: Float[Tensor, "q c"], masks: Float[Tensor, "q h w"]) -> list[Detection]:
    """What logits say (the last class: nothing), as mmdet reads them: of the likeliest 100 pairs of query and class.

    The score is the class's probability times the mean probability of the mask's pixels; only what is `SURE` is kept.
    """
    chances, found = classes.softmax(-1)[:, :-1], []
    best = chances.flatten().topk(min(100, chances.numel()))
    for chance, pair in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        query, label = divmod(pair, chances.shape[1])
        mask = Image.fromarray((masks[query] > 0).cpu().numpy()) if chance > SURE else None
        if mask and (box := mask.getbbox()):
            score = chance * masks[query][masks[query] > 0].sigmoid().mean().item()
            found.append(Detection(OBJECTS[label], box, score, mask=mask))
    return [each for each in found if each.score > SURE]


def clip_colours(place: str, device: torch.device) -> tuple[Callable[[Image.Image, Detection], str], str, bool]:
    """Colours of objects by OpenCLIP, zero-shot on boxes with grey around the masks; else as `mask2former`."""
    library, groups = pretrained.optional_package("open_clip"), [[file] for file in openclip.WEIGHTS]
    folder = pretrained.part_folder(place, openclip.FILES, weights=groups)
    files = pretrained.weight_files("CLIP", folder, groups)
    kinds = OSError, ValueError, TypeError, RuntimeError, KeyError
    with user_error(f"The CLIP in {folder} does not load ({{}}).", *kinds, told=pretrained.first_line):
        model, _, prepare = library.create_model_and_transforms(f"local-dir:{folder}", device=device)
        tokenizer = library.get_tokenizer(f"local-dir:{folder}")
        vision = library.get_model_config(f"local-dir:{folder}")["vision_cfg"]
    model.eval()

    @torch.inference_mode()
    def colour_of(picture: Image.Image, thing: Detection) -> str:
        if thing.mask:
            picture = Image.composite(picture, Image.new("RGB", picture.size, "#999"), thing.mask)
        seen = model.encode_image(prepare(picture.crop(thing.box))[None].to(device))[0]
        texts = [template.format(colour, thing.label) for colour in COLOURS for template in TEMPLATES]
        words = model.encode_text(tokenizer(texts).to(device), normalize=True).unflatten(0, (len(COLOURS), -1))
        return COLOURS[int((normalize(words.mean(1), dim=-1) @ seen).argmax())]

    usual = (vision.get("width"), vision.get("layers"), vision.get("patch_size")) == (1024, 24, 14)
    return colour_of, f"CLIP ({place}, {pretrained.weights_sha256(files)[:12]})", usual
