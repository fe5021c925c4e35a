"""What a board measured itself to be: readings, timings, and the conditions they were taken under."""
