"""The Ray Serve pool, its settings and its Redis."""
