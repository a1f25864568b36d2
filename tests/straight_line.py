"""The paper's models written straight down, as plain functions of a state dict in the public code's layout.

Written from the paper's formulas (sections 3.1 to 3.3, appendix F), each mechanism as someone would write it for
that mechanism alone: one matrix product for all that is computed of the same input, PyTorch's attention, RoPE
tables made once. It imports nothing of the project: what it shares with the model is the paper.

Shape suffixes: B batch, T tokens, H heads, G key/value heads, R rank, D head dimension, C d_model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import torch
from torch.nn import functional as F

EPS = 2.0**-23  # float32's epsilon, PyTorch's default for RMSNorm
LATENT_EPS = 1e-6
OUTPUT_EPS = 1e-5

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """A model of the public code. `mechanism` is a key of `LAYERS`."""

    mechanism: str
    vocab_size: int = 97
    d_model: int = 40
    n_layers: int = 2
    n_heads: int = 5
    head_dim: int = 16
    rank_q: int = 6
    rank: int = 2
    kv_heads: int = 1
    q_latent: int = 24
    kv_latent: int = 20
    rope_dim: int = 8
    output_norm: bool = False

    @property
    def rotated(self) -> int:
        """Dimensions that turn."""
        return self.rope_dim if self.mechanism == "mla" else self.head_dim


# --- random weights in the public code's layout ---


def shapes(s: Sizes) -> dict[str, tuple[int, ...]]:
    """Name and shape of everything in the file."""
    C, H, D, hidden = s.d_model, s.n_heads, s.head_dim, s.d_model * 8 // 3
    still_and_turned = H * (D + s.rope_dim)
    attention: dict[str, dict[str, tuple[int, ...]]] = {
        "tpa": {
            "c_qkv.W_A_q": (H * s.rank_q, C),
            "c_qkv.W_A_k": (H * s.rank, C),
            "c_qkv.W_A_v": (H * s.rank, C),
            "c_qkv.W_B_q": (s.rank_q * D, C),
            "c_qkv.W_B_k": (s.rank * D, C),
            "c_qkv.W_B_v": (s.rank * D, C),
        },
        "tpa-kvonly": {
            "c_qkv.c_q": (H * D, C),
            "c_qkv.W_A_k": (H * s.rank, C),
            "c_qkv.W_A_v": (H * s.rank, C),
            "c_qkv.W_B_k": (s.rank * D, C),
            "c_qkv.W_B_v": (s.rank * D, C),
        },
        "mha": {"c_q": (H * D, C), "c_k": (H * D, C), "c_v": (H * D, C)},
        "gqa": {"c_q": (H * D, C), "c_k": (s.kv_heads * D, C), "c_v": (s.kv_heads * D, C)},
        "mla": {
            "q_a_proj": (s.q_latent, C),
            "q_a_layernorm": (s.q_latent,),
            "q_b_proj": (still_and_turned, s.q_latent),
            "kv_a_proj_with_mqa": (s.kv_latent + s.rope_dim, C),
            "kv_a_layernorm": (s.kv_latent,),
            "kv_b_proj": (H * 2 * D, s.kv_latent),
        },
    }
    layer = attention[s.mechanism] | {"c_proj": (C, H * D)}
    if s.output_norm:
        layer["subln"] = (D,)
    named = {f"attn.{name}": shape for name, shape in layer.items()}
    named |= {"mlp.c_fc1": (hidden, C), "mlp.c_fc2": (hidden, C), "mlp.c_proj": (C, hidden)}
    every = {f"transformer.h.{i}.{name}": shape for i in range(s.n_layers) for name, shape in named.items()}
    every = {"transformer.wte": (s.vocab_size, C)} | every | {"lm_head": (s.vocab_size, C)}
    return {f"{name}.weight": shape for name, shape in every.items()}


def random_state(s: Sizes, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensors:
    """Weights with which every part shows in the logits; norm weights are not 1, and the tied pair is tied."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes(s).items():
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        if len(shape) == 1:
            values = 1 + 0.3 * values
        elif name.startswith("transformer.h."):
            values *= 1.5 / sqrt(shape[1])
        state[name] = values.to(dtype)
    state["lm_head.weight"] = state["transformer.wte.weight"]
    return state


