"""Attention of a few new tokens over a cache of full keys and values: MHA, GQA, MQA and absorbed MLA.

Shapes: B batch, T query tokens, M cached tokens, H heads, G KV heads, D head dimension, E value dimension.
"""

from collections.abc import Callable
from functools import partial

import torch

from kernels.attention import attention, check_shapes
from kernels.decode import MOST_QUERIES, check_lengths, visible, why_not_triton
from kernels.dispatch import check_floats, choose, why_no_derivative

# The widest head of torch's flash kernel.
WIDEST_FLASH = 256


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
    backend   "auto", "triton", "flash", "sdpa" or "plain"
    returns   (B, T, H, E) in q's dtype

    "triton" takes heads of any width, and reads values that are the first E features of the keys, as MLA's latent,
    once. "flash" is the kernel behind SDPA, asked to stop at `lengths`, which SDPA cannot say. Both read the lengths on
    the device and nothing past them, so that a CUDA graph holds while they grow.

    Raises ValueError for shapes and dtypes that do not fit together, for a backend that is unknown or cannot run and,
    on a CPU, for lengths that are not 0 to M.
    """
    check_shapes("decode_grouped", q_BTHD, k_BMGD, v_BMGE)
    check_floats("decode_grouped", {"q": q_BTHD, "k": k_BMGD, "v": v_BMGE})
    check_lengths("decode_grouped", lengths, q_BTHD.shape[0], k_BMGD.shape[1])
    cannot = {
        name: why
        for name, why in {
            "triton": why_not_triton(
                q_BTHD, (k_BMGD, k_BMGD, v_BMGE, v_BMGE), mask if lengths is None else None
            ),
            "flash": _why_not_flash(q_BTHD, k_BMGD, v_BMGE, lengths),
        }.items()
        if why
    }
    # µs of 16 rows of 32,768 tokens on an H100 (bfloat16), Triton / flash / SDPA with a mask, which reads past lengths:
    #     16 heads of 64        702 / 908 / 731          31 over 1 of 64    54 / 69 / 490
    #     30 over 2 of 64        98 / 123 / 494          MLA of 256 + 32   116 / - / 2116
    candidates: dict[str, Callable[..., torch.Tensor]] = {"triton": _triton, "flash": _flash, "sdpa": _sdpa}
    # On a CPU Triton's interpreter is for tests: by name only. MHA in float32 has no tensor cores; it was not timed.
    float32_mha = q_BTHD.dtype == torch.float32 and q_BTHD.shape[2] == k_BMGD.shape[2]
    if q_BTHD.device.type == "cpu" or float32_mha:
        candidates = {"sdpa": _sdpa, "flash": _flash, "triton": _triton}
    candidates["plain"] = partial(_sdpa, backend="plain")
    run = choose("decode_grouped", backend, candidates, cannot)
    return run(q_BTHD, k_BMGD, v_BMGE, scale, mask, lengths)


def _sdpa(q_BTHD, k_BMGD, v_BMGE, scale, mask, lengths, backend="sdpa") -> torch.Tensor:
    if mask is None and lengths is not None:
        mask = visible(lengths, q_BTHD.shape[1], k_BMGD.shape[1])
    return attention(q_BTHD, k_BMGD, v_BMGE, scale=scale, causal=False, mask=mask, backend=backend)


def _triton(q_BTHD, k_BMGD, v_BMGE, scale, mask, lengths) -> torch.Tensor:
    if not q_BTHD.numel():
        return q_BTHD.new_empty(*q_BTHD.shape[:3], v_BMGE.shape[-1])
    if torch.compiler.is_compiling():
        return torch.ops.t6_lightning.decode_grouped(q_BTHD, k_BMGD, v_BMGE, scale, lengths)
    return _launched(q_BTHD, k_BMGD, v_BMGE, scale, lengths)


def _launched(q_BTHD, k_BMGD, v_BMGE, scale, lengths) -> torch.Tensor:
    # Imported here: the package is absent on most machines without a GPU.
    from kernels.decode import grouped_triton

    return grouped_triton.decode(q_BTHD, k_BMGD, v_BMGE, scale, lengths)


# An operator for torch.compile, as in kernels/decode/__init__.py.
_library = torch.library.Library("t6_lightning", "FRAGMENT")
_library.define("decode_grouped(Tensor q, Tensor k, Tensor v, float scale, Tensor? lengths) -> Tensor")
_library.impl("decode_grouped", _launched, "CUDA")
torch.library.register_fake(
    "t6_lightning::decode_grouped",
    lambda q, k, v, *_: q.new_empty(*q.shape[:3], v.shape[-1]),
    lib=_library,
)


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
