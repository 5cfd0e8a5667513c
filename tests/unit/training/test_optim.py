import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from micro_diffusion.models.dit import DiT
from micro_diffusion.models.moe import ExpertChoiceMoE
from micro_diffusion.training.config import Recipe
from micro_diffusion.training.ema import follow
from micro_diffusion.training.optim import guarded_step, learning_rate, make_optimizer, orthogonalise


class Toy(nn.Module):
    """Two parameters of no particular kind."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.vector = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5))


def make_dit(recipe: Recipe) -> DiT:
    """Experts in the mixer and in the backbone; every parameter random, so that none has a gradient of zero."""
    torch.manual_seed(0)
    model = replace(recipe.stage_model(recipe.stages[0], downscale=8), num_experts=2, experts_every_n=1)
    dit = DiT(model)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return dit


def random_gradients(dit: nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator) for name, p in dit.named_parameters()}


def step(
    recipe: Recipe, dit: nn.Module, gradients: list[dict[str, Tensor]], clip_norm: float = 1e9
) -> dict[str, Tensor]:
    """The weights after one step with each of the gradients."""
    optimizer = make_optimizer(dit, recipe)
    for each in gradients:
        for name, parameter in dit.named_parameters():
            parameter.grad = each[name].clone()
        guarded_step(optimizer, torch.tensor(1.0), lr=0.01, clip_norm=clip_norm)
    return {name: parameter.detach().clone() for name, parameter in dit.named_parameters()}


def test_warmup_then_constant(one_stage: Callable[..., Recipe]) -> None:
    stage = one_stage(learning_rate=2.0, warmup_images=16).stages[0]
    assert [learning_rate(stage, images) for images in (4, 8, 16, 24, 40)] == [0.5, 1.0, 2.0, 2.0, 2.0]


def test_cosine(one_stage: Callable[..., Recipe]) -> None:
    stage = one_stage(learning_rate=2.0, warmup_images=8, schedule="cosine", final_lr_ratio=0.25).stages[0]
    assert learning_rate(stage, 8) == 2.0
    assert learning_rate(stage, 24) == pytest.approx(2.0 * (0.25 + 0.75 / 2))
    assert learning_rate(stage, 16) == pytest.approx(2.0 * (0.25 + 0.75 * (1 + math.cos(math.pi / 4)) / 2))
    assert learning_rate(stage, 40) == pytest.approx(0.5)


def test_step_is_clipped_adamw(recipe: Recipe) -> None:
    torch.manual_seed(0)
    toy = Toy()
    parameters = list(toy.parameters())
    plain = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    optimizer = make_optimizer(toy, recipe)
    expected = torch.optim.AdamW(plain, lr=0.1, betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay)
    for size in (0.01, 100.0, 1.0):
        for ours, theirs in zip(parameters, plain, strict=True):
            ours.grad = size * torch.randn_like(ours)
            theirs.grad = ours.grad.clone()
        step = guarded_step(optimizer, torch.tensor(1.0), lr=0.1, clip_norm=0.5)
        norm = torch.nn.utils.clip_grad_norm_(plain, 0.5)
        expected.step()
        assert step.taken
        torch.testing.assert_close(step.grad_norm, norm)
        for ours, theirs in zip(parameters, plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
            assert ours.grad is None


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    ("bad_loss", "bad_gradient"), [(math.nan, 0.0), (math.inf, 0.0), (1.0, math.nan), (1.0, math.inf)]
)
def test_a_bad_batch_changes_nothing(recipe: Recipe, optimizer: str, bad_loss: float, bad_gradient: float) -> None:
    recipe = replace(recipe, optimizer=optimizer)  # type: ignore[arg-type]
    dit = make_dit(recipe)
    made = make_optimizer(dit, recipe)

    def step(loss: float, gradient: float) -> bool:
        for name, parameter in dit.named_parameters():
            parameter.grad = random_gradients(dit, 1)[name] if name.startswith("blocks") else torch.ones_like(parameter)
        dit.blocks[0].attn.qkv.weight.grad[0, 0] = gradient
        return bool(guarded_step(made, torch.tensor(loss), lr=0.1, clip_norm=1.0).taken)

    def everything() -> list[torch.Tensor]:
        moments = [value for state in made.state.values() for value in state.values()]
        return [tensor.detach().clone() for tensor in (*dit.parameters(), *moments)]

    assert step(1.0, 4.0)
    before = everything()
    assert not step(bad_loss, bad_gradient)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(everything(), before, strict=True))
    assert step(1.0, 4.0)
    assert not any(torch.equal(ours, theirs) for ours, theirs in zip(everything(), before, strict=True))


@pytest.mark.parametrize("shape", [(3, 24, 16), (2, 16, 24), (1, 16, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_newton_schulz_keeps_the_singular_vectors(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Against the decomposition: U^T O V is diagonal with entries of about 1, whatever the singular values were."""
    torch.manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.logspace(-1, 1, 16)
    found = u.mT @ orthogonalise(u * values @ vt, dtype=dtype).float() @ vt.mT
    diagonal = found.diagonal(dim1=1, dim2=2)
    assert diagonal.min() > 0.65 and diagonal.max() < 1.25
    rest = found - torch.diag_embed(diagonal)
    assert rest.abs().max() < (1e-5 if dtype == torch.float32 else 0.05)
    tiny = orthogonalise(1e-3 * u * values @ vt, dtype=dtype).float()
    torch.testing.assert_close(u.mT @ tiny @ vt.mT, found, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.1)
    assert not orthogonalise(torch.zeros(shape), dtype=dtype).any()


