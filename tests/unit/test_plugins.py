"""Loading `agents/` and `scorers/` by path."""

import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import agents as sdk
import pytest

from gateway.errors import ConfigurationError
from gateway.plugins import folder_version, load_agents, load_modules

AGENT = "from agents import Agent\nagent = Agent(name='A')\n"
OFFLINE = "from agents.testing import ScriptedModel\nmodel = ScriptedModel()\n"
SHIPPED_AGENTS = Path(__file__).parents[2] / "agents"


@pytest.fixture(autouse=True)
def modules_put_back():
    """Each test finds the loaded plug-ins of the others as they were."""
    before = {name: module for name, module in sys.modules.items() if "_plugins" in name}
    yield
    for name in [name for name in sys.modules if "_plugins" in name]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture
def write(tmp_path):
    """Write files below a plug-in folder, and return that folder."""

    def files(**contents: str) -> Path:
        folder = tmp_path / "agents"
        for name, content in contents.items():
            path = folder / (name.replace("__in__", "/") + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(dedent(content))
        return folder

    return files


def test_agents_in_order(write):
    """Each folder with an agent.py is an agent, by name and in order of name; other files and folders are not."""
    folder = write(b__in__agent=AGENT, a__in__agent=AGENT, a__in__offline=OFFLINE, shared__in__data="", notes="")

    loaded = load_agents(folder)

    assert list(loaded) == ["a", "b"]
    assert loaded["a"].offline_model is not None
    assert loaded["b"].offline_model is None
    assert all(
        isinstance(plugin.agent, sdk.Agent) and plugin.folder == folder / name for name, plugin in loaded.items()
    )


def test_sdk_keeps_its_name():
    """After loading the shipped agents, in a process that runs beside their folder, `agents` is still the SDK."""
    code = """
        from pathlib import Path
        from gateway.plugins import load_agents
        loaded = load_agents(Path("agents"))
        import agents
        assert agents.Agent.__module__.startswith("agents."), agents.__file__
        assert "site-packages" in agents.__file__, agents.__file__
        assert all(type(plugin.agent) is agents.Agent for plugin in loaded.values())
        print(*loaded)
    """
    run = subprocess.run(
        [sys.executable, "-c", dedent(code)], cwd=SHIPPED_AGENTS.parent, capture_output=True, text=True, check=False
    )
    assert run.stdout.split() == ["math", "support"], run.stderr
    load_agents(SHIPPED_AGENTS)
    assert sys.modules["agents"] is sdk


def test_relative_imports(write):
    """Files of a folder import each other relatively, sub-packages included, and share one copy of a module."""
    folder = write(
        a__in__data="RATES = {}",
        a__in__deep__in__tools="from ..data import RATES\nRATES['x'] = 1\n",
        a__in__agent=AGENT + "from .deep import tools\nfrom .data import RATES\nassert RATES == {'x': 1}\n",
        a__in__offline=OFFLINE + "from .agent import agent\nfrom .data import RATES\nassert RATES\nmodel.of = agent\n",
    )
    plugin = load_agents(folder)["a"]
    assert plugin.offline_model.of is plugin.agent


def test_folders_do_not_share_modules(write):
    """Two agents may have files of one name."""
    agent = "from agents import Agent\nfrom .data import NAME\nagent = Agent(name=NAME)\n"
    folder = write(a__in__data="NAME = 'one'", b__in__data="NAME = 'two'", a__in__agent=agent, b__in__agent=agent)
    assert [plugin.agent.name for plugin in load_agents(folder).values()] == ["one", "two"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a__in__agent": "agent = ("}, r"a/agent\.py cannot be imported: SyntaxError"),
        (
            {"a__in__agent": "import no_such_module"},
            r"a/agent\.py cannot be imported: ModuleNotFoundError.*no_such_module",
        ),
        ({"a__in__agent": "1 / 0"}, r"a/agent\.py cannot be imported: ZeroDivisionError"),
        ({"a__in__agent": "raise SystemExit(3)"}, r"a/agent\.py cannot be imported: SystemExit"),
        ({"a__in__agent": "x = 1"}, r"a/agent\.py must set `agent` to an Agent"),
        ({"a__in__agent": "agent = 'math'"}, r"a/agent\.py must set `agent` to an Agent"),
        ({"a__in__agent": AGENT, "a__in__offline": "model = 1"}, r"a/offline\.py must set `model` to a Model"),
        ({"a__in__agent": AGENT, "a__in__offline": "(("}, r"a/offline\.py cannot be imported: SyntaxError"),
        ({"a__in__agent": AGENT, "__init__": ""}, r"agents/__init__\.py would shadow"),
        ({"my-agent__in__agent": AGENT}, r"my-agent: an agent's folder must be named like a Python variable"),
        ({"data": ""}, r"agents holds no agent"),
    ],
)
def test_mistakes(write, files, message):
    """A mistake names the file and what it must be."""
    with pytest.raises(ConfigurationError, match=message):
        load_agents(write(**files))


def test_no_folder(tmp_path):
    """A missing folder is named, with the ways out."""
    with pytest.raises(ConfigurationError, match=r"no agents folder .*nowhere.*GATEWAY_AGENTS_DIR"):
        load_agents(tmp_path / "nowhere")


def test_failed_import_is_tried_again(write):
    """A file that was mended loads: nothing of the failed attempt is kept."""
    with pytest.raises(ConfigurationError):
        load_agents(write(a__in__agent="1 / 0"))
    assert list(load_agents(write(a__in__agent=AGENT))) == ["a"]


def test_version_changes_with_content(write):
    """The version follows names and contents of a folder's files, of sub-folders too."""
    folder = write(a__in__agent=AGENT) / "a"
    versions = [folder_version(folder)]
    (folder / "agent.py").write_text(AGENT + "\n")
    versions.append(folder_version(folder))
    (folder / "prompts").mkdir()
    (folder / "prompts" / "tone.txt").write_text("kind")
    versions.append(folder_version(folder))
    (folder / "prompts" / "tone.txt").rename(folder / "prompts" / "style.txt")
    versions.append(folder_version(folder))
    assert len(set(versions)) == 4
    assert all(len(version) == 12 for version in versions)


def test_version_keeps_names_and_contents_apart(tmp_path):
    """Moving a byte from one file to the next is a change."""
    versions = set()
    for number, (one, two) in enumerate([("xy", "z"), ("x", "yz")]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "1").write_text(one)
        (folder / "2").write_text(two)
        versions.add(folder_version(folder))
    assert len(versions) == 2


def test_version_leaves_out_caches(write):
    """Bytecode, hidden files and the place of the folder are no part of the version."""
    folder = write(a__in__agent=AGENT) / "a"
    before = folder_version(folder)
    for cache in ("__pycache__", ".ipynb_checkpoints"):
        (folder / cache).mkdir()
        (folder / cache / "agent.pyc").write_bytes(b"x")
    (folder / ".DS_Store").write_bytes(b"x")
    assert folder_version(folder) == before
    assert folder_version(folder.rename(folder.with_name("b"))) == before


def test_scorer_modules(write):
    """The files of a folder are loaded in order of name; a leading underscore makes a helper that they may import."""
    folder = write(b="from ._shared import X\ny = X", a="from ._shared import X\nimport sys\n", _shared="X = object()")

    a, b = load_modules(folder, "scorer_plugins")

    assert (a.__name__, b.__name__) == ("scorer_plugins.a", "scorer_plugins.b")
    assert a.X is b.X is b.y


def test_scorer_mistake(write):
    """A scorer file that cannot be imported is named."""
    with pytest.raises(ConfigurationError, match=r"bad\.py cannot be imported: NameError"):
        list(load_modules(write(bad="nonsense"), "scorer_plugins"))
