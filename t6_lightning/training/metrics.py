"""Language-model metrics with torchmetrics: exact sums over everything, across batches and ranks."""

from __future__ import annotations

from math import exp, log

import torch
from torchmetrics import Metric

from t6_lightning.model.t6 import IGNORE


class LanguageModelMetrics(Metric):
    """Loss, perplexity and bits per byte, over all text and in each domain.

    Bits per byte = Σ negative log-likelihood / ln 2 / Σ UTF-8 bytes: it does not depend on the tokenizer.

    Args:
        domains: names of the domains that rows point to.
    """

    full_state_update = False

    def __init__(self, domains: list[str]) -> None:
        super().__init__()
        self.domains = domains
        for name in ("nll", "tokens", "bytes"):
            self.add_state(name, torch.zeros(len(domains), dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        losses_BT: torch.Tensor,
        targets_BT: torch.Tensor,
        n_bytes_B: torch.Tensor,
        domain_B: torch.Tensor,
    ) -> None:
        """Add one batch: token losses in nats, targets (-100 is ignored), target bytes and domain of each row."""
        index = domain_B.clamp_min(0)
        for state, value in (
            (self.nll, losses_BT.double().sum(1)),
            (self.tokens, (targets_BT != IGNORE).sum(1).double()),
            (self.bytes, n_bytes_B.double()),
        ):
            assert isinstance(state, torch.Tensor)
            state.index_add_(0, index, value)

    def compute(self) -> dict[str, float]:
        """`loss` (nats per token), `perplexity`, `bits_per_byte` and, of several, `<domain>/bits_per_byte`."""
        rows = self.per_domain()
        figures = {name: rows["all"][name] for name in ("loss", "perplexity", "bits_per_byte")}
        if len(self.domains) > 1:
            figures |= {f"{name}/bits_per_byte": rows[name]["bits_per_byte"] for name in self.domains}
        return figures

    def per_domain(self) -> dict[str, dict[str, float]]:
        """Each domain's tokens, bytes, loss, perplexity and bits per byte, and those of "all"."""
        sums = [torch.as_tensor(state).tolist() for state in (self.nll, self.tokens, self.bytes)]
        rows = {name: summarize(*values) for name, *values in zip(self.domains, *sums, strict=True)}
        return rows | {"all": summarize(*(sum(values) for values in sums))}


def summarize(nll: float, tokens: float, n_bytes: float) -> dict[str, float]:
    """Loss, perplexity and bits per byte from sums of nats, tokens and UTF-8 bytes, which are kept too."""
    loss = nll / tokens if tokens else float("nan")
    return {
        "tokens": tokens,
        "bytes": n_bytes,
        "loss": loss,
        "perplexity": exp(loss) if loss < 700 else float("inf"),
        "bits_per_byte": nll / log(2) / n_bytes if n_bytes else float("nan"),
    }
