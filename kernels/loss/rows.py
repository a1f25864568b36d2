"""Cross-entropy of logits that may be overwritten, by what the device has.

Shapes: N tokens, V vocabulary.
"""

import torch

from kernels.place import TRITON_IS_INSTALLED


def cross_entropy_(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, ignore_index: int, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses (N,) in float32 or float64, and with `gradient` the gradient of their sum in the logits' dtype.

    The logits are lost.
    """
    if logits_NV.is_cuda and TRITON_IS_INSTALLED and logits_NV.dtype != torch.float64:
        from kernels.loss import triton

        return triton.cross_entropy_(logits_NV, targets_N, ignore_index, gradient), logits_NV
    wide_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    counts_N = targets_N != ignore_index
    index_N1 = targets_N.where(counts_N, 0).unsqueeze(1)
    log_sum_N = wide_NV.logsumexp(dim=1)
    losses_N = (log_sum_N - wide_NV.gather(1, index_N1).squeeze(1)).where(counts_N, 0)
    if not gradient:
        return losses_N, logits_NV
    d_logits_NV = wide_NV.sub_(log_sum_N.unsqueeze(1)).exp_()
    d_logits_NV.scatter_add_(1, index_N1, torch.full_like(index_N1, -1, dtype=wide_NV.dtype))
    d_logits_NV *= counts_N.unsqueeze(1)
    return losses_N, d_logits_NV.to(logits_NV.dtype)
