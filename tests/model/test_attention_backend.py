"""attention_backend and attention_saves: the same numbers by other means, and refusals with their reason.

Shape suffixes: B batch, T tokens, H heads, D head dimension.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from interpreter import needs_interpreter

from t6_lightning.__main__ import main
from t6_lightning.common.errors import BadInput
from t6_lightning.model.attention.mha import MHAConfig
from t6_lightning.model.attention.tpa import TPAConfig
from t6_lightning.model.backend import check_backend
from t6_lightning.model.config import T6Config
from t6_lightning.model.t6 import T6
from t6_lightning.training.module import T6Module
from t6_lightning.training.optim import AdamWConfig

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "KV only": {"factorize_q": False},
    "shared b, shifted": {"shared_b": True, "kv_shift": True},
    "order 3": {"order": 3, "feature_dims": (8, 4)},
    "learned a, mixture": {"noncontextual_a": "k", "nonlinearity": "softmax_heads"},
    "product": {"rope_at": "product"},
}
SHAPES = {(2, 4, 3, 32), (2, 3, 4, 32)}


def net(backend: str = "auto", saves: str = "qkv", **attention: Any) -> T6Config:
    return T6Config(
        vocab_size=97,
        d_model=32,
        n_layers=1,
        context=16,
        attention=TPAConfig(3, 32, **attention),
        output_init="scaled",
        attention_backend=backend,  # pyright: ignore[reportArgumentType]
        attention_saves=saves,  # pyright: ignore[reportArgumentType]
    )


def gradients(
    config: T6Config, documents: torch.Tensor | None = None, compiled: bool = False
) -> tuple[torch.Tensor, int]:
    """Of all weights, and how many tensors of the size of Q, K or V were saved for them."""
    torch.manual_seed(0)
    model = T6(config)
    tokens = torch.randint(97, (2, 4))
    if compiled:
        torch._dynamo.reset()
        for block in model.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
    saved = [0]

    def count(tensor: torch.Tensor) -> torch.Tensor:
        saved[0] += tuple(tensor.shape) in SHAPES
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = model.loss(tokens, tokens.roll(-1, 1), documents)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), saved[0]


@needs_interpreter
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("backend", "saves"), [("triton", "qkv"), ("triton", "factors"), ("sdpa", "factors")]
)
def test_every_backend_gives_the_plain_gradients(backend, saves, variant):
    expected, _ = gradients(net("plain", **VARIANTS[variant]))
    got, _ = gradients(net(backend, saves, **VARIANTS[variant]))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@needs_interpreter
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_saved_are_factors_alone(compiled):
    documents = torch.tensor([[0, 1, 1, 1], [2] * 4])
    expected, kept = gradients(net("triton"), documents, compiled)
    got, left = gradients(net("triton", "factors"), documents, compiled)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    # Q, K, V and attention's output; of these the output alone, which eager mode keeps outside the hooks.
    assert kept >= 4
    assert left <= 1


@pytest.mark.parametrize("backend", ["plain", "sdpa"])
def test_generation_follows_the_backend(backend, monkeypatch):
    asked = []
    from t6_lightning.model.attention.tpa import layer

    decode = layer.decode
    monkeypatch.setattr(layer, "decode", lambda *a, **k: asked.append(k["backend"]) or decode(*a, **k))
    model = T6(net(backend)).eval()
    cache = model.new_cache(1, 8)
    with torch.no_grad():
        for tokens in ([[1, 2, 3]], [[4]]):
            model(torch.tensor(tokens), cache=cache)
    assert asked == [backend]


@pytest.mark.parametrize("backend", ["plain", "sdpa"])
def test_mha_generates_by_every_backend(backend):
    torch.manual_seed(0)
    config = T6Config(97, 32, 1, 16, MHAConfig(2, 16), output_init="scaled")
    model = T6(config).eval()
    named = T6(dataclasses.replace(config, attention_backend=backend)).eval()
    named.load_state_dict(model.state_dict())
    tokens = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        expected = model(tokens)
        cache = named.new_cache(1, 8)
        got = torch.cat([named(tokens[:, :3], cache=cache), named(tokens[:, 3:], cache=cache)], dim=1)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("attention", "why"),
    [(MHAConfig(2, 32), "mha has no factors"), (TPAConfig(2, 32, rank_k=65), "ranks up to 64, not 65")],
)
def test_triton_is_refused_for_what_it_cannot_run(attention, why):
    with pytest.raises(BadInput, match=f"attention_backend='triton' is not possible: .*{why}"):
        T6Config(attention=attention, attention_backend="triton")


def test_other_names_and_savings_that_do_not_exist_are_refused():
    with pytest.raises(
        BadInput, match="attention_backend='cuda' is not possible: choose one of auto, triton"
    ):
        T6Config(attention_backend="cuda")  # pyright: ignore[reportArgumentType]
    with pytest.raises(BadInput, match="attention_saves='factors' is not possible: mha has none"):
        T6Config(attention=MHAConfig(2, 32), attention_saves="factors")


def test_a_device_without_the_backend_is_refused_before_any_work(home, capsys):
    with pytest.raises(BadInput, match="it needs an NVIDIA GPU"):
        check_backend(net("triton"), torch.device("cpu"))
    check_backend(net("auto"), torch.device("cpu"))
    arguments = [
        "fit",
        "--trainer.accelerator",
        "cpu",
        "--model.net.attention_backend",
        "triton",
        "--run",
        "no",
    ]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "model.net.attention_backend='triton' is not possible: it needs an NVIDIA GPU" in error
    assert not (home / "runs" / "no").exists()


def test_checkpoints_do_not_fix_the_backend():
    config = net("plain", "factors")
    stored = T6Module(config, AdamWConfig()).hparams["net"]
    assert {"attention_backend", "attention_saves"}.isdisjoint(stored)
    assert T6Config.from_dict(stored) == dataclasses.replace(
        config, attention_backend="auto", attention_saves="qkv"
    )
