"""Rules by name: ``[scorers.<name>]``, ``[agents.<name>]`` and ``[judge_models.<name>]`` of ``gateway.toml``.

Apart from `gateway.settings`, which reads them; those of datasets are in `gateway.dataset_rules`.
"""

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

_DATASET_NAME = re.compile(r"[\w .-]{1,200}")


class ScorerFilter(BaseModel):
    """What a scorer is for: the key ``filter`` of its rule. What is left out lets every trace through.

    A conversation has the tools and the tags of all its turns, the status "error" if one of them failed, and the
    duration of its slowest one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    status: Literal["ok", "error"] | None = None
    """Runs that were answered, or that failed."""
    tags: dict[str, str] = Field(default_factory=dict)
    """Tags that a trace has, all of them, with these very values."""
    tools: list[str] | None = Field(default=None, min_length=1)
    """Tools of which the run called one at least; ``*`` and ``?`` stand for any letters, so ``["*"]`` is any tool."""
    slower_than_s: float | None = Field(default=None, ge=0)
    """Seconds that the run took at least."""
    faster_than_s: float | None = Field(default=None, gt=0)
    """Seconds that the run did not take."""

    @model_validator(mode="after")
    def _leaves_something(self) -> "ScorerFilter":
        slower, faster = self.slower_than_s or 0, self.faster_than_s or float("inf")
        if slower >= faster:
            raise ValueError(f"no run takes {slower:g} s or more and less than {faster:g} s")
        return self


class ScorerRule(BaseModel):
    """When one scorer runs live: a ``[scorers.<name>]`` table of ``gateway.toml``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = True
    builtin: str | None = None
    """Class of MLflow's that is made by this name. ``None``: the scorer of the folder, or the class, of the name."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """What the built-in is made with, as ``guidelines``."""
    judge_model: str | None = Field(default=None, pattern=r"^[\w.-]+:/[^/].*$|^databricks$")
    """Model that it asks. ``None``: the one that the scorer names itself, else ``GATEWAY_JUDGE_MODEL``."""
    agents: list[str] | None = None
    """Agents whose runs it scores; ``None``: all."""
    share: float = Field(default=1.0, ge=0.0, le=1.0)
    """Share of the kept traces (or conversations) that it scores, drawn per subject with a salt of its own."""
    filter: ScorerFilter = ScorerFilter()
    """Which traces, or conversations, it is for; by default all."""
    pass_at_least: float | None = None
    """For scorers that give a number: the smallest value that passes. ``None``: numbers are averaged, not judged."""
    dataset: str | None = "regressions"
    """MLflow dataset that collects what it fails; ``None``, or an empty text in TOML: none."""

    @field_validator("dataset")
    @classmethod
    def _empty_is_none(cls, value: str | None) -> str | None:
        if value and not _DATASET_NAME.fullmatch(value):
            raise ValueError("a dataset's name has letters, digits, blanks, dots, dashes and underscores only")
        return value or None


class JudgeModelRule(BaseModel):
    """What is different for one judge model: a ``[judge_models."<provider>:/<model>"]`` table of ``gateway.toml``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    concurrency: int | None = Field(default=16, ge=1)
    """Calls of it under way at once, over all evaluators. ``None``: no limit."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """Calls of it a minute, over all evaluators. ``None``: no limit."""
    input_usd: float | None = Field(default=None, ge=0)
    """Price of a million input tokens in US dollars. ``None``: the price that MLflow knows."""
    output_usd: float | None = Field(default=None, ge=0)
    """Price of a million output tokens in US dollars. ``None``: the price that MLflow knows."""
    cached_input_usd: float | None = Field(default=None, ge=0)
    """Price of a million cached input tokens in US dollars. ``None``: that of the others."""

    @model_validator(mode="after")
    def _whole_price(self) -> "JudgeModelRule":
        if (self.input_usd is None) != (self.output_usd is None):
            raise ValueError("a price has both input_usd and output_usd")
        return self


TailRule = Literal["error", "tool_error", "guardrail", "slow", "asked"]
"""What keeps a conversation whatever the sampling says: a run failed, a tool failed, a guardrail tripped, a run was
slower than its bound, the client asked for it by a header."""


class AgentRule(BaseModel):
    """What is different for one agent: an ``[agents.<name>]`` table of ``gateway.toml``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sample_rate: float | None = Field(default=None, ge=0.0, le=1.0)
    """Share of its sessions whose traces are kept; ``None``: what ``GATEWAY_SAMPLE_RATE`` says."""
    slow_s: float | None = Field(default=None, gt=0)
    """Seconds from which on a run of it counts as slow; ``None``: what ``GATEWAY_TAIL_SLOW_S`` says."""
