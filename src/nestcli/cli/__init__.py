"""The `nest` command line, built with Typer: one thin module per subcommand.

A command reads its options and configuration, calls its room (`nestcli.training`, `nestcli.prepare`, ...), and prints
the result: tables and logs for people, or one JSON document with --json. `console.py` does all the printing.
Start with `app.py`, which registers the commands and turns exceptions into messages and exit codes.
"""
