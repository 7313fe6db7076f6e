"""`python -m nestcli` is `nest`."""

from nestcli.cli.app import main

main()
