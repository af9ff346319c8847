"""How many positions of a long prompt travel in one step, unless the user says.

Chunks follow each other through the layers: while the cloud runs one, the next is on its way. Shorter ones
hide more of the link and cost more calls. Knows nothing about links: what a chunk holds must not depend on
how long something took, or the same prompt would be added up in another order each time.
"""

from shared.plan import Plan

CHUNK_TOKENS = 512  # where a chunk's exchanges cost more than its length
ONE_TRIP_CHUNK_TOKENS = 256  # where a chunk waits for nothing but its own way up


def prefill_chunk_tokens(plan: Plan) -> int:
    """Return the most positions that a step of ``plan`` holds (count)."""
    return ONE_TRIP_CHUNK_TOKENS if plan.round_trips == 1 else CHUNK_TOKENS
