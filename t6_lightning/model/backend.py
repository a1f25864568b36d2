"""Whether a model's `attention_backend` can run on a device, said before anything is spent."""

from __future__ import annotations

import torch

from kernels.place import TRITON_IS_INSTALLED
from t6_lightning.common.errors import require
from t6_lightning.model.config import T6Config


def check_backend(net: T6Config, device: torch.device) -> None:
    """Refuse a backend that was asked for by name and that `device` does not have.

    Raises:
        BadInput: with the reason. What no device could run is refused by `T6Config` itself.
    """
    if net.attention_backend != "triton":
        return
    why_not = None
    if not TRITON_IS_INSTALLED:
        why_not = "the package triton is not installed"
    elif device.type != "cuda":
        why_not = f"it needs an NVIDIA GPU, and this would run on the device {device.type!r}"
    elif torch.cuda.get_device_capability(device)[0] < 8:
        why_not = "it needs a GPU of compute capability 8 or later"
    require(why_not is None, "model.net.attention_backend", "triton", why_not or "")
