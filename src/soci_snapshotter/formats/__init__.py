"""Floor 0. Bytes <-> values, pure: no I/O, no clock, no threads."""