# --- pieces ---


def rope_tables(
    n_tokens: int, s: Sizes, device: torch.device | str = "cpu", base: float = 10000.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine (T, 1, D/2): angles in float32, tables in bfloat16, as the public code keeps them."""
    frequencies = 1.0 / base ** (torch.arange(0, s.rotated, 2, device=device).float() / s.rotated)
    angles_T1D = torch.outer(torch.arange(n_tokens, device=device).float(), frequencies).unsqueeze(1)
    return angles_T1D.cos().bfloat16(), angles_T1D.sin().bfloat16()


def turn(x_BTRD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Pairs of halves, in the direction of section 3.2."""
    x1, x2 = x_BTRD.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1).to(x_BTRD.dtype)


def norm(x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = EPS) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def attend(q_BTHD: torch.Tensor, k_BTGD: torch.Tensor, v_BTGD: torch.Tensor, scale: float) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTGD, v_BTGD))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped).transpose(
        1, 2
    )


def merged(layer: Tensors, *names: str) -> torch.Tensor:
    return torch.cat([layer[f"attn.{name}.weight"] for name in names])


# --- one function per mechanism: merged weights, then the heads' outputs (B, T, H, D) ---


def merge_tpa(layer: Tensors) -> Tensors:
    names = ("W_B_q", "W_B_k", "W_B_v", "W_A_q", "W_A_k", "W_A_v")
    return {"factors": merged(layer, *(f"c_qkv.{name}" for name in names))}


