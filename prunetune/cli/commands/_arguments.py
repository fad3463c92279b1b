"""Arguments that several commands share, and how they become a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from prunetune.config.schema import RunConfig

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file of the run, e.g. configs/quickstart.yaml")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="settings that win over the file, e.g. target.kept=60% train.max_steps=80"
    ),
]


def size_bytes(option: str, text: str) -> int:
    """A size as it is typed; raises ConfigError that names the option."""
    from prunetune.core.errors import ConfigError, Problem
    from prunetune.core.sizes import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise ConfigError([Problem(str(error), option)]) from None


def read_run(config: Path, overrides: list[str] | None) -> RunConfig:
    """The checked configuration of a run; raises ConfigError with all problems at once."""
    from prunetune.config.load import load_config
    from prunetune.pipeline.checks import check_methods

    return load_config(config, overrides or [], checks=[check_methods])
