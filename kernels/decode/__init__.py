"""TPA attention over a cache of factors (section 5).

Shapes: B batch, T query tokens, M cached tokens, H heads, D head dimension, E value dimension,
S rank of K, U rank of V; with pages: P pages of the whole cache, N tokens of a page; with further factors: C and Y
features of those of K and V.
"""

from collections.abc import Callable

import torch

from kernels.decode import plain, sdpa
from kernels.decode.rows import Rows
from kernels.dispatch import check_floats, choose, one_dtype, values_are_at_hand, why_no_derivative
from kernels.place import lies_side_by_side, why_no_triton_at
from kernels.rope import Tables, check_pairing, check_tables

# The Triton kernel: more query tokens are prefill, wider heads leave no room for a tile on the chip.
MOST_QUERIES = 16
WIDEST_HEAD = 256
# In half precision, for MLA's latent and turned key, and its latent.
WIDEST_KEY, WIDEST_VALUE = 576, 512
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# The factors of new tokens, in the order a_k, b_k, a_v, b_v and, where there are further ones, c_k, c_v.
New = tuple[torch.Tensor | None, ...]


def decode(
    q_BTHD: torch.Tensor,
    a_k_BMSH: torch.Tensor,
    b_k_BMSD: torch.Tensor,
    a_v_BMUH: torch.Tensor,
    b_v_BMUE: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    pages: torch.Tensor | None = None,
    new: New | None = None,
    c_k: torch.Tensor | None = None,
    c_v: torch.Tensor | None = None,
    turn: Tables | None = None,
    pairing: str = "halves",
    backend: str = "auto",
) -> torch.Tensor:
    """softmax(scale · q Kᵀ) V with K = (1/S) Σ_s a_s ⊗ b_s and V = (1/U) Σ_u a_u ⊗ b_u (algorithms 1-3).

    q_BTHD    (B, T, H, D) queries, already rotated
    a_k_BMSH  (B, M, S, H) cached head factors of K
    b_k_BMSD  (B, M, S, D) cached feature factors of K, already rotated unless `turn` is given
    a_v_BMUH  (B, M, U, H) cached head factors of V
    b_v_BMUE  (B, M, U, E) cached feature factors of V
    mask      bool (B, 1, T, M), True = may attend; a row without any True gives zeros
    lengths   int32 or int64 (B,), 0 to M: cached tokens of each row with the T of the queries, which are its last
              ones: query t sees the tokens before lengths - (T - 1 - t). What a factor holds past that must be
              finite. Not together with `mask`; with neither, all of the cache is visible to every query
    pages     int32 or int64 (B, n): the factors are (P, N, ...) and row b holds pages[b, 0], pages[b, 1], ..., so that
              M = n N. An index beyond what `lengths` uses must still be a page, 0 to P - 1
    new       the factors (B, T, rank, width) of the queries' own tokens, in the order of the factors, None for one that
              is no cache: written into the factors first, as the last T tokens of each row; of a row of fewer
              tokens, the last of them. "triton" does both in one launch and takes those of the factors' dtype; others
              convert any floats to it. No gradient flows through them
    c_k, c_v  (B, M, S, C) and (B, M, U, Y), both or neither: further factors of K and V (order 3, appendix C). b_k is
              then (B, M, S, D/C) and what K is made of is vec(b ⊗ c), with b_i c_j at j · D/C + i; likewise V
    turn      cos and sin, (M, W/2) or (B, M, W/2), by which `kernels.rope.rotate` turns b_k as it is read: for one
              that V has too, or that is a parameter
    pairing   which features they pair: "halves" or "interleaved"
    backend   "auto", "triton", "sdpa" or "plain"
    returns   (B, T, H, E) in q's dtype

    A factor may be any view whose last dimension is contiguous: a non-contextual one is expanded over tokens. Up to 16
    bytes behind its heads may be read where its strides leave that room: what lies there must be finite too.
    "triton" reads the cache once, makes what `c_k`, `c_v` and `turn` say on the chip, needs no memory of the cache's
    size, and is compiled once for all batches and lengths; `lengths` stay on the device, so that a CUDA graph holds
    while they grow. Fastest where each rank's head factors start at multiples of 16 bytes (`kernels.decode.layout`).

    Raises ValueError for shapes and dtypes that do not fit together, for a pairing or backend that is unknown or cannot
    run and, on a CPU, for lengths and pages that are not there. On a GPU nothing waits to look at those: lengths count
    as 0 to M, and an index that is no page reads what is none.
    """
    given = {
        "q": q_BTHD,
        "a_k": a_k_BMSH,
        "b_k": b_k_BMSD,
        "a_v": a_v_BMUH,
        "b_v": b_v_BMUE,
        "c_k": c_k,
        "c_v": c_v,
    }
    parts = {name: x for name, x in given.items() if x is not None}
    if any(x.dim() != 4 for x in parts.values()):
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in parts.items())
        raise ValueError(f"decode: queries and factors must have 4 dimensions, are {shapes}")
    check_floats("decode", parts)
    B, T, H, D = q_BTHD.shape
    rows, S = b_k_BMSD.shape[:2], b_k_BMSD.shape[2]
    U = b_v_BMUE.shape[2]
    made = Rows(c_k, c_v, *(turn or (None, None)), pairing)
    C, Y = (1 if c is None else c.shape[-1] for c in (c_k, c_v))
    fits = (
        (pages is not None or rows[0] == B)
        and a_k_BMSH.shape == (*rows, S, H)
        and b_k_BMSD.shape[:3] == (*rows, S)
        and b_k_BMSD.shape[3] * C == D
        and a_v_BMUH.shape == (*rows, U, H)
        and b_v_BMUE.shape[:3] == (*rows, U)
        and (c_k is None or c_k.shape == (*rows, S, C))
        and (c_v is None or c_v.shape == (*rows, U, Y))
    )
    if not fits:
        with_c = "" if c_k is None and c_v is None else ", c_k, c_v"
        must_be = "(B, T, H, D), (B, M, S, H), (B, M, S, D), (B, M, U, H), (B, M, U, E)"
        if with_c:
            must_be = must_be.replace("S, D)", "S, D/C)") + ", (B, M, S, C), (B, M, U, Y)"
        raise ValueError(
            f"decode: q, a_k, b_k, a_v, b_v{with_c} are {[tuple(x.shape) for x in parts.values()]},"
            f" must be {must_be}"
        )
    sizes = {
        "heads": H,
        "rank of K": S,
        "rank of V": U,
        "features of K": D,
        "features of V": b_v_BMUE.shape[3] * Y,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"decode: {name} must be at least 1, got {size}")
    if (c_k is None) != (c_v is None):
        raise ValueError("decode: give both c_k and c_v, or neither")
    if pages is not None and (pages.dim() != 2 or pages.shape[0] != B or not _integers(pages)):
        raise ValueError(
            f"decode: pages must be int32 or int64 ({B}, n), are {pages.dtype} {tuple(pages.shape)}"
        )
    M = rows[1] if pages is None else rows[1] * pages.shape[1]
    check_pairing("decode", pairing)
    if turn is not None:
        check_tables("decode", *turn, (B, M, *b_k_BMSD.shape[2:]), pairing)
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (B, 1, T, M)):
        raise ValueError(f"decode: mask must be bool {(B, 1, T, M)}, is {mask.dtype} {tuple(mask.shape)}")
    if lengths is not None and mask is not None:
        raise ValueError("decode: lengths and mask both say what is visible: give one of them")
    check_lengths("decode", lengths, B, M)
    _check_range("decode: pages", pages, rows[0])

    factors = (a_k_BMSH, b_k_BMSD, a_v_BMUH, b_v_BMUE, *(c for c in (c_k, c_v) if c is not None))
    if new is not None:
        del parts["q"]
        _check_new(new, parts, B, T)
    cannot = {}
    why_not = why_not_triton(q_BTHD, factors, mask, pages, new)
    if why_not:
        cannot["triton"] = why_not
    if not one_dtype(q_BTHD, *factors):
        cannot["sdpa"] = "queries and factors must all be of one dtype"
    run = choose("decode", backend, _fastest_first(T, q_BTHD.device.type), cannot)
    if run is _triton:
        if not q_BTHD.numel():
            return q_BTHD.new_empty(B, T, H, sizes["features of V"])
        return _triton(q_BTHD, *factors[:4], scale, lengths, pages, made, new)
    if lengths is not None:
        lengths = lengths.clamp(0, M)
    if new is not None:
        _append(new, factors, lengths, pages)
    if pages is not None:
        factors = tuple(x[pages].flatten(1, 2) for x in factors)
    if lengths is not None:
        mask = visible(lengths, T, M)
    a_k_BMSH, b_k_BMSD, a_v_BMUH, b_v_BMUE, *further = factors
    if further:
        made = made._replace(c_k=further[0], c_v=further[1])
    return run(q_BTHD, a_k_BMSH, made.of_keys(b_k_BMSD), a_v_BMUH, made.of_values(b_v_BMUE), scale, mask)


