"""The scene benchmark: GenEval's six tasks, with its logic, on held-out compositions of emoji and with exact truth."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from micro_diffusion.data.sources.emoji_scenes import TASKS, Scene, scene_picture, scenes
from micro_diffusion.evaluation.geneval import Detection, task_scores, verdict
from micro_diffusion.evaluation.judges import BLOCK, FOLDER, STRIDE, Detector, load_network, to_tensor
from micro_diffusion.evaluation.pictures import PictureFolder, Prompt, Scores
from micro_diffusion.runtime.files import sha256
from micro_diffusion.runtime.random import derive_seed

CONFIDENCE = 0.35  # that an object's centre lies in a cell


class ScenesBenchmark:
    """`per_task` prompts a task; all but the single objects are compositions that no scene for training has."""

    def __init__(self, *, per_task: int = 64, seed: int = 0) -> None:
        self.per_task, self.seed = per_task, seed

    @cached_property
    def scenes(self) -> list[Scene]:
        """A scene a prompt, task by task: prompts taken evenly from them have the tasks in equal parts."""
        rows = (scenes(self.seed, task=task, wanted=lambda s: s.task == TASKS[0] or bool(s.held_out)) for task in TASKS)
        return [scene for row in rows for scene in islice(row, self.per_task)]

    def prompts(self) -> list[Prompt]:
        """The scenes' words; the truth is in the form of GenEval's metadata."""
        truths = [scene.truth | {"scene": index} for index, scene in enumerate(self.scenes)]
        seeds = [derive_seed(self.seed, f"prompt/{task}", index) for task in TASKS for index in range(self.per_task)]
        return [Prompt(truth["prompt"], seed, truth) for truth, seed in zip(truths, seeds, strict=True)]

    def true_picture(self, truth: Mapping[str, Any]) -> Image.Image:
        """A scene that a prompt asks for, composed."""
        return scene_picture(self.scenes[truth["scene"]])

    def score(self, pictures: PictureFolder, device: torch.device) -> Scores:
        """Shares of pictures right, by task, and beside them those of true pictures: what the detector lets through."""
        truths = [prompt.truth for prompt in pictures.prompts or []]
        detector = cast(Detector, load_network("detector")).to(device)
        found = (each for batch in pictures.batches(BLOCK) for each in find(detector, batch))
        drawn = [verdict(truth, each) for truth, each in zip(truths, found, strict=True)]
        true = [self.true_picture(truth) for truth in truths]
        ceiling = task_scores(truths, list(map(verdict, truths, find(detector, true))))
        numbers = task_scores(truths, drawn)
        numbers |= {f"{task}, true pictures": share for task, share in ceiling.items()}
        network = f"embedded detector (sha256 {sha256(FOLDER / 'detector.safetensors')[:12]}) at {Detector.SIZE} px"
        asked = f"{len(truths)} prompts, compositions held out but for single objects, a picture each"
        each, notes = {"right": [float(one.correct) for one in drawn]}, [one.reason for one in drawn]
        return Scores(f"{asked}; {network}, GenEval's logic", numbers, each, notes=notes, true=true)


@torch.no_grad()
def find(detector: Detector, pictures: Sequence[Image.Image]) -> Iterator[list[Detection]]:
    """The objects in each picture, the surest first: where a cell is surer of a centre than its eight neighbours."""
    device = next(detector.parameters()).device
    concepts, colours = detector.names["concepts"], [None, *detector.names["colours"][1:]]
    for start in range(0, len(pictures), BLOCK):
        some = pictures[start : start + BLOCK]
        cells = detector(to_tensor(some).to(device))
        sure = cells.centre.sigmoid()
        peak = (sure == F.max_pool2d(sure[:, None], 3, 1, 1)[:, 0]) & (sure > CONFIDENCE)
        for index, picture in enumerate(some):
            order = sure[index][peak[index]].argsort(descending=True)
            y, x = peak[index].nonzero()[order].unbind(-1)
            middle = torch.stack([x, y], -1) + 0.5
            box = cells.box[index][y, x]
            scale = STRIDE / Detector.SIZE * np.array([*picture.size, *picture.size])
            corners = torch.cat([middle - box[:, :2], middle + box[:, 2:]], -1).cpu().numpy() * scale
            names, tints = (logits[index][y, x].argmax(-1).tolist() for logits in (cells.concept, cells.colour))
            found = zip(corners.tolist(), names, tints, strict=True)
            yield [Detection(concepts[name], tuple(corner), 1.0, colours[tint]) for corner, name, tint in found]
