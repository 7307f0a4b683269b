"""What the stages with torch stand on: models, tokens, losses, fine-tuning.

Takes examples and a section of the config; gives losses and trained models. Read `tokenizers`, `tokens` over `token_rows`,
`chat_rows`, `turns` and `chat_templates` (text to tokens, of pairs and of conversations), `token_pools` and `token_parts`
(of the whole pool, once on a node), `losses` over `output_head`, `varlen_attention` and `label_statistics` (per-example loss
at the machine's speed, which `flops` measures, and what else is known of an example's labels), `embeddings`, `batches` (which
rows in which step), `fine_tuning`, `training_run`, `resume_points` and `zero` (one worker of a training), `locations`,
`models`, `adapters` and `checkpoints` (found, made, saved), `schedule` (when losses are recorded).
"""
