"""The command line, `s2l`: parsing and printing only.

Exit codes: 0 done; 2 the user must change something (one message, no traceback); 1 anything else.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from s2l_ray.errors import ConfigError, S2LError, cause_of, printable, storage_problem
from s2l_ray.progress import log_to_console

app = typer.Typer(
    name="s2l",
    help="SmallToLarge data selection: choose the part of a fine-tuning corpus that is worth training a large model on.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _completed(incomplete: str) -> list[tuple[str, str]]:
    """What the shell offers after `--set`."""
    from s2l_ray.config.completion import settings

    return settings(incomplete)


def _complete_behind_equals() -> None:
    """Answer bash behind the `=` of `--set key=`, where it does not tell Typer which option is meant."""
    from s2l_ray.config.completion import bash_values

    values = bash_values(os.environ["COMP_WORDS"], int(os.environ["COMP_CWORD"]))
    if values is not None:
        print("\n".join(values))
        sys.exit(0)


Config = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A run's YAML config, or a shipped one's name: `s2l init --list`.")
]
RunDir = Annotated[str | None, typer.Option("--run-dir", metavar="URI", help="Run directory, local or URI; default runs/NAME.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Override a value; may repeat.", autocompletion=_completed),
]
Reuse = Annotated[str | None, typer.Option(metavar="RUN_DIR", help="Take every stage of another run that matches.")]


@app.command()
def plan(
    config: Config,
    run_dir: RunDir = None,
    set_: Set = None,
    reuse: Reuse = None,
    accelerator: Annotated[str | None, typer.Option(help="Price it for this accelerator, such as H100 or A100.")] = None,
    price_per_hour: Annotated[float | None, typer.Option(help="Price of one accelerator per hour.")] = None,
    num_accelerators: Annotated[
        int | None, typer.Option(min=1, help="How many train the target; default: its workers in the config, else 8.")
    ] = None,
    accelerators_per_node: Annotated[int, typer.Option(min=1, help="How many of them share a machine.")] = 8,
) -> None:
    """Show what would be built, reused or refused, and what it will cost. Builds nothing and needs no accelerator."""
    from s2l_ray.compare.planning import comparison_lines
    from s2l_ray.config import load_config
    from s2l_ray.plan.plan import make_plan

    loaded = load_config(config, set_)
    made = make_plan(
        loaded,
        run_dir,
        reuse=reuse,
        accelerator=accelerator,
        price_per_hour=price_per_hour,
        num_accelerators=num_accelerators,
        accelerators_per_node=accelerators_per_node,
    )
    print("\n".join([made.text(), *comparison_lines(loaded, made)]))
    if made.is_refused:
        raise typer.Exit(2)


@app.command()
def run(
    config: Config,
    run_dir: RunDir = None,
    set_: Set = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")] = None,
    reuse: Reuse = None,
) -> None:
    """Build what is missing. The same command again goes on where it stopped."""
    from s2l_ray.config import load_config
    from s2l_ray.pipeline import run as run_pipeline

    run_pipeline(load_config(config, set_), run_dir, until=until, reuse=reuse)


@app.command()
def status(run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="A run directory, local or URI.")]) -> None:
    """Show how far each stage is, part by part."""
    from s2l_ray.plan.status import status_text

    print(status_text(run_dir))


@app.command()
def select(
    trajectories: Annotated[str, typer.Argument(metavar="TRAJECTORIES", help="Parquet: a file, directory, glob or URI.")],
    budget: Annotated[
        list[str],
        typer.Option(help="Examples (3000), a fraction (0.1) or response tokens (tokens:100000). Several: nested subsets."),
    ],
    output: Annotated[str, typer.Option(metavar="DIR", help="Gets clustering/ and selection/.")],
    method: Annotated[str, typer.Option(metavar="NAME", help="s2l, or a rival; see `s2l compare --arms`.")] = "s2l",
    num_clusters: Annotated[int, typer.Option(help="K, in each value of a named column; 'auto' shares them.")] = 100,
    stratify_by: Annotated[
        str, typer.Option(metavar="COLUMN", help="Group within its values; auto: by source if there are several; or none.")
    ] = "auto",
    levels: Annotated[str | None, typer.Option(metavar="K,K,...", help="Groups of groups, such as 1000,100,20.")] = None,
    allocation: Annotated[float, typer.Option(help="A group's share: its size to this power; 1: as in the pool.")] = 0.0,
    allocation_of_strata: Annotated[float, typer.Option(help="The same for strata.")] = 0.0,
    draw: Annotated[Literal["random", "central", "spread"], typer.Option(help="Which rows of a group.")] = "random",
    seed: Annotated[int, typer.Option(help="Seed of the grouping and of the sampling.")] = 0,
    features: Annotated[
        Literal["raw", "reduction", "shape", "whitened", "profile"], typer.Option(help="What k-means sees of the losses.")
    ] = "raw",
    num_iterations: Annotated[int, typer.Option(help="Lloyd iterations at most.")] = 20,
    num_restarts: Annotated[int, typer.Option(help="Initialisations tried.")] = 3,
    tolerance: Annotated[float, typer.Option(help="Stop when centroids move less; 0: when no row changes its group.")] = 0.0,
    training_rows: Annotated[int | None, typer.Option(help="Run k-means on this many rows, and assign the others.")] = None,
    defer_groups_up_to: Annotated[int, typer.Option(help="Take from groups of at most this size last.")] = 0,
    min_per_source: Annotated[int, typer.Option(help="At least this many examples of each source.")] = 0,
    engine: Annotated[
        Literal["auto", "memory", "disk", "ray", "gpu"], typer.Option(help="Where k-means keeps the trajectories.")
    ] = "auto",
    memory_gb: Annotated[float, typer.Option(help="With --engine auto: losses up to this size stay in memory.")] = 0.5,
    num_workers: Annotated[int, typer.Option(help="With --engine ray: actors.")] = 2,
) -> None:
    """Clustering and selection alone, on trajectories from anywhere (columns `example_id` and `losses`)."""
    select_trajectories = _selecting()
    from s2l_ray.config import ClusteringConfig, GroupingConfig, SelectionConfig, checked

    clustering = checked(
        ClusteringConfig,
        **(_levels(levels) if levels else {"num_clusters": num_clusters}),
        features=features,
        num_iterations=num_iterations,
        num_restarts=num_restarts,
        tolerance=tolerance,
        training_rows=training_rows,
        stratify_by=None if stratify_by == "none" else stratify_by,
        seed=seed,
    )
    selection = checked(
        SelectionConfig,
        **_budgets(budget),
        method=method,
        seed=seed,
        draw=draw,
        min_per_source=min_per_source,
        defer_groups_up_to=defer_groups_up_to,
        allocation=allocation,
        allocation_of_strata=allocation_of_strata,
    )
    machines = checked(GroupingConfig, engine=engine, memory_gb=memory_gb, num_workers=num_workers)
    select_trajectories(trajectories, output, clustering, selection, machines)


def _selecting() -> Callable[..., object]:
    """`select_trajectories`, loaded after the process has one heap."""
    from s2l_ray.runtime.process import share_one_heap

    share_one_heap()
    from s2l_ray.selection.alone import select_trajectories

    return select_trajectories


def _levels(text: str) -> dict[str, list[int | str]]:
    """Groups of groups as a config has them: `1000,100,20` is [1000, 100, 20]."""
    return {"levels": [int(part) if part.strip().isdigit() else part for part in text.split(",")]}


def _budgets(texts: list[str]) -> dict[str, Any]:
    """The budget and the further ones as a config has them."""
    first, *more = map(_budget, texts)
    return {"budget": first, "more_budgets": more}


def _budget(text: str) -> str | dict[str, str]:
    """A budget as a config has it: `tokens:100000` is {tokens: 100000}."""
    unit, _, number = text.partition(":")
    return {"tokens": number} if unit == "tokens" else text


@app.command()
def compare(
    config: Annotated[
        str | None,
        typer.Argument(metavar="CONFIG", help="A run's YAML config with a section `compare`, or a shipped one's name."),
    ] = None,
    run_dir: RunDir = None,
    set_: Set = None,
    reuse: Reuse = None,
    premise: Annotated[
        bool, typer.Option("--premise", help="Instead: do examples that learn alike have like gradients here?")
    ] = False,
    arms: Annotated[bool, typer.Option("--arms", help="Name the arms that there are, and do nothing.")] = False,
) -> None:
    """Train a target on each arm's subset, under several seeds: does S2L pay, on your data? The same command goes on."""
    if arms:
        from s2l_ray.compare.arms import listing

        print(listing())
        return
    if config is None:
        raise ConfigError("s2l compare: give a config, or --arms.")
    from s2l_ray.compare.stage import check_premise
    from s2l_ray.compare.stage import compare as compare_arms
    from s2l_ray.config import load_config

    loaded = load_config(config, set_)
    print(check_premise(loaded, run_dir, reuse=reuse) if premise else compare_arms(loaded, run_dir, reuse=reuse).text())


