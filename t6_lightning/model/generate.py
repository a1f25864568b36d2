"""Sampling from a T6 with its key/value cache; prefill and decoding are separate steps.

Shape suffixes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from math import isfinite

import torch

from t6_lightning.common.errors import BadInput, require
from t6_lightning.model.cache import KVCache
from t6_lightning.model.t6 import T6

MOST_TOKENS = 2**40
"""Of one generation: what tensors can have as a size."""

Randomness = torch.Generator | Sequence[torch.Generator] | None
"""One source for all rows, one for each row, or torch's own."""


def row_generators(seed: int, batch: int, device: torch.device) -> list[torch.Generator]:
    """A generator for each row, by (seed, row) alone: what a row draws does not depend on how many there are."""

    def row_seed(row: int) -> int:
        return int.from_bytes(hashlib.sha256(f"{seed} {row}".encode()).digest()[:8], "big") >> 1

    return [torch.Generator(device).manual_seed(row_seed(row)) for row in range(batch)]


def sample(
    logits_BV: torch.Tensor,
    temperature: float,
    top_k: int | None,
    generator: Randomness = None,
) -> torch.Tensor:
    """One token (B,) per row: the likeliest at temperature 0, else drawn from the softmax of the k largest logits.

    Of equal logits at the border of the k those of the smallest ids are kept.
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV.float()
    # The largest becomes 0, so that no temperature makes it infinite; one below what float32 holds would be 0 itself.
    temperature = max(temperature, torch.finfo(torch.float32).tiny)
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits_BV.shape[-1]:
        least_B1 = logits_BV.topk(top_k).values[:, -1:]
        above_BV, equal_BV = logits_BV > least_B1, logits_BV == least_B1
        room_B1 = top_k - above_BV.sum(-1, keepdim=True)
        kept_BV = above_BV | (equal_BV & (equal_BV.cumsum(-1) <= room_B1))
        logits_BV = logits_BV.masked_fill(~kept_BV, -torch.inf)
    # What torch.multinomial does for one draw, less its checks, for which the host would wait.
    noise_BV = torch.empty_like(logits_BV)
    if generator is None or isinstance(generator, torch.Generator):
        noise_BV.exponential_(generator=generator)
    else:
        for noise_V, of_row in zip(noise_BV, generator, strict=True):
            noise_V.exponential_(generator=of_row)
    return (logits_BV.softmax(-1) / noise_BV).argmax(-1)


def check_settings(max_new_tokens: int, temperature: float, top_k: int | None) -> None:
    """Raises BadInput for a setting of `generate` that is out of range."""
    allowed = f"it must be from 1 to {MOST_TOKENS:,}"
    require(1 <= max_new_tokens <= MOST_TOKENS, "max_new_tokens", max_new_tokens, allowed)
    require(isfinite(temperature) and temperature >= 0, "temperature", temperature, "it must be 0 or above")
    require(top_k is None or top_k >= 1, "top_k", top_k, "it must be at least 1")


def generate(
    model: T6,
    prompt_BT: torch.Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: Randomness = None,
    cache: KVCache | None = None,
    graph: bool | None = None,
    n_symbols: int | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[torch.Tensor]:
    """Yield one new token (B,) at a time.

    On a GPU the cache is fixed (`KVCache.fix`) after the prompt, and one CUDA graph serves all further tokens.

    Args:
        model: in evaluation mode; its weights must not change while tokens come.
        prompt_BT: at least one token in each row.
        max_new_tokens: tokens to add.
        temperature: 0 takes the likeliest token.
        top_k: sample among the k likeliest; None among all.
        generator: source of randomness on the model's device; with one for each row (`row_generators`) a row's tokens
            do not depend on the other rows, as far as its logits do not.
        cache: an empty cache to fill; one of the exact size is made when not given.
        graph: False launches every operation of every token anew; None is True on a GPU, where alone it can be.
        n_symbols: ids from here on are padding of the embedding and never drawn, as a tokenizer's `vocab_size`; None:
            every row is a symbol.
        dtype: of the cache that is made; None: of the weights.

    Raises:
        BadInput: a setting out of range.
    """
    check_settings(max_new_tokens, temperature, top_k)
    on_gpu = model.embedding.weight.is_cuda
    require(on_gpu or not graph, "graph", graph, "CUDA graphs need a GPU")
    batch, n_prompt = prompt_BT.shape
    require(n_prompt >= 1, "prompt", n_prompt, "it must hold at least one token")
    rows = model.config.vocab_size
    require(
        n_symbols is None or 1 <= n_symbols <= rows, "n_symbols", n_symbols, f"it must be from 1 to {rows}"
    )
    per_row = None if generator is None or isinstance(generator, torch.Generator) else len(generator)
    require(per_row in (None, batch), "generator", per_row, f"one for each of the {batch} rows is needed")
    if cache is None:
        try:
            cache = model.new_cache(batch, n_prompt + max_new_tokens - 1, dtype)
        except RuntimeError as error:  # the allocator's
            raise BadInput(
                f"max_new_tokens={max_new_tokens} needs a larger cache than memory holds"
            ) from error

    def draw(x_BTC: torch.Tensor) -> torch.Tensor:
        assert cache is not None
        return sample(model.logits(x_BTC[:, -1])[:, :n_symbols], temperature, top_k, generator)

    return _generate(
        model, prompt_BT, max_new_tokens, draw, cache, generator, on_gpu if graph is None else graph
    )


@torch.inference_mode()
def _generate(
    model: T6,
    prompt_BT: torch.Tensor,
    max_new_tokens: int,
    draw: Callable[[torch.Tensor], torch.Tensor],
    cache: KVCache,
    generator: Randomness,
    graph: bool,
) -> Iterator[torch.Tensor]:
    with model.frozen():
        token_B = draw(model.hidden(prompt_BT, cache=cache))
        yield token_B
        if prompt_BT.is_cuda:
            cache.fix()
        decoder = Decoder(model, cache, draw, generator, graph)
        for _ in range(max_new_tokens - 1):
            token_B = decoder.next(token_B)
            yield token_B


class Decoder:
    """One further token for each row, again and again; the model must be `frozen`.

    With `graph` the second token captures what the first one ran, and every further one replays it: `cache` must
    be fixed, and nothing may put other tensors in its place or in the model's.

    Args:
        model, cache: what decodes; the cache holds at least one token.
        draw: a token (B,) of hidden states (B, 1, C).
        generator: what `draw` takes random numbers from, None for torch's own.
        graph: replay a CUDA graph.
    """

    def __init__(
        self,
        model: T6,
        cache: KVCache,
        draw: Callable[[torch.Tensor], torch.Tensor],
        generator: Randomness = None,
        graph: bool = False,
    ) -> None:
        self._model = model
        self._cache = cache
        self._draw = draw
        self._generator = generator
        self._wants_graph = graph
        self._graph: torch.cuda.CUDAGraph | None = None
        self._token_B1: torch.Tensor | None = None

    def next(self, token_B: torch.Tensor) -> torch.Tensor:
        """The token after `token_B`, which is appended to the cache."""
        if not self._wants_graph:
            return self._step(token_B[:, None])
        if self._token_B1 is None:
            # Kernels are built and workspaces allocated now, before anything is captured.
            token_B = self._step(token_B[:, None])
            self._token_B1 = token_B[:, None].clone()
            return token_B
        self._token_B1.copy_(token_B[:, None])
        if self._graph is None:
            self._graph = self._capture(self._token_B1)
        self._cache.check_room(1)
        self._graph.replay()
        self._cache.longest += 1
        return self._token_B1[:, 0].clone()

    def _step(self, token_B1: torch.Tensor) -> torch.Tensor:
        return self._draw(self._model.hidden(token_B1, cache=self._cache))

    def _capture(self, token_B1: torch.Tensor) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        drawn_from = [self._generator] if isinstance(self._generator, torch.Generator) else self._generator
        for generator in drawn_from or ():
            graph.register_generator_state(generator)
        longest = self._cache.longest
        # Other threads, such as a data loader's, may go on using the GPU.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            token_B1.copy_(self._step(token_B1)[:, None])
        # Nothing has run yet.
        self._cache.longest = longest
        return graph
