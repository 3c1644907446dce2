"""A driver without a model, run as a process of its own: it takes a staging folder, keeps a journal, finishes blocks.

Arguments: the output, its blocks, and how many it finishes before it says so on stdout and waits for a line on stdin.
"""

import sys
from pathlib import Path

from sparsify.files import staging_folder, write_json
from sparsify.journal import About, Journal, Stopwatch
from sparsify.types import PrunedLinear

ABOUT = About("a model", "fast", "2:4", {"seed": 1}, threads=2, workers=2)


def row(index: int, error: float = 0.01) -> PrunedLinear:
    """What was done to the only linear of a block."""
    return PrunedLinear(f"block.{index}.linear", (4, 8), "2:4", "4", 16, error, 100)


def main() -> None:
    """Take up what an earlier process left, and end in an output."""
    out, total, pause = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    with staging_folder(out, {"recipe": {"method": "fast", "pattern": "2:4"}}) as staging:
        state = staging.state or {"blocks": []}
        done = len(state["blocks"])
        with Journal(staging.path, None, ABOUT, done=done) as journal:
            journal.stage("pruning", 10 * total)
            journal.skip(10 * done)
            journal.blocks(total, range(done), weights=[32] * total)
            for index in range(done, total):
                if index == pause:
                    journal.worker("w1", "solve", index)
                    journal.notice("about to wait")
                    print("waiting", flush=True)
                    sys.stdin.readline()
                clock = Stopwatch()
                with clock("solve"):
                    journal.worker("w1", "solve", index, peak_memory_bytes=1 << 20)
                    journal.advance(10)
                state["blocks"].append(index)
                staging.save(state)
                journal.block(index, [row(index)], clock.seconds, workers=["w1"])
                journal.worker("w1")
            write_json(staging.path / "sparsify.json", {
                "format": 1, "kind": "checkpoint", "source": {"name": "a model"}, "files": {},
                "recipe": {"method": "fast", "pattern": "2:4"},
            })  # fmt: skip
            write_json(
                staging.path / "run.json", {"seconds": 1.5, "peak_memory_bytes": 3 << 20, "blocks_resumed": done}
            )
            journal.finish()
        staging.commit()


if __name__ == "__main__":
    main()
