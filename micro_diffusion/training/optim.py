"""AdamW and Muon, their learning rate over a stage, and the guarded step."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from torch.optim import AdamW
from torch.optim.adamw import adamw

from micro_diffusion.models.dit import Block
from micro_diffusion.models.layers import CrossAttention, SelfAttention, SwiGLU
from micro_diffusion.models.moe import ExpertChoiceMoE
from micro_diffusion.training.config import Recipe, Stage

# What Muon moves: parameters of these modules, and of how many matrices, one above the other, each is made. A tensor
# of experts is a stack of matrices. The rest (embeddings, router, final layer, norms, biases) is AdamW's.
MATRICES: tuple[tuple[type[nn.Module], dict[str, int]], ...] = (
    (Block, {"adaLN_modulation.1.weight": 6}),
    (SelfAttention, {"qkv.weight": 3, "proj.weight": 1}),
    (CrossAttention, {"q_linear.weight": 1, "kv_linear.weight": 2, "proj.weight": 1}),
    (SwiGLU, {"w1.weight": 1, "w2.weight": 1, "w3.weight": 1}),
    (ExpertChoiceMoE, {"w1": 1, "w2": 1}),
)


def learning_rate(stage: Stage, images: int) -> float:
    """Rate of the step that ends `images` into the stage: linear warm-up, then constant or a half cosine to the end."""
    if images < stage.warmup_images:
        return stage.learning_rate * images / stage.warmup_images
    if stage.schedule == "constant":
        return stage.learning_rate
    progress = (images - stage.warmup_images) / (stage.images - stage.warmup_images)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return stage.learning_rate * (stage.final_lr_ratio + (1 - stage.final_lr_ratio) * cosine)


def orthogonalise(matrices: Float[Tensor, "k n m"], *, dtype: torch.dtype) -> Float[Tensor, "k n m"]:
    """About U V^T of each matrix U S V^T: singular values between 0.7 and 1.2, in the place of any others.

    Five steps of the quintic Newton-Schulz iteration with Muon's coefficients (Jordan et al., 2024).
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


