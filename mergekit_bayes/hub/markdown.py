"""How a value from a record stands in a card: as text, as code, in a table, or as a word to type.

A record may come from anybody, so none of its values may end the line, the cell, the code block or
the comment that it is in, nor become a link, an element of HTML or an option of a command.
"""

import re
import shlex
from collections.abc import Iterable

_MARKUP = re.compile(r"([\\`*_\[\]<>&~])")
_INLINE = re.compile(r"[`|\\]")  # without a form that holds in a table and outside of one
_BEGINS_BLOCK = re.compile(r"^(\d{0,9})(?=[#+.)-])")  # a heading, or an item of a list
# What GitHub's Markdown makes a link of by itself, an address of mail among it (model@v1.0).
_LINK = re.compile(r"(\S*(?:://|\bwww\.)\S*|[\w.+-]+@[\w-]+\.\S*)", re.IGNORECASE)
_JOINERS = "\u200c\u200d"  # not printable, but part of words and of emoji
_INSIDE_WORD = re.compile(r"(?<=[^\W_])_(?=[^\W_])")
_LONGEST = 2000  # characters; a merge's own notes have up to 400
_LONGEST_BLOCK = 20_000
_TABLE_ROWS = 200


def one_line(value: object, limit: int = _LONGEST) -> str:
    """A value in one line of printable characters, cut if it is long."""
    text = str(value)[: limit + 1]
    text = "".join(
        c if c.isprintable() or c in _JOINERS else " " if c.isspace() else "?" for c in text
    )
    return text if len(text) <= limit else f"{text[:limit]}..."


def text(value: object) -> str:
    """A value as running text, without any markup in it; an address in it is code."""
    parts = _LINK.split(one_line(value).strip())  # every second one is an address
    parts[::2] = [_escaped(part) for part in parts[::2]]
    parts[1::2] = [code(part) for part in parts[1::2]]
    return _BEGINS_BLOCK.sub(r"\1\\", "".join(parts))


def _escaped(value: str) -> str:
    marked = _INSIDE_WORD.sub("\0", value)  # as in a tensor's name: no emphasis
    escaped = _MARKUP.sub(r"\\\1", marked).replace("\0", "_")
    return escaped.replace("\\<", "&lt;")  # so that no comment begins, even for a reader of bytes


def code(value: object) -> str:
    """A value as inline code; a backtick, a pipe or a backslash in it becomes a question mark."""
    return f"`{_INLINE.sub('?', one_line(value, 300)) or ' '}`"


def block(content: str, language: str = "", *, backticks: int = 3) -> str:
    """Lines in a code block, which ends where we end it; cut if they are long."""
    lines = [one_line(line, _LONGEST_BLOCK) for line in content.split("\n")]
    shown = "\n".join(lines)
    if len(shown) > _LONGEST_BLOCK:
        shown = f"{shown[:_LONGEST_BLOCK]}\n..."
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence = "`" * max(backticks, longest + 1)
    return f"{fence}{language}\n{shown}\n{fence}"


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of cells that are `text` or `code` already."""
    columns = list(columns)
    body = [list(row) for row in rows]
    cut = [[f"... and {len(body) - _TABLE_ROWS} more"] + [""] * (len(columns) - 1)]
    lines = [columns, ["---"] * len(columns), *body[:_TABLE_ROWS]]
    lines += cut if len(body) > _TABLE_ROWS else []
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def word(value: object) -> str:
    """A value as one word of a command, which is no option and holds no second command."""
    plain = one_line(value)
    return shlex.quote(f"./{plain}" if plain.startswith("-") else plain)
