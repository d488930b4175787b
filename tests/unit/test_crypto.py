"""Encryption at rest, keyed hashes, and the key file."""

import multiprocessing
import stat
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import permutations
from pathlib import Path

import pytest
from pydantic import SecretStr

from gateway.crypto import DamagedData, Keys, WrongKey, keyed_hash, load_keys
from gateway.errors import ConfigurationError
from gateway.settings import Settings

KEYS = Keys(b"a secret of some length")
ROTATED = Keys(b"a new secret in front", b"a secret of some length")


@pytest.mark.parametrize("plain", [b"", b"x", "Grüße 🙂".encode(), bytes(range(256)) * 1000])
def test_round_trip(plain):
    """What was encrypted comes back, and cannot be read before."""
    stored = KEYS.history.encrypt(plain, "row 1")
    assert KEYS.history.decrypt(stored, "row 1") == plain
    assert len(plain) < 4 or plain not in stored


def test_nonce():
    """The same text is never written the same way twice."""
    assert len({KEYS.history.encrypt(b"same", "row 1") for _ in range(100)}) == 100


def test_moved_row():
    """Data that was moved to another row does not decrypt, and the message says so."""
    with pytest.raises(DamagedData, match="moved to another row"):
        KEYS.history.decrypt(KEYS.history.encrypt(b"text", "row 1"), "row 2")


def test_wrong_key():
    """Data of another key is told from damaged data, and the message names the setting."""
    stored = KEYS.history.encrypt(b"text", "row 1")
    with pytest.raises(WrongKey, match=r"another key.*GATEWAY_SECRET_KEY"):
        Keys(b"another secret").history.decrypt(stored, "row 1")


def test_purposes():
    """Each purpose of one secret has a key of its own, and none reads what another wrote."""
    ciphers = [KEYS.history, KEYS.outbox, KEYS.responses, KEYS.paused, KEYS.answers]
    assert KEYS.derive("history") == KEYS.derive("history") != KEYS.derive("outbox")
    assert len(KEYS.derive("sampling")) == 32
    for writer, reader in permutations(ciphers, 2):
        with pytest.raises(WrongKey):
            reader.decrypt(writer.encrypt(b"text", "row 1"), "row 1")


def test_data_of_the_first_version():
    """Keys are derived as ever: what the first version hashed and encrypted is found and read."""
    stored = bytes.fromhex("0115e01df8889258030650e1b183c62d278a7763a0450530f0901e350abe2a58ff24e58dc1")
    assert KEYS.history.decrypt(stored, "row 1") == ROTATED.history.decrypt(stored, "row 1") == b"text"
    assert KEYS.derive("redaction").hex() == "b516c8f925811de20f73c6e315fb1f7a92451bed2f4744366015bfd543fbc4da"


@pytest.mark.parametrize("cipher", ["history", "outbox", "responses", "paused", "answers"])
def test_rotation(cipher):
    """A new secret in front encrypts from then on, and what the older one wrote is still read."""
    earlier = getattr(KEYS, cipher).encrypt(b"text", "row 1")
    later = getattr(ROTATED, cipher).encrypt(b"text", "row 1")
    assert getattr(ROTATED, cipher).decrypt(earlier, "row 1") == b"text"
    assert getattr(Keys(b"a new secret in front"), cipher).decrypt(later, "row 1") == b"text"
    with pytest.raises(WrongKey):
        getattr(KEYS, cipher).decrypt(later, "row 1")


def test_hashes_stay_while_keys_rotate():
    """Keys of hashes come from the oldest secret, until that one is dropped."""
    assert ROTATED.derive("redaction") == KEYS.derive("redaction")
    assert Keys(b"newer still", b"a new secret in front").derive("redaction") != KEYS.derive("redaction")


@pytest.mark.parametrize("cut", [0, 1, 4, 5, 16, 17, 20])
def test_cut_short(cut):
    """Data that was cut short anywhere is refused with our own error."""
    with pytest.raises((WrongKey, DamagedData)):
        KEYS.history.decrypt(KEYS.history.encrypt(b"text", "row 1")[:cut], "row 1")


@pytest.mark.parametrize("position", [5, 16, 17, -1])
def test_damaged(position):
    """One changed bit of nonce, text or tag is found."""
    damaged = bytearray(KEYS.history.encrypt(b"text", "row 1"))
    damaged[position] ^= 1
    with pytest.raises(DamagedData, match="damaged"):
        KEYS.history.decrypt(bytes(damaged), "row 1")


