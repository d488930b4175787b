"""Settings that change while the process runs: ``gateway.toml`` is read again when it was written anew.

Only what says "may change while running" in `gateway.settings` is looked up here each time it is needed; everything
else was taken at the start and stays. The environment still overrides the file.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path

import structlog

from gateway.errors import ConfigurationError
from gateway.settings import Settings, config_path, load_settings

log = structlog.get_logger(__name__)

_LOOK_S = 1.0  # somebody has just saved the file and watches

Stamp = tuple[int, int, int]


class LiveSettings:
    """The settings as they are now. One a process."""

    def __init__(self, settings: Settings, path: Path | None = None, load: Callable[[], Settings] = load_settings):
        """Take the settings of the start, the file to watch (``None``: the configured one), and what reads it."""
        self.now = settings
        """The newest valid settings."""
        self._path = path or config_path()
        self._load = load
        self._seen = stamp_of(self._path)

    async def watch(self) -> None:
        """Look at the file each second until cancelled; one that is not valid is logged, and changes nothing."""
        while True:
            await asyncio.sleep(_LOOK_S)
            await asyncio.to_thread(self.refresh)

    def refresh(self) -> bool:
        """Read the file if it was written since the last look; return whether the settings are new. Blocks."""
        stamp = stamp_of(self._path)
        if stamp == self._seen:
            return False
        self._seen = stamp
        try:
            self.now = self._load()
        except ConfigurationError as error:
            log.error("the settings were changed and are not valid; the ones before stay", problem=str(error))
            return False
        log.info("the settings were read again; what may change while running counts from now on")
        return True


def stamp_of(path: Path) -> Stamp | None:
    """Return what changes when a file is written or replaced; ``None`` if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
