"""The commands of `edgelam`, one file each; coordinator.cli puts them together."""
