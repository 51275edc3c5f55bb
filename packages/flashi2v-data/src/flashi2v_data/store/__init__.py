"""Records and features on disk."""
