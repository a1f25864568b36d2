"""What one run of the benchmark times: one callable per row of the table, over inputs of the requested sizes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

Sizes = dict[str, int]


@dataclass(frozen=True)
class Row:
    """One callable to time. `least_bytes`: what it must at least read and write, where that is the limit."""

    name: str
    mode: str
    run: Callable[[], object]
    least_bytes: int | None = None


@dataclass(frozen=True)
class Plan:
    operation: str
    device: torch.device
    dtype: torch.dtype
    sizes: Sizes
    rows: list[Row]


def plan(
    operation: str,
    given: Mapping[str, int | None],
    *,
    device: str | None,
    dtype: str | None,
    folders: Mapping[str, Path] | None = None,
) -> Plan:
    """The rows of `kernels.<operation>.bench`. Sizes, device and dtype that are None take what fits the device.

    Raises ValueError, in one sentence, for a device that is not there and for sizes that do not go together.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    bench = import_module(f"kernels.{operation}.bench")
    defaults: dict[str, int | str] = bench.GPU_SIZES if place.type == "cuda" else bench.CPU_SIZES
    asked = {**defaults, **{name: value for name, value in given.items() if value is not None}}
    # A default that is the name of another size follows that one.
    sizes = {name: asked[value] if isinstance(value, str) else value for name, value in asked.items()}
    if sizes.get("head_dim", 2) % 2:
        raise ValueError(f"--head-dim must be even for RoPE, got {sizes['head_dim']}")
    precision = getattr(torch, dtype or ("bfloat16" if place.type == "cuda" else "float32"))

    torch.manual_seed(0)
    with torch.device(place):
        rows = bench.rows(sizes, precision, **(folders or {}))
    return Plan(operation, place, precision, sizes, rows)


def both_modes(
    name: str,
    forward: Callable[[], torch.Tensor | tuple[torch.Tensor, ...]],
    inputs: list[torch.Tensor],
    least_bytes: tuple[int, int] | tuple[None, None] = (None, None),
) -> list[Row]:
    """`least_bytes`: of the forward pass, and of both passes."""
    # Full tensors, as a next layer would send back: the stride-0 gradient of a sum times other code paths.
    found = without_gradients(forward)()
    gradients = [torch.randn_like(x) for x in (found if isinstance(found, tuple) else [found])]

    def forward_and_backward() -> object:
        return torch.autograd.grad(forward(), inputs, gradients)

    return [
        Row(name, "forward", without_gradients(forward), least_bytes[0]),
        Row(name, "forward+backward", forward_and_backward, least_bytes[1]),
    ]


def without_gradients(forward: Callable[[], Any]) -> Callable[[], Any]:
    return torch.no_grad()(forward)


def n_bytes(*tensors: torch.Tensor) -> int:
    """Of all of them together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
