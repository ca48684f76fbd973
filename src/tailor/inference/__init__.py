"""Answers: one protocol for every source; batched generation with a KV cache, slots mixed freely."""
