"""What was found in a corpus, in lines for people."""

from __future__ import annotations

from s2l_ray.examples.row_problems import names_in_words
from s2l_ray.init.advice import Advice
from s2l_ray.init.figures import ReadExamples, TokenCounts, Turns, turns_of
from s2l_ray.init.layout import FoundLayout
from s2l_ray.init.sampling import CorpusLook

_TURN_ROWS = 20_000
_MOST_SOURCES = 5


def summary_lines(
    look: CorpusLook, examples: ReadExamples, layout: FoundLayout, tokens: TokenCounts, advice: Advice
) -> list[tuple[str, str]]:
    """(label, text) of every line: rows, layout, what is learned, sources, copies, tokens, rows that are too long."""
    read = examples.table.num_rows
    lines = [("corpus", look.counted()), ("layout", layout.text)]
    turns = turns_of(examples.sample(_TURN_ROWS))
    if turns is not None:
        lines.append(("learned", _turns_in_words(turns, min(read, _TURN_ROWS), read)))
    sources = examples.sources()
    if len(sources) > 1:
        largest = ", ".join(f"{names_in_words([name])} {count:,}" for name, count in list(sources.items())[:_MOST_SOURCES])
        lines.append(("sources", f"{len(sources):,}: {largest}{' ...' if len(sources) > _MOST_SOURCES else ''}"))
    if examples.dropped:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in examples.dropped.most_common())
        lines.append(("dropped", "\n".join([counts, *list(examples.first.values())[:3]])))
    copies = examples.num_copies()
    scope = "" if look.is_all else f" among the {read:,} examples that were read"
    lines.append(("duplicates", f"{copies:,} exact copies of earlier examples{scope}"))
    lines.append(("tokens", _tokens_in_words(tokens)))
    lines += [("template", "\n".join(tokens.notes))] if tokens.notes else []
    lines.append(("too long", _too_long(tokens, advice.max_tokens, look.num_rows)))
    return lines


def _turns_in_words(turns: Turns, counted: int, read: int) -> str:
    roles = ", ".join(f"{count:,} {role}" for role, count in turns.roles.most_common())
    parts = [f"answers in {counted:,} conversations{f' of {read:,}' if counted < read else ''}: {turns.num_learned:,}"]
    if turns.num_context:
        parts.append(f"marked as context, not learned: {turns.num_context:,}")
    if turns.num_calls:
        parts.append(f"calls of tools: {turns.num_calls:,}")
    if turns.num_with_tools:
        parts.append(f"conversations with tools: {turns.num_with_tools:,}")
    return "; ".join([*parts, f"messages: {roles}"])


def _tokens_in_words(tokens: TokenCounts) -> str:
    median, high, longest = tokens.quantile(0.5), tokens.quantile(0.99), int(tokens.lengths.max())
    return (
        f"median {median:,}, 99% have at most {high:,}, the longest {longest:,}; {tokens.learned_fraction:.0%} are learned "
        f"({len(tokens.lengths):,} examples, {tokens.how})"
    )


def _too_long(tokens: TokenCounts, limit: int, num_rows: int) -> str:
    share = tokens.share_over(limit)
    if share == 0:
        return f"no example has more than {limit:,} tokens, the recommended max_tokens"
    if len(tokens.lengths) == num_rows:
        found = f"{round(share * num_rows):,} examples have more than {limit:,} tokens, the recommended max_tokens"
        return f"{found}: they are cut, and dropped where no answer is left"
    return (
        f"about {round(share * num_rows):,} examples ({share:.1%} of the sample) have more than {limit:,} tokens, the "
        "recommended max_tokens: they are cut, and dropped where no answer is left"
    )
