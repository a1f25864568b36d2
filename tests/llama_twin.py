"""Multi-head attention of ours and transformers' Llama with the same random weights."""

from __future__ import annotations

import dataclasses

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from t6_lightning.model.attention.mha import MHAConfig
from t6_lightning.model.config import T6Config
from t6_lightning.model.norm import NORM_EPS
from t6_lightning.model.t6 import T6

NAMES = {
    "self_attn.q_proj": "attention.q",
    "self_attn.k_proj": "attention.k",
    "self_attn.v_proj": "attention.v",
    "self_attn.o_proj": "attention.output",
    "mlp.gate_proj": "ffn.gate",
    "mlp.up_proj": "ffn.up",
    "mlp.down_proj": "ffn.down",
}


def llama_twin(config: T6Config, eot: int) -> tuple[T6, LlamaForCausalLM]:
    """Both in evaluation mode, float32; the attention of `config` must be MHA with RoPE in Llama's direction."""
    attention = config.attention
    assert isinstance(attention, MHAConfig)
    assert attention.rope.direction == "llama"
    ours = T6(dataclasses.replace(config, dropout=0.0)).eval()
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=ours.blocks[0].ffn.up.weight.shape[0],  # pyright: ignore
            num_hidden_layers=config.n_layers,
            num_attention_heads=attention.n_heads,
            head_dim=attention.head_dim,
            max_position_embeddings=config.context,
            rms_norm_eps=NORM_EPS,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=eot,
            attn_implementation="sdpa",
        )
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in theirs.parameters():
            if value.ndim == 2:
                value.copy_(torch.randn(value.shape, generator=generator) * 1.5 / value.shape[1] ** 0.5)
    state = theirs.state_dict()
    weights = {"embedding.weight": state["model.embed_tokens.weight"]} | {
        f"blocks.{i}.{here}.weight": state[f"model.layers.{i}.{there}.weight"]
        for i in range(config.n_layers)
        for there, here in NAMES.items()
    }
    ours.load_state_dict(weights)
    return ours, theirs
