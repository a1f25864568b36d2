"""Sampling from a T6 with its key/value cache; prefill and decoding are separate steps.

Shape suffixes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import isfinite

import torch

from t6_lightning.common.errors import BadInput, require
from t6_lightning.model.cache import KVCache
from t6_lightning.model.t6 import T6


def sample(
    logits_BV: torch.Tensor,
    temperature: float,
    top_k: int | None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """One token (B,) per row: the likeliest at temperature 0, else drawn from the (top-k) softmax."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV.float()
    # The largest becomes 0, so that no temperature makes it infinite; one below what float32 holds would be 0 itself.
    temperature = max(temperature, torch.finfo(torch.float32).tiny)
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature
    if top_k is not None:
        kept = logits_BV.topk(min(top_k, logits_BV.shape[-1])).values
        logits_BV = logits_BV.masked_fill(logits_BV < kept[:, -1:], -torch.inf)
    # What torch.multinomial does for one draw, less its checks, for which the host would wait.
    noise_BV = torch.empty_like(logits_BV).exponential_(generator=generator)
    return (logits_BV.softmax(-1) / noise_BV).argmax(-1)


def check_settings(max_new_tokens: int, temperature: float, top_k: int | None) -> None:
    """Raises BadInput for a setting of `generate` that is out of range."""
    require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "it must be at least 1")
    require(isfinite(temperature) and temperature >= 0, "temperature", temperature, "it must be 0 or above")
    require(top_k is None or top_k >= 1, "top_k", top_k, "it must be at least 1")


def generate(
    model: T6,
    prompt_BT: torch.Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    cache: KVCache | None = None,
    graph: bool | None = None,
) -> Iterator[torch.Tensor]:
    """Yield one new token (B,) at a time.

    On a GPU the cache is fixed (`KVCache.fix`) after the prompt, and one CUDA graph serves all further tokens.

    Args:
        model: in evaluation mode; its weights must not change while tokens come.
        prompt_BT: at least one token in each row.
        max_new_tokens: tokens to add.
        temperature: 0 takes the likeliest token.
        top_k: sample among the k likeliest; None among all.
        generator: source of randomness on the model's device.
        cache: an empty cache to fill; one of the exact size is made when not given.
        graph: False launches every operation of every token anew; None is True on a GPU, where alone it can be.

    Raises:
        BadInput: a setting out of range.
    """
    check_settings(max_new_tokens, temperature, top_k)
    on_gpu = model.embedding.weight.is_cuda
    require(on_gpu or not graph, "graph", graph, "CUDA graphs need a GPU")
    batch, n_prompt = prompt_BT.shape
    require(n_prompt >= 1, "prompt", n_prompt, "it must hold at least one token")
    if cache is None:
        try:
            cache = model.new_cache(batch, n_prompt + max_new_tokens - 1)
        except RuntimeError as error:  # the allocator's
            raise BadInput(
                f"max_new_tokens={max_new_tokens} needs a larger cache than memory holds"
            ) from error

    def draw(x_BTC: torch.Tensor) -> torch.Tensor:
        assert cache is not None
        return sample(model.logits(x_BTC[:, -1]), temperature, top_k, generator)

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
    generator: torch.Generator | None,
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
        generator: torch.Generator | None = None,
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
        if self._generator is not None:
            graph.register_generator_state(self._generator)
        longest = self._cache.longest
        # Other threads, such as a data loader's, may go on using the GPU.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            token_B1.copy_(self._step(token_B1)[:, None])
        # Nothing has run yet.
        self._cache.longest = longest
        return graph
