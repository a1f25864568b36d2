"""The whole model as a value: what it is, and in closed form what it costs. Builds no module."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import isfinite, log
from typing import Any, Literal

from t6_lightning.common.classes import import_path
from t6_lightning.common.errors import BadInput, require
from t6_lightning.model.attention import AttentionConfig, attention_config
from t6_lightning.model.attention.mha import MHAConfig
from t6_lightning.model.attention.tpa import TPAConfig

BACKENDS = ("auto", "triton", "sdpa", "plain")
FREE = ("attention_backend", "attention_saves")
"""Fields that say how a model is computed, and not what it is."""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@dataclass(frozen=True)
class T6Config:
    """A decoder-only transformer with one kind of attention.

    Attributes:
        vocab_size: rows of the embedding, which is also the output matrix (tied).
        d_model: width of the residual stream.
        n_layers: blocks of attention and SwiGLU.
        context: tokens per training window; what "full context" means in reports.
        attention: the attention variant, a value of its own config class.
        ffn_hidden: SwiGLU's hidden size; None is the reference's floor(8/3 · d_model).
        output_init: how W_O and the FFN's last matrix start: "zero" as the reference, "scaled" as GPT-2.
        dropout: probability, on the embedding and on what each layer adds to the residual stream.
        rope_base: base of RoPE's frequencies.
        attention_backend: what computes attention, in training and decoding: "auto", the fastest that runs this model
            on this device; "triton", this project's kernels for TPA's factors (with torch's attention over full K
            and V); "sdpa", torch's own operators alone; "plain", written out. No part of what a checkpoint fixes.
        attention_saves: what TPA keeps for the backward pass: "qkv", or "factors", from which Q, K and V are computed
            again. No part of what a checkpoint fixes.
    """

    vocab_size: int = 8192
    d_model: int = 256
    n_layers: int = 6
    context: int = 512
    attention: AttentionConfig = field(default_factory=TPAConfig)
    ffn_hidden: int | None = None
    output_init: Literal["zero", "scaled"] = "zero"
    dropout: float = 0.0
    rope_base: float = 10000.0
    attention_backend: Literal["auto", "triton", "sdpa", "plain"] = "auto"
    attention_saves: Literal["qkv", "factors"] = "qkv"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "context"):
            value = getattr(self, name)
            require(_is_count(value), name, value, "it must be an integer >= 1")
        hidden = self.ffn_hidden
        require(
            hidden is None or _is_count(hidden), "ffn_hidden", hidden, "it must be an integer >= 1 or null"
        )
        require(
            self.output_init in ("zero", "scaled"),
            "output_init",
            self.output_init,
            "choose one of zero, scaled",
        )
        for name, allowed in (("attention_backend", BACKENDS), ("attention_saves", ("qkv", "factors"))):
            value = getattr(self, name)
            require(value in allowed, name, value, f"choose one of {', '.join(allowed)}")
        self.attention.check_fields()
        if self.attention_backend == "triton":
            why_not = self.attention.why_not_triton()
            require(why_not is None, "attention_backend", "triton", why_not or "")
        if self.attention_saves == "factors":
            self._check_factors()
        require(0 <= self.dropout < 1, "dropout", self.dropout, "it must be at least 0 and below 1")
        base = self.rope_base
        require(base > 1 and isfinite(base), "rope_base", base, "it must be above 1 and finite")
        decay = self.attention.rope.decay or 1
        require(
            -self.context * log(decay) < log(1e30),
            "rope.decay",
            decay,
            f"over context={self.context} keys would grow by {decay}^-{self.context}, beyond float32's range",
        )

    def _check_factors(self) -> None:
        has_factors = isinstance(self.attention, TPAConfig)
        require(
            has_factors, "attention_saves", "factors", f"{self.attention.mechanism} has none: it is for TPA"
        )

    @property
    def ffn_width(self) -> int:
        """Hidden size of SwiGLU."""
        return self.ffn_hidden or 8 * self.d_model // 3

    def n_parameters(self) -> int:
        """All parameters; the tied embedding counts once, norms have none."""
        ffn = 3 * self.d_model * self.ffn_width
        layer = self.attention.n_parameters(self.d_model) + ffn
        return self.vocab_size * self.d_model + self.n_layers * layer

    def cache_bytes_per_token(self, bytes_per_element: int) -> int:
        """Key/value cache of one token in all layers."""
        return self.n_layers * self.attention.cache_elements() * bytes_per_element

    def cache_ratio_to_mha(self) -> float:
        """Cache against MHA of the same width and dtype: h = d_model / head_dim, so 2 · d_model elements."""
        return self.attention.cache_elements() / (2 * self.d_model)

    def forward_flops(self, keys: float) -> float:
        """Forward FLOPs of one token that attends to `keys` tokens, 2 per multiply-add."""
        return self._around(self.attention.flops(self.d_model, keys))

    def decode_flops(self, keys: float) -> float:
        """FLOPs of generating one token with `keys` cached tokens, itself included."""
        return self._around(self.attention.decode_flops(self.d_model, keys))

    def appendix_a_flops(self, keys: float) -> float | None:
        """As `decode_flops`, with attention counted as appendix A of the paper counts it, or None where it does not."""
        attention = self.attention.appendix_a_flops(self.d_model, keys)
        return None if attention is None else self._around(attention)

    def _around(self, attention: float) -> float:
        """FLOPs of a token, of which a layer's attention takes `attention`."""
        layer = attention + 2 * 3 * self.d_model * self.ffn_width
        return self.n_layers * layer + 2 * self.d_model * self.vocab_size

    def training_flops(self, context: int | None = None) -> float:
        """*Model* FLOPs of one training token (forward and twice that backward), causal half only: used for MFU."""
        return 3 * self.forward_flops(((context or self.context) + 1) / 2)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, in the form of the YAML presets; `from_dict` reads it back.

        The attention's class goes by its import path, so that one of any module is found again.
        """
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        init_args = dataclasses.asdict(self.attention)  # pyright: ignore[reportArgumentType]
        plain["attention"] = {"class_path": import_path(type(self.attention)), "init_args": init_args}
        return plain

    def architecture(self) -> dict[str, Any]:
        """`to_dict` without what a checkpoint does not fix."""
        return {name: value for name, value in self.to_dict().items() if name not in FREE}

    def differences(self, saved: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Fields whose value in a checkpoint's architecture is another: dotted name -> (value there, value here).

        What an earlier version saved is read first: a class by its short name equals the same class by its import
        path, and a field that did not exist then has its default.

        Raises:
            BadInput: `saved` is no architecture, or its attention's class cannot be imported.
        """
        there = dict(_leaves(T6Config.from_dict(saved).architecture()))
        here = dict(_leaves(self.architecture()))
        names = sorted(there | here)
        return {
            name: (there.get(name), here.get(name)) for name in names if there.get(name) != here.get(name)
        }

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> T6Config:
        """The config that `to_dict` or a preset's `model.net` states.

        The attention's class is a family's name, or an import path: its module is then imported, which runs its code.
        See `t6_lightning.common.classes.import_class` for where it is looked for.

        Raises:
            BadInput: an unknown field or attention family, a class that cannot be imported, or an impossible value.
        """
        _require_mapping("net", plain, "the fields of a model")
        plain = dict(plain)
        chosen: Any = plain.pop("attention", None)
        if chosen is not None:
            # A class by its name alone is what the command line takes too.
            chosen = {"class_path": chosen} if isinstance(chosen, str) else chosen
            _require_mapping("attention", chosen, "a class_path with its init_args")
            beside = sorted(set(chosen) - {"class_path", "init_args"})
            require(not beside, "attention", beside, "fields stand below init_args")
            family = attention_config(str(chosen.get("class_path", "")))
            plain["attention"] = _build(family, chosen.get("init_args") or {}, "attention.")
        return _build(cls, plain, "")


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _require_mapping(name: str, value: Any, allowed: str) -> None:
    require(isinstance(value, dict), name, value, f"it must be a mapping: {allowed}")


