"""The old place of `data/image_decoding.py`, for versions registered when it was here."""

from deta.platform.data.image_decoding import decode_bytes as decode_bytes
