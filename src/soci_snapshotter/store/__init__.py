"""Floor 3. What is on our own disk: sqlite metadata, content by digest, layer files."""
