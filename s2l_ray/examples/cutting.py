"""How a corpus is cut into shards: pieces that many tasks can read at once.

The cut decides no result. It depends on the corpus alone, so that a resumed run finds its shards again.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator

from s2l_ray.config import ExamplesConfig, MimicRadiologyDataset, ReasoningGym, ReasoningGymDataset
from s2l_ray.errors import DataError
from s2l_ray.examples.corpus import find_files
from s2l_ray.examples.csv_files import CsvFile
from s2l_ray.examples.fields import normalise
from s2l_ray.examples.files import BYTE_ORDER_MARK, CorpusFile, marked_encoding
from s2l_ray.examples.formats import FilePiece, JsonValues, Lines, StreamedLines, cut_row_groups
from s2l_ray.examples.llama_factory import resolved
from s2l_ray.examples.mimic import RadiologyReports
from s2l_ray.examples.pieces import GeneratedRows, HubRows, Shard, load_hub
from s2l_ray.progress import get_log
from s2l_ray.storage.hub import hub_id

# A task holds a shard in memory as Python objects. Between the bounds, a small corpus still keeps several tasks busy.
LARGEST_SHARD_BYTES = 32 * 2**20
SMALLEST_SHARD_BYTES = 2**20
SHARDS_WANTED = 64
# Generated rows have no size in advance; the driver keeps an index of every shard.
SMALLEST_GENERATED_SHARD_ROWS = 256
MOST_GENERATED_SHARDS = 1024
SHARDS_IN_A_SAMPLE = 3


def cut_corpus(config: ExamplesConfig) -> list[Shard]:
    """The shards of a corpus, always the same for the same corpus. Raises DataError for one that is missing or empty."""
    if isinstance(config.dataset, ReasoningGymDataset):
        gym = config.dataset.reasoning_gym
        total = sum(parameters["size"] for parameters in gym.tasks.values())
        shards = list(_cut_generated(gym, max(SMALLEST_GENERATED_SHARD_ROWS, -(-total // MOST_GENERATED_SHARDS))))
    elif isinstance(config.dataset, MimicRadiologyDataset):
        shards = [(RadiologyReports(file),) for file in find_files(config.dataset.mimic_radiology)]
    elif hub := hub_id(config.dataset):
        shards = list(_cut_hub(hub, config))
    else:
        shards = _cut_files(config.dataset)
    if not shards:
        raise DataError(f"{config.dataset}: the corpus is empty: no row in it. Give files with rows.")
    return shards


def sample_corpus(config: ExamplesConfig, num_rows: int) -> tuple[int, list[str]]:
    """About how many examples a corpus has, and the texts (prompt and response) of about `num_rows` of them.

    Reads a few shards, or a few rows of every generated task. Nothing is known of a Hub dataset before it is downloaded, nor of
    clinical notes before all of them are read: (0, []). Raises DataError as reading it all would.
    """
    config, layout = resolved(config)
    if hub_id(config.dataset) or isinstance(config.dataset, MimicRadiologyDataset):
        return 0, []
    if isinstance(config.dataset, ReasoningGymDataset):
        gym = config.dataset.reasoning_gym
        shards = list(_cut_generated(gym, -(-num_rows // len(gym.tasks))))
        chosen = list({shard[0].name: shard for shard in reversed(shards)}.values())  # the first of every task
    else:
        shards = cut_corpus(config)
        chosen = shards[:: -(-len(shards) // SHARDS_IN_A_SAMPLE)]
    tables = [normalise(rows, config, layout).table for shard in chosen for piece in shard for rows in piece.read()]
    columns = [(table["prompt"].to_pylist(), table["response"].to_pylist()) for table in tables]
    texts = [
        f"{prompt}{response}" for prompts, responses in columns for prompt, response in zip(prompts, responses, strict=True)
    ]
    read, total = (sum(piece.size for shard in some for piece in shard) for some in (chosen, shards))
    return round(len(texts) * total / max(read, 1)), texts[:: max(1, len(texts) // num_rows)]


def _cut_files(dataset: str | list[str]) -> list[Shard]:
    files = find_files(dataset)
    wanted = sum(file.num_bytes for file in files) // SHARDS_WANTED
    shard_bytes = min(LARGEST_SHARD_BYTES, max(SMALLEST_SHARD_BYTES, wanted))
    with concurrent.futures.ThreadPoolExecutor() as pool:  # in object storage every footer is a request
        beside_json = any(file.format != "parquet" for file in files)
        pieces = [piece for cut in pool.map(lambda file: cut_file(file, shard_bytes, beside_json), files) for piece in cut]
    return _packed(pieces, shard_bytes)


def _cut_generated(gym: ReasoningGym, step: int) -> Iterator[Shard]:
    """Every task in shards of `step` rows."""
    for task, parameters in gym.tasks.items():
        for start in range(0, parameters["size"], step):
            stop = min(start + step, parameters["size"])
            yield (GeneratedRows(task, {"seed": gym.seed} | parameters, start, stop, gym.imperfections),)


def _cut_hub(dataset: str, config: ExamplesConfig) -> Iterator[Shard]:
    place = dataset, config.subset, config.revision, config.split
    loaded = load_hub(*place)
    num_bytes = loaded.data.nbytes
    num_shards = max(1, num_bytes // LARGEST_SHARD_BYTES, min(SHARDS_WANTED, num_bytes // SMALLEST_SHARD_BYTES))
    step = max(1, -(-len(loaded) // num_shards))
    for start in range(0, len(loaded), step):
        yield (HubRows(*place, start, min(start + step, len(loaded))),)


def _packed(pieces: list[FilePiece], shard_bytes: int) -> list[Shard]:
    """Neighbouring pieces put together up to `shard_bytes`: a thousand small files are not a thousand tasks."""
    shards: list[list[FilePiece]] = []
    room = 0
    for piece in pieces:
        if piece.size > room or not shards:  # a piece without a byte may be the first
            shards.append([])
            room = shard_bytes
        shards[-1].append(piece)
        room -= piece.size
    return [tuple(shard) for shard in shards]


# --- one file ----------------------------------------------------------------------------------------------------


def cut_file(file: CorpusFile, shard_bytes: int, beside_json: bool = False) -> list[FilePiece]:
    """The pieces of a file, of about `shard_bytes` each where its format can be cut. Raises DataError if it cannot be read.

    What a file is called tells CSV, Parquet and JSON apart; its first bytes tell which kind of JSON it is.
    """
    if file.format in {"csv", "tsv"}:
        return [CsvFile(file)]
    if file.format == "parquet":
        return list(cut_row_groups(file, shard_bytes, beside_json))
    head = file.head()
    encoding = marked_encoding(head) or "utf-8"
    kind = _json_kind(head.decode(encoding, "replace"), file)
    if kind != "lines":
        if file.format == "lines":
            get_log("examples").info(f"{file.name}: not one object a line, but {kind}: read as that")
        return [JsonValues(file)]
    if file.format == "json" and head:
        get_log("examples").info(f"{file.name}: no array, but one object a line: read as that")
    is_utf8 = encoding.startswith("utf-8")
    if file.compression or not is_utf8:
        return [StreamedLines(file, is_utf8)]
    return [Lines(file, start, min(start + shard_bytes, file.num_bytes)) for start in range(0, file.num_bytes, shard_bytes)]


def _json_kind(head: str, file: CorpusFile) -> str:
    """`lines`, or what a JSON file is instead, by its first characters."""
    start = head.lstrip(BYTE_ORDER_MARK + " \t\r\n")
    if start.startswith("["):
        return "one JSON array"
    first, newline, _ = start.partition("\n")
    is_broken_off = file.format == "json" and newline and not first.rstrip().endswith("}")
    return "objects over several lines" if first.strip() == "{" or is_broken_off else "lines"
