"""Plain English from what is installed here, to measure how much general ability a model keeps.

It is the running text of the descriptions that installed distributions carry in their metadata; the reference
manual that ships with Python fills up where few packages are installed. Code, tables and lists are left out.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from prunetune.data.docstrings import clean_inline, sentences
from prunetune.data.pysource import SKIPPED_PACKAGES

ENOUGH_CHARACTERS = 160_000
LEAST_CHARACTERS = 60_000
CHARACTERS_PER_PACKAGE = 6_000
_FENCE = re.compile(r"^(```|~~~).*?^(```|~~~)\s*$|<!--.*?-->|<(pre|table|details)\b.*?</\3>", re.S | re.M)
_MARKUP = (
    (re.compile(r"!\[[^\]]*\]\([^)]*\)|!\[[^\]]*\]\[[^\]]*\]|\|[^|\n]+\|_?"), ""),
    (re.compile(r"\[([^\]]+)\](\([^)]*\)|\[[^\]]*\])"), r"\1"),
    (re.compile(r"<[^>\n]+>"), ""),
    (re.compile(r"(\*\*|__)(?=\S)(.+?)(?<=\S)\1"), r"\2"),
    (re.compile(r"(?<=[\w`])__?(?=\W|$)"), ""),
    (re.compile(r"[`_*](?=\S)([^`_*\n]+)(?<=\S)[`_*](?!\w)"), r"\1"),
)


def _running_text(text: str) -> Iterator[str]:
    """The paragraphs of prose in a description written in Markdown or reStructuredText."""
    for block in re.split(r"\n\s*\n", _FENCE.sub("\n\n", text.replace("\r", ""))):
        lines = block.splitlines()
        if not lines or re.match(r"\s{2,}|\t|#|[-*+•>|]\s|\d+[.)]\s|\.\.|:\w+:|={3,}|-{3,}", lines[0]):
            continue
        if any(re.match(r"\s*(([-*+]|\d+[.)])\s|[|=~^-]{3,})|\s{4,}", line) for line in lines[1:]):
            continue
        paragraph = " ".join(lines)
        for pattern, replacement in _MARKUP:
            paragraph = pattern.sub(replacement, paragraph)
        paragraph = clean_inline(paragraph).removesuffix("::")
        if _reads_as_prose(paragraph):
            yield paragraph


def _reads_as_prose(text: str) -> bool:
    letters = sum(character.isalpha() or character in " ,.'" for character in text)
    return (
        len(text.split()) >= 12
        and text.isascii()
        and text[-1] in ".!?"
        and text[0].isupper()
        and letters >= 0.88 * len(text)
        and text.count('"') <= 8
        and not re.match(r"(Changed|New|Added|Deprecated) in (version )?\d", text)
        and not re.search(r"https?:|[`<>{}=|\\]|\.\.\.|\bpip install\b", text)
    )


def _descriptions() -> Iterator[str]:
    """The long descriptions of the installed distributions, in the order of their names."""
    found = {(item.metadata["Name"] or "").lower(): item for item in importlib.metadata.distributions()}
    for name in sorted(found.keys() - SKIPPED_PACKAGES):
        values = found[name].metadata.json  # has the description wherever in the file it was written
        yield str(values.get("description") or "")


def _manual() -> Iterator[str]:
    """The language reference that ships with Python: read as text, topic by topic."""
    spec = importlib.util.find_spec("pydoc_data")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("topics*.py")):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
                    yield from (text for _, text in sorted(ast.literal_eval(node.value).items()))


def general_text(avoid: Iterable[str] = ()) -> str:
    """At least 60 kB of English prose, the same on every call.

    Args:
        avoid: texts whose sentences must not occur, for example the training answers.
    """
    taken = {sentence.casefold() for text in avoid for sentence in sentences(text)}
    parts: list[str] = []
    size = 0
    for source, share, enough in (
        (_descriptions(), CHARACTERS_PER_PACKAGE, ENOUGH_CHARACTERS),
        (_manual(), LEAST_CHARACTERS, LEAST_CHARACTERS * 3 // 2),
    ):
        for text in source:
            used = 0
            for paragraph in _running_text(text):
                known = {sentence.casefold() for sentence in sentences(paragraph)}
                if used + len(paragraph) > share or size > enough or known & taken:
                    continue
                taken |= known
                parts.append(paragraph)
                used += len(paragraph)
                size += len(paragraph)
    return "\n\n".join(parts) + "\n"
