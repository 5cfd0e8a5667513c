"""GenEval's logic on scenes with exact boxes, its prompts, and small random networks of the published kinds."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from real_formats import seeded, write_openclip

from micro_diffusion.evaluation import geneval
from micro_diffusion.evaluation.geneval import (
    COLOURS,
    OBJECTS,
    TASKS,
    Detection,
    GenEval,
    Truth,
    Verdict,
    geneval_prompts,
    read_metadata,
    relative_position,
    task_scores,
    verdict,
)
from micro_diffusion.evaluation.pictures import PictureFolder, file_name, prompts_text
from micro_diffusion.runtime.files import UserError

CPU = torch.device("cpu")
HERE, RIGHT, BELOW = (10, 10, 30, 30), (60, 10, 80, 30), (10, 60, 30, 80)


def thing(label: str, box: Sequence[float] = HERE, score: float = 1.0, colour: str | None = None) -> Detection:
    left, top, right, bottom = box
    return Detection(label, (left, top, right, bottom), score, colour)


def cups(count: int, score: float = 0.95) -> list[Detection]:
    return [thing("cup", (30 * i, 0, 30 * i + 20, 20), score) for i in range(count)]


def truth(tag: str, *include: dict[str, Any], exclude: Sequence[dict[str, Any]] = ()) -> Truth:
    return {"tag": tag, "include": [{"count": 1} | each for each in include], "exclude": list(exclude), "prompt": tag}


SINGLE = truth("single_object", {"class": "cup"})
TWO = truth("two_object", {"class": "cup"}, {"class": "dog"})
THREE = truth("counting", {"class": "cup", "count": 3}, exclude=[{"class": "cup", "count": 4}])
RED = truth("colors", {"class": "cup", "color": "red"})
LEFT = truth("position", {"class": "dog"}, {"class": "cup", "position": ["left of", 0]})
BOTH = truth("color_attr", {"class": "cup", "color": "red"}, {"class": "dog", "color": "blue"})


@pytest.mark.parametrize(
    ("asked", "found", "reason"),
    [
        (SINGLE, [thing("cup")], ""),
        (SINGLE, [thing("cup"), thing("cup", RIGHT), thing("dog")], ""),  # more is no fault where nothing is excluded
        (SINGLE, [thing("dog")], "expected 1 cup, found 0"),
        (SINGLE, [], "expected 1 cup, found 0"),
        (SINGLE, [thing("cup", score=0.31)], ""),
        (SINGLE, [thing("cup", score=0.3)], "expected 1 cup, found 0"),
        (TWO, [thing("dog"), thing("cup", RIGHT)], ""),
        (TWO, [thing("dog"), thing("cup")], ""),
        (TWO, [thing("dog"), thing("dog", RIGHT)], "expected 1 cup, found 0"),
        (TWO, [], "expected 1 cup, found 0; expected 1 dog, found 0"),
        (THREE, cups(3), ""),
        (THREE, cups(2), "expected 3 cup, found 2"),
        (THREE, cups(4), "expected fewer than 4 cup, found 4"),
        (THREE, cups(5), "expected fewer than 4 cup, found 5"),
        (THREE, [*cups(3), thing("dog")], ""),
        (THREE, cups(3, score=0.9), "expected 3 cup, found 0"),
        (THREE, [*cups(3), thing("cup", BELOW, 0.9)], ""),  # not sure enough to be one too many
        (THREE, [thing("cup")] * 3, ""),  # boxes at one place are not merged
        (THREE, cups(40), "expected fewer than 4 cup, found 16"),
        (RED, [thing("cup", colour="red")], ""),
        (RED, [thing("cup", colour="blue")], "expected red cup, found blue"),
        (RED, [thing("dog", colour="red")], "expected 1 cup, found 0"),
        (
            RED,
            [thing("cup", score=0.5, colour="red"), thing("cup", RIGHT, 0.6, "blue")],
            "expected red cup, found blue",
        ),
        (RED, [thing("cup", score=0.6, colour="red"), thing("cup", RIGHT, 0.5, "blue")], ""),
        (RED, [thing("cup")], "expected red cup, found None"),
        (LEFT, [thing("cup"), thing("dog", RIGHT)], ""),
        (LEFT, [thing("dog"), thing("cup", RIGHT)], "expected cup left of dog, found right of"),
        (LEFT, [thing("cup"), thing("dog", BELOW)], "expected cup left of dog, found above"),
        (LEFT, [thing("cup"), thing("dog", (60, 60, 80, 80))], ""),  # left and above
        (LEFT, [thing("cup"), thing("dog")], "expected cup left of dog, found neither side"),
        (LEFT, [thing("dog", RIGHT)], "expected 1 cup, found 0"),
        (LEFT, [thing("cup")], "expected 1 dog, found 0; found nothing for cup to be left of"),
        (LEFT, [thing("cup"), thing("dog", RIGHT, 0.8), thing("dog", (-50, 10, -30, 30), 0.7)], ""),
        (BOTH, [thing("cup", colour="red"), thing("dog", RIGHT, colour="blue")], ""),
        (BOTH, [thing("cup", colour="blue"), thing("dog", RIGHT, colour="blue")], "expected red cup, found blue"),
        (
            BOTH,
            [thing("cup", colour="blue"), thing("dog", RIGHT, colour="red")],
            "expected red cup, found blue; expected blue dog, found red",
        ),
    ],
)
def test_scenes(asked: Truth, found: list[Detection], reason: str) -> None:
    assert verdict(asked, found) == verdict(asked, found[::-1]) == Verdict(not reason, reason)


def test_every_pair_of_a_group_must_stand_as_asked_and_a_failed_group_is_no_mark() -> None:
    asked = truth("position", {"class": "dog", "count": 2}, {"class": "cup", "position": ["left of", 0]})
    dogs = [thing("dog", RIGHT), thing("dog", (100, 10, 120, 30))]
    assert verdict(asked, [thing("cup"), *dogs]).correct
    assert verdict(asked, [thing("cup", (80, 10, 100, 30)), *dogs]).reason == "expected cup left of dog, found right of"
    red = truth("position", {"class": "dog", "color": "red"}, {"class": "cup", "position": ["left of", 0]})
    blue_dog = thing("dog", RIGHT, colour="blue")
    assert verdict(red, [thing("cup"), blue_dog]).reason.endswith("found nothing for cup to be left of")


def test_colours_are_asked_of_the_surest_only() -> None:
    asked: list[float] = []

    def colour_of(each: Detection) -> str:
        asked.append(each.score)
        return "red"

    found = [thing("cup", score=0.5), thing("cup", score=0.8), thing("dog", score=0.9)]
    assert verdict(RED, found, colour_of=colour_of).correct and asked == [0.8]
    assert verdict(SINGLE, found, colour_of=colour_of).correct and asked == [0.8]


@pytest.mark.parametrize(
    ("offset", "sides"),
    [
        # boxes of 20 by 10: the slack is 4 on x and 2 on y, and what exceeds it must be over half of the distance
        ((8, 0), []), ((8.1, 0), ["right of"]), ((-8, 0), []), ((-8.1, 0), ["left of"]),
        ((0, 4), []), ((0, 4.1), ["below"]), ((0, -4.1), ["above"]), ((0, 0), []), ((4, 2), []),
        ((100, 100), ["right of", "below"]), ((-100, 100), ["left of", "below"]), ((100, 20), ["right of"]),
        ((50, 90), ["below"]),  # 46 of 103 is less than half
        ((60, 90), ["right of", "below"]),  # 56 of 108 is more
    ],
)  # fmt: skip
def test_edges_of_the_rule_of_places(offset: tuple[float, float], sides: list[str]) -> None:
    x, y = offset
    assert relative_position((50 + x, 50 + y, 70 + x, 60 + y), (50, 50, 70, 60)) == sides


coordinates = st.integers(-200, 200).map(float)
boxes = st.builds(lambda x, y, w, h: (x, y, x + w, y + h), coordinates, coordinates, *[st.integers(1, 150)] * 2)
MIRRORED = {"left of": "right of", "right of": "left of", "above": "above", "below": "below"}
OPPOSITE = MIRRORED | {"above": "below", "below": "above"}
TURNED = {"left of": "above", "above": "left of", "right of": "below", "below": "right of"}


@given(boxes, boxes)
def test_places_in_a_mirror_turned_and_from_the_other_side(box: geneval.Box, other: geneval.Box) -> None:
    sides = set(relative_position(box, other))

    def mirrored(b: geneval.Box) -> geneval.Box:
        return (-b[2], b[1], -b[0], b[3])

    def turned(b: geneval.Box) -> geneval.Box:
        return (b[1], b[0], b[3], b[2])

    assert set(relative_position(mirrored(box), mirrored(other))) == {MIRRORED[side] for side in sides}
    assert set(relative_position(turned(box), turned(other))) == {TURNED[side] for side in sides}
    assert set(relative_position(other, box)) == {OPPOSITE[side] for side in sides}
    assert len(sides) <= 2 and not {"left of", "right of"} <= sides and not {"above", "below"} <= sides


@given(boxes, boxes)
def test_places_against_the_rule_in_words(box: geneval.Box, other: geneval.Box) -> None:
    """Each side by itself and without vectors, for numbers away from the threshold."""
    dx, dy = sum(box[::2]) / 2 - sum(other[::2]) / 2, sum(box[1::2]) / 2 - sum(other[1::2]) / 2
    width, height = box[2] - box[0] + other[2] - other[0], box[3] - box[1] + other[3] - other[1]
    distance = (dx**2 + dy**2) ** 0.5
    margins = {
        "left of": -dx - width / 10 - distance / 2, "right of": dx - width / 10 - distance / 2,
        "above": -dy - height / 10 - distance / 2, "below": dy - height / 10 - distance / 2,
    }  # fmt: skip
    sides = relative_position(box, other)
    assert all((side in sides) == (margin > 0) for side, margin in margins.items() if abs(margin) > 1e-2)


@given(st.permutations([*cups(3), thing("dog", RIGHT, 0.4), thing("cat", BELOW, 0.95), thing("cup", HERE, 0.2)]))
def test_the_order_of_detections_does_not_matter(found: list[Detection]) -> None:
    assert verdict(THREE, found).correct and verdict(TWO, found).correct


def test_scores_are_means_of_tasks() -> None:
    truths = [RED, SINGLE, SINGLE, SINGLE, SINGLE]
    verdicts = [Verdict(right, "") for right in (False, True, True, True, False)]
    scores = task_scores(truths, verdicts)
    assert scores == {"single_object": 0.75, "colors": 0.0, "overall": 0.375} and [*scores] == [
        "single_object",
        "colors",
        "overall",
    ]
    with pytest.raises(ValueError, match="shorter"):
        task_scores(truths, verdicts[:2])


def test_the_benchmarks_own_prompts() -> None:
    """Counts as published; prompts that papers and reports on the benchmark show; and a hash against any change."""
    truths = geneval_prompts()
    assert Counter(each["tag"] for each in truths) == dict(zip(TASKS, (80, 99, 80, 94, 100, 100), strict=True))
    assert {each["include"][0]["class"] for each in truths[:80]} == set(OBJECTS) and len(OBJECTS) == 80
    texts = [each["prompt"].removeprefix("a photo of ") for each in truths]
    assert texts[:6] == ["a bench", "a cow", "a bicycle", "a clock", "a carrot", "a suitcase"]
    shown = [
        "a bench and a sports ball", "a giraffe and a computer mouse", "two clocks", "four buses", "three benchs",
        "two wine glasses", "a yellow orange", "a red dog", "a toothbrush below a pizza", "a tie above a sink",
        "a skateboard above a person", "a suitcase above a skis", "an orange giraffe and a white baseball glove",
        "a brown hot dog and a purple pizza", "a black potted plant and a yellow toilet",
    ]  # fmt: skip
    assert set(shown) <= set(texts)
    assert truths[texts.index("four buses")]["exclude"] == [{"class": "bus", "count": 5}]
    assert truths[texts.index("a tie above a sink")]["include"] == [
        {"class": "sink", "count": 1},
        {"class": "tie", "count": 1, "position": ["above", 0]},
    ]
    digest = hashlib.sha256("\n".join(each["prompt"] for each in truths).encode()).hexdigest()
    assert digest == "4de60dfc3c29f9d3db69ec45cf03a964627c2d82f2c224c3f75645e137f7126b"


def test_other_seeds_draw_other_prompts_by_the_same_scheme() -> None:
    truths = geneval_prompts(7)
    assert truths == geneval_prompts(7) != geneval_prompts(8)
    assert len({each["prompt"] for each in truths}) == len(truths)
    for each in truths:
        clauses = each["include"]
        assert len(clauses) == (1 if each["tag"] in ("single_object", "counting", "colors") else 2)
        assert all(("color" in clause) == ("color" in each["tag"]) for clause in clauses)
        assert not any(clause["class"] == "person" for clause in clauses if "color" in clause)
        assert len({clause["class"] for clause in clauses}) == len(clauses)
        if each["tag"] == "counting":
            assert each["exclude"] == [{"class": clauses[0]["class"], "count": clauses[0]["count"] + 1}]
            assert clauses[0]["count"] in (2, 3, 4)


def test_reads_the_benchmarks_file(tmp_path: Path) -> None:
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in geneval_prompts()) + "\n")
    assert read_metadata(path) == geneval_prompts()


GOOD = '{"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a photo of a red dog"}'


@pytest.mark.parametrize(
    "bad",
    [
        "{", "[]", "3", "null", "\xff", "", '{"include": [], "prompt": ""}',
        GOOD.replace("colors", "colours"), GOOD.replace("dog", "unicorn"), GOOD.replace("red", "crimson"),
        GOOD.replace('1, "color"', '0, "color"'), GOOD.replace('1, "color"', '"one", "color"'),
        GOOD.replace('"a photo of a red dog"', "null"), GOOD.replace('[{"class"', '{"class"').replace("}]", "}"),
        GOOD.replace('"color": "red"', '"position": ["left of", 0]'),  # of itself
        GOOD.replace('"color": "red"', '"position": ["left of", -1]'),
        GOOD.replace('"color": "red"', '"position": ["behind", 0]'), GOOD.replace('"color": "red"', '"position": 1'),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "metadata.jsonl"
    path.write_bytes(f"{GOOD}\n".encode() + bad.encode("latin-1") + f"\n{GOOD}\n".encode())
    with pytest.raises(UserError, match=r"^Line 2 of .*metadata.jsonl is not a prompt of GenEval \(.+\)\.$"):
        read_metadata(path)


def test_no_prompts(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.jsonl", tmp_path / "empty.jsonl", tmp_path):
        (tmp_path / "empty.jsonl").touch()
        with pytest.raises(UserError, match="no prompt in .*evaluation_metadata.jsonl"):
            read_metadata(path)


def test_boxes_and_scores_of_masks() -> None:
    """Logits of three queries by hand: a box of pixels, an empty mask, and one that two classes claim."""
    masks = torch.full((3, 8, 12), -4.0)
    masks[0, 2:5, 3:10], masks[0, 2, 3] = 2.0, 1.0
    masks[2, 7, 11] = 3.0
    classes = torch.zeros(3, 81)
    classes[0, 16], classes[1, 2], classes[2, 0], classes[2, 79] = 9.0, 9.0, 20.0, 20.0
    dog, first, second = sorted(geneval.instances(classes, masks), key=lambda each: OBJECTS.index(each.label) != 16)
    assert dog.label == "dog" and dog.box == (3, 2, 10, 5)
    inside = torch.tensor([2.0] * 20 + [1.0]).sigmoid().mean()
    assert dog.score == pytest.approx((classes[0].softmax(0)[16] * inside).item(), rel=1e-5)
    assert dog.mask is not None and dog.mask.getpixel((3, 2)) and not dog.mask.getpixel((2, 2))
    assert sum(dog.mask.histogram()[1:]) == 21
    assert {first.label, second.label} == {"person", "toothbrush"} and first.box == second.box == (11, 7, 12, 8)
    assert first.score == pytest.approx(0.5 * torch.tensor(3.0).sigmoid().item(), rel=1e-4)
    masks[2] -= 2.7  # its probability falls to 0.57, the score to 0.29
    assert [each.label for each in geneval.instances(classes, masks)] == ["dog"]


def write_mask2former(folder: Path, *, classes: int = 80) -> Any:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    swin = SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=10,
        num_labels=classes,
    )  # fmt: skip
    model = seeded(lambda: Mask2FormerForUniversalSegmentation(config)).eval()
    torch.nn.init.normal_(model.class_predictor.weight, std=3.0, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("networks")
    write_mask2former(folder / "mask2former")
    write_openclip(folder / "clip")
    return {"mask2former": str(folder / "mask2former"), "clip-vit-l-14": str(folder / "clip")}


def draw(folder: Path, benchmark: GenEval, size: tuple[int, int] = (96, 64)) -> PictureFolder:
    folder.mkdir()
    prompts = benchmark.prompts()
    (folder / "prompts.jsonl").write_text(prompts_text(prompts))
    for index in range(len(prompts)):
        picture = Image.new("RGB", size, "white")
        ImageDraw.Draw(picture).rectangle((10, 10, 30, 30), fill=COLOURS[index % len(COLOURS)])
        picture.save(folder / file_name(index))
    return PictureFolder(folder)


def test_pixels_as_mmdet_prepares_them(networks: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The shorter side is 800 unless the longer then passes 1333; padding to 32 is nought; masks come back whole."""
    from transformers import Mask2FormerForUniversalSegmentation
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput

    seen = []

    def forward(self: Any, pixel_values: torch.Tensor) -> Any:
        seen.append(pixel_values)
        height, width = pixel_values.shape[-2:]
        masks, classes = torch.full((1, 1, height // 4, width // 4), -5.0), torch.zeros(1, 1, 81)
        masks[..., 20:40, 150:202], classes[..., 15] = 5.0, 30.0
        return Mask2FormerForUniversalSegmentationOutput(class_queries_logits=classes, masks_queries_logits=masks)

    monkeypatch.setattr(Mask2FormerForUniversalSegmentation, "forward", forward)
    detect, _, usual = geneval.mask2former(networks["mask2former"], CPU)
    assert not usual
    (cat,) = detect(Image.new("RGB", (101, 100), (255, 0, 127)))
    assert seen[0].shape == (1, 3, 800, 832)  # 808 and 24 of padding
    expected = torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, (127 / 255 - 0.406) / 0.225])
    torch.testing.assert_close(seen[0][0, :, 400, 600], expected, atol=1e-4, rtol=1e-4)
    assert not seen[0][..., 808:].any() and seen[0][..., 807].all()
    # rows 80 to 160 and columns 600 to 808 of 800 by 808, an eighth of that in the picture
    assert cat.label == "cat" and cat.box == (75, 10, 101, 20) and cat.score > 0.9
    assert cat.mask is not None and cat.mask.size == (101, 100)
    detect(Image.new("RGB", (100, 400)))
    assert seen[1].shape == (1, 3, 1344, 352) and not seen[1][:, :, 1333:].any()  # 333 by 1333
    detect(Image.linear_gradient("L").convert("RGB"))
    reds = seen[2][0, 0, :800, :800] * 58.395 + 123.675
    assert (reds - reds.round()).abs().max() < 1e-3 and len(reds.round().unique()) == 256


