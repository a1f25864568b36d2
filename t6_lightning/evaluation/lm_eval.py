"""lm-eval's own command line, which knows a T6's checkpoint as `--model t6`.

python -m t6_lightning.evaluation.lm_eval run --model t6 --model_args ckpt_path=FILE --tasks hellaswag
"""

from __future__ import annotations

import sys

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model

from t6_lightning.common.errors import BadInput
from t6_lightning.evaluation.language_model import T6LM

register_model("t6")(T6LM)


def main() -> int:
    """Run lm-eval with the arguments of this process."""
    try:
        cli_evaluate()
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
