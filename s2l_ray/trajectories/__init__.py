"""Checkpoints -> trajectories: the loss of every example under every checkpoint, each exactly once.

Takes a run's checkpoints, or losses that a user's own training records; gives `trajectories/part-*.parquet`. Read `stage`
(scoring), `overlapped` (while the proxy is trained), `store` and `files` (what clustering and selection read) over
`sorting`; `recording` and `callback` are for other trainers.
"""
