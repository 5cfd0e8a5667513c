import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from micro_diffusion.data.loader import Loader
from micro_diffusion.models.dit import DiT
from micro_diffusion.runtime.distributed import ALONE, Stuck, World
from micro_diffusion.runtime.files import UserError
from micro_diffusion.training import loop, parallel
from micro_diffusion.training.config import Recipe
from micro_diffusion.training.feed import Examples
from micro_diffusion.training.options import Options
from micro_diffusion.training.parallel import Parallel
from micro_diffusion.training.stages import State, first_state

CPU = torch.device("cpu")


def run(recipe: Recipe, folder: Path, loaders: dict[int, Loader], options: Options) -> torch.Tensor:
    def release(folder: Path, state: State) -> None:
        folder.mkdir(exist_ok=True)

    dit = loop.train(
        recipe, run=folder, loaders=loaders, downscale=8, device=CPU, release=release, options=options
    )  # fmt: skip
    return torch.cat([parameter.detach().flatten() for parameter in dit.parameters()])


@pytest.mark.parametrize("fits", [4, 2, 1, 0])
def test_out_of_memory_halves_the_micro_batch(
    one_stage: Callable[..., Recipe],
    loaders: dict[int, Loader],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fits: int,
) -> None:
    """A device that holds `fits` images; what is trained is what a micro-batch given by hand trains, to the bit."""
    sizes = []
    gradient = loop.add_gradient

    def limited(*arguments: object) -> torch.Tensor:
        part = arguments[-1]
        assert isinstance(part, Examples)
        sizes.append(len(part.latents))
        if len(part.latents) > fits:
            raise torch.OutOfMemoryError("out of memory")
        return gradient(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "add_gradient", limited)
    caplog.set_level(logging.INFO)
    if not fits:
        with pytest.raises(UserError, match="out of memory with micro-batches of 1 images"):
            run(one_stage(), tmp_path / "auto", loaders, Options(micro_batch="auto"))
        return
    found = run(one_stage(), tmp_path / "auto", loaders, Options(micro_batch="auto"))
    tried = [size for size in (8, 4, 2, 1) if size >= fits]
    assert sizes == [*tried, fits] + [fits] * (5 * 8 // fits)  # it must fit beside the gradient of another
    assert f"stage '1': micro-batches of {fits} images" in caplog.text
    assert torch.equal(found, run(one_stage(), tmp_path / "given", loaders, Options(micro_batch=fits)))


def test_activation_checkpointing_changes_nothing(
    one_stage: Callable[..., Recipe], loaders: dict[int, Loader], tmp_path: Path
) -> None:
    plain = run(one_stage(), tmp_path / "plain", loaders, Options())
    assert torch.equal(run(one_stage(), tmp_path / "less", loaders, Options(activation_checkpointing=True)), plain)


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_what_lies_outside_of_blocks_compiles_for_a_cuda_graph(
    one_stage: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, cuda_graph: bool
) -> None:
    """With one graph a block, here, and one a part: all that has parameters is in one of them."""
    compiled: list[Callable[..., object]] = []

    def compiles(function: Callable[..., object], **settings: object) -> Callable[..., object]:
        assert settings == {"dynamic": False}
        compiled.append(function)
        return lambda *inputs: function(*inputs)

    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch, "compile", compiles)
    recipe = replace(one_stage(), text_length=4, compile=True)
    options = Options(cuda_graph=cuda_graph, activation_checkpointing=True)
    made, dit = Parallel(options, ALONE, recipe, torch.device("cuda")), DiT(recipe.model)
    for parameter in dit.parameters():  # what is zero at the start hides what comes before it
        torch.nn.init.normal_(parameter, std=0.1)
    size, width = recipe.model.latent_size, recipe.model.caption_channels
    inputs = torch.randn(2, recipe.model.in_channels, *size), torch.randn(2), torch.randn(2, 4, width)
    expected, _ = dit(*inputs, text_mask=torch.ones(2, 4, dtype=torch.bool))
    found, _ = made.network(made.shard(dit), recipe.stages[0])(*inputs, text_mask=torch.ones(2, 4, dtype=torch.bool))
    assert torch.equal(found, expected)
    assert len(compiled) == len(dit.patch_mixer) + len(dit.blocks) + (len([*dit.children()]) - 2) * cuda_graph


