"""What every attention family declares (its costs), computes (queries, cached entries, keys) and is given.

Shape suffixes: B batch, T tokens, M keys (cached tokens and new ones), H heads, G key/value heads,
D head dimension, E value dimension, C d_model, W turned dimensions.
"""

from __future__ import annotations

import abc
import dataclasses
import inspect
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import nn

from kernels.attention import attention
from kernels.decode.grouped import decode_grouped
from kernels.linear.stacked import stacked_linear
from t6_lightning.common.errors import require
from t6_lightning.model.rope import Rope, Tables

if TYPE_CHECKING:
    from t6_lightning.model.cache import LayerCache


class AttentionConfig(abc.ABC):
    """One attention variant as a value: subclasses are frozen dataclasses, one file per family.

    A subclass has the fields `n_heads` and `head_dim` (and `rope`, where it can be
    chosen), states what it costs in closed form and builds its layer. Defining it in this folder is all it takes
    to make it selectable. The formulas are arithmetic: they build no module.
    """

    n_heads: int
    head_dim: int
    rope: Rope = Rope()

    @property
    def mechanism(self) -> str:
        """What reports call it: the class's name in small letters, without "Config"."""
        return type(self).__name__.removesuffix("Config").lower()

    @abc.abstractmethod
    def n_parameters(self, d_model: int) -> int:
        """Parameters of one layer (table 1 of the paper)."""

    @abc.abstractmethod
    def cache_entries(self) -> dict[str, tuple[int, ...]]:
        """What one layer caches for one token: name and shape of each tensor."""

    def stored_entries(self, element_size: int) -> dict[str, tuple[int, ...]]:
        """`cache_entries` as they lie in memory, for numbers of `element_size` bytes: the last size may be padded.

        The cache keeps zeros in the padding and hands out what `cache_entries` says.
        """
        return self.cache_entries()

    @abc.abstractmethod
    def flops(self, d_model: int, keys: float) -> float:
        """Forward FLOPs of one layer for one token that attends to `keys` tokens; 2 per multiply-add.

        Counts matrix products as PyTorch's counter does, in the form that training and prefill use.
        """

    @abc.abstractmethod
    def build(self, d_model: int) -> AttentionLayer[Any]:
        """The layer."""

    def decode_flops(self, d_model: int, keys: float) -> float:
        """As `flops`, for one new token against a cache, where it is in another form than training."""
        return self.flops(d_model, keys)

    def appendix_a_flops(self, d_model: int, keys: float) -> float | None:
        """As `decode_flops`, with scores and values counted as appendix A of the paper counts them, for its algorithm.

        2 h d_h multiply-adds per key for heads with keys and values of their own or shared, which is what
        `decode_flops` has too. None where the appendix has no count.
        """
        return self.decode_flops(d_model, keys)

    def cache_elements(self) -> int:
        """Numbers that one layer caches for one token."""
        return sum(prod(shape) for shape in self.cache_entries().values())

    def rope_width(self) -> int:
        """W, how many dimensions RoPE turns."""
        return self.rope.width(self.head_dim)

    @property
    def rotates_when_read(self) -> bool:
        """Whether cached keys are rotated each time they are read, so that `Layout.seen` needs their tables.

        True is right for every family; False spares decoding the tables where rotated keys are cached.
        """
        return True

    def softmax_scale(self) -> float:
        """What query-key products are multiplied by."""
        return self.head_dim**-0.5

    def initial_variances(self, d_model: int) -> dict[str, float]:
        """Variance of the entries of Q, K and V ("q", "k", "v") at initialization, for inputs of unit RMS.

        nn.Linear draws from U(±1/√fan_in), of variance 1/(3 fan_in): a sum of fan_in terms has variance 1/3.
        """
        return {"q": 1 / 3, "k": 1 / 3, "v": 1 / 3}

    def states_its_spread(self) -> bool:
        """Whether `initial_variances` can hold: a class outside this package with a layer of its own must say them."""
        for cls in type(self).__mro__:
            if "initial_variances" in vars(cls):
                return True
            if "build" in vars(cls) and not cls.__module__.startswith(f"{__package__}."):
                return False
        return False

    def why_not_triton(self) -> str | None:
        """Why `attention_backend: triton` cannot run this variant on any device, or None."""
        return f"{self.mechanism} has no factors, which is what the Triton kernels contract and decode"

    def check_integers(self, **lowest: int) -> None:
        """Refuse fields that are no integers or below their lowest value."""
        for field, least in lowest.items():
            value = getattr(self, field)
            fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
            require(fits, f"attention.{field}", value, f"it must be an integer >= {least}")

    def check_fields(self) -> None:
        """Refuse a class whose fields were never made, for want of @dataclass: they would be without effect."""
        fields = {field.name for field in dataclasses.fields(self)}  # pyright: ignore[reportArgumentType]
        for cls in type(self).__mro__:
            if not issubclass(cls, AttentionConfig) or cls is AttentionConfig:
                continue
            for name, kind in inspect.get_annotations(cls).items():
                taken = name in fields or "ClassVar" in str(kind)
                why = f"{cls.__name__}.{name} is no field: put @dataclass(frozen=True) above the class"
                require(taken, "attention", cls.__name__, why)

    def check_choice(self, field: str, allowed: tuple[str, ...]) -> None:
        """Refuse a value that is none of `allowed`."""
        value = getattr(self, field)
        require(value in allowed, f"attention.{field}", value, f"choose one of {', '.join(allowed)}")


@dataclass(frozen=True)
class Keys:
    """Where a run of keys stands.

    Attributes:
        tables: RoPE tables of keys, (M, W/2) or (B, M, W/2).
        starts: bool (M,) or (B, M), True where a token begins its document: nothing comes before it.
    """

    tables: Tables
    starts: torch.Tensor


