"""A whole run on conversations under a template that rewrites earlier turns: one example, several rows, one loss."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from s2l_ray.config import parse_config
from s2l_ray.pipeline import run
from s2l_ray.storage.artifacts import Artifact
from s2l_ray.storage.places import Storage
from s2l_ray.training.token_rows import RowLimit
from s2l_ray.training.tokens import encode_table
from tests.chat_templates import QWEN_3, chat_tokenizer

SCRATCH = {"architecture": "llama", "layers": 1, "hidden": 16, "heads": 2, "max_positions": 256}
TRAINING = {"epochs": 1, "global_batch_size": 8, "learning_rate": 1e-3, "max_tokens": 200}
ALONE = {"num_workers": 1, "cpus_per_worker": 1, "gpus_per_worker": 0}


def conversation(number: int) -> list[dict[str, str]]:
    topic = f"{'abcdefgh'[number % 8]} {'ijkl'[number // 8]}"
    first = [{"role": "user", "content": f"name {topic}"}, {"role": "assistant", "content": f"this is {topic}"}]
    again = [{"role": "user", "content": f"and again {topic}"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nno"}]
    return first if number % 4 == 0 else first + again


@pytest.mark.slow
def test_a_conversation_that_is_split_is_scored_selected_and_trained_on_as_one_example(
    ray_session: None, tmp_path: Path
) -> None:
    chat_tokenizer(QWEN_3).save_pretrained(tmp_path / "tokenizer")
    rows = [{"id": f"id-{number:02d}", "messages": conversation(number)} for number in range(32)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = parse_config(
        {
            "name": "chats",
            "examples": {"dataset": str(tmp_path / "chats.jsonl"), "messages_field": "messages", "id_field": "id"}
            | {"held_out_fraction": 0.2},
            "proxy": TRAINING | {"model": {"scratch": SCRATCH}, "tokenizer": str(tmp_path / "tokenizer"), "num_checkpoints": 2},
            "clustering": {"num_clusters": 2, "num_restarts": 1},
            "selection": {"budget": 12},
            "target": TRAINING | {"model": {"scratch": SCRATCH}, "zero_stage": 0},
            "evaluation": {"max_generations": 1, "max_new_tokens": 4},
            "machines": dict.fromkeys(("examples", "proxy", "trajectories", "target", "evaluation"), ALONE),
        }
    )
    folder = str(tmp_path / "run")
    run(config, folder)
    made = {name: Artifact.read(Storage(f"{folder}/{name}")) for name in ("examples", "proxy", "trajectories", "target")}
    table = pa.concat_tables([made["examples"].read_table(part) for part in made["examples"].parts()])
    pool = table.filter(pa.array([split == "pool" for split in table["split"].to_pylist()]))
    num_split = sum(int(name[3:]) % 4 != 0 for name in pool["example_id"].to_pylist())
    assert made["proxy"].summary["split_conversations"] == num_split > 0
    assert made["proxy"].summary["total_steps"] == (len(pool) + num_split) // 8, "a step takes rows, and a split chat has two"

    tokenizer = chat_tokenizer(QWEN_3)
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/proxy/step-{made['proxy'].summary['steps'][-1]:06d}").eval()
    found = {row["example_id"]: row for part in made["trajectories"].parts() for row in rows_of(made["trajectories"], part)}
    assert sorted(found) == sorted(pool["example_id"].to_pylist())
    tokens = encode_table(tokenizer, pool, RowLimit(200))
    for number, name in enumerate(tokens.example_ids.to_pylist()):
        losses: list[float] = []
        for row in np.flatnonzero(tokens.owners == number):
            ids, is_label = tokens.tokens[int(row)]
            with torch.no_grad():
                logits = model(torch.tensor(ids[None].astype(np.int64))).logits[0, :-1]
            each = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:].astype(np.int64)), reduction="none")
            losses += each[torch.tensor(is_label[1:])].tolist()
        assert found[name]["num_response_tokens"] == len(losses)
        assert found[name]["losses"][-1] == pytest.approx(np.mean(losses), abs=1e-4)  # float32, in another order

    assert made["target"].summary["rows"] == 12
    metrics = json.loads(Path(folder, "evaluation/metrics.json").read_text())
    assert metrics["selected"]["loss_per_token"] > 0


def rows_of(artifact: Artifact, part: str) -> list[dict[str, object]]:
    return list(artifact.read_table(part).to_pylist())
