"""Floor 5. Open a lazy layer, fill it span by span, answer reads from it."""
