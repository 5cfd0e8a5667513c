"""Scenes: the same ones everywhere, truth and picture in agreement, nothing held out in training."""

import colorsys
import itertools

import numpy as np
import pytest
from PIL import Image

from micro_diffusion.data.records import decode_image
from micro_diffusion.data.sources.emoji import emoji_table
from micro_diffusion.data.sources.emoji_scenes import (
    COLOURS,
    CONCEPTS,
    EDGE,
    STYLE_WORDS,
    TASKS,
    Group,
    Scene,
    compose,
    cut_out,
    emoji_scene_records,
    known,
    scenes,
    tinted,
)
from micro_diffusion.evaluation.geneval import Detection, relative_position, verdict
from micro_diffusion.runtime.files import UserError


def some(count, *, task=None, seed=3, wanted=lambda scene: True):
    return list(itertools.islice(scenes(seed, task=task, wanted=wanted), count))


def test_always_the_same_and_one_by_one():
    rows = some(6)
    assert rows == some(6) and rows != some(6, seed=4)
    kept = [scene for scene in some(300) if not scene.held_out]
    assert kept[:3] != rows[:3] or rows[0] in kept
    assert [compose(scene)[0].tobytes() for scene in rows] == [compose(scene)[0].tobytes() for scene in some(6)]


def test_no_scene_for_training_has_a_held_out_composition():
    held = {}
    for scene in some(3000):
        for kind in scene.held_out:
            held[kind] = held.get(kind, 0) + 1
    assert set(held) == {"pair", "colour", "count"}
    train = some(400, wanted=lambda scene: not scene.held_out)
    assert not any(scene.held_out for scene in train)
    assert all(scene.held_out for scene in some(50, task="position", wanted=lambda scene: bool(scene.held_out)))


def test_a_composition_is_held_out_whatever_else_the_scene_shows():
    pair = next(scene for scene in some(500, task="two_object") if "pair" in scene.held_out)
    turned = pair._replace(groups=pair.groups[::-1], relation="above", style="noto", ground="white", seed=0)
    assert "pair" in turned.held_out
    assert "pair" not in pair._replace(groups=pair.groups[:1]).held_out


def test_about_a_tenth_of_compositions_is_held_out():
    pairs = [
        Scene((Group(a, 1, None), Group(b, 1, None)), None, "noto", "white", 0)
        for a, b in itertools.combinations(CONCEPTS, 2)
    ]
    share = sum(map(bool, (scene.held_out for scene in pairs))) / len(pairs)
    assert 0.08 < share < 0.12


@pytest.mark.parametrize("task", TASKS)
def test_picture_and_truth_agree(task):
    for scene in some(40, task=task):
        picture, objects = compose(scene)
        assert picture.size == (EDGE, EDGE) and scene.task == task
        boxes = [box for box, _ in objects]
        assert all(0 <= box[0] < box[2] <= EDGE and 0 <= box[1] < box[3] <= EDGE for box in boxes)
        for a, b in itertools.combinations(boxes, 2):
            assert a[0] > b[2] or b[0] > a[2] or a[1] > b[3] or b[1] > a[3]
        found = [Detection(group.concept, box, 1.0, group.colour) for box, group in objects]
        assert verdict(scene.truth, found).correct, (scene, found)
        assert not verdict(scene.truth, found[1:]).correct
        if scene.relation:
            assert relative_position(boxes[0], boxes[1]) == [scene.relation]


def test_a_wrong_colour_count_or_place_is_not_the_truth():
    (scene,) = some(1, task="color_attr")
    found = [Detection(group.concept, box, 1.0, group.colour) for box, group in compose(scene)[1]]
    first, second = (each.colour for each in found)
    swapped = [found[0]._replace(colour=second), found[1]._replace(colour=first)]
    assert first == second or not verdict(scene.truth, swapped).correct
    (scene,) = some(1, task="counting")
    found = [Detection(group.concept, box) for box, group in compose(scene)[1]]
    assert not verdict(scene.truth, [*found, found[0]]).correct
    (scene,) = some(1, task="position")
    found = [Detection(group.concept, box) for box, group in compose(scene)[1]]
    turned = [found[0]._replace(box=found[1].box), found[1]._replace(box=found[0].box)]
    assert not verdict(scene.truth, turned).correct


