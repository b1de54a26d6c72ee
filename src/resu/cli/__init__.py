"""The command ``resu``: one file per subcommand."""
