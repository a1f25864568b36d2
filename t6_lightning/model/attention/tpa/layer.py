"""The layer of Tensor Product Attention: factors of the token, what is cached of them, attention over them.

Shape suffixes: B batch, T tokens, M cached tokens, H heads, D head dimension, R rank, C d_model; an axis N is
a factor's own size: H for head factors (letter a), d_b, d_c, ... for feature factors (letters b, c, ...).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kernels.attention import OPERATORS
from kernels.contract import contract, outer
from kernels.contract.qkv import Part, contract_qkv
from kernels.decode import decode
from kernels.factors import query_and_key
from kernels.linear import linear
from kernels.linear.stacked import stack, stacked_linear
from kernels.rope import rotate
from t6_lightning.common.errors import BadInput
from t6_lightning.model.attention.base import AttentionLayer, Keys, Layout
from t6_lightning.model.attention.head_factors import nonlinearity
from t6_lightning.model.attention.tpa.factorization import Factorization
from t6_lightning.model.cache import LayerCache
from t6_lightning.model.init import init_factor_
from t6_lightning.model.norm import OUTPUT_NORM_EPS, RMSNorm
from t6_lightning.model.rope import Tables

ALIGNMENT = 16
"""Numbers. On a GPU each factor begins at a multiple of this in its projection: both the matrix products and the
kernels that read it move 16 bytes at a time."""
RECORD_ALIGNMENT = 64
"""Numbers. On a GPU a record is a multiple of this, 128 bytes in half precision: others torch.compile stores with gaps
between them, and copies for an operator that is not its own."""


def _keep_attention(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in OPERATORS else CheckpointPolicy.MUST_RECOMPUTE


def predecessors(x_BMRN: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """x of the token before, and zeros where a document `starts` ((M,) or (B, M))."""
    before = F.pad(x_BMRN[:, :-1], (0, 0, 0, 0, 1, 0))
    return before.masked_fill(starts[..., None, None], 0)


class TensorProductAttention(AttentionLayer[Factorization]):
    """Q_t = (1/R_Q) A_Q(x_t)ᵀ RoPE(B_Q(x_t)), likewise K; V without RoPE (eq. 3.1 to 3.3), and their variants.

    The cache holds the factors of K and V that depend on the token, never K and V (section 3.3).

    A derived class changes what is computed by `adapt_factors`, which training, prefill and decoding all call. Other
    methods are not all called by each of them: kernels contract and decode factors without `expand` or `pair`.
    """

    def __init__(self, config: Factorization, d_model: int) -> None:
        super().__init__(config)
        width = config.n_heads * config.head_dim
        self._frozen: torch.Tensor | None = None
        adapts = type(self).adapt_factors is not TensorProductAttention.adapt_factors
        self._contracts_records = config.has_plain_factors and not adapts
        self.contextual = {name: f for name, f in config.factors().items() if f.contextual}
        for part in config.ranks:
            for letter in config.sizes:
                name = config.factor_name(letter, part)
                if not hasattr(self, name):
                    self._add_factor(name, letter, part, d_model)
        if not config.factorize_q:
            self.q = nn.Linear(d_model, width, bias=False)
            if config.init_q == "xavier":
                init_factor_(self.q.weight, "xavier_paper", config.plain_q_shape(d_model))
        self.output = nn.Linear(width, d_model, bias=False)
        if config.output_norm:
            self.output_norm = RMSNorm(config.head_dim, eps=OUTPUT_NORM_EPS)
        if config.output_gate != "none":
            self.gate = nn.Linear(d_model, config.gate_width(), bias=False)
        if config.kv_shift:
            now, before = torch.ones(config.n_heads), torch.zeros(config.n_heads)
            self.shift = nn.ParameterDict(
                {
                    f"{part}_{when}": value.clone()
                    for part in "kv"
                    for when, value in (("now", now), ("before", before))
                }
            )

    def _add_factor(self, name: str, letter: str, part: str, d_model: int) -> None:
        shape = self.config.factor_shape(letter, part, d_model)
        if name in self.contextual:
            projection = nn.Linear(d_model, shape.rank * shape.size, bias=False)
            setattr(self, name, projection)
            weight = projection.weight
        else:
            weight = nn.Parameter(torch.empty(shape.rank, shape.size))
            setattr(self, name, weight)
        init_factor_(weight, self.config.init, shape, self.config.gain(letter))

    def adapt_factors(self, factors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """For derived classes: new factors in place of those of new tokens.

        Training contracts what this returns, and decoding caches it. The factors are all that depend on the token, by
        name (`a_q`, `b_k`, ...; `TPAConfig.factors`), of shape (B, T, R, N): after their nonlinearity, before RoPE.
        Names, shapes and dtypes must stay. What is returned for a token may depend on that token and on parameters
        alone.
        """
        return factors

    def contextual_factors(self, x_BTC: torch.Tensor) -> dict[str, torch.Tensor]:
        """The factors (B, T, R, N) that depend on the token."""
        return self._factors(self._record(x_BTC))

    def _record(self, x_BTC: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        """All of them side by side, from one matrix product: small ones are slower."""
        if torch.is_grad_enabled():
            return stacked_linear(x_BTC, *self._weights())
        return linear(
            x_BTC, self._merged_weights() if self._frozen is None else self._frozen, backend=backend
        )

    def _starts(self, on_gpu: bool) -> dict[str, int]:
        """Where each factor begins in a record."""
        return dict(zip(self.contextual, accumulate(self._widths(on_gpu), initial=0), strict=False))

    def _widths(self, on_gpu: bool) -> list[int]:
        """Numbers that each factor takes in a record."""
        unit = ALIGNMENT if on_gpu else 1
        widths = [-(-f.rank * f.size // unit) * unit for f in self.contextual.values()]
        widths[-1] += -sum(widths) % RECORD_ALIGNMENT if on_gpu else 0
        return widths

    def _factors(self, record_BTN: torch.Tensor) -> dict[str, torch.Tensor]:
        starts = self._starts(record_BTN.is_cuda)
        factors = {
            name: record_BTN[..., starts[name] : starts[name] + f.rank * f.size].unflatten(
                -1, (f.rank, f.size)
            )
            for name, f in self.contextual.items()
        }
        for part in self.config.ranks:
            if f"a_{part}" in factors:
                factors[f"a_{part}"] = self._nonlinear(factors[f"a_{part}"], part)
        adapted = self.adapt_factors(factors)
        if adapted.keys() != factors.keys():
            raise BadInput(
                f"{type(self).__name__}.adapt_factors must return the factors {', '.join(factors)},"
                f" not {', '.join(adapted)}"
            )
        return adapted

    def _weights(self) -> tuple[list[torch.Tensor], list[int]]:
        """The factors' projections, and the numbers that each makes of a record."""
        weights: list[torch.Tensor] = [self.get_submodule(name).weight for name in self.contextual]  # pyright: ignore
        return weights, self._widths(weights[0].is_cuda)

    def _merged_weights(self) -> torch.Tensor:
        return stack(*self._weights())

    def freeze(self) -> None:
        self._frozen = self._merged_weights()

    def thaw(self) -> None:
        self._frozen = None

    def _nonlinear(self, a: torch.Tensor, part: str) -> torch.Tensor:
        c = self.config
        if not c.acts_on(part):
            return a
        return nonlinearity(a, c.nonlinearity, c.temperature, c.top_k)

    def _each(self, part: str, factors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """The factors (B, M, R, N) of Q, K or V; those that are parameters expanded."""
        c = self.config
        like = next(iter(factors.values()))

        def get(letter: str) -> torch.Tensor:
            name = c.factor_name(letter, part)
            if name in factors:
                return factors[name]
            value: torch.Tensor = getattr(self, name)
            value = self._nonlinear(value, part) if letter == "a" else value
            return value.to(like.dtype).expand(*like.shape[:2], -1, -1)

        return [get(letter) for letter in c.sizes]

    def pair(
        self, part: str, factors: Mapping[str, torch.Tensor], turn: Tables | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Head factors (B, M, R, H) and feature rows (B, M, R, D) of Q, K or V, rotated by `turn`."""
        c = self.config
        a, b, *further = self._each(part, factors)
        if turn is not None and c.rope_at == "factors":
            b = rotate(b, *turn, c.rope.pairing)
        rows = outer((b, *further))
        if turn is not None and c.rope_at == "product":
            rows = rotate(rows, *turn, c.rope.pairing)
        return a, rows

    def project(self, x_BTC: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        c = self.config
        factors = self._factors(self._record(x_BTC, layout.step_backend))
        if layout.seen is not None and c.factorize_q and c.order == 2 and c.caches_rotated_b:
            q_BTHD, factors["b_k"] = query_and_key(
                *self.pair("q", factors, None),
                factors["b_k"],
                layout.queries,
                layout.keys.tables,
                pairing=c.rope.pairing,
                backend=layout.step_backend,
            )
            return q_BTHD, {name: factors[name] for name in c.cache_entries()}
        q_BTHD = (
            self._contract("q", factors, layout.queries, layout)
            if c.factorize_q
            else self._plain_q(x_BTC, layout)
        )
        if c.caches_rotated_b:
            factors["b_k"] = rotate(factors["b_k"], *layout.keys.tables, c.rope.pairing)
        return q_BTHD, {name: factors[name] for name in c.cache_entries()}

    def _plain_q(self, x_BTC: torch.Tensor, layout: Layout) -> torch.Tensor:
        c = self.config
        q_BTHD = self.q(x_BTC).unflatten(-1, (-1, c.head_dim))
        if c.rope_at == "factors" and c.order > 2:
            return self._rotate_first_factor(q_BTHD, layout.queries)
        return rotate(q_BTHD, *layout.queries, c.rope.pairing)

    def _contract(
        self, part: str, factors: Mapping[str, torch.Tensor], turn: Tables | None, layout: Layout
    ) -> torch.Tensor:
        """Q, K or V (B, M, H, D) of its factors, rotated by `turn`."""
        pairing, backend = self.config.rope.pairing, layout.contract_backend
        if self.config.order == 2 and turn is not None:
            # One feature factor is the whole head dimension: wherever RoPE acts, the contraction does it in passing.
            return contract(*self.pair(part, factors, None), *turn, pairing=pairing, backend=backend)
        return contract(*self.pair(part, factors, turn), backend=backend)

    def _rotate_first_factor(self, q_BTHD: torch.Tensor, tables: Tables) -> torch.Tensor:
        """T_t of theorem C.1 on a plain query: R_t on each run of d_b dimensions."""
        B, T, H, D = q_BTHD.shape
        d_b = self.config.sizes["b"]
        rotated = rotate(q_BTHD.reshape(B, T, H * D // d_b, d_b), *tables, self.config.rope.pairing)
        return rotated.view(B, T, H, D)

    def _keys(self, entries: Mapping[str, torch.Tensor], keys: Keys) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pair("k", entries, None if self.config.caches_rotated_b else keys.tables)

    def expand(self, entries: dict[str, torch.Tensor], keys: Keys) -> tuple[torch.Tensor, torch.Tensor]:
        k_BMHD = contract(*self._keys(entries, keys))
        v_BMHD = contract(*self.pair("v", entries, None))
        return self._shifted_heads(k_BMHD, v_BMHD, keys.starts)

    def _shifted_heads(
        self, k_BMHD: torch.Tensor, v_BMHD: torch.Tensor, starts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.config.kv_shift:
            k_BMHD, v_BMHD = (
                self.shift[f"{part}_now"].to(x.dtype)[:, None] * x
                + self.shift[f"{part}_before"].to(x.dtype)[:, None] * predecessors(x, starts)
                for part, x in (("k", k_BMHD), ("v", v_BMHD))
            )
        return k_BMHD, v_BMHD

    def heads(self, x_BTC: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self._heads(
            self._record(x_BTC, layout.step_backend), self._plain_q_or_none(x_BTC, layout), layout
        )

    def _plain_q_or_none(self, x_BTC: torch.Tensor, layout: Layout) -> torch.Tensor | None:
        return None if self.config.factorize_q else self._plain_q(x_BTC, layout)

    def _heads(
        self, record_BTN: torch.Tensor, plain_q_BTHD: torch.Tensor | None, layout: Layout
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self._contracts_records:
            starts, factors = self._starts(record_BTN.is_cuda), self.config.factors()
            parts = [
                Part(
                    starts[f"a_{part}"],
                    starts[f"b_{part}"],
                    rank,
                    factors[f"a_{part}"].size,
                    factors[f"b_{part}"].size,
                )
                for part, rank in self.config.ranks.items()
            ]
            q_BTHD, k_BTHD, v_BTHD = contract_qkv(
                record_BTN,
                parts,
                layout.queries,
                layout.keys.tables,
                pairing=self.config.rope.pairing,
                backend=layout.contract_backend,
            )
        else:
            factors = self._factors(record_BTN)
            q_BTHD = plain_q_BTHD
            if q_BTHD is None:
                q_BTHD = self._contract("q", factors, layout.queries, layout)
            k_BTHD = self._contract("k", factors, layout.keys.tables, layout)
            v_BTHD = self._contract("v", factors, None, layout)
        return q_BTHD, *self._shifted_heads(k_BTHD, v_BTHD, layout.keys.starts)

    def attend_new(self, x_BTC: torch.Tensor, layout: Layout) -> torch.Tensor:
        if layout.saves == "qkv" or not torch.is_grad_enabled():
            return super().attend_new(x_BTC, layout)

        def from_factors(record_BTN: torch.Tensor, plain_q_BTHD: torch.Tensor | None) -> torch.Tensor:
            return self.attend(*self._heads(record_BTN, plain_q_BTHD, layout), layout)

        # Of what happens in there, attention's result alone is kept for the backward pass, beside what goes in.
        contexts = partial(create_selective_checkpoint_contexts, _keep_attention)
        o_BTHE = checkpoint(
            from_factors,
            self._record(x_BTC, layout.step_backend),
            self._plain_q_or_none(x_BTC, layout),
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=contexts,
        )
        assert isinstance(o_BTHE, torch.Tensor)
        return o_BTHE

    def attend_cached(
        self, q_BTHD: torch.Tensor, new: dict[str, torch.Tensor], cache: LayerCache, layout: Layout
    ) -> torch.Tensor:
        c = self.config
        assert layout.seen is not None
        if c.decodes_in_place:
            return self._append_and_decode(q_BTHD, new, cache.read(), layout, layout.seen)
        entries = cache.append(new)
        keys, values = self._keys(entries, layout.seen), self.pair("v", entries, None)
        if c.kv_shift:
            keys = self._shifted("k", *keys, layout.seen.starts)
            values = self._shifted("v", *values, layout.seen.starts)
        return decode(
            q_BTHD, *keys, *values, scale=c.softmax_scale(), lengths=layout.lengths, backend=layout.backend
        )

    def _append_and_decode(
        self,
        q_BTHD: torch.Tensor,
        new: dict[str, torch.Tensor],
        entries: dict[str, torch.Tensor],
        layout: Layout,
        seen: Keys,
    ) -> torch.Tensor:
        """In one call, which reads the entries as they lie in the cache."""
        c = self.config
        a_k, b_k, *c_k = self._each("k", entries)
        a_v, b_v, *c_v = self._each("v", entries)
        names = [c.factor_name(letter, part) for part in "kv" for letter in "ab"]
        names += [c.factor_name("c", part) for part in "kv"] if c.order > 2 else []
        # A shared factor is written once.
        appended = [new.get(name) if name not in names[:i] else None for i, name in enumerate(names)]
        return decode(
            q_BTHD,
            a_k,
            b_k,
            a_v,
            b_v,
            scale=c.softmax_scale(),
            lengths=layout.lengths,
            new=tuple(appended),
            c_k=c_k[0] if c_k else None,
            c_v=c_v[0] if c_v else None,
            turn=None if c.caches_rotated_b else seen.tables,
            pairing=c.rope.pairing,
            backend=layout.backend,
        )

    def _shifted(
        self, part: str, a: torch.Tensor, rows: torch.Tensor, starts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The predecessors' factors as further ranks; the 2 undoes that decoding divides by twice the rank."""
        now, before = (2 * self.shift[f"{part}_{when}"].to(a.dtype) for when in ("now", "before"))
        a = torch.cat((now * a, before * predecessors(a, starts)), dim=2)
        return a, torch.cat((rows, predecessors(rows, starts)), dim=2)

    def finish(self, o_BTHE: torch.Tensor, x_BTC: torch.Tensor) -> torch.Tensor:
        c = self.config
        if c.output_norm:
            o_BTHE = self.output_norm(o_BTHE)
        if c.output_gate != "none":
            gate = self.gate(x_BTC).sigmoid()
            o_BTHE = o_BTHE * gate.unflatten(-1, (c.n_heads, -1))
        return o_BTHE
