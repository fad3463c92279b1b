"""Checks of a configuration that need the method plug-ins; they go into ``load_config(..., checks=...)``.

Names are read from the plug-ins' source, so that `prunetune plan` stays free of torch; a method's own options
are checked by the method itself, which imports it, and only when some are set.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunetune.config.schema import RunConfig
from prunetune.core.errors import Problem, suggest

MASK_PACKAGE = "prunetune.methods.masks"
COMPENSATION_PACKAGE = "prunetune.methods.compensation"
DELTA_PACKAGE = "prunetune.methods.deltas"
RANKS_PACKAGE = "prunetune.methods.ranks"


def check_methods(config: RunConfig) -> list[Problem]:
    """Problems with the names, options and abilities of all methods that are named."""
    found = []
    for section, package, method, options in (
        ("mask", MASK_PACKAGE, config.mask.method, config.mask.options()),
        ("compensation", COMPENSATION_PACKAGE, config.compensation.method, config.compensation.options()),
        ("delta", DELTA_PACKAGE, config.delta.method, config.delta.method_options()),
        ("lora.ranks", RANKS_PACKAGE, config.lora.ranks.method, config.lora.ranks.options()),
    ):
        known = registered_names(package)
        if method not in known:
            message = f"there is no {section} {method!r}; {suggest(method, known)}"
            found.append(Problem(message, f"{section}.method"))
        elif options:
            found += _check_options(section, method, options)
    return found + _check_selection(config)


def _check_selection(config: RunConfig) -> list[Problem]:
    """Sample and token methods need no torch, so they are asked themselves."""
    select = config.selection()
    if select is None:
        return []
    from prunetune.methods.online import check_online

    return check_online(select)


@functools.cache
def registered_names(package: str) -> tuple[str, ...]:
    """Names and aliases that the modules of a plug-in package register, without importing them."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations or () if spec else ()
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.py"))]
    return tuple(sorted(name for file in files for name in _names_in(ast.parse(file.read_text(encoding="utf-8")))))


def _names_in(tree: ast.Module) -> list[str]:
    return [
        name.value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "register"
        for name in call.args
        if isinstance(name, ast.Constant) and isinstance(name.value, str)
    ]


def _check_options(section: str, method: str, options: Mapping[str, Any]) -> list[Problem]:
    if section == "mask":
        from prunetune.methods.masks import check_mask as check
    elif section == "delta":
        from prunetune.methods.deltas import check_delta as check
    elif section == "lora.ranks":
        from prunetune.methods.ranks import check_ranks as check
    else:
        from prunetune.methods.compensation import check_compensation as check
    return check(method, options)
