"""Whether an error says that there is no room for the sizes that were asked for."""

import torch

# What torch raises for too many bytes, for a product of sizes past 64 bits, and for one size past them.
ERRORS = (RuntimeError, TypeError, OverflowError)


def no_room(error: Exception) -> bool:
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in said or "overflow" in said
