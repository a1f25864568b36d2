"""Attention of a few new tokens over a cache of full keys and values: MHA, GQA, MQA and absorbed MLA.

Shapes: B batch, T query tokens, M cached tokens, H heads, G KV heads, D head dimension, E value dimension.
"""

from collections.abc import Callable
from functools import partial

import torch

from kernels.attention import attention, check_shapes
from kernels.decode import MOST_QUERIES, check_lengths, decode, visible, why_not_triton
from kernels.dispatch import check_floats, choose, why_no_derivative

# The widest head of torch's flash kernel.
WIDEST_FLASH = 256
# Of the Triton kernel, whose matrix products grow with them: each is a rank, and meets every query head.
MOST_KV_HEADS = 8


def decode_grouped(
    q_BTHD: torch.Tensor,
    k_BMGD: torch.Tensor,
    v_BMGE: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """softmax(scale · q kᵀ) v per head; head h reads KV head h // (H/G).

    q_BTHD    (B, T, H, D), H a multiple of G
    k_BMGD    (B, M, G, D)
    v_BMGE    (B, M, G, E)
    lengths   integers (B,), cached tokens of each row with the T of the queries, as in `kernels.decode.decode`;
              None: all of the cache is visible
    mask      bool (B, 1, T, M), what `lengths` mean, for backends that read masks; made here where it is missing.
              Without lengths it is for those backends alone
    backend   "auto", "triton", "grouped", "flash", "sdpa" or "plain"
    returns   (B, T, H, E) in q's dtype

    "triton" is the kernel of `kernels.decode.decode`: G KV heads are TPA of rank G whose head factors are ones and
    zeros, times G (section 4); it takes heads of any width. "grouped" is a kernel of their own, which reads values that
    are the first E features of the keys, as MLA's, once; "auto" leaves it out until it is timed. "flash" is the kernel
    behind SDPA, asked to stop at `lengths`, which SDPA cannot say. These three read the lengths on the device and
    nothing past them, so that a CUDA graph holds while they grow.

    Raises ValueError for shapes and dtypes that do not fit together, for a backend that is unknown or cannot run and,
    on a CPU, for lengths that are not 0 to M.
    """
    check_shapes("decode_grouped", q_BTHD, k_BMGD, v_BMGE)
    check_floats("decode_grouped", {"q": q_BTHD, "k": k_BMGD, "v": v_BMGE})
    check_lengths("decode_grouped", lengths, q_BTHD.shape[0], k_BMGD.shape[1])
    alone = mask if lengths is None else None
    cannot = {
        name: why
        for name, why in {
            "triton": _why_not_triton(q_BTHD, k_BMGD, v_BMGE, alone),
            "grouped": _why_not_grouped(q_BTHD, k_BMGD, v_BMGE, alone),
            "flash": _why_not_flash(q_BTHD, k_BMGD, v_BMGE, lengths),
        }.items()
        if why
    }
    candidates: dict[str, Callable[..., torch.Tensor]] = {"flash": _flash, "triton": _triton, "sdpa": _sdpa}
    if q_BTHD.device.type == "cpu":  # Triton's interpreter is for tests: by name only
        candidates = {"sdpa": _sdpa, "flash": _flash, "triton": _triton}
    elif q_BTHD.shape[2] == k_BMGD.shape[2]:
        # 16 heads of 64 over 16 rows of 32,768 tokens on an H100: 721 µs, where flash takes 880. With 2 and 1 KV
        # heads SDPA takes 490, flash 122 and 70, Triton (1 KV head) 75; MLA of 256 + 32: SDPA 2116, Triton 212.
        candidates = {"sdpa": _sdpa, "flash": _flash, "triton": _triton}
    candidates |= {"plain": partial(_sdpa, backend="plain"), "grouped": _grouped}
    run = choose("decode_grouped", backend, candidates, cannot)
    return run(q_BTHD, k_BMGD, v_BMGE, scale, mask, lengths)


def _sdpa(q_BTHD, k_BMGD, v_BMGE, scale, mask, lengths, backend="sdpa") -> torch.Tensor:
    if mask is None and lengths is not None:
        mask = visible(lengths, q_BTHD.shape[1], k_BMGD.shape[1])
    return attention(q_BTHD, k_BMGD, v_BMGE, scale=scale, causal=False, mask=mask, backend=backend)


def _triton(q_BTHD, k_BMGD, v_BMGE, scale, mask, lengths) -> torch.Tensor:
    a_BMGH = _head_factors(q_BTHD, k_BMGD.shape[2]).expand(*k_BMGD.shape[:2], -1, -1)
    return decode(q_BTHD, a_BMGH, k_BMGD, a_BMGH, v_BMGE, scale=scale, lengths=lengths, backend="triton")


def _grouped(q_BTHD, k_BMGD, v_BMGE, scale, mask, lengths) -> torch.Tensor:
    # Imported here: the package is absent on most machines without a GPU.
    from kernels.decode import grouped_triton

    return grouped_triton.decode(q_BTHD, k_BMGD, v_BMGE, scale, lengths)


_kept: dict[tuple[int, int, torch.dtype, torch.device], torch.Tensor] = {}


def _head_factors(q_BTHD: torch.Tensor, G: int) -> torch.Tensor:
    """(G, H): G where a KV head is the query head's own, which undoes that decoding divides by the rank; else 0."""
    H = q_BTHD.shape[2]
    key = (H, G, q_BTHD.dtype, q_BTHD.device)
    compiling = torch.compiler.is_compiling()
    if not compiling and key in _kept:
        return _kept[key]
    made_GH = G * torch.eye(G, dtype=q_BTHD.dtype, device=q_BTHD.device).repeat_interleave(H // G, dim=1)
    # Kept, so that a step launches nothing for them; but not what belongs to a CUDA graph, or to a compiled one.
    if not compiling and not (made_GH.is_cuda and torch.cuda.is_current_stream_capturing()):
        _kept[key] = made_GH
    return made_GH


def _why_not_triton(q_BTHD, k_BMGD, v_BMGE, mask) -> str | None:
    if k_BMGD.shape[2] > MOST_KV_HEADS:
        return f"it reads at most {MOST_KV_HEADS} KV heads"
    return why_not_triton(q_BTHD, (q_BTHD, k_BMGD, q_BTHD, v_BMGE), mask)


def _why_not_grouped(q_BTHD, k_BMGD, v_BMGE, mask) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile does not follow it"
    return why_not_triton(q_BTHD, (k_BMGD, k_BMGD, v_BMGE, v_BMGE), mask)


def _flash(q_BTHD, k_BMGD, v_BMGE, scale, mask, lengths) -> torch.Tensor:
    B, T = q_BTHD.shape[:2]
    M = k_BMGD.shape[1]
    rows = torch.arange(B + 1, device=q_BTHD.device, dtype=torch.int32)
    o_NHE = torch.ops.aten._flash_attention_forward(
        q_BTHD.flatten(0, 1),
        k_BMGD.flatten(0, 1),
        v_BMGE.flatten(0, 1),
        rows * T,
        rows * M,
        T,
        M,
        0.0,
        T > 1,  # the queries are the last of `seqused_k` tokens
        False,
        scale=scale,
        seqused_k=lengths.int().contiguous(),
    )[0]
    return o_NHE.unflatten(0, (B, T))


def _why_not_flash(q_BTHD, k_BMGD, v_BMGE, lengths) -> str | None:
    D = q_BTHD.shape[-1]
    if q_BTHD.device.type != "cuda":
        return "it needs an NVIDIA GPU"
    if lengths is None or q_BTHD.shape[1] > MOST_QUERIES:
        return "it takes lengths, and few queries"
    if any(x.dtype != q_BTHD.dtype for x in (k_BMGD, v_BMGE)) or q_BTHD.dtype.itemsize != 2:
        return "queries, keys and values must all be float16 or all bfloat16"
    if v_BMGE.shape[-1] != D or D % 8 or D > WIDEST_FLASH:
        return f"keys and values must be equally wide, a multiple of 8 up to {WIDEST_FLASH}"
    if not (k_BMGD.is_contiguous() and v_BMGE.is_contiguous()):
        return "keys and values must be contiguous"
    return why_no_derivative(q_BTHD, k_BMGD, v_BMGE)
