"""Losses per example beside the reference's way (one example at a time, float32, all logits), and beside the machine's limit.

    python benchmarks/gpu_scoring.py --shape 70m --rows 200 --data 'rows/*.jsonl' --tokenizer tokenizer.json
    python benchmarks/gpu_scoring.py --shape 7m --precision bfloat16 --checkpoints 4

Needs torch and transformers and nothing else: it reads the package from this checkout. It runs on a GPU where there is one,
else on the CPU. Without `--data` the rows are random tokens of real lengths. Every pair measures both ways and, before and
after, the machine's matrix product; what is said are medians over the pairs. A line is added to
`results/scoring/scoring.jsonl`; with losses further from the reference's than the precision allows the exit code is 1.
"""

from __future__ import annotations

import argparse
import datetime
import glob
import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from s2l_ray.runtime.process import keep_freed_memory
from s2l_ray.training.flops import matmul_flops_per_second, scoring_flops
from s2l_ray.training.losses import losses_of_models
from s2l_ray.training.token_rows import TokenRows

RESULTS = Path(__file__).parent / "results" / "scoring" / "scoring.jsonl"
# Layers, hidden size, heads: Pythia-70M's shape, and a proxy of 7M parameters with the same vocabulary.
SHAPES = {"70m": (6, 512, 8), "7m": (6, 64, 4)}
VOCABULARY = 50_304
# Largest difference of a loss (float32), mean difference (bfloat16) in nats.
TOLERANCES = {"float32": 1e-4, "bfloat16": 1e-3}


def random_rows(count: int, rng: np.random.Generator, max_tokens: int) -> TokenRows:
    """Random tokens; prompts of 79 and responses of 72 tokens on average, with long tails as in instruction data."""
    rows = []
    for prompt, response in np.exp(rng.normal([4.1, 3.9], [0.75, 0.85], (count, 2))).astype(int) + 1:
        ids = rng.integers(0, VOCABULARY, min(max_tokens, prompt + response)).astype(np.int32)
        rows.append((ids, np.arange(len(ids)) >= min(prompt, len(ids) - 1)))
    return TokenRows.of(rows)


def real_rows(pattern: str, tokenizer_file: str, count: int, rng: np.random.Generator, max_tokens: int) -> TokenRows:
    """A random sample of JSON Lines with `instruction`, `input` and `output`, or `prompt` and `response`."""
    lines = [line for path in sorted(glob.glob(pattern)) for line in Path(path).read_text("utf-8").splitlines()]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=tokenizer_file)
    end, rows = tokenizer.get_vocab().get("<|endoftext|>", 0), []
    for i in rng.permutation(len(lines)):
        row = json.loads(lines[i])
        prompt = row.get("prompt") or "\n\n".join(filter(None, (row["instruction"], row.get("input")))) + "\n\n"
        first = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        second = tokenizer(row.get("response") or row["output"], add_special_tokens=False)["input_ids"]
        ids = np.asarray([*first, *second, end][:max_tokens], np.int32)
        if len(ids) > len(first) > 0:
            rows.append((ids, np.arange(len(ids)) >= len(first)))
        if len(rows) == count:
            break
    return TokenRows.of(rows)


def make_models(shape: str, count: int, device: torch.device) -> list[Any]:
    """Models of one shape with other weights each, as checkpoints have them."""
    layers, hidden, heads = SHAPES[shape]
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    return [transformers.GPTNeoXForCausalLM(config).to(device).eval() for _ in range(count)]


def one_by_one(models: list[Any], tokens: TokenRows, device: torch.device) -> np.ndarray:
    """The reference's way: (models, rows) losses by transformers' own loss, in float32 with all logits."""
    losses = []
    for model in models:
        for ids, is_label in (tokens[row] for row in range(len(tokens))):
            input_ids = torch.from_numpy(ids.astype(np.int64))[None].to(device)
            labels = torch.from_numpy(np.where(is_label, ids, -100).astype(np.int64))[None].to(device)
            with torch.no_grad():
                losses.append(model(input_ids=input_ids, labels=labels).loss.item())
    return np.reshape(losses, (len(models), len(tokens)))