def make_optimizer(dit: nn.Module, recipe: Recipe) -> AdamW:
    """The recipe's optimizer for all parameters of the model, plain or sharded by FSDP2.

    All moments exist from the start, so that a checkpoint can be loaded into them in place. `guarded_step` takes the
    steps: AdamW's, and `muon`'s of groups that have `sides`, matrices of one shape, some of them turned.
    """
    sides: dict[nn.Parameter, tuple[int, ...]] = dict.fromkeys(dit.parameters(), ())
    scales = dict.fromkeys(dit.parameters(), 1.0)
    for module in dit.modules():
        for kind, names in MATRICES:
            for name, count in names.items() if isinstance(module, kind) else ():
                parameter = module.get_parameter(name)
                if recipe.optimizer == "muon":
                    sides[parameter] = tuple(sorted((parameter.shape[-2] // count, parameter.shape[-1])))
                scales[parameter] = recipe.expert_learning_rate_scale if kind is ExpertChoiceMoE else 1.0
    groups: dict[Any, Any] = {}
    for parameter, shape in sides.items():
        group = {"params": [], "sides": shape, "lr_scale": scales[parameter], "momentum": recipe.muon_momentum}
        groups.setdefault((shape, scales[parameter]), group)["params"].append(parameter)
    optimizer = AdamW(list(groups.values()), betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay)
    for parameter, shape in sides.items():
        moments = ("momentum",) if shape else ("exp_avg", "exp_avg_sq")
        optimizer.state[parameter] = {name: torch.zeros_like(parameter) for name in moments}
        if not shape:
            optimizer.state[parameter]["step"] = torch.zeros((), device=parameter.device)
    return optimizer


@torch.no_grad()
def muon(optimizer: AdamW, group: dict[str, Any], *, divisor: Float[Tensor, ""], taken: Bool[Tensor, ""]) -> None:
    """Step along the orthogonalised Nesterov momentum of a group's gradients / `divisor`, which are freed.

    As long as a step of AdamW (arXiv 2502.16982). Nothing moves where `taken` is false. Of a sharded matrix every rank
    gathers all and moves its own part, so that the number of ranks does not matter.
    """
    held = group["params"]
    buffers = [local(optimizer.state[parameter]["momentum"]) for parameter in held]
    ahead = torch._foreach_div([local(parameter.grad) for parameter in held], divisor)
    for each in ahead:
        each.masked_fill_(~taken, 0.0)
    torch._foreach_mul_(buffers, torch.where(taken, group["momentum"], 1.0))
    torch._foreach_add_(buffers, ahead)
    torch._foreach_add_(ahead, buffers, alpha=group["momentum"])
    dtype = torch.bfloat16 if ahead[0].is_cuda else torch.float32  # a CPU is no faster in bf16
    full = [_gather(part.to(dtype), parameter) for part, parameter in zip(ahead, held, strict=True)]
    stacks = [each.reshape(-1, sum(group["sides"]) - each.shape[-1], each.shape[-1]) for each in full]
    flat = [stack.mT if stack.shape[1] > stack.shape[2] else stack for stack in stacks]
    found = orthogonalise(torch.cat(flat), dtype=dtype).split([len(stack) for stack in stacks])
    moves = []
    for parameter, stack, direction in zip(held, stacks, found, strict=True):
        move: Tensor = (direction.mT if direction.shape != stack.shape else direction).reshape(parameter.shape)
        if isinstance(parameter, DTensor):
            move = distribute_tensor(move, parameter.device_mesh, parameter.placements, src_data_rank=None)
        moves.append(local(move).to(parameter.dtype))
        parameter.grad = None
    own = [local(parameter) for parameter in held]
    torch._foreach_mul_(moves, taken * (group["lr"] * 0.2 * max(group["sides"]) ** 0.5))
    torch._foreach_mul_(own, 1 - taken * (group["lr"] * group["weight_decay"]))
    torch._foreach_sub_(own, moves)


class Step(NamedTuple):
    """What a guarded step saw; both stay on the device."""

    grad_norm: Float[Tensor, ""]
    taken: Bool[Tensor, ""]


@torch.no_grad()
def guarded_step(optimizer: AdamW, loss: Float[Tensor, ""], *, lr: float | Float[Tensor, ""], clip_norm: float) -> Step:
    """Clip by the global norm and step, or leave weights and moments alone where loss or gradient is not finite.

    The host never waits: fused AdamW divides by `grad_scale` and obeys `found_inf` inside its kernel, the way that
    `torch.amp.GradScaler` drives it. Shards are moved as plain tensors, which spares the host DTensor's dispatch. The
    gradients are freed. `loss` is the whole batch's, the same on every rank.
    """
    held = [[p for p in group["params"] if p.grad is not None] for group in optimizer.param_groups]
    norm = total_norm([p.grad for some in held for p in some])
    taken, divisor = torch.isfinite(norm) & torch.isfinite(loss), (norm / clip_norm).clamp(min=1.0)
    for group, some in zip(optimizer.param_groups, held, strict=True):
        group["lr"] = lr * group["lr_scale"]
        if group["sides"] and some:
            muon(optimizer, group | {"params": some}, divisor=divisor, taken=taken)
            continue
        states = [optimizer.state[p] for p in some]
        first, second = ([local(state[name]) for state in states] for name in ("exp_avg", "exp_avg_sq"))
        # a step may be part of a CUDA graph: capturable, which costs a fused one nothing
        adamw([*map(local, some)], [local(p.grad) for p in some], first, second, [], [s["step"] for s in states],
              lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], beta1=group["betas"][0],
              beta2=group["betas"][1], grad_scale=divisor, found_inf=(~taken).float(), amsgrad=False, maximize=False,
              fused=True, capturable=True)  # fmt: skip
    optimizer.zero_grad(set_to_none=True)
    return Step(norm, taken)


def total_norm(tensors: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Norm of all numbers together, over all shards."""
    norm, first = nn.utils.get_total_norm([*map(local, tensors)]), tensors[0]
    if isinstance(first, DTensor):
        parts = [Partial() if each.is_shard() else each for each in first.placements]
        return whole(DTensor.from_local(norm.square(), first.device_mesh, parts)).sqrt()
    return norm


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from the shards of all ranks, on each of them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _gather(part: Tensor, like: Tensor) -> Tensor:
    """The whole of a tensor laid out like `like`, of which this rank holds `part`."""
    if isinstance(like, DTensor):
        part = DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    return whole(part)
