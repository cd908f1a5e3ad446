"""Reads the files that deploy/ ships."""
