"""A run measures the images that it verifies, so that image_measures does not decode them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from krea_dagster import KreaResource
from krea_dagster.curation.measures.builtin import measure
from krea_dagster.curation.measures.cache import KEY, MeasureCache, digests
from krea_dagster.emulator import Emulator
from krea_dagster.engine.storage.storage import Storage
from tests.dagster_bench import OpenAccount


@pytest.mark.parametrize(
    ("settings", "measured"),
    [({}, True), ({"measure_images": False}, False), ({"verify_images": False}, False)],
)
def test_a_run_measures_what_it_decodes_unless_it_is_told_not_to(
    tmp_path: Path,
    emulator: Emulator,
    open_account: OpenAccount,
    settings: dict[str, Any],
    measured: bool,
) -> None:
    krea = KreaResource(
        api_key=open_account(),
        base_url=emulator.url,
        expected_latency_s=0.02,
        storage=str(tmp_path),
        **settings,
    )
    bought = krea.generate([f"a ruler of {number} cm, {settings}" for number in range(3)])
    assert bought["status"].to_pylist() == ["stored"] * 3
    cache = MeasureCache.builtin(Storage(str(tmp_path)))
    found = {tuple(row.values()) for row in cache.find(digests(bought["image_sha256"])).to_pylist()}
    expected = set()
    for row in bought.to_pylist() if measured else []:
        with Image.open(row["image_path"]) as image:
            expected.add((bytes.fromhex(row["image_sha256"]), *measure(image).values()))
    assert cache.schema.names[0] == KEY
    assert found == expected, "as if they were taken from the files"
