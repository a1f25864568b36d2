"""TPA decoding in factor space: K and V of the cache are never formed (section 5, algorithms 1-3).

Shapes: B batch, T query tokens, M cached tokens (a chunk of them in the inner functions), H heads,
D head dimension, E value dimension, S rank of K, U rank of V.
"""

import torch

from kernels.dispatch import without_autocast

# Elements of the largest intermediate, (B, H, T, M of a chunk, rank): 32 MiB in float32.
CHUNK_ELEMENTS = 2**23
# Fewer cached tokens at a time than this and the loop, not the arithmetic, takes the time.
MIN_CHUNK_TOKENS = 64


def decode(
    q_BTHD: torch.Tensor,
    a_k_BMSH: torch.Tensor,
    b_k_BMSD: torch.Tensor,
    a_v_BMUH: torch.Tensor,
    b_v_BMUE: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """See `kernels.decode.decode`. Online softmax in float32, or float64 for float64 queries."""
    dtype = torch.promote_types(q_BTHD.dtype, torch.float32)
    B, T, H, _ = q_BTHD.shape
    (M, S), (U, E) = b_k_BMSD.shape[1:3], b_v_BMUE.shape[2:]
    chunk = max(MIN_CHUNK_TOKENS, CHUNK_ELEMENTS // max(1, B * H * T * max(S, U)))

    lowest = torch.finfo(dtype).min
    o_BHTE = q_BTHD.new_zeros(B, H, T, E, dtype=dtype)
    total_BHT = q_BTHD.new_zeros(B, H, T, dtype=dtype)
    highest_BHT = q_BTHD.new_full((B, H, T), lowest, dtype=dtype)
    with without_autocast(q_BTHD.device):
        q_BHTD = q_BTHD.to(dtype).transpose(1, 2) * (scale / S)
        for start in range(0, M, chunk):
            now = slice(start, start + chunk)
            logits_BHTM = _logits(q_BHTD, a_k_BMSH[:, now].to(dtype), b_k_BMSD[:, now].to(dtype))
            hidden = None if mask is None else ~mask[..., now]
            if hidden is not None:
                logits_BHTM = logits_BHTM.masked_fill(hidden, lowest)
            # Any shift gives the same softmax, so no gradient goes through the maximum.
            new_highest_BHT = torch.maximum(highest_BHT, logits_BHTM.detach().amax(-1))
            p_BHTM = (logits_BHTM - new_highest_BHT.unsqueeze(-1)).exp()
            if hidden is not None:
                # In a row that sees nothing yet, hidden logits equal the maximum and exp gives 1.
                p_BHTM = p_BHTM.masked_fill(hidden, 0)
            shrink_BHT = (highest_BHT - new_highest_BHT).exp()
            values_BHTE = _values(p_BHTM, a_v_BMUH[:, now].to(dtype), b_v_BMUE[:, now].to(dtype))
            o_BHTE = o_BHTE * shrink_BHT.unsqueeze(-1) + values_BHTE
            total_BHT = total_BHT * shrink_BHT + p_BHTM.sum(-1)
            highest_BHT = new_highest_BHT
        # The largest logit contributes exp(0): a total below 1 means that the row saw nothing (0/1 = 0).
        o_BHTE = o_BHTE / (U * total_BHT.clamp_min(1)).unsqueeze(-1)
    return o_BHTE.transpose(1, 2).to(q_BTHD.dtype)


def _logits(q_BHTD: torch.Tensor, a_k_BMSH: torch.Tensor, b_k_BMSD: torch.Tensor) -> torch.Tensor:
    """L[h, t, m] = Σ_s a_k[m, s, h] (q[h, t] · b_k[m, s]): the dots are against factors shared by heads."""
    dots_BHTMS = torch.einsum("bhtd,bmsd->bhtms", q_BHTD, b_k_BMSD)
    return torch.einsum("bhtms,bmsh->bhtm", dots_BHTMS, a_k_BMSH)


def _values(p_BHTM: torch.Tensor, a_v_BMUH: torch.Tensor, b_v_BMUE: torch.Tensor) -> torch.Tensor:
    """O[h, t] = Σ_m Σ_u p[h, t, m] a_v[m, u, h] b_v[m, u]."""
    weights_BHTMU = torch.einsum("bhtm,bmuh->bhtmu", p_BHTM, a_v_BMUH)
    return torch.einsum("bhtmu,bmue->bhte", weights_BHTMU, b_v_BMUE)
