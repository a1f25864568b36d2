"""Softmax attention over full keys and values; heads may share them in groups (GQA, MQA).

Shapes: B batch, T query tokens, M cached tokens, H heads, G KV heads, D head dimension, E value dimension.
"""

from collections.abc import Callable
from functools import partial

import torch

from kernels.attention import plain, sdpa, varlen
from kernels.attention.varlen import offsets
from kernels.dispatch import check_floats, choose, one_dtype

OPERATORS = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    *varlen.OPERATORS,
}
"""What these backends run: operators whose results are dear to compute again."""

HALF = (torch.float16, torch.bfloat16)
# Where cuDNN's attention is ahead of flash, which torch takes by itself. Forward and backward of 16,384 tokens in
# bfloat16 on an H100, cuDNN / flash in ms (torch 2.11; `python -m kernels.bench attention`):
#     tokens         256           512          1,024         2,048         4,096
#     47 x 64    1.25 / 1.29   1.38 / 1.44   1.65 / 2.04   2.39 / 3.25   3.86 / 5.67
#     34 x 64    0.99 / 1.05   1.11 / 1.20   1.34 / 1.58   1.78 / 2.47   2.84 / 4.28
#     16 x 64    0.70 / 0.65   0.78 / 0.71   0.82 / 0.82   1.03 / 1.33   1.53 / 2.21
#     16 x 128   0.99 / 0.96   1.01 / 1.02   1.12 / 1.29   1.32 / 2.14   2.25 / 3.71
CUDNN_PAYS_FROM_TOKENS = 1024
CUDNN_PAYS_FROM_HEADS = 32


def attention(
    q_BTHD: torch.Tensor,
    k_BMGD: torch.Tensor,
    v_BMGE: torch.Tensor,
    *,
    scale: float,
    causal: bool = True,
    mask: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> torch.Tensor:
    """softmax(scale · q kᵀ) v per head; head h reads KV head h // (H/G).

    q_BTHD     (B, T, H, D), H a multiple of G
    k_BMGD     (B, M, G, D)
    v_BMGE     (B, M, G, E)
    causal     token t attends to tokens 0..t; needs T == M
    mask       bool (B, 1, T, M), True = may attend; a row without any True gives zeros. Needs causal=False
    documents  `offsets` of packed documents: token t attends to those tokens 0..t that are of its document. Needs
               causal=True
    dropout    probability with which an attention weight is dropped; 0 outside training
    backend    "auto", "cudnn", "flash", "efficient" (torch's SDPA by that implementation), "sdpa" (by the one that
               torch takes), "varlen" (documents as sequences of their own lengths), "plain"
    returns    (B, T, H, E) in q's dtype

    Inputs may be any views. Raises ValueError for shapes, dtypes or options that do not fit together, for a backend
    that is unknown or cannot run and, on a CPU, for offsets that `offsets` would not give.
    """
    check_shapes("attention", q_BTHD, k_BMGD, v_BMGE)
    B, T = q_BTHD.shape[:2]
    M = k_BMGD.shape[1]
    check_floats("attention", {"q": q_BTHD, "k": k_BMGD, "v": v_BMGE})
    if not 0 <= dropout <= 1:
        raise ValueError(f"attention: dropout must be 0 to 1, got {dropout}")
    if mask is not None and causal:
        raise ValueError("attention: mask and causal=True exclude each other; put the causal part into mask")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (B, 1, T, M)):
        raise ValueError(f"attention: mask must be bool {(B, 1, T, M)}, is {mask.dtype} {tuple(mask.shape)}")
    if causal and T != M:
        raise ValueError(f"attention: causal=True needs as many queries as keys, got T={T} and M={M}")
    if documents is not None and not causal:
        raise ValueError("attention: documents need causal=True")
    if documents is not None:
        varlen.check_offsets(documents, B, T)

    cannot = _cannot(q_BTHD, k_BMGD, v_BMGE, mask, documents, dropout)
    run = choose("attention", backend, _fastest_first(q_BTHD, k_BMGD, v_BMGE), cannot)
    if run is _VARLEN:
        assert documents is not None
        return varlen.attention(q_BTHD, k_BMGD, v_BMGE, scale, documents)
    if documents is not None:
        mask, causal = varlen.mask(documents, B, T), False
    return run(q_BTHD, k_BMGD, v_BMGE, scale, causal, mask, dropout)


