"""The one place where the version stands."""

VERSION = "0.1.0"
PROTOCOL = 1
"""Version of topics, control messages and frames; level 2 of every topic and byte 3 of every frame."""
