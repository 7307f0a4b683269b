"""Any corpus -> canonical parts with stable ids, sorted by id.

Takes files, a Hub dataset or generated tasks; gives `examples/part-*.parquet` and the corpus's own columns back. Read `stage`
(three passes), then what they stand on: `corpus` (which files, how they are cut), `pieces` (reading a stretch), `rows`
(rows as they are), `fields` (a row to an example), `index` (the order of all rows), `ids` (ids and the random numbers that
they bring along).
"""
