"""Floor 5. Build and push SOCI indexes."""
