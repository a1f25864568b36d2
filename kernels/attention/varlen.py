"""Attention inside packed documents as sequences of their own lengths: no mask, no work across documents.

Shapes: B batch, T tokens, N = B T, H heads, G KV heads, D head dimension, E value dimension.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F

from kernels.dispatch import values_are_at_hand

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

OPERATORS = set() if varlen_attn is None else {torch.ops.torch_attn._varlen_attn.default}
SHARES_HEADS = varlen_attn is not None and "enable_gqa" in inspect.signature(varlen_attn).parameters
# Documents are counted in steps of this: each count is another shape to torch.compile.
STEP = 64


def offsets(documents_BT: torch.Tensor) -> torch.Tensor:
    """Where each document of a packed batch begins in its B T tokens, then B T: int32 (n + 1,).

    documents_BT  (B, T) index of each token's document, constant in it; no document goes over the end of a row

    n is the number of documents rounded up, the last ones being empty. Waits for the device. Raises ValueError for
    documents of other dimensions.
    """
    if documents_BT.dim() != 2:
        raise ValueError(f"offsets: documents must be (B, T), are {tuple(documents_BT.shape)}")
    B, T = documents_BT.shape
    starts_BT = F.pad(documents_BT[:, 1:] != documents_BT[:, :-1], (1, 0), value=True)[:, :T]
    begins = starts_BT.flatten().nonzero().flatten().to(torch.int32)
    padding = STEP - len(begins) % STEP
    return F.pad(begins, (0, padding), value=B * T)


def check_offsets(offsets: torch.Tensor, B: int, T: int) -> None:
    """Raises ValueError where they are not documents of B rows of T tokens; of values only those that are at hand."""
    if offsets.dim() != 1 or len(offsets) < 2 or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "attention: documents must be what `offsets` gives, integers (n + 1,) with n of at least 1, are"
            f" {offsets.dtype} {tuple(offsets.shape)}"
        )
    if not values_are_at_hand(offsets):
        return
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != B * T:
        raise ValueError(f"attention: documents must be from 0 to B T = {B * T}, are from {first} to {last}")
    falls = offsets.diff() < 0
    if falls.any():
        n = int(falls.nonzero()[0])
        raise ValueError(
            f"attention: documents must not fall, fall from {int(offsets[n])} to {int(offsets[n + 1])}"
        )
    rows_B = T * torch.arange(B, device=offsets.device)
    inside = ~torch.isin(rows_B, offsets)
    if inside.any():
        raise ValueError(
            f"attention: documents must not go over the end of a row of {T} tokens, one does at token"
            f" {int(rows_B[inside][0])}"
        )


def mask(offsets: torch.Tensor, B: int, T: int) -> torch.Tensor:
    """What offsets mean: bool (B, 1, T, T), True where a token of a document sees another, or itself."""
    positions_N = torch.arange(B * T, device=offsets.device, dtype=offsets.dtype)
    document_BT = torch.searchsorted(offsets, positions_N, right=True).view(B, T)
    position_T = torch.arange(T, device=offsets.device)
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    return (same_BTT & (position_T[:, None] >= position_T)).unsqueeze(1)


def attention(
    q_BTHD: torch.Tensor, k_BTGD: torch.Tensor, v_BTGE: torch.Tensor, scale: float, offsets: torch.Tensor
) -> torch.Tensor:
    """Causal attention inside each document: (B, T, H, E)."""
    assert varlen_attn is not None
    B, T, H, D = q_BTHD.shape
    G, E = v_BTGE.shape[2:]
    if E < D:  # the kernel knows one size of heads
        v_BTGE = F.pad(v_BTGE, (0, D - E))
    options: dict[str, Any] = {"enable_gqa": True} if SHARES_HEADS and G != H else {}
    if G != H and not SHARES_HEADS:
        k_BTGD, v_BTGE = (x.repeat_interleave(H // G, dim=2) for x in (k_BTGD, v_BTGE))
    o_NHD = varlen_attn(
        q_BTHD.flatten(0, 1), k_BTGD.flatten(0, 1), v_BTGE.flatten(0, 1), offsets, offsets, T, T,
        scale=scale, window_size=(-1, 0), **options,
    )  # fmt: skip
    assert isinstance(o_NHD, torch.Tensor)
    return o_NHD[..., :E].unflatten(0, (B, T))
