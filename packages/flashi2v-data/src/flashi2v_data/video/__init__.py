"""Video files: what they say, their frames, and how they are written."""
