"""Numbers for a corpus and a target, each with its reason. The reasons are measurements of METHOD and of the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from s2l_ray.init.figures import TokenCounts
from s2l_ray.init.layout import ConfigLine
from s2l_ray.init.proxies import ProxyChoice, choose_proxy, scratch
from s2l_ray.init.target import TargetModel

EPOCHS = 3
LIMITS = (64, 128, 256, 512, 1024, 2048, 4096)
COVERED = 0.98
"""The share of the examples that should fit into `max_tokens`."""
TOKENS_PER_PASS = 8192
"""Tokens of a forward and backward pass of the proxy that a usual GPU or a laptop has memory for."""
PAPER_BATCH, PAPER_GROUPS, PAPER_POINTS = 128, 100, 12
WANTED_STEPS = 200
ROWS_PER_GROUP = 100


@dataclass(frozen=True)
class CorpusFacts:
    """What the advice depends on."""

    num_rows: int
    tokens: TokenCounts
    is_chat: bool
    sources: dict[str, int]


@dataclass(frozen=True)
class Advice:
    """The settings of every section but `examples`, in the order of a config."""

    sections: dict[str, list[ConfigLine]]
    max_tokens: int

    @property
    def settings(self) -> dict[str, ConfigLine]:
        """Every setting by its place, such as `proxy.model`."""
        return {f"{section}.{one.key}": one for section, settings in self.sections.items() for one in settings}


def advise(facts: CorpusFacts, target: TargetModel | None) -> Advice:
    """Settings for a corpus and a target; without a target, models from scratch that a laptop trains."""
    limit = limit_for(facts.tokens, target.positions if target else None)
    held_out = held_out_fraction(facts.num_rows)
    pool = max(1, round(facts.num_rows * (1 - held_out)))
    if target is None:
        proxy, targets = _laptop_models(pool, limit)
    else:
        proxy = choose_proxy(target, is_chat=facts.is_chat, max_tokens=limit)
        targets = [ConfigLine("model", target.name, "the model that you named")]
    batch = batch_for(pool)
    share = budget_for(pool)
    limits = ConfigLine("max_tokens", limit, _limit_reason(facts.tokens, limit))
    sections = {
        "proxy": _proxy_settings(proxy, pool, batch, limits),
        "clustering": _group_settings(pool, facts.sources),
        "selection": [ConfigLine("budget", share, _budget_reason(share, pool))],
        "target": [*targets, *_target_settings(target, pool, share, limits)],
        "evaluation": _evaluation_settings(target),
        "machines": _machine_settings(target, (batch, batch_for(max(1, int(pool * share)))), limit),
    }
    return Advice(sections, limit)


# --- one number each -----------------------------------------------------------------------------------------------


def limit_for(tokens: TokenCounts, positions: int | None) -> int:
    """`max_tokens`: the smallest usual limit that nearly all examples fit into, and that the target takes."""
    usual = next((limit for limit in LIMITS if tokens.share_over(limit) <= 1 - COVERED), LIMITS[-1])
    return min(usual, positions) if positions else usual


def held_out_fraction(num_rows: int) -> float:
    """The share kept for evaluation: a few hundred rows where there are that many."""
    return 0.02 if num_rows >= 10_000 else 0.1


def batch_for(pool: int) -> int:
    """Examples per step: the paper's, less where a small corpus would then be over in a few steps."""
    batch = PAPER_BATCH
    while batch > 4 and pool * EPOCHS / batch < WANTED_STEPS:
        batch //= 2
    return max(1, min(batch, pool))


def budget_for(pool: int) -> float:
    """The share to select: on small pools S2L was better than random with three tenths, not with one (METHOD)."""
    return 0.1 if pool >= 50_000 else 0.2 if pool >= 4_000 else 0.3 if pool >= 10 else 0.5


def _budget_reason(share: float, pool: int) -> str:
    why = (
        "the paper: a tenth of a large corpus did as well as all of it"
        if share == 0.1
        else "of a small pool a tenth is too few"
    )
    return f"{max(1, int(share * pool)):,} examples; {why}"


def _limit_reason(tokens: TokenCounts, limit: int) -> str:
    return f"{1 - tokens.share_over(limit):.1%} of the rows fit, the longest has {int(tokens.lengths.max()):,} tokens"


# --- sections ------------------------------------------------------------------------------------------------------


