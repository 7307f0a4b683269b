"""Checkpoints -> trajectories: the loss of every example under every checkpoint, each exactly once.

Takes a run's checkpoints, or losses that a user's own training records; gives `trajectories/part-*.parquet`. Read `stage`
(scoring), `beside` (what the last checkpoint alone gives), `units` (where losses lie until they are joined) and `overlapped`
(scoring during the training); then `store` and `files` (what clustering and selection read) over `loss_columns`, `parts`
(Parquet from anywhere), `sorting`, `arriving` (what is learned of rows on their way in), in Ray `ranges` and `ranged_store`,
and `measured` (what only some selectors read). For other trainers: `recording`, and `callback` over `dataset_rows` and
`scored_training`.
"""
