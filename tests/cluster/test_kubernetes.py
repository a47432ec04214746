"""The shipped values and manifests, as Kubernetes would receive them, by its strict schemas.

No cluster runs them here: dagster-k8s builds the Job of a run, and ``kubernetes-validate`` has the
schemas.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import kubernetes_validate
import pytest
import yaml
from dagster import DagsterRun
from dagster._config import process_config, resolve_to_config_type
from dagster._core.code_pointer import FileCodePointer
from dagster._core.origin import JobPythonOrigin, RepositoryPythonOrigin
from dagster_k8s import K8sRunLauncher, construct_dagster_k8s_job
from kubernetes.client import ApiClient

from krea_dagster import definitions_from_environment
from tests.cluster.cluster import SHIPPED

pytestmark = pytest.mark.cluster

KUBERNETES: Final = "1.35"
MANIFESTS: Final = list(yaml.safe_load_all((SHIPPED / "kubernetes/environment.yaml").read_text()))
VALUES: Final = yaml.safe_load((SHIPPED / "kubernetes/values.yaml").read_text())


def launcher_of(values: dict[str, Any], folder: Path) -> K8sRunLauncher:
    """The launcher that Dagster's chart configures with these values."""
    given = values["runLauncher"]["config"]["k8sRunLauncher"]
    run_config = {
        "container_config": given["runK8sConfig"]["containerConfig"],
        "pod_spec_config": given["runK8sConfig"]["podSpecConfig"],
        "job_spec_config": given["runK8sConfig"]["jobSpecConfig"],
    }
    config = {
        "service_account_name": "dagster",
        "job_namespace": "default",
        "instance_config_map": "dagster-instance",
        "postgres_password_secret": "dagster-postgresql-secret",
        "dagster_home": "/opt/dagster/dagster_home",
        "image_pull_policy": given["imagePullPolicy"],
        "load_incluster_config": False,
        "kubeconfig_file": str(write_kubeconfig(folder)),
        "env_config_maps": [one["name"] for one in given["envConfigMaps"]],
        "env_secrets": [one["name"] for one in given["envSecrets"]],
        "run_k8s_config": run_config,
    }
    processed = process_config(resolve_to_config_type(K8sRunLauncher.config_type()), config)
    assert processed.success, processed.errors
    launcher: K8sRunLauncher = K8sRunLauncher.from_config_value(None, processed.value)
    return launcher


def write_kubeconfig(folder: Path) -> Path:
    """Name a cluster that nobody calls."""
    path = folder / "kubeconfig"
    context = {"name": "none", "context": {"cluster": "none", "user": "none"}}
    cluster = {"name": "none", "cluster": {"server": "https://127.0.0.1:9"}}
    path.write_text(
        yaml.safe_dump(
            {
                "current-context": "none",
                "contexts": [context],
                "clusters": [cluster],
                "users": [{"name": "none", "user": {}}],
            }
        )
    )
    return path


def job_of(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The Job of a run, as dagster-k8s sends it to Kubernetes."""
    (deployment,) = values["dagster-user-deployments"]["deployments"]
    container_context = {
        "k8s": {
            "env_config_maps": [one["name"] for one in deployment["envConfigMaps"]],
            "env_secrets": [one["name"] for one in deployment["envSecrets"]],
        }
    }
    image = f"{deployment['image']['repository']}:{deployment['image']['tag']}"
    run = DagsterRun(
        job_name="__ASSET_JOB",
        run_id="3c8f4d2e-0000-4000-8000-000000000000",
        job_code_origin=JobPythonOrigin(
            job_name="__ASSET_JOB",
            repository_origin=RepositoryPythonOrigin(
                executable_path="python",
                code_pointer=FileCodePointer("/opt/krea/definitions.py", "defs"),
                container_image=image,
                container_context=container_context,
            ),
        ),
    )
    launcher = launcher_of(values, folder)
    context = launcher.get_container_context_for_run(run)
    job = construct_dagster_k8s_job(
        job_config=context.get_k8s_job_config(job_image=image, run_launcher=launcher),
        args=["dagster", "api", "execute_run"],
        job_name="dagster-run-1",
        component="run_worker",
        user_defined_k8s_config=context.run_k8s_config,
    )
    sent: dict[str, Any] = ApiClient().sanitize_for_serialization(job)
    return sent


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda one: f"{one['kind']} {one['metadata']}")
def test_a_shipped_manifest_is_valid(manifest: dict[str, Any]) -> None:
    assert kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_the_job_of_a_run_is_valid_and_has_what_the_values_say(tmp_path: Path) -> None:
    job = job_of(VALUES, tmp_path)
    assert kubernetes_validate.validate(job, KUBERNETES, strict=True)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == "registry.example.com/krea:1"
    assert {"secretRef": {"name": "krea"}} in container["envFrom"]
    assert {"configMapRef": {"name": "krea"}} in container["envFrom"]
    assert container["resources"]["limits"] == {"memory": "1Gi"}
    assert "temporary" in [one["name"] for one in container["volumeMounts"]]
    assert {"name": "temporary", "emptyDir": {"sizeLimit": "2Gi"}} in pod["volumes"]
    assert (pod["terminationGracePeriodSeconds"], job["spec"]["backoffLimit"]) == (60, 0)


def test_a_misspelt_field_is_refused(tmp_path: Path) -> None:
    job = job_of(VALUES, tmp_path)
    job["spec"]["template"]["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, KUBERNETES, strict=True)


def test_the_variables_describe_a_code_location(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        name: value
        for one in MANIFESTS
        for name, value in {**one.get("data", {}), **one.get("stringData", {})}.items()
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    graph = definitions_from_environment(given).resolve_asset_graph()
    images = graph.get(next(key for key in graph.get_all_asset_keys() if key.path == ["images"]))
    assert images.backfill_policy is not None
    assert images.backfill_policy.max_partitions_per_run == 2
    assert images.partitions_def is not None
    assert len(images.partitions_def.get_partition_keys()) == 64
