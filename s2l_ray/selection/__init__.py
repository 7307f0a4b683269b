"""Groups and a budget -> the subset: a share of every group. Needs neither torch nor Ray.

Takes a trajectory store and `Groups`; gives `selection/selected.parquet` with the corpus's own rows. Read `quotas` (how many
of each group, in which order), `assignments` (which group each row is in), `choosing` (which rows, in a stream), `spreading`
(which, where they shall lie far apart), `subsets` (a subset for each budget, with weights),
`subset_rows` (the corpus's rows with our columns, and as they were written), `card`, and `stage`, which joins them. `alone` is
`s2l select`. `export` is `s2l export`: `subset_files` writes rows as they are; `turns` reads them as conversations, for which
`trainers` has the forms of `to_trl`, `to_llama_factory`, `to_axolotl` and `to_openai`; `destination` is where they go,
`pushing` the Hub.
"""
