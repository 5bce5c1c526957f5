"""Floor 4. The FUSE loop for flat files, EROFS mounts, the keeper of the FUSE descriptor."""
