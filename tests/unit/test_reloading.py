"""Settings that change while the process runs."""

from pathlib import Path

import pytest

from gateway.reloading import LiveSettings
from gateway.settings import load_settings


@pytest.fixture
def toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A settings file that the process is told to use."""
    path = tmp_path / "gateway.toml"
    path.write_text("[agents.math]\nsample_rate = 0.5\n")
    monkeypatch.setenv("GATEWAY_CONFIG", str(path))
    return path


def test_a_file_that_was_written_anew_counts(toml: Path) -> None:
    """A new rate in the file is the rate from the next look on, and an unchanged file is not read again."""
    live = LiveSettings(load_settings())
    assert not live.refresh()
    toml.write_text("sample_rate = 0.25\n[agents.math]\nsample_rate = 0.125\nslow_s = 2.5\n")
    assert live.refresh()
    assert live.now.sample_rate == 0.25
    assert live.now.agents["math"].sample_rate == 0.125
    assert live.now.agents["math"].slow_s == 2.5


@pytest.mark.parametrize("broken", ["[agents.math]\nsample_rate = 7\n", "sample_rate = \n", "no_such_setting = 1\n"])
def test_a_file_that_is_not_valid_changes_nothing(toml: Path, broken: str) -> None:
    """Settings that are not valid leave those that were there, until the file is right again."""
    live = LiveSettings(load_settings())
    toml.write_text(broken)
    assert not live.refresh()
    assert live.now.agents["math"].sample_rate == 0.5
    toml.write_text("[agents.math]\nsample_rate = 0.75\n")
    assert live.refresh()
    assert live.now.agents["math"].sample_rate == 0.75


def test_the_environment_still_counts_for_more(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the environment sets is not overridden by a file that was written anew."""
    monkeypatch.setenv("GATEWAY_SAMPLE_RATE", "0.9")
    live = LiveSettings(load_settings())
    toml.write_text("sample_rate = 0.1\n")
    live.refresh()
    assert live.now.sample_rate == 0.9
