"""The query from its factors and the rotated feature factors of the new key, one after the other."""

import torch

from kernels.contract.plain import contract
from kernels.rope import rotate


def query_and_key(
    a_q_BTRH: torch.Tensor,
    b_q_BTRD: torch.Tensor,
    b_k_BTSD: torch.Tensor,
    queries: tuple[torch.Tensor, torch.Tensor],
    keys: tuple[torch.Tensor, torch.Tensor],
    pairing: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.factors.query_and_key`."""
    return contract(a_q_BTRH, b_q_BTRD, *queries, pairing), rotate(b_k_BTSD, *keys, pairing)
