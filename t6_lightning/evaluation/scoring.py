"""Log-probabilities of continuations; a context that several continuations share is computed once.

Shape suffixes: B contexts, R continuations, T tokens, N scored tokens, C d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from t6_lightning.common.errors import require
from t6_lightning.model.t6 import T6

LOGITS_AT_ONCE = 1 << 26
"""Numbers of the largest logits tensor."""

Tokens = Sequence[int]


class Score(NamedTuple):
    """Of one continuation: log-probability in nats, and whether each of its tokens is the likeliest."""

    log_probability: float
    is_greedy: bool


class _Group(NamedTuple):
    """One context and the requests that continue it."""

    context: tuple[int, ...]
    requests: list[int]


def score(
    model: T6,
    requests: Sequence[tuple[Tokens, Tokens]],
    batch_size: int,
    max_length: int | None = None,
    *,
    mine: Callable[[int], bool] = lambda batch: True,
    on_progress: Callable[[int], object] = lambda done: None,
) -> list[Score | None]:
    """Score continuations given their contexts.

    Contexts with several continuations (the answers to a question) go through the model once; their cache is copied for
    each continuation. Requests are batched by length.

    Args:
        model: in evaluation mode, whole on this device.
        requests: (context, continuation) as token ids; at least one token of context each.
        batch_size: contexts per forward.
        max_length: tokens that the model reads at most, by default its training context; longer contexts lose their
            first tokens.
        mine: which batches this process computes, for sharing work between ranks.
        on_progress: called with the number of requests of each batch.

    Returns:
        in the order of the requests; None for those of batches that are not this process's.

    Raises:
        BadInput: an empty context, or a continuation longer than `max_length`.
    """
    limit = max_length or model.config.context
    scores: list[Score | None] = [None] * len(requests)
    for number, batch in enumerate(_batches(requests, batch_size, limit)):
        if mine(number):
            found = _score_batch(model, batch, requests)
            for request, value in found:
                scores[request] = value
        on_progress(sum(len(group.requests) for group in batch))
    return scores


def _batches(requests: Sequence[tuple[Tokens, Tokens]], batch_size: int, limit: int) -> list[list[_Group]]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, (context, continuation) in enumerate(requests):
        require(len(context) >= 1, "context", "", "a continuation is scored after at least one token")
        require(
            len(continuation) <= limit,
            "continuation",
            f"{len(continuation)} tokens",
            f"the model reads {limit} at once",
        )
        kept = tuple(context)[-max(1, limit + 1 - len(continuation)) :]
        groups.setdefault(kept, []).append(i)
    shared = [_Group(*group) for group in groups.items() if len(group[1]) > 1]
    alone = [_Group(*group) for group in groups.items() if len(group[1]) == 1]
    # The longest first: what does not fit into memory shows at once.
    shared.sort(key=lambda group: len(group.context), reverse=True)
    alone.sort(key=lambda group: len(group.context) + len(requests[group.requests[0]][1]), reverse=True)
    return [
        kind[first : first + batch_size]
        for kind in (shared, alone)
        for first in range(0, len(kind), batch_size)
    ]


@torch.inference_mode()
def _score_batch(
    model: T6, batch: list[_Group], requests: Sequence[tuple[Tokens, Tokens]]
) -> list[tuple[int, Score]]:
    order = [request for group in batch for request in group.requests]
    continuations = [list(requests[request][1]) for request in order]
    if len(order) == len(batch):
        hidden_NC = _hidden_alone(model, batch, continuations)
    else:
        hidden_NC = _hidden_shared(model, batch, continuations)
    device = hidden_NC.device
    targets_N = torch.tensor([token for tokens in continuations for token in tokens], device=device)
    owner_N = torch.tensor([i for i, tokens in enumerate(continuations) for _ in tokens], device=device)
    sums, greedy = torch.zeros(len(order), dtype=torch.float64), [True] * len(order)
    if len(targets_N):
        log_probabilities_N, is_likeliest_N = _of_targets(model, hidden_NC, targets_N.long())
        sums = torch.zeros(len(order), dtype=torch.float64, device=device)
        sums = sums.index_add_(0, owner_N, log_probabilities_N.double()).cpu()
        missed = torch.zeros(len(order), dtype=torch.long, device=device)
        greedy = (missed.index_add_(0, owner_N, (~is_likeliest_N).long()) == 0).tolist()
    return [
        (request, Score(value, is_greedy))
        for request, value, is_greedy in zip(order, sums.tolist(), greedy, strict=True)
    ]


def _hidden_alone(model: T6, batch: list[_Group], continuations: list[list[int]]) -> torch.Tensor:
    """States (N, C) that predict the continuations, each after a context of its own."""
    inputs = [[*group.context, *tokens[:-1]] for group, tokens in zip(batch, continuations, strict=True)]
    x_BTC = model.hidden(_padded(inputs, model.embedding.weight.device))
    width = x_BTC.shape[1]
    index = [
        row * width + len(group.context) - 1 + i
        for row, (group, tokens) in enumerate(zip(batch, continuations, strict=True))
        for i in range(len(tokens))
    ]
    return x_BTC.flatten(0, 1)[torch.tensor(index, dtype=torch.long, device=x_BTC.device)]


def _hidden_shared(model: T6, batch: list[_Group], continuations: list[list[int]]) -> torch.Tensor:
    """The same for contexts with several continuations."""
    device = model.embedding.weight.device
    contexts = [list(group.context) for group in batch]
    lengths = torch.tensor([len(context) for context in contexts], device=device)
    kind = device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    cache = model.new_cache(len(contexts), max(map(len, contexts)), dtype)
    x_BTC = model.hidden(_padded(contexts, device), cache=cache)
    cache.crop(lengths)
    owner_R = [row for row, group in enumerate(batch) for _ in group.requests]
    # The state after the context predicts a continuation's first token, those after its tokens all others.
    last_BC = x_BTC[torch.arange(len(contexts), device=device), lengths - 1]
    states_RTC = last_BC[torch.tensor(owner_R, device=device)][:, None]
    longest = max(map(len, continuations))
    if longest > 1:
        rows = cache.repeated(torch.tensor(owner_R, device=device), room=longest - 1)
        inputs_RT = _padded([tokens[:-1] for tokens in continuations], device)
        states_RTC = torch.cat((states_RTC, model.hidden(inputs_RT, cache=rows)), dim=1)
    width = states_RTC.shape[1]
    index = [row * width + i for row, tokens in enumerate(continuations) for i in range(len(tokens))]
    return states_RTC.flatten(0, 1)[torch.tensor(index, dtype=torch.long, device=device)]


def _of_targets(
    model: T6, hidden_NC: torch.Tensor, targets_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target, and whether it is the likeliest token; at least in float32."""
    parts = []
    rows = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    for first in range(0, len(targets_N), rows):
        logits_NV = model.logits(hidden_NC[first : first + rows])
        logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
        targets = targets_N[first : first + rows]
        of_target = logits_NV.gather(1, targets[:, None])[:, 0]
        parts.append((of_target - logits_NV.logsumexp(-1), logits_NV.argmax(-1) == targets))
    log_probabilities, likeliest = zip(*parts, strict=True)
    return torch.cat(log_probabilities), torch.cat(likeliest)


def _padded(rows: list[list[int]], device: torch.device) -> torch.Tensor:
    """Ids (rows, longest), filled up with zeros, which come after all that counts."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
