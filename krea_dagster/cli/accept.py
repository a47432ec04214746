"""The commands ``accept root``, ``accept key`` and ``accept price``: a person's decisions."""

from __future__ import annotations

import click

from krea_dagster.cli.options import open_krea, project_options


@click.group("accept")
def accept_group() -> None:
    """Accept what a run stopped for: a storage root, an API key, a price."""


@accept_group.command("root")
@project_options
def accept_root_command() -> None:
    """Accept the storage root as it is.

    After a run said that the root is empty, older or newer than the journal, or another journal's.
    Missing images are fetched again while their links are valid; images that the journal does not
    know are adopted, and their charge stays unknown. Buys nothing.
    """
    click.echo(open_krea().accept_root())


@accept_group.command("key")
@project_options
@click.option(
    "--same-as",
    default="",
    metavar="FINGERPRINT",
    help="A key of the same account, if the journal has keys of several accounts.",
)
def accept_key_command(same_as: str) -> None:
    """Declare that EVOLINK_API_KEY belongs to the account of the journal's purchases.

    For a key that was rotated: otherwise purchases made with the old key are neither repeated nor
    given up. Buys nothing.
    """
    click.echo(open_krea().accept_key(same_as))


@accept_group.command("price")
@project_options
@click.argument("quality", type=click.Choice(["1K", "2K"]))
@click.option("--dismiss", is_flag=True, help="Treat the price as a mistake.")
def accept_price_command(quality: str, *, dismiss: bool) -> None:
    """Accept the price of a quality that was far from the expected one.

    Settles the charges of the purchases at that price; caps then use it. Buys nothing.
    """
    click.echo(open_krea().accept_price(quality, dismiss=dismiss))
