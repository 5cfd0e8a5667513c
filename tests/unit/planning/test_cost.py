"""Cost against sums made by hand and the two steps that were measured on an H100."""

from dataclasses import replace

import pytest
import torch

from micro_diffusion.models.flops import forward_flops, parameters
from micro_diffusion.models.layers import SwiGLU
from micro_diffusion.models.presets import PRESETS
from micro_diffusion.planning.cost import Machine, Work, fit, image_bytes, picture_bytes
from micro_diffusion.runtime.files import UserError
from micro_diffusion.runtime.hardware import GPUS

XL = Work("256 px", PRESETS["MicroDiT_XL_2"](), ((2048, 0.75),), 256, 77, "bf16", True)
NANO = Work("64 px", PRESETS["MicroDiT_Nano_4"](input_size=8), ((640, 0.5), (1280, 0.0)), 64, 16, "float32", False)


def test_seconds_are_flops_over_speed_and_an_optimizer_step_a_batch() -> None:
    """Mask schedules included: each span at its own cost and its own speed."""
    measured = {NANO.kind(0.5): (1e9, 1e-9), NANO.kind(0.0): (2e9, 1e-9)}
    cost = [3 * forward_flops(NANO.model, mask_ratio=ratio, text_length=16) for ratio in (0.5, 0.0)]
    steps = (640 + 1280) / 64 * parameters(NANO.model).total * 1e-9
    alone = Machine(None, measured=measured)
    assert alone.seconds(NANO) == pytest.approx(640 * cost[0] / 1e9 + 1280 * cost[1] / 2e9 + steps)
    four = Machine(None, 4, 4, measured)
    assert four.seconds(NANO) == pytest.approx(alone.seconds(NANO) / 4)
    copies = four._replace(shards=1)  # each rank steps all weights
    assert copies.seconds(NANO) == pytest.approx(alone.seconds(NANO) / 4 + steps * 3 / 4)


def test_no_speed_is_one_sentence() -> None:
    other = Machine(None, measured={NANO._replace(text_length=17).kind(0.5): (1e9, 0)})
    with pytest.raises(UserError, match="micro-diffusion bench"):
        other.seconds(NANO)


@pytest.mark.parametrize(
    ("mask_ratio", "micro_batch", "images_per_second", "peak_gb"), [(0.75, 256, 1370.5, 65.5), (0.0, 64, 520.1, 51.7)]
)
def test_what_was_measured(mask_ratio: float, micro_batch: int, images_per_second: float, peak_gb: float) -> None:
    """benchmarks/results/step-h200.json, to which the table was fitted; the micro-batches are what fits 80 GB."""
    work = XL._replace(spans=((2048, mask_ratio),))
    assert 2048 / Machine(GPUS["h200"]).seconds(work) == pytest.approx(images_per_second, rel=0.01)
    size, memory = fit(work, Machine(GPUS["h100"]))
    assert size == micro_batch and memory == pytest.approx(peak_gb, rel=0.03)


@pytest.mark.parametrize(("mask_ratio", "images_per_second"), [(0.75, 5081.8), (0.0, 2070.5)])
def test_what_four_gpus_did(mask_ratio: float, images_per_second: float) -> None:
    """benchmarks/results/scaling-graph-h200.json: 256 images a GPU and step, DDP."""
    work = XL._replace(spans=((4096, mask_ratio),), batch_size=1024)
    four, alone = Machine(GPUS["h200"], 4), Machine(GPUS["h200"])
    assert 4096 / four.seconds(work) == pytest.approx(images_per_second, rel=0.03)
    without = four._replace(gpu=GPUS["h200"]._replace(nvlink=0))
    assert four.seconds(work) - without.seconds(work) == pytest.approx(4 * 1.5 * 4 * parameters(XL.model).total / 450e9)
    assert alone._replace(gpu=without.gpu).seconds(work) == alone.seconds(work)


def test_memory_grows_with_what_is_held_and_shrinks_with_shards() -> None:
    one, weights = Machine(GPUS["h200"]), parameters(NANO.model).total
    assert fit(NANO, Machine(None))[0] == 64
    plain, held = fit(NANO, one)[1], image_bytes(NANO, 0.0)
    assert plain == pytest.approx((16 * weights + 64 * held) / 1e9)
    assert fit(NANO._replace(averages=2), one)[1] - plain == pytest.approx(8 * weights / 1e9)
    assert plain - fit(NANO, one._replace(shards=4))[1] == pytest.approx(9 * weights / 1e9)
    assert image_bytes(NANO, 0.5) < held < image_bytes(NANO._replace(text_length=40), 0.0)
    assert image_bytes(NANO._replace(compiled=True), 0.0) < held


@pytest.mark.slow
def test_what_fits_divides_the_share_and_may_be_nothing() -> None:
    small = GPUS["h100"]._replace(memory_gb=24)
    odd = XL._replace(batch_size=24 * 7)
    assert (24 * 7) % fit(odd, Machine(small))[0] == 0
    size, memory = fit(XL, Machine(small._replace(memory_gb=16)))
    assert size == 0 and memory > 16
    assert fit(XL, Machine(small._replace(memory_gb=16), 8, 8))[0] > 0  # sharded it fits


def test_activations_of_a_layer_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deeper model holds more: by at least what its feed-forward reads and makes."""
    config = replace(NANO.model, num_experts=0)
    deeper = replace(
        config, depth=5, qkv_multipliers=(*config.qkv_multipliers, 1.0), ffn_multipliers=(*config.ffn_multipliers, 4.0)
    )
    more = image_bytes(NANO._replace(model=deeper), 0.0) - image_bytes(NANO._replace(model=config), 0.0)
    hidden = SwiGLU(config.dim, 4.0, config.multiple_of, bias=False).w1.out_features
    least = (
        4 * 4 * (4 * config.dim + 4 * hidden)
    )  # four tokens, float32: x, normed, branches; gate, silu, value, product
    assert least < more < 5 * least


def test_counting_takes_no_memory_and_leaves_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    image_bytes(NANO, 0.5)
    assert torch.equal(before, torch.get_rng_state())


def test_bytes_of_a_picture_are_those_of_the_papers_store() -> None:
    high = XL._replace(model=PRESETS["MicroDiT_XL_2"](input_size=64))
    assert picture_bytes([XL, XL, high, high]) == 198_656
    assert picture_bytes([XL]) == 2 * (4 * 32 * 32 + 77 * 1024)
