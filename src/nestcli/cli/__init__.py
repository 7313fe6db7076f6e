"""The `nest` command: one thin module a subcommand."""
