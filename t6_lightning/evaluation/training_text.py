"""Which documents a model was trained on, by the hashes that its run's token cache holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from datamodules import corpora  # noqa: F401  (so that short names of data classes are known)
from datamodules.base import TokenData
from datamodules.indexed import IndexedData
from datamodules.token_cache import are_cached
from datamodules.tokenizer import Tokenizer
from t6_lightning.common.classes import import_class
from t6_lightning.common.errors import BadInput


def training_keys(data: Mapping[str, Any], tokenizer: Tokenizer) -> np.ndarray | None:
    """Hashes (uint64) of the training documents of a run.

    Args:
        data: class_path and init_args of its data module, as the run's configuration has them.
        tokenizer: the run's.

    Returns:
        None where they cannot be told without reading the text again: of a stream, of files that changed or are gone,
        and where the token cache was removed.
    """
    try:
        cls: Any = import_class(data["class_path"], TokenData, "data")
        found = cls(**data.get("init_args", {}))
        sources = (
            list(found.sources.values()) if isinstance(getattr(found, "sources", None), dict) else [found]
        )
        keys = []
        for source in sources:
            if not isinstance(source, IndexedData):
                return None
            source.tokenizer = tokenizer
            validation = source.validation_sources().values()
            if not are_cached([*source.sources(), *(one for each in validation for one in each)], tokenizer):
                return None
            keys.append(source.corpus.table.key[source.corpus.training_documents])
        return np.concatenate(keys)
    except (BadInput, OSError, KeyError, TypeError):  # the files or the run's own class are not here any more
        return None
