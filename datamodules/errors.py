"""What the package raises when the user's data or settings are wrong."""


class BadData(ValueError):
    """One sentence that names the field, file or line, the value, and what is allowed."""


def first_line(error: Exception) -> str:
    """What a foreign exception says, short enough to stand in a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