def rows_and_models(arguments: argparse.Namespace) -> tuple[TokenRows, list[Any], torch.device]:
    """What both ways score, the same in every process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rng = np.random.default_rng(arguments.seed)
    if arguments.data:
        tokens = real_rows(arguments.data, arguments.tokenizer, arguments.rows, rng, arguments.max_tokens)
    else:
        tokens = random_rows(arguments.rows, rng, arguments.max_tokens)
    return tokens, make_models(arguments.shape, arguments.checkpoints, device), device


def reference(arguments: argparse.Namespace) -> tuple[float, np.ndarray]:
    """Seconds and losses of the one-by-one loop. In a process of its own: our setting of the allocator speeds it up, too."""
    transformers.utils.logging.set_verbosity_error()
    tokens, models, device = rows_and_models(arguments)
    one_by_one(models[:1], tokens.take(np.arange(min(16, len(tokens)))), device)
    begun = time.perf_counter()
    losses = one_by_one(models, tokens, device)
    return time.perf_counter() - begun, losses


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One pair after another; medians."""
    tokens, models, device = rows_and_models(arguments)
    dtype = getattr(torch, arguments.precision)
    needed = len(models) * scoring_flops(models[0], tokens.lengths, int(tokens.num_labels.sum()))

    def ours(rows: TokenRows) -> np.ndarray:
        return np.stack(list(losses_of_models(models, rows, arguments.tokens_per_batch, arguments.precision)))

    ours(tokens.take(np.arange(min(16, len(tokens)))))
    pairs, expected, found = [], np.zeros(0), np.zeros(0)
    for _ in range(arguments.pairs):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            theirs_seconds, expected = pool.apply(reference, [arguments])
        rates = [matmul_flops_per_second(device, dtype)]
        begun = time.perf_counter()
        found = ours(tokens)
        ours_seconds = time.perf_counter() - begun
        rates.append(matmul_flops_per_second(device, dtype))
        rate = statistics.mean(rates)
        pairs.append({"one_by_one": theirs_seconds, "ours": ours_seconds, "rate": rate})
        share = f"{needed / ours_seconds / rate:.0%} of {rate / 1e9:.0f} GFLOP/s"
        print(f"{theirs_seconds:.2f} s one by one, {ours_seconds:.2f} s ours, {share}", flush=True)
    difference = np.abs(found - expected)
    return {
        "shape": arguments.shape,
        "precision": arguments.precision,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "rows": len(tokens),
        "tokens": len(tokens.ids),
        "labels": int(tokens.num_labels.sum()),
        "real_rows": bool(arguments.data),
        "checkpoints": len(models),
        "tokens_per_batch": arguments.tokens_per_batch,
        "ratio": statistics.median(pair["one_by_one"] / pair["ours"] for pair in pairs),
        "tokens_per_second": statistics.median(len(models) * len(tokens.ids) / pair["ours"] for pair in pairs),
        "share_of_rate": statistics.median(needed / pair["ours"] / pair["rate"] for pair in pairs),
        "largest_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "pairs": pairs,
    }


def provenance() -> dict[str, Any]:
    """Commit, versions and time, without the package's own libraries."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}
    return {"created": created, "git": commit, "versions": versions}


def main() -> int:
    """Measure, say it, keep it; 1 where the losses are not the reference's."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="70m")
    parser.add_argument("--precision", choices=TOLERANCES, default="float32")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--checkpoints", type=int, default=1, help="models scored in one pass")
    parser.add_argument("--data", help="JSON Lines, a glob; without it random tokens")
    parser.add_argument("--tokenizer", help="tokenizer.json for --data")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--tokens-per-batch", type=int, default=32_768 if torch.cuda.is_available() else 4096)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    keep_freed_memory()
    result = measure(arguments) | provenance()
    difference = result["largest_difference" if arguments.precision == "float32" else "mean_difference"]
    is_equal = difference <= TOLERANCES[arguments.precision]
    print(
        f"{arguments.shape} {arguments.precision}: {result['ratio']:.2f} times the one-by-one loop, "
        f"{result['tokens_per_second']:,.0f} tokens/s, {result['share_of_rate']:.0%} of the matrix-product rate; losses "
        f"differ by {result['largest_difference']:.1e} at most, {result['mean_difference']:.1e} on average"
        f"{'' if is_equal else ': TOO MUCH'}"
    )
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    return 0 if is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
