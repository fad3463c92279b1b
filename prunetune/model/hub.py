"""Files from the Hugging Face Hub or its local cache, with a bounded wait when the hub cannot be reached.

Which model is wanted, and what else it may come from, is decided in resolve.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prunetune.core.errors import UnsupportedModelError

PROBE_SECONDS = 5.0
# Weights in safetensors only: pickled weights run code when they are opened.
_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "README.md"]
_NOT_AT_TOP = ["*/*"]


@dataclass(frozen=True)
class HubState:
    """Whether a repository answers: its commit (None: not reachable now), or why the hub refuses it."""

    commit: str | None = None
    refusal: str = ""


def ask(repo: str, revision: str | None) -> HubState:
    """Asks the hub once for ``repo``'s config.json; waits at most PROBE_SECONDS and never retries."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if constants.HF_HUB_OFFLINE:
        return HubState()
    try:
        found = get_hf_file_metadata(hf_hub_url(repo, "config.json", revision=revision), timeout=PROBE_SECONDS)
        return HubState(commit=found.commit_hash)
    except HFValidationError:
        return HubState(refusal=f"{repo!r} is no name that a hub repository can have")
    except GatedRepoError:
        return HubState(refusal="accept its licence on its page first, then log in with `hf auth login`")
    except RevisionNotFoundError:
        return HubState(refusal=f"it has no revision {revision!r}")
    except RemoteEntryNotFoundError:
        return HubState(refusal="it has no config.json, so it is not a transformers model")
    except RepositoryNotFoundError:
        return HubState(refusal="the hub has no such model (or it is private: log in with `hf auth login`)")
    except (HfHubHTTPError, HTTPError, OSError):
        return HubState()  # no connection, a time-out, a server error: as good as offline


def cached_config(repo: str, revision: str | None) -> Path | None:
    """The config.json of ``repo`` in the local hub cache, without any network."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repo, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def download_config(repo: str, commit: str) -> Path:
    """config.json of a repository that has just answered."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo, "config.json", revision=commit, etag_timeout=PROBE_SECONDS))


def cached_snapshot(repo: str, revision: str | None) -> Path | None:
    """The folder of ``repo`` in the local hub cache, or None if it holds no config and weights."""
    config = cached_config(repo, revision)
    if config is None or not any(config.parent.glob("*.safetensors")):
        return None
    return config.parent


def download(repo: str, commit: str) -> Path:
    """Fetches configuration, safetensors weights, tokenizer and licence of one commit.

    Raises:
        UnsupportedModelError: the connection broke, or the disk is full; what arrived is kept for next time.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        folder = snapshot_download(
            repo,
            revision=commit,
            allow_patterns=_PATTERNS,
            ignore_patterns=_NOT_AT_TOP,
            etag_timeout=PROBE_SECONDS,
        )
    except (HTTPError, OSError) as error:
        raise UnsupportedModelError(
            f"downloading {repo} broke off ({error}); run again to continue, or download it by other means "
            "and give the folder's path as model.name"
        ) from error
    return Path(folder)
