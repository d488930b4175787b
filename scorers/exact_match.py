"""Whether the answer is, word for word, the one that was expected."""

from typing import Any

from mlflow.entities import Feedback
from mlflow.genai.scorers import scorer

from ._trace import answer_text


@scorer
def exact_match(outputs: Any, expectations: dict[str, Any] | None) -> Feedback | None:
    """Pass if the answer equals `expectations["expected_response"]`, white space around either aside.

    Not applicable (None) without that expectation, and so never on live traffic.
    """
    expected = (expectations or {}).get("expected_response")
    if not isinstance(expected, str):
        return None
    answer = answer_text(outputs)
    if answer is None:
        return Feedback(value=False, rationale="There is no answer to compare.")
    if answer.strip() == expected.strip():
        return Feedback(value=True, rationale="The answer is the expected response.")
    return Feedback(value=False, rationale=f"Expected {expected.strip()!r}, got {answer.strip()!r}.")
