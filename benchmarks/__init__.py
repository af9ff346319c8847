"""One runnable file per claim; each prints its figures as one JSON line last.

Not part of the installed package. May import both sides, which never import each other.
"""