@app.command()
def report(run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="A run directory, local or URI.")]) -> None:
    """(Re)build the HTML report of a run from what is finished."""
    from s2l_ray.report.page import build_report

    print(build_report(run_dir))


@app.command()
def export(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="A run directory, or the output of `s2l select`.")],
    format_: Annotated[
        Literal["jsonl", "parquet", "trl", "llama-factory", "axolotl", "openai"] | None,
        typer.Option("--format", help="The corpus's own rows (jsonl, parquet), or the form of a trainer."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="The file to write, local or URI; for trl, llama-factory and axolotl a directory, or a file ending in .jsonl.",
        ),
    ] = None,
    subset: Annotated[str, typer.Option(help="selected, random, or selected-BUDGET of a further budget.")] = "selected",
    with_columns: Annotated[
        bool | None,
        typer.Option(
            "--with-columns/--without-columns",
            help="Whether rows end with example_id, cluster_id and weight; jsonl and parquet have them unless told otherwise.",
        ),
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="NAME", help="Also a dataset on the Hub, with a card; parquet without --format.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push-to-hub: for all to see; else private.")] = False,
) -> None:
    """Write the subset for another trainer: the corpus's own rows, or its conversations in that trainer's form."""
    from s2l_ray.selection.export import export_subset
    from s2l_ray.selection.pushing import push_subset

    if push_to_hub is None and (format_ is None or output is None):
        raise ConfigError("s2l export: give --format and --output, or --push-to-hub.")
    chosen = format_ or "parquet"
    if output is not None:
        print(export_subset(run_dir, chosen, output, subset, with_columns=with_columns))
    if push_to_hub is not None:
        print(push_subset(run_dir, chosen, push_to_hub, subset, with_columns=with_columns, is_public=public))


