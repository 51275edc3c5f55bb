"""Releases of the packages, one at a time: `nox -s release -- flashi2v-data 0.2.0`. CONTRIBUTING.md says how."""
