"""What a user sees: examples with their learned part in colour, or between marks where there are no colours."""

from __future__ import annotations

import shlex
import sys
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2l_ray.init.figures import Pieces
from s2l_ray.init.start import Start

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
        shown = visible(_shortened(piece))
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
    if len(text) <= 2 * _MOST_CHARACTERS:  # a few left-out ones would not be worth a remark
        return text
    half = _MOST_CHARACTERS // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


def show(found: Start, path: Path) -> None:
    """Print what was found, a few examples, the advice with its reasons, and what is left to decide."""
    from rich.console import Console

    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    console = Console(highlight=False, soft_wrap=True)
    in_colour = console.is_terminal and not console.no_color and not console.is_dumb_terminal
    for label, text in found.summary:
        console.print(_labelled(label, text))
    marks = "in green" if in_colour else f"between {OPENING} and {CLOSING}"
    for number, pieces in enumerate(found.shown, 1):
        console.rule(f"example {number} of {len(found.shown)}, what is learned {marks}", style="", characters="-", align="left")
        console.print(shown_example(pieces, in_colour=in_colour))
    console.rule("recommended", style="", characters="-", align="left")
    for place, setting in found.advice.settings.items():
        if setting.is_set and setting.reason:
            console.print(_labelled(f"{place} {short(setting.value)}", setting.reason, 48))
    for place, question in found.questions.items():
        console.print(_labelled("CHOOSE", f"{place}: {question.reason}"))
    console.print(_labelled("written", f"{path}. Next: s2l plan {shlex.quote(str(path))}"))


def _labelled(label: str, text: str, width: int = 13) -> Text:
    """A line of the summary, as a stage's line in a log. What follows in other lines stands under it."""
    from rich.text import Text

    first, *rest = visible(text).splitlines() or [""]
    return Text("\n".join([f"{label:<{width}} {first}".rstrip(), *(f"{'':<{width}} {line}" for line in rest)]))


def short(value: Any) -> str:
    """A value of the config in a few words."""
    if isinstance(value, dict) and "scratch" in value:
        shape = value["scratch"]
        return f"from scratch, {shape['layers']} layers of {shape['hidden']}"
    return ", ".join(f"{key} {inner}" for key, inner in value.items()) if isinstance(value, dict) else str(value)
