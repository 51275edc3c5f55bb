"""From meta JSON to a store: what is read, judged, counted and kept."""
