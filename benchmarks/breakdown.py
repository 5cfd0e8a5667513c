"""Where a step's time goes: launches, and milliseconds by kind of kernel, from torch's profiler."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

LARGEST, NAME = 12, 90  # kernels that are listed by name, and letters of it
KINDS: tuple[tuple[str, str], ...] = (
    ("optimizer + clip", r"multi_tensor_apply|lpnorm|fused_?adam|_foreach_"),
    # what inductor makes is named after all that it fused: here its form decides first
    ("gather/scatter", r"^triton_poi_.*(gather|scatter|index)|^triton_per_.*sort|^_(gather|sum)_kernel"),
    ("copies", r"^triton_poi_fused_(((_to)?_copy|clone|cat|copy|zeros(_like)?|full(_like)?|view|t)_)+\d+$"),
    ("reductions", r"^triton_(red|per)_|^_add_norm"),
    ("gemm", r"^triton_tem_"),
    ("pointwise", r"^triton_(poi|for)_"),
    # libraries' kernels, and the CPU's operators
    ("attention", r"flash|fmha|sdpa|attention"),
    ("gemm", r"gemm|nvjet|cutlass|cublas|splitk|xmma|gemv|convol|cudnn|dgrad|wgrad|mkldnn|aten::(add|badd)?b?mm$"),
    ("gather/scatter", r"gather|scatter|index|sort|topk|radix|bitonic|one_hot"),
    ("reductions", r"reduce|layer_?norm|gammabeta|softmax|aten::(sum|mean|amax|linalg_vector_norm|all|any)$"),
    ("copies", r"memcpy|memset|copy|clone|catarray|fill|aten::(cat|zero_|stack)$"),
    ("pointwise", r"elementwise|aten::(_?(add|sub|rsub|mul|div|neg|pow|square|sqrt|rsqrt|exp|log|sin|cos|tanh|sigmoid"
                  r"|gelu|silu|clamp|clamp_min|where|lerp|addcmul|isfinite|eq|ne|lt|gt|le|ge|bitwise_\w+|logical_\w+|abs)"
                  r"(_backward)?_?)$"),
)  # fmt: skip
"""Kinds with what their kernels' names hold, in small letters; the first that fits counts, and without one "other"."""


def kind_of(name: str) -> str:
    """The kind of a kernel on a GPU, or of an operator on a CPU."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name.lower())), "other")


def breakdown(step: Callable[[], object], *, steps: int, gpu: bool) -> dict[str, Any]:
    """Per step: launches, milliseconds of all kernels together and by kind, and the largest by name.

    On a CPU operators take the place of kernels, each with the time that is its own.
    """
    step()
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
        if gpu:
            torch.cuda.synchronize()
    times, counts = Counter[str](), Counter[str]()
    for row in profiler.key_averages():
        if gpu and (row.device_type != DeviceType.CUDA or row.is_user_annotation):
            continue
        if not gpu and not row.key.startswith("aten::"):
            continue
        times[row.key] += (row.self_device_time_total if gpu else row.self_cpu_time_total) / steps / 1e3
        counts[row.key] += row.count
    kinds = dict.fromkeys([*(kind for kind, _ in KINDS), "other"], 0.0)
    for name, milliseconds in times.items():
        kinds[kind_of(name)] += milliseconds
    return {
        "launches": round(counts.total() / steps),
        "kernel_ms": round(times.total(), 3),
        "kinds_ms": {kind: round(milliseconds, 3) for kind, milliseconds in kinds.items()},
        "largest": [
            {"kernel": name[:NAME], "kind": kind_of(name), "launches": counts[name] / steps, "ms": round(ms, 3)}
            for name, ms in times.most_common(LARGEST)
        ],
    }
