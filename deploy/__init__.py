"""Command line, HTTP contract, Ray Serve pool and demo. Import from its modules."""
