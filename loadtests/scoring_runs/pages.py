"""What was found: a page with tables, for the terminal and as Markdown."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from comparison.machine import Cores, Machine
from comparison.report import table
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent.parent / "results"


@dataclass
class Page:
    """One measurement."""

    title: str
    name: str
    """In the name of its file."""
    machine: Machine = field(default_factory=lambda: Machine.here(Cores.split()))
    begun: datetime = field(default_factory=lambda: datetime.now().astimezone())
    tables: list[tuple[Sequence[str], list[Sequence[str]]]] = field(default_factory=list)
    """Each with its head."""
    notes: list[str] = field(default_factory=list)

    def show(self) -> None:
        """Print it."""
        console = Console()
        for number, (head, rows) in enumerate(self.tables):
            shown = Table(*head, title=None if number else self.title, title_justify="left")
            for row in rows:
                shown.add_row(*row)
            console.print(shown)
        for note in [*self.notes, self._load()]:
            console.print(f"- {note}", highlight=False, markup=False)

    def write(self, folder: Path = RESULTS) -> Path:
        """Write it as Markdown, named by the time at which it was begun; return the file."""
        path = folder / f"{self.begun:%Y-%m-%d-%H%M}-{self.name}.md"
        machine = self.machine
        packages = ", ".join(f"{name} {number}" for name, number in machine.packages.items())
        about = f"{machine.cpu}, {machine.cores} cores, {machine.memory_gb:g} GB; {machine.system}; Python "
        parts = [f"# {self.title}, {self.begun:%d %B %Y, %H:%M}", f"{about}{machine.python}; {packages}."]
        parts += [table(tuple(head), [tuple(row) for row in rows]) for head, rows in self.tables]
        parts.append("\n".join(f"- {note}" for note in [*self.notes, self._load()]))
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(parts) + "\n")
        return path

    def _load(self) -> str:
        before, after = (", ".join(f"{each:.2f}" for each in load) for load in (self.machine.load_average, _load()))
        return f"Load average (1, 5, 15 minutes): {before} when it began, {after} when it ended."


def _load() -> tuple[float, float, float]:
    return os.getloadavg()


def seconds(value: float) -> str:
    """Return seconds as they are shown."""
    return f"{value:.2f} s"
