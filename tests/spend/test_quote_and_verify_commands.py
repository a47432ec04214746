"""Quote and proof where people meet them: the asset check, the metadata, and the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import dagster as dg
import pytest

from krea_dagster import build_krea_definitions, cli
from krea_dagster.emulator import Emulator
from tests.dagster_bench import QUIET, OpenAccount, latest, run_job, values
from tests.spend.project_harness import ProjectHarness

BUCKETS = ("bucket-000", "bucket-001")


# -- Dagster ----------------------------------------------------------------------------------


def evaluation(result: dg.ExecuteInProcessResult) -> dg.AssetCheckEvaluation:
    """What the proof said at the end of a run."""
    (found,) = [
        one for one in result.get_asset_check_evaluations() if one.check_name == "spend_proof"
    ]
    return found


def test_the_proof_is_a_job_of_its_own_and_each_run_shows_what_it_had_quoted(
    project: ProjectHarness, instance: dg.DagsterInstance
) -> None:
    project = project.with_rows("ash", "birch", "cedar", "date")
    sizes = {key: sum(image.partition_key == key for image in project.images()) for key in BUCKETS}
    defs = build_krea_definitions(
        prompts=project.table.source,
        partition_by="hash:2",
        krea=project.resource,
        key_prefix="proved",
    )
    first = run_job(defs, instance, *BUCKETS, job="proved_krea_images")
    assert first.success
    assert "spend_proof" not in {one.check_name for one in first.get_asset_check_evaluations()}
    proof = evaluation(run_job(defs, instance, job="proved_krea_proof"))
    assert proof.passed
    assert proof.asset_key == dg.AssetKey(["proved", "spend_ledger"])
    assert proof.description == "4 charges of 1.8 credits add up; 0 notes."
    said = {name: entry.value for name, entry in proof.metadata.items()}
    assert (said["charges"], said["files_hashed"], said["manifest_rows"]) == (4, 4, 4)
    assert (said["account_credits_used"], said["account_credits_unexplained"]) == (1.8, 0)
    for key in BUCKETS:
        shown = values(latest(instance, ("proved", "images"), key))
        assert shown["quoted_to_buy"] == sizes[key]
        assert shown["quoted_credits"] == pytest.approx(0.45 * sizes[key])

    # A byte changes, and the next proof says so.
    path = project.file_of("ash")
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    second = run_job(defs, instance, BUCKETS[0], job="proved_krea_images")
    assert second.success
    proof = evaluation(run_job(defs, instance, job="proved_krea_proof"))
    assert not proof.passed
    assert proof.severity is dg.AssetCheckSeverity.ERROR
    assert proof.description is not None
    assert proof.description.startswith("ash (bucket-00")
    table = proof.metadata["findings"].value
    assert isinstance(table, dg.TableMetadataValue)
    (row,) = table.records
    assert row.data["kind"] == "file_changed"
    shown = values(latest(instance, ("proved", "images"), BUCKETS[0]))
    assert not {"quoted_to_buy", "quoted_credits"} & set(shown)


def test_a_launch_of_the_images_proves_nothing_and_one_of_the_ledger_reads_no_file(
    project: ProjectHarness, instance: dg.DagsterInstance
) -> None:
    """A launch of assets, as by the UI, takes every check of these assets along."""
    project = project.with_rows("elder", "fir")
    defs = build_krea_definitions(
        prompts=project.table.source,
        partition_by="hash:1",
        krea=project.resource,
        key_prefix="prefix",
    )
    job = defs.resolve_implicit_global_asset_job_def()
    keys = [dg.AssetKey(["prefix", name]) for name in ("images", "image_manifest")]
    result = job.execute_in_process(
        instance=instance, asset_selection=keys, partition_key="bucket-000", run_config=QUIET
    )
    assert result.success
    assert "spend_proof" not in {one.check_name for one in result.get_asset_check_evaluations()}
    tables = [dg.AssetKey(["prefix", name]) for name in ("spend_ledger", "spend_daily")]
    result = job.execute_in_process(instance=instance, asset_selection=tables, run_config=QUIET)
    said = {name: entry.value for name, entry in evaluation(result).metadata.items()}
    assert (said["files"], said["files_hashed"]) == (2, 0)


# -- the command ------------------------------------------------------------------------------


class Shell:
    """The command, in the environment of a project."""

    def __init__(
        self,
        project: ProjectHarness,
        patch: pytest.MonkeyPatch,
        capture: pytest.CaptureFixture[str],
    ) -> None:
        self._patch = patch
        self._capture = capture
        variables = {
            "EVOLINK_API_KEY": project.api_key,
            "EVOLINK_BASE_URL": project.emulator.url,
            "KREA_PROMPTS": project.table.source,
            "KREA_STORAGE": str(project.folder / "krea"),
            "KREA_PARTITION_BY": "hash:2",
        }
        for name, value in variables.items():
            patch.setenv(name, value)

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Run it; exit code, stdout, stderr."""
        self._patch.setattr(sys, "argv", ["krea-dagster", *arguments])
        self._capture.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.run()
        captured = self._capture.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err


