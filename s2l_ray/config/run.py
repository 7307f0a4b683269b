"""A whole run's config: its sections, and whether they fit together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from s2l_ray.config.comparing import CompareConfig
from s2l_ray.config.machines import MachinesConfig
from s2l_ray.config.methods import MIN_POINTS
from s2l_ray.config.section import Positive, Section
from s2l_ray.config.sections import (
    ClusteringConfig,
    EvaluationConfig,
    ExamplesConfig,
    ReportConfig,
    SelectionConfig,
    TrajectoriesConfig,
)
from s2l_ray.config.training import ProxyConfig, ScratchModel, TargetConfig
from s2l_ray.errors import has_credentials


class PlanConfig(Section):
    """What `s2l plan` assumes where it cannot look: nothing is computed from it."""

    num_examples: Positive | None = None
    tokens_per_example: Positive | None = None
    response_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    proxy_parameters: Annotated[float, Field(gt=0)] | None = None
    target_parameters: Annotated[float, Field(gt=0)] | None = None
    accelerator: str | None = None
    price_per_hour: Annotated[float, Field(ge=0)] | None = None


class RunConfig(Section):
    """A whole run. The sections are the eight words of the flow."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the run; the default run directory is `runs/<name>`."""

    examples: ExamplesConfig
    proxy: ProxyConfig
    trajectories: TrajectoriesConfig = TrajectoriesConfig()
    clustering: ClusteringConfig = ClusteringConfig()
    selection: SelectionConfig
    target: TargetConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    report: ReportConfig = ReportConfig()
    machines: MachinesConfig = MachinesConfig()
    plan: PlanConfig = PlanConfig()
    compare: CompareConfig | None = None

    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(default_factory=list)
    """Where the trainings of the proxy and of the target also report their losses (`pip install 's2l_ray[trackers]'`)."""

    @model_validator(mode="before")
    @classmethod
    def _no_credentials_in_uris(cls, values: Any) -> Any:
        """They would end up in run.json, manifests and logs."""
        for place, text in _texts(values):
            if has_credentials(text):
                raise ValueError(f"{place}: credentials in a URI end up in files and logs. Put them into the environment")
        return values

    @model_validator(mode="after")
    def _sections_fit_together(self) -> RunConfig:
        for name in ("proxy", "target"):
            batch, workers = getattr(self, name).global_batch_size, getattr(self.machines, name).num_workers
            most = max(workers) if isinstance(workers, list) else workers if isinstance(workers, int) else 1
            if most > batch:
                raise ValueError(
                    f"machines.{name}.num_workers={workers}: more workers than the {batch} examples of a batch "
                    f"({name}.global_batch_size)"
                )
        offload, zero_stage = self.machines.target.offload, self.target.zero_stage
        if zero_stage < {"none": 0, "optimizer": 1, "parameters": 3}[offload]:
            needed = "3" if offload == "parameters" else "1, 2 or 3"
            raise ValueError(f"machines.target.offload={offload} needs target.zero_stage {needed}, found {zero_stage}")
        self._points_are_recorded()
        if self.clustering.features == "profile" and not self.trajectories.statistics:
            raise ValueError("clustering.features=profile needs what trajectories.statistics=true records. Set both")
        recorded = {"ifd": "without_prompt", "rds_plus": "embeddings"}.get(self.selection.method)
        if recorded is not None and not getattr(self.trajectories, recorded):
            raise ValueError(
                f"selection.method={self.selection.method} needs what trajectories.{recorded}=true records. Set both"
            )
        if self.clustering.stratify_by not in (None, "auto", "source"):
            raise ValueError(
                f"clustering.stratify_by='{self.clustering.stratify_by}': a run knows strata by 'source'. Set "
                "examples.source_field to that column, or use `s2l select`"
            )
        return self

    def _points_are_recorded(self) -> None:
        proxy, points, features, method = self.proxy, self.clustering.points, self.clustering.features, self.selection.method
        if not proxy.checkpoints and proxy.checkpoint_every_steps is not None:
            return  # how many there are goes by the proxy's steps
        count = len(proxy.checkpoints) or proxy.num_checkpoints + proxy.include_untrained
        if beyond := [point for point in points or [] if not -count <= point < count]:
            raise ValueError(
                f"clustering.points={points}: no point {beyond[0]} in trajectories of {count} points (proxy.num_checkpoints, "
                f"include_untrained). Give 0 to {count - 1}, or from the end -1 to -{count}"
            )
        if features not in ("raw", "profile") and (count if points is None else len(points)) < 2:
            raise ValueError(f"clustering.features={features} needs two points at least, here is one. Use raw")
        if count < (least := MIN_POINTS.get(method, 1)):
            raise ValueError(
                f"selection.method={method} needs trajectories of {least} points or more, these have {count}: record more "
                "checkpoints (proxy.num_checkpoints)"
            )

    @model_validator(mode="after")
    def _proxy_has_a_tokenizer(self) -> RunConfig:
        if isinstance(self.proxy.model, ScratchModel) and self.proxy.tokenizer is None and not self.proxy.checkpoints:
            raise ValueError(
                "proxy.tokenizer is missing: a proxy from scratch brings none. "
                "Set proxy.tokenizer={train: bpe, vocab_size: 4096} or name one"
            )
        return self


def _texts(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Every text in plain values, with its place."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner, place)
