"""All examples that a model is trained on, as tokens; and what of them is not learned, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from s2l_ray.config import ExamplesConfig
from s2l_ray.errors import DataError
from s2l_ray.examples.reading import read_pool
from s2l_ray.training.token_rows import AnyTokenRows, RowLimit, TokenRows
from s2l_ray.training.tokens import CUT, NO_LABEL, REFUSED, PartTokens, RefusedExample, encode_table
from s2l_ray.training.turns import CALLS_LOST, ENDLESS, REASONING_LOST, SPLIT, TOOLS_LOST

_SAID = {
    REFUSED: "dropped: %s refused_by_template",
    NO_LABEL: "dropped: %s no_response_token, whose prompts alone fill max_tokens",
    SPLIT: "%s conversations are split: the chat template renders earlier turns differently once later ones follow, so each of "
    "their learned turns is a row of its own",
    ENDLESS: "%s conversations have an answer whose end of turn is not learned: no token marks it, or the template's "
    "generation marks leave it out",
    TOOLS_LOST: "%s conversations have tools that the chat template does not show to the model",
    REASONING_LOST: "%s conversations have reasoning that the chat template does not write, so that it is not learned",
    CALLS_LOST: "%s conversations have tool calls that the chat template does not write, so that they are not learned",
}


@dataclass(frozen=True)
class CountedRows:
    """Examples as rows of tokens, and what became of those that are not there as they stand in the corpus."""

    tokens: AnyTokenRows
    num_examples: int
    """Those with a label."""

    changed: dict[str, int]
    """As in PartTokens."""

    refused: list[RefusedExample]
    unlearned_lengths: list[int]

    @property
    def sizes(self) -> str:
        """How many examples, and rows of tokens where these are more, in words."""
        rows = f" in {len(self.tokens):,} rows" if len(self.tokens) > self.num_examples else ""
        return f"{self.num_examples:,} examples{rows}"

    def check(self, section: str, limit: RowLimit, corpus: ExamplesConfig) -> None:
        """Raise DataError where the chat template refuses more than may be dropped, or nothing is left to learn.

        `section`: of the config, whose `max_tokens` it is.
        """
        total = self.num_examples + self.changed.get(NO_LABEL, 0) + self.changed.get(REFUSED, 0)
        check_refused(self.refused, corpus, section, total)
        if not self.num_examples and self.unlearned_lengths:
            raise DataError(
                f"{section}.max_tokens={limit.max_tokens}: no response token is left of any of {total:,} examples, whose "
                f"median length is {median(self.unlearned_lengths):,.0f} tokens. Raise {section}.max_tokens, or set "
                f"{section}.truncation=left_prompt to cut the prompts instead."
            )


@dataclass(frozen=True)
class PoolTokens(CountedRows):
    """Examples as rows of tokens in the order of their parts, each with its name."""

    tokens: TokenRows
    row_ids: list[str]
    """A name for each row, which decides its place in the training's order."""

    example_ids: pa.Array
    """The id of the example that each row is of, string (rows,)."""

    @classmethod
    def join(cls, parts: Iterable[PartTokens]) -> PoolTokens:
        """Parts laid end to end."""
        found = list(parts)
        owner_ids = [part.example_ids.take(pa.array(part.owners)).cast(pa.string()) for part in found]
        return cls(
            TokenRows.join([part.tokens for part in found]),
            sum(len(part.example_ids) for part in found),
            dict(sum((Counter(part.changed) for part in found), Counter[str]())),
            [refused for part in found for refused in part.refused],
            [length for part in found for length in part.unlearned_lengths],
            [name for part in found for name in part.row_ids],
            pa.concat_arrays([pa.array([], pa.string()), *owner_ids]),
        )


def check_refused(refused: list[RefusedExample], corpus: ExamplesConfig, section: str = "", total: int = 0) -> None:
    """Raise DataError that names the first example which the chat template refuses, where such rows are not to be dropped or,
    of a `total` of examples, are more than may be."""
    if not refused:
        return
    if corpus.on_bad_row == "error":
        raise DataError(
            f"{_first(refused)}. Fix or remove the row (examples/part-*.parquet has it "
            "under that example_id), set examples.on_bad_row=drop, or use another tokenizer or chat template."
        )
    if total and len(refused) > corpus.max_dropped * total:
        raise DataError(
            f"{section}: the chat template refuses {len(refused):,} of {total:,} examples, more than examples.max_dropped="
            f"{corpus.max_dropped:g} allows; the first: {_first(refused)}. Fix or remove these rows, raise "
            "examples.max_dropped, or use another tokenizer or chat template."
        )


def pool_tokens(examples: Any, tokenizer: Any, limit: RowLimit, keep: set[str] | None = None) -> PoolTokens:
    """The pool, or of it the examples whose ids are in `keep`. The workers of a training make a share of the parts each."""
    import torch.distributed

    is_shared = torch.distributed.is_initialized()
    rank, num_ranks = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if is_shared else (0, 1)
    wanted = None if keep is None else pa.array(sorted(keep), pa.string())

    def made(part: str) -> PartTokens:
        table = read_pool(examples, part)
        return encode_table(tokenizer, table if wanted is None else table.filter(pc.is_in(table["example_id"], wanted)), limit)

    shares: list[Any] = [list(map(made, examples.parts()[rank::num_ranks]))]
    if num_ranks > 1:
        shares = shares * num_ranks
        torch.distributed.all_gather_object(shares, shares[rank])
    return PoolTokens.join(shares[i % num_ranks][i // num_ranks] for i in range(len(examples.parts())))


def row_counts(changed: Mapping[str, int], refused: list[RefusedExample]) -> dict[str, Any]:
    """Counts of examples as a manifest has them: dropped and shortened, each by reason, and what else there was to count."""
    dropped = {reason: changed[reason] for reason in changed if reason in {NO_LABEL, REFUSED}}
    rest: dict[str, Any] = {name: changed[name] for name in changed if name in _SAID.keys() - {REFUSED, NO_LABEL}}
    if refused:
        by_source = Counter(found.source for found in refused)
        rest["dropped_by_source"] = {source: {REFUSED: count} for source, count in sorted(by_source.items())}
        rest["first_dropped"] = {REFUSED: _first(refused)}
    return {"dropped": dropped, "shortened": {CUT: changed[CUT]} if CUT in changed else {}} | rest


def said_counts(changed: Mapping[str, int], refused: list[RefusedExample]) -> list[str]:
    """One line for each kind of example that is not learned as it stands in the corpus; the first refused one is shown."""
    lines = {reason: line % f"{changed[reason]:,}" for reason, line in _SAID.items() if changed.get(reason)}
    if refused:
        lines[REFUSED] += f", the first: {_first(refused)}"
    return list(lines.values())


def _first(refused: list[RefusedExample]) -> str:
    return f"example '{refused[0].example_id}': the chat template refuses it ({refused[0].words})"
