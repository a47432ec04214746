"""The options of one run of ``images``, as Dagster's run config."""

from collections.abc import Mapping
from typing import Final

import dagster as dg

from krea_dagster.application.buy_options import BuyOptions

#: The tag of a run that is a trial, such as ``limit=10``. The runs that collect its images have it
#: too, so that they buy no other rows.
TRIAL_TAG: Final = "krea/trial"


class KreaImagesConfig(BuyOptions, dg.Config):
    """Options of one run of ``images``; with the defaults it buys what is missing."""

    def trial_tags(self) -> Mapping[str, str]:
        """Return the tags of a run with these options."""
        trial = self.trial()
        if trial is None:
            return {}
        return {TRIAL_TAG: f"{'sample' if trial.sample else 'limit'}={trial.rows}"}

    def of_run(self, tags: Mapping[str, str]) -> "KreaImagesConfig":
        """Return these options, with the trial that a run's tags name."""
        name, _, rows = tags.get(TRIAL_TAG, "").partition("=")
        return self.model_copy(update={name: int(rows)}) if rows and self.trial() is None else self
