"""SIGTERM to the command: it ends soon, writes its answers, and the next run completes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from krea_dagster.engine.states import State
from tests.crash.test_kill import PATIENCE_S, ROOT, wait_until
from tests.engine.harness import EngineHarness, open_harness


def command(engine: EngineHarness) -> subprocess.Popen[bytes]:
    """``krea-dagster materialize`` over eight rows, three at a time."""
    prompts = engine.folder / "prompts.parquet"
    pq.write_table(pa.table({"prompt": [f"a fox {n}" for n in range(8)]}), prompts)
    environment = {
        **os.environ,
        "DAGSTER_HOME": "",
        "EVOLINK_API_KEY": "emulator",
        "EVOLINK_BASE_URL": engine.emulator.url,
        "KREA_PROMPTS": str(prompts),
        "KREA_STORAGE": str(engine.folder),
        "KREA_PARTITION_BY": "hash:1",
        "KREA_MAX_IN_FLIGHT": "3",
        "KREA_ON_UNKNOWN": "hold",
    }
    arguments = [sys.executable, "-m", "krea_dagster.cli", "materialize"]
    with (engine.folder / "stderr.txt").open("wb") as errors:
        return subprocess.Popen(
            arguments, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=errors
        )


def test_a_terminated_command_waits_for_the_answer_to_a_post(tmp_path: Path) -> None:
    """Under hold, a lost answer would need a person."""
    with open_harness(tmp_path, latency_s=0.05) as engine:
        engine.emulator.world.set_rate("stuck", 1.0)
        engine.emulator.world.script("delay_create", arg=1)
        process = command(engine)
        try:
            wait_until(lambda: engine.emulator.stats(tasks=False)["creates"] == 3, process)
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 1
        finally:
            process.kill()
            process.wait()
        assert (
            "Cancelled: nothing was bought, and no image that is paid for is lost. The next run of "
            "these partitions continues from here. 8 images in 1 partition: 0 stored already, 5 to "
            "buy for at most 2.25 credits, 3 paid for and to be fetched."
        ) in (engine.folder / "stderr.txt").read_text()
        stats = engine.assert_accounts_agree()
        assert stats["creates"] == stats["submit_posts"] == 3
        records = list(engine.journal.all_records())
        states = sorted(record.state.value for record in records)
        assert states == ["planned"] * 5 + ["submitted"] * 3
        assert {record.claimed_by for record in records} == {None}

        engine.emulator.world.set_rate("stuck", 0.0)
        unfinished = [record.request for record in records if record.state is State.PLANNED]
        report = asyncio.run(engine.run(unfinished, "run-2"))
        assert (report.posts, report.progress.delivered) == (5, 5)
        assert engine.assert_accounts_agree()["creates"] == 8
