"""Test `published_catalogue.py`."""

from __future__ import annotations

from deta.platform.weights.published_catalogue import format_catalogue, published_files


def test_every_file_is_listed_with_an_encrypted_address_of_its_own():
    files, text = published_files(), format_catalogue()

    addresses = [file["url"] for file in files]
    assert all(url.startswith("https://") for url in addresses)
    assert len(set(addresses)) == len(addresses) == 18
    for file in files:
        assert f"{file['name']}, " in text
        assert file["url"] in text
