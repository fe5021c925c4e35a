"""The program on every board: a small supervisor and its worker processes."""
