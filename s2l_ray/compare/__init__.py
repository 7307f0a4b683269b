"""Does it pay, on these data? Other ways to choose, trained and evaluated alike; and whether S2L's premise is true here.

Takes a run's trajectories. Read `premise` (do examples of a group have similar gradients), `premise_worker` (what the workers
compute for it), `similarity` (its statistics) and `premise_wording`.
"""
