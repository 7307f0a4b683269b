"""What a run would do, what it would cost, and how far a run is. Reads and estimates; builds nothing.

Takes a config or a run directory; gives text. Read `costs`, then `memory` (formulas of the target's memory).
"""
