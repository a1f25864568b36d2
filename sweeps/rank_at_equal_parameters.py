"""Does the rank of K and V matter when the number of parameters stays the same?

A smaller rank makes a smaller cache: (R_K + R_V)(h + d_h) numbers per token and layer. It also frees
parameters, which go into more heads here, so that no cell wins by being the larger model.
"""

from dataclasses import replace

from sweeps.definition import Cell, Sweep
from t6_lightning.model.attention.tpa import TPAConfig
from t6_lightning.model.budget import match
from t6_lightning.presets import load_net

PRESET = "quickstart"
MAX_STEPS = 60  # the budget of a trial: enough to see the method work, too few to believe a small difference

base = load_net(PRESET)


def cell(rank: int) -> Cell:
    """The preset with R_K = R_V = rank, and as many heads as give it the preset's parameters."""
    assert isinstance(base.attention, TPAConfig)
    ranked = replace(base, attention=replace(base.attention, rank_k=rank, rank_v=rank))
    return Cell(
        f"rank{rank}",
        {
            "model.net.attention.rank_k": rank,
            "model.net.attention.rank_v": rank,
            "model.net.attention.n_heads": match(ranked, to=base).config.attention.n_heads,
        },
    )


sweep = Sweep(
    hypothesis="""At equal parameters, rank 2 loses nothing against rank 4, as in the paper's models;
        rank 1 loses a little, although it has more heads.""",
    stopping_rule="""Every cell is trained with every seed to the last step, none is stopped early.
        A cell counts as better only where the paired difference over seeds is significant.""",
    max_steps=MAX_STEPS,
    seeds=[0, 1],
    cells=[cell(rank) for rank in (1, 2, 4)],
    config=PRESET,
    target_parameters=base.n_parameters(),
)
