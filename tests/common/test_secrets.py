"""Passwords in addresses are hidden."""

from __future__ import annotations

import pytest

from t6_lightning.common.secrets import hide_password, without_secrets


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql+psycopg://a:b/c@d@host:5432/x", "postgresql+psycopg://***@host:5432/x"),
        ("mysql://host/x?user=a&password=b", "mysql://host/x?user=***&password=***"),
        ("sqlite:////home/me@work/a=b.db", "sqlite:////home/me@work/a=b.db"),
        ("https://token@hub.example.org", "https://***@hub.example.org"),
        ("https://hub.example.org/a", "https://hub.example.org/a"),
        ("user:pass@host", "***@host"),
    ],
)
def test_hide_password(url: str, shown: str) -> None:
    assert hide_password(url) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("'http://ada:s3cret@127.0.0.1:9' cannot be used", "'http://***@127.0.0.1:9' cannot be used"),
        ("at //ada:s3@cr/et@host/x, and //b@c", "at //***@host/x, and //***@c"),
        ("GET https://s3/x?sig=s3cret&key=s3cret failed", "GET https://s3/x?sig=***&key=*** failed"),
        ("(https://s3/x?sig=s3cret)", "(https://s3/x?sig=***)"),
        ("sqlite:////home/me@work/x.db is locked", "sqlite:////home/me@work/x.db is locked"),
        ("nothing to hide: me@work", "nothing to hide: me@work"),
    ],
)
def test_without_secrets(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


def test_the_password_of_an_address_in_use_is_hidden_by_itself_too() -> None:
    url = "postgresql://ada:s3/cr@et@host/db"
    text = f'{url}: password "s3/cr@et" of ada is wrong'
    assert without_secrets(text, url, "") == 'postgresql://***@host/db: password "***" of ada is wrong'
