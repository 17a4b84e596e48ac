import os
import subprocess
import sys
from pathlib import Path

import pytest

from packed_folder import tiny_llama, write_packed

WORKER = Path(__file__).with_name("two_ranks.py")


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp-mixed"])
def test_one_step_on_two_ranks_equals_one_process(kind: str, tmp_path: Path):
    write_packed(tiny_llama(), tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*command, str(WORKER), kind, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-4000:]
