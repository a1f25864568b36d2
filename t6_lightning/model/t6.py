"""The T6 transformer: embedding, blocks, final norm, tied output matrix.

Shape suffixes: B batch, T tokens, M cached tokens, C d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from kernels.attention import offsets, takes_documents
from kernels.dispatch import product_dtype
from kernels.loss import linear_cross_entropy, linear_cross_entropy_sum
from t6_lightning.model.attention import AttentionLayer, Keys, Layout
from t6_lightning.model.block import Block, SwiGLU, dropout
from t6_lightning.model.cache import KVCache
from t6_lightning.model.config import T6Config
from t6_lightning.model.norm import rms_norm
from t6_lightning.model.rope import Tables

IGNORE = -100
"""Target of a position that counts in no loss."""


class T6(nn.Module):
    """Decoder-only language model whose attention is the value `config.attention`."""

    def __init__(self, config: T6Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        # The reference ties the embedding to a Linear, whose own initialization stands.
        bound = config.d_model**-0.5
        nn.init.uniform_(self.embedding.weight, -bound, bound)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.dropout = dropout(config.dropout)

    def forward(
        self,
        tokens_BT: torch.Tensor,
        documents_BT: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """Logits (B, T, V) of the token after each one.

        Args:
            tokens_BT: token ids.
            documents_BT: index of the document each token belongs to, never falling along T. When given,
                positions restart in each document and attention stays inside it.
            cache: what came before; the tokens are appended to it. Not together with documents.
        """
        return self.logits(self.hidden(tokens_BT, documents_BT, cache))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) of `hidden` states (..., C)."""
        return F.linear(x, self.embedding.weight)

    def hidden(
        self,
        tokens_BT: torch.Tensor,
        documents_BT: torch.Tensor | None = None,
        cache: KVCache | None = None,
        *,
        sparse_gradient: bool = False,
    ) -> torch.Tensor:
        """The final normalized residual stream (B, T, C): `forward` before the output matrix.

        `sparse_gradient`: the embedding gets one from its rows, for where its use as output matrix gives it a dense one
        that autograd adds this to.
        """
        n_tokens = tokens_BT.shape[1]
        if cache is None:
            layout = self._layout(n_tokens, documents_BT)
            caches = [None] * self.config.n_layers
        else:
            if documents_BT is not None:
                raise ValueError("documents cannot be combined with a cache: a cached row is one document")
            positions_BT = cache.positions(n_tokens)
            layout = self._cached_layout(positions_BT, cache)
            caches = [cache.layer(i, positions_BT) for i in range(self.config.n_layers)]
        # Indexing is 4 times as fast as an embedding of a few tokens on a GPU, and as good without gradients.
        decoding = cache is not None and not torch.is_grad_enabled()
        weight = self.embedding.weight
        if decoding:
            x_BTC = weight[tokens_BT]
        elif sparse_gradient:
            x_BTC = F.embedding(tokens_BT, weight, sparse=True)
        else:
            x_BTC = self.embedding(tokens_BT)
        x_BTC = self.dropout(x_BTC)
        normed_BTC = rms_norm(x_BTC)
        for block, layer_cache in zip(self.blocks, caches, strict=True):
            x_BTC, normed_BTC = block(x_BTC, normed_BTC, layout, layer_cache)
        if cache is not None:
            cache.advance(n_tokens)
        return normed_BTC

    def token_losses(
        self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor, documents_BT: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Negative log-likelihood in nats of each target, float32 (B, T), 0 where the target is -100."""
        x_BTC = self.hidden(tokens_BT, documents_BT)
        losses_N = linear_cross_entropy(
            x_BTC.flatten(0, 1), self.embedding.weight, targets_BT.flatten(), ignore_index=IGNORE
        )
        return losses_N.view_as(targets_BT)

    def summed_loss(
        self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor, documents_BT: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The sum of `token_losses`, for training: its gradients are formed on the way, nothing is computed twice."""
        weight = self.embedding.weight
        # Not in half precision, where rows of frequent tokens would be rounded as often as they are added; tensors
        # without memory have no sparse gradients.
        sparse = weight.dtype.itemsize >= 4 and not weight.is_meta
        x_BTC = self.hidden(tokens_BT, documents_BT, sparse_gradient=sparse)
        return linear_cross_entropy_sum(
            x_BTC.flatten(0, 1), self.embedding.weight, targets_BT.flatten(), ignore_index=IGNORE
        )

    def loss(
        self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor, documents_BT: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Mean negative log-likelihood in nats over the targets that are not -100; never holds all logits."""
        total = self.summed_loss(tokens_BT, targets_BT, documents_BT)
        return total / (targets_BT != IGNORE).sum()

    def new_cache(self, batch: int, capacity: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for `capacity` tokens in each of `batch` rows, in the weights' dtype unless said."""
        weight = self.embedding.weight
        attention, n_layers = self.config.attention, self.config.n_layers
        return KVCache(attention, n_layers, batch, capacity, dtype or weight.dtype, weight.device)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Weights do not change meanwhile: what layers make of them alone is made once."""
        layers = [module for module in self.modules() if isinstance(module, AttentionLayer | SwiGLU)]
        try:
            for layer in layers:
                layer.freeze()
            yield
        finally:
            for layer in layers:
                layer.thaw()

    def _tables(self, positions: torch.Tensor) -> tuple[Tables, Tables]:
        """RoPE tables of queries and of keys."""
        attention = self.config.attention
        return attention.rope.query_and_key_tables(positions, attention.rope_width(), self.config.rope_base)

    def _layout(self, n_tokens: int, documents_BT: torch.Tensor | None) -> Layout:
        weight = self.embedding.weight
        positions = torch.arange(n_tokens, device=weight.device)
        mask = documents = None
        if documents_BT is not None:
            if takes_documents(weight.device, product_dtype(weight, weight)):
                documents = offsets(documents_BT)
            else:
                before_TT = positions[:, None] >= positions[None, :]
                same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
                mask = (before_TT & same_BTT).unsqueeze(1)
            # A document starts where the index changes; positions count from there.
            starts_BT = F.pad(documents_BT[:, 1:] != documents_BT[:, :-1], (1, 0), value=True)
            positions = positions - (positions * starts_BT).cummax(dim=1).values
        queries, keys = self._tables(positions)
        return self._by_setting(
            Layout(queries, Keys(keys, positions == 0), mask=mask, causal=mask is None, documents=documents)
        )

    def _by_setting(self, layout: Layout) -> Layout:
        c = self.config
        return replace(layout, backend=c.attention_backend, saves=c.attention_saves)

    def _cached_layout(self, positions_BT: torch.Tensor, cache: KVCache) -> Layout:
        if cache.fixed and cache.longest > 0:
            return self._fixed_layout(positions_BT, cache)
        queries, keys = self._tables(positions_BT)
        new = Keys(keys, positions_BT == 0)
        if cache.longest == 0:
            return self._by_setting(Layout(queries, new))
        keys_M = torch.arange(cache.n_read(positions_BT.shape[1]), device=positions_BT.device)
        reads_tables = self.config.attention.rotates_when_read
        nothing = torch.empty(len(keys_M), 0, device=keys_M.device)
        tables = self._tables(keys_M)[1] if reads_tables else Tables(nothing, nothing)
        seen = Keys(tables, keys_M == 0)
        if not cache.ragged and positions_BT.shape[1] == 1:
            return self._by_setting(Layout(queries, new, seen, causal=False))
        mask = (keys_M <= positions_BT[:, :, None]).unsqueeze(1)
        return self._by_setting(Layout(queries, new, seen, mask, positions_BT[:, -1] + 1, causal=False))

    def _fixed_layout(self, positions_BT: torch.Tensor, cache: KVCache) -> Layout:
        """As `_cached_layout`, by lookups alone: `lengths` say what is visible, in the form that kernels read."""
        if cache.positions_of_keys is None:
            every = torch.arange(cache.capacity, device=positions_BT.device)
            cache.positions_of_keys = (*self._tables(every), every == 0)
        queries, keys, starts = cache.positions_of_keys
        new_queries, new_keys = (Tables(*(table[positions_BT] for table in x)) for x in (queries, keys))
        seen = Keys(keys, starts)
        return self._by_setting(
            Layout(
                new_queries,
                Keys(new_keys, starts[positions_BT]),
                seen,
                None,
                positions_BT[:, -1] + 1,
                causal=False,
            )
        )
