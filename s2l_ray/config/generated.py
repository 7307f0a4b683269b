"""The corpora that are more than files: tasks that reasoning-gym generates, and MIMIC-III's radiology reports."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from s2l_ray.config.section import Section


class Imperfections(Section):
    """What generated tasks lack and real corpora have, each as a share of the rows, chosen by the seed and the row alone."""

    exact_copies: float = Field(0.0, ge=0.0, le=0.4)
    """Share of rows that repeat an earlier row of their task; they are dropped as duplicates."""

    near_copies: float = Field(0.0, ge=0.0, le=0.4)
    """Share of rows that repeat an earlier row of their task with other white space or capitals: the masked prompt is the
    same."""

    wrong_answers: float = Field(0.0, ge=0.0, le=0.2)
    """Share of rows with the answer to another question of their task. Only three prompts in ten may have some, and all
    rows of these prompts stay in the pool: held-out and validation rows have right answers."""


class ReasoningGym(Section):
    """An embedded corpus: real procedural tasks with verifiable answers, made offline by reasoning-gym."""

    tasks: dict[str, dict[str, Any]] = Field(min_length=1)
    """Task name -> its parameters, `size` (how many examples) among them. The name becomes the source."""

    seed: int = 0
    """Seed of the task generators."""

    imperfections: Imperfections | None = None
    """Copies and wrong answers among the rows; none unless given."""

    @field_validator("tasks")
    @classmethod
    def _sizes_are_given(cls, tasks: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, parameters in tasks.items():
            size = parameters.get("size")
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"task '{name}' needs size, the number of examples, as an integer above 0")
        return tasks


class ReasoningGymDataset(Section):
    """`dataset: {reasoning_gym: {...}}`."""

    reasoning_gym: ReasoningGym


class MimicRadiologyDataset(Section):
    """`dataset: {mimic_radiology: PATH}`."""

    mimic_radiology: str
    """MIMIC-III's table of notes, NOTEEVENTS.csv or NOTEEVENTS.csv.gz: a path or URI. Its radiology reports become findings to
    be summarised as an impression."""
