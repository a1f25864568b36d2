"""MHA, GQA and MLA against transformers' Llama, DeepSeek-V2 and DeepSeek-V3: random weights, full logits.

The other model keeps its weights' names and its conventions (it turns the other way, DeepSeek pairs neighbours);
ours takes both by name map and config values, nothing is permuted.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import DeepseekV2Config, DeepseekV3Config, LlamaConfig, PreTrainedModel

from t6_lightning.model.attention import AttentionConfig
from t6_lightning.model.attention.mha import MHAConfig
from t6_lightning.model.attention.mla import MLAConfig
from t6_lightning.model.config import T6Config
from t6_lightning.model.generate import generate
from t6_lightning.model.norm import NORM_EPS
from t6_lightning.model.rope import Rope
from t6_lightning.model.t6 import T6

VOCABULARY, WIDTH, LAYERS, CONTEXT = 101, 105, 3, 64
HIDDEN = 8 * WIDTH // 3

EMBEDDING = {"model.embed_tokens.weight": "embedding.weight"}
LAYER = {
    "self_attn.o_proj.weight": "attention.output.weight",
    "mlp.gate_proj.weight": "ffn.gate.weight",
    "mlp.up_proj.weight": "ffn.up.weight",
    "mlp.down_proj.weight": "ffn.down.weight",
}
MHA = {f"self_attn.{part}_proj.weight": f"attention.{part}.weight" for part in "qkv"}
MLA = {
    "self_attn.q_a_proj.weight": "attention.q_down.weight",
    "self_attn.q_a_layernorm.weight": "attention.q_norm.weight",
    "self_attn.q_b_proj.weight": "attention.q_up.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attention.kv_down.weight",
    "self_attn.kv_a_layernorm.weight": "attention.kv_norm.weight",
    "self_attn.kv_b_proj.weight": "attention.kv_up.weight",
}
# Ours have no weight in these: they are 1 there.
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight")

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": NORM_EPS,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "attn_implementation": "sdpa",
}


def llama(heads: int, groups: int, head_dim: int) -> tuple[PreTrainedModel, AttentionConfig]:
    config = LlamaConfig(
        **COMMON,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        attention_bias=False,
    )
    ours = MHAConfig(heads, head_dim, n_kv_heads=groups, rope=Rope(direction="llama"))
    return transformers.LlamaForCausalLM(config), ours


MLA_SIZES = {
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 6,
    "v_head_dim": 12,
}


def deepseek(version: int, heads: int) -> tuple[PreTrainedModel, AttentionConfig]:
    names = {"num_attention_heads": heads, "num_key_value_heads": heads, "first_k_dense_replace": LAYERS}
    ours = MLAConfig(
        heads, 12, rope_dim=6, kv_rank=20, q_rank=28, rope=Rope(pairing="interleaved", direction="llama")
    )
    if version == 2:
        config = DeepseekV2Config(**COMMON, **MLA_SIZES, **names)
        return transformers.DeepseekV2ForCausalLM(config), ours
    config = DeepseekV3Config(**COMMON, **MLA_SIZES, **names, num_mtp_layers=0)
    return transformers.DeepseekV3ForCausalLM(config), ours


MODELS = {
    "llama-mha-h5": lambda: llama(5, 5, 16),
    "llama-gqa-h15-g3": lambda: llama(15, 3, 8),
    "llama-mqa-h7": lambda: llama(7, 1, 16),
    "deepseek-v2-h5": lambda: deepseek(2, 5),
    "deepseek-v3-h3": lambda: deepseek(3, 3),
    "deepseek-v3-h7": lambda: deepseek(3, 7),
}


def randomized(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(NORMS):
                value.fill_(1)
            elif value.ndim == 1:
                value.copy_(1 + 0.3 * torch.randn(value.shape, generator=generator))
            else:
                value.copy_(torch.randn(value.shape, generator=generator) * 1.5 / value.shape[1] ** 0.5)


def with_weights_of(theirs: PreTrainedModel, attention: AttentionConfig) -> T6:
    """Our model with the other's weights; every one of them is used, and every one of ours is set."""
    config = T6Config(VOCABULARY, WIDTH, LAYERS, CONTEXT, attention, ffn_hidden=HIDDEN)
    names = LAYER | (MLA if isinstance(attention, MLAConfig) else MHA)
    every = EMBEDDING | {
        f"model.layers.{i}.{there}": f"blocks.{i}.{here}"
        for i in range(LAYERS)
        for there, here in names.items()
    }
    parameters = dict(theirs.named_parameters())
    assert {name for name in parameters if not name.endswith(NORMS)} == set(every)
    model = T6(config)
    model.load_state_dict({here: parameters[there].detach() for there, here in every.items()})
    return model.eval()


def in_double(model: PreTrainedModel) -> None:
    """Let the other model compute in float64: its RMSNorm goes to float32 whatever comes in."""
    model.double()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                norm: Any = nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(parent, name, norm)


@pytest.fixture(params=MODELS, ids=list(MODELS))
def pair(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, T6]:
    theirs, attention = MODELS[request.param]()
    randomized(theirs)
    return theirs.eval(), with_weights_of(theirs, attention)


def tokens(length: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_logits_in_float32(pair: tuple[PreTrainedModel, T6]) -> None:
    theirs, ours = pair
    expected = theirs(tokens(37)).logits
    assert expected.std() > 1
    torch.testing.assert_close(ours(tokens(37)), expected, rtol=0, atol=1e-5 * expected.std().item())


@torch.no_grad()
def test_logits_in_float64(pair: tuple[PreTrainedModel, T6], monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = pair
    in_double(theirs)
    # Theirs takes angles, and ours in this test, in float32; DeepSeek-V2 turns queries and keys in float32 too.
    attention: Any = ours.config.attention
    rope = dataclasses.replace(attention.rope, tables="reference")
    model = T6(dataclasses.replace(ours.config, attention=dataclasses.replace(attention, rope=rope)))
    model.load_state_dict(ours.state_dict())
    monkeypatch.setattr(Rope, "_rounded", lambda rope, *tables: tables)
    tolerance = 4e-6 if theirs.config.model_type == "deepseek_v2" else 1e-12
    expected = theirs(tokens(37)).logits
    torch.testing.assert_close(model.double()(tokens(37)), expected, rtol=0, atol=tolerance)


@torch.no_grad()
def test_the_other_convention_would_show(pair: tuple[PreTrainedModel, T6]) -> None:
    """The comparisons above see RoPE's direction and pairing."""
    theirs, ours = pair
    attention: Any = ours.config.attention
    other = "interleaved" if attention.rope.pairing == "halves" else "halves"
    for change in ({"direction": "reference"}, {"pairing": other}):
        rope = dataclasses.replace(attention.rope, **change)
        model = T6(dataclasses.replace(ours.config, attention=dataclasses.replace(attention, rope=rope)))
        model.load_state_dict(ours.state_dict())
        assert (model(tokens(37)) - theirs(tokens(37)).logits).abs().max() > 0.05, change


@torch.no_grad()
def test_greedy_decoding_with_both_caches(pair: tuple[PreTrainedModel, T6]) -> None:
    theirs, ours = pair
    prompt = tokens(7)
    expected = theirs.generate(prompt, max_new_tokens=20, do_sample=False, use_cache=True)[:, 7:]
    actual = torch.stack(list(generate(ours, prompt, 20, temperature=0)), dim=1)
    assert actual.tolist() == expected.tolist()
    assert len(expected.unique()) > 5, "no loop of a few tokens"
