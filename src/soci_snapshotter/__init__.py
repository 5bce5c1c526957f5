"""A containerd snapshotter that mounts unmodified OCI layers before their bytes are here."""

__version__ = "0.1.0"
