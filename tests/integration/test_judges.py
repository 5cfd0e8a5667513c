"""The networks in the package judge: true drawings and scenes come out right, noise by chance."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from micro_diffusion.data.sources.emoji import emoji_table
from micro_diffusion.data.sources.emoji_scenes import TASKS
from micro_diffusion.evaluation.emoji import EmojiBenchmark, opinion, right
from micro_diffusion.evaluation.geneval import task_scores, verdict
from micro_diffusion.evaluation.judges import FOLDER, load_network
from micro_diffusion.evaluation.pictures import PictureFolder, prompts_text
from micro_diffusion.evaluation.scenes import ScenesBenchmark, find

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the networks are not in the package yet")


def shares(name, pictures, rows):
    judge = load_network(name)
    hits = right(judge, opinion(judge, [pictures]), rows)
    return {measure: float(hit.float().mean()) for measure, hit in hits.items()}


@pytest.fixture(scope="module")
def held_out():
    return [row for row in emoji_table() if row["split"] != "train"][::2]


def varied(row, generator):
    """As no picture in training was: another size and filter, moved by up to 5%, turned by up to 5 degrees."""
    picture = Image.open(io.BytesIO(row["image"])).convert("RGB").resize((104, 104), Image.Resampling.LANCZOS)
    shift = tuple(generator.integers(-5, 6, 2).tolist())
    return picture.rotate(
        generator.uniform(-5, 5), Image.Resampling.BICUBIC, translate=shift, fillcolor=(255, 255, 255)
    )


def test_the_judge_knows_held_out_drawings_however_they_are_rendered(held_out):
    generator = np.random.default_rng(7)
    found = shares("judge", [varied(row, generator) for row in held_out], held_out)
    assert found["style"] >= 0.95 and found["concept top-5"] >= 0.85 and found["concept top-1"] >= 0.85


def test_noise_scores_by_chance(held_out):
    generator = np.random.default_rng(0)
    noise = [Image.fromarray(generator.integers(0, 256, (128, 128, 3), np.uint8)) for _ in held_out]
    for name in ("judge", "second"):
        found = shares(name, noise, held_out)
        assert found["concept top-5"] < 0.02 and found["style"] < 0.3


def test_the_second_judge_never_saw_a_held_out_concept(held_out):
    concepts = [row for row in held_out if row["split"] == "held_out_concept"]
    pictures = [Image.open(io.BytesIO(row["image"])).convert("RGB") for row in concepts]
    assert shares("second", pictures, concepts)["concept top-1"] < 0.02
    training = [row for row in emoji_table() if row["split"] == "train"][::40]
    pictures = [Image.open(io.BytesIO(row["image"])).convert("RGB") for row in training]
    assert shares("second", pictures, training)["concept top-1"] > 0.9


def test_true_scenes_of_held_out_compositions_are_read():
    benchmark = ScenesBenchmark(per_task=100, seed=2)
    truths = [prompt.truth for prompt in benchmark.prompts()]
    found = find(load_network("detector"), list(map(benchmark.true_picture, truths)))
    scores = task_scores(truths, list(map(verdict, truths, found)))
    assert set(scores) == {*TASKS, "overall"} and min(scores.values()) >= 0.95, scores


def test_blank_scenes_are_wrong(tmp_path):
    benchmark = ScenesBenchmark(per_task=4)
    (tmp_path / "prompts.jsonl").write_text(prompts_text(benchmark.prompts()))
    for index in range(24):
        Image.new("RGB", (128, 128), "white").save(tmp_path / f"{index:06d}.png")
    numbers = benchmark.score(PictureFolder(tmp_path), torch.device("cpu")).numbers
    assert numbers["overall"] == 0 and numbers["overall, true pictures"] > 0.9


def test_true_pictures_score_at_the_ceiling_and_lie_at_no_distance(tmp_path):
    benchmark = EmojiBenchmark()
    prompts = benchmark.prompts()[::9]
    (tmp_path / "prompts.jsonl").write_text(prompts_text(prompts))
    for index in range(len(prompts)):
        benchmark.true_picture(prompts[index].truth).save(tmp_path / f"{index:06d}.png")
    scores = benchmark.score(PictureFolder(tmp_path), torch.device("cpu"))
    for name, value in scores.numbers.items():
        if ", true pictures" in name:
            assert scores.numbers[name.replace(", true pictures", "")] == value
    assert scores.numbers["concept top-5, held-out pairs"] > 0.95
    assert abs(scores.numbers["Frechet distance, held-out"]) < 1e-4
    assert scores.numbers["memorisation: held-out pairs nearer to a training drawing"] == 0
    assert scores.numbers["memorisation: distance to the nearest, relative to true pictures"] == pytest.approx(1)
    assert len(scores.each["sure"]) == len(scores.notes) == len(prompts)


def test_the_networks_are_small():
    files = sorted(FOLDER.glob("*.safetensors"))
    assert [file.stem for file in files] == ["detector", "judge", "second"]
    assert sum(file.stat().st_size for file in files) < 4e6
