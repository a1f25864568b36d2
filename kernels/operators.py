"""What the registered operators with a gradient have in common."""

from collections.abc import Callable
from typing import Any

import torch


def differentiate_once(
    library: torch.library.Library, name: str, save: Callable[..., None], differentiate: Callable[..., Any]
) -> None:
    """Registers the gradient of `name`, by its operator `name`_backward, and that this one has none.

    Without the second, torch takes a second derivative for zeros. RuntimeError, as torch's `once_differentiable`.
    """

    def refuse(ctx: Any, *_: torch.Tensor) -> None:
        raise RuntimeError(
            f"{name}: by backend 'triton' gradients can be taken once, not differentiated again;"
            " backend 'plain' can do that"
        )

    torch.library.register_autograd(f"t6_lightning::{name}", differentiate, setup_context=save, lib=library)
    torch.library.register_autograd(f"t6_lightning::{name}_backward", refuse, lib=library)