@dataclass(frozen=True)
class Layout:
    """Where each token stands and what it may attend to; computed once per forward, shared by all layers.

    Attributes:
        queries: RoPE tables of the new tokens' queries, (T, W/2) or (B, T, W/2).
        keys: the new tokens as keys.
        seen: everything in the cache, the new tokens included; None unless it is read (`causal` is False). Its
            tables are empty (W = 0) for a family that does not rotate what it reads.
        mask: bool (B, 1, T, M), True where a token may attend; None means `causal` alone decides.
        lengths: integers (B,), cached tokens of each row with the new ones, which are its last: what `mask` says too,
            in the form that decoding kernels read. None where there is no mask, or it is one of documents.
        causal: the new tokens are all there is, and each sees itself and those before it, or as `mask` says.
        documents: where packed documents begin (`kernels.attention.offsets`): of those before it a token sees its own
            document's. The same as a `mask` of documents, which is None then.
        backend: `T6Config.attention_backend`.
        saves: `T6Config.attention_saves`.
    """

    queries: Tables
    keys: Keys
    seen: Keys | None = None
    mask: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    causal: bool = True
    documents: torch.Tensor | None = None
    backend: str = "auto"
    saves: str = "qkv"

    @property
    def contract_backend(self) -> str:
        """What `kernels.contract` is asked for."""
        return "plain" if self.backend == "sdpa" else self.backend

    @property
    def step_backend(self) -> str:
        """What the small steps around attention in decoding are asked for (`kernels.linear`, `kernels.factors`)."""
        return "plain" if self.contract_backend == "plain" else "auto"

    @property
    def attention_backend(self) -> str:
        """What `kernels.attention` is asked for: over full K and V torch's own is the fastest there is."""
        return "auto" if self.backend == "triton" else self.backend


Config = TypeVar("Config", bound=AttentionConfig)


class AttentionLayer(nn.Module, abc.ABC, Generic[Config]):
    """softmax(scale · Q Kᵀ) V per head, then the output matrix; a family says what Q, K and V are.

    In three parts, so that what is cached is what a family declares: `project` makes the query and the cached
    entries of new tokens, `expand` makes keys and values of entries, and `attend_cached` appends to a cache and
    reads all of it, by expanding it unless the family knows better.
    """

    output: nn.Linear

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config: Config = config

    @abc.abstractmethod
    def project(self, x_BTC: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The queries (B, T, H, D) and, by name, the entries (B, T, *shape) of `cache_entries`."""

    @abc.abstractmethod
    def expand(self, entries: dict[str, torch.Tensor], keys: Keys) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (B, M, G, D) and values (B, M, G, E) of entries (B, M, *shape) that stand at `keys`."""

    def attend_cached(
        self, q_BTHD: torch.Tensor, new: dict[str, torch.Tensor], cache: LayerCache, layout: Layout
    ) -> torch.Tensor:
        """Append the new tokens' entries (B, T, *shape), then the output per head (B, T, H, E) over all tokens."""
        assert layout.seen is not None
        k_BMGD, v_BMGE = self.expand(cache.append(new), layout.seen)
        return decode_grouped(
            q_BTHD,
            k_BMGD,
            v_BMGE,
            scale=self.config.softmax_scale(),
            mask=layout.mask,
            lengths=layout.lengths,
            backend=layout.attention_backend,
        )

    def finish(self, o_BTHE: torch.Tensor, x_BTC: torch.Tensor) -> torch.Tensor:
        """What happens to the heads' outputs before the output matrix: nothing, unless a family says so."""
        return o_BTHE

    def freeze(self) -> None:
        """Weights do not change until `thaw`: keep what is made of them alone, if anything is."""

    def thaw(self) -> None:
        """Drop what `freeze` keeps."""

    def heads(self, x_BTC: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Q (B, T, H, D), K (B, T, G, D) and V (B, T, G, E) as in training."""
        q_BTHD, entries = self.project(x_BTC, layout)
        return q_BTHD, *self.expand(entries, layout.keys)

    def attend(
        self, q_BTHD: torch.Tensor, k_BTGD: torch.Tensor, v_BTGE: torch.Tensor, layout: Layout
    ) -> torch.Tensor:
        """Output per head (B, T, H, E) where nothing came before these tokens: their own K and V are all there is."""
        return attention(
            q_BTHD,
            k_BTGD,
            v_BTGE,
            scale=self.config.softmax_scale(),
            causal=layout.causal,
            mask=layout.mask,
            documents=layout.documents,
            backend=layout.attention_backend,
        )

    def attend_new(self, x_BTC: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Output per head (B, T, H, E) in training, where nothing is cached."""
        return self.attend(*self.heads(x_BTC, layout), layout)

    def forward(self, x_BTC: torch.Tensor, layout: Layout, cache: LayerCache | None = None) -> torch.Tensor:
        """(B, T, C) to (B, T, C); the new tokens' entries are appended to `cache`."""
        return stacked_linear(self.before_output(x_BTC, layout, cache), [self.output.weight])

    def before_output(
        self, x_BTC: torch.Tensor, layout: Layout, cache: LayerCache | None = None
    ) -> torch.Tensor:
        """`forward` without the output matrix, (B, T, H E)."""
        if cache is None:
            o_BTHE = self.attend_new(x_BTC, layout)
        else:
            q_BTHD, entries = self.project(x_BTC, layout)
            if layout.seen is not None:
                o_BTHE = self.attend_cached(q_BTHD, entries, cache, layout)
            else:
                cache.append(entries)
                o_BTHE = self.attend(q_BTHD, *self.expand(entries, layout.keys), layout)
        return self.finish(o_BTHE, x_BTC).flatten(-2)
