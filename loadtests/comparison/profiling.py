"""Where the time of a contestant's process goes: py-spy samples it under load."""

import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .contest import SETTLE_S, Plan
from .contestants import Contestant, ModelKind
from .processes import Shared

_RATE_HZ = 250
_PLACES = {
    "gateway/": "gateway",
    "agents/": "openai-agents",
    "compare/serving/": "the other contestants' own code",
    "compare/agent_folder/": "the agent and its model",
}
_TOP = 40
_RUNS = "AgentExecutor._run "
"""Calls the SDK's runner, and does little else."""
_LOOP = " (asyncio/runners.py)"
"""Ends the frame that runs the event loop; what the loop calls stands directly above it."""


class ProfilerMissingError(Exception):
    """py-spy is not installed: ``pip install py-spy``; as another user than root it also needs the right to ptrace."""


@dataclass(frozen=True)
class Profile:
    """Processor time a request, by where it went, in milliseconds."""

    contestant: str
    model: ModelKind
    requests: int
    cpu_ms: float
    """Processor time a request, profiler and all."""
    packages: list[tuple[str, float]]
    """Own time of the functions of a package."""
    functions: list[tuple[str, float]]
    """Own time of a function."""
    behalf: list[tuple[str, float]]
    """Time by the innermost function of the gateway that it was spent for: its own, and what others did for it."""
    inclusive: list[tuple[str, float]]
    """Time of a function and all that it calls; of the gateway and the SDK alone."""


def take_profile(shared: Shared, contestant: Contestant, model: ModelKind, plan: Plan) -> Profile:
    """Put a contestant under load, sample it, and say where the time went.

    Raises:
        ProfilerMissingError: there is no py-spy.
    """
    tool = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if tool is None:
        raise ProfilerMissingError(ProfilerMissingError.__doc__)
    stacks = shared.folder / f"{contestant.name}-{model}.stacks"
    with contestant.running(shared, model) as running:
        running.load(plan.load(seconds=plan.warm_up_s))
        command = [tool, "record", "--pid", str(running.child.pid), "--format", "raw", "--output", str(stacks)]
        command += ["--rate", str(_RATE_HZ), "--duration", str(max(1, round(plan.seconds))), "--nonblocking"]
        sampler = threading.Thread(
            target=subprocess.run, args=[command], kwargs={"capture_output": True}, name="py-spy"
        )
        cpu_s = running.child.cpu_s()
        sampler.start()
        outcome = running.load(plan.load(seconds=plan.seconds + SETTLE_S))
        cpu_s = running.child.cpu_s() - cpu_s
        sampler.join()
    requests = max(len(outcome.latencies_s), 1)
    return _profile(contestant.name, model, requests, cpu_s * 1000 / requests, stacks.read_text().splitlines())


def _profile(contestant: str, model: ModelKind, requests: int, cpu_ms: float, lines: Iterable[str]) -> Profile:
    """Add up py-spy's lines (``outer;...;inner count``)."""
    packages: Counter[str] = Counter()
    functions: Counter[str] = Counter()
    behalf: Counter[str] = Counter()
    inclusive: Counter[str] = Counter()
    for line in lines:
        stack, _, samples = line.rpartition(" ")
        frames = [_function(frame) for frame in stack.split(";")]
        count = int(samples)
        functions[frames[-1]] += count
        packages[_package(frames[-1])] += count
        behalf[_behalf(frames)] += count
        for frame in {each for each in frames if _package(each) in {"gateway", "openai-agents"}}:
            inclusive[frame] += count
    a_sample_ms = cpu_ms / max(packages.total(), 1)

    def ranked(counts: Counter[str]) -> list[tuple[str, float]]:
        return [(name, count * a_sample_ms) for name, count in counts.most_common(_TOP)]

    return Profile(
        contestant, model, requests, cpu_ms, ranked(packages), ranked(functions), ranked(behalf), ranked(inclusive)
    )


def _behalf(frames: list[str]) -> str:
    """Return the innermost function of the gateway; if there is none, the outermost package beside the loop's own."""
    begins = max((at for at, frame in enumerate(frames) if frame.endswith(_LOOP)), default=-1) + 1
    frames = frames[begins:]  # below it is only how the process was started
    packages = [(_package(frame), frame) for frame in frames]
    ours = [frame for package, frame in packages if package == "gateway"]
    if ours and not ours[-1].startswith(_RUNS):
        return ours[-1]
    if ours or any(package == "openai-agents" for package, _ in packages):
        return "the SDK's run"
    others = (package for package, _ in packages if package not in {"asyncio", "the standard library"})
    return f"none: {next(others, 'the event loop' if begins else 'a thread')}"


def _function(frame: str) -> str:
    """Return a frame without its line number: ``run (agents/run.py)``."""
    name, _, place = frame.partition(" (")
    return f"{name} ({place.rpartition(':')[0] or place.rstrip(')')})"


def _package(function: str) -> str:
    """Return the package that a function belongs to, by the path of its file."""
    place = function.rpartition(" (")[2].rstrip(")")
    for start, name in _PLACES.items():
        if start in place[: len(start) + 30]:
            return name
    return place.partition("/")[0] if "/" in place else "the standard library"
