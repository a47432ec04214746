"""What a person may ask of one run of images, as Dagster's run config."""

import dagster as dg
from pydantic import Field

from krea_dagster.engine.resolution import Resolution, parse_resolution
from krea_dagster.prompts import Plan


class KreaImagesConfig(dg.Config):
    """Wishes for one run of ``images``; without any it buys what is missing."""

    again: list[str] = Field(
        default=[],
        description=(
            "prompt_ids of which another image is bought: their attempt is raised by one, and with "
            "it the seed, where it was drawn. Also error:CODE, for the rows that failed with that "
            "code, and rejected, for those whose image a person has rejected. The old images stay "
            "in the journal. If the run is interrupted, the same wish continues it, and buys no "
            "second image."
        ),
    )
    new_seed: bool = Field(
        default=False,
        description=(
            "Draw the seed of the rows in `again` whose seed the table fixes: with the same seed "
            "they would give the same image, and are refused."
        ),
    )
    retry_errors: list[str] = Field(
        default=[],
        description="Error codes: rows that failed or were refused with one are bought again.",
    )
    resolve: dict[str, str] = Field(
        default={},
        description=(
            "Decisions about purchases whose outcome is unknown, by prompt_id or request_key: "
            "replay (repeat under the same key), not-charged (buy it anew), lost, or task:ID."
        ),
    )

    wait: bool | None = Field(
        default=None,
        description=(
            "Whether the run waits for its images, or submits and ends. By default as the assets "
            "were built: they wait, unless they collect later."
        ),
    )

    def waits(self, by_default: bool) -> bool:
        """Whether the run waits for its images."""
        return by_default if self.wait is None else self.wait

    def resolutions(self, plan: Plan) -> dict[str, Resolution]:
        """The decisions, by request key. Raises ConfigError for one that cannot be read."""
        decided = {name: parse_resolution(text) for name, text in self.resolve.items()}
        found: dict[str, Resolution] = {}
        for image in plan.named(decided):
            key = image.request.request_key
            decision = decided.get(key) or decided.get(image.prompt_id)
            if decision is not None:
                found[key] = decision
        return found