def visible(lengths_B: torch.Tensor, T: int, M: int) -> torch.Tensor:
    """What `lengths` mean as a mask: bool (B, 1, T, M)."""
    past_B11T = lengths_B[:, None, None] - torch.arange(T - 1, -1, -1, device=lengths_B.device)
    return torch.arange(M, device=lengths_B.device) < past_B11T.unsqueeze(-1)


def check_lengths(op_name: str, lengths: torch.Tensor | None, B: int, M: int) -> None:
    """Raises ValueError for lengths that are no integers (B,) and, where they are at hand, not 0 to M."""
    if lengths is not None and (lengths.shape != (B,) or not _integers(lengths)):
        raise ValueError(
            f"{op_name}: lengths must be int32 or int64 {(B,)}, are {lengths.dtype} {tuple(lengths.shape)}"
        )
    _check_range(f"{op_name}: lengths", lengths, M + 1)


def _check_range(name: str, integers: torch.Tensor | None, end: int) -> None:
    """Raises ValueError where a value that is at hand is not one of 0 to `end` - 1."""
    if integers is None or not integers.numel() or not values_are_at_hand(integers):
        return
    low, high = int(integers.min()), int(integers.max())
    if low < 0 or high >= end:
        raise ValueError(f"{name} must be 0 to {end - 1} here, are {low} to {high}")


