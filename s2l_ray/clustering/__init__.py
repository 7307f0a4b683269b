"""Trajectories -> groups of examples whose losses fell in the same way. Needs neither torch nor Ray.

Takes a trajectory store; gives `Groups` and the files of `clustering/`. Read `stage` (what is called and written), `groups`
(what comes out), `stratifying` (within which strata, and how many in each), `grouping` (two passes over the store, then each
stratum), `strata` (sample, restarts, all rows), `kmeans` (Lloyd's loop and where it starts), `bounds` (searches saved),
`numbering` (canonical cluster ids), `levels` (groups of groups) and `diagnostics` (how good the groups are). Where rows
are: `engines` chooses between `local_rows`, `ray_rows` and `gpu_rows`, `opening` opens a store for it; `columns` are memory or
files. In Ray: `actors` keep `slot`s of rows, made of `feature_files`; `assigned_files` is what they leave. `features` is what
k-means sees of the losses, `threads` is faiss.
"""
