"""Tells what is asked and answered: metrics, a log of requests, and traces."""
