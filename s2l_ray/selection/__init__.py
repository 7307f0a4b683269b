"""Groups and a budget -> the subset: an equal share of every group. Needs neither torch nor Ray.

Takes a trajectory store and groups; gives `selection/selected.parquet`. Read `stage`; `alone` is `s2l select`, `export` is
`s2l export`.
"""
