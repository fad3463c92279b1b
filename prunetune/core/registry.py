"""Plug-ins by discovery: one file in a folder, one decorator, and it is listed everywhere.

A registry imports the modules of its package on first use, so adding a method edits no existing file.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from prunetune.core.errors import ConfigError, Problem, suggest

T = TypeVar("T")


class Registry(Generic[T]):
    """Named things of one kind that live in one package.

    Args:
        kind: what one entry is called in messages, e.g. ``"mask"``.
        package: dotted name of the folder whose modules register themselves.
    """

    def __init__(self, kind: str, package: str):
        self.kind = kind
        self.package = package
        self._entries: dict[str, T] = {}
        self._aliases: dict[str, str] = {}
        self._discovered = False

    def register(self, name: str, *aliases: str) -> Callable[[T], T]:
        """Decorator that enters a class, function or object under ``name``; ``aliases`` are understood, too."""

        def enter(entry: T) -> T:
            for each in (name, *aliases):
                known = self._entries.get(self._aliases.get(each, each), entry)
                if known is not entry:
                    raise ValueError(f"two {self.kind}s are called {each!r}")
            self._entries[name] = entry
            self._aliases |= dict.fromkeys(aliases, name)
            return entry

        return enter

    def get(self, name: str) -> T:
        """The entry called ``name``; raises ConfigError with a suggestion if there is none."""
        found = self.canonical(name)
        if found not in self._entries:
            known = [*self._entries, *self._aliases]
            raise ConfigError([Problem(f"unknown {self.kind} {name!r}; {suggest(name, known)}")])
        return self._entries[found]

    def canonical(self, name: str) -> str:
        """The name that an alias stands for; any other name as it is."""
        self._discover()
        return self._aliases.get(name, name)

    def aliases(self, name: str) -> list[str]:
        """Other names of an entry, sorted."""
        self._discover()
        return sorted(alias for alias, known in self._aliases.items() if known == name)

    def names(self) -> list[str]:
        """All names, sorted."""
        self._discover()
        return sorted(self._entries)

    def items(self) -> Iterator[tuple[str, T]]:
        """All (name, entry) pairs, sorted by name."""
        return ((name, self._entries[name]) for name in self.names())

    def summary(self, name: str) -> str:
        """First line of the entry's docstring, for listings."""
        doc = getattr(self.get(name), "__doc__", None) or ""
        return doc.strip().splitlines()[0] if doc.strip() else ""

    def _discover(self) -> None:
        if self._discovered:
            return
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):
                importlib.import_module(f"{self.package}.{module.name}")
        self._discovered = True