def _build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    """The dataclass `cls` of plain values; a field whose default is a dataclass takes a mapping."""
    _require_mapping(prefix.rstrip(".") or "net", values, f"the fields of {cls.__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    built = {}
    for name, value in values.items():
        if name not in fields:
            raise BadInput(
                f"{prefix}{name} is not a field of {cls.__name__}: choose from {', '.join(fields)}"
            )
        default = fields[name].default
        if dataclasses.is_dataclass(default):
            value = _build(type(default), value, f"{prefix}{name}.")
        for kind in (bool, int, float, str):
            if type(default) is kind:
                fits = isinstance(value, (int, float) if kind is float else kind)
                fits &= kind is bool or not isinstance(value, bool)
                require(fits, f"{prefix}{name}", value, f"it must be of type {kind.__name__}")
        built[name] = value
    try:
        return cls(**built)
    except TypeError as error:  # fields that may be null have no type to check above
        raise BadInput(f"{cls.__name__} holds a value of an impossible type: {error}") from error


def mha_of_same_width(config: T6Config) -> T6Config:
    """The MHA model that a variant's cache is compared with: the same but for h = d_model / head_dim."""
    head_dim = config.attention.head_dim
    return dataclasses.replace(config, attention=MHAConfig(max(1, config.d_model // head_dim), head_dim))
