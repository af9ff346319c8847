"""What both sides must agree on: plan, wire codec, A and B, fingerprints, adapters, model sources.

Imports neither ``cloud_server`` nor ``edge_client``.
"""

__version__ = "0.1.0"
PROTOCOL_VERSION = 1