def test_colours_agree_with_open_clip(networks: dict[str, str]) -> None:
    """Against the classifier written out: three sentences a colour, and grey where the object is not."""
    colour_of, _, usual = geneval.clip_colours(networks["clip-vit-l-14"], CPU)
    place = f"local-dir:{networks['clip-vit-l-14']}"
    model, _, prepare = open_clip.create_model_and_transforms(place)
    tokenizer = open_clip.get_tokenizer(place)
    rows = []
    for colour in COLOURS:
        texts = [f"a photo of a {colour} dog", f"a photo of a {colour}-colored dog", f"a photo of a {colour} object"]
        vectors = model.encode_text(tokenizer(texts)).detach()
        mean = (vectors / vectors.norm(dim=1, keepdim=True)).mean(0)
        rows.append(mean / mean.norm())
    answers = []
    for seed in range(12):
        noise = torch.rand(40, 60, 3, generator=torch.Generator().manual_seed(seed))
        picture = Image.fromarray((noise * 255).byte().numpy())
        mask = Image.new("1", (60, 40))
        ImageDraw.Draw(mask).ellipse((10, 5, 39, 34), fill=1)
        grey = Image.new("RGB", (60, 40), (0x99, 0x99, 0x99))
        grey.paste(picture, (0, 0), mask)
        for each, shown in ((mask, grey), (None, picture)):
            features = model.encode_image(prepare(shown.crop((10, 5, 40, 35)))[None])[0].detach()
            answers.append(COLOURS[int((torch.stack(rows) @ features).argmax())])
            assert colour_of(picture, Detection("dog", (10, 5, 40, 35), mask=each)) == answers[-1]
    assert len(set(answers)) > 1 and not usual


