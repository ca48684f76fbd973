"""The command line: one sub-command, one module, imported when used."""
