"""Floor 2. Thin shells over the kernel and the inflate libraries."""
