"""Several corpora as one: each training window comes whole from one of them, in the shares asked for."""

import hashlib
import inspect
import json
import logging
import math
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

import numpy as np

from datamodules.base import TokenData
from datamodules.corpus import Side, counts_of, total
from datamodules.documents import Document
from datamodules.indexed import IndexedData
from datamodules.packing import ValidationWindows, Windows
from datamodules.streamed import StreamedData
from datamodules.tokenizer_loading import TRAINING_BYTES
from t6_lightning.common.errors import BadInput

log = logging.getLogger(__name__)

RESOLUTION = 1 << 32
"""Weights are kept as whole numbers that add up to about this: counts of samples stay exact for ever."""


OVERRULED = {"tokenizer": "tokenizer_spec"} | {
    name: name for name in ("vocab_size", "context", "batch_size", "num_workers", "seed")
}
"""Setting -> attribute of what only the mixture decides."""


class Shares:
    """Which source each sample comes from: as even as whole samples can be, a function of the number alone.

    Args:
        phases: first sample -> weights of the sources from there on; one phase begins at 0.
        seed: Shifts where in the pattern the sequence begins.
    """

    def __init__(self, phases: dict[int, list[float]], seed: int):
        self.begins = sorted(phases)
        self.weights = [
            [round(weight / sum(phases[begin]) * RESOLUTION) for weight in phases[begin]]
            for begin in self.begins
        ]
        rng = np.random.default_rng([seed, len(self.weights[0])])
        self.shifts = rng.integers(RESOLUTION // 2, size=len(self.weights[0])).tolist()
        self.before = [[0] * len(self.weights[0])]
        """Samples of each source before each phase."""
        for i in range(1, len(self.begins)):
            counts = self._counts(i - 1, self.begins[i] - self.begins[i - 1])
            self.before.append([a + b for a, b in zip(self.before[-1], counts, strict=True)])

    def locate(self, sample: int) -> tuple[int, int]:
        """(source, how many samples of that source come before this one)"""
        phase = bisect_right(self.begins, sample) - 1
        n = sample - self.begins[phase]
        for source, weight, shift, rest in self._splits(phase):
            before = (n * weight + shift % rest) // rest
            if rest == weight or ((n + 1) * weight + shift % rest) // rest > before:
                return source, self.before[phase][source] + before
            n -= before
        raise AssertionError("the last source with a weight takes what is left")

    def counts(self, samples: int) -> list[int]:
        """Samples of each source among the first `samples`."""
        phase = bisect_right(self.begins, samples) - 1
        counts = self._counts(phase, samples - self.begins[phase])
        return [a + b for a, b in zip(self.before[phase], counts, strict=True)]

    def _counts(self, phase: int, n: int) -> list[int]:
        counts = [0] * len(self.weights[phase])
        for source, weight, shift, rest in self._splits(phase):
            counts[source] = (n * weight + shift % rest) // rest
            n -= counts[source]
        return counts

    def _splits(self, phase: int) -> Iterator[tuple[int, int, int, int]]:
        """(source, its weight, shift, weight of it and all behind it): each takes its part of what is left."""
        rest = sum(self.weights[phase])
        for source, weight in enumerate(self.weights[phase]):
            if weight > 0:
                yield source, weight, self.shifts[source] if rest > weight else 0, rest
                rest -= weight


class Mixture(TokenData):
    """Several corpora; every source goes through its own epochs. See TokenData for the other settings.

    Tokenizer, context, batch size, workers and seed are those of the mixture; validation domains are named
    source, or source/domain where a source has several.

    Args:
        sources: Name -> corpus.
        weights: Name -> share of the training tokens; they need not add up to 1.
        schedule: Training tokens -> weights that hold from there on, the first window that begins there or later.
    """

    streamed = True

    def __init__(
        self,
        sources: dict[str, TokenData],
        weights: dict[str, float],
        schedule: dict[Any, dict[str, float]] | None = None,
        **common: Any,
    ):
        super().__init__(**common)
        if not sources:
            raise BadInput("sources: the list is empty; name at least one corpus.")
        for name, source in sources.items():
            if not isinstance(source, (StreamedData, IndexedData)):
                raise BadInput(
                    f"sources.{name}: {type(source).__name__} is not allowed; allowed: corpora of text."
                )
        self.sources: dict[str, Any] = sources
        self.phases = {0: weights} | {_tokens(begin): later for begin, later in (schedule or {}).items()}
        for tokens, chosen in self.phases.items():
            field = f"schedule.{tokens}" if tokens else "weights"
            if set(chosen) != set(sources):
                raise BadInput(
                    f"{field}: it names {sorted(chosen)}; allowed: a weight for each of {sorted(sources)}."
                )
            if min(chosen.values()) < 0 or not 0 < sum(chosen.values()) < math.inf:
                raise BadInput(
                    f"{field}: {chosen} is not allowed; allowed: finite weights from 0 on that are not all 0."
                )
        self._shares: Shares | None = None
        self._warn_of_overruled()

    def _warn_of_overruled(self) -> None:
        """Of settings of the sources in whose place those of the mixture hold."""
        defaults = inspect.signature(TokenData.__init__).parameters
        for setting, attribute in OVERRULED.items():
            holds = getattr(self, attribute)
            for name, source in self.sources.items():
                given = getattr(source, attribute)
                if given not in (holds, defaults[setting].default):
                    log.warning(
                        "sources.%s.%s: %r is not used: the mixture's %r holds for all its sources.",
                        name,
                        setting,
                        given,
                        holds,
                    )

    def _each(self) -> Iterator[tuple[str, Any]]:
        """The sources, with the mixture's settings."""
        for name, source in self.sources.items():
            source.__dict__["tokenizer"] = self.tokenizer
            source.context, source.batch_size, source.seed = self.context, self.batch_size, self.seed
            source.val_tokens = source.val_tokens if self.val_tokens is None else self.val_tokens
            yield name, source

    def check_sources(self) -> None:
        for source in self.sources.values():
            source.check_sources()

    def locate(self, sample: int) -> tuple[int, int]:
        if self._shares is None:
            raise AssertionError("training_windows comes first")
        return self._shares.locate(sample)

    def samples_of_each(self) -> list[int]:
        if self._shares is None:
            raise AssertionError("training_windows comes first")
        return self._shares.counts(self.samples)

    def training_windows(self, left_out: np.ndarray) -> dict[str, Windows]:
        phases = {
            -(-tokens // self.context): [weights[name] for name in self.sources]
            for tokens, weights in sorted(self.phases.items())
        }
        self._shares = Shares(phases, self.seed)
        return {
            name: windows
            for name, source in self._each()
            for windows in source.training_windows(left_out).values()
        }

    def validation_windows(self) -> ValidationWindows:
        joined, *others = (source.validation_windows() for _, source in self._each())
        for following in others:
            joined = joined.followed_by(following)
        return joined

    def test_windows(self) -> ValidationWindows:
        """All test windows, numbered as in `domains`; of a source without test documents none. Raises BadInput where
        no source has any."""
        joined, *others = (
            ValidationWindows(*side, self.tokenizer, self.context) for side in self._test_sides().values()
        )
        for following in others:
            joined = joined.followed_by(following)
        if len(joined) == 0:
            raise BadInput(
                "sources: their held-out documents are too few to validate and to test on; raise a val_fraction."
            )
        return joined

    def _test_sides(self) -> dict[str, Side]:
        """Each source's test documents but those that validate in another source."""
        sides = {name: (source.validation, source.test) for name, source in self._each()}
        seen = np.unique(
            np.concatenate(
                [table.key[chosen] for (table, side), _ in sides.values() for chosen in side.values()]
            )
        )
        return {
            name: (
                table,
                {domain: chosen[~np.isin(table.key[chosen], seen)] for domain, chosen in test.items()},
            )
            for name, (_, (table, test)) in sides.items()
        }

    def validation_keys(self) -> np.ndarray:
        return np.unique(np.concatenate([source.validation_keys() for _, source in self._each()]))

    @property
    def domains(self) -> list[str]:
        return [
            self._domain(name, source, domain) for name, source in self._each() for domain in source.domains
        ]

    @staticmethod
    def _domain(name: str, source: TokenData, domain: str) -> str:
        return name if len(source.domains) == 1 else f"{name}/{domain}"

    @property
    def fingerprint(self) -> str:
        parts = {name: source.fingerprint for name, source in self._each()}
        phases = [(tokens, sorted(weights.items())) for tokens, weights in sorted(self.phases.items())]
        return hashlib.sha256(json.dumps([parts, phases]).encode()).hexdigest()

    def summary(self) -> dict[str, Any]:
        """Counts of all sources together, and each one's own summary under "sources", with its share at first."""
        weights = sum(self.phases[0].values())
        parts = {
            name: source.summary() | {"share": self.phases[0][name] / weights}
            for name, source in self._each()
        }
        domains = {
            self._domain(name, self.sources[name], domain): parts[name]["domains"][domain]
            | counts_of(table, chosen, "test")
            for name, (table, side) in self._test_sides().items()
            for domain, chosen in side.items()
        }
        summary: dict[str, Any] = total(domains.values()) | {"domains": domains}
        for key in ("gzip_bits_per_byte", "xz_bits_per_byte"):
            if all(key in part for part in parts.values()):
                bits = sum(part[key] * part["val_bytes"] for part in parts.values())
                summary[key] = bits / summary["val_bytes"]
        if any("val_lost_share" in part for part in parts.values()):
            lost = sum(part["val_lost_share"] * part["val_bytes"] for part in parts.values())
            summary["val_lost_share"] = lost / max(sum(part["val_bytes"] for part in parts.values()), 1)
        return summary | {"sources": parts}

    def corpus_identity(self) -> str:
        parts = [(name, source.corpus_identity()) for name, source in self.sources.items()]
        return hashlib.sha256(json.dumps([parts, sorted(self.phases[0].items())]).encode()).hexdigest()

    def tokenizer_texts(self) -> Iterator[str]:
        """Texts of each source in its share."""
        total = sum(self.phases[0].values())
        for name, source in self.sources.items():
            wanted = TRAINING_BYTES * self.phases[0][name] / total
            for text in source.tokenizer_texts():
                if wanted <= 0:
                    break
                wanted -= len(text)
                yield text

    def example_documents(self, number: int) -> Iterator[Document]:
        for name, source in self._each():
            for document in source.example_documents(-(-number // len(self.sources))):
                yield document._replace(domain=name)

    def order_state(self) -> dict[str, Any]:
        return {name: source.order_state() for name, source in self.sources.items()}

    def restore_order(self, state: dict[str, Any]) -> None:
        for name, source in self._each():
            if state.get(name):
                source.restore_order(state[name])


def _tokens(begin: Any) -> int:
    """A key of `schedule`, which YAML and JSON may give as text. Raises BadInput."""
    try:
        number = float(begin)
    except (TypeError, ValueError):
        number = math.nan
    if not (number >= 1 and number.is_integer()):
        raise BadInput(f"schedule: {begin!r} is not allowed; allowed: whole numbers of tokens from 1 on.")
    return int(number)
