"""Names as drivers report them; data sheets' numbers, written down a second time."""

from collections.abc import Callable

import pytest
import torch

from micro_diffusion.runtime.hardware import GPUS, Gpu, gpu_of


@pytest.fixture
def find_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Gpu | None]:
    def find(name: str) -> Gpu | None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        return gpu_of(torch.device("cuda"))

    return find


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 3090", "rtx-3090"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_known_names(find_gpu: Callable[[str], Gpu | None], name: str, key: str) -> None:
    assert find_gpu(name) is GPUS[key]


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb", "NVIDIA GH200 480GB", "NVIDIA L40", "NVIDIA H20", "AMD Radeon", "",
    ],
)  # fmt: skip
def test_a_relative_of_a_known_gpu_is_unknown(find_gpu: Callable[[str], Gpu | None], name: str) -> None:
    assert find_gpu(name) is None


def test_peaks_and_memory() -> None:
    bf16 = {key: GPUS[key].peak_flops("bf16") / 1e12 for key in ("h100", "a100-80gb", "b200", "rtx-3090", "l4")}
    assert bf16 == pytest.approx({"h100": 989, "a100-80gb": 312, "b200": 2250, "rtx-3090": 71, "l4": 121}, rel=0.005)
    assert GPUS["a100-40gb"].peak_flops("float32") == 156e12
    assert {key: GPUS[key].memory_gb for key in ("h100", "h200", "mi300x")} == {"h100": 80, "h200": 141, "mi300x": 192}


def test_names_are_unique_and_numbers_make_sense() -> None:
    names = [name for gpu in GPUS.values() for name in gpu.names]
    assert len(names) == len(set(names))
    for gpu in GPUS.values():
        assert 1.9 * gpu.single < gpu.half < 10 * gpu.single
        assert 0 < gpu.price < 10


def test_a_cpu_is_no_gpu() -> None:
    assert gpu_of(torch.device("cpu")) is None