def tpa(x: torch.Tensor, w: Tensors, s: Sizes, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Q = (1/R_Q) A_Qᵀ RoPE(B_Q), K likewise, V without RoPE (eq. 3.1 to 3.3)."""
    H, D, Q, R = s.n_heads, s.head_dim, s.rank_q, s.rank
    b, a = F.linear(x, w["factors"]).split(((Q + 2 * R) * D, (Q + 2 * R) * H), dim=-1)
    turned, b_v = b.unflatten(-1, (-1, D)).split((Q + R, R), dim=-2)
    b_q, b_k = turn(turned, cos, sin).split((Q, R), dim=-2)
    a_q, a_k, a_v = (part.unflatten(-1, (H, -1)) for part in a.split((H * Q, H * R, H * R), dim=-1))
    # 1/R_Q and 1/R_K go into the softmax scale, 1/R_V onto the small factor.
    return attend(a_q @ b_q, a_k @ b_k, (a_v / R) @ b_v, scale=1 / (Q * R * sqrt(D)))


def merge_kvonly(layer: Tensors) -> Tensors:
    return {"all": merged(layer, *(f"c_qkv.{name}" for name in ("c_q", "W_B_k", "W_B_v", "W_A_k", "W_A_v")))}


def kvonly(x: torch.Tensor, w: Tensors, s: Sizes, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """TPA with one plain matrix for Q."""
    H, D, R = s.n_heads, s.head_dim, s.rank
    rows, a_k, a_v = F.linear(x, w["all"]).split(((H + 2 * R) * D, H * R, H * R), dim=-1)
    turned, b_v = rows.unflatten(-1, (-1, D)).split((H + R, R), dim=-2)
    q, b_k = turn(turned, cos, sin).split((H, R), dim=-2)
    a_k, a_v = a_k.unflatten(-1, (H, R)), a_v.unflatten(-1, (H, R))
    return attend(q, a_k @ b_k, (a_v / R) @ b_v, scale=1 / (R * sqrt(D)))


def merge_mha(layer: Tensors) -> Tensors:
    return {"qkv": merged(layer, "c_q", "c_k", "c_v")}


def mha(x: torch.Tensor, w: Tensors, s: Sizes, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Heads of their own keys and values."""
    H, D = s.n_heads, s.head_dim
    turned, v = F.linear(x, w["qkv"]).unflatten(-1, (3 * H, D)).split((2 * H, H), dim=-2)
    q, k = turn(turned, cos, sin).split((H, H), dim=-2)
    return attend(q, k, v, scale=1 / sqrt(D))


def gqa(x: torch.Tensor, w: Tensors, s: Sizes, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Head h reads key/value head h // (H/G)."""
    H, D, G = s.n_heads, s.head_dim, s.kv_heads
    turned, v = F.linear(x, w["qkv"]).unflatten(-1, (H + 2 * G, D)).split((H + G, G), dim=-2)
    q, k = turn(turned, cos, sin).split((H, G), dim=-2)
    return attend(q, k, v, scale=1 / sqrt(D))


def merge_mla(layer: Tensors) -> Tensors:
    rest = ("q_a_layernorm", "q_b_proj", "kv_a_layernorm", "kv_b_proj")
    return {"down": merged(layer, "q_a_proj", "kv_a_proj_with_mqa")} | {
        name: layer[f"attn.{name}.weight"] for name in rest
    }


def mla(x: torch.Tensor, w: Tensors, s: Sizes, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Queries and keys [still, turned]; all heads share the turned part of the key."""
    H, D, S = s.n_heads, s.head_dim, s.rope_dim
    q_latent, kv_latent, k_turned = F.linear(x, w["down"]).split((s.q_latent, s.kv_latent, S), dim=-1)
    q = F.linear(norm(q_latent, w["q_a_layernorm"], LATENT_EPS), w["q_b_proj"]).unflatten(-1, (H, D + S))
    kv = F.linear(norm(kv_latent, w["kv_a_layernorm"], LATENT_EPS), w["kv_b_proj"]).unflatten(-1, (H, 2 * D))
    q_still, q_turned = q.split((D, S), dim=-1)
    k_still, v = kv.split((D, D), dim=-1)
    q = torch.cat((q_still, turn(q_turned, cos, sin)), dim=-1)
    k_turned = turn(k_turned.unsqueeze(-2), cos, sin).expand(-1, -1, H, -1)
    return attend(q, torch.cat((k_still, k_turned), dim=-1), v, scale=1 / sqrt(D + S))


LAYERS: dict[str, tuple[Callable[[Tensors], Tensors], Callable[..., torch.Tensor]]] = {
    "tpa": (merge_tpa, tpa),
    "tpa-kvonly": (merge_kvonly, kvonly),
    "mha": (merge_mha, mha),
    "gqa": (merge_mha, gqa),
    "mla": (merge_mla, mla),
}


# --- the whole ---


def merge(state: Tensors, s: Sizes) -> list[Tensors]:
    """Weights as the model below reads them: the embedding, then each layer's."""
    weights: list[Tensors] = [{"embedding": state["transformer.wte.weight"]}]
    for i in range(s.n_layers):
        start = f"transformer.h.{i}."
        layer = {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
        weights.append(LAYERS[s.mechanism][0](layer))
        weights[-1]["output"] = layer["attn.c_proj.weight"]
        weights[-1]["gate_up"] = torch.cat((layer["mlp.c_fc1.weight"], layer["mlp.c_fc2.weight"]))
        weights[-1]["ffn_down"] = layer["mlp.c_proj.weight"]
        if s.output_norm:
            weights[-1]["output_norm"] = layer["attn.subln.weight"]
    return weights


def model(
    tokens_BT: torch.Tensor, weights: list[Tensors], s: Sizes, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Logits (B, T, vocabulary)."""
    heads_of = LAYERS[s.mechanism][1]
    embedding = weights[0]["embedding"]
    x = F.embedding(tokens_BT, embedding)
    for w in weights[1:]:
        o_BTHD = heads_of(norm(x), w, s, cos, sin)
        if s.output_norm:
            o_BTHD = norm(o_BTHD, w["output_norm"], OUTPUT_EPS)
        x = x + F.linear(o_BTHD.flatten(-2), w["output"])
        gate, up = F.linear(norm(x), w["gate_up"]).chunk(2, dim=-1)
        x = x + F.linear(F.silu(gate) * up, w["ffn_down"])
    return F.linear(norm(x), embedding)


def logits(tokens_BT: torch.Tensor, state: Tensors, s: Sizes) -> torch.Tensor:
    """Of a state dict in the public code's layout."""
    return model(tokens_BT, merge(state, s), s, *rope_tables(tokens_BT.shape[1], s, tokens_BT.device))
