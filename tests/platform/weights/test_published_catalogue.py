"""Test `published_catalogue.py`."""

from __future__ import annotations

from collections import Counter

from deta.platform.weights.published_catalogue import PUBLISHED_FILES, format_catalogue


def test_every_file_is_listed_with_an_encrypted_address_of_its_own():
    text = format_catalogue()

    addresses = Counter(file.url for file in PUBLISHED_FILES)
    assert all(url.startswith("https://") for url in addresses)
    assert set(addresses.values()) == {1}
    for file in PUBLISHED_FILES:
        assert f"{file.name}, " in text
        assert file.url in text