def check_shapes(op_name: str, q_BTHD: torch.Tensor, k_BMGD: torch.Tensor, v_BMGE: torch.Tensor) -> None:
    """Raises ValueError where these are no queries, keys and values of heads that share them in groups."""
    if q_BTHD.dim() == k_BMGD.dim() == v_BMGE.dim() == 4:
        B, _, H, D = q_BTHD.shape
        M, G = k_BMGD.shape[1:3]
        if k_BMGD.shape == (B, M, G, D) and v_BMGE.shape[:3] == (B, M, G) and H > 0 < G and H % G == 0:
            return
    raise ValueError(
        f"{op_name}: q {tuple(q_BTHD.shape)}, k {tuple(k_BMGD.shape)}, v {tuple(v_BMGE.shape)} must be"
        " (B, T, H, D), (B, M, G, D), (B, M, G, E) with H a multiple of G"
    )


def takes_documents(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether documents run without a mask here, so that it is better not to make one."""
    return device.type == "cuda" and dtype in HALF and _flash_runs()


def _VARLEN(*arguments: object) -> torch.Tensor:
    raise AssertionError("it needs other arguments than the rest")


def _fastest_first(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> dict[str, Callable[..., torch.Tensor]]:
    """The backends in the order of their measured speed.

    cuDNN plans anew for each new shape, which takes longer than the call: it is for training, whose shapes stay.
    """
    cudnn = {"cudnn": partial(sdpa.attention, implementation="cudnn")}
    others = {
        "sdpa": sdpa.attention,
        "plain": plain.attention,
        "flash": partial(sdpa.attention, implementation="flash"),
        "efficient": partial(sdpa.attention, implementation="efficient"),
    }
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    ahead = q.shape[1] >= CUDNN_PAYS_FROM_TOKENS or q.shape[2] >= CUDNN_PAYS_FROM_HEADS
    first = trains and ahead and not torch.are_deterministic_algorithms_enabled()
    return {"varlen": _VARLEN, **(cudnn | others if first else others | cudnn)}


def _cannot(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    documents: torch.Tensor | None,
    dropout: float,
) -> dict[str, str]:
    """Backend -> why not, in a sentence."""
    D, E = q.shape[-1], v.shape[-1]
    half = q.dtype in HALF and k.dtype == q.dtype and v.dtype == q.dtype
    why: dict[str, str] = {}
    if documents is None:
        why["varlen"] = "it is for packed documents"
    elif dropout:
        why["varlen"] = "it has no dropout"
    elif not q.is_cuda or not half or not _flash_runs():
        why["varlen"] = "it needs half precision on an NVIDIA GPU of compute capability 8 or later"
    elif D > 256 or E > D or D % 8:
        why["varlen"] = "it takes heads of at most 256 features, a multiple of 8, and values no wider"

    if not q.is_cuda or not half or not _cudnn_runs():
        why["cudnn"] = "it needs half precision and cuDNN on an NVIDIA GPU of compute capability 9 or later"
    elif mask is not None or documents is not None:
        why["cudnn"] = "it takes no mask here"
    elif D % 8 or E % 8 or max(D, E) > 128:
        why["cudnn"] = "it takes heads of at most 128 features, a multiple of 8"
    for name in ("sdpa", "efficient"):
        if not one_dtype(q, k, v):
            why[name] = "queries, keys and values must be of one dtype"
    for name in ("flash", "efficient"):
        if not q.is_cuda:
            why[name] = "it names an implementation of torch on NVIDIA GPUs"
    if "flash" not in why and (mask is not None or documents is not None or not half or D != E):
        why["flash"] = "it takes half precision, no mask, and values as wide as keys"
    if "efficient" not in why and q.shape[2] != k.shape[2]:
        why["efficient"] = "it shares no heads"
    return why


@torch.compiler.assume_constant_result
def _flash_runs() -> bool:
    return varlen.varlen_attn is not None and torch.cuda.get_device_capability()[0] >= 8


@torch.compiler.assume_constant_result
def _cudnn_runs() -> bool:
    return torch.backends.cudnn.is_available() and torch.cuda.get_device_capability()[0] >= 9


__all__ = ["OPERATORS", "attention", "offsets", "takes_documents"]
