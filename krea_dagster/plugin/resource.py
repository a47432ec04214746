"""KreaResource: the settings as a Dagster resource, and the application behind them."""

import time
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import dagster as dg
import pyarrow as pa

from krea_dagster.application.krea import Krea
from krea_dagster.application.run_text import end_line
from krea_dagster.application.settings import ConnectionSettings
from krea_dagster.engine.run.report import Progress
from krea_dagster.errors import ConfigError
from krea_dagster.plugin.progress import step_log
from krea_dagster.plugin.usage import Context, add_usage, counted
from krea_dagster.prompts import Defaults

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class KreaResource(ConnectionSettings, dg.ConfigurableResource[None]):
    """Buys images of Krea 2 Turbo from EvoLink, each once, and keeps them verified.

    Give ``api_key``, ``callback_secret``, and a ``journal_url`` or ``storage`` with a password as
    ``dagster.EnvVar``: Dagster shows the name of a variable, but the text of a string. So do the
    secrets in ``storage_options``.
    """

    def krea(self) -> Krea:
        """Return the application with these settings.

        Raises ConfigError for an environment variable that is not set.
        """
        values = {name: _resolved(getattr(self, name)) for name in ConnectionSettings.model_fields}
        return Krea(ConnectionSettings(**values))

    def generate(
        self,
        prompts: Any,
        *,
        context: Context | None = None,
        defaults: Defaults | None = None,
        metadata: bool = True,
        output_name: str | None = None,
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> pa.Table:
        """Buy, fetch and verify the images of a few prompts, and return their manifest.

        For custom assets and ops, with the same journal and storage as the assets of this package:
        what any of them has bought is not bought again.

        Args:
            prompts: Texts, or rows with the columns of a prompt table, or a table (pandas, Polars
                or Arrow).
            context: The asset's or op's context, whose run and name become the manifest's
                ``run_id`` and ``partition_key``.
            defaults: Values for what a row leaves open.
            metadata: Whether the asset that owns the context shows thumbnails, counts and credits,
                as the sum of its calls.
            output_name: The output that shows them, of a step with several; without it such a step
                shows none.
            on_progress: Is called whenever something changed.

        Returns:
            The manifest: one row for each requested image, also if it is missing (``status`` and
            ``error_message`` then say why).

        Raises:
            ConfigError, PromptTableError: before anything is bought.
            AccountStopped, RunStopped: if buying stopped. The next call takes up what is paid for.
            JournalError, StorageError: if what was bought could not be written.
        """
        run_id, name = _ids_of(context)
        krea = self.krea()
        if context is None:
            return krea.generate(prompts, name=name, defaults=defaults, on_progress=on_progress)
        with step_log(context.log, "reading the prompts") as log:

            def on_progress_too(progress: Progress) -> None:
                log.progress(progress)
                on_progress(progress)

            started_s = time.monotonic()
            manifest = krea.generate(
                prompts, run_id=run_id, name=name, defaults=defaults, on_progress=on_progress_too
            )
            if log.last is not None:
                where, seconds = krea.open_storage().shown(""), time.monotonic() - started_s
                log.say(end_line(log.last, seconds, where, manifests=False))
        if metadata:
            add_usage(context, manifest, krea.open_storage(), output_name)
        return manifest

    def with_usage_metadata(
        self,
        context: Context,
        call: Callable[_Arguments, _Result],
        *,
        output_name: str | None = None,
    ) -> Callable[_Arguments, _Result]:
        """Return a function whose purchases are shown on the asset that owns the context.

        For calls of your own: ``Krea.generate``, ``Krea.run`` or ``KreaClient.submit``. The asset
        shows the sum of all its calls, as it does for ``generate``. A submission shows the credits
        that it reserves: what became of it is not known yet.

        Args:
            context: The asset's or op's context.
            call: The function, or coroutine function.
            output_name: The output that shows them, of a step with several.

        Example::

            @dg.asset
            def posters(context: dg.AssetExecutionContext, krea: KreaResource) -> None:
                run = krea.with_usage_metadata(context, krea.krea().run)
                run(PromptTable("posters.parquet"))
        """
        return counted(context, call, self.krea().open_storage(), output_name)


def krea_of(
    context: dg.AssetExecutionContext
    | dg.AssetCheckExecutionContext
    | dg.SensorEvaluationContext
    | dg.InitResourceContext,
    key: str,
) -> Krea:
    """Return the application of a step or sensor. Raises Failure if the resource is another."""
    resource = getattr(context.resources, key)
    if not isinstance(resource, KreaResource):
        raise dg.Failure(f"resource {key!r} is a {type(resource).__name__}, not a KreaResource")
    return resource.krea()


def named_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return storage options with ``{"env": NAME}`` for each EnvVar, as within a run."""
    return {name: _named(value) for name, value in options.items()}


def _named(value: Any) -> Any:
    if isinstance(value, dg.EnvVar):
        return {"env": value.env_var_name}
    if isinstance(value, Mapping):
        return named_options(value)
    return [_named(one) for one in value] if isinstance(value, list | tuple) else value


def _ids_of(context: Context | None) -> tuple[str, str]:
    """Return the run's id and the asset's or op's name; no id if a test calls the asset directly.

    Dagster would give all such calls the same id, so that images of an earlier one would count as
    bought by this one.
    """
    if context is None:
        return "", "generate"
    try:
        run_id = context.run.run_id
    except dg.DagsterError:
        run_id = ""
    if isinstance(context, dg.AssetExecutionContext) and len(context.assets_def.keys) == 1:
        return run_id, context.asset_key.to_user_string()
    return run_id, context.op_def.name


def _resolved(value: Any) -> Any:
    """Return a setting's value, also outside a run, where Dagster leaves an EnvVar as it is.

    Raises ConfigError if its variable is not set: with an empty journal URL another journal would
    be created, which knows no purchase.
    """
    if isinstance(value, Mapping):
        return named_options(value)
    if not isinstance(value, dg.EnvVar):
        return value
    text = value.get_value()
    if text is None:
        raise ConfigError(f"the variable {value.env_var_name} is not set; nothing was bought")
    return text
