"""Floor 7. The soci command, one file per subcommand."""
