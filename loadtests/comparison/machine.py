"""Which machine this is, and which of its cores does what."""

import os
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

_PACKAGES = (
    "agent-gateway",
    "openai-agents",
    "openai",
    "mlflow",
    "litestar",
    "fastapi",
    "uvicorn",
    "uvloop",
    "psycopg",
    "msgspec",
    "google-re2",
    "cryptography",
    "aiohttp",
)


@dataclass(frozen=True)
class Cores:
    """One core for the process that serves, the others for everything else."""

    serving: frozenset[int]
    others: frozenset[int]

    @classmethod
    def split(cls) -> "Cores":
        """Split the cores that this process may use; with a single one, all share it."""
        cores = sorted(os.sched_getaffinity(0))
        return cls(frozenset(cores[:1]), frozenset(cores[1:] or cores))


@dataclass(frozen=True)
class Machine:
    """What a report says of the machine."""

    system: str
    cpu: str
    cores: int
    memory_gb: float
    python: str
    packages: dict[str, str]
    load_average: tuple[float, float, float]
    """Of the last 1, 5 and 15 minutes, when the comparison began."""
    serving_cores: list[int] = field(default_factory=list)
    other_cores: list[int] = field(default_factory=list)

    @classmethod
    def here(cls, cores: Cores) -> "Machine":
        """Describe this machine."""
        return cls(
            system=f"{platform.system()}, {platform.machine()}",
            cpu=_cpu(),
            cores=os.cpu_count() or 1,
            memory_gb=round(psutil.virtual_memory().total / 2**30, 1),
            python=platform.python_version(),
            packages={name: version(name) for name in _PACKAGES},
            load_average=os.getloadavg(),
            serving_cores=sorted(cores.serving),
            other_cores=sorted(cores.others),
        )

    def as_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")
