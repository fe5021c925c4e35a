"""`python -m agent` is `edgelam-agent`."""

import sys

from agent.cli import main

sys.exit(main())
