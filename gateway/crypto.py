"""Encryption at rest and keyed hashes, from one secret.

The secret is ``GATEWAY_SECRET_KEY``, or a file that is generated once in ``GATEWAY_HOME`` (mode 0600). HKDF-SHA256
(RFC 5869) derives a key for each purpose, so that a leak of one says nothing about another. What is encrypted carries
the first bytes of its key's hash, so that a wrong key is told from damaged data.
"""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from gateway.errors import ConfigurationError, GatewayError
from gateway.settings import Settings

_FORMAT = b"\x01"
_KEY_ID_BYTES = 4
_NONCE_BYTES = 12  # what AES-GCM is specified for (NIST SP 800-38D, 8.2.1)
_HEADER_BYTES = len(_FORMAT) + _KEY_ID_BYTES + _NONCE_BYTES


class WrongKey(ConfigurationError):
    """Stored data was written with another secret key; the message says which setting to look at."""


class DamagedData(GatewayError):
    """Stored data was changed, cut short, or moved to another row since it was encrypted."""


class Cipher:
    """AES-256-GCM for one purpose. Each message is bound to a context, so that rows cannot be swapped."""

    def __init__(self, key: bytes):
        self._aead = AESGCM(key)
        self._key_id = hashlib.sha256(key).digest()[:_KEY_ID_BYTES]

    def encrypt(self, plain: bytes, context: str) -> bytes:
        """Return format byte, key id, nonce and ciphertext; ``context`` must be given again to decrypt."""
        nonce = os.urandom(_NONCE_BYTES)
        return _FORMAT + self._key_id + nonce + self._aead.encrypt(nonce, plain, context.encode())

    def decrypt(self, stored: bytes, context: str) -> bytes:
        """Return the plain bytes; raise `WrongKey` or `DamagedData` if they cannot be had."""
        key_id = stored[len(_FORMAT) : len(_FORMAT) + _KEY_ID_BYTES]
        if key_id != self._key_id:
            raise WrongKey(
                "Stored data was encrypted with another key. Set GATEWAY_SECRET_KEY to the key it was written with, "
                "or restore the file secret.key of GATEWAY_HOME."
            )
        try:
            nonce = stored[_HEADER_BYTES - _NONCE_BYTES : _HEADER_BYTES]
            return self._aead.decrypt(nonce, stored[_HEADER_BYTES:], context.encode())
        except (InvalidTag, ValueError):  # ValueError: cut short within the nonce
            raise DamagedData("Stored data is damaged, or was moved to another row; it cannot be decrypted.") from None


class Keys:
    """The keys derived from one secret."""

    def __init__(self, secret: bytes):
        self._secret = secret
        self.history = Cipher(self.derive("history"))
        self.outbox = Cipher(self.derive("outbox"))

    def derive(self, purpose: str) -> bytes:
        """Return 32 bytes for ``purpose``."""
        return HKDF(SHA256(), length=32, salt=None, info=f"agent-gateway/{purpose}".encode()).derive(self._secret)


def keyed_hash(key: bytes, *parts: str) -> bytes:
    """Return HMAC-SHA256 of the parts, kept apart by their lengths so that ("ab", "c") differs from ("a", "bc")."""
    message = b"".join(len(part.encode()).to_bytes(8, "big") + part.encode() for part in parts)
    return hmac.digest(key, message, "sha256")


def load_keys(settings: Settings) -> Keys:
    """Return the keys of this deployment, generating the secret on first use.

    Raises:
        ConfigurationError: the key file is unreadable or not a key.
    """
    if settings.secret_key is not None:
        return Keys(settings.secret_key.get_secret_value().encode())
    path = settings.home / "secret.key"
    try:
        secret = path.read_text().strip()
    except FileNotFoundError:
        secret = _create_secret(path)
    except UnicodeDecodeError:
        secret = ""
    except OSError as error:
        raise ConfigurationError(f"Cannot read the secret key {path}: {error.strerror}.") from None
    if len(secret) < 32:
        raise ConfigurationError(f"{path} holds no secret key. Restore it, or set GATEWAY_SECRET_KEY.")
    return Keys(secret.encode())


def _create_secret(path: Path) -> str:
    """Write a new secret so that it is there whole or not at all, also when two processes start at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_urlsafe(48) + "\n")
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(draft, path)  # unlike a rename, it never replaces a key that another process has just made
    except FileExistsError:
        pass
    finally:
        draft.unlink()
    return path.read_text().strip()
