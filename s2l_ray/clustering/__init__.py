"""Trajectories -> groups of examples whose losses fell in the same way. Needs neither torch nor Ray.

Takes a trajectory store; gives groups and `clustering/assignments-*.parquet`. Read `stage`, then `grouping` (samples,
restarts, all rows), `kmeans` (one Lloyd loop), `engines` (where its rows are), `features` (what it sees), `diagnostics` (how
good the groups are).
"""
