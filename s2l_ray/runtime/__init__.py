"""Ray, and nothing of any stage: the only room that knows how work gets onto machines.

Takes functions, and how many workers of which size they want; gives their results, waits for machines, starts again what
was lost. Read `session` (connecting), `workers` and `room` (how many, and waiting for machines), `fit` and `attempts` (a
training group, seen by the driver and by a worker), `pool` (units of work on actors); `data`, `nodes`, `process` and `metrics`
are small. `private` has all that is used of other libraries without their promise.
"""
