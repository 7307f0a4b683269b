"""The target before and after, on rows that nothing was trained on: was the subset worth it?

Takes the held-out rows and the target's models; gives `metrics.json`, `losses.parquet` (row by row) and `predictions.jsonl`.
Read `stage` (what is measured and written), `held_out` (one model on some rows), `scores` (how an answer or a summary is
scored, and a model's metrics), `generation` (what a model writes, and the lm-evaluation-harness), `sharding` (where the weights
are of a model that no device holds), `shares` (a group of workers that hold it together).
"""
