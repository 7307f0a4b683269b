"""Groups and a budget -> the subset: an equal share of every group. Needs neither torch nor Ray.

Takes a trajectory store and `Groups`; gives `selection/selected.parquet` with the corpus's own rows. Read `quotas` (how many
of each group, in which order), `choosing` (which rows, in a stream), `subsets` (a subset for each budget, with weights),
`subset_rows` (the corpus's rows with our columns), and `stage`, which joins them. `alone` is `s2l select`,
`export` is `s2l export`.
"""
