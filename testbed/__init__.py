"""Virtual boards on one machine: real agents with emulated speed, memory and links."""
