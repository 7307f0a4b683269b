"""Where results lie and how stages meet: directories on a disk or in object storage that are finished or are not.

Takes names and bytes; gives artifacts that nobody reads before they are whole. Read `layout` (what lies where in a run
directory), `places` (reading and writing, the same everywhere), `artifacts` (fingerprints, manifests), `ownership` (what is
ours and may be removed), `drafts` (a stage while it is built), `stages` (what a stage is built from), `lock` (one run per
directory), `node_files` (what the processes of a node share); `listing` (globs), `records` (hashes) and `provenance` are what
manifests are made of, `hub` pins names to commits.
"""