@pytest.mark.parametrize(
    ("group", "words"),
    [
        (Group("fox", 3, "blue"), "three blue foxes"),
        (Group("owl", 1, "orange"), "an orange owl"),
        (Group("owl", 1, None), "an owl"),
        (Group("unicorn", 1, None), "a unicorn"),
        (Group("umbrella", 1, None), "an umbrella"),
        (Group("butterfly", 2, None), "two butterflies"),
        (Group("trophy", 5, "grey"), "five grey trophies"),
        (Group("key", 4, None), "four keys"),
        (Group("octopus", 2, "red"), "two red octopuses"),
        (Group("bus", 2, None), "two buses"),
    ],
)
def test_words(group, words):
    assert group.words == words


def test_captions_say_what_is_there_and_where_none_tells_a_ground_it_is_white():
    groups = (Group("dog", 1, "red"), Group("key", 1, None))

    def texts(ground):
        return [caption.text for caption in Scene(groups, "left of", "noto-v1", ground, 0).captions]

    assert texts("pale blue") == [
        "a red dog left of a key on a pale blue background",
        "a red dog left of a key on a pale blue background, in old noto style",
        "a picture of a red dog left of a key on a pale blue background, in old noto style",
    ]
    assert texts("white") == [
        "a red dog left of a key",
        "a red dog left of a key, in old noto style",
        "a picture of a red dog left of a key on a white background, in old noto style",
    ]


def test_a_white_ground_is_white_all_over():
    for seed in range(8):
        picture, [(box, _)] = compose(Scene((Group("fox", 1, None),), None, "twemoji", "white", seed))
        seen = np.asarray(picture).copy()
        seen[box[1] : box[3], box[0] : box[2]] = 255
        assert (seen == 255).all()


@pytest.mark.parametrize("colour", [name for name in COLOURS if name != "grey"])
def test_tints_have_their_hue(colour):
    drawing = Image.new("RGBA", (32, 32), (200, 40, 90, 255))
    drawing.paste((30, 30, 60, 255), (0, 0, 16, 32))
    drawing.paste((240, 240, 250, 255), (0, 0, 16, 10))
    shades = np.asarray(tinted(drawing, COLOURS[colour]).convert("RGB")).reshape(-1, 3) / 255
    hue = colorsys.rgb_to_hsv(*(value / 255 for value in COLOURS[colour]))[0]
    for shade in np.unique(shades, axis=0):
        assert min(abs(colorsys.rgb_to_hsv(*shade)[0] - hue) % 1, 1 - abs(colorsys.rgb_to_hsv(*shade)[0] - hue)) < 0.04
    assert len(np.unique(shades, axis=0)) == 3


def test_drawings_are_of_the_training_split_and_cut_out():
    training = {(row["concept"], row["style"]) for row in emoji_table() if row["split"] == "train"}
    assert set(known()) <= training and {concept for concept, _ in known()} == set(CONCEPTS)
    for style in STYLE_WORDS:
        alpha = np.asarray(cut_out("dog", style).getchannel("A"))
        assert alpha[0].any() and alpha[:, 0].any() and 0.3 < (alpha > 0).mean() < 1  # cropped to what shows
    scene = Scene((Group("fox", 1, None),), None, "twemoji", "pale blue", 1)
    picture, [(box, _)] = compose(scene)
    corner = np.asarray(picture)[0, 0]
    outside = np.asarray(picture)[box[1], box[0]]  # a fox's face leaves the corners of its box free
    assert np.abs(corner.astype(int) - outside).max() < 40


def test_records():
    records = list(emoji_scene_records(count=5))
    assert len({record.key for record in records}) == 5
    assert decode_image(records[0]).size == (EDGE, EDGE)
    assert [record.captions for record in records] == [record.captions for record in emoji_scene_records(count=5)]
    with pytest.raises(UserError, match="count"):
        next(emoji_scene_records(count=0))