def one_matrix_muon(
    weight: Tensor, gradients: list[Tensor], *, lr: float, momentum: float, weight_decay: float
) -> Tensor:
    """Muon of one matrix, by singular values: each goes through the iteration's polynomial five times."""
    average = torch.zeros_like(weight)
    for gradient in gradients:
        average = momentum * average + gradient
        u, values, vt = torch.linalg.svd(gradient + momentum * average, full_matrices=False)
        values /= values.square().sum().sqrt()
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        weight = weight * (1 - lr * weight_decay) - lr * 0.2 * max(weight.shape) ** 0.5 * (u * values) @ vt
    return weight


def test_muon_moves_each_chunk_and_each_expert_by_itself(recipe: Recipe) -> None:
    recipe = replace(recipe, optimizer="muon", muon_momentum=0.9)
    dit = make_dit(recipe)
    before = {name: parameter.detach().clone() for name, parameter in dit.named_parameters()}
    gradients = [random_gradients(dit, seed) for seed in range(3)]
    after = step(recipe, dit, gradients)
    for name, chunks in (
        ("blocks.0.attn.qkv.weight", 3), ("blocks.1.attn.proj.weight", 1), ("blocks.0.cross_attn.kv_linear.weight", 2),
        ("blocks.0.adaLN_modulation.1.weight", 6), ("patch_mixer.0.mlp.w1", 2), ("blocks.1.mlp.w3.weight", 1),
        ("y_emb_preprocess.attn.qkv.weight", 3),
    ):  # fmt: skip
        stack = [tensor[name].flatten(0, -2).chunk(chunks) for tensor in (before, after, *gradients)]
        for old, new, *each in zip(*stack, strict=True):
            expected = one_matrix_muon(old, each, lr=0.01, momentum=0.9, weight_decay=recipe.weight_decay)
            torch.testing.assert_close(new, expected, rtol=1e-4, atol=1e-5)


def test_what_is_no_hidden_matrix_is_adamws(recipe: Recipe) -> None:
    gradients = random_gradients(make_dit(recipe), 0)
    adamw, muon = (
        step(replace(recipe, optimizer=name), make_dit(recipe), [gradients])  # type: ignore[arg-type]
        for name in ("adamw", "muon")
    )
    same = {name for name in adamw if torch.equal(adamw[name], muon[name])}
    matrices = {"attn", "cross_attn", "mlp", "adaLN_modulation"}
    inside = {
        name for name in adamw if name.startswith(("blocks", "patch_mixer.", "y_emb_preprocess"))
        and name.endswith(("weight", "w1", "w2")) and matrices & set(name.split(".")) and "gate" not in name
    }  # fmt: skip
    assert same == adamw.keys() - inside
    assert {"x_embedder.proj.weight", "final_layer.linear.weight", "blocks.0.mlp.gate.weight"} <= same


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_experts_move_by_their_scale(recipe: Recipe, optimizer: str) -> None:
    """Without weight decay a step is proportional to the rate: that of an expert's weights alone is scaled."""
    recipe = replace(recipe, optimizer=optimizer, weight_decay=0.0)  # type: ignore[arg-type]
    dit = make_dit(recipe)
    experts = {
        f"{name}.{weight}" for name, module in dit.named_modules() if isinstance(module, ExpertChoiceMoE)
        for weight in ("w1", "w2")
    }  # fmt: skip
    assert len(experts) == 4
    before = {name: parameter.detach().clone() for name, parameter in dit.named_parameters()}
    gradients = [random_gradients(dit, 0)]
    plain, scaled = (
        step(replace(recipe, expert_learning_rate_scale=scale), make_dit(recipe), gradients) for scale in (1.0, 0.25)
    )
    for name, start in before.items():
        expected = start + (0.25 if name in experts else 1.0) * (plain[name] - start)
        torch.testing.assert_close(scaled[name], expected, rtol=0, atol=1e-7)


