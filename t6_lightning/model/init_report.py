"""Spread at initialization: standard deviations of Q, K, V, logits and the residual stream, predicted and measured.

The predictions are formulas and build no module; the measurements build layers and call no formula.
Shape suffixes: B batch, T tokens, M keys, H heads, G key/value heads, P heads per key/value head, D head dimension,
C d_model.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from math import exp, factorial, pi, sqrt
from typing import Any

import numpy as np
import torch

from t6_lightning.model.attention import Keys, Layout
from t6_lightning.model.attention.tpa import TPAConfig
from t6_lightning.model.block import rms_norm
from t6_lightning.model.config import T6Config
from t6_lightning.model.norm import OUTPUT_NORM_EPS
from t6_lightning.model.t6 import T6

N_TOKENS = 256
"""Random tokens that are measured on, or the context where it is less; the stream's prediction is for as many."""

LAYER_DRAWS = (4, 32)
DRAWN_PARAMETERS = 20_000_000
"""Attention layers are drawn anew, 4 to 32 times, until about so many parameters have been drawn."""

STREAM_DRAWS = 8
STREAM_PARAMETERS = 100_000_000
"""Models with more in their blocks are measured with fewer layers."""

STREAM = ("embedding", "middle", "end")
"""The residual stream before, half-way through and after the blocks."""

NAMES = ("q", "k", "v", "logits", *STREAM)
"""What is reported."""


