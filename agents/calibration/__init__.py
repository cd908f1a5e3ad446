"""Turns a policy's score into a setting whose loss is bounded, and writes the certificate."""
