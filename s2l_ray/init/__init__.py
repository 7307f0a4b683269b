"""From a corpus to a config: a look at the rows, what they are, what fits them, and a commented YAML file to start from.

Nothing is guessed in silence: what cannot be told from the rows becomes a line marked `CHOOSE`, in the file and on the screen.

Read `sampling` (rows), `layout` (which field is what), `figures` (counts and tokens), `target` and `proxies` (models), `advice`
(numbers, each with its reason), `config_text` (the file), `summary` and `screen` (what a user sees), `start` (all in order).
"""
