"""The check of the images: flat, damaged, wrong size, duplicate."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from krea_dagster import KreaResource
from krea_dagster.errors import ConfigError
from krea_dagster.plugin.checks import (
    build_files_check,
    build_images_check,
)
from tests.plugin.checks.stored_manifests import (
    ERROR,
    MANIFEST,
    WARN,
    StoredManifests,
    named,
    number,
)

pytestmark = pytest.mark.filterwarnings("ignore::dagster.BetaWarning")  # backfill_policy is beta


def image_bytes(seed: int, width: int = 1024, height: int = 1024, *, flat: bool = False) -> bytes:
    small = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)
    image = Image.fromarray(small * (not flat)).resize((width, height))
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def test_a_flat_a_damaged_and_a_wrong_size_image_are_found(stored: StoredManifests) -> None:
    stored.write(
        [
            stored.row(0, content=image_bytes(0)),
            stored.row(1, content=image_bytes(1, flat=True)),
            stored.row(2, content=image_bytes(2)[:5000]),
            stored.row(3, content=image_bytes(3, 1152, 896)),
            stored.row(4, content=image_bytes(4), width=1152, height=896),
            stored.row(5, content=image_bytes(5, 1344, 768), size="16:9", width=1344, height=768),
        ]
    )
    check = stored.check(build_images_check)
    assert (check.passed, check.severity) == (False, ERROR)
    found = named(check)
    assert set(found) == {"row-0001", "row-0002", "row-0003", "row-0004"}
    assert "one flat colour" in found["row-0001"]
    assert "cut short" in found["row-0002"]
    assert "1152×896 pixels instead of 1024×1024" in found["row-0003"]
    assert "the manifest says 1152×896" in found["row-0004"]
    assert number(check, "pictures_decoded") == 5


def test_an_image_twice_under_different_seeds_is_named_with_the_other_and_twins_are_not(
    stored: StoredManifests,
) -> None:
    same = b"the same"
    stored.write([stored.row(0), stored.row(1, content=same), stored.row(2)])
    twin = {**stored.row(1, content=same), "prompt_id": "twin-of-1"}
    stored.write([twin, stored.row(3, content=same), stored.row(4, content=same)], "b/1")
    check = stored.check(functools.partial(build_images_check, sample=0))
    assert (check.passed, check.severity) == (False, WARN)
    assert number(check, "pictures_twice") == 2
    why = "gave the same image as row-0001 sample 0 (partition a) with seed 2"
    assert named(check) == {"row-0003": f"seed 4 {why}", "row-0004": f"seed 5 {why}"}


def test_the_sample_bounds_what_is_decoded(stored: StoredManifests) -> None:
    stored.write([stored.row(n) for n in range(10)])  # none of them is an image
    check = stored.check(functools.partial(build_images_check, sample=4))
    assert (number(check, "pictures_decoded"), len(named(check))) == (4, 4)


@pytest.mark.parametrize(("verified", "decoded"), [(True, 1), (False, 3)])
def test_what_the_run_has_bought_and_verified_is_not_decoded_again(
    stored: StoredManifests, verified: bool, decoded: int
) -> None:
    stored.krea = KreaResource(storage=stored.root, verify_images=verified)

    def buy(run_id: str) -> None:
        ids = ["an earlier run", run_id, run_id]
        stored.write([stored.row(n, run_id=one) for n, one in enumerate(ids)])

    check = stored.check(build_images_check, "a", before=buy)
    assert (number(check, "rows_checked"), number(check, "pictures_decoded")) == (3, decoded)


@pytest.mark.parametrize("build", [build_files_check, build_images_check])
def test_a_negative_sample_is_refused(build: Callable[..., object]) -> None:
    with pytest.raises(ConfigError, match="sample is -1"):
        build(MANIFEST, sample=-1)
