"""The evidence on a pretrained target: chosen here, sent in parts, trained without Ray, interrupted, and put into one table."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_gpu_kit import BLOCKED

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SOURCES = 12
ROWS = 40


def evidence(*arguments: str, without_ray: bool = False, is_refused: bool = False) -> str:
    """What a step prints. It must end well, or with 3 where cells are left; or be refused, and say why."""
    script = str(BENCHMARKS / "evidence.py")
    alone = f"{BLOCKED}\nimport runpy\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    command = [sys.executable, *(["-c", alone] if without_ray else []), script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in ((2,) if is_refused else (0, 3)), done.stdout[-1000:] + done.stderr[-3000:]
    assert not is_refused or "Traceback" not in done.stderr
    return done.stderr if is_refused else done.stdout


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A few rows under each name of the mixture and of the text before it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import readings

    folder = tmp_path / "data"
    folder.mkdir()
    for name in {*readings.MIXTURES["mathematics"], *readings.PRETRAINED_ON["mathematics"]}:
        rows = [
            {
                "id": f"{name}-{i}",
                "instruction": f"{chr(97 + i % 26) * 3} {chr(97 + i // 26)}: what is {i} plus {len(name)}, by {name}?",
                "input": "",
                "output": f"{i} + {len(name)}. The answer is {i + len(name)}",
                "split": "train",
            }
            for i in range(ROWS)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A small model with its tokenizer, as a folder."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = {letter: number for number, letter in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    folder = tmp_path / "target"
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    made.save_pretrained(folder)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.GPTNeoXConfig(vocab_size=len(letters), max_position_embeddings=512, **shape)
    transformers.GPTNeoXForCausalLM(config).save_pretrained(folder)
    return folder


def test_two_calls_do_not_train_into_one_folder(tmp_path: Path) -> None:
    (tmp_path / "cells.json").write_text(json.dumps({"cells": []}))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "results").mkdir()
    with (tmp_path / "results" / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        command = [sys.executable, str(BENCHMARKS / "evidence.py"), "train", str(tmp_path), "--model", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "another `train` writes there" in done.stdout


@pytest.mark.slow
def test_cells_chosen_here_are_trained_elsewhere_and_compared_here(data: Path, target: Path, tmp_path: Path) -> None:
    work, model = tmp_path / "work", str(target)
    here = (str(data), str(work), "--model", model, "--kind", "reduced", "--tiny")
    assert "9 cells" in evidence("choose", *here)
    bundle = work / "reduced"
    evidence("pack", str(bundle), "--model", model, "--output", str(tmp_path / "parts"))
    for part in (tmp_path / "parts").glob("call*/*"):  # as each call leaves them
        part.replace(tmp_path / "parts" / part.name)
    evidence("join", str(tmp_path / "parts"), without_ray=True)
    there = (str(tmp_path / "parts" / "bundle"), "--model", str(tmp_path / "parts" / "model"), "--threads", "1")
    assert "cells are left" in evidence("train", *there, "--minutes", "0.0001", without_ray=True)
    results = tmp_path / "parts" / "bundle" / "results"
    (first,) = results.glob("*.parquet")
    stamp = first.stat().st_mtime_ns
    evidence("train", *there, without_ray=True)
    assert len(list(results.glob("*.parquet"))) == 9
    assert first.stat().st_mtime_ns == stamp, "what is there is not trained again"
    sorted(results.glob("*-seed2-*.parquet"))[0].unlink()  # as if interrupted: two seeds are whole
    printed = evidence("table", *here, "--results", str(results))
    assert "2 seeds" in printed
    table = json.loads((results / "reduced-table.json").read_text())
    assert {row["arm"] for row in table["rows"]} == {"random", "source_balanced", "s2l_inside_sources"}
    assert {cell["seed"] for cell in table["cells"]} == {0, 1}
    assert len(table["machines"]) == 1
    (results / "machines.json").unlink()
    assert "names no machine" in evidence("table", *here, "--results", str(results))
    assert json.loads((results / "reduced-table.json").read_text())["machines"] == []
    assert "learning_rate: 0.0001 -> 3e-05" in evidence("choose", *here, "--rate", "3e-5", is_refused=True)


@pytest.mark.slow
def test_learning_rates_are_compared_on_the_validation_split(data: Path, target: Path, tmp_path: Path) -> None:
    work, model = tmp_path / "work", str(target)
    here = (str(data), str(work), "--model", model, "--kind", "rates", "--tiny")
    assert "6 cells" in evidence("choose", *here)
    evidence("train", str(work / "rates"), "--model", model, "--threads", "1", without_ray=True)
    lines = [line for line in evidence("table", *here).splitlines() if line.endswith("nats per token of random, 2 seeds")]
    assert [line.split(":")[0] for line in lines] == ["1e-05", "3e-05", "0.0001"]
    losses = [float(line.split()[1]) for line in lines]
    assert len(set(losses)) == 3
    assert losses == sorted(losses, reverse=True), "a tiny model in a few steps learns more at a higher rate"
    # The answer goes into the whole comparison; its run directory is the same.
    assert "cells" in evidence("choose", *here[:-2], "reduced", "--tiny", "--rate", "3e-5")
    assert json.loads((work / "reduced" / "cells.json").read_text())["rate"] == 3e-5