def test_quote_prints_a_table_and_makes_nothing(
    project: ProjectHarness, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project = project.with_rows("ash", "birch", "cedar").with_rows("large", quality="2K")
    before = project.emulator.stats(tasks=False)["requests"]
    shell = Shell(project, monkeypatch, capsys)
    code, out, err = shell.run("quote")
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["partition", "quality", "asked", "reused", "to", "buy", "credits", "USD"]
    assert ["total", "4", "0", "4", "3.15", "0.0463"] in lines
    assert "price of 1K: 0.45 credits (published; this account has not paid for one yet)" in out

    code, out, _ = shell.run("quote", "--json", "--credit-prices", "68/USD,2026-01-01=45/EUR")
    figures = json.loads(out)
    assert code == 0
    assert figures["total"]["to_buy"] == 4
    assert figures["total"]["eur"] == 0.07
    sums = [(line["asked"], line["credits"]) for line in figures["partitions"]]
    assert sum(asked for asked, _ in sums) == 4
    assert sum(credit for _, credit in sums) == pytest.approx(3.15)

    code, out, err = shell.run("quote", "--partition", "bucket-002")
    assert (code, out) == (2, "")
    assert "unknown partition 'bucket-002'" in err
    assert not (project.folder / "krea").exists()
    assert project.emulator.stats(tasks=False)["requests"] == before


def test_quote_shows_totals_where_the_partitions_are_many(
    project: ProjectHarness, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project = project.with_rows(*(f"row-{number}" for number in range(30)))
    shell = Shell(project, monkeypatch, capsys)
    monkeypatch.setenv("KREA_PARTITION_BY", "hash:20")
    _, out, _ = shell.run("quote")
    assert "20 partitions; --by-partition lists them." in out
    assert "bucket-" not in out
    _, out, _ = shell.run("quote", "--by-partition")
    assert out.count("bucket-") > 5


def test_verify_prints_what_it_proved_and_exits_1_where_something_does_not_add_up(
    shared_project: ProjectHarness,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shell = Shell(shared_project, monkeypatch, capsys)
    code, out, err = shell.run("verify")
    assert (code, err) == (0, "")
    figures = {line[:16].strip(): line[16:].strip() for line in out.splitlines()}
    assert figures["charges"] == "4 of 1.8 credits"
    assert figures["files"] == "4, 4 of them read again"
    assert figures["manifest rows"] == "4 of 4 agree"
    assert figures["account before"] == "0 credits used"
    assert figures["account after"] == "1.8 credits used"
    assert figures["unexplained"] == "0 credits"
    assert "Every credit is accounted for." in out

    shared_project.file_of("ash").write_bytes(b"another image")
    code, out, _ = shell.run("verify", "--no-files", "--json")
    told = json.loads(out)
    assert code == 1
    assert (told["adds_up"], told["errors"], told["files_hashed"]) == (False, 1, 0)
    assert told["counts"] == {"file_changed": 1}
    assert told["findings"][0]["credits"] == 0.45
    code, out, _ = shell.run("verify")
    assert code == 1
    assert "error: ash (bucket-00" in out
    assert "1 thing does not add up." in out


def test_verify_without_a_journal_is_wrong_use(
    project: ProjectHarness, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = Shell(project.with_rows("ash"), monkeypatch, capsys).run("verify")
    assert (code, out) == (2, "")
    assert "has no journal yet" in err
    assert not (project.folder / "krea").exists()


def test_quote_of_a_journal_elsewhere_needs_no_emulator(
    tmp_path: Path,
    emulator: Emulator,
    open_account: OpenAccount,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without a key, where a run would start an emulator of its own."""
    project = ProjectHarness(tmp_path, emulator, open_account()).with_rows("ash")
    shell = Shell(project, monkeypatch, capsys)
    monkeypatch.delenv("EVOLINK_API_KEY")
    monkeypatch.delenv("EVOLINK_BASE_URL")
    code, out, _ = shell.run("quote")
    assert code == 0
    assert "0.45" in out
    assert not (tmp_path / "krea").exists()
