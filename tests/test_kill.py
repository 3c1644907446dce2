"""Kill the process at random instants: whatever it left, the same command ends in the same bits."""

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from sparsify import manifest

N_KILLS = 20


def test_killed_at_random_instants_it_resumes_to_the_same_bits(stories: Path, tmp_path: Path) -> None:
    ids = torch.randint(3, 512, (24, 384), generator=torch.Generator().manual_seed(0))
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    result = subprocess.run(
        [
            sys.executable,
            Path(__file__).with_name("kill_worker.py"),
            stories,
            tmp_path / "work",
            f"{tmp_path}/ids.safetensors:ids",
            str(N_KILLS),
            "7",
        ],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr
    killed, resumable = map(int, result.stdout.split())
    # A test that killed nothing, or nothing worth resuming, would prove nothing.
    assert killed >= N_KILLS // 2
    assert resumable >= N_KILLS // 5
    whole = contents(tmp_path / "work/whole")
    assert len(whole) > 5
    for trial in range(N_KILLS):
        assert contents(tmp_path / f"work/killed-{trial}") == whole
    assert not list((tmp_path / "work").glob("*.partial"))


def contents(folder: Path) -> dict[str, bytes]:
    # A kill right after the rename may leave the state's dot file behind; it is not part of the output.
    names = [p for p in folder.iterdir() if p.name not in manifest.ABOUT_RUN and not p.name.startswith(".")]
    return {p.name: p.read_bytes() for p in names}