def test_prompts_carry_truth_and_seeds_of_their_own() -> None:
    prompts = GenEval({}).prompts()
    assert len(prompts) == len({prompt.seed for prompt in prompts}) == 4 * 553
    assert prompts == GenEval({}).prompts()
    assert [prompt.text for prompt in prompts[:5]] == ["a photo of a bench"] * 4 + ["a photo of a cow"]
    assert all(prompt.truth["prompt"] == prompt.text for prompt in prompts)


def test_another_detector_is_not_comparable(tmp_path: Path, networks: dict[str, str]) -> None:
    def detect(picture: Image.Image) -> list[Detection]:
        return cups(2) if picture.getpixel((20, 20)) == (255, 0, 0) else cups(3)

    benchmark = GenEval(networks, truths=[THREE, SINGLE], detect=detect)
    scores = benchmark.score(draw(tmp_path / "pictures", benchmark), CPU)
    assert scores.numbers == {"single_object": 1.0, "counting": 0.75, "overall": 0.875}
    assert scores.each == {"GenEval": [0, 1, 1, 1, 1, 1, 1, 1]}
    assert scores.notes == ["expected 3 cup, found 2"] + [""] * 7
    assert len(scores.warnings) == 2 and all("Not comparable" in warning for warning in scores.warnings)
    assert "detector of your own" in scores.protocol and "8 pictures" in scores.protocol


