"""What GPUs can do and what they cost: peaks from the makers' data sheets, typical prices. An unknown GPU has none."""

from typing import NamedTuple

import torch


class Gpu(NamedTuple):
    """A GPU by the names that `torch.cuda.get_device_name` gives it, without "NVIDIA".

    Peaks are dense (no sparsity), in TFLOP/s: `half` of bf16 with float32 sums; `single` of float32 as this package
    runs it, in TF32 where there is that. `price` is in dollars an hour, on demand: typical of specialised clouds in
    spring 2026 and rounded; offers vary widely. `bandwidth`: of its memory, in GB/s. `nvlink`: to the others of its
    host, in one direction, in GB/s; 0 where it is not known.
    """

    names: tuple[str, ...]
    half: float
    single: float
    memory_gb: int
    price: float
    bandwidth: float
    nvlink: float = 0

    def peak_flops(self, precision: str) -> float:
        """FLOP/s at "bf16" or "float32"."""
        return (self.half if precision == "bf16" else self.single) * 1e12


GPUS = {
    "h100": Gpu(("H100 80GB HBM3",), 989.4, 494.7, 80, 2.90, 3350, 450),
    "h100-pcie": Gpu(("H100 PCIe",), 756.5, 378.2, 80, 2.40, 2000),
    "h100-nvl": Gpu(("H100 NVL",), 835.5, 417.7, 94, 2.70, 3938),
    "h200": Gpu(("H200",), 989.4, 494.7, 141, 3.60, 4800, 450),
    "b200": Gpu(("B200",), 2250, 1125, 180, 6.00, 8000, 900),
    "a100-40gb": Gpu(("A100-SXM4-40GB", "A100-PCIE-40GB"), 312, 156, 40, 1.20, 1555),
    "a100-80gb": Gpu(("A100-SXM4-80GB", "A100 80GB PCIe"), 312, 156, 80, 1.40, 1935),
    "a6000": Gpu(("RTX A6000",), 154.8, 77.4, 48, 0.50, 768),
    "l40s": Gpu(("L40S",), 362.1, 183.2, 48, 0.80, 864),
    "l4": Gpu(("L4",), 121, 60, 24, 0.45, 300),
    "rtx-4090": Gpu(("GeForce RTX 4090",), 165.2, 82.6, 24, 0.40, 1008),
    "rtx-3090": Gpu(("GeForce RTX 3090",), 71.2, 35.6, 24, 0.25, 936),
    "mi300x": Gpu(("AMD Instinct MI300X",), 1307.4, 163.4, 192, 2.20, 5300),
}


def gpu_of(device: torch.device) -> Gpu | None:
    """The GPU that the driver calls by such a name; None for a CPU, and for one not listed: a guess would mislead."""
    name = device_name(device)
    return next((gpu for gpu in GPUS.values() if name in gpu.names), None)


def device_name(device: torch.device) -> str:
    """As the driver has it, without "NVIDIA"; of what is no GPU its kind."""
    return torch.cuda.get_device_name(device).removeprefix("NVIDIA ") if device.type == "cuda" else device.type


def device_count() -> int:
    """Devices of this run: one for each of its processes."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
