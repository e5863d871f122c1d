"""Makes API keys, and the hashes of them that the tenants' file holds.

Stores nothing: a key is shown once, to whoever runs `swiftkv key`.
Called by: gateway/tenants.py, cli/key.py.
"""

import hashlib
import secrets

PREFIX = "swk_"
NUM_RANDOM_BYTES = 32


def create_key() -> tuple[str, str]:
    """A new key with 256 random bits, and its hash."""
    key = PREFIX + secrets.token_urlsafe(NUM_RANDOM_BYTES)
    return key, hash_key(key)


def hash_key(key: str) -> str:
    """SHA-256 of a key in hexadecimal. A key is random, so that no slower hash would protect it better."""
    return hashlib.sha256(key.encode("utf-8", errors="surrogateescape")).hexdigest()
