"""The key/value cache of a model, allocated and measured beside what the formula predicts."""

from __future__ import annotations

from typing import Any

import torch

from kernels.bench.memory import ERRORS, no_room
from t6_lightning.common.errors import BadInput
from t6_lightning.model.cache import KVCache
from t6_lightning.presets import load_net

# torch's allocator gives a GPU's memory out in multiples of this many bytes.
ALLOCATION = 512
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def measure(name: str, context: int | None, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    """Allocate the cache that `generate` would use, on a GPU where there is one, and count its storage.

    measured = logical (the formula, if all is well) + padding that the attention declares; what torch's allocator
    rounds up stands apart, and is none on a CPU.
    """
    net = load_net(name)
    context = context or net.context
    on_gpu = torch.cuda.is_available()
    held = torch.cuda.memory_allocated() if on_gpu else 0
    try:
        cache = KVCache(net.attention, net.n_layers, batch, context, dtype, "cuda" if on_gpu else "cpu")
    except ERRORS as error:
        if not no_room(error):
            raise
        raise BadInput(
            f"--context {context} --batch {batch}: {name}'s cache cannot be allocated here"
        ) from error
    # The row numbers and lengths beside the entries are no part of what is cached.
    beside = sum(-(-8 * batch // ALLOCATION) * ALLOCATION for _ in range(2))
    rounding = torch.cuda.memory_allocated() - held - beside - cache.n_bytes if on_gpu else 0
    predicted = net.cache_bytes_per_token(dtype.itemsize) * context * batch
    return {
        "preset": name,
        "mechanism": net.attention.mechanism,
        "context": context,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "measured_bytes": cache.n_bytes,
        "logical_bytes": cache.logical_bytes,
        "padding_bytes": cache.padding_bytes,
        "allocator_rounding_bytes": rounding,
        "predicted_bytes": predicted,
        "measured_bytes_per_token": cache.n_bytes / (context * batch),
        "ratio_to_mha": cache.logical_bytes
        / (net.n_layers * 2 * net.d_model * dtype.itemsize * context * batch),
    }
