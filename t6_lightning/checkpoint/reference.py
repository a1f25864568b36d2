"""State dicts of the paper's public code: what they were trained as, and how they become ours.

Source: Zhang et al., 2025 (arXiv 2501.06425) and its public code, github.com/tensorgi/TPA.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from t6_lightning.checkpoint.reference_files import EMBEDDING, TIED
from t6_lightning.common.errors import BadInput, require
from t6_lightning.model.attention import AttentionConfig
from t6_lightning.model.attention.mha import MHAConfig
from t6_lightning.model.attention.mla import MLAConfig
from t6_lightning.model.attention.tpa import TPAConfig
from t6_lightning.model.config import T6Config

State = Mapping[str, torch.Tensor]

OUTPUT_NORM = "attn.subln.weight"
FREQUENCIES = "inv_freq"
"""Last part of the name of RoPE's frequencies, which some versions of the code save: they are recomputed."""

# What tells the mechanisms apart, the telling one first.
SIGNS = {
    "attn.c_qkv.c_q.weight": "TPA-KVonly",
    "attn.c_qkv.W_A_q.weight": "TPA",
    "attn.kv_b_proj.weight": "MLA",
    "attn.c_k.weight": "MHA, GQA or MQA",
}


# --- names and layouts ---


class Weight(NamedTuple):
    """Where a matrix of the public code goes.

    Attributes:
        ours: its name in our block.
        shape: its shape in both.
        heads: its rows stand (heads, rank) there and (rank, heads) here; None where rows stand the same.
    """

    ours: str
    shape: tuple[int, ...]
    heads: int | None = None


def _tpa(c: TPAConfig, d_model: int) -> dict[str, Weight]:
    plain = {
        **{"order": 2, "shared_b": False, "noncontextual_a": "", "noncontextual_b": ""},
        **{"nonlinearity": "none", "output_gate": "none", "kv_shift": False},
    }
    for field, value in plain.items():
        require(
            getattr(c, field) == value,
            f"attention.{field}",
            getattr(c, field),
            f"the public code has {value!r} only",
        )
    names = {}
    for part, rank in c.ranks.items():
        a, b = (rank * c.n_heads, d_model), (rank * c.head_dim, d_model)
        names[f"attn.c_qkv.W_A_{part}.weight"] = Weight(f"attention.a_{part}.weight", a, c.n_heads)
        names[f"attn.c_qkv.W_B_{part}.weight"] = Weight(f"attention.b_{part}.weight", b)
    if not c.factorize_q:
        names["attn.c_qkv.c_q.weight"] = Weight("attention.q.weight", (c.n_heads * c.head_dim, d_model))
    return names


def _mha(c: MHAConfig, d_model: int) -> dict[str, Weight]:
    heads = {"q": c.n_heads, "k": c.groups, "v": c.groups}
    return {
        f"attn.c_{part}.weight": Weight(f"attention.{part}.weight", (n * c.head_dim, d_model))
        for part, n in heads.items()
    }


def _mla(c: MLAConfig, d_model: int) -> dict[str, Weight]:
    # Per head [still, turned] in q_b and [key, value] in kv_b, there as here.
    return {
        "attn.q_a_proj.weight": Weight("attention.q_down.weight", (c.q_rank, d_model)),
        "attn.q_a_layernorm.weight": Weight("attention.q_norm.weight", (c.q_rank,)),
        "attn.q_b_proj.weight": Weight(
            "attention.q_up.weight", (c.n_heads * (c.head_dim + c.rope_dim), c.q_rank)
        ),
        "attn.kv_a_proj_with_mqa.weight": Weight(
            "attention.kv_down.weight", (c.kv_rank + c.rope_dim, d_model)
        ),
        "attn.kv_a_layernorm.weight": Weight("attention.kv_norm.weight", (c.kv_rank,)),
        "attn.kv_b_proj.weight": Weight("attention.kv_up.weight", (c.n_heads * 2 * c.head_dim, c.kv_rank)),
    }


FAMILIES: dict[type[AttentionConfig], Callable[[Any, int], dict[str, Weight]]] = {
    TPAConfig: _tpa,
    MHAConfig: _mha,
    MLAConfig: _mla,
}
"""The mechanisms of the public code: the names of one layer's matrices before the output."""


def layer_weights(config: T6Config) -> dict[str, Weight]:
    """Every matrix of one layer of the public code, by its name there.

    Raises:
        BadInput: the public code has no such attention.
    """
    attention, d_model = config.attention, config.d_model
    family = type(attention)
    if family not in FAMILIES:
        known = ", ".join(cls.__name__ for cls in FAMILIES)
        raise BadInput(
            f"attention.class_path={family.__name__!r} is not possible: the public code has {known}"
        )
    width, hidden = attention.n_heads * attention.head_dim, config.ffn_width
    names = FAMILIES[family](attention, d_model)
    if getattr(attention, "output_norm", False):
        names[OUTPUT_NORM] = Weight("attention.output_norm.weight", (attention.head_dim,))
    # The public code's SwiGLU is c_proj(silu(c_fc1 x) * c_fc2 x).
    return names | {
        "attn.c_proj.weight": Weight("attention.output.weight", (d_model, width)),
        "mlp.c_fc1.weight": Weight("ffn.gate.weight", (hidden, d_model)),
        "mlp.c_fc2.weight": Weight("ffn.up.weight", (hidden, d_model)),
        "mlp.c_proj.weight": Weight("ffn.down.weight", (d_model, hidden)),
    }


