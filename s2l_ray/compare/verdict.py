"""The comparison's answer in one sentence, for somebody who has to decide what to train on."""

from __future__ import annotations

from collections.abc import Sequence

from s2l_ray.compare.statistics import LEVEL, MACRO, POOL, TOKENS, Difference, Row, detectable_difference

WORDS = {TOKENS: "over tokens", MACRO: "averaged over sources"}


def verdict(rows: Sequence[Row], primary: Row, detectable: float | None) -> list[str]:
    """One sentence about the primary arm against random in both losses, and where another arm of its budget is better than
    both, clearly in one loss and not worse in the other, a second that names the best of these."""
    name = "S2L" if primary.arm == "s2l" else primary.arm
    if not primary.differences or detectable is None:
        return [
            f"Nothing can be said of {name} and random: fewer than two pairs at {primary.budget:,} examples have finite "
            "losses. Lower target.learning_rate."
        ]
    signs = {kind: _sign(primary.differences[kind]) for kind in WORDS}
    found = {kind: primary.differences[kind] for kind in WORDS}
    better = _better(rows, primary)
    both = f"{_amount(found[TOKENS])} per token and {_amount(found[MACRO])} averaged over sources"
    if signs[TOKENS] == signs[MACRO] == -1:
        sentence = f"{name} is better than random here: by {both}{_share(primary)}.{_in_the_pool(primary)}"
    elif signs[TOKENS] == signs[MACRO] == 1:
        advice = f"{name} is worse than random here" if better else f"Take random: {name} is worse here"
        sentence = f"{advice}, by {both}."
    elif not any(signs.values()):
        macro = detectable_difference(found[MACRO].deviation, primary.seeds)
        sentence = (
            f"No difference between {name} and random that this comparison could see at {primary.budget:,} examples (it would "
            f"have seen {detectable:.3f} nats per token, {macro:.3f} averaged over sources)."
        )
    else:
        parts = [f"{_word(signs[kind])} {WORDS[kind]} ({_amount(found[kind])})" for kind in WORDS]
        sentence = f"{name} against random: {parts[0]}, {parts[1]}."
    lost = f" ({primary.diverged} of {primary.diverged + primary.seeds} of its targets diverged and are left out.)"
    return [sentence + lost * bool(primary.diverged), *better]


def _sign(found: Difference) -> int:
    """-1 where the arm is better than random at the 5% level, 1 where it is worse, else 0."""
    p = found.p if found.p_holm is None else found.p_holm
    return 0 if p >= LEVEL else -1 if found.mean < 0 else 1


def _word(sign: int) -> str:
    return {-1: "better", 0: "no difference to be seen", 1: "worse"}[sign]


def _amount(found: Difference) -> str:
    low, high = sorted(map(abs, (found.low, found.high))) if found.low * found.high > 0 else (found.low, found.high)
    shown = abs(found.mean) if found.low * found.high > 0 else found.mean
    return f"{shown:.3f} nats (95% interval {low:.3f} to {high:.3f})"


def _share(row: Row) -> str:
    shares = {kind: row.gap_closed.get(kind) for kind in WORDS}
    known = [
        f"{one.share:.0%} (95% interval {one.low:.0%} to {one.high:.0%}) of the gap to all data {WORDS[kind]}"
        for kind, one in shares.items()
        if one and one.low is not None
    ]
    return f"; {' and '.join(known)}" if known else ""


def _in_the_pool(row: Row) -> str:
    """What a win in both losses hides where the pool's large sources count more."""
    found = row.differences.get(POOL)
    return f" With sources weighed as in the pool it is worse, by {_amount(found)}." if found and _sign(found) > 0 else ""


def _better(rows: Sequence[Row], primary: Row) -> list[str]:
    """The arm to take instead, if there is one."""

    def beats(row: Row) -> bool:
        signs = [_sign(row.differences[kind]) for kind in WORDS]
        below = all(
            row.differences[kind].high < primary.differences[kind].low for kind in WORDS if _sign(row.differences[kind]) < 0
        )
        worse = any(row.differences[kind].low > primary.differences[kind].high for kind in WORDS)
        return min(signs) == -1 and max(signs) < 1 and below and not worse

    others = [row for row in rows if row.budget == primary.budget and row.differences and row.arm != primary.arm]
    better = sorted((row for row in others if beats(row)), key=lambda row: row.differences[MACRO].mean)
    if not better:
        return []
    best = better[0]
    amounts = f"{_amount(best.differences[TOKENS])} per token and {_amount(best.differences[MACRO])} averaged over sources"
    return [f"{best.arm} is better than both: than random by {amounts}{_share(best)}. {_advice(best)}"]


def _advice(best: Row) -> str:
    """When to take the better arm: not where the target will meet rows like the pool's, if it is worse there."""
    worse = _in_the_pool(best)
    return f"Take that where every source is to count alike.{worse}" if worse else "Take that."
