"""Serves pools as their users do."""
