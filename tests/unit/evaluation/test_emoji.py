"""The embedded benchmark: what it asks, and its measures against small examples."""

import numpy as np
import pytest
import torch

from micro_diffusion.data.sources.emoji import emoji_records
from micro_diffusion.evaluation import emoji as module
from micro_diffusion.evaluation.emoji import (
    REPEATED,
    REPEATS,
    EmojiBenchmark,
    kernel_distance,
    opinion,
    right,
    seen_as,
    sureness,
)
from micro_diffusion.evaluation.judges import Judge, Opinion

CONCEPTS, STYLES = [f"c{i}" for i in range(8)], ["flat", "round"]
TRUTHS = [{"concept": "c0", "style": "flat"}, {"concept": "c1", "style": "flat"}, {"concept": "c2", "style": "round"}]


@pytest.fixture
def said():
    concept = torch.tensor([[9.0, 8, 7, 6, 5, 0, 0, 0], [9, 8, 7, 6, 5, 0, 0, 0], [5, 6, 0, 9, 8, 7, 4, 3]])
    return Opinion(concept, torch.tensor([[1.0, 0], [1, 0], [0, 1]]), torch.zeros(3, 128))


def test_shares_right(said):
    hits = right(Judge(CONCEPTS, STYLES), said, TRUTHS)
    assert {name: hit.tolist() for name, hit in hits.items()} == {
        "concept top-1": [True, False, False], "concept top-5": [True, True, False],
        "style": [True, True, True], "both": [True, False, False],
    }  # fmt: skip


def test_sureness_is_a_log_probability(said):
    sure = sureness(Judge(CONCEPTS, STYLES), said, TRUTHS, "concept")
    assert sure[0] == pytest.approx(9 - np.log(np.exp([9, 8, 7, 6, 5, 0, 0, 0]).sum()), rel=1e-5)
    assert seen_as(Judge(CONCEPTS, STYLES), said)[2] == "seen as c3, round"


def test_every_held_out_drawing_is_asked_for_once():
    benchmark = EmojiBenchmark()
    prompts = benchmark.prompts()
    first = prompts[: len(benchmark.rows)]
    for split in ("held_out_pair", "held_out_concept"):
        wanted = sorted(str(record.captions[0].text) for record in emoji_records(split=split))
        assert sorted(prompt.text for prompt in first if prompt.truth["split"] == split) == wanted
    seen = [prompt for prompt in first if prompt.truth["split"] == "train"]
    assert 200 < len(seen) < 320
    repeated = [prompt.text for prompt in prompts[len(first) :]]
    assert repeated == [prompt.text for prompt in first[:REPEATED]] * (REPEATS - 1)
    assert len({prompt.seed for prompt in prompts}) == len(prompts)
    kinds = {prompt.truth["split"] for prompt in first[:20]}
    assert kinds == {"held_out_pair", "held_out_concept", "train"}  # any number of the first ones has all kinds


def test_a_true_picture_is_that_of_its_prompt():
    benchmark = EmojiBenchmark()
    count = len(benchmark.rows)
    assert benchmark.true_picture(3).tobytes() == benchmark.true_picture(count + 3 + REPEATED).tobytes()
    assert benchmark.true_picture(3).tobytes() != benchmark.true_picture(4).tobytes()


def test_kernel_distance_against_sums_written_out():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    b = torch.randn(4, 3, generator=generator, dtype=torch.float64) + 1

    def kernel(x, y):
        return (float(x @ y) / 3 + 1) ** 3

    within = [
        np.mean([kernel(rows[i], rows[j]) for i in range(len(rows)) for j in range(len(rows)) if i != j])
        for rows in (a, b)
    ]
    between = np.mean([kernel(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(sum(within) - 2 * between, rel=1e-9)


def test_kernel_distance_of_the_same_distribution_is_about_nothing():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(400, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    assert abs(kernel_distance(a, b)) < 0.02 < kernel_distance(a, b + 0.5)


def test_opinions_do_not_depend_on_batches(monkeypatch):
    judge = Judge(CONCEPTS, STYLES).eval()
    pictures = [EmojiBenchmark().true_picture(index) for index in range(5)]
    together = opinion(judge, [pictures])
    monkeypatch.setattr(module, "BLOCK", 2)
    apart = opinion(judge, [pictures[:3], pictures[3:]])
    assert torch.allclose(together.concept, apart.concept, atol=1e-4)
