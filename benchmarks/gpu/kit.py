"""The kit for a GPU that is lent for minutes: one command per piece. See the README beside it.

    python benchmarks/gpu/kit.py losses|scoring|training|kmeans [--rehearse] [--results DIR]     with tier a
    python benchmarks/gpu/kit.py run|tests [--rehearse] [--results DIR]                          with tiers a and b
    python benchmarks/gpu/kit.py faiss [--rehearse] [--results DIR]                              with tiers a and faiss
    python benchmarks/gpu/kit.py pack [--tier a|b|faiss] [--output DIR]                          where there is a network
    python benchmarks/gpu/kit.py join DIR                                                        on the GPU's machine

A piece ends with 0 (all cells done), 3 (call the same again: cells are left), 1 (a result is wrong, or it was not run: the
message says what is missing).
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from measuring import Kit  # noqa: E402

PIECES = {
    "losses": "piece_losses",
    "scoring": "piece_scoring",
    "training": "piece_training",
    "kmeans": "piece_kmeans",
    "run": "piece_whole",
    "tests": "piece_whole",
    "faiss": "piece_whole",
}


def main() -> int:
    """Run one piece, or make or join the parts of a package of wheels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("piece", choices=[*PIECES, "pack", "join"])
    parser.add_argument("folder", nargs="?", type=Path, help="of `join`: where the parts are")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at a tiny size")
    parser.add_argument("--results", type=Path, default=HERE.parent / "results" / "gpu", help="where PIECE.json is written")
    parser.add_argument("--minutes", type=float, default=7.5, help="no cell begins that may end later")
    parser.add_argument("--data", help="JSON Lines, a glob: real rows for `scoring`")
    parser.add_argument("--tokenizer", help="tokenizer.json for --data")
    parser.add_argument("--output", type=Path, default=Path("build/kit"), help="of `pack`")
    parser.add_argument("--tier", choices=["a", "b", "faiss"], default="b", help="of `pack`; b has a in it")
    arguments = parser.parse_args()
    if arguments.piece in {"pack", "join"}:
        import packing

        if arguments.piece == "pack":
            return packing.pack(arguments.output, arguments.tier)
        return packing.join(arguments.folder or arguments.output)
    if arguments.rehearse:  # before torch looks, in this process and those that it starts
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    kit = Kit(arguments.results, arguments.rehearse, arguments.minutes, arguments.data, arguments.tokenizer)
    try:
        module = importlib.import_module(PIECES[arguments.piece])
    except ModuleNotFoundError as error:
        wanted = f"not run: {error}. Send the wheels: kit.py pack --tier a, then join."
        raise SystemExit(wanted) from error
    cells = module.cells(kit) if arguments.piece not in {"run", "tests", "faiss"} else module.CELLS[arguments.piece](kit)
    return kit.run(arguments.piece, cells)


if __name__ == "__main__":
    sys.exit(main())
