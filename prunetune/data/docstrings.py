"""From a docstring to a few clean sentences: sections, markup, examples and directives are left out."""

from __future__ import annotations

import inspect
import re

_SECTION = re.compile(
    r"^\s*(args|arguments|parameters?|params|other parameters|keyword arg(ument)?s|returns?|"
    r"return values?|yields?|raises|"
    r"exceptions|warns|examples?|usage|notes?|warnings?|attributes|methods|see also|references|todo|"
    r"inputs?|outputs?|"
    r"shape|options|keywords|details|constructor|call arguments)\s*(:.*)?$",
    re.IGNORECASE,
)
_FIELD = re.compile(r"^\s*(:\w[^:]*:(\s|$)|@\w+)")
_UNDERLINE = re.compile(r"^\s*([-=~^*+#])\1{2,}\s*$")
_BULLET = re.compile(r"^\s*([-*+•]|\d+[.)]|#\.)\s+\S")
_CALL_LINE = re.compile(r"^[\w.]+\(.*\)(\s*->.*|\s*[-–—]+\s.*|\s*)$")
_POINTER = re.compile(
    r"^(please )?(see|refer to|for (more|further) (details|information)|check out|read)\b", re.IGNORECASE
)
_SENTENCE_END = re.compile(
    r""
    r""
    r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<!vs\.)(?<!cf\.)(?<!resp\.)(?<!approx\.)(?<!a\.k\.a\.)\s+(?=[A-Za-z`\"'(])"
)
_INLINE = (
    (re.compile(r"\[`~(?:[\w]+\.)*([^`\]]+)`\](\([^)]*\))?"), r"`\1`"),
    (re.compile(r"\[`([^`\]]+)`\](\([^)]*\))?"), r"`\1`"),
    (re.compile(r":[\w:.+-]+:`~(?:[\w.]*\.)?([\w()]+)`"), r"`\1`"),
    (re.compile(r":[\w:.+-]+:`[!~.]*([^`<]+?)\s*(<[^`>]*>)?`"), r"`\1`"),
    (re.compile(r"``([^`]+)``"), r"`\1`"),
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`__?"), r"\1"),
    (re.compile(r"\[([^\]`]+)\]\((https?:[^)]*)\)"), r"\1"),
    (re.compile(r"`([^`'\s]+)'"), r"`\1`"),
    (re.compile(r"(?<![\w*])\*\*([^\s*][^*]*)\*\*(?![\w*])"), r"\1"),
    (re.compile(r"(?<![\w*])\*([A-Za-z_][\w ]*)\*(?![\w*])"), r"\1"),
    (re.compile(r"</?(Tip|b|i|em|code|tt|p)>"), ""),
    (re.compile(r"`[.~]+(?=[A-Za-z])"), "`"),
    (re.compile(r"(?<=`)\\\\?(?=[a-z ])"), ""),
)


def clean_inline(text: str) -> str:
    """Running text without reStructuredText roles, double backticks, links and emphasis."""
    text = " ".join(text.split())
    for pattern, replacement in _INLINE:
        text = pattern.sub(replacement, text)
    return text.strip()


def sentences(text: str) -> list[str]:
    """The sentences of a paragraph; abbreviations such as ``e.g.`` do not end one."""
    return [part.strip() for part in _SENTENCE_END.split(text) if part.strip()]


def _prose_lines(block: str) -> tuple[list[str], bool]:
    """The leading prose of a block, and whether the prose of the docstring ends in it."""
    kept: list[str] = []
    for line in block.splitlines():
        ends = _SECTION.match(line) or _FIELD.match(line) or _BULLET.match(line) or _UNDERLINE.match(line)
        if ends or line.lstrip().startswith((">>>", "```", ".. ", "|", "+--", "$ ", "<")):
            if _UNDERLINE.match(line) and kept:
                kept.pop()  # the title above the line
            return kept, True
        if line.startswith((" ", "\t")) and kept:
            return kept, True  # a table, code or a definition list
        kept.append(line)
    return kept, False


def paragraphs(doc: str) -> list[str]:
    """The opening prose of a docstring, one clean string per paragraph; empty if it has none."""
    found: list[str] = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(doc)):
        lines, ended = _prose_lines(block)
        if not found:
            while lines and _CALL_LINE.match(lines[0].strip()):
                lines = lines[1:]
        text = clean_inline(" ".join(lines))
        if text.endswith(":"):
            # It introduces something that is not prose; the sentences before that one still stand.
            text, ended = " ".join(sentences(text)[:-1]), True
        if text and not text[0].isspace():
            found.append(text if text[-1] in ".!?" else text + ".")
        if ended and not (block.lstrip().startswith(".. version") and not lines):
            break
    return found


def shorten(text: str, limit: int) -> str:
    """Whole sentences from the start of ``text`` that fit ``limit`` characters; empty if not even one does.

    Pointers to other pages ("See the documentation for ...") say nothing on their own and are left out.
    """
    result = ""
    for sentence in sentences(text):
        if _POINTER.match(sentence):
            continue
        if len(result) + len(sentence) + 1 > limit:
            break
        result = f"{result} {sentence}".strip()
    return result
