"""What a user sees: examples with their learned part in colour, or between marks where there are no colours."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING

from s2l_ray.init.figures import Pieces

if TYPE_CHECKING:
    from rich.text import Text

LEARNED_STYLE = "bold green"
OPENING, CLOSING = "⟦", "⟧"
_MOST_CHARACTERS = 600


def shown_example(pieces: Pieces, *, in_colour: bool) -> Text:
    """An example's text, the learned part coloured or between marks, long pieces without their middle.

    Nothing in the text acts on a terminal or is taken for markup: control characters are shown by their codes.
    """
    from rich.text import Text

    text = Text()
    for piece, is_learned in pieces:
        shown = _shortened(visible(piece))
        if is_learned and not in_colour:
            shown = f"{OPENING}{shown}{CLOSING}"
        text.append(shown, LEARNED_STYLE if is_learned and in_colour else "")
    return text


def visible(text: str) -> str:
    """Text in which control characters, those that turn its direction, and half characters stand by their codes."""
    return "".join(character if _is_harmless(character) else _code(character) for character in text.replace("\r\n", "\n"))


def _is_harmless(character: str) -> bool:
    return character == "\n" or unicodedata.category(character) not in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def _code(character: str) -> str:
    number = ord(character)
    return "    " if character == "\t" else f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"


def _shortened(text: str) -> str:
    if len(text) <= _MOST_CHARACTERS:
        return text
    half = _MOST_CHARACTERS // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


def labelled(label: str, text: str) -> str:
    """A line of the summary, as a stage's line in a log. Lines of more than one stay under the first."""
    first, *rest = text.splitlines() or [""]
    return "\n".join([f"{label:<13} {first}", *(f"{'':<13} {line}" for line in rest)])


def joined(parts: Iterable[str]) -> str:
    """Sentences in a line, empty ones left out."""
    return "; ".join(filter(None, parts))
