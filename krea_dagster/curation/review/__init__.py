"""Review: a page on this machine on which people keep, reject or flag each image.

``review_command``
    the command line
"""

from __future__ import annotations

from krea_dagster.curation.review.command import review_command

__all__ = ["review_command"]
