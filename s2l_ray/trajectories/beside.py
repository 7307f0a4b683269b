"""What is recorded of each example under the last checkpoint alone, beside the trajectories: the loss without the prompt and an
embedding, and the embeddings of the validation rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from s2l_ray.config import RunConfig
from s2l_ray.examples.reading import read_validation
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.training.embeddings import example_embeddings
from s2l_ray.training.losses import example_losses
from s2l_ray.training.token_pools import check_refused
from s2l_ray.training.token_rows import RowLimit
from s2l_ray.training.tokens import PartTokens, encode_table, without_prompts
from s2l_ray.trajectories.loss_columns import EMBEDDING, LOSS_WITHOUT_PROMPT, points_column

# What ends the name of a checkpoint in a unit of these: the pool's, and the validation split's.
BESIDE, VALIDATION = "beside", "validation"


def passes_beside(config: RunConfig) -> tuple[str, ...]:
    """Which units of the last checkpoint there are beside its losses."""
    options = config.trajectories
    return (BESIDE,) * (options.without_prompt or options.embeddings) + (VALIDATION,) * options.embeddings


def columns_beside(model: Any, tokenizer: Any, read: PartTokens, config: RunConfig) -> dict[str, pa.Array]:
    """The columns of a part's examples: `loss_without_prompt` float32 and `embedding` fixed_size_list<float32, H>, of these the
    ones that are asked for."""
    options, columns = config.trajectories, {}
    if options.without_prompt:
        alone, owners = without_prompts(tokenizer, read.tokens, read.owners)
        losses_N = example_losses(
            model, alone, tokens_per_batch=options.tokens_per_batch, precision=options.precision, owners=owners
        )
        columns[LOSS_WITHOUT_PROMPT] = pa.array(losses_N)
    if options.embeddings:
        columns[EMBEDDING] = _embeddings(model, read, config)
    return columns


def validation_rows(model: Any, tokenizer: Any, examples: Artifact, part: str, config: RunConfig) -> pa.Table:
    """The validation rows of a part, perhaps none: example_id, source, embedding."""
    read = encode_table(tokenizer, read_validation(examples, part), RowLimit.of(config.proxy))
    check_refused(read.refused, config.examples)
    columns = {"example_id": read.example_ids.cast(pa.string()), "source": read.sources.cast(pa.string())}
    return pa.table(columns | {EMBEDDING: _embeddings(model, read, config)})


def joined(tables: Iterable[pa.Table]) -> pa.Table | None:
    """The validation rows of all parts in ascending order of ids; None for none."""
    table = pa.concat_tables(tables)
    return table.sort_by("example_id").combine_chunks() if table.num_rows else None


def _embeddings(model: Any, read: PartTokens, config: RunConfig) -> pa.Array:
    options = config.trajectories
    found_NH = example_embeddings(model, read.tokens, options.tokens_per_batch, options.precision, owners=read.owners)
    return points_column(found_NH)
