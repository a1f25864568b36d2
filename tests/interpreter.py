"""Whether kernels run in Triton's interpreter here: conftest.py turns it on where there is no GPU."""

from __future__ import annotations

import os

import pytest

from kernels.place import TRITON_IS_INSTALLED

IS_ON = TRITON_IS_INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"
WHY_OFF = "Triton's interpreter is off: the package is not installed, or there is a GPU"
needs_interpreter = pytest.mark.skipif(not IS_ON, reason=WHY_OFF)
