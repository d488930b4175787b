"""The documentation says what the code does: settings, routes, error codes."""

import ast
import json
import re
from pathlib import Path

import pytest

from gateway import errors
from gateway.http.bodies import IGNORED, REFUSED
from gateway.http.errors import _HTTP_CODES
from gateway.rules import AgentRule, ScorerRule
from gateway.settings import ENV_PREFIX, Settings

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"


def shown(default: object) -> str:
    """Return a default as the documentation writes it."""
    if isinstance(default, tuple):
        return json.dumps(default)
    return "none" if default is None else str(default)


def rows(document: str) -> dict[str, str]:
    """Return the second cell by the first, of the tables' rows whose first two cells are code."""
    found = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|", (DOCS / document).read_text(), re.MULTILINE)
    return dict(found)


def test_every_setting_is_documented_with_its_default() -> None:
    """The settings table has every setting under its environment name, with the default, and nothing else."""
    documented = {name: default for name, default in rows("settings.md").items() if name.isupper()}
    actual = {}
    for name, field in Settings.model_fields.items():
        alias = field.validation_alias
        variable = alias if isinstance(alias, str) else f"{ENV_PREFIX}{name.upper()}"
        actual[variable] = shown(field.get_default(call_default_factory=True))
    scorers = actual.pop("GATEWAY_SCORERS")
    assert scorers == "{}"
    assert {name: default for name, default in documented.items() if name != "GATEWAY_SCORERS"} == actual


def test_every_key_of_a_scorer_rule_is_documented() -> None:
    """The table of the scorers' rules has every key of a rule."""
    text = (DOCS / "settings.md").read_text()
    assert all(f"| `{name}` |" in text for name in ScorerRule.model_fields)


def test_every_key_of_an_agent_rule_is_documented() -> None:
    """The table of the agents' rules has every key of a rule."""
    text = (DOCS / "settings.md").read_text()
    assert all(f"| `{name}` |" in text for name in AgentRule.model_fields)


def subclasses(error: type[errors.GatewayError]) -> set[type[errors.GatewayError]]:
    """Return an error class with everything below it in `gateway.errors`."""
    return {error}.union(*(subclasses(each) for each in error.__subclasses__() if each.__module__ == errors.__name__))


def test_every_error_code_is_documented_with_its_status() -> None:
    """Each error that a request can end with stands in the table of errors, with its HTTP status and code."""
    table = set(re.findall(r"^\| (\d{3}) \| `([A-Z_]+)` \|", (DOCS / "http.md").read_text(), re.MULTILINE))
    raised = subclasses(errors.RequestError) | subclasses(errors.RunError) | subclasses(errors.ServiceUnavailable)
    abstract = {errors.RequestError, errors.RunError}
    expected = {(str(error.status), error.code) for error in raised - abstract}
    expected |= {(str(status), code) for status, code in _HTTP_CODES.items()}
    assert table >= expected
    assert {code for _, code in table} - {code for _, code in expected} <= {"INTERNAL_ERROR", "BAD_REQUEST"}


def test_every_route_is_documented() -> None:
    """Each route stands in the HTTP reference with its method, and no other does."""
    from gateway.app import ROUTES  # noqa: PLC0415 - as in a web process, where it is imported last

    text = (DOCS / "http.md").read_text()
    documented = set(re.findall(r"^\| `(GET|POST|DELETE) ([^`]+)` \|", text, re.MULTILINE))
    served = {
        (method, path)
        for handler in ROUTES
        for path in handler.paths
        for method in handler.http_methods
        if method != "OPTIONS" and handler.include_in_schema
    }
    assert documented == {(method, re.sub(r":\w+}", "}", path)) for method, path in served}


@pytest.mark.parametrize(("fields", "heading"), [(IGNORED, "no effect"), (REFUSED, "are refused")])
def test_fields_that_are_not_honoured_are_documented(fields: dict[str, str], heading: str) -> None:
    """The HTTP reference lists the fields that have no effect and those that are refused, as the code has them."""
    section = (
        (DOCS / "http.md").read_text().split(f"### Fields that {'have ' if heading == 'no effect' else ''}{heading}")[1]
    )
    listed = re.findall(r"^\| `([^`]+)` \| (.+) \|$", section.split("\n##")[0], re.MULTILINE)
    assert dict(listed) == fields


def test_the_error_tree_in_the_docstring_is_the_code() -> None:
    """The tree drawn in `gateway.errors` has every error with its status and code."""
    for error in subclasses(errors.GatewayError) - {errors.GatewayError, errors.RequestError, errors.RunError}:
        if error is not errors.ConfigurationError:
            assert re.search(rf"{error.__name__}\s+{error.status}\s+{error.code}\n", errors.__doc__ or ""), error


@pytest.mark.parametrize("document", sorted(path.name for path in DOCS.glob("*.md")))
def test_python_in_the_documentation_is_python(document: str) -> None:
    """Every Python block of the documentation parses."""
    for block in re.findall(r"```python\n(.*?)```", (DOCS / document).read_text(), re.DOTALL):
        ast.parse(block)


@pytest.mark.parametrize("document", ["README.md", *(f"docs/{path.name}" for path in DOCS.glob("*.md"))])
def test_links_lead_somewhere(document: str) -> None:
    """Every relative link of the documentation leads to a file that is there."""
    source = ROOT / document
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", source.read_text()):
        assert (source.parent / target).exists(), target
