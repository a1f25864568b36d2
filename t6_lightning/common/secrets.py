"""Passwords and tokens in addresses, hidden wherever an address is shown."""

import re

from t6_lightning.common.databases import is_sqlite


def hide_password(url: str) -> str:
    """A URL without its user:password part and without query values, which may hold secrets too."""
    if is_sqlite(url):  # has neither, and @ and = may stand in a path
        return url
    url = re.sub(r"^(.*?://)?.*@", r"\1***@", url)
    return re.sub(r"([?&][^=&]+=)[^&]*", r"\1***", url)


def without_secrets(text: str, *urls: str) -> str:
    """A text with the secrets of the URLs that it mentions hidden.

    Args:
        text: may mention any URL.
        urls: addresses in use. A password of theirs is hidden wherever it stands, also without its URL.
    """
    for url in filter(None, urls):
        text = text.replace(url, hide_password(url))
        if password := re.search(r"://[^:@/]*:(.+)@", url):
            text = text.replace(password[1], "***")
    # A password may hold @, : and / itself: everything up to the last @ is hidden.
    text = re.sub(r"(\bsqlite(?:\+\w+)?:\S*)|//[^\s'\"]*@", lambda found: found[1] or "//***@", text)
    return re.sub(r"([?&][^=&\s'\"]+=)[^&\s'\")]+", r"\1***", text)
