"""The key/value cache: one small generic store, built from what each attention config declares.

Shape suffixes: L layers, B batch, T tokens, M cached tokens.
"""

from __future__ import annotations

import torch


class KVCache:
    """Preallocated tensors (L, B, capacity, *entry), one for each entry that the attention config declares.

    A forward appends T tokens to every row; rows may have different lengths. `T6.forward` moves `lengths`
    on once all layers have appended.

    Args:
        entries: name and shape of what one layer keeps for one token (`AttentionConfig.cache_entries`).
        n_layers, batch, capacity: layers, rows and tokens per row to hold.
        dtype, device: of the tensors.
    """

    def __init__(
        self,
        entries: dict[str, tuple[int, ...]],
        n_layers: int,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.capacity = capacity
        self.tensors = {
            name: torch.zeros(n_layers, batch, capacity, *shape, dtype=dtype, device=device)
            for name, shape in entries.items()
        }
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        # Kept beside `lengths` so that sizes are known without waiting for the device.
        self.longest = 0
        self.ragged = False

    def positions(self, n_tokens: int) -> torch.Tensor:
        """Positions (B, T) that the next T tokens of each row take.

        Raises:
            ValueError: the cache is full.
        """
        if self.longest + n_tokens > self.capacity:
            raise ValueError(
                f"the cache holds {self.capacity} tokens a row: {n_tokens} more after {self.longest} do not fit"
            )
        return self.lengths[:, None] + torch.arange(n_tokens, device=self.lengths.device)

    def layer(self, index: int, positions: torch.Tensor) -> LayerCache:
        """The part of layer `index`, ready to take tokens at `positions` (B, T)."""
        tensors = {name: tensor[index] for name, tensor in self.tensors.items()}
        return LayerCache(tensors, positions, self.longest + positions.shape[1])

    def advance(self, n_tokens: int) -> None:
        """Count the T tokens that every layer has appended."""
        self.lengths += n_tokens
        self.longest += n_tokens

    def crop(self, lengths: torch.Tensor) -> None:
        """Forget what each row holds beyond `lengths` (B,), as after refused speculative tokens."""
        self.lengths = torch.minimum(self.lengths, lengths.to(self.lengths))
        self.longest = int(self.lengths.max())
        self.ragged = bool((self.lengths != self.longest).any())

    @property
    def n_bytes(self) -> int:
        """Bytes of storage that the cache really occupies."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())


class LayerCache:
    """One layer's tensors (B, capacity, *entry) during one forward."""

    def __init__(self, tensors: dict[str, torch.Tensor], positions_BT: torch.Tensor, n_used: int) -> None:
        self.tensors = tensors
        self.positions_BT = positions_BT
        self.n_used = n_used
        self.rows = torch.arange(len(positions_BT), device=positions_BT.device)[:, None]

    def append(self, new: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Write the new tokens (B, T, *entry) in place and return all tokens so far (B, M, *entry)."""
        for name, tensor in new.items():
            self.tensors[name][self.rows, self.positions_BT] = tensor.detach().to(self.tensors[name].dtype)
        return {name: tensor[:, : self.n_used] for name, tensor in self.tensors.items()}