def test_keyed_hash_keeps_parts_apart():
    """Where one part ends and the next begins makes a difference, as do key, order and number of parts."""
    hashes = {
        keyed_hash(b"k", "ab", "c"),
        keyed_hash(b"k", "a", "bc"),
        keyed_hash(b"k", "abc"),
        keyed_hash(b"k", "abc", ""),
        keyed_hash(b"k", "c", "ab"),
        keyed_hash(b"j", "ab", "c"),
        keyed_hash(b"k", "a\0b", "c"),
    }
    assert len(hashes) == 7
    assert keyed_hash(b"k", "ab", "c") in hashes


def test_secret_from_the_settings(tmp_path):
    """A secret in the settings is used, and no file is made."""
    settings = Settings(home=tmp_path, secret_key=SecretStr("sixteen characters"))
    assert load_keys(settings).derive("x") == Keys(b"sixteen characters").derive("x")
    assert not list(tmp_path.iterdir())


def test_secrets_from_the_settings(tmp_path):
    """Of several secrets in the settings the first writes and the last hashes; blanks around them do not count."""
    settings = Settings(home=tmp_path, secret_key=SecretStr(" the second secret , the first secret\n"))
    keys, expected = load_keys(settings), Keys(b"the second secret", b"the first secret")
    assert Keys(b"the second secret").history.decrypt(keys.history.encrypt(b"text", "row 1"), "row 1") == b"text"
    assert keys.history.decrypt(Keys(b"the first secret").history.encrypt(b"text", "row 1"), "row 1") == b"text"
    assert keys.derive("x") == expected.derive("x")


def test_key_file(tmp_path):
    """The key is generated once, readable by its owner alone, and is the same after a restart."""
    settings = Settings(home=tmp_path / "deep" / "home")
    first, second = load_keys(settings), load_keys(settings)
    (path,) = settings.home.iterdir()
    assert first.derive("x") == second.derive("x")
    assert path.name == "secret.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_key_file_rotated(tmp_path):
    """Of a key file with several lines the first writes and the last hashes; blank lines do not count."""
    before = load_keys(Settings(home=tmp_path))
    path = tmp_path / "secret.key"
    path.write_text(f"\n{'n' * 32}\n\n{path.read_text()}")
    after = load_keys(Settings(home=tmp_path))
    assert after.history.decrypt(before.history.encrypt(b"text", "row 1"), "row 1") == b"text"
    assert Keys(b"n" * 32).history.decrypt(after.history.encrypt(b"text", "row 1"), "row 1") == b"text"
    assert after.derive("x") == before.derive("x")


def _derive(home: Path) -> bytes:
    return load_keys(Settings(home=home)).derive("x")


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_key_file_race(tmp_path, kind):
    """Eight that start at once agree on one key and leave nothing else behind."""
    if kind == "threads":
        pool = ThreadPoolExecutor(8)
    else:
        pool = ProcessPoolExecutor(8, mp_context=multiprocessing.get_context("fork"))
    with pool:
        keys = set(pool.map(_derive, [tmp_path] * 8))
    assert len(keys) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["secret.key"]


@pytest.mark.parametrize("content", ["", "short\n", " " * 40, f"{'n' * 32}\nshort\n"])
def test_key_file_without_a_key(tmp_path, content):
    """A key file that holds no key, or a line that is none, is named and never replaced."""
    path = tmp_path / "secret.key"
    path.write_text(content)
    with pytest.raises(ConfigurationError, match=r"secret\.key holds no secret key"):
        load_keys(Settings(home=tmp_path))
    assert path.read_text() == content


def test_key_file_not_readable(tmp_path):
    """A key file that cannot be read is named, with the reason."""
    (tmp_path / "secret.key").mkdir()
    with pytest.raises(ConfigurationError, match=r"Cannot read the secret key .*secret\.key: "):
        load_keys(Settings(home=tmp_path))


def test_key_file_not_text(tmp_path):
    """A key file of bytes that are no text is refused like any other that holds no key."""
    (tmp_path / "secret.key").write_bytes(b"\xff" * 48)
    with pytest.raises(ConfigurationError, match=r"secret\.key"):
        load_keys(Settings(home=tmp_path))
