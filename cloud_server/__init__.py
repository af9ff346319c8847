"""The cloud: frozen decoder layers, A and B, and the KV cache. No tokens, no text, no M, no labels."""