@cache
def _correlation_series(function: str) -> np.ndarray:
    """s_n with E[f(g) f(g')] = Σ s_n cⁿ for silu or sigmoid of g, g' of variance 1/3 and correlation c (Mehler)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    sigmoid = 1 / (1 + np.exp(-nodes / sqrt(3)))
    values = sigmoid if function == "sigmoid" else sigmoid * nodes / sqrt(3)
    polynomials = np.polynomial.hermite_e.hermevander(nodes, 16)
    norms = np.array([sqrt(2 * pi) * sqrt(factorial(n)) for n in range(17)])
    return (weights * values @ polynomials / norms) ** 2


def _product_of(function: str, c: np.ndarray) -> np.ndarray:
    return np.polynomial.polynomial.polyval(c, _correlation_series(function))


def _logits_variance(net: T6Config) -> float | None:
    """Variance of a logit between tokens that have nothing to do with each other.

    q and k have D independent entries of mean zero, D counting MLA's turned dimensions: D · Var[q] · Var[k] · scale².
    None under a RoPE with decay, where it depends on the positions.
    """
    attention = net.attention
    if attention.rope.decay not in (None, 1):
        return None
    variances = attention.initial_variances(net.d_model)
    width = attention.head_dim + getattr(attention, "rope_dim", 0)
    return width * variances["q"] * variances["k"] * attention.softmax_scale() ** 2


def _correlations(k_TT: np.ndarray, eps: float = 0.0) -> np.ndarray:
    norms_T = np.sqrt(np.diag(k_TT) + eps)
    return k_TT / np.outer(norms_T, norms_T)


def _attended(net: T6Config, c_TT: np.ndarray, logits: float) -> np.ndarray:
    """E[o_t o_s] of what goes into W_O, for tokens with correlations c."""
    attention, n = net.attention, len(c_TT)
    power = 1
    if isinstance(attention, TPAConfig):
        power = sum(attention.factors()[attention.factor_name(f, "v")].contextual for f in attention.sizes)
    mean_TT = np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]
    o_TT = mean_TT @ c_TT**power @ mean_TT.T
    uneven_T = np.minimum(1, exp(logits) / np.arange(1, n + 1)) - 1 / np.arange(1, n + 1)
    o_TT += np.diag(uneven_T * (1 - np.diag(o_TT)))
    o_TT *= attention.initial_variances(net.d_model)["v"]
    if isinstance(attention, TPAConfig):
        o_TT = _correlations(o_TT, OUTPUT_NORM_EPS) if attention.output_norm else o_TT
        o_TT = o_TT * _product_of("sigmoid", c_TT) if attention.output_gate != "none" else o_TT
    return o_TT


def _stream_variances(net: T6Config) -> list[float | None]:
    """Variance of the residual stream before the first block and after each.

    The embedding, U(±1/√d_model), has 1/(3 d_model). Output matrices that start at zero add nothing. "scaled" ones
    have entries of variance 1/(6 L n_in), so that each of the 2 L sums adds its input's mean square over 6 L. Soon most
    of the stream is what attention made alike in all tokens, so E[x_t x_s] is followed for all pairs, from different
    random tokens on:

    - With correlation c, values have E[v_t v_s] = Var[v] cᵖ, where p factors of V depend on the token (1 but in TPA).
    - Attention is near uniform, E[o_t o_s] their mean over t's and s's predecessors; as the logits are normal of
      variance s² and E[Σ p²] = e^(s²)/t instead of 1/t, E[o_t²] has a share of that size of what differs.
    - An output norm divides by the norms; a gate multiplies by E[σ(g) σ(g')], g of variance 1/3.
    - The FFN adds E[silu(g) silu(g')] c/3.

    This holds to a few percent while the logits' standard deviation is below 0.5. None with a nonlinearity of V's head
    factors, and where a logit has no prediction.
    """
    first = 1 / (3 * net.d_model)
    if net.output_init == "zero":
        return [first] * (net.n_layers + 1)
    logits = _logits_variance(net)
    attention = net.attention
    nonlinear_v = (
        isinstance(attention, TPAConfig) and attention.nonlinearity != "none" and attention.acts_on("v")
    )
    if logits is None or nonlinear_v:
        return [first, *[None] * net.n_layers]
    k_TT = first * np.eye(min(N_TOKENS, net.context))
    variances: list[float | None] = [first]
    for _ in range(net.n_layers):
        k_TT = k_TT + _attended(net, _correlations(k_TT), logits) / (6 * net.n_layers)
        c_TT = _correlations(k_TT)
        k_TT = k_TT + _product_of("silu", c_TT) * c_TT / 3 / (6 * net.n_layers)
        variances.append(float(np.diag(k_TT).mean()))
    return variances


def _root(variance: float | None) -> float | None:
    return None if variance is None else sqrt(variance)


def predicted(net: T6Config) -> dict[str, float | None]:
    """Standard deviations by name (`NAMES`), for layer inputs of unit RMS; None where there is no closed form."""
    if not net.attention.states_its_spread():
        embedding = _root(_stream_variances(net)[0])
        return dict.fromkeys(NAMES) | {"embedding": embedding}
    variances: dict[str, float | None] = dict(net.attention.initial_variances(net.d_model))
    if net.attention.rope.decay not in (None, 1):
        variances |= {"q": None, "k": None}
    variances["logits"] = _logits_variance(net)
    stream = _stream_variances(net)
    variances |= {"embedding": stream[0], "middle": stream[len(stream) // 2], "end": stream[-1]}
    return {name: _root(variances[name]) for name in NAMES}


def stream_net(net: T6Config) -> T6Config:
    """The model whose residual stream is measured: `net`, with fewer layers where it is large.

    Nothing but the layers' number matters: the embedding's rows are alike, so that there need not be all of them.
    """
    block = net.attention.n_parameters(net.d_model) + 3 * net.d_model * net.ffn_width
    layers = min(net.n_layers, max(2, STREAM_PARAMETERS // block))
    return dataclasses.replace(net, n_layers=layers, vocab_size=min(net.vocab_size, 8192), dropout=0.0)


def measured(net: T6Config) -> dict[str, float]:
    """Standard deviations by name (`NAMES`) of new layers at full width and of the stream of `stream_net(net)`.

    Q, K, V and the logits between two halves of the tokens are taken over several draws of one attention layer, whose
    inputs are normal and have unit RMS. The caller's random numbers stay as they were.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return _measured_heads(net) | _measured_stream(stream_net(net))


def _measured_heads(net: T6Config) -> dict[str, float]:
    attention = net.attention
    least, most = LAYER_DRAWS
    positions = torch.arange(N_TOKENS)
    tables = attention.rope.query_and_key_tables(positions, attention.rope_width(), net.rope_base)
    layout = Layout(tables[0], Keys(tables[1], positions == 0))
    squares: dict[str, list[float]] = {name: [] for name in NAMES[:4]}
    for seed in range(most):
        torch.manual_seed(seed)
        layer = attention.build(net.d_model)
        q_BTHD, k_BTGD, v_BTGD = layer.heads(rms_norm(torch.randn(1, N_TOKENS, net.d_model)), layout)
        # Queries of one half and keys of the other, so that no token meets itself.
        q_BTGPD = q_BTHD[:, N_TOKENS // 2 :].unflatten(2, (k_BTGD.shape[2], -1))
        k_BMGD = k_BTGD[:, : N_TOKENS // 2]
        logits = torch.einsum("btgpd,bmgd->bgptm", q_BTGPD, k_BMGD) * attention.softmax_scale()
        for name, values in zip(squares, (q_BTHD, k_BTGD, v_BTGD, logits), strict=True):
            squares[name].append(values.square().mean().item())
        drawn = sum(parameter.numel() for parameter in layer.parameters()) * (seed + 1)
        if seed + 1 >= least and drawn >= DRAWN_PARAMETERS:
            break
    return {name: sqrt(sum(values) / len(values)) for name, values in squares.items()}


def _measured_stream(net: T6Config) -> dict[str, float]:
    # What attention makes alike in all tokens is one random vector, so that a single draw scatters by 10 %.
    draws = 1 if net.output_init == "zero" else STREAM_DRAWS
    squares = torch.tensor([_stream_of_one_draw(net, seed) for seed in range(draws)]).mean(0).tolist()
    middle = len(squares) // 2
    return {name: sqrt(squares[i]) for name, i in zip(STREAM, (0, middle, -1), strict=True)}


def _stream_of_one_draw(net: T6Config, seed: int) -> list[float]:
    """Mean squares of the residual stream before the first block and after each."""
    torch.manual_seed(seed)
    model = T6(net)
    seen: list[float] = []

    def note(_: Any, __: Any, out: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> None:
        x_BTC = out[0] if isinstance(out, tuple) else out  # a block's second is the norm
        seen.append(x_BTC.square().mean().item())

    for module in (model.embedding, *model.blocks):
        module.register_forward_hook(note)
    model.hidden(torch.randint(net.vocab_size, (1, min(N_TOKENS, net.context))))
    return seen
