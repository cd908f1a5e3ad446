"""What tests of releases share."""
