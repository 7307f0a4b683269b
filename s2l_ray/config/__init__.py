"""The config of a run: one YAML file, complete and flat, checked before anything starts.

There is no inheritance and no templating; `--set section.field=value` is the only override. A field of text takes the text
as it is written. Every section is a frozen value whose fields explain themselves, and the *recipe* of the stage of the same
name: what decides its result. `machines` (where and how fast) and `plan` (assumptions of the price list) change no result and
are in no fingerprint.

Read `section` (what all share), `sections` and `training` (a class per stage), `generated` (corpora), `machines`, `run` (how
they fit together), `shipped` (those that come with the package), `parsing` (from a file), `messages` (what is wrong with it),
`recipes` (what of it decides each stage's result), `schema` (for editors), `completion` (for the shell).
"""

# ruff: noqa: F401
# mypy: implicit-reexport
from s2l_ray.config.generated import Imperfections, MimicRadiologyDataset, ReasoningGym, ReasoningGymDataset
from s2l_ray.config.machines import (
    EvaluationWorkerConfig,
    GroupingConfig,
    MachinesConfig,
    TargetWorkerConfig,
    TrainingWorkerConfig,
    WorkerConfig,
)
from s2l_ray.config.parsing import checked, load_config, parse_config
from s2l_ray.config.run import RunConfig
from s2l_ray.config.section import Schedule, Section
from s2l_ray.config.sections import (
    ClusteringConfig,
    EvaluationConfig,
    ExamplesConfig,
    ReportConfig,
    SelectionConfig,
    TrajectoriesConfig,
    template_fields,
)
from s2l_ray.config.training import Lora, ProxyConfig, Scratch, ScratchModel, TargetConfig, TrainedTokenizer, TrainingConfig
