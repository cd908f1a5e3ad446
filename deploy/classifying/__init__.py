"""Serves a pool that classifies: its route over HTTP, and its workers."""
