"""Passwords and tokens in addresses, hidden wherever an address is shown."""

import re


def hide_password(url: str) -> str:
    """A URL without its user:password part and without query values, which may hold secrets too."""
    if url.startswith("sqlite:"):  # has neither, and @ and = may stand in a path
        return url
    url = re.sub(r"^(.*?://)?.*@", r"\1***@", url)
    return re.sub(r"([?&][^=&]+=)[^&]*", r"\1***", url)


def without_secrets(text: str) -> str:
    """A text with user and password in the URLs that it mentions hidden."""
    return re.sub(r"//[^/@\s]*@", "//***@", text)
