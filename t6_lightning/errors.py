"""What a user did wrong, said in one sentence."""


class BadInput(ValueError):
    """A setting, file or checkpoint that cannot be used.

    The message is one sentence that names the field, the value and what is allowed. The command line
    prints it alone, without a traceback, and exits with code 2.
    """


def require(condition: bool, field: str, value: object, allowed: str) -> None:
    """Raise `BadInput` naming the field, its value and what is allowed, unless the condition holds."""
    if not condition:
        raise BadInput(f"{field}={value!r} is not possible: {allowed}")