def test_keys_and_shown_weights_are_plain(one_stage: Callable[..., Recipe]) -> None:
    recipe = one_stage()
    parallel = Parallel(Options(activation_checkpointing=True), ALONE, recipe, CPU)
    state = first_state(recipe, downscale=8, device=CPU, shard=parallel.shard)
    assert state.dit.state_dict().keys() == DiT(state.dit.config).state_dict().keys()
    assert "forward" in vars(state.dit.blocks[0]) and "forward" not in vars(state.gathered().dit.blocks[0])
    weight = state.gathered().dit.x_embedder.proj.weight
    assert weight.data_ptr() == state.dit.x_embedder.proj.weight.data_ptr()


@pytest.mark.parametrize(
    ("size", "stage", "option", "expected"),
    [(1, 0, None, 8), (2, 0, None, 4), (2, 2, None, 2), (4, 4, None, 2), (2, 4, 1, 1), (8, 2, None, 1)],
)
def test_micro_batch_of_a_rank(
    one_stage: Callable[..., Recipe], size: int, stage: int, option: int | None, expected: int
) -> None:
    recipe = one_stage(micro_batch=stage)
    parallel = Parallel(Options(micro_batch=option), replace(ALONE, size=size), recipe, CPU)
    assert parallel.micro_batch(recipe.stages[0]) == expected


@pytest.mark.parametrize(("size", "option"), [(3, None), (2, 3), (16, None)])
def test_what_does_not_divide(one_stage: Callable[..., Recipe], size: int, option: int | None) -> None:
    with pytest.raises(UserError, match=f"a batch of 8 does not divide among {size} ranks"):
        Parallel(Options(micro_batch=option), World(size=size), one_stage(), CPU)


@pytest.mark.parametrize(("device", "length"), [(CPU, 4), (torch.device("cuda"), None)])
def test_a_cuda_graph_needs_a_gpu_and_fixed_shapes(
    one_stage: Callable[..., Recipe], device: torch.device, length: int | None
) -> None:
    with pytest.raises(UserError, match="--cuda-graph is for CUDA GPUs, and for batches of one shape"):
        Parallel(Options(cuda_graph=True), ALONE, replace(one_stage(), text_length=length), device)


def test_a_graph_that_hangs_is_found_out(one_stage: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    """The host is a few steps ahead, waits for all of them where it reads, and gives up on one that does not end."""
    ended: list[int] = []

    class Event:
        made = 0

        def __init__(self) -> None:
            Event.made += 1
            self.number = Event.made

        def query(self) -> bool:
            ended.extend([self.number] if self.number < 5 else [])
            return self.number < 5

    monkeypatch.setattr(parallel, "AHEAD", 2)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(record_event=Event))
    monkeypatch.setattr(parallel, "Graphed", lambda work, **more: lambda *inputs: len(inputs))
    recipe = replace(one_stage(), text_length=4)
    made = Parallel(Options(cuda_graph=True, timeout=0.05), ALONE, recipe, torch.device("cuda"))
    made.device = CPU
    network = DiT(recipe.model)
    step = made.captured(network, lambda batch, rate: 0)
    batch = Examples(*[torch.zeros(1)] * len(Examples._fields))
    for _ in range(4):
        assert step(batch, 0.1) == 1 + len(batch)
    assert ended == [1, 2]
    made.wait()
    assert ended == [1, 2, 3, 4]
    step(batch, 0.1)
    with pytest.raises(Stuck, match="a step does not end"):
        made.wait()


def test_options_that_cannot_be() -> None:
    with pytest.raises(UserError, match="--deadline must be positive"):
        Options(deadline=0)
