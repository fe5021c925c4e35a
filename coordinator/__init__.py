"""Where decisions are made and shown: fleet, plans, artifacts, requests, screens."""
