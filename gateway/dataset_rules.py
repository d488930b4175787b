"""What goes into which dataset: the tables ``[datasets.<name>]`` of ``gateway.toml``.

Apart from `gateway.settings`, which reads them, since there is enough to say of them.
"""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

DATASET_NAME = re.compile(r"[\w .-]{1,200}")
"""What a dataset may be called: it stands in MLflow's search filters, between quotes."""

Condition = Literal["failed", "passed", "below", "above", "corrected", "any"]

_FITTING: dict[str, frozenset[str]] = {
    "scores": frozenset({"failed", "passed", "below", "above"}),
    "feedback": frozenset({"failed", "passed", "below", "above", "corrected", "any"}),
    "tags": frozenset({"any"}),
}


class DatasetRule(BaseModel):
    """What goes into a dataset: a ``[datasets.<name>]`` table of ``gateway.toml``."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    dataset: str | None = None
    """MLflow dataset that it feeds; ``None``: the one of the rule's own name. Several rules may feed one dataset."""
    source: Literal["scores", "feedback", "tags"] = Field(default="scores", alias="from")
    """What decides: scores, what people say in MLflow (feedback and expectations), or tags alone."""
    when: Condition | None = None
    """``failed``, ``passed``, ``below`` or ``above`` the value; of what people say also ``corrected``, which is that
    somebody wrote an expectation, and ``any``. ``None``: ``failed``; for tags, that they are there."""
    value: float | None = None
    """The bound of ``below`` and ``above``, which it does not include itself."""
    scorers: list[str] | None = None
    """Scorers, or names of their assessments, that count; ``None``: all. ``passed`` and ``above`` want them named, and
    every one of them to say so."""
    names: list[str] | None = None
    """Names of the feedback and expectations that count; ``None``: all."""
    agents: list[str] | None = None
    """Agents whose traces it takes; ``None``: all."""
    tags: dict[str, str] = Field(default_factory=dict)
    """Tags that the trace must have, with these values."""
    whole_session: bool = False
    """Take every turn of the conversation, each as a row, once the conversation is over."""
    max_per_day: int | None = Field(default=200, ge=1)
    """Rows that the dataset has taken today (UTC) from which on this rule adds none; ``false`` in TOML: no cap. What a
    person can look through in a day, and no flood when something breaks."""
    similar_at_least: float | None = Field(default=0.8, gt=0.0, le=1.0)
    """Similarity to a row that is there from which on a trace is left out; ``false`` in TOML: none is left out. At 0.8,
    of a short question, a word more, case and punctuation make no new row, and another order number does."""

    @field_validator("max_per_day", "similar_at_least", mode="before")
    @classmethod
    def _false_is_none(cls, value: object) -> object:
        if value is True:
            raise ValueError("a number is wanted, or false for none")
        return None if value is False else value

    @field_validator("dataset")
    @classmethod
    def _name_fits(cls, value: str | None) -> str | None:
        if value is not None and not DATASET_NAME.fullmatch(value):
            raise ValueError("a dataset's name has letters, digits, blanks, dots, dashes and underscores only")
        return value

    @model_validator(mode="after")
    def _makes_sense(self) -> "DatasetRule":
        if self.condition not in _FITTING[self.source]:
            fitting = ", ".join(sorted(_FITTING[self.source]))
            raise ValueError(f'when = "{self.when}" does not go with from = "{self.source}"; it takes {fitting}')
        if (self.condition in {"below", "above"}) != (self.value is not None):
            raise ValueError('when = "below" and "above" want a value, and the others want none')
        if self.source == "scores" and self.condition in {"passed", "above"} and not self.scorers:
            raise ValueError(f'when = "{self.condition}" wants scorers: the names of all that must say so')
        if any(mark in text for text in [*self.tags, *self.tags.values(), *(self.names or ())] for mark in "'`\""):
            raise ValueError("tags and names cannot hold quotes: MLflow's search is asked for them")
        if self.source == "tags" and not self.tags:
            raise ValueError('from = "tags" wants tags, as in tags = { review = "yes" }')
        if self.source != "scores" and self.scorers is not None:
            raise ValueError('scorers goes with from = "scores" only')
        if self.source != "feedback" and self.names is not None:
            raise ValueError('names goes with from = "feedback" only')
        return self

    @property
    def condition(self) -> Condition:
        """What it waits for, defaults filled in."""
        return self.when or ("any" if self.source == "tags" else "failed")

    @property
    def wants_all(self) -> bool:
        """All that it names must say so, instead of any of them."""
        return self.condition in {"passed", "above"}


def _named_well(rules: dict[str, DatasetRule]) -> dict[str, DatasetRule]:
    for name, rule in rules.items():
        if rule.dataset is None and not DATASET_NAME.fullmatch(name):
            raise ValueError(
                f"[datasets.{name}]: a dataset's name has letters, digits, blanks, dots, dashes and underscores only"
            )
    return rules


DatasetRules = Annotated[dict[str, DatasetRule], AfterValidator(_named_well)]
"""Rules by name; the name is that of the dataset, unless the rule names another."""
