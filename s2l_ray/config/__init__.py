"""The config of a run: one YAML file, complete and flat, checked before anything starts.

There is no inheritance and no templating; `--set section.field=value` is the only override. Every section is a
frozen value whose fields explain themselves. A section is the *recipe* of the stage of the same name: what decides
its result. `machines` (where and how fast) and `plan` (what the price list assumes) decide no result and
are in no fingerprint.

Read `section` (what all share), `sections` and `training` (a class per stage), `machines`, `run` (how they fit together),
`parsing` (from a file), `messages` (what is wrong with it), `recipes` (what of it decides each stage's result).
"""

from s2l_ray.config.machines import (
    GroupingConfig as GroupingConfig,
)
from s2l_ray.config.machines import (
    MachinesConfig as MachinesConfig,
)
from s2l_ray.config.machines import (
    TargetWorkerConfig as TargetWorkerConfig,
)
from s2l_ray.config.machines import (
    TrainingWorkerConfig as TrainingWorkerConfig,
)
from s2l_ray.config.machines import (
    WorkerConfig as WorkerConfig,
)
from s2l_ray.config.parsing import checked as checked
from s2l_ray.config.parsing import load_config as load_config
from s2l_ray.config.parsing import parse_config as parse_config
from s2l_ray.config.run import RunConfig as RunConfig
from s2l_ray.config.section import Schedule as Schedule
from s2l_ray.config.section import Section as Section
from s2l_ray.config.sections import (
    ClusteringConfig as ClusteringConfig,
)
from s2l_ray.config.sections import (
    EvaluationConfig as EvaluationConfig,
)
from s2l_ray.config.sections import (
    ExamplesConfig as ExamplesConfig,
)
from s2l_ray.config.sections import (
    ReasoningGym as ReasoningGym,
)
from s2l_ray.config.sections import (
    ReasoningGymDataset as ReasoningGymDataset,
)
from s2l_ray.config.sections import (
    SelectionConfig as SelectionConfig,
)
from s2l_ray.config.sections import (
    TrajectoriesConfig as TrajectoriesConfig,
)
from s2l_ray.config.sections import (
    template_fields as template_fields,
)
from s2l_ray.config.training import (
    Lora as Lora,
)
from s2l_ray.config.training import (
    ProxyConfig as ProxyConfig,
)
from s2l_ray.config.training import (
    Scratch as Scratch,
)
from s2l_ray.config.training import (
    ScratchModel as ScratchModel,
)
from s2l_ray.config.training import (
    TargetConfig as TargetConfig,
)
from s2l_ray.config.training import (
    TrainedTokenizer as TrainedTokenizer,
)
from s2l_ray.config.training import (
    TrainingConfig as TrainingConfig,
)
