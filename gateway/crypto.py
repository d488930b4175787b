"""Encryption at rest and keyed hashes, from a few secrets.

The secrets are ``GATEWAY_SECRET_KEY``, separated by commas, or the lines of a file that is generated once in
``GATEWAY_HOME`` (mode 0600). HKDF-SHA256 (RFC 5869) derives a key for each purpose, so that a leak of one says nothing
about another. What is encrypted carries the first bytes of its key's hash, so that the right key is found, and a
wrong one told from damaged data.

To rotate, put a new secret in front, for all processes at once: the first encrypts, all decrypt. Keyed hashes come from
the last, the oldest, so that they stay the same. Drop the oldest when nothing that it encrypted is kept any more:
whatever it did encrypt cannot be read from then on, and hashed ids, sampling draws and idempotency keys start anew.
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
_FILE_SECRET_CHARS = 32  # below the 64 that are generated; shorter, a line was cut short or is something else


class WrongKey(ConfigurationError):
    """Stored data was written with another secret key; the message says which setting to look at."""


class DamagedData(GatewayError):
    """Stored data was changed, cut short, or moved to another row since it was encrypted."""


class Cipher:
    """AES-256-GCM for one purpose. Each message is bound to a context, so that rows cannot be swapped."""

    def __init__(self, newest: bytes, *older: bytes):
        """Take the key that encrypts, and those that only decrypt; 32 bytes each."""
        self._key_id = _key_id(newest)
        self._aeads = {_key_id(key): AESGCM(key) for key in (newest, *older)}

    def encrypt(self, plain: bytes, context: str) -> bytes:
        """Return format byte, key id, nonce and ciphertext; ``context`` must be given again to decrypt."""
        nonce = os.urandom(_NONCE_BYTES)
        return _FORMAT + self._key_id + nonce + self._aeads[self._key_id].encrypt(nonce, plain, context.encode())

    def decrypt(self, stored: bytes, context: str) -> bytes:
        """Return the plain bytes; raise `WrongKey` or `DamagedData` if they cannot be had."""
        aead = self._aeads.get(stored[len(_FORMAT) : len(_FORMAT) + _KEY_ID_BYTES])
        if aead is None:
            raise WrongKey(
                "Stored data was encrypted with another key. Add the secret it was written with to GATEWAY_SECRET_KEY, "
                "behind the others, or restore the file secret.key of GATEWAY_HOME."
            )
        try:
            nonce = stored[_HEADER_BYTES - _NONCE_BYTES : _HEADER_BYTES]
            return aead.decrypt(nonce, stored[_HEADER_BYTES:], context.encode())
        except (InvalidTag, ValueError):  # ValueError: cut short within the nonce
            raise DamagedData("Stored data is damaged, or was moved to another row; it cannot be decrypted.") from None


def _key_id(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()[:_KEY_ID_BYTES]


class Keys:
    """The keys derived from the secrets: a cipher a purpose, and keys for hashes."""

    def __init__(self, newest: bytes, *older: bytes):
        """Take the secrets, from the newest to the oldest."""
        self._secrets = (newest, *older)
        self.history = self._cipher("history")
        """For the turns of sessions."""
        self.outbox = self._cipher("outbox")
        """For traces on their way to MLflow."""
        self.responses = self._cipher("responses")
        """For the stored answers of the Responses API."""
        self.paused = self._cipher("paused")
        """For runs that wait for a person's decision."""
        self.answers = self._cipher("answers")
        """For the answers that an ``Idempotency-Key`` gives again."""

    def derive(self, purpose: str) -> bytes:
        """Return 32 bytes for keyed hashes of ``purpose``: the same for as long as the oldest secret is there."""
        return _derive(self._secrets[-1], purpose)

    def _cipher(self, purpose: str) -> Cipher:
        return Cipher(*(_derive(secret, purpose) for secret in self._secrets))


def _derive(secret: bytes, purpose: str) -> bytes:
    return HKDF(SHA256(), length=32, salt=None, info=f"agent-gateway/{purpose}".encode()).derive(secret)


def keyed_hash(key: bytes, *parts: str) -> bytes:
    """Return HMAC-SHA256 of the parts, kept apart by their lengths so that ("ab", "c") differs from ("a", "bc")."""
    message = b"".join(len(part.encode()).to_bytes(8, "big") + part.encode() for part in parts)
    return hmac.digest(key, message, "sha256")


def load_keys(settings: Settings) -> Keys:
    """Return the keys of this deployment, generating the secret on first use.

    Raises:
        ConfigurationError: the key file is unreadable, or a line of it is no key.
    """
    if settings.secret_key is not None:
        return Keys(*settings.secret_key.get_secret_value().encode().split(b","))
    path = settings.home / "secret.key"
    try:
        text = path.read_text()
    except FileNotFoundError:
        text = _create_secret(path)
    except UnicodeDecodeError:
        text = ""
    except OSError as error:
        raise ConfigurationError(f"Cannot read the secret key {path}: {error.strerror}.") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines or min(map(len, lines)) < _FILE_SECRET_CHARS:
        raise ConfigurationError(
            f"{path} holds no secret key, or a line of it is shorter than {_FILE_SECRET_CHARS} characters. Restore it, "
            "or set GATEWAY_SECRET_KEY."
        )
    return Keys(*(secret.encode() for secret in lines))


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
    return path.read_text()
