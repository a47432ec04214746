"""What tests share: one emulator, one Dagster instance, and an environment without a real key."""

from __future__ import annotations

import gc
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from krea_dagster.application.settings import Settings
from krea_dagster.emulator import Emulator

if TYPE_CHECKING:
    import dagster as dg

# What is imported and collected stays to the end: to look through it for garbage would take a
# tenth of the suite's time.
gc.disable()

# How long an example takes says more of the machine than of the code.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


#: The folders whose tests take longest: they begin first, so that no worker ends with one of them.
_LONG_FIRST = ("simulation", "secrets", "drill", "scenarios", "examples", "crash", "tutorial")


def pytest_configure(config: pytest.Config) -> None:
    """Ignore a false alarm of Python 3.10.

    Its TLS transports call themselves unclosed if the other side ended the connection, although the
    socket is closed (tests/api/test_transport.py counts them).
    """
    if sys.version_info < (3, 11):
        alarm = "ignore:unclosed transport <asyncio.sslproto:ResourceWarning"
        config.addinivalue_line("filterwarnings", alarm)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the tests by folder; xdist's workers take them from the first, and steal the last."""
    folders = {name: at for at, name in enumerate(_LONG_FIRST)}
    items.sort(key=lambda item: folders.get(item.path.parent.name, len(folders)))


def pytest_xdist_auto_num_workers() -> int:
    """Return half as many workers again as cores: many tests wait for processes and clocks."""
    cores = os.cpu_count() or 1
    return cores + cores // 2


def pytest_collection_finish() -> None:
    """Collect garbage again, of what the tests make and less often than usual."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    gc.enable()


# Journals and Dagster's databases wait for the disk at each commit, so their folders are in memory,
# where there is room for them.
_MEMORY = Path("/dev/shm")  # noqa: S108 - pytest and tempfile make folders of their own in it
if _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > 4 << 30:
    os.environ["TMPDIR"] = tempfile.tempdir = str(_MEMORY)

_VARIABLES = (
    "DAGSTER_HOME",
    "EVOLINK_API_KEY",
    "EVOLINK_BASE_URL",
    "KREA_PROMPTS",
    "KREA_STORAGE",
    "KREA_JOURNAL_URL",
    "KREA_PARTITION_BY",
    "KREA_MAX_IN_FLIGHT",
    "KREA_PARTITIONS_PER_RUN",
    "KREA_RUN_CREDITS",
    "KREA_DAY_CREDITS",
    "KREA_BUDGETS",
    "KREA_SOFT_BUDGETS",
    "KREA_SPEND_BY",
    "KREA_SPEND_THRESHOLD",
    "KREA_SPEND_TAGS",
    "KREA_TIMEZONE",
    "KREA_ON_UNKNOWN",
    "KREA_BUDGETS",
    "KREA_CALLBACK_BASE_URL",
    "KREA_CALLBACK_SECRET",
    "KREA_COLLECT",
    "KREA_REVIEW_TOKEN",
)


@pytest.fixture(scope="session", autouse=True)
def _plain_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads a developer's settings or caches, and none can spend a developer's credits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        for name in _VARIABLES:
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def emulator() -> Iterator[Emulator]:
    """EvoLink's API on this machine; tasks take 20 ms."""
    with Emulator(latency_s=0.02, latency_jitter=0.0) as running:
        yield running


@pytest.fixture(scope="session")
def open_account(emulator: Emulator) -> Callable[..., str]:
    """Open a fresh account, so that a test's credits are its own."""
    numbers = itertools.count(1)

    def opened(credits: float = 1000.0) -> str:
        key = f"sk-of-this-test-{next(numbers):04d}-Zq81"
        emulator.world.add_account(key, round(credits * 10_000))
        return key

    return opened


@pytest.fixture
def settings_of(
    tmp_path: Path, emulator: Emulator, open_account: Callable[..., str]
) -> Callable[..., Settings]:
    """Make the settings of a project in the test's folder, which buys from the emulator."""

    def made(partition_by: str, **further: Any) -> Settings:
        own: dict[str, Any] = {
            "prompts": str(tmp_path / "prompts.parquet"),
            "storage": str(tmp_path / "krea"),
            "base_url": emulator.url,
            "expected_latency_s": 0.02,
        }
        return Settings(api_key=open_account(), partition_by=partition_by, **{**own, **further})

    return made


@pytest.fixture(scope="session")
def dagster_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for Dagster's own files, which calls home to nobody."""
    home = tmp_path_factory.mktemp("dagster-home")
    (home / "dagster.yaml").write_text("telemetry:\n  enabled: false\nnux:\n  enabled: false\n")
    return home


@pytest.fixture(scope="session")
def instance() -> Iterator[dg.DagsterInstance]:
    """A real instance in memory. Tests share it and keep apart by their assets' key prefix."""
    import dagster as dg  # noqa: PLC0415 - two seconds that other tests need not wait

    with dg.DagsterInstance.ephemeral() as opened:
        yield opened


@pytest.fixture(scope="session")
def instance_on_disk(dagster_home: Path) -> Iterator[dg.DagsterInstance]:
    """The same in ``dagster_home``, for tests that read its files: each event costs three times."""
    import dagster as dg  # noqa: PLC0415 - as above

    with dg.DagsterInstance.local_temp(str(dagster_home)) as opened:
        yield opened
