"""Everything both sides of the network must agree on: topics, messages, frames, flow control, transport, discovery.

Knows no model and no hardware. Nothing here decides; it carries.
"""
