"""Puts it to use: command line, HTTP contract, Ray Serve pool, demo. Import from its modules."""
