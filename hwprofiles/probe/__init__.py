"""One reader per source. Each takes a `root`, so that a recorded tree is read as a live one, and gives
Reading | Absent | Failed: a board without a sensor and a sensor that can't be read are two things, and neither is 0.

Only `files` opens paths and only `commands` runs programs.
"""
