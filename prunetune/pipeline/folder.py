"""The run folder: where everything goes, what was set, with which versions."""

from __future__ import annotations

import glob
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from prunetune.config.schema import RunConfig
from prunetune.core.errors import ConfigError, Problem
from prunetune.core.files import discard, sweep, write_json, write_text

RESOLVED = "resolved.yaml"
VERSIONS = "versions.json"
PACKAGES = (
    *("prunetune", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "safetensors", "numpy"),
    "bitsandbytes",
)


def open_folder(config: RunConfig, *, resume: bool, overwrite: bool) -> None:
    """Makes the run folder and records settings and versions in it.

    Args:
        config: the run's settings; ``config.folder`` is the run folder.
        resume: go on in a folder that exists.
        overwrite: delete what a former run left there.

    Raises:
        ConfigError: the folder holds a run and neither was asked for, or the run there had other settings.
    """
    folder, text = config.folder, resolved_text(config)
    sweep(folder.parent, glob.escape(folder.name))
    sweep(folder)
    exists = (folder / RESOLVED).exists()
    if exists and overwrite:
        discard(folder)
    elif exists and not resume:
        raise ConfigError(
            [
                Problem(
                    f"{folder} holds a run already; add --resume to go on with it, --overwrite to start anew, or set "
                    "another folder=...",
                    "folder",
                )
            ]
        )
    elif exists:
        _require_same(folder, text)
    elif folder.exists() and any(folder.iterdir()):
        raise ConfigError([Problem(f"{folder} is not empty and not a run; set another folder=...", "folder")])
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / RESOLVED, text)
    write_json(folder / VERSIONS, versions())


def _require_same(folder: Path, text: str) -> None:
    """Resuming with other settings would not be the run that was started; evaluation and export may change."""
    before = _flat(read_config(folder).model_dump(mode="json"))
    now = _flat(RunConfig(**yaml.safe_load(text)).model_dump(mode="json"))
    free = ("evaluate", "export", "folder")
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key) and not key.startswith(free)]
    if changed:
        advice = "resume with the same settings, or set another folder=..."
        raise ConfigError(
            [
                Problem(f"is {now.get(key)}, but the run in {folder} has {before.get(key)}; {advice}", key)
                for key in changed
            ]
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def resolved_text(config: RunConfig) -> str:
    """The whole configuration, defaults included, as YAML that `prunetune train` takes."""
    values = config.model_dump(mode="json")
    values["target"] = {key: value for key, value in values["target"].items() if value is not None}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def read_config(folder: Path) -> RunConfig:
    """The configuration that a run folder was made with.

    Raises:
        ConfigError: there is no run in the folder.
    """
    path = folder / RESOLVED
    if not path.exists():
        raise ConfigError([Problem(f"there is no run in {folder} ({RESOLVED} is missing)", "folder")])
    try:
        return RunConfig(**{**yaml.safe_load(path.read_text(encoding="utf-8")), "folder": folder})
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise ConfigError([Problem(f"{path} is damaged ({error}); restore it", "folder")]) from error


def versions() -> dict[str, str]:
    """Versions of Python, the platform and the packages that results depend on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
