"""Writes the YAML of a new ``KreaImages``, and a first prompt table if there is none."""

from pathlib import Path
from typing import Any, Final

import dagster as dg
from pydantic import BaseModel, Field

from krea_dagster.application.settings import Settings, variable_of

#: The prompts of the first table.
FIRST_PROMPTS: Final = (
    ("harbor-dawn", "a harbor at dawn, film grain"),
    ("red-kite", "a red kite over a quiet city"),
    ("lake-fog", "a lake in fog, soft light"),
    ("old-sailor", "portrait of an old sailor"),
)

#: What follows the storage in the YAML: limits to choose, and the variable for ``dg list envs``.
_FURTHER: Final = """\
    # run_credits: 10  # maximum credits of a run; rows beyond it are deferred
    # day_credits: 100  # maximum credits of a UTC day, for all runs
  # spend_schedule: 0 7 * * *  # when the spend tables are updated and looked at for warnings
  # collect_later: true  # runs do not wait for their images; a sensor launches those that collect
requirements:
  env:
  - {api_key_env}
"""


class KreaImagesParams(BaseModel):
    """The options of ``dg scaffold defs krea_dagster.KreaImages NAME``."""

    prompts: str = Field(
        default="data/prompts.parquet", description="The prompt table, below the project's root."
    )
    partition_by: str = Field(default="hash:8", description="How the table is partitioned.")
    api_key_env: str = Field(
        default=variable_of(Settings.model_fields["api_key"]),
        description="Name of the variable that holds the API key.",
    )


class KreaImagesScaffolder(dg.Scaffolder[KreaImagesParams]):
    """Scaffolds an instance of ``KreaImages`` that can be launched immediately."""

    @classmethod
    def get_scaffold_params(cls) -> type[KreaImagesParams]:
        """Return the options of the command."""
        return KreaImagesParams

    def scaffold(self, request: dg.ScaffoldRequest[KreaImagesParams]) -> None:
        """Write the component's file, and a table of four prompts if there is none."""
        params = request.params
        attributes: dict[str, Any] = {
            "prompts": params.prompts,
            "partition_by": params.partition_by,
            "krea": {"api_key_env": params.api_key_env, "storage": "data/krea"},
        }
        dg.scaffold_component(request, attributes)
        if request.scaffold_format == "yaml":
            path = request.target_path
            with (path if request.append else path / "defs.yaml").open("a") as file:
                file.write(_FURTHER.format(api_key_env=params.api_key_env))
        if request.project_root is not None and "://" not in params.prompts:
            _write_prompts(Path(request.project_root, params.prompts))


def _write_prompts(file: Path) -> None:
    import pyarrow as pa  # noqa: PLC0415 - a quarter of a second, for `dg list components` too
    import pyarrow.parquet as pq  # noqa: PLC0415

    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    ids, prompts = zip(*FIRST_PROMPTS, strict=True)
    pq.write_table(pa.table({"prompt_id": ids, "prompt": prompts}), file)
