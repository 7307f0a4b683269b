"""What a run would do, what it would cost, and how far a run is. Reads and estimates; builds nothing.

Takes a config or a run directory; gives text. Read `plan` (the table), `costs` (operations, bytes, hours), `target_memory`
(which ZeRO settings fit) over `memory` (the formulas) and `accelerators`; `status` is how far a run is.
"""