def test_the_benchmarks_pictures_and_networks_are_comparable(
    tmp_path: Path, networks: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(geneval, "mask2former", lambda place, device: (lambda picture: [], "it", True))
    monkeypatch.setattr(geneval, "clip_colours", lambda place, device: (lambda picture, each: "red", "its", True))
    monkeypatch.setattr(PictureFolder, "__getitem__", lambda self, index: Image.new("RGB", (8, 8)))
    benchmark = GenEval({})
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "prompts.jsonl").write_text(prompts_text(benchmark.prompts()))
    monkeypatch.setattr(Path, "is_file", lambda self: True)
    pictures = PictureFolder(folder)
    monkeypatch.setattr(PictureFolder, "__iter__", lambda self: (self[0] for _ in range(len(self))))
    scores = benchmark.score(pictures, CPU)
    assert not scores.warnings and [*scores.numbers] == [*TASKS, "overall"] and scores.numbers["overall"] == 0.0


def test_pictures_drawn_for_something_else(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for text in (None, "a cat"):
        if text:
            (tmp_path / "a.txt").write_text(text)
        with pytest.raises(UserError, match="was not drawn for GenEval"):
            GenEval({}).score(PictureFolder(tmp_path), CPU)


def test_networks_that_are_none(tmp_path: Path, networks: dict[str, str]) -> None:
    write_mask2former(tmp_path / "few", classes=5)
    with pytest.raises(UserError, match="not a whole Mask2Former of COCO's 80 classes"):
        geneval.mask2former(str(tmp_path / "few"), CPU)
    with pytest.raises(UserError, match="no file model.safetensors"):
        geneval.mask2former(networks["clip-vit-l-14"], CPU)
    with pytest.raises(UserError, match="no file open_clip_model.safetensors"):
        geneval.clip_colours(networks["mask2former"], CPU)
    with pytest.raises(UserError, match="hub does not give it"):
        geneval.mask2former("nobody/nothing", CPU)


@pytest.mark.slow
def test_random_networks_end_to_end(tmp_path: Path, networks: dict[str, str]) -> None:
    detect, _, _ = geneval.mask2former(networks["mask2former"], CPU)
    truths = [truth("colors", {"class": each, "color": "red"}) for each in ("cup", "dog")]
    benchmark = GenEval(networks, truths=truths)
    pictures = draw(tmp_path / "pictures", benchmark, (96, 64))
    assert any(detect(picture) for picture in pictures)
    for found in (detect(pictures[0]), detect(pictures[5])):
        for each in found:
            left, top, right, bottom = each.box
            assert 0 <= left < right <= 96 and 0 <= top < bottom <= 64 and 0.3 < each.score <= 1
    scores = benchmark.score(pictures, CPU)
    assert len(scores.each["GenEval"]) == len(scores.notes) == 8
    assert [*scores.numbers] == ["colors", "overall"] and len(scores.warnings) == 2
    assert all(
        note.startswith("expected")
        for note, right in zip(scores.notes, scores.each["GenEval"], strict=True)
        if not right
    )
