"""Queries, keys and values of one record of factors, as one operator.

Shapes: B batch, T tokens, N numbers of a token's record, R rank, H heads, D head dimension.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from kernels.contract import plain, tables_that_turn, why_not_triton
from kernels.dispatch import check_floats, choose, product_dtype
from kernels.operators import differentiate_once
from kernels.rope import Tables, check_pairing


class Part(NamedTuple):
    """Where the factors of Q, K or V stand in a record: `rank` x `heads` numbers at `a`, `rank` x `width` at `b`."""

    a: int
    b: int
    rank: int
    heads: int
    width: int


def contract_qkv(
    record_BTN: torch.Tensor,
    parts: Sequence[Part],
    queries: Tables | None,
    keys: Tables | None,
    *,
    pairing: str = "halves",
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`kernels.contract.contract` of Q, K and V, whose factors one matrix product has made.

    record_BTN     (B, T, N) all factors of a token; what belongs to no part is ignored, its gradient is 0
    parts          of Q, K and V; their stretches of the record do not overlap
    queries, keys  RoPE tables as cos and sin of `contract`; None: nothing is rotated. V never is
    pairing        which dimensions RoPE pairs: "halves" or "interleaved"
    backend        "auto", "triton" or "plain"
    returns        three (B, T, H, D), in autocast's dtype inside autocast

    "triton" is one operator, whose gradient is one record: the compiler neither takes factors apart for three
    operators nor puts three gradients together. As with `contract`, it can be taken once.

    Raises ValueError for parts that are not three or do not fit, and for a pairing or backend that is unknown or cannot
    run.
    """
    if record_BTN.dim() != 3:
        raise ValueError(f"contract_qkv: the record must be (B, T, N), is {tuple(record_BTN.shape)}")
    check_floats("contract_qkv", {"the record": record_BTN})
    if len(parts) != 3:
        raise ValueError(f"contract_qkv: {len(parts)} parts; allowed: 3, of Q, K and V")
    for part in parts:
        if min(part.rank, part.heads, part.width) < 1:
            raise ValueError(f"contract_qkv: {part}; allowed: rank, heads and width of at least 1")
    for name, tables in (("queries", queries), ("keys", keys)):
        if tables is not None and any(table is None for table in tables):
            raise ValueError(f"contract_qkv: give both cos and sin of {name}, or None")
    check_pairing("contract_qkv", pairing)
    stretches = sorted(
        stretch for p in parts for stretch in ((p.a, p.a + p.rank * p.heads), (p.b, p.b + p.rank * p.width))
    )
    ends = [0, *(end for _, end in stretches)]
    starts = [*(start for start, _ in stretches), record_BTN.shape[-1]]
    if any(end > start for end, start in zip(ends, starts, strict=True)):
        raise ValueError(
            f"contract_qkv: parts take {stretches} of a record of {record_BTN.shape[-1]} numbers;"
            " they must lie inside it and not overlap"
        )
    tables = (*(queries or ()), *(keys or ()))
    cannot = [why_not_triton(*factors(record_BTN, part), *tables) for part in parts]
    why_not = next((why for why in cannot if why), None)
    candidates = {"triton": _triton, "plain": _plain}
    if record_BTN.device.type == "cpu":  # Triton's interpreter is for tests: by name only
        candidates = {"plain": _plain, "triton": _triton}
    run = choose("contract_qkv", backend, candidates, {"triton": why_not} if why_not else None)
    return run(record_BTN, parts, queries, keys, pairing)


def factors(record_BTN: torch.Tensor, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
    """Views (B, T, R, H) and (B, T, R, D)."""
    a = record_BTN[..., part.a : part.a + part.rank * part.heads].unflatten(-1, (part.rank, part.heads))
    b = record_BTN[..., part.b : part.b + part.rank * part.width].unflatten(-1, (part.rank, part.width))
    return a, b


def _plain(
    record_BTN: torch.Tensor, parts: Sequence[Part], queries: Tables | None, keys: Tables | None, pairing: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = (factors(record_BTN, part) for part in parts)
    turn_q, turn_k = queries or (None, None), keys or (None, None)
    return (
        plain.contract(*q, *turn_q, pairing),
        plain.contract(*k, *turn_k, pairing),
        plain.contract(*v, None, None, pairing),
    )


def _triton(
    record_BTN: torch.Tensor, parts: Sequence[Part], queries: Tables | None, keys: Tables | None, pairing: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    record = record_BTN.to(product_dtype(record_BTN, record_BTN))
    tables: list[torch.Tensor | None] = []
    for part, turn in zip(parts, (queries, keys), strict=False):
        b_shape = (*record.shape[:2], part.rank, part.width)
        tables += tables_that_turn(*(turn or (None, None)), b_shape, pairing)
    numbers = [number for part in parts for number in part]
    return torch.ops.t6_lightning.contract_qkv(record, numbers, *tables, pairing)


# The operators, as in kernels/contract/__init__.py. To torch, parts are their numbers, one after the other.


def _parts(numbers: list[int]) -> list[Part]:
    width = len(Part._fields)
    return [Part(*numbers[i : i + width]) for i in range(0, len(numbers), width)]


def _run_forward(record, numbers, *rest):
    from kernels.contract import triton

    return triton.forward_qkv(record, _parts(numbers), *rest)


def _run_backward(d_q, d_k, d_v, record, numbers, *rest):
    from kernels.contract import triton

    return triton.backward_qkv(d_q, d_k, d_v, record, _parts(numbers), *rest)


def _save(ctx, inputs, output):
    record, ctx.numbers, *tables, ctx.pairing = inputs
    ctx.save_for_backward(record, *tables)


def _differentiate(ctx, d_q, d_k, d_v):
    record, *tables = ctx.saved_tensors
    d_record = torch.ops.t6_lightning.contract_qkv_backward(
        d_q, d_k, d_v, record, ctx.numbers, *tables, ctx.pairing
    )
    return d_record, None, None, None, None, None, None


_library = torch.library.Library("t6_lightning", "FRAGMENT")
_TABLES = "Tensor? q_cos, Tensor? q_sin, Tensor? k_cos, Tensor? k_sin, str pairing"
_library.define(f"contract_qkv(Tensor record, int[] parts, {_TABLES}) -> (Tensor, Tensor, Tensor)")
_library.define(
    f"contract_qkv_backward(Tensor d_q, Tensor d_k, Tensor d_v, Tensor record, int[] parts, {_TABLES}) -> Tensor"
)
for _device in ("CUDA", "CPU"):
    _library.impl("contract_qkv", _run_forward, _device)
    _library.impl("contract_qkv_backward", _run_backward, _device)

torch.library.register_fake(
    "t6_lightning::contract_qkv",
    lambda record, numbers, *_: tuple(
        record.new_empty(*record.shape[:2], part.heads, part.width) for part in _parts(numbers)
    ),
    lib=_library,
)
torch.library.register_fake(
    "t6_lightning::contract_qkv_backward",
    lambda d_q, d_k, d_v, record, *_: record.new_empty(record.shape),
    lib=_library,
)
differentiate_once(_library, "contract_qkv", _save, _differentiate)
