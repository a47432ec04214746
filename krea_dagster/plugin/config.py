"""The options of one run of ``images``, as Dagster's run config."""

import dagster as dg

from krea_dagster.application.buy_options import BuyOptions


class KreaImagesConfig(BuyOptions, dg.Config):
    """Options of one run of ``images``; with the defaults it buys what is missing."""
