"""A measurement is of the right model, of the whole pass, and of the step apart."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count

import pytest
import torch

from micro_diffusion.models.dit import DiT
from micro_diffusion.models.flops import parameters
from micro_diffusion.models.moe import ExpertChoiceMoE
from micro_diffusion.models.presets import PRESETS
from micro_diffusion.planning import measure as module
from micro_diffusion.planning.cost import Work
from micro_diffusion.planning.measure import BLOCKS, COMPILED, measure, shallow


def test_shallow_keeps_widths_and_both_ends() -> None:
    config = PRESETS["MicroDiT_XL_2"]()
    small = shallow(config, BLOCKS)
    assert (small.depth, small.patch_mixer_depth, small.dim) == (5, 2, 1024)
    assert small.ffn_multipliers[::4] == (0.5, 4.0) and sorted(small.qkv_multipliers) == list(small.qkv_multipliers)
    assert parameters(small).total < 0.4 * parameters(config).total
    assert shallow(PRESETS["MicroDiT_Nano_4"](), BLOCKS) == PRESETS["MicroDiT_Nano_4"]()
    smaller = shallow(config, COMPILED)
    assert (smaller.depth, smaller.patch_mixer_depth, smaller.ffn_multipliers[::2]) == (3, 1, (0.5, 4.0))
    assert sum(isinstance(block.mlp, ExpertChoiceMoE) for block in DiT(replace(smaller, dim=64)).blocks) == 1


def test_flops_of_a_pass_over_its_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that moves a second a look: each pass and each step takes one."""
    ticks: Iterator[int] = count()
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(ticks)))
    work = Work("64 px", PRESETS["MicroDiT_Nano_4"](input_size=8), ((64, 0.5),), 8, 4, "float32", True)
    stepped = []

    def optimizer(dit: DiT) -> Callable[[], object]:
        return lambda: stepped.append(all(weight.grad is not None for weight in dit.parameters()))

    speed = measure(work, 0.5, torch.device("cpu"), optimizer)
    assert speed == (8 * work.flops(0.5), 1 / parameters(work.model).total)
    assert all(stepped) and len(stepped) == module.WARM_UP + module.STEPS
