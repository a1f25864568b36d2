"""The key/value cache: one small generic store, built from what each attention config declares.

Shape suffixes: L layers, B batch, T tokens, M cached tokens.
"""

from __future__ import annotations

from copy import copy
from typing import Protocol

import torch

from t6_lightning.model.rope import Tables


class Cacheable(Protocol):
    """What the cache asks of an attention config (`t6_lightning.model.attention.base.AttentionConfig`)."""

    def cache_entries(self) -> dict[str, tuple[int, ...]]: ...

    def stored_entries(self, element_size: int) -> dict[str, tuple[int, ...]]: ...


class KVCache:
    """Preallocated tensors (L, B, capacity, *entry), one for each entry that the attention config declares.

    A forward appends T tokens to every row; rows may have different lengths. `T6.forward` moves `lengths`
    on once all layers have appended.

    A forward reads the tokens so far, so that its shapes grow with them; after `fix` it reads the whole capacity
    and knows from `lengths`, on the device, what counts: then one CUDA graph serves every length.

    Args:
        attention: what is cached.
        n_layers, batch, capacity: layers, rows and tokens per row to hold.
        dtype, device: of the tensors.
    """

    def __init__(
        self,
        attention: Cacheable,
        n_layers: int,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.capacity = capacity
        entries, stored = attention.cache_entries(), attention.stored_entries(dtype.itemsize)
        self._stored = {
            name: torch.zeros(n_layers, batch, capacity, *shape, dtype=dtype, device=device)
            for name, shape in stored.items()
        }
        # Nothing writes past these views: padding stays zero.
        self.tensors = {name: self._stored[name][..., : shape[-1]] for name, shape in entries.items()}
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self._rows_B1 = torch.arange(batch, device=device)[:, None]
        # Kept beside `lengths` so that sizes are known without waiting for the device.
        self.longest = 0
        self.ragged = False
        self.fixed = False
        # Of a fixed cache: RoPE tables of queries and of keys at every position, and where documents start.
        self.positions_of_keys: tuple[Tables, Tables, torch.Tensor] | None = None

    def fix(self) -> None:
        """From now on forwards that follow a first one have shapes that do not depend on the tokens so far."""
        self.fixed = True

    def n_read(self, n_new: int) -> int:
        """Tokens of a row that a forward of `n_new` further ones reads."""
        return self.capacity if self.fixed else self.longest + n_new

    def check_room(self, n_tokens: int) -> None:
        """Raises ValueError where `n_tokens` more do not fit."""
        if self.longest + n_tokens > self.capacity:
            raise ValueError(
                f"the cache holds {self.capacity} tokens a row: {n_tokens} more after {self.longest} do not fit"
            )

    def positions(self, n_tokens: int) -> torch.Tensor:
        """Positions (B, T) that the next T tokens of each row take.

        Raises:
            ValueError: the cache is full.
        """
        self.check_room(n_tokens)
        return self.lengths[:, None] + torch.arange(n_tokens, device=self.lengths.device)

    def layer(self, index: int, positions: torch.Tensor) -> LayerCache:
        """The part of layer `index`, ready to take tokens at `positions` (B, T)."""
        tensors = {name: tensor[index] for name, tensor in self.tensors.items()}
        return LayerCache(tensors, self._rows_B1, positions, self.n_read(positions.shape[1]))

    def advance(self, n_tokens: int) -> None:
        """Count the T tokens that every layer has appended."""
        self.lengths += n_tokens
        self.longest += n_tokens

    def crop(self, lengths: torch.Tensor) -> None:
        """Forget what each row holds beyond `lengths` (B,), as after refused speculative tokens."""
        torch.minimum(self.lengths, lengths.to(self.lengths), out=self.lengths)
        self.longest = int(self.lengths.max())
        self.ragged = bool((self.lengths != self.longest).any())

    def repeated(self, rows: torch.Tensor, room: int) -> KVCache:
        """A new cache of these `rows` (R,), each as often as it is named, with room for `room` more tokens."""
        new = copy(self)
        new.capacity = self.longest + room
        new._stored = {}
        for name, tensor in self._stored.items():
            n_layers, _, _, *shape = tensor.shape
            stored = tensor.new_zeros(n_layers, len(rows), new.capacity, *shape)
            stored[:, :, : self.longest] = tensor[:, rows, : self.longest]
            new._stored[name] = stored
        new.tensors = {name: new._stored[name][..., : x.shape[-1]] for name, x in self.tensors.items()}
        new.lengths = self.lengths[rows]
        new._rows_B1 = torch.arange(len(rows), device=rows.device)[:, None]
        new.fixed, new.positions_of_keys = False, None
        return new

    @property
    def n_bytes(self) -> int:
        """Bytes of storage that the cache really occupies: `logical_bytes` and `padding_bytes`."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._stored.values())

    @property
    def logical_bytes(self) -> int:
        """Bytes of the declared entries of all tokens that fit."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @property
    def padding_bytes(self) -> int:
        """Bytes of the zeros that `AttentionConfig.stored_entries` puts between entries."""
        sizes = (
            (self._stored[name].numel() - x.numel()) * x.element_size() for name, x in self.tensors.items()
        )
        return sum(sizes)


class LayerCache:
    """One layer's tensors (B, capacity, *entry) during one forward."""

    def __init__(
        self,
        tensors: dict[str, torch.Tensor],
        rows_B1: torch.Tensor,
        positions_BT: torch.Tensor,
        n_read: int,
    ) -> None:
        self.tensors = tensors
        self.rows_B1 = rows_B1
        self.positions_BT = positions_BT
        self.n_read = n_read

    def append(self, new: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Write the new tokens (B, T, *entry) in place and return the tokens to read (B, M, *entry)."""
        for name, tensor in new.items():
            self.tensors[name][self.rows_B1, self.positions_BT] = tensor.detach().to(self.tensors[name].dtype)
        return self.read()

    def read(self) -> dict[str, torch.Tensor]:
        """The tokens to read, (B, M, *entry)."""
        return {name: tensor[:, : self.n_read] for name, tensor in self.tensors.items()}