@app.command()
def init(
    data: Annotated[
        list[str] | None, typer.Argument(metavar="DATA", help="Files, a folder, a glob, FOLDER/#NAME, a URI or a Hub id.")
    ] = None,
    target: Annotated[str | None, typer.Option(metavar="MODEL", help="The model to fine-tune: a path, URI or Hub id.")] = None,
    output: Annotated[str | None, typer.Option(metavar="CONFIG", help="The file to write; default NAME.yaml, here.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Name the configs that come with s2l, and write nothing.")] = False,
) -> None:
    """Look at a corpus, and write a commented config to start from."""
    if list_:
        from s2l_ray.config.shipped import configs_folder, listing

        print("\n".join(f"{name:<28} {about}" for name, about in listing()))
        print(f"\ns2l run NAME takes one as it is. To change one, copy it from {configs_folder()}")
        return
    from s2l_ray.init.screen import show
    from s2l_ray.init.start import start

    show(*start(data or [], target, output))


@app.command()
def schema() -> None:
    """Print the JSON Schema of a config, for editors and other programs."""
    from s2l_ray.config.schema import schema_text

    print(schema_text(), end="")


def main() -> None:
    """Run the command line; what a user can fix becomes one message and exit code 2."""
    log_to_console()
    if os.environ.get("_S2L_COMPLETE") == "complete_bash":
        _complete_behind_equals()
    try:
        app(prog_name="s2l", standalone_mode=True)
    except Exception as error:
        is_foreign = type(error).__module__.startswith("ray.")  # it may carry what a worker met
        problem = cause_of(error) if is_foreign or isinstance(error, S2LError) else storage_problem(error)
        if problem is None:
            raise
        print(f"s2l: {printable(str(problem))}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        if end.code == 130:  # Typer takes the KeyboardInterrupt and ends with this, without a word
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would only break what Ray does at the end
            start = "\r" if sys.stderr.isatty() else ""  # over the ^C that the terminal has echoed
            print(f"{start}s2l: interrupted. The same command goes on where this one stopped.", file=sys.stderr)
            sys.exit(1)
        raise
