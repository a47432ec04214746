"""For tests of projects that use this package: a fake resource, and a small prompt table.

``krea_dagster.testing.fixtures`` has both as pytest fixtures. Nothing else of the package imports
this.
"""

from krea_dagster.testing.fake_krea import FakeKrea
from krea_dagster.testing.small_table import SMALL_TABLE, write_prompts

__all__ = ["SMALL_TABLE", "FakeKrea", "write_prompts"]
