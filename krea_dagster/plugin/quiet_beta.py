"""Keeps Dagster's beta warnings from users who cannot do anything about them."""

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import dagster as dg

P = ParamSpec("P")
R = TypeVar("R")


def quiet_beta(build: Callable[P, R]) -> Callable[P, R]:
    """Build without Dagster's beta warnings.

    Backfill policies are beta in Dagster. That they are used here is this package's decision,
    which its tests watch; a warning at each start would only be noise.
    """

    @functools.wraps(build)
    def quietly(*args: P.args, **kwargs: P.kwargs) -> R:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", dg.BetaWarning)
            return build(*args, **kwargs)

    return quietly
