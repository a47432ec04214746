"""The asset check ``spend_proof``: the whole journal against files, manifests and account."""

from collections.abc import Mapping
from typing import Any, Final

import dagster as dg

from krea_dagster.models import credits_from_units
from krea_dagster.plugin.failures import as_failure
from krea_dagster.plugin.names import Names
from krea_dagster.plugin.progress import step_log
from krea_dagster.plugin.resource import krea_of
from krea_dagster.spend.proof.findings import Proof
from krea_dagster.spend.proof.verify import verify

#: Maximum number of bytes that the check reads again in one run; of other files it compares the
#: size. The command ``krea-dagster verify`` reads all.
_HASH_BYTES: Final = 20 * 1024**3

#: Maximum number of findings in the check's table.
_ROWS: Final = 50


def build_spend_proof_check(names: Names) -> dg.AssetChecksDefinition:
    """Build the check of ``spend_ledger`` that every credit is accounted for.

    It reads the whole journal, and so is not a check of ``image_manifest``: Dagster would run it
    with every partition. Manifests that other runs have yet to write do not fail it. In a run that
    was launched for assets, as from the UI, only the size of each file is compared: the job reads
    the files again.
    """

    @dg.asset_check(
        asset=names.key("spend_ledger"),
        name="spend_proof",
        required_resource_keys={names.resource_key},
        description=(
            "Every charge in the journal has one task, one file whose hash matches, and a manifest "
            "row; and the journal explains what the account used."
        ),
    )
    def spend_proof(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        krea = krea_of(context, names.resource_key)
        most_bytes = 0 if context.run.asset_selection else _HASH_BYTES
        with (
            step_log(context.log, "comparing the manifests with the journal") as log,
            as_failure(),
            krea.open_journal() as journal,
        ):
            proof = verify(
                journal,
                krea.open_storage(),
                hash_bytes=most_bytes,
                manifests_may_lag=True,
                on_progress=lambda figures: log.doing(
                    f"{figures.charges} charges compared with their files"
                ),
            )
        return dg.AssetCheckResult(
            passed=proof.adds_up,
            severity=dg.AssetCheckSeverity.ERROR,
            description=_sentence(proof),
            metadata=_metadata(proof),
        )

    return spend_proof


def _sentence(proof: Proof) -> str:
    if not proof.adds_up:
        more = f" (and {proof.errors - 1} more)" if proof.errors > 1 else ""
        return f"{proof.findings[0].text}{more}"
    figures = proof.figures
    return (
        f"{figures.charges} charges of {credits_from_units(figures.charged_units):g} credits add "
        f"up; {proof.notes} notes."
    )


def _metadata(proof: Proof) -> Mapping[str, Any]:
    figures, account = proof.figures, proof.account
    values: dict[str, Any] = {
        "charges": figures.charges,
        "tasks": figures.tasks,
        "files": figures.files,
        "files_hashed": figures.files_hashed,
        "manifest_rows": figures.rows,
        "credits_charged": credits_from_units(figures.charged_units),
        "credits_at_stake": credits_from_units(figures.at_stake_units),
        "credits_lost": credits_from_units(figures.lost_units),
        "errors": proof.errors,
        "notes": proof.notes,
    }
    if account is not None:
        values["account_credits_used"] = credits_from_units(account.used_units)
        values["account_credits_unexplained"] = credits_from_units(account.unexplained_units)
    if proof.findings:
        values["findings"] = dg.MetadataValue.table(
            records=[
                dg.TableRecord(
                    {
                        "severity": finding.severity.value,
                        "kind": finding.kind.value,
                        "finding": finding.text,
                        "credits": credits_from_units(finding.units),
                    }
                )
                for finding in proof.findings[:_ROWS]
            ]
        )
    return values
