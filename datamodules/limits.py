"""Bounds on what data may ask for: generous for real text, far below what a machine cannot hold."""

import os

MAX_DOCUMENT_LENGTH = 1 << 25
"""UTF-8 bytes of a document, or of a row or line that holds one: the default of `max_document_length`."""

MAX_DOMAINS = 256
"""Validation domains: each has metrics of its own in every validation, and a sample of text at the end."""

MAX_BATCH_SIZE, MAX_CONTEXT, MAX_SEED = 1 << 20, 1 << 24, (1 << 63) - 1
MAX_BATCH_TOKENS = 1 << 28
"""Of one micro-batch: its ids, targets and documents take 20 bytes a token."""


def max_workers() -> int:
    """Loader processes of a rank: far beyond this they only take memory and time to start."""
    return max(64, 4 * (os.cpu_count() or 1))
