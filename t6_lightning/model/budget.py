"""Fair comparisons: change a variant's integers until it costs what another model costs.

    match(load_net("paper/small-gqa"), load_net("paper/small-tpa"), "cache", allow=["kv_heads", "head_dim"])

The caller names what may change. Of all models within 0.1 % of the target the one that changes least is taken: the
smallest sum of |ln(after / before)|, in which the head dimension counts twice and the FFN's width ten times, so that
it gives or takes only what the others leave.

Costs are formulas, so the search is plain. Small integers (ranks, key/value heads, head dimensions) are enumerated,
least change first; heads, d_c of MLA and the FFN's width are then solved for, as costs grow with them.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import floor, log, prod
from typing import Any

from t6_lightning.common.errors import BadInput, require
from t6_lightning.model.config import T6Config

CACHE_BYTES = 2  # bf16
TOLERANCE = 1e-3

COSTS: dict[str, Callable[[T6Config], float]] = {
    "parameters": T6Config.n_parameters,
    "cache": lambda config: config.cache_bytes_per_token(CACHE_BYTES),
    "flops": T6Config.training_flops,
}
"""What can be matched: parameters, cache bytes per token in bf16, model FLOPs per training token at full context."""

ALLOWED = {
    "heads": ("n_heads",),
    "kv_heads": ("n_kv_heads",),
    "ranks": ("rank_q", "rank_k", "rank_v"),
    "head_dim": ("head_dim",),
    "ffn": ("ffn_hidden",),
    "kv_rank": ("kv_rank",),
}
"""What may change: the fields of the attention (of the model: ffn_hidden) behind each name."""

# Enumerated, and up to where unless the model is beyond; all other fields are solved for, coarsest first.
HIGHEST = {"rank_q": 8, "rank_k": 8, "rank_v": 8, "n_kv_heads": 64, "head_dim": 512}
SOLVED = ("n_heads", "kv_rank", "ffn_hidden")
WEIGHTS = {"head_dim": 2, "ffn_hidden": 10}
MOST_COMBINATIONS = 1_000  # under a second; what comes later changes the model beyond recognition


@dataclass(frozen=True)
class Match:
    """A model that was brought to a budget.

    Attributes:
        config: the model as it is now.
        changed: options of `fit`, such as "model.net.attention.n_heads", before and after.
        gap: (cost - target) / target; above 0 it costs more.
    """

    config: T6Config
    changed: dict[str, tuple[Any, Any]]
    gap: float


def _has(config: T6Config, field: str) -> bool:
    attention = config.attention
    if field == "rank_q" and not getattr(attention, "factorize_q", True):
        return False  # it has no effect
    if field in _tied(config):
        return False  # rank_k stands for it
    return field == "ffn_hidden" or hasattr(attention, field)


def _tied(config: T6Config) -> tuple[str, ...]:
    """Ranks that must equal rank_k, as factors are shared."""
    if getattr(config.attention, "shared_c", False):
        return ("rank_q", "rank_v")
    return ("rank_v",) if getattr(config.attention, "shared_b", False) else ()


def _get(config: T6Config, field: str) -> int:
    if field == "ffn_hidden":
        return config.ffn_width
    value = getattr(config.attention, field)
    return config.attention.n_heads if value is None else value  # n_kv_heads of MHA


def _step(config: T6Config, field: str) -> int:
    if field == "n_heads":
        return getattr(config.attention, "n_kv_heads", None) or 1
    return 2 if field == "head_dim" else 1


def _with(config: T6Config, **values: int) -> T6Config | None:
    """`config` with other fields; None where the attention refuses them."""
    if "head_dim" in values and getattr(config.attention, "order", 2) > 2:
        # The first feature factor takes it: the others keep their sizes.
        further = config.attention.feature_dims[1:]  # pyright: ignore[reportAttributeAccessIssue]
        values["feature_dims"] = (values["head_dim"] // prod(further), *further)  # pyright: ignore[reportArgumentType]
    if "rank_k" in values:
        values |= dict.fromkeys(_tied(config), values["rank_k"])
    net = {"ffn_hidden": values.pop("ffn_hidden")} if "ffn_hidden" in values else {}
    try:
        attention: Any = config.attention
        if values:
            attention = dataclasses.replace(attention, **values)
        return dataclasses.replace(config, attention=attention, **net)
    except BadInput:
        return None


def _change(field: str, before: int, after: int) -> float:
    return WEIGHTS.get(field, 1) * abs(log(after / before))


def _changes(before: T6Config, after: T6Config) -> dict[str, tuple[Any, Any]]:
    """Settings that differ."""
    fields = dataclasses.fields(before.attention)  # pyright: ignore[reportArgumentType]
    pairs = {
        f"model.net.attention.{f.name}": (getattr(before.attention, f.name), getattr(after.attention, f.name))
        for f in fields
    }
    pairs["model.net.ffn_hidden"] = before.ffn_width, after.ffn_width
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


class _Search:
    """One search: the target, what may change, and the best so far."""

    def __init__(self, config: T6Config, target: float, what: str, fields: Sequence[str]) -> None:
        self.config, self.target, self.cost, self.fields = config, target, COSTS[what], fields
        self.before = {field: _get(config, field) for field in (*fields, "n_heads")}
        self.best: tuple[tuple[float, float, float], T6Config] | None = None
        self.below = False
        self.above = False

    def change(self, config: T6Config) -> float:
        return sum(_change(field, before, _get(config, field)) for field, before in self.before.items())

    def combinations(self, fields: Sequence[str]) -> Iterator[tuple[float, dict[str, int]]]:
        """Values of enumerated fields, with how much they change, least first."""
        choices: dict[str, list[tuple[float, int]]] = {}
        for field in fields:
            now = self.before[field]
            step = 2 if field == "head_dim" else 1
            values = {now, *range(step, max(HIGHEST[field], 2 * now) + 1, step)}
            choices[field] = sorted((_change(field, now, value), value) for value in values)
        lists = list(choices.values())
        # Best first: each combination opens those that are one further in one list.
        start: tuple[int, ...] = (0,) * len(lists)
        queue: list[tuple[float, tuple[int, ...]]] = [(0.0, start)]
        known: set[tuple[int, ...]] = {start}
        while queue:
            change, places = heapq.heappop(queue)
            chosen = [values[place] for values, place in zip(lists, places, strict=True)]
            yield change, {field: value for field, (_, value) in zip(choices, chosen, strict=True)}
            for i, values in enumerate(lists):
                further = (*places[:i], places[i] + 1, *places[i + 1 :])
                if further[i] < len(values) and further not in known:
                    known.add(further)
                    total = sum(v[place][0] for v, place in zip(lists, further, strict=True))
                    heapq.heappush(queue, (total, further))

    def start(self, values: dict[str, int]) -> T6Config | None:
        """The model with the enumerated values; heads follow to a multiple of the key/value heads."""
        values = {name: value for name, value in values.items() if value != self.before[name]}
        groups = values.get("n_kv_heads")
        if groups is not None and "n_heads" in self.fields:
            values["n_heads"] = max(1, round(self.before["n_heads"] / groups)) * groups
        return _with(self.config, **values) if values else self.config

    def bracket(self, config: T6Config, field: str) -> list[T6Config]:
        """The models just below and just above the target, or at the lowest value, in one field."""
        step = _step(config, field)
        value = _get(config, field)
        pair: list[T6Config] = []
        for _ in range(20):
            here, next_ = _with(config, **{field: value}), _with(config, **{field: value + step})
            if here is None or next_ is None:
                return []
            pair, low, high = [here, next_], self.cost(here), self.cost(next_)
            if high <= low:
                return []  # without effect
            if low <= self.target <= high or (value == step and low >= self.target):
                return pair
            value = max(step, value + step * floor((self.target - low) / (high - low)))
        return pair

    def refined(self, config: T6Config, fields: Sequence[str]) -> Iterator[tuple[float, T6Config]]:
        """`config`, and what solving for some of `fields` in turn makes of it, each with its gap."""
        gap = (self.cost(config) - self.target) / self.target
        yield gap, config
        if not fields or abs(gap) <= TOLERANCE:
            return
        first, *rest = fields
        for solved in self.bracket(config, first):
            yield from self.refined(solved, rest)
        if rest:
            yield from self.refined(config, rest)

    def run(self) -> None:
        """Find `best`."""
        enumerated = [field for field in self.fields if field in HIGHEST]
        solved = [field for field in SOLVED if field in self.fields]
        self.search(enumerated, solved)
        if "head_dim" in enumerated and (self.best is None or self.best[0][0] > 0):
            # The target may lie beyond the combinations that change least: solve for head dimensions too.
            self.search([field for field in enumerated if field != "head_dim"], ["head_dim", *solved])

    def search(self, enumerated: Sequence[str], solved: Sequence[str]) -> None:
        """Try values of the enumerated fields, solving for others."""
        for change, values in itertools.islice(self.combinations(enumerated), MOST_COMBINATIONS):
            if self.best is not None and self.best[0][0] == 0 and self.best[0][1] <= change:
                break  # within tolerance, and whatever comes changes more
            start = self.start(values)
            for gap, candidate in self.refined(start, solved) if start is not None else ():
                self.below |= gap <= 0
                self.above |= gap >= 0
                score = (abs(gap) if abs(gap) > TOLERANCE else 0.0, self.change(candidate), abs(gap))
                if self.best is None or score < self.best[0]:
                    self.best = (score, candidate)


def _fields(config: T6Config, what: str, allow: Sequence[str]) -> list[str]:
    """The fields that may change, refused where none of them has an effect."""
    for name in allow:
        require(name in ALLOWED, "allow", name, f"choose from {', '.join(ALLOWED)}")
    fields = {name: [f for f in ALLOWED[name] if _has(config, f)] for name in ALLOWED}

    def has_effect(field: str) -> bool:
        value, step = _get(config, field), 2 if field == "head_dim" else _step(config, field)
        others = [_with(config, **{field: n}) for n in (value + step, 2 * value, max(1, value // 2))]
        return any(other is not None and COSTS[what](other) != COSTS[what](config) for other in others)

    effective = {name: [f for f in own if has_effect(f)] for name, own in fields.items()}
    if not any(effective[name] for name in allow):
        useful = [name for name, own in effective.items() if own]
        raise BadInput(
            f"allow={' '.join(allow)!r} is not possible: it does not change the {what} of "
            f"{config.attention.mechanism}; choose from {', '.join(useful)}"
        )
    chosen = [field for name in ALLOWED if name in allow for field in effective[name]]
    # Heads that cost nothing themselves still follow the key/value heads.
    return ["n_heads", *chosen] if {"heads", "kv_heads"} <= set(allow) and "n_heads" not in chosen else chosen


def match(
    config: T6Config, to: float | T6Config, what: str = "parameters", allow: Sequence[str] = ("heads",)
) -> Match:
    """`config` at the cost of another model: within 0.1 % where integers allow it, else as near as they do.

    Args:
        config: the variant to change.
        to: a model, or a number of parameters, of cache bytes per token in bf16, or of model FLOPs per training token.
        what: "parameters", "cache" or "flops".
        allow: what may change: heads, kv_heads, ranks, head_dim, ffn, kv_rank. Heads remain a multiple of the
            key/value heads, head dimensions even, and products of feature factors whole.

    Raises:
        BadInput: none of `allow` changes that cost, or even its lowest or highest values miss the target by over 1 %.
    """
    require(what in COSTS, "match", what, f"choose from {', '.join(COSTS)}")
    target = COSTS[what](to) if isinstance(to, T6Config) else to
    require(target > 0, "to", target, "it must be above 0")
    fields = _fields(config, what, allow)
    search = _Search(config, target, what, fields)
    search.run()
    assert search.best is not None  # the model itself is always a candidate
    matched = search.best[1]
    gap = (COSTS[what](matched) - target) / target
    if abs(gap) > 0.01 and not (search.below and search.above):
        named = " and ".join(f"{field}={_get(matched, field)}" for field in fields)
        raise BadInput(
            f"{what}={target:,.0f} cannot be met by changing {', '.join(allow)}: with {named} this model has "
            f"{COSTS[what](matched):,.0f} {'already' if gap > 0 else 'only'}"
        )
    return Match(matched, _changes(config, matched), gap)