def _proxy_settings(proxy: ProxyChoice, pool: int, batch: int, limits: ConfigLine) -> list[ConfigLine]:
    steps = max(1, -(-pool // batch) * EPOCHS)
    points = min(PAPER_POINTS, steps)
    settings = [ConfigLine("model", proxy.model, proxy.reason)]
    if proxy.question:
        settings.append(ConfigLine("model", None, proxy.question, is_open=True, is_set=False))
    if proxy.tokenizer is not None:
        settings.append(ConfigLine("tokenizer", proxy.tokenizer))
    rate = (2e-5, "the paper's") if proxy.is_pretrained else (3e-3, "higher than the paper's 2e-5: it starts from nothing")
    why = "the paper's" if batch == PAPER_BATCH else f"{steps:,} steps; the paper's {PAPER_BATCH} would leave too few"
    return [
        *settings,
        ConfigLine("epochs", EPOCHS),
        ConfigLine("global_batch_size", batch, why),
        ConfigLine("learning_rate", rate[0], rate[1]),
        limits,
        ConfigLine("num_checkpoints", points, "points of every example's trajectory"),
        ConfigLine("include_untrained", True, "one more point, and often a dimension more to group by"),
    ]


def _group_settings(pool: int, sources: dict[str, int]) -> list[ConfigLine]:
    groups = max(2, min(PAPER_GROUPS, pool // ROWS_PER_GROUP)) if pool > 1 else 1
    why = "the paper's" if groups == PAPER_GROUPS else f"about {pool // groups:,} rows a group"
    settings = [ConfigLine("num_clusters", groups, why)]
    sizes = sorted(sources.values())
    if len(sizes) > 1 and sizes[-1] >= 4 * sizes[0]:
        reason = f"sources have {sizes[0]:,} to {sizes[-1]:,} rows and equal shares each; null: if sources do not matter"
        settings.append(ConfigLine("stratify_by", "auto", reason, is_open=True, is_set=False))
    return settings


def _target_settings(target: TargetModel | None, pool: int, share: float, limits: ConfigLine) -> list[ConfigLine]:
    batch = batch_for(max(1, int(pool * share)))
    rate = (1e-3, "from scratch") if target is None else (2e-5, "the paper's")
    large = [] if target is None else [ConfigLine("precision", "bfloat16", "on GPUs, and for the proxy, too", is_set=False)]
    return [
        ConfigLine("epochs", EPOCHS),
        ConfigLine("global_batch_size", batch, "a subset is small: smaller batches give it more steps"),
        ConfigLine("learning_rate", rate[0], rate[1]),
        limits,
        *large,
    ]


def _machine_settings(target: TargetModel | None, batches: tuple[int, int], limit: int) -> list[ConfigLine]:
    """`batches`: of the proxy and of the target. A named target is taken to be much larger than a proxy."""
    rows = max(1, TOKENS_PER_PASS // limit)
    passes, targets = min(batches[0], rows), min(batches[1], rows if target is None else max(1, rows // 4))
    return [
        ConfigLine(
            "proxy", {"device_batch_size": passes}, f"about {TOKENS_PER_PASS:,} tokens at once; more where there is memory"
        ),
        ConfigLine("target", {"device_batch_size": targets}, "`s2l plan --accelerator NAME` tells what fits"),
    ]


def _evaluation_settings(target: TargetModel | None) -> list[ConfigLine]:
    if target is None:
        return [ConfigLine("random_control", True, "also trains on a random subset: was the selection worth it?")]
    return [ConfigLine("random_control", False, "true also trains the target on a random subset of the same size")]


def _laptop_models(pool: int, limit: int) -> tuple[ProxyChoice, list[ConfigLine]]:
    """Models from scratch that two CPU cores train, with a tokenizer of the corpus's own."""
    shapes = ((2, 16), (4, 128)) if pool < 20_000 else ((2, 32), (6, 256))
    tokenizer = laptop_tokenizer(pool)
    reason = "a tiny model that a laptop trains, with a tokenizer of the corpus's own"
    proxy = ProxyChoice(scratch(*shapes[0], limit), tokenizer, 1e5, reason)
    question = "no --target was given: name the model that you mean to fine-tune. Here stands one that a laptop trains"
    return proxy, [ConfigLine("model", scratch(*shapes[1], limit), question, is_open=True)]


def laptop_tokenizer(num_rows: int) -> dict[str, Any]:
    """The tokenizer of models from scratch, as a config has it."""
    return {"train": "bpe", "vocab_size": 768 if num_rows < 5_000 else 2048 if num_rows < 20_000 else 4096}
