"""Any corpus -> canonical parts with stable ids, sorted by id.

Takes files, a Hub dataset or generated tasks; gives `examples/part-*.parquet`, and to later stages the pool, the held-out rows
and the corpus's own columns (`reading`). Read `stage` first, then its three passes: `shards`, `order`, `parts`. They stand on
`corpus` (which files, and what identifies them), `cutting` (the corpus as shards), `pieces` and `formats` (reading a stretch of
a corpus or of a file), `csv_files` and `mimic` (MIMIC-III's radiology reports), `files` (one file), `rows` (rows as they were
read), `fields` (a row to an example), `hashes` (ids, copies and the split by content) and `ids` (what an id is, and the random
numbers made from it).
"""
