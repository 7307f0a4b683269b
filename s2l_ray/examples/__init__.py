"""Any corpus -> canonical parts with stable ids, sorted by id.

Takes files, a Hub dataset or generated tasks; gives `examples/part-*.parquet`, and to later stages the pool, the held-out
rows and those for validation, and the corpus's own rows (`reading`). Read `stage` first, then its passes: `shards`, `order`,
`splits` (more held-out rows of small sources), `parts`. They stand on

- which files: `corpus` (and what identifies them), `llama_factory` (a dataset by name), `files` (one file), `cutting` (the
  corpus as shards);
- rows as they were read: `pieces` (with `imperfections` where tasks are generated), `formats`, `csv_files` and `mimic`
  (reading a stretch of a corpus or of a file), `rows`, `columns` (their own columns as Parquet holds them);
- a row to an example: `fields`, `layouts` (which fields are what), `conversations` with `message_content` and `tool_calls`,
  `row_problems` (why there is none) and `dropped` (how many); `plain_pairs` for rows of plain texts, column by column;
- `hashes` (ids, copies and the split by content), `texts` and `masking` (the same for many texts at once), and `ids` (what an
  id is, and the random numbers made from it).
"""
