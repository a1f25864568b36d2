"""Does every attention variant learn, at the same number of parameters and the same tokens?

A check of the variants rather than a contest: one seed, a tiny model, 200 steps. A curve that stays high shows
a variant that is broken, or an initialization that starts too small to see anything; which one is better takes
more tokens and seeds than this.
"""

from dataclasses import replace

from sweeps.definition import Cell, Sweep
from t6_lightning.model.attention import AttentionConfig
from t6_lightning.model.attention.mfa import MFAConfig
from t6_lightning.model.attention.mha import MHAConfig
from t6_lightning.model.attention.mla import MLAConfig
from t6_lightning.model.budget import match
from t6_lightning.presets import load_net, model_presets

tiny = replace(load_net("quickstart"), vocab_size=1024, d_model=96, n_layers=2, context=128)
baselines: dict[str, AttentionConfig] = {
    "mha": MHAConfig(3, 32),
    "gqa": MHAConfig(4, 32, n_kv_heads=2),
    "mqa": MHAConfig(5, 32, n_kv_heads=1),
    "mla": MLAConfig(4, 32, rope_dim=16, kv_rank=48, q_rank=64),
    "mfa": MFAConfig(4, 32),
}
variants = {
    name.removeprefix("ablations/"): load_net(name)
    for name in model_presets()
    if name.startswith("ablations/")
}


def cell(name: str, attention: AttentionConfig, output_init: str = "zero", allow: str = "ffn") -> Cell:
    """The variant with plain TPA's parameters: by its heads if they may change, and by the FFN's width."""
    model = replace(tiny, attention=attention, output_init=output_init)
    model = match(model, to=tiny, allow=allow.split()).config
    return Cell(
        name,
        {
            "model.net.attention": model.to_dict()["attention"],
            "model.net.output_init": output_init,
            "model.net.ffn_hidden": model.ffn_width,
        },
    )


sweep = Sweep(
    hypothesis="""Every variant learns: its training loss falls well below that of the first steps, and all
        stay finite.""",
    stopping_rule="All cells run to the last step with one seed; nothing is called better.",
    max_steps=200,
    seeds=[0],
    cells=[
        cell("tpa", tiny.attention),
        *(cell(name, attention) for name, attention in baselines.items()),
        *(cell(name, net.attention, net.output_init, "heads ffn") for name, net in variants.items()),
    ],
    config="quickstart",
    overrides={
        "model.net.vocab_size": tiny.vocab_size,
        "model.net.d_model": tiny.d_model,
        "model.net.n_layers": tiny.n_layers,
        "model.net.context": tiny.context,
        "data.vocab_size": tiny.vocab_size,
        "data.val_tokens": 10_000,
        "cadence.tokens_per_step": 1024,
        "cadence.log_every_steps": 5,
    },
    target_parameters=tiny.n_parameters(),
)
