"""Floor 1. Decisions as pure functions that return a value; somebody else carries it out."""
