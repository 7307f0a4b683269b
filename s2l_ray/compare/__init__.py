"""Arms x budgets x seeds over one run's trajectories -> one table: is the selection better than a random sample, on this data?

Every cell is a target trained alike, from the same starting weights, on another subset, and evaluated on the same held-out
rows. Read `stage` (the order of work), `arms` (what is compared), `cells` (what one is made from and leaves), `subsets` (what
it trains on), `worker` (many targets in one process), `fits` (one target by the run's own stages), `statistics` (paired
differences and their intervals), `table` and `verdict` (what came out, in numbers and in words), `costs`, `results`, `planning`
(before it runs), and `premise` with `similarity` and `premise_worker` (do examples that learn alike have like gradients?).
"""