# --- converting ---


def as_trained(state: State, config: T6Config) -> T6Config:
    """`config` with what the public code sets: vocabulary, RoPE's convention, the norm of the heads' outputs.

    The public code keeps RoPE tables in bfloat16, in float32 where RoPE decays.

    Raises:
        BadInput: another mechanism, two embeddings that differ, or an output norm where the attention has none.
    """
    found = {re.sub(r"^transformer\.h\.\d+\.", "", name) for name in state}
    here, there = _mechanism(set(layer_weights(config))), _mechanism(found)
    if here != there:
        raise BadInput(f"the file holds {there}, and the configuration describes {here}")
    embedding = _embedding(state)
    decays = config.attention.rope.decay is not None
    rope = dataclasses.replace(
        config.attention.rope,
        pairing="halves",
        direction="reference",
        decay_form="reference" if decays else "relative",
        tables="exact" if decays else "reference",
    )
    changed: dict[str, Any] = {"rope": rope}
    normed = OUTPUT_NORM in found
    if hasattr(config.attention, "output_norm"):
        changed["output_norm"] = normed
    elif normed:
        raise BadInput(
            f"{OUTPUT_NORM} is in the file, and {type(config.attention).__name__} has no output norm"
        )
    attention: Any = config.attention
    return dataclasses.replace(
        config, vocab_size=embedding.shape[0], attention=dataclasses.replace(attention, **changed)
    )


def _embedding(state: State) -> torch.Tensor:
    both = [state[name] for name in (EMBEDDING, TIED) if name in state]
    if len(both) == 2 and not torch.equal(*both):
        raise BadInput(f"{EMBEDDING} and {TIED} differ in the file, and in the model they are one matrix")
    if both[0].ndim != 2:
        raise BadInput(f"{EMBEDDING} has shape {tuple(both[0].shape)} in the file, and should be a matrix")
    return both[0]


def _mechanism(names: set[str]) -> str:
    return next((mechanism for sign, mechanism in SIGNS.items() if sign in names), "an unknown mechanism")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}"


def _is_frequencies(name: str) -> bool:
    return name.rpartition(".")[2] == FREQUENCIES


def _check_frequencies(state: State, config: T6Config) -> None:
    """Saved frequencies may be left out where they are those that `config` recomputes."""
    width = config.attention.rope_width()
    pairs = torch.arange(0, width, 2, dtype=torch.float64)
    expected = config.rope_base ** (-pairs / max(width, 1))
    for name, value in state.items():
        if not _is_frequencies(name):
            continue
        found = value.double().flatten()
        # They may have been saved in bfloat16, which keeps 8 bits.
        if len(found) != len(expected) or ((found - expected).abs() > expected / 2**8).any():
            raise BadInput(
                f"{name} in the file is not what rope_base={config.rope_base:g} gives for {width} rotated "
                "dimensions: the model was trained with another RoPE"
            )


def convert(state: State, config: T6Config) -> dict[str, torch.Tensor]:
    """The state dict of `T6(config)` with the weights of the public code's `state`, in their dtype.

    Args:
        state: of `read_state`.
        config: of `as_trained`.

    Raises:
        BadInput: a missing or unexpected name, a wrong shape, or the frequencies of another RoPE.
    """
    _check_frequencies(state, config)
    state = {name: value for name, value in state.items() if not _is_frequencies(name)}
    layer = layer_weights(config)
    indices = {int(match[1]) for name in state if (match := re.match(r"transformer\.h\.(\d+)\.", name))}
    if len(indices) != config.n_layers:
        raise BadInput(
            f"the file has {len(indices)} layers, and the configuration n_layers={config.n_layers}"
        )
    expected = {
        f"transformer.h.{i}.{name}": weight._replace(ours=f"blocks.{i}.{weight.ours}")
        for i in range(config.n_layers)
        for name, weight in layer.items()
    }
    if missing := [name for name in expected if name not in state]:
        raise BadInput(f"the file lacks {_some(missing)}")
    if extra := [name for name in state if name not in expected and name not in (EMBEDDING, TIED)]:
        raise BadInput(f"the file holds {_some(extra)}, for which the configuration has no place")
    embedding = _embedding(state)
    expected = {EMBEDDING: Weight("embedding.weight", (config.vocab_size, config.d_model))} | expected
    converted = {}
    for name, weight in expected.items():
        value = embedding if name == EMBEDDING else state[name]
        if tuple(value.shape) != weight.shape:
            raise BadInput(
                f"{name} has shape {tuple(value.shape)} in the file, and the configuration makes it {weight.shape}"
            )
        if weight.heads is not None:
            value = value.unflatten(0, (weight.heads, -1)).transpose(0, 1).flatten(0, 1)
        converted[weight.ours] = value.contiguous()
    return converted
