"""Which sessions are kept: a pure function of key, session and rate."""

from gateway.crypto import keyed_hash

_SCALE = 2**64


def keep_session(key: bytes, session_id: str, rate: float) -> bool:
    """Whether the traces of this session are kept.

    The session's id is mapped to a point in [0, 1) by a keyed hash and kept if the point lies below ``rate``. So all
    turns of a session share one fate in every web process, nobody without the key can choose an id that is never
    looked at, and raising the rate only adds sessions.

    Args:
        key: 32 bytes, one deployment's.
        session_id: as the client gave it, or as generated.
        rate: 0.0 keeps none, 1.0 all.
    """
    return draw(key, session_id) < rate


def draw(key: bytes, *subject: str) -> float:
    """Return the subject's point in [0, 1), uniform over subjects, always the same for one subject and key."""
    return int.from_bytes(keyed_hash(key, *subject)[:8], "big") / _SCALE