def _check_new(new: New, factors: dict[str, torch.Tensor], B: int, T: int) -> None:
    if len(new) != len(factors):
        raise ValueError(
            f"decode: new factors must be {len(factors)}, None for each that is no cache, are {len(new)}"
        )
    for part, (name, factor) in zip(new, factors.items(), strict=True):
        if part is None:
            continue
        if part.shape != (B, T, *factor.shape[2:]):
            raise ValueError(
                f"decode: new factors must be {(B, T, *factor.shape[2:])}, are {tuple(part.shape)}"
            )
        if not part.dtype.is_floating_point:
            check_floats("decode", {f"the new {name}": part})
        strides = factor.stride()
        if 0 in strides and any(
            n > 1 and stride == 0 for n, stride in zip(factor.shape, strides, strict=True)
        ):
            raise ValueError(
                f"decode: {name} is expanded, strides {strides}: one write would change many numbers; new"
                " must be None for it"
            )


def _append(
    new: New, factors: tuple[torch.Tensor, ...], lengths: torch.Tensor | None, pages: torch.Tensor | None
) -> None:
    """Write `new` (B, T, ...) into the factors as the last tokens of each row, those for which the row has room."""
    first = next((part for part in new if part is not None), None)
    M, N = factors[0].shape[1] * (1 if pages is None else pages.shape[1]), factors[0].shape[1]
    if first is None or not first.shape[:2].numel() or not M:
        return
    B, T = first.shape[:2]
    device = first.device
    if lengths is None:
        lengths = torch.full((B,), M, device=device)
    # Where there is no room, the last token of the longest row is written once more: no shape depends on a length, as a
    # CUDA graph needs. Where no row has any, what is there.
    nth_BT, rows_BT = (
        torch.arange(T, device=device).expand(B, T),
        torch.arange(B, device=device)[:, None].expand(B, T),
    )
    fits_BT = lengths[:, None] - T + nth_BT >= 0
    rows_BT, nth_BT = torch.where(fits_BT, rows_BT, lengths.argmax()), torch.where(fits_BT, nth_BT, T - 1)
    tokens_BT = (lengths[rows_BT] - T + nth_BT).clamp_min(0)
    some_fit = fits_BT.any()
    at_BT = rows_BT if pages is None else pages[rows_BT, tokens_BT // N]
    in_BT = tokens_BT % N if pages is not None else tokens_BT
    for part, factor in zip(new, factors, strict=True):
        if part is not None:
            written = part.detach()[rows_BT, nth_BT].to(factor.dtype)
            factor[at_BT, in_BT] = torch.where(some_fit, written, factor[at_BT, in_BT])


def _integers(x: torch.Tensor) -> bool:
    return x.dtype in (torch.int32, torch.int64)


def _triton(
    q, a_k, b_k, a_v, b_v, scale, lengths=None, pages=None, made: Rows | None = None, new: New | None = None
) -> torch.Tensor:
    made = made or Rows()
    if torch.compiler.is_compiling():
        cached = (a_k, b_k, a_v, b_v)
        if new is not None and None not in new and made.as_cached:
            return torch.ops.t6_lightning.tpa_append_and_decode(q, *cached, scale, lengths, pages, *new)
        if new is not None:
            further = (c for c in (made.c_k, made.c_v) if c is not None)
            _append(new, (*cached, *further), lengths, pages)
        return torch.ops.t6_lightning.tpa_decode(q, *cached, scale, lengths, pages, *made)
    # Imported here: the package is absent on most machines without a GPU.
    from kernels.decode import triton

    return triton.decode(q, a_k, b_k, a_v, b_v, scale, lengths, pages, new=new, rows=made)


# Operators for torch.compile, which cannot follow how the kernels are launched. Two, because the compiler must be
# told what is written.
_library = torch.library.Library("t6_lightning", "FRAGMENT")
_library.define(
    "tpa_decode(Tensor q, Tensor a_k, Tensor b_k, Tensor a_v, Tensor b_v, float scale, Tensor? lengths, Tensor? pages,"
    " Tensor? c_k=None, Tensor? c_v=None, Tensor? cos=None, Tensor? sin=None, str pairing='halves') -> Tensor"
)
_library.define(
    "tpa_append_and_decode(Tensor q, Tensor(a!) a_k, Tensor(b!) b_k, Tensor(c!) a_v, Tensor(d!) b_v, float scale,"
    " Tensor? lengths, Tensor? pages, Tensor new_a_k, Tensor new_b_k, Tensor new_a_v, Tensor new_b_v) -> Tensor"
)
_library.impl("tpa_decode", lambda *given: _triton(*given[:8], made=Rows(*given[8:])), "CUDA")
_library.impl("tpa_append_and_decode", lambda *given: _triton(*given[:8], new=given[8:]), "CUDA")


def _like_result(q, a_k, b_k, a_v, b_v, scale, lengths, pages, c_k=None, c_v=None, *_):
    return q.new_empty(*q.shape[:3], b_v.shape[-1] * (1 if c_v is None else c_v.shape[-1]))


torch.library.register_fake("t6_lightning::tpa_decode", _like_result, lib=_library)
torch.library.register_fake(
    "t6_lightning::tpa_append_and_decode", lambda *given: _like_result(*given[:8]), lib=_library
)


def why_not_triton(
    q_BTHD: torch.Tensor,
    factors: tuple[torch.Tensor, ...],
    mask: torch.Tensor | None = None,
    pages: torch.Tensor | None = None,
    new: New | None = None,
) -> str | None:
    """One sentence, or None where the Triton kernel runs."""
    _, T, _, D = q_BTHD.shape
    _, _, _, b_v, *further = factors
    E = b_v.shape[-1] * (further[1].shape[-1] if further else 1)
    why = why_no_triton_at(
        q_BTHD, only_hopper="it is made for the shared memory and launches of an H100 or later"
    )
    if why:
        return why
    if q_BTHD.device.type == "cpu" and torch.compiler.is_compiling():
        return "the compiler takes it on an NVIDIA GPU alone"
    if mask is not None:
        return "it takes lengths, not a mask"
    written = [] if new is None else [x for x in new if x is not None]
    if any(x.dtype != q_BTHD.dtype for x in (*factors, *written)) or q_BTHD.dtype not in TRITON_DTYPES:
        return "queries and factors must all be float16, all bfloat16 or all float32"
    if T > MOST_QUERIES:
        return f"it takes at most {MOST_QUERIES} query tokens"
    if max(D, E) > WIDEST_HEAD and q_BTHD.dtype == torch.float32:
        return f"it takes heads of at most {WIDEST_HEAD} features in float32"
    if D > WIDEST_KEY or E > WIDEST_VALUE:
        return f"it takes keys of at most {WIDEST_KEY} features and values of at most {WIDEST_VALUE}"
    if not all(lies_side_by_side(x) for x in factors):
        return "the last dimension of every factor must be contiguous"
    if pages is not None and factors[0].shape[1] % 64:
        return "the tokens of a page must be a multiple of 64"
    return why_no_derivative(q_BTHD, *factors, *written)


def _fastest_first(T: int, device: str) -> dict[str, Callable[..., torch.Tensor]]:
    """The backends in the order of their measured speed for T query tokens.

    The factor-space form repeats for every query what SDPA on contracted K and V does once. On a CPU that
    pays for one query: 1/8 of SDPA's time on 2 cores (34 heads, head_dim 64, rank 2, 4,096 cached tokens,
    float32), while from 4 queries (rank 2) or 2 (rank 6) on SDPA is as fast or faster. On a GPU its many small
    operators take 3 times as long as SDPA (H100, 47 heads, batch 16, 32,768 tokens, bfloat16), and the Triton
    kernel is far ahead of both. `python -m kernels.bench decode [--queries N] [--rank R]`.
    """
    if device == "cpu":
        # Triton's interpreter is for tests: by name only.
        backends = (
            {"plain": plain.decode, "sdpa": sdpa.decode}
            if T == 1
            else {"sdpa": sdpa.decode, "plain": plain.decode}
        )
        return {**backends, "triton": _triton}
    return {"triton": _triton, "sdpa": sdpa.decode, "plain": plain.decode}
