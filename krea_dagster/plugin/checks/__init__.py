"""The asset checks, as factories: each looks at manifests and the files that they name.

They read the manifests of the run's partitions (one, or a range), or where the run has none, all
that are on file; never the network of EvoLink, and never the journal.
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
    """The checks that cost little: schema, failure share, and the files, of which a few are hashed.

    Pictures are not decoded again and no price is compared: add ``build_images_check`` and
    ``build_spend_check`` where that is wanted.
    """
    return (build_manifest_schema_check, build_failure_share_check, build_files_check)
