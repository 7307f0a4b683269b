"""Ray, and nothing of any stage: the only room that knows how work gets onto machines.

Takes functions, and how many workers of which size they want; gives their results, waits for machines, starts again what
was lost. Read `session` (connecting), `room` (waiting for machines), `fit` (a training group), `pool` (units of work on
actors); `data`, `process` and `metrics` are small.
"""
