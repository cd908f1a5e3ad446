"""What decoding costs, as environments charge it."""
