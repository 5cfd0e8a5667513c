import pytest
import torch

from micro_diffusion.runtime.device import autocast, pick_device
from micro_diffusion.runtime.files import UserError


def test_pick_device() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device().type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize("name", ["cuda:77", "gpu"])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(UserError, match="is not available here"):
        pick_device(name)


def test_autocast() -> None:
    x = torch.ones(2, 2)
    with autocast(x.device, "bf16"):
        assert (x @ x).dtype == torch.bfloat16
    with autocast(x.device, "float32"):
        assert (x @ x).dtype == torch.float32
