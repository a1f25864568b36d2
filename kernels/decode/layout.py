"""One contiguous record per cached token, [A_K | B_K | A_V | B_V]: every factor of a token in the same lines of memory.

Shapes: B rows (or pages), M cached tokens of a row, H heads, D head dimension, E value dimension, S rank of K,
U rank of V.
"""

from typing import NamedTuple

import torch

# Of a record that may be padding, so that the head factors of every rank begin at an aligned address.
MOST_PADDING = 0.05


class Factors(NamedTuple):
    """What `kernels.decode.decode` takes after the queries, in its order: views of one tensor of records."""

    a_k_BMSH: torch.Tensor
    b_k_BMSD: torch.Tensor
    a_v_BMUH: torch.Tensor
    b_v_BMUE: torch.Tensor


def padded_heads(H: int, D: int, E: int, S: int, U: int, element_size: int) -> int:
    """Heads that a rank of A takes in a record: H rounded up to 16, 8 or 4 bytes.

    The widest of these that keeps padding within MOST_PADDING of the record: a kernel loads that many bytes at
    once. H itself where none does.
    """
    return padded_width(H, S + U, (S + U) * H + S * D + U * E, element_size)


def padded_width(width: int, n_rows: int, n_elements: int, element_size: int) -> int:
    """`width` rounded up as in `padded_heads`, where `n_rows` rows of a token's `n_elements` are padded."""
    for n_bytes in (16, 8, 4):
        unit = max(1, n_bytes // element_size)
        padded = -(-width // unit) * unit
        if n_rows * (padded - width) <= MOST_PADDING * n_elements:
            return padded
    return width


def record_width(H: int, D: int, E: int, S: int, U: int, element_size: int) -> int:
    """Elements of one record, a whole number of 16 bytes."""
    width = (S + U) * padded_heads(H, D, E, S, U, element_size) + S * D + U * E
    unit = max(1, 16 // element_size)
    return -(-width // unit) * unit


def views(records_BMW: torch.Tensor, H: int, D: int, E: int, S: int, U: int) -> Factors:
    """The factors as views of records (B, M, `record_width`); writing to them writes the records.

    Make records of zeros: what pads them is read, and must be finite.

    Raises ValueError where the last dimension is not `record_width`.
    """
    size = records_BMW.element_size()
    if records_BMW.shape[-1] != record_width(H, D, E, S, U, size):
        raise ValueError(
            f"records have {records_BMW.shape[-1]} elements, these sizes take {record_width(H, D, E, S, U, size)}"
        )
    padded = padded_heads(H, D, E, S, U, size)
    widths = [S * padded, S * D, U * padded, U * E]
    a_k, b_k, a_v, b_v = records_BMW[..., : sum(widths)].split(widths, dim=-1)
    return Factors(
        a_k.unflatten(-1, (S, padded))[..., :H],
        b_k.unflatten(-1, (S, D)),
        a_v.unflatten(-1, (U, padded))[..., :H],
        b_v.unflatten(-1, (U, E)),
    )