def test_a_step_of_muon_is_as_large_as_adamws(recipe: Recipe) -> None:
    """Root mean square 0.2 of the rate, what AdamW's steps come to (arXiv 2502.16982), for any shape."""
    recipe = replace(recipe, optimizer="muon", weight_decay=0.0)
    dit = make_dit(recipe)
    before = {name: parameter.detach().clone() for name, parameter in dit.named_parameters()}
    after = step(recipe, dit, [random_gradients(dit, 0)])
    for name in ("blocks.1.attn.qkv.weight", "blocks.0.mlp.w1", "blocks.1.mlp.w3.weight", "blocks.0.attn.proj.weight"):
        assert (after[name] - before[name]).square().mean().sqrt() == pytest.approx(0.2 * 0.01, rel=0.25)


def sharded(rank: int, world: int, rendezvous: str, recipe: Recipe, out: Path) -> None:
    """Twenty steps of a sharded model, and one that the guard skips; each rank has its part of the batch."""
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    mesh = dist.init_device_mesh("cpu", (world,))
    dit = make_dit(recipe)
    for block in (*dit.patch_mixer, *dit.blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(dit, mesh=mesh)
    torch.save(train(dit, recipe, rank=rank, world=world), out / f"{world}-{rank}.pt")
    dist.destroy_process_group()


def train(dit: DiT, recipe: Recipe, *, rank: int = 0, world: int = 1) -> tuple[dict[str, Tensor], list[float]]:
    optimizer, norms, ema = make_optimizer(dit, recipe), [], None
    for number in range(21):
        torch.manual_seed(number)
        batch = torch.randn(4, 4, 8, 8), torch.rand(4), torch.randn(4, 3, 12), torch.randn(4, 4, 8, 8)
        x, level, text, target = (column.chunk(world)[rank] for column in batch)
        predicted = dit(x, level, text, text_mask=torch.ones(len(x), 3, dtype=torch.bool)).sample
        loss = (predicted - target).square().mean() * (math.nan if number == 10 else 1.0)
        loss.backward()
        norms.append(float(guarded_step(optimizer, loss.detach(), lr=1e-3, clip_norm=0.5).grad_norm))
        ema = follow(ema, dit, recipe.stages[0], images=8 * (number + 1))
    assert ema is not None
    weights = dict(dit.named_parameters()) | {f"ema.{name}": value for name, value in ema.dit.named_parameters()}
    weights = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in weights.items()}
    return {name: tensor.detach().clone() for name, tensor in weights.items()}, norms


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_one_rank_is_two_ranks(one_stage: Callable[..., Recipe], tmp_path: Path, optimizer: str) -> None:
    recipe = replace(one_stage(ema_sigma_rel=(0.2,)), optimizer=optimizer, eps=1e-5)  # type: ignore[arg-type]
    expected, norms = train(make_dit(recipe), recipe)
    context = torch.multiprocessing.get_context("spawn")
    arguments = 2, f"file://{tmp_path}/rendezvous", recipe, tmp_path
    ranks = [context.Process(target=sharded, args=(rank, *arguments)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    for rank in range(2):
        weights, seen = torch.load(tmp_path / f"2-{rank}.pt")
        assert seen == pytest.approx(norms, rel=1e-4, nan_ok=True) and math.isnan(seen[10])
        for name, tensor in expected.items():
            torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-5, msg=name)
