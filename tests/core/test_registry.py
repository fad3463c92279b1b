"""Plug-ins by discovery, and the errors that name what exists."""

from __future__ import annotations

import sys

import pytest

from prunetune.core.errors import ConfigError, Problem, PrunetuneError, suggest
from prunetune.core.registry import Registry


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with a registry, two methods in files of their own, and a private helper."""
    folder = tmp_path / "methods_of_a_test"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from prunetune.core.registry import Registry\nTHINGS = Registry('thing', 'methods_of_a_test')\n"
    )
    for name in ("alpha", "beta"):
        (folder / f"{name}.py").write_text(
            f"from methods_of_a_test import THINGS\n@THINGS.register('{name}')\n"
            f"class Thing:\n    '''What {name} does.\n\n    More.\n    '''\n"
        )
    (folder / "_helper.py").write_text("raise RuntimeError('a private module must not be imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.startswith("methods_of_a_test")]:
        del sys.modules[name]


def test_a_file_in_the_folder_is_enough(package):
    (package / "gamma.py").write_text(
        "from methods_of_a_test import THINGS\n@THINGS.register('gamma')\ndef gamma():\n    '''A function.'''\n"
    )
    from methods_of_a_test import THINGS

    assert THINGS.names() == ["alpha", "beta", "gamma"]
    assert [name for name, _ in THINGS.items()] == THINGS.names()
    assert THINGS.get("alpha").__name__ == "Thing"
    assert THINGS.summary("alpha") == "What alpha does."
    assert THINGS.summary("gamma") == "A function."


def test_unknown_names_are_refused_with_a_suggestion(package):
    from methods_of_a_test import THINGS

    with pytest.raises(ConfigError, match="unknown thing 'alpa'; did you mean 'alpha'"):
        THINGS.get("alpa")
    with pytest.raises(ConfigError, match="unknown thing 'zzz'; known: alpha, beta"):
        THINGS.get("zzz")


def test_two_of_one_name_are_refused():
    registry = Registry("thing", "prunetune.core")
    entry = registry.register("a")(object())
    assert registry.register("a")(entry) is entry
    with pytest.raises(ValueError, match="two things are called 'a'"):
        registry.register("a")(object())


def test_an_alias_is_understood_and_not_listed():
    registry = Registry("thing", "prunetune.core")
    entry = registry.register("first", "old")(object())
    assert registry.get("old") is registry.get("first") is entry
    assert (registry.canonical("old"), registry.canonical("other")) == ("first", "other")
    assert registry.names() == ["first"]
    assert registry.aliases("first") == ["old"]
    with pytest.raises(ValueError, match="two things are called 'old'"):
        registry.register("old")(object())
    with pytest.raises(ConfigError, match="did you mean 'old'"):
        registry.get("odl")


def test_a_broken_file_is_not_passed_over_in_silence(package):
    (package / "broken.py").write_text("import a_module_that_is_not_there\n")
    from methods_of_a_test import THINGS

    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
            THINGS.names()


def test_all_problems_are_said_at_once():
    error = ConfigError([Problem("is missing", "train.lr", "run.yaml:3"), Problem("is odd", where="run.yaml:9")])
    assert str(error).splitlines() == [
        "2 problems in the configuration",
        "  - run.yaml:3: train.lr: is missing",
        "  - run.yaml:9: is odd",
    ]
    assert str(ConfigError([Problem("x")])).startswith("1 problem in")
    assert isinstance(error, PrunetuneError)


def test_suggestions():
    assert suggest("salency", ["saliency", "random"]) == "did you mean 'saliency'?"
    assert suggest("q", ["b", "a"]) == "known: a, b"
