"""Looks at everything between this edge and a cloud, one thing after the other, and says what to mend."""
