"""The scene benchmark: balanced prompts, boxes out of cells, scores with their ceiling."""

import numpy as np
import pytest
import torch
from PIL import Image

from micro_diffusion.data.sources.emoji_scenes import COLOURS, CONCEPTS, TASKS, compose
from micro_diffusion.evaluation import scenes as module
from micro_diffusion.evaluation.judges import STRIDE, Cells, Detector
from micro_diffusion.evaluation.pictures import PictureFolder, Prompt, prompts_text
from micro_diffusion.evaluation.scenes import ScenesBenchmark, find


class Seer(Detector):
    """Reads the objects from a list in place of the picture: what a perfect detector would say."""

    def __init__(self, rows):
        super().__init__(CONCEPTS, ["own", *COLOURS], width=8)
        self.rows, self.at = rows, 0

    def forward(self, pictures):
        h = w = self.SIZE // STRIDE
        cells = Cells(
            torch.full((len(pictures), h, w), -6.0), torch.zeros(len(pictures), h, w, 4),
            torch.zeros(len(pictures), h, w, len(CONCEPTS)), torch.zeros(len(pictures), h, w, len(COLOURS) + 1),
        )  # fmt: skip
        for index in range(len(pictures)):
            for box, group in self.rows[self.at]:
                left, top, right, bottom = (side / STRIDE for side in box)
                x, y = int((left + right) / 2), int((top + bottom) / 2)
                cells.centre[index, y, x] = 4.0
                cells.centre[index, y, max(0, x - 1)] = 3.0  # a neighbour that is less sure
                middle = torch.tensor([x + 0.5 - left, y + 0.5 - top, right - x - 0.5, bottom - y - 0.5])
                cells.box[index, y, x] = middle
                cells.concept[index, y, x, CONCEPTS.index(group.concept)] = 5.0
                cells.colour[index, y, x, list(COLOURS).index(group.colour) + 1 if group.colour else 0] = 5.0
            self.at += 1
        return cells


def test_prompts_taken_evenly_have_the_tasks_in_equal_parts():
    benchmark = ScenesBenchmark(per_task=4)
    prompts = benchmark.prompts()
    assert [prompt.truth["tag"] for prompt in prompts[::4]] == list(TASKS) and len(prompts) == 24
    assert prompts == ScenesBenchmark(per_task=4).prompts() and len({prompt.seed for prompt in prompts}) == 24
    fewer = ScenesBenchmark(per_task=2).prompts()
    assert [prompt[:2] for prompt in fewer] == [prompt[:2] for i, prompt in enumerate(prompts) if i % 4 < 2]
    assert all(scene.held_out for scene in benchmark.scenes if scene.task != "single_object")
    assert all(prompt.text == prompt.truth["prompt"] for prompt in prompts)


def test_objects_are_read_from_the_cells():
    scenes = ScenesBenchmark(per_task=3).scenes
    objects = [compose(scene)[1] for scene in scenes]
    pictures = [Image.new("RGB", (256, 256))] * len(scenes)
    for found, true in zip(find(Seer(objects), pictures), objects, strict=True):
        assert sorted(each.label for each in found) == sorted(group.concept for _, group in true)
        boxes = sorted(tuple(2 * side for side in box) for box, _ in true)  # in pixels of a picture twice as large
        assert np.allclose(sorted(each.box for each in found), boxes, atol=0.01)
        assert {(each.label, each.colour) for each in found} == {(group.concept, group.colour) for _, group in true}


@pytest.fixture
def drawn(tmp_path):
    prompts = ScenesBenchmark(per_task=4).prompts()[1::2]  # as --limit takes them
    (tmp_path / "prompts.jsonl").write_text(prompts_text(prompts))
    for index in range(len(prompts)):
        Image.new("RGB", (128, 128)).save(tmp_path / f"{index:06d}.png")
    return PictureFolder(tmp_path)


def test_scores_with_their_ceiling(drawn, monkeypatch):
    benchmark = ScenesBenchmark(per_task=4)
    true = [compose(scene)[1] for scene in benchmark.scenes[1::2]]
    wrong = [objects[1:] for objects in true]  # an object is missing from every picture, but from the true ones
    monkeypatch.setattr(module, "load_network", lambda name: Seer([*wrong, *true]))
    monkeypatch.setattr(module, "sha256", lambda file: "0" * 64)
    scores = benchmark.score(drawn, torch.device("cpu"))
    assert all(scores.numbers[task] == 0 for task in (*TASKS, "overall"))
    assert all(scores.numbers[f"{task}, true pictures"] == 1 for task in (*TASKS, "overall"))
    assert len(scores.each["right"]) == len(scores.notes) == 12 and all(scores.notes)
    assert isinstance(drawn.prompts[0], Prompt) and "12 prompts" in scores.protocol
