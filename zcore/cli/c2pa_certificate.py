"""`zimage c2pa-certificate`: make a certificate to try the signing of images with.

Readers show its signatures as valid but by an unknown signer. Needs no torch.
"""

import argparse

from zcore.cli.parser import Commands
from zcore.cli.setting_flags import add_setting_flags, chosen_settings
from zcore.errors import ConfigurationError
from zcore.image_files.signing_certificate import (
    CERTIFICATE_SETTING,
    KEY_SETTING,
    LONGEST_ORGANIZATION_BYTES,
    TRIAL_DAYS,
    make_trial_certificate,
)

DESCRIPTION = f"""\
Make a certificate chain and a private key to try Content Credentials (C2PA) with, in the folder of the installation's
keys, and print the settings that sign every image with them. Valid for {TRIAL_DAYS} days. Readers show the signature as
valid, and the signer as unknown; for the public, get a certificate from an authority on C2PA's trust list.

  zimage c2pa-certificate
  zimage c2pa-certificate --organization "Example Ltd" """


def add_to(commands: Commands) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser(
        "c2pa-certificate",
        usage="zimage c2pa-certificate [FLAGS]",
        help="make a certificate to try signing images",
        description=DESCRIPTION,
    )
    parser.add_argument(
        "--organization", metavar="NAME", default="Z-Image", help="Name of the signer. (default Z-Image)"
    )
    add_setting_flags(parser, ())
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Write the files and print the settings. Raises `ConfigurationError`."""
    if not 1 <= len(arguments.organization.encode()) <= LONGEST_ORGANIZATION_BYTES:
        raise ConfigurationError(f"--organization: must be text of 1 to {LONGEST_ORGANIZATION_BYTES} bytes in UTF-8")
    settings = chosen_settings(arguments).settings
    certificate, key, root = make_trial_certificate(settings.data_path / "keys" / "c2pa", arguments.organization)
    print(f"{CERTIFICATE_SETTING}={certificate}\n{KEY_SETTING}={key}\n# for readers: {root}")
    return 0
