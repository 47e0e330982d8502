"""The engine that every system runs on; it knows no system by name."""
