"""Real containerds, registries and daemons in scratch directories, for tests, demo and bench."""
