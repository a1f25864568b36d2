"""The factors of Tensor Product Attention: which variants exist, and in closed form what they cost."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, prod
from string import ascii_lowercase
from typing import Literal, NamedTuple

from kernels.contract import HIGHEST_RANK, WIDEST_HEAD
from kernels.decode.layout import padded_width
from t6_lightning.common.errors import require
from t6_lightning.model.attention.base import AttentionConfig
from t6_lightning.model.attention.head_factors import NAMES, second_moment
from t6_lightning.model.init import SCHEMES, FactorShape, entry_variance, xavier_paper
from t6_lightning.model.rope import Rope

MAX_ORDER = 8


class Factor(NamedTuple):
    """One factor of one token: (rank, size), a linear map of the token or a parameter."""

    rank: int
    size: int
    contextual: bool


@dataclass(frozen=True)
class Factorization(AttentionConfig):
    """All that a TPAConfig says, which its layer is built of; the fields are explained there."""

    n_heads: int = 8
    head_dim: int = 64
    rank_q: int = 6
    rank_k: int = 2
    rank_v: int = 2
    factorize_q: bool = True
    order: int = 2
    feature_dims: tuple[int, ...] | None = None
    shared_b: bool = False
    shared_c: bool = False
    noncontextual_a: str = ""
    noncontextual_b: str = ""
    noncontextual_c: str = ""
    rope: Rope = Rope()
    rope_at: Literal["factors", "product"] = "factors"
    nonlinearity: Literal["none", "sigmoid", "softmax_heads", "softmax_ranks", "relu2", "topk_heads"] = "none"
    nonlinear_on: str | None = None
    temperature: float = 1.0
    top_k: int | None = None
    init: Literal[
        "xavier_reference",
        "xavier_paper",
        "xavier_paper_per_rank",
        "normal",
        "orthogonal",
        "variance_preserving",
    ] = "xavier_reference"
    init_std: float = 0.02
    init_q: Literal["linear", "xavier"] = "linear"
    gain_a: float = 1.0
    gain_b: float = 1.0
    gain_c: float = 1.0
    output_norm: bool = False
    output_gate: Literal["none", "head", "element"] = "none"
    kv_shift: bool = False

    def __post_init__(self) -> None:
        if self.feature_dims is not None:
            listed = isinstance(self.feature_dims, (list, tuple))
            require(listed, "attention.feature_dims", self.feature_dims, "it must be a list of sizes or null")
            object.__setattr__(self, "feature_dims", tuple(self.feature_dims))
        self.check_integers(n_heads=1, head_dim=1, rank_q=1, rank_k=1, rank_v=1, order=2)
        self._check_order()
        self._check_choices()
        self._check_sharing()
        self.rope_width()

    def _check_order(self) -> None:
        require(self.order <= MAX_ORDER, "attention.order", self.order, f"it must be at most {MAX_ORDER}")
        dims = self.feature_dims
        if dims is None:
            require(
                self.order == 2,
                "attention.feature_dims",
                dims,
                f"order {self.order} needs {self.order - 1} sizes with product head_dim={self.head_dim}",
            )
            return
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in dims)
        require(
            whole and len(dims) == self.order - 1 and prod(dims) == self.head_dim,
            "attention.feature_dims",
            list(dims),
            f"order {self.order} needs {self.order - 1} sizes with product head_dim={self.head_dim}",
        )

    def _check_choices(self) -> None:
        self.check_choice("rope_at", ("factors", "product"))
        self.check_choice("nonlinearity", NAMES)
        self.check_choice("init", tuple(SCHEMES))
        self.check_choice("init_q", ("linear", "xavier"))
        self.check_choice("output_gate", ("none", "head", "element"))
        parts = "qkv" if self.factorize_q else "kv"
        for field in ("noncontextual_a", "noncontextual_b", "noncontextual_c", "nonlinear_on"):
            value = getattr(self, field)
            if field == "nonlinear_on" and value is None:
                continue
            fits = isinstance(value, str) and len(set(value)) == len(value) and set(value) <= set(parts)
            why = "" if self.factorize_q else ", as Q is not factorized"
            require(fits, f"attention.{field}", value, f"name some of the letters {parts} once{why}")
        require(
            self.nonlinear_on is None or (self.nonlinearity != "none" and self.nonlinear_on != ""),
            "attention.nonlinear_on",
            self.nonlinear_on,
            "it names what an attention.nonlinearity acts on",
        )
        if self.nonlinearity == "topk_heads":
            k = self.top_k
            require(
                isinstance(k, int) and not isinstance(k, bool) and 1 <= k <= self.n_heads,
                "attention.top_k",
                k,
                f"topk_heads needs 1 to n_heads={self.n_heads}",
            )
        else:
            require(
                self.top_k is None,
                "attention.top_k",
                self.top_k,
                "it needs attention.nonlinearity=topk_heads",
            )
        for field in ("temperature", "init_std", "gain_a", "gain_b", "gain_c"):
            value = getattr(self, field)
            fits = not isinstance(value, bool) and value > 0 and isfinite(value)
            require(fits, f"attention.{field}", value, "it must be above 0 and finite")
        require(
            self.temperature == 1 or self.nonlinearity != "none",
            "attention.temperature",
            self.temperature,
            "it needs an attention.nonlinearity",
        )

    def _check_sharing(self) -> None:
        fixed = self._noncontextual()
        require(
            self.order >= 3 or not fixed["c"],
            "attention.noncontextual_c",
            fixed["c"],
            "it needs order 3 or more",
        )
        letters = "ab" if self.order == 2 else "abc"
        constant = set.intersection(*(set(fixed[letter]) for letter in letters))
        require(
            not constant,
            f"attention.noncontextual_{letters[-1]}",
            fixed[letters[-1]],
            f"no factor of {''.join(sorted(constant))} would depend on the token",
        )
        if self.shared_b:
            same = ("k" in self.noncontextual_b) == ("v" in self.noncontextual_b)
            require(
                self.rank_k == self.rank_v and same,
                "attention.shared_b",
                True,
                "K and V need equal ranks, and both a contextual b or both not",
            )
        if self.shared_c:
            ranks = sorted(set(self.ranks.values()))
            require(
                self.order >= 3 and len(ranks) == 1,
                "attention.shared_c",
                True,
                f"it needs order 3 or more and equal ranks, not order {self.order} and ranks {ranks}",
            )
            require(
                set(fixed["c"]) in (set(), set(self.ranks)),
                "attention.noncontextual_c",
                fixed["c"],
                f"with shared_c name all of {''.join(self.ranks)} or none",
            )

    def acts_on(self, part: str) -> bool:
        """Whether the nonlinearity acts on q, k or v."""
        return self.nonlinear_on is None or part in self.nonlinear_on

    @property
    def ranks(self) -> dict[str, int]:
        """Ranks of what is factorized, by letter q, k, v."""
        ranks = {"q": self.rank_q, "k": self.rank_k, "v": self.rank_v}
        return ranks if self.factorize_q else {part: ranks[part] for part in "kv"}

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each factor by its letter: {"a": heads, "b": d_b, "c": d_c, ...}."""
        return dict(
            zip(ascii_lowercase, (self.n_heads, *(self.feature_dims or (self.head_dim,))), strict=False)
        )

    def factor_name(self, letter: str, part: str) -> str:
        """Name of factor `letter` of Q, K or V: shared ones have one name."""
        if letter == "b" and self.shared_b and part in "kv":
            return "b_kv"
        if letter > "b" and self.shared_c:
            return f"{letter}_{''.join(self.ranks)}"
        return f"{letter}_{part}"

    def _noncontextual(self) -> dict[str, str]:
        """Which of q, k, v have a parameter for each factor."""
        further = dict.fromkeys(ascii_lowercase[2:MAX_ORDER], self.noncontextual_c)
        return {"a": self.noncontextual_a, "b": self.noncontextual_b, **further}

    def factors(self) -> dict[str, Factor]:
        """Every factor once, by name."""
        fixed = self._noncontextual()
        return {
            self.factor_name(letter, part): Factor(rank, size, part not in fixed[letter])
            for part, rank in self.ranks.items()
            for letter, size in self.sizes.items()
        }

    @property
    def mechanism(self) -> str:
        parts = [super().mechanism]  # a derived class goes by its own name
        parts += [] if self.factorize_q else ["kvonly"]
        parts += ["noncontextual-a"] if self.noncontextual_a else []
        parts += ["noncontextual-b"] if self.noncontextual_b else []
        parts += ["noncontextual-c"] if self.noncontextual_c else []
        parts += [f"order{self.order}"] if self.order > 2 else []
        return "-".join(parts)

    def why_not_triton(self) -> str | None:
        if self.head_dim % 2 or self.head_dim > WIDEST_HEAD:
            return f"the kernels take heads of an even number of features up to {WIDEST_HEAD}, not {self.head_dim}"
        highest = max(self.ranks.values())
        return (
            None if highest <= HIGHEST_RANK else f"the kernels take ranks up to {HIGHEST_RANK}, not {highest}"
        )

    @property
    def caches_rotated_b(self) -> bool:
        """The cached b of K is rotated already: it is K's alone, depends on the token, and is what turns."""
        return self.rope_at == "factors" and not self.shared_b and "k" not in self.noncontextual_b

    @property
    def has_plain_factors(self) -> bool:
        """Q, K and V have two factors each, all of the token, none shared and none changed (section 3.1)."""
        return (
            self.order == 2
            and self.factorize_q
            and not self.shared_b
            and self.nonlinearity == "none"
            and all(f.contextual for f in self.factors().values())
        )

    @property
    def decodes_in_place(self) -> bool:
        """What decoding reads are the cached entries themselves (and parameters): what it makes of them stays on
        the chip."""
        product_of_few = self.order == 3 and self.rope_at == "factors"
        return (self.order == 2 or product_of_few) and not self.kv_shift

    @property
    def rotates_when_read(self) -> bool:
        return not self.caches_rotated_b

    def n_parameters(self, d_model: int) -> int:
        factors = sum((d_model if f.contextual else 1) * f.rank * f.size for f in self.factors().values())
        width = self.n_heads * self.head_dim
        plain = d_model * width * (1 if self.factorize_q else 2)
        gate = d_model * self.gate_width()
        return factors + plain + gate + self.output_norm * self.head_dim + self.kv_shift * 4 * self.n_heads

    def gate_width(self) -> int:
        return {"none": 0, "head": self.n_heads, "element": self.n_heads * self.head_dim}[self.output_gate]

    def cache_entries(self) -> dict[str, tuple[int, ...]]:
        factors = self.factors()
        names = (self.factor_name(letter, part) for part in "kv" for letter in self.sizes)
        return {name: (factors[name].rank, factors[name].size) for name in names if factors[name].contextual}

    def stored_entries(self, element_size: int) -> dict[str, tuple[int, ...]]:
        # Where each rank's head factors begin at a multiple of 16 bytes, decoding reads them with wide loads.
        entries = self.cache_entries()
        head_factors = [name for name in entries if name.startswith("a")]
        ranks = sum(entries[name][0] for name in head_factors)
        padded = padded_width(self.n_heads, ranks, self.cache_elements(), element_size)
        return entries | {name: (entries[name][0], padded) for name in head_factors}

    def _projection_flops(self, d_model: int) -> int:
        maps = sum(f.rank * f.size for f in self.factors().values() if f.contextual)
        width = self.n_heads * self.head_dim * (1 if self.factorize_q else 2)
        return 2 * d_model * (maps + width + self.gate_width())

    def flops(self, d_model: int, keys: float) -> float:
        width = self.n_heads * self.head_dim
        contraction = 2 * sum(self.ranks.values()) * width
        return self._projection_flops(d_model) + contraction + 2 * 2 * width * keys

    def decode_flops(self, d_model: int, keys: float) -> float:
        # Only Q is contracted; K and V stay factors: products with b for each head and rank, those of K weighted by
        # a. Over a single rank that is no sum, so no product that PyTorch counts.
        width = self.n_heads * self.head_dim
        query = 2 * self.ranks.get("q", 0) * width
        terms = 2 if self.kv_shift else 1  # the predecessor's factors count as further ranks
        rank_k, rank_v = terms * self.rank_k, terms * self.rank_v
        weighting = self.n_heads * rank_k if rank_k > 1 else 0
        per_key = 2 * (width * (rank_k + rank_v) + weighting)
        return self._projection_flops(d_model) + query + per_key * keys

    def appendix_a_flops(self, d_model: int, keys: float) -> float | None:
        # Q, K and V all stay factors: products of B_Q and B_K for each pair of ranks, weighted by a of both in each
        # head, and B_V for each head and rank (algorithm 2). A plain Q has a row for each head in place of B_Q.
        if self.order > 2:
            return None
        terms = 2 if self.kv_shift else 1
        rank_k, rank_v, h, d_h = terms * self.rank_k, terms * self.rank_v, self.n_heads, self.head_dim
        scores = self.rank_q * rank_k * (d_h + h) if self.factorize_q else h * rank_k * (d_h + 1)
        return self._projection_flops(d_model) + 2 * (scores + h * rank_v * d_h) * keys

    def rope_width(self) -> int:
        if self.rope_at == "factors":
            field = "attention.head_dim" if self.order == 2 else "attention.feature_dims"
            return self.rope.width(self.sizes["b"], field)
        return self.rope.width(self.head_dim)

    def factor_shape(self, letter: str, part: str, d_model: int) -> FactorShape:
        """What initialization schemes look at."""
        rank = self.ranks[part]
        target = 1.0
        if letter != "a" and self.init == "variance_preserving":
            moment = self._second_moment_of_a(part, 1.0)
            target = (rank / (3 * moment)) ** (1 / (self.order - 1))
        return FactorShape(letter, rank, self.sizes[letter], d_model, self.init_std, target)

    def plain_q_shape(self, d_model: int) -> FactorShape:
        """The matrix of a Q that is not factorized, as initialization schemes see it."""
        return FactorShape("q", 1, self.n_heads * self.head_dim, d_model)

    def gain(self, letter: str) -> float:
        """Factor on the initial spread of a factor."""
        return {"a": self.gain_a, "b": self.gain_b}.get(letter, self.gain_c)

    def initial_variances(self, d_model: int) -> dict[str, float]:
        variances = super().initial_variances(d_model)
        if not self.factorize_q and self.init_q == "xavier":
            variances["q"] = d_model * xavier_paper(self.plain_q_shape(d_model))[1]
        for part, rank in self.ranks.items():
            spread = {
                letter: self.gain(letter) ** 2
                * entry_variance(self.init, self.factor_shape(letter, part, d_model))
                for letter in self.sizes
            }
            head = self._second_moment_of_a(part, spread.pop("a") ** 0.5)
            variances[part] = head * prod(spread.values()) / rank
        return variances

    def _second_moment_of_a(self, part: str, std: float) -> float:
        chosen = self.nonlinearity if self.acts_on(part) else "none"
        temperature = self.temperature if chosen != "none" else 1.0
        return second_moment(chosen, std, self.ranks[part], self.n_heads, temperature, self.top_k)
