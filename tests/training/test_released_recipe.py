"""`recipe: released` trains as the released trainer does: beside straight-line code of it, step by step."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import straight_line_training as released
import torch
import yaml
from straight_line import Sizes
from straight_line_training import Settings, initial_bound, initial_state

from t6_lightning.__main__ import main
from t6_lightning.checkpoint.reference import convert, layer_weights
from t6_lightning.model.config import T6Config
from t6_lightning.model.rope import Rope
from t6_lightning.model.t6 import T6
from t6_lightning.presets import load_net
from t6_lightning.runs.folder import RunFolder
from t6_lightning.training.module import T6Module
from t6_lightning.training.optim import AdamWConfig
from t6_lightning.training.schedule import Cosine

STEPS, MICRO_BATCHES, BATCH, CONTEXT = 30, 2, 2, 16
TRAINING = Settings(peak=6e-3, last=3e-4, warmup=6, steps=STEPS)

# The paper's small models, made tiny; heads are odd where they can be.
TINY = {
    "tpa": Sizes("tpa", vocab_size=257, n_heads=5),
    "tpa-kvonly": Sizes("tpa-kvonly", vocab_size=257, n_heads=3),
    "mha": Sizes("mha", vocab_size=257, n_heads=3),
    "mqa": Sizes("gqa", vocab_size=257, n_heads=3, kv_heads=1),
    "gqa": Sizes("gqa", vocab_size=257, n_heads=6, kv_heads=2),
    "mla": Sizes("mla", vocab_size=257, n_heads=3),
}


def configuration(name: str, file: Path, **settings: Any) -> Path:
    """A file that extends the paper's small model of a mechanism, with the sizes of TINY."""
    s = TINY[name]
    attention: dict[str, Any] = {"n_heads": s.n_heads, "head_dim": s.head_dim}
    if name == "mla":
        attention |= {"kv_rank": s.kv_latent, "q_rank": s.q_latent, "rope_dim": s.rope_dim}
    net = {"vocab_size": s.vocab_size, "d_model": s.d_model, "n_layers": s.n_layers, "context": CONTEXT}
    model = {"net": net | {"attention": {"init_args": attention}}}
    file.write_text(yaml.safe_dump({"extends": f"paper/small-{name}", "model": model, **settings}))
    return file


def released_net(name: str, folder: Path) -> T6Config:
    return load_net(str(configuration(name, folder / f"{name}.yaml", recipe="released")))


# --- how weights start ---


@pytest.mark.parametrize("recipe", ["paper", "released"])
@pytest.mark.parametrize("name", TINY)
def test_every_matrix_starts_with_the_released_spread(name: str, recipe: str, tmp_path: Path) -> None:
    """Of full width, so that a standard deviation is known to a percent; the paper's W_Q is nn.Linear's default."""
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump({"extends": f"paper/small-{name}", "recipe": recipe}))
    net = load_net(str(file))
    c: Any = net.attention
    options = {"rank_q": c.rank_q, "rank": c.rank_k} if name.startswith("tpa") else {}
    options |= {"q_latent": c.q_rank, "kv_latent": c.kv_rank, "rope_dim": c.rope_dim} if name == "mla" else {}
    s = Sizes(TINY[name].mechanism, net.vocab_size, net.d_model, 1, c.n_heads, c.head_dim, **options)
    torch.manual_seed(0)
    model = T6(T6Config.from_dict(net.to_dict() | {"n_layers": 1, "vocab_size": 1024}))
    state = model.state_dict()
    checked = 0
    for theirs, weight in layer_weights(net).items():
        if len(weight.shape) < 2:
            assert (state[f"blocks.0.{weight.ours}"] == 1).all()
            continue
        bound = initial_bound(theirs, weight.shape, s)
        if recipe == "paper" and theirs == "attn.c_qkv.c_q.weight":
            bound = net.d_model**-0.5
        found = state[f"blocks.0.{weight.ours}"]
        assert found.abs().max() <= bound
        assert found.std().item() == pytest.approx(bound / 3**0.5, rel=0.02), theirs
        checked += 1
    assert checked >= 7
    embedding = state["embedding.weight"]
    assert embedding.std().item() == pytest.approx((3 * net.d_model) ** -0.5, rel=0.01)


