"""`hallmark privacy ...`: keys that content is sealed by."""

import typer

privacy = typer.Typer(help="What is kept of what people said: keys that seal it.", no_args_is_help=True)


@privacy.command("new-key")
def make_key() -> None:
    """Make a master key and print it: for HALLMARK_PRIVACY_MASTER_KEY_FILE, above the keys that are there."""
    from app.privacy.sealing import new_key  # A cryptographic library that no other command needs.

    typer.echo(new_key())
