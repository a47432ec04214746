"""Warnings about the spend, posted once each by e-mail and to a webhook.

``python examples/spend_alerts/definitions.py``. ``play`` does by hand what Dagster's daemon does
where it runs: the schedule of ``krea_spend``, and the ticks of the sensors.
"""

import json
import os
import smtplib
import urllib.request
from email.message import EmailMessage
from pathlib import Path

import dagster as dg
import pandas as pd

from krea_dagster import KreaResource, SpendWarning, build_krea_definitions, build_spend_alerts

FOLDER = Path(os.environ.get("EXAMPLE_FOLDER", "data/examples/spend_alerts")).absolute()
QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
SOFT_BUDGETS = ["day=0.5"]


class MailServer(dg.ConfigurableResource):  # type: ignore[type-arg]
    """Where e-mails go; printed without an address."""

    address: str = ""

    def send(self, message: EmailMessage) -> None:
        """Send a message, or raise an error."""
        if not self.address:
            print(message["Subject"])
            return
        host, port = self.address.rsplit(":", 1)
        with smtplib.SMTP(host, int(port), timeout=10) as server:
            server.send_message(message)


def mail(warning: SpendWarning, mail_server: MailServer) -> None:
    """Send a warning by e-mail. If this raises an error, the next tick calls it again."""
    message = EmailMessage()
    message["Subject"] = f"Spend: {warning.text}"
    message["From"], message["To"] = "dagster@example.com", "finance@example.com"
    message.set_content(f"{warning.text}\n\n{warning.advice}\n\n{warning.warning_id}")
    mail_server.send(message)


def call_webhook(warning: SpendWarning) -> None:
    """Send a warning as JSON, as incoming webhooks of chats take it."""
    body = {
        "text": warning.text,
        "level": warning.level.value,
        "credits": str(warning.credits),
        "days": [f"{warning.since}", f"{warning.until}"],
        "id": warning.warning_id,
    }
    url = os.environ.get("WEBHOOK_URL")
    if not url:
        print(json.dumps(body))
        return
    request = urllib.request.Request(  # noqa: S310
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=10).close()  # noqa: S310


images = build_krea_definitions(
    prompts=str(FOLDER / "prompts.parquet"),
    partition_by="hash:1",
    krea=KreaResource(emulator=True, storage=str(FOLDER / "krea")),
    soft_budgets=SOFT_BUDGETS,
    spend_schedule="0 7 * * *",
)
alerts = dg.Definitions(
    sensors=[
        build_spend_alerts(
            mail,
            name="mail_alerts",
            required_resource_keys={"mail_server"},
            soft_budgets=SOFT_BUDGETS,
        ),
        build_spend_alerts(call_webhook, name="webhook_alerts", soft_budgets=SOFT_BUDGETS),
    ],
    resources={"mail_server": MailServer(address=os.environ.get("MAIL_SERVER", ""))},
)
defs = dg.Definitions.merge(images, alerts)


def play() -> None:
    """Buy two images, update the spend tables, and let each sensor look twice."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    pd.DataFrame({"prompt": ["a tram in the rain", "a kite"]}).to_parquet(
        FOLDER / "prompts.parquet"
    )
    with dg.DagsterInstance.local_temp() as instance:
        for job, partition in (("krea_images", "bucket-000"), ("krea_spend", None)):
            defs.resolve_job_def(job).execute_in_process(
                instance=instance, partition_key=partition, run_config=QUIET
            )
        for name in ("mail_alerts", "webhook_alerts") * 2:
            context = dg.build_sensor_context(
                instance, resources=defs.resources, repository_def=defs.get_repository_def()
            )
            looked = defs.resolve_sensor_def(name).evaluate_tick(context)
            print(f"{name}: {looked.skip_message}")


if __name__ == "__main__":
    play()
