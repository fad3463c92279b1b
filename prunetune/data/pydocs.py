"""The embedded data set: questions about the Python documentation installed here, and their answers.

Rows come from the docstrings and signatures of the running interpreter's standard library and of the
installed packages. Nothing is downloaded, and the same installation always gives the same rows.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from prunetune.data import docstrings, pysource
from prunetune.data.pysource import Entry
from prunetune.data.split import content_key, hold_out

# About 120 tokens of English with some code in it.
ANSWER_CHARACTERS = 430
ENTRIES_PER_STDLIB_MODULE = 60
ENTRIES_PER_PACKAGE = 24
_USELESS = re.compile(
    r"^(deprecated|internal|todo|xxx|fixme|see |undocumented|not implemented|override|overridden|same as|"
    r"like |"
    r"alias|for internal|private|helper|this (function|method|class) is (deprecated|internal)|copyright|"
    r"test|initiali[sz]e self|subclasses|hook|stub|dummy|unused|legacy|\W)",
    re.IGNORECASE,
)
_VERB_LIST = """
add append apply attach build call cancel change check clear close compare compute concatenate
configure connect construct convert copy count create decode decompress delete detach determine
disable discard dispatch display download draw emit enable encode encrypt ensure escape evaluate
execute expand extract fetch fill filter find flush format generate get group handle import
initialize insert invoke join list load locate lock log make map mark merge move normalize open pack
parse perform plot pop prepare print process produce push put quote raise read receive register
release remove rename render replace report reset resolve restore retrieve reverse round run save
scan schedule search select send serialize set show shuffle skip sort split start stop store strip
submit swap test tokenize transform translate truncate unpack unregister update upload validate
verify wait walk wrap write yield
"""
_VERBS = frozenset(_VERB_LIST.split())


@dataclass(frozen=True)
class Question:
    """One row. ``top`` is the top-level module that it is about."""

    prompt: str
    completion: str
    top: str


@dataclass(frozen=True)
class PyDocs:
    """Rows for training, rows about other modules for validation, and what they were made from."""

    train: tuple[Question, ...]
    validation: tuple[Question, ...]
    standard_modules: int
    packages: int
    held_out: tuple[str, ...]


def entries() -> Iterator[tuple[Entry, bool]]:
    """Everything documented here, with whether it belongs to the standard library, in a fixed order."""
    for name in pysource.C_MODULES:
        yield from ((entry, True) for entry in pysource.read_c_module(name))
    for top, files in pysource.stdlib_files():
        yield from ((entry, True) for entry in pysource.read_package(top, files))
    for top, files in pysource.package_files():
        yield from ((entry, False) for entry in pysource.read_package(top, files))


def _usable(found: Iterable[tuple[Entry, bool]]) -> dict[str, list[tuple[Entry, list[str]]]]:
    """Entries with good prose by top-level module: one per name and text, a limited number each."""
    names: set[str] = set()
    texts: set[str] = set()
    groups: dict[str, list[tuple[Entry, list[str]]]] = defaultdict(list)
    limits: dict[str, int] = {}
    for entry, standard in found:
        prose = docstrings.paragraphs(entry.doc)
        if entry.name in names or not prose or not _worth_asking(prose[0]):
            continue
        text = content_key(" ".join(prose).casefold())
        if text not in texts:
            names.add(entry.name)
            texts.add(text)
            groups[entry.top].append((entry, prose))
            limits[entry.top] = ENTRIES_PER_STDLIB_MODULE if standard else ENTRIES_PER_PACKAGE
    return {
        top: sorted(group, key=lambda item: (item[0].kind != "module", content_key(item[0].name)))[: limits[top]]
        for top, group in groups.items()
    }


def _worth_asking(text: str) -> bool:
    """Whether a first paragraph says something, in English, that makes sense on its own."""
    words = text.split()
    plain = sum(character.isascii() for character in text) >= 0.98 * len(text)
    letters = sum(character.isalpha() or character == " " for character in text) >= 0.75 * len(text)
    prose = text.count("`") % 2 == 0 and text.count("=") < 3 and not text.endswith(",.")
    starts = text[:1].isupper() or text[:1] == "`"
    return len(words) >= 4 and starts and plain and letters and prose and not _USELESS.match(text)


def questions(entry: Entry, prose: list[str]) -> Iterator[Question]:
    """The rows about one entry; which wordings are used depends on its name alone."""
    answer = docstrings.shorten(" ".join(prose), ANSWER_CHARACTERS)
    if not _worth_asking(answer):
        return
    pick = int(content_key("wording", entry.name)[:8], 16)
    yield Question(_what(entry, pick), answer, entry.top)
    first, *rest = docstrings.sentences(answer)
    if entry.kind in {"function", "method"} and entry.signature is not None:
        call = f"`{entry.name}{entry.signature}`"
        task = _task(first)
        if task and pick % 3 != 0:
            about = f" with `{entry.top}`" if entry.top != "builtins" else " in Python"
            yield Question(f"How do I {task}{about}?", _joined(f"Use {call}.", " ".join(rest)), entry.top)
        elif entry.signature != "()":
            wording = ("What is the signature of `{}`?", "Which arguments does `{}` take?")[pick % 2]
            yield Question(wording.format(entry.name), _joined(f"{call}.", first), entry.top)
    elif entry.kind == "class" and len(entry.members) >= 3:
        listed = ", ".join(f"`{name}`" for name in entry.members[:8])
        more = f"{len(entry.members)} public methods, among them " if len(entry.members) > 8 else "the methods "
        yield Question(f"Which methods does `{entry.name}` have?", f"`{entry.name}` has {more}{listed}.", entry.top)
    elif entry.kind == "module" and len(entry.members) >= 3:
        listed = ", ".join(f"`{name}`" for name in entry.members[:8])
        more = "Among others " if len(entry.members) > 8 else ""
        yield Question(f"What does the module `{entry.name}` offer?", f"{more}{listed}. {first}", entry.top)


def _joined(call: str, text: str) -> str:
    """A call and as many sentences about it as an answer may have."""
    return f"{call} {docstrings.shorten(text, ANSWER_CHARACTERS - len(call) - 1)}".strip()


def _what(entry: Entry, pick: int) -> str:
    """The question for what an entry is or does; half of the calls show their arguments."""
    if entry.kind == "module":
        return (f"What is the `{entry.name}` module for?", f"What is `{entry.name}` in Python?")[pick % 2]
    if entry.kind == "class":
        return (f"What is `{entry.name}`?", f"What is the class `{entry.name}` for?")[pick % 2]
    if entry.kind == "property":
        return f"What is the attribute `{entry.name}`?"
    call = entry.name + (entry.signature or "")
    return (
        f"What does `{call}` do?",
        f"What does `{entry.name}` do?",
        f"Explain `{call}` briefly.",
        f"What is `{entry.name}` used for?",
    )[pick // 7 % 4]


def _task(sentence: str) -> str | None:
    """``Return the size of a file.`` as ``get the size of a file``; None if it does not read like a task."""
    words = sentence.rstrip(".").split()
    if not 4 <= len(words) <= 16 or re.search(r"[(:;]|\bself\b|\bthis\b", sentence):
        return None
    verb, rest = words[0].lower(), " ".join(words[1:])
    if verb in {"return", "returns"}:
        truth = re.fullmatch(r"(?:`?[Tt]rue`?,? (?:if and only if|if|when|iff)|whether(?: or not)?) (.+)", rest)
        return f"check whether {truth[1].split(', ')[0]}" if truth else f"get {rest}"
    for base in (verb, verb.removesuffix("s"), verb.removesuffix("es")):
        if base in _VERBS:
            return f"{base} {rest}"
    return None


@cache
def _all_questions() -> tuple[tuple[Question, ...], frozenset[str]]:
    """Every row, in an order that only depends on what is asked, and the standard modules it came from."""
    found = [*entries()]
    standard = frozenset(entry.top for entry, is_standard in found if is_standard)
    rows: dict[str, Question] = {}
    for _, group in sorted(_usable(found).items()):
        for entry, prose in group:
            for question in questions(entry, prose):
                rows.setdefault(question.prompt, question)
    return tuple(sorted(rows.values(), key=lambda row: content_key(row.prompt))), standard


def load(validation_fraction: float = 0.05) -> PyDocs:
    """All rows, split so that validation asks about top-level modules that training never mentions.

    Args:
        validation_fraction: share of the rows to hold out, in [0, 1].
    """
    rows, standard = _all_questions()
    wanted = max(1, round(validation_fraction * len(rows)))
    held = hold_out([row.top for row in rows], wanted, largest=1 / 6)
    tops = {row.top for row in rows}
    return PyDocs(
        train=tuple(row for row in rows if row.top not in held),
        validation=tuple(row for row in rows if row.top in held),
        standard_modules=len(standard & tops),
        packages=len(tops - standard),
        held_out=tuple(sorted(map(str, held))),
    )
