"""README.md of the run folder and of the exported model: a model card with the exact configuration."""

from __future__ import annotations

import re
from typing import Any

import yaml

from prunetune.report.gather import RunRecord
from prunetune.report.story import base_name, how_made, is_hub_id, story
from prunetune.report.table import before_after_markdown
from prunetune.report.templating import render

# Identifiers that the Hub knows; anything else is "other" with its own name beside it.
HUB_LICENCES = {
    "apache-2.0",
    "mit",
    "bsd-3-clause",
    "cc-by-4.0",
    "cc-by-sa-4.0",
    "cc-by-nc-4.0",
    "gemma",
    "llama2",
    "llama3",
    "llama3.1",
    "llama3.2",
    "llama3.3",
    "openrail",
    "bigscience-openrail-m",
}


def model_card(record: RunRecord) -> str:
    """The card's Markdown, with YAML front matter."""
    return render(
        "card.md.jinja",
        front_matter=yaml.safe_dump(front_matter(record), sort_keys=False, allow_unicode=True),
        **story(record, "path/to/this/folder"),
        how_made=how_made(record),
        table=before_after_markdown(record.results) if record.results else "",
        licence_note=licence_note(record),
    )


def front_matter(record: RunRecord) -> dict[str, Any]:
    """What the Hub reads: base_model only if it is a Hub id, licence by the Hub's own names."""
    found: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    base = str(record.facts.get("base_model") or "")
    if is_hub_id(base):
        found |= {"base_model": base, "base_model_relation": "finetune"}
    licence = str(record.facts.get("base_licence") or "").strip()
    known = re.sub(r"\s+", "-", licence.lower())
    if known in HUB_LICENCES:
        found["license"] = known
    elif licence:
        found |= {"license": "other", "license_name": known}
    return found | {"tags": ["prunetune", "pruned", "lora", "text-generation"]}


def licence_note(record: RunRecord) -> str:
    """On which terms the model may be used: the base model's, and the data's."""
    base = str(record.facts.get("base_licence") or "").strip()
    data = str(record.facts.get("data_licence") or "").strip()
    first = (
        f"The weights derive from {base_name(record)}, which is under {base}; its terms go on to hold."
        if base
        else f"The weights derive from {base_name(record)}, whose licence is not known here: "
        "look it up before you share this model."
    )
    second = (
        f"The training data is under: {data}."
        if data
        else "The licence of the training data is not known here: whoever shares this model must check it."
    )
    return f"{first} {second}"
