"""One device, DDP, FSDP2 and hybrid sharding, from outside the model: names, shapes and mathematics stay the same.

Each rank takes its contiguous share of every global batch, and both wrappers average gradients over the ranks, so the
gradient is that of the global mean. Weights and reductions are float32; bf16 is the autocast inside.
"""

import functools
import logging
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from micro_diffusion.models.dit import DiT, Stream
from micro_diffusion.runtime.distributed import Stuck, World
from micro_diffusion.runtime.files import UserError
from micro_diffusion.training.config import Recipe, Stage
from micro_diffusion.training.feed import Examples
from micro_diffusion.training.graph import EAGER, Graphed, beside
from micro_diffusion.training.options import Options

T = TypeVar("T")
logger = logging.getLogger(__name__)
BUCKETS = 6  # all-reduces of a step of DDP, and about as many graphs: the host falls behind a GPU with more of them
AHEAD = 8  # steps that the host may be ahead of CUDA graphs
UNIT = 4  # blocks that are gathered by FSDP, and compiled, at once: for the same reason
warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # of views, which nobody here writes into


class Parallel:
    """How the model of a run is spread over the ranks; UserError for batches that do not divide among them."""

    def __init__(self, options: Options, world: World, recipe: Recipe, device: torch.device) -> None:
        self.options, self.world, self.device, self.compile = options, world, device, recipe.compile
        self.mode = "single" if world.size == 1 else "ddp" if options.parallel == "auto" else options.parallel
        if options.cuda_graph and (device.type != "cuda" or recipe.text_length is None):
            raise UserError("--cuda-graph is for CUDA GPUs, and for batches of one shape: set text_length")
        self.side, self.ends = torch.cuda.Stream() if options.cuda_graph else None, deque[torch.cuda.Event]()
        self.by_block = recipe.compile and (self.mode in ("fsdp", "hybrid") or options.activation_checkpointing)
        for stage in recipe.stages:
            self.micro_batch(stage)

    @functools.cached_property
    def mesh(self) -> DeviceMesh:
        """All ranks; for hybrid machines by ranks of one: copies along the first axis, shards along the second."""
        if self.mode == "fsdp":
            return init_device_mesh(self.device.type, (self.world.size,))
        shape = self.world.size // self.world.local_size, self.world.local_size
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))

    def micro_batch(self, stage: Stage) -> int:
        """Images of one forward pass of this rank, before any halving."""
        share, rest = divmod(stage.batch_size, self.world.size)
        chosen = self.options.micro_batch if isinstance(self.options.micro_batch, int) else stage.micro_batch
        size = min(chosen or share, share)
        if rest or share % size:
            raise UserError(
                f"stage {stage.name!r}: a batch of {stage.batch_size} does not divide among {self.world.size} ranks "
                f"with micro-batches of {size or chosen}: change batch_size, --micro-batch or the number of ranks"
            )
        return size

    def shard(self, dit: DiT) -> DiT:
        """Prepare a new model, in place, before its optimizer is made: blocks recompute, compile, parameters shard.

        FSDP's hooks stay between units of a few blocks, where communication overlaps. What lies outside of blocks
        compiles part by part, where a graph launches it: the text's refiner has more tokens than a block of masked
        patches. Where the host launches, that was not seen to gain.
        """
        size = 1 if self.options.activation_checkpointing else UNIT
        stacks: list[list[nn.Module]] = [[*dit.patch_mixer], [*dit.blocks]]
        units = [stack[at : at + size] for stack in stacks for at in range(0, len(stack), size)]
        recompute = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        for unit in units:
            if self.by_block:
                together = functools.partial(_in_turn, [block.forward for block in unit])
                for block in unit[1:]:  # is called as before, for the sake of hooks, after its work is done
                    block.forward = lambda stream, *_: stream
                unit[0].forward = torch.compile(together, dynamic=False)
            if self.options.activation_checkpointing:
                unit[0].forward = functools.partial(recompute, unit[0].forward)
        for part in dit.children() if self.by_block and self.options.cuda_graph else ():
            if not isinstance(part, nn.ModuleList):
                part.forward = torch.compile(part.forward, dynamic=False)
        if self.mode in ("fsdp", "hybrid"):
            for unit in [*units, cast(list[nn.Module], [dit])]:
                fully_shard(unit, mesh=self.mesh)
        return dit

    def network(self, dit: DiT, stage: Stage) -> DiT:
        """What a stage calls in place of the prepared model; the parameters are the model's own.

        Where a step of DDP is one micro-batch, or a CUDA graph, the compiler cuts the model where a bucket of gradients
        is full: its all-reduce then begins while the backward pass goes on. Launched for several, the cuts cost the
        host more than that gains.
        """
        if self.compile:
            torch.compiler.reset()  # graphs of the stage before
            torch._dynamo.config.recompile_limit = 64  # blocks share their code and differ in width
            torch._dynamo.config.fail_on_recompile_limit_hit = True  # rather than run uncompiled, unnoticed
            one = self.micro_batch(stage) * self.world.size == stage.batch_size
            torch._dynamo.config.optimize_ddp = not self.by_block and (one or self.options.cuda_graph)
        network = cast(DiT, torch.compile(dit, dynamic=False)) if self.compile and not self.by_block else dit
        if self.mode == "ddp":
            size = max(1.0, sum(each.nbytes for each in dit.parameters()) / 2**20 / BUCKETS)
            with beside(self.side) if self.side else nullcontext():  # its hooks launch where they were made
                ddp = DistributedDataParallel(network, gradient_as_bucket_view=True, bucket_cap_mb=size)
            ddp._set_ddp_runtime_logging_sample_rate(2**30)  # it times steps, which cannot be in a CUDA graph
            return cast(DiT, ddp)
        return network

    def split(self, network: DiT, batch: Examples, size: int) -> Iterator[Examples]:
        """Micro-batches of `size` images; gradients cross the ranks in the backward pass of the last one only."""
        parts = list(batch.split(size))
        for index, part in enumerate(parts):
            if index in (0, len(parts) - 1):  # it is slow: FSDP walks through all modules
                self._synchronise(network, index + 1 == len(parts))
            yield part
        if isinstance(network, FSDPModule):
            network.set_reshard_after_forward(True)  # where no backward pass follows

    def captured(self, network: DiT, work: Callable[[Examples, float | Tensor], T]) -> Callable[[Examples, float], T]:
        """A step of a batch at a learning rate; as a CUDA graph if that was asked for."""
        if not self.options.cuda_graph:
            return work

        def joined(rate: Tensor, *columns: Tensor) -> T:
            found = work(Examples(*columns), rate)
            if isinstance(network, FSDPModule):  # its streams wait for the last weights, and a capture for its streams
                gather = network._get_fsdp_state()._comm_ctx
                for stream in (gather.all_gather_copy_in_stream, gather.all_gather_stream):
                    torch.cuda.current_stream().wait_stream(stream)
            return found

        def step(batch: Examples, rate: float) -> T:
            found = graph(torch.full((), rate, device=self.device), *batch)
            self.ends.append(torch.cuda.current_stream().record_event())
            self.wait(AHEAD)
            return found

        # DDP arranges its buckets in the first step, and times the first ten
        graph = Graphed(joined, eager=12 if self.mode == "ddp" else EAGER, side=self.side)
        return step

    def wait(self, ahead: int = 0) -> None:
        """Wait for the device to end all steps of CUDA graphs but the last `ahead`; Stuck if one takes too long.

        NCCL itself gives up a collective that hangs, but not in a graph.
        """
        while len(self.ends) > ahead:
            begun = time.monotonic()
            while not self.ends[0].query():
                if time.monotonic() - begun > self.options.timeout:
                    raise Stuck(f"a step does not end (seen from rank {self.world.rank}): a GPU or a network is stuck")
                time.sleep(1e-4)
            self.ends.popleft()

    def fit(self, network: DiT, batch: Examples, stage: Stage, backward: Callable[[Examples], object]) -> int:
        """The micro-batch of a stage, halved until forward and backward of its first one fit on every rank.

        Without sharding the trial does not communicate, so a rank that runs out of memory leaves no other waiting.
        """
        size, chosen = self.micro_batch(stage), self.options.micro_batch or stage.micro_batch
        if chosen != "auto" and (chosen or self.device.type != "cuda"):
            return size
        while self.world.agree(not self._fits(network, next(batch.split(size)), stage, backward)):
            share = stage.batch_size // self.world.size
            smaller = max((part for part in range(1, size // 2 + 1) if share % part == 0), default=0)
            if not smaller or isinstance(network, FSDPModule):
                raise UserError(
                    f"stage {stage.name!r}: out of memory with micro-batches of {size} images; set a smaller "
                    "--micro-batch, --activation-checkpointing, or --reshard with FSDP"
                )
            logger.warning("stage %r: out of memory with micro-batches of %d images", stage.name, size)
            # several a step from now on: see `network`
            size, torch._dynamo.config.optimize_ddp = smaller, self.options.cuda_graph and not self.by_block
        logger.info("stage %r: micro-batches of %d images", stage.name, size)
        return size

    def _fits(self, network: DiT, part: Examples, stage: Stage, backward: Callable[[Examples], object]) -> bool:
        reserve: list[Tensor] = []  # what an average takes later in the stage
        try:
            reserve += [torch.empty_like(each) for each in network.parameters() if stage.ema_halflife_images]
            times = min(2, stage.batch_size // self.world.size // len(part.latents))
            for time in range(times):  # once more where gradients are added up: the second needs room beside them
                # what FSDP has not sharded is out of zero_grad's reach
                self._synchronise(network, isinstance(network, FSDPModule) and time + 1 == times)
                backward(part)
            fits = True
        except torch.OutOfMemoryError:
            fits = False
        reserve.clear()
        network.zero_grad(set_to_none=True)
        if not fits and self.device.type == "cuda":
            torch.cuda.empty_cache()
        return fits

    def _synchronise(self, network: DiT, now: bool) -> None:
        if isinstance(network, DistributedDataParallel):
            network.require_backward_grad_sync = now
        elif isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(now)
            network.set_reshard_after_forward(self.options.reshard)
            network.set_reshard_after_backward(now or self.options.reshard)


def _in_turn(forwards: list[Callable[..., Stream]], stream: Stream, *rest: Tensor | None) -> Stream:
    """A unit of blocks as one function: caption, condition and mask are the same for all."""
    for forward in forwards:
        stream = forward(stream, *rest[:3])  # each makes its own keys; the fourth would be those of the first
    return stream


def make_deterministic() -> None:
    """Ask torch for the same bits every time: before the first use of a GPU."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # no kernel is chosen by timing; torch's settings hold in one thread, what the environment says in all
    os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"
    torch._inductor.config.deterministic = True
