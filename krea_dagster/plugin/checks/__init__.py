"""The asset checks of manifests and their files, as factories.

They read the manifests of the run's partitions (one or a range), or all manifests if the run has no
partitions. They use neither EvoLink's API nor the journal.
"""

from krea_dagster.plugin.checks.delivered import CHECK_NAME, check_rows
from krea_dagster.plugin.checks.failure_share import build_failure_share_check
from krea_dagster.plugin.checks.files import build_files_check
from krea_dagster.plugin.checks.images import build_images_check
from krea_dagster.plugin.checks.manifest_check import CheckFactory
from krea_dagster.plugin.checks.manifest_schema import build_manifest_schema_check
from krea_dagster.plugin.checks.spend import build_spend_check

__all__ = [
    "CHECK_NAME",
    "CheckFactory",
    "build_failure_share_check",
    "build_files_check",
    "build_images_check",
    "build_manifest_schema_check",
    "build_spend_check",
    "check_rows",
    "default_checks",
]


def default_checks() -> tuple[CheckFactory, ...]:
    """Return the checks that cost little: schema, failure share, and files with some hashes.

    Images are not decoded again and prices are not compared: add ``build_images_check`` and
    ``build_spend_check`` for that.
    """
    return (build_manifest_schema_check, build_failure_share_check, build_files_check)
