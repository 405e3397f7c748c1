"""The command `nbdshard`: one module a subcommand, imported only when it is asked for."""
