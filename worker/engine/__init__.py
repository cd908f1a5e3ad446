"""The engine: requests join and leave between launches; scripts and services run it."""
