"""Activation checkpointing keeps less for the backward pass and changes no gradient."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from t6_lightning.model.attention.mha import MHAConfig
from t6_lightning.model.attention.tpa import TPAConfig
from t6_lightning.model.config import T6Config
from t6_lightning.model.t6 import T6
from t6_lightning.training import recompute


def train(choice: recompute.Recompute, attention: object) -> tuple[dict[str, torch.Tensor], int, int]:
    """Gradients of one batch with dropout, bytes that autograd kept for the backward pass, FLOPs of products."""
    torch.manual_seed(0)
    config = T6Config(vocab_size=64, d_model=32, n_layers=3, context=48, dropout=0.1, attention=attention)  # pyright: ignore
    net = T6(config)
    recompute.apply(net.blocks, choice)
    tokens = torch.randint(64, (2, 48))
    documents = torch.arange(48).div(20, rounding_mode="floor").expand(2, 48)
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(1)
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = net.loss(tokens, tokens.roll(-1, 1), documents)
        kept = sum(storages.values())
        loss.backward()
    flops = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}, kept, flops


@pytest.mark.parametrize("attention", [TPAConfig(n_heads=3, head_dim=16), MHAConfig(n_heads=2, head_dim=16)])
def test_gradients_stay_and_memory_falls(attention: object) -> None:
    expected, everything, products = train("none", attention)
    bytes_kept, flops = {}, {}
    for choice in ("selective", "full"):
        gradients, bytes_kept[choice], flops[choice] = train(choice, attention)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert torch.equal(gradient, expected[name]), (choice, name)
    assert bytes_kept["full"] < everything / 2
    assert flops["selective"] == products, "no product with weights is computed twice"
    assert flops["full"] > products


def test_weights_keep_their_names_and_generation_its_cache() -> None:
    net = T6(T6Config(vocab_size=64, d_model=32, n_layers=2, context=16))
    names = list(net.state_dict())
    tokens = torch.randint(64, (1, 8))
    expected = net(tokens)
    recompute.apply(net.blocks, "full")
    assert list(net.state_dict()) == names
    with torch.no_grad():
        cache = net.new_cache(1, 8)
        got = torch.cat([net(tokens[:, :5], cache=cache), net(tokens[:, 5:], cache=cache)], dim=1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
