"""Floor 3. A client of containerd's services; the generated stubs are private to here and the daemon."""