def test_the_kvonly_matrix_of_q_has_the_released_standard_deviation(tmp_path: Path) -> None:
    for recipe, std in (("paper", 0.0209), ("released", 0.0304)):
        file = tmp_path / "kvonly.yaml"
        file.write_text(yaml.safe_dump({"extends": "paper/small-tpa-kvonly", "recipe": recipe}))
        net = load_net(str(file))
        layer = net.attention.build(net.d_model)
        q: Any = layer.q
        assert q.weight.std().item() == pytest.approx(std, rel=0.01)
        assert net.attention.initial_variances(net.d_model)["q"] == pytest.approx(768 * std**2, rel=0.02)


# --- how they are trained ---


class Losses(pl.Callback):
    """Keeps the mean loss and the gradient's norm of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module: Any = pl_module
        if trainer.global_step > len(self.losses):
            self.losses.append(float(module.step_loss))
            self.norms.append(float(module.grad_norm))


def random_batches(s: Sizes) -> torch.Tensor:
    """Token ids (STEPS, MICRO_BATCHES, BATCH, CONTEXT + 1), few of them often, so that there is something to learn."""
    generator = torch.Generator().manual_seed(3)
    uniform = torch.rand(STEPS, MICRO_BATCHES, BATCH, CONTEXT + 1, generator=generator)
    return (uniform**3 * s.vocab_size).long()


def train_ours(
    name: str, state: dict[str, torch.Tensor], folder: Path, precision: Any = "64-true", **unlike: Any
) -> Losses:
    """With a stock Trainer that accumulates, and the released settings by hand; `unlike`: some of them otherwise."""
    s, t = TINY[name], TRAINING
    net = unlike.pop("net", released_net(name, folder))
    from_zero = unlike.pop("warmup_from_zero", True)
    schedule = Cosine(warmup_steps=t.warmup, min_factor=t.last / t.peak, warmup_from_zero=from_zero)
    summed = unlike.pop("summed_losses", None)
    module = T6Module(net, AdamWConfig(lr=t.peak), schedule, summed_losses=summed)
    module.start_from(convert(state, net))
    ids = random_batches(s).flatten(0, 1)
    windows = [{"tokens": batch[:, :-1], "targets": batch[:, 1:]} for batch in ids]
    found = Losses()
    options: dict[str, Any] = {"max_steps": STEPS, "accumulate_grad_batches": MICRO_BATCHES}
    options |= {"gradient_clip_val": t.clip, "precision": precision, "accelerator": "cpu", "logger": False}
    options |= {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(callbacks=[found], default_root_dir=folder, **options)
    trainer.fit(module, torch.utils.data.DataLoader(windows, batch_size=None))  # pyright: ignore[reportArgumentType]
    assert len(found.losses) == STEPS
    return found


def train_straight(name: str, state: dict[str, torch.Tensor]) -> tuple[list[float], list[float]]:
    steps = [[(ids[:, :-1], ids[:, 1:]) for ids in step] for step in random_batches(TINY[name])]
    return released.train(state, TINY[name], steps, TRAINING)


def farthest(some: list[float], others: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("name", TINY)
def test_thirty_losses_are_those_of_straight_line_code(name: str, tmp_path: Path) -> None:
    state = initial_state(TINY[name], dtype=torch.float64)
    expected, norms = train_straight(name, state)
    found = train_ours(name, state, tmp_path)
    assert sum(norm > TRAINING.clip for norm in norms) > STEPS / 2, "clipping acts"
    assert expected[0] - expected[-1] > 0.5, "it learns"
    assert farthest(found.losses, expected) <= 1e-9
    assert found.norms == pytest.approx(norms, rel=1e-9)
    print(f"\n{name}: largest difference of {STEPS} losses in float64 {farthest(found.losses, expected):.1e}")


def test_in_float32_the_losses_stay_near(tmp_path: Path) -> None:
    """AdamW magnifies rounding: the figure is reported, and bounds nothing that matters."""
    state = initial_state(TINY["mqa"])
    found = farthest(train_ours("mqa", state, tmp_path, "32-true").losses, train_straight("mqa", state)[0])
    print(f"\nmqa: largest difference of {STEPS} losses in float32 {found:.1e}")
    assert found < 1e-3


@pytest.mark.parametrize("setting", ["summed_losses", "warmup_from_zero", "tables"])
def test_each_setting_of_the_recipe_counts(setting: str, tmp_path: Path) -> None:
    """What the comparison above is worth: without any one of them the losses are others."""
    net = released_net("tpa", tmp_path)
    exact: Any = dataclasses.replace(net.attention, rope=Rope())  # pyright: ignore[reportArgumentType]
    unlike: dict[str, Any] = {
        "summed_losses": {"summed_losses": 1},
        "warmup_from_zero": {"warmup_from_zero": False},
        "tables": {"net": dataclasses.replace(net, attention=exact)},
    }[setting]
    state = initial_state(TINY["tpa"], dtype=torch.float64)
    other = train_ours("tpa", state, tmp_path, **unlike)
    assert farthest(other.losses, train_straight("tpa", state)[0]) > 1e-7


# --- through the command line ---


class KeepBatches(Losses):
    """Keeps what was trained on too; read after the command that built it."""

    built: ClassVar[list[KeepBatches]] = []

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.built.append(self)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append((batch["tokens"].clone(), batch["targets"].clone()))


def test_fit_with_the_recipe_trains_as_straight_line_code(home: Path, tmp_path: Path) -> None:
    """Import what the released code starts with, and `fit --recipe released` on a text."""
    micro_batches = 5  # as the preset of the small size says
    s, t = TINY["tpa-kvonly"], Settings(peak=6e-3, last=3e-4, warmup=6, steps=STEPS)
    state = initial_state(s)
    torch.save(state, tmp_path / "start.pt")
    file = configuration("tpa-kvonly", tmp_path / "tiny.yaml")
    first = tmp_path / "start.ckpt"
    assert main(["import", str(tmp_path / "start.pt"), "--config", str(file), "--output", str(first)]) == 0
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i * i} is the square of {i}, and {i**3} its cube.\n" for i in range(900)))
    KeepBatches.built.clear()
    arguments = [
        *("--config", str(file), "--recipe", "released", "--init_from", str(first), "--run", "released"),
        *("--data", "TextFiles", "--data.files", str(text), "--data.txt_documents", "line"),
        *("--data.tokenizer", "bytes", "--data.batch_size", str(BATCH), "--data.val_tokens", "200"),
        *("--cadence.tokens_per_step", str(micro_batches * BATCH * CONTEXT)),
        *(
            "--trainer.precision",
            "64-true",
            "--trainer.accelerator",
            "cpu",
            "--trainer.max_steps",
            str(STEPS),
        ),
        *("--model.optimizer.lr", str(t.peak), "--model.schedule.warmup_steps", str(t.warmup)),
        *("--trainer.callbacks+=" + f"{__name__}.KeepBatches",),
    ]
    assert main(["fit", *arguments]) == 0
    (found,) = KeepBatches.built
    assert len(found.batches) == STEPS * micro_batches
    steps = [found.batches[i : i + micro_batches] for i in range(0, len(found.batches), micro_batches)]
    wide = {name: value.double() for name, value in state.items()}
    expected, norms = released.train(wide, s, steps, t)
    assert sum(norm > t.clip for norm in norms) > STEPS / 2
    assert farthest(found.losses, expected) <= 1e-9
    settings = yaml.safe_load(RunFolder("released").config_file.read_text())
    assert (settings["recipe"], settings["model"]["summed_losses"]) == ("released", micro_batches)
